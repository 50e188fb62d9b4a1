// The op written as plainly as possible, in double, one token at a time with explicit features. Drivers
// compare kernels with it. Arrays are contiguous, and each batch entry is one sequence. Includes op/ alone,
// and shares no formula with a backend.
//
//   forward   S_i = S_{i-1} + phi(k'_i) v_i^T, z likewise;  y_i = phi_w(q'_i) S_i / (phi_w(q'_i) z_i + eps)
//   backward  the same walk in reverse, with T and M, by the chain rule
#pragma once

#include <cmath>
#include <vector>

#include "op/feature_map.h"
#include "op/problem.h"

namespace rebased::tests {

using Values = std::vector<double>;

struct Reference {
  // What goes in. Of `sizes` no stride and no pointer is read.
  Problem sizes;
  Values q, k, v;                              // (batch, heads, seqlen, width)
  Values gamma_q, beta_q, gamma_k, beta_k;     // (heads, feature_dim) or empty
  Values initial_kv, initial_k;                // (batch, kv_heads, features[, head_dim]) or empty
  Values grad_y, grad_final_kv, grad_final_k;  // the latter two may be empty
  Values saved_y;  // y as backward gets it, rounded to its dtype; empty for the y computed here
  // Whether q' and k' are rounded to bfloat16, as operands of tensor cores are. How far this moves a result
  // is the least that a kernel on tensor cores may be off.
  bool rounds_operands = false;
  // What comes out.
  Values y, r, final_kv, final_k;
  Values grad_q, grad_k, grad_v, grad_gamma_q, grad_beta_q, grad_gamma_k, grad_beta_k;
  Values grad_initial_kv, grad_initial_k;

  void run() {
    features_ = num_features(sizes.feature_map, sizes.feature_dim);
    query_ = normalize(q, sizes.heads, gamma_q, beta_q);
    key_ = normalize(k, sizes.kv_heads, gamma_k, beta_k);
    const int64_t states = sizes.batch * sizes.kv_heads;
    y.assign(sizes.batch * sizes.heads * sizes.seqlen * sizes.head_dim, 0);
    r.assign(sizes.batch * sizes.heads * sizes.seqlen, 1);
    final_kv.assign(states * features_ * sizes.head_dim, 0);
    final_k.assign(states * features_, 0);
    grad_initial_kv = final_kv;
    grad_initial_k = final_k;
    grad_v.assign(v.size(), 0);
    query_.gradient.assign(q.size(), 0);
    key_.gradient.assign(k.size(), 0);
    for (int64_t batch = 0; batch < sizes.batch; ++batch) {
      for (int64_t head = 0; head < sizes.kv_heads; ++head) walk(batch, head);
    }
    grad_q = denormalize(query_, sizes.heads, gamma_q, &grad_gamma_q, &grad_beta_q);
    grad_k = denormalize(key_, sizes.kv_heads, gamma_k, &grad_gamma_k, &grad_beta_k);
  }

 private:
  struct Normalized {
    Values unit;         // LayerNorm(x)
    Values transformed;  // after gamma and beta
    Values rstd;         // 1 / standard deviation of each (batch, head, row)
    Values gradient;     // d loss / d transformed
  };

  // The nearest number of 8 significant bits.
  static double rounded(double x) {
    int exponent;
    const double mantissa = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
  }

  // Calls body for each (batch, head, row) that one LayerNorm runs over: all heads of a token, or one head.
  template <class Body>
  void for_each_group(int64_t heads, const Body& body) const {
    const bool token = sizes.layer_norm == LayerNorm::token;
    for (int64_t batch = 0; batch < sizes.batch; ++batch) {
      for (int64_t row = 0; row < sizes.seqlen; ++row) {
        for (int64_t head = 0; head < heads; head += token ? heads : 1) {
          body(batch, row, head, token ? heads : head + 1);
        }
      }
    }
  }
  int64_t row_index(int64_t heads, int64_t batch, int64_t head, int64_t row) const {
    return (batch * heads + head) * sizes.seqlen + row;
  }

  Normalized normalize(const Values& x, int64_t heads, const Values& gamma, const Values& beta) const {
    const int64_t dim = sizes.feature_dim;
    Normalized result{x, x, Values(sizes.batch * heads * sizes.seqlen, 1), {}};
    for_each_group(heads, [&](int64_t batch, int64_t row, int64_t first, int64_t end) {
      double mean = 0, variance = 0;
      const double count = static_cast<double>((end - first) * dim);
      const auto at = [&](int64_t head, int64_t i) { return row_index(heads, batch, head, row) * dim + i; };
      for (int64_t head = first; head < end; ++head) {
        for (int64_t i = 0; i < dim; ++i) mean += x[at(head, i)] / count;
      }
      for (int64_t head = first; head < end; ++head) {
        for (int64_t i = 0; i < dim; ++i) variance += std::pow(x[at(head, i)] - mean, 2) / count;
      }
      double rstd = 1 / std::sqrt(variance + sizes.layer_norm_eps);
      if (sizes.layer_norm == LayerNorm::none) mean = 0, rstd = 1;
      for (int64_t head = first; head < end; ++head) {
        result.rstd[row_index(heads, batch, head, row)] = rstd;
        for (int64_t i = 0; i < dim; ++i) {
          const double unit = (x[at(head, i)] - mean) * rstd;
          result.unit[at(head, i)] = unit;
          const double transformed =
              (gamma.empty() ? 1 : gamma[head * dim + i]) * unit + (beta.empty() ? 0 : beta[head * dim + i]);
          result.transformed[at(head, i)] = rounds_operands ? rounded(transformed) : transformed;
        }
      }
    });
    return result;
  }

  Values denormalize(const Normalized& x, int64_t heads, const Values& gamma, Values* grad_gamma,
                     Values* grad_beta) const {
    const int64_t dim = sizes.feature_dim;
    Values result(x.unit.size());
    grad_gamma->assign(heads * dim, 0);
    grad_beta->assign(heads * dim, 0);
    for_each_group(heads, [&](int64_t batch, int64_t row, int64_t first, int64_t end) {
      const double count = static_cast<double>((end - first) * dim);
      const auto at = [&](int64_t head, int64_t i) { return row_index(heads, batch, head, row) * dim + i; };
      const auto h = [&](int64_t head, int64_t i) {
        return x.gradient[at(head, i)] * (gamma.empty() ? 1 : gamma[head * dim + i]);
      };
      double mean = 0, dot = 0;
      for (int64_t head = first; head < end; ++head) {
        for (int64_t i = 0; i < dim; ++i) {
          mean += h(head, i) / count;
          dot += h(head, i) * x.unit[at(head, i)] / count;
          (*grad_gamma)[head * dim + i] += x.gradient[at(head, i)] * x.unit[at(head, i)];
          (*grad_beta)[head * dim + i] += x.gradient[at(head, i)];
        }
      }
      if (sizes.layer_norm == LayerNorm::none) mean = dot = 0;
      for (int64_t head = first; head < end; ++head) {
        for (int64_t i = 0; i < dim; ++i) {
          result[at(head, i)] =
              x.rstd[row_index(heads, batch, head, row)] * (h(head, i) - mean - x.unit[at(head, i)] * dot);
        }
      }
    });
    return result;
  }

  double weight(int64_t f, bool query) const {
    return query ? query_weight(sizes.feature_map, f, sizes.feature_dim, sizes.scale) : 1;
  }

  // grad_x += J(x)^T times the weighted gradients of the features.
  void add_feature_gradients(const double* x, const Values& gradient, bool query, double* grad_x) const {
    const int64_t dim = sizes.feature_dim, circulant = circulant_begin(sizes.feature_map, dim);
    for (int64_t f = 0; f < features_; ++f) {
      const double g = gradient[f] * weight(f, query);
      if (sizes.feature_map == FeatureMap::square) {
        grad_x[f] += 2 * x[f] * g;
      } else if (sizes.feature_map == FeatureMap::elu) {
        grad_x[f] += elu_feature_derivative(x[f]) * g;
      } else if (sizes.feature_map == FeatureMap::identity) {
        grad_x[f] += g;
      } else if (f >= circulant) {
        const CirculantEntry pair = circulant_entry(f - circulant, dim);
        grad_x[pair.first] += g * x[pair.second];
        grad_x[pair.second] += g * x[pair.first];
      } else if (f > 0) {
        grad_x[f - 1] += g;
      }
    }
  }

  void walk(int64_t batch, int64_t kv_head) {
    const int64_t dim = sizes.feature_dim, width = sizes.head_dim, group = sizes.group_size();
    const int64_t state = batch * sizes.kv_heads + kv_head;
    // S and z before the first token, then after each token
    std::vector<Values> kv(sizes.seqlen + 1), sums(sizes.seqlen + 1);
    const auto part = [](const Values& from, int64_t index, int64_t size) {
      return from.empty() ? Values(size, 0)
                          : Values(from.begin() + index * size, from.begin() + (index + 1) * size);
    };
    kv[0] = part(initial_kv, state, features_ * width);
    sums[0] = part(initial_k, state, features_);
    const auto key_at = [&](int64_t row) { return row_index(sizes.kv_heads, batch, kv_head, row); };
    const auto phi = [&](int64_t f, const double* x) { return feature(sizes.feature_map, f, x, dim); };
    for (int64_t row = 0; row < sizes.seqlen; ++row) {
      kv[row + 1] = kv[row];
      sums[row + 1] = sums[row];
      const double* const x = &key_.transformed[key_at(row) * dim];
      for (int64_t f = 0; f < features_; ++f) {
        sums[row + 1][f] += phi(f, x);
        for (int64_t c = 0; c < width; ++c)
          kv[row + 1][f * width + c] += phi(f, x) * v[key_at(row) * width + c];
      }
    }
    std::copy(kv.back().begin(), kv.back().end(), final_kv.begin() + state * features_ * width);
    std::copy(sums.back().begin(), sums.back().end(), final_k.begin() + state * features_);

    Values reverse_kv = part(grad_final_kv, state, features_ * width);
    Values reverse_k = part(grad_final_k, state, features_);
    for (int64_t row = sizes.seqlen - 1; row >= 0; --row) {
      for (int64_t member = 0; member < group; ++member) {
        const int64_t at = row_index(sizes.heads, batch, kv_head * group + member, row);
        const double* const x = &query_.transformed[at * dim];
        Values weighted(features_), gradient(features_, 0);
        double denominator = sizes.eps;
        for (int64_t f = 0; f < features_; ++f) {
          weighted[f] = phi(f, x) * weight(f, true);
          denominator += weighted[f] * sums[row + 1][f];
        }
        if (sizes.normalize) r[at] = 1 / denominator;
        double delta = 0;
        for (int64_t c = 0; c < width; ++c) {
          double& result = y[at * width + c];
          for (int64_t f = 0; f < features_; ++f) result += weighted[f] * kv[row + 1][f * width + c] * r[at];
          delta += r[at] * grad_y[at * width + c] * (saved_y.empty() ? result : saved_y[at * width + c]);
        }
        if (!sizes.normalize) delta = 0;
        for (int64_t f = 0; f < features_; ++f) {
          gradient[f] -= delta * sums[row + 1][f];
          reverse_k[f] -= delta * weighted[f];
          for (int64_t c = 0; c < width; ++c) {
            gradient[f] += kv[row + 1][f * width + c] * r[at] * grad_y[at * width + c];
            reverse_kv[f * width + c] += weighted[f] * r[at] * grad_y[at * width + c];
          }
        }
        add_feature_gradients(x, gradient, true, &query_.gradient[at * dim]);
      }
      const double* const x = &key_.transformed[key_at(row) * dim];
      Values gradient = reverse_k;
      for (int64_t f = 0; f < features_; ++f) {
        for (int64_t c = 0; c < width; ++c) {
          gradient[f] += reverse_kv[f * width + c] * v[key_at(row) * width + c];
          grad_v[key_at(row) * width + c] += phi(f, x) * reverse_kv[f * width + c];
        }
      }
      add_feature_gradients(x, gradient, false, &key_.gradient[key_at(row) * dim]);
    }
    std::copy(reverse_kv.begin(), reverse_kv.end(), grad_initial_kv.begin() + state * features_ * width);
    std::copy(reverse_k.begin(), reverse_k.end(), grad_initial_k.begin() + state * features_);
  }

  int64_t features_ = 0;
  Normalized query_, key_;
};

}  // namespace rebased::tests
