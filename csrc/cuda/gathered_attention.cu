#include <cmath>
#include <limits>

#include "cuda/gathered_attention.cuh"
#include "cuda/gathered_attention.h"

namespace vggt_mv {

namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max();
// Room for the end of a tile beyond the last key, in 31 bits.
constexpr int64_t kLongest = kMost - 1024;
// Fewer tiles of keys are not worth a block of their own, and a partial result.
constexpr int kLeastChunkTiles = 4;

int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

int64_t tokens_of_scene(const TokenGrid& grid) { return sequence_length(grid, Axis::global); }

template <int kWidth>
int64_t tiles_of_memory_and_tokens(const TokenGrid& grid, int memory_tokens) {
  constexpr int kKeys = GatheredTiling<TokenKeys::all, kWidth>::kKeys;
  return divide_up(memory_tokens, kKeys) + divide_up(tokens_of_scene(grid), kKeys);
}

// Which arguments go together.
bool consistent(const GatheredAttentionParams& params) {
  const bool memory = params.memory_qkv != nullptr && params.memory_tokens > 0;
  const bool list = params.listed != nullptr && params.list_length > 0;
  if (params.key_chunks < 1 || (params.key_chunks > 1 && (params.partial == nullptr || !params.memory_queries))) {
    return false;
  }
  switch (params.token_keys) {
    case TokenKeys::none: return memory && !list && !params.memory_queries && params.key_bias == nullptr;
    case TokenKeys::all: return memory && !list && params.memory_queries;
    case TokenKeys::listed_tokens:
    case TokenKeys::listed_frames: return !memory && list && !params.memory_queries;
  }
  return false;
}

template <typename T>
bool rows_are_aligned(const GatheredAttentionParams& params) {
  if (!attention_rows_aligned<T>(params.qkv, params.grid, params.qkv_strides) ||
      !rows_aligned<T>(params.out, kChunk, 16) || !rows_aligned<float>(params.partial, 4, 16)) {
    return false;
  }
  if (params.memory_qkv == nullptr) return true;
  const MemoryStrides& strides = params.memory_strides;
  const QkvStrides as_qkv{{strides.batch, 0, 0, strides.token}, strides.part, strides.head};
  return attention_rows_aligned<T>(params.memory_qkv, {params.grid.batch, 1, 1, params.memory_tokens}, as_qkv);
}

SequenceLayout evenly_spaced(int length, int64_t stride) {
  return {fast_divisor(length), fast_divisor(1), stride, 0, 0, length};
}

template <typename T, TokenKeys kSource, int kWidth>
cudaError_t launch_source(GatheredAttentionLaunch launch, cudaStream_t stream) {
  using Tiling = GatheredTiling<kSource, kWidth>;
  const int64_t scene = tokens_of_scene(launch.grid);
  const int64_t frame_tiles = divide_up(launch.grid.tokens, Tiling::kKeys);
  int64_t key_tiles = divide_up(launch.memory_tokens, Tiling::kKeys);
  launch.memory_tiles = static_cast<int>(key_tiles);
  if (kSource == TokenKeys::all) key_tiles += divide_up(scene, Tiling::kKeys);
  if (kSource == TokenKeys::listed_tokens) key_tiles = divide_up(launch.list_length, Tiling::kKeys);
  if (kSource == TokenKeys::listed_frames) key_tiles = launch.list_length * frame_tiles;
  const int64_t chunk_tiles = divide_up(key_tiles, launch.key_chunks);
  const int64_t row_blocks = divide_up(launch.query_layout.length, Tiling::kRows);
  const int64_t heads = int64_t{launch.grid.batch} * launch.frames * launch.heads;
  const int64_t combine_blocks = divide_up(heads * launch.memory_tokens * (kWidth / kChunk), kCombineThreads);
  // A chunk without a tile would have nothing to say.
  if (key_tiles > kMost || (launch.key_chunks - 1) * chunk_tiles >= key_tiles ||
      heads > kMost / row_blocks / launch.key_chunks || combine_blocks > kMost) {
    return cudaErrorInvalidValue;
  }
  launch.frame_tiles = fast_divisor(static_cast<int>(frame_tiles));
  launch.key_tiles = static_cast<int>(key_tiles);
  launch.chunk_tiles = static_cast<int>(chunk_tiles);
  launch.row_blocks = static_cast<int>(row_blocks);
  const dim3 grid(static_cast<unsigned>(row_blocks * launch.key_chunks * heads));

  const bool bias = launch.key_bias != nullptr;
  auto kernel = gathered_attention_kernel<T, kSource, kWidth, false>;
  if constexpr (kSource != TokenKeys::none) {
    if (bias) kernel = gathered_attention_kernel<T, kSource, kWidth, true>;
  }
  const auto shared_bytes = static_cast<std::size_t>(Tiling::shared_bytes(bias));
  const cudaError_t status = simt::launch(kernel, grid, Tiling::kThreads, shared_bytes, stream, launch);
  if (status != cudaSuccess || launch.key_chunks == 1) return status;
  return simt::launch(gathered_attention_combine_kernel<T, kWidth>, dim3(static_cast<unsigned>(combine_blocks)),
                      kCombineThreads, 0, stream, launch);
}

template <typename T, int kWidth>
cudaError_t launch_width(const GatheredAttentionLaunch& launch, cudaStream_t stream) {
  switch (launch.token_keys) {
    case TokenKeys::none: return launch_source<T, TokenKeys::none, kWidth>(launch, stream);
    case TokenKeys::all: return launch_source<T, TokenKeys::all, kWidth>(launch, stream);
    case TokenKeys::listed_tokens: return launch_source<T, TokenKeys::listed_tokens, kWidth>(launch, stream);
    case TokenKeys::listed_frames: return launch_source<T, TokenKeys::listed_frames, kWidth>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

GatheredAttentionLaunch launch_of(const GatheredAttentionParams& params) {
  GatheredAttentionLaunch launch{};
  static_cast<GatheredAttentionParams&>(launch) = params;
  const bool each_frame = params.token_keys == TokenKeys::listed_frames;
  launch.frames = each_frame ? params.grid.times * params.grid.views : 1;
  launch.scene_layout = sequence_layout(params.grid, Axis::global, params.qkv_strides.tokens);
  launch.frame_layout = sequence_layout(params.grid, Axis::frame, params.qkv_strides.tokens);
  launch.memory_layout =
      evenly_spaced(params.memory_tokens == 0 ? 1 : params.memory_tokens, params.memory_strides.token);
  launch.query_layout = params.memory_queries ? launch.memory_layout
                        : each_frame          ? launch.frame_layout
                                              : launch.scene_layout;
  launch.out_layout = evenly_spaced(launch.query_layout.length, int64_t{params.heads} * params.width);
  launch.bias_layout = evenly_spaced(each_frame ? params.grid.tokens : launch.scene_layout.length, 1);
  launch.scale_log2 = params.scale * 1.4426950408889634f;
  launch.inverse_scale = 1.0f / params.scale;
  return launch;
}

}  // namespace

cudaError_t launch_gathered_attention(const GatheredAttentionParams& params, cudaStream_t stream) {
  return with_attention_types(params.dtype, params.width, [&](auto t, auto width) {
    using T = typename decltype(t)::type;
    constexpr int kWidth = decltype(width)::value;
    if (params.grid.batch == 0 || params.heads == 0) return cudaSuccess;
    if (!consistent(params) || !(params.scale > 0.0f) || std::isinf(params.scale)) return cudaErrorInvalidValue;
    if (token_count(params.grid) == 0) return params.memory_queries ? cudaErrorInvalidValue : cudaSuccess;
    if (tokens_of_scene(params.grid) > kLongest || params.memory_tokens > kLongest || params.list_length > kLongest) {
      return cudaErrorInvalidValue;
    }
    if (!rows_are_aligned<T>(params)) return cudaErrorMisalignedAddress;
    return launch_width<T, kWidth>(launch_of(params), stream);
  });
}

cudaError_t gathered_attention_key_chunks(const TokenGrid& grid, int memory_tokens, int heads, int width,
                                          int* key_chunks) {
  int multiprocessors = 0;
  const cudaError_t status = simt::multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  return with_attention_types(DType::f16, width, [&](auto, auto width_of) {
    constexpr int kWidth = decltype(width_of)::value;
    using Tiling = GatheredTiling<TokenKeys::all, kWidth>;
    const int64_t tiles = tiles_of_memory_and_tokens<kWidth>(grid, memory_tokens);
    const int64_t blocks = divide_up(memory_tokens, Tiling::kRows) * heads * grid.batch;
    *key_chunks = 1;
    if (blocks == 0 || tiles == 0) return cudaSuccess;
    int64_t chunks = int64_t{Tiling::kBlocks} * multiprocessors / blocks;  // one wave of blocks
    if (chunks > tiles / kLeastChunkTiles) chunks = tiles / kLeastChunkTiles;
    // All chunks but the last are equally long: not more than have a tile then.
    if (chunks > 1) *key_chunks = static_cast<int>(divide_up(tiles, divide_up(tiles, chunks)));
    return cudaSuccess;
  });
}

}  // namespace vggt_mv
