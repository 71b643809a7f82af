// Attention inside every sequence of an axis of the token grid: what a launch needs to know.
//
//   s_ij = scale * q_i . k_j + row_gate_i * key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// for i, j in one sequence (see token_grid.h), each head by itself. Softmax and sums are in float. A sequence in which all
// biases of a row are -inf gives NaN, as PyTorch's softmax does.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/qk_norm_rope.h"
#include "core/token_grid.h"

namespace vggt_mv {

struct AlternatingAttentionParams {
  const void* qkv;        // [B, T, N, P, 3, h, D] dtype
  const float* key_bias;  // [B, T, N, P] contiguous; null: zero
  const float* row_gate;  // [B, T, N, P] by row_gate_strides, 0 along repeated dimensions; null: one
  void* out;              // [B, T, N, P, h, D] dtype, contiguous
  float* lse;             // [sequences, h, length]; null: not wanted
  TokenGrid grid;
  QkvStrides qkv_strides;
  TokenStrides row_gate_strides;
  Axis axis;
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

// With p_ij = exp(s_ij - lse_i) and delta_i = sum_d grad_out_id out_id:
//   ds_ij = p_ij (grad_out_i . v_j - delta_i)
//   grad_q_i = scale sum_j ds_ij k_j,   grad_k_j = scale sum_i ds_ij q_i,   grad_v_j = sum_i p_ij grad_out_i
//   grad_key_bias_j = sum_i ds_ij row_gate_i,   grad_row_gate_i = sum_j ds_ij key_bias_j,   the last two for each head.
// Every sum is taken in one order, so that the result is the same every time.
struct AlternatingAttentionBackwardParams {
  const void* grad_out;   // [B, T, N, P, h, D] dtype, contiguous
  const void* qkv;        // [B, T, N, P, 3, h, D] dtype
  const void* out;        // [B, T, N, P, h, D] dtype, contiguous: of the forward pass
  const float* lse;       // [sequences, h, length]: of the forward pass
  const float* key_bias;  // as in the forward pass
  const float* row_gate;  // as in the forward pass
  float* delta;           // [sequences, h, length] workspace
  void* grad_qkv;         // [B, T, N, P, 3, h, D] dtype, by grad_qkv_strides
  float* grad_key_bias;   // [h, B, T, N, P] contiguous; null: not wanted
  float* grad_row_gate;   // [h, B, T, N, P] contiguous; null: not wanted
  TokenGrid grid;
  QkvStrides qkv_strides;
  QkvStrides grad_qkv_strides;
  TokenStrides row_gate_strides;
  Axis axis;
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

}  // namespace vggt_mv
