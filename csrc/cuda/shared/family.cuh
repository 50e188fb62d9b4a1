// A family of kernels as the sequence of launches (cuda/launch/sequence.cuh) sees it: a table of what queues
// each of the family's own kernels, on the grid and with the shared memory that they want.
#pragma once

#include "cuda/shared/block.cuh"

namespace rebased::REBASED_BACKEND {

template <class AnyProblem>
using Queue = void (*)(const Call<AnyProblem>&, Launches*);

template <class AnyProblem>
struct Family;

template <>
struct Family<ForwardProblem> {
  Queue<ForwardProblem> states;       // what blocks start from, where sequences are split or a state is given
  Queue<ForwardProblem> sweep;        // y, r and the final state
  Queue<ForwardProblem> whole_state;  // the final state alone, of these rows alone; null where there is none
};

template <>
struct Family<BackwardProblem> {
  Queue<BackwardProblem> states, reverse_states;  // what the blocks of grad_q and of grad_kv start from
  Queue<BackwardProblem> grad_q;
  Queue<BackwardProblem> grad_kv;      // also the gradient of the initial state
  Queue<BackwardProblem> whole_state;  // that gradient alone, of these rows alone; null where there is none
  // Whether the workspace has delta / r of each column group, which grad_kv leaves there for grad_q. Else it
  // has delta of whole rows, before both.
  bool delta_of_groups;
};

}  // namespace rebased::REBASED_BACKEND
