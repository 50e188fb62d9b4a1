// What the main functions of the CUDA kernels' drivers share: they run all cases, or few that still launch
// every kernel.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/sweeps.h"

namespace rebased::tests {

// A name for each kernel that a case launches.
inline std::set<std::string> kernels_of(const Case& c) {
  const std::string instance = std::to_string(static_cast<int>(c.dtype)) +
                               std::to_string(static_cast<int>(c.map)) + path_name(c.path) +
                               (c.path == Path::tensor_core ? std::to_string(c.dim) : "");
  std::set<std::string> result{instance};
  if (c.plan.segments > 1) result.insert(instance + " split");
  if (c.path == Path::tensor_core) {  // grouped heads have kernels of their own
    result.insert(instance + (c.group > 1 ? " group" : " single"));
    if (c.width % 8 || c.padding % 8) result.insert(instance + " narrow");
  }
  if (c.plan.shared_memory_per_block) {  // chunks of another length have kernels of their own too
    result.insert(instance + " smaller device" + (c.group > 1 ? " group" : " single"));
  }
  if (c.norm == LayerNorm::token) result.insert(instance + " token");
  if (!c.cu_seqlens.empty()) result.insert(instance + " packed");
  if (c.states) result.insert(instance + " states");
  if (c.plan.compensated_rows) result.insert(instance + " compensated");
  return result;
}

// As few cases as together launch every kernel that `all` of them launch. Takes, again and again, the case
// that launches most kernels which no case taken before launches.
inline std::vector<Case> thinned(const std::vector<Case>& all) {
  std::vector<Case> result;
  std::set<std::string> launched;
  while (true) {
    const Case* best = nullptr;
    size_t most = 0;
    for (const Case& c : all) {
      size_t is_new = 0;
      for (const std::string& kernel : kernels_of(c)) is_new += !launched.count(kernel);
      if (is_new > most) best = &c, most = is_new;
    }
    if (!best) return result;
    for (const std::string& kernel : kernels_of(*best)) launched.insert(kernel);
    result.push_back(*best);
  }
}

// Runs a driver's cases. Arguments of the program: a seed (1 by default), then "thinned" for the fewest cases
// that run every kernel in every dtype and map, or a part of the names of the wanted cases. Returns 1 when a
// result is off. Exits with 2 when a call fails.
inline int run_cases(std::vector<Case> all, bool steps, int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 1;
  std::string filter = count > 2 ? arguments[2] : "";
  if (filter == "thinned") {
    all = thinned(all);
    filter = "";
  }
  Device device;
  const char* const error = BACKEND::query_device(0, &device);
  if (*error) fail("query_device", error);
  int cases = 0;
  for (const Case& c : all) {
    if (c.name().find(filter) == std::string::npos) continue;
    ++cases;
    // A case draws the same numbers whichever cases run before it.
    const std::string seeded = std::to_string(seed) + c.name();
    std::seed_seq sequence(seeded.begin(), seeded.end());
    std::mt19937 random(sequence);
    check_sweeps(c, device, random);
    if (steps) check_step(c, device, random);
  }
  std::printf("%d cases, %d comparisons, %d mismatches\n", cases, comparisons, failures);
  return failures > 0 || cases == 0;
}

}  // namespace rebased::tests
