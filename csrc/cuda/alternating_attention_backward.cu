#include <limits>

#include "cuda/alternating_attention_backward.cuh"
#include "cuda/alternating_attention_backward.h"
#include "cuda/attention_tile.cuh"
#include "cuda/qk_norm_rope_types.cuh"

namespace vggt_mv {

namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max();

AttentionBackwardLaunch launch_of(const AlternatingAttentionBackwardParams& params) {
  AttentionBackwardLaunch launch{};
  launch.params = params;
  launch.out_strides = contiguous_strides(params.grid, int64_t{params.heads} * params.width);
  launch.float_strides = contiguous_strides(params.grid, 1);
  const auto layout = [&](const TokenStrides& strides) { return sequence_layout(params.grid, params.axis, strides); };
  launch.qkv = layout(params.qkv_strides.tokens);
  launch.grad_qkv = layout(params.grad_qkv_strides.tokens);
  launch.out = layout(launch.out_strides);
  launch.floats = layout(launch.float_strides);
  launch.row_gate = layout(params.row_gate_strides);
  return launch;
}

// One block for each tile of kRows tokens of every (sequence, head).
cudaError_t launch_tiles(void (*kernel)(AttentionBackwardLaunch), int rows, int threads, int shared_bytes,
                         AttentionBackwardLaunch launch, cudaStream_t stream) {
  const AlternatingAttentionBackwardParams& params = launch.params;
  launch.tiles = static_cast<int>((int64_t{launch.qkv.length} + rows - 1) / rows);
  const int64_t sequences = sequence_count(params.grid, params.axis);
  if (sequences > kMost / launch.tiles / params.heads) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(launch.tiles * sequences * params.heads));
  return simt::launch(kernel, grid, threads, static_cast<std::size_t>(shared_bytes), stream, launch);
}

template <typename T, int kWidth, bool kBias>
cudaError_t launch_passes(const AttentionBackwardLaunch& launch, cudaStream_t stream) {
  cudaError_t status = launch_tiles(alternating_attention_backward_delta_kernel<T, kWidth>, kBackwardDeltaTokens,
                                    kBackwardDeltaThreads, 0, launch, stream);
  if (status != cudaSuccess) return status;
  using Keys = BackwardShared<T, kWidth, BackwardPass::keys, kBias>;
  status = launch_tiles(alternating_attention_backward_keys_kernel<T, kWidth, kBias>, Keys::Sizes::kRows,
                        Keys::Sizes::kThreads, Keys::kBytes, launch, stream);
  if (status != cudaSuccess) return status;
  using Queries = BackwardShared<T, kWidth, BackwardPass::queries, kBias>;
  return launch_tiles(alternating_attention_backward_queries_kernel<T, kWidth, kBias>, Queries::Sizes::kRows,
                      Queries::Sizes::kThreads, Queries::kBytes, launch, stream);
}

}  // namespace

cudaError_t launch_alternating_attention_backward(const AlternatingAttentionBackwardParams& params,
                                                  cudaStream_t stream) {
  return with_attention_types(params.dtype, params.width, [&](auto t, auto width) {
    using T = typename decltype(t)::type;
    constexpr int kWidth = decltype(width)::value;
    const bool bias = params.key_bias != nullptr;
    if (!bias && (params.grad_key_bias != nullptr || params.grad_row_gate != nullptr)) return cudaErrorInvalidValue;
    if (token_count(params.grid) == 0 || params.heads == 0) return cudaSuccess;
    // The last tile may begin up to a tile below the length and is counted in int.
    if (sequence_length(params.grid, params.axis) > kMost - 256) return cudaErrorInvalidValue;
    if (!qkv_aligned<T>(params.qkv, params.qkv_strides) || !qkv_aligned<T>(params.grad_qkv, params.grad_qkv_strides) ||
        !rows_aligned<T>(params.grad_out, kWidth, 16) || !rows_aligned<T>(params.out, kWidth, 16)) {
      return cudaErrorMisalignedAddress;
    }
    const AttentionBackwardLaunch launch = launch_of(params);
    return bias ? launch_passes<T, kWidth, true>(launch, stream) : launch_passes<T, kWidth, false>(launch, stream);
  });
}

}  // namespace vggt_mv
