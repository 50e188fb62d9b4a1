// The plan of the general kernels, with a state and without: their tiles, their segments, their workspace.
#include <algorithm>

#include "cuda/plan/parts.h"

namespace rebased {
namespace {

// Shared memory past which a block would be alone on a multiprocessor of any architecture: better a shorter
// chunk, or the state in the L2 cache, and more blocks at work.
constexpr int64_t shared_memory_of_half_a_multiprocessor = 112 * 1024;

// The least stride >= width that is an odd number of quads.
int odd_quads(int64_t width) { return static_cast<int>((divide_up(width, 4) | 1) * 4); }

struct Kind {
  bool backward, quadratic;
};

GeneralTiles general_tiles(const Problem& problem, Kind kind, int chunk, bool state_in_shared) {
  GeneralTiles tiles{};
  tiles.chunk = chunk;
  // one 4 x 4 tile of y per thread, or two
  tiles.threads = static_cast<int>(
      std::clamp<int64_t>(round_up(chunk / 4 * divide_up(problem.head_dim, 4), 32), 128, 256));
  tiles.row_stride = odd_quads(chunk);
  tiles.value_stride = odd_quads(problem.head_dim);
  tiles.num_features = static_cast<int>(features_of(problem));
  tiles.padded_features = static_cast<int>(round_up(tiles.num_features, 4));
  tiles.gradient_features = kind.backward && !kind.quadratic ? std::min(tiles.padded_features, 64) : 0;
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
  if (kind.backward) {
    tiles.row_normalized = take(feature_tile);
    tiles.row_gradient = take(feature_tile);
    tiles.row_values = take(value_tile);
    tiles.scores = take(std::max(2 * score_tile, tiles.gradient_features * tiles.row_stride));
    tiles.score_gradients = tiles.scores + score_tile;
    tiles.feature_gradients = tiles.scores;
  } else {
    tiles.scores = take(score_tile);
  }
  const bool gathers = kind.quadratic || (kind.backward && problem.group_size() > 1);
  tiles.gathered_values = take(gathers ? value_tile : 0);
  tiles.vectors = take(GeneralTiles::vector_count * chunk + tiles.threads);
  tiles.state = take(state_in_shared ? static_cast<int>(tiles.slot_size()) : 0);
  tiles.size = size;
  return tiles;
}

// The state in shared memory with chunks of 32 or 16 if that fits, else in the workspace with the longest
// chunk that fits: each chunk then reads the whole state once from the L2 cache. The longest chunk that fits
// when there is no state. Two blocks a multiprocessor where possible. False where nothing fits.
bool choose_tiles(const Problem& problem, const Device& device, Kind kind, GeneralTiles* chosen) {
  struct Candidate {
    int chunk;
    bool state_in_shared;
  };
  static constexpr Candidate candidates[] = {{32, true},  {16, true}, {64, false}, {32, false},
                                             {16, false}, {8, false}, {4, false}};
  const int64_t accumulator = accumulator_size(problem.dtype), most = device.shared_memory_per_block;
  const PlanOverride& forced = plan_override();
  const bool forced_place = forced.state_in_shared >= 0 && !kind.quadratic;
  const int64_t state_bytes = features_of(problem) * (odd_quads(problem.head_dim) + 1) * accumulator;
  for (const int64_t limit : {std::min(most, shared_memory_of_half_a_multiprocessor), most}) {
    for (const Candidate candidate : candidates) {
      const int chunk = forced.chunk ? forced.chunk : candidate.chunk;
      const bool state_in_shared = forced_place ? forced.state_in_shared == 1 : candidate.state_in_shared;
      if (state_in_shared && (kind.quadratic || state_bytes > limit)) continue;
      *chosen = general_tiles(problem, kind, chunk, state_in_shared);
      if (chosen->size * accumulator <= limit) return true;
    }
  }
  return false;
}

// Enough blocks for two on every multiprocessor, of at least eight chunks each. Without a state blocks do not
// depend on each other: one per chunk, or for packed sequences per chunk of one of twice the mean length.
int choose_segments(const Problem& problem, const Device& device, Kind kind, int chunk) {
  const int64_t rows = mean_rows(problem), chunks = divide_up(problem.seqlen, chunk);
  if (kind.quadratic) {
    return static_cast<int>(std::max<int64_t>(std::min(chunks, 2 * divide_up(rows, chunk)), 1));
  }
  if (plan_override().segments) return plan_override().segments;
  const int64_t blocks = problem.num_sequences * problem.kv_heads;
  if (blocks == 0) return 1;
  const int64_t wanted = divide_up(2 * device.multiprocessors, blocks);
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, rows / (8 * chunk)), 1, 128));
}

}  // namespace

Plan plan_general(const Problem& problem, const Device& device, Sweep sweep, bool quadratic) {
  Plan plan;
  const Kind kind{sweep.backward, quadratic};
  plan.path = quadratic ? Path::quadratic : Path::general;
  if (!choose_tiles(problem, device, kind, &plan.tiles)) {
    plan.error = "no chunk length fits this device's shared memory";
    return plan;
  }
  const int64_t accumulator = accumulator_size(problem.dtype);
  plan.segments = choose_segments(problem, device, kind, plan.tiles.chunk);
  plan.shared_memory_bytes = plan.tiles.size * accumulator;

  const bool slots = !quadratic && (plan.segments > 1 || !plan.tiles.state_in_shared);
  const int64_t affine = sweep.backward ? problem.group_size() * 2 * problem.feature_dim : 0;
  add_preparation_regions(problem, sweep, &plan);
  add_state_regions(problem, sweep, plan.tiles.slot_size() * accumulator, slots, slots, false, &plan);
  if (sweep.backward) add_gradient_regions(problem, sweep, false, &plan);
  if (!quadratic) add_carries(problem, plan.tiles.slot_size() + affine, &plan);
  return plan;
}

}  // namespace rebased
