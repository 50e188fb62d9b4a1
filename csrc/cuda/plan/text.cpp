// A plan in words, for tests and for showing it.
#include <atomic>
#include <mutex>

#include "cuda/plan/parts.h"
#include "cuda/plan/tensor_core_shape.h"

namespace rebased {
namespace {

constexpr const char* dtype_names[] = {"float32", "float64", "float16", "bfloat16"};
constexpr const char* map_names[] = {"outer", "square", "taylor", "elu", "identity"};

template <class AnyProblem>
std::string sweep_configuration(const char* direction, const AnyProblem& problem, const Plan& plan) {
  std::string text = std::string(direction) + " " + path_name(plan.path);
  const auto add = [&](const std::string& word) { text += " " + word; };
  add(dtype_names[static_cast<int>(problem.dtype)]);
  const bool fixed = plan.path == Path::tensor_core || plan.path == Path::float32;
  if (fixed) add(map_names[static_cast<int>(problem.feature_map)]);
  if (plan.path == Path::tensor_core) add("d=" + std::to_string(problem.feature_dim));
  const auto add_chunk = [&] { add("chunk=" + std::to_string(plan.tiles.chunk)); };
  if (fixed) {
    add(plan.column_groups == 1 ? "one-column-group" : "column-groups");
    if (plan.path == Path::tensor_core) add_chunk();
  } else {
    add("threads=" + std::to_string(plan.tiles.threads));
    add_chunk();
  }
  if (plan.path == Path::general) add(plan.tiles.state_in_shared ? "state-in-shared" : "state-in-workspace");
  if (plan.path != Path::quadratic) {
    add(plan.segments == 1 ? "one-segment" : plan.segments <= 8 ? "few-segments" : "many-segments");
  }
  if (plan.path == Path::tensor_core) {
    add("pieces=" + std::to_string(tensor_core::Pieces(problem).least()));
  }
  if (problem.group_size() > 1) add("grouped");
  if (problem.cu_seqlens) add("packed");
  if (plan.workspace.carries.bytes) add("compensated");
  return text;
}

std::atomic<bool> recording{false};
std::mutex recorded_mutex;
std::vector<std::string> recorded;

}  // namespace

std::string launch_configuration(const ForwardProblem& problem, const Plan& plan) {
  return sweep_configuration("forward", problem, plan);
}
std::string launch_configuration(const BackwardProblem& problem, const Plan& plan) {
  return sweep_configuration("backward", problem, plan);
}
std::string launch_configuration(const StepProblem& problem, const Plan& plan) {
  const StepTiles& step = plan.step;
  const bool one_pass = step.features_at_once >= features_of(problem);
  return std::string("step ") + dtype_names[static_cast<int>(problem.dtype)] +
         " threads=" + std::to_string(step.threads) + " heads-at-once=" + std::to_string(step.heads_at_once) +
         (step.group > step.heads_at_once ? " heads-in-turns" : "") +
         (one_pass ? " one-pass" : " several-passes");
}

template <class AnyProblem>
Plan record(const AnyProblem& problem, const Plan& plan) {
  if (recording) {
    std::lock_guard<std::mutex> lock(recorded_mutex);
    recorded.push_back(launch_configuration(problem, plan));
  }
  return plan;
}
template Plan record(const ForwardProblem&, const Plan&);
template Plan record(const BackwardProblem&, const Plan&);
template Plan record(const StepProblem&, const Plan&);

void record_launches(bool on) {
  std::lock_guard<std::mutex> lock(recorded_mutex);
  recorded.clear();
  recording = on;
}
std::vector<std::string> take_recorded_launches() {
  std::lock_guard<std::mutex> lock(recorded_mutex);
  return std::exchange(recorded, {});
}

const char* path_name(Path path) {
  constexpr const char* names[] = {"general", "tensor_core", "quadratic", "float32"};
  return names[static_cast<int>(path)];
}

std::vector<std::pair<std::string, int64_t>> plan_entries(const Plan& plan) {
  std::vector<std::pair<std::string, int64_t>> entries = {
      {"segments", plan.segments},
      {"column_groups", plan.column_groups},
      {"shared_memory_bytes", plan.shared_memory_bytes},
      {"tiles.chunk", plan.tiles.chunk},
      {"tiles.threads", plan.tiles.threads},
      {"tiles.num_features", plan.tiles.num_features},
      {"tiles.state_in_shared", plan.tiles.state_in_shared},
      {"step.threads", plan.step.threads},
      {"step.heads_at_once", plan.step.heads_at_once},
      {"step.features_at_once", plan.step.features_at_once},
      {"workspace.bytes", plan.workspace.bytes},
      {"kept_bytes", plan.kept_bytes},
  };
  const Workspace& workspace = plan.workspace;
  const std::pair<const char*, Region> regions[] = {
      {"bounds", workspace.bounds},
      {"query_statistics", workspace.query_statistics},
      {"key_statistics", workspace.key_statistics},
      {"states", workspace.states},
      {"reverse_states", workspace.reverse_states},
      {"delta", workspace.delta},
      {"query_gradient", workspace.query_gradient},
      {"key_gradient", workspace.key_gradient},
      {"query_affine", workspace.query_affine},
      {"key_affine", workspace.key_affine},
      {"carries", workspace.carries},
      {"initial_sums", workspace.initial_sums},
  };
  for (const auto& [name, region] : regions) {
    if (region.bytes == 0) continue;
    entries.emplace_back(std::string("workspace.") + name + ".offset", region.offset);
    entries.emplace_back(std::string("workspace.") + name + ".bytes", region.bytes);
  }
  return entries;
}

}  // namespace rebased
