#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/residual_scale_norm.h"
#include "cuda/residual_scale_norm_backward.cuh"
#include "cuda/residual_scale_norm_types.cuh"

namespace vggt_mv {

namespace {

int threads_for(int features, int features_per_thread) {
  return ((features + features_per_thread - 1) / features_per_thread + 31) / 32 * 32;
}

std::size_t shared_bytes_for(int threads) { return static_cast<std::size_t>(threads / 32) * 4 * sizeof(float); }

template <typename X, typename Y, typename P, int kVector, int kChunks>
cudaError_t launch_columns(const ResidualScaleNormBackwardParams& p, cudaStream_t stream) {
  const int threads = threads_for(p.features, kVector * kChunks);
  return simt::launch(residual_scale_norm_backward_kernel<X, Y, P, kVector, kChunks>,
                      dim3(static_cast<unsigned>(p.row_blocks)), threads, shared_bytes_for(threads), stream, p);
}

template <typename X, typename Y, typename P>
cudaError_t launch_stage_one(const ResidualScaleNormBackwardParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Y));
  const bool aligned = p.features % kVector == 0 && rows_aligned<X>(p.grad_residual, kVector, 16) &&
                       rows_aligned<Y>(p.grad_normed, kVector, 16) && rows_aligned<X>(p.residual, kVector, 16) &&
                       rows_aligned<Y>(p.y, p.y_row_stride, 16) && rows_aligned<P>(p.gamma, kVector, 16) &&
                       rows_aligned<P>(p.weight, kVector, 16) && rows_aligned<X>(p.grad_x, kVector, 16) &&
                       rows_aligned<Y>(p.grad_y, kVector, 16) && rows_aligned<float>(p.partial_sums, kVector, 16);
  constexpr int kColumns = 8;  // of a thread
  if (p.features <= kColumns * kResidualScaleNormBackwardThreads) {
    return aligned ? launch_columns<X, Y, P, kVector, kColumns / kVector>(p, stream)
                   : launch_columns<X, Y, P, 1, kColumns>(p, stream);
  }
  constexpr int kThreads = kResidualScaleNormBackwardThreads;
  return simt::launch(residual_scale_norm_backward_loop_kernel<X, Y, P>, dim3(static_cast<unsigned>(p.row_blocks)),
                      kThreads, shared_bytes_for(kThreads), stream, p);
}

}  // namespace

cudaError_t launch_residual_scale_norm_backward(const ResidualScaleNormBackwardParams& params, cudaStream_t stream) {
  const cudaError_t status = with_residual_scale_norm_types(
      params.x_dtype, params.y_dtype, params.param_dtype, [&](auto x, auto y, auto parameter) {
        // Without rows the sums over rows are still wanted: zeros.
        if (params.features == 0 || (params.rows == 0 && params.partial_sums == nullptr)) return cudaSuccess;
        return launch_stage_one<typename decltype(x)::type, typename decltype(y)::type,
                                typename decltype(parameter)::type>(params, stream);
      });
  if (status != cudaSuccess || params.features == 0 || params.partial_sums == nullptr) return status;
  return launch_column_sums({params.partial_sums, params.grad_parameters, 1, params.row_blocks, 3 * params.features},
                            stream);
}

cudaError_t residual_scale_norm_row_blocks(int64_t rows, int features, int* row_blocks) {
  int multiprocessors = 0;
  const cudaError_t status = simt::multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  // Half of a multiprocessor's threads, and at least eight rows for each [3, C] of partial sums.
  const int threads = std::min(threads_for(std::max(features, 1), 8), 512);
  const int64_t resident = int64_t{multiprocessors} * std::max(1024 / threads, 1);
  *row_blocks = static_cast<int>(std::clamp(rows / 8, int64_t{1}, resident));
  return cudaSuccess;
}

}  // namespace vggt_mv
