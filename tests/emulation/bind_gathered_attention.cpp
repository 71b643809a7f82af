// gathered_attention's launchers for ctypes. `grid`: B, T, N, P; strides: of B, T, N, P, 3, h and of B, M, 3, h.
#include "cuda/gathered_attention.h"

extern "C" {

int emulated_gathered_attention(const void* qkv, const void* memory_qkv, const float* key_bias, const long long* listed,
                                void* out, float* lse, float* partial, const int* grid, const long long* qkv_strides,
                                const long long* memory_strides, int token_keys, int memory_queries, int memory_tokens,
                                int list_length, int key_chunks, int heads, int width, float scale, int dtype) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  vggt_mv::GatheredAttentionParams params{};
  params.qkv = qkv;
  params.memory_qkv = memory_qkv;
  params.key_bias = key_bias;
  params.listed = reinterpret_cast<const int64_t*>(listed);
  params.out = out;
  params.lse = lse;
  params.partial = partial;
  params.grid = {grid[0], grid[1], grid[2], grid[3]};
  const long long* s = qkv_strides;
  params.qkv_strides = {{s[0], s[1], s[2], s[3]}, s[4], s[5]};
  params.memory_strides = {memory_strides[0], memory_strides[1], memory_strides[2], memory_strides[3]};
  params.token_keys = static_cast<vggt_mv::TokenKeys>(token_keys);
  params.memory_queries = memory_queries != 0;
  params.memory_tokens = memory_tokens;
  params.list_length = list_length;
  params.key_chunks = key_chunks;
  params.heads = heads;
  params.width = width;
  params.scale = scale;
  params.dtype = static_cast<vggt_mv::DType>(dtype);
  return static_cast<int>(vggt_mv::launch_gathered_attention(params, nullptr));
}

int emulated_gathered_attention_key_chunks(const int* grid, int memory_tokens, int heads, int width) {
  int key_chunks = 0;
  const cudaError_t status = vggt_mv::gathered_attention_key_chunks({grid[0], grid[1], grid[2], grid[3]}, memory_tokens,
                                                                    heads, width, &key_chunks);
  return status == cudaSuccess ? key_chunks : -static_cast<int>(status);
}

}  // extern "C"
