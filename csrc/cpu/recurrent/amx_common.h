// `square` with bfloat16 inputs on AMX, by chunks of one block of tokens: what forward and backward share.
// phi(q), phi(k), the chunk's own scores and a copy of the state are rounded to bfloat16; v, y and grad_y are
// bfloat16 as they come. Sums, the state, LayerNorm and the division stay float32. All features of a token
// fit in one register's row, half of its pairs.
#pragma once

#include "cpu/recurrent/common.h"
#include "cpu/simd/amx_products.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int kBlock = kProductRows;     // tokens
constexpr int kHalf = kTile / 2;         // pairs of a token's features, and of half a block's tokens
constexpr int kTokenPairs = kBlock / 2;  // pairs of a block's tokens

template <int Register>
REBASED_INLINE void load_tile(const void* source, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride_bytes), "i"(Register) : "memory");
}
template <int Register>
REBASED_INLINE void store_tile(void* target, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride_bytes), "i"(Register) : "memory");
}
template <int Register>
REBASED_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
// Register Sums + n += a b for the n-th kTile columns of b, n < NV. a: kTile rows of kTile pairs, or half as
// many (AmxRegisters(true) must live), a_stride numbers apart; b: as many rows of pairs, b_stride pairs
// apart.
template <int Sums, int NV, bool Half>
REBASED_INLINE void add_product(const void* a, int64_t a_stride, const uint32_t* b, int64_t b_stride) {
  constexpr int A = Half ? 6 : 4, B = Half ? 7 : 5;
  load_tile<A>(a, 2 * a_stride);
  load_tile<B>(b, 4 * b_stride);
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
  if constexpr (NV == 2) {
    load_tile<B>(b + kTile, 4 * b_stride);
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums + 1), "i"(A), "i"(B));
  }
}

// One vector as kHalf pairs of neighbours.
REBASED_INLINE void store_rounded(uint32_t* target, FloatVector v) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(target, &rounded, sizeof rounded);
}
REBASED_INLINE FloatVector load_rounded(const uint32_t* source) {
  return widen<float>(reinterpret_cast<const Bfloat16*>(source));
}
// The first `count` elements, zero after them.
REBASED_INLINE Uint32Vector read_pairs(const Bfloat16* source, int count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << larger(count, 0)) - 1;
  return (Uint32Vector)_mm512_maskz_loadu_epi16(mask, source);
}
REBASED_INLINE void write_pairs(Bfloat16* target, Uint32Vector v, int count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << larger(count, 0)) - 1;
  _mm512_mask_storeu_epi16(target, mask, (__m512i)v);
}

// Lanes of two vectors are pairs, kTile of each: all their first and all their second numbers.
REBASED_INLINE void split_pairs(const uint32_t* low, const uint32_t* high, uint32_t* first,
                                uint32_t* second) {
  const __m512i firsts = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30,
                                          28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i a = (__m512i)load_pairs(low), b = (__m512i)load_pairs(high);
  store_pairs(first, (Uint32Vector)_mm512_permutex2var_epi16(a, firsts, b));
  const __m512i seconds = _mm512_add_epi16(firsts, _mm512_set1_epi16(1));
  store_pairs(second, (Uint32Vector)_mm512_permutex2var_epi16(a, seconds, b));
}

// Forms of a block's features, from rows [token][kHalf pairs of features], which are an operand a:
//   feature_pairs  [half a block][pair of features][kTile tokens]  b, summed over features
//   feature_rows   [feature][pair of tokens]                       a, summed over tokens
//   token_pairs    [pair of tokens][feature]                       b, summed over tokens
REBASED_INLINE void pack_feature_pairs(const uint32_t* rows, uint32_t* feature_pairs) {
  store_transposed(feature_pairs, kTile, [&](int i) {
    __m256i low, high;
    __builtin_memcpy(&low, rows + i * kHalf, sizeof low);
    __builtin_memcpy(&high, rows + (i + kTile) * kHalf, sizeof high);
    return (Uint32Vector)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
  });
}
REBASED_INLINE void pack_feature_rows(const uint32_t* feature_pairs, uint32_t* feature_rows) {
  for (int p = 0; p < kHalf; p++)
    split_pairs(feature_pairs + p * kTile, feature_pairs + (kHalf + p) * kTile,
                feature_rows + 2 * p * kTokenPairs, feature_rows + (2 * p + 1) * kTokenPairs);
}
REBASED_INLINE void pack_token_pairs(const uint32_t* rows, uint32_t* token_pairs) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int i = 0; i < kTokenPairs; i++)
    store_pairs(token_pairs + i * kTile, (Uint32Vector)_mm512_permutexvar_epi16(
                                             interleave, (__m512i)load_pairs(rows + 2 * i * kHalf)));
}

// Registers 0 and 2 are the diagonal of [kBlock][kBlock], 1 what lies below or above it.
template <bool Lower>
REBASED_INLINE void store_triangle(float* scores) {
  float* lower = scores + kTile * kBlock;
  store_tile<0>(scores, 4 * kBlock);
  store_tile<1>(Lower ? lower : scores + kTile, 4 * kBlock);
  store_tile<2>(lower + kTile, 4 * kBlock);
}
// Scores or the like of a block with itself, [row][kBlock], rounded: each row only up to its own number
// (Lower) or from it on; weigh(row, n, vector of columns [n, n + kTile)).
template <bool Lower, class Weigh>
REBASED_INLINE void round_triangle(const float* scores, uint32_t* rounded, const Weigh& weigh) {
  const auto masked = [&](int row, int n) {
    const FloatVector v = weigh(row, n, load(scores + row * kBlock + n));
    const Int32Vector column = lane_numbers<float>() + n;
    return (Lower ? column <= row : column >= row) ? v : FloatVector{};
  };
  for (int i = 0; i < kTile; i++) {
    const FloatVector beyond = Lower ? FloatVector{} : weigh(i, kTile, load(scores + i * kBlock + kTile));
    store_pairs(rounded + i * kTokenPairs, pair_lanes(masked(i, 0), beyond));
  }
  for (int i = kTile; i < kBlock; i++) {
    const FloatVector before = Lower ? weigh(i, 0, load(scores + i * kBlock)) : FloatVector{};
    store_pairs(rounded + i * kTokenPairs, pair_lanes(before, masked(i, kTile)));
  }
}

struct AmxElementwiseScratch : ElementwiseScratch<float> {
  uint32_t *key_rows, *key_feature_pairs, *key_feature_rows;  // the forms above
  uint32_t* query_rows;
  uint32_t* value_pairs;  // [pair of tokens][columns]
  uint32_t* state_pairs;  // [head][pair of features][columns]
  float* scores;          // [kBlock][kBlock]
  uint32_t* score_rows;   // [kBlock][pair of tokens]
  float* block_sums;      // [kBlock][columns]

  // heads: of those that are walked side by side.
  AmxElementwiseScratch(const Sizes<float>& s, int64_t group, int64_t heads, Arena& arena, bool backward)
      : ElementwiseScratch<float>(s, group, arena, backward, heads) {
    const int64_t features = kBlock * kHalf;
    key_rows = arena.take<uint32_t>(features), key_feature_pairs = arena.take<uint32_t>(features);
    key_feature_rows = arena.take<uint32_t>(features), query_rows = arena.take<uint32_t>(features);
    value_pairs = arena.take<uint32_t>(kTokenPairs * s.value_columns);
    state_pairs = arena.take<uint32_t>(heads * kHalf * s.value_columns);
    scores = arena.take<float>(kBlock * kBlock), score_rows = arena.take<uint32_t>(kBlock * kTokenPairs);
    block_sums = arena.take<float>(kBlock * s.value_columns);
  }
  void move_to_head(int64_t n, const Sizes<float>& s, int64_t group) {
    ElementwiseScratch<float>::move_to_head(n, s, group);
    state_pairs += n * kHalf * s.value_columns;
  }
};

// On top of ElementwiseForward or ElementwiseBackward.
template <class Base>
struct AmxElementwise : Base {
  using Scratch = AmxElementwiseScratch;
  using Base::Base, Base::sizes, Base::base;

  int columns() const { return sizes.value_columns; }

  const Bfloat16* bf16_rows(const ConstRows& source, int64_t batch, int64_t head, int64_t row) const {
    const char* rows = head_rows<float>(source, batch, head, Dtype::bfloat16);
    return reinterpret_cast<const Bfloat16*>(rows) + row * source.row_stride + sizes.first_column;
  }

  // phi of a block's tokens, times a factor of each (null: 1), as rows; zero past the tokens and features.
  void pack_rows(const TokenRows<float>& t, int tokens, const float* factors, uint32_t* target) const {
    const Bfloat16* rows = reinterpret_cast<const Bfloat16*>(t.data);
    const FloatVector gamma = load(t.gamma), beta = load(t.beta);
    const auto valid = lane_numbers<float>() < t.feature_dim;
    const int64_t stride = t.stride, ahead = t.ahead * stride;
    for (int i = 0; i < tokens; i++) {
      __builtin_prefetch(rows + i * stride + ahead, 0, 2);
      const FloatVector x = read<float>(rows + i * stride, t.feature_dim);
      const FloatVector scaled = (x - t.mean[i]) * t.rstd[i] * gamma + beta;
      const FloatVector feature = scaled * scaled * (factors ? factors[i] : 1);
      store_rounded(target + i * kHalf, valid ? feature : FloatVector{});
    }
    __builtin_memset(target + tokens * kHalf, 0, (kBlock - tokens) * kHalf * sizeof(uint32_t));
  }

  // Rows of values as pairs of tokens, [pair of tokens][columns], zero past the tokens. `ahead` as elsewhere.
  void pack_value_pairs(const ConstRows& source, int64_t batch, int64_t head, int64_t row, int tokens,
                        int64_t ahead, uint32_t* target) const {
    const Bfloat16* rows = bf16_rows(source, batch, head, row);
    const int64_t stride = source.row_stride;
    // unpacking works within quarters of a vector: these bring the columns to where it leaves them in order
    const __m512i quarters = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    for (int i = 0; i < kBlock; i += 2)
      for (int n = 0; n < columns(); n += kLanes<float>) {
        const auto part = [&](int token) {
          const Bfloat16* from = rows + token * stride + n;
          __builtin_prefetch(from + ahead * stride, 0, 2);
          return _mm512_maskz_permutexvar_epi64(
              0xff, quarters, (__m512i)read_pairs(from, token < tokens ? sizes.head_dim - n : 0));
        };
        const __m512i even = part(i), odd = part(i + 1);
        uint32_t* pairs = target + i / 2 * columns() + n;
        store_pairs(pairs, (Uint32Vector)_mm512_unpacklo_epi16(even, odd));
        store_pairs(pairs + kTile, (Uint32Vector)_mm512_unpackhi_epi16(even, odd));
      }
  }
  // sums [token][columns] times a factor of each token (null: 1), out; columns [begin, end).
  void write_rows(const MutableRows& target, int64_t batch, int64_t head, int64_t row, int tokens,
                  const float* sums, const float* factors, int begin, int end, int64_t ahead) const {
    const ConstRows rows{target.data, target.batch_stride, target.head_stride, target.row_stride};
    Bfloat16* to = const_cast<Bfloat16*>(bf16_rows(rows, batch, head, row));
    const int64_t stride = target.row_stride;
    for (int i = 0; i < tokens; i++) {
      const FloatVector factor = broadcast<float>(factors ? factors[i] : 1);
      for (int n = begin; n < end; n += kLanes<float>) {
        __builtin_prefetch(to + (i + ahead) * stride + n, 0, 2);
        const float* from = sums + i * columns() + n;
        write_pairs(to + i * stride + n, pair_lanes(load(from) * factor, load(from + kTile) * factor),
                    sizes.head_dim - n);
      }
    }
  }

  // Where the state's kTile columns from `column` on begin; its rows lie kLanes apart.
  float* state_columns(const Scratch& scratch, int column) const {
    return scratch.state + int64_t(column / kLanes<float> * kLanes<float>) * kTile + column % kLanes<float>;
  }
  void round_state(const Scratch& scratch) const {
    for (int n = 0; n < columns(); n += kTile) {
      const float* rows = state_columns(scratch, n);
      for (int p = 0; p < kHalf; p++)
        store_pairs(scratch.state_pairs + p * columns() + n,
                    pair(load(rows + 2 * p * kLanes<float>), load(rows + (2 * p + 1) * kLanes<float>)));
    }
  }
  // target += the block's rows of features, each times a factor (null: 1).
  void add_rows(const uint32_t* rows, const float* factors, float* target) const {
    FloatVector sum = load(target);
    for (int i = 0; i < kBlock; i++) sum += load_rounded(rows + i * kHalf) * (factors ? factors[i] : 1);
    store(target, sum);
  }

  // state += feature_rows value_pairs, columns [begin, end).
  void add_to_state(const Scratch& scratch, const uint32_t* feature_rows, const uint32_t* value_pairs,
                    int begin, int end) const {
    for (int n = begin; n < end; n += kLanes<float>) {
      float* state = state_columns(scratch, n);
      load_tile<0>(state, 4 * kLanes<float>);
      load_tile<1>(state + kTile, 4 * kLanes<float>);
      add_product<0, 2, false>(feature_rows, kBlock, value_pairs + n, columns());
      store_tile<0>(state, 4 * kLanes<float>);
      store_tile<1>(state + kTile, 4 * kLanes<float>);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
