// Runs every instance of the tensor-core path under the emulator, at small sizes, against a scalar reference
// in double that keeps one state per token. Stands alone, so that sanitizers see it from its first
// instruction:
//   driver_tensor_core [part of a case's name]
// Fails when a result's relative L2 error is past what rounding to the type explains.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/tensor_core.h"
#include "emulator/runtime.h"
#include "op/feature_map.h"
#include "tests/scalar_reference.h"

namespace {

using namespace rebased;
namespace kernels = rebased::emulated::tensor_core;

constexpr int dim = kernels::feature_dim;
using Doubles = std::vector<double>;

struct Case {
  FeatureMap map;
  Dtype dtype;
  LayerNorm layer_norm;
  int batch, heads, kv_heads, seqlen, head_dim, segments;
  bool affine, states, normalize;
  std::vector<int64_t> bounds;  // cu_seqlens, or empty
  double value_size = 1;        // standard deviation of v; of grad y its inverse

  int sequences() const { return bounds.empty() ? batch : static_cast<int>(bounds.size()) - 1; }
  int features() const { return static_cast<int>(num_features(map, dim)); }
  size_t state_sums() const {  // floats of a state's k
    return states ? static_cast<size_t>(sequences()) * kv_heads * features() : 0;
  }
  std::string name() const {
    const char* maps[] = {"outer", "square", "taylor", "elu"};
    const char* norms[] = {"none", "token", "head"};
    return std::string(dtype == Dtype::bfloat16 ? "bf16 " : "fp16 ") + maps[static_cast<int>(map)] +
           " norm " + norms[static_cast<int>(layer_norm)] + " batch " + std::to_string(batch) + " heads " +
           std::to_string(heads) + "/" + std::to_string(kv_heads) + " seqlen " + std::to_string(seqlen) +
           " head_dim " + std::to_string(head_dim) + " segments " + std::to_string(segments) +
           (affine ? " affine" : "") + (states ? " states" : "") + (normalize ? "" : " unnormalized") +
           (bounds.empty() ? "" : " packed") + (value_size == 1 ? "" : " large values");
  }
};

// ---- 16-bit numbers ----

uint16_t to_bits(double value, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? emulator::float_to_bfloat16(static_cast<float>(value))
                                  : emulator::float_to_half(static_cast<float>(value));
}
double from_bits(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::float16) return emulator::half_to_float(bits);
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// A tensor of 16-bit rows: what a kernel reads or writes, and the same numbers in double.
struct Rows16 {
  std::vector<uint16_t> bits;
  Doubles values;
  int heads, rows, width;

  // laid out as (batch, rows, heads, width) in memory: x.view(B, N, H, d).transpose(1, 2)
  template <class Pointer>
  RowsOf<Pointer> view() {
    return {bits.data(), int64_t{1} * rows * heads * width, width, int64_t{1} * heads * width};
  }
  size_t at(int batch, int head, int row) const {
    return ((static_cast<size_t>(batch) * rows + row) * heads + head) * width;
  }
};

struct Random {
  std::mt19937 generator{1234};
  std::normal_distribution<double> normal;

  Rows16 rows(const Case& c, int heads, int width, double deviation = 1) {
    Rows16 result{{}, {}, heads, c.seqlen, width};
    for (int i = 0; i < c.batch * heads * c.seqlen * width; ++i) {
      result.bits.push_back(to_bits(deviation * normal(generator), c.dtype));
      result.values.push_back(from_bits(result.bits.back(), c.dtype));
    }
    return result;
  }
  std::vector<float> floats(size_t count, double mean, double deviation) {
    std::vector<float> result(count);
    for (float& x : result) x = static_cast<float>(mean + deviation * normal(generator));
    return result;
  }
};

Rows16 empty_rows(const Case& c, int heads, int width) {
  const size_t count = static_cast<size_t>(c.batch) * heads * c.seqlen * width;
  return {std::vector<uint16_t>(count, 0x7fff), {}, heads, c.seqlen, width};  // NaN until written
}

// ---- the reference ----

constexpr double eps = 1e-3, scale = 0.25, layer_norm_eps = 1e-5;

struct Inputs {
  Rows16 q, k, v, grad_y;
  std::vector<float> gamma_q, beta_q, gamma_k, beta_k;  // (heads, dim), empty when absent
  std::vector<float> state_kv, state_k;                 // initial, empty when absent
  std::vector<float> grad_kv, grad_k;                   // of the final state, likewise
};

// Rows laid out like Rows16, the rest like the kernels'.
struct Outputs {
  Doubles y, r, state_kv, state_k;
  Doubles grad_q, grad_k, grad_v, gamma_q, beta_q, gamma_k, beta_k, grad_kv, grad_sums;
};

void fill_sizes(const Case& c, Problem& problem) {
  problem.batch = c.batch, problem.heads = c.heads, problem.kv_heads = c.kv_heads, problem.seqlen = c.seqlen;
  problem.feature_dim = dim, problem.head_dim = c.head_dim, problem.num_sequences = c.sequences();
  problem.dtype = c.dtype, problem.feature_map = c.map, problem.layer_norm = c.layer_norm;
  problem.normalize = c.normalize, problem.scale = scale, problem.eps = eps;
  problem.layer_norm_eps = layer_norm_eps;
}

// Rows begin..end of one batch entry, from (rows, heads, width) to (heads, rows, width), and back.
Doubles take(const Rows16& x, const Doubles& values, int batch, int begin, int end) {
  Doubles result;
  for (int head = 0; head < x.heads; ++head) {
    for (int row = begin; row < end; ++row) {
      const double* first = &values[x.at(batch, head, row)];
      result.insert(result.end(), first, first + x.width);
    }
  }
  return result;
}
void put(const Rows16& x, const Doubles& values, int batch, int begin, int end, Doubles& target) {
  target.resize(x.values.size());
  size_t next = 0;
  for (int head = 0; head < x.heads; ++head) {
    for (int row = begin; row < end; ++row) {
      for (int i = 0; i < x.width; ++i) target[x.at(batch, head, row) + i] = values[next++];
    }
  }
}

void append(Doubles& target, const Doubles& values) {
  target.insert(target.end(), values.begin(), values.end());
}
void add(Doubles& target, const Doubles& values) {
  target.resize(values.size());
  for (size_t i = 0; i < values.size(); ++i) target[i] += values[i];
}

// Sequence by sequence. saved_y, as the kernels' backward gets it, is laid out like y; empty: forward alone
// counts.
Outputs reference(const Case& c, const Inputs& in, const Doubles& saved_y) {
  Outputs out;
  out.r.resize(static_cast<size_t>(c.batch) * c.heads * c.seqlen);
  const auto slice = [&](const std::vector<float>& values, size_t sequence) {
    const size_t count = values.size() / c.sequences();
    return Doubles(values.begin() + sequence * count, values.begin() + (sequence + 1) * count);
  };
  const auto whole = [](const std::vector<float>& values) { return Doubles(values.begin(), values.end()); };
  for (int sequence = 0; sequence < c.sequences(); ++sequence) {
    const int batch = c.bounds.empty() ? sequence : 0;
    const int begin = c.bounds.empty() ? 0 : static_cast<int>(c.bounds[sequence]);
    const int end = c.bounds.empty() ? c.seqlen : static_cast<int>(c.bounds[sequence + 1]);
    tests::Reference one{};
    fill_sizes(c, one.sizes);
    one.sizes.batch = one.sizes.num_sequences = 1, one.sizes.seqlen = end - begin;
    const auto rows = [&](const Rows16& x) { return take(x, x.values, batch, begin, end); };
    one.q = rows(in.q), one.k = rows(in.k), one.v = rows(in.v), one.grad_y = rows(in.grad_y);
    one.gamma_q = whole(in.gamma_q), one.beta_q = whole(in.beta_q);
    one.gamma_k = whole(in.gamma_k), one.beta_k = whole(in.beta_k);
    one.initial_kv = slice(in.state_kv, sequence), one.initial_k = slice(in.state_k, sequence);
    one.grad_final_kv = slice(in.grad_kv, sequence), one.grad_final_k = slice(in.grad_k, sequence);
    if (!saved_y.empty()) one.saved_y = take(in.grad_y, saved_y, batch, begin, end);
    one.run();
    put(in.grad_y, one.y, batch, begin, end, out.y);
    for (int head = 0; head < c.heads; ++head) {
      for (int row = begin; row < end; ++row) {
        out.r[(static_cast<size_t>(batch) * c.heads + head) * c.seqlen + row] =
            one.r[static_cast<size_t>(head) * (end - begin) + row - begin];
      }
    }
    append(out.state_kv, one.final_kv), append(out.state_k, one.final_k);
    append(out.grad_kv, one.grad_initial_kv), append(out.grad_sums, one.grad_initial_k);
    put(in.q, one.grad_q, batch, begin, end, out.grad_q);
    put(in.k, one.grad_k, batch, begin, end, out.grad_k);
    put(in.v, one.grad_v, batch, begin, end, out.grad_v);
    add(out.gamma_q, one.grad_gamma_q), add(out.beta_q, one.grad_beta_q);
    add(out.gamma_k, one.grad_gamma_k), add(out.beta_k, one.grad_beta_k);
  }
  return out;
}

// ---- comparison ----

int failures = 0;

template <class Get>
void compare(const Case& c, const char* what, const Doubles& expected, Get&& got, double tolerance) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(got(i) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const bool good = relative <= tolerance;  // false for NaN
  if (!good) ++failures;
  std::printf("%s %-8s %.2e  %s\n", good ? "ok  " : "FAIL", what, relative, c.name().c_str());
}

Affine affine_of(const std::vector<float>& gamma, const std::vector<float>& beta) {
  return {gamma.empty() ? nullptr : gamma.data(), beta.empty() ? nullptr : beta.data(), dim, dim};
}

std::vector<float> token_statistics(const Case& c, const Rows16& x) {
  std::vector<float> result;
  if (c.layer_norm != LayerNorm::token) return result;
  const int count = x.heads * dim;
  for (int row = 0; row < c.batch * c.seqlen; ++row) {
    const double* values = &x.values[static_cast<size_t>(row) * count];  // all heads of the token
    double mean = 0, variance = 0;
    for (int i = 0; i < count; ++i) mean += values[i] / count;
    for (int i = 0; i < count; ++i) variance += (values[i] - mean) * (values[i] - mean) / count;
    result.push_back(static_cast<float>(mean));
    result.push_back(static_cast<float>(1 / std::sqrt(variance + layer_norm_eps)));
  }
  return result;
}

void fill(const Case& c, Inputs& in, Problem& problem) {
  fill_sizes(c, problem);
  problem.q = in.q.view<const void*>(), problem.k = in.k.view<const void*>();
  problem.v = in.v.view<const void*>();
  problem.query_affine = affine_of(in.gamma_q, in.beta_q);
  problem.key_affine = affine_of(in.gamma_k, in.beta_k);
  problem.cu_seqlens = c.bounds.empty() ? nullptr : c.bounds.data();
}

// Runs `direction` (forward or backward) with a workspace full of NaN; false and a message when it can't.
template <class AnyProblem>
bool launch(const Case& c, const AnyProblem& problem, const Inputs& in,
            const char* (*direction)(const AnyProblem&, const kernels::Launch&, void*)) {
  const std::vector<float> query_statistics = token_statistics(c, in.q),
                           key_statistics = token_statistics(c, in.k);
  kernels::Launch launch;
  launch.segments = c.segments;
  launch.bounds = problem.cu_seqlens;
  launch.query_statistics = query_statistics.empty() ? nullptr : query_statistics.data();
  launch.key_statistics = key_statistics.empty() ? nullptr : key_statistics.data();
  // a multiple of 64 bytes from an address that is one
  std::vector<double> workspace(kernels::workspace_bytes(problem, c.segments) / 8 + 16, NAN);
  launch.workspace = &workspace[(64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64 / 8];
  const char* error = kernels::supports(problem) ? direction(problem, launch, nullptr) : "unsupported";
  if (*error) {
    std::printf("FAIL %s: %s\n", c.name().c_str(), error);
    ++failures;
  }
  return !*error;
}

Inputs make_inputs(const Case& c) {
  Random random;
  Inputs in;
  in.q = random.rows(c, c.heads, dim);
  in.k = random.rows(c, c.kv_heads, dim);
  in.v = random.rows(c, c.kv_heads, c.head_dim, c.value_size);
  in.grad_y = random.rows(c, c.heads, c.head_dim, 1 / c.value_size);
  if (c.affine) {
    in.gamma_q = random.floats(c.heads * dim, 1, 0.2), in.beta_q = random.floats(c.heads * dim, 0, 0.2);
    in.gamma_k = random.floats(c.kv_heads * dim, 1, 0.2), in.beta_k = random.floats(c.kv_heads * dim, 0, 0.2);
  }
  const size_t sums = c.state_sums();
  in.state_kv = random.floats(sums * c.head_dim, 0, 1), in.state_k = random.floats(sums, 0, 0.1);
  // sums of features of real keys: the diagonal products and whole maps are positive
  for (size_t i = 0; i < sums; ++i) {
    const int f = static_cast<int>(i) % c.features(), begin = static_cast<int>(circulant_begin(c.map, dim));
    if (f >= begin && f < begin + dim) in.state_k[i] = 5 + std::fabs(in.state_k[i]);
    if (f == 0 && begin > 0) in.state_k[i] = 7;
  }
  in.grad_kv = random.floats(sums * c.head_dim, 0, 0.1), in.grad_k = random.floats(sums, 0, 0.1);
  return in;
}

void run(const Case& c) {
  Inputs in = make_inputs(c);
  const size_t sums = c.state_sums();
  const std::vector<float> no_state_kv(sums * c.head_dim, NAN), no_state_k(sums, NAN);
  const double tolerance = c.dtype == Dtype::bfloat16 ? 6e-3 : 8e-4;
  const auto check = [&](const char* what, const Doubles& expected, const std::vector<float>& got,
                         double bound) {
    compare(c, what, expected, [&](size_t i) { return got[i]; }, bound);
  };
  const auto check_rows = [&](const char* what, const Doubles& expected, const Rows16& got, double bound) {
    compare(c, what, expected, [&](size_t i) { return from_bits(got.bits[i], c.dtype); }, bound);
  };

  ForwardProblem forward{};
  fill(c, in, forward);
  Rows16 y = empty_rows(c, c.heads, c.head_dim);
  std::vector<float> r(static_cast<size_t>(c.batch) * c.heads * c.seqlen, NAN);
  std::vector<float> state_kv = no_state_kv, state_k = no_state_k;
  forward.y = y.view<void*>(), forward.r = r.data();
  if (c.states) {
    forward.initial_state = {in.state_kv.data(), in.state_k.data()};
    forward.final_state = {state_kv.data(), state_k.data()};
  }
  if (!launch(c, forward, in, &kernels::forward)) return;
  Doubles saved_y;
  for (uint16_t bits : y.bits) saved_y.push_back(from_bits(bits, c.dtype));
  const Outputs expected = reference(c, in, saved_y);
  check_rows("y", expected.y, y, tolerance);
  Doubles denominators;
  for (double x : expected.r) denominators.push_back(1 / x);
  compare(c, "1/r", denominators, [&](size_t i) { return 1 / r[i]; }, tolerance);
  if (c.states) {
    check("S", expected.state_kv, state_kv, tolerance);
    check("Z", expected.state_k, state_k, tolerance);
  }

  BackwardProblem backward{};
  fill(c, in, backward);
  Rows16 grad_q = empty_rows(c, c.heads, dim), grad_k = empty_rows(c, c.kv_heads, dim),
         grad_v = empty_rows(c, c.kv_heads, c.head_dim);
  std::vector<float> gamma_q(c.heads * dim, NAN), beta_q = gamma_q;
  std::vector<float> gamma_k(c.kv_heads * dim, NAN), beta_k = gamma_k;
  std::vector<float> grad_kv = no_state_kv, grad_sums = no_state_k;
  backward.y = y.view<const void*>(), backward.r = r.data(), backward.grad_y = in.grad_y.view<const void*>();
  backward.grad_q = grad_q.view<void*>(), backward.grad_k = grad_k.view<void*>();
  backward.grad_v = grad_v.view<void*>();
  if (c.affine) {
    backward.grad_query_affine = {gamma_q.data(), beta_q.data()};
    backward.grad_key_affine = {gamma_k.data(), beta_k.data()};
  }
  if (c.states) {
    backward.initial_state = forward.initial_state;
    backward.grad_final_state = {in.grad_kv.data(), in.grad_k.data()};
    backward.grad_initial_state = {grad_kv.data(), grad_sums.data()};
  }
  if (!launch(c, backward, in, &kernels::backward)) return;
  const double bound = 3 * tolerance;  // several roundings, and sums in which terms cancel
  check_rows("grad q", expected.grad_q, grad_q, bound);
  check_rows("grad k", expected.grad_k, grad_k, bound);
  check_rows("grad v", expected.grad_v, grad_v, bound);
  if (c.affine) {
    check("gamma q", expected.gamma_q, gamma_q, bound);
    check("beta q", expected.beta_q, beta_q, bound);
    check("gamma k", expected.gamma_k, gamma_k, bound);
    check("beta k", expected.beta_k, beta_k, bound);
  }
  if (c.states) {
    check("grad S", expected.grad_kv, grad_kv, bound);
    check("grad Z", expected.grad_sums, grad_sums, bound);
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](FeatureMap map, Dtype dtype) {
    const auto none = LayerNorm::none, head = LayerNorm::head, token = LayerNorm::token;
    all.push_back({map, dtype, head, 1, 1, 1, 64, 64, 1, false, false, true, {}});
    all.push_back({map, dtype, head, 2, 2, 2, 150, 64, 1, true, true, true, {}});
    all.push_back({map, dtype, none, 1, 1, 1, 300, 64, 2, true, true, true, {}});
    all.push_back({map, dtype, token, 1, 2, 2, 259, 64, 3, true, false, true, {}});
    all.push_back({map, dtype, head, 1, 1, 1, 1, 64, 1, false, true, true, {}});
    all.push_back({map, dtype, head, 1, 1, 1, 70, 64, 4, true, true, false, {}});
    all.push_back({map, dtype, head, 1, 2, 2, 100, 16, 1, true, true, true, {}});
    all.push_back({map, dtype, head, 1, 1, 1, 140, 208, 2, true, true, true, {}});
    all.push_back({map, dtype, head, 2, 6, 2, 130, 64, 2, true, true, true, {}});
    all.push_back({map, dtype, head, 1, 2, 1, 200, 80, 2, true, true, true, {0, 70, 70, 73, 200}});
    // sums past float16's 65504, and grad y / sum(sim) near its smallest numbers
    all.push_back({map, dtype, head, 1, 1, 1, 320, 64, 2, true, false, true, {}, 300});
  };
  for (Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (FeatureMap map : {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu}) {
      add(map, dtype);
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  for (const Case& c : cases()) {
    if (c.name().find(filter) != std::string::npos) run(c);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures > 0;
}
