#include <cmath>
#include <limits>

#include "cuda/dual_stream_attention.cuh"
#include "cuda/dual_stream_attention.h"

namespace vggt_mv {

namespace {

// Room for the end of a tile beyond the end of a sequence, in 31 bits.
constexpr int64_t kLongestSequence = std::numeric_limits<int>::max() - 1024;

template <typename T, bool kShared, int kWidth>
cudaError_t launch_streams(DualStreamAttentionLaunch launch, cudaStream_t stream) {
  using Tiling = DualStreamTiling<kShared, kWidth>;
  const int64_t row_blocks = (int64_t{launch.out_layout.length} + Tiling::kRows - 1) / Tiling::kRows;
  const int64_t stream_blocks = row_blocks * launch.heads * sequence_count(launch.grid, launch.axis);
  const int64_t blocks = (kShared ? 1 : 2) * stream_blocks;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  launch.row_blocks = static_cast<int>(row_blocks);
  launch.stream_blocks = static_cast<int>(stream_blocks);
  const bool mask = launch.mask != nullptr;
  const auto kernel = mask ? dual_stream_attention_kernel<T, kShared, kWidth, true>
                           : dual_stream_attention_kernel<T, kShared, kWidth, false>;
  return simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), Tiling::kThreads,
                      static_cast<std::size_t>(Tiling::shared_bytes(mask)), stream, launch);
}

}  // namespace

cudaError_t launch_dual_stream_attention(const DualStreamAttentionParams& params, cudaStream_t stream) {
  return with_attention_types(params.dtype, params.width, [&](auto t, auto width) {
    using T = typename decltype(t)::type;
    constexpr int kWidth = decltype(width)::value;
    const bool shared = params.qkv_geo == nullptr;
    if (token_count(params.grid) == 0 || params.heads == 0) return cudaSuccess;
    if (!(params.scale > 0.0f) || std::isinf(params.scale) ||
        (params.mask != nullptr && (params.lambda_pose == nullptr || params.lambda_geo == nullptr)) ||
        sequence_length(params.grid, params.axis) > kLongestSequence) {
      return cudaErrorInvalidValue;
    }
    if (!attention_rows_aligned<T>(params.qkv_pose, params.grid, params.pose_strides) ||
        (!shared && !attention_rows_aligned<T>(params.qkv_geo, params.grid, params.geo_strides)) ||
        !rows_aligned<T>(params.pose, kChunk, 16) || !rows_aligned<T>(params.geo, kChunk, 16)) {
      return cudaErrorMisalignedAddress;
    }
    const auto layout = [&](const TokenStrides& strides) { return sequence_layout(params.grid, params.axis, strides); };
    const float inverse_scale = 1.0f / params.scale;
    DualStreamAttentionLaunch launch{};
    launch.streams[0] = {
        params.qkv_pose,     params.pose,   params.lse_pose, params.lambda_pose, layout(params.pose_strides.tokens),
        params.pose_strides, -inverse_scale};
    launch.streams[1] = {
        params.qkv_geo,     params.geo,   params.lse_geo, params.lambda_geo, layout(params.geo_strides.tokens),
        params.geo_strides, inverse_scale};
    launch.mask = params.mask;
    launch.grid = params.grid;
    launch.axis = params.axis;
    launch.out_strides = contiguous_strides(params.grid, int64_t{params.heads} * kWidth);
    launch.mask_strides = contiguous_strides(params.grid, 1);
    launch.out_layout = layout(launch.out_strides);
    launch.mask_layout = layout(launch.mask_strides);
    launch.heads = params.heads;
    launch.scale_log2 = params.scale * 1.4426950408889634f;
    if constexpr (kSharesProducts<kWidth>) {
      if (shared) return launch_streams<T, true, kWidth>(launch, stream);
    }
    if (shared) {
      launch.streams[1].qkv = params.qkv_pose;
      launch.streams[1].layout = launch.streams[0].layout;
      launch.streams[1].strides = params.pose_strides;
    }
    return launch_streams<T, false, kWidth>(launch, stream);
  });
}

}  // namespace vggt_mv
