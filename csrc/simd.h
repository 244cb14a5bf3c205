// The SIMD layer: one vector of floats as wide as the instruction set this file is compiled for.
//
// Compiler vector extensions do the arithmetic on every processor; intrinsics appear only where
// the extensions have no word for the instruction (fused multiply-add, scalef, conversions).
// Kernels are written once over `F` and `LANES`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header leaves the untouched half of a masked operation undefined, and warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTCL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTCL_VECTOR_BYTES 32
#else
#define FASTCL_VECTOR_BYTES 16
#endif

namespace fastcl {

constexpr int LANES = FASTCL_VECTOR_BYTES / 4;

inline int64_t padded(int64_t d) { return (d + LANES - 1) / LANES * LANES; }  // to whole vectors

typedef float F __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
typedef int32_t I __attribute__((vector_size(FASTCL_VECTOR_BYTES)));
typedef uint16_t H __attribute__((vector_size(FASTCL_VECTOR_BYTES / 2)));

// Storage types. Arithmetic is always float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float INF = std::numeric_limits<float>::infinity();

inline F broadcast(float x) { return x - F{}; }  // x + 0 would lose the sign of −0

// ---- bits ------------------------------------------------------------------------------------

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00)  // infinity, NaN
    return bit_cast<float>(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // Exponent re-biased by a multiplication, which makes subnormals come out right.
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline Half from_float<Half>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const uint32_t rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (rest < 0x38800000)  // subnormal: the float adder rounds to a multiple of 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000))};
  const uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1) - 0x38000000;
  return {uint16_t(sign | (rounded >> 13))};
}

// ---- memory ----------------------------------------------------------------------------------

inline F load(const float* x) {
  F v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline void store(float* x, F v) { std::memcpy(x, &v, sizeof v); }

inline F load(const BFloat16* x) {
#if defined(__AVX512F__)
  return F(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
#elif defined(__AVX2__)
  return F(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16));
#else
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = to_float(x[i]);
  return v;
#endif
}

inline F load(const Half* x) {
#if defined(__AVX512F__)
  return F(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#elif defined(__AVX2__)
  return F(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = to_float(x[i]);
  return v;
#endif
}

inline void store(BFloat16* x, F v) {
  const I u = bit_cast<I>(v);
  const I nan = v != v;
  I r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  r = (nan & ((u >> 16) | 0x40)) | (~nan & r);
  const H h = __builtin_convertvector(r, H);
  std::memcpy(x, &h, sizeof h);
}

inline void store(Half* x, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                   _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; ++i) x[i] = from_float<Half>(v[i]);
#endif
}

// The first `count` lanes, 0 < count; the others are `fill` on a load and untouched by a store.
// Masked where the machine can: a lane at a time costs as much as the row before it.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <class T>
inline F load(const T* x, int64_t count, float fill = 0.0f) {
  if (count >= LANES) return load(x);
#if defined(__AVX512F__)
  const __mmask16 mask = first_lanes(count);
  if constexpr (sizeof(T) == 4) {
    return F(_mm512_mask_loadu_ps(__m512(broadcast(fill)), mask, x));
  } else {
    T part[LANES];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(mask, x));
    return F(_mm512_mask_mov_ps(__m512(broadcast(fill)), mask, __m512(load(part))));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i mask = first_lanes(count);
    return F(_mm256_blendv_ps(__m256(broadcast(fill)), _mm256_maskload_ps(x, mask),
                              _mm256_castsi256_ps(mask)));
  }
#endif
  F v = broadcast(fill);
  for (int i = 0; i < count; ++i) v[i] = to_float(x[i]);
  return v;
}
template <class T>
inline void store(T* x, F v, int64_t count) {
  if (count >= LANES) return store(x, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(x, first_lanes(count), __m512(v));
  } else {
    T part[LANES];
    store(part, v);
    return _mm256_mask_storeu_epi16(x, first_lanes(count),
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(x, first_lanes(count), __m256(v));
#endif
  for (int i = 0; i < count; ++i) x[i] = from_float<T>(v[i]);
}

// ---- arithmetic ------------------------------------------------------------------------------

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// a·b + c rounded once on every machine: for c near −a·b, where `fma` of a processor without the
// instruction would leave the rounding of a·b. In double a·b is exact.
inline F fma_once(F a, F b, F c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  typedef double D __attribute__((vector_size(2 * FASTCL_VECTOR_BYTES)));
  const D wide = __builtin_convertvector(a, D) * __builtin_convertvector(b, D);
  return __builtin_convertvector(wide + __builtin_convertvector(c, D), F);
#endif
}

// A NaN in the second argument survives: max(limit, x) keeps a broken input visible.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return F(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline F min(F a, F b) {
#if defined(__AVX512F__)
  return F(_mm512_min_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}

// Lane sums pairwise, halves first, so that the result does not depend on how a compiler orders a
// loop. Through memory, a lane at a time, it would cost as much as the 128 products before it.
inline float sum(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#elif defined(__AVX2__)
  const __m128 half =
      _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[LANES];
  store(lane, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}
// The same way; a NaN in the second half survives.
inline float max(F v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight =
      _mm256_max_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1));
#else
  const __m256 eight = __m256(v);
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[LANES];
  store(lane, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
#endif
}

// 2^f for |f| ≤ 1/2, to about one unit in the last place.
inline F exp2_fraction(F f) {
  F y = broadcast(1.5353362e-4f);
  y = fma(y, f, broadcast(1.3398874e-3f));
  y = fma(y, f, broadcast(9.6184373e-3f));
  y = fma(y, f, broadcast(5.5503324e-2f));
  y = fma(y, f, broadcast(2.4022648e-1f));
  y = fma(y, f, broadcast(6.9314718e-1f));
  return fma(y, f, broadcast(1.0f));
}

constexpr float ROUND = 0x1.8p23f;  // adding it rounds to an integer, which stays in the low bits

constexpr float LOWEST_EXPONENT = -126.0f;  // of numbers that are not subnormal

// 2^x: x = n + f with |f| ≤ 1/2, a polynomial for 2^f, and n added to the exponent. Error below
// 1 unit in the last place and a half; below 2^-126 it is zero, as a subnormal result takes Intel's
// processors thirty times as long; NaN stays NaN.
inline F exp2(F x) {
  x = min(broadcast(200.0f), x);
#if defined(__AVX512F__)
  const __mmask16 normal =
      _mm512_cmp_ps_mask(__m512(x), __m512(broadcast(LOWEST_EXPONENT)), _CMP_NLT_UQ);
  const F n = F(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return F(_mm512_maskz_scalef_ps(normal, __m512(exp2_fraction(x - n)), __m512(n)));
#else
  const I low = x < broadcast(LOWEST_EXPONENT);
  x = max(broadcast(LOWEST_EXPONENT), x);
  const F shifted = x + ROUND;
  const F y = exp2_fraction(x - (shifted - ROUND));
  // Two steps, so that n = 128 (times y < 1) comes out right.
  const I k = bit_cast<I>(shifted) - bit_cast<int32_t>(ROUND);
  const I half = k >> 1;
  const F a = bit_cast<F>((half + 127) << 23), b = bit_cast<F>((k - half + 127) << 23);
  return bit_cast<F>(bit_cast<I>(y * a * b) & ~low);
#endif
}

// 2^x where x is known to lie in [-126, 127], or to be so low that the answer is 0 (−FLT_MAX, not
// −infinity): three operations fewer than exp2.
inline F exp2_bounded(F x) {
#if defined(__AVX512F__)
  const F n = F(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return F(_mm512_scalef_ps(__m512(exp2_fraction(x - n)), __m512(n)));
#else
  x = max(broadcast(-127.0f), x);  // an exponent field of 0 is the number 0
  const F shifted = x + ROUND;
  const I k = bit_cast<I>(shifted) - bit_cast<int32_t>(ROUND);
  return exp2_fraction(x - (shifted - ROUND)) * bit_cast<F>((k + 127) << 23);
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

}  // namespace fastcl
