// Two streams of attention whose logits differ in the sign and the weight of one mask: see core/dual_stream_attention.h.
//
// Layout    qkv_pose and qkv_geo [B, T, N, P, 3, h, D], any strides whose rows are 16-byte aligned; results and mask
//           contiguous. The lambdas are read from device memory by every block.
// Mapping   As attention_forward.cuh has it, -lambda_pose and lambda_geo being the gates of the mask. Streams with a qkv of
//           their own: the blocks of the pose stream, then those of the geometry stream, each as in
//           alternating_attention. Streams that share theirs: a warp takes 16 queries for both, so that q . k is
//           computed once, a fragment of V serves both results, and keys and values are copied once: 3 products of
//           matrices where two launches have 4.
// Ends      What lies past the end of a sequence is never read: zeros stand in for it, and its logits are -inf.
#pragma once

#include "core/dual_stream_attention.h"
#include "cuda/attention_forward.cuh"

namespace vggt_mv {

// What differs between the streams.
struct StreamLaunch {
  const void* qkv;
  void* out;
  float* lse;           // null: not wanted
  const float* lambda;  // null without a mask
  SequenceLayout layout;
  QkvStrides strides;
  float gate;  // of lambda times mask: the sign, over the scale
};

struct DualStreamAttentionLaunch {
  StreamLaunch streams[2];
  const float* mask;
  TokenGrid grid;
  Axis axis;
  SequenceLayout out_layout;
  SequenceLayout mask_layout;
  TokenStrides out_strides;
  TokenStrides mask_strides;
  int heads;
  int row_blocks;     // blocks that share the rows of a sequence
  int stream_blocks;  // blocks of a stream; with a shared qkv, of both
  float scale_log2;

  // Of the kernel's parameters, not of global memory. By index: a block that chose between two names would keep what it
  // chose in registers.
  __device__ __forceinline__ const StreamLaunch& stream(int number) const { return streams[number]; }
};

// At D = 128 two row tiles beside the choice of a stream are some registers more than there are on sm_90: one row tile, and
// streams that share their qkv are two streams.
template <int kWidth>
inline constexpr bool kSharesProducts = kWidth < 128;
template <bool kShared, int kWidth>
using DualStreamTiling = AttentionTiling<kWidth, kSharesProducts<kWidth> ? 2 : 1, kShared ? 2 : 1>;

// The warp's rows of a stream, to where the results of the sequence and the head lie.
template <typename T, typename Tiling>
__device__ __forceinline__ void store_stream(const DualStreamAttentionLaunch& p, const StreamLaunch& stream,
                                             float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4],
                                             RowStatistics<Tiling::kRowTiles>& rows, int sequence, int head,
                                             int first_row) {
  T* out =
      static_cast<T*>(stream.out) + sequence_offset(p.grid, p.axis, p.out_strides, sequence) + head * Tiling::kWidth;
  float* lse =
      stream.lse == nullptr ? nullptr : stream.lse + (int64_t{sequence} * p.heads + head) * p.out_layout.length;
  store_result<T, Tiling>(p.out_layout, ForwardTiles<T, Tiling>::queries(), result, rows, out, lse, first_row);
}

template <typename T, bool kShared, int kWidth, bool kMask>
__global__ void __launch_bounds__(DualStreamTiling<kShared, kWidth>::kThreads,
                                  DualStreamTiling<kShared, kWidth>::kBlocks)
    dual_stream_attention_kernel(const __grid_constant__ DualStreamAttentionLaunch p) {
  using Tiling = DualStreamTiling<kShared, kWidth>;
  using Tiles = ForwardTiles<T, Tiling>;
  constexpr int kKeys = Tiling::kKeys;
  constexpr int kThreads = Tiling::kThreads;
  static_assert(!kShared || Tiling::kRowTiles == 2, "a row tile for each stream");
  const int length = p.out_layout.length;

  const int number = !kShared && simt::block_index_x() >= p.stream_blocks ? 1 : 0;
  const int index = simt::block_index_x() - number * p.stream_blocks;
  const StreamLaunch& stream = p.stream(number);
  const int first_row = index % p.row_blocks * Tiling::kRows;
  const int head = index / p.row_blocks % p.heads;
  const int sequence = index / p.row_blocks / p.heads;
  const T* queries = static_cast<const T*>(stream.qkv) +
                     sequence_offset(p.grid, p.axis, stream.strides.tokens, sequence) + head * stream.strides.head;
  const T* keys = queries + stream.strides.part;

  const float* mask = nullptr;
  // In shared memory, since registers are short: of the block's stream, or of both.
  const auto gates = simt::dynamic_shared<float>(Tiling::kGateOffset);
  if constexpr (kMask) {
    mask = p.mask + sequence_offset(p.grid, p.axis, p.mask_strides, sequence);
    if (simt::thread_index() < Tiling::kStreams) {
      const StreamLaunch& gated = p.stream(number + simt::thread_index());
      gates.store(simt::thread_index(), simt::load_global(gated.lambda) * gated.gate);
    }
  }

  copy_tile_async<Tiling::kRows, kThreads>(Tiles::queries(), queries, stream.layout, first_row);
  simt::copy_async_commit();
  RowStatistics<Tiling::kRowTiles> rows;
  float result[Tiling::kRowTiles][kWidth / 8][4] = {};
  attend<T, Tiling, kMask>(
      rows, result, (length - 1) / kKeys + 1, p.scale_log2,
      [&](int tile, int stage) {
        const T* values = keys + stream.strides.part;
        copy_tiles_async<kKeys, kThreads>({Tiles::keys(stage), Tiles::values(stage)}, {keys, values}, stream.layout,
                                          tile * kKeys);
        if constexpr (kMask) {
          copy_floats_async<kKeys, kThreads>(Tiles::biases(stage), mask, p.mask_layout, tile * kKeys);
        }
      },
      [&](int tile) { return length - tile * kKeys; }, [&](int m, int) { return gates.load(kShared ? m : 0); });

  if constexpr (kShared) {
    // One stream after the other through the rows of shared memory that had the queries.
    using One = AttentionTiling<kWidth, 1>;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      RowStatistics<1> of_rows;
      float of_stream[1][kWidth / 8][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        of_rows.maximum[0][half] = rows.maximum[m][half];
        of_rows.sum[0][half] = rows.sum[m][half];
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of_stream[0][n][i] = result[m][n][i];
      }
      store_stream<T, One>(p, p.stream(m), of_stream, of_rows, sequence, head, first_row);
    }
  } else {
    store_stream<T, Tiling>(p, stream, result, rows, sequence, head, first_row);
  }
}

}  // namespace vggt_mv
