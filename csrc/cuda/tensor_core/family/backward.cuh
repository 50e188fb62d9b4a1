// The tensor-core path's family of backward kernels. Host code.
#pragma once

#include "cuda/tensor_core/family/launch.cuh"
#include "cuda/tensor_core/grad_kv.cuh"
#include "cuda/tensor_core/grad_q.cuh"
#include "cuda/tensor_core/polynomial/grad_kv.cuh"
#include "cuda/tensor_core/polynomial/grad_q.cuh"
#include "cuda/tensor_core/wide_grad_kv.cuh"
#include "cuda/tensor_core/wide_grad_q.cuh"

namespace rebased::REBASED_BACKEND {

namespace tensor_core {

inline BackwardBuffers make_buffers(const Call<BackwardProblem>& call) {
  const auto region = [&](const Region& place) { return call.region<float>(place); };
  const Workspace& workspace = call.workspace;
  float* const initial_sums = region(workspace.initial_sums);
  return {region(workspace.delta),
          region(workspace.query_gradient),
          region(workspace.key_gradient),
          region(workspace.query_affine),
          region(workspace.key_affine),
          initial_sums ? initial_sums : static_cast<float*>(call.problem.grad_initial_state.k)};
}

// The kernels of the sweeps, and how much dynamic shared memory each of them needs.
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

// What the reverse sweeps are given. `all_segments`: see Launch.
template <class S>
Arguments<BackwardProblem> reverse_arguments(const Call<BackwardProblem>& call, bool all_segments = false) {
  const bool scanned = !all_segments && needs_scan<S>(call.segments, call.problem.grad_final_state);
  return {call, call.region<float>(call.workspace.reverse_states), scanned, all_segments};
}

// Queues what leaves each segment's own sums of the reverse state in the workspace.
template <class T, class S>
void add_reverse_sums(const Call<BackwardProblem>& call, bool all_segments, Launches* launches) {
  launches->add(Sweeps<T, S>::reverse_segment, sweep_grid(call.problem, call.segments), S::threads,
                Sweeps<T, S>::reverse_segment_bytes, reverse_arguments<S>(call, all_segments));
}

namespace polynomial {

// What the reverse sweeps are given. `all_segments`: see Launch.
inline Arguments<BackwardProblem> reverse_arguments(const Call<BackwardProblem>& call, bool all_segments) {
  const bool scanned = !all_segments && needs_scan(call.segments, call.problem.grad_final_state);
  return {call, call.region<float>(call.workspace.reverse_states), scanned, all_segments};
}

// Queues what leaves each segment's own sums of the reverse state in the workspace. delta / r must be there.
template <class T, FeatureMap map, int feature_dim>
void add_reverse_sums(const Call<BackwardProblem>& call, bool all_segments, Launches* launches) {
  visit_shape<map, feature_dim>(call, [&](auto shape, auto) {
    using S = decltype(shape);
    launches->add(reverse_segment_kernel<T, S>, sweep_grid(call.problem, call.segments), threads,
                  reverse_segment_bytes<S>(call.problem.group_size()), reverse_arguments(call, all_segments),
                  call.region<const float>(call.workspace.delta));
  });
}

// Queues the sweep that makes grad q, and leaves delta / r of each column group.
template <class T, FeatureMap map, int feature_dim>
void add_grad_q(const Call<BackwardProblem>& call, Launches* launches) {
  visit_shape<map, feature_dim>(call, [&](auto shape, auto grouped) {
    using S = decltype(shape);
    const Arguments<BackwardProblem> arguments(call, call.region<float>(call.workspace.states),
                                               needs_scan(call.segments, call.problem.initial_state));
    launches->add(grad_q_kernel<T, S, decltype(grouped)::value>, sweep_grid(call.problem, call.segments),
                  threads, GradQTiles<S>::bytes(call.problem.group_size()), arguments, make_buffers(call));
  });
}

// Queues the sweep that makes grad k and grad v.
template <class T, FeatureMap map, int feature_dim>
void add_grad_kv(const Call<BackwardProblem>& call, Launches* launches) {
  visit_shape<map, feature_dim>(call, [&](auto shape, auto grouped) {
    using S = decltype(shape);
    launches->add(grad_kv_kernel<T, S, decltype(grouped)::value>, sweep_grid(call.problem, call.segments),
                  threads, GradKvTiles<S>::bytes(call.problem.group_size()), reverse_arguments(call, false),
                  make_buffers(call));
  });
}

template <class T, FeatureMap map, int feature_dim>
Family<BackwardProblem> backward_family() {
  using AnyCall = const Call<BackwardProblem>&;
  using StateSlot = Slot<map, feature_dim>;
  return {[](AnyCall call, Launches* launches) { add_states<T, map, feature_dim>(call, launches); },
          [](AnyCall call, Launches* launches) {
            if (call.segments > 1) add_reverse_sums<T, map, feature_dim>(call, false, launches);
            add_scan<StateSlot>(call, call.workspace.reverse_states, call.problem.grad_final_state, true,
                                launches);
          },
          [](AnyCall call, Launches* launches) { add_grad_q<T, map, feature_dim>(call, launches); },
          [](AnyCall call, Launches* launches) { add_grad_kv<T, map, feature_dim>(call, launches); },
          [](AnyCall call, Launches* launches) {
            add_reverse_sums<T, map, feature_dim>(call, true, launches);
            add_slot_sums<StateSlot>(call, call.workspace.reverse_states, call.problem.grad_initial_state,
                                     true, launches);
          },
          Deltas::from_grad_q};
}

}  // namespace polynomial

}  // namespace tensor_core

template <FeatureMap map, int feature_dim>
Family<BackwardProblem> tensor_core_family(const BackwardProblem&) {
  using namespace tensor_core;
  using T = bfloat16_t;
  using AnyCall = const Call<BackwardProblem>&;
  if constexpr (is_polynomial(map) && feature_dim <= 16) {
    return polynomial::backward_family<T, map, feature_dim>();
  } else {
    using S = Slabs<map, feature_dim>;
    return {[](AnyCall call, Launches* launches) { add_states<T, S>(call, launches); },
            [](AnyCall call, Launches* launches) {
              if (call.segments > 1) add_reverse_sums<T, S>(call, false, launches);
              add_scan<S>(call, call.workspace.reverse_states, call.problem.grad_final_state, true, launches);
            },
            [](AnyCall call, Launches* launches) {
              const int64_t group_size = call.problem.group_size();
              launches->add(Sweeps<T, S>::grad_q(group_size > 1), sweep_grid(call.problem, call.segments),
                            S::threads, Sweeps<T, S>::grad_q_bytes(group_size), sweep_arguments<S>(call),
                            make_buffers(call));
            },
            [](AnyCall call, Launches* launches) {
              const bool grouped = call.problem.group_size() > 1;
              launches->add(Sweeps<T, S>::grad_kv(grouped), sweep_grid(call.problem, call.segments),
                            S::threads, Sweeps<T, S>::grad_kv_bytes(grouped), reverse_arguments<S>(call),
                            make_buffers(call));
            },
            [](AnyCall call, Launches* launches) {
              add_reverse_sums<T, S>(call, true, launches);
              add_slot_sums<S>(call, call.workspace.reverse_states, call.problem.grad_initial_state, true,
                               launches);
            },
            Deltas::from_grad_kv};
  }
}

}  // namespace rebased::REBASED_BACKEND
