// One token of decoding: one block per (sequence, kv head) reads its state once and updates it in place.
//
// A block is a short chain of waits, so all that it needs from memory is asked for at its start. The state
// goes past the registers to shared memory, each quad to the thread that owns it; what is small stays as it
// came until it is used, since a warp stops at the first use of what is not there yet.
//
// The query reads the state as it was, and the token's own score, squared rather than summed over signed
// features, is added to it:
//   y = (phi(q') S + s(q', k') v) / (phi(q') z + s(q', k') + eps),   then S += phi(k') v^T, z += phi(k')
// A group of more than max_heads query heads reads the state several times; the last pass writes it.
#pragma once

#include "cuda/device/load_ahead.cuh"
#include "cuda/shared/block.cuh"
#include "cuda/shared/vector.cuh"
#include "cuda/shared/warp_rows.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int step_max_threads = 128;

// A thread's part of the state: a quad of columns of features lane, lane + lanes, ...
template <class A>
struct StepLane {
  A* kv;                    // its quad of feature `lane`
  A* copy;                  // the same in shared memory, where the quads of features_at_once features lie
  int lane, lanes;          // no feature has a lane of `no_lane`
  int stride, copy_stride;  // from one of its features to the next
  int head_dim, columns;    // columns: how many of the quad are real
  bool aligned;

  static constexpr int no_lane = INT32_MAX / 2;

  // body(feature, its quad, its quad's copy) for the thread's features of [begin, end).
  template <class Body>
  DEVICE void for_each(int begin, int end, const Body& body) const {
    A* quad = kv + static_cast<int64_t>(begin) * head_dim;
    A* quad_copy = copy;
    NO_UNROLL for (int f = begin + lane; f < end; f += lanes, quad += stride, quad_copy += copy_stride) {
      body(f, quad, quad_copy);
    }
  }

  // Starts to copy a quad.
  DEVICE void fetch(const A* quad, A* quad_copy) const {
    if (aligned) {
      UNROLL for (int n = 0; n < 4; n += 16 / sizeof(A)) copy_async<16>(quad_copy + n, quad + n);
    } else {
      UNROLL for (int n = 0; n < 4; ++n) {
        if (n < columns) copy_async<sizeof(A)>(quad_copy + n, quad + n);
      }
    }
  }
  DEVICE void store(A* quad, const Quad<A>& value) const {
    if (aligned) {
      store_quad(quad, value);
    } else {
      UNROLL for (int n = 0; n < 4; ++n) {
        if (n < columns) quad[n] = value.x[n];
      }
    }
  }
};

template <class A>
struct VectorStatistics {
  A mean, rstd;  // rstd: 1 / standard deviation
};

// Of `heads` runs of `dim` elements, `stride` apart, by a warp; every lane gets them. The lanes take as many
// runs at once as they can hold whole; the second look at the elements finds them in the L1 cache.
template <class E, class A>
DEVICE VectorStatistics<A> vector_statistics(const E* x, int heads, int64_t stride, int dim, A eps) {
  const unsigned lane = threadIdx.x % 32, width = minimum(dim, 32), runs = 32 / width;
  const unsigned first_run = lane / width, rounds = static_cast<unsigned>(heads) / runs;
  const int count = first_run < runs ? rounds + (first_run < heads - rounds * runs) : 0;
  const auto sum = [&](const auto& term) {
    A result = 0;
    NO_UNROLL for (int i = lane % width; i < dim; i += 32) {
      visit_ahead(x + first_run * stride + i, runs * stride, count,
                  [&](const E*, E element) { result += term(convert<A>(element)); });
    }
    return warp_sum(result);
  };
  const A size = static_cast<A>(heads * dim);
  const A mean = sum([](A value) { return value; }) / size;
  const A variance = sum([&](A value) { return (value - mean) * (value - mean); }) / size;
  return {mean, reciprocal_sqrt(variance + eps)};
}

// target[0 .. dim) = x' of a head's q or k, transformed as the features want it, by a warp.
template <class E, class A>
DEVICE void normalize_vector(A* target, const StepProblem& problem, const Features<A>& features,
                             const ConstRows& rows, const Affine& affine, A scale, int64_t sequence, int head,
                             int heads) {
  const int dim = features.dim;
  const E* const x = head_rows<E>(rows, sequence, head, 0);
  const Norm<A> norm = HeadNorm<A>{affine, nullptr, scale}.at(problem, 0, head, 0);
  VectorStatistics<A> statistics{0, 1};
  NO_UNROLL for (int begin = 0; begin < dim; begin += 32) {
    const int i = begin + threadIdx.x % 32;
    E element{};
    A gamma = 1, beta = 0;
    if (i < dim) {
      element = x[i];
      if (norm.gamma) gamma = norm.gamma[i];
      if (norm.beta) beta = norm.beta[i];
    }
    if (begin == 0 && norm.mode != LayerNorm::none) {  // its loads are under way beside those above
      const bool whole = norm.mode == LayerNorm::token;
      statistics = vector_statistics(whole ? head_rows<E>(rows, sequence, 0, 0) : x, whole ? heads : 1,
                                     rows.head_stride, dim, norm.eps);
    }
    const A normalized = (convert<A>(element) - statistics.mean) * statistics.rstd;
    if (i < dim) target[i] = features.apply(gamma * normalized + beta, scale);
  }
}

// max_heads: the query heads of every pass but the last; 1 where the group is one. Registers allow the blocks
// on a multiprocessor that shared memory has room for, in float.
template <class E, int max_heads>
KERNEL void LAUNCH_BOUNDS(step_max_threads, (sizeof(E) == 8 ? 3 : 5))
    step_kernel(StepProblem problem, StepTiles tiles) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const int thread = threadIdx.x, threads = tiles.threads, warp = thread / 32, warps = threads / 32;
  const unsigned kv_heads = static_cast<unsigned>(problem.kv_heads);
  const int64_t sequence = blockIdx.x / kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x % kv_heads), group = max_heads == 1 ? 1 : tiles.group;
  const int head_dim = static_cast<int>(problem.head_dim), dim = static_cast<int>(problem.feature_dim);
  const int64_t slot = problem.state_index ? problem.state_index[sequence] : sequence;
  if (slot < 0 || slot >= problem.num_slots) {
    NO_UNROLL for (int index = thread; index < group * head_dim; index += threads) {
      const int member = index / head_dim;
      head_rows<E>(problem.y, sequence, kv_head * group + member, 0)[index - member * head_dim] =
          convert<E>(A(0));
    }
    return;
  }

  const Features<A> features(problem.feature_map, problem.feature_dim, problem.scale);
  const int64_t state = static_cast<int64_t>(kv_head) * features.count;  // within its slot
  A* const sums_copy = shared + tiles.state_sums;  // (features_at_once), each of the thread that reads it
  A* const state_sums = static_cast<A*>(problem.state.k) + slot * problem.k_stride + state;
  const unsigned quads = (head_dim + 3) / 4;
  StepLane<A> own;
  own.lane = threadIdx.x / quads;
  own.lanes = tiles.lanes;
  const int column = 4 * (threadIdx.x % quads);
  own.kv =
      static_cast<A*>(problem.state.kv) + slot * problem.kv_stride + (state + own.lane) * head_dim + column;
  own.copy = shared + tiles.state + 4 * thread;
  own.stride = own.lanes * head_dim;
  own.copy_stride = own.lanes * 4 * quads;
  own.head_dim = head_dim;
  own.columns = head_dim - column;
  own.aligned = rows_aligned(static_cast<const A*>(problem.state.kv), problem.kv_stride, head_dim, 16) &&
                head_dim % 4 == 0;
  if (own.lane == own.lanes) own.lane = own.no_lane;
  const auto fetch = [&](int begin, int end) {
    NO_UNROLL for (int f = begin + thread; f < end; f += threads) {
      copy_async<sizeof(A)>(sums_copy + f - begin, state_sums + f);
    }
    copy_async_commit();
    own.for_each(begin, end, [&](int, const A* quad, A* quad_copy) { own.fetch(quad, quad_copy); });
    copy_async_commit();
  };
  fetch(0, minimum(tiles.features_at_once, features.count));
  E raw_value[4] = {};
  UNROLL for (int n = 0; n < 4; ++n) {
    if (n < own.columns) raw_value[n] = head_rows<E>(problem.v, sequence, kv_head, 0)[column + n];
  }

  NO_UNROLL for (int first_member = 0; first_member < group; first_member += max_heads) {
    const int heads = minimum(max_heads, group - first_member);
    const int first_head = kv_head * group + first_member;
    const bool last_pass = first_member + heads == group;
    A* const vectors = shared + tiles.vectors;  // (1 + heads, dim): k', then the query heads' q'
    A* const scores = shared + tiles.scores;
    NO_UNROLL for (int vector = warp; vector <= heads; vector += warps) {
      const bool is_key = vector == 0;
      normalize_vector<E>(vectors + vector * dim, problem, features, is_key ? problem.k : problem.q,
                          is_key ? problem.key_affine : problem.query_affine,
                          is_key ? A(1) : features.query_scale, sequence,
                          is_key ? kv_head : first_head + vector - 1,
                          static_cast<int>(is_key ? problem.kv_heads : problem.heads));
    }
    sync_threads();

    // from the last warp on: of few features the first warps have more
    NO_UNROLL for (int h = warps - 1 - warp; h < heads; h += warps) {
      A u = 0;
      NO_UNROLL for (int i = thread % 32; i < dim; i += 32) u += vectors[(1 + h) * dim + i] * vectors[i];
      u = warp_sum(u);
      if (thread % 32 == 0) scores[h] = features.score(u);
    }
    A value[4];
    UNROLL for (int c = 0; c < 4; ++c) value[c] = convert<A>(raw_value[c]);
    A sums[max_heads][4] = {}, denominators[max_heads] = {};
    NO_UNROLL for (int begin = 0; begin < features.count; begin += tiles.features_at_once) {
      const int end = minimum(begin + tiles.features_at_once, features.count);
      A* const table = shared + tiles.features;  // (1 + heads, features_at_once)
      if (begin > 0) sync_threads();
      if (begin > 0 || first_member > 0) fetch(begin, end);
      copy_async_wait<1>();
      NO_UNROLL for (int f = begin + thread; f < end; f += threads) {
        const auto pair = features.pair(f);
        const A weight = features.weight(f);
        const A sum = sums_copy[f - begin];
        UNROLL for (int vector = 0; vector <= max_heads; ++vector) {
          if (vector > heads) continue;
          const A* const x = vectors + vector * dim;
          const A phi =
              (pair.first < dim ? x[pair.first] : A(1)) * (pair.second < dim ? x[pair.second] : A(1));
          table[vector * tiles.features_at_once + f - begin] = vector == 0 ? phi : weight * phi;
          if (vector == 0) {
            if (last_pass) state_sums[f] = sum + phi;
          } else {
            denominators[vector - 1] += weight * phi * sum;
          }
        }
      }
      copy_async_wait<0>();
      sync_threads();
      own.for_each(begin, end, [&](int f, A* quad, const A* quad_copy) {
        Quad<A> entry = load_quad(quad_copy);
        UNROLL for (int h = 0; h < max_heads; ++h) {
          if (h >= heads) continue;
          const A phi = table[(1 + h) * tiles.features_at_once + f - begin];
          UNROLL for (int c = 0; c < 4; ++c) sums[h][c] += phi * entry.x[c];
        }
        if (last_pass) {
          const A phi = table[f - begin];
          UNROLL for (int c = 0; c < 4; ++c) entry.x[c] += phi * value[c];
          own.store(quad, entry);
        }
      });
    }

    UNROLL for (int h = 0; h < max_heads; ++h) {
      if (h >= heads) continue;
      const A score = own.lane == 0 ? scores[h] : A(0);
      UNROLL for (int c = 0; c < 4; ++c) sums[h][c] += score * value[c];
      store_quad(shared + tiles.sums + (h * threads + thread) * 4,
                 {{sums[h][0], sums[h][1], sums[h][2], sums[h][3]}});
      const A denominator = warp_sum(denominators[h]);
      if (thread % 32 == 0) shared[tiles.denominators + h * warps + warp] = denominator;
    }
    sync_threads();
    NO_UNROLL for (int index = thread; index < heads * head_dim; index += threads) {
      const int h = max_heads == 1 ? 0 : index / head_dim, c = index - h * head_dim;
      A sum = 0, r = 1;
      for (int lane = 0; lane < own.lanes; ++lane) {
        sum += shared[tiles.sums + (h * threads + lane * quads) * 4 + c];
      }
      if (problem.normalize) {
        A denominator = scores[h];
        NO_UNROLL for (int w = 0; w < warps; ++w) denominator += shared[tiles.denominators + h * warps + w];
        r = reciprocal(denominator + static_cast<A>(problem.eps));
      }
      head_rows<E>(problem.y, sequence, first_head + h, 0)[c] = convert<E>(sum * r);
    }
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
