// AVX2 + FMA: 8 float lanes. The only place with AVX2 intrinsics for vec.h.
#ifndef SKIVE_ISA_AVX2_H
#define SKIVE_ISA_AVX2_H

#include <immintrin.h>

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kLanes = 8;
constexpr bool kFusedMultiplyAdd = true;  // fma() rounds once

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

// `IVec<N>`: N lanes of int32; arithmetic wraps.
template <int N = kLanes>
struct IVec {
  static_assert(N >= 1 && N <= kLanes, "an IVec has 1 to 8 lanes");
  static constexpr int lanes = N;
  __m256i v;
};

// The Bytes bytes at p in the low end of a register, nothing read beyond them.
template <int Bytes>
SKIVE_INLINE __m128i load_bytes(const void* p) {
  if constexpr (Bytes == 16) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  } else if constexpr (Bytes == 8) {
    return _mm_loadl_epi64(static_cast<const __m128i*>(p));
  } else {
    int64_t part[2] = {0, 0};
    __builtin_memcpy(part, p, Bytes);
    return _mm_set_epi64x(part[1], part[0]);
  }
}
template <int Bytes>
SKIVE_INLINE void store_bytes(void* p, __m128i a) {
  if constexpr (Bytes == 16) {
    _mm_storeu_si128(static_cast<__m128i*>(p), a);
  } else if constexpr (Bytes == 8) {
    _mm_storel_epi64(static_cast<__m128i*>(p), a);
  } else {
    const int64_t part[2] = {_mm_cvtsi128_si64(a), Bytes > 8 ? _mm_extract_epi64(a, 1) : 0};
    __builtin_memcpy(p, part, Bytes);
  }
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint8_t* p) { return {_mm256_cvtepu8_epi32(load_bytes<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int8_t* p) { return {_mm256_cvtepi8_epi32(load_bytes<N>(p))}; }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(load_bytes<2 * N>(p))};
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int16_t* p) {
  return {_mm256_cvtepi16_epi32(load_bytes<2 * N>(p))};
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int32_t* p) {
  if constexpr (N == kLanes) return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  else return {_mm256_maskload_epi32(p, active<N>())};
}
// Narrowing stores keep the low bits, as a conversion of integers does.
template <int N>
SKIVE_INLINE void store(uint8_t* p, IVec<N> a) {
  const __m256i low = _mm256_shuffle_epi8(a.v, _mm256_set1_epi32(0x0c080400));
  store_bytes<N>(p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
template <int N>
SKIVE_INLINE void store(uint16_t* p, IVec<N> a) {
  const __m256i low = _mm256_shuffle_epi8(a.v, _mm256_set1_epi64x(0x0d0c090805040100));
  store_bytes<2 * N>(
      p, _mm_unpacklo_epi64(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
template <int N>
SKIVE_INLINE void store(int32_t* p, IVec<N> a) {
  if constexpr (N == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
  else _mm256_maskstore_epi32(p, active<N>(), a.v);
}
template <int N>
SKIVE_INLINE void store(int8_t* p, IVec<N> a) { store(reinterpret_cast<uint8_t*>(p), a); }
template <int N>
SKIVE_INLINE void store(int16_t* p, IVec<N> a) { store(reinterpret_cast<uint16_t*>(p), a); }
// Four vectors, narrowed, to consecutive memory: dword K of each 128-bit lane takes the bytes of
// vector K, then the dwords are put in order.
SKIVE_INLINE void store(uint8_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  const auto low = [](IVec<kLanes> x) {
    return _mm256_shuffle_epi8(x.v, _mm256_set1_epi32(0x0c080400));
  };
  const __m256i ab = _mm256_blend_epi32(low(a), low(b), 0x22);
  const __m256i cd = _mm256_blend_epi32(low(c), low(d), 0x88);
  const __m256i r = _mm256_blend_epi32(ab, cd, 0xcc), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(r, order));
}
SKIVE_INLINE void store(uint16_t* p, IVec<kLanes> a, IVec<kLanes> b) {
  const __m256i even = _mm256_set1_epi64x(0x0d0c090805040100);
  const __m256i r = _mm256_blend_epi32(_mm256_shuffle_epi8(a.v, even),
                                       _mm256_shuffle_epi8(b.v, even), 0xcc);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(r, 0xd8));
}
SKIVE_INLINE void store(uint16_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  store(p, a, b);
  store(p + 2 * kLanes, c, d);
}
SKIVE_INLINE void store(int8_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  store(reinterpret_cast<uint8_t*>(p), a, b, c, d);
}
SKIVE_INLINE void store(int16_t* p, IVec<kLanes> a, IVec<kLanes> b, IVec<kLanes> c, IVec<kLanes> d) {
  store(reinterpret_cast<uint16_t*>(p), a, b, c, d);
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> splat(int32_t x) { return {_mm256_set1_epi32(x)}; }
template <int N>
SKIVE_INLINE IVec<N> in_register(IVec<N> a) {
  __asm__("" : "+x"(a.v));
  return a;
}

template <int N> SKIVE_INLINE IVec<N> bits(Vec<N> a) { return {_mm256_castps_si256(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> from_bits(IVec<N> a) { return {_mm256_castsi256_ps(a.v)}; }
template <int N> SKIVE_INLINE Vec<N> to_float(IVec<N> a) { return {_mm256_cvtepi32_ps(a.v)}; }
// Nearest, ties to even; |a| < 2^31.
template <int N> SKIVE_INLINE IVec<N> round_to_int(Vec<N> a) { return {_mm256_cvtps_epi32(a.v)}; }

template <int N> SKIVE_INLINE IVec<N> operator+(IVec<N> a, IVec<N> b) {
  return {_mm256_add_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a, IVec<N> b) {
  return {_mm256_sub_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator*(IVec<N> a, IVec<N> b) {
  return {_mm256_mullo_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a) {
  return {_mm256_sub_epi32(_mm256_setzero_si256(), a.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator&(IVec<N> a, IVec<N> b) {
  return {_mm256_and_si256(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator|(IVec<N> a, IVec<N> b) {
  return {_mm256_or_si256(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> operator^(IVec<N> a, IVec<N> b) {
  return {_mm256_xor_si256(a.v, b.v)};
}
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_left(IVec<N> a) {
  return {_mm256_slli_epi32(a.v, K)};
}
// Arithmetic: the sign is copied in.
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_right(IVec<N> a) {
  return {_mm256_srai_epi32(a.v, K)};
}
// A count outside [0, 32) shifts every bit out.
template <int N> SKIVE_INLINE IVec<N> shift_left(IVec<N> a, IVec<N> count) {
  return {_mm256_sllv_epi32(a.v, count.v)};
}
template <int N> SKIVE_INLINE IVec<N> shift_right(IVec<N> a, IVec<N> count) {
  return {_mm256_srav_epi32(a.v, count.v)};
}
template <int N> SKIVE_INLINE IVec<N> vmin(IVec<N> a, IVec<N> b) {
  return {_mm256_min_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> vmax(IVec<N> a, IVec<N> b) {
  return {_mm256_max_epi32(a.v, b.v)};
}
template <int N> SKIVE_INLINE IVec<N> abs_(IVec<N> a) { return {_mm256_abs_epi32(a.v)}; }

template <int N> SKIVE_INLINE Mask<N> less(IVec<N> a, IVec<N> b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))};
}
template <int N> SKIVE_INLINE Mask<N> equal(IVec<N> a, IVec<N> b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))};
}
template <int N> SKIVE_INLINE Mask<N> less_equal(IVec<N> a, IVec<N> b) { return !less(b, a); }
template <int N> SKIVE_INLINE Mask<N> not_equal(IVec<N> a, IVec<N> b) { return !equal(a, b); }
template <int N> SKIVE_INLINE IVec<N> select(Mask<N> m, IVec<N> yes, IVec<N> no) {
  return {_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(m.m))};
}

// As `fold` above, on integers.
template <int N, class F>
SKIVE_INLINE int32_t fold(IVec<N> a, int32_t neutral, F f) {
  if constexpr (N != kLanes) a.v = _mm256_blendv_epi8(_mm256_set1_epi32(neutral), a.v, active<N>());
  __m128i s = f(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  s = f(s, _mm_shuffle_epi32(s, 0x4e));
  s = f(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}
template <int N> SKIVE_INLINE int32_t hsum(IVec<N> a) {
  return fold(a, 0, [](__m128i x, __m128i y) { return _mm_add_epi32(x, y); });
}
template <int N> SKIVE_INLINE int32_t hmax(IVec<N> a) {
  return fold(a, INT32_MIN, [](__m128i x, __m128i y) { return _mm_max_epi32(x, y); });
}
template <int N> SKIVE_INLINE int32_t hmin(IVec<N> a) {
  return fold(a, INT32_MAX, [](__m128i x, __m128i y) { return _mm_min_epi32(x, y); });
}

// min(max(((x * multiplier + 2^(shift-1)) >> shift) + offset, lowest), highest) in 64 bits, lane by
// lane; 1 <= shift <= 62. AVX2 has no arithmetic shift of 64 bits: adding 2^63 makes the sum
// unsigned, and 2^63, shifted, is taken off again.
template <int N>
SKIVE_INLINE IVec<N> scale_fixed(IVec<N> x, IVec<N> multiplier, IVec<N> shift, IVec<N> offset,
                                 int32_t lowest, int32_t highest) {
  const auto half = [&](__m256i a, __m256i m, __m256i s, __m256i z) {
    const __m256i count = _mm256_and_si256(s, _mm256_set1_epi64x(0xffffffff));
    const __m256i one = _mm256_set1_epi64x(1), top = _mm256_set1_epi64x(INT64_MIN);
    const __m256i round = _mm256_sllv_epi64(one, _mm256_sub_epi64(count, one));
    const __m256i sum = _mm256_add_epi64(_mm256_mul_epi32(a, m), round);
    const __m256i wide = _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_xor_si256(sum, top), count),
                                          _mm256_srlv_epi64(top, count));
    const __m256i sign = _mm256_cmpgt_epi32(_mm256_setzero_si256(), z);
    const __m256i moved =
        _mm256_add_epi64(wide, _mm256_blend_epi32(z, _mm256_slli_epi64(sign, 32), 0xaa));
    const __m256i low = _mm256_set1_epi64x(lowest), high = _mm256_set1_epi64x(highest);
    const __m256i raised = _mm256_blendv_epi8(moved, low, _mm256_cmpgt_epi64(low, moved));
    return _mm256_blendv_epi8(raised, high, _mm256_cmpgt_epi64(raised, high));
  };
  const auto high = [](IVec<N> a) { return _mm256_srli_epi64(a.v, 32); };
  const __m256i even = half(x.v, multiplier.v, shift.v, offset.v);
  const __m256i odd = half(high(x), high(multiplier), high(shift), high(offset));
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}

// table[i mod S], S = 16 or 32; the table is 64-byte aligned. Bits 3 and 4 choose among registers.
template <int S, int N> SKIVE_INLINE Vec<N> entries(const float* table, IVec<N> i) {
  if constexpr (S == 8) {
    return {_mm256_permutevar8x32_ps(_mm256_load_ps(table), i.v)};
  } else {
    const Vec<N> low = entries<S / 2>(table, i), high = entries<S / 2>(table + S / 2, i);
    return {_mm256_blendv_ps(low.v, high.v, _mm256_castsi256_ps(_mm256_slli_epi32(i.v, S == 16 ? 28 : 27)))};
  }
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
  const IVec<N> whole = bits(n + magic) - bits(magic);
  const IVec<N> half = shift_lanes_right<1>(whole);
  const IVec<N> one = bits(splat<N>(1.0f));
  return a * from_bits(one + shift_lanes_left<23>(half)) *
         from_bits(one + shift_lanes_left<23>(whole - half));
}

// `Packed<T, N>`: N integers of 8 or 16 bits in the smallest register that holds them.
constexpr int kRegisterBytes = 32;
template <int Bytes>
SKIVE_INLINE auto load_register(const void* p) {
  static_assert(Bytes >= 1 && Bytes <= 32, "one register");
  if constexpr (Bytes <= 16) {
    return load_bytes<Bytes>(p);
  } else if constexpr (Bytes == 32) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  } else {
    const __m128i high = load_bytes<Bytes - 16>(static_cast<const char*>(p) + 16);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_bytes<16>(p)), high, 1);
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
  if constexpr (bytes <= 16) {
    store_bytes<bytes>(p, a.v);
  } else {
    store_bytes<16>(p, _mm256_castsi256_si128(a.v));
    store_bytes<bytes - 16>(reinterpret_cast<char*>(p) + 16, _mm256_extracti128_si256(a.v, 1));
  }
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> in_register(Packed<T, N> a) {
  __asm__("" : "+x"(a.v));
  return a;
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> splat_packed(T x) {
  const int16_t word = static_cast<int16_t>(sizeof(T) == 1 ? (x & 0xff) * 0x101 : x);
  if constexpr (N * sizeof(T) <= 16) return {_mm_set1_epi16(word)};
  else return {_mm256_set1_epi16(word)};
}
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, uint8_t) { return _mm_max_epu8(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, int8_t) { return _mm_max_epi8(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, uint16_t) { return _mm_max_epu16(a, b); }
SKIVE_INLINE __m128i max_of(__m128i a, __m128i b, int16_t) { return _mm_max_epi16(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, uint8_t) { return _mm256_max_epu8(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, int8_t) { return _mm256_max_epi8(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, uint16_t) { return _mm256_max_epu16(a, b); }
SKIVE_INLINE __m256i max_of(__m256i a, __m256i b, int16_t) { return _mm256_max_epi16(a, b); }
template <class T, int N>
SKIVE_INLINE Packed<T, N> vmax(Packed<T, N> a, Packed<T, N> b) { return {max_of(a.v, b.v, T{})}; }

// Bytes widened to words; sums and differences of words, which wrap.
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const uint8_t* p) {
  if constexpr (N <= 8) return {_mm_cvtepu8_epi16(load_bytes<N>(p))};
  else return {_mm256_cvtepu8_epi16(load_bytes<N>(p))};
}
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const int8_t* p) {
  if constexpr (N <= 8) return {_mm_cvtepi8_epi16(load_bytes<N>(p))};
  else return {_mm256_cvtepi8_epi16(load_bytes<N>(p))};
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator+(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  if constexpr (N <= 8) return {_mm_add_epi16(a.v, b.v)};
  else return {_mm256_add_epi16(a.v, b.v)};
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator-(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  if constexpr (N <= 8) return {_mm_sub_epi16(a.v, b.v)};
  else return {_mm256_sub_epi16(a.v, b.v)};
}

// A table of 256 bytes: y[i] = table[x[i]] for kRegisterBytes bytes. The low four bits look into each
// of the 16 rows, the high four choose among the results in a tree.
struct ByteTable {
  explicit ByteTable(const uint8_t* t) : table(t) {}
  SKIVE_INLINE void look_up(const uint8_t* x, uint8_t* y) const {
    const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y),
                        rows<0, 16>(i, _mm256_and_si256(i, _mm256_set1_epi8(15))));
  }
  // The entries of rows [First, First + Count): the middle bit of the choice decides on a half.
  template <int First, int Count>
  SKIVE_INLINE __m256i rows(__m256i i, __m256i column) const {
    if constexpr (Count == 1) {
      const __m128i* row = reinterpret_cast<const __m128i*>(table + 16 * First);
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(row)), column);
    } else {
      const __m256i low = rows<First, Count / 2>(i, column);
      const __m256i high = rows<First + Count / 2, Count / 2>(i, column);
      constexpr int shift = Count == 16 ? 0 : Count == 8 ? 1 : Count == 4 ? 2 : 3;
      return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(i, shift));
    }
  }
  const uint8_t* table;
};

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

#endif  // SKIVE_ISA_AVX2_H
