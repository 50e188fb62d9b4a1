// What the library of operators tells of itself: one table of facts about the build, for the operator
// build_info and for the Python module alike, the limits of a device, and for tests how many kernels a plan
// launches.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan/plan.h"
#include "op/backend.h"

namespace rebased {

struct Fact {
  const char* name;
  std::string text;  // of a flag: empty where the flag is off
  bool is_flag;
};

std::vector<Fact> build_facts();

// How many kernels a call of this plan launches, of which none runs; 0 where there is no such plan, and -1
// where the build has no emulator to count them.
int count_launches(ForwardProblem problem, const Plan&);
int count_launches(BackwardProblem problem, const Plan&);
int count_launches(StepProblem problem, const Plan&);

// The limits of a GPU, or with index -1 of the emulator; returns an error text, empty when all went well.
const char* query_limits(int index, Device*);

}  // namespace rebased
