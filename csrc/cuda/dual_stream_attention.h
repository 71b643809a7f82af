// Launcher of dual_stream_attention on CUDA: fp16 and bf16, D in {32, 64, 96, 128}; one launch for both streams. It returns
// at once, with cudaSuccess, when there is nothing to compute. What it refuses, without launching anything:
//   cudaErrorInvalidValue       another dtype or width, a scale that is not above 0 and finite, a sequence of
//                               about 2^31 tokens or more, a mask without both lambdas, more than 2^31 - 1 blocks
//   cudaErrorMisalignedAddress  rows of qkv or of the results that do not begin at a multiple of 16 bytes
#pragma once

#include <cuda_runtime_api.h>

#include "core/dual_stream_attention.h"

namespace vggt_mv {

cudaError_t launch_dual_stream_attention(const DualStreamAttentionParams& params, cudaStream_t stream);

}  // namespace vggt_mv
