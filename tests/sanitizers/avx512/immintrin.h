// AVX-512 for machines without it: the instructions that csrc/cpu names, in plain C++ and AVX2.
//
// Stands before the compiler's header of the same name where VGGT_MV_EMULATE_AVX512 is set, for the variants `avx512` and
// `avx512_bf16` alone. GCC splits wide vectors up by itself; what remains are the names. Results are those of the
// instructions, bit by bit, but for signalling NaNs and floating-point flags.
#pragma once

// The compiler's header must see the instruction set that there is.
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512DQ__
#undef __AVX512VL__
#if defined(__AVX512BF16__)
#undef __AVX512BF16__
#define VGGT_MV_EMULATED_BF16
#endif
#include_next <immintrin.h>
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(VGGT_MV_EMULATED_BF16)
#define __AVX512BF16__ 1
#endif

#include <stdint.h>

namespace vggt_mv::emulated_avx512 {

#define VGGT_MV_EMULATED static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// Two halves of 8 lanes, each by an instruction of AVX2.
struct Two {
  __m256 low, high;
};

VGGT_MV_EMULATED Two split(__m512 v) {
  Two two;
  __builtin_memcpy(&two, &v, sizeof(v));
  return two;
}

VGGT_MV_EMULATED __m512 join(__m256 low, __m256 high) {
  const Two two = {low, high};
  __m512 v;
  __builtin_memcpy(&v, &two, sizeof(v));
  return v;
}

VGGT_MV_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Two x = split(a), y = split(b), z = split(c);
  return join(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}

VGGT_MV_EMULATED __m512 max_ps(__mmask16, __m512 a, __m512 b) {
  const Two x = split(a), y = split(b);
  return join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}

VGGT_MV_EMULATED __m512 sqrt_ps(__mmask16, __m512 v) {
  const Two x = split(v);
  return join(_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high));
}

VGGT_MV_EMULATED __m512i cvtepu16_epi32(__mmask16, __m256i v) {
  return (__m512i) __builtin_convertvector((Halves)v, Words);
}

VGGT_MV_EMULATED __m256i cvtepi32_epi16(__mmask16, __m512i v) {
  return (__m256i) __builtin_convertvector((Words)v, Halves);
}

VGGT_MV_EMULATED __m512 cvtph_ps(__mmask16, __m256i v) {
  __m128i parts[2];
  __builtin_memcpy(parts, &v, sizeof(v));
  return join(_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1]));
}

VGGT_MV_EMULATED __m256i cvtps_ph_to_nearest(__m512 v) {
  const Two x = split(v);
  const __m128i parts[2] = {_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT)};
  __m256i result;
  __builtin_memcpy(&result, parts, sizeof(result));
  return result;
}

VGGT_MV_EMULATED uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

VGGT_MV_EMULATED float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

VGGT_MV_EMULATED bool is_subnormal(uint32_t bits) { return (bits & 0x7f800000u) == 0 && (bits & 0x7fffffu) != 0; }

VGGT_MV_EMULATED uint32_t without_subnormal(uint32_t bits) { return is_subnormal(bits) ? bits & 0x80000000u : bits; }

VGGT_MV_EMULATED __mmask16 subnormal_mask(__m512 v) {
  const Words words = (Words)v;
  unsigned mask = 0;
  for (int lane = 0; lane < 16; ++lane) mask |= static_cast<unsigned>(is_subnormal(words[lane])) << lane;
  return static_cast<__mmask16>(mask);
}

// t - floor(t), and 0 for infinities: the only way that csrc/cpu asks for.
VGGT_MV_EMULATED __m512 reduce_below(__m512 v, int) {
  Floats t = (Floats)v;
  for (int lane = 0; lane < 16; ++lane) {
    t[lane] = __builtin_isinf(t[lane]) ? 0.0f : t[lane] - __builtin_floorf(t[lane]);
  }
  return (__m512)t;
}

// y 2^floor(t), rounded once.
VGGT_MV_EMULATED __m512 scalef_ps(__mmask16, __m512 v, __m512 exponent) {
  Floats y = (Floats)v;
  const Floats t = (Floats)exponent;
  for (int lane = 0; lane < 16; ++lane) {
    const float below = __builtin_floorf(t[lane]);
    const float bounded = below < -1000 ? -1000 : below > 1000 ? 1000 : below;
    y[lane] = below != below ? below : __builtin_ldexpf(y[lane], static_cast<int>(bounded));
  }
  return (__m512)y;
}

// To nearest, ties to even; subnormal numbers become zero, a NaN a quiet one.
VGGT_MV_EMULATED uint16_t bfloat16(float value) {
  const uint32_t bits = without_subnormal(bits_of(value));
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

VGGT_MV_EMULATED __m256bh cvtneps_pbh(__m512 v) {
  const Floats values = (Floats)v;
  Halves halves = {};
  for (int lane = 0; lane < 16; ++lane) halves[lane] = bfloat16(values[lane]);
  return (__m256bh)halves;
}

VGGT_MV_EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const __m256bh halves[2] = {cvtneps_pbh(low), cvtneps_pbh(high)};
  __m512bh result;
  __builtin_memcpy(&result, halves, sizeof(result));
  return result;
}

// c + a.high b.high, then + a.low b.low; the products are exact, subnormal operands and sums count as zero.
VGGT_MV_EMULATED __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  Floats sums = (Floats)c;
  const Words x = (Words)a, y = (Words)b;
  for (int lane = 0; lane < 16; ++lane) {
    uint32_t sum = without_subnormal(bits_of(sums[lane]));
    for (int shift = 0; shift <= 16; shift += 16) {  // the high half first
      const uint32_t first = (x[lane] << shift) & 0xffff0000u, second = (y[lane] << shift) & 0xffff0000u;
      const float product = float_of(without_subnormal(first)) * float_of(without_subnormal(second));
      sum = without_subnormal(bits_of(float_of(sum) + product));
    }
    sums[lane] = float_of(sum);
  }
  return (__m512)sums;
}

#undef VGGT_MV_EMULATED

}  // namespace vggt_mv::emulated_avx512

// Some of them are macros of the compiler's header.
#undef _mm512_fmadd_ps
#undef _mm512_maskz_max_ps
#undef _mm512_maskz_sqrt_ps
#undef _mm512_maskz_cvtepu16_epi32
#undef _mm512_maskz_cvtepi32_epi16
#undef _mm512_maskz_cvtph_ps
#undef _mm512_maskz_cvtps_ph
#undef _mm512_fpclass_ps_mask
#undef _mm512_maskz_reduce_ps
#undef _mm512_maskz_scalef_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps

#define _mm512_fmadd_ps ::vggt_mv::emulated_avx512::fmadd_ps
#define _mm512_maskz_max_ps ::vggt_mv::emulated_avx512::max_ps
#define _mm512_maskz_sqrt_ps ::vggt_mv::emulated_avx512::sqrt_ps
#define _mm512_maskz_cvtepu16_epi32 ::vggt_mv::emulated_avx512::cvtepu16_epi32
#define _mm512_maskz_cvtepi32_epi16 ::vggt_mv::emulated_avx512::cvtepi32_epi16
#define _mm512_maskz_cvtph_ps ::vggt_mv::emulated_avx512::cvtph_ps
#define _mm512_maskz_cvtps_ph(mask, v, rounding) ::vggt_mv::emulated_avx512::cvtps_ph_to_nearest(v)
#define _mm512_fpclass_ps_mask(v, classes) ::vggt_mv::emulated_avx512::subnormal_mask(v)
#define _mm512_maskz_reduce_ps(mask, v, how) ::vggt_mv::emulated_avx512::reduce_below(v, how)
#define _mm512_maskz_scalef_ps ::vggt_mv::emulated_avx512::scalef_ps
#define _mm512_cvtneps_pbh ::vggt_mv::emulated_avx512::cvtneps_pbh
#define _mm512_cvtne2ps_pbh ::vggt_mv::emulated_avx512::cvtne2ps_pbh
#define _mm512_dpbf16_ps ::vggt_mv::emulated_avx512::dpbf16_ps
