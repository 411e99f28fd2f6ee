// AVX-512 (F, BW, VL, DQ): 16 float lanes. The only place with AVX-512 intrinsics for vec.h.
#ifndef SKIVE_ISA_AVX512_H
#define SKIVE_ISA_AVX512_H

// g++ 12 warns inside its own header about the undefined pass-through operand of unmasked intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kLanes = 16;

template <int N = kLanes>
struct Vec {
  static_assert(N >= 1 && N <= kLanes, "a Vec has 1 to 16 lanes");
  static constexpr int lanes = N;
  __m512 v;
};

template <int N>
struct Mask {
  __mmask16 m;
};

template <int N>
constexpr __mmask16 active() {
  return static_cast<__mmask16>((1u << N) - 1u);
}

template <int N = kLanes>
SKIVE_INLINE Vec<N> load(const float* p) {
  if constexpr (N == kLanes) return {_mm512_loadu_ps(p)};
  else return {_mm512_maskz_loadu_ps(active<N>(), p)};
}
template <int N>
SKIVE_INLINE void store(float* p, Vec<N> a) {
  if constexpr (N == kLanes) _mm512_storeu_ps(p, a.v);
  else _mm512_mask_storeu_ps(p, active<N>(), a.v);
}
template <int N = kLanes>
SKIVE_INLINE Vec<N> splat(float x) { return {_mm512_set1_ps(x)}; }
template <int N = kLanes>
SKIVE_INLINE Vec<N> zero() { return {_mm512_setzero_ps()}; }

// The value in a register: the compiler must not turn its uses into loads of their own.
template <int N>
SKIVE_INLINE Vec<N> in_register(Vec<N> a) {
  __asm__("" : "+v"(a.v));
  return a;
}

template <int N> SKIVE_INLINE Vec<N> operator+(Vec<N> a, Vec<N> b) { return {_mm512_add_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a, Vec<N> b) { return {_mm512_sub_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator*(Vec<N> a, Vec<N> b) { return {_mm512_mul_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator/(Vec<N> a, Vec<N> b) { return {_mm512_div_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a) {
  return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))};
}
template <int N> SKIVE_INLINE Vec<N> fma(Vec<N> a, Vec<N> b, Vec<N> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
template <int N> SKIVE_INLINE Vec<N> vmin(Vec<N> a, Vec<N> b) { return {_mm512_min_ps(a.v, b.v)}; }
template <int N> SKIVE_INLINE Vec<N> vmax(Vec<N> a, Vec<N> b) { return {_mm512_max_ps(a.v, b.v)}; }

template <int N> SKIVE_INLINE Mask<N> less(Vec<N> a, Vec<N> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
template <int N> SKIVE_INLINE Mask<N> equal(Vec<N> a, Vec<N> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
template <int N> SKIVE_INLINE Vec<N> select(Mask<N> m, Vec<N> yes, Vec<N> no) {
  return {_mm512_mask_blend_ps(m.m, no.v, yes.v)};
}

template <int N> SKIVE_INLINE float hsum(Vec<N> a) {
  return N == kLanes ? _mm512_reduce_add_ps(a.v) : _mm512_mask_reduce_add_ps(active<N>(), a.v);
}
template <int N> SKIVE_INLINE float hmax(Vec<N> a) {
  return N == kLanes ? _mm512_reduce_max_ps(a.v) : _mm512_mask_reduce_max_ps(active<N>(), a.v);
}
template <int N> SKIVE_INLINE float hmin(Vec<N> a) {
  return N == kLanes ? _mm512_reduce_min_ps(a.v) : _mm512_mask_reduce_min_ps(active<N>(), a.v);
}

// Mask logic and the comparisons beyond less and equal. not_equal is true for NaN.
template <int N> SKIVE_INLINE Mask<N> less_equal(Vec<N> a, Vec<N> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
template <int N> SKIVE_INLINE Mask<N> not_equal(Vec<N> a, Vec<N> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)};
}
template <int N> SKIVE_INLINE Mask<N> operator&(Mask<N> a, Mask<N> b) {
  return {static_cast<__mmask16>(a.m & b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator|(Mask<N> a, Mask<N> b) {
  return {static_cast<__mmask16>(a.m | b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator^(Mask<N> a, Mask<N> b) {
  return {static_cast<__mmask16>(a.m ^ b.m)};
}
template <int N> SKIVE_INLINE Mask<N> operator!(Mask<N> a) {
  return {static_cast<__mmask16>(~a.m)};
}
// True if any of the N active lanes is set.
template <int N> SKIVE_INLINE bool any(Mask<N> a) { return (a.m & active<N>()) != 0; }

// `Ints<N>`: the same lanes as 32-bit integers, for exponent arithmetic; they wrap.
template <int N>
struct Ints {
  __m512i v;
};
template <int N> SKIVE_INLINE Ints<N> splat_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int N> SKIVE_INLINE Ints<N> bits(Vec<N> a) { return {_mm512_castps_si512(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> from_bits(Ints<N> a) { return {_mm512_castsi512_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> to_floats(Ints<N> a) { return {_mm512_cvtepi32_ps(a.v)}; }
template <int N> SKIVE_INLINE Ints<N> operator+(Ints<N> a, Ints<N> b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator-(Ints<N> a, Ints<N> b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator&(Ints<N> a, Ints<N> b) {
  return {_mm512_and_si512(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator|(Ints<N> a, Ints<N> b) {
  return {_mm512_or_si512(a.v, b.v)};
}
template <int N> SKIVE_INLINE Ints<N> operator^(Ints<N> a, Ints<N> b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
template <int K, int N> SKIVE_INLINE Ints<N> shift_lanes_left(Ints<N> a) {
  return {_mm512_slli_epi32(a.v, K)};
}
// Arithmetic: the sign is copied in.
template <int K, int N> SKIVE_INLINE Ints<N> shift_lanes_right(Ints<N> a) {
  return {_mm512_srai_epi32(a.v, K)};
}

template <int N> SKIVE_INLINE Vec<N> sqrt_(Vec<N> a) { return {_mm512_sqrt_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> abs_(Vec<N> a) { return {_mm512_abs_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> floor_(Vec<N> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> ceil_(Vec<N> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> trunc_(Vec<N> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
template <int N> SKIVE_INLINE Vec<N> round_even(Vec<N> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// a * 2^n for integral n in [-252, 252], with gradual underflow and overflow to infinity.
template <int N> SKIVE_INLINE Vec<N> scale_exponent(Vec<N> a, Vec<N> n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_AVX512_H
