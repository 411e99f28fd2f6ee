// Plain C++17, no intrinsics: the path of every target without a file of its own, and the oracle
// that the other instruction sets are compared with. Four lanes in an array: a compiler with any
// SIMD unit vectorises the fixed loops, one without unrolls them.
#ifndef SKIVE_ISA_GENERIC_H
#define SKIVE_ISA_GENERIC_H

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kLanes = 4;
constexpr bool kFusedMultiplyAdd = false;  // fma() rounds once

template <int N = kLanes>
struct Vec {
  static_assert(N >= 1 && N <= kLanes, "a Vec has 1 to 4 lanes");
  static constexpr int lanes = N;
  float v[N];
};

template <int N>
struct Mask {
  bool m[N];
};

template <int N, class F>
SKIVE_INLINE Vec<N> each(F f) {
  Vec<N> r;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) r.v[i] = f(i);
  return r;
}

template <int N = kLanes>
SKIVE_INLINE Vec<N> load(const float* p) { return each<N>([&](int i) { return p[i]; }); }
template <int N>
SKIVE_INLINE void store(float* p, Vec<N> a) { for (int i = 0; i < N; ++i) p[i] = a.v[i]; }
template <int N = kLanes>
SKIVE_INLINE Vec<N> splat(float x) { return each<N>([&](int) { return x; }); }
template <int N = kLanes>
SKIVE_INLINE Vec<N> zero() { return splat<N>(0.0f); }

// Where instruction sets keep the compiler from turning each use into a load; here it may choose.
template <int N>
SKIVE_INLINE Vec<N> in_register(Vec<N> a) { return a; }

template <int N> SKIVE_INLINE Vec<N> operator+(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] + b.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] - b.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> operator*(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] * b.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> operator/(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] / b.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> operator-(Vec<N> a) {
  return each<N>([&](int i) { return -a.v[i]; });
}
// Two roundings where the target has no fused multiply-add: the tolerance table allows for it.
template <int N> SKIVE_INLINE Vec<N> fma(Vec<N> a, Vec<N> b, Vec<N> c) {
  return each<N>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> vmin(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
template <int N> SKIVE_INLINE Vec<N> vmax(Vec<N> a, Vec<N> b) {
  return each<N>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

template <int N> SKIVE_INLINE Mask<N> less(Vec<N> a, Vec<N> b) {
  Mask<N> r;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) r.m[i] = a.v[i] < b.v[i];
  return r;
}
template <int N> SKIVE_INLINE Mask<N> equal(Vec<N> a, Vec<N> b) {
  Mask<N> r;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) r.m[i] = a.v[i] == b.v[i];
  return r;
}
template <int N> SKIVE_INLINE Vec<N> select(Mask<N> m, Vec<N> yes, Vec<N> no) {
  return each<N>([&](int i) { return m.m[i] ? yes.v[i] : no.v[i]; });
}

template <int N> SKIVE_INLINE float hsum(Vec<N> a) {
  float s = a.v[0];
  for (int i = 1; i < N; ++i) s += a.v[i];
  return s;
}
template <int N> SKIVE_INLINE float hmax(Vec<N> a) {
  float s = a.v[0];
  for (int i = 1; i < N; ++i) s = a.v[i] > s ? a.v[i] : s;
  return s;
}
template <int N> SKIVE_INLINE float hmin(Vec<N> a) {
  float s = a.v[0];
  for (int i = 1; i < N; ++i) s = a.v[i] < s ? a.v[i] : s;
  return s;
}

// Mask logic and the comparisons beyond less and equal. not_equal is true for NaN.
template <int N, class F>
SKIVE_INLINE Mask<N> each_mask(F f) {
  Mask<N> r;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) r.m[i] = f(i);
  return r;
}
template <int N> SKIVE_INLINE Mask<N> less_equal(Vec<N> a, Vec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] <= b.v[i]; });
}
template <int N> SKIVE_INLINE Mask<N> not_equal(Vec<N> a, Vec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] != b.v[i]; });
}
template <int N> SKIVE_INLINE Mask<N> operator&(Mask<N> a, Mask<N> b) {
  return each_mask<N>([&](int i) { return a.m[i] && b.m[i]; });
}
template <int N> SKIVE_INLINE Mask<N> operator|(Mask<N> a, Mask<N> b) {
  return each_mask<N>([&](int i) { return a.m[i] || b.m[i]; });
}
template <int N> SKIVE_INLINE Mask<N> operator^(Mask<N> a, Mask<N> b) {
  return each_mask<N>([&](int i) { return a.m[i] != b.m[i]; });
}
template <int N> SKIVE_INLINE Mask<N> operator!(Mask<N> a) {
  return each_mask<N>([&](int i) { return !a.m[i]; });
}
// True if any of the N active lanes is set.
template <int N> SKIVE_INLINE bool any(Mask<N> a) {
  bool r = false;
  for (int i = 0; i < N; ++i) r |= a.m[i];
  return r;
}

// `IVec<N>`: N lanes of int32; arithmetic wraps.
template <int N = kLanes>
struct IVec {
  static_assert(N >= 1 && N <= kLanes, "an IVec has 1 to 4 lanes");
  static constexpr int lanes = N;
  int32_t v[N];
};
template <int N, class F>
SKIVE_INLINE IVec<N> each_int(F f) {
  IVec<N> r;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) r.v[i] = static_cast<int32_t>(f(i));
  return r;
}
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint8_t* p) { return each_int<N>([&](int i) { return p[i]; }); }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int8_t* p) { return each_int<N>([&](int i) { return p[i]; }); }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const uint16_t* p) { return each_int<N>([&](int i) { return p[i]; }); }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int16_t* p) { return each_int<N>([&](int i) { return p[i]; }); }
template <int N = kLanes>
SKIVE_INLINE IVec<N> load(const int32_t* p) { return each_int<N>([&](int i) { return p[i]; }); }
// Narrowing stores keep the low bits, as a conversion of integers does.
template <int N>
SKIVE_INLINE void store(uint8_t* p, IVec<N> a) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
template <int N>
SKIVE_INLINE void store(uint16_t* p, IVec<N> a) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = static_cast<uint16_t>(a.v[i]);
}
template <int N>
SKIVE_INLINE void store(int32_t* p, IVec<N> a) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = a.v[i];
}
template <int N>
SKIVE_INLINE void store(int8_t* p, IVec<N> a) { store(reinterpret_cast<uint8_t*>(p), a); }
template <int N>
SKIVE_INLINE void store(int16_t* p, IVec<N> a) { store(reinterpret_cast<uint16_t*>(p), a); }
template <int N = kLanes>
SKIVE_INLINE IVec<N> splat(int32_t x) { return each_int<N>([&](int) { return x; }); }
template <int N>
SKIVE_INLINE IVec<N> in_register(IVec<N> a) { return a; }

template <int N> SKIVE_INLINE IVec<N> bits(Vec<N> a) {
  IVec<N> r;
  __builtin_memcpy(r.v, a.v, sizeof r.v);
  return r;
}
template <int N> SKIVE_INLINE Vec<N> from_bits(IVec<N> a) {
  Vec<N> r;
  __builtin_memcpy(r.v, a.v, sizeof r.v);
  return r;
}
template <int N> SKIVE_INLINE Vec<N> to_float(IVec<N> a) {
  return each<N>([&](int i) { return static_cast<float>(a.v[i]); });
}
// Nearest, ties to even; |a| < 2^31. A sum with 2^23 has no room for a fraction, and from 2^23 on a
// float has none itself: unlike rintf this needs no call of the C library.
template <int N> SKIVE_INLINE IVec<N> round_to_int(Vec<N> a) {
  return each_int<N>([&](int i) {
    const float x = a.v[i], big = __builtin_copysignf(8388608.0f, x), r = (x + big) - big;
    return static_cast<int32_t>(__builtin_fabsf(x) < 8388608.0f ? r : x);
  });
}

// In uint32_t, which wraps.
template <int N> SKIVE_INLINE IVec<N> operator+(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return uint32_t(a.v[i]) + uint32_t(b.v[i]); });
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return uint32_t(a.v[i]) - uint32_t(b.v[i]); });
}
template <int N> SKIVE_INLINE IVec<N> operator*(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return uint32_t(a.v[i]) * uint32_t(b.v[i]); });
}
template <int N> SKIVE_INLINE IVec<N> operator-(IVec<N> a) {
  return each_int<N>([&](int i) { return 0u - uint32_t(a.v[i]); });
}
template <int N> SKIVE_INLINE IVec<N> operator&(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return a.v[i] & b.v[i]; });
}
template <int N> SKIVE_INLINE IVec<N> operator|(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int N> SKIVE_INLINE IVec<N> operator^(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return a.v[i] ^ b.v[i]; });
}
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_left(IVec<N> a) {
  return each_int<N>([&](int i) { return uint32_t(a.v[i]) << K; });
}
// Arithmetic: the sign is copied in.
template <int K, int N> SKIVE_INLINE IVec<N> shift_lanes_right(IVec<N> a) {
  return each_int<N>([&](int i) { return a.v[i] >> K; });
}
// A count outside [0, 32) shifts every bit out.
template <int N> SKIVE_INLINE IVec<N> shift_left(IVec<N> a, IVec<N> count) {
  return each_int<N>([&](int i) {
    const uint32_t n = static_cast<uint32_t>(count.v[i]);
    return n < 32 ? uint32_t(a.v[i]) << n : 0u;
  });
}
template <int N> SKIVE_INLINE IVec<N> shift_right(IVec<N> a, IVec<N> count) {
  return each_int<N>([&](int i) {
    const uint32_t n = static_cast<uint32_t>(count.v[i]);
    return a.v[i] >> (n < 32 ? n : 31);
  });
}
template <int N> SKIVE_INLINE IVec<N> vmin(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
template <int N> SKIVE_INLINE IVec<N> vmax(IVec<N> a, IVec<N> b) {
  return each_int<N>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <int N> SKIVE_INLINE IVec<N> abs_(IVec<N> a) {
  return each_int<N>([&](int i) { return a.v[i] < 0 ? 0u - uint32_t(a.v[i]) : uint32_t(a.v[i]); });
}

template <int N> SKIVE_INLINE Mask<N> less(IVec<N> a, IVec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] < b.v[i]; });
}
template <int N> SKIVE_INLINE Mask<N> less_equal(IVec<N> a, IVec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] <= b.v[i]; });
}
template <int N> SKIVE_INLINE Mask<N> equal(IVec<N> a, IVec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] == b.v[i]; });
}
template <int N> SKIVE_INLINE Mask<N> not_equal(IVec<N> a, IVec<N> b) {
  return each_mask<N>([&](int i) { return a.v[i] != b.v[i]; });
}
template <int N> SKIVE_INLINE IVec<N> select(Mask<N> m, IVec<N> yes, IVec<N> no) {
  return each_int<N>([&](int i) { return m.m[i] ? yes.v[i] : no.v[i]; });
}

template <int N> SKIVE_INLINE int32_t hsum(IVec<N> a) {
  uint32_t s = 0;
  for (int i = 0; i < N; ++i) s += static_cast<uint32_t>(a.v[i]);
  return static_cast<int32_t>(s);
}
template <int N> SKIVE_INLINE int32_t hmax(IVec<N> a) {
  int32_t s = a.v[0];
  for (int i = 1; i < N; ++i) s = a.v[i] > s ? a.v[i] : s;
  return s;
}
template <int N> SKIVE_INLINE int32_t hmin(IVec<N> a) {
  int32_t s = a.v[0];
  for (int i = 1; i < N; ++i) s = a.v[i] < s ? a.v[i] : s;
  return s;
}

// min(max(((x * multiplier + 2^(shift-1)) >> shift) + offset, lowest), highest) in 64 bits, lane by
// lane; 1 <= shift <= 62.
template <int N>
SKIVE_INLINE IVec<N> scale_fixed(IVec<N> x, IVec<N> multiplier, IVec<N> shift, IVec<N> offset,
                                 int32_t lowest, int32_t highest) {
  return each_int<N>([&](int i) {
    const int64_t half = int64_t{1} << (shift.v[i] - 1);
    const int64_t sum = int64_t{x.v[i]} * multiplier.v[i] + half;
    const int64_t y = (sum >> shift.v[i]) + offset.v[i];
    return y < lowest ? lowest : y > highest ? highest : y;
  });
}

// table[i mod S], S = 16 or 32.
template <int S, int N> SKIVE_INLINE Vec<N> entries(const float* table, IVec<N> i) {
  return each<N>([&](int k) { return table[i.v[k] & (S - 1)]; });
}

template <int N> SKIVE_INLINE Vec<N> sqrt_(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
template <int N> SKIVE_INLINE Vec<N> abs_(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_fabsf(a.v[i]); });
}
template <int N> SKIVE_INLINE Vec<N> floor_(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_floorf(a.v[i]); });
}
template <int N> SKIVE_INLINE Vec<N> ceil_(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_ceilf(a.v[i]); });
}
template <int N> SKIVE_INLINE Vec<N> trunc_(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_truncf(a.v[i]); });
}
template <int N> SKIVE_INLINE Vec<N> round_even(Vec<N> a) {
  return each<N>([&](int i) { return __builtin_rintf(a.v[i]); });
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

// `Packed<T, N>`: N integers of 8 or 16 bits.
constexpr int kRegisterBytes = 16;
template <class T, int N>
struct Packed {
  static constexpr int lanes = N;
  T v[N];
};
template <class T, int N, class F>
SKIVE_INLINE Packed<T, N> each_packed(F f) {
  Packed<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = static_cast<T>(f(i));
  return r;
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> load_packed(const T* p) {
  return each_packed<T, N>([&](int i) { return p[i]; });
}
template <class T, int N>
SKIVE_INLINE void store(T* p, Packed<T, N> a) { __builtin_memcpy(p, a.v, sizeof a.v); }
template <class T, int N>
SKIVE_INLINE Packed<T, N> in_register(Packed<T, N> a) { return a; }
template <class T, int N>
SKIVE_INLINE Packed<T, N> splat_packed(T x) {
  return each_packed<T, N>([&](int) { return x; });
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> vmax(Packed<T, N> a, Packed<T, N> b) {
  return each_packed<T, N>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

// Bytes widened to words; sums and differences of words, which wrap. Unrolled, they vectorise.
template <class T, int N, class F>
SKIVE_INLINE Packed<T, N> each_word(F f) {
  Packed<T, N> r;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r.v[i] = static_cast<T>(f(i));
  return r;
}
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const uint8_t* p) {
  return each_word<int16_t, N>([&](int i) { return p[i]; });
}
template <int N>
SKIVE_INLINE Packed<int16_t, N> load_words_of(const int8_t* p) {
  return each_word<int16_t, N>([&](int i) { return p[i]; });
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator+(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  return each_word<T, N>([&](int i) { return a.v[i] + b.v[i]; });
}
template <class T, int N>
SKIVE_INLINE Packed<T, N> operator-(Packed<T, N> a, Packed<T, N> b) {
  static_assert(sizeof(T) == 2, "sums of words");
  return each_word<T, N>([&](int i) { return a.v[i] - b.v[i]; });
}

// A table of 256 bytes: y[i] = table[x[i]] for kRegisterBytes bytes.
struct ByteTable {
  explicit ByteTable(const uint8_t* t) : table(t) {}
  SKIVE_INLINE void look_up(const uint8_t* x, uint8_t* y) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRegisterBytes; ++i) y[i] = table[x[i]];
  }
  const uint8_t* table;
};

// out[a * out_stride + b] = in[b * in_stride + a] for a, b < kTransposeEdge<T>, T of 8 or 16 bits.
template <class T>
constexpr int kTransposeEdge = 16 / static_cast<int>(sizeof(T));
template <class T>
SKIVE_INLINE void transpose_square(const T* in, ptrdiff_t in_stride, T* out, ptrdiff_t out_stride) {
  for (int a = 0; a < kTransposeEdge<T>; ++a)
    for (int b = 0; b < kTransposeEdge<T>; ++b) out[a * out_stride + b] = in[b * in_stride + a];
}
// out[3 k + s] = in[s * stride + k] for k < 16, and back.
constexpr int kThreePixels = 16;
SKIVE_INLINE void interleave3(const uint8_t* in, ptrdiff_t stride, uint8_t* out) {
  for (int k = 0; k < kThreePixels; ++k)
    for (int s = 0; s < 3; ++s) out[3 * k + s] = in[s * stride + k];
}
SKIVE_INLINE void deinterleave3(const uint8_t* in, uint8_t* out, ptrdiff_t stride) {
  for (int k = 0; k < kThreePixels; ++k)
    for (int s = 0; s < 3; ++s) out[s * stride + k] = in[3 * k + s];
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_GENERIC_H
