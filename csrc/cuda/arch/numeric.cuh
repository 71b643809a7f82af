// Number formats in registers: vectors of T in global memory on one side, floats on the other.
#pragma once

#include <cstring>

#include "core/dtype.h"
#include "cuda/arch/simt.cuh"

namespace vggt_mv {

// The unsigned integer or vector of them that is kBytes wide: what one access moves.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

// kCount elements of T as they lie in memory, moved by accesses of at most 16 bytes.
template <typename T, int kCount>
struct Packed {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  static constexpr int kAccessBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kAccesses = kBytes / kAccessBytes;
  using Bits = typename BitsOf<kAccessBytes>::type;

  Bits bits[kAccesses];
};

// Reads data that this launch does not write; `Once`: and that nobody reads again.
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* address) {
  Packed<T, kCount> packed;
#pragma unroll
  for (int i = 0; i < Packed<T, kCount>::kAccesses; ++i) {
    packed.bits[i] = simt::load_global(reinterpret_cast<const typename Packed<T, kCount>::Bits*>(address) + i);
  }
  return packed;
}
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed_once(const T* address) {
  Packed<T, kCount> packed;
#pragma unroll
  for (int i = 0; i < Packed<T, kCount>::kAccesses; ++i) {
    packed.bits[i] = simt::load_global_once(reinterpret_cast<const typename Packed<T, kCount>::Bits*>(address) + i);
  }
  return packed;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_packed(T* address, const Packed<T, kCount>& packed) {
#pragma unroll
  for (int i = 0; i < Packed<T, kCount>::kAccesses; ++i) {
    simt::store_global(reinterpret_cast<typename Packed<T, kCount>::Bits*>(address) + i, packed.bits[i]);
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Two neighbours at once, rounded to nearest even: one instruction where the hardware has it.
__device__ __forceinline__ void from_floats(float low, float high, float (&pair)[2]) {
  pair[0] = low;
  pair[1] = high;
}
__device__ __forceinline__ void from_floats(float low, float high, __half (&pair)[2]) {
  const __half2 both = __floats2half2_rn(low, high);
  pair[0] = both.x;
  pair[1] = both.y;
}
__device__ __forceinline__ void from_floats(float low, float high, __nv_bfloat16 (&pair)[2]) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  pair[0] = both.x;
  pair[1] = both.y;
}

template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Packed<T, kCount>& packed, float (&values)[kCount]) {
  T elements[kCount];
  memcpy(static_cast<void*>(elements), packed.bits, sizeof(elements));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(elements[i]);
}

template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> pack(const float (&values)[kCount]) {
  T elements[kCount];
#pragma unroll
  for (int i = 0; i + 1 < kCount; i += 2) {
    T pair[2];
    from_floats(values[i], values[i + 1], pair);
    elements[i] = pair[0];
    elements[i + 1] = pair[1];
  }
  if constexpr (kCount % 2 == 1) {
    T pair[2];
    from_floats(values[kCount - 1], 0.0f, pair);
    elements[kCount - 1] = pair[0];
  }
  Packed<T, kCount> packed;
  memcpy(packed.bits, static_cast<const void*>(elements), sizeof(elements));
  return packed;
}

// Names a type to a generic lambda.
template <typename T>
struct Type {
  using type = T;
};

// Whether `address` and every row `stride` elements further are multiples of `bytes`.
template <typename T>
bool rows_aligned(const void* address, int64_t stride, int bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(bytes) == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % bytes == 0;
}

}  // namespace vggt_mv
