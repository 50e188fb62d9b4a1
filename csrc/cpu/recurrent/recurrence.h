// The one inner loop of the elementwise maps: a state of F x head_dim walked token by token. For each token,
//   state += rows lanes^T             once for each of its updates
//   sums = or += rows^T state         once for each of its queries
// where `rows` are scalars and `lanes` are vectors. A tile of the state stays in registers for a block of
// tokens, so that the only loads are the operands: 2 F head_dim multiply-adds a token and query, no scores,
// no transposes. A state lies either way round: lanes are value columns for y and grad v, or features for
// grad q and grad k, whose sums run over the columns; so no product ever sums over lanes. It includes
// schedule.h alone.
#pragma once

#include "cpu/schedule.h"

namespace rebased::cpu::REBASED_ISA {

// A tile fills half of the register file. AVX-512 multiplies by a scalar in memory, so its tile is as tall as
// it can be; elsewhere every scalar is a load of its own, which two vectors share.
constexpr int kStateRows = REBASED_VECTOR_BYTES == 64 ? 16 : 4,
              kStateVectors = REBASED_VECTOR_BYTES == 64 ? 1 : 2;
// All tiles walk over a block of tokens before the next block. Every tile meets the same rows of v and y,
// whose cache lines lie a row apart and so fall into few sets of the first cache, which hold no more.
constexpr int kBlockTokens = REBASED_VECTOR_BYTES == 64 ? 32 : 16;

// One row for each token and head. `data` is at the token that is processed first; strides may be negative.
template <class Pointer>
struct Stream {
  Pointer data;
  int64_t token_stride, head_stride;
  int64_t ahead;  // how many elements on the row lies that is fetched into the cache meanwhile; 0: none is

  Stream from(int64_t column) const { return {data + column, token_stride, head_stride, ahead}; }
};

template <class T>
struct Recurrence {
  int tokens, rows, lanes;  // rows and lanes are rounded up to whole vectors
  int updates, queries;     // of each token
  Stream<const T*> update_rows, update_lanes, query_rows;
  Stream<T*> sums;
  bool accumulate;  // whether sums begin with what stands there
  T* state;         // [panel of lanes][rows][columns of the panel]
};

// A tile of the state, [Rows][NV vectors], from memory and back.
template <class T, int Rows, int NV>
REBASED_INLINE void load_tile(Vector<T> (&tile)[Rows][NV], const T* state, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) tile[r][n] = load(state + r * stride + n * kWidth<T>);
}
template <class T, int Rows, int NV>
REBASED_INLINE void store_tile(const Vector<T> (&tile)[Rows][NV], T* state, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) store(state + r * stride + n * kWidth<T>, tile[r][n]);
}
// The tile takes in a token: Rows scalars of a times NV vectors of b.
template <class T, int Rows, int NV>
REBASED_INLINE void update_tile(Vector<T> (&tile)[Rows][NV], const T* a, const T* b) {
  Vector<T> columns[NV];
#pragma GCC unroll 2
  for (int n = 0; n < NV; n++) columns[n] = load(b + n * kWidth<T>);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) tile[r][n] += a[r] * columns[n];
}

// Walks one tile over tokens [begin, end) of a chunk. What would be a branch for each token, a tenth of the
// loop's time, is a template argument:
//   Single: each token has one update and one query
//   Accumulate: sums begin with what stands there
//   FetchRows: the rows of scalars that lie ahead are fetched into the cache, else those of vectors and sums.
// Every tile fetches what the tiles beside it fetch: the processor drops what it can't begin at once.
template <class T, int Rows, int NV, bool Single, bool Accumulate, bool FetchRows>
inline void recur_tile(const Recurrence<T>& call, int64_t begin, int64_t end, int row, int lane, T* state,
                       int64_t stride) {
  const Stream<const T*> update_rows = call.update_rows.from(row),
                         update_lanes = call.update_lanes.from(lane);
  const Stream<const T*> query_rows = call.query_rows.from(row);
  const Stream<T*> sums = call.sums.from(lane);
  const int updates = Single ? 1 : call.updates, queries = Single ? 1 : call.queries;
  Vector<T> tile[Rows][NV];
  load_tile<T>(tile, state, stride);
  for (int64_t token = begin; token < end; token++) {
    for (int64_t head = 0; head < updates; head++) {
      const T* a = update_rows.data + token * update_rows.token_stride + head * update_rows.head_stride;
      const T* b = update_lanes.data + token * update_lanes.token_stride + head * update_lanes.head_stride;
      __builtin_prefetch(FetchRows ? a + update_rows.ahead : b + update_lanes.ahead, 0, 2);
      update_tile<T>(tile, a, b);
    }
    for (int64_t head = 0; head < queries; head++) {
      const T* a = query_rows.data + token * query_rows.token_stride + head * query_rows.head_stride;
      T* target = sums.data + token * sums.token_stride + head * sums.head_stride;
      __builtin_prefetch(FetchRows ? a + query_rows.ahead : target + sums.ahead, 0, 2);
      Vector<T> sum[2][NV];  // of even and of odd rows: one alone would wait for itself
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        sum[0][n] = a[0] * tile[0][n], sum[1][n] = a[1] * tile[1][n];
        if constexpr (Accumulate) sum[0][n] += load(target + n * kWidth<T>);
      }
#pragma GCC unroll 16
      for (int r = 2; r < Rows; r++)
#pragma GCC unroll 2
        for (int n = 0; n < NV; n++) sum[r % 2][n] += a[r] * tile[r][n];
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) store(target + n * kWidth<T>, sum[0][n] + sum[1][n]);
    }
  }
  store_tile<T>(tile, state, stride);
}

// The updates of one head alone: a plain sum of products, with nothing between the multiply-adds.
template <class T, int Rows, int NV>
inline void update_state_tile(int64_t tokens, const Stream<const T*>& rows, const Stream<const T*>& lanes,
                              T* state, int64_t stride) {
  Vector<T> tile[Rows][NV];
  load_tile<T>(tile, state, stride);
  const T *a = rows.data, *b = lanes.data;
#pragma GCC unroll 4
  for (int64_t token = 0; token < tokens; token++) {
    update_tile<T>(tile, a, b);
    a += rows.token_stride, b += lanes.token_stride;
  }
  store_tile<T>(tile, state, stride);
}

// Calls body(Constant<rows>, Constant<vectors>, row, lane, tile, stride) for each tile of a state: its size,
// where it begins, its first element and how far its rows are apart.
template <class T, class Body>
REBASED_INLINE void for_state_tiles(const Recurrence<T>& call, T* state, const Body& body) {
  for_panels<T>(call.lanes, [&](auto vectors, int column) {
    constexpr int columns = decltype(vectors)::value * kWidth<T>;
    constexpr int NV = decltype(vectors)::value < kStateVectors ? decltype(vectors)::value : kStateVectors;
    for (int lane = 0; lane < columns; lane += NV * kWidth<T>) {
      T* part = state + int64_t(column) * call.rows + lane;
      int row = 0;
      for (; row + kStateRows <= call.rows; row += kStateRows)
        body(Constant<kStateRows>{}, Constant<NV>{}, row, column + lane, part + int64_t(row) * columns,
             columns);
      for (; row < call.rows; row += kWidth<T>)
        body(Constant<kWidth<T>>{}, Constant<NV>{}, row, column + lane, part + int64_t(row) * columns,
             columns);
    }
  });
}

template <class T, bool Single>
inline void recur(const Recurrence<T>& call) {
  for (int begin = 0; begin < call.tokens; begin += kBlockTokens) {
    const int end = smaller(begin + kBlockTokens, call.tokens);
    for_state_tiles<T>(
        call, call.state, [&](auto rows, auto vectors, int row, int lane, T* tile, int stride) {
          constexpr int R = decltype(rows)::value, NV = decltype(vectors)::value;
          if (row == 0 && !call.accumulate)
            recur_tile<T, R, NV, Single, false, false>(call, begin, end, row, lane, tile, stride);
          else if (call.update_rows.ahead)
            recur_tile<T, R, NV, Single, true, true>(call, begin, end, row, lane, tile, stride);
          else
            recur_tile<T, R, NV, Single, true, false>(call, begin, end, row, lane, tile, stride);
        });
  }
}

template <class T>
inline void recur(const Recurrence<T>& call) {
  if (call.updates == 1 && call.queries == 1)
    recur<T, true>(call);
  else
    recur<T, false>(call);
}

// Adds what the updates of a recurrence add to its own state to another state.
template <class T>
inline void add_updates(const Recurrence<T>& call, T* state) {
  for (int64_t head = 0; head < call.updates; head++)
    for_state_tiles<T>(call, state, [&](auto rows, auto vectors, int row, int lane, T* tile, int stride) {
      const Stream<const T*> a = call.update_rows.from(row + head * call.update_rows.head_stride),
                             b = call.update_lanes.from(lane + head * call.update_lanes.head_stride);
      update_state_tile<T, decltype(rows)::value, decltype(vectors)::value>(call.tokens, a, b, tile, stride);
    });
}

// turned: a state of rows x lanes the other way round.
template <class T>
inline void turn_state(const T* state, int rows, int lanes, T* turned) {
  const auto panels = [](int all_rows, int all_lanes, int row, int lane) {
    const int whole = all_lanes / kLanes<T> * kLanes<T>;
    const int first = lane < whole ? lane / kLanes<T> * kLanes<T> : whole;
    return int64_t(first) * all_rows + row * (lane < whole ? kLanes<T> : kWidth<T>)+lane - first;
  };
  for (int row = 0; row < rows; row++)
    for (int lane = 0; lane < lanes; lane++)
      turned[panels(lanes, rows, lane, row)] = state[panels(rows, lanes, row, lane)];
}

}  // namespace rebased::cpu::REBASED_ISA
