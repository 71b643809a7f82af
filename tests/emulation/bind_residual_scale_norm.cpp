// residual_scale_norm's launchers for ctypes. Arguments in the order of the params structs.
#include "cuda/residual_scale_norm.h"

using vggt_mv::DType;

extern "C" {

int emulated_residual_scale_norm(const void* x, const void* y, const void* gamma, const void* weight, const void* bias,
                                 void* residual, void* normed, float* mean, float* rstd, long long rows, int features,
                                 long long x_row_stride, long long y_row_stride, float eps, int x_dtype, int y_dtype,
                                 int param_dtype) {
  const vggt_mv::ResidualScaleNormParams params{x,
                                                y,
                                                gamma,
                                                weight,
                                                bias,
                                                residual,
                                                normed,
                                                mean,
                                                rstd,
                                                rows,
                                                features,
                                                x_row_stride,
                                                y_row_stride,
                                                eps,
                                                static_cast<DType>(x_dtype),
                                                static_cast<DType>(y_dtype),
                                                static_cast<DType>(param_dtype)};
  return static_cast<int>(vggt_mv::launch_residual_scale_norm(params, nullptr));
}

int emulated_residual_scale_norm_backward(const void* grad_residual, const void* grad_normed, const void* residual,
                                          const void* y, const void* gamma, const void* weight, const float* mean,
                                          const float* rstd, void* grad_x, void* grad_y, float* partial_sums,
                                          float* grad_parameters, long long rows, int features, int row_blocks,
                                          long long y_row_stride, int x_dtype, int y_dtype, int param_dtype) {
  const vggt_mv::ResidualScaleNormBackwardParams params{grad_residual,
                                                        grad_normed,
                                                        residual,
                                                        y,
                                                        gamma,
                                                        weight,
                                                        mean,
                                                        rstd,
                                                        grad_x,
                                                        grad_y,
                                                        partial_sums,
                                                        grad_parameters,
                                                        rows,
                                                        features,
                                                        row_blocks,
                                                        y_row_stride,
                                                        static_cast<DType>(x_dtype),
                                                        static_cast<DType>(y_dtype),
                                                        static_cast<DType>(param_dtype)};
  return static_cast<int>(vggt_mv::launch_residual_scale_norm_backward(params, nullptr));
}

int emulated_residual_scale_norm_row_blocks(long long rows, int features) {
  int row_blocks = 0;
  return vggt_mv::residual_scale_norm_row_blocks(rows, features, &row_blocks) == cudaSuccess ? row_blocks : -1;
}

}  // extern "C"
