// alternating_attention's launcher for ctypes. `grid`: B, T, N, P; strides: of B, T, N, P, 3, h and of B, T, N, P.
#include "cuda/alternating_attention.h"

extern "C" int emulated_alternating_attention(const void* qkv, const float* key_bias, const float* row_gate, void* out,
                                              float* lse, const int* grid, const long long* qkv_strides,
                                              const long long* row_gate_strides, int axis, int heads, int width,
                                              float scale, int dtype) {
  vggt_mv::AlternatingAttentionParams params{};
  params.qkv = qkv;
  params.key_bias = key_bias;
  params.row_gate = row_gate;
  params.out = out;
  params.lse = lse;
  params.grid = {grid[0], grid[1], grid[2], grid[3]};
  const long long* s = qkv_strides;
  params.qkv_strides = {{s[0], s[1], s[2], s[3]}, s[4], s[5]};
  params.row_gate_strides = {row_gate_strides[0], row_gate_strides[1], row_gate_strides[2], row_gate_strides[3]};
  params.axis = static_cast<vggt_mv::Axis>(axis);
  params.heads = heads;
  params.width = width;
  params.scale = scale;
  params.dtype = static_cast<vggt_mv::DType>(dtype);
  return static_cast<int>(vggt_mv::launch_alternating_attention(params, nullptr));
}
