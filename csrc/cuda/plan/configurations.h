// Every launch configuration (plan.h) that a plan can choose, found by asking the plan; for tests, which hold
// each of them against the reference.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "op/problem.h"

namespace rebased {

enum class Direction { forward, backward, step };

// A call as far as the plan looks at it; batch is 1. `sequences`: of packed ones, 0 where they are not.
// `aligned`: whether rows of q lie at multiples of 16 bytes.
struct Shape {
  Direction direction;
  Dtype dtype;
  FeatureMap feature_map;
  int64_t feature_dim, head_dim, heads, kv_heads, seqlen, sequences;
  bool state, aligned;
  int multiprocessors;
  int64_t shared_memory_per_block;
};

struct Configuration {
  std::string text;  // launch_configuration
  Shape example;     // the one with the least work of those that were tried and do not say little
  bool says_little;  // results of a few numbers, or no full chunk: there was no other
  int64_t work;      // operations, roughly
};

// Those of devices with that much shared memory a block, in the order of their texts.
std::vector<Configuration> reachable_configurations(int64_t shared_memory_per_block);

}  // namespace rebased
