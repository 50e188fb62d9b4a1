// Checks the CPU backend against scalar_reference.h: all maps, LayerNorms, dtypes and directions at small odd
// sizes, with grouped queries, packed sequences, states in and out, every stride larger than it has to be,
// several threads and segments. Each call is made twice and must give the same bits. The environment variable
// REBASED_CPU_ISA picks the instruction set. Arguments: a seed (1 by default), then "thinned" for one shape
// of each map, LayerNorm and dtype, in turns. Exits with 1 when a result is off.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "op/backend.h"
#include "tests/cpu_run.h"

namespace rebased::cpu_tests {
namespace {

// A run, and what its results must be like.
struct CheckedRun : Run {
  using Run::Run;

  // Whether operands are rounded to bfloat16 before they are summed: then r and the states are as exact as
  // such terms.
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
  // Checks rows of no sequence: results are 0, and r is 1.
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

  // Steps through the tokens one by one, with a pool that has one slot more than there are sequences, and
  // room for one head more in each: what stands there must stay NaN. One more call names no slot, and must
  // change nothing.
  void check_steps() {
    Results out = call();
    Tensor pool_kv(sums, c.batch + 1, c.kv_heads + 1, features, c.head_dim);
    Tensor pool_k(sums, c.batch + 1, c.kv_heads + 1, features, 1);
    pool_kv.heads = pool_k.heads = c.kv_heads;
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
      p.kv_stride = pool_kv.batch_stride, p.k_stride = pool_k.batch_stride;
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
    for (Tensor* pool : {&pool_kv, &pool_k}) {
      pool->heads = c.kv_heads + 1;
      for (int64_t slot = 0; slot <= c.batch; ++slot) {
        for (const char* byte = pool->at(slot, c.kv_heads, 0, 0);
             byte < pool->at(slot, c.kv_heads, 0, 0) + features * pool->row_stride * element_size(sums);
             ++byte) {
          if (static_cast<unsigned char>(*byte) == 0xff) continue;
          ++failures;
          std::printf("MISMATCH %s: a step wrote between the slots\n", c.name().c_str());
          return;
        }
      }
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
}  // namespace rebased::cpu_tests

int main(int count, char** arguments) {
  using namespace rebased;
  using namespace rebased::cpu_tests;
  random_bits.seed(count > 1 ? std::atoi(arguments[1]) : 1);
  const struct {
    int64_t batch, kv_heads, group, seqlen, feature_dim, head_dim;
    int threads;
  } shapes[] = {{2, 2, 1, 37, 5, 6, 2},   {1, 1, 2, 131, 16, 33, 3}, {1, 2, 1, 70, 8, 64, 1},
                {2, 16, 3, 1, 1, 1, 1},   {1, 1, 1, 100, 33, 17, 4}, {1, 1, 1, 0, 4, 4, 2},
                {1, 1, 2, 150, 16, 50, 2}};
  const bool thinned = count > 2 && !std::strcmp(arguments[2], "thinned");
  constexpr int shape_count = sizeof shapes / sizeof shapes[0];
  int number = 0;
  for (FeatureMap map :
       {FeatureMap::outer, FeatureMap::square, FeatureMap::taylor, FeatureMap::elu, FeatureMap::identity})
    for (LayerNorm norm : {LayerNorm::none, LayerNorm::token, LayerNorm::head})
      for (Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
        for (const auto& shape : shapes) {
          const int n = number++;
          if (thinned && n % shape_count != n / shape_count % shape_count) continue;
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
                 n % 11 != 3 && map != FeatureMap::identity};  // denominators of identity may be near 0
          CheckedRun(c).check();
          if (shape.seqlen > 40 || shape.seqlen == 0 || c.packed) continue;
          c.states = false;
          CheckedRun(c).check_steps();
        }
  std::printf("%s: %d comparisons, %d mismatches\n", cpu::instruction_set(), comparisons, failures);
  return failures > 0;
}
