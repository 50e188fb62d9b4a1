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

// What a backward family's workspace has as delta, and which of its kernels leaves it there for the other:
// that of whole rows, made before both; or delta / r of each column group, left by grad_kv or by grad_q, and
// made before where that one does not run.
enum class Deltas { of_rows, from_grad_kv, from_grad_q };

template <>
struct Family<BackwardProblem> {
  Queue<BackwardProblem> states, reverse_states;  // what the blocks of grad_q and of grad_kv start from
  Queue<BackwardProblem> grad_q;
  Queue<BackwardProblem> grad_kv;      // also the gradient of the initial state
  Queue<BackwardProblem> whole_state;  // that gradient alone, of these rows alone; null where there is none
  Deltas deltas;
};

}  // namespace rebased::REBASED_BACKEND
