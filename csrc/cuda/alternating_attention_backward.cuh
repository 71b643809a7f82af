// Gradients of alternating_attention. With p_ij = exp(scale q_i . k_j + row_gate_i key_bias_j - lse_i), for every head:
//   delta_i = grad_out_i . out_i,   dp_ij = grad_out_i . v_j,   ds_ij = p_ij (dp_ij - delta_i)
//   grad_v_j = sum_i p_ij grad_out_i,   grad_k_j = scale sum_i ds_ij q_i,   grad_q_i = scale sum_j ds_ij k_j
//   grad_key_bias_j = sum_i ds_ij row_gate_i,   grad_row_gate_i = sum_j ds_ij key_bias_j (where key_bias_j is finite)
//
// Layout    As core/alternating_attention.h says; delta, like lse, [sequences, h, length].
// Mapping   Three kernels, each with one block for a tile of tokens of one (sequence, head), tiles of a sequence next to
//           each other: delta; the pass of keys, where a block owns keys and goes through all queries; the pass of
//           queries, where it owns queries and goes through all keys. The passes are one algorithm with the parts swapped:
//             pass      owned rows (first, second)   streamed columns (first, second)   gradients of the owned rows
//             keys      k, v                         q, grad_out                        first: ds q, second: p grad_out
//             queries   q, grad_out                  k, v                               first: ds k
//           logits[rows, columns] = first first^T and dp = second second^T, so that the logits come transposed in the pass
//           of keys, and p and ds leave the tensor cores in the registers in which the next product wants them: they
//           never go through shared memory. A warp owns kRowTiles x 16 rows, all columns.
// Shared    The owned tiles (warps read their own rows only, and the results go out through the same place); two stages of
//           streamed tiles and of floats of each column: the copies of one are under way while the other is used.
// Sums      fp32 in the tensor cores' accumulators, over columns from first to last: no atomics, so equal inputs give equal
//           bits, whatever the GPU. p and ds are rounded to the dtype of q before the second product.
// Why       Seven products of L^2 D where atomics would need five (dp and the logits are computed in both passes): the price
//           of determinism without a second copy of grad_q in fp32. Tile sizes and their reasons stand in
//           alternating_attention_backward_tiles.cuh. Columns go in chunks of 16 through both products, so the logits
//           take 16 registers for each row tile and the accumulators can have the rest.
#pragma once

#include "core/alternating_attention.h"
#include "cuda/alternating_attention_backward_tiles.cuh"
#include "cuda/arch/numeric.cuh"
#include "cuda/arch/simt.cuh"
#include "cuda/attention_tile.cuh"

namespace vggt_mv {

// The params and what the launcher derives from them: where the tokens of a sequence lie in every tensor.
struct AttentionBackwardLaunch {
  AlternatingAttentionBackwardParams params;
  TokenStrides out_strides;    // of out and grad_out
  TokenStrides float_strides;  // of key_bias, grad_key_bias and grad_row_gate
  SequenceLayout qkv;
  SequenceLayout grad_qkv;
  SequenceLayout out;
  SequenceLayout floats;
  SequenceLayout row_gate;
  int tiles;  // of a sequence
};

// The block's share: tile `tile` of head `head` of sequence `sequence`.
struct BlockPlace {
  int tile;
  int head;
  int64_t sequence;
  int64_t statistics;  // offset of its lse and delta

  __device__ __forceinline__ explicit BlockPlace(const AttentionBackwardLaunch& p) {
    const int block = simt::block_index_x();
    tile = block % p.tiles;
    head = block / p.tiles % p.params.heads;
    sequence = block / p.tiles / p.params.heads;
    statistics = (sequence * p.params.heads + head) * p.qkv.length;
  }
};

constexpr int kBackwardDeltaThreads = 128;
constexpr int kBackwardDeltaTokens = 64;  // of a block

// delta. A group of lanes takes a token, so that a row is read in one piece.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kBackwardDeltaThreads)
    alternating_attention_backward_delta_kernel(const __grid_constant__ AttentionBackwardLaunch p) {
  constexpr int kChunks = kWidth / kChunk;
  constexpr int kLanes = kChunks % 8 == 0 ? kChunks : 4;  // of a group: a power of two that divides the chunks
  constexpr int kStep = kBackwardDeltaThreads / kLanes;
  const BlockPlace place(p);
  const int64_t start =
      sequence_offset(p.params.grid, p.params.axis, p.out_strides, place.sequence) + int64_t{place.head} * kWidth;
  const T* out = static_cast<const T*>(p.params.out) + start;
  const T* grad_out = static_cast<const T*>(p.params.grad_out) + start;

#pragma unroll
  for (int step = 0; step < kBackwardDeltaTokens; step += kStep) {
    const int index = place.tile * kBackwardDeltaTokens + step + simt::thread_index() / kLanes;
    const bool valid = index < p.out.length;
    float sum = 0.0f;
    if (valid) {
      const int64_t row = p.out.offset(index);
#pragma unroll
      for (int chunk = 0; chunk < kChunks / kLanes; ++chunk) {
        const int64_t offset = row + (chunk * kLanes + simt::thread_index() % kLanes) * kChunk;
        float a[kChunk], b[kChunk];
        unpack(load_packed_once<T, kChunk>(out + offset), a);
        unpack(load_packed<T, kChunk>(grad_out + offset), b);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum = fmaf(a[i], b[i], sum);
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += simt::shuffle_xor(sum, mask);
    if (valid && simt::thread_index() % kLanes == 0) {
      simt::store_global(p.params.delta + place.statistics + index, sum);
    }
  }
}

// Shared memory of a pass, in bytes.
template <typename T, int kWidth, BackwardPass kPass, bool kBias>
struct BackwardShared {
  using Sizes = BackwardTiles<kWidth, kPass>;
  using Tile = SharedTile<T, kWidth>;
  static constexpr int kStages = 2;
  static constexpr int kRowBytes = Tile::bytes(Sizes::kRows);
  static constexpr int kColumnBytes = Tile::bytes(Sizes::kColumns);
  // Pass of keys: lse, delta and, with a bias, the gate of each query; pass of queries: the bias of each key.
  static constexpr int kFloats = (kPass == BackwardPass::keys ? 2 : 0) + (kBias ? 1 : 0);
  static constexpr int kFloatBytes = kFloats * Sizes::kColumns * static_cast<int>(sizeof(float));
  static constexpr int kStageBegin = 2 * kRowBytes;
  static constexpr int kFloatBegin = kStageBegin + kStages * 2 * kColumnBytes;
  static constexpr int kBytes = kFloatBegin + kStages * kFloatBytes;

  static __device__ __forceinline__ Tile own(int which) { return Tile(simt::dynamic_shared<T>(which * kRowBytes)); }
  static __device__ __forceinline__ Tile streamed(int stage, int which) {
    return Tile(simt::dynamic_shared<T>(kStageBegin + (2 * stage + which) * kColumnBytes));
  }
  static __device__ __forceinline__ simt::Shared<float> floats(int stage, int which) {
    return simt::dynamic_shared<float>(kFloatBegin + stage * kFloatBytes) + which * Sizes::kColumns;
  }
};

// One block of a pass: see above. Every array below is in registers.
template <typename T, int kWidth, BackwardPass kPass, bool kBias>
struct BackwardBlock {
  using Sizes = BackwardTiles<kWidth, kPass>;
  using Memory = BackwardShared<T, kWidth, kPass, kBias>;
  static constexpr bool kKeys = kPass == BackwardPass::keys;
  static constexpr int kRowTiles = Sizes::kRowTiles;
  static constexpr int kColumns = Sizes::kColumns;
  static constexpr int kThreads = Sizes::kThreads;
  static constexpr int kSteps = kWidth / 16;
  template <int kHeldSteps>
  static constexpr int kHeld = kHeldSteps == 0 ? 1 : kHeldSteps;  // an array needs an element
  static constexpr float kLog2e = 1.44269504088896340736f;

  const AttentionBackwardLaunch& p;
  const BlockPlace place;
  const T* first;  // of the sequence: of what the block streams
  const T* second;
  const float* column_floats;  // of the sequence: the gate of what it streams, or the bias; null: a gate of one
  const float scale;           // of logits to base 2

  float first_sum[kRowTiles][2 * kSteps][4];
  float second_sum[kKeys ? kRowTiles : 1][kKeys ? 2 * kSteps : 1][4];
  unsigned own_first[kRowTiles][kHeld<Sizes::kFirstSteps>][4];
  unsigned own_second[kRowTiles][kHeld<Sizes::kSecondSteps>][4];
  // Of rows g and g + 8 of each row tile. Keys: the bias; queries: -lse and gate to base 2, and delta.
  float row_bias[kRowTiles][2];
  float row_lse[kRowTiles][2];
  float row_delta[kRowTiles][2];
  float bias_sum[kRowTiles][2];

  __device__ __forceinline__ explicit BackwardBlock(const AttentionBackwardLaunch& launch)
      : p(launch), place(launch), scale(launch.params.scale * kLog2e) {}

  __device__ __forceinline__ const T* qkv_part(int part) const {
    const QkvStrides& strides = p.params.qkv_strides;
    return static_cast<const T*>(p.params.qkv) +
           sequence_offset(p.params.grid, p.params.axis, strides.tokens, place.sequence) + part * strides.part +
           place.head * strides.head;
  }
  __device__ __forceinline__ const T* grad_out() const {
    return static_cast<const T*>(p.params.grad_out) +
           sequence_offset(p.params.grid, p.params.axis, p.out_strides, place.sequence) + int64_t{place.head} * kWidth;
  }
  // Offset of the sequence in key_bias and in the gradients of the bias.
  __device__ __forceinline__ int64_t first_float() const {
    return sequence_offset(p.params.grid, p.params.axis, p.float_strides, place.sequence);
  }
  __device__ __forceinline__ const float* biases() const { return p.params.key_bias + first_float(); }
  __device__ __forceinline__ const float* gates() const {
    if (p.params.row_gate == nullptr) return nullptr;
    return p.params.row_gate + sequence_offset(p.params.grid, p.params.axis, p.params.row_gate_strides, place.sequence);
  }

  __device__ __forceinline__ int warp_row() const { return simt::warp_index() * Sizes::kWarpRows; }
  // Index in the sequence of row g or g + 8 of a row tile.
  __device__ __forceinline__ int index_of_row(int tile, int half) const {
    return place.tile * Sizes::kRows + warp_row() + 16 * tile + simt::lane_index() / 4 + 8 * half;
  }

  // Starts the copies of the streamed tile that begins at token `begin`.
  __device__ __forceinline__ void copy_stage(int stage, int begin) const {
    copy_tile_async<kColumns, kThreads>(Memory::streamed(stage, 0), first, p.qkv, begin);
    copy_tile_async<kColumns, kThreads>(Memory::streamed(stage, 1), second, kKeys ? p.out : p.qkv, begin);
    if constexpr (kKeys) {
      const auto copy_statistic = [&](int which, const float* statistic) {
#pragma unroll
        for (int i = simt::thread_index(); i < kColumns; i += kThreads) {
          const bool valid = begin + i < p.qkv.length;
          simt::copy_async<4>(Memory::floats(stage, which) + i, statistic + place.statistics + (valid ? begin + i : 0),
                              valid);
        }
      };
      copy_statistic(0, p.params.lse);
      copy_statistic(1, p.params.delta);
    }
    if constexpr (kBias) {
      const auto floats = Memory::floats(stage, Memory::kFloats - 1);
      if (column_floats != nullptr) {
        copy_floats_async<kColumns, kThreads>(floats, column_floats, kKeys ? p.row_gate : p.floats, begin);
      } else {
        for (int i = simt::thread_index(); i < kColumns; i += kThreads) floats.store(i, 1.0f);
      }
    }
  }

  // The owned tiles and the first streamed one, to where they are used.
  __device__ __forceinline__ void begin() {
    first = qkv_part(kKeys ? 0 : 1);
    second = kKeys ? grad_out() : qkv_part(2);
    if constexpr (kBias) column_floats = kKeys ? gates() : biases();
    const int row = place.tile * Sizes::kRows;
    copy_tile_async<Sizes::kRows, kThreads>(Memory::own(0), qkv_part(kKeys ? 1 : 0), p.qkv, row);
    copy_tile_async<Sizes::kRows, kThreads>(Memory::own(1), kKeys ? qkv_part(2) : grad_out(), kKeys ? p.qkv : p.out,
                                            row);
    copy_stage(0, 0);
    load_row_floats();
    zero(first_sum);
    zero(second_sum);
    simt::copy_async_wait_all();
    simt::block_barrier();
    load_own<Sizes::kFirstSteps>(own_first, Memory::own(0));
    load_own<Sizes::kSecondSteps>(own_second, Memory::own(1));
  }

  template <int kTiles, int kCount>
  static __device__ __forceinline__ void zero(float (&sums)[kTiles][kCount][4]) {
#pragma unroll
    for (int i = 0; i < kTiles * kCount * 4; ++i) sums[i / (4 * kCount)][i / 4 % kCount][i % 4] = 0.0f;
  }

  template <int kHeldSteps>
  __device__ __forceinline__ void load_own(unsigned (&own)[kRowTiles][kHeld<kHeldSteps>][4],
                                           const SharedTile<T, kWidth>& tile) const {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int step = 0; step < kHeldSteps; ++step) {
        load_a(own[row_tile][step], tile, warp_row() + 16 * row_tile, 16 * step);
      }
    }
  }

  __device__ __forceinline__ void load_row_floats() {
    const float* floats = nullptr;
    if constexpr (kBias) floats = kKeys ? biases() : gates();
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int index = index_of_row(i / 2, i % 2);
      const bool valid = index < p.qkv.length;
      float bias = 0.0f, lse = 0.0f, delta = 0.0f;
      if (valid) {
        if constexpr (!kKeys) {
          lse = simt::load_global(p.params.lse + place.statistics + index) * -kLog2e;
          delta = simt::load_global(p.params.delta + place.statistics + index);
        }
        if constexpr (kBias && kKeys) bias = simt::load_global(floats + p.floats.offset(index));
        if constexpr (kBias && !kKeys) {
          bias = (floats == nullptr ? 1.0f : simt::load_global(floats + p.row_gate.offset(index))) * kLog2e;
        }
      }
      row_bias[i / 2][i % 2] = bias;
      row_lse[i / 2][i % 2] = lse;
      row_delta[i / 2][i % 2] = delta;
      bias_sum[i / 2][i % 2] = 0.0f;
    }
  }

  // sum[tile][n] += own rows times columns `column` .. + 16 of a streamed tile; kHeldSteps of them are in registers.
  template <int kHeldSteps>
  __device__ __forceinline__ void multiply_own(float (&sum)[kRowTiles][2][4],
                                               const unsigned (&held)[kRowTiles][kHeld<kHeldSteps>][4],
                                               const SharedTile<T, kWidth>& own, const SharedTile<T, kWidth>& streamed,
                                               int column) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned b[2][2];
      load_b(b, streamed, column, 16 * step);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const auto multiply = [&](const unsigned (&a)[4]) {
          simt::multiply_accumulate_16x8x16<T>(sum[tile][0], a, b[0]);
          simt::multiply_accumulate_16x8x16<T>(sum[tile][1], a, b[1]);
        };
        if (step < kHeldSteps) {
          multiply(held[tile][step < kHeldSteps ? step : 0]);
        } else {
          unsigned a[4];
          load_a(a, own, warp_row() + 16 * tile, 16 * step);
          multiply(a);
        }
      }
    }
  }

  // sum += weights [rows, 16] times rows `column` .. + 16 of a streamed tile.
  __device__ __forceinline__ void multiply_streamed(float (&sum)[kRowTiles][2 * kSteps][4],
                                                    const unsigned (&weights)[kRowTiles][4],
                                                    const SharedTile<T, kWidth>& streamed, int column) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned b[2][2];
      load_b_transposed(b, streamed, column, 16 * step);
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        simt::multiply_accumulate_16x8x16<T>(sum[tile][2 * step], weights[tile], b[0]);
        simt::multiply_accumulate_16x8x16<T>(sum[tile][2 * step + 1], weights[tile], b[1]);
      }
    }
  }

  // From logits and dp to p and ds, in place, for columns `column` .. + 16 of which `valid` are there.
  __device__ __forceinline__ void weigh(float (&logits)[kRowTiles][2][4], float (&dp)[kRowTiles][2][4], int stage,
                                        int column, int valid) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int pair = 8 * n + simt::lane_index() % 4 * 2;  // the lane's columns: this and the next
      float lse[2] = {}, delta[2] = {}, bias[2] = {}, counted[2] = {};
      const auto load_two = [&](int which, float (&two)[2]) {
        const float2 both = Memory::floats(stage, which).template load_as<float2>(column + pair);
        two[0] = both.x;
        two[1] = both.y;
      };
      if constexpr (kKeys) {
        load_two(0, lse);
        load_two(1, delta);
        lse[0] *= -kLog2e;
        lse[1] *= -kLog2e;
      }
      if constexpr (kBias) {
        load_two(Memory::kFloats - 1, bias);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          counted[c] = kKeys || fabsf(bias[c]) < __builtin_huge_valf() ? bias[c] : 0.0f;  // a shut key has no share
          if constexpr (kKeys) bias[c] *= kLog2e;
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        const int tile = i / 4, half = i / 2 % 2, c = i % 2;
        float& logit = logits[tile][n][i % 4];
        float& gradient = dp[tile][n][i % 4];
        float exponent = kKeys ? lse[c] : row_lse[tile][half];
        if constexpr (kBias) exponent = fmaf(row_bias[tile][half], bias[c], exponent);
        logit = simt::exp2_approximate(fmaf(logit, scale, exponent));
        if (valid < 16 && pair + c >= valid) logit = 0.0f;
        gradient = logit * (gradient - (kKeys ? delta[c] : row_delta[tile][half]));
        if constexpr (kBias) bias_sum[tile][half] = fmaf(gradient, counted[c], bias_sum[tile][half]);
      }
    }
  }

  // Columns begin .. begin + kColumns of the sequence, which lie in `stage`.
  __device__ __forceinline__ void use_stage(int stage, int begin) {
    const auto streamed_first = Memory::streamed(stage, 0), streamed_second = Memory::streamed(stage, 1);
    const int valid = p.qkv.length - begin;
#pragma unroll 1
    for (int column = 0; column < kColumns && column < valid; column += 16) {
      float logits[kRowTiles][2][4], dp[kRowTiles][2][4];
      zero(logits);
      zero(dp);
      multiply_own<Sizes::kFirstSteps>(logits, own_first, Memory::own(0), streamed_first, column);
      multiply_own<Sizes::kSecondSteps>(dp, own_second, Memory::own(1), streamed_second, column);
      weigh(logits, dp, stage, column, valid - column);
      unsigned weights[kRowTiles][4];
      if constexpr (kKeys) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile)
          accumulators_to_a<T>(weights[tile], logits[tile][0], logits[tile][1]);
        multiply_streamed(second_sum, weights, streamed_second, column);
      }
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) accumulators_to_a<T>(weights[tile], dp[tile][0], dp[tile][1]);
      multiply_streamed(first_sum, weights, streamed_first, column);
    }
  }

  __device__ __forceinline__ void loop() {
    const int length = p.qkv.length;
    int stage = 0;
#pragma unroll 1
    for (int begin = 0; begin < length; begin += kColumns) {
      const bool more = length - begin > kColumns;
      if (more) copy_stage(1 - stage, begin + kColumns);
      use_stage(stage, begin);
      if (!more) break;
      simt::copy_async_wait_all();
      simt::block_barrier();
      stage = 1 - stage;
    }
  }

  // A gradient of the warp's rows: through the rows' place in shared memory, so that whole rows are written.
  __device__ __forceinline__ void store(const float (&sum)[kRowTiles][2 * kSteps][4], float factor,
                                        const SharedTile<T, kWidth>& through, int part) const {
    const int lane = simt::lane_index();
#pragma unroll
    for (int i = 0; i < kRowTiles * 2 * kSteps * 2; ++i) {
      const int tile = i / (4 * kSteps), chunk = i / 2 % (2 * kSteps), half = i % 2;
      const float* two = sum[tile][chunk] + 2 * half;
      through.at(warp_row() + 16 * tile + 8 * half, lane / 4, chunk)
          .template store_as<unsigned>(lane % 4 * 2, pack_pair<T>(two[0] * factor, two[1] * factor));
    }
    simt::warp_barrier();
    const QkvStrides& strides = p.params.grad_qkv_strides;
    T* out = static_cast<T*>(p.params.grad_qkv) +
             sequence_offset(p.params.grid, p.params.axis, strides.tokens, place.sequence) + part * strides.part +
             place.head * strides.head;
    constexpr int kChunks = kWidth / kChunk;
#pragma unroll 2
    for (int i = lane; i < Sizes::kWarpRows * kChunks; i += simt::kWarpSize) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int index = place.tile * Sizes::kRows + warp_row() + row;
      if (index >= p.grad_qkv.length) break;
      simt::store_global(reinterpret_cast<uint4*>(out + p.grad_qkv.offset(index) + chunk * kChunk),
                         through.at(warp_row(), row, chunk).template load_as<uint4>());
    }
  }

  // The gradient of each owned row's bias or gate: the sums of the four lanes that share a row.
  __device__ __forceinline__ void store_bias_sums() const {
    float* out = kKeys ? p.params.grad_key_bias : p.params.grad_row_gate;
    if (out == nullptr) return;
    out += place.head * token_count(p.params.grid) + first_float();
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float sum = bias_sum[i / 2][i % 2];
      sum += simt::shuffle_xor(sum, 1);
      sum += simt::shuffle_xor(sum, 2);
      const int index = index_of_row(i / 2, i % 2);
      if (simt::lane_index() % 4 == 0 && index < p.floats.length) simt::store_global(out + p.floats.offset(index), sum);
    }
  }

  __device__ __forceinline__ void run() {
    begin();
    loop();
    simt::warp_barrier();  // the warp's own rows are read for the last time
    store(first_sum, p.params.scale, Memory::own(0), kKeys ? 1 : 0);
    if constexpr (kKeys) store(second_sum, 1.0f, Memory::own(1), 2);
    if constexpr (kBias) store_bias_sums();
  }
};

template <typename T, int kWidth, bool kBias>
__global__ void __launch_bounds__(BackwardTiles<kWidth, BackwardPass::keys>::kThreads,
                                  BackwardTiles<kWidth, BackwardPass::keys>::kBlocksPerMultiprocessor)
    alternating_attention_backward_keys_kernel(const __grid_constant__ AttentionBackwardLaunch p) {
  BackwardBlock<T, kWidth, BackwardPass::keys, kBias>(p).run();
}

template <typename T, int kWidth, bool kBias>
__global__ void __launch_bounds__(BackwardTiles<kWidth, BackwardPass::queries>::kThreads,
                                  BackwardTiles<kWidth, BackwardPass::queries>::kBlocksPerMultiprocessor)
    alternating_attention_backward_queries_kernel(const __grid_constant__ AttentionBackwardLaunch p) {
  BackwardBlock<T, kWidth, BackwardPass::queries, kBias>(p).run();
}

}  // namespace vggt_mv
