// The CPU backend against scalar_reference.h: all maps, LayerNorms, dtypes and directions at small odd sizes,
// with grouped queries, packed sequences, states in and out, every stride larger than it has to be, several
// threads and segments, and each call twice for the same bits. The environment variable REBASED_CPU_ISA picks
// the instruction set. Arguments: none, or a seed. Exits with 1 when a result is off.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "op/backend.h"
#include "tests/scalar_reference.h"

namespace {

using namespace rebased;
using rebased::tests::Reference;
using rebased::tests::Values;

int failures = 0, comparisons = 0;
std::mt19937 random_bits;

void run_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back([=] { body(i, i + 1, context); });
  for (std::thread& thread : threads) thread.join();
}

// ---- elements: inputs are multiples of 1/32 below 4, which every dtype holds exactly ----
uint16_t encode_small(double value, int fraction, int bias) {
  if (value == 0) return 0;
  const int exponent = std::ilogb(value);
  const int mantissa = static_cast<int>(std::ldexp(std::fabs(value), fraction - exponent));
  const int bits = ((exponent + bias - 1) << fraction) + mantissa;  // the mantissa's leading 1 carries
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}
double decode_small(uint16_t bits, int fraction, int bias) {
  const int field = (bits & 0x7fff) >> fraction, mantissa = bits & ((1 << fraction) - 1);
  if (field == (1 << (15 - fraction)) - 1) return NAN;  // infinite or not a number: no result should be
  const double magnitude = field ? std::ldexp(mantissa + (1 << fraction), field - bias - fraction)
                                 : std::ldexp(mantissa, 1 - bias - fraction);
  return bits & 0x8000 ? -magnitude : magnitude;
}
void write_element(char* to, Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  const uint16_t small = dtype == Dtype::float16 ? encode_small(value, 10, 15) : encode_small(value, 7, 127);
  if (dtype == Dtype::float64)
    std::memcpy(to, &value, 8);
  else if (dtype == Dtype::float32)
    std::memcpy(to, &single, 4);
  else
    std::memcpy(to, &small, 2);
}
double read_element(const char* from, Dtype dtype) {
  double value;
  float single;
  uint16_t small;
  if (dtype == Dtype::float64) return std::memcpy(&value, from, 8), value;
  if (dtype == Dtype::float32) return std::memcpy(&single, from, 4), single;
  std::memcpy(&small, from, 2);
  return dtype == Dtype::float16 ? decode_small(small, 10, 15) : decode_small(small, 7, 127);
}

// A tensor (batch, heads, rows, width) in memory (batch, rows, heads, width) or in that order, with `padding`
// elements after each row; unwritten elements are NaN. Its memory ends with its last element.
struct Tensor {
  Dtype dtype;
  int64_t batch, heads, rows, width, batch_stride, head_stride, row_stride;
  std::vector<char> bytes;

  Tensor(Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width, bool token_major = false,
         int64_t padding = 0)
      : dtype(dtype), batch(batch), heads(heads), rows(rows), width(width) {
    row_stride = token_major ? heads * width + padding : width + padding;
    head_stride = token_major ? width : rows * row_stride;
    batch_stride = token_major ? rows * row_stride : heads * head_stride;
    const int64_t elements =
        batch * heads * rows * width == 0
            ? 0
            : (batch - 1) * batch_stride + (heads - 1) * head_stride + (rows - 1) * row_stride + width;
    bytes.assign(elements * element_size(dtype), static_cast<char>(0xff));
  }
  char* at(int64_t b, int64_t head, int64_t row, int64_t column) {
    return bytes.data() +
           (b * batch_stride + head * head_stride + row * row_stride + column) * element_size(dtype);
  }
  void randomize(double mean) {
    std::uniform_int_distribution<int> steps(-48, 48);
    for_each([&](char* element) { write_element(element, dtype, mean + steps(random_bits) / 32.0); });
  }
  template <class Body>
  void for_each(const Body& body) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t column = 0; column < width; ++column) body(at(b, head, row, column));
  }
  // rows [first, first + count) of one batch entry as (heads, count, width)
  Values slice(int64_t b, int64_t first, int64_t count) {
    Values values;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = first; row < first + count; ++row)
        for (int64_t column = 0; column < width; ++column)
          values.push_back(read_element(at(b, head, row, column), dtype));
    return values;
  }
  Values all() {
    Values values;
    for_each([&](char* element) { values.push_back(read_element(element, dtype)); });
    return values;
  }
  ConstRows input() { return {bytes.data(), batch_stride, head_stride, row_stride}; }
  MutableRows output() { return {bytes.data(), batch_stride, head_stride, row_stride}; }
  void* data() { return bytes.data(); }
};

struct Workspace {
  explicit Workspace(int64_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
    std::memset(memory, 0xff, bytes);
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  void* memory;
};

struct Case {
  FeatureMap map;
  LayerNorm norm;
  Dtype dtype;
  int64_t batch, kv_heads, group, seqlen, feature_dim, head_dim;
  int threads;
  bool states, packed, token_major, affine, shared_affine, normalize;

  std::string name() const {
    static const char* const maps[] = {"outer", "square", "taylor", "elu", "identity"};
    static const char* const norms[] = {"none", "token", "head"};
    static const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    char text[200];
    std::snprintf(text, sizeof text, "%s %s %s B%d Hkv%d G%d N%d d%d dv%d%s%s%s%s threads %d", maps[int(map)],
                  norms[int(norm)], dtypes[int(dtype)], int(batch), int(kv_heads), int(group), int(seqlen),
                  int(feature_dim), int(head_dim), states ? " states" : "", packed ? " packed" : "",
                  affine ? "" : " plain", normalize ? "" : " unnormalized", threads);
    return text;
  }
};

void compare(const Case& c, const char* what, const Values& result, const Values& expected, double limit,
             double floor = 0) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (result[i] - expected[i]) * (result[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  ++comparisons;
  const double error = std::sqrt(difference) / std::max(std::sqrt(size), std::max(floor, 1e-30));
  if (result.size() == expected.size() && error <= limit) return;
  ++failures;
  std::printf("MISMATCH %s: %s is off by %.2e (limit %.1e)\n", c.name().c_str(), what, error, limit);
}

struct Run {
  Case c;
  Dtype sums;
  int64_t heads, sequences, features;
  std::vector<int64_t> bounds;
  Tensor q, k, v, grad_y, gamma_q, beta_q, gamma_k, beta_k;
  Tensor initial_kv, initial_k, grad_final_kv, grad_final_k;

  explicit Run(const Case& c)
      : c(c),
        sums(c.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32),
        heads(c.kv_heads * c.group),
        sequences(c.packed ? 4 : c.batch),
        features(num_features(c.map, c.feature_dim)),
        // the first row and the last third belong to no sequence, the second sequence is empty
        bounds(c.packed ? std::vector<int64_t>{1, c.seqlen / 4 + 1, c.seqlen / 4 + 1, c.seqlen / 2 + 1,
                                               c.seqlen * 2 / 3 + 1}
                        : std::vector<int64_t>{}),
        q(tensor(heads, c.feature_dim)),
        k(tensor(c.kv_heads, c.feature_dim)),
        v(tensor(c.kv_heads, c.head_dim)),
        grad_y(tensor(heads, c.head_dim)),
        gamma_q(parameter(heads)),
        beta_q(parameter(heads)),
        gamma_k(parameter(c.kv_heads)),
        beta_k(parameter(c.kv_heads)),
        initial_kv(state(c.head_dim)),
        initial_k(state(1)),
        grad_final_kv(state(c.head_dim)),
        grad_final_k(state(1)) {
    for (Tensor* t : {&q, &k, &v, &grad_y, &initial_kv, &grad_final_kv, &grad_final_k}) t->randomize(0);
    for (Tensor* t : {&gamma_q, &gamma_k}) t->randomize(1);
    for (Tensor* t : {&beta_q, &beta_k}) t->randomize(0.25);
    // the denominator of a state that keys made: a mass on the squares, or everywhere
    initial_k.randomize(0);
    const int64_t squares = is_polynomial(c.map) ? circulant_begin(c.map, c.feature_dim) : 0;
    for (int64_t s = 0; s < sequences; ++s)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        for (int64_t f = 0; f < features; ++f) {
          const bool square = f >= squares && f < squares + c.feature_dim;
          write_element(initial_k.at(s, head, f, 0), sums, square ? 6 : f < squares ? 2.0 * (f == 0) : 0);
        }
  }
  Tensor tensor(int64_t of_heads, int64_t width) const {
    return Tensor(c.dtype, c.batch, of_heads, c.seqlen, width, c.token_major, c.token_major ? 3 : 0);
  }
  Tensor parameter(int64_t of_heads) const {
    return Tensor(sums, 1, c.shared_affine ? 1 : of_heads, 1, c.feature_dim);
  }
  Tensor state(int64_t width) const { return Tensor(sums, sequences, c.kv_heads, features, width); }

  Affine affine(Tensor& gamma, Tensor& beta) {
    const int64_t stride = c.shared_affine ? 0 : c.feature_dim;
    if (!c.affine) return {nullptr, nullptr, 0, 0};
    return {gamma.data(), beta.data(), stride, stride};
  }
  void describe(Problem& p) {
    p.batch = c.batch, p.heads = heads, p.kv_heads = c.kv_heads, p.seqlen = c.seqlen;
    p.feature_dim = c.feature_dim, p.head_dim = c.head_dim, p.num_sequences = sequences;
    p.dtype = c.dtype, p.feature_map = c.map, p.layer_norm = c.norm, p.normalize = c.normalize;
    p.scale = 0.625, p.eps = 0.5, p.layer_norm_eps = 1e-3;
    p.q = q.input(), p.k = k.input(), p.v = v.input();
    p.query_affine = affine(gamma_q, beta_q), p.key_affine = affine(gamma_k, beta_k);
    p.cu_seqlens = c.packed ? bounds.data() : nullptr;
  }

  struct Results {
    Tensor y, r, final_kv, final_k, grad_q, grad_k, grad_v;
    Tensor grad_gamma_q, grad_beta_q, grad_gamma_k, grad_beta_k, grad_initial_kv, grad_initial_k;
  };
  // in_parts: the backward's two halves apart, and states as the given one plus what the rows alone add.
  Results call(bool in_parts = false) {
    Results out{tensor(heads, c.head_dim),
                Tensor(sums, c.batch, heads, c.seqlen, 1),
                state(c.head_dim),
                state(1),
                tensor(heads, c.feature_dim),
                tensor(c.kv_heads, c.feature_dim),
                tensor(c.kv_heads, c.head_dim),
                parameter(heads),
                parameter(heads),
                parameter(c.kv_heads),
                parameter(c.kv_heads),
                state(c.head_dim),
                state(1)};
    const Parallel parallel{c.threads, run_threads};
    ForwardProblem f{};
    describe(f);
    f.y = out.y.output(), f.r = out.r.data();
    if (c.states) f.initial_state = {initial_kv.data(), initial_k.data()};
    if (c.states) f.final_state = {out.final_kv.data(), out.final_k.data()};
    const Workspace forward_workspace(cpu::workspace_bytes(f, c.threads));
    f.workspace = forward_workspace.memory;
    cpu::forward(f, parallel);

    BackwardProblem b{};
    describe(b);
    b.y = out.y.input(), b.r = out.r.data(), b.grad_y = grad_y.input();
    b.grad_q = out.grad_q.output(), b.grad_k = out.grad_k.output(), b.grad_v = out.grad_v.output();
    if (c.affine) b.grad_query_affine = {out.grad_gamma_q.data(), out.grad_beta_q.data()};
    if (c.affine) b.grad_key_affine = {out.grad_gamma_k.data(), out.grad_beta_k.data()};
    if (c.states) {
      b.initial_state = f.initial_state;
      b.grad_final_state = {grad_final_kv.data(), grad_final_k.data()};
      b.grad_initial_state = {out.grad_initial_kv.data(), out.grad_initial_k.data()};
    }
    const auto run_part = [&](BackwardPart part) {
      b.part = part;
      const Workspace workspace(cpu::workspace_bytes(b, c.threads));
      b.workspace = workspace.memory;
      cpu::backward(b, parallel);
    };
    if (!in_parts) {
      run_part(BackwardPart::all);
      return out;
    }
    const BackwardProblem whole = b;
    b.grad_k = b.grad_v = MutableRows{}, b.grad_key_affine = {}, b.grad_initial_state = {};
    run_part(BackwardPart::queries);
    b = whole;
    b.grad_q = MutableRows{}, b.grad_query_affine = {};
    run_part(BackwardPart::keys);
    if (!c.states) return out;
    b.grad_k = b.grad_v = MutableRows{}, b.grad_key_affine = {};
    b.initial_state = b.grad_final_state = ConstState{};
    run_part(BackwardPart::reverse_state);
    add(out.grad_initial_kv, grad_final_kv), add(out.grad_initial_k, grad_final_k);
    f.state_only = true;
    f.initial_state = ConstState{}, f.y = MutableRows{}, f.r = nullptr;
    const Workspace state_workspace(cpu::workspace_bytes(f, c.threads));
    f.workspace = state_workspace.memory;
    cpu::forward(f, parallel);
    add(out.final_kv, initial_kv), add(out.final_k, initial_k);
    return out;
  }
  void add(Tensor& sum, Tensor& given) {
    const Values a = sum.all(), b = given.all();
    size_t i = 0;
    sum.for_each([&](char* element) { write_element(element, sums, a[i] + b[i]), ++i; });
  }

  Values per_head(Tensor& parameter, int64_t of_heads) {
    Values values;
    if (!c.affine) return values;
    const Values own = parameter.all();
    for (int64_t i = 0; i < of_heads * c.feature_dim; ++i) values.push_back(own[i % own.size()]);
    return values;
  }
  Reference reference(int64_t s, int64_t b, int64_t first, int64_t count, Results& out) {
    Reference expected;
    describe(expected.sizes);
    expected.sizes.batch = 1, expected.sizes.seqlen = count;
    expected.q = q.slice(b, first, count), expected.k = k.slice(b, first, count);
    expected.v = v.slice(b, first, count), expected.grad_y = grad_y.slice(b, first, count);
    expected.saved_y = out.y.slice(b, first, count);
    expected.gamma_q = per_head(gamma_q, heads), expected.beta_q = per_head(beta_q, heads);
    expected.gamma_k = per_head(gamma_k, c.kv_heads), expected.beta_k = per_head(beta_k, c.kv_heads);
    if (c.states) {
      expected.initial_kv = initial_kv.slice(s, 0, features);
      expected.initial_k = initial_k.slice(s, 0, features);
      expected.grad_final_kv = grad_final_kv.slice(s, 0, features);
      expected.grad_final_k = grad_final_k.slice(s, 0, features);
    }
    expected.run();
    return expected;
  }

  double limit(bool gradient) const {
    if (c.dtype == Dtype::float64) return gradient ? 4e-12 : 1e-12;
    if (c.dtype == Dtype::float32) return gradient ? 2e-5 : 5e-6;
    return c.dtype == Dtype::float16 ? 2e-3 : 1e-2;
  }

  // bfloat16 operands of float32 sums: r and the states are as exact as their terms.
  bool rounds_operands() const {
    if (c.dtype != Dtype::bfloat16 || !is_polynomial(c.map)) return false;
    const char* const set = cpu::instruction_set();
    const bool whole_panels = (c.head_dim + 15) / 16 % 2 == 0;
    return (!std::strcmp(set, "avx512_amx") && whole_panels) || !std::strcmp(set, "avx512_bf16");
  }
  double sums_limit(double limit_of_sums) const { return rounds_operands() ? limit(false) : limit_of_sums; }

  void check() {
    Results out = call(), again = call();
    const auto same = [](const Tensor& a, const Tensor& b) { return a.bytes == b.bytes; };
    if (!same(out.y, again.y) || !same(out.grad_q, again.grad_q) || !same(out.grad_k, again.grad_k) ||
        !same(out.grad_v, again.grad_v) || !same(out.grad_gamma_q, again.grad_gamma_q) ||
        !same(out.grad_beta_k, again.grad_beta_k) || !same(out.grad_initial_kv, again.grad_initial_kv)) {
      ++failures;
      std::printf("MISMATCH %s: two calls differ\n", c.name().c_str());
    }
    check_results(out);
    Results parts = call(true);
    check_results(parts);
  }
  void check_results(Results& out) {
    Values gamma_sums[4] = {Values(heads * c.feature_dim), Values(heads * c.feature_dim),
                            Values(c.kv_heads * c.feature_dim), Values(c.kv_heads * c.feature_dim)};
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t b = c.packed ? 0 : s, first = c.packed ? bounds[s] : 0;
      const int64_t count = c.packed ? bounds[s + 1] - first : c.seqlen;
      Reference expected = reference(s, b, first, count, out);
      compare(c, "y", out.y.slice(b, first, count), expected.y, limit(false));
      compare(c, "r", out.r.slice(b, first, count), expected.r,
              sums == c.dtype ? limit(false) : sums_limit(5e-6));
      const struct {
        const char* what;
        Tensor& result;
        Values& expected;
      } gradients[] = {{"grad_q", out.grad_q, expected.grad_q},
                       {"grad_k", out.grad_k, expected.grad_k},
                       {"grad_v", out.grad_v, expected.grad_v}};
      for (const auto& g : gradients)
        compare(c, g.what, g.result.slice(b, first, count), g.expected, limit(true), 0.1);
      const Values* parts[4] = {&expected.grad_gamma_q, &expected.grad_beta_q, &expected.grad_gamma_k,
                                &expected.grad_beta_k};
      for (int i = 0; i < 4; ++i)
        for (size_t e = 0; e < parts[i]->size(); ++e) gamma_sums[i][e] += (*parts[i])[e];
      if (!c.states) continue;
      const double state_limit = sums == Dtype::float64 ? 1e-12 : sums_limit(2e-5);
      compare(c, "final_kv", out.final_kv.slice(s, 0, features), expected.final_kv, state_limit);
      compare(c, "final_k", out.final_k.slice(s, 0, features), expected.final_k, state_limit);
      compare(c, "grad_initial_kv", out.grad_initial_kv.slice(s, 0, features), expected.grad_initial_kv,
              state_limit);
      compare(c, "grad_initial_k", out.grad_initial_k.slice(s, 0, features), expected.grad_initial_k,
              state_limit);
    }
    check_unowned(out);
    if (!c.affine) return;
    Tensor* parameters[4] = {&out.grad_gamma_q, &out.grad_beta_q, &out.grad_gamma_k, &out.grad_beta_k};
    const char* const names[4] = {"grad_gamma_q", "grad_beta_q", "grad_gamma_k", "grad_beta_k"};
    for (int i = 0; i < 4; ++i) {
      const Values result = parameters[i]->all();
      Values expected(result.size(), 0);
      for (size_t e = 0; e < gamma_sums[i].size(); ++e) expected[e % result.size()] += gamma_sums[i][e];
      compare(c, names[i], result, expected, sums == Dtype::float64 ? 4e-12 : sums_limit(4e-5), 0.1);
    }
  }
  // Rows of no sequence: zero, r = 1.
  void check_unowned(Results& out) {
    if (!c.packed) return;
    for (const auto& [first, end] : {std::pair<int64_t, int64_t>{0, 1}, {bounds.back(), c.seqlen}}) {
      for (Tensor* t : {&out.y, &out.grad_q, &out.grad_k, &out.grad_v}) {
        const Values result = t->slice(0, first, end - first);
        compare(c, "a row of no sequence", result, Values(result.size(), 0), 0);
      }
      const Values r = out.r.slice(0, first, end - first);
      compare(c, "r of no sequence", r, Values(r.size(), 1), 0);
    }
  }

  // The tokens one by one through a pool with one slot more than sequences; one more call names no slot.
  void check_steps() {
    Results out = call();
    Tensor pool_kv(sums, c.batch + 1, c.kv_heads, features, c.head_dim);
    Tensor pool_k(sums, c.batch + 1, c.kv_heads, features, 1);
    pool_kv.for_each([&](char* element) { write_element(element, sums, 0); });
    pool_k.for_each([&](char* element) { write_element(element, sums, 0); });
    std::vector<int64_t> slots(c.batch);
    for (int64_t b = 0; b < c.batch; ++b) slots[b] = c.batch - b;
    Tensor y = tensor(heads, c.head_dim);
    const auto step = [&](int64_t row) {
      StepProblem p{};
      describe(p);
      p.seqlen = 1, p.num_sequences = c.batch, p.cu_seqlens = nullptr;
      p.q.data = q.at(0, 0, row, 0), p.k.data = k.at(0, 0, row, 0), p.v.data = v.at(0, 0, row, 0);
      p.y = y.output();
      p.y.data = y.at(0, 0, row, 0);
      p.state = {pool_kv.data(), pool_k.data()};
      p.num_slots = c.batch + 1, p.state_index = slots.data();
      const Workspace workspace(cpu::workspace_bytes(p, c.threads));
      p.workspace = workspace.memory;
      cpu::step(p, {c.threads, run_threads});
    };
    for (int64_t row = 0; row < c.seqlen; ++row) step(row);
    for (int64_t b = 0; b < c.batch; ++b) {
      Reference expected = reference(b, b, 0, c.seqlen, out);
      compare(c, "y, stepped", y.slice(b, 0, c.seqlen), expected.y, limit(false));
      compare(c, "state, stepped", pool_kv.slice(slots[b], 0, features), expected.final_kv,
              sums == Dtype::float64 ? 1e-12 : 1e-5);
      compare(c, "sums, stepped", pool_k.slice(slots[b], 0, features), expected.final_k,
              sums == Dtype::float64 ? 1e-12 : 1e-5);
    }
    const std::vector<char> before = pool_kv.bytes;
    for (int64_t b = 0; b < c.batch; ++b) slots[b] = b % 2 ? -1 : c.batch + 1;
    step(0);
    compare(c, "y of no slot", y.slice(0, 0, 1), Values(heads * c.head_dim, 0), 0);
    if (pool_kv.bytes == before) return;
    ++failures;
    std::printf("MISMATCH %s: a step without a slot changed a state\n", c.name().c_str());
  }
};

}  // namespace

int main(int count, char** arguments) {
  random_bits.seed(count > 1 ? std::atoi(arguments[1]) : 1);
  const struct {
    int64_t batch, kv_heads, group, seqlen, feature_dim, head_dim;
    int threads;
  } shapes[] = {{2, 2, 1, 37, 5, 6, 2},   {1, 1, 2, 131, 16, 33, 3}, {1, 2, 1, 70, 8, 64, 1},
                {2, 16, 3, 1, 1, 1, 1},   {1, 1, 1, 100, 33, 17, 4}, {1, 1, 1, 0, 4, 4, 2},
                {1, 1, 2, 150, 16, 50, 2}};
  int number = 0;
  for (FeatureMap map :
       {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu, FeatureMap::identity})
    for (LayerNorm norm : {LayerNorm::none, LayerNorm::token, LayerNorm::head})
      for (Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
        for (const auto& shape : shapes) {
          const int n = number++;
          const bool packed = shape.batch == 1 && n % 3 == 0 && shape.seqlen > 1;
          Case c{map,
                 norm,
                 dtype,
                 shape.batch,
                 shape.kv_heads,
                 shape.group,
                 shape.seqlen,
                 shape.feature_dim,
                 shape.head_dim,
                 shape.threads,
                 n % 2 == 0,
                 packed,
                 n % 5 < 2,
                 n % 7 != 0,
                 n % 4 == 1,
                 n % 11 != 3 && map != FeatureMap::identity};  // its denominators may be near 0
          Run(c).check();
          if (shape.seqlen > 40 || shape.seqlen == 0 || c.packed) continue;
          c.states = false;
          Run(c).check_steps();
        }
  std::printf("%s: %d comparisons, %d mismatches\n", cpu::instruction_set(), comparisons, failures);
  return failures > 0;
}
