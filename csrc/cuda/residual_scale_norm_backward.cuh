// The gradients of residual_scale_norm. With n = (residual - mean) * rstd and g = grad_normed * weight,
//
//   grad_x = grad_residual + rstd * (g - sum(g) / C - n * sum(g * n) / C),   grad_y = gamma * grad_x,
//   grad_gamma = sum over rows of grad_x * y,  grad_weight = of grad_normed * n,  grad_bias = of grad_normed.
//
// Layout    Four tensors [rows, C] are read and two written, all contiguous but y, whose rows have a stride; mean and
//           rstd [rows] come from the forward; partial_sums [row_blocks, 3, C] and grad_parameters [3, C] are float.
// Mapping   Stage one: a block walks through its share of rows one after another; a thread keeps the same columns,
//           (chunk * threads + thread) * kVector, for all of them, so the sums over rows are registers until the
//           block leaves them in partial_sums. Stage two is column_sums.cuh. Both add in an order that depends on the
//           shapes alone: equal inputs, equal bits.
// Shared    The two row sums of each warp, twice, because the next row may begin while slower warps still read this
//           one's.
// Why       A row needs both of its sums before anything can be written: one barrier a row, which other blocks of the
//           multiprocessor cover. 8 columns a thread, 3 sums and 4 operands each, stay within 128 registers. Rows that
//           do not fit (more than 4096 features) take the looping kernel, whose sums live in partial_sums.
#pragma once

#include "core/residual_scale_norm.h"
#include "cuda/arch/numeric.cuh"
#include "cuda/arch/simt.cuh"

namespace vggt_mv {

constexpr int kResidualScaleNormBackwardThreads = 512;  // of a block, at most

// Sums two values over the block, in every thread. `slots`: 2 * warps floats that no other sum in flight uses.
__device__ __forceinline__ float2 block_sum(float2 value, simt::Shared<float> slots) {
  value.x = simt::warp_sum(value.x);
  value.y = simt::warp_sum(value.y);
  const int warps = simt::block_size() / simt::kWarpSize;
  if (warps == 1) return value;
  if (simt::lane_index() == 0) slots.store_as(2 * simt::warp_index(), value);
  simt::block_barrier();
  value = make_float2(0.0f, 0.0f);
  for (int warp = 0; warp < warps; ++warp) {
    const float2 part = slots.load_as<float2>(2 * warp);
    value.x += part.x;
    value.y += part.y;
  }
  return value;
}

// What a thread reads of a row.
template <typename X, typename Y, int kVector, int kChunks>
struct BackwardRow {
  Packed<X, kVector> grad_residual[kChunks], residual[kChunks];
  Packed<Y, kVector> grad_normed[kChunks], y[kChunks];
  float mean, rstd;

  __device__ __forceinline__ void load(const ResidualScaleNormBackwardParams& p, int64_t row, int first_column,
                                       int column_step) {
    const int64_t begin = row * p.features;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = first_column + chunk * column_step;
      grad_residual[chunk] = {};
      grad_normed[chunk] = {};
      if (column >= p.features) continue;
      if (p.grad_residual != nullptr) {
        grad_residual[chunk] = load_packed_once<X, kVector>(static_cast<const X*>(p.grad_residual) + begin + column);
      }
      if (p.grad_normed != nullptr) {
        grad_normed[chunk] = load_packed_once<Y, kVector>(static_cast<const Y*>(p.grad_normed) + begin + column);
      }
      residual[chunk] = load_packed_once<X, kVector>(static_cast<const X*>(p.residual) + begin + column);
      y[chunk] = load_packed_once<Y, kVector>(static_cast<const Y*>(p.y) + row * p.y_row_stride + column);
    }
    mean = simt::load_global(p.mean + row);
    rstd = simt::load_global(p.rstd + row);
  }
};

template <typename X, typename Y, typename P, int kVector, int kChunks>
__global__ void __launch_bounds__(kResidualScaleNormBackwardThreads)
    residual_scale_norm_backward_kernel(const __grid_constant__ ResidualScaleNormBackwardParams p) {
  const int features = p.features;
  const int column_step = simt::block_size() * kVector;
  const int first_column = simt::thread_index() * kVector;
  const float per_feature = 1.0f / static_cast<float>(features);
  const auto slots = simt::dynamic_shared<float>();
  const int slot_count = 2 * simt::block_size() / simt::kWarpSize;

  // One by one, the parameters would not fit into registers beside the sums: then they are read again for each row.
  Packed<P, kVector> packed_gamma[kChunks], packed_weight[kChunks];
  float sum_gamma[kChunks][kVector] = {}, sum_weight[kChunks][kVector] = {}, sum_bias[kChunks][kVector] = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int column = first_column + chunk * column_step;
    if (kVector == 1 || column >= features) continue;
    packed_gamma[chunk] = load_packed<P, kVector>(static_cast<const P*>(p.gamma) + column);
    packed_weight[chunk] = load_packed<P, kVector>(static_cast<const P*>(p.weight) + column);
  }

  const int block = simt::block_index_x();
  const int64_t first_row = first_row_of_block(block, p.rows, p.row_blocks);
  const int64_t end_row = first_row_of_block(block + 1, p.rows, p.row_blocks);
  for (int64_t index = first_row; index < end_row; ++index) {
    BackwardRow<X, Y, kVector, kChunks> row;
    row.load(p, index, first_column, column_step);
    float normed[kChunks][kVector], grad[kChunks][kVector];
    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = first_column + chunk * column_step;
      if (column >= features) continue;
      if (kVector == 1) packed_weight[chunk] = load_packed<P, kVector>(static_cast<const P*>(p.weight) + column);
      float weight[kVector];
      unpack(packed_weight[chunk], weight);
      unpack(row.residual[chunk], normed[chunk]);
      unpack(row.grad_normed[chunk], grad[chunk]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float n = (normed[chunk][i] - row.mean) * row.rstd;
        const float grad_normed = grad[chunk][i];
        sum_weight[chunk][i] = fmaf(grad_normed, n, sum_weight[chunk][i]);
        sum_bias[chunk][i] += grad_normed;
        const float g = grad_normed * weight[i];
        sums.x += g;
        sums.y = fmaf(g, n, sums.y);
        normed[chunk][i] = n;
        grad[chunk][i] = g;
      }
    }
    sums = block_sum(sums, slots + static_cast<int>((index - first_row) % 2) * slot_count);
    const float mean_g = sums.x * per_feature;
    const float mean_gn = sums.y * per_feature;

    const int64_t begin = index * features;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = first_column + chunk * column_step;
      if (column >= features) continue;
      if (kVector == 1) packed_gamma[chunk] = load_packed<P, kVector>(static_cast<const P*>(p.gamma) + column);
      float grad_x[kVector], grad_y[kVector], gamma[kVector], y[kVector];
      unpack(row.grad_residual[chunk], grad_x);
      unpack(row.y[chunk], y);
      unpack(packed_gamma[chunk], gamma);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = grad[chunk][i] - fmaf(normed[chunk][i], mean_gn, mean_g);
        grad_x[i] = fmaf(row.rstd, centred, grad_x[i]);
        grad_y[i] = gamma[i] * grad_x[i];
        sum_gamma[chunk][i] = fmaf(grad_x[i], y[i], sum_gamma[chunk][i]);
      }
      store_packed(static_cast<X*>(p.grad_x) + begin + column, pack<X>(grad_x));
      store_packed(static_cast<Y*>(p.grad_y) + begin + column, pack<Y>(grad_y));
    }
  }

  if (p.partial_sums == nullptr) return;
  float* partial = p.partial_sums + int64_t{block} * 3 * features;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int column = first_column + chunk * column_step;
    if (column >= features) continue;
    store_packed(partial + column, pack<float>(sum_gamma[chunk]));
    store_packed(partial + features + column, pack<float>(sum_weight[chunk]));
    store_packed(partial + 2 * features + column, pack<float>(sum_bias[chunk]));
  }
}

// Rows of any length. Each thread adds to its own columns of partial_sums in memory.
template <typename X, typename Y, typename P>
__global__ void __launch_bounds__(kResidualScaleNormBackwardThreads)
    residual_scale_norm_backward_loop_kernel(const __grid_constant__ ResidualScaleNormBackwardParams p) {
  const int features = p.features;
  const int threads = simt::block_size();
  const auto slots = simt::dynamic_shared<float>();
  const int slot_count = 2 * threads / simt::kWarpSize;
  const int block = simt::block_index_x();
  float* partial = p.partial_sums == nullptr ? nullptr : p.partial_sums + int64_t{block} * 3 * features;
  if (partial != nullptr) {
    for (int column = simt::thread_index(); column < features; column += threads) {
      for (int which = 0; which < 3; ++which) simt::store_global(partial + which * features + column, 0.0f);
    }
  }

  const int64_t first_row = first_row_of_block(block, p.rows, p.row_blocks);
  const int64_t end_row = first_row_of_block(block + 1, p.rows, p.row_blocks);
  for (int64_t index = first_row; index < end_row; ++index) {
    const int64_t begin = index * features;
    const float mean = simt::load_global(p.mean + index);
    const float rstd = simt::load_global(p.rstd + index);
    const auto grad_normed_at = [&](int column) {
      return p.grad_normed == nullptr
                 ? 0.0f
                 : to_float(simt::load_global(static_cast<const Y*>(p.grad_normed) + begin + column));
    };
    const auto normed_at = [&](int column) {
      return (to_float(simt::load_global(static_cast<const X*>(p.residual) + begin + column)) - mean) * rstd;
    };
    const auto weight_at = [&](int column) {
      return to_float(simt::load_global(static_cast<const P*>(p.weight) + column));
    };

    float2 sums = make_float2(0.0f, 0.0f);
    for (int column = simt::thread_index(); column < features; column += threads) {
      const float g = grad_normed_at(column) * weight_at(column);
      sums.x += g;
      sums.y = fmaf(g, normed_at(column), sums.y);
    }
    sums = block_sum(sums, slots + static_cast<int>((index - first_row) % 2) * slot_count);
    const float mean_g = sums.x / static_cast<float>(features);
    const float mean_gn = sums.y / static_cast<float>(features);

    for (int column = simt::thread_index(); column < features; column += threads) {
      const float grad_normed = grad_normed_at(column);
      const float normed = normed_at(column);
      float grad_x[1] = {rstd * (grad_normed * weight_at(column) - fmaf(normed, mean_gn, mean_g))};
      if (p.grad_residual != nullptr) {
        grad_x[0] += to_float(simt::load_global(static_cast<const X*>(p.grad_residual) + begin + column));
      }
      const float grad_y[1] = {to_float(simt::load_global(static_cast<const P*>(p.gamma) + column)) * grad_x[0]};
      store_packed(static_cast<X*>(p.grad_x) + begin + column, pack<X>(grad_x));
      store_packed(static_cast<Y*>(p.grad_y) + begin + column, pack<Y>(grad_y));
      if (partial == nullptr) continue;
      const float y = to_float(simt::load_global(static_cast<const Y*>(p.y) + index * p.y_row_stride + column));
      const float addends[3] = {grad_x[0] * y, grad_normed * normed, grad_normed};
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        float* sum = partial + which * features + column;
        simt::store_global(sum, simt::load_global(sum) + addends[which]);
      }
    }
  }
}

}  // namespace vggt_mv
