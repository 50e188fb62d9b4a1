// How a case of the CUDA kernels (case.h) is checked. Forward, backward and a step run through the entry
// points of the backend and are compared with scalar_reference.h; forward and backward run twice, and must
// give the same bits. Works for the emulator (-DREBASED_EMULATED), under any sanitizer, and for CUDA.
// Includes no torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/plan/plan.h"
#include "op/backend.h"
#include "tests/case.h"
#include "tests/device_tensors.h"
#include "tests/scalar_reference.h"

namespace rebased::tests {

inline Dtype accumulator(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

// The tensors of one case and the calls on them.
struct Run {
  const Case& c;
  int64_t heads, sequences, features;
  Tensor q, k, v, grad_y, gamma_q, beta_q, gamma_k, beta_k, initial_kv, initial_k, grad_final_kv,
      grad_final_k;
  Tensor y, r, final_kv, final_k, grad_q, grad_k, grad_v, grad_gamma_q, grad_beta_q, grad_gamma_k,
      grad_beta_k, grad_initial_kv, grad_initial_k;
  Buffer bounds;
  std::unique_ptr<Buffer> kept;  // what the last forward kept for backward

  explicit Run(const Case& c)
      : c(c),
        heads(c.kv_heads * c.group),
        sequences(c.cu_seqlens.empty() ? c.batch : static_cast<int64_t>(c.cu_seqlens.size()) - 1),
        features(num_features(c.map, c.dim)),
        q(c.dtype, c.batch, heads, c.seqlen, c.dim, c.packed_heads, c.padding),
        k(c.dtype, c.batch, c.kv_heads, c.seqlen, c.dim, c.packed_heads, c.padding),
        v(c.dtype, c.batch, c.kv_heads, c.seqlen, c.width, c.packed_heads, c.padding),
        grad_y(c.dtype, c.batch, heads, c.seqlen, c.width, c.packed_heads, c.padding),
        gamma_q(accumulator(c.dtype), 1, heads, 1, c.dim),
        beta_q(accumulator(c.dtype), 1, heads, 1, c.dim),
        gamma_k(accumulator(c.dtype), 1, c.kv_heads, 1, c.dim),
        beta_k(accumulator(c.dtype), 1, c.kv_heads, 1, c.dim),
        initial_kv(accumulator(c.dtype), sequences, c.kv_heads, features, c.width),
        initial_k(accumulator(c.dtype), sequences, c.kv_heads, features, 1),
        grad_final_kv(accumulator(c.dtype), sequences, c.kv_heads, features, c.width),
        grad_final_k(accumulator(c.dtype), sequences, c.kv_heads, features, 1),
        y(c.dtype, c.batch, heads, c.seqlen, c.width, c.packed_heads, c.padding),
        r(accumulator(c.dtype), c.batch, heads, c.seqlen, 1),
        final_kv(accumulator(c.dtype), sequences, c.kv_heads, features, c.width),
        final_k(accumulator(c.dtype), sequences, c.kv_heads, features, 1),
        grad_q(c.dtype, c.batch, heads, c.seqlen, c.dim, c.packed_heads, c.padding),
        grad_k(c.dtype, c.batch, c.kv_heads, c.seqlen, c.dim, c.packed_heads, c.padding),
        grad_v(c.dtype, c.batch, c.kv_heads, c.seqlen, c.width, c.packed_heads, c.padding),
        grad_gamma_q(accumulator(c.dtype), 1, c.shared_affine ? 1 : heads, 1, c.dim),
        grad_beta_q(accumulator(c.dtype), 1, c.shared_affine ? 1 : heads, 1, c.dim),
        grad_gamma_k(accumulator(c.dtype), 1, c.shared_affine ? 1 : c.kv_heads, 1, c.dim),
        grad_beta_k(accumulator(c.dtype), 1, c.shared_affine ? 1 : c.kv_heads, 1, c.dim),
        grad_initial_kv(accumulator(c.dtype), sequences, c.kv_heads, features, c.width),
        grad_initial_k(accumulator(c.dtype), sequences, c.kv_heads, features, 1),
        bounds(c.cu_seqlens.size() * sizeof(int64_t)) {
    bounds.upload(c.cu_seqlens.data());
  }

  void randomize(std::mt19937& random) {
    q.randomize(random, 0.2, 1);
    k.randomize(random, 0.2, 1);
    v.randomize(random, 0, c.value_size);
    grad_y.randomize(random, 0, 1 / c.value_size);
    for (Tensor* gamma : {&gamma_q, &gamma_k}) gamma->randomize(random, 1, 0.3);
    for (Tensor* beta : {&beta_q, &beta_k}) beta->randomize(random, 0.2, 0.3);
    for (Tensor* affine : {&gamma_q, &gamma_k, &beta_q, &beta_k}) {
      for (size_t i = 0; c.shared_affine && i < affine->values.size(); ++i) {
        affine->values[i] = affine->values[i % c.dim];
      }
      affine->upload();
    }
    for (Tensor* state : {&initial_kv, &grad_final_kv, &grad_final_k}) state->randomize(random, 0, 0.5);
    initial_k.randomize(random, 0, 0.1);
    // A state that keys have made has a denominator far from 0: the squares get some mass, or all features
    // do. A state may also be any other, of which a negative one is far from 0 too.
    const int64_t squares = is_polynomial(c.map) ? circulant_begin(c.map, c.dim) : 0;
    for (int64_t s = 0; s < sequences * c.kv_heads; ++s) {
      for (int64_t f = 0; f < c.dim; ++f)
        initial_k.values[s * features + squares + f] += c.negative ? -60 : 3;
      if (c.map == FeatureMap::taylor) initial_k.values[s * features] += c.negative ? -100 : 5;
    }
    initial_k.upload();
  }

  Affine affine(const Tensor& gamma, const Tensor& beta) const {
    const int64_t stride = c.shared_affine ? 0 : c.dim;
    return {c.gamma ? gamma.data() : nullptr, c.beta ? beta.data() : nullptr, stride, stride};
  }
  template <class AnyProblem>
  AnyProblem problem() const {
    AnyProblem p{};
    p.batch = c.batch, p.heads = heads, p.kv_heads = c.kv_heads, p.seqlen = c.seqlen;
    p.feature_dim = c.dim, p.head_dim = c.width, p.num_sequences = sequences;
    p.dtype = c.dtype, p.feature_map = c.map, p.layer_norm = c.norm, p.normalize = c.normalize;
    p.scale = c.scale, p.eps = c.eps, p.layer_norm_eps = 1e-3;
    p.q = q.rows<ConstRows>(), p.k = k.rows<ConstRows>(), p.v = v.rows<ConstRows>();
    p.query_affine = affine(gamma_q, beta_q);
    p.key_affine = affine(gamma_k, beta_k);
    if (!c.cu_seqlens.empty()) p.cu_seqlens = static_cast<const int64_t*>(bounds.data());
    return p;
  }

  template <class AnyProblem>
  void call(AnyProblem p, const Device& device) {
    const Plan plan = make_plan(p, device);
    Buffer workspace(plan.workspace.bytes);
    p.workspace = workspace.data();
    if constexpr (std::is_same_v<AnyProblem, ForwardProblem>) {
      kept = std::make_unique<Buffer>(plan.kept_bytes);
      p.kept = kept->data();
    }
    const char* const error = BACKEND::run(p, plan, nullptr);
    if (*error) fail(c.name(), error);
#if !defined(REBASED_EMULATED)
    check(cudaDeviceSynchronize());
#endif
  }

  void expect_path(const Plan& plan) const {
    if (plan.path == c.path) return;
    ++failures;
    std::printf("MISMATCH %s: the plan takes the path %s\n", c.name().c_str(), path_name(plan.path));
  }

  std::vector<Tensor*> results() {
    return {&y,
            &r,
            &final_kv,
            &final_k,
            &grad_q,
            &grad_k,
            &grad_v,
            &grad_gamma_q,
            &grad_beta_q,
            &grad_gamma_k,
            &grad_beta_k,
            &grad_initial_kv,
            &grad_initial_k};
  }

  // Calls forward and backward. With in_parts the two halves of the backward are called apart, and a state is
  // the given state plus the state of the rows alone.
  void sweep(const Device& device, bool in_parts = false) {
    auto forward = problem<ForwardProblem>();
    if (c.states) forward.initial_state = {initial_kv.data(), initial_k.data()};
    if (c.states) forward.final_state = {final_kv.data(), final_k.data()};
    forward.y = y.rows<MutableRows>();
    forward.r = r.data();
    if (!in_parts) {
      forward.keep = Keep::states;
      expect_path(make_plan(forward, device));
    }
    call(forward, device);

    auto backward = problem<BackwardProblem>();
    backward.initial_state = forward.initial_state;
    backward.y = y.rows<ConstRows>();
    backward.r = r.data();
    backward.grad_y = grad_y.rows<ConstRows>();
    if (c.states) backward.grad_final_state = {grad_final_kv.data(), grad_final_k.data()};
    if (c.states) backward.grad_initial_state = {grad_initial_kv.data(), grad_initial_k.data()};
    backward.grad_q = grad_q.rows<MutableRows>();
    backward.grad_k = grad_k.rows<MutableRows>();
    backward.grad_v = grad_v.rows<MutableRows>();
    backward.grad_query_affine = {c.gamma ? grad_gamma_q.data() : nullptr,
                                  c.beta ? grad_beta_q.data() : nullptr};
    backward.grad_key_affine = {c.gamma ? grad_gamma_k.data() : nullptr,
                                c.beta ? grad_beta_k.data() : nullptr};
    if (!in_parts) {
      backward.kept = kept->data();
      backward.kept_bytes = make_plan(forward, device).kept_bytes;
      expect_path(make_plan(backward, device));
      call(backward, device);
      for (Tensor* result : results()) result->download();
      return;
    }
    BackwardProblem part = backward;
    part.part = BackwardPart::queries;
    part.grad_k = part.grad_v = MutableRows{}, part.grad_key_affine = {}, part.grad_initial_state = {};
    call(part, device);
    part = backward;
    part.part = BackwardPart::keys;
    part.grad_q = MutableRows{}, part.grad_query_affine = {};
    call(part, device);
    if (c.states) {
      part.part = BackwardPart::reverse_state;
      part.grad_k = part.grad_v = MutableRows{}, part.grad_key_affine = {};
      part.initial_state = part.grad_final_state = ConstState{};
      call(part, device);
      forward.state_only = true;
      forward.initial_state = ConstState{}, forward.y = MutableRows{}, forward.r = nullptr;
      call(forward, device);
    }
    for (Tensor* result : results()) result->download();
    const auto add = [&](Tensor& sum, const Tensor& given) {
      for (size_t i = 0; c.states && i < sum.values.size(); ++i) sum.values[i] += given.values[i];
    };
    add(grad_initial_kv, grad_final_kv), add(grad_initial_k, grad_final_k);
    add(final_kv, initial_kv), add(final_k, initial_k);
  }

  // What sequence `s` should give, computed from its own rows.
  Reference reference(int64_t s, int64_t first, int64_t rows, bool rounds_operands = false) {
    Reference expected;
    expected.rounds_operands = rounds_operands;
    expected.sizes = problem<Problem>();
    expected.sizes.batch = 1;
    expected.sizes.seqlen = rows;
    const int64_t batch = c.cu_seqlens.empty() ? s : 0;
    expected.q = q.slice(batch, first, rows);
    expected.k = k.slice(batch, first, rows);
    expected.v = v.slice(batch, first, rows);
    expected.grad_y = grad_y.slice(batch, first, rows);
    expected.saved_y = y.slice(batch, first, rows);
    if (c.gamma) expected.gamma_q = gamma_q.values, expected.gamma_k = gamma_k.values;
    if (c.beta) expected.beta_q = beta_q.values, expected.beta_k = beta_k.values;
    if (c.states) {
      expected.initial_kv = initial_kv.slice(s, 0, features);
      expected.initial_k = initial_k.slice(s, 0, features);
      expected.grad_final_kv = grad_final_kv.slice(s, 0, features);
      expected.grad_final_k = grad_final_k.slice(s, 0, features);
    }
    expected.run();
    return expected;
  }
};

// Fills `expected`, a run of the same case, with what the reference says of a run. Rows of no sequence are 0.
// In the place of r there is 1 / r, since r of a small denominator would outweigh all others.
inline void run_reference(const Case& c, Run& run, bool rounds_operands, Run* filled) {
  Run& expected = *filled;
  std::fill(expected.r.values.begin(), expected.r.values.end(), 1);
  const auto add = [&](Tensor& sum, const Values& values) {
    for (size_t i = 0; i < values.size(); ++i) sum.values[i % sum.values.size()] += values[i];
  };
  int64_t previous = 0;
  for (int64_t s = 0; s < run.sequences; ++s) {
    int64_t first = 0, rows = c.seqlen, batch = s;
    if (!c.cu_seqlens.empty()) {
      first = std::min(std::max(previous, c.cu_seqlens[s]), c.seqlen);
      previous = std::max(first, std::min(c.cu_seqlens[s + 1], c.seqlen));
      rows = previous - first;
      batch = 0;
    }
    const Reference one = run.reference(s, first, rows, rounds_operands);
    expected.y.put(batch, first, rows, one.y);
    expected.r.put(batch, first, rows, one.r);
    expected.grad_q.put(batch, first, rows, one.grad_q);
    expected.grad_k.put(batch, first, rows, one.grad_k);
    expected.grad_v.put(batch, first, rows, one.grad_v);
    expected.final_kv.put(s, 0, run.features, one.final_kv);
    expected.final_k.put(s, 0, run.features, one.final_k);
    expected.grad_initial_kv.put(s, 0, run.features, one.grad_initial_kv);
    expected.grad_initial_k.put(s, 0, run.features, one.grad_initial_k);
    add(expected.grad_gamma_q, one.grad_gamma_q);
    add(expected.grad_beta_q, one.grad_beta_q);
    add(expected.grad_gamma_k, one.grad_gamma_k);
    add(expected.grad_beta_k, one.grad_beta_k);
  }
  for (double& inverse : expected.r.values) inverse = 1 / inverse;
}

// Compares a run with the reference. On tensor cores a result may also be off by 3 times what rounding q' and
// k' alone makes of it, as where a sum cancels or a denominator comes close to 0. Of few numbers one error
// may be larger than another that is as large on average.
inline void check_results(const Case& c, Run& run, Run& expected) {
  std::unique_ptr<Run> rounded;
  const auto match = [&](const char* what, Tensor Run::* tensor) {
    const bool gradient = std::strncmp(what, "grad", 4) == 0;
    const Values& exact = (expected.*tensor).values;
    double limit = tolerance(c, gradient);
    const double error = relative_error((run.*tensor).values, exact);
    ++comparisons;
    if (error <= limit) return;
    if (c.path == Path::tensor_core) {
      if (!rounded) {
        rounded = std::make_unique<Run>(c);
        run_reference(c, run, true, rounded.get());
      }
      const double size = static_cast<double>(exact.size()), spread = size < 64 ? 1 + 2 / std::sqrt(size) : 1;
      limit = std::max(limit, 3 * spread * relative_error(((*rounded).*tensor).values, exact));
    }
    if (!(error <= limit)) mismatch(c.name(), what, error, limit);
  };
  match("y", &Run::y);
  for (double& inverse : run.r.values) inverse = 1 / inverse;
  match("1/r", &Run::r);
  match("grad q", &Run::grad_q);
  match("grad k", &Run::grad_k);
  match("grad v", &Run::grad_v);
  if (c.gamma) match("grad gamma q", &Run::grad_gamma_q), match("grad gamma k", &Run::grad_gamma_k);
  if (c.beta) match("grad beta q", &Run::grad_beta_q), match("grad beta k", &Run::grad_beta_k);
  if (c.states) {
    match("final state kv", &Run::final_kv);
    match("final state k", &Run::final_k);
    match("grad initial state kv", &Run::grad_initial_kv);
    match("grad initial state k", &Run::grad_initial_k);
  }
}

inline void check_sweeps(const Case& c, const Device& device, std::mt19937& random) {
  set_plan_override(c.plan);
  Run run(c);
  run.randomize(random);
  run.sweep(device);
  std::vector<Values> once;
  for (const Tensor* result : run.results()) once.push_back(result->values);
  run.sweep(device);
  for (size_t i = 0; i < once.size(); ++i) {
    const Values& again = run.results()[i]->values;
    if (!again.empty() && std::memcmp(once[i].data(), again.data(), again.size() * sizeof(double)) != 0) {
      ++failures;
      std::printf("MISMATCH %s: a second call gives other bits\n", c.name().c_str());
    }
  }

  Run expected(c);
  run_reference(c, run, false, &expected);
  check_results(c, run, expected);
  const bool has_parts = c.path == Path::general || c.path == Path::quadratic;
  if (has_parts || !c.plan.force_path) {
    run.sweep(device, true);
    check_results(c, run, expected);
  }
  set_plan_override({});
}

// Checks a step on a pool of states, whose slots lie 4 elements apart. The slot of the last sequence is
// outside the pool, the slots of the others are in reverse order.
inline void check_step(Case c, const Device& device, std::mt19937& random) {
  c.seqlen = 1;
  c.batch = 3;
  c.cu_seqlens.clear();
  c.states = true;
  const int64_t slots = 4;
  Run run(c);
  run.randomize(random);
  Tensor pool_kv(accumulator(c.dtype), slots, c.kv_heads, run.features, c.width, false, 0, 4);
  Tensor pool_k(accumulator(c.dtype), slots, c.kv_heads, run.features, 1, false, 0, 4);
  pool_kv.randomize(random, 0, 1);
  pool_k.randomize(random, 1, 0.1);
  Values expected_kv = pool_kv.values, expected_k = pool_k.values;
  const std::vector<int64_t> index = {2, 0, -1};
  for (int64_t s = 0; s < 2; ++s) {
    pool_kv.put(index[s], 0, run.features, run.initial_kv.slice(s, 0, run.features));
    pool_k.put(index[s], 0, run.features, run.initial_k.slice(s, 0, run.features));
  }
  pool_kv.upload();
  pool_k.upload();
  Buffer indices(index.size() * sizeof(int64_t));
  indices.upload(index.data());

  auto step = run.problem<StepProblem>();
  step.state = {pool_kv.data(), pool_k.data()};
  step.num_slots = slots;
  step.kv_stride = pool_kv.rows<MutableRows>().batch_stride;
  step.k_stride = pool_k.rows<MutableRows>().batch_stride;
  step.state_index = static_cast<const int64_t*>(indices.data());
  step.y = run.y.rows<MutableRows>();
  run.call(step, device);
  for (Tensor* result : {&run.y, &pool_kv, &pool_k}) result->download();

  Run expected(c);
  Tensor after_kv(accumulator(c.dtype), slots, c.kv_heads, run.features, c.width);
  Tensor after_k(accumulator(c.dtype), slots, c.kv_heads, run.features, 1);
  after_kv.values = expected_kv;
  after_k.values = expected_k;
  for (int64_t s = 0; s < 2; ++s) {
    const Reference one = run.reference(s, 0, 1);
    expected.y.put(s, 0, 1, one.y);
    after_kv.put(index[s], 0, run.features, one.final_kv);
    after_k.put(index[s], 0, run.features, one.final_k);
  }
  const double limit = tolerance(c, false);
  compare("step " + c.name(), "y", run.y.values, expected.y.values, limit);
  compare("step " + c.name(), "state kv", pool_kv.values, after_kv.values, limit);
  compare("step " + c.name(), "state k", pool_k.values, after_k.values, limit);
}

}  // namespace rebased::tests
