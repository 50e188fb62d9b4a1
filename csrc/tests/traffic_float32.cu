// Counts with the tracer what the float32 kernels move: forward and backward, outer and square, d = 16, dv =
// 64, "head" LayerNorm with gamma and beta, one head of 4096 tokens, in one pass and in 4 segments. Writes
// what traffic.cu writes, under the names "<sweep> <map> <segments> float32".
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/float32/launch.cuh"
#include "cuda/launch/sequence.cuh"
#include "emulator/tracer.h"
#include "op/backend.h"

namespace rebased::REBASED_BACKEND {
namespace {

using rebased::emulator::trace_buffer;

constexpr int64_t tokens = 4096, head_dim = 64, feature_dim = 16;

[[noreturn]] void fail(const char* error) {
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

// Named arrays of floats that begin at a sector, as memory of a device does.
class Memory {
 public:
  // An array without a name: accesses to it are not counted.
  float* array(const char* name, int64_t count) {
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    if (posix_memalign(&memory, 256, bytes)) fail("no memory");
    arrays_.emplace_back(static_cast<float*>(memory), &std::free);
    for (int64_t i = 0; i < count; ++i) arrays_.back().get()[i] = 0.01f * static_cast<float>(i % 7 + 1);
    if (name) trace_buffer(name, memory, bytes);
    return arrays_.back().get();
  }
  // An array (tokens, width).
  template <class Rows>
  Rows rows(const char* name, int64_t width) {
    return Rows{array(name, tokens * width), tokens * width, tokens * width, width};
  }

 private:
  std::vector<std::unique_ptr<float, void (*)(void*)>> arrays_;
};

template <class AnyProblem>
AnyProblem make_problem(FeatureMap map, Memory* memory) {
  AnyProblem result{};
  result.batch = result.heads = result.kv_heads = result.num_sequences = 1;
  result.seqlen = tokens, result.feature_dim = feature_dim, result.head_dim = head_dim;
  result.dtype = Dtype::float32, result.feature_map = map, result.layer_norm = LayerNorm::head;
  result.normalize = true, result.scale = 0.25, result.eps = 1e-3, result.layer_norm_eps = 1e-5;
  result.q = memory->rows<ConstRows>("q", feature_dim), result.k = memory->rows<ConstRows>("k", feature_dim);
  result.v = memory->rows<ConstRows>("v", head_dim);
  float* const affine = memory->array("gamma, beta", 4 * feature_dim);
  result.query_affine = {affine, affine + feature_dim, feature_dim, feature_dim};
  result.key_affine = {affine + 2 * feature_dim, affine + 3 * feature_dim, feature_dim, feature_dim};
  return result;
}

// Gives each region of the plan's workspace its name.
template <class AnyProblem>
void add_workspace(AnyProblem* problem, const Plan& plan, Memory* memory) {
  float* const begin = memory->array(nullptr, plan.workspace.bytes / 4 + 1);
  problem->workspace = begin;
  const Workspace& workspace = plan.workspace;
  const std::pair<const char*, Region> regions[] = {{"states", workspace.states},
                                                    {"reverse states", workspace.reverse_states},
                                                    {"delta", workspace.delta},
                                                    {"affine sums", workspace.query_affine},
                                                    {"affine sums", workspace.key_affine}};
  for (const auto& [name, region] : regions) {
    if (region.bytes) trace_buffer(name, begin + region.offset / 4, static_cast<size_t>(region.bytes));
  }
}

Device traced_device() { return {132, 90, 227 << 10}; }

template <FeatureMap map>
const char* trace_forward() {
  Memory memory;
  auto problem = make_problem<ForwardProblem>(map, &memory);
  problem.y = memory.rows<MutableRows>("y", head_dim);
  problem.r = memory.array("r", tokens);
  const Plan plan = make_plan(problem, traced_device());
  if (*plan.error) return plan.error;
  add_workspace(&problem, plan, &memory);
  return run_sequence<float>(problem, plan, float32_family<map>(problem), nullptr);
}

template <FeatureMap map>
const char* trace_backward() {
  Memory memory;
  auto problem = make_problem<BackwardProblem>(map, &memory);
  problem.y = memory.rows<ConstRows>("y", head_dim);
  problem.r = memory.array("r", tokens);
  problem.grad_y = memory.rows<ConstRows>("grad y", head_dim);
  problem.grad_q = memory.rows<MutableRows>("grad q", feature_dim);
  problem.grad_k = memory.rows<MutableRows>("grad k", feature_dim);
  problem.grad_v = memory.rows<MutableRows>("grad v", head_dim);
  float* const affine = memory.array("grad gamma, beta", 4 * feature_dim);
  problem.grad_query_affine = {affine, affine + feature_dim};
  problem.grad_key_affine = {affine + 2 * feature_dim, affine + 3 * feature_dim};
  const Plan plan = make_plan(problem, traced_device());
  if (*plan.error) return plan.error;
  add_workspace(&problem, plan, &memory);
  return run_sequence<float>(problem, plan, float32_family<map>(problem), nullptr);
}

void report(const char* sweep, const char* map_name, const char* (*run)()) {
  static const char* separator = "{";
  for (const int segments : {1, 4}) {
    PlanOverride forced;
    forced.force_path = true, forced.path = Path::float32, forced.segments = segments;
    set_plan_override(forced);
    const char* const error = run();
    if (*error) fail(error);
    std::printf("%s\"%s %s %d float32\": ", separator, sweep, map_name, segments);
    separator = ",\n";
    rebased::emulator::trace_write_json(stdout);
    rebased::emulator::trace_reset();
  }
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND

int main() {
  using namespace rebased::REBASED_BACKEND;
  using rebased::FeatureMap;
  report("forward", "outer", &trace_forward<FeatureMap::outer>);
  report("forward", "square", &trace_forward<FeatureMap::square>);
  report("backward", "outer", &trace_backward<FeatureMap::outer>);
  report("backward", "square", &trace_backward<FeatureMap::square>);
  std::printf("}\n");
  return 0;
}
