// Tiles of queries, keys, values and gradients: from the token grid into swizzled shared memory, and from there into
// tensor-core fragments. Shared by the attention kernels.
//
// How to use it, for a tile of kRows tokens from `first` on of one sequence and one head (T of 16 bits):
//
//   host    params.layout = sequence_layout(grid, axis, strides.tokens);        // by value into the kernel's params
//   device  const T* keys = qkv + sequence_offset(grid, axis, strides.tokens, sequence) + part * strides.part + ...;
//           const SharedTile<T, kWidth> tile(simt::dynamic_shared<T>(byte_offset));     // SharedTile::bytes(kRows) big
//           copy_tile_async<kRows, kThreads>(tile, keys, layout, first);         // all threads; rows >= length: zeros
//           simt::copy_async_commit(); ... simt::copy_async_wait<n>(); simt::block_barrier();
//           load_a(a, tile, row, column)             a[16 rows, 16 columns] of a tile that lies [m, k]
//           load_a_transposed(a, tile, k, m)         a[16 m, 16 k]          of a tile that lies [k, m]
//           load_b(b, tile, n, k)                    two b[16 k, 8 n]       of a tile that lies [n, k]: K in Q K^T
//           load_b_transposed(b, tile, k, n)         two b[16 k, 8 n]       of a tile that lies [k, n]: V in P V
//           multiply_accumulate_16x8x16<T>(sum, a, b[0]): columns n..n+7;  b[1]: n+8..n+15
//           accumulators_to_a<T>(a, sum[2 j], sum[2 j + 1])   the product of one multiplication as `a` of the next
//   Rows and columns given to load_* are multiples of 16, the same in all lanes.
//
// Shared memory: a row is kWidth / 8 chunks of 16 bytes; chunk c of row r lies at place c ^ (r & 7) of the row (width
// 64, 128) or c ^ (r / 2 & 3) (width 32, 96, whose rows begin at every other half of the 128 bytes that the banks
// span). So the 8 rows that a phase of ldmatrix reads, at one column, lie in 8 different groups of 4 banks, and so do
// the 8 chunks that a phase of a copy writes. A tile begins at a multiple of 128 bytes.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/qk_norm_rope.h"
#include "core/token_grid.h"
#include "cuda/arch/numeric.cuh"
#include "cuda/arch/simt.cuh"

namespace vggt_mv {

constexpr int kChunk = 8;  // elements of 16 bits in one 16-byte access

// Division of 0 <= n < 2^31 by a fixed 1 <= divisor < 2^31: floor(n m / 2^(31 + s)) with s = ceil(log2 divisor) and
// m = floor(2^(31 + s) / divisor) + 1, exact since m divisor - 2^(31 + s) is in (0, 2^s].
struct FastDivisor {
  unsigned multiplier;
  int shift;
  int divisor;

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((uint64_t{static_cast<unsigned>(n)} * multiplier) >> shift);
  }
};

inline FastDivisor fast_divisor(int divisor) {
  int log2 = 0;
  while (int64_t{1} << log2 < divisor) ++log2;
  return {static_cast<unsigned>((uint64_t{1} << (31 + log2)) / static_cast<unsigned>(divisor) + 1), 31 + log2, divisor};
}

// Where token `index` of a sequence lies, from the sequence's first token, in elements: tokens come in runs of one
// distance, runs in groups of one distance. Neighbours that happen to be evenly spaced (contiguous frames, views,
// everything) are one run.
struct SequenceLayout {
  FastDivisor run;    // tokens of a run
  FastDivisor group;  // runs of a group
  int64_t token_stride;
  int64_t run_stride;
  int64_t group_stride;
  int length;

  __device__ __forceinline__ int64_t offset(int index) const {
    const int run_index = run.quotient(index);
    const int group_index = group.quotient(run_index);
    return (index - run_index * run.divisor) * token_stride + (run_index - group_index * group.divisor) * run_stride +
           group_index * group_stride;
  }
};

// For a grid without empty dimensions whose sequences are shorter than 2^31.
inline SequenceLayout sequence_layout(const TokenGrid& grid, Axis axis, const TokenStrides& strides) {
  const int frames = static_cast<int>(frames_per_sequence(grid, axis));
  const int length = static_cast<int>(sequence_length(grid, axis));
  int run = grid.tokens, group = frames;
  int64_t run_stride = strides.view, group_stride = 0;
  if (axis == Axis::time || (axis == Axis::global && grid.views == 1)) {
    run_stride = strides.time;
  } else if (axis == Axis::global && grid.times > 1 && strides.time != grid.views * strides.view) {
    group = grid.views;
    group_stride = strides.time;
  }
  if (frames == 1 || (group == frames && run_stride == grid.tokens * strides.token)) run = length;
  return {fast_divisor(run), fast_divisor(group), strides.token, run_stride, group_stride, length};
}

// Offset of the first token of a sequence.
__device__ __forceinline__ int64_t sequence_offset(const TokenGrid& grid, Axis axis, const TokenStrides& strides,
                                                   int64_t sequence) {
  return frame_offset(grid, strides, frame_of_sequence(grid, axis, sequence, 0));
}

template <typename T, int kTileWidth>
struct SharedTile {
  using Element = T;
  static constexpr int kWidth = kTileWidth;
  static constexpr int kChunks = kWidth / kChunk;
  static constexpr bool kWholeLines = kChunks % 8 == 0;  // rows are multiples of 128 bytes
  static_assert(sizeof(T) == 2 && kChunks % 4 == 0, "16-bit elements, width a multiple of 32");

  simt::Shared<T> start;

  __device__ __forceinline__ explicit SharedTile(simt::Shared<T> first) : start(first) {}

  static constexpr int elements(int rows) { return rows * kWidth; }
  static constexpr int bytes(int rows) { return elements(rows) * static_cast<int>(sizeof(T)); }

  // Chunk `chunk` of row `first_row + row`; first_row is a multiple of 8, so that the swizzle depends on `row` alone.
  __device__ __forceinline__ simt::Shared<T> at(int first_row, int row, int chunk) const {
    const int swizzle = kWholeLines ? row & 7 : row >> 1 & 3;
    return start + (first_row * kWidth + row * kWidth + (chunk ^ swizzle) * kChunk);
  }
};

// Starts the copies of rows first .. first + kRows of kTiles tensors with one layout (keys and values) into as many
// tiles; the rows of kWidth elements of the sequence's first token are at `sequences`. Rows from layout.length on become
// zeros. All kThreads threads of the block call it; it commits nothing.
template <int kRows, int kThreads, typename T, int kWidth, int kTiles>
__device__ __forceinline__ void copy_tiles_async(const SharedTile<T, kWidth> (&tiles)[kTiles],
                                                 const T* const (&sequences)[kTiles], const SequenceLayout& layout,
                                                 int first) {
  using Tile = SharedTile<T, kWidth>;
  // kSpan neighbouring threads take kSpan neighbouring chunks of a row; a thread's rows differ by multiples of 8.
  constexpr int kSpan = Tile::kWholeLines ? 8 : 4;
  constexpr int kRowStep = kThreads / kSpan;
  static_assert(kRowStep % 8 == 0 && kRows % 8 == 0, "the swizzle of a thread's rows is the same");
  const int row = simt::thread_index() / kSpan;
  const int column = simt::thread_index() % kSpan;
  const auto copy_row = [&](int step, int64_t offset, bool valid) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kSpan) {
        simt::copy_async<16>(tiles[i].at(step * kRowStep, row, chunk + column),
                             sequences[i] + offset + (chunk + column) * kChunk, valid);
      }
    }
  };
  constexpr int kSteps = (kRows + kRowStep - 1) / kRowStep;
  const int token = first - layout.run.quotient(first) * layout.run.divisor;
  if (token + kRows <= layout.run.divisor) {  // inside one run, as nearly always: no division for each row
    const int64_t offset = layout.offset(first) + row * layout.token_stride;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (kRows % kRowStep != 0 && step * kRowStep + row >= kRows) break;
      copy_row(step, offset + step * kRowStep * layout.token_stride, true);
    }
    return;
  }
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    if (kRows % kRowStep != 0 && step * kRowStep + row >= kRows) break;
    const int index = first + step * kRowStep + row;
    const bool valid = index < layout.length;
    copy_row(step, layout.offset(valid ? index : 0), valid);
  }
}

// The same for one tensor.
template <int kRows, int kThreads, typename T, int kWidth>
__device__ __forceinline__ void copy_tile_async(const SharedTile<T, kWidth>& tile, const T* sequence,
                                                const SequenceLayout& layout, int first) {
  const SharedTile<T, kWidth> tiles[1] = {tile};
  const T* const sequences[1] = {sequence};
  copy_tiles_async<kRows, kThreads>(tiles, sequences, layout, first);
}

// Starts the copies of one float a token (a key's bias, a row's statistic): tokens first .. first + kCount of a
// sequence whose first float is at `sequence`; zeros from layout.length on.
template <int kCount, int kThreads>
__device__ __forceinline__ void copy_floats_async(simt::Shared<float> floats, const float* sequence,
                                                  const SequenceLayout& layout, int first) {
#pragma unroll
  for (int step = 0; step < (kCount + kThreads - 1) / kThreads; ++step) {
    const int i = step * kThreads + simt::thread_index();
    if (i >= kCount) break;
    const bool valid = first + i < layout.length;
    simt::copy_async<4>(floats + i, sequence + layout.offset(valid ? first + i : 0), valid);
  }
}

// The four load_* below read 16 x 16 elements by one ldmatrix.x4. Fragments are those of multiply_accumulate_16x8x16.

template <typename T, int kWidth>
__device__ __forceinline__ void load_a(unsigned (&a)[4], const SharedTile<T, kWidth>& tile, int row, int column) {
  const int lane = simt::lane_index();
  simt::load_matrix_x4(a, tile.at(row, lane % 16, column / kChunk + lane / 16));
}

template <typename T, int kWidth>
__device__ __forceinline__ void load_a_transposed(unsigned (&a)[4], const SharedTile<T, kWidth>& tile, int k, int m) {
  const int lane = simt::lane_index();
  simt::load_matrix_x4_transposed(a, tile.at(k, lane % 8 + lane / 16 * 8, m / kChunk + lane / 8 % 2));
}

template <typename T, int kWidth>
__device__ __forceinline__ void load_b(unsigned (&b)[2][2], const SharedTile<T, kWidth>& tile, int n, int k) {
  const int lane = simt::lane_index();
  unsigned tiles[4];
  simt::load_matrix_x4(tiles, tile.at(n, lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2));
  b[0][0] = tiles[0];
  b[0][1] = tiles[1];
  b[1][0] = tiles[2];
  b[1][1] = tiles[3];
}

template <typename T, int kWidth>
__device__ __forceinline__ void load_b_transposed(unsigned (&b)[2][2], const SharedTile<T, kWidth>& tile, int k,
                                                  int n) {
  const int lane = simt::lane_index();
  unsigned tiles[4];
  simt::load_matrix_x4_transposed(tiles, tile.at(k, lane % 16, n / kChunk + lane / 16));
  b[0][0] = tiles[0];
  b[0][1] = tiles[1];
  b[1][0] = tiles[2];
  b[1][1] = tiles[3];
}

// Two floats, rounded, as one register of a fragment.
template <typename T>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  T pair[2];
  from_floats(low, high, pair);
  unsigned bits;
  memcpy(&bits, static_cast<const void*>(pair), sizeof(bits));
  return bits;
}

// Sums of columns 16 j .. 16 j + 15, rounded to T, as the `a` of a product over those columns.
template <typename T>
__device__ __forceinline__ void accumulators_to_a(unsigned (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack_pair<T>(low[0], low[1]);
  a[1] = pack_pair<T>(low[2], low[3]);
  a[2] = pack_pair<T>(high[0], high[1]);
  a[3] = pack_pair<T>(high[2], high[3]);
}

// Whether every row of D elements of a [B, T, N, P, 3, h, D] begins at a multiple of 16 bytes.
template <typename T>
bool attention_rows_aligned(const void* address, const TokenGrid& grid, const QkvStrides& strides) {
  const auto aligned = [address](int size, int64_t stride) {
    return size == 1 || rows_aligned<T>(address, stride, 16);
  };
  return rows_aligned<T>(address, strides.part, 16) && rows_aligned<T>(address, strides.head, 16) &&
         aligned(grid.batch, strides.tokens.batch) && aligned(grid.times, strides.tokens.time) &&
         aligned(grid.views, strides.tokens.view) && aligned(grid.tokens, strides.tokens.token);
}

// The dtypes and head widths that the attention kernels are compiled for: calls run(Type<T>, integral constant width).
template <typename Run>
cudaError_t with_attention_types(DType dtype, int width, Run&& run) {
  const auto with_width = [&](auto t) {
    switch (width) {
      case 32: return run(t, std::integral_constant<int, 32>{});
      case 64: return run(t, std::integral_constant<int, 64>{});
      case 96: return run(t, std::integral_constant<int, 96>{});
      case 128: return run(t, std::integral_constant<int, 128>{});
      default: return cudaErrorInvalidValue;
    }
  };
  if (dtype == DType::f16) return with_width(Type<__half>{});
  if (dtype == DType::bf16) return with_width(Type<__nv_bfloat16>{});
  return cudaErrorInvalidValue;
}

}  // namespace vggt_mv
