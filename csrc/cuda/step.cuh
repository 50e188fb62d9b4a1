// One token of decoding: one block per (sequence, kv head) streams its state through registers once, in
// place.
//
// A thread owns a quad of columns of every feature_lanes-th feature and holds `held` state quads at a time,
// whose loads are all under way before q and k are normalised. The query reads the state as it was, and the
// token's own score, squared rather than summed over signed features, is added to it:
//   y = (phi(q') S + s(q', k') v) / (phi(q') z + s(q', k') + eps),   then S += phi(k') v^T, z += phi(k')
// A group of more than heads_at_once query heads reads the state several times; the last pass writes it.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/general_block.cuh"
#include "cuda/layer_norm.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int step_held = 10;
constexpr int step_max_threads = 256;

template <class A>
DEVICE Quad<A> load_part(const A* address, int count, bool aligned) {
  Quad<A> quad{};
  if (aligned) {
    quad = load_quad(address);
  } else {
    UNROLL for (int n = 0; n < 4; ++n) {
      if (n < count) quad.x[n] = address[n];
    }
  }
  return quad;
}
template <class A>
DEVICE void store_part(A* address, const Quad<A>& quad, int count, bool aligned) {
  if (aligned) {
    store_quad(address, quad);
  } else {
    UNROLL for (int n = 0; n < 4; ++n) {
      if (n < count) address[n] = quad.x[n];
    }
  }
}

// A thread's share of a block's work: which quads of the state, and where they are.
template <class A>
struct StepLane {
  A* kv;                         // (count, head_dim), from the thread's first column on
  int count, head_dim, columns;  // columns: how many of the quad are real
  int lane, lanes;               // features lane, lane + lanes, ...; count where the thread has none
  bool aligned;

  DEVICE void load(Quad<A> (&quads)[step_held], int first) const {
    UNROLL for (int n = 0; n < step_held; ++n) {
      const int f = first + lane + n * lanes;
      if (f < count) quads[n] = load_part(kv + static_cast<int64_t>(f) * head_dim, columns, aligned);
    }
  }
};

// x' of element i of one head, transformed as the features want it. Every caller computes the head's
// statistics for itself: the row is in the L1 cache, and a barrier would cost more.
template <class E, class A>
DEVICE A normalized_element(const E* x, int i, const Features<A>& features, const Norm<A>& norm) {
  const int dim = features.dim;
  A mean = 0, rstd = 1;
  if (norm.mode == LayerNorm::head) {
    for (int n = 0; n < dim; ++n) mean += convert<A>(x[n]);
    mean /= dim;
    A variance = 0;
    for (int n = 0; n < dim; ++n) variance += (convert<A>(x[n]) - mean) * (convert<A>(x[n]) - mean);
    rstd = reciprocal_sqrt(variance / dim + norm.eps);
  } else if (norm.mode == LayerNorm::token) {
    mean = norm.statistics[0];
    rstd = norm.statistics[1];
  }
  return features.apply(norm.affine((convert<A>(x[i]) - mean) * rstd, i), norm.scale);
}

// max_heads: the most that heads_at_once can be. Two blocks on a multiprocessor where registers allow it.
template <class E, int max_heads>
KERNEL void LAUNCH_BOUNDS(step_max_threads, (sizeof(E) == 8 ? 1 : 2))
    step_kernel(StepProblem problem, StepTiles tiles) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  SHARED_MEMORY(A, statistics, 4);  // of q and of k: mean and 1 / standard deviation
  const int thread = threadIdx.x, threads = tiles.threads;
  const int64_t sequence = blockIdx.x / problem.kv_heads, kv_head = blockIdx.x % problem.kv_heads;
  const int group = static_cast<int>(group_size(problem));
  const int head_dim = static_cast<int>(problem.head_dim), dim = static_cast<int>(problem.feature_dim);
  const int64_t slot = problem.state_index ? problem.state_index[sequence] : sequence;
  if (slot < 0 || slot >= problem.num_slots) {
    for (int index = thread; index < group * head_dim; index += threads) {
      const int member = index / head_dim;
      head_rows<E>(problem.y, sequence, kv_head * group + member, 0)[index - member * head_dim] =
          convert<E>(A(0));
    }
    return;
  }

  const Features<A> features(problem.feature_map, problem.feature_dim, problem.scale);
  const int64_t state = (slot * problem.kv_heads + kv_head) * features.count;
  A* const state_sums = static_cast<A*>(problem.state.k) + state;
  const int quads = (head_dim + 3) / 4, column = thread % quads * 4;
  StepLane<A> own;
  own.kv = static_cast<A*>(problem.state.kv) + state * head_dim + column;
  own.count = thread / quads < threads / quads ? features.count : 0;
  own.head_dim = head_dim;
  own.columns = head_dim - column;
  own.lane = thread / quads;
  own.lanes = threads / quads;
  own.aligned =
      rows_aligned(static_cast<const A*>(problem.state.kv), head_dim, head_dim, 16) && head_dim % 4 == 0;

  Quad<A> held[step_held];
  own.load(held, 0);
  const E* const value_row = head_rows<E>(problem.v, sequence, kv_head, 0);
  Quad<A> value{};
  UNROLL for (int n = 0; n < 4; ++n) {
    if (n < own.columns) value.x[n] = convert<A>(value_row[column + n]);
  }

  if (problem.layer_norm == LayerNorm::token) {
    if (thread < 64) {  // a warp for q, one for k
      const bool is_query = thread < 32;
      const ConstRows& rows = is_query ? problem.q : problem.k;
      const E* const x = head_rows<E>(rows, sequence, 0, 0);
      const int64_t size = (is_query ? problem.heads : problem.kv_heads) * dim;
      const auto at = [&](int64_t index) {
        return convert<A>(x[index / dim * rows.head_stride + index % dim]);
      };
      A mean = 0, variance = 0;
      for (int index = thread % 32; index < size; index += 32) mean += at(index);
      mean = warp_sum(mean) / size;
      for (int index = thread % 32; index < size; index += 32)
        variance += (at(index) - mean) * (at(index) - mean);
      variance = warp_sum(variance) / size;
      if (thread % 32 == 0) {
        statistics[is_query ? 0 : 2] = mean;
        statistics[is_query ? 1 : 3] = reciprocal_sqrt(variance + static_cast<A>(problem.layer_norm_eps));
      }
    }
    sync_threads();
  }
  // with no offset: (batch 0, row 0) of one token's statistics
  const HeadNorm<A> query{problem.query_affine, problem.layer_norm == LayerNorm::token ? statistics : nullptr,
                          features.query_scale};
  const HeadNorm<A> key{problem.key_affine, problem.layer_norm == LayerNorm::token ? statistics + 2 : nullptr,
                        A(1)};

  for (int first_member = 0; first_member < group; first_member += tiles.heads_at_once) {
    const int heads = minimum(tiles.heads_at_once, group - first_member);
    const int64_t first_head = kv_head * group + first_member;
    const bool last_pass = first_member + heads == group;
    A* const vectors = shared + tiles.vectors;  // (1 + heads, dim): k', then the query heads' q'
    NO_UNROLL for (int index = thread; index < (1 + heads) * dim; index += threads) {
      const int vector = index / dim, i = index - vector * dim;
      const int64_t head = first_head + vector - 1;
      const E* const x = vector == 0 ? head_rows<E>(problem.k, sequence, kv_head, 0)
                                     : head_rows<E>(problem.q, sequence, head, 0);
      vectors[index] = normalized_element(
          x, i, features, vector == 0 ? key.at(problem, 0, kv_head, 0) : query.at(problem, 0, head, 0));
    }
    sync_threads();

    A sums[max_heads][4] = {}, denominators[max_heads] = {};
    for (int begin = 0; begin < features.count; begin += tiles.features_at_once) {
      const int end = minimum(begin + tiles.features_at_once, features.count);
      A* const table = shared + tiles.features;  // (1 + heads, features_at_once)
      NO_UNROLL for (int f = begin + thread; f < end; f += threads) {
        const auto pair = features.pair(f);
        const A weight = features.weight(f);
        const A sum = state_sums[f];
        for (int vector = 0; vector <= heads; ++vector) {
          const A* const x = vectors + vector * dim;
          const A phi =
              (pair.first < dim ? x[pair.first] : A(1)) * (pair.second < dim ? x[pair.second] : A(1));
          table[vector * tiles.features_at_once + f - begin] = vector == 0 ? phi : weight * phi;
          if (vector == 0 && last_pass) state_sums[f] = sum + phi;
        }
        UNROLL for (int n = 0; n < max_heads; ++n) {
          if (n < heads) denominators[n] += table[(1 + n) * tiles.features_at_once + f - begin] * sum;
        }
      }
      sync_threads();
      for (int first = begin; first < end; first += step_held * own.lanes) {
        if (first > 0 || first_member > 0) own.load(held, first);
        UNROLL for (int n = 0; n < step_held; ++n) {
          const int f = first + own.lane + n * own.lanes;
          if (f >= end || own.count == 0) continue;
          UNROLL for (int h = 0; h < max_heads; ++h) {
            if (h >= heads) continue;
            const A phi = table[(1 + h) * tiles.features_at_once + f - begin];
            UNROLL for (int c = 0; c < 4; ++c) sums[h][c] += phi * held[n].x[c];
          }
          if (last_pass) {
            const A phi = table[f - begin];
            UNROLL for (int c = 0; c < 4; ++c) held[n].x[c] += phi * value.x[c];
            store_part(own.kv + static_cast<int64_t>(f) * head_dim, held[n], own.columns, own.aligned);
          }
        }
      }
      sync_threads();
    }

    UNROLL for (int h = 0; h < max_heads; ++h) {
      if (h >= heads) continue;
      store_quad(shared + tiles.sums + (h * threads + thread) * 4,
                 {{sums[h][0], sums[h][1], sums[h][2], sums[h][3]}});
      const A denominator = warp_sum(denominators[h]);
      if (thread % 32 == 0) shared[tiles.denominators + h * threads + thread / 32] = denominator;
    }
    sync_threads();
    NO_UNROLL for (int index = thread; index < heads * head_dim; index += threads) {
      const int h = index / head_dim, c = index - h * head_dim;
      A u = 0, sum = 0, r = 1;
      for (int i = 0; i < dim; ++i) u += vectors[(1 + h) * dim + i] * vectors[i];
      const A score = features.score(u);
      for (int lane = 0; lane < own.lanes; ++lane) {
        sum += shared[tiles.sums + (h * threads + lane * quads) * 4 + c];
      }
      if (problem.normalize) {
        A denominator = 0;
        for (int warp = 0; warp < threads / 32; ++warp)
          denominator += shared[tiles.denominators + h * threads + warp];
        r = reciprocal(denominator + score + static_cast<A>(problem.eps));
      }
      head_rows<E>(problem.y, sequence, first_head + h, 0)[c] =
          convert<E>((sum + score * convert<A>(value_row[c])) * r);
    }
    sync_threads();
  }
}

template <class E>
const char* launch_step(const StepProblem& problem, const Plan& plan, void* stream) {
  const int64_t blocks = problem.batch * problem.kv_heads;
  if (blocks == 0) return "";
  if (blocks > INT32_MAX) return "more blocks than a grid can have";
  return LAUNCH((plan.step.heads_at_once == 1 ? step_kernel<E, 1> : step_kernel<E, 4>),
                dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(plan.step.threads)),
                static_cast<size_t>(plan.shared_memory_bytes), stream, problem, plan.step);
}

}  // namespace rebased::REBASED_BACKEND
