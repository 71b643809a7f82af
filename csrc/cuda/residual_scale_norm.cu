#include <algorithm>

#include "cuda/residual_scale_norm.cuh"
#include "cuda/residual_scale_norm.h"
#include "cuda/residual_scale_norm_types.cuh"

namespace vggt_mv {

namespace {

// Enough waves that the last one, partly filled, does not count; a bound on the grid for tensors of billions of rows.
constexpr int kBlocksPerMultiprocessor = 64;

cudaError_t grid_for(int64_t blocks, dim3* grid) {
  int multiprocessors = 0;
  const cudaError_t status = simt::multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  *grid = dim3(static_cast<unsigned>(std::min(blocks, int64_t{multiprocessors} * kBlocksPerMultiprocessor)));
  return cudaSuccess;
}

template <typename X, typename Y, typename P, int kVector, int kChunks, int kWarps>
cudaError_t launch_group(const ResidualScaleNormParams& p, cudaStream_t stream) {
  constexpr int kRows = kWarps == 1 ? kResidualScaleNormRowsPerBlock : 1;
  dim3 grid;
  const cudaError_t status = grid_for((p.rows + kRows - 1) / kRows, &grid);
  if (status != cudaSuccess) return status;
  const std::size_t shared_bytes = kWarps == 1 ? 0 : 2 * kWarps * sizeof(float);
  return simt::launch(residual_scale_norm_kernel<X, Y, P, kVector, kChunks, kWarps>, grid, 32 * kWarps * kRows,
                      shared_bytes, stream, p);
}

template <typename X, typename Y, typename P>
cudaError_t launch_loop(const ResidualScaleNormParams& p, cudaStream_t stream) {
  dim3 grid;
  const cudaError_t status = grid_for(p.rows, &grid);
  if (status != cudaSuccess) return status;
  return simt::launch(residual_scale_norm_loop_kernel<X, Y, P>, grid, 32 * kResidualScaleNormLoopWarps,
                      2 * kResidualScaleNormLoopWarps * sizeof(float), stream, p);
}

template <typename X, typename Y, typename P>
cudaError_t launch_typed(const ResidualScaleNormParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Y));
  const bool aligned = p.features % kVector == 0 && rows_aligned<X>(p.x, p.x_row_stride, 16) &&
                       rows_aligned<Y>(p.y, p.y_row_stride, 16) && rows_aligned<X>(p.residual, kVector, 16) &&
                       rows_aligned<Y>(p.normed, kVector, 16) && rows_aligned<P>(p.gamma, kVector, 16) &&
                       rows_aligned<P>(p.weight, kVector, 16) && rows_aligned<P>(p.bias, kVector, 16);
  if (aligned) {
    if (p.features <= 32 * kVector * 4) return launch_group<X, Y, P, kVector, 4, 1>(p, stream);
    if (p.features <= 128 * kVector * 4) return launch_group<X, Y, P, kVector, 4, 4>(p, stream);
    if (p.features <= 256 * kVector * 4) return launch_group<X, Y, P, kVector, 4, 8>(p, stream);
  } else {
    if (p.features <= 32 * 16) return launch_group<X, Y, P, 1, 16, 1>(p, stream);
    if (p.features <= 256 * 16) return launch_group<X, Y, P, 1, 16, 8>(p, stream);
  }
  return launch_loop<X, Y, P>(p, stream);
}

}  // namespace

cudaError_t launch_residual_scale_norm(const ResidualScaleNormParams& params, cudaStream_t stream) {
  return with_residual_scale_norm_types(
      params.x_dtype, params.y_dtype, params.param_dtype, [&](auto x, auto y, auto parameter) {
        if (params.rows == 0 || params.features == 0) return cudaSuccess;
        return launch_typed<typename decltype(x)::type, typename decltype(y)::type, typename decltype(parameter)::type>(
            params, stream);
      });
}

}  // namespace vggt_mv
