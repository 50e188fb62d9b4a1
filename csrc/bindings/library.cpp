// The torch operators of rebased_cuda: schemas, and one implementation over three backends (native CPU, CUDA,
// and in a test build the CUDA kernels emulated on the CPU).
//   forward, backward          the op and its gradients, where no state comes in or goes out
//   forward_with_state and     the same with states. They are operators of their own, since in a call of
//   backward_with_state        microseconds every argument and every result costs time
//   forward_kept               forward_with_state, and one tensor of bytes more, which spares backward work
//                              where it is handed on; without elements where the backend keeps nothing. Its
//                              size follows from the inputs' sizes alone where keep_states is false
//   step                       one token more, whose state is updated in place
//   build_info                 the facts of facts.h as JSON, for a Python that the package has no module for
//   forward_state              the state that rows of k and v leave behind. With this operator and the `part`
//                              of backward_with_state, processes that share a sequence exchange states
//                              (rebased_cuda/context_parallel/)
//
// Everything goes through torch's stable ABI, so one build serves every later torch. Only int64_t, double,
// bool, std::string, Tensor and optionals of these cross it intact.
#include <tuple>
#include <utility>

#include "bindings/facts.h"
#include "bindings/inputs.h"
#include "bindings/slots.h"

namespace rebased {
namespace {

const OptionalTensor kNone;
constexpr const char* kInitialState[2] = {"initial_state.kv", "initial_state.k"};

struct Outputs {
  Tensor y, r;
  std::optional<StateOutputs> final_state;
  OptionalTensor kept;
};

template <class Backend>
Outputs run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Parameters& parameters,
                    const OptionalTensor& initial_kv, const OptionalTensor& initial_k,
                    const OptionalTensor& cu_seqlens, const Options& options, bool with_state,
                    bool return_state, Keep keep = Keep::nothing) {
  const Backend backend(q);
  require(q.dim() == 4, "q, k, v: must have four dimensions");
  const Inputs inputs(q, k, v, parameters, cu_seqlens);
  auto problem = inputs.problem<ForwardProblem>(options, Backend::on_host);
  const StateInputs initial(problem, kInitialState, initial_kv, initial_k);
  if (initial_kv) inputs.require_same_device(*initial_kv), inputs.require_same_device(*initial_k);
  problem.initial_state = initial.pointers();
  Outputs outputs{empty_rows(q, problem.batch, problem.heads, problem.seqlen, problem.head_dim),
                  empty(q, {problem.batch, problem.heads, problem.seqlen}, accumulator_type(problem.dtype)),
                  std::nullopt, std::nullopt};
  if (with_state) {
    outputs.final_state.emplace(problem, q, return_state);
    problem.final_state = outputs.final_state->pointers;
  }
  problem.y = mutable_rows(outputs.y);
  problem.r = outputs.r.mutable_data_ptr();
  problem.keep = keep;
  if (keep == Keep::nothing) {
    run(backend, problem, q);
  } else {
    outputs.kept = run_keeping(backend, problem, q);
  }
  return outputs;
}

template <class Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor gamma_q,
                                   OptionalTensor beta_q, OptionalTensor gamma_k, OptionalTensor beta_k,
                                   OptionalTensor cu_seqlens, std::string feature_map, std::string layer_norm,
                                   double scale, double eps, double layer_norm_eps, bool normalize) {
  Outputs outputs =
      run_forward<Backend>(q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, kNone, kNone, cu_seqlens,
                           {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, false, false);
  return {std::move(outputs.y), std::move(outputs.r)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_state(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor gamma_q, OptionalTensor beta_q,
    OptionalTensor gamma_k, OptionalTensor beta_k, OptionalTensor initial_kv, OptionalTensor initial_k,
    OptionalTensor cu_seqlens, std::string feature_map, std::string layer_norm, double scale, double eps,
    double layer_norm_eps, bool normalize, bool return_state) {
  const Outputs outputs = run_forward<Backend>(
      q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, initial_kv, initial_k, cu_seqlens,
      {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, true, return_state);
  return {outputs.y, outputs.r, outputs.final_state->kv, outputs.final_state->k};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_kept(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor gamma_q, OptionalTensor beta_q,
    OptionalTensor gamma_k, OptionalTensor beta_k, OptionalTensor initial_kv, OptionalTensor initial_k,
    OptionalTensor cu_seqlens, std::string feature_map, std::string layer_norm, double scale, double eps,
    double layer_norm_eps, bool normalize, bool return_state, bool keep_states) {
  const Outputs outputs =
      run_forward<Backend>(q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, initial_kv, initial_k, cu_seqlens,
                           {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, true,
                           return_state, keep_states ? Keep::states : Keep::statistics);
  return {outputs.y, outputs.r, outputs.final_state->kv, outputs.final_state->k, *outputs.kept};
}

// What the rows of k and v leave behind: the state after them, from an empty one.
template <class Backend>
std::tuple<Tensor, Tensor> forward_state(const Tensor& k, const Tensor& v, OptionalTensor gamma_k,
                                         OptionalTensor beta_k, OptionalTensor cu_seqlens,
                                         std::string feature_map, std::string layer_norm,
                                         double layer_norm_eps) {
  const Backend backend(k);
  require(k.dim() == 4, "k, v: must have four dimensions");
  extent_of("k", k);  // Inputs would call it q
  const Inputs inputs(k, k, v, {kNone, kNone, gamma_k, beta_k}, cu_seqlens);
  auto problem =
      inputs.problem<ForwardProblem>({feature_map, layer_norm, 1, 0, layer_norm_eps, true}, Backend::on_host);
  problem.state_only = true;
  StateOutputs final_state(problem, k, true);
  problem.final_state = final_state.pointers;
  run(backend, problem, k);
  return {final_state.kv, final_state.k};
}

struct Gradients {
  Tensor q, k, v, gamma_q, beta_q, gamma_k, beta_k;
  std::optional<StateOutputs> initial_state;
};

BackwardPart backward_part_of(const std::string& name) {
  if (name == "all") return BackwardPart::all;
  if (name == "queries") return BackwardPart::queries;
  if (name == "keys") return BackwardPart::keys;
  require(name == "reverse_state",
          [&] { return "part: must be all, queries, keys or reverse_state, got " + name; });
  return BackwardPart::reverse_state;
}

// Gradients that `part` does not ask for are absent. Those of the initial state are there where one is given,
// and of reverse_state always: the state that flows out of these rows towards the rows before them.
template <class Backend>
Gradients run_backward(const Tensor& grad_y, const OptionalTensor& grad_kv, const OptionalTensor& grad_k,
                       const Tensor& q, const Tensor& k, const Tensor& v, const Parameters& parameters,
                       const OptionalTensor& initial_kv, const OptionalTensor& initial_k,
                       const OptionalTensor& cu_seqlens, const Tensor& y, const Tensor& r,
                       const Options& options, BackwardPart part, bool with_state,
                       const OptionalTensor& kept) {
  const Backend backend(q);
  require(q.dim() == 4, "q, k, v: must have four dimensions");
  const Inputs inputs(q, k, v, parameters, cu_seqlens);
  auto problem = inputs.problem<BackwardProblem>(options, Backend::on_host);
  problem.part = part;
  const StateInputs initial(problem, kInitialState, initial_kv, initial_k),
      grad_final(problem, {"grad_kv", "grad_k"}, grad_kv, grad_k);
  for (const OptionalTensor* tensor : {&initial_kv, &initial_k, &grad_kv, &grad_k}) {
    if (*tensor) inputs.require_same_device(**tensor);
  }
  for (const Tensor* tensor : {&grad_y, &y, &r}) inputs.require_same_device(*tensor);
  if (kept) inputs.require_same_device(*kept);
  problem.initial_state = initial.pointers();
  problem.grad_final_state = grad_final.pointers();
  const Tensor dense_y = with_dense_rows(with_memory("y", y)),
               dense_grad_y = with_dense_rows(with_memory("grad_y", grad_y)),
               dense_r = as_contiguous(with_memory("r", r));
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
  const OptionalTensor dense_kept = kept_input(kept);
  problem.kept = const_pointer(dense_kept);
  problem.kept_bytes = dense_kept ? dense_kept->numel() : 0;

  const auto rows_like = [&](bool wanted, const Tensor& like, int64_t heads, int64_t width,
                             MutableRows* target) {
    if (!wanted) return absent(like, like.scalar_type());
    Tensor gradient = empty_rows(like, problem.batch, heads, problem.seqlen, width);
    *target = mutable_rows(gradient);
    return gradient;
  };
  const auto parameter_like = [&](bool wanted, const OptionalTensor& parameter, void** target) {
    if (!wanted || !parameter) return absent(q, type);
    const auto sizes = parameter->sizes();
    Tensor gradient = empty(*parameter, sizes.data(), static_cast<int64_t>(sizes.size()), type);
    *target = gradient.mutable_data_ptr();
    return gradient;
  };
  const bool queries = problem.wants_queries(), keys = problem.wants_keys();
  Gradients gradients{
      rows_like(queries, q, problem.heads, problem.feature_dim, &problem.grad_q),
      rows_like(keys, k, problem.kv_heads, problem.feature_dim, &problem.grad_k),
      rows_like(keys, v, problem.kv_heads, problem.head_dim, &problem.grad_v),
      parameter_like(queries, inputs.gamma_q, &problem.grad_query_affine.gamma),
      parameter_like(queries, inputs.beta_q, &problem.grad_query_affine.beta),
      parameter_like(keys, inputs.gamma_k, &problem.grad_key_affine.gamma),
      parameter_like(keys, inputs.beta_k, &problem.grad_key_affine.beta),
      std::nullopt,
  };
  if (with_state) {
    const bool present = part == BackwardPart::reverse_state || (keys && initial_kv.has_value());
    gradients.initial_state.emplace(problem, q, present);
    problem.grad_initial_state = gradients.initial_state->pointers;
  }
  const auto plan = backend.plan(problem);
  require(Backend::kept_bytes(plan) <= problem.kept_bytes, kNotKept);
  run_planned(backend, problem, plan, q);
  return gradients;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor gamma_q,
    OptionalTensor beta_q, OptionalTensor gamma_k, OptionalTensor beta_k, OptionalTensor cu_seqlens,
    const Tensor& y, const Tensor& r, std::string feature_map, std::string layer_norm, double scale,
    double eps, double layer_norm_eps, bool normalize, OptionalTensor kept) {
  Gradients g = run_backward<Backend>(
      grad_y, kNone, kNone, q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, kNone, kNone, cu_seqlens, y, r,
      {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, BackwardPart::all, false, kept);
  return {std::move(g.q),      std::move(g.k),       std::move(g.v),     std::move(g.gamma_q),
          std::move(g.beta_q), std::move(g.gamma_k), std::move(g.beta_k)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_with_state(
    const Tensor& grad_y, OptionalTensor grad_kv, OptionalTensor grad_k, const Tensor& q, const Tensor& k,
    const Tensor& v, OptionalTensor gamma_q, OptionalTensor beta_q, OptionalTensor gamma_k,
    OptionalTensor beta_k, OptionalTensor initial_kv, OptionalTensor initial_k, OptionalTensor cu_seqlens,
    const Tensor& y, const Tensor& r, std::string feature_map, std::string layer_norm, double scale,
    double eps, double layer_norm_eps, bool normalize, std::string part, OptionalTensor kept) {
  const Gradients g = run_backward<Backend>(
      grad_y, grad_kv, grad_k, q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, initial_kv, initial_k, cu_seqlens,
      y, r, {feature_map, layer_norm, scale, eps, layer_norm_eps, normalize}, backward_part_of(part), true,
      kept);
  return {g.q, g.k, g.v, g.gamma_q, g.beta_q, g.gamma_k, g.beta_k, g.initial_state->kv, g.initial_state->k};
}

template <class Backend>
Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor gamma_q, OptionalTensor beta_q,
            OptionalTensor gamma_k, OptionalTensor beta_k, Tensor state_kv, Tensor state_k,
            OptionalTensor state_index, std::string feature_map, std::string layer_norm, double scale,
            double eps, double layer_norm_eps, bool normalize) {
  const Backend backend(q);
  require(q.dim() == 3, "q, k, v: must have three dimensions");
  const Inputs inputs(q, k, v, {gamma_q, beta_q, gamma_k, beta_k}, kNone);
  auto problem = inputs.problem<StepProblem>({feature_map, layer_norm, scale, eps, layer_norm_eps, normalize},
                                             Backend::on_host);
  problem.num_slots = state_kv.size(0);
  check_state(problem, state_kv, state_k, problem.num_slots);
  Extent index_extent;
  with_memory("state_index", state_index, &index_extent);
  inputs.require_same_device(state_kv), inputs.require_same_device(state_k);
  if (state_index) inputs.require_same_device(*state_index);
  if (state_index) {
    require(state_index->dim() == 1 && state_index->size(0) == problem.batch &&
                state_index->scalar_type() == ScalarType::Long && state_index->is_contiguous(),
            "state_index: must be int64 of shape (batch)");
    problem.state_index = static_cast<const int64_t*>(state_index->const_data_ptr());
    if (Backend::on_host) check_slots(problem);
  } else {
    require(problem.num_slots == problem.batch,
            "state: must have q's batch size where state_index is not given");
  }
  const SlotMemory kv("state.kv", state_kv), k_sum("state.k", state_k);
  require(!kv.overlaps(k_sum), "state.kv: shares memory with state.k, and both are updated in place");
  const auto address = [](const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; };
  const Tensor* given[] = {&q, &k, &v, address(gamma_q), address(beta_q), address(gamma_k), address(beta_k)};
  for (size_t i = 0; i < std::size(given); ++i) {
    check_state_apart(kv, k_sum, Inputs::kNames[i], inputs.extents[i], given[i]);
  }
  check_state_apart(kv, k_sum, "state_index", index_extent, address(state_index));
  problem.state = {reinterpret_cast<void*>(kv.extent.begin), reinterpret_cast<void*>(k_sum.extent.begin)};
  problem.kv_stride = kv.stride, problem.k_stride = k_sum.stride;
  Tensor y = empty(q, {problem.batch, problem.heads, problem.head_dim}, q.scalar_type());
  problem.y = {y.mutable_data_ptr(), problem.heads * problem.head_dim, problem.head_dim, 0};
  run(backend, problem, q);
  return y;
}

// No fact holds what JSON would have to escape: names, versions and architectures.
std::string build_info() {
  std::string json = "{";
  for (const Fact& fact : build_facts()) {
    if (json.size() > 1) json += ", ";
    json += std::string("\"") + fact.name + "\": ";
    json += !fact.is_flag ? "\"" + fact.text + "\"" : fact.text.empty() ? "false" : "true";
  }
  return json + "}";
}

#if defined(REBASED_EMULATOR)
// For the test of the poison: rows as an operator allocates them, before anything is written.
Tensor unwritten(const Tensor& like) {
  return empty_rows(like, like.size(0), like.size(1), like.size(2), like.size(3));
}
#endif

template <class Backend, class Library>
void implement(Library& library) {
#if defined(REBASED_EMULATOR)
  library.impl("unwritten", TORCH_BOX(&unwritten));
#endif
  library.impl("forward", TORCH_BOX(&forward<Backend>));
  library.impl("backward", TORCH_BOX(&backward<Backend>));
  library.impl("forward_with_state", TORCH_BOX(&forward_with_state<Backend>));
  library.impl("backward_with_state", TORCH_BOX(&backward_with_state<Backend>));
  library.impl("forward_kept", TORCH_BOX(&forward_kept<Backend>));
  library.impl("step", TORCH_BOX(&step<Backend>));
  library.impl("forward_state", TORCH_BOX(&forward_state<Backend>));
}

}  // namespace

// In step, state_kv and state_k are updated in place; rebased_cuda/attention.py bumps their versions.
STABLE_TORCH_LIBRARY(rebased_cuda, library) {
#if defined(REBASED_EMULATOR)
  library.def("unwritten(Tensor like) -> Tensor");
#endif
  library.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, "
      "Tensor? beta_k, Tensor? cu_seqlens, str feature_map, str layer_norm, float scale, float eps, "
      "float layer_norm_eps, bool normalize) -> (Tensor, Tensor)");
  library.def(
      "backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, "
      "Tensor? gamma_k, Tensor? beta_k, Tensor? cu_seqlens, Tensor y, Tensor r, str feature_map, "
      "str layer_norm, float scale, float eps, float layer_norm_eps, bool normalize, Tensor? kept=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "forward_with_state(Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, "
      "Tensor? beta_k, Tensor? initial_kv, Tensor? initial_k, Tensor? cu_seqlens, str feature_map, "
      "str layer_norm, float scale, float eps, float layer_norm_eps, bool normalize, bool return_state) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward_with_state(Tensor grad_y, Tensor? grad_kv, Tensor? grad_k, Tensor q, Tensor k, Tensor v, "
      "Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, Tensor? beta_k, Tensor? initial_kv, "
      "Tensor? initial_k, Tensor? cu_seqlens, Tensor y, Tensor r, str feature_map, str layer_norm, "
      "float scale, float eps, float layer_norm_eps, bool normalize, str part, Tensor? kept=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "forward_kept(Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, "
      "Tensor? beta_k, Tensor? initial_kv, Tensor? initial_k, Tensor? cu_seqlens, str feature_map, "
      "str layer_norm, float scale, float eps, float layer_norm_eps, bool normalize, bool return_state, "
      "bool keep_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "forward_state(Tensor k, Tensor v, Tensor? gamma_k, Tensor? beta_k, Tensor? cu_seqlens, "
      "str feature_map, str layer_norm, float layer_norm_eps) -> (Tensor, Tensor)");
  library.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor? gamma_q, Tensor? beta_q, Tensor? gamma_k, Tensor? beta_k, "
      "Tensor(a!) state_kv, Tensor(b!) state_k, Tensor? state_index, str feature_map, str layer_norm, "
      "float scale, float eps, float layer_norm_eps, bool normalize) -> Tensor");
  library.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rebased_cuda, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(rebased_cuda, CPU, library) {
  with_cpu_backend([&](auto backend) { implement<typename decltype(backend)::type>(library); });
}

#if defined(REBASED_CUDA)
STABLE_TORCH_LIBRARY_IMPL(rebased_cuda, CUDA, library) { implement<CudaBackend>(library); }
#endif

}  // namespace rebased
