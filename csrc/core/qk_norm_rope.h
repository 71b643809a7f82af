// LayerNorm over D of every query and key, then a rotation by the position of its token: what a launch needs to know.
//
// With w = D / 2, the first w features of a head turn with the row of their token and the last w with its column; inside
// such a half, features j and j + w / 2 (j < w / 2) are a pair:
//   (a, b) -> (a cos - b sin, b cos + a sin),   the angle of pair j at position p is p * base^(-2 j / w).
// Sines and cosines are the caller's table, so that they can be computed once, in float64.
// The first `special` tokens of a frame stand at (special_position, special_position), the others, row by row of a grid
// `grid_width` wide, at (row + 1, column + 1). Arithmetic is in float. Values are copied, or left alone in place.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/token_grid.h"

namespace vggt_mv {

// Distances in elements inside a [B, T, N, P, 3, h, D] whose last dimension is contiguous.
struct QkvStrides {
  TokenStrides tokens;
  int64_t part;  // from query to key to value
  int64_t head;
};

struct QkNormRopeParams {
  const void* qkv;       // [B, T, N, P, 3, h, D] dtype
  void* out;             // the same shape and dtype; `qkv` itself: in place
  const void* q_weight;  // [D] norm_dtype; null: queries are not normalised
  const void* q_bias;    // [D] norm_dtype; null with q_weight
  const void* k_weight;  // [D] norm_dtype; null: keys are not normalised
  const void* k_bias;    // [D] norm_dtype; null with k_weight
  const float* cos_sin;  // [positions, D / 4, 2]: cosine and sine of pair j at each position
  TokenGrid grid;
  QkvStrides qkv_strides;
  QkvStrides out_strides;
  int heads;
  int width;  // D
  int special;
  int grid_width;
  int special_position;
  float eps;
  DType dtype;
  DType norm_dtype;
};

// grad_qkv from grad_out; statistics are computed again from qkv. Sums over tokens take two stages, as in
// residual_scale_norm: `partial_sums` holds, for queries and keys, one pair of rows for each block of frames' tokens.
struct QkNormRopeBackwardParams {
  const void* grad_out;  // [B, T, N, P, 3, h, D] dtype
  const void* qkv;       // the same
  void* grad_qkv;        // the same
  const void* q_weight;  // as above
  const void* k_weight;  // as above
  const float* cos_sin;  // as above
  float* partial_sums;   // [2 (q, k), blocks, 2 (weight, bias), D] workspace; null: the norms want no gradients
  float* grad_norms;     // [2 (q, k), 2 (weight, bias), D]; null with partial_sums
  TokenGrid grid;
  QkvStrides grad_out_strides;
  QkvStrides qkv_strides;
  QkvStrides grad_qkv_strides;
  int heads;
  int width;
  int special;
  int grid_width;
  int special_position;
  int blocks;  // at least 1
  float eps;
  DType dtype;
  DType norm_dtype;
};

}  // namespace vggt_mv
