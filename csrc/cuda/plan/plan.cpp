#include "cuda/plan/plan.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "cuda/plan/float32_shape.h"
#include "cuda/plan/tensor_core_shape.h"
#include "op/backend.h"

namespace rebased {
namespace {

// Shared memory past which a block would be alone on a multiprocessor of any architecture: better a shorter
// chunk, or the state in the L2 cache, and more blocks at work.
constexpr int64_t shared_memory_of_half_a_multiprocessor = 112 * 1024;

PlanOverride active_override;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The least stride >= width that is an odd number of quads.
int odd_quads(int64_t width) { return static_cast<int>((divide_up(width, 4) | 1) * 4); }

int64_t features_of(const Problem& problem) { return num_features(problem.feature_map, problem.feature_dim); }

// Of a sequence, on average: the lengths of packed ones are on the device.
int64_t mean_rows(const Problem& problem) {
  return problem.cu_seqlens && problem.num_sequences ? problem.seqlen / problem.num_sequences
                                                     : problem.seqlen;
}

// What the general kernels need to know of a path and a direction.
struct Sweep {
  bool backward, quadratic;
  bool queries = true, keys = true;  // of backward: whose gradients are asked for
};

GeneralTiles general_tiles(const Problem& problem, Sweep sweep, int chunk, bool state_in_shared) {
  GeneralTiles tiles{};
  tiles.chunk = chunk;
  // one 4 x 4 tile of y per thread, or two
  tiles.threads = static_cast<int>(
      std::clamp<int64_t>(round_up(chunk / 4 * divide_up(problem.head_dim, 4), 32), 128, 256));
  tiles.row_stride = odd_quads(chunk);
  tiles.value_stride = odd_quads(problem.head_dim);
  tiles.num_features = static_cast<int>(features_of(problem));
  tiles.padded_features = static_cast<int>(round_up(tiles.num_features, 4));
  tiles.gradient_features = sweep.backward && !sweep.quadratic ? std::min(tiles.padded_features, 64) : 0;
  tiles.state_in_shared = state_in_shared;

  int size = 0;
  const auto take = [&size](int count) {
    const int offset = size;
    size += static_cast<int>(round_up(count, 4));
    return offset;
  };
  const int feature_tile = static_cast<int>(problem.feature_dim + 2) * tiles.row_stride;
  const int value_tile = chunk * tiles.value_stride;
  const int score_tile = chunk * tiles.row_stride;
  tiles.row_features = take(feature_tile);
  tiles.other_features = take(feature_tile);
  tiles.other_values = take(value_tile);
  if (sweep.backward) {
    tiles.row_normalized = take(feature_tile);
    tiles.row_gradient = take(feature_tile);
    tiles.row_values = take(value_tile);
    tiles.scores = take(std::max(2 * score_tile, tiles.gradient_features * tiles.row_stride));
    tiles.score_gradients = tiles.scores + score_tile;
    tiles.feature_gradients = tiles.scores;
  } else {
    tiles.scores = take(score_tile);
  }
  const bool gathers = sweep.quadratic || (sweep.backward && problem.group_size() > 1);
  tiles.gathered_values = take(gathers ? value_tile : 0);
  tiles.vectors = take(GeneralTiles::vector_count * chunk + tiles.threads);
  tiles.state = take(state_in_shared ? static_cast<int>(tiles.slot_size()) : 0);
  tiles.size = size;
  return tiles;
}

// The state in shared memory with chunks of 32 or 16 if that fits, else in the workspace with the longest
// chunk that fits: each chunk then reads the whole state once from the L2 cache. The longest chunk that fits
// when there is no state. Two blocks a multiprocessor where possible. False where nothing fits.
bool choose_tiles(const Problem& problem, const Device& device, Sweep sweep, GeneralTiles* chosen) {
  struct Candidate {
    int chunk;
    bool state_in_shared;
  };
  static constexpr Candidate candidates[] = {{32, true},  {16, true}, {64, false}, {32, false},
                                             {16, false}, {8, false}, {4, false}};
  const int64_t accumulator = accumulator_size(problem.dtype), most = device.shared_memory_per_block;
  const PlanOverride& forced = plan_override();
  const bool forced_place = forced.state_in_shared >= 0 && !sweep.quadratic;
  const int64_t state_bytes = features_of(problem) * (odd_quads(problem.head_dim) + 1) * accumulator;
  for (const int64_t limit : {std::min(most, shared_memory_of_half_a_multiprocessor), most}) {
    for (const Candidate candidate : candidates) {
      const int chunk = forced.chunk ? forced.chunk : candidate.chunk;
      const bool state_in_shared = forced_place ? forced.state_in_shared == 1 : candidate.state_in_shared;
      if (state_in_shared && (sweep.quadratic || state_bytes > limit)) continue;
      *chosen = general_tiles(problem, sweep, chunk, state_in_shared);
      if (chosen->size * accumulator <= limit) return true;
    }
  }
  return false;
}

// Enough blocks for two on every multiprocessor, of at least eight chunks each. Without a state blocks do not
// depend on each other: one per chunk, or for packed sequences per chunk of one of twice the mean length.
int choose_segments(const Problem& problem, const Device& device, Sweep sweep, int chunk) {
  const int64_t rows = mean_rows(problem), chunks = divide_up(problem.seqlen, chunk);
  if (sweep.quadratic) {
    return static_cast<int>(std::max<int64_t>(std::min(chunks, 2 * divide_up(rows, chunk)), 1));
  }
  if (plan_override().segments) return plan_override().segments;
  const int64_t blocks = problem.num_sequences * problem.kv_heads;
  if (blocks == 0) return 1;
  const int64_t wanted = divide_up(2 * device.multiprocessors, blocks);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, rows / (8 * chunk)), 1, 128));
}

Device as_overridden(Device device) {
  if (active_override.multiprocessors) device.multiprocessors = active_override.multiprocessors;
  if (active_override.shared_memory_per_block) {
    device.shared_memory_per_block = active_override.shared_memory_per_block;
  }
  return device;
}

std::atomic<bool> recording{false};
std::mutex recorded_mutex;
std::vector<std::string> recorded;

template <class AnyProblem>
Plan record(const AnyProblem& problem, const Plan& plan) {
  if (recording) {
    std::lock_guard<std::mutex> lock(recorded_mutex);
    recorded.push_back(launch_configuration(problem, plan));
  }
  return plan;
}

constexpr const char* dtype_names[] = {"float32", "float64", "float16", "bfloat16"};
constexpr const char* map_names[] = {"outer", "square", "taylor", "elu", "identity"};

std::string sweep_configuration(const char* direction, const Problem& problem, const Plan& plan) {
  std::string text = std::string(direction) + " " + path_name(plan.path);
  const auto add = [&](const std::string& word) { text += " " + word; };
  add(dtype_names[static_cast<int>(problem.dtype)]);
  const bool fixed = plan.path == Path::tensor_core || plan.path == Path::float32;
  if (fixed) add(map_names[static_cast<int>(problem.feature_map)]);
  if (plan.path == Path::tensor_core) add("d=" + std::to_string(problem.feature_dim));
  if (fixed) {
    const int64_t groups = plan.path == Path::float32 ? float32_path::column_groups(problem)
                                                      : tensor_core::column_groups(problem);
    add(groups == 1 ? "one-column-group" : "column-groups");
  } else {
    add("threads=" + std::to_string(plan.tiles.threads));
    add("chunk=" + std::to_string(plan.tiles.chunk));
  }
  if (plan.path == Path::general) add(plan.tiles.state_in_shared ? "state-in-shared" : "state-in-workspace");
  if (plan.path != Path::quadratic) {
    add(plan.segments == 1 ? "one-segment" : plan.segments <= 8 ? "few-segments" : "many-segments");
  }
  if (problem.group_size() > 1) add("grouped");
  if (problem.cu_seqlens) add("packed");
  if (plan.workspace.carries.bytes) add("compensated");
  return text;
}

void add_region(Workspace* workspace, bool needed, Region* region, int64_t bytes) {
  if (!needed) return;
  *region = {workspace->bytes, bytes};
  workspace->bytes += round_up(bytes, 64);
}

// What every path needs: the regions that launch_preparation (cuda/launch/dispatch.h) fills.
void add_shared_regions(const Problem& problem, Workspace* workspace) {
  const bool token_norm = problem.layer_norm == LayerNorm::token;
  const int64_t statistics = problem.batch * problem.seqlen * 2 * accumulator_size(problem.dtype);
  add_region(workspace, problem.cu_seqlens != nullptr, &workspace->bounds, (problem.num_sequences + 1) * 8);
  add_region(workspace, token_norm, &workspace->query_statistics, statistics);
  add_region(workspace, token_norm, &workspace->key_statistics, statistics);
}

// What a backward needs beside states: delta, `parts` gradients of q' and k' each that another kernel
// finishes, where `unfinished`, and the affine sums of `blocks` blocks for every head of a sequence.
void add_gradient_regions(const Problem& problem, Sweep sweep, int64_t blocks, int64_t parts, bool unfinished,
                          Workspace* workspace) {
  const int64_t accumulator = accumulator_size(problem.dtype), tokens = problem.batch * problem.seqlen;
  const int64_t affine = problem.num_sequences * blocks * 2 * problem.feature_dim * accumulator;
  const int64_t gradient = parts * tokens * problem.feature_dim * accumulator;
  add_region(workspace, problem.normalize, &workspace->delta, tokens * problem.heads * accumulator);
  const auto has_affine = [](const Affine& parameters) { return parameters.gamma || parameters.beta; };
  add_region(workspace, unfinished && sweep.queries, &workspace->query_gradient, gradient * problem.heads);
  add_region(workspace, unfinished && sweep.keys, &workspace->key_gradient, gradient * problem.kv_heads);
  add_region(workspace, sweep.queries && has_affine(problem.query_affine), &workspace->query_affine,
             affine * problem.heads);
  add_region(workspace, sweep.keys && has_affine(problem.key_affine), &workspace->key_affine,
             affine * problem.kv_heads);
}

// Room for what rounding takes from the sums of blocks that may walk more than compensated_rows tokens:
// `size` numbers for each, in `groups` column groups. A block of one chunk must have no carries, as packed
// sequences that are so short would share a slot.
void add_carries(const Problem& problem, int64_t groups, int64_t size, Plan* plan) {
  const int64_t forced = plan_override().compensated_rows;
  const int64_t least = std::max<int64_t>(forced ? forced : compensated_rows, plan->tiles.chunk);
  while (int64_t{1} << plan->carry_rows_log2 < least) ++plan->carry_rows_log2;
  const int64_t chunks = divide_up(problem.seqlen, plan->tiles.chunk);
  const int64_t longest = divide_up(chunks, plan->segments) * plan->tiles.chunk;
  const bool needed = accumulator_size(problem.dtype) == 4 && problem.num_sequences > 0 &&
                      longest > int64_t{1} << plan->carry_rows_log2;
  const bool packed = problem.cu_seqlens != nullptr;
  const int64_t sequences =
      carry_slot(packed, problem.seqlen, problem.num_sequences - 1, plan->carry_rows_log2) + 1;
  plan->carry_size = needed ? round_up(size, 4) : 0;
  add_region(&plan->workspace, needed, &plan->workspace.carries,
             sequences * problem.kv_heads * plan->segments * groups * plan->carry_size * 4);
}

Plan plan_general(const Problem& problem, const Device& device, Sweep sweep) {
  Plan plan;
  plan.path = sweep.quadratic ? Path::quadratic : Path::general;
  if (!choose_tiles(problem, device, sweep, &plan.tiles)) {
    plan.error = "no chunk length fits this device's shared memory";
    return plan;
  }
  const int64_t accumulator = accumulator_size(problem.dtype);
  plan.segments = choose_segments(problem, device, sweep, plan.tiles.chunk);
  plan.shared_memory_bytes = plan.tiles.size * accumulator;

  const int64_t states =
      problem.num_sequences * problem.kv_heads * plan.segments * plan.tiles.slot_size() * accumulator;
  const bool slots = !sweep.quadratic && (plan.segments > 1 || !plan.tiles.state_in_shared);
  const int64_t affine = sweep.backward ? problem.group_size() * 2 * problem.feature_dim : 0;
  Workspace& workspace = plan.workspace;
  const auto add = [&](bool needed, Region* region, int64_t bytes) {
    add_region(&workspace, needed, region, bytes);
  };
  add_shared_regions(problem, &workspace);
  add(slots, &workspace.states, states);
  if (sweep.backward) {
    add(slots, &workspace.reverse_states, states);
    add_gradient_regions(problem, sweep, plan.segments, 1, problem.layer_norm == LayerNorm::token,
                         &workspace);
  }
  if (!sweep.quadratic) add_carries(problem, 1, plan.tiles.slot_size() + affine, &plan);
  return plan;
}

// With how many segments, up to `most`, the last block ends earliest. Blocks come in waves of as many as
// `resident` on every multiprocessor can hold. Few warps leave a scheduler idle, so a wave takes no less time
// with one warp on a scheduler than with two; from there on in proportion: measured on an H100
// (issue_of_a_warp and issue_at_most of benchmarks/speed/gpu_model.py). There a block that sums the states
// before it took about a quarter of a chunk's time for each of them, and the pass that makes the states, over
// all segments but one, two fifths of what the sweep behind it takes.
int fastest_segments(int64_t blocks, int64_t chunks, const Device& device, int64_t resident, int64_t threads,
                     int64_t most) {
  constexpr int64_t summed_states = 8;  // beyond, a kernel of its own sums them
  const int64_t room = resident * device.multiprocessors;
  const int64_t warps_on_scheduler = std::max<int64_t>(threads / 128, 1);
  const auto wave = [&](int64_t on_multiprocessor) {
    return on_multiprocessor == 0 ? 0 : std::max<int64_t>(28 * on_multiprocessor * warps_on_scheduler, 60);
  };
  const auto waves = [&](int64_t count) {
    return count / room * wave(resident) + wave(divide_up(count % room, device.multiprocessors));
  };
  int64_t best = 1, least = INT64_MAX;
  for (int64_t segments = 1; segments <= std::clamp<int64_t>(most, 1, 128); ++segments) {
    const int64_t quarters = 4 * divide_up(chunks, segments) + std::min(segments, summed_states) - 1;
    const int64_t time = quarters * (5 * waves(blocks * segments) + 2 * waves(blocks * (segments - 1)));
    if (time < least) {
      least = time;
      best = segments;
    }
  }
  return static_cast<int>(best);
}

// The kernels size their own workspace, behind the regions here: clamped bounds and statistics.
Plan plan_tensor_core(const Problem& problem, const Device& device, bool backward) {
  // d = 32: blocks twice as large, of a thread's most registers, and four times the state
  const bool wide = problem.feature_dim == 32;
  const bool many_registers =
      problem.feature_dim == 16 &&
      (problem.feature_map == FeatureMap::taylor || (problem.feature_map == FeatureMap::outer && backward));
  const int64_t resident = wide ? 1 : many_registers ? 2 : 3, rows_per_segment = wide ? 1024 : 512;
  Plan plan;
  plan.path = Path::tensor_core;
  const int64_t blocks = problem.num_sequences * problem.kv_heads * tensor_core::column_groups(problem);
  const int64_t rows = mean_rows(problem);
  plan.segments = fastest_segments(blocks, divide_up(rows, tensor_core::chunk), device, resident,
                                   wide ? 256 : 128, rows / rows_per_segment);
  if (plan_override().segments) plan.segments = plan_override().segments;
  add_shared_regions(problem, &plan.workspace);
  return plan;
}

Plan refused(Path path) {
  Plan plan;
  plan.path = path;
  plan.error = "this path does not take this problem";
  return plan;
}

// Tiles of a fixed shape; of GeneralTiles only what says how chunks are cut and where a slot's entries are.
Plan plan_float32(const Problem& problem, const Device& device, int chunk, int64_t shared_floats) {
  constexpr int64_t resident = 2, rows_per_segment = 512;
  Plan plan;
  plan.path = Path::float32;
  plan.shared_memory_bytes = shared_floats * 4;
  GeneralTiles& tiles = plan.tiles;
  tiles.chunk = chunk;
  tiles.threads = float32_path::threads;
  tiles.value_stride = static_cast<int>(problem.head_dim);
  tiles.num_features = float32_path::state_features(problem.feature_map);
  tiles.padded_features = float32_path::padded_features(problem.feature_map);
  tiles.state_in_shared = true;
  const int64_t states = problem.num_sequences * problem.kv_heads, rows = mean_rows(problem);
  plan.segments = fastest_segments(states * float32_path::column_groups(problem), divide_up(rows, chunk),
                                   device, resident, float32_path::threads, rows / rows_per_segment);
  if (plan_override().segments) plan.segments = plan_override().segments;
  add_shared_regions(problem, &plan.workspace);
  add_region(&plan.workspace, plan.segments > 1, &plan.workspace.states,
             states * plan.segments * tiles.slot_size() * 4);
  add_carries(problem, float32_path::column_groups(problem),
              float32_path::carry_size(problem.feature_map, problem.group_size()), &plan);
  return plan;
}

bool stateless(const ForwardProblem& problem) {
  return !problem.initial_state.kv && !problem.initial_state.k && !problem.final_state.kv &&
         !problem.final_state.k;
}
bool stateless(const BackwardProblem& problem) {
  return !problem.initial_state.kv && !problem.initial_state.k && !problem.grad_final_state.kv &&
         !problem.grad_final_state.k && !problem.grad_initial_state.kv && !problem.grad_initial_state.k;
}

// Whether scores of all pairs cost fewer operations than a state: per row and with n rows on average,
//   forward   n (d + dv)       against C (d + dv) + 4 F dv
//   backward  n (3 d + 2 dv)   against C (3 d + 2 dv) + 10 F dv
// `slowness`: the time of an operation without a state, in those of one with.
bool quadratic_is_cheaper(const Problem& problem, bool backward, int slowness) {
  constexpr int64_t chunk = 32;
  const int64_t d = problem.feature_dim, dv = problem.head_dim;
  const int64_t pair = backward ? 3 * d + 2 * dv : d + dv;
  return (mean_rows(problem) - chunk) * pair * slowness < (backward ? 10 : 4) * features_of(problem) * dv;
}

// The float32 path's plan, or one with an error where it does not take the problem.
Plan plan_float32(const ForwardProblem& problem, const Device& device) {
  if (!float32_path::supports(problem)) return refused(Path::float32);
  const int size = float32_path::ForwardTiles(problem.feature_map, problem.group_size()).size;
  return plan_float32(problem, device, float32_path::ForwardShape::chunk, size);
}
Plan plan_float32(const BackwardProblem& problem, const Device& device) {
  if (!float32_path::supports(problem)) return refused(Path::float32);
  const auto size = [&](bool reverse) {
    return float32_path::BackwardTiles(problem.feature_map, reverse, problem.group_size()).size;
  };
  Plan plan =
      plan_float32(problem, device, float32_path::BackwardShape::chunk, std::max(size(false), size(true)));
  const int64_t groups = float32_path::column_groups(problem);
  add_region(&plan.workspace, plan.segments > 1, &plan.workspace.reverse_states, plan.workspace.states.bytes);
  add_gradient_regions(problem, {true, false}, plan.segments * groups, groups,
                       groups > 1 || problem.layer_norm == LayerNorm::token, &plan.workspace);
  return plan;
}

template <class AnyProblem>
Plan plan_sweep(const AnyProblem& problem, const Device& device, Sweep sweep) {
  const bool has_tensor_cores = tensor_core::supports(problem) &&
                                tensor_core::shared_memory_bytes(problem) <= device.shared_memory_per_block;
  const Plan fast = plan_float32(problem, device);
  const bool has_fast = !*fast.error && fast.shared_memory_bytes <= device.shared_memory_per_block;
  const int slowness = has_fast ? 2 : 1;  // by instructions and loads: 4 x 4 tiles against 8 x 8
  Path path = has_tensor_cores ? Path::tensor_core
              : stateless(problem) && quadratic_is_cheaper(problem, sweep.backward, slowness)
                  ? Path::quadratic
              : has_fast ? Path::float32
                         : Path::general;
  if (plan_override().force_path) path = plan_override().path;
  if ((path == Path::tensor_core && !has_tensor_cores) || (path == Path::quadratic && !stateless(problem)) ||
      (path == Path::float32 && !has_fast)) {
    return refused(path);
  }
  if (path == Path::float32) return fast;
  if (path == Path::tensor_core) return plan_tensor_core(problem, device, sweep.backward);
  sweep.quadratic = path == Path::quadratic;
  return plan_general(problem, device, sweep);
}

}  // namespace

void set_plan_override(const PlanOverride& forced) { active_override = forced; }
const PlanOverride& plan_override() { return active_override; }

void record_launches(bool on) {
  std::lock_guard<std::mutex> lock(recorded_mutex);
  recorded.clear();
  recording = on;
}
std::vector<std::string> take_recorded_launches() {
  std::lock_guard<std::mutex> lock(recorded_mutex);
  return std::exchange(recorded, {});
}

Plan plan_forward(const ForwardProblem& problem, const Device& device) {
  return record(problem, plan_sweep(problem, as_overridden(device), {false, false}));
}
Plan plan_backward(const BackwardProblem& problem, const Device& device) {
  const Sweep sweep{true, false, problem.wants_queries(), problem.wants_keys()};
  return record(problem, plan_sweep(problem, as_overridden(device), sweep));
}

Plan plan_step(const StepProblem& problem, const Device&) {
  Plan plan;
  StepTiles& step = plan.step;
  const int64_t features = features_of(problem), quads = divide_up(problem.head_dim, 4);
  const int64_t bytes = accumulator_size(problem.dtype);
  step.group = problem.kv_heads ? static_cast<int>(problem.group_size()) : 1;
  step.heads_at_once = std::clamp(step.group, 1, 4);
  const int heads = step.heads_at_once;
  // What a thread does before it meets the state costs as much as several quads. Larger states fill a
  // multiprocessor's shared memory with five blocks: 153 features of 64 floats are held at once.
  step.threads = features * quads <= 8 * 64 ? 64 : 128;
  step.lanes = quads ? step.threads / static_cast<int>(quads) : 0;
  const int64_t most = (41 << 10) / ((4 * quads + 2 + heads) * bytes);
  step.features_at_once = static_cast<int>(std::min(round_up(features, 4), most / 4 * 4));
  step.state = 0;
  step.state_sums = step.state + step.features_at_once * static_cast<int>(4 * quads);
  step.features = step.state_sums + step.features_at_once;
  step.vectors = step.features + (1 + heads) * step.features_at_once;
  step.sums = step.vectors + static_cast<int>(round_up((1 + heads) * problem.feature_dim, 4));
  step.denominators = step.sums + heads * step.threads * 4;
  step.scores = step.denominators + heads * step.threads / 32;
  step.size = step.scores + heads;
  plan.shared_memory_bytes = step.size * bytes;
  return record(problem, plan);
}

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

const char* path_name(Path path) {
  constexpr const char* names[] = {"general", "tensor_core", "quadratic", "float32"};
  return names[static_cast<int>(path)];
}

std::vector<std::pair<std::string, int64_t>> plan_entries(const Plan& plan) {
  std::vector<std::pair<std::string, int64_t>> entries = {
      {"segments", plan.segments},
      {"shared_memory_bytes", plan.shared_memory_bytes},
      {"tiles.chunk", plan.tiles.chunk},
      {"tiles.threads", plan.tiles.threads},
      {"tiles.num_features", plan.tiles.num_features},
      {"tiles.state_in_shared", plan.tiles.state_in_shared},
      {"step.threads", plan.step.threads},
      {"step.heads_at_once", plan.step.heads_at_once},
      {"step.features_at_once", plan.step.features_at_once},
      {"workspace.bytes", plan.workspace.bytes},
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
  };
  for (const auto& [name, region] : regions) {
    if (region.bytes == 0) continue;
    entries.emplace_back(std::string("workspace.") + name + ".offset", region.offset);
    entries.emplace_back(std::string("workspace.") + name + ".bytes", region.bytes);
  }
  return entries;
}

}  // namespace rebased
