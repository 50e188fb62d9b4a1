// What the operators share: tensors in, as a Problem with its copies and checks, states in and out, and a run
// with its workspace.
#pragma once

#include "bindings/backends.h"
#include "bindings/tensors.h"
#include "op/backend.h"

namespace rebased {

struct Options {
  const std::string& feature_map;
  const std::string& layer_norm;
  double scale, eps, layer_norm_eps;
  bool normalize;
};

struct Parameters {
  const OptionalTensor &gamma_q, &beta_q, &gamma_k, &beta_k;
};

// q, k, v as (batch, heads, rows, width), or (batch, heads, width) for one row, the parameters and
// cu_seqlens, in layouts that backends understand. Holds the copies for as long as the Problem points into
// them.
class Inputs {
 public:
  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Parameters& parameters,
         const OptionalTensor& cu_seqlens)
      : q(with_memory(kNames[0], q, &extents[0])),
        k(with_memory(kNames[1], k, &extents[1])),
        v(with_memory(kNames[2], v, &extents[2])),
        gamma_q(as_contiguous(with_memory(kNames[3], parameters.gamma_q, &extents[3]))),
        beta_q(as_contiguous(with_memory(kNames[4], parameters.beta_q, &extents[4]))),
        gamma_k(as_contiguous(with_memory(kNames[5], parameters.gamma_k, &extents[5]))),
        beta_k(as_contiguous(with_memory(kNames[6], parameters.beta_k, &extents[6]))),
        cu_seqlens(as_contiguous(with_memory(kNames[7], cu_seqlens, &extents[7]))) {
    require(k.dim() == q.dim() && v.dim() == q.dim(), "q, k, v: must have as many dimensions each");
    this->q = with_dense_rows(q);
    this->k = with_dense_rows(k);
    this->v = with_dense_rows(v);
  }

  template <class AnyProblem>
  AnyProblem problem(const Options& options, bool on_host) const {
    AnyProblem p{};
    p.batch = q.size(0);
    p.heads = q.size(1);
    const int64_t last = q.dim() - 1;
    p.seqlen = last == 3 ? q.size(2) : 1;
    p.feature_dim = q.size(last);
    p.kv_heads = k.size(1);
    p.head_dim = v.size(last);
    p.dtype = dtype_of(q);
    p.feature_map = feature_map_of(options.feature_map);
    p.layer_norm = layer_norm_of(options.layer_norm);
    // over one head both are the same, and a head's own needs no pass over the tokens beforehand
    if (p.layer_norm == LayerNorm::token && p.heads == 1) p.layer_norm = LayerNorm::head;
    p.normalize = options.normalize;
    p.scale = options.scale;
    p.eps = options.eps;
    p.layer_norm_eps = options.layer_norm_eps;
    require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
            "k, v: must have q's dtype");
    for (const Tensor* tensor : {&k, &v}) require_same_device(*tensor);
    for (const OptionalTensor* tensor : {&gamma_q, &beta_q, &gamma_k, &beta_k, &cu_seqlens}) {
      if (*tensor) require_same_device(**tensor);
    }
    require(k.size(0) == p.batch && v.size(0) == p.batch &&
                (last == 2 || (k.size(2) == p.seqlen && v.size(2) == p.seqlen)) &&
                k.size(last) == p.feature_dim && v.size(1) == p.kv_heads,
            "k, v: sizes must match q");
    require(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0,
            "q: heads must be a multiple of kv heads");
    require(p.feature_dim >= 1 && p.feature_dim <= 128, "q: feature dim must be 1 to 128");
    require(p.head_dim >= 1 && p.head_dim <= 256, "v: head dim must be 1 to 256");
    p.q = const_rows(q);
    p.k = const_rows(k);
    p.v = const_rows(v);
    p.query_affine = affine(gamma_q, beta_q, p.heads, p);
    p.key_affine = affine(gamma_k, beta_k, p.kv_heads, p);
    p.num_sequences = p.batch;
    if (cu_seqlens) {
      require(p.batch == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 &&
                  cu_seqlens->scalar_type() == ScalarType::Long,
              "cu_seqlens: must be int64 of shape (sequences + 1), and q's batch 1");
      p.num_sequences = cu_seqlens->size(0) - 1;
      p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens->const_data_ptr());
      if (on_host) check_sequences(p);
    }
    return p;
  }

  void require_same_device(const Tensor& tensor) const {
    require(tensor.device() == q.device(), "all tensors must be on q's device");
  }

  static constexpr const char* kNames[] = {"q",      "k",       "v",      "gamma_q",
                                           "beta_q", "gamma_k", "beta_k", "cu_seqlens"};
  Extent extents[8];  // of the tensors as they were given, in the order of kNames
  Tensor q, k, v;
  OptionalTensor gamma_q, beta_q, gamma_k, beta_k, cu_seqlens;

 private:
  static Affine affine(const OptionalTensor& gamma, const OptionalTensor& beta, int64_t heads,
                       const Problem& p) {
    return {const_pointer(gamma), const_pointer(beta), head_stride(gamma, heads, p),
            head_stride(beta, heads, p)};
  }
  static int64_t head_stride(const OptionalTensor& parameter, int64_t heads, const Problem& p) {
    if (!parameter) return 0;
    const int64_t dims = parameter->dim();
    const bool shared = dims == 1 && parameter->size(0) == p.feature_dim;
    const bool flat = dims == 1 && parameter->size(0) == heads * p.feature_dim;
    const bool by_head = dims == 2 && parameter->size(0) == heads && parameter->size(1) == p.feature_dim;
    require(parameter->scalar_type() == accumulator_type(p.dtype) && (shared || flat || by_head),
            "gamma, beta: must be of shape (feature_dim), (heads, feature_dim) or (heads * feature_dim), "
            "float32 (float64 for float64)");
    return shared ? 0 : p.feature_dim;
  }
  // Only on the host: on a GPU this would synchronise, and the kernels clamp instead.
  static void check_sequences(const Problem& p) {
    int64_t previous = 0;
    for (int64_t s = 0; s <= p.num_sequences; ++s) {
      require(p.cu_seqlens[s] >= previous && p.cu_seqlens[s] <= p.seqlen, [&] {
        return "cu_seqlens: must not decrease and must stay within 0 and the sequence length " +
               std::to_string(p.seqlen) + ", got " + std::to_string(p.cu_seqlens[s]) + " at index " +
               std::to_string(s);
      });
      previous = p.cu_seqlens[s];
    }
  }
};

inline void check_state(const Problem& p, const Tensor& kv, const Tensor& k, int64_t states) {
  const int64_t features = num_features(p.feature_map, p.feature_dim);
  const ScalarType type = accumulator_type(p.dtype);
  require(
      kv.scalar_type() == type && k.scalar_type() == type && kv.dim() == 4 && k.dim() == 3 &&
          kv.size(0) == states && kv.size(1) == p.kv_heads && kv.size(2) == features &&
          kv.size(3) == p.head_dim && k.size(0) == states && k.size(1) == p.kv_heads && k.size(2) == features,
      [&] {
        return "state: must be kv (" + std::to_string(states) + ", kv_heads, " + std::to_string(features) +
               ", head_dim) and k of the same without head_dim, float32 (float64 for float64)";
      });
}

// The state's contiguous copies (both present or both absent), checked. `names`: of kv and k.
struct StateInputs {
  StateInputs(const Problem& p, const char* const (&names)[2], const OptionalTensor& kv,
              const OptionalTensor& k)
      : kv(as_contiguous(with_memory(names[0], kv))), k(as_contiguous(with_memory(names[1], k))) {
    require(kv.has_value() == k.has_value(), "state: kv and k go together");
    if (kv) check_state(p, *kv, *k, p.num_sequences);
  }
  ConstState pointers() const { return {const_pointer(kv), const_pointer(k)}; }
  OptionalTensor kv, k;
};

struct StateOutputs {
  StateOutputs(const Problem& p, const Tensor& like, bool present) {
    const ScalarType type = accumulator_type(p.dtype);
    const int64_t features = num_features(p.feature_map, p.feature_dim);
    kv =
        present ? empty(like, {p.num_sequences, p.kv_heads, features, p.head_dim}, type) : absent(like, type);
    k = present ? empty(like, {p.num_sequences, p.kv_heads, features}, type) : absent(like, type);
    if (present) pointers = {kv.mutable_data_ptr(), k.mutable_data_ptr()};
  }
  Tensor kv, k;
  MutableState pointers{nullptr, nullptr};
};

// A host workspace up to this many bytes is on the stack: a decode step then allocates nothing but y.
constexpr int64_t kStackWorkspace = 32 << 10;

template <class Backend, class AnyProblem, class Plan>
void run_planned(const Backend& backend, AnyProblem& problem, const Plan& plan, const Tensor& like) {
  const int64_t bytes = backend.workspace_bytes(problem, plan);
  if (Backend::on_host && bytes <= kStackWorkspace) {
    alignas(64) char workspace[kStackWorkspace];
#if defined(REBASED_EMULATOR)
    std::memset(workspace, 255, sizeof workspace);  // poison, see tensors.h
#endif
    problem.workspace = workspace;
    backend.run(problem, plan);
    return;
  }
  OptionalTensor workspace;
  if (bytes > 0) {
    workspace = empty(like, {bytes}, ScalarType::Byte);
    problem.workspace = workspace->mutable_data_ptr();
  }
  backend.run(problem, plan);
}

template <class Backend, class AnyProblem>
void run(const Backend& backend, AnyProblem& problem, const Tensor& like) {
  run_planned(backend, problem, backend.plan(problem), like);
}

// The same with room for what the backend keeps for backward, which is given back.
template <class Backend>
Tensor run_keeping(const Backend& backend, ForwardProblem& problem, const Tensor& like) {
  const auto plan = backend.plan(problem);
  Tensor kept = empty(like, {backend.kept_bytes(plan)}, ScalarType::Byte);
  problem.kept = kept.mutable_data_ptr();
  run_planned(backend, problem, plan, like);
  return kept;
}

constexpr const char* kNotKept = "kept: must be what forward_kept returned for these inputs";

// What forward kept, as backward reads it: at a multiple of 16 bytes, wherever a hook on saved tensors put
// it.
inline OptionalTensor kept_input(const OptionalTensor& kept) {
  if (!kept) return kept;
  require(kept->dim() == 1 && kept->scalar_type() == ScalarType::Byte, kNotKept);
  return with_dense_rows(with_memory("kept", *kept));
}

}  // namespace rebased
