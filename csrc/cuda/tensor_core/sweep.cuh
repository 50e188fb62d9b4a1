// What the two backward sweeps have in common: buffers in the workspace, tiles in shared memory, where the
// rows of a block begin, and the sums of the gradients of gamma and beta.
#pragma once

#include "cuda/tensor_core/gradient.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// What the backward kernels find in the workspace beside the states.
struct BackwardBuffers {
  float* delta;           // (column groups, batch, heads, seqlen): delta / r, over a group's columns
  float* query_gradient;  // (column groups, batch, heads, seqlen, d): see RowTarget::partial; or null
  float* key_gradient;    // (column groups, batch, kv_heads, seqlen, d)
  float* query_affine;    // (num_sequences, heads, segments, column groups, 2, d): blocks' sums
  float* key_affine;      // (num_sequences, kv_heads, segments, column groups, 2, d)
  float* initial_sums;    // (column groups, num_sequences, kv_heads, features): of grad_initial_state.k
};

// The tiles of a sweep in dynamic shared memory.
template <class T, class S>
struct SweepTiles {
  static constexpr int value_tile = chunk * columns;
  static constexpr int state_tile = columns * S::state_stride;
  static constexpr int float4s = 16 / sizeof(T);  // elements in the place of a float4

  T *values, *gradients;  // two stages each
  T* y;                   // in the reverse sweep alone
  T* state;
  float4* gathered_values;  // with several query heads: 8 per thread, in the place of the state
  float4* rest;             // with several query heads: 2 per thread, for grad k'

  DEVICE SweepTiles(void* memory, bool reverse, bool gathers)
      : values(static_cast<T*>(memory)),
        gradients(values + 2 * value_tile),
        y(gradients + 2 * value_tile),
        state(y + (reverse ? value_tile : 0)),
        gathered_values(reinterpret_cast<float4*>(state)),
        rest(reinterpret_cast<float4*>(state + state_place(gathers))) {}

  HOST_DEVICE static constexpr int state_place(bool gathers) {
    return gathers ? maximum(state_tile, 8 * threads * float4s) : state_tile;
  }
  static constexpr int64_t bytes(bool reverse, bool gathers) {
    const int rest = gathers ? 2 * threads * float4s : 0;
    return static_cast<int64_t>(sizeof(T)) * ((reverse ? 5 : 4) * value_tile + state_place(gathers) + rest);
  }
};

// How many blocks per multiprocessor the registers must suffice for, in the kernels that hold a state and the
// gradient of a tile.
constexpr int backward_blocks(bool grouped) { return grouped ? 2 : 3; }

template <class T>
struct BackwardOrigins : Origins<T> {
  const T *y, *grad_y;
  const float* r;
  int64_t row;  // number of the first row of the first query head, in (batch, heads, seqlen)

  DEVICE void set(const Arguments<BackwardProblem>& arguments, int chunk_length = chunk) {
    Origins<T>::set(arguments, chunk_length);
    const BackwardProblem& problem = arguments.problem;
    const Span& span = this->span;
    const int64_t head = span.kv_head * arguments.group_size;
    row = (span.batch * problem.heads + head) * problem.seqlen + span.begin;
    y = first_row<T>(problem.y, span, head) + span.first_column;
    grad_y = first_row<T>(problem.grad_y, span, head) + span.first_column;
    r = static_cast<const float*>(problem.r) + row;
  }

  // Brings in grad y, y and r of a chunk of the block's query head `head`: `step` is Start or Settle.
  template <int block_threads = threads, class Step>
  DEVICE void bring_gradients(const Step& step, T* gradients, T* y_tile, float* r_tile,
                              const Arguments<BackwardProblem>& arguments, int first, int head, int end,
                              int columns_left) const {
    const BackwardProblem& problem = arguments.problem;
    step.template values<block_threads>(gradients, grad_y + head * problem.grad_y.head_stride,
                                        row_stride(problem.grad_y), arguments.pieces.grad_y, first, end,
                                        columns_left);
    step.template values<block_threads>(y_tile, y + head * problem.y.head_stride, row_stride(problem.y),
                                        arguments.pieces.y, first, end, columns_left);
    step.floats(r_tile, r + head * problem.seqlen, first, end);
  }
};

// Adds up what the warps of the block have summed, in shared memory, for grad gamma and grad beta, and writes
// it to row `row` of `target`.
template <class S>
DEVICE void store_affine_sums(float* target, const float* sums, int64_t row) {
  if (threadIdx.x >= S::affine_size) return;
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += sums[warp * S::affine_size + threadIdx.x];
  target[row * S::affine_size + threadIdx.x] = sum;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
