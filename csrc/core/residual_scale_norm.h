// residual = x + gamma * y, normed = (residual - mean) * rstd * weight + bias: what a launch needs to know.
//
// A tensor is `rows` rows of `features` (C) elements with unit stride inside a row; strides count elements and are
// 64 bits wide, since a tensor may hold more than 2^31 elements. Arithmetic and statistics are in float. `residual` is
// rounded to its dtype first, and normalised as rounded: what the next layer reads is what was normalised.
//
// Combinations (x and residual, y and normed, parameters): f32 f32 f32, f16 f16 f16, bf16 bf16 bf16, f32 f16 f32,
// f32 bf16 f32, f16 f16 f32, bf16 bf16 f32.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace vggt_mv {

struct ResidualScaleNormParams {
  const void* x;       // [rows, C] x_dtype
  const void* y;       // [rows, C] y_dtype
  const void* gamma;   // [C] param_dtype
  const void* weight;  // [C] param_dtype
  const void* bias;    // [C] param_dtype
  void* residual;      // [rows, C] x_dtype, contiguous; on a CPU `x` itself: in place
  void* normed;        // [rows, C] y_dtype, contiguous; on a CPU `y` itself: in place
  float* mean;         // [rows]
  float* rstd;         // [rows], 1 / sqrt(variance + eps)
  int64_t rows;
  int features;
  int64_t x_row_stride;
  int64_t y_row_stride;
  float eps;
  DType x_dtype;
  DType y_dtype;
  DType param_dtype;
};

// With n = (residual - mean) * rstd, g = grad_normed * weight and sums over the C features of a row:
//   grad_x = grad_residual + rstd * (g - sum(g) / C - n * sum(g * n) / C),   grad_y = gamma * grad_x,
// and over all rows: grad_gamma = sum(grad_x * y), grad_weight = sum(grad_normed * n), grad_bias = sum(grad_normed).
//
// Sums over rows take two stages, so that they come out the same every time: stage one leaves one partial sum for each
// block of rows in `partial_sums`, stage two adds those in order. Block b holds the rows
// [first_row_of_block(b, ...), first_row_of_block(b + 1, ...)).
struct ResidualScaleNormBackwardParams {
  const void* grad_residual;  // [rows, C] x_dtype, contiguous; null: zero
  const void* grad_normed;    // [rows, C] y_dtype, contiguous; null: zero
  const void* residual;       // [rows, C] x_dtype, contiguous
  const void* y;              // [rows, C] y_dtype
  const void* gamma;          // [C] param_dtype
  const void* weight;         // [C] param_dtype
  const float* mean;          // [rows]
  const float* rstd;          // [rows]
  void* grad_x;               // [rows, C] x_dtype, contiguous
  void* grad_y;               // [rows, C] y_dtype, contiguous
  float* partial_sums;        // [row_blocks, 3, C] workspace; null: the parameters want no gradients
  float* grad_parameters;     // [3, C]: of gamma, weight, bias; null with partial_sums
  int64_t rows;
  int features;
  int row_blocks;  // 1 <= row_blocks <= max(rows, 1)
  int64_t y_row_stride;
  DType x_dtype;
  DType y_dtype;
  DType param_dtype;
};

static constexpr int64_t first_row_of_block(int block, int64_t rows, int row_blocks) {
  return rows / row_blocks * block + (block < rows % row_blocks ? block : rows % row_blocks);
}

}  // namespace vggt_mv
