// Launchers of qk_norm_rope on CUDA. Each returns at once, with cudaSuccess, when there is nothing to compute.
#pragma once

#include <cuda_runtime_api.h>

#include "core/qk_norm_rope.h"

namespace vggt_mv {

// D must be 32, 64, 96 or 128, norm_dtype that of qkv or float (else cudaErrorInvalidValue); pointers and strides must
// be multiples of 16 bytes (else cudaErrorMisalignedAddress).
cudaError_t launch_qk_norm_rope(const QkNormRopeParams& params, cudaStream_t stream);
cudaError_t launch_qk_norm_rope_backward(const QkNormRopeBackwardParams& params, cudaStream_t stream);

// What to set `blocks` of the backward to on the current device.
cudaError_t qk_norm_rope_blocks(const TokenGrid& grid, int* blocks);

}  // namespace vggt_mv
