// The walk of a forward over the chunks of one item: a segment of a sequence, for one kv head and its query
// heads. It knows no product: Products is ForwardProducts of float.h, or what bf16.h and amx.h make of it.
//
// With a state (chunked form), per chunk of keys and block of kLanes queries (lanes):
//   scores^T (keys x queries) = sim, masked;  y = (phi(q) S + scores v) / (phi(q) z + row sums + eps)
//   then S += phi(k)^T v, z += sum phi(k)
// Without one (quadratic form), the same block meets every chunk of keys before it. Scores, features and the
// running y never leave the worker's scratch, whose size does not depend on seqlen.
#pragma once

#include "cpu/chunked/float.h"

namespace rebased::cpu::REBASED_ISA {

template <class T, class Products = ForwardProducts<T>>
struct ForwardSweep : Products {
  using Scratch = typename Products::Scratch;
  using Products::Products, Products::problem, Products::sizes;

  Scratch scratch(Arena& arena) const { return Scratch(sizes, arena); }

  // start_state(item, state) brings the state before the item and returns whether it is zero.
  template <class Start>
  void run(const Item& item, int64_t /*heads*/, const Scratch& scratch, const Start& start_state) const {
    [[maybe_unused]] const typename Products::Registers registers{};
    const ForwardProblem& p = problem;
    const Sizes<T>& s = sizes;
    const int64_t group = this->group();
    const Tokens<T> keys = this->key_tokens(item);
    const bool keep_state = item.last && p.final_state.kv;
    bool state_is_zero = start_state(item, scratch.state);
    if (!item.quadratic) scratch.long_sums->start(s, item.end - item.begin, scratch.state);
    if (!item.quadratic && !state_is_zero) this->round_state(scratch);
    const Ahead next{scratch.queue, s.chunk};
    for (int64_t row = item.begin; row < item.end; row += s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item.end - row));
      if (!item.quadratic) {
        this->pack_tokens(keys, row, rows, next, scratch.keys);
        this->pack_chunk_values(scratch, item, row, rows, next);
      }
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = item.kv_head * group + g;
        this->pack_tokens(this->query_tokens(item, head), row, rows, next, scratch.queries);
        // y is written, but stores wait for their cache lines as well
        this->queue_rows(next, head_rows<T>(p.y, item.batch, head, p.dtype), row, rows, p.y.row_stride,
                         s.head_dim);
        const int64_t first_key = item.quadratic ? item.sequence_begin : row;
        for (int64_t key = first_key; key <= row; key += s.chunk) {
          const int key_rows = key == row ? rows : s.chunk;
          if (item.quadratic) {
            this->pack_tokens(keys, key, key_rows, Ahead{}, scratch.keys);
            this->pack_values(p.v, item.batch, item.kv_head, key, key_rows, Ahead{}, scratch.values);
          }
          Meeting<T> meeting{key_rows,   item.quadratic, key == row, key == first_key,
                             key == row, nullptr,        nullptr};
          if (!item.quadratic && !state_is_zero) meeting.state = scratch.state;
          for (int b = 0; b * kLanes<T> < rows; b++) {
            const int block_rows = smaller(rows - b * kLanes<T>, kLanes<T>);
            const int64_t block_row = row + b * kLanes<T>;
            meeting.y = this->whole_block(item, head, block_row, block_rows);
            this->meet(scratch, b, meeting);
            if (meeting.last) this->write_block(scratch, b, item, head, block_row, block_rows, meeting.y);
          }
        }
      }
      if (item.quadratic || (row + rows == item.end && !keep_state)) continue;
      this->add_to_state(scratch, rows);
      state_is_zero = false;
    }
    if (keep_state) export_state(s, scratch.state, p.final_state, item.sequence * p.kv_heads + item.kv_head);
  }

  // The state that an item's keys leave behind, from zero, by products in T whatever Products are.
  void local_state(const Item& item, const Scratch& scratch, T* state) const {
    const Tokens<T> keys = this->key_tokens(item);
    __builtin_memset(state, 0, sizes.state_size * sizeof(T));
    scratch.long_sums->start(sizes, item.end - item.begin, state);
    const Ahead next{scratch.queue, sizes.chunk};
    for (int64_t row = item.begin; row < item.end; row += sizes.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(sizes.chunk, item.end - row));
      this->pack_tokens(keys, row, rows, next, scratch.keys);
      this->pack_values(problem.v, item.batch, item.kv_head, row, rows, next, scratch.values);
      update_state<T, false>(sizes, this->pairs, scratch.keys, nullptr, scratch.values, rows, state,
                             scratch.long_sums, scratch.key_slab, scratch.queue);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
