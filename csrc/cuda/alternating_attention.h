// Launcher of alternating_attention on CUDA: fp16 and bf16, D in {32, 64, 96, 128}. It returns at once, with
// cudaSuccess, when there is nothing to compute. What it refuses, without launching anything:
//   cudaErrorInvalidValue       another dtype or width, a scale that is not above 0 and finite, a sequence of
//                               about 2^31 tokens or more, a row_gate without a key_bias, more than 2^31 - 1 blocks
//   cudaErrorMisalignedAddress  rows of qkv or of the result that do not begin at a multiple of 16 bytes
#pragma once

#include <cuda_runtime_api.h>

#include "core/alternating_attention.h"

namespace vggt_mv {

cudaError_t launch_alternating_attention(const AlternatingAttentionParams& params, cudaStream_t stream);

}  // namespace vggt_mv
