// Launcher of gathered_attention on CUDA: fp16 and bf16, D in {32, 64, 96, 128}. It returns at once, with cudaSuccess,
// when there is nothing to compute. What it refuses, without launching anything:
//   cudaErrorInvalidValue       another dtype or width, a scale that is not above 0 and finite, about 2^31 tokens of a
//                               batch element or more, more than 2^31 - 1 blocks, queries of the memory without the keys
//                               of all tokens or the other way round, a memory beside a list, lists or chunks that do
//                               not fit together
//   cudaErrorMisalignedAddress  rows of qkv, of memory_qkv or of the result that do not begin at a multiple of 16 bytes
// Numbers in a list are taken as they are: one past the grid gives another token's result, or an illegal read.
#pragma once

#include <cuda_runtime_api.h>

#include "core/gathered_attention.h"

namespace vggt_mv {

cudaError_t launch_gathered_attention(const GatheredAttentionParams& params, cudaStream_t stream);

// What to set `key_chunks` to on the current device where the memory asks. More than 1 want a workspace `partial`.
cudaError_t gathered_attention_key_chunks(const TokenGrid& grid, int memory_tokens, int heads, int width,
                                          int* key_chunks);

}  // namespace vggt_mv
