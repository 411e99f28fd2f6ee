// AVX2 + FMA: 8 float lanes. The only place with AVX2 intrinsics for vec.h.
#ifndef SKIVE_ISA_AVX2_H
#define SKIVE_ISA_AVX2_H

#include <immintrin.h>

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kLanes = 8;

template <int N = kLanes>
struct Vec {
  static_assert(N >= 1 && N <= kLanes, "a Vec has 1 to 8 lanes");
  static constexpr int lanes = N;
  __m256 v;
};

template <int N>
struct Mask {
  __m256 m;
};

template <int N>
SKIVE_INLINE __m256i active() {
  return _mm256_setr_epi32(N > 0 ? -1 : 0, N > 1 ? -1 : 0, N > 2 ? -1 : 0, N > 3 ? -1 : 0,
                           N > 4 ? -1 : 0, N > 5 ? -1 : 0, N > 6 ? -1 : 0, N > 7 ? -1 : 0);
}

template <int N = kLanes>
SKIVE_INLINE Vec<N> load(const float* p) {
  if constexpr (N == kLanes) return {_mm256_loadu_ps(p)};
  else return {_mm256_maskload_ps(p, active<N>())};
}
template <int N>
SKIVE_INLINE void store(float* p, Vec<N> a) {
  if constexpr (N == kLanes) _mm256_storeu_ps(p, a.v);
  else _mm256_maskstore_ps(p, active<N>(), a.v);
}
template <int N = kLanes>
SKIVE_INLINE Vec<N> splat(float x) { return {_mm256_set1_ps(x)}; }
template <int N = kLanes>
SKIVE_INLINE Vec<N> zero() { return {_mm256_setzero_ps()}; }

// The value in a register: the compiler must not turn its uses into loads of their own.
template <int N>
SKIVE_INLINE Vec<N> in_register(Vec<N> a) {
  __asm__("" : "+x"(a.v));
  return a;
}

template <int N> SKIVE_INLINE Vec<N> operator+(Vec<N> a, Vec<N> b) { return {_mm256_add_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a, Vec<N> b) { return {_mm256_sub_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator*(Vec<N> a, Vec<N> b) { return {_mm256_mul_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator/(Vec<N> a, Vec<N> b) { return {_mm256_div_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a) {
  return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))};
}
template <int N> SKIVE_INLINE Vec<N> fma(Vec<N> a, Vec<N> b, Vec<N> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
template <int N> SKIVE_INLINE Vec<N> vmin(Vec<N> a, Vec<N> b) { return {_mm256_min_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> vmax(Vec<N> a, Vec<N> b) { return {_mm256_max_ps(a.v, b.v)}; }

template <int N> SKIVE_INLINE Mask<N> less(Vec<N> a, Vec<N> b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
template <int N> SKIVE_INLINE Mask<N> equal(Vec<N> a, Vec<N> b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
}
template <int N> SKIVE_INLINE Vec<N> select(Mask<N> m, Vec<N> yes, Vec<N> no) {
  return {_mm256_blendv_ps(no.v, yes.v, m.m)};
}

// Horizontal reductions walk the lanes in a fixed tree; inactive lanes take the neutral element.
template <int N, class F>
SKIVE_INLINE float fold(Vec<N> a, float neutral, F f) {
  if constexpr (N != kLanes)
    a.v = _mm256_blendv_ps(_mm256_set1_ps(neutral), a.v, _mm256_castsi256_ps(active<N>()));
  __m128 s = f(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = f(s, _mm_movehl_ps(s, s));
  s = f(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
template <int N> SKIVE_INLINE float hsum(Vec<N> a) {
  return fold(a, 0.0f, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}
template <int N> SKIVE_INLINE float hmax(Vec<N> a) {
  return fold(a, -__builtin_inff(), [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}
template <int N> SKIVE_INLINE float hmin(Vec<N> a) {
  return fold(a, __builtin_inff(), [](__m128 x, __m128 y) { return _mm_min_ps(x, y); });
}

// Mask logic and the comparisons beyond less and equal. not_equal is true for NaN.
template <int N> SKIVE_INLINE Mask<N> less_equal(Vec<N> a, Vec<N> b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
}
template <int N> SKIVE_INLINE Mask<N> not_equal(Vec<N> a, Vec<N> b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)};
}
template <int N> SKIVE_INLINE Mask<N> operator&(Mask<N> a, Mask<N> b) {
  return {_mm256_and_ps(a.m, b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator|(Mask<N> a, Mask<N> b) {
  return {_mm256_or_ps(a.m, b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator^(Mask<N> a, Mask<N> b) {
  return {_mm256_xor_ps(a.m, b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator!(Mask<N> a) {
  return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
// True if any of the N active lanes is set.
template <int N> SKIVE_INLINE bool any(Mask<N> a) {
  return (_mm256_movemask_ps(a.m) & ((1 << N) - 1)) != 0;
}

// `Ints<N>`: the same lanes as 32-bit integers, for exponent arithmetic; they wrap.
template <int N>
struct Ints {
  __m256i v;
};
template <int N> SKIVE_INLINE Ints<N> splat_ints(int32_t x) { return {_mm256_set1_epi32(x)}; }
template <int N> SKIVE_INLINE Ints<N> bits(Vec<N> a) { return {_mm256_castps_si256(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> from_bits(Ints<N> a) { return {_mm256_castsi256_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> to_floats(Ints<N> a) { return {_mm256_cvtepi32_ps(a.v)}; }
template <int N> SKIVE_INLINE Ints<N> operator+(Ints<N> a, Ints<N> b) {
  return {_mm256_add_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator-(Ints<N> a, Ints<N> b) {
  return {_mm256_sub_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator&(Ints<N> a, Ints<N> b) {
  return {_mm256_and_si256(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator|(Ints<N> a, Ints<N> b) {
  return {_mm256_or_si256(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator^(Ints<N> a, Ints<N> b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
template <int K, int N> SKIVE_INLINE Ints<N> shift_lanes_left(Ints<N> a) {
  return {_mm256_slli_epi32(a.v, K)};
}
// Arithmetic: the sign is copied in.
template <int K, int N> SKIVE_INLINE Ints<N> shift_lanes_right(Ints<N> a) {
  return {_mm256_srai_epi32(a.v, K)};
}

template <int N> SKIVE_INLINE Vec<N> sqrt_(Vec<N> a) { return {_mm256_sqrt_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> abs_(Vec<N> a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
template <int N> SKIVE_INLINE Vec<N> floor_(Vec<N> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> ceil_(Vec<N> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> trunc_(Vec<N> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> round_even(Vec<N> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a * 2^n for integral n in [-252, 252], with gradual underflow and overflow to infinity: two
// factors, because 2^n itself may lie outside the normal range.
template <int N> SKIVE_INLINE Vec<N> scale_exponent(Vec<N> a, Vec<N> n) {
  const Vec<N> magic = splat<N>(12582912.0f);  // 1.5 * 2^23: the integer lands in the low bits
  const Ints<N> whole = bits(n + magic) - bits(magic);
  const Ints<N> half = shift_lanes_right<1>(whole);
  const Ints<N> one = bits(splat<N>(1.0f));
  return a * from_bits(one + shift_lanes_left<23>(half)) *
         from_bits(one + shift_lanes_left<23>(whole - half));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_AVX2_H
