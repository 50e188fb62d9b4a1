// Rows of any width, stride and address, as the kernels for tensor cores copy them into tiles and store them.
//
// A tile takes a row in units of 8 elements, 16 bytes. Where rows do not lie at multiples of 16 bytes, a unit
// is copied, and a tile is stored, in narrower pieces: those of `piece` = 16, 8, 4 or 2 bytes that
// row_piece() in plan/tensor_core_shape.h has found for the whole tensor. It is the same for all threads of a
// launch, so that to ask for it costs one branch. No access reads or writes outside of a row.
//
// There are no asynchronous copies of 2 bytes. A unit that begins in the middle of a word is therefore copied
// from the next word on, and lies in its tile one element early, until settle_unit() moves the unit to its
// place.
#pragma once

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

constexpr int unit_elements = 8;

// Whether the address of a 16-bit element lies in the middle of a word.
DEVICE bool splits_word(const void* address) { return (reinterpret_cast<uintptr_t>(address) & 2) != 0; }

// Brings one unit of a row, of which `left` elements (or fewer than 1) are there from its first on, into a
// tile, in pieces of less than 16 bytes, with zeros past the end of the row. Asynchronously: copy_async_wait
// must follow, and then settle_unit where pieces have 2 bytes.
//
// What is done in narrow pieces is done in loops that are not unrolled: by these loops
// benchmarks/kernels/instructions.py knows the code that aligned rows skip.
template <class T>
DEVICE void copy_narrow_unit(T* target, const T* source, int left, int piece) {
  if (left <= 0) {
    store_shared(target, uint4{0, 0, 0, 0});
  } else if (piece == 8) {
    NO_UNROLL for (int i = 0; i < unit_elements; i += 4) {
      copy_async<8>(target + i, source + i, i < left ? 8 : 0);
    }
  } else {
    const int early = splits_word(source) ? 1 : 0;
    NO_UNROLL for (int i = 0; i < unit_elements; i += 2) {
      copy_async<4>(target + i, source + early + i, 2 * minimum(maximum(left - early - i, 0), 2));
    }
  }
}

// Moves a unit that copy_narrow_unit has brought in one element early to its place. Every lane of the warp
// must call, each for the unit that it copied; previous_lane is the lane that has the unit before this lane's
// in the same row. The first unit of a row has none before it, and its first element comes from memory, whose
// sector the copies have just read.
template <class T>
DEVICE void settle_unit(T* place, const T* source, bool present, bool is_first, int previous_lane) {
  const uint4 early = load_shared<uint4>(place);
  uint32_t before = shuffle(early.w, previous_lane);
  if (!splits_word(source)) return;
  if (is_first) before = present ? static_cast<uint32_t>(source->bits) << 16 : 0u;
  const auto join = [](uint32_t low, uint32_t high) { return low >> 16 | high << 16; };
  store_shared(place, uint4{join(before, early.x), join(early.x, early.y), join(early.y, early.z),
                            join(early.z, early.w)});
}

template <class Piece, class T>
DEVICE Piece load_piece(const T* shared) {
  if constexpr (sizeof(Piece) == sizeof(T)) {
    return *shared;
  } else {
    return load_shared<Piece>(shared);
  }
}
template <class Piece, class T>
DEVICE void store_piece(T* global, Piece piece) {
  if constexpr (sizeof(Piece) == sizeof(T)) {
    *global = piece;
  } else {
    store_global(global, piece);
  }
}

// Stores a tile (16, 8 n) from shared memory in pieces of sizeof(Piece) bytes, neighbours by neighbouring
// lanes. place(row, i) is where unit i of a row lies.
template <class Piece, int n, class T, class Place>
DEVICE void store_pieces(const Place& place, T* rows, int stride, int rows_left, int columns_left, int lane) {
  constexpr int elements = sizeof(Piece) / sizeof(T), in_row = unit_elements * n / elements;
  constexpr int rows_at_once = 32 / in_row, accesses = 2;  // under way at a time
  const int column = lane % in_row * elements, end = minimum(rows_left, 16);
  if (column >= columns_left) return;
  NO_UNROLL for (int row = lane / in_row; row < end; row += rows_at_once * accesses) {
    Piece pieces[accesses];
    UNROLL for (int i = 0; i < accesses; ++i) {
      const T* const from = place((row + rows_at_once * i) % 16, column / unit_elements);
      pieces[i] = load_piece<Piece>(from + column % unit_elements);
    }
    UNROLL for (int i = 0; i < accesses; ++i) {
      if (row + rows_at_once * i >= end) continue;
      store_piece(rows + static_cast<int64_t>(row + rows_at_once * i) * stride + column, pieces[i]);
    }
  }
}

// The same in pieces of `piece` bytes, 8, 4 or 2. It reads the lane anew, so that nothing of this rare path
// takes registers in others.
template <int n, class T, class Place>
DEVICE void store_narrow_tile(const Place& place, T* rows, int stride, int piece, int rows_left,
                              int columns_left) {
  const int lane = thread_index_anew() % 32;
  if (piece == 8) {
    store_pieces<uint2, n>(place, rows, stride, rows_left, columns_left, lane);
  } else if (piece == 4) {
    store_pieces<uint32_t, n>(place, rows, stride, rows_left, columns_left, lane);
  } else {
    store_pieces<T, n>(place, rows, stride, rows_left, columns_left, lane);
  }
}

// ---- tiles of 16 rows, by one warp ----

// The rows of such a tile have `width` elements, at most 64, and come in pieces of `piece` = 8, 4 or 2 bytes.
// As many lanes share a row as it has pieces, or the next power of two.

// What a lane has of a row: the piece at `column`, in rows `row` and on, rows_at_once apart.
struct RowPieces {
  int elements, row, column, rows_at_once;

  DEVICE RowPieces(int width, int bytes, int lane) : elements(bytes / 2) {
    const int pieces = (width + elements - 1) / elements;
    const int shift = pieces > 16 ? 5 : pieces > 8 ? 4 : pieces > 4 ? 3 : 2;
    row = lane >> shift, rows_at_once = 32 >> shift;
    column = (lane & ((1 << shift) - 1)) * elements;
  }
};

// Starts the copy of a tile's rows, with zeros past the last row. A row that begins in the middle of a word
// arrives one element early, as in copy_narrow_unit. Columns from the first even one past `width` on are left
// as they are.
template <class T>
DEVICE void copy_narrow_rows(T* target, int target_stride, const T* source, int stride, int piece, int width,
                             int rows_left, int lane) {
  const RowPieces own(width, piece == 8 ? 8 : 4, lane);
  if (own.column >= width) return;
  target += own.row * target_stride + own.column;
  source += static_cast<int64_t>(own.row) * stride + own.column;
  NO_UNROLL for (int row = own.row; row < 16; row += own.rows_at_once) {
    const int early = splits_word(source) ? 1 : 0, left = row < rows_left ? width - early - own.column : 0;
    if (piece == 8) {
      copy_async<8>(target, source, left > 0 ? 8 : 0);
    } else {
      copy_async<4>(target, source + early, 2 * minimum(maximum(left, 0), 2));
    }
    target += own.rows_at_once * target_stride;
    source += static_cast<int64_t>(own.rows_at_once) * stride;
  }
}

// Moves rows that have arrived one element early to their place. The arguments are
// those of the copy; every lane of the warp must call.
template <class T>
DEVICE void settle_narrow_rows(T* place, int place_stride, const T* source, int stride, int width,
                               int rows_left, int lane) {
  const RowPieces own(width, 4, lane);
  place += own.row * place_stride + own.column;
  source += static_cast<int64_t>(own.row) * stride;
  NO_UNROLL for (int row = own.row; row < 16; row += own.rows_at_once) {
    const uint32_t early = load_shared<uint32_t>(place);
    uint32_t before = shuffle(early, (lane + 31) % 32);
    if (splits_word(source) && own.column < width) {
      if (own.column == 0) before = row < rows_left ? static_cast<uint32_t>(source->bits) << 16 : 0u;
      store_shared(place, before >> 16 | early << 16);
    }
    place += own.rows_at_once * place_stride;
    source += static_cast<int64_t>(own.rows_at_once) * stride;
  }
}

// Stores a tile from shared memory.
template <class T>
DEVICE void store_narrow_rows(const T* tile_rows, int tile_stride, T* rows, int stride, int piece, int width,
                              int rows_left) {
  const RowPieces own(width, piece, thread_index_anew() % 32);
  NO_UNROLL for (int row = own.row; row < minimum(rows_left, 16); row += own.rows_at_once) {
    NO_UNROLL for (int column = own.column; column < width; column += 32 * own.elements) {
      const T* const from = tile_rows + row * tile_stride + column;
      T* const to = rows + static_cast<int64_t>(row) * stride + column;
      if (piece == 8) {
        store_piece(to, load_piece<uint2>(from));
      } else if (piece == 4) {
        store_piece(to, load_piece<uint32_t>(from));
      } else {
        *to = *from;
      }
    }
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
