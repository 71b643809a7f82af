#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/qk_norm_rope.cuh"
#include "cuda/qk_norm_rope.h"
#include "cuda/qk_norm_rope_types.cuh"

namespace vggt_mv {

cudaError_t launch_qk_norm_rope(const QkNormRopeParams& params, cudaStream_t stream) {
  return with_qk_norm_rope_types(params.dtype, params.norm_dtype, params.width, [&](auto t, auto norm, auto width) {
    using T = typename decltype(t)::type;
    using P = typename decltype(norm)::type;
    if (token_count(params.grid) == 0 || params.heads == 0) return cudaSuccess;
    if (!qkv_aligned<T>(params.qkv, params.qkv_strides) || !qkv_aligned<T>(params.out, params.out_strides) ||
        !vectors_aligned({params.q_weight, params.q_bias, params.k_weight, params.k_bias, params.cos_sin})) {
      return cudaErrorMisalignedAddress;
    }
    const int64_t frames = std::min(frame_count(params.grid), int64_t{65535});
    const int blocks = (params.grid.tokens + kQkNormRopeWarps - 1) / kQkNormRopeWarps;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(frames));
    return simt::launch(qk_norm_rope_kernel<T, P, decltype(width)::value>, grid, 32 * kQkNormRopeWarps, 0, stream,
                        params);
  });
}

cudaError_t launch_qk_norm_rope_backward(const QkNormRopeBackwardParams& params, cudaStream_t stream) {
  const cudaError_t status =
      with_qk_norm_rope_types(params.dtype, params.norm_dtype, params.width, [&](auto t, auto norm, auto width) {
        using T = typename decltype(t)::type;
        using P = typename decltype(norm)::type;
        using Layout = RopeLayout<T, decltype(width)::value>;
        const bool nothing = token_count(params.grid) == 0 || params.heads == 0;
        if (nothing && params.partial_sums == nullptr) return cudaSuccess;
        if (!qkv_aligned<T>(params.grad_out, params.grad_out_strides) ||
            !qkv_aligned<T>(params.qkv, params.qkv_strides) ||
            !qkv_aligned<T>(params.grad_qkv, params.grad_qkv_strides) ||
            !vectors_aligned({params.q_weight, params.k_weight, params.cos_sin})) {
          return cudaErrorMisalignedAddress;
        }
        constexpr int kPartials = kQkNormRopeWarps * Layout::kRows * 2 * decltype(width)::value;
        const std::size_t shared_bytes = params.partial_sums == nullptr ? 0 : kPartials * sizeof(float);
        const unsigned parts = params.grad_qkv == params.grad_out ? 2 : 3;
        return simt::launch(qk_norm_rope_backward_kernel<T, P, decltype(width)::value>,
                            dim3(static_cast<unsigned>(params.blocks), parts), 32 * kQkNormRopeWarps, shared_bytes,
                            stream, params);
      });
  if (status != cudaSuccess || params.partial_sums == nullptr) return status;
  return launch_column_sums({params.partial_sums, params.grad_norms, 2, params.blocks, 2 * params.width}, stream);
}

cudaError_t qk_norm_rope_blocks(const TokenGrid& grid, int* blocks) {
  int multiprocessors = 0;
  const cudaError_t status = simt::multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  // Three parts run side by side; at least eight tokens for each warp, so that the partial sums are little beside them.
  *blocks = static_cast<int>(
      std::clamp(token_count(grid) / (8 * kQkNormRopeWarps), int64_t{1}, int64_t{multiprocessors} * 2));
  return cudaSuccess;
}

}  // namespace vggt_mv
