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
template <int kVectors>
VGGT_MV_INLINE void multiply_tile(const float* a, int64_t row_stride, int64_t depth_stride, const float* panel,
                                  int depth, Vector (&sums)[kTileRows][kVectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vector{};
  }
#pragma GCC unroll 1
  for (int k = 0; k < depth; ++k) {
    Vector b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Vector element = broadcast(a[i * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(element, b[v], sums[i][v]);
    }
    a += depth_stride;
    panel += kTileColumns;
  }
}

// Panels of `count` rows of `width` elements each, row i at row(i), as B[k = i, j] of a product: [width / kTileColumns,
// count, kTileColumns], `stride` elements from panel to panel.
template <typename T>
VGGT_MV_INLINE void pack_row(const T* row, int width, int64_t index, int64_t stride, float factor, float* panels) {
  for (int column = 0; column < width; column += kTileColumns) {
    float* to = panels + column / kTileColumns * stride + index * kTileColumns;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int left = width - column - v * kLanes;
      Vector value = {};
      if (left >= kLanes) {
        value = load(row + column + v * kLanes);
      } else if (left > 0) {
        value = load(row + column + v * kLanes, Some{left});
      }
      store(to + v * kLanes, value * factor);
    }
  }
}

// The transpose of `count` <= kLanes rows as columns [first, first + kLanes) of B[k, j]: rows become columns, zero where
// there is no row. `panel_rows` is B's number of rows, that is `width`.
template <typename T, typename Row>
VGGT_MV_INLINE void pack_columns(Row row, int count, int width, int64_t first, float* panels) {
  float* to = panels + first / kTileColumns * width * kTileColumns + first % kTileColumns;
  for (int feature = 0; feature < width; feature += kLanes) {
    const int features = width - feature < kLanes ? width - feature : kLanes;
    Vector block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if (i >= count) {
        block[i] = Vector{};
      } else if (features == kLanes) {
        block[i] = load(row(i) + feature);
      } else {
        block[i] = load(row(i) + feature, Some{features});
      }
    }
    transpose(block);
    for (int i = 0; i < features; ++i) store(to + (feature + i) * kTileColumns, block[i]);
  }
}

}  // namespace vggt_mv::VGGT_MV_ISA
