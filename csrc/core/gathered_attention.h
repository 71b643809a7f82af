// Attention of all tokens of the grid, or of a small memory, over gathered keys: what a launch needs to know. One struct
// for the four sparse operators, which differ in who asks and in which keys there are:
//
//   operator                  queries                 keys
//   memory_write              the M memory tokens     the memory's, then those of all tokens of the batch element
//   memory_read               all tokens              the memory's
//   landmark_attention        all tokens              those of the tokens that row b of `listed` names
//   block_dilated_attention   the tokens of frame f   those of all tokens of the frames that row f of `listed` names
//
//   s_ij = scale * q_i . k_j + key_bias_j,   out_i = sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)
//
// for queries and keys of one batch element, each head by itself; key_bias is 0 on memory keys. Softmax and sums are in
// float. A key that is listed twice counts twice.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/qk_norm_rope.h"
#include "core/token_grid.h"

namespace vggt_mv {

// Which tokens of the grid are keys. The numbers stand in vggt_mv_ext too, on the other side of the binding.
enum class TokenKeys : int {
  none = 0,           // `listed` is null
  all = 1,            // `listed` is null: tokens 0 to T N P - 1 of the batch element, in order
  listed_tokens = 2,  // `listed` is [B, list_length]: numbers (t N + n) P + p, the same list for all queries of b
  listed_frames = 3,  // `listed` is [T N, list_length]: numbers t N + n, all P tokens of each; -1: no frame, skipped
};

// Distances in elements along [B, M, 3, h, D].
struct MemoryStrides {
  int64_t batch;
  int64_t token;
  int64_t part;  // from query to key to value
  int64_t head;
};

// queries: T N P of every batch element, or M with memory_queries.
struct GatheredAttentionParams {
  const void* qkv;         // [B, T, N, P, 3, h, D] dtype
  const void* memory_qkv;  // [B, M, 3, h, D] dtype, its keys before all others; null: no memory
  const float* key_bias;   // [B, T, N, P] contiguous; null: zero
  const int64_t* listed;   // see TokenKeys; contiguous
  void* out;               // [B, queries, h, D] dtype, contiguous
  float* lse;              // [B, h, queries]; null: not wanted
  float* partial;          // [key_chunks (D + 1), B, h, queries] workspace on CUDA; null with 1 chunk
  TokenGrid grid;
  QkvStrides qkv_strides;
  MemoryStrides memory_strides;
  TokenKeys token_keys;
  bool memory_queries;  // the memory asks, not the tokens
  int memory_tokens;    // M; 0: no memory
  int list_length;
  int key_chunks;  // parts of the keys that share the work on CUDA where the memory asks; else 1
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

// With p_ij = exp(s_ij - lse_i) and delta_i = sum_d grad_out_id out_id:
//   ds_ij = p_ij (grad_out_i . v_j - delta_i)
//   grad_q_i = scale sum_j ds_ij k_j,   grad_k_j = scale sum_i ds_ij q_i,   grad_v_j = sum_i p_ij grad_out_i
//   grad_key_bias_j = sum_i ds_ij for each head.
// A token that is listed several times takes the sum over its places. Parts that take no part in the attention (the
// queries of tokens when the memory asks, the keys of tokens that are not listed, ...) have the gradient 0, which is
// written, too. Every sum is taken in one order, so that the result is the same every time.
struct GatheredAttentionBackwardParams {
  const void* grad_out;    // [B, queries, h, D] dtype, contiguous
  const void* qkv;         // [B, T, N, P, 3, h, D] dtype
  const void* memory_qkv;  // as in the forward pass
  const void* out;         // [B, queries, h, D] dtype, contiguous: of the forward pass
  const float* lse;        // [B, h, queries]: of the forward pass
  const float* key_bias;   // as in the forward pass
  const int64_t* listed;   // as in the forward pass
  float* delta;            // [B, h, queries] workspace
  void* grad_qkv;          // [B, T, N, P, 3, h, D] dtype, by grad_qkv_strides
  void* grad_memory_qkv;   // [B, M, 3, h, D] dtype, by grad_memory_strides; null with memory_qkv
  float* grad_key_bias;    // [h, B, T, N, P] contiguous; null: not wanted
  TokenGrid grid;
  QkvStrides qkv_strides;
  QkvStrides grad_qkv_strides;
  MemoryStrides memory_strides;
  MemoryStrides grad_memory_strides;
  TokenKeys token_keys;
  bool memory_queries;
  int memory_tokens;
  int list_length;
  int heads;
  int width;  // D
  float scale;
  DType dtype;
};

}  // namespace vggt_mv
