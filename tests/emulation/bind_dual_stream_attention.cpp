// dual_stream_attention's launcher for ctypes. `grid`: B, T, N, P; strides: of B, T, N, P, 3, h.
#include "cuda/dual_stream_attention.h"

extern "C" int emulated_dual_stream_attention(const void* qkv_pose, const void* qkv_geo, const float* mask,
                                              const float* lambda_pose, const float* lambda_geo, void* pose, void* geo,
                                              float* lse_pose, float* lse_geo, const int* grid,
                                              const long long* pose_strides, const long long* geo_strides, int axis,
                                              int heads, int width, float scale, int dtype) {
  const auto strides_of = [](const long long* s) { return vggt_mv::QkvStrides{{s[0], s[1], s[2], s[3]}, s[4], s[5]}; };
  vggt_mv::DualStreamAttentionParams params{};
  params.qkv_pose = qkv_pose;
  params.qkv_geo = qkv_geo;
  params.mask = mask;
  params.lambda_pose = lambda_pose;
  params.lambda_geo = lambda_geo;
  params.pose = pose;
  params.geo = geo;
  params.lse_pose = lse_pose;
  params.lse_geo = lse_geo;
  params.grid = {grid[0], grid[1], grid[2], grid[3]};
  params.pose_strides = strides_of(pose_strides);
  params.geo_strides = strides_of(geo_strides);
  params.axis = static_cast<vggt_mv::Axis>(axis);
  params.heads = heads;
  params.width = width;
  params.scale = scale;
  params.dtype = static_cast<vggt_mv::DType>(dtype);
  return static_cast<int>(vggt_mv::launch_dual_stream_attention(params, nullptr));
}
