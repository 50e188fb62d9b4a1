// LayerNorm over all heads of a token, whose statistics no block of one head can know: a prepass, and the
// last step of backward.
#pragma once

#include "cuda/shared/block.cuh"
#include "cuda/shared/vector.cuh"
#include "cuda/shared/warp_rows.cuh"

namespace rebased::REBASED_BACKEND {

template <int count, class T>
DEVICE void load_piece(T (&x)[count], const T* address) {
  constexpr int step = count < vector_elements<T> ? count : vector_elements<T>;
  UNROLL for (int i = 0; i < count; i += step) {
    const auto vector = *reinterpret_cast<const Vector<T, step>*>(address + i);
    UNROLL for (int n = 0; n < step; ++n) x[i + n] = vector.x[n];
  }
}

// Calls visit(head, i) for the pieces of a token's (heads, dim) that are this lane's, from element i of a
// head on. The warp walks them side by side; only the first costs a division.
template <int piece, class Visit>
DEVICE void for_each_piece(int heads, int dim, const Visit& visit) {
  const int pieces = dim / piece, lane = threadIdx.x % 32;
  const int head_step = 32 / pieces, piece_step = 32 % pieces;
  int head = lane / pieces, index = lane % pieces;
  while (head < heads) {
    visit(head, index * piece);
    head += head_step;
    index += piece_step;
    if (index >= pieces) {
      index -= pieces;
      ++head;
    }
  }
}

// Whether every head's row of every token can be accessed in pieces of 16 bytes.
template <class T, class Pointer>
HOST_DEVICE bool in_pieces(const RowsOf<Pointer>& rows, int dim) {
  const int64_t elements = rows.batch_stride | rows.head_stride | rows.row_stride | dim;
  return (reinterpret_cast<uintptr_t>(rows.data) | elements * sizeof(T)) % 16 == 0;
}

// A lane holds up to this many pieces of a token in registers, all of whose loads are then under way at once.
constexpr int held_pieces = 8;

template <class E>
struct TokenRows {
  ConstRows x;
  int heads;
  Accumulator<E>* statistics;
  bool pieces;  // of 16 bytes; else of one element
  int lanes;    // of a warp that share a token: as few as can hold it, else all

  TokenRows() = default;
  TokenRows(const ConstRows& x, int heads, int dim, Accumulator<E>* statistics)
      : x(x), heads(heads), statistics(statistics), pieces(in_pieces<E>(x, dim)), lanes(1) {
    const int count = heads * dim / (pieces ? vector_elements<E> : 1);
    while (lanes < 32 && count > lanes * held_pieces) lanes *= 2;
  }
  int64_t blocks(int64_t tokens) const { return divide_up(tokens * lanes, row_threads); }
};

// A token is read once: in one go, or where its lanes cannot hold it a part after the other, whose means and
// sums of squared deviations are then put together (Chan, Golub and LeVeque).
template <int piece, class E>
DEVICE void token_statistics_of(const TokenRows<E>& rows, int64_t tokens, int64_t seqlen, int dim,
                                double eps) {
  using A = Accumulator<E>;
  const int lane = threadIdx.x % rows.lanes, width = dim / piece;
  const int64_t wanted = (static_cast<int64_t>(blockIdx.x) * row_threads + threadIdx.x) / rows.lanes;
  const bool has_token = wanted < tokens;  // lanes without one read nothing, and go along with their warp
  const int64_t token = has_token ? wanted : tokens - 1;
  const E* const x = head_rows<E>(rows.x, token / seqlen, 0, token % seqlen);
  const auto sum_over_lanes = [&](A value) {
    for (int distance = rows.lanes / 2; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
  };
  const int head_step = rows.lanes / width, piece_step = rows.lanes % width;
  int head = lane / width, index = lane % width;
  A mean = 0, deviations = 0;
  int seen = 0;
  for (const int size = rows.heads * dim; seen < size;) {
    Vector<E, piece> held[held_pieces];
    bool present[held_pieces];
    UNROLL for (int n = 0; n < held_pieces; ++n) {
      present[n] = has_token && head < rows.heads;
      if (present[n]) {
        held[n] = *reinterpret_cast<const Vector<E, piece>*>(x + head * rows.x.head_stride + index * piece);
      }
      head += head_step;
      index += piece_step;
      if (index >= width) {
        index -= width;
        ++head;
      }
    }
    const auto sum_of = [&](const auto& term) {
      A sum = 0;
      UNROLL for (int n = 0; n < held_pieces; ++n) {
        if (!present[n]) continue;
        UNROLL for (int i = 0; i < piece; ++i) sum += term(convert<A>(held[n].x[i]));
      }
      return sum_over_lanes(sum);
    };
    const int count = minimum(size - seen, rows.lanes * held_pieces * piece);
    const A own_mean = sum_of([](A value) { return value; }) / count;
    deviations += sum_of([own_mean](A value) { return (value - own_mean) * (value - own_mean); });
    const A step = own_mean - mean, share = static_cast<A>(count) / (seen + count);
    mean += step * share;
    deviations += step * step * share * seen;
    seen += count;
  }
  if (lane == 0 && has_token) {
    const A variance = deviations / seen;
    *reinterpret_cast<Vector<A, 2>*>(rows.statistics + 2 * token) = {
        mean, reciprocal_sqrt(variance + static_cast<A>(eps))};
  }
}

// statistics (tokens, 2) = mean and 1 / standard deviation over (heads, dim) of each token. A warp takes
// several tokens, and a block its part's next ones; parts with fewer blocks leave the last of the grid alone.
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    token_statistics(Parts<TokenRows<E>> parts, int64_t tokens, int64_t seqlen, int dim, double eps) {
  const TokenRows<E> rows = parts.chosen();
  if (static_cast<int64_t>(blockIdx.x) * row_threads >= tokens * rows.lanes) return;
  if (rows.pieces) {
    token_statistics_of<vector_elements<E>>(rows, tokens, seqlen, dim, eps);
  } else {
    token_statistics_of<1>(rows, tokens, seqlen, dim, eps);
  }
}

template <class E>
struct TokenGradient {
  ConstRows x;
  Affine affine;
  const Accumulator<E>* statistics;
  const Accumulator<E>* gradient;  // (batch, heads, seqlen, dim): d loss / d (gamma LayerNorm(x) + beta)
  MutableRows grad_x;
  int heads;
};

template <int piece, class E>
DEVICE void token_norm_backward_of(const TokenGradient<E>& rows, int64_t token, int64_t seqlen, int dim) {
  using A = Accumulator<E>;
  const int64_t batch = token / seqlen, row = token % seqlen;
  const E* const x = head_rows<E>(rows.x, batch, 0, row);
  E* const target = head_rows<E>(rows.grad_x, batch, 0, row);
  const A* const gradient = rows.gradient + (batch * rows.heads * seqlen + row) * dim;
  const A* const gamma = static_cast<const A*>(rows.affine.gamma);
  const A mean = rows.statistics[2 * token], rstd = rows.statistics[2 * token + 1];
  // visit(head, i, h, x^)
  const auto for_each = [&](const auto& visit) {
    for_each_piece<piece>(rows.heads, dim, [&](int head, int i) {
      E values[piece];
      A h[piece], normalized[piece];
      load_piece(values, x + head * rows.x.head_stride + i);
      load_piece(h, gradient + head * seqlen * dim + i);
      if (gamma) {
        A factors[piece];
        load_piece(factors, gamma + head * rows.affine.gamma_head_stride + i);
        UNROLL for (int n = 0; n < piece; ++n) h[n] *= factors[n];
      }
      UNROLL for (int n = 0; n < piece; ++n) normalized[n] = (convert<A>(values[n]) - mean) * rstd;
      visit(head, i, h, normalized);
    });
  };
  A sum = 0, dot = 0;
  for_each([&](int, int, const A(&h)[piece], const A(&normalized)[piece]) {
    UNROLL for (int n = 0; n < piece; ++n) {
      sum += h[n];
      dot += h[n] * normalized[n];
    }
  });
  sum = warp_sum(sum) / (rows.heads * dim);
  dot = warp_sum(dot) / (rows.heads * dim);
  for_each([&](int head, int i, const A(&h)[piece], const A(&normalized)[piece]) {
    Vector<E, piece> result;
    UNROLL for (int n = 0; n < piece; ++n) {
      result.x[n] = convert<E>(rstd * (h[n] - sum - normalized[n] * dot));
    }
    *reinterpret_cast<Vector<E, piece>*>(target + head * rows.grad_x.head_stride + i) = result;
  });
}

// grad x over a token's heads:
//   grad x = rstd (h - mean(h) - x^ mean(h x^)),   h = gamma gradient,   x^ = (x - mean) rstd
// Tokens outside bounds[0] .. bounds[num_sequences] are left alone.
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    token_norm_backward(Parts<TokenGradient<E>> parts, int64_t tokens, int64_t seqlen, int dim,
                        const int64_t* bounds, int64_t num_sequences) {
  using A = Accumulator<E>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
  if (token >= tokens) return;
  const int64_t row = token % seqlen;
  if (bounds && (row < bounds[0] || row >= bounds[num_sequences])) return;
  const TokenGradient<E> rows = parts.chosen();
  const auto factors = reinterpret_cast<uintptr_t>(rows.affine.gamma);
  const bool aligned = (factors | rows.affine.gamma_head_stride * sizeof(A)) % 16 == 0;
  if (aligned && in_pieces<E>(rows.x, dim) && in_pieces<E>(rows.grad_x, dim)) {
    token_norm_backward_of<vector_elements<E>>(rows, token, seqlen, dim);
  } else {
    token_norm_backward_of<1>(rows, token, seqlen, dim);
  }
}

}  // namespace rebased::REBASED_BACKEND
