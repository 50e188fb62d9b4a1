// Host side of the tensor-core backward for one element type, map and feature dim: workspace, and which
// kernels run in which order.
#pragma once

#include "cuda/layer_norm.cuh"
#include "cuda/tensor_core_finish.cuh"
#include "cuda/tensor_core_grad_kv.cuh"
#include "cuda/tensor_core_grad_q.cuh"
#include "cuda/tensor_core_launch.cuh"
#include "cuda/tensor_core_wide_grad_kv.cuh"
#include "cuda/tensor_core_wide_grad_q.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

struct BackwardWorkspace {
  float *slots, *reverse_slots;
  BackwardBuffers buffers;
  int64_t bytes;
};

// Where things lie from `workspace` on; absent ones are null. With a null workspace only `bytes` means
// something.
inline BackwardWorkspace backward_workspace(const BackwardProblem& problem, int segments, void* workspace) {
  const int64_t groups = column_groups(problem), states = problem.num_sequences * problem.kv_heads;
  const int64_t rows = problem.batch * problem.seqlen, feature_dim = problem.feature_dim;
  const bool partial = groups > 1 || problem.layer_norm == LayerNorm::token;
  const int64_t slots = slot_count(problem, segments) * slot_floats(problem);
  BackwardWorkspace result{};
  const auto take = [&](bool present, int64_t floats) {
    if (!present) return static_cast<float*>(nullptr);
    const int64_t offset = result.bytes;
    result.bytes += (floats * 4 + 63) / 64 * 64;
    return workspace ? reinterpret_cast<float*>(static_cast<char*>(workspace) + offset) : nullptr;
  };
  const auto has_affine = [](const AffineGradient& gradient) { return gradient.gamma || gradient.beta; };
  const bool queries = problem.wants_queries(), keys = problem.wants_keys();
  result.slots = take(queries && (segments > 1 || problem.initial_state.kv), slots);
  result.reverse_slots = take(
      problem.part == BackwardPart::reverse_state || (keys && (segments > 1 || problem.grad_final_state.kv)),
      slots);
  BackwardBuffers& buffers = result.buffers;
  buffers.delta = take(queries || keys, groups * rows * problem.heads);
  buffers.query_gradient = take(partial && queries, groups * rows * problem.heads * feature_dim);
  buffers.key_gradient = take(partial && keys, groups * rows * problem.kv_heads * feature_dim);
  const int64_t blocks = problem.num_sequences * segments * groups;
  buffers.query_affine =
      take(has_affine(problem.grad_query_affine), blocks * problem.heads * 2 * feature_dim);
  buffers.key_affine = take(has_affine(problem.grad_key_affine), blocks * problem.kv_heads * 2 * feature_dim);
  buffers.initial_sums = take(problem.grad_initial_state.kv && groups > 1,
                              groups * states * num_features(problem.feature_map, feature_dim));
  if (!buffers.initial_sums) buffers.initial_sums = static_cast<float*>(problem.grad_initial_state.k);
  return result;
}

// From the partial gradients of q' or k' to grad q or grad k.
template <class T, class S>
const char* launch_finish(const BackwardProblem& problem, const Launch& launch, float* partial,
                          const ConstRows& x, const Affine& affine, const float* statistics,
                          const MutableRows& grad_x, int64_t heads, void* stream) {
  const int64_t tokens = problem.batch * problem.seqlen, rows = tokens * heads;
  const char* error = "";
  const int groups = static_cast<int>(column_groups(problem));
  if (groups > 1) {
    error = LAUNCH((finish_gradient_kernel<T, S::feature_dim>),
                   dim3(static_cast<unsigned>((rows + finish_threads - 1) / finish_threads)),
                   dim3(finish_threads), 0, stream, partial, groups, x, affine, grad_x, heads, rows,
                   problem.seqlen, problem.layer_norm, problem.layer_norm_eps, launch.bounds,
                   problem.num_sequences);
  }
  if (*error || problem.layer_norm != LayerNorm::token) return error;
  return LAUNCH(token_norm_backward<T>,
                dim3(static_cast<unsigned>((tokens + rows_per_block - 1) / rows_per_block)),
                dim3(row_threads), 0, stream, x, affine, statistics, partial, grad_x, heads, tokens,
                problem.seqlen, S::feature_dim, launch.bounds, problem.num_sequences);
}

// grad gamma and grad beta from the blocks' sums.
inline const char* launch_affine_sums(const BackwardProblem& problem, int segments, const float* sums,
                                      int64_t heads, const Affine& affine, const AffineGradient& gradient,
                                      void* stream) {
  const auto sum = [&](int which, int64_t head_stride, void* target) {
    if (!target) return "";
    return LAUNCH(sum_affine_gradients<float>, dim3(static_cast<unsigned>(head_stride ? heads : 1)),
                  dim3(affine_threads), 0, stream, sums, problem.num_sequences, heads,
                  segments * column_groups(problem), static_cast<int>(problem.feature_dim), which,
                  head_stride, static_cast<float*>(target));
  };
  const char* error = sum(0, affine.gamma_head_stride, gradient.gamma);
  return *error ? error : sum(1, affine.beta_head_stride, gradient.beta);
}

// The kernels of the sweeps, and the dynamic shared memory that they want.
template <class T, class S>
struct Sweeps {
  static constexpr auto reverse_segment = &reverse_segment_kernel<T, S>;
  static constexpr int64_t reverse_segment_bytes = 0;
  static auto grad_kv(bool grouped) {
    return grouped ? &grad_kv_kernel<T, S, true> : &grad_kv_kernel<T, S, false>;
  }
  static auto grad_q(bool grouped) {
    return grouped ? &grad_q_kernel<T, S, true> : &grad_q_kernel<T, S, false>;
  }
  static int64_t grad_kv_bytes(bool grouped) { return SweepTiles<T, S>::bytes(true, grouped); }
  static int64_t grad_q_bytes(int64_t group_size) {
    return SweepTiles<T, S>::bytes(false, false) + group_size * warps * S::affine_size * 4;
  }
};
template <class T>
struct Sweeps<T, Wide> {
  static constexpr auto reverse_segment = &wide_reverse_segment_kernel<T>;
  static constexpr int64_t reverse_segment_bytes =
      2 * WideSweepTiles<T>::value_tile * static_cast<int64_t>(sizeof(T));
  static auto grad_kv(bool) { return &wide_grad_kv_kernel<T>; }
  static auto grad_q(bool) { return &wide_grad_q_kernel<T>; }
  static int64_t grad_kv_bytes(bool grouped) { return WideSweepTiles<T>::bytes(true, grouped); }
  static int64_t grad_q_bytes(int64_t group_size) {
    return WideSweepTiles<T>::bytes(false, false) + group_size * warps * Wide::affine_size * 4;
  }
};

// Launches one after the other, up to the first that fails.
struct Sequence {
  const char* error = "";
  template <class Next>
  void then(const Next& launch_next) {
    if (!*error) error = launch_next();
  }
};

// grad k and grad v, delta for the queries' half, and what of the initial state's gradient a block has.
template <class T, class S>
void add_keys(const BackwardProblem& problem, const Launch& launch, const BackwardWorkspace& workspace,
              void* stream, Sequence* sequence) {
  const bool grouped = problem.group_size() > 1;
  const bool scan = workspace.reverse_slots && needs_scan<S>(launch, problem.grad_final_state);
  const Arguments<BackwardProblem> arguments(problem, launch, workspace.reverse_slots, scan);
  const dim3 grid = sweep_grid(problem, launch.segments), block(S::threads);
  if (launch.segments > 1) {
    sequence->then([&] {
      return LAUNCH((Sweeps<T, S>::reverse_segment), grid, block,
                    static_cast<size_t>(Sweeps<T, S>::reverse_segment_bytes), stream, arguments);
    });
  }
  if (scan) {
    sequence->then([&] {
      return launch_scan<S>(problem, workspace.reverse_slots, launch.segments, problem.grad_final_state, true,
                            stream);
    });
  }
  sequence->then([&] {
    return LAUNCH((Sweeps<T, S>::grad_kv(grouped)), grid, block,
                  static_cast<size_t>(Sweeps<T, S>::grad_kv_bytes(grouped)), stream, arguments,
                  workspace.buffers);
  });
}

// grad q; without the keys' half before it, delta first.
template <class T, class S>
void add_queries(const BackwardProblem& problem, const Launch& launch, const BackwardWorkspace& workspace,
                 void* stream, Sequence* sequence) {
  const int64_t group_size = problem.group_size(), rows = problem.batch * problem.heads * problem.seqlen;
  if (!problem.wants_keys()) {
    sequence->then([&] {
      return LAUNCH(row_delta_kernel<T>,
                    dim3(static_cast<unsigned>((rows + delta_rows - 1) / delta_rows),
                         static_cast<unsigned>(column_groups(problem))),
                    dim3(32 * delta_rows), 0, stream, problem.y, problem.grad_y, workspace.buffers.delta,
                    rows, problem.heads, problem.seqlen, problem.head_dim, problem.normalize);
    });
  }
  sequence->then([&] {
    return launch_segment_states<T, S>(problem, launch, problem.initial_state, workspace.slots, stream);
  });
  sequence->then([&] {
    const Arguments<BackwardProblem> arguments(problem, launch, workspace.slots,
                                               needs_scan<S>(launch, problem.initial_state));
    return LAUNCH((Sweeps<T, S>::grad_q(group_size > 1)), sweep_grid(problem, launch.segments),
                  dim3(S::threads), static_cast<size_t>(Sweeps<T, S>::grad_q_bytes(group_size)), stream,
                  arguments, workspace.buffers);
  });
}

template <class T, class S>
const char* launch_reverse_state(const BackwardProblem& problem, Launch launch, float* slots, void* stream) {
  launch.all_segments = true;
  const char* const error = LAUNCH((Sweeps<T, S>::reverse_segment), sweep_grid(problem, launch.segments),
                                   dim3(S::threads), static_cast<size_t>(Sweeps<T, S>::reverse_segment_bytes),
                                   stream, Arguments<BackwardProblem>(problem, launch, slots, false));
  if (*error) return error;
  return launch_slot_sums<S>(problem, slots, launch.segments, problem.grad_initial_state, true, stream);
}

template <class T, class S>
const char* launch_backward(const BackwardProblem& problem, const Launch& launch, void* stream) {
  const BackwardWorkspace workspace = backward_workspace(problem, launch.segments, launch.workspace);
  const BackwardBuffers& buffers = workspace.buffers;
  if (problem.part == BackwardPart::reverse_state) {
    return launch_reverse_state<T, S>(problem, launch, workspace.reverse_slots, stream);
  }
  Sequence sequence;
  if (problem.wants_keys()) add_keys<T, S>(problem, launch, workspace, stream, &sequence);
  if (problem.wants_queries()) add_queries<T, S>(problem, launch, workspace, stream, &sequence);
  if (buffers.query_gradient) {
    sequence.then([&] {
      return launch_finish<T, S>(problem, launch, buffers.query_gradient, problem.q, problem.query_affine,
                                 launch.query_statistics, problem.grad_q, problem.heads, stream);
    });
  }
  if (buffers.key_gradient) {
    sequence.then([&] {
      return launch_finish<T, S>(problem, launch, buffers.key_gradient, problem.k, problem.key_affine,
                                 launch.key_statistics, problem.grad_k, problem.kv_heads, stream);
    });
  }
  if (buffers.query_affine) {
    sequence.then([&] {
      return launch_affine_sums(problem, launch.segments, buffers.query_affine, problem.heads,
                                problem.query_affine, problem.grad_query_affine, stream);
    });
  }
  if (buffers.key_affine) {
    sequence.then([&] {
      return launch_affine_sums(problem, launch.segments, buffers.key_affine, problem.kv_heads,
                                problem.key_affine, problem.grad_key_affine, stream);
    });
  }
  if (problem.grad_initial_state.kv && column_groups(problem) > 1) {
    sequence.then([&] {
      const int64_t count = problem.num_sequences * problem.kv_heads * S::public_features;
      return LAUNCH(sum_groups_kernel<float>,
                    dim3(static_cast<unsigned>((count + finish_threads - 1) / finish_threads)),
                    dim3(finish_threads), 0, stream, buffers.initial_sums, column_groups(problem), count,
                    static_cast<float*>(problem.grad_initial_state.k));
    });
  }
  return sequence.error;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
