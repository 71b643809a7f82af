// Vectors of floats in the width of the instruction set that a file is compiled for, and loads and stores that widen
// from and round to the storage types.
//
// Built on the vector extensions of GCC and Clang, so that one source serves SSE, AVX2, AVX-512 and NEON; instructions
// are named only for what the extensions do not have (float16, bfloat16, the fused multiply-add) or what GCC makes badly
// of them. Everything here is in the namespace of one instruction set and inlined always: see cmake/InstructionSets.cmake for why that matters.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"
#include "core/status.h"

#if !defined(VGGT_MV_ISA)
#error "csrc/cpu/vector.h is for files that are compiled once for each instruction set"
#endif

#define VGGT_MV_INLINE inline __attribute__((always_inline))
#define VGGT_MV_INLINE_LAMBDA __attribute__((always_inline))

namespace vggt_mv::VGGT_MV_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVector __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));

// Storage types. The bits mean nothing to C++; only `load` and `store` know.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
// Two bfloat16 that follow each other in memory: what the dot product of pairs multiplies.
struct Bfloat16Pair {
  uint32_t bits;
};

// Calls run(T{}) with the storage type T of a dtype.
template <typename Run>
VGGT_MV_INLINE Status for_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::f16: return run(Half{});
    case DType::bf16: return run(Bfloat16{});
  }
  return Status::unsupported_dtypes;
}

// Asks for a row of `width` elements ahead of its use: where rows are far apart, a processor does not by itself.
template <typename T>
VGGT_MV_INLINE void prefetch_row(const T* row, int width) {
  constexpr int kCacheLine = 64 / sizeof(T);
  for (int d = 0; d < width; d += kCacheLine) __builtin_prefetch(row + d);
}

constexpr int features_in(float) { return 1; }
constexpr int features_in(Bfloat16Pair) { return 2; }

// Subtracting zero leaves every number alone and so costs nothing; adding it would turn -0 into 0.
VGGT_MV_INLINE Vector broadcast(float value) { return value - Vector{}; }

// a * b + c, rounded once where the instruction set can. The compiler fuses nothing by itself (-ffp-contract=off): the
// same product would come out rounded in one place and not in another, and their difference not zero.
VGGT_MV_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

VGGT_MV_INLINE BitVector bits_of(Vector v) { return (BitVector)v; }
VGGT_MV_INLINE Vector from_bits(BitVector v) { return (Vector)v; }

VGGT_MV_INLINE BitVector choose(IntVector condition, BitVector a, BitVector b) { return condition ? a : b; }

VGGT_MV_INLINE BitVector zero_extend(HalfBits v) {
#if defined(__AVX512F__)  // named, since GCC 12 makes four instructions of the conversion below
  return (BitVector)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (BitVector)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, BitVector);
#endif
}

// For values below 2^16.
VGGT_MV_INLINE HalfBits truncate(BitVector v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (HalfBits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

// Rounds to nearest, ties to even, in the upper half of the bits. A NaN stays one: adding to its bits could carry it to
// infinity or zero.
VGGT_MV_INLINE BitVector bfloat16_bits(Vector v) {
  const BitVector bits = bits_of(v);
  const BitVector nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return choose((IntVector)(v != v), bits | 0x400000u, nearest);
}

VGGT_MV_INLINE Vector widen(HalfBits stored, Bfloat16) { return from_bits(zero_extend(stored) << 16); }

#if defined(__AVX512BF16__)
// The lanes that the conversion to bfloat16 would take for zero.
VGGT_MV_INLINE __mmask16 subnormal_lanes(Vector v) { return _mm512_fpclass_ps_mask((__m512)v, 0x20); }
#endif

VGGT_MV_INLINE HalfBits narrow(Vector v, Bfloat16) {
#if defined(__AVX512BF16__)
  if (__builtin_expect(subnormal_lanes(v) == 0, 1)) return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
#endif
  return truncate(bfloat16_bits(v) >> 16);
}

#if defined(__AVX2__)

// The masks are full: GCC 12 warns of an uninitialised variable inside the forms without one.
VGGT_MV_INLINE Vector widen(HalfBits stored, Half) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)stored);
#else
  return (Vector)_mm256_cvtph_ps((__m128i)stored);
#endif
}

VGGT_MV_INLINE HalfBits narrow(Vector v, Half) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
}

#elif defined(__aarch64__)

VGGT_MV_INLINE Vector widen(HalfBits stored, Half) { return (Vector)vcvt_f32_f16((float16x4_t)stored); }
VGGT_MV_INLINE HalfBits narrow(Vector v, Half) { return (HalfBits)vcvt_f16_f32((float32x4_t)v); }

#else

// Without instructions for it: move exponent and mantissa to their place in a float and scale by 2^112, the difference
// of the exponents' biases, which also normalises subnormal numbers; infinity and NaN get the full exponent back.
VGGT_MV_INLINE Vector widen(HalfBits stored, Half) {
  const BitVector bits = zero_extend(stored);
  const BitVector magnitude = (bits & 0x7fffu) << 13;
  const Vector scaled = from_bits(magnitude) * 0x1p112f;
  const BitVector special = magnitude | 0x7f800000u;
  const IntVector is_special = (IntVector)(magnitude >= (0x7c00u << 13));
  return from_bits(choose(is_special, special, bits_of(scaled)) | ((bits & 0x8000u) << 16));
}

// With e the exponent of the number, but at least -14, adding 2^(e + 13) makes the float adder round to a multiple of
// 2^(e - 10), the last place of a float16 of that exponent, and leaves that multiple in the low bits of the sum. A
// result that rounds up to the next power of two carries into the exponent, as it should.
VGGT_MV_INLINE HalfBits narrow(Vector v, Half) {
  const BitVector sign = (bits_of(v) >> 16) & 0x8000u;
  const BitVector magnitude = bits_of(v) & 0x7fffffffu;
  const BitVector smallest = BitVector{} + (113u << 23);  // 2^-14
  const BitVector exponent = choose((IntVector)(magnitude > smallest), magnitude & 0x7f800000u, smallest);
  const BitVector place = exponent + (13u << 23);
  const BitVector multiple = bits_of(from_bits(magnitude) + from_bits(place)) - place;
  const BitVector finite = multiple + ((exponent - smallest) >> 13);
  const BitVector nan_or_infinity =
      choose((IntVector)(magnitude > 0x7f800000u), BitVector{} + 0x7e00u, BitVector{} + 0x7c00u);
  const BitVector result = choose((IntVector)(magnitude >= 0x477ff000u), nan_or_infinity, finite);  // 65520 and more
  return truncate(result | sign);
}

#endif

VGGT_MV_INLINE BitVector broadcast(Bfloat16Pair value) { return BitVector{} + value.bits; }

VGGT_MV_INLINE BitVector operand(const Bfloat16Pair* from) {
  BitVector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

VGGT_MV_INLINE void store(Bfloat16Pair* to, BitVector v) { __builtin_memcpy(to, &v, sizeof(v)); }

#if defined(__AVX512BF16__)
// a.low * b.low + a.high * b.high + c. Subnormal bfloat16 count as zero.
VGGT_MV_INLINE Vector multiply_add(BitVector a, BitVector b, Vector c) {
  return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

// 2 kLanes floats, rounded to nearest, as kLanes pairs.
VGGT_MV_INLINE void store_pairs(Bfloat16Pair* to, Vector first, Vector second) {
  store(to, (BitVector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

VGGT_MV_INLINE Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
VGGT_MV_INLINE Vector load(const T* from) {
  HalfBits stored;
  __builtin_memcpy(&stored, from, sizeof(stored));
  return widen(stored, T{});
}

VGGT_MV_INLINE Vector operand(const float* from) { return load(from); }

VGGT_MV_INLINE void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof(v)); }

template <typename T>
VGGT_MV_INLINE void store(T* to, Vector v) {
  const HalfBits stored = narrow(v, T{});
  __builtin_memcpy(to, &stored, sizeof(stored));
}

// Two vectors that follow each other in memory: of bfloat16 together in fewer instructions than one by one.
template <typename T>
VGGT_MV_INLINE void store_two(T* to, Vector first, Vector second) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bfloat16>) {
    if (__builtin_expect((subnormal_lanes(first) | subnormal_lanes(second)) == 0, 1)) {
      const auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      __builtin_memcpy(to, &both, sizeof(both));
      return;
    }
  }
#endif
  store(to, first);
  store(to + kLanes, second);
}

// How many lanes of a vector take part: all of them, or the first `count` at the end of a row. With `Some`, loads and
// stores touch nothing beyond those, and the other lanes read as zero.
struct All {};
struct Some {
  int count;
};

template <typename T>
VGGT_MV_INLINE Vector load(const T* from, All) {
  return load(from);
}

template <typename T>
VGGT_MV_INLINE Vector load(const T* from, Some lanes) {
  T buffer[kLanes] = {};
  for (int lane = 0; lane < lanes.count; ++lane) buffer[lane] = from[lane];
  return load(buffer);
}

// A vector of which `count` elements are there, at most kLanes and perhaps none.
template <typename T>
VGGT_MV_INLINE Vector load_zero_filled(const T* from, int count) {
  return count >= kLanes ? load(from) : count > 0 ? load(from, Some{count}) : Vector{};
}

template <typename T>
VGGT_MV_INLINE void store(T* to, Vector v, All) {
  store(to, v);
}

template <typename T>
VGGT_MV_INLINE void store(T* to, Vector v, Some lanes) {
  T buffer[kLanes];
  store(buffer, v);
  for (int lane = 0; lane < lanes.count; ++lane) to[lane] = buffer[lane];
}

// Zeroes the lanes that take no part.
VGGT_MV_INLINE Vector keep(Vector v, All) { return v; }
VGGT_MV_INLINE Vector keep(Vector v, Some lanes) {
  IntVector index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return from_bits((BitVector)(index < lanes.count) & bits_of(v));
}

// Calls body(offset, slot, lanes) for every vector of a row of `features` elements. Vectors that follow each other have
// different slots, 0 to kSlots - 1: an accumulator for each lets the additions overlap.
constexpr int kSlots = 4;
template <typename Body>
VGGT_MV_INLINE void for_each_vector(int features, Body body) {
  int offset = 0;
  for (; features - offset >= kSlots * kLanes; offset += kSlots * kLanes) {
    body(offset, 0, All{});
    body(offset + kLanes, 1, All{});
    body(offset + 2 * kLanes, 2, All{});
    body(offset + 3 * kLanes, 3, All{});
  }
  for (; features - offset >= kLanes; offset += kLanes) body(offset, 0, All{});
  if (offset < features) body(offset, 1, Some{features - offset});
}

// Calls body(values, lanes) for all elements of a row, a vector at a time in any order, as sums may be taken.
template <typename T, typename Body>
VGGT_MV_INLINE void for_each_value(const T* row, int width, Body body) {
  for_each_vector(width, [&](int d, int, auto lanes) VGGT_MV_INLINE_LAMBDA { body(load(row + d, lanes), lanes); });
}

// The halves of 32 bits are widened by one instruction each, neighbours by two.
template <typename Body>
VGGT_MV_INLINE void for_each_value(const Bfloat16* row, int width, Body body) {
  int d = 0;
  for (; width - d >= 2 * kLanes; d += 2 * kLanes) {
    BitVector pairs;
    __builtin_memcpy(&pairs, row + d, sizeof(pairs));
    body(from_bits(pairs << 16), All{});
    body(from_bits(pairs & 0xffff0000u), All{});
  }
  for (; width - d >= kLanes; d += kLanes) body(load(row + d), All{});
  if (d < width) body(load(row + d, Some{width - d}), Some{width - d});
}

VGGT_MV_INLINE float sum_of_lanes(Vector v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) v[lane] += v[lane + width];
  }
  return v[0];
}

VGGT_MV_INLINE float sum_of_slots(const Vector (&v)[kSlots]) { return sum_of_lanes((v[0] + v[1]) + (v[2] + v[3])); }

// Stores, and returns what `load` then gives.
template <typename T>
VGGT_MV_INLINE Vector store_rounded(T* to, Vector v) {
  const HalfBits stored = narrow(v, T{});
  __builtin_memcpy(to, &stored, sizeof(stored));
  return widen(stored, T{});
}

VGGT_MV_INLINE Vector store_rounded(float* to, Vector v) {
  store(to, v);
  return v;
}

template <typename T>
VGGT_MV_INLINE Vector store_rounded(T* to, Vector v, All) {
  return store_rounded(to, v);
}

template <typename T>
VGGT_MV_INLINE Vector store_rounded(T* to, Vector v, Some lanes) {
  T buffer[kLanes];
  const Vector stored = store_rounded(buffer, v);
  for (int lane = 0; lane < lanes.count; ++lane) to[lane] = buffer[lane];
  return stored;
}

// Room for floats that one thread keeps while it works; `data` is null where there is no memory left.
struct FloatBuffer {
  explicit FloatBuffer(int64_t size) : data(static_cast<float*>(std::malloc((size > 0 ? size : 1) * sizeof(float)))) {}
  ~FloatBuffer() { std::free(data); }
  FloatBuffer(const FloatBuffer&) = delete;
  FloatBuffer& operator=(const FloatBuffer&) = delete;
  float* const data;
};

}  // namespace vggt_mv::VGGT_MV_ISA
