// out_i = sum_j softmax_j(scale q_i . k_j + row_gate_i key_bias_j) v_j and lse_i: see core/alternating_attention.h.
//
// Layout    qkv [B, T, N, P, 3, h, D], any strides whose rows are 16-byte aligned; out and key_bias contiguous.
// Mapping   A block takes kRows queries of one head of one sequence and walks through all keys in tiles of kKeys. Each
//           of its warps owns 16 kRowTiles of the rows from the first logit to the result, so softmax needs no exchange
//           beyond the 4 lanes that share a row of a fragment. Blocks of one head are neighbours in the grid and run
//           at the same time, so that its keys and values are read from memory once and from the L2 cache after that.
// Shared    The block's queries (later its results, on their way to 16-byte stores), its row gates, and a ring of
//           kStages tiles of keys, of values and of key biases, filled by cp.async under the products of the tile
//           before; one barrier a tile. Swizzled, see attention_tile.cuh.
// Sums      In float: logits, running maximum, running sum and result. In powers of 2, with the scale folded in: of the
//           logits x = q . k (+ row_gate / scale * key_bias: one fma), p = 2^(x c - m), c = scale log2(e), one fma
//           again, where m is the rounded maximum of x c. Sums are of the unrounded p; p is rounded to T for the
//           product with v.
// Why       4 L^2 D operations for each head on 4 L D numbers: the tensor cores are the limit as soon as L is a few
//           hundred, and beside them exp2 (16 a cycle and multiprocessor) and the 4 to 5 operations in float around it.
// Infinite  A key with a bias of -inf weighs nothing; a row whose logits are all -inf gives NaN and an lse of -inf.
//           What lies past the end of a sequence is never read: zeros stand in for it, and its logits are -inf.
#pragma once

#include <cmath>
#include <limits>

#include "core/alternating_attention.h"
#include "cuda/attention_tile.cuh"
#include "cuda/attention_tuning.h"

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

// The running softmax of a warp's rows: a thread has rows lane / 4 and lane / 4 + 8 of each of the kRowTiles.
template <int kRowTiles>
struct RowStatistics {
  float maximum[kRowTiles][2];  // of the logits, times scale log2(e)
  float sum[kRowTiles][2];      // of this thread's columns, relative to 2^maximum

  __device__ __forceinline__ RowStatistics() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = -std::numeric_limits<float>::infinity();
        sum[m][half] = 0.0f;
      }
    }
  }

  // Turns logits into weights relative to the new maximum and brings `result` from the old one to it.
  template <int kColumns, int kWidthTiles>
  __device__ __forceinline__ void take(float (&logits)[kRowTiles][kColumns][4],
                                       float (&result)[kRowTiles][kWidthTiles][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = fmaxf(logits[m][0][2 * half], logits[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kColumns; ++n) {
          highest = fmaxf(highest, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
        }
        highest = fmaxf(highest, simt::shuffle_xor(highest, 1));
        highest = fmaxf(highest, simt::shuffle_xor(highest, 2));
        const float old = maximum[m][half];
        maximum[m][half] = fmaxf(old, highest * scale_log2);
        // While all logits were -inf: 2^(-inf - 0) = 0, where 2^(-inf + inf) would be NaN for good.
        const bool none = maximum[m][half] == -std::numeric_limits<float>::infinity();
        const float reference = none ? 0.0f : maximum[m][half];
        const float shrink = simt::exp2_approximate(old - reference);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            logits[m][n][i] = simt::exp2_approximate(fmaf(logits[m][n][i], scale_log2, -reference));
            added += logits[m][n][i];
          }
        }
        sum[m][half] = fmaf(sum[m][half], shrink, added);
#pragma unroll
        for (int n = 0; n < kWidthTiles; ++n) {
          result[m][n][2 * half] *= shrink;
          result[m][n][2 * half + 1] *= shrink;
        }
      }
    }
  }
};

// logits += queries keys^T; `queries(m, k)` gives the fragment of row tile m at features k.
template <typename T, typename Tiling, typename Queries>
__device__ __forceinline__ void multiply_queries_keys(float (&logits)[Tiling::kRowTiles][Tiling::kKeys / 8][4],
                                                      const SharedTile<T, Tiling::kWidth>& keys, Queries&& queries) {
#pragma unroll
  for (int k = 0; k < Tiling::kWidth; k += 16) {
    unsigned a[Tiling::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tiling::kRowTiles; ++m) queries(a[m], m, k);
#pragma unroll
    for (int n = 0; n < Tiling::kKeys; n += 16) {
      unsigned b[2][2];
      load_b(b, keys, n, k);
#pragma unroll
      for (int m = 0; m < Tiling::kRowTiles; ++m) {
        simt::multiply_accumulate_16x8x16<T>(logits[m][n / 8], a[m], b[0]);
        simt::multiply_accumulate_16x8x16<T>(logits[m][n / 8 + 1], a[m], b[1]);
      }
    }
  }
}

// result += weights values
template <typename T, typename Tiling>
__device__ __forceinline__ void multiply_weights_values(float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4],
                                                        const float (&weights)[Tiling::kRowTiles][Tiling::kKeys / 8][4],
                                                        const SharedTile<T, Tiling::kWidth>& values) {
#pragma unroll
  for (int k = 0; k < Tiling::kKeys; k += 16) {
    unsigned a[Tiling::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tiling::kRowTiles; ++m) accumulators_to_a<T>(a[m], weights[m][k / 8], weights[m][k / 8 + 1]);
#pragma unroll
    for (int n = 0; n < Tiling::kWidth; n += 16) {
      unsigned b[2][2];
      load_b_transposed(b, values, k, n);
#pragma unroll
      for (int m = 0; m < Tiling::kRowTiles; ++m) {
        simt::multiply_accumulate_16x8x16<T>(result[m][n / 8], a[m], b[0]);
        simt::multiply_accumulate_16x8x16<T>(result[m][n / 8 + 1], a[m], b[1]);
      }
    }
  }
}

// The warp's rows of the result, divided by their sums, through shared memory to 16-byte stores.
template <typename T, typename Tiling>
__device__ __forceinline__ void store_result(const AlternatingAttentionLaunch& p,
                                             const SharedTile<T, Tiling::kWidth>& tile,
                                             float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4],
                                             RowStatistics<Tiling::kRowTiles>& rows, T* out, float* lse,
                                             int first_of_block) {
  constexpr float kLog2 = 0.6931471805599453f;
  const int lane = simt::lane_index();
  const int first_of_warp = 16 * Tiling::kRowTiles * simt::warp_index();
  simt::warp_barrier();  // the queries of these rows have been read
#pragma unroll
  for (int m = 0; m < Tiling::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[m][half];
      sum += simt::shuffle_xor(sum, 1);
      sum += simt::shuffle_xor(sum, 2);
      const float inverse = simt::reciprocal(sum);
      const int first_row = first_of_warp + 16 * m + 8 * half;
#pragma unroll
      for (int n = 0; n < Tiling::kWidth / 8; ++n) {
        tile.at(first_row, lane / 4, n)
            .template store_as<unsigned>(
                2 * (lane % 4), pack_pair<T>(result[m][n][2 * half] * inverse, result[m][n][2 * half + 1] * inverse));
      }
      const int row = first_of_block + first_row + lane / 4;
      if (lse != nullptr && lane % 4 == 0 && row < p.out_layout.length) {
        simt::store_global(lse + row, (rows.maximum[m][half] + simt::log2_approximate(sum)) * kLog2);
      }
    }
  }
  simt::warp_barrier();
  constexpr int kChunks = Tiling::kWidth / kChunk;
  constexpr int kSpan = SharedTile<T, Tiling::kWidth>::kWholeLines ? 8 : 4;  // neighbouring lanes, neighbouring chunks
#pragma unroll 1
  for (int step = 0; step < 16 * Tiling::kRowTiles * kSpan / 32; ++step) {
    const int row_of_warp = step * (32 / kSpan) + lane / kSpan;
    const int row = first_of_block + first_of_warp + row_of_warp;
    if (row >= p.out_layout.length) break;
    T* to = out + p.out_layout.offset(row);
#pragma unroll
    for (int chunk = lane % kSpan; chunk < kChunks; chunk += kSpan) {
      simt::store_global(reinterpret_cast<uint4*>(to + chunk * kChunk),
                         tile.at(first_of_warp, row_of_warp, chunk).template load_as<uint4>());
    }
  }
}

template <typename T, typename Tiling, bool kBias>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    alternating_attention_kernel(const __grid_constant__ AlternatingAttentionLaunch p) {
  using Tile = SharedTile<T, Tiling::kWidth>;
  constexpr int kRowTiles = Tiling::kRowTiles;
  constexpr int kKeys = Tiling::kKeys;
  constexpr int kThreads = Tiling::kThreads;
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const int lane = simt::lane_index();
  const int first_of_warp = 16 * kRowTiles * simt::warp_index();
  const int length = p.qkv_layout.length;

  const int first_row = simt::block_index_x() % p.row_blocks * Tiling::kRows;
  const int head = simt::block_index_x() / p.row_blocks % p.heads;
  const int sequence = simt::block_index_x() / p.row_blocks / p.heads;
  const T* queries = static_cast<const T*>(p.qkv) + sequence_offset(p.grid, p.axis, p.qkv_strides.tokens, sequence) +
                     head * p.qkv_strides.head;
  const T* keys = queries + p.qkv_strides.part;

  const Tile query_tile(simt::dynamic_shared<T>());
  const auto key_tile = [](int stage) {
    return Tile(simt::dynamic_shared<T>(Tiling::kQueryBytes) + 2 * stage * Tile::elements(kKeys));
  };
  const auto value_tile = [](int stage) {
    return Tile(simt::dynamic_shared<T>(Tiling::kQueryBytes + Tiling::kTileBytes) + 2 * stage * Tile::elements(kKeys));
  };
  const auto bias_tile = [](int stage) { return simt::dynamic_shared<float>(Tiling::kBiasOffset) + stage * kKeys; };

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

  // Every call is one group of copies, an empty one past the last tile.
  const auto load_keys = [&](int first, int stage) {
    if (first < length) {
      const T* values = keys + p.qkv_strides.part;
      copy_tiles_async<kKeys, kThreads>({key_tile(stage), value_tile(stage)}, {keys, values}, p.qkv_layout, first);
      if constexpr (kBias) copy_floats_async<kKeys, kThreads>(bias_tile(stage), biases, p.bias_layout, first);
    }
    simt::copy_async_commit();
  };
  copy_tile_async<Tiling::kRows, kThreads>(query_tile, queries, p.qkv_layout, first_row);
  simt::copy_async_commit();
#pragma unroll
  for (int stage = 0; stage < Tiling::kStages - 1; ++stage) load_keys(stage * kKeys, stage);

  unsigned query[Tiling::kQueriesInRegisters ? kRowTiles : 1][Tiling::kWidth / 16][4];
  if constexpr (Tiling::kQueriesInRegisters) {
    simt::copy_async_wait<Tiling::kStages - 1>();
    simt::block_barrier();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < Tiling::kWidth; k += 16) load_a(query[m][k / 16], query_tile, first_of_warp + 16 * m, k);
    }
  }
  const auto query_fragment = [&](unsigned (&a)[4], int m, int k) {
    if constexpr (Tiling::kQueriesInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query[m][k / 16][i];
    } else {
      load_a(a, query_tile, first_of_warp + 16 * m, k);
    }
  };

  RowStatistics<kRowTiles> rows;
  float result[kRowTiles][Tiling::kWidth / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int first = 0; first < length; first += kKeys) {
    simt::copy_async_wait<Tiling::kStages - 2>();
    simt::block_barrier();  // this tile is there, and everybody is through with the one before
    load_keys(first + (Tiling::kStages - 1) * kKeys, stage == 0 ? Tiling::kStages - 1 : stage - 1);

    float logits[kRowTiles][kKeys / 8][4] = {};
    multiply_queries_keys<T, Tiling>(logits, key_tile(stage), query_fragment);
    if constexpr (kBias) {
      float gate[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        gate[m][0] = gates.load(16 * m + lane / 4);
        gate[m][1] = gates.load(16 * m + 8 + lane / 4);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float2 bias = bias_tile(stage).template load_as<float2>(8 * n + 2 * (lane % 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            logits[m][n][2 * half] = fmaf(gate[m][half], bias.x, logits[m][n][2 * half]);
            logits[m][n][2 * half + 1] = fmaf(gate[m][half], bias.y, logits[m][n][2 * half + 1]);
          }
        }
      }
    }
    if (first + kKeys > length) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + 8 * n + 2 * (lane % 4) + i % 2 < length) continue;
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) logits[m][n][i] = kMinusInfinity;
        }
      }
    }
    rows.take(logits, result, p.scale_log2);
    multiply_weights_values<T, Tiling>(result, logits, value_tile(stage));
    stage = stage == Tiling::kStages - 1 ? 0 : stage + 1;
  }

  T* out = static_cast<T*>(p.out) + sequence_offset(p.grid, p.axis, p.out_strides, sequence) + head * Tiling::kWidth;
  float* lse = p.lse == nullptr ? nullptr : p.lse + (int64_t{sequence} * p.heads + head) * length;
  store_result<T, Tiling>(p, query_tile, result, rows, out, lse, first_row);
}

}  // namespace vggt_mv
