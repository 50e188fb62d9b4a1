// Host side of the tensor-core backward for one element type, map and feature dim: workspace, and which
// kernels run in which order.
#pragma once

#include "cuda/shared/affine.cuh"
#include "cuda/shared/column_groups.cuh"
#include "cuda/shared/delta.cuh"
#include "cuda/shared/token_norm.cuh"
#include "cuda/tensor_core/grad_kv.cuh"
#include "cuda/tensor_core/grad_q.cuh"
#include "cuda/tensor_core/launch.cuh"
#include "cuda/tensor_core/wide_grad_kv.cuh"
#include "cuda/tensor_core/wide_grad_q.cuh"

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

// grad k and grad v, delta for the queries' half, and what of the initial state's gradient a block has.
template <class T, class S>
void add_keys(const BackwardProblem& problem, const Launch& launch, const BackwardWorkspace& workspace,
              Launches* launches) {
  const bool grouped = problem.group_size() > 1;
  const bool scan = workspace.reverse_slots && needs_scan<S>(launch, problem.grad_final_state);
  const Arguments<BackwardProblem> arguments(problem, launch, workspace.reverse_slots, scan);
  const dim3 grid = sweep_grid(problem, launch.segments);
  if (launch.segments > 1) {
    launches->add(Sweeps<T, S>::reverse_segment, grid, S::threads, Sweeps<T, S>::reverse_segment_bytes,
                  arguments);
  }
  if (scan) {
    launches->add([&](void* stream) {
      return launch_scan<S>(problem, workspace.reverse_slots, launch.segments, problem.grad_final_state, true,
                            stream);
    });
  }
  launches->add(Sweeps<T, S>::grad_kv(grouped), grid, S::threads, Sweeps<T, S>::grad_kv_bytes(grouped),
                arguments, workspace.buffers);
}

// grad q; without the keys' half before it, delta first.
template <class T, class S>
void add_queries(const BackwardProblem& problem, const Launch& launch, const BackwardWorkspace& workspace,
                 Launches* launches) {
  const int64_t group_size = problem.group_size(), rows = problem.batch * problem.heads * problem.seqlen;
  if (!problem.wants_keys()) {
    launches->add(row_deltas<T>,
                  dim3(static_cast<unsigned>(divide_up(rows, rows_per_block)),
                       static_cast<unsigned>(column_groups(problem))),
                  row_threads, 0, problem.y, problem.grad_y, static_cast<const float*>(nullptr),
                  workspace.buffers.delta, rows, problem.heads, problem.seqlen, columns,
                  problem.normalize ? static_cast<int>(problem.head_dim) : 0);
  }
  launches->add([&](void* stream) {
    return launch_segment_states<T, S>(problem, launch, problem.initial_state, workspace.slots, stream);
  });
  const Arguments<BackwardProblem> arguments(problem, launch, workspace.slots,
                                             needs_scan<S>(launch, problem.initial_state));
  launches->add(Sweeps<T, S>::grad_q(group_size > 1), sweep_grid(problem, launch.segments), S::threads,
                Sweeps<T, S>::grad_q_bytes(group_size), arguments, workspace.buffers);
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
  Launches launches(stream);
  if (problem.wants_keys()) add_keys<T, S>(problem, launch, workspace, &launches);
  if (problem.wants_queries()) add_queries<T, S>(problem, launch, workspace, &launches);
  add_finish<T>(problem, buffers.query_gradient, problem.q, problem.query_affine, problem.grad_q,
                problem.heads, launch.bounds, &launches);
  add_finish<T>(problem, buffers.key_gradient, problem.k, problem.key_affine, problem.grad_k,
                problem.kv_heads, launch.bounds, &launches);
  if (problem.layer_norm == LayerNorm::token) {
    add_token_norm_backward<T>(problem, launch.query_statistics, launch.key_statistics,
                               buffers.query_gradient, buffers.key_gradient, launch.bounds, &launches);
  }
  add_affine_sums<float>(problem, launch.segments * column_groups(problem), buffers.query_affine,
                         buffers.key_affine, &launches);
  if (problem.grad_initial_state.kv && column_groups(problem) > 1) {
    const int64_t count = problem.num_sequences * problem.kv_heads * S::public_features;
    launches.add(sum_groups<float>, divide_up(count, finish_threads), finish_threads, 0, buffers.initial_sums,
                 static_cast<int>(column_groups(problem)), count,
                 static_cast<float*>(problem.grad_initial_state.k));
  }
  return launches.error();
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
