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
constexpr bool kFusedMultiplyAdd = true;  // fma() rounds once

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

// `IVec<N>`: N lanes of int32; arithmetic wraps.
template <int N = kLanes>
struct IVec {
  static_assert(N >= 1 && N <= kLanes, "an IVec has 1 to 16 lanes");
  static constexpr int lanes = N;
  __m512i v;
};

// The N elements at p in the low bytes of a register, nothing read beyond them.
template <int N>
SKIVE_INLINE __m128i load_bytes(const void* p) {
  if constexpr (N == 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  else return _mm_maskz_loadu_epi8(active<N>(), p);
}
template <int N>
SKIVE_INLINE __m256i load_words(const void* p) {
  if constexpr (N == 16) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  else return _mm256_maskz_loadu_epi16(active<N>(), p);
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint8_t* p) { return {_mm512_cvtepu8_epi32(load_bytes<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int8_t* p) { return {_mm512_cvtepi8_epi32(load_bytes<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint16_t* p) { return {_mm512_cvtepu16_epi32(load_words<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int16_t* p) { return {_mm512_cvtepi16_epi32(load_words<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int32_t* p) {
  if constexpr (N == kLanes) return {_mm512_loadu_si512(p)};
  else return {_mm512_maskz_loadu_epi32(active<N>(), p)};
}
// Narrowing stores keep the low bits, as a conversion of integers does. One lane goes by way of a
// scalar: clang 22 turns its masked store into one of four bytes.
template <int N>
SKIVE_INLINE void store(uint8_t* p, IVec<N> a) {
  const __m128i b = _mm512_cvtepi32_epi8(a.v);
  if constexpr (N == kLanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b);
  else if constexpr (N == 1) *p = static_cast<uint8_t>(_mm_cvtsi128_si32(b));
  else _mm_mask_storeu_epi8(p, active<N>(), b);
}
template <int N>
SKIVE_INLINE void store(uint16_t* p, IVec<N> a) {
  const __m256i b = _mm512_cvtepi32_epi16(a.v);
  if constexpr (N == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b);
  else if constexpr (N == 1) *p = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(b)));
  else _mm256_mask_storeu_epi16(p, active<N>(), b);
}
template <int N>
SKIVE_INLINE void store(int32_t* p, IVec<N> a) {
  if constexpr (N == kLanes) _mm512_storeu_si512(p, a.v);
  else _mm512_mask_storeu_epi32(p, active<N>(), a.v);
}
template <int N>
SKIVE_INLINE void store(int8_t* p, IVec<N> a) { store(reinterpret_cast<uint8_t*>(p), a); }
template <int N>
SKIVE_INLINE void store(int16_t* p, IVec<N> a) { store(reinterpret_cast<uint16_t*>(p), a); }
// Four vectors, narrowed, to consecutive memory: dword K of each 128-bit lane takes the bytes of
// vector K, then the dwords are put in order.
SKIVE_INLINE void store(uint8_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  const __m512i low = _mm512_set1_epi32(0x0c080400);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i r = _mm512_shuffle_epi8(a.v, low);
  r = _mm512_mask_shuffle_epi8(r, 0x00f000f000f000f0, b.v, low);
  r = _mm512_mask_shuffle_epi8(r, 0x0f000f000f000f00, c.v, low);
  r = _mm512_mask_shuffle_epi8(r, 0xf000f000f000f000, d.v, low);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, r));
}
SKIVE_INLINE void store(uint16_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  // The even words of both operands; bit 5 of an index chooses the second.
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                        30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a.v, even, b.v));
  _mm512_storeu_si512(p + 2 * kLanes, _mm512_permutex2var_epi16(c.v, even, d.v));
}
SKIVE_INLINE void store(int8_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  store(reinterpret_cast<uint8_t*>(p), a, b, c, d);
}
SKIVE_INLINE void store(int16_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  store(reinterpret_cast<uint16_t*>(p), a, b, c, d);
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int N>
SKIVE_INLINE IVec<N> in_register(IVec<N> a) {
  __asm__("" : "+v"(a.v));
  return a;
}

template <int N> SKIVE_INLINE IVec<N> bits(Vec<N> a) { return {_mm512_castps_si512(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> from_bits(IVec<N> a) { return {_mm512_castsi512_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> to_float(IVec<N> a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Nearest, ties to even; |a| < 2^31.
template <int N> SKIVE_INLINE IVec<N> round_to_int(Vec<N> a) { return {_mm512_cvtps_epi32(a.v)}; }

template <int N> SKIVE_INLINE IVec<N> operator+(IVec<N> a, IVec<N> b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a, IVec<N> b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator*(IVec<N> a, IVec<N> b) {
  return {_mm512_mullo_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a) {
  return {_mm512_sub_epi32(_mm512_setzero_si512(), a.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator&(IVec<N> a, IVec<N> b) {
  return {_mm512_and_si512(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator|(IVec<N> a, IVec<N> b) {
  return {_mm512_or_si512(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator^(IVec<N> a, IVec<N> b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_left(IVec<N> a) {
  return {_mm512_slli_epi32(a.v, K)};
}
// Arithmetic: the sign is copied in.
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_right(IVec<N> a) {
  return {_mm512_srai_epi32(a.v, K)};
}
// A count outside [0, 32) shifts every bit out.
template <int N> SKIVE_INLINE IVec<N> shift_left(IVec<N> a, IVec<N> count) {
  return {_mm512_sllv_epi32(a.v, count.v)};
}
template <int N> SKIVE_INLINE IVec<N> shift_right(IVec<N> a, IVec<N> count) {
  return {_mm512_srav_epi32(a.v, count.v)};
}
template <int N> SKIVE_INLINE IVec<N> vmin(IVec<N> a, IVec<N> b) {
  return {_mm512_min_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> vmax(IVec<N> a, IVec<N> b) {
  return {_mm512_max_epi32(a.v, b.v)};
}
// Not vpabsd: g++ 12 takes the absolute value of a narrowed result for that of an unsigned operand.
template <int N> SKIVE_INLINE IVec<N> abs_(IVec<N> a) { return vmax(a, -a); }

template <int N> SKIVE_INLINE Mask<N> less(IVec<N> a, IVec<N> b) {
  return {_mm512_cmplt_epi32_mask(a.v, b.v)};
}
template <int N> SKIVE_INLINE Mask<N> less_equal(IVec<N> a, IVec<N> b) {
  return {_mm512_cmple_epi32_mask(a.v, b.v)};
}
template <int N> SKIVE_INLINE Mask<N> equal(IVec<N> a, IVec<N> b) {
  return {_mm512_cmpeq_epi32_mask(a.v, b.v)};
}
template <int N> SKIVE_INLINE Mask<N> not_equal(IVec<N> a, IVec<N> b) {
  return {_mm512_cmpneq_epi32_mask(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> select(Mask<N> m, IVec<N> yes, IVec<N> no) {
  return {_mm512_mask_blend_epi32(m.m, no.v, yes.v)};
}

template <int N> SKIVE_INLINE int32_t hsum(IVec<N> a) {
  return N == kLanes ? _mm512_reduce_add_epi32(a.v) : _mm512_mask_reduce_add_epi32(active<N>(), a.v);
}
template <int N> SKIVE_INLINE int32_t hmax(IVec<N> a) {
  return N == kLanes ? _mm512_reduce_max_epi32(a.v) : _mm512_mask_reduce_max_epi32(active<N>(), a.v);
}
template <int N> SKIVE_INLINE int32_t hmin(IVec<N> a) {
  return N == kLanes ? _mm512_reduce_min_epi32(a.v) : _mm512_mask_reduce_min_epi32(active<N>(), a.v);
}

// min(max(((x * multiplier + 2^(shift-1)) >> shift) + offset, lowest), highest) in 64 bits, lane by
// lane; 1 <= shift <= 62.
template <int N>
SKIVE_INLINE IVec<N> scale_fixed(IVec<N> x, IVec<N> multiplier, IVec<N> shift, IVec<N> offset,
                                 int32_t lowest, int32_t highest) {
  const auto half = [&](__m512i a, __m512i m, __m512i s, __m512i z) {
    const __m512i count = _mm512_and_si512(s, _mm512_set1_epi64(0xffffffff));
    const __m512i one = _mm512_set1_epi64(1);
    const __m512i round = _mm512_sllv_epi64(one, _mm512_sub_epi64(count, one));
    const __m512i wide = _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(a, m), round), count);
    const __m512i moved =
        _mm512_add_epi64(wide, _mm512_srai_epi64(_mm512_slli_epi64(z, 32), 32));
    return _mm512_min_epi64(_mm512_max_epi64(moved, _mm512_set1_epi64(lowest)),
                            _mm512_set1_epi64(highest));
  };
  const auto high = [](IVec<N> a) { return _mm512_srli_epi64(a.v, 32); };
  const __m512i even = half(x.v, multiplier.v, shift.v, offset.v);
  const __m512i odd = half(high(x), high(multiplier), high(shift), high(offset));
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}

// table[i mod S], S = 16 or 32; the table is 64-byte aligned.
template <int S, int N> SKIVE_INLINE Vec<N> entries(const float* table, IVec<N> i) {
  if constexpr (S == 16) return {_mm512_permutexvar_ps(i.v, _mm512_load_ps(table))};
  else return {_mm512_permutex2var_ps(_mm512_load_ps(table), i.v, _mm512_load_ps(table + 16))};
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

// `Packed<T, N>`: N integers of 8 or 16 bits in the smallest register that holds them.
constexpr int kRegisterBytes = 64;
template <int Bytes>
SKIVE_INLINE auto load_register(const void* p) {
  static_assert(Bytes >= 1 && Bytes <= 64, "one register");
  if constexpr (Bytes <= 16) {
    if constexpr (Bytes == 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    else return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << Bytes) - 1), p);
  } else if constexpr (Bytes <= 32) {
    if constexpr (Bytes == 32) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    else return _mm256_maskz_loadu_epi8(static_cast<__mmask32>((1u << Bytes) - 1), p);
  } else {
    if constexpr (Bytes == 64) return _mm512_loadu_si512(p);
    else return _mm512_maskz_loadu_epi8((__mmask64{1} << Bytes) - 1, p);
  }
}
template <class T, int N>
struct Packed {
  static constexpr int lanes = N;
  decltype(load_register<N * static_cast<int>(sizeof(T))>(nullptr)) v;
};
template <class T, int N>
SKIVE_INLINE Packed<T, N> load_packed(const T* p) {
  return {load_register<N * static_cast<int>(sizeof(T))>(p)};
}
template <class T, int N>
SKIVE_INLINE void store(T* p, Packed<T, N> a) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  if constexpr (bytes == 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v);
  else if constexpr (bytes == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
  else if constexpr (bytes == 64) _mm512_storeu_si512(p, a.v);
  else if constexpr (bytes < 16) _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << bytes) - 1), a.v);
  else if constexpr (bytes < 32)
    _mm256_mask_storeu_epi8(p, static_cast<__mmask32>((1u << bytes) - 1), a.v);
  else _mm512_mask_storeu_epi8(p, (__mmask64{1} << bytes) - 1, a.v);
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> in_register(Packed<T, N> a) {
  __asm__("" : "+v"(a.v));
  return a;
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> splat_packed(T x) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  const int16_t word = static_cast<int16_t>(sizeof(T) == 1 ? (x & 0xff) * 0x101 : x);
  if constexpr (bytes <= 16) return {_mm_set1_epi16(word)};
  else if constexpr (bytes <= 32) return {_mm256_set1_epi16(word)};
  else return {_mm512_set1_epi16(word)};
}
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, uint8_t) { return _mm_max_epu8(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, int8_t) { return _mm_max_epi8(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, uint16_t) { return _mm_max_epu16(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, int16_t) { return _mm_max_epi16(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, uint8_t) { return _mm256_max_epu8(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, int8_t) { return _mm256_max_epi8(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, uint16_t) { return _mm256_max_epu16(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, int16_t) { return _mm256_max_epi16(a, b); }
SKIVE_INLINE __m512i max_of(__m512i a, __m512i b, uint8_t) { return _mm512_max_epu8(a, b); }
SKIVE_INLINE __m512i max_of(__m512i a, __m512i b, int8_t) { return _mm512_max_epi8(a, b); }
SKIVE_INLINE __m512i max_of(__m512i a, __m512i b, uint16_t) { return _mm512_max_epu16(a, b); }
SKIVE_INLINE __m512i max_of(__m512i a, __m512i b, int16_t) { return _mm512_max_epi16(a, b); }
template <class T, int N>
SKIVE_INLINE Packed<T, N> vmax(Packed<T, N> a, Packed<T, N> b) { return {max_of(a.v, b.v, T{})}; }

// Bytes widened to words; sums and differences of words, which wrap.
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const uint8_t* p) {
  if constexpr (N <= 8) return {_mm_cvtepu8_epi16(load_register<N>(p))};
  else if constexpr (N <= 16) return {_mm256_cvtepu8_epi16(load_register<N>(p))};
  else return {_mm512_cvtepu8_epi16(load_register<N>(p))};
}
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const int8_t* p) {
  if constexpr (N <= 8) return {_mm_cvtepi8_epi16(load_register<N>(p))};
  else if constexpr (N <= 16) return {_mm256_cvtepi8_epi16(load_register<N>(p))};
  else return {_mm512_cvtepi8_epi16(load_register<N>(p))};
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator+(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  if constexpr (N <= 8) return {_mm_add_epi16(a.v, b.v)};
  else if constexpr (N <= 16) return {_mm256_add_epi16(a.v, b.v)};
  else return {_mm512_add_epi16(a.v, b.v)};
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator-(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  if constexpr (N <= 8) return {_mm_sub_epi16(a.v, b.v)};
  else if constexpr (N <= 16) return {_mm256_sub_epi16(a.v, b.v)};
  else return {_mm512_sub_epi16(a.v, b.v)};
}

// A table of 256 bytes in registers: y[i] = table[x[i]] for kRegisterBytes bytes.
#if defined(__AVX512VBMI__)
struct ByteTable {
  explicit ByteTable(const uint8_t* table)
      : a(_mm512_loadu_si512(table)), b(_mm512_loadu_si512(table + 64)),
        c(_mm512_loadu_si512(table + 128)), d(_mm512_loadu_si512(table + 192)) {}
  SKIVE_INLINE void look_up(const uint8_t* x, uint8_t* y) const {
    const __m512i i = _mm512_loadu_si512(x);
    const __m512i low = _mm512_permutex2var_epi8(a, i, b), high = _mm512_permutex2var_epi8(c, i, d);
    _mm512_storeu_si512(y, _mm512_mask_blend_epi8(_mm512_movepi8_mask(i), low, high));
  }
  __m512i a, b, c, d;
};
#else
// Without permutations of bytes, those of words give the pair of entries 2k, 2k + 1: bits 1 to 6 of
// an index choose the pair, bit 7 the half of the table, bit 0 the entry.
struct ByteTable {
  explicit ByteTable(const uint8_t* table)
      : a(_mm512_loadu_si512(table)), b(_mm512_loadu_si512(table + 64)),
        c(_mm512_loadu_si512(table + 128)), d(_mm512_loadu_si512(table + 192)) {}
  // The entry of each word's byte i (0 to 255), in the low byte of the word.
  SKIVE_INLINE __m512i entry(__m512i i) const {
    const __m512i pair = _mm512_srli_epi16(i, 1);
    const __m512i low = _mm512_permutex2var_epi16(a, pair, b);
    const __m512i high = _mm512_permutex2var_epi16(c, pair, d);
    const __mmask32 upper = _mm512_test_epi16_mask(i, _mm512_set1_epi16(0x80));
    const __m512i both = _mm512_mask_blend_epi16(upper, low, high);
    const __mmask32 odd = _mm512_test_epi16_mask(i, _mm512_set1_epi16(1));
    return _mm512_mask_srli_epi16(both, odd, both, 8);
  }
  SKIVE_INLINE void look_up(const uint8_t* x, uint8_t* y) const {
    const __m512i i = _mm512_loadu_si512(x), byte = _mm512_set1_epi16(0xff);
    const __m512i even = entry(_mm512_and_si512(i, byte)), odd = entry(_mm512_srli_epi16(i, 8));
    const __m512i r = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
    _mm512_storeu_si512(y, r);
  }
  __m512i a, b, c, d;
};
#endif

// out[a * out_stride + b] = in[b * in_stride + a] for a, b < kTransposeEdge<T>, T of 8 or 16 bits.
// Interleaving row i with row i + half rotates the bits of an element's position by one; after as many
// rounds as a column has bits, rows and columns have changed places.
template <class T>
constexpr int kTransposeEdge = 16 / static_cast<int>(sizeof(T));
template <class T>
SKIVE_INLINE void transpose_square(const T* in, ptrdiff_t in_stride, T* out, ptrdiff_t out_stride) {
  constexpr int n = kTransposeEdge<T>, half = n / 2;
  __m128i a[n], b[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
#pragma GCC unroll 4
  for (int bit = 1; bit < n; bit *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      if constexpr (sizeof(T) == 1) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + half]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + half]);
      } else {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + half]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + half]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), a[i]);
}

// Three planes of 16 bytes and 16 pixels of 3: byte k of one is byte Planes ? 3k + s : k of the other.
template <bool Planes>
struct ThreeShuffles {
  alignas(16) int8_t from[3][3][16];  // [result][source][byte]: byte of the source, or -1: none
};
template <bool Planes>
constexpr ThreeShuffles<Planes> three_shuffles() {
  ThreeShuffles<Planes> s{};
  for (int r = 0; r < 3; ++r)
    for (int k = 0; k < 16; ++k)
      for (int v = 0; v < 3; ++v) {
        const int at = Planes ? 3 * k + r : 16 * r + k;
        const int source = Planes ? at / 16 : at % 3, byte = Planes ? at % 16 : at / 3;
        s.from[r][v][k] = static_cast<int8_t>(source == v ? byte : -1);
      }
  return s;
}
template <bool Planes>
SKIVE_INLINE void three(const uint8_t* in, ptrdiff_t in_stride, uint8_t* out, ptrdiff_t out_stride) {
  static constexpr ThreeShuffles<Planes> s = three_shuffles<Planes>();
  __m128i x[3];
#pragma GCC unroll 3
  for (int v = 0; v < 3; ++v)
    x[v] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + v * in_stride));
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    const auto part = [&](int v) {
      return _mm_shuffle_epi8(x[v], _mm_load_si128(reinterpret_cast<const __m128i*>(s.from[r][v])));
    };
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r * out_stride),
                     _mm_or_si128(_mm_or_si128(part(0), part(1)), part(2)));
  }
}
// out[3 k + s] = in[s * stride + k] for k < 16, and back.
constexpr int kThreePixels = 16;
SKIVE_INLINE void interleave3(const uint8_t* in, ptrdiff_t stride, uint8_t* out) {
  three<false>(in, stride, out, 16);
}
SKIVE_INLINE void deinterleave3(const uint8_t* in, uint8_t* out, ptrdiff_t stride) {
  three<true>(in, 16, out, stride);
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_AVX512_H
