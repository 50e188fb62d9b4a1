// The plans of the families of kernels with tiles of a fixed shape: their segments and their workspace.
#include <algorithm>

#include "cuda/plan/float32_shape.h"
#include "cuda/plan/parts.h"
#include "cuda/plan/tensor_core_shape.h"

namespace rebased {
namespace {

Plan refused(Path path) {
  Plan plan;
  plan.path = path;
  plan.error = not_taken;
  return plan;
}

// The number of segments, from `fewest` to `most`, with which the last block ends earliest. Blocks come in
// waves of as many as all multiprocessors hold, `resident` on each of them. Few warps leave a scheduler idle,
// so a wave takes no less time with one warp on a scheduler than with two; from there on in proportion:
// measured on an H100 (issue_of_a_warp and issue_at_most of benchmarks/speed/gpu_model.py). There a block
// that sums the states before it took about a quarter of a chunk's time for each of them, and the pass that
// makes the states, over all segments but one, two fifths of what the sweep behind it takes.
int fastest_segments(int64_t blocks, int64_t chunks, const Device& device, int64_t resident, int64_t threads,
                     int64_t fewest, int64_t most) {
  constexpr int64_t summed_states = tensor_core::summed_segments;
  const int64_t room = resident * device.multiprocessors;
  const int64_t warps_on_scheduler = std::max<int64_t>(threads / 128, 1);
  const auto wave = [&](int64_t on_multiprocessor) {
    return on_multiprocessor == 0 ? 0 : std::max<int64_t>(28 * on_multiprocessor * warps_on_scheduler, 60);
  };
  const auto waves = [&](int64_t count) {
    return count / room * wave(resident) + wave(divide_up(count % room, device.multiprocessors));
  };
  int64_t best = fewest, least = INT64_MAX;
  for (int64_t segments = fewest; segments <= std::max(std::min<int64_t>(most, 128), fewest); ++segments) {
    const int64_t quarters = 4 * divide_up(chunks, segments) + std::min(segments, summed_states) - 1;
    const int64_t time = quarters * (5 * waves(blocks * segments) + 2 * waves(blocks * (segments - 1)));
    if (time < least) {
      least = time;
      best = segments;
    }
  }
  return static_cast<int>(best);
}

constexpr int64_t any_rows = INT64_MAX / 2;

// How a family's blocks fill a multiprocessor.
struct Blocks {
  int64_t resident, threads;  // blocks of the sweep that a multiprocessor holds, and the threads of one
  int64_t least_rows;         // of a segment
  int64_t most_rows;          // of a segment too; of packed sequences, on average
};

Plan plan_fixed(Path path, const Problem& problem, Sweep sweep, const Device& device, int64_t chunk,
                const Blocks& blocks) {
  Plan plan;
  plan.path = path;
  plan.column_groups = static_cast<int>(fixed_shape::column_groups(problem));
  const int64_t rows = mean_rows(problem);
  plan.segments =
      fastest_segments(problem.num_sequences * problem.kv_heads * plan.column_groups, divide_up(rows, chunk),
                       device, blocks.resident, blocks.threads,
                       std::max<int64_t>(divide_up(rows, blocks.most_rows), 1), rows / blocks.least_rows);
  if (plan_override().segments) plan.segments = plan_override().segments;
  add_preparation_regions(problem, sweep, &plan);
  return plan;
}

// A float32 plan fills in only those of its GeneralTiles that say how chunks are cut and where a slot's
// entries are.
Plan plan_float32(const Problem& problem, const Device& device, Sweep sweep, int chunk,
                  int64_t shared_floats) {
  if (shared_floats * 4 > device.shared_memory_per_block) return refused(Path::float32);
  Plan plan =
      plan_fixed(Path::float32, problem, sweep, device, chunk, {2, float32_path::threads, 512, any_rows});
  plan.shared_memory_bytes = shared_floats * 4;
  GeneralTiles& tiles = plan.tiles;
  tiles.chunk = chunk;
  tiles.threads = float32_path::threads;
  tiles.value_stride = static_cast<int>(problem.head_dim);
  tiles.num_features = float32_path::state_features(problem.feature_map);
  tiles.padded_features = float32_path::padded_features(problem.feature_map);
  tiles.state_in_shared = true;
  const bool split = plan.segments > 1;
  add_state_regions(problem, sweep, tiles.slot_size() * 4, split, split, false, &plan);
  if (sweep.backward) add_gradient_regions(problem, sweep, false, false, &plan);
  add_carries(problem, float32_path::carry_size(problem.feature_map, problem.group_size()), &plan);
  return plan;
}

template <class AnyProblem>
Plan plan_tensor_core_sweep(const AnyProblem& problem, const Device& device) {
  if (!tensor_core::supports(problem) ||
      tensor_core::shared_memory_bytes(problem) > device.shared_memory_per_block) {
    return refused(Path::tensor_core);
  }
  // d = 32: blocks twice as large, of a thread's most registers, and four times the state. A forward that
  // keeps its states is cut as its backward, whose grad q then starts from them.
  const Sweep sweep = sweep_of(problem);
  const bool wide = problem.feature_dim == 32;
  const bool many_registers =
      problem.feature_dim == 16 &&
      (problem.feature_map == FeatureMap::taylor ||
       (problem.feature_map == FeatureMap::outer && (sweep.backward || sweep.keep == Keep::states)));
  const bool polynomial = tensor_core::polynomial_kernels(problem);
  const bool longer =
      polynomial && tensor_core::has_room_for_longer_chunks(device.shared_memory_per_block) &&
      tensor_core::takes_longer_chunks(problem.feature_map, problem.feature_dim, problem.group_size() > 1);
  const int chunk = longer ? 2 * tensor_core::chunk : tensor_core::chunk;
  int64_t resident = wide ? 1 : many_registers ? 2 : 3, shared_bytes = 0;
  if (polynomial && !sweep.backward) {
    constexpr int64_t beside = 1024 + 128;  // what each block takes further, and static arrays
    shared_bytes = tensor_core::polynomial_forward_bytes(problem.feature_map, problem.feature_dim, chunk,
                                                         problem.group_size());
    if (sweep.keep != Keep::states) {
      resident = chunk > tensor_core::chunk && problem.feature_dim == 16 ? 2 : 3;  // by registers
      resident =
          std::clamp<int64_t>((device.shared_memory_per_block + 1024) / (shared_bytes + beside), 1, resident);
    }
  }
  Plan plan = plan_fixed(
      Path::tensor_core, problem, sweep, device, chunk,
      {resident, wide ? 256 : 128, wide ? 1024 : 512, polynomial ? tensor_core::drifting_rows : any_rows});
  plan.tiles.chunk = chunk;
  plan.shared_memory_bytes = shared_bytes;
  return plan;
}

template <class AnyProblem>
std::vector<Refusal> refusals(const AnyProblem& problem, const Device& device) {
  std::vector<Refusal> found;
  tensor_core::refuse(problem, [&](const char* argument, const char* reason, const char* remedy) {
    found.push_back({argument, reason, remedy});
  });
  if (tensor_core::shared_memory_bytes(problem) > device.shared_memory_per_block) {
    found.push_back({"device", "a block cannot have the shared memory that these kernels need",
                     "a device with more shared memory per block, or a smaller feature dim"});
  }
  return found;
}

// The bytes that one block's slots take, of all its column groups.
template <class AnyProblem>
int64_t tensor_core_slot_bytes(const AnyProblem& problem, const Plan& plan) {
  using namespace tensor_core;
  const int64_t floats = polynomial_kernels(problem)
                             ? polynomial_slot_floats(problem.feature_map, problem.feature_dim)
                             : slot_floats(problem.feature_dim);
  return floats * plan.column_groups * 4;
}

}  // namespace

Plan plan_float32(const ForwardProblem& problem, const Device& device) {
  if (!float32_path::supports(problem)) return refused(Path::float32);
  const int size = float32_path::ForwardTiles(problem.feature_map, problem.group_size()).size;
  return plan_float32(problem, device, sweep_of(problem), float32_path::ForwardShape::chunk, size);
}

Plan plan_float32(const BackwardProblem& problem, const Device& device) {
  if (!float32_path::supports(problem)) return refused(Path::float32);
  const auto size = [&](bool reverse) {
    return float32_path::BackwardTiles(problem.feature_map, reverse, problem.group_size()).size;
  };
  return plan_float32(problem, device, sweep_of(problem), float32_path::BackwardShape::chunk,
                      std::max(size(false), size(true)));
}

std::vector<Refusal> tensor_core_refusals(const ForwardProblem& problem, const Device& device) {
  return refusals(problem, device);
}
std::vector<Refusal> tensor_core_refusals(const BackwardProblem& problem, const Device& device) {
  return refusals(problem, device);
}

// Blocks of an unsplit sequence have slots only for a state that they are given, or that only is asked for.
Plan plan_tensor_core(const ForwardProblem& problem, const Device& device) {
  Plan plan = plan_tensor_core_sweep(problem, device);
  if (*plan.error) return plan;
  BackwardProblem backward{};
  static_cast<Problem&>(backward) = problem;
  const bool keepable = tensor_core::shared_memory_bytes(backward) <= device.shared_memory_per_block;
  add_state_regions(problem, sweep_of(problem), tensor_core_slot_bytes(problem, plan),
                    plan.segments > 1 || problem.initial_state.kv || problem.state_only, false, keepable,
                    &plan);
  return plan;
}

Plan plan_tensor_core(const BackwardProblem& problem, const Device& device) {
  Plan plan = plan_tensor_core_sweep(problem, device);
  if (*plan.error) return plan;
  const bool split = plan.segments > 1, only_state = problem.part == BackwardPart::reverse_state;
  add_state_regions(problem, sweep_of(problem), tensor_core_slot_bytes(problem, plan),
                    split || problem.initial_state.kv, split || problem.grad_final_state.kv || only_state,
                    true, &plan);
  add_gradient_regions(problem, sweep_of(problem), true, tensor_core::polynomial_kernels(problem), &plan);
  if (!only_state) add_initial_sums_region(problem, &plan);
  return plan;
}

}  // namespace rebased
