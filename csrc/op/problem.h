// What one call of the op is: sizes, strides, pointers and options, with no torch and no CUDA.
//
// Bindings fill a Problem from tensors; every backend reads nothing else. All strides are in elements, all
// sizes and offsets are int64_t, so that tensors past 2^31 elements need no second code path.
#pragma once

#include <cstdint>

namespace rebased {

// Of q, k, v, y and their gradients. Everything else (gamma, beta, states, r, sums, the division) is in the
// accumulation type: double for float64, float for the other three.
enum class Dtype { float32, float64, float16, bfloat16 };

// phi; feature_map.h has the formulas.
enum class FeatureMap { outer, square, taylor, elu, identity };

// What one LayerNorm runs over: nothing, all heads' features of a token together, or each head's own.
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

// gamma and beta of q or of k, in the accumulation type; null where absent (gamma 1, beta 0). Their shape is
// (feature_dim) with head_stride 0, or (heads, feature_dim) with head_stride feature_dim.
struct Affine {
  const void* gamma;
  const void* beta;
  int64_t gamma_head_stride, beta_head_stride;
};
struct AffineGradient {
  void* gamma;  // shaped like the parameter; null where the parameter is absent
  void* beta;
};

// kv (states, kv_heads, num_features, head_dim) and k (states, kv_heads, num_features), contiguous, in the
// accumulation type and in the public feature order (feature_map.h). kv null: no state.
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

  // (num_sequences + 1) row numbers, or null: sequence s owns rows [cu_seqlens[s], cu_seqlens[s + 1]).
  // Readers clamp them to 0 <= previous <= next <= seqlen; rows that belong to no sequence have y = 0.
  const int64_t* cu_seqlens;

  int64_t group_size() const { return heads / kv_heads; }  // query heads per kv head
};

struct ForwardProblem : Problem {
  // Only final_state is asked for, of these rows alone: q, query_affine, initial_state, y and r are absent.
  // What one process of several gives the others of its part of a sequence.
  bool state_only;
  ConstState initial_state;  // of each sequence
  MutableRows y;             // (batch, heads, seqlen, head_dim)
  void* r;                   // (batch, heads, seqlen): 1 / (sum_j sim(i, j) + eps), 1 when not normalize
  MutableState final_state;  // of each sequence, null when not asked for
  void* workspace;           // as many bytes as the backend asks for, 64-byte aligned
};

// What of the backward is asked for, so that processes can exchange states between its halves:
//   queries        grad_q and grad_query_affine, which need initial_state only
//   keys           grad_k, grad_v, grad_key_affine and grad_initial_state, which need grad_final_state only
//   reverse_state  grad_initial_state of these rows alone, as if grad_final_state were zero; k, v and their
//                  affine are only sizes
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
  void* workspace;

  bool wants_queries() const { return part == BackwardPart::all || part == BackwardPart::queries; }
  bool wants_keys() const { return part == BackwardPart::all || part == BackwardPart::keys; }
};

// One token per sequence: seqlen is 1, row strides mean nothing. y is the answer of the updated state.
struct StepProblem : Problem {
  MutableState state;  // (num_slots, kv_heads, ...), updated in place
  int64_t num_slots;
  const int64_t* state_index;  // (batch) slots, or null for slot = batch; outside [0, num_slots): y = 0
  MutableRows y;
  void* workspace;
};

}  // namespace rebased
