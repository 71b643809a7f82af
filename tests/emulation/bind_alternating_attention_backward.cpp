// alternating_attention_backward's launcher for ctypes. `grid`: B, T, N, P; strides of qkv: of B, T, N, P, 3, h; of the
// row gate: of B, T, N, P.
#include "cuda/alternating_attention_backward.h"

extern "C" int emulated_alternating_attention_backward(const void* grad_out, const void* qkv, const void* out,
                                                       const float* lse, const float* key_bias, const float* row_gate,
                                                       float* delta, void* grad_qkv, float* grad_key_bias,
                                                       float* grad_row_gate, const int* grid,
                                                       const long long* qkv_strides, const long long* grad_qkv_strides,
                                                       const long long* row_gate_strides, int axis, int heads,
                                                       int width, float scale, int dtype) {
  const auto qkv_strides_of = [](const long long* s) {
    return vggt_mv::QkvStrides{{s[0], s[1], s[2], s[3]}, s[4], s[5]};
  };
  vggt_mv::AlternatingAttentionBackwardParams params{};
  params.grad_out = grad_out;
  params.qkv = qkv;
  params.out = out;
  params.lse = lse;
  params.key_bias = key_bias;
  params.row_gate = row_gate;
  params.delta = delta;
  params.grad_qkv = grad_qkv;
  params.grad_key_bias = grad_key_bias;
  params.grad_row_gate = grad_row_gate;
  params.grid = {grid[0], grid[1], grid[2], grid[3]};
  params.qkv_strides = qkv_strides_of(qkv_strides);
  params.grad_qkv_strides = qkv_strides_of(grad_qkv_strides);
  params.row_gate_strides = {row_gate_strides[0], row_gate_strides[1], row_gate_strides[2], row_gate_strides[3]};
  params.axis = static_cast<vggt_mv::Axis>(axis);
  params.heads = heads;
  params.width = width;
  params.scale = scale;
  params.dtype = static_cast<vggt_mv::DType>(dtype);
  return static_cast<int>(vggt_mv::launch_alternating_attention_backward(params, nullptr));
}
