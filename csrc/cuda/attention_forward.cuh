// What the forward attention kernels share: a block's queries meet tiles of keys and values, wherever these come from.
//
// A block takes kRows queries of one head; each of its warps owns 16 kRowTiles of the rows from the first logit to the
// result, so softmax needs no exchange beyond the 4 lanes that share a row of a fragment. In shared memory lie the queries
// (later the results, on their way to 16-byte stores) and a ring of kStages tiles of keys, of values and of key biases,
// filled by cp.async under the products of the tile before; one barrier a tile. Swizzled, see attention_tile.cuh.
//
// Sums are in float: logits, running maximum, running sum and result. In powers of 2, with the scale folded in: of the
// logits x = q . k (+ gate / scale * key_bias: one fma), p = 2^(x c - m), c = scale log2(e), one fma again, where m is the
// rounded maximum of x c. Sums are of the unrounded p; p is rounded to T for the product with v.
//
// A key with a bias of -inf weighs nothing; a row whose logits are all -inf gives NaN and an lse of -inf.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/attention_tile.cuh"
#include "cuda/attention_tuning.h"

namespace vggt_mv {

// A block's tiles in shared memory.
template <typename T, typename Tiling>
struct ForwardTiles {
  using Tile = SharedTile<T, Tiling::kWidth>;

  __device__ __forceinline__ static Tile queries() { return Tile(simt::dynamic_shared<T>()); }
  __device__ __forceinline__ static Tile keys(int stage) {
    return Tile(simt::dynamic_shared<T>(Tiling::kQueryBytes) + 2 * stage * Tile::elements(Tiling::kKeys));
  }
  __device__ __forceinline__ static Tile values(int stage) {
    return Tile(simt::dynamic_shared<T>(Tiling::kQueryBytes + Tiling::kTileBytes) +
                2 * stage * Tile::elements(Tiling::kKeys));
  }
  __device__ __forceinline__ static simt::Shared<float> biases(int stage) {
    return simt::dynamic_shared<float>(Tiling::kBiasOffset) + stage * Tiling::kKeys;
  }
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

  // The sum of a whole row, in the 4 lanes that share it, and the logarithm of the row's sum of exp(logit) from that.
  __device__ __forceinline__ float whole_sum(int m, int half) const {
    float whole = sum[m][half];
    whole += simt::shuffle_xor(whole, 1);
    return whole + simt::shuffle_xor(whole, 2);
  }
  __device__ __forceinline__ float log_sum(int m, int half, float whole) const {
    constexpr float kLog2 = 0.6931471805599453f;
    return (maximum[m][half] + simt::log2_approximate(whole)) * kLog2;
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

// logits += queries keys^T, of the first kQueryTiles row tiles; `queries(m, k)` gives the fragment of row tile m at
// features k.
template <typename T, typename Tiling, typename Queries>
__device__ __forceinline__ void multiply_queries_keys(float (&logits)[Tiling::kRowTiles][Tiling::kKeys / 8][4],
                                                      const SharedTile<T, Tiling::kWidth>& keys, Queries&& queries) {
#pragma unroll
  for (int k = 0; k < Tiling::kWidth; k += 16) {
    unsigned a[Tiling::kQueryTiles][4];
#pragma unroll
    for (int m = 0; m < Tiling::kQueryTiles; ++m) queries(a[m], m, k);
#pragma unroll
    for (int n = 0; n < Tiling::kKeys; n += 16) {
      unsigned b[2][2];
      load_b(b, keys, n, k);
#pragma unroll
      for (int m = 0; m < Tiling::kQueryTiles; ++m) {
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

// Takes the block's queries, whose copy is the group of copies before this, over `tiles` tiles of keys.
//   load(tile, stage)   starts the copies of a tile's keys, values and, with kBias, biases into ForwardTiles' `stage`
//   keys_left(tile)     how many keys there are from the tile's first on, the same in all threads: those past the end
//                       weigh nothing, a tile without any is left out
//   gate(m, half)       the factor of the biases of a thread's row, over the scale
// Row tiles m and m + kQueryTiles are of the same queries, whose products with the keys are taken once.
template <typename T, typename Tiling, bool kBias, typename Load, typename KeysLeft, typename Gate>
__device__ __forceinline__ void attend(RowStatistics<Tiling::kRowTiles>& rows,
                                       float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4], int tiles,
                                       float scale_log2, Load&& load, KeysLeft&& keys_left, Gate&& gate) {
  using Tiles = ForwardTiles<T, Tiling>;
  constexpr int kRowTiles = Tiling::kRowTiles;
  constexpr int kKeys = Tiling::kKeys;
  const int lane = simt::lane_index();
  const int first_of_warp = 16 * Tiling::kQueryTiles * simt::warp_index();

  // Every call is one group of copies, an empty one past the last tile.
  const auto load_tile = [&](int tile, int stage) {
    if (tile < tiles) load(tile, stage);
    simt::copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < Tiling::kStages - 1; ++stage) load_tile(stage, stage);

  unsigned query[Tiling::kQueriesInRegisters ? Tiling::kQueryTiles : 1][Tiling::kWidth / 16][4];
  if constexpr (Tiling::kQueriesInRegisters) {
    simt::copy_async_wait<Tiling::kStages - 1>();
    simt::block_barrier();
#pragma unroll
    for (int m = 0; m < Tiling::kQueryTiles; ++m) {
#pragma unroll
      for (int k = 0; k < Tiling::kWidth; k += 16)
        load_a(query[m][k / 16], Tiles::queries(), first_of_warp + 16 * m, k);
    }
  }
  const auto query_fragment = [&](unsigned (&a)[4], int m, int k) {
    if constexpr (Tiling::kQueriesInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query[m][k / 16][i];
    } else {
      load_a(a, Tiles::queries(), first_of_warp + 16 * m, k);
    }
  };

  int stage = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    simt::copy_async_wait<Tiling::kStages - 2>();
    simt::block_barrier();  // this tile is there, and everybody is through with the one before
    load_tile(tile + Tiling::kStages - 1, stage == 0 ? Tiling::kStages - 1 : stage - 1);
    const int this_stage = stage;
    stage = stage == Tiling::kStages - 1 ? 0 : stage + 1;
    const int left = keys_left(tile);
    if (left <= 0) continue;

    float logits[kRowTiles][kKeys / 8][4] = {};
    multiply_queries_keys<T, Tiling>(logits, Tiles::keys(this_stage), query_fragment);
    if constexpr (Tiling::kStreams > 1) {
#pragma unroll
      for (int m = Tiling::kQueryTiles; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) logits[m][n][i] = logits[m - Tiling::kQueryTiles][n][i];
        }
      }
    }
    if constexpr (kBias) {
      float gates[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        gates[m][0] = gate(m, 0);
        gates[m][1] = gate(m, 1);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float2 bias = Tiles::biases(this_stage).template load_as<float2>(8 * n + 2 * (lane % 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            logits[m][n][2 * half] = fmaf(gates[m][half], bias.x, logits[m][n][2 * half]);
            logits[m][n][2 * half + 1] = fmaf(gates[m][half], bias.y, logits[m][n][2 * half + 1]);
          }
        }
      }
    }
    if (left < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + 2 * (lane % 4) + i % 2 < left) continue;
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) logits[m][n][i] = -std::numeric_limits<float>::infinity();
        }
      }
    }
    rows.take(logits, result, scale_log2);
    multiply_weights_values<T, Tiling>(result, logits, Tiles::values(this_stage));
  }
}

// The warp's rows of the result, divided by their sums, through shared memory to 16-byte stores; lse may be null.
template <typename T, typename Tiling>
__device__ __forceinline__ void store_result(const SequenceLayout& layout, const SharedTile<T, Tiling::kWidth>& tile,
                                             float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4],
                                             RowStatistics<Tiling::kRowTiles>& rows, T* out, float* lse,
                                             int first_of_block) {
  const int lane = simt::lane_index();
  const int first_of_warp = 16 * Tiling::kRowTiles * simt::warp_index();
  simt::warp_barrier();  // the queries of these rows have been read
#pragma unroll
  for (int m = 0; m < Tiling::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.whole_sum(m, half);
      const float inverse = simt::reciprocal(sum);
      const int first_row = first_of_warp + 16 * m + 8 * half;
#pragma unroll
      for (int n = 0; n < Tiling::kWidth / 8; ++n) {
        tile.at(first_row, lane / 4, n)
            .template store_as<unsigned>(
                2 * (lane % 4), pack_pair<T>(result[m][n][2 * half] * inverse, result[m][n][2 * half + 1] * inverse));
      }
      const int row = first_of_block + first_row + lane / 4;
      if (lse != nullptr && lane % 4 == 0 && row < layout.length) {
        simt::store_global(lse + row, rows.log_sum(m, half, sum));
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
    if (row >= layout.length) break;
    T* to = out + layout.offset(row);
#pragma unroll
    for (int chunk = lane % kSpan; chunk < kChunks; chunk += kSpan) {
      simt::store_global(reinterpret_cast<uint4*>(to + chunk * kChunk),
                         tile.at(first_of_warp, row_of_warp, chunk).template load_as<uint4>());
    }
  }
}

}  // namespace vggt_mv
