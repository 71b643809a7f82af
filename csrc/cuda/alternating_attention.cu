#include <cmath>
#include <limits>

#include "cuda/alternating_attention.cuh"
#include "cuda/alternating_attention.h"

namespace vggt_mv {

namespace {

// Room for the end of a tile beyond the end of a sequence, in 31 bits.
constexpr int64_t kLongestSequence = std::numeric_limits<int>::max() - 1024;

template <typename T, typename Tiling>
cudaError_t launch_tiling(AlternatingAttentionLaunch launch, cudaStream_t stream) {
  const int64_t row_blocks = (int64_t{launch.qkv_layout.length} + Tiling::kRows - 1) / Tiling::kRows;
  const int64_t blocks = row_blocks * launch.heads * sequence_count(launch.grid, launch.axis);
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  launch.row_blocks = static_cast<int>(row_blocks);
  const dim3 grid(static_cast<unsigned>(blocks));
  const auto kernel = launch.key_bias == nullptr ? alternating_attention_kernel<T, Tiling, false>
                                                 : alternating_attention_kernel<T, Tiling, true>;
  const auto shared_bytes = static_cast<std::size_t>(Tiling::shared_bytes(launch.key_bias != nullptr));
  return simt::launch(kernel, grid, Tiling::kThreads, shared_bytes, stream, launch);
}

template <typename T, int kWidth>
cudaError_t launch_width(const AlternatingAttentionLaunch& launch, cudaStream_t stream) {
  using Large = AttentionTiling<kWidth, 2>;
  int multiprocessors = 0;
  const cudaError_t status = simt::multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  const int64_t row_blocks = (int64_t{launch.qkv_layout.length} + Large::kRows - 1) / Large::kRows;
  const bool idle = row_blocks * launch.heads * sequence_count(launch.grid, launch.axis) < multiprocessors;
  return idle ? launch_tiling<T, AttentionTiling<kWidth, 1>>(launch, stream) : launch_tiling<T, Large>(launch, stream);
}

}  // namespace

cudaError_t launch_alternating_attention(const AlternatingAttentionParams& params, cudaStream_t stream) {
  return with_attention_types(params.dtype, params.width, [&](auto t, auto width) {
    using T = typename decltype(t)::type;
    constexpr int kWidth = decltype(width)::value;
    if (token_count(params.grid) == 0 || params.heads == 0) return cudaSuccess;
    if (!(params.scale > 0.0f) || std::isinf(params.scale) ||
        (params.row_gate != nullptr && params.key_bias == nullptr) ||
        sequence_length(params.grid, params.axis) > kLongestSequence) {
      return cudaErrorInvalidValue;
    }
    if (!attention_rows_aligned<T>(params.qkv, params.grid, params.qkv_strides) ||
        !rows_aligned<T>(params.out, kChunk, 16)) {
      return cudaErrorMisalignedAddress;
    }
    AlternatingAttentionLaunch launch{};
    static_cast<AlternatingAttentionParams&>(launch) = params;
    launch.out_strides = contiguous_strides(params.grid, int64_t{params.heads} * kWidth);
    launch.bias_strides = contiguous_strides(params.grid, 1);
    launch.qkv_layout = sequence_layout(params.grid, params.axis, params.qkv_strides.tokens);
    launch.out_layout = sequence_layout(params.grid, params.axis, launch.out_strides);
    launch.bias_layout = sequence_layout(params.grid, params.axis, launch.bias_strides);
    launch.gate_layout = sequence_layout(params.grid, params.axis, params.row_gate_strides);
    launch.scale_log2 = params.scale * 1.4426950408889634f;
    launch.inverse_scale = 1.0f / params.scale;
    return launch_width<T, kWidth>(launch, stream);
  });
}

}  // namespace vggt_mv
