// Launchers of residual_scale_norm on CUDA. Each returns at once, with cudaSuccess, when there is nothing to compute.
#pragma once

#include <cuda_runtime_api.h>

#include "core/residual_scale_norm.h"

namespace vggt_mv {

// cudaErrorInvalidValue for a combination of dtypes that core/residual_scale_norm.h does not list.
cudaError_t launch_residual_scale_norm(const ResidualScaleNormParams& params, cudaStream_t stream);
cudaError_t launch_residual_scale_norm_backward(const ResidualScaleNormBackwardParams& params, cudaStream_t stream);

// How many blocks of rows the backward does best with on the current device: what to set row_blocks to, and how much
// workspace partial_sums needs.
cudaError_t residual_scale_norm_row_blocks(int64_t rows, int features, int* row_blocks);

}  // namespace vggt_mv
