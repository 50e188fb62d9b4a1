// One case of the CUDA kernels' drivers: sizes, dtype, options, what the launch plan is forced to, and how
// far off its results may be.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/plan/plan.h"
#include "op/problem.h"
#include "tests/scalar_reference.h"

namespace rebased::tests {

struct Case {
  FeatureMap map = FeatureMap::outer;
  Dtype dtype = Dtype::float32;
  LayerNorm norm = LayerNorm::none;
  int64_t batch = 2, kv_heads = 2, group = 1, seqlen = 37, dim = 5, width = 6;
  bool gamma = true, beta = true, shared_affine = false, normalize = true, states = true;
  bool packed_heads = false;
  bool negative = false;  // whether the given state makes all denominators, and so r, negative
  int64_t padding = 0;
  double scale = 0.7, eps = 0.05;
  double value_size = 1;            // standard deviation of v; grad y has its inverse
  std::vector<int64_t> cu_seqlens;  // empty where sequences are not packed
  PlanOverride plan;
  Path path = Path::general;  // the path that the plan should choose

  std::string name() const {
    static const char* const maps[] = {"outer", "square", "taylor", "elu", "identity"};
    static const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    static const char* const norms[] = {"none", "token", "head"};
    char text[256];
    std::snprintf(text, sizeof(text),
                  "%s %s norm=%s B=%d Hkv=%d G=%d N=%d d=%d dv=%d %s%s%s%s%s%sseg=%d chunk=%d shared=%d %s",
                  maps[static_cast<int>(map)], dtypes[static_cast<int>(dtype)], norms[static_cast<int>(norm)],
                  static_cast<int>(batch), static_cast<int>(kv_heads), static_cast<int>(group),
                  static_cast<int>(seqlen), static_cast<int>(dim), static_cast<int>(width),
                  normalize ? "" : "unnormalized ", states ? "states " : "", negative ? "negative " : "",
                  cu_seqlens.empty() ? "" : "packed ", shared_affine ? "shared affine " : "",
                  value_size == 1 ? "" : "large values ", plan.segments, plan.chunk, plan.state_in_shared,
                  path_name(path));
    return text;
  }
};

// The largest relative L2 error that is allowed. 16-bit results are rounded to 11 or 8 bits, and the operands
// of tensor cores are rounded so several times on the way to a gradient.
inline double tolerance(const Case& c, bool gradient) {
  switch (c.dtype) {
    case Dtype::float64:
      return 1e-12;
    case Dtype::float32:
      return gradient ? 2e-5 : 5e-6;
    default:
      return (c.dtype == Dtype::float16 ? 1e-3 : 6e-3) * (gradient && c.path == Path::tensor_core ? 3 : 1);
  }
}

inline int failures = 0, comparisons = 0;

inline double relative_error(const Values& result, const Values& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (result[i] - expected[i]) * (result[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference) / (std::sqrt(size) + 1e-30);
}

inline void mismatch(const std::string& name, const char* what, double error, double limit) {
  ++failures;
  std::printf("MISMATCH %s: %s is off by %.2e (limit %.1e)\n", name.c_str(), what, error, limit);
}

inline void compare(const std::string& name, const char* what, const Values& result, const Values& expected,
                    double limit) {
  ++comparisons;
  const double error = relative_error(result, expected);
  if (!(error <= limit)) mismatch(name, what, error, limit);
}

}  // namespace rebased::tests
