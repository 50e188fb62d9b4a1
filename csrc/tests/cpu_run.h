// One case of the CPU backend's driver: its tensors, the calls of the backend on them, and what
// scalar_reference.h says that the calls give. driver_cpu.cpp compares the two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "op/backend.h"
#include "op/feature_map.h"
#include "tests/host_tensors.h"
#include "tests/scalar_reference.h"

namespace rebased::cpu_tests {

using rebased::tests::Reference;

inline int failures = 0, comparisons = 0;

inline void run_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back([=] { body(i, i + 1, context); });
  for (std::thread& thread : threads) thread.join();
}

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

inline void compare(const Case& c, const char* what, const Values& result, const Values& expected,
                    double limit, double floor = 0) {
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
        // the first row and the last third of all rows belong to no sequence; the second sequence is empty
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
    // A state that keys have made has a denominator far from 0: the squares get some mass, or all features
    // do.
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
  // Calls forward and backward. With in_parts the two halves of the backward are called apart, and a state is
  // the given state plus the state of the rows alone.
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
};

}  // namespace rebased::cpu_tests
