// Launcher of alternating_attention's backward on CUDA; returns at once, with cudaSuccess, when there is nothing to
// compute.
#pragma once

#include <cuda_runtime_api.h>

#include "core/alternating_attention.h"

namespace vggt_mv {

// cudaErrorInvalidValue for a dtype other than f16 and bf16, a width other than 32, 64, 96 and 128, gradients of a bias
// that is not there, or more than 2^31 - 1 tokens in a sequence or tiles in all; cudaErrorMisalignedAddress unless every
// row of width elements starts at a multiple of 16 bytes.
cudaError_t launch_alternating_attention_backward(const AlternatingAttentionBackwardParams& params,
                                                  cudaStream_t stream);

}  // namespace vggt_mv
