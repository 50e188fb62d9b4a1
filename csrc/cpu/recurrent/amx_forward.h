// Forward of `square` on AMX (amx_common.h), a block of tokens at a time:
//   y = (phi(q) S + scores v) / (phi(q) z + row sums of scores + eps)
//   then S += phi(k)^T v, z += sum phi(k)
// Denominators sum the same rounded numbers as numerators.
#pragma once

#include "cpu/recurrent/amx_common.h"
#include "cpu/recurrent/forward.h"

namespace rebased::cpu::REBASED_ISA {

// Two heads' rows of q or k fill a cache line; more at once would leave few runs of heads for the threads.
struct AmxElementwiseForward : AmxElementwise<ElementwiseForward<float, 2>> {
  using AmxElementwise<ElementwiseForward<float, 2>>::AmxElementwise;

  Scratch scratch(Arena& arena) const { return Scratch(sizes, all_groups(), all_heads(), arena, false); }

  // phi(q) phi(k)^T within the block, rounded, to score_rows.
  void score(const Scratch& scratch) const {
    const uint32_t *first_keys = scratch.key_feature_pairs, *later_keys = first_keys + kHalf * kTile;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>();
    add_product<0, 1, true>(scratch.query_rows, kTile, first_keys, kTile);
    add_product<1, 1, true>(scratch.query_rows + kTile * kHalf, kTile, first_keys, kTile);
    add_product<2, 1, true>(scratch.query_rows + kTile * kHalf, kTile, later_keys, kTile);
    store_triangle<true>(scratch.scores);
    round_triangle<true>(scratch.scores, scratch.score_rows, [](int, int, FloatVector v) { return v; });
  }

  // r of the block's queries.
  void divide(const Scratch& scratch, float* r) const {
    const FloatVector z = load(scratch.state + sizes.state_kv);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    sum_tokens<float>(kBlock, r, [&](int i) {
      const FloatVector older = load_rounded(scratch.query_rows + i * kHalf) * z;
      const __m512bh own = (__m512bh)load_pairs(scratch.score_rows + i * kTokenPairs);
      return (FloatVector)_mm512_dpbf16_ps((__m512)older, own, ones);
    });
    for (int i = 0; i < kBlock; i += kTile)
      store(r + i, problem.normalize ? 1 / (load(r + i) + float(problem.eps)) : broadcast<float>(1));
  }

  // Numerators, to block_sums.
  void answer(const Scratch& scratch) const {
    const int stride = columns();
    const uint32_t *queries = scratch.query_rows, *scores = scratch.score_rows;
    for (int n = 0; n < columns(); n += kLanes<float>) {
      const uint32_t *state = scratch.state_pairs + n, *values = scratch.value_pairs + n;
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      add_product<0, 2, true>(queries, kTile, state, stride);
      add_product<2, 2, true>(queries + kTile * kHalf, kTile, state, stride);
      add_product<0, 2, true>(scores, kBlock, values, stride);
      add_product<2, 2, false>(scores + kTile * kTokenPairs, kBlock, values, stride);
      float *upper = scratch.block_sums + n, *lower = upper + kTile * stride;
      store_tile<0>(upper, 4 * stride);
      store_tile<1>(upper + kTile, 4 * stride);
      store_tile<2>(lower, 4 * stride);
      store_tile<3>(lower + kTile, 4 * stride);
    }
  }

  void run_block(const Item& item, const Scratch& scratch, int64_t row) const {
    const ForwardProblem& p = problem;
    const int tokens = int(smaller<int64_t>(kBlock, item.end - row));
    pack_rows(token_rows(scratch, item, group(), row, tokens, kBlock), tokens, nullptr, scratch.key_rows);
    for (int64_t g = 0; g < group(); g++) {
      const int64_t head = item.kv_head * group() + g;
      pack_rows(token_rows(scratch, item, g, row, tokens, kBlock), tokens, nullptr, scratch.query_rows);
      if (g == 0) {  // here, since a tile is loaded only when what was stored before it is in the cache
        pack_feature_pairs(scratch.key_rows, scratch.key_feature_pairs);
        pack_feature_rows(scratch.key_feature_pairs, scratch.key_feature_rows);
        pack_value_pairs(p.v, item.batch, item.kv_head, row, tokens, kBlock, scratch.value_pairs);
      }
      score(scratch);
      divide(scratch, scratch.factors);
      answer(scratch);
      write_rows(p.y, item.batch, head, row, tokens, scratch.block_sums, scratch.factors, 0, columns(),
                 kBlock);
      if (sizes.first_column == 0)
        __builtin_memcpy(static_cast<float*>(p.r) + (item.batch * p.heads + head) * p.seqlen + row,
                         scratch.factors, tokens * sizeof(float));
    }
    add_to_state(scratch, scratch.key_feature_rows, scratch.value_pairs, 0, columns());
    round_state(scratch);
    add_rows(scratch.key_rows, nullptr, scratch.state + sizes.state_kv);
  }

  // `count` heads from that of `first` on; start_state(item, state) brings the state before an item.
  template <class Start>
  void run_heads(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state) const {
    const AmxRegisters registers(true);
    for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      start_state(item, own.state);
      pad_affine(own, item);
      round_state(own);
    });
    for (int64_t row = first.begin; row < first.end; row += kBlock)
      for_heads(first, count, scratch,
                [&](const Item& item, const Scratch& own) { run_block(item, own, row); });
    write_states(first, count, scratch);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
