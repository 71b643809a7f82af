// out[g, c] = sum over b of partial[g, b, c]: the second stage of every gradient that is a sum over tokens.
//
// Layout    partial [groups, blocks, columns] and out [groups, columns], float, contiguous.
// Mapping   Grid (columns / 32, groups). A block of 16 warps takes 32 columns; warp w adds blocks w, w + 16, ... and the
//           first warp adds those 16 sums, so the order depends on the shapes alone: equal inputs, equal bits.
// Shared    One float a thread.
// Why       Stage one leaves a few hundred partial sums of a few thousand columns: too little to fill a GPU by columns
//           alone, so the blocks are spread over warps as well; every access is 128 contiguous bytes.
#pragma once

#include <cstdint>

#include "cuda/arch/simt.cuh"

namespace vggt_mv {

struct ColumnSumsParams {
  const float* partial;  // [groups, blocks, columns]
  float* out;            // [groups, columns]
  int groups;
  int blocks;
  int columns;
};

constexpr int kColumnSumsWarps = 16;

// A template only so that the header can be included more than once.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) column_sums_kernel(const __grid_constant__ ColumnSumsParams p) {
  const int column = simt::block_index_x() * simt::kWarpSize + simt::lane_index();
  const int64_t group = simt::block_index_y();
  const int warp = simt::warp_index();
  const auto sums = simt::dynamic_shared<float>();

  float sum = 0.0f;
  if (column < p.columns) {
    const float* partial = p.partial + group * p.blocks * p.columns + column;
#pragma unroll 4
    for (int block = warp; block < p.blocks; block += kWarps) {
      sum += simt::load_global(partial + int64_t{block} * p.columns);
    }
  }
  sums.store(warp * simt::kWarpSize + simt::lane_index(), sum);
  simt::block_barrier();
  if (warp != 0 || column >= p.columns) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums.load(i * simt::kWarpSize + simt::lane_index());
  simt::store_global(p.out + group * p.columns + column, sum);
}

inline cudaError_t launch_column_sums(const ColumnSumsParams& params, cudaStream_t stream) {
  if (params.groups == 0 || params.columns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((params.columns + 31) / 32), static_cast<unsigned>(params.groups));
  constexpr int kThreads = 32 * kColumnSumsWarps;
  return simt::launch(column_sums_kernel<kColumnSumsWarps>, grid, kThreads, kThreads * sizeof(float), stream, params);
}

}  // namespace vggt_mv
