// The Python module rebased_cuda._C: facts about the build, and the launch plan of a shape. Tensors never
// pass here (library.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/facts.h"
#include "bindings/row_layout.h"
#include "cuda/plan/configurations.h"
#include "cuda/plan/plan.h"
#include "op/backend.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  for (const rebased::Fact& fact : rebased::build_facts()) {
    if (fact.is_flag) {
      info[fact.name] = !fact.text.empty();
    } else {
      info[fact.name] = fact.text;
    }
  }
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
  int launches = -1;
  const auto plan_call = [&](const auto& p) {
    chosen = rebased::make_plan(p, device);
    launches = rebased::count_launches(p, chosen);
  };
  if (direction == "forward") {
    auto p = problem(rebased::ForwardProblem{});
    p.y.data = p.r = present;
    if (state) p.final_state = {present, present};
    p.keep = keep ? rebased::Keep::states : rebased::Keep::nothing;
    plan_call(p);
  } else if (direction == "backward") {
    auto p = problem(rebased::BackwardProblem{});
    if (state) p.grad_final_state = {present, present};
    if (keep) {
      auto forward = problem(rebased::ForwardProblem{});
      forward.keep = rebased::Keep::states;
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
  if (launches >= 0) result["launches"] = launches;
  for (const auto& [name, value] : rebased::plan_entries(chosen)) result[name.c_str()] = value;
  return result;
}

using Sizes = std::vector<int64_t>;

// A call of the op as far as the plan looks at it. `sequences`: of packed ones, or -1.
struct GivenCall {
  std::vector<Sizes> sizes, strides;  // of q, k and v
  std::string dtype, feature_map, layer_norm;
  std::vector<bool> parameters;  // whether gamma_q, beta_q, gamma_k, beta_k are there
  int64_t sequences;
  bool normalize, initial_state, return_state, keep;
  rebased::Device device;

  // Rows in memory: as they were given where `like` is one of q, k and v, or dense.
  rebased::ConstRows rows(size_t like, int64_t heads, int64_t width, bool given) const {
    alignas(16) static const char present[16] = {};
    const Sizes& size = sizes[like];
    const int64_t rows = size[2], *stride = strides[like].data();
    const rebased::Dtype type = parse("dtype", dtype);
    const rebased::RowLayout layout(size.data(), stride, 4, rebased::element_size(type), 0,
                                    type == rebased::Dtype::bfloat16);
    const auto used = [&](int i) { return size[static_cast<size_t>(i)] == 1 ? 0 : stride[i]; };
    if (given && layout.dense && layout.aligned) return {present, used(0), used(1), used(2)};
    if (stride[1] < stride[2]) return {present, heads * rows * width, width, heads * width};
    return {present, heads * rows * width, rows * width, width};
  }
  static rebased::Dtype parse(const char* argument, const std::string& text) {
    return ::parse<rebased::Dtype>(argument, text, dtype_names);
  }

  template <class AnyProblem>
  AnyProblem problem() const {
    static const int64_t present[2] = {};
    const Sizes &q = sizes[0], &v = sizes[2];
    AnyProblem p{};
    p.batch = q[0], p.heads = q[1], p.kv_heads = v[1], p.seqlen = q[2];
    p.feature_dim = q[3], p.head_dim = v[3];
    p.num_sequences = sequences < 0 ? p.batch : sequences;
    p.cu_seqlens = sequences < 0 ? nullptr : present;
    p.dtype = parse("dtype", dtype);
    p.feature_map = ::parse<rebased::FeatureMap>("feature_map", feature_map, feature_map_names);
    p.layer_norm = ::parse<rebased::LayerNorm>("layer_norm", layer_norm, layer_norm_names);
    if (p.layer_norm == rebased::LayerNorm::token && p.heads == 1) p.layer_norm = rebased::LayerNorm::head;
    p.normalize = normalize;
    p.q = rows(0, p.heads, p.feature_dim, true);
    p.k = rows(1, p.kv_heads, p.feature_dim, true);
    p.v = rows(2, p.kv_heads, p.head_dim, true);
    const auto pointer = [&](size_t i) { return parameters[i] ? present : nullptr; };
    p.query_affine = {pointer(0), pointer(1), p.feature_dim, p.feature_dim};
    p.key_affine = {pointer(2), pointer(3), p.feature_dim, p.feature_dim};
    if (initial_state) p.initial_state = {present, present};
    return p;
  }
  rebased::ForwardProblem forward() const {
    static char present[16];
    auto p = problem<rebased::ForwardProblem>();
    const rebased::ConstRows y = rows(0, p.heads, p.head_dim, false);
    p.y = {present, y.batch_stride, y.head_stride, y.row_stride};
    if (return_state) p.final_state = {present, present};
    p.keep = keep ? rebased::Keep::states : rebased::Keep::nothing;
    return p;
  }
  rebased::BackwardProblem backward() const {
    static char present[16];
    auto p = problem<rebased::BackwardProblem>();
    p.y = p.grad_y = rows(0, p.heads, p.head_dim, false);
    const auto output = [](const rebased::ConstRows& x) {
      return rebased::MutableRows{present, x.batch_stride, x.head_stride, x.row_stride};
    };
    p.grad_q = output(rows(0, p.heads, p.feature_dim, false));
    p.grad_k = output(rows(1, p.kv_heads, p.feature_dim, false));
    p.grad_v = output(rows(2, p.kv_heads, p.head_dim, false));
    if (initial_state) p.grad_initial_state = {present, present};
    if (return_state) p.grad_final_state = {present, present};
    if (keep) p.kept_bytes = rebased::make_plan(forward(), device).kept_bytes;
    return p;
  }
};

template <class AnyProblem>
py::dict explained(const AnyProblem& problem, const rebased::Device& device) {
  const rebased::Plan plan = rebased::make_plan(problem, device);
  py::list refusals;
  for (const auto& [argument, reason, remedy] : rebased::tensor_core_refusals(problem, device)) {
    refusals.append(py::make_tuple(argument, reason, remedy));
  }
  py::dict result;
  result["path"] = rebased::path_name(plan.path);
  result["error"] = plan.error;
  result["segments"] = plan.segments;
  result["workspace_bytes"] = plan.workspace.bytes;
  result["kept_bytes"] = plan.kept_bytes;
  result["refusals"] = refusals;
  return result;
}

GivenCall given_call(const std::vector<Sizes>& sizes, const std::vector<Sizes>& strides,
                     const std::string& dtype, const std::string& feature_map, const std::string& layer_norm,
                     const std::vector<bool>& parameters, int64_t sequences, bool normalize,
                     bool initial_state, bool return_state, bool keep, int multiprocessors,
                     int compute_capability, int64_t shared_memory_per_block) {
  return {sizes,        strides,    dtype,
          feature_map,  layer_norm, parameters,
          sequences,    normalize,  initial_state,
          return_state, keep,       {multiprocessors, compute_capability, shared_memory_per_block}};
}

// Of a GPU, or with index -1 of the emulator: multiprocessors, compute capability, shared memory per block.
py::tuple device_limits(int index) {
  rebased::Device device{};
  const char* const error = rebased::query_limits(index, &device);
  if (*error) throw std::runtime_error(std::string("rebased_cuda: ") + error);
  return py::make_tuple(device.multiprocessors, device.compute_capability, device.shared_memory_per_block);
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
             py::arg("keep") = false, py::arg("multiprocessors") = 132,
             py::arg("shared_memory_per_block") = 227 << 10);
  py::class_<GivenCall>(module, "GivenCall",
                        "A call of the op that was checked, on a device with these limits.")
      .def(py::init(&given_call), py::kw_only(), py::arg("sizes"), py::arg("strides"), py::arg("dtype"),
           py::arg("feature_map"), py::arg("layer_norm"), py::arg("parameters"), py::arg("sequences"),
           py::arg("normalize"), py::arg("initial_state"), py::arg("return_state"), py::arg("keep"),
           py::arg("multiprocessors"), py::arg("compute_capability"), py::arg("shared_memory_per_block"))
      .def("forward", [](const GivenCall& call) { return explained(call.forward(), call.device); })
      .def("backward", [](const GivenCall& call) { return explained(call.backward(), call.device); });
  module.def("device_limits", &device_limits, "Of a GPU, or with index -1 of the emulator.",
             py::arg("index"));
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
