// What one call of the op is: sizes, strides, pointers and options. Includes neither torch nor CUDA nor any
// other file of csrc.
//
// Bindings fill a Problem from tensors, and a backend reads nothing but the Problem. All strides are in
// elements. All sizes and offsets are int64_t, so that tensors past 2^31 elements need no second code path.
#pragma once

#include <cstdint>

namespace rebased {

// The type of q, k, v, y and their gradients. Everything else (gamma, beta, states, r, sums, the division) is
// in the accumulation type: double for float64, float for the other three dtypes.
enum class Dtype { float32, float64, float16, bfloat16 };

// The feature map phi; feature_map.h has the formulas.
enum class FeatureMap { outer, square, taylor, elu, identity };

// What LayerNorm runs over: nothing, the features of all heads of a token together, or those of each head.
enum class LayerNorm { none, token, head };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}
inline int64_t accumulator_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// A tensor (batch, heads, rows, width) whose last stride is 1.
template <class Pointer>
struct RowsOf {
  Pointer data;
  int64_t batch_stride, head_stride, row_stride;
};
using ConstRows = RowsOf<const void*>;
using MutableRows = RowsOf<void*>;

// gamma and beta of q or of k, in the accumulation type. A null pointer stands for gamma = 1 or beta = 0. The
// shape is (feature_dim) with a head stride of 0, or (heads, feature_dim) with a head stride of feature_dim.
struct Affine {
  const void* gamma;
  const void* beta;
  int64_t gamma_head_stride, beta_head_stride;
};
struct AffineGradient {
  void* gamma;  // shaped like the parameter; null where the parameter is absent
  void* beta;
};

// A state: kv (states, kv_heads, num_features, head_dim) is S, k (states, kv_heads, num_features) is z. Both
// are contiguous (of a step each slot is), in the accumulation type and the public feature order
// (feature_map.h). Where kv is null there is no state.
template <class Pointer>
struct StateOf {
  Pointer kv;
  Pointer k;
};
using ConstState = StateOf<const void*>;
using MutableState = StateOf<void*>;

struct Problem {
  int64_t batch, heads, kv_heads, seqlen, feature_dim, head_dim;
  int64_t num_sequences;  // = batch, or with cu_seqlens the number of packed sequences (then batch is 1)
  Dtype dtype;
  FeatureMap feature_map;
  LayerNorm layer_norm;
  bool normalize;  // divide by sum(sim) + eps
  double scale, eps, layer_norm_eps;

  ConstRows q;  // (batch, heads, seqlen, feature_dim)
  ConstRows k;  // (batch, kv_heads, seqlen, feature_dim)
  ConstRows v;  // (batch, kv_heads, seqlen, head_dim)
  Affine query_affine, key_affine;

  // (num_sequences + 1) row numbers, or null: sequence s owns the rows [cu_seqlens[s], cu_seqlens[s + 1]). A
  // backend clamps them to 0 <= previous <= next <= seqlen. Rows that belong to no sequence have y = 0.
  const int64_t* cu_seqlens;

  int64_t group_size() const { return heads / kv_heads; }  // query heads per kv head
};

// What forward leaves for backward in memory of its own, beyond y and r. A backend that has no use for it
// keeps nothing.
//   statistics  those of "token" LayerNorm. Their size follows from the problem's sizes alone
//   states      these, and the states that blocks start from, where the backend's backward can use them
enum class Keep { nothing, statistics, states };

struct ForwardProblem : Problem {
  // Whether only final_state is asked for, the sum over these rows alone. Then q, query_affine,
  // initial_state, y and r are absent. Processes that share a sequence exchange such states.
  bool state_only;
  ConstState initial_state;  // before the first row of each sequence
  MutableRows y;             // (batch, heads, seqlen, head_dim)
  void* r;                   // (batch, heads, seqlen): 1 / (sum_j sim(i, j) + eps), 1 when not normalize
  MutableState final_state;  // after the last row of each sequence; null when not asked for
  Keep keep;
  void* kept;       // as many bytes as the backend keeps, 64-byte aligned
  void* workspace;  // as many bytes as the backend asks for, 64-byte aligned
};

// Which part of the backward is asked for. Processes that share a sequence exchange states between its
// halves.
//   queries        grad_q and grad_query_affine. Of the states this half reads initial_state only.
//   keys           grad_k, grad_v, grad_key_affine and grad_initial_state. Of the states this half reads
//                  grad_final_state only.
//   reverse_state  grad_initial_state as these rows alone make it, as if grad_final_state were zero. Of k, v
//                  and their affine only the sizes are read.
enum class BackwardPart { all, queries, keys, reverse_state };

struct BackwardProblem : Problem {
  BackwardPart part;
  ConstState initial_state;
  ConstRows y;
  const void* r;
  ConstRows grad_y;
  ConstState grad_final_state;  // null: zero
  MutableRows grad_q, grad_k, grad_v;
  AffineGradient grad_query_affine, grad_key_affine;
  MutableState grad_initial_state;  // null when not asked for
  const void* kept;                 // what forward kept, of kept_bytes; null: nothing, it is computed again
  int64_t kept_bytes;
  void* workspace;

  bool wants_queries() const { return part == BackwardPart::all || part == BackwardPart::queries; }
  bool wants_keys() const { return part == BackwardPart::all || part == BackwardPart::keys; }
};

// One token per sequence: seqlen is 1, and row strides mean nothing. y is what the updated state answers.
struct StepProblem : Problem {
  // (num_slots, kv_heads, ...), updated in place. A slot's own entries are contiguous. Slots lie kv_stride
  // and k_stride apart: in the pages of a serving engine other things stand between them.
  MutableState state;
  int64_t num_slots, kv_stride, k_stride;
  const int64_t* state_index;  // (batch) slots, or null for slot = batch; outside [0, num_slots): y = 0
  MutableRows y;
  void* workspace;
};

}  // namespace rebased
