// Backward of `square` on AMX (amx_common.h), a block of tokens at a time. Names as in
// recurrent/backward.h; delta = grad_y . y, and within a block c_ij = grad_y_i . v_j - delta_i.
//   queries, forwards:  d phi(q) = r (c phi(k) + grad_y S^T - delta z);   then S, z take the block in
//   keys, backwards:    d phi(k) = c^T (r phi(q)) + v T^T + m,   dv = (r phi(q) phi(k)^T)^T grad_y + phi(k) T
//                       then T += (r phi(q))^T grad_y,   m -= delta r phi(q)
// delta is taken off before c is rounded: c is the smaller of the two where y is close to v.
#pragma once

#include "cpu/recurrent/amx_common.h"
#include "cpu/recurrent/backward.h"

namespace rebased::cpu::REBASED_ISA {

struct AmxElementwiseBackwardScratch : AmxElementwiseScratch {
  uint32_t *key_token_pairs, *query_token_pairs, *query_feature_pairs, *query_feature_rows;
  uint32_t *own_values, *own_gradients;  // BlockRows
  uint32_t* column_pairs;                // [pair of columns][token], of v or grad_y
  uint32_t* turned_pairs;                // the state, [head][pair of columns][feature]

  AmxElementwiseBackwardScratch(const Sizes<float>& s, int64_t group, int64_t heads, Arena& arena)
      : AmxElementwiseScratch(s, group, heads, arena, true) {
    const int64_t features = kBlock * kHalf, rows = kBlock * s.value_columns / 2;
    key_token_pairs = arena.take<uint32_t>(features), query_token_pairs = arena.take<uint32_t>(features);
    query_feature_pairs = arena.take<uint32_t>(features), query_feature_rows = arena.take<uint32_t>(features);
    own_values = arena.take<uint32_t>(rows), own_gradients = arena.take<uint32_t>(rows);
    column_pairs = arena.take<uint32_t>(rows);
    turned_pairs = arena.take<uint32_t>(heads * s.value_columns / 2 * kTile);
  }
  void move_to_head(int64_t n, const Sizes<float>& s, int64_t group) {
    AmxElementwiseScratch::move_to_head(n, s, group);
    turned_pairs += n * s.value_columns / 2 * kTile;
  }
};

struct AmxElementwiseBackward : AmxElementwise<ElementwiseBackward<float, 6>> {
  using Scratch = AmxElementwiseBackwardScratch;
  using AmxElementwise<ElementwiseBackward<float, 6>>::AmxElementwise;

  Scratch scratch(Arena& arena) const { return Scratch(sizes, all_groups(), all_heads(), arena); }

  // A block's rows of v or grad_y as an operand a: where they lie if they are whole, else a copy with zeros
  // past the tokens and columns.
  struct BlockRows {
    const Bfloat16* data;
    int64_t stride;
  };
  BlockRows block_rows(const ConstRows& source, int64_t batch, int64_t head, int64_t row, int tokens,
                       uint32_t* copy) const {
    const Bfloat16* rows = bf16_rows(source, batch, head, row);
    const int64_t stride = source.row_stride;
    if (tokens == kBlock && sizes.head_dim == columns()) return {rows, stride};
    for (int i = 0; i < kBlock; i++)
      for (int n = 0; n < columns(); n += kLanes<float>)
        store_pairs(copy + (i * columns() + n) / 2,
                    read_pairs(rows + i * stride + n, i < tokens ? sizes.head_dim - n : 0));
    return {reinterpret_cast<const Bfloat16*>(copy), columns()};
  }
  // Those rows as an operand b, summed over columns; the rows `ahead` are fetched meanwhile.
  void pack_columns(const BlockRows& rows, int64_t ahead, uint32_t* column_pairs) const {
    for (int n = 0; n < columns(); n += kLanes<float>)
      for (int first = 0; first < kBlock; first += kTile)
        store_transposed(column_pairs + n / 2 * kBlock + first, kBlock, [&](int i) {
          const Bfloat16* from = rows.data + (first + i) * rows.stride + n;
          if (ahead) __builtin_prefetch(from + ahead * rows.stride, 0, 2);
          return read_pairs(from, kLanes<float>);
        });
  }
  // -delta of the block's queries, 0 where nothing was divided.
  void dot_block(const Scratch& scratch, const Item& item, int64_t head, int64_t row, int tokens,
                 const BlockRows& gradients, int64_t ahead) const {
    if (!problem.normalize) return clear(scratch.factors, kBlock);
    const Bfloat16* y = bf16_rows(problem.y, item.batch, head, row);
    const int64_t stride = problem.y.row_stride;
    sum_tokens<float>(kBlock, scratch.factors, [&](int i) {
      __m512 sum = (__m512)FloatVector{};
      for (int n = 0; n < columns(); n += kLanes<float>) {
        __builtin_prefetch(y + (i + ahead) * stride + n, 0, 2);
        __builtin_prefetch(gradients.data + (i + ahead) * gradients.stride + n, 0, 2);
        const Uint32Vector a = read_pairs(gradients.data + i * gradients.stride + n, kLanes<float>),
                           b = read_pairs(y + i * stride + n, i < tokens ? sizes.head_dim - n : 0);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
      }
      return -(FloatVector)sum;
    });
  }

  // The block's products of rows with the rows in column_pairs, on the triangle's side of the diagonal.
  template <bool Lower>
  void correlate(const Scratch& scratch, const BlockRows& rows) const {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>();
    for (int n = 0; n < columns(); n += kLanes<float>) {
      const Bfloat16 *first = rows.data + n, *second = first + kTile * rows.stride;
      const uint32_t* pairs = scratch.column_pairs + n / 2 * kBlock;
      add_product<0, 1, false>(first, rows.stride, pairs, kBlock);
      add_product<1, 1, false>(Lower ? second : first, rows.stride, Lower ? pairs : pairs + kTile, kBlock);
      add_product<2, 1, false>(second, rows.stride, pairs + kTile, kBlock);
    }
    store_triangle<Lower>(scratch.scores);
  }

  void turn_state_pairs(const Scratch& scratch) const {
    for (int n = 0; n < columns(); n += kLanes<float>) {
      const float* rows = state_columns(scratch, n);
      store_transposed(scratch.turned_pairs + n / 2 * kTile, kTile, [&](int f) {
        return pair_lanes(load(rows + f * kLanes<float>), load(rows + f * kLanes<float> + kTile));
      });
    }
  }
  // Registers 0 and 1 += rows times the state: gradients of features.
  void add_turned(const Scratch& scratch, const BlockRows& rows) const {
    for (int n = 0; n < columns(); n += kLanes<float>) {
      const uint32_t* pairs = scratch.turned_pairs + n / 2 * kTile;
      add_product<0, 1, false>(rows.data + n, rows.stride, pairs, kTile);
      add_product<1, 1, false>(rows.data + kTile * rows.stride + n, rows.stride, pairs, kTile);
    }
  }

  // dq of a block.
  void query_block(const Item& item, const Scratch& scratch, int64_t row) const {
    const BackwardProblem& p = problem;
    const FloatVector z = load(scratch.state + sizes.state_kv);
    const int tokens = int(smaller<int64_t>(kBlock, item.end - row));
    pack_rows(token_rows(scratch, item, group(), row, tokens, kBlock), tokens, nullptr, scratch.key_rows);
    pack_token_pairs(scratch.key_rows, scratch.key_token_pairs);
    pack_feature_pairs(scratch.key_rows, scratch.key_feature_pairs);
    pack_feature_rows(scratch.key_feature_pairs, scratch.key_feature_rows);
    const BlockRows values = block_rows(p.v, item.batch, item.kv_head, row, tokens, scratch.own_values);
    pack_columns(values, kBlock, scratch.column_pairs);
    pack_value_pairs(p.v, item.batch, item.kv_head, row, tokens, 0, scratch.value_pairs);
    for (int64_t g = 0; g < group(); g++) {
      const int64_t head = item.kv_head * group() + g;
      const BlockRows gradients = block_rows(p.grad_y, item.batch, head, row, tokens, scratch.own_gradients);
      const float* delta = scratch.factors;
      dot_block(scratch, item, head, row, tokens, gradients, kBlock);
      float *upper = scratch.grad_tokens + g * kBlock * kTile, *lower = upper + kTile * kTile;
      for (int i = 0; i < kBlock; i++) store(upper + i * kTile, z * delta[i]);
      correlate<true>(scratch, gradients);
      round_triangle<true>(scratch.scores, scratch.score_rows,
                           [&](int i, int, FloatVector c) { return c + delta[i]; });
      load_tile<0>(upper, 4 * kTile);
      load_tile<1>(lower, 4 * kTile);
      add_turned(scratch, gradients);
      add_product<0, 1, true>(scratch.score_rows, kBlock, scratch.key_token_pairs, kTile);
      add_product<1, 1, false>(scratch.score_rows + kTile * kTokenPairs, kBlock, scratch.key_token_pairs,
                               kTile);
      store_tile<0>(upper, 4 * kTile);
      store_tile<1>(lower, 4 * kTile);
    }
    add_to_state(scratch, scratch.key_feature_rows, scratch.value_pairs, 0, columns());
    turn_state_pairs(scratch);
    add_rows(scratch.key_rows, nullptr, scratch.state + sizes.state_kv);
    for (int64_t g = 0; g < group(); g++)
      finish(scratch, token_rows(scratch, item, g, row, tokens, kBlock), g, r_of(item, g, row), query_target,
             item.batch, item.kv_head * group() + g, row, tokens);
  }

  // What a query head's block gives to the gradients of the features of the block's keys, in grad_tokens.
  void add_key_gradients(const Scratch& scratch, const BlockRows& values, bool with_state) const {
    const float* delta = scratch.factors;
    correlate<false>(scratch, values);
    round_triangle<false>(scratch.scores, scratch.score_rows,
                          [&](int, int n, FloatVector c) { return c + load(delta + n); });
    float *upper = scratch.grad_tokens, *lower = upper + kTile * kTile;
    load_tile<0>(upper, 4 * kTile);
    load_tile<1>(lower, 4 * kTile);
    if (with_state) add_turned(scratch, values);
    add_product<0, 1, false>(scratch.score_rows, kBlock, scratch.query_token_pairs, kTile);
    add_product<1, 1, true>(scratch.score_rows + kTile * kTokenPairs + kHalf, kBlock,
                            scratch.query_token_pairs + kHalf * kTile, kTile);
    store_tile<0>(upper, 4 * kTile);
    store_tile<1>(lower, 4 * kTile);
  }
  // The same for those of the block's values, columns [begin, end), in block_sums.
  void add_value_gradients(const Scratch& scratch, bool with_state, int begin, int end) const {
    const uint32_t *keys = scratch.key_rows, *queries = scratch.query_feature_pairs;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>();
    add_product<0, 1, true>(keys, kTile, queries, kTile);
    add_product<1, 1, true>(keys, kTile, queries + kHalf * kTile, kTile);
    add_product<2, 1, true>(keys + kTile * kHalf, kTile, queries + kHalf * kTile, kTile);
    store_triangle<false>(scratch.scores);
    round_triangle<false>(scratch.scores, scratch.score_rows, [](int, int, FloatVector v) { return v; });
    const int stride = columns();
    for (int n = begin; n < end; n += kLanes<float>) {
      float *upper = scratch.block_sums + n, *lower = upper + kTile * stride;
      if (with_state) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        add_product<0, 2, true>(keys, kTile, scratch.state_pairs + n, stride);
        add_product<2, 2, true>(keys + kTile * kHalf, kTile, scratch.state_pairs + n, stride);
      } else {
        load_tile<0>(upper, 4 * stride);
        load_tile<1>(upper + kTile, 4 * stride);
        load_tile<2>(lower, 4 * stride);
        load_tile<3>(lower + kTile, 4 * stride);
      }
      const uint32_t* gradients = scratch.value_pairs + n;
      add_product<0, 2, false>(scratch.score_rows, kBlock, gradients, stride);
      add_product<2, 2, true>(scratch.score_rows + kTile * kTokenPairs + kHalf, kBlock,
                              gradients + kHalf * stride, stride);
      store_tile<0>(upper, 4 * stride);
      store_tile<1>(upper + kTile, 4 * stride);
      store_tile<2>(lower, 4 * stride);
      store_tile<3>(lower + kTile, 4 * stride);
    }
  }

  // dv of a block, columns [begin, end), and where asked for dk.
  void key_block(const Item& item, const Scratch& scratch, int64_t row, bool with_keys, int begin,
                 int end) const {
    const BackwardProblem& p = problem;
    constexpr int64_t ahead = -kBlock;
    float* m = scratch.state + sizes.state_kv;
    const int tokens = int(smaller<int64_t>(kBlock, item.end - row));
    const TokenRows<float> keys = token_rows(scratch, item, group(), row, tokens, ahead);
    pack_rows(keys, tokens, nullptr, scratch.key_rows);
    const BlockRows values = block_rows(p.v, item.batch, item.kv_head, row, tokens, scratch.own_values);
    const FloatVector later = load(m);
    for (int i = 0; i < kBlock; i++) {
      for (int n = 0; n < columns(); n += kLanes<float>)
        __builtin_prefetch(values.data + (i + ahead) * values.stride + n, 0, 2);
      store(scratch.grad_tokens + i * kTile, later);
    }
    for (int64_t g = 0; g < group(); g++) {
      const int64_t head = item.kv_head * group() + g;
      pack_rows(token_rows(scratch, item, g, row, tokens, ahead), tokens, r_of(item, g, row),
                scratch.query_rows);
      pack_feature_pairs(scratch.query_rows, scratch.query_feature_pairs);
      pack_feature_rows(scratch.query_feature_pairs, scratch.query_feature_rows);
      pack_value_pairs(p.grad_y, item.batch, head, row, tokens, ahead, scratch.value_pairs);
      if (with_keys) {
        const BlockRows gradients =
            block_rows(p.grad_y, item.batch, head, row, tokens, scratch.own_gradients);
        pack_token_pairs(scratch.query_rows, scratch.query_token_pairs);
        pack_columns(gradients, 0, scratch.column_pairs);
        dot_block(scratch, item, head, row, tokens, gradients, ahead);
        add_key_gradients(scratch, values, g == 0);
        add_rows(scratch.query_rows, scratch.factors, m);
      }
      add_value_gradients(scratch, g == 0, begin, end);
      add_to_state(scratch, scratch.query_feature_rows, scratch.value_pairs, with_keys ? 0 : begin,
                   with_keys ? columns() : end);
    }
    round_state(scratch);
    if (with_keys) {
      turn_state_pairs(scratch);
      finish(scratch, keys, group(), nullptr, key_target, item.batch, item.kv_head, row, tokens);
    }
    write_rows(p.grad_v, item.batch, item.kv_head, row, tokens, scratch.block_sums, nullptr, begin, end,
               ahead);
  }

  // dq of `count` heads from that of `first` on; start_state(item, queries, state) as in the driver.
  template <class Start>
  void sweep_queries(const Item& first, int64_t count, const Scratch& scratch,
                     const Start& start_state) const {
    for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      start_state(item, true, own.state);
      pad_affine(own, item);
      clear(own.grad_affine, group() * 2 * kTile);
      clear(query_affine_of(item), group() * 2 * sizes.feature_dim);
      turn_state_pairs(own);
    });
    for (int64_t row = first.begin; row < first.end; row += kBlock)
      for_heads(first, count, scratch,
                [&](const Item& item, const Scratch& own) { query_block(item, own, row); });
    for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      move_affine(own, group(), query_affine_of(item));
    });
  }
  // dv of columns [begin, end) and, where asked for, dk.
  template <class Start>
  void sweep_keys(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state,
                  bool with_keys, int begin, int end) const {
    for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      start_state(item, false, own.state);
      pad_affine(own, item);
      clear(own.grad_affine, 2 * kTile);
      if (with_keys) clear(key_affine_of(item), 2 * sizes.feature_dim);
      round_state(own);
      turn_state_pairs(own);
    });
    const int64_t blocks = (first.end - first.begin + kBlock - 1) / kBlock;
    for (int64_t row = first.begin + (blocks - 1) * kBlock; row >= first.begin; row -= kBlock)
      for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
        key_block(item, own, row, with_keys, begin, end);
      });
    if (with_keys) write_key_sums(first, count, scratch);
  }

  template <class Start>
  void run_heads(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state) const {
    const AmxRegisters registers(true);
    if (first.part == 0)
      return sweep_keys(first, count, scratch, start_state, true, shared_columns, columns());
    sweep_queries(first, count, scratch, start_state);
    if (shared_columns) sweep_keys(first, count, scratch, start_state, false, 0, shared_columns);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
