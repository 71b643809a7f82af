// The dtypes and head widths that qk_norm_rope has kernels for, and what its kernels ask of addresses.
#pragma once

#include <type_traits>

#include "core/qk_norm_rope.h"
#include "cuda/arch/numeric.cuh"

namespace vggt_mv {

// Calls run(Type<T>, Type<P>, width) with the C++ types of qkv and of the norm's parameters, the width a constant.
template <typename Run>
cudaError_t with_qk_norm_rope_types(DType dtype, DType norm_dtype, int width, Run&& run) {
  const auto with_width = [&](auto t, auto p) {
    switch (width) {
      case 32: return run(t, p, std::integral_constant<int, 32>{});
      case 64: return run(t, p, std::integral_constant<int, 64>{});
      case 96: return run(t, p, std::integral_constant<int, 96>{});
      case 128: return run(t, p, std::integral_constant<int, 128>{});
      default: return cudaErrorInvalidValue;
    }
  };
  const bool full = norm_dtype == DType::f32;
  if (dtype == DType::f32 && full) return with_width(Type<float>{}, Type<float>{});
  if (dtype == DType::f16 && full) return with_width(Type<__half>{}, Type<float>{});
  if (dtype == DType::bf16 && full) return with_width(Type<__nv_bfloat16>{}, Type<float>{});
  if (dtype == DType::f16 && norm_dtype == dtype) return with_width(Type<__half>{}, Type<__half>{});
  if (dtype == DType::bf16 && norm_dtype == dtype) return with_width(Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  return cudaErrorInvalidValue;
}

template <typename T>
bool qkv_aligned(const void* address, const QkvStrides& strides) {
  for (const int64_t stride : {strides.tokens.batch, strides.tokens.time, strides.tokens.view, strides.tokens.token,
                               strides.part, strides.head}) {
    if (!rows_aligned<T>(address, stride, 16)) return false;
  }
  return true;
}

inline bool vectors_aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (!rows_aligned<float>(address, 4, 16)) return false;
  }
  return true;
}

}  // namespace vggt_mv
