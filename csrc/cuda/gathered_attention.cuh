// out_i = sum_j softmax_j(scale q_i . k_j + key_bias_j) v_j and lse_i over gathered keys: see core/gathered_attention.h.
//
// Layout    qkv [B, T, N, P, 3, h, D] and memory_qkv [B, M, 3, h, D], any strides whose rows are 16-byte aligned; out,
//           key_bias and lists contiguous. Nothing is gathered in memory: rows are copied from where they lie.
// Mapping   As attention_forward.cuh has it. A block takes kRows queries of one head: of a batch element, or of one of
//           its frames where each frame has a list of its own. What a tile of keys is, depends on the source:
//             none            keys of the memory
//             all             keys of the memory, then, from a new tile on, those of all tokens
//             listed_tokens   kKeys places of the list: the one source whose rows each have an address of their own
//             listed_frames   keys of one frame of the list, so that rows are as in dense attention: a frame's last
//                             tile is not filled up from the next frame, and a place without a frame costs a barrier
// Chunks    A memory has few queries and all keys: too few blocks to fill a GPU, so blocks share the tiles of keys in
//           key_chunks chunks, each of which writes its own softmax's result, in float, and lse. A second kernel weighs
//           them by exp(lse), in the order of the chunks: the result is the same every time.
// Why       Listed keys: operations and bytes as in dense attention over as many keys. memory_write (32 queries for every
//           key) and memory_read (32 keys for every query): 32 operations a byte, bound by memory.
// Ends      What lies past the end of a tile's source is never read: zeros stand in for it, and its logits are -inf.
#pragma once

#include "core/gathered_attention.h"
#include "cuda/attention_forward.cuh"

namespace vggt_mv {

struct GatheredAttentionLaunch : GatheredAttentionParams {
  SequenceLayout query_layout;
  SequenceLayout out_layout;
  SequenceLayout scene_layout;  // all tokens of a batch element of qkv
  SequenceLayout frame_layout;  // the tokens of a frame of it
  SequenceLayout memory_layout;
  SequenceLayout bias_layout;  // neighbouring floats, as many as a tile may take
  FastDivisor frame_tiles;     // tiles of keys of a frame
  int frames;                  // T N where each frame has a list of its own, else 1
  int row_blocks;              // blocks that share the rows of a sequence
  int memory_tiles;
  int key_tiles;    // of a sequence, the memory's included
  int chunk_tiles;  // of a chunk; with one chunk, all
  float scale_log2;
  float inverse_scale;
};

// A memory has few rows, everything else many.
template <TokenKeys kSource, int kWidth>
using GatheredTiling = AttentionTiling<kWidth, kSource == TokenKeys::all ? 1 : 2>;

// A tile of keys: which of its source's keys is its first one, and how many there are from there on.
struct KeyTile {
  int first;
  int left;
  int frame;    // listed_frames: whose tokens they are
  bool memory;  // they are the memory's
};

template <TokenKeys kSource, int kKeys>
__device__ __forceinline__ KeyTile key_tile(const GatheredAttentionLaunch& p, const int64_t* list, int tile) {
  if constexpr (kSource == TokenKeys::listed_frames) {
    const int place = p.frame_tiles.quotient(tile);
    const int first = (tile - place * p.frame_tiles.divisor) * kKeys;
    const int frame = static_cast<int>(simt::load_global(list + place));
    return {first, frame < 0 ? 0 : p.grid.tokens - first, frame, false};
  } else if constexpr (kSource == TokenKeys::listed_tokens) {
    return {tile * kKeys, p.list_length - tile * kKeys, 0, false};
  } else {
    const bool memory = kSource == TokenKeys::none || tile < p.memory_tiles;
    const int first = (memory ? tile : tile - p.memory_tiles) * kKeys;
    return {first, (memory ? p.memory_tokens : p.scene_layout.length) - first, 0, memory};
  }
}

// copy_tiles_async and copy_floats_async for rows that a list names: places first .. first + kRows of the list, of which
// `left` exist. `floats` may be null.
template <int kRows, int kThreads, typename T, int kWidth, int kTiles>
__device__ __forceinline__ void copy_listed_tiles_async(const SharedTile<T, kWidth> (&tiles)[kTiles],
                                                        const T* const (&sequences)[kTiles],
                                                        const SequenceLayout& layout, const int64_t* places, int left) {
  using Tile = SharedTile<T, kWidth>;
  constexpr int kSpan = Tile::kWholeLines ? 8 : 4;
  constexpr int kRowStep = kThreads / kSpan;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0, "the swizzle of a thread's rows is the same");
  constexpr int kSteps = kRows / kRowStep;
  const int row = simt::thread_index() / kSpan;
  const int column = simt::thread_index() % kSpan;
  int numbers[kSteps];  // all at once, so that the latency of the list is waited for once
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int place = step * kRowStep + row;
    numbers[step] = place < left ? static_cast<int>(simt::load_global(places + place)) : 0;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t offset = layout.offset(numbers[step]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kSpan) {
        simt::copy_async<16>(tiles[i].at(step * kRowStep, row, chunk + column),
                             sequences[i] + offset + (chunk + column) * kChunk, step * kRowStep + row < left);
      }
    }
  }
}
template <int kCount, int kThreads>
__device__ __forceinline__ void copy_listed_floats_async(simt::Shared<float> floats, const float* sequence,
                                                         const int64_t* places, int left) {
#pragma unroll
  for (int step = 0; step < (kCount + kThreads - 1) / kThreads; ++step) {
    const int i = step * kThreads + simt::thread_index();
    if (i >= kCount) break;
    simt::copy_async<4>(floats + i, sequence + (i < left ? simt::load_global(places + i) : 0), i < left);
  }
}

// A chunk's results, divided by their sums, in float: partial_out and partial_lse are those of the head's first query.
template <typename Tiling>
__device__ __forceinline__ void store_partial(float (&result)[Tiling::kRowTiles][Tiling::kWidth / 8][4],
                                              const RowStatistics<Tiling::kRowTiles>& rows, float* partial_out,
                                              float* partial_lse, int first_of_block, int count) {
  const int lane = simt::lane_index();
#pragma unroll
  for (int m = 0; m < Tiling::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.whole_sum(m, half);
      const float inverse = simt::reciprocal(sum);
      const int row = first_of_block + 16 * (Tiling::kRowTiles * simt::warp_index() + m) + 8 * half + lane / 4;
      if (row >= count) continue;
      float* to = partial_out + int64_t{row} * Tiling::kWidth + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Tiling::kWidth / 8; ++n) {
        simt::store_global(reinterpret_cast<float2*>(to + 8 * n),
                           float2{result[m][n][2 * half] * inverse, result[m][n][2 * half + 1] * inverse});
      }
      if (lane % 4 == 0) simt::store_global(partial_lse + row, rows.log_sum(m, half, sum));
    }
  }
}

template <typename T, TokenKeys kSource, int kWidth, bool kBias>
__global__ void __launch_bounds__(GatheredTiling<kSource, kWidth>::kThreads, GatheredTiling<kSource, kWidth>::kBlocks)
    gathered_attention_kernel(const __grid_constant__ GatheredAttentionLaunch p) {
  using Tiling = GatheredTiling<kSource, kWidth>;
  using Tiles = ForwardTiles<T, Tiling>;
  constexpr int kKeys = Tiling::kKeys;
  constexpr int kThreads = Tiling::kThreads;
  constexpr bool kMemoryAsks = kSource == TokenKeys::all;

  int index = simt::block_index_x();
  const int first_row = index % p.row_blocks * Tiling::kRows;
  index /= p.row_blocks;
  int chunk = 0;
  if constexpr (kMemoryAsks) {
    chunk = index % p.key_chunks;
    index /= p.key_chunks;
  }
  const int head = index % p.heads;
  index /= p.heads;
  const int frame = kSource == TokenKeys::listed_frames ? index % p.frames : 0;
  const int batch = kSource == TokenKeys::listed_frames ? index / p.frames : index;

  const int64_t head_offset = head * p.qkv_strides.head;
  const T* scene = static_cast<const T*>(p.qkv) + batch * p.qkv_strides.tokens.batch + head_offset;
  const T* memory = nullptr;  // of the batch element and the head, as `scene`
  if constexpr (kSource == TokenKeys::none || kMemoryAsks) {
    memory = static_cast<const T*>(p.memory_qkv) + batch * p.memory_strides.batch + head * p.memory_strides.head;
  }
  const T* queries = kMemoryAsks ? memory : scene + p.scene_layout.offset(frame * p.grid.tokens);
  const float* biases = kBias ? p.key_bias + int64_t{batch} * p.scene_layout.length : nullptr;
  const int64_t* list = nullptr;
  if constexpr (kSource == TokenKeys::listed_tokens) list = p.listed + int64_t{batch} * p.list_length;
  if constexpr (kSource == TokenKeys::listed_frames) list = p.listed + int64_t{frame} * p.list_length;

  copy_tile_async<Tiling::kRows, kThreads>(Tiles::queries(), queries, p.query_layout, first_row);
  simt::copy_async_commit();
  const int first_tile = kMemoryAsks ? chunk * p.chunk_tiles : 0;
  const int last_tile = first_tile + p.chunk_tiles < p.key_tiles ? first_tile + p.chunk_tiles : p.key_tiles;
  RowStatistics<Tiling::kRowTiles> rows;
  float result[Tiling::kRowTiles][kWidth / 8][4] = {};
  attend<T, Tiling, kBias>(
      rows, result, last_tile - first_tile, p.scale_log2,
      [&](int tile, int stage) {
        const KeyTile keys = key_tile<kSource, kKeys>(p, list, first_tile + tile);
        const typename Tiles::Tile to[2] = {Tiles::keys(stage), Tiles::values(stage)};
        if constexpr (kSource == TokenKeys::listed_tokens) {
          const T* const from[2] = {scene + p.qkv_strides.part, scene + 2 * p.qkv_strides.part};
          copy_listed_tiles_async<kKeys, kThreads>(to, from, p.scene_layout, list + keys.first, keys.left);
          if constexpr (kBias) {
            copy_listed_floats_async<kKeys, kThreads>(Tiles::biases(stage), biases, list + keys.first, keys.left);
          }
        } else if (keys.memory) {
          const T* const from[2] = {memory + p.memory_strides.part, memory + 2 * p.memory_strides.part};
          copy_tiles_async<kKeys, kThreads>(to, from, p.memory_layout, keys.first);
          // Past the end of the layout: zeros.
          if constexpr (kBias)
            copy_floats_async<kKeys, kThreads>(Tiles::biases(stage), biases, p.bias_layout, p.bias_layout.length);
        } else if (keys.left > 0) {
          constexpr bool listed = kSource == TokenKeys::listed_frames;
          const int64_t first_token = listed ? int64_t{keys.frame} * p.grid.tokens : 0;
          const T* tokens = scene + (listed ? p.scene_layout.offset(keys.frame * p.grid.tokens) : 0);
          const T* const from[2] = {tokens + p.qkv_strides.part, tokens + 2 * p.qkv_strides.part};
          copy_tiles_async<kKeys, kThreads>(to, from, listed ? p.frame_layout : p.scene_layout, keys.first);
          if constexpr (kBias) {
            copy_floats_async<kKeys, kThreads>(Tiles::biases(stage), biases + first_token, p.bias_layout, keys.first);
          }
        }
      },
      [&](int tile) { return key_tile<kSource, kKeys>(p, list, first_tile + tile).left; },
      [&](int, int) { return p.inverse_scale; });

  const int count = p.query_layout.length;
  const int64_t first_query = (int64_t{batch} * p.heads + head) * p.frames * count + int64_t{frame} * count;
  if constexpr (kMemoryAsks) {
    if (p.key_chunks > 1) {
      const int64_t all = int64_t{p.grid.batch} * p.heads * count;
      float* partial_lse = p.partial + all * p.key_chunks * kWidth;
      store_partial<Tiling>(result, rows, p.partial + (chunk * all + first_query) * kWidth,
                            partial_lse + chunk * all + first_query, first_row, count);
      return;
    }
  }
  T* out = static_cast<T*>(p.out) + ((int64_t{batch} * p.frames + frame) * count * p.heads + head) * kWidth;
  float* lse = p.lse == nullptr ? nullptr : p.lse + first_query;
  store_result<T, Tiling>(p.out_layout, Tiles::queries(), result, rows, out, lse, first_row);
}

constexpr int kCombineThreads = 128;

// Weighs the results of a row's chunks by exp(lse). A thread takes kChunk features of a row, rows lie [B, h, M].
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCombineThreads)
    gathered_attention_combine_kernel(const __grid_constant__ GatheredAttentionLaunch p) {
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr float kLog2 = 0.6931471805599453f;
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  constexpr int kThreadsOfRow = kWidth / kChunk;
  const int64_t thread = int64_t{simt::block_index_x()} * kCombineThreads + simt::thread_index();
  const int64_t all = int64_t{p.grid.batch} * p.heads * p.memory_tokens;
  const int64_t row = thread / kThreadsOfRow;
  const int column = static_cast<int>(thread % kThreadsOfRow) * kChunk;
  if (row >= all) return;
  const float* partial_lse = p.partial + all * p.key_chunks * kWidth + row;
  const float* partial_out = p.partial + row * kWidth + column;

  float maximum = kMinusInfinity;
  for (int chunk = 0; chunk < p.key_chunks; ++chunk) {
    maximum = fmaxf(maximum, simt::load_global(partial_lse + chunk * all));
  }
  float sum = 0.0f;
  float values[kChunk] = {};
  for (int chunk = 0; chunk < p.key_chunks; ++chunk) {
    const float lse = simt::load_global(partial_lse + chunk * all);
    if (lse == kMinusInfinity) continue;  // nothing but keys that are shut out: its result is not a number
    const float weight = simt::exp2_approximate((lse - maximum) * kLog2E);
    sum += weight;
    float part[kChunk];
    unpack(load_packed<float, kChunk>(partial_out + chunk * all * kWidth), part);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = fmaf(weight, part[i], values[i]);
  }
  const float inverse = simt::reciprocal(sum);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] *= inverse;
  const int token = static_cast<int>(row % p.memory_tokens);
  const int64_t of_head = row / p.memory_tokens;  // number batch h + head
  const int64_t head = of_head % p.heads, batch = of_head / p.heads;
  T* out = static_cast<T*>(p.out) + ((batch * p.memory_tokens + token) * p.heads + head) * kWidth + column;
  store_packed(out, pack<T, kChunk>(values));
  if (p.lse != nullptr && column == 0) {
    simt::store_global(p.lse + row, maximum + simt::log2_approximate(sum) * kLog2);
  }
}

}  // namespace vggt_mv
