// How a call is cut into blocks: which path, chunk length, segments, threads, shared memory and workspace,
// from a Problem's sizes and a Device's limits alone. No GPU and no pointer is looked at (except whether
// optional ones are null), so that a plan can be tested, shown and asked for its workspace before anything is
// allocated.
//
// Sizes of shared memory and workspace are in accumulators (float, or double for float64) unless named bytes.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "op/feature_map.h"
#include "op/problem.h"

namespace rebased {

struct Device;  // backend.h

// general: SIMT kernels with a state, every problem. quadratic: the same kernels without, for problems that
// neither take nor give one. tensor_core: mma kernels for bfloat16. float32: SIMT kernels with register
// tiles of a fixed shape, for float32 with 16 features.
enum class Path { general, tensor_core, quadratic, float32 };

// The general path's shared-memory tiles, as offsets; kernels and the plan read the same numbers.
//   feature tile  (feature_dim + 2, chunk), stride row_stride: q' or k' transposed, then a row of ones (with
//                 0 past the last row of the sequence) and a row of zeros
//   value tile    (chunk, head_dim), stride value_stride, padded with zeros
//   state         (padded_features, head_dim), stride value_stride, then padded_features sums
// Both strides are an odd number of 16-byte (float) quads, so that eight lanes with consecutive rows touch
// all banks.
struct GeneralTiles {
  int chunk, threads;
  int row_stride, value_stride;
  int num_features, padded_features;  // padded to a multiple of 4
  int gradient_features;              // features whose gradients are held at once, a multiple of 4
  bool state_in_shared;               // else the state lives in its workspace slot

  int row_features, other_features;  // feature tiles: of the rows the block computes, of those they look at
  int row_normalized;                // feature tile: LayerNorm(x) of the rows, then only in backward
  int row_gradient;                  // feature tile: d loss / d row_features
  int row_values, other_values;      // value tiles
  int scores;                        // (chunk, row_stride): scores, [other][row]
  int score_gradients;               // (chunk, row_stride)
  int feature_gradients;             // (gradient_features, row_stride), in the place of the two above
  int gathered_values;               // value tile: y or grad v while several others or heads add to it
  int vectors;                       // vector_count vectors of `chunk`, then one of `threads`
  int state;
  int size;

  // rows of `vectors`
  static constexpr int row_extra = 0, other_extra = 1, row_mean = 2, row_scale = 3, row_sum = 4, row_dot = 5,
                       vector_count = 6;

  REBASED_HOST_DEVICE int64_t slot_size() const {
    return static_cast<int64_t>(padded_features) * value_stride + padded_features;
  }
};

// The step kernel's: threads, of which `lanes` share a quad of columns; query heads per kv head, those whose
// features are held at once, and the features held at once. Shared memory, as offsets: state
// (features_at_once, 4 quads) and its sums (features_at_once); features (1 + heads_at_once, features_at_once)
// and vectors (1 + heads_at_once, feature_dim) of k' and of the query heads; of each of these heads sums
// (threads, 4), denominators (threads / 32) and a score.
struct StepTiles {
  int threads, lanes, group, heads_at_once, features_at_once;
  int state, state_sums, features, vectors, sums, denominators, scores, size;
};

// What keeps a call from a family of kernels: the argument it is about, what of it, and what would change it.
struct Refusal {
  const char *argument, *reason, *remedy;
};

struct Region {
  int64_t offset = 0, bytes = 0;
  bool kept = false;  // it lies in the memory that forward keeps for backward, not in the workspace
};

// What the workspace holds, each region at a multiple of 64 bytes; a region of 0 bytes is absent.
struct Workspace {
  Region bounds;            // int64 (num_sequences + 1): cu_seqlens clamped
  Region query_statistics;  // (batch, seqlen, 2): mean and 1 / standard deviation of "token" LayerNorm
  Region key_statistics;
  // (num_sequences, kv_heads, segments, slot size), of the tensor-core kernels for each column group: the
  // state before each segment
  Region states;
  Region reverse_states;  // the same for T and M of backward, after each segment
  // (batch, heads, seqlen): sum over head_dim of r grad_y y. Of the tensor-core kernels (column groups,
  // batch, heads, seqlen): sum over the group's columns of grad_y y
  Region delta;
  // (column groups, batch, heads, seqlen, feature_dim): grad q' that another kernel finishes, that of "token"
  // LayerNorm or of several column groups
  Region query_gradient;
  Region key_gradient;  // (column groups, batch, kv_heads, seqlen, feature_dim)
  // (num_sequences, heads, segments, column groups, 2, feature_dim): grad gamma, grad beta per block
  Region query_affine;
  Region key_affine;    // (num_sequences, kv_heads, segments, column groups, 2, feature_dim)
  Region carries;       // (carry slots, carry_size): what rounding took from the sums of long segments
  Region initial_sums;  // (column groups, num_sequences, kv_heads, features): of grad_initial_state.k
  int64_t bytes = 0;
};

// A float32 sum of n numbers of one sign is off by about sqrt(n) roundings, and by more where the numbers are
// too small to move it. Blocks that walk more than this many tokens therefore keep with every entry of a
// state what its roundings took away, and give it back with the next chunk (compensated summation).
constexpr int64_t compensated_rows = 4096;

// The carry slot of the block whose sequence begins at `first_row` and has number `sequence`, where blocks
// past `1 << rows_log2` tokens have carries. Packed sequences do not get a slot each, since thousands of
// short ones would fill memory with slots: sequences long enough to have carries begin more than that many
// tokens apart.
REBASED_HOST_DEVICE inline int64_t carry_slot(bool packed, int64_t first_row, int64_t sequence,
                                              int rows_log2) {
  return packed ? first_row >> rows_log2 : sequence;
}

struct Plan {
  Path path = Path::general;
  const char* error = "";  // why there is no such plan; empty when there is one
  int segments = 1;        // runs of chunks of one sequence that different blocks walk
  int column_groups = 1;   // blocks that share the value columns of a head
  GeneralTiles tiles{};    // of all general kernels of this direction
  StepTiles step{};
  int64_t shared_memory_bytes = 0;  // the most that a kernel of the plan asks for
  int64_t carry_size = 0;           // accumulators of a slot of workspace.carries
  int carry_rows_log2 = 0;          // of compensated_rows: a shift costs kernels less than a division
  Workspace workspace;
  int64_t kept_bytes = 0;  // of the regions that forward keeps, or that backward is given
};

// For tests: what to take instead of the choice that a plan would make; 0 means the plan's own choice.
// Numbers of a plan change and no code does, so that short calls stand for long ones.
struct PlanOverride {
  bool force_path = false;
  Path path = Path::general;
  int chunk = 0;  // 4, 8, 16, 32 or 64
  int segments = 0;
  int state_in_shared = -1;  // 0 or 1; -1 leaves it to the plan
  int multiprocessors = 0;   // of the device, and the bytes of shared memory that a block may have there
  int64_t shared_memory_per_block = 0;
  int compensated_rows = 0;  // rounded up to a power of two that is no less than a chunk
};
// Process-wide. To be set only while no call is under way.
void set_plan_override(const PlanOverride&);
const PlanOverride& plan_override();

Plan make_plan(const ForwardProblem&, const Device&);
Plan make_plan(const BackwardProblem&, const Device&);
Plan make_plan(const StepProblem&, const Device&);

// What sets one launch apart from another as far as code is concerned: direction, path, kernel instance,
// threads, chunk, where the state is, one column group or more, segments, the narrowest pieces of rows,
// grouped heads, packed sequences, compensated sums. Tests hold each that the plan can choose against the
// reference; of those that take long calls they force it upon short ones, which launch the same code.
std::string launch_configuration(const ForwardProblem&, const Plan&);
std::string launch_configuration(const BackwardProblem&, const Plan&);
std::string launch_configuration(const StepProblem&, const Plan&);

// For tests: from record_launches(true) on, every plan that is made leaves its configuration here.
void record_launches(bool);
std::vector<std::string> take_recorded_launches();

// All that keeps a call from the tensor-core kernels; empty where they take it.
std::vector<Refusal> tensor_core_refusals(const ForwardProblem&, const Device&);
std::vector<Refusal> tensor_core_refusals(const BackwardProblem&, const Device&);

const char* path_name(Path);
// Every number of a plan under its name, for showing it: "segments", "tiles.chunk",
// "workspace.states.offset".
std::vector<std::pair<std::string, int64_t>> plan_entries(const Plan&);

}  // namespace rebased
