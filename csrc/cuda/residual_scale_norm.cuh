// residual = x + gamma * y;  normed = (residual - mean) * rstd * weight + bias, statistics over the C features of a row.
//
// Layout    x, y [rows, C] with any row stride; residual, normed [rows, C] contiguous; mean, rstd [rows] float.
// Mapping   A row belongs to a group of kWarps warps, of which a thread holds kChunks vectors of kVector neighbouring
//           features in registers: column = (chunk * threads of the group + thread) * kVector, so that a warp's
//           access is one contiguous piece. kWarps = 1: four rows in a block and no barrier at all; else one row in a
//           block. Blocks beyond the grid's cap go round in a loop over rows.
// Shared    With kWarps > 1, two sets of one float a warp: the partial sums of the mean and of the variance.
// Sums      In float: the mean first, then the squares of what is left after subtracting it. Everything is in
//           registers by then, so the second pass costs no memory traffic, and unlike E[r^2] - E[r]^2 it does not
//           cancel for rows far from zero. The residual is rounded to its own dtype before anything is computed from
//           it.
// Why       The operator is bandwidth: 2 reads and 2 writes of [rows, C] at about 5 operations an element. What counts
//           is that nothing is read twice and that enough 16-byte loads are in flight, so all loads of a row are
//           issued before the first is used. kVector is the number of y's elements in 16 bytes; 32 values a thread
//           (kVector * kChunks) keep the register count under 128. Rows that fit no group (more than 8192
//           features, or 4096 without alignment) take the looping kernel, which reads its own residual once more.
#pragma once

#include "core/residual_scale_norm.h"
#include "cuda/arch/numeric.cuh"
#include "cuda/arch/simt.cuh"

namespace vggt_mv {

constexpr int kResidualScaleNormRowsPerBlock = 4;  // of the kernel with a warp a row

// The sum over the kWarps warps of a block, in every thread. `slots`: kWarps floats that no other sum in flight uses.
template <int kWarps>
__device__ __forceinline__ float group_sum(float value, simt::Shared<float> slots) {
  value = simt::warp_sum(value);
  if constexpr (kWarps > 1) {
    if (simt::lane_index() == 0) slots.store(simt::warp_index(), value);
    simt::block_barrier();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) value += slots.load(warp);
  }
  return value;
}

template <typename X, typename Y, typename P, int kVector, int kChunks, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? 32 * kResidualScaleNormRowsPerBlock : 32 * kWarps)
    residual_scale_norm_kernel(const __grid_constant__ ResidualScaleNormParams p) {
  constexpr int kThreads = 32 * kWarps;
  constexpr int kRows = kWarps == 1 ? kResidualScaleNormRowsPerBlock : 1;
  const int thread = simt::thread_index() % kThreads;
  const int features = p.features;
  const auto slots = simt::dynamic_shared<float>();
  const auto column_of = [thread](int chunk) { return (chunk * kThreads + thread) * kVector; };

  const int64_t step = int64_t{simt::grid_size_x()} * kRows;
  for (int64_t row = int64_t{simt::block_index_x()} * kRows + simt::thread_index() / kThreads; row < p.rows;
       row += step) {
    const X* x = static_cast<const X*>(p.x) + row * p.x_row_stride;
    const Y* y = static_cast<const Y*>(p.y) + row * p.y_row_stride;
    X* residual = static_cast<X*>(p.residual) + row * features;
    Y* normed = static_cast<Y*>(p.normed) + row * features;

    Packed<X, kVector> packed_x[kChunks];
    Packed<Y, kVector> packed_y[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (column_of(chunk) >= features) continue;
      packed_x[chunk] = load_packed_once<X, kVector>(x + column_of(chunk));
      packed_y[chunk] = load_packed_once<Y, kVector>(y + column_of(chunk));
    }

    float value[kChunks][kVector];
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (column_of(chunk) >= features) continue;
      float old[kVector], branch[kVector], scale[kVector];
      unpack(packed_x[chunk], old);
      unpack(packed_y[chunk], branch);
      unpack(load_packed<P, kVector>(static_cast<const P*>(p.gamma) + column_of(chunk)), scale);
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[chunk][i] = fmaf(scale[i], branch[i], old[i]);
      const Packed<X, kVector> rounded = pack<X>(value[chunk]);
      store_packed(residual + column_of(chunk), rounded);
      unpack(rounded, value[chunk]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += value[chunk][i];
    }
    const float mean = group_sum<kWarps>(sum, slots) / static_cast<float>(features);

    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (column_of(chunk) >= features) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        value[chunk][i] -= mean;
        squares = fmaf(value[chunk][i], value[chunk][i], squares);
      }
    }
    const float variance = group_sum<kWarps>(squares, slots + kWarps) / static_cast<float>(features);
    const float rstd = simt::reciprocal_square_root(variance + p.eps);
    if (thread == 0) {
      simt::store_global(p.mean + row, mean);
      simt::store_global(p.rstd + row, rstd);
    }

#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (column_of(chunk) >= features) continue;
      float weight[kVector], bias[kVector], result[kVector];
      unpack(load_packed<P, kVector>(static_cast<const P*>(p.weight) + column_of(chunk)), weight);
      unpack(load_packed<P, kVector>(static_cast<const P*>(p.bias) + column_of(chunk)), bias);
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] = fmaf(value[chunk][i] * rstd, weight[i], bias[i]);
      store_packed(normed + column_of(chunk), pack<Y>(result));
    }
  }
}

constexpr int kResidualScaleNormLoopWarps = 8;

// Rows of any length: each thread reads back the residuals that it has written itself.
template <typename X, typename Y, typename P>
__global__ void __launch_bounds__(32 * kResidualScaleNormLoopWarps)
    residual_scale_norm_loop_kernel(const __grid_constant__ ResidualScaleNormParams p) {
  constexpr int kWarps = kResidualScaleNormLoopWarps;
  constexpr int kThreads = 32 * kWarps;
  const int features = p.features;
  const auto slots = simt::dynamic_shared<float>();
  const P* gamma = static_cast<const P*>(p.gamma);
  const P* weight = static_cast<const P*>(p.weight);
  const P* bias = static_cast<const P*>(p.bias);

  for (int64_t row = simt::block_index_x(); row < p.rows; row += simt::grid_size_x()) {
    const X* x = static_cast<const X*>(p.x) + row * p.x_row_stride;
    const Y* y = static_cast<const Y*>(p.y) + row * p.y_row_stride;
    X* residual = static_cast<X*>(p.residual) + row * features;
    Y* normed = static_cast<Y*>(p.normed) + row * features;

    float sum = 0.0f;
    for (int column = simt::thread_index(); column < features; column += kThreads) {
      const float unrounded[1] = {fmaf(to_float(simt::load_global(gamma + column)),
                                       to_float(simt::load_global_once(y + column)),
                                       to_float(simt::load_global_once(x + column)))};
      float rounded[1];
      const Packed<X, 1> packed = pack<X>(unrounded);
      store_packed(residual + column, packed);
      unpack(packed, rounded);
      sum += rounded[0];
    }
    const float mean = group_sum<kWarps>(sum, slots) / static_cast<float>(features);

    float squares = 0.0f;
    for (int column = simt::thread_index(); column < features; column += kThreads) {
      const float centred = to_float(simt::load_global(residual + column)) - mean;
      squares = fmaf(centred, centred, squares);
    }
    const float variance = group_sum<kWarps>(squares, slots + kWarps) / static_cast<float>(features);
    const float rstd = simt::reciprocal_square_root(variance + p.eps);
    if (simt::thread_index() == 0) {
      simt::store_global(p.mean + row, mean);
      simt::store_global(p.rstd + row, rstd);
    }

    for (int column = simt::thread_index(); column < features; column += kThreads) {
      const float centred = to_float(simt::load_global(residual + column)) - mean;
      const float result[1] = {fmaf(centred * rstd, to_float(simt::load_global(weight + column)),
                                    to_float(simt::load_global(bias + column)))};
      store_packed(normed + column, pack<Y>(result));
    }
  }
}

}  // namespace vggt_mv
