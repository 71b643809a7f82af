// out_i = sum_j softmax_j(scale q_i . k_j + row_gate_i key_bias_j) v_j and lse_i: see core/alternating_attention.h.
//
// Layout    qkv [B, T, N, P, 3, h, D], any strides whose rows are 16-byte aligned; out and key_bias contiguous.
// Mapping   A block takes kRows queries of one head of one sequence and walks through all keys in tiles of kKeys, as
//           attention_forward.cuh has it. Blocks of one head are neighbours in the grid and run at the same time, so that
//           its keys and values are read from memory once and from the L2 cache after that. A block's row gates lie in
//           shared memory, over the scale.
// Why       4 L^2 D operations for each head on 4 L D numbers: the tensor cores are the limit as soon as L is a few
//           hundred, and beside them exp2 (16 a cycle and multiprocessor) and the 4 to 5 operations in float around it.
// Ends      What lies past the end of a sequence is never read: zeros stand in for it, and its logits are -inf.
#pragma once

#include "core/alternating_attention.h"
#include "cuda/attention_forward.cuh"

namespace vggt_mv {

struct AlternatingAttentionLaunch : AlternatingAttentionParams {
  SequenceLayout qkv_layout;
  SequenceLayout out_layout;
  SequenceLayout bias_layout;
  SequenceLayout gate_layout;
  TokenStrides out_strides;
  TokenStrides bias_strides;
  int row_blocks;  // blocks that share the rows of a sequence
  float scale_log2;
  float inverse_scale;
};

template <typename T, typename Tiling, bool kBias>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    alternating_attention_kernel(const __grid_constant__ AlternatingAttentionLaunch p) {
  using Tiles = ForwardTiles<T, Tiling>;
  constexpr int kRowTiles = Tiling::kRowTiles;
  constexpr int kKeys = Tiling::kKeys;
  constexpr int kThreads = Tiling::kThreads;
  const int lane = simt::lane_index();
  const int first_of_warp = 16 * kRowTiles * simt::warp_index();
  const int length = p.qkv_layout.length;

  const int first_row = simt::block_index_x() % p.row_blocks * Tiling::kRows;
  const int head = simt::block_index_x() / p.row_blocks % p.heads;
  const int sequence = simt::block_index_x() / p.row_blocks / p.heads;
  const T* queries = static_cast<const T*>(p.qkv) + sequence_offset(p.grid, p.axis, p.qkv_strides.tokens, sequence) +
                     head * p.qkv_strides.head;
  const T* keys = queries + p.qkv_strides.part;

  const float* biases = nullptr;
  const auto gates = simt::dynamic_shared<float>(Tiling::kGateOffset) + first_of_warp;  // of the warp's rows
  if constexpr (kBias) {
    biases = p.key_bias + sequence_offset(p.grid, p.axis, p.bias_strides, sequence);
    if (lane < 16 * kRowTiles) {
      const int row = first_row + first_of_warp + lane;
      float gate = 1.0f;
      if (p.row_gate != nullptr && row < length) {
        gate = simt::load_global(p.row_gate + sequence_offset(p.grid, p.axis, p.row_gate_strides, sequence) +
                                 p.gate_layout.offset(row));
      }
      gates.store(lane, gate * p.inverse_scale);
    }
  }

  copy_tile_async<Tiling::kRows, kThreads>(Tiles::queries(), queries, p.qkv_layout, first_row);
  simt::copy_async_commit();
  RowStatistics<kRowTiles> rows;
  float result[kRowTiles][Tiling::kWidth / 8][4] = {};
  attend<T, Tiling, kBias>(
      rows, result, (length - 1) / kKeys + 1, p.scale_log2,
      [&](int tile, int stage) {
        const T* values = keys + p.qkv_strides.part;
        copy_tiles_async<kKeys, kThreads>({Tiles::keys(stage), Tiles::values(stage)}, {keys, values}, p.qkv_layout,
                                          tile * kKeys);
        if constexpr (kBias)
          copy_floats_async<kKeys, kThreads>(Tiles::biases(stage), biases, p.bias_layout, tile * kKeys);
      },
      [&](int tile) { return length - tile * kKeys; },
      [&](int m, int half) { return gates.load(16 * m + 8 * half + lane / 4); });

  T* out = static_cast<T*>(p.out) + sequence_offset(p.grid, p.axis, p.out_strides, sequence) + head * Tiling::kWidth;
  float* lse = p.lse == nullptr ? nullptr : p.lse + (int64_t{sequence} * p.heads + head) * length;
  store_result<T, Tiling>(p.out_layout, Tiles::queries(), result, rows, out, lse, first_row);
}

}  // namespace vggt_mv
