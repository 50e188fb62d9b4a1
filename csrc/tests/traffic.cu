// Counts with the tracer what the tensor-core kernels move: forward and backward, bfloat16, outer and square
// with d = 16, outer with d = 8 and 32, dv = 64, "head" LayerNorm with gamma and beta, one head of 4096
// tokens, in one pass and in 4 segments. Writes one JSON object {"<sweep> <map> <segments>": the tracer's
// report, ...} to standard output. Figures per token are exact for any batch and number of heads, since
// blocks share no buffer that is named here.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/launch/sequence.cuh"
#include "cuda/tensor_core/family/backward.cuh"
#include "emulator/tracer.h"
#include "op/backend.h"

namespace rebased::REBASED_BACKEND::tensor_core {
namespace {

using rebased::emulator::trace_buffer;

constexpr int64_t tokens = 4096, head_dim = 64;

// What a family of kernels is compiled for, called S.
template <FeatureMap feature_map, int dim>
struct Instance {
  static constexpr FeatureMap map = feature_map;
  static constexpr int feature_dim = dim;
};

[[noreturn]] void fail(const char* error) {
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

// A named buffer that begins at a sector, as memory of a device does.
template <class T>
class Array {
 public:
  Array(const char* name, int64_t size) : name_(name), bytes_(size * static_cast<int64_t>(sizeof(T))) {
    if (posix_memalign(&memory_, 256, static_cast<size_t>(bytes_))) fail("no memory");
    std::memset(memory_, 0x3c, static_cast<size_t>(bytes_));  // about 0.0115, in bfloat16 and in float
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  T* data() const { return static_cast<T*>(memory_); }
  void trace() const { trace_buffer(name_, memory_, static_cast<size_t>(bytes_)); }

 private:
  const char* name_;
  int64_t bytes_;
  void* memory_;
};

template <class S>
struct Tensors {
  static constexpr int64_t feature_dim = S::feature_dim;
  Array<bfloat16_t> q{"q", tokens * feature_dim}, k{"k", tokens * feature_dim}, v{"v", tokens * head_dim};
  Array<bfloat16_t> y{"y", tokens * head_dim}, grad_y{"grad y", tokens * head_dim};
  Array<bfloat16_t> grad_q{"grad q", tokens * feature_dim}, grad_k{"grad k", tokens * feature_dim};
  Array<bfloat16_t> grad_v{"grad v", tokens * head_dim};
  Array<float> r{"r", tokens}, affine{"gamma, beta", 4 * feature_dim};
  Array<float> grad_affine{"grad gamma, beta", 4 * feature_dim};

  void trace() const {
    for (const auto* tensor : {&q, &k, &v, &y, &grad_y, &grad_q, &grad_k, &grad_v}) tensor->trace();
    for (const auto* tensor : {&r, &affine, &grad_affine}) tensor->trace();
  }
  template <class AnyProblem>
  AnyProblem problem() const {
    AnyProblem result{};
    result.batch = result.heads = result.kv_heads = result.num_sequences = 1;
    result.seqlen = tokens, result.feature_dim = feature_dim, result.head_dim = head_dim;
    result.dtype = Dtype::bfloat16, result.feature_map = S::map, result.layer_norm = LayerNorm::head;
    result.normalize = true, result.scale = 0.25, result.eps = 1e-3, result.layer_norm_eps = 1e-5;
    result.q = rows<ConstRows>(q, feature_dim), result.k = rows<ConstRows>(k, feature_dim);
    result.v = rows<ConstRows>(v, head_dim);
    float* const parameters = affine.data();
    result.query_affine = {parameters, parameters + feature_dim, feature_dim, feature_dim};
    result.key_affine = {parameters + 2 * feature_dim, parameters + 3 * feature_dim, feature_dim,
                         feature_dim};
    return result;
  }
  template <class Rows>
  static Rows rows(const Array<bfloat16_t>& tensor, int64_t width) {
    return Rows{tensor.data(), tokens * width, tokens * width, width};
  }
};

// Each region of the plan under its name, of `memory`.
void trace_workspace(const Plan& plan, const float* memory) {
  const Workspace& workspace = plan.workspace;
  const std::pair<const char*, Region> regions[] = {{"states", workspace.states},
                                                    {"reverse states", workspace.reverse_states},
                                                    {"delta", workspace.delta},
                                                    {"affine sums", workspace.query_affine},
                                                    {"affine sums", workspace.key_affine}};
  for (const auto& [name, region] : regions) {
    if (region.bytes) trace_buffer(name, memory + region.offset / 4, static_cast<size_t>(region.bytes));
  }
}

template <class S, class AnyProblem>
const char* run_traced(AnyProblem problem) {
  const Plan plan = make_plan(problem, Device{132, 90, 227 << 10});
  if (*plan.error) return plan.error;
  const Array<float> memory("workspace", plan.workspace.bytes / 4 + 1);
  problem.workspace = memory.data();
  trace_workspace(plan, memory.data());
  return run_sequence<bfloat16_t>(problem, plan, tensor_core_family<S::map, S::feature_dim>(problem),
                                  nullptr);
}

template <class S>
const char* trace_forward(const Tensors<S>& tensors) {
  auto problem = tensors.template problem<ForwardProblem>();
  problem.y = Tensors<S>::template rows<MutableRows>(tensors.y, head_dim);
  problem.r = tensors.r.data();
  return run_traced<S>(problem);
}

template <class S>
const char* trace_backward(const Tensors<S>& tensors) {
  constexpr int64_t feature_dim = S::feature_dim;
  auto problem = tensors.template problem<BackwardProblem>();
  problem.y = Tensors<S>::template rows<ConstRows>(tensors.y, head_dim);
  problem.r = tensors.r.data();
  problem.grad_y = Tensors<S>::template rows<ConstRows>(tensors.grad_y, head_dim);
  problem.grad_q = Tensors<S>::template rows<MutableRows>(tensors.grad_q, feature_dim);
  problem.grad_k = Tensors<S>::template rows<MutableRows>(tensors.grad_k, feature_dim);
  problem.grad_v = Tensors<S>::template rows<MutableRows>(tensors.grad_v, head_dim);
  float* const parameters = tensors.grad_affine.data();
  problem.grad_query_affine = {parameters, parameters + feature_dim};
  problem.grad_key_affine = {parameters + 2 * feature_dim, parameters + 3 * feature_dim};
  return run_traced<S>(problem);
}

template <class S>
void trace_map(const char* map_name, const char** separator) {
  const auto report = [&](const char* sweep, int segments, const char* (*run)(const Tensors<S>&)) {
    PlanOverride forced;
    forced.force_path = true, forced.path = Path::tensor_core, forced.segments = segments;
    set_plan_override(forced);
    const Tensors<S> tensors;
    tensors.trace();
    const char* const error = run(tensors);
    if (*error) fail(error);
    std::printf("%s\"%s %s %d\": ", *separator, sweep, map_name, segments);
    *separator = ",\n";
    rebased::emulator::trace_write_json(stdout);
    rebased::emulator::trace_reset();
  };
  for (const int segments : {1, 4}) {
    report("forward", segments, &trace_forward<S>);
    report("backward", segments, &trace_backward<S>);
  }
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND::tensor_core

int main() {
  using namespace rebased::REBASED_BACKEND::tensor_core;
  const char* separator = "{";
  trace_map<Instance<rebased::FeatureMap::outer, 16>>("outer", &separator);
  trace_map<Instance<rebased::FeatureMap::square, 16>>("square", &separator);
  trace_map<Instance<rebased::FeatureMap::outer, 8>>("outer8", &separator);
  trace_map<Instance<rebased::FeatureMap::outer, 32>>("outer32", &separator);
  std::printf("}\n");
  return 0;
}
