// The combinations of dtypes that residual_scale_norm has kernels for.
#pragma once

#include "core/dtype.h"
#include "cuda/arch/numeric.cuh"

namespace vggt_mv {

// Calls run(Type<X>, Type<Y>, Type<P>) for the C++ types of the dtypes of (x, y, parameters).
template <typename Run>
cudaError_t with_residual_scale_norm_types(DType x, DType y, DType parameters, Run&& run) {
  using F32 = Type<float>;
  using F16 = Type<__half>;
  using BF16 = Type<__nv_bfloat16>;
  const bool full_parameters = parameters == DType::f32;
  if (x == DType::f32 && full_parameters) {
    if (y == DType::f32) return run(F32{}, F32{}, F32{});
    if (y == DType::f16) return run(F32{}, F16{}, F32{});
    if (y == DType::bf16) return run(F32{}, BF16{}, F32{});
  }
  if (x == y && (full_parameters || parameters == x)) {
    if (x == DType::f16) return full_parameters ? run(F16{}, F16{}, F32{}) : run(F16{}, F16{}, F16{});
    if (x == DType::bf16) return full_parameters ? run(BF16{}, BF16{}, F32{}) : run(BF16{}, BF16{}, BF16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace vggt_mv
