// The torch operators rebased_cuda::forward, backward and step: schemas, and one implementation over three
// backends (native CPU, CUDA, and in a test build the CUDA kernels emulated on the CPU).
//
// Everything goes through torch's stable ABI, so one build serves every later torch. Only int64_t, double,
// bool, std::string, Tensor and optionals of these cross it intact.
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>

#include "bindings/cuda_stream.h"
#include "bindings/tensors.h"
#include "op/backend.h"

namespace rebased {
namespace {

// ---- backends: where the work goes, chosen by the dispatch key ----

class NativeBackend {
 public:
  explicit NativeBackend(const Tensor&) {}
  template <class AnyProblem>
  int64_t workspace_bytes(const AnyProblem& problem) const {
    return cpu::workspace_bytes(problem, parallel(problem).threads);
  }
  void run(const ForwardProblem& problem) const { cpu::forward(problem, parallel(problem)); }
  void run(const BackwardProblem& problem) const { cpu::backward(problem, parallel(problem)); }
  void run(const StepProblem& problem) const { cpu::step(problem, parallel(problem)); }
  static constexpr bool on_host = true;

 private:
  // Waking a thread takes about as long as this many operations of the forward's products with a state.
  static constexpr double kOperationsPerThread = 4e6;

  // A step looks at the size of its state itself.
  Parallel parallel(const StepProblem&) const { return parallel_; }
  Parallel parallel(const Problem& p) const {
    const double tokens = static_cast<double>(p.batch) * static_cast<double>(p.heads * p.seqlen);
    const double operations =
        4 * tokens * static_cast<double>(num_features(p.feature_map, p.feature_dim) * p.head_dim);
    Parallel few = parallel_;
    if (operations < kOperationsPerThread * few.threads)
      few.threads = 1 + static_cast<int>(operations / kOperationsPerThread);
    return few;
  }
  using Body = void (*)(int64_t, int64_t, void*);
  static void parallel_for(int64_t count, Body body, void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }
  Parallel parallel_{static_cast<int>(torch::stable::get_num_threads()), parallel_for};
};

[[maybe_unused]] void require_success(const char* error) {
  if (*error == '\0') return;
  std::string message = std::string("rebased_cuda: ") + error;
#if defined(REBASED_CUDA)
  if (std::strstr(error, "no kernel image") != nullptr ||
      std::strstr(error, "invalid device function") != nullptr) {
    message += ": this build has code for " REBASED_CUDA_ARCHITECTURES
               " only; rebuild with this GPU's compute capability in TORCH_CUDA_ARCH_LIST";
  }
#endif
  throw std::runtime_error(message);
}

#if defined(REBASED_EMULATOR)
class EmulatedBackend {
 public:
  explicit EmulatedBackend(const Tensor&) { require_success(emulated::query_device(0, &device_)); }
  template <class AnyProblem>
  int64_t workspace_bytes(const AnyProblem& problem) const {
    return emulated::workspace_bytes(problem, device_);
  }
  void run(const ForwardProblem& problem) const {
    require_success(emulated::forward(problem, device_, nullptr));
  }
  void run(const BackwardProblem& problem) const {
    require_success(emulated::backward(problem, device_, nullptr));
  }
  void run(const StepProblem& problem) const { require_success(emulated::step(problem, device_, nullptr)); }
  static constexpr bool on_host = true;

 private:
  Device device_;
};
#endif

#if defined(REBASED_CUDA)
class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& q)
      : guard_(q.get_device_index()), stream_(current_cuda_stream(q.get_device_index())) {
    require_success(cuda::query_device(q.get_device_index(), &device_));
  }
  template <class AnyProblem>
  int64_t workspace_bytes(const AnyProblem& problem) const {
    return cuda::workspace_bytes(problem, device_);
  }
  void run(const ForwardProblem& problem) const { require_success(cuda::forward(problem, device_, stream_)); }
  void run(const BackwardProblem& problem) const {
    require_success(cuda::backward(problem, device_, stream_));
  }
  void run(const StepProblem& problem) const { require_success(cuda::step(problem, device_, stream_)); }
  static constexpr bool on_host = false;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  Device device_;
};
#endif

// ---- what the three operators share ----

struct Options {
  const std::string& feature_map;
  const std::string& layer_norm;
  double scale, eps, layer_norm_eps;
  bool normalize;
};

// q, k, v as (batch, heads, rows, width), or (batch, heads, width) for one row, the parameters and
// cu_seqlens, in layouts that backends understand. Holds the copies for as long as the Problem points into
// them.
class Inputs {
 public:
  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gamma_q,
         const OptionalTensor& beta_q, const OptionalTensor& gamma_k, const OptionalTensor& beta_k,
         const OptionalTensor& cu_seqlens)
      : q(q),
        k(k),
        v(v),
        gamma_q(as_contiguous(gamma_q)),
        beta_q(as_contiguous(beta_q)),
        gamma_k(as_contiguous(gamma_k)),
        beta_k(as_contiguous(beta_k)),
        cu_seqlens(as_contiguous(cu_seqlens)) {
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
    require(
        parameter->scalar_type() == accumulator_type(p.dtype) &&
            ((dims == 1 && parameter->size(0) == p.feature_dim) ||
             (dims == 2 && parameter->size(0) == heads && parameter->size(1) == p.feature_dim)),
        "gamma, beta: must be of shape (feature_dim) or (heads, feature_dim), float32 (float64 for float64)");
    return dims == 1 ? 0 : p.feature_dim;
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

void check_state(const Problem& p, const Tensor& kv, const Tensor& k, int64_t states) {
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

// The state's contiguous copies (both present or both absent), checked.
struct StateInputs {
  StateInputs(const Problem& p, const OptionalTensor& kv, const OptionalTensor& k)
      : kv(as_contiguous(kv)), k(as_contiguous(k)) {
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

template <class Backend, class AnyProblem>
void run(const Backend& backend, AnyProblem& problem, const Tensor& like) {
  const int64_t bytes = backend.workspace_bytes(problem);
  if (Backend::on_host && bytes <= kStackWorkspace) {
    alignas(64) char workspace[kStackWorkspace];
    problem.workspace = workspace;
    backend.run(problem);
    return;
  }
  const Tensor workspace = empty(like, {bytes}, ScalarType::Byte);
  problem.workspace = workspace.mutable_data_ptr();
  backend.run(problem);
}

// ---- the operators ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   OptionalTensor gamma_q, OptionalTensor beta_q,
                                                   OptionalTensor gamma_k, OptionalTensor beta_k,
                                                   OptionalTensor initial_kv, OptionalTensor initial_k,
                                                   OptionalTensor cu_seqlens, std::string feature_map,
                                                   std::string layer_norm, double scale, double eps,
                                                   double layer_norm_eps, bool normalize, bool return_state) {
  const Backend backend(q);
  require(q.dim() == 4, "q, k, v: must have four dimensions");
  const Inputs inputs(q, k, v, gamma_q, beta_q, gamma_k, beta_k, cu_seqlens);
  auto problem = inputs.problem<ForwardProblem>(
      {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, Backend::on_host);
  const StateInputs initial(problem, initial_kv, initial_k);
  if (initial_kv) inputs.require_same_device(*initial_kv), inputs.require_same_device(*initial_k);
  problem.initial_state = initial.pointers();
  Tensor y = empty_rows(q, problem.batch, problem.heads, problem.seqlen, problem.head_dim);
  Tensor r = empty(q, {problem.batch, problem.heads, problem.seqlen}, accumulator_type(problem.dtype));
  StateOutputs final_state(problem, q, return_state);
  problem.y = mutable_rows(y);
  problem.r = r.mutable_data_ptr();
  problem.final_state = final_state.pointers;
  run(backend, problem, q);
  return {y, r, final_state.kv, final_state.k};
}

Tensor gradient_like(const OptionalTensor& parameter, const Tensor& like, ScalarType type, void** pointer) {
  if (!parameter) return absent(like, type);
  Tensor gradient = torch::stable::new_empty(*parameter, parameter->sizes());
  *pointer = gradient.mutable_data_ptr();
  return gradient;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, OptionalTensor grad_kv, OptionalTensor grad_k, const Tensor& q, const Tensor& k,
    const Tensor& v, OptionalTensor gamma_q, OptionalTensor beta_q, OptionalTensor gamma_k,
    OptionalTensor beta_k, OptionalTensor initial_kv, OptionalTensor initial_k, OptionalTensor cu_seqlens,
    const Tensor& y, const Tensor& r, std::string feature_map, std::string layer_norm, double scale,
    double eps, double layer_norm_eps, bool normalize) {
  const Backend backend(q);
  require(q.dim() == 4, "q, k, v: must have four dimensions");
  const Inputs inputs(q, k, v, gamma_q, beta_q, gamma_k, beta_k, cu_seqlens);
  auto problem = inputs.problem<BackwardProblem>(
      {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, Backend::on_host);
  const StateInputs initial(problem, initial_kv, initial_k), grad_final(problem, grad_kv, grad_k);
  for (const OptionalTensor* tensor : {&initial_kv, &initial_k, &grad_kv, &grad_k}) {
    if (*tensor) inputs.require_same_device(**tensor);
  }
  for (const Tensor* tensor : {&grad_y, &y, &r}) inputs.require_same_device(*tensor);
  problem.initial_state = initial.pointers();
  problem.grad_final_state = grad_final.pointers();
  const Tensor dense_y = with_dense_rows(y), dense_grad_y = with_dense_rows(grad_y),
               dense_r = as_contiguous(r);
  const auto is_output = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == problem.batch && t.size(1) == problem.heads &&
           t.size(2) == problem.seqlen && t.size(3) == problem.head_dim && t.scalar_type() == q.scalar_type();
  };
  require(is_output(y) && is_output(grad_y), "y, grad_y: must have the output's shape and q's dtype");
  const ScalarType type = accumulator_type(problem.dtype);
  require(r.dim() == 3 && r.size(0) == problem.batch && r.size(1) == problem.heads &&
              r.size(2) == problem.seqlen && r.scalar_type() == type,
          "r: must be what forward returned");
  problem.y = const_rows(dense_y);
  problem.grad_y = const_rows(dense_grad_y);
  problem.r = dense_r.const_data_ptr();

  Tensor grad_query = empty_rows(q, problem.batch, problem.heads, problem.seqlen, problem.feature_dim);
  Tensor grad_key = empty_rows(k, problem.batch, problem.kv_heads, problem.seqlen, problem.feature_dim);
  Tensor grad_value = empty_rows(v, problem.batch, problem.kv_heads, problem.seqlen, problem.head_dim);
  problem.grad_q = mutable_rows(grad_query);
  problem.grad_k = mutable_rows(grad_key);
  problem.grad_v = mutable_rows(grad_value);
  Tensor grad_gamma_q = gradient_like(inputs.gamma_q, q, type, &problem.grad_query_affine.gamma);
  Tensor grad_beta_q = gradient_like(inputs.beta_q, q, type, &problem.grad_query_affine.beta);
  Tensor grad_gamma_k = gradient_like(inputs.gamma_k, q, type, &problem.grad_key_affine.gamma);
  Tensor grad_beta_k = gradient_like(inputs.beta_k, q, type, &problem.grad_key_affine.beta);
  StateOutputs grad_initial(problem, q, initial_kv.has_value());
  problem.grad_initial_state = grad_initial.pointers;
  run(backend, problem, q);
  return {grad_query,   grad_key,    grad_value,      grad_gamma_q,  grad_beta_q,
          grad_gamma_k, grad_beta_k, grad_initial.kv, grad_initial.k};
}

template <class Backend>
Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor state_kv, Tensor state_k,
            OptionalTensor gamma_q, OptionalTensor beta_q, OptionalTensor gamma_k, OptionalTensor beta_k,
            OptionalTensor state_index, std::string feature_map, std::string layer_norm, double scale,
            double eps, double layer_norm_eps, bool normalize) {
  const Backend backend(q);
  require(q.dim() == 3, "q, k, v: must have three dimensions");
  const Inputs inputs(q, k, v, gamma_q, beta_q, gamma_k, beta_k, std::nullopt);
  auto problem = inputs.problem<StepProblem>({feature_map, layer_norm, scale, eps, layer_norm_eps, normalize},
                                             Backend::on_host);
  problem.num_slots = state_kv.size(0);
  check_state(problem, state_kv, state_k, problem.num_slots);
  require(state_kv.is_contiguous() && state_k.is_contiguous(), "state: must be contiguous");
  inputs.require_same_device(state_kv), inputs.require_same_device(state_k);
  if (state_index) inputs.require_same_device(*state_index);
  if (state_index) {
    require(state_index->dim() == 1 && state_index->size(0) == problem.batch &&
                state_index->scalar_type() == ScalarType::Long && state_index->is_contiguous(),
            "state_index: must be int64 of shape (batch)");
    problem.state_index = static_cast<const int64_t*>(state_index->const_data_ptr());
    for (int64_t b = 0; Backend::on_host && b < problem.batch; ++b) {
      const int64_t slot = problem.state_index[b];
      require(slot >= -1 && slot < problem.num_slots, [&] {
        return "state_index: must lie in -1 (skip) to " + std::to_string(problem.num_slots - 1) + ", got " +
               std::to_string(slot) + " at index " + std::to_string(b);
      });
    }
  } else {
    require(problem.num_slots == problem.batch,
            "state: must have q's batch size where state_index is not given");
  }
  problem.state = {state_kv.mutable_data_ptr(), state_k.mutable_data_ptr()};
  Tensor y = empty(q, {problem.batch, problem.heads, problem.head_dim}, q.scalar_type());
  problem.y = {y.mutable_data_ptr(), problem.heads * problem.head_dim, problem.head_dim, 0};
  run(backend, problem, q);
  return y;
}

template <class Backend, class Library>
void implement(Library& library) {
  library.impl("forward", TORCH_BOX(&forward<Backend>));
  library.impl("backward", TORCH_BOX(&backward<Backend>));
  library.impl("step", TORCH_BOX(&step<Backend>));
}

}  // namespace

// In step, state_kv and state_k are updated in place; rebased_cuda/attention.py bumps their versions.
STABLE_TORCH_LIBRARY(rebased_cuda, library) {
  library.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, Tensor? "
      "beta_k, "
      "Tensor? initial_kv, Tensor? initial_k, Tensor? cu_seqlens, str feature_map, str layer_norm, float "
      "scale, "
      "float eps, float layer_norm_eps, bool normalize, bool return_state) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  library.def(
      "backward(Tensor grad_y, Tensor? grad_kv, Tensor? grad_k, Tensor q, Tensor k, Tensor v, Tensor? "
      "gamma_q, "
      "Tensor? beta_q, Tensor? gamma_k, Tensor? beta_k, Tensor? initial_kv, Tensor? initial_k, "
      "Tensor? cu_seqlens, Tensor y, Tensor r, str feature_map, str layer_norm, float scale, float eps, "
      "float layer_norm_eps, bool normalize) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor(a!) state_kv, Tensor(b!) state_k, Tensor? gamma_q, "
      "Tensor? beta_q, Tensor? gamma_k, Tensor? beta_k, Tensor? state_index, str feature_map, str "
      "layer_norm, "
      "float scale, float eps, float layer_norm_eps, bool normalize) -> Tensor");
}

// Registering is once per process: a test build reads here which backend CPU tensors get.
STABLE_TORCH_LIBRARY_IMPL(rebased_cuda, CPU, library) {
#if defined(REBASED_EMULATOR)
  const char* wanted = std::getenv("REBASED_CPU_BACKEND");
  if (wanted != nullptr && std::strcmp(wanted, "emulated") == 0) {
    implement<EmulatedBackend>(library);
    return;
  }
#endif
  implement<NativeBackend>(library);
}

#if defined(REBASED_CUDA)
STABLE_TORCH_LIBRARY_IMPL(rebased_cuda, CUDA, library) { implement<CudaBackend>(library); }
#endif

}  // namespace rebased
