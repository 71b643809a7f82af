// Attention of a pose stream and a geometry stream inside every sequence of an axis of the token grid: what a launch needs.
//
//   pose:      s_ij = scale * q_i . k_j - lambda_pose * m_j
//   geometry:  s_ij = scale * q_i . k_j + lambda_geo * m_j
//   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// for i, j in one sequence (see token_grid.h), each head and each stream by itself. Softmax and sums are in float. The
// lambdas are read where the kernel runs. With qkv_geo null the streams share q, k and v, and q_i . k_j with them.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/qk_norm_rope.h"
#include "core/token_grid.h"

namespace vggt_mv {

struct DualStreamAttentionParams {
  const void* qkv_pose;      // [B, T, N, P, 3, h, D] dtype
  const void* qkv_geo;       // [B, T, N, P, 3, h, D] dtype; null: qkv_pose
  const float* mask;         // m, [B, T, N, P] contiguous; null: no bias
  const float* lambda_pose;  // []; null with mask
  const float* lambda_geo;   // []; null with mask
  void* pose;                // [B, T, N, P, h, D] dtype, contiguous
  void* geo;                 // [B, T, N, P, h, D] dtype, contiguous
  float* lse_pose;           // [sequences, h, length]; null: not wanted
  float* lse_geo;            // [sequences, h, length]; null: not wanted
  TokenGrid grid;
  QkvStrides pose_strides;
  QkvStrides geo_strides;
  Axis axis;
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

// For each stream as in core/alternating_attention.h, whose key_bias_j is -lambda_pose m_j or lambda_geo m_j:
//   grad_key_bias_j = sum_i ds_ij, for each head. From both follow, outside of the kernel,
//   grad_m = lambda_geo grad_bias_geo - lambda_pose grad_bias_pose,
//   grad_lambda_pose = -sum_j m_j grad_bias_pose_j,   grad_lambda_geo = sum_j m_j grad_bias_geo_j.
// With shared q, k and v grad_qkv_pose takes the sum over both streams. Every sum is taken in one order.
struct DualStreamAttentionBackwardParams {
  const void* grad_pose;     // [B, T, N, P, h, D] dtype, contiguous; null: zero
  const void* grad_geo;      // [B, T, N, P, h, D] dtype, contiguous; null: zero
  const void* qkv_pose;      // [B, T, N, P, 3, h, D] dtype
  const void* qkv_geo;       // [B, T, N, P, 3, h, D] dtype; null: qkv_pose
  const void* pose;          // [B, T, N, P, h, D] dtype, contiguous: of the forward pass
  const void* geo;           // [B, T, N, P, h, D] dtype, contiguous: of the forward pass
  const float* lse_pose;     // [sequences, h, length]: of the forward pass
  const float* lse_geo;      // [sequences, h, length]: of the forward pass
  const float* mask;         // as in the forward pass
  const float* lambda_pose;  // as in the forward pass
  const float* lambda_geo;   // as in the forward pass
  float* delta_pose;         // [sequences, h, length] workspace
  float* delta_geo;          // [sequences, h, length] workspace
  void* grad_qkv_pose;       // [B, T, N, P, 3, h, D] dtype, by grad_pose_strides
  void* grad_qkv_geo;        // [B, T, N, P, 3, h, D] dtype, by grad_geo_strides; null with qkv_geo
  float* grad_bias_pose;     // [h, B, T, N, P] contiguous; null: not wanted
  float* grad_bias_geo;      // [h, B, T, N, P] contiguous; null: not wanted
  TokenGrid grid;
  QkvStrides pose_strides;
  QkvStrides geo_strides;
  QkvStrides grad_pose_strides;
  QkvStrides grad_geo_strides;
  Axis axis;
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

}  // namespace vggt_mv
