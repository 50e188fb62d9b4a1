// Checks every kernel of the general path and of the step against scalar_reference.h: all maps, dtypes,
// LayerNorms and directions, at small odd sizes. run_cases.h says which arguments the program takes.
#include "tests/run_cases.h"

namespace {

using namespace rebased;
using namespace rebased::tests;

// Checks that every size has a plan within the shared memory of the architectures with the least (99 KB a
// block on 8.6 and 8.9).
void check_plans() {
  const Device smallest{28, 86, 99 * 1024};
  for (int64_t dim = 1; dim <= 128; ++dim) {
    for (int64_t width = 1; width <= 256; ++width) {
      for (const FeatureMap map : {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor}) {
        for (const Dtype dtype : {Dtype::float64, Dtype::bfloat16}) {
          const auto fits = [&](const Plan& plan) {
            ++comparisons;
            if (*plan.error == 0 && plan.shared_memory_bytes <= smallest.shared_memory_per_block) return;
            ++failures;
            std::printf("MISMATCH no plan for d=%d dv=%d\n", static_cast<int>(dim), static_cast<int>(width));
          };
          const auto sized = [&](auto problem) {
            problem.batch = problem.num_sequences = 1, problem.heads = 6, problem.kv_heads = 1;
            problem.seqlen = 1 << 20, problem.feature_dim = dim, problem.head_dim = width;
            problem.dtype = dtype, problem.feature_map = map, problem.normalize = true;
            return problem;
          };
          fits(make_plan(sized(ForwardProblem{}), smallest));
          fits(make_plan(sized(BackwardProblem{}), smallest));
          fits(make_plan(sized(StepProblem{}), smallest));
        }
      }
    }
  }
}

std::vector<Case> cases() {
  constexpr FeatureMap maps[] = {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu,
                                 FeatureMap::identity};
  constexpr Dtype dtypes[] = {Dtype::float64, Dtype::float32, Dtype::float16, Dtype::bfloat16};
  constexpr LayerNorm norms[] = {LayerNorm::none, LayerNorm::token, LayerNorm::head};
  struct Sizes {
    int64_t batch, kv_heads, group, seqlen, dim, width;
  };
  static constexpr Sizes sizes[] = {{1, 2, 1, 41, 5, 6},   {2, 1, 3, 13, 4, 1},  {3, 2, 1, 5, 1, 1},
                                    {2, 2, 1, 70, 16, 16}, {1, 2, 2, 33, 7, 21}, {1, 1, 5, 20, 8, 16}};
  std::vector<Case> result;
  int number = 0;
  for (const FeatureMap map : maps) {
    for (const Dtype dtype : dtypes) {
      for (const LayerNorm norm : norms) {
        for (int variant = 0; variant < 5; ++variant, ++number) {
          const Sizes& size = sizes[number % 6];
          Case c;
          c.map = map, c.dtype = dtype, c.norm = norm;
          c.batch = size.batch, c.kv_heads = size.kv_heads, c.group = size.group;
          c.seqlen = size.seqlen, c.dim = size.dim, c.width = size.width;
          c.states = variant != 1 && variant != 4;
          c.gamma = variant != 2, c.beta = variant != 3;
          c.shared_affine = number % 5 == 0;
          // With one feature the division cancels q, whose gradient is then all rounding. The denominators of
          // identity may be near 0.
          c.normalize = number % 7 != 0 && c.dim > 1 && map != FeatureMap::identity;
          c.packed_heads = variant % 2 == 1, c.padding = number % 3;
          c.plan.chunk = (number % 4 == 3) ? 0 : 8 << (number % 4);
          c.plan.segments = variant == 0 ? 0 : variant;
          c.plan.force_path = true;  // the plan would take tensor cores for some of these cases
          c.path = c.plan.path = variant == 4 ? Path::quadratic : Path::general;
          c.plan.state_in_shared = number % 3 - 1;
          if (variant == 2 || (variant == 4 && number % 3 == 0)) {
            c.batch = 1;
            c.cu_seqlens = {2, c.seqlen / 2, c.seqlen / 2, c.seqlen / 3, c.seqlen - 1};
          }
          result.push_back(c);
        }
      }
    }
  }
  // the widest heads, for which the plan has to shorten its chunks; then one token, and no token
  for (const Dtype dtype : {Dtype::float64, Dtype::bfloat16}) {
    for (const FeatureMap map : {FeatureMap::taylor, FeatureMap::elu}) {
      Case c;
      c.map = map, c.dtype = dtype, c.norm = LayerNorm::head;
      c.batch = 1, c.kv_heads = 1, c.group = map == FeatureMap::elu ? 2 : 1, c.seqlen = 19;
      c.dim = map == FeatureMap::elu ? 128 : 45, c.width = map == FeatureMap::elu ? 256 : 130;
      c.path = Path::quadratic, c.states = false;
      result.push_back(c);
      c.path = Path::general, c.states = true;
      for (const int64_t seqlen : {1, 0}) {
        c.dim = 3, c.width = 7, c.seqlen = seqlen;
        result.push_back(c);
      }
    }
  }
  // a segment so long that its sums have carries
  Case c;
  c.dtype = Dtype::float32, c.norm = LayerNorm::head, c.states = true;
  c.batch = c.kv_heads = 1, c.group = 2, c.seqlen = 200, c.dim = 4, c.width = 5;
  c.path = c.plan.path = Path::general, c.plan.force_path = true, c.plan.segments = 1;
  c.plan.chunk = 32, c.plan.compensated_rows = 64;
  result.push_back(c);
  c.cu_seqlens = {3, 20, c.seqlen};
  result.push_back(c);
  return result;
}

}  // namespace

int main(int count, char** arguments) {
  check_plans();
  return run_cases(cases(), true, count, arguments);
}
