// What both passes of attention are made of: rows of the token grid packed into panels, and products of small matrices.
//
// A product C = A B is computed in tiles of kTileRows x kTileColumns that stay in registers. A is read one element at a
// time, each broadcast to a vector; B lies in panels: kTileColumns columns beside each other, row after row, zero
// beyond the last column. Per step of the depth a tile loads 2 vectors and kTileRows broadcasts for 2 kTileRows
// multiply-adds: with 16 registers 6 x 2 sums fit, and two loads a cycle keep two multiply-adds a cycle busy.
#pragma once

#include "core/token_grid.h"
#include "cpu/vector_math.h"

namespace vggt_mv::VGGT_MV_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;  // 32 registers
#else
constexpr int kTileRows = 6;  // 16 registers
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Calls body(frame, token, done, count) for every part of [first, first + count) of a sequence that lies in one frame:
// `count` tokens from `token` on, after `done` tokens of earlier parts.
template <typename Body>
VGGT_MV_INLINE void for_each_run(const TokenGrid& grid, Axis axis, int64_t sequence, int64_t first, int count,
                                 Body body) {
  int64_t frame = first / grid.tokens;
  int token = static_cast<int>(first % grid.tokens);
  for (int done = 0; done < count; ++frame, token = 0) {
    const int left = grid.tokens - token;
    const int run = count - done < left ? count - done : left;
    body(frame_of_sequence(grid, axis, sequence, frame), token, done, run);
    done += run;
  }
}

// C[i, j] of a tile, i < kTileRows, j < vectors * kLanes; A[i, k] is a[i * row_stride + k * depth_stride], B a panel.
// An element is a float, or a pair of bfloat16 that stands for two steps of the depth.
template <int kVectors, typename Element>
VGGT_MV_INLINE void multiply_tile(const Element* a, int64_t row_stride, int64_t depth_stride, const Element* panel,
                                  int depth, Vector (&sums)[kTileRows][kVectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vector{};
  }
#pragma GCC unroll 1
  for (int k = 0; k < depth; ++k) {
    decltype(operand(panel)) b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = operand(panel + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const auto element = broadcast(a[i * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(element, b[v], sums[i][v]);
    }
    a += depth_stride;
    panel += kTileColumns;
  }
}

// Row `index` of B[k, j] in panels [width / kTileColumns, rows, kTileColumns], `stride` elements from panel to panel.
template <typename T>
VGGT_MV_INLINE void pack_row(const T* row, int width, int64_t index, int64_t stride, float factor, float* panels) {
  for (int column = 0; column < width; column += kTileColumns) {
    float* to = panels + column / kTileColumns * stride + index * kTileColumns;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      store(to + v * kLanes, load_zero_filled(row + column + v * kLanes, width - column - v * kLanes) * factor);
    }
  }
}

// The same where rows 2 i and 2 i + 1 are the halves of elements of row i. An even row leaves zeros for the odd one. What
// a factor makes of an element is rounded.
VGGT_MV_INLINE void pack_row(const Bfloat16* row, int width, int64_t index, int64_t stride, float factor,
                             Bfloat16Pair* panels) {
  for (int column = 0; column < width; column += kTileColumns) {
    Bfloat16Pair* to = panels + column / kTileColumns * stride + index / 2 * kTileColumns;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      // Widened, the bits stand in the upper half.
      Vector values = load_zero_filled(row + column + v * kLanes, width - column - v * kLanes);
      if (factor != 1.0f) values = widen(narrow(values * factor, Bfloat16{}), Bfloat16{});
      const BitVector bits = bits_of(values);
      store(to + v * kLanes, index % 2 == 0 ? bits >> 16 : operand(to + v * kLanes) | bits);
    }
  }
}

// `kLanes` elements of a row at `feature`, zero beyond its `width` features.
template <typename T>
VGGT_MV_INLINE Vector load_elements(const T* row, int feature, int width, float) {
  return load_zero_filled(row + feature, width - feature);
}

VGGT_MV_INLINE Vector load_elements(const Bfloat16* row, int element, int width, Bfloat16Pair) {
  const int left = width - 2 * element;
  BitVector bits = {};
  __builtin_memcpy(&bits, row + 2 * element, (left < 2 * kLanes ? left : 2 * kLanes) * sizeof(Bfloat16));
  return from_bits(bits);
}

VGGT_MV_INLINE void store_elements(float* to, Vector v) { store(to, v); }
VGGT_MV_INLINE void store_elements(Bfloat16Pair* to, Vector v) { store(to, bits_of(v)); }

// The transpose of `count` <= kLanes rows as columns [first, first + kLanes) of B[k, j]: rows become columns, zero where
// there is no row. B has as many rows as a row of `width` features has elements.
template <typename T, typename Row, typename Element>
VGGT_MV_INLINE void pack_columns(Row row, int count, int width, int64_t first, Element* panels) {
  constexpr int kPack = features_in(Element{});
  const int depth = (width + kPack - 1) / kPack;
  Element* to = panels + first / kTileColumns * depth * kTileColumns + first % kTileColumns;
  for (int element = 0; element < depth; element += kLanes) {
    Vector block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      block[i] = i < count ? load_elements(row(i), element, width, Element{}) : Vector{};
    }
    transpose(block);
    const int elements = depth - element < kLanes ? depth - element : kLanes;
    for (int i = 0; i < elements; ++i) store_elements(to + (element + i) * kTileColumns, block[i]);
  }
}

}  // namespace vggt_mv::VGGT_MV_ISA
