// The general path's family of kernels: one block per (sequence, kv head, segment). Host code.
#pragma once

#include "cuda/general/backward.cuh"
#include "cuda/general/forward.cuh"
#include "cuda/general/states.cuh"
#include "cuda/shared/family.cuh"
#include "cuda/shared/scan.cuh"

namespace rebased::REBASED_BACKEND {

// The launch of any of them.
template <class E, class AnyProblem>
struct GeneralLaunch {
  const Call<AnyProblem>& call;
  Launches* launches;

  Grid grid() const { return call.problem.num_sequences * call.problem.kv_heads * call.segments; }
  int64_t shared_bytes() const { return call.tiles.size * int64_t{sizeof(Accumulator<E>)}; }
  void add(void (*kernel)(Call<AnyProblem>)) const {
    launches->add(kernel, grid(), call.tiles.threads, shared_bytes(), call);
  }
  template <bool reverse>
  void add_states(const ConstState& initial) const {
    add_segment_states<Accumulator<E>, reverse>(general_local_states<E, reverse, AnyProblem>, grid(),
                                                call.tiles.threads, shared_bytes(), initial, call, launches);
  }
  template <bool reverse>
  void add_whole_state() const {
    add_states<reverse>(ConstState{});
    add(general_whole_state<E, reverse, AnyProblem>);
  }
};

template <class E>
Family<ForwardProblem> general_family(const ForwardProblem&) {
  using Launch = GeneralLaunch<E, ForwardProblem>;
  using AnyCall = const Call<ForwardProblem>&;
  return {[](AnyCall call, Launches* to) {
            Launch{call, to}.template add_states<false>(call.problem.initial_state);
          },
          [](AnyCall call, Launches* to) { Launch{call, to}.add(general_forward<E>); },
          [](AnyCall call, Launches* to) { Launch{call, to}.template add_whole_state<false>(); }};
}

template <class E>
Family<BackwardProblem> general_family(const BackwardProblem&) {
  using Launch = GeneralLaunch<E, BackwardProblem>;
  using AnyCall = const Call<BackwardProblem>&;
  return {[](AnyCall call, Launches* to) {
            Launch{call, to}.template add_states<false>(call.problem.initial_state);
          },
          [](AnyCall call, Launches* to) {
            Launch{call, to}.template add_states<true>(call.problem.grad_final_state);
          },
          [](AnyCall call, Launches* to) { Launch{call, to}.add(general_grad_q<E>); },
          [](AnyCall call, Launches* to) { Launch{call, to}.add(general_grad_kv<E>); },
          [](AnyCall call, Launches* to) { Launch{call, to}.template add_whole_state<true>(); },
          Deltas::of_rows};
}

}  // namespace rebased::REBASED_BACKEND
