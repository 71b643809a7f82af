// Arithmetic on the vectors of vector.h that attention needs: maximum, exp(x), reductions over lanes, transposition.
#pragma once

#include "cpu/vector.h"

namespace vggt_mv::VGGT_MV_ISA {

VGGT_MV_INLINE Vector select(IntVector condition, Vector a, Vector b) {
  return from_bits(choose(condition, bits_of(a), bits_of(b)));
}

// a > b ? a : b. Where either is NaN the result is b: `maximum(x, best)` ignores a NaN in x, and
// `maximum(broadcast(bound), x)` lets it through.
VGGT_MV_INLINE Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select((IntVector)(a > b), a, b);
#endif
}

// 2^n and f of x log2(e) = n + f with n the nearest integer, for x <= 0; x under -88 counts as -88, which gives n = -127
// and the factor zero. The factor is multiplied, not added to the exponent's bits, so that a NaN stays one.
struct PowerOfTwo {
  Vector fraction;
  Vector factor;
};

VGGT_MV_INLINE PowerOfTwo power_of_two(Vector x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  x = maximum(broadcast(-88.0f), x);
  const Vector shifted = multiply_add(x, broadcast(kLog2E), broadcast(kRound));
#if defined(__FMA__) || defined(__aarch64__)
  const Vector fraction = multiply_add(x, broadcast(kLog2E), kRound - shifted);
#else
  // The product would be rounded: subtract n ln(2) instead, in two parts of which n times the first is exact.
  const Vector n = shifted - kRound;
  const Vector fraction = (x - n * 0x1.62ep-1f - n * 0x1.0bfbe8p-15f) * kLog2E;
#endif
  return {fraction, from_bits((bits_of(shifted) << 23) + (127u << 23))};
}

// exp(x) for x <= 0: relative error at most 2e-7 + 1.4e-8 |x|, zero from -88 on, NaN for NaN. 2^f is a polynomial of
// degree 5, minimax in relative error on [-1/2, 1/2] among those that give 1 for 0.
VGGT_MV_INLINE Vector exp_of_nonpositive(Vector x) {
  const PowerOfTwo power = power_of_two(x);
  const Vector f = power.fraction;
  Vector y = broadcast(0x1.5bba16p-10f);
  y = multiply_add(y, f, broadcast(0x1.3cea88p-7f));
  y = multiply_add(y, f, broadcast(0x1.c6b752p-5f));
  y = multiply_add(y, f, broadcast(0x1.ebf9bcp-3f));
  y = multiply_add(y, f, broadcast(0x1.62e42ap-1f));
  y = multiply_add(y, f, broadcast(1.0f));
  return y * power.factor;
}

// The same for a result that is rounded to bfloat16 (2e-3), of degree 3: relative error at most 1.1e-4.
VGGT_MV_INLINE Vector rough_exp_of_nonpositive(Vector x) {
#if defined(__AVX512DQ__)
  // x log2(e) = n + f with n the integer below, which both instructions find by themselves: 2^f from one, y 2^n from the
  // other. The polynomial is minimax in relative error on [0, 1).
  constexpr int kBelow = 0x09;
  const Vector t = x * 0x1.715476p+0f;
  const Vector f = (Vector)_mm512_maskz_reduce_ps(0xffff, (__m512)t, kBelow);
  Vector y = broadcast(0x1.3f96a4p-4f);
  y = multiply_add(y, f, broadcast(0x1.cefc4cp-3f));
  y = multiply_add(y, f, broadcast(0x1.64444cp-1f));
  y = multiply_add(y, f, broadcast(0x1.fff632p-1f));
  return (Vector)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)t);
#else
  const PowerOfTwo power = power_of_two(x);
  const Vector f = power.fraction;
  Vector y = broadcast(0x1.c2a216p-5f);
  y = multiply_add(y, f, broadcast(0x1.f00c4cp-3f));
  y = multiply_add(y, f, broadcast(0x1.62f5fap-1f));
  y = multiply_add(y, f, broadcast(1.0f));
  return y * power.factor;
#endif
}

// Lane by lane element index[lane] of a, then b.
VGGT_MV_INLINE Vector shuffle(Vector a, Vector b, IntVector index) {
#if defined(__clang__)
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = index[lane] < kLanes ? a[index[lane]] : b[index[lane] - kLanes];
  }
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

template <int kDistance>
VGGT_MV_INLINE Vector exchange_lanes(Vector v) {
  IntVector other;
  for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ kDistance;
  return shuffle(v, v, other);
}

// The largest lane, or the sum of all, in every lane.
VGGT_MV_INLINE Vector maximum_of_lanes(Vector v) {
  if constexpr (kLanes > 8) v = maximum(exchange_lanes<8>(v), v);
  if constexpr (kLanes > 4) v = maximum(exchange_lanes<4>(v), v);
  v = maximum(exchange_lanes<2>(v), v);
  return maximum(exchange_lanes<1>(v), v);
}

VGGT_MV_INLINE Vector total_of_lanes(Vector v) {
  if constexpr (kLanes > 8) v += exchange_lanes<8>(v);
  if constexpr (kLanes > 4) v += exchange_lanes<4>(v);
  v += exchange_lanes<2>(v);
  return v + exchange_lanes<1>(v);
}

// Four sums for little more than the price of one: lane i of every four holds the sum of all lanes of v[i].
VGGT_MV_INLINE Vector totals_of_four(const Vector (&v)[4]) {
  IntVector low, high, first, second;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int four = lane & ~3, other = (lane & 1) != 0 ? kLanes : 0;
    low[lane] = four + other + (lane & 2) / 2;
    high[lane] = low[lane] + 2;
    first[lane] = (lane & 2) != 0 ? kLanes + lane - 2 : lane;
    second[lane] = first[lane] + 2;
  }
  const Vector a = shuffle(v[0], v[1], low) + shuffle(v[0], v[1], high);
  const Vector b = shuffle(v[2], v[3], low) + shuffle(v[2], v[3], high);
  Vector totals = shuffle(a, b, first) + shuffle(a, b, second);
  if constexpr (kLanes > 4) totals += exchange_lanes<4>(totals);
  if constexpr (kLanes > 8) totals += exchange_lanes<8>(totals);
  return totals;
}

VGGT_MV_INLINE void store_four(float* to, Vector v) { __builtin_memcpy(to, &v, 4 * sizeof(float)); }

// 1 / sqrt(v) of correctly rounded root and quotient, not an estimate.
VGGT_MV_INLINE Vector reciprocal_root(Vector v) {
#if defined(__AVX512F__)
  const Vector root = (Vector)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  const Vector root = (Vector)_mm256_sqrt_ps((__m256)v);
#else
  Vector root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(v[lane]);
#endif
  return 1.0f / root;
}

// One stage of a transposition: of every 2 x 2 blocks of kSize x kSize lanes, those beside the diagonal change places.
template <int kSize>
VGGT_MV_INLINE void exchange_blocks(Vector (&rows)[kLanes]) {
  IntVector upper, lower;
  for (int lane = 0; lane < kLanes; ++lane) {
    upper[lane] = (lane & kSize) == 0 ? lane : kLanes + lane - kSize;
    lower[lane] = (lane & kSize) == 0 ? lane + kSize : kLanes + lane;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kSize) != 0) continue;
    const Vector a = rows[i], b = rows[i + kSize];
    rows[i] = shuffle(a, b, upper);
    rows[i + kSize] = shuffle(a, b, lower);
  }
}

VGGT_MV_INLINE void transpose(Vector (&rows)[kLanes]) {
  if constexpr (kLanes > 8) exchange_blocks<8>(rows);
  if constexpr (kLanes > 4) exchange_blocks<4>(rows);
  exchange_blocks<2>(rows);
  exchange_blocks<1>(rows);
}

}  // namespace vggt_mv::VGGT_MV_ISA
