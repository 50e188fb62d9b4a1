// The Python module rebased_cuda._C: facts about the build, and the launch plan of a shape. Tensors never
// pass here (library.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/plan/configurations.h"
#include "cuda/plan/plan.h"
#include "op/backend.h"
#if defined(REBASED_EMULATOR)
#include "emulator/runtime.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(REBASED_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = REBASED_CUDA_VERSION;
  info["cuda_architectures"] = REBASED_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_version"] = "";
  info["cuda_architectures"] = "";
#endif
#if defined(REBASED_EMULATOR)
  info["emulator"] = true;
#else
  info["emulator"] = false;
#endif
  info["torch_version"] = REBASED_TORCH_VERSION;  // built against; any torch from 2.11 on will do
  info["compiler"] = REBASED_COMPILER;
  info["cpu_instruction_set"] = rebased::cpu::instruction_set();
  return info;
}

// names[i] is the text of the i-th value of an enum.
template <class Enum, size_t count>
Enum parse(const char* argument, const std::string& text, const char* const (&names)[count]) {
  for (size_t i = 0; i < count; ++i) {
    if (text == names[i]) return static_cast<Enum>(i);
  }
  throw std::invalid_argument(std::string(argument) + ": unknown value " + text);
}

constexpr const char* dtype_names[] = {"float32", "float64", "float16", "bfloat16"};
constexpr const char* feature_map_names[] = {"outer", "square", "taylor", "elu", "identity"};
constexpr const char* layer_norm_names[] = {"none", "token", "head"};
constexpr const char* path_names[] = {"general", "tensor_core", "quadratic", "float32"};

// A problem of this shape with dense rows; pointers that only have to be there point at `present`.
template <class AnyProblem>
AnyProblem shaped(int64_t batch, int64_t heads, int64_t kv_heads, int64_t seqlen, int64_t feature_dim,
                  int64_t head_dim, const std::string& dtype, const std::string& feature_map,
                  const std::string& layer_norm, int64_t sequences) {
  static const int64_t present[2] = {};
  AnyProblem p{};
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.seqlen = seqlen;
  p.feature_dim = feature_dim, p.head_dim = head_dim;
  p.num_sequences = sequences ? sequences : batch;
  p.cu_seqlens = sequences ? present : nullptr;
  p.dtype = parse<rebased::Dtype>("dtype", dtype, dtype_names);
  p.feature_map = parse<rebased::FeatureMap>("feature_map", feature_map, feature_map_names);
  p.layer_norm = parse<rebased::LayerNorm>("layer_norm", layer_norm, layer_norm_names);
  p.normalize = true;
  p.q = {nullptr, heads * seqlen * feature_dim, seqlen * feature_dim, feature_dim};
  p.k = {nullptr, kv_heads * seqlen * feature_dim, seqlen * feature_dim, feature_dim};
  p.v = {nullptr, kv_heads * seqlen * head_dim, seqlen * head_dim, head_dim};
  p.query_affine = p.key_affine = {present, present, feature_dim, feature_dim};
  return p;
}

#if defined(REBASED_EMULATOR)
// How many kernels a call of this plan launches; none of them runs. 0 where there is no such plan.
template <class AnyProblem>
int count_launches(AnyProblem problem, const rebased::Plan& plan) {
  alignas(64) static char present[64];
  problem.workspace = present;
  const rebased::emulator::LaunchCounter counter;
  return *rebased::emulated::run(problem, plan, nullptr) ? 0 : counter.count();
}
#endif

py::dict plan(const std::string& direction, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seqlen,
              int64_t feature_dim, int64_t head_dim, const std::string& dtype, const std::string& feature_map,
              const std::string& layer_norm, int64_t sequences, bool state, bool keep, int multiprocessors,
              int64_t shared_memory_per_block) {
  const std::pair<const char*, int64_t> sizes[] = {{"batch", batch},
                                                   {"heads", heads},
                                                   {"kv_heads", kv_heads},
                                                   {"seqlen", seqlen},
                                                   {"feature_dim", feature_dim},
                                                   {"head_dim", head_dim},
                                                   {"multiprocessors", multiprocessors},
                                                   {"shared_memory_per_block", shared_memory_per_block}};
  for (const auto& [name, size] : sizes) {
    if (size < 1 || size > int64_t(1) << 40) {
      throw std::invalid_argument(std::string(name) + ": must be at least 1, got " + std::to_string(size));
    }
  }
  if (heads % kv_heads || feature_dim > 128 || head_dim > 256) {
    throw std::invalid_argument("heads, feature_dim, head_dim: not sizes that the op takes");
  }
  alignas(16) static char present[16];
  const rebased::Device device{multiprocessors, 90, shared_memory_per_block};
  const auto problem = [&](auto kind) {
    return shaped<decltype(kind)>(batch, heads, kv_heads, seqlen, feature_dim, head_dim, dtype, feature_map,
                                  layer_norm, sequences);
  };
  rebased::Plan chosen;
  [[maybe_unused]] int launches = 0;
  const auto plan_call = [&](const auto& p) {
    chosen = rebased::make_plan(p, device);
#if defined(REBASED_EMULATOR)
    launches = count_launches(p, chosen);
#endif
  };
  if (direction == "forward") {
    auto p = problem(rebased::ForwardProblem{});
    p.y.data = p.r = present;
    if (state) p.final_state = {present, present};
    p.keep = keep ? rebased::Keep::statistics : rebased::Keep::nothing;
    plan_call(p);
  } else if (direction == "backward") {
    auto p = problem(rebased::BackwardProblem{});
    if (state) p.grad_final_state = {present, present};
    if (keep) {
      auto forward = problem(rebased::ForwardProblem{});
      forward.keep = rebased::Keep::statistics;
      p.kept_bytes = rebased::make_plan(forward, device).kept_bytes;
    }
    p.grad_q.data = p.grad_k.data = p.grad_v.data = present;
    p.grad_query_affine = p.grad_key_affine = {present, present};
    plan_call(p);
  } else if (direction == "step") {
    plan_call(problem(rebased::StepProblem{}));
  } else {
    throw std::invalid_argument("direction: must be forward, backward or step, got " + direction);
  }
  py::dict result;
  result["path"] = rebased::path_name(chosen.path);
  result["error"] = chosen.error;
#if defined(REBASED_EMULATOR)
  result["launches"] = launches;
#endif
  for (const auto& [name, value] : rebased::plan_entries(chosen)) result[name.c_str()] = value;
  return result;
}

void set_plan_override(const std::string& path, int chunk, int segments, int state_in_shared,
                       int multiprocessors, int64_t shared_memory_per_block, int compensated_rows) {
  rebased::PlanOverride forced;
  forced.force_path = !path.empty();
  if (forced.force_path) forced.path = parse<rebased::Path>("path", path, path_names);
  forced.chunk = chunk, forced.segments = segments, forced.state_in_shared = state_in_shared;
  forced.multiprocessors = multiprocessors, forced.shared_memory_per_block = shared_memory_per_block;
  forced.compensated_rows = compensated_rows;
  rebased::set_plan_override(forced);
}

py::list reachable_configurations(int64_t shared_memory_per_block) {
  constexpr const char* direction_names[] = {"forward", "backward", "step"};
  py::list result;
  for (const auto& [text, shape, says_little, work] :
       rebased::reachable_configurations(shared_memory_per_block)) {
    py::dict example;
    example["direction"] = direction_names[static_cast<int>(shape.direction)];
    example["dtype"] = dtype_names[static_cast<int>(shape.dtype)];
    example["feature_map"] = feature_map_names[static_cast<int>(shape.feature_map)];
    example["feature_dim"] = shape.feature_dim;
    example["head_dim"] = shape.head_dim;
    example["heads"] = shape.heads;
    example["kv_heads"] = shape.kv_heads;
    example["seqlen"] = shape.seqlen;
    example["sequences"] = shape.sequences;
    example["state"] = shape.state;
    example["aligned"] = shape.aligned;
    example["multiprocessors"] = shape.multiprocessors;
    example["shared_memory_per_block"] = shape.shared_memory_per_block;
    example["says_little"] = says_little;
    example["work"] = work;
    result.append(py::make_tuple(text, example));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What was built, and how a problem would be launched.";
  module.def("build_info", &build_info, "Facts about this build as a dict.");
  module.def("plan", &plan, "How the CUDA kernels would be launched for a shape, as a dict of named numbers.",
             py::arg("direction"), py::kw_only(), py::arg("batch") = 1, py::arg("heads") = 12,
             py::arg("kv_heads") = 12, py::arg("seqlen") = 4096, py::arg("feature_dim") = 16,
             py::arg("head_dim") = 64, py::arg("dtype") = "bfloat16", py::arg("feature_map") = "outer",
             py::arg("layer_norm") = "token", py::arg("sequences") = 0, py::arg("state") = false,
             py::arg("keep") = false, py::arg("multiprocessors") = 132, py::arg("shared_memory_per_block") = 227 << 10);
  module.def("set_plan_override", &set_plan_override,
             "For tests: what every later plan of the CUDA kernels takes instead of its own choice.",
             py::kw_only(), py::arg("path") = "", py::arg("chunk") = 0, py::arg("segments") = 0,
             py::arg("state_in_shared") = -1, py::arg("multiprocessors") = 0,
             py::arg("shared_memory_per_block") = 0, py::arg("compensated_rows") = 0);
  module.def("record_launches", &rebased::record_launches,
             "For tests: whether every later plan leaves its launch configuration to be taken.",
             py::arg("on"));
  module.def(
      "take_recorded_launches", &rebased::take_recorded_launches,
      "The launch configurations since record_launches(True), or since the last call; they are forgotten.");
  module.def("reachable_configurations", &reachable_configurations,
             "For tests: every launch configuration that a plan can choose on such a device, each with the "
             "smallest call that chooses it, as (text, dict) pairs. Takes seconds.",
             py::arg("shared_memory_per_block"));
}
