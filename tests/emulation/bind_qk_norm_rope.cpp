// qk_norm_rope's launchers for ctypes. `grid`: B, T, N, P; strides: of B, T, N, P, 3, h.
#include "cuda/qk_norm_rope.h"

using vggt_mv::DType;

namespace {

vggt_mv::TokenGrid grid_of(const int* grid) { return {grid[0], grid[1], grid[2], grid[3]}; }

vggt_mv::QkvStrides strides_of(const long long* s) { return {{s[0], s[1], s[2], s[3]}, s[4], s[5]}; }

}  // namespace

extern "C" {

int emulated_qk_norm_rope(const void* qkv, void* out, const void* q_weight, const void* q_bias, const void* k_weight,
                          const void* k_bias, const float* cos_sin, const int* grid, const long long* qkv_strides,
                          const long long* out_strides, int heads, int width, int special, int grid_width,
                          int special_position, float eps, int dtype, int norm_dtype) {
  vggt_mv::QkNormRopeParams params{};
  params.qkv = qkv;
  params.out = out;
  params.q_weight = q_weight;
  params.q_bias = q_bias;
  params.k_weight = k_weight;
  params.k_bias = k_bias;
  params.cos_sin = cos_sin;
  params.grid = grid_of(grid);
  params.qkv_strides = strides_of(qkv_strides);
  params.out_strides = strides_of(out_strides);
  params.heads = heads;
  params.width = width;
  params.special = special;
  params.grid_width = grid_width;
  params.special_position = special_position;
  params.eps = eps;
  params.dtype = static_cast<DType>(dtype);
  params.norm_dtype = static_cast<DType>(norm_dtype);
  return static_cast<int>(vggt_mv::launch_qk_norm_rope(params, nullptr));
}

int emulated_qk_norm_rope_backward(const void* grad_out, const void* qkv, void* grad_qkv, const void* q_weight,
                                   const void* k_weight, const float* cos_sin, float* partial_sums, float* grad_norms,
                                   const int* grid, const long long* grad_out_strides, const long long* qkv_strides,
                                   const long long* grad_qkv_strides, int heads, int width, int special, int grid_width,
                                   int special_position, int blocks, float eps, int dtype, int norm_dtype) {
  vggt_mv::QkNormRopeBackwardParams params{};
  params.grad_out = grad_out;
  params.qkv = qkv;
  params.grad_qkv = grad_qkv;
  params.q_weight = q_weight;
  params.k_weight = k_weight;
  params.cos_sin = cos_sin;
  params.partial_sums = partial_sums;
  params.grad_norms = grad_norms;
  params.grid = grid_of(grid);
  params.grad_out_strides = strides_of(grad_out_strides);
  params.qkv_strides = strides_of(qkv_strides);
  params.grad_qkv_strides = strides_of(grad_qkv_strides);
  params.heads = heads;
  params.width = width;
  params.special = special;
  params.grid_width = grid_width;
  params.special_position = special_position;
  params.blocks = blocks;
  params.eps = eps;
  params.dtype = static_cast<DType>(dtype);
  params.norm_dtype = static_cast<DType>(norm_dtype);
  return static_cast<int>(vggt_mv::launch_qk_norm_rope_backward(params, nullptr));
}

int emulated_qk_norm_rope_blocks(const int* grid) {
  int blocks = 0;
  return vggt_mv::qk_norm_rope_blocks(grid_of(grid), &blocks) == cudaSuccess ? blocks : -1;
}

}  // extern "C"
