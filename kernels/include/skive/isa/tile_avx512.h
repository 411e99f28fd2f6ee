// AVX-512 registers of the dot-product tile (tile.h): float32, uint8 x int8 and int16 x int16.
#ifndef SKIVE_ISA_TILE_AVX512_H
#define SKIVE_ISA_TILE_AVX512_H

#include "skive/vec.h"

// g++ needs help to allocate the tile's registers, see multiply_add. Sanitizers do not see the memory
// that assembly reads.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define SKIVE_FMA_ASSEMBLY
#endif

namespace skive {
inline namespace SKIVE_ISA {

struct F32Tile {
  using Element = float;
  using Weight = float;
  using Sum = float;
  static constexpr int kStep = 1;
  static constexpr bool kEmbeds = true;  // multiply_add_broadcast saves a load
  static constexpr int kRegisters = 32;
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;  // of a pixel; of a vector of channels
  // Independent multiply-adds that must be in flight to hide the latency of one (4 cycles, 1 per
  // cycle).
  static constexpr int kInFlight = 5;
  // Those that tiles of few registers keep in flight by several chains (tile.h); 0: sums keep their order.
  static constexpr int kChained = 0;

  // L lanes, a multiple of 4, in the narrowest register that holds them: Zen 4 runs two 256-bit
  // multiply-adds in the time of one 512-bit one.
  template <int L> static constexpr int width() { return L <= 4 ? 4 : L <= 8 ? 8 : 16; }
  template <int W, class = void> struct Register { using type = __m512; };
  template <class T> struct Register<8, T> { using type = __m256; };
  template <class T> struct Register<4, T> { using type = __m128; };

  template <int L>
  struct Lanes {
    typename Register<width<L>()>::type v;
  };

  template <int L>
  using Weights = Lanes<L>;

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    if constexpr (L == 16) return {_mm512_loadu_ps(p)};
    else if constexpr (L == 12) return {_mm512_maskz_loadu_ps(0xfff, p)};
    else if constexpr (L == 8) return {_mm256_loadu_ps(p)};
    else return {_mm_loadu_ps(p)};
  }
  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const float* p) {
    return load_lanes<L>(p);
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> broadcast(const float* p) {
    if constexpr (L > 8) return {_mm512_set1_ps(*p)};
    else if constexpr (L == 8) return {_mm256_set1_ps(*p)};
    else return {_mm_set1_ps(*p)};
  }
  // The same pointer, of which the compiler knows nothing. Overlapping windows read the same element
  // for several pixels at several steps; compilers would keep those in registers that the
  // accumulators need.
  static SKIVE_INLINE const float* opaque(const float* p) {
    __asm__("" : "+r"(p));
    return p;
  }
  // The first L of the lanes of a wider register.
  template <int L, int From>
  static SKIVE_INLINE Lanes<L> narrow(Lanes<From> a) {
    if constexpr (width<L>() == width<From>()) return {a.v};
    else if constexpr (width<From>() == 8) return {_mm256_castps256_ps128(a.v)};
    else if constexpr (L == 8) return {_mm512_castps512_ps256(a.v)};
    else return {_mm512_castps512_ps128(a.v)};
  }
  // acc + x * w. g++ gets the instruction that overwrites its accumulator: given the choice it often
  // overwrites `x`, lets the accumulators wander, and copies them back at the end of a loop.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
#if defined(SKIVE_FMA_ASSEMBLY)
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
    return acc;
#else
    if constexpr (L > 8) return {_mm512_fmadd_ps(x.v, w.v, acc.v)};
    else if constexpr (L == 8) return {_mm256_fmadd_ps(x.v, w.v, acc.v)};
    else return {_mm_fmadd_ps(x.v, w.v, acc.v)};
#endif
  }
  // acc + *x * w, for an input element that is used once.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add_broadcast(Lanes<L> acc, const float* x, Lanes<L> w) {
#if defined(SKIVE_FMA_ASSEMBLY)
    if constexpr (L > 8) __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*x));
    else if constexpr (L == 8) __asm__("vfmadd231ps %2%{1to8%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*x));
    else __asm__("vfmadd231ps %2%{1to4%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*x));
    return acc;
#else
    return multiply_add(acc, broadcast<L>(x), w);
#endif
  }
  template <int N, int L>
  static SKIVE_INLINE Vec<N> finish(Lanes<L> a) {
    if constexpr (L > 8) return {a.v};
    else if constexpr (L == 8) return {_mm512_castps256_ps512(a.v)};
    else return {_mm512_castps128_ps512(a.v)};
  }
};

// Integer sums: L lanes of int32, a multiple of 4, in the narrowest register that holds them. An input
// is four bytes of one pixel in every lane, a weight four bytes per lane.
template <class E, class W>
struct IntegerTile {
  using Element = E;
  using Weight = W;
  using Sum = int32_t;
  static constexpr int kStep = 4 / sizeof(E);
  static constexpr bool kEmbeds = false;
  static constexpr int kRegisters = 32;
  static constexpr int kInFlight = 5;
  static constexpr int kChained = 8;  // two per cycle

  template <int L> static constexpr int width() { return L <= 4 ? 4 : L <= 8 ? 8 : 16; }
  template <int R, class = void> struct Register { using type = __m512i; };
  template <class T> struct Register<8, T> { using type = __m256i; };
  template <class T> struct Register<4, T> { using type = __m128i; };

  template <int L>
  struct Lanes {
    typename Register<width<L>()>::type v;
  };

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const void* p) {
    if constexpr (L == 16) return {_mm512_loadu_si512(p)};
    else if constexpr (L == 12) return {_mm512_maskz_loadu_epi32(0xfff, p)};
    else if constexpr (L == 8) return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
    else return {_mm_loadu_si128(static_cast<const __m128i*>(p))};
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> broadcast_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    if constexpr (L > 8) return {_mm512_set1_epi32(four)};
    else if constexpr (L == 8) return {_mm256_set1_epi32(four)};
    else return {_mm_set1_epi32(four)};
  }
  static SKIVE_INLINE const E* opaque(const E* p) {
    __asm__("" : "+r"(p));
    return p;
  }
  template <int L, int From>
  static SKIVE_INLINE Lanes<L> first(Lanes<From> a) {
    if constexpr (width<L>() == width<From>()) return {a.v};
    else if constexpr (width<From>() == 8) return {_mm256_castsi256_si128(a.v)};
    else if constexpr (L == 8) return {_mm512_castsi512_si256(a.v)};
    else return {_mm512_castsi512_si128(a.v)};
  }
  // acc + the sum of the two products of 16-bit pairs, which wraps. The addition is the
  // instruction itself: g++ would add the products of several steps first, all of which it then holds.
  template <int L>
  static SKIVE_INLINE Lanes<L> add_pairs(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
    Lanes<L> p;
    if constexpr (L > 8) p.v = _mm512_madd_epi16(x.v, w.v);
    else if constexpr (L == 8) p.v = _mm256_madd_epi16(x.v, w.v);
    else p.v = _mm_madd_epi16(x.v, w.v);
    __asm__("vpaddd %1, %0, %0" : "+v"(acc.v) : "v"(p.v));
    return acc;
  }
  // The lowest 16 bits of `acc`; the others, as signed numbers, are added to `high`, the First ones stored.
  template <bool First, int L>
  static SKIVE_INLINE Lanes<L> spill(Lanes<L> acc, int32_t* high) {
    if constexpr (L > 8) {
      const auto above = _mm512_srai_epi32(acc.v, 16);
      _mm512_store_si512(high, First ? above : _mm512_add_epi32(_mm512_load_si512(high), above));
    } else if constexpr (L == 8) {
      auto* const p = reinterpret_cast<__m256i*>(high);
      const auto above = _mm256_srai_epi32(acc.v, 16);
      _mm256_store_si256(p, First ? above : _mm256_add_epi32(_mm256_load_si256(p), above));
    } else {
      auto* const p = reinterpret_cast<__m128i*>(high);
      const auto above = _mm_srai_epi32(acc.v, 16);
      _mm_store_si128(p, First ? above : _mm_add_epi32(_mm_load_si128(p), above));
    }
    return low(acc);
  }
  // The lowest 16 bits.
  template <int L>
  static SKIVE_INLINE Lanes<L> low(Lanes<L> acc) {
    if constexpr (L > 8) return {_mm512_maskz_mov_epi16(0x55555555, acc.v)};
    else if constexpr (L == 8) return {_mm256_maskz_mov_epi16(0x5555, acc.v)};
    else return {_mm_maskz_mov_epi16(0x55, acc.v)};
  }
  template <int N, int L>
  static SKIVE_INLINE IVec<N> finish(Lanes<L> a) {
    if constexpr (L > 8) return {a.v};
    else if constexpr (L == 8) return {_mm512_castsi256_si512(a.v)};
    else return {_mm512_castsi128_si512(a.v)};
  }
};

#if defined(SKIVE_TARGET_AVX512VNNI)

// The instructions themselves: for their intrinsics g++ copies the accumulator before each one, and
// clang takes vpdpwssd apart into a multiplication and an addition.
struct U8Tile : IntegerTile<uint8_t, int8_t> {
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;
  template <int L> using Weights = Lanes<L>;

  template <int L> static SKIVE_INLINE Weights<L> load_weights(const int8_t* p) { return load_lanes<L>(p); }
  template <int L> static SKIVE_INLINE Lanes<L> broadcast(const uint8_t* p) { return broadcast_bytes<L>(p); }
  template <int L, int From> static SKIVE_INLINE Lanes<L> narrow(Lanes<From> a) { return first<L>(a); }
  // acc + the sum of the four products.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Weights<L> w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
    return acc;
  }
};

struct I16Tile : IntegerTile<int16_t, int16_t> {
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;
  template <int L> using Weights = Lanes<L>;

  template <int L> static SKIVE_INLINE Weights<L> load_weights(const int16_t* p) { return load_lanes<L>(p); }
  template <int L> static SKIVE_INLINE Lanes<L> broadcast(const int16_t* p) { return broadcast_bytes<L>(p); }
  template <int L, int From> static SKIVE_INLINE Lanes<L> narrow(Lanes<From> a) { return first<L>(a); }
  // acc + the sum of the two products.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Weights<L> w) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
    return acc;
  }
};

#else  // no VNNI: pairs of 16 bits

// Four uint8 times int8 products as two exact sums of 16-bit pairs: elements 0 and 2, 1 and 3.
// (vpmaddubsw would saturate.)
struct U8Tile : IntegerTile<uint8_t, int8_t> {
  static constexpr int kInputRegisters = 3, kWeightRegisters = 2;  // one for the product
  template <int L>
  struct Pairs {
    Lanes<L> even, odd;
  };
  template <int L> using Weights = Pairs<L>;

  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const int8_t* p) {
    const auto v = load_lanes<L>(p).v;
    if constexpr (L > 8) return {{_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8)}, {_mm512_srai_epi16(v, 8)}};
    else if constexpr (L == 8) return {{_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8)}, {_mm256_srai_epi16(v, 8)}};
    else return {{_mm_srai_epi16(_mm_slli_epi16(v, 8), 8)}, {_mm_srai_epi16(v, 8)}};
  }
  template <int L>
  static SKIVE_INLINE Pairs<L> broadcast(const uint8_t* p) {
    const auto v = broadcast_bytes<L>(p).v;
    if constexpr (L > 8) return {{_mm512_and_si512(v, _mm512_set1_epi16(0xff))}, {_mm512_srli_epi16(v, 8)}};
    else if constexpr (L == 8) return {{_mm256_and_si256(v, _mm256_set1_epi16(0xff))}, {_mm256_srli_epi16(v, 8)}};
    else return {{_mm_and_si128(v, _mm_set1_epi16(0xff))}, {_mm_srli_epi16(v, 8)}};
  }
  template <int L, int From>
  static SKIVE_INLINE Pairs<L> narrow(Pairs<From> a) {
    return {first<L>(a.even), first<L>(a.odd)};
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Pairs<L> x, Weights<L> w) {
    return add_pairs<L>(add_pairs<L>(acc, x.even, w.even), x.odd, w.odd);
  }
};

struct I16Tile : IntegerTile<int16_t, int16_t> {
  static constexpr int kInputRegisters = 2, kWeightRegisters = 1;  // one for the product
  template <int L> using Weights = Lanes<L>;

  template <int L> static SKIVE_INLINE Weights<L> load_weights(const int16_t* p) { return load_lanes<L>(p); }
  template <int L> static SKIVE_INLINE Lanes<L> broadcast(const int16_t* p) { return broadcast_bytes<L>(p); }
  template <int L, int From> static SKIVE_INLINE Lanes<L> narrow(Lanes<From> a) { return first<L>(a); }
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Weights<L> w) {
    return add_pairs<L>(acc, x, w);
  }
};

#endif

template <class T> constexpr bool kSigned = T(-1) < T(0);

// See tile.h. `v` is rounded; of 8 bits without the zero point, which 16-bit lanes add with saturation.
template <class T, int N>
struct Rounded {
  static constexpr int lanes = N;
  __m512i v;
  int32_t zero;
};
// NaN and what lies below the range of int32 converts to its lowest value, but so does what lies above.
template <class T, bool Bounded = false, int N>
SKIVE_INLINE Rounded<T, N> rounded(Vec<N> v, int32_t zero) {
  __m512 x = v.v;
  if constexpr (!Bounded) x = _mm512_min_ps(_mm512_set1_ps(0x1p30f), x);
  if constexpr (sizeof(T) == 1) return {_mm512_cvtps_epi32(x), zero};
  x = _mm512_max_ps(x, _mm512_set1_ps(-0x1p30f));
  return {_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero)), 0};
}
template <int N>
SKIVE_INLINE void store(int16_t* p, Rounded<int16_t, N> a) {
  const __m256i words = _mm512_cvtsepi32_epi16(a.v);
  if constexpr (N == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  else _mm256_mask_storeu_epi16(p, active<N>(), words);
}
template <class T, int N>
SKIVE_INLINE void store(T* p, Rounded<T, N> a) {
  __m256i words = _mm512_cvtsepi32_epi16(a.v);
  if (a.zero != 0) words = _mm256_adds_epi16(words, _mm256_set1_epi16(static_cast<short>(a.zero)));
  const __m128i bytes = kSigned<T> ? _mm256_cvtsepi16_epi8(words)
                                   : _mm256_cvtusepi16_epi8(_mm256_max_epi16(words, _mm256_setzero_si256()));
  if constexpr (N == kLanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  else _mm_mask_storeu_epi8(p, active<N>(), bytes);
}

// Four full registers of results of 8 bits make one of bytes, stored as one, two or four pixels. The
// packing instructions saturate, and work within quarters of a register: a last step puts these
// together.
template <class T> constexpr bool kJoins = sizeof(T) == 1;
template <int N>
SKIVE_INLINE __m512i narrow_two(IVec<N> a, IVec<N> b) { return _mm512_packs_epi32(a.v, b.v); }
template <class T, int N>
SKIVE_INLINE __m512i narrow_two(Rounded<T, N> a, Rounded<T, N> b) {
  const __m512i words = _mm512_packs_epi32(a.v, b.v);
  if (a.zero == 0) return words;
  return _mm512_adds_epi16(words, _mm512_set1_epi16(static_cast<short>(a.zero)));
}
// Dword k of quarter j: lanes 4 j to 4 j + 3 of register k.
template <class T, class R>
SKIVE_INLINE __m512i quarters_of_four(R a, R b, R c, R d) {
  const __m512i ab = narrow_two(a, b), cd = narrow_two(c, d);
  return kSigned<T> ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
}
template <class T, class R>
SKIVE_INLINE __m512i narrow_four(R a, R b, R c, R d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, quarters_of_four<T>(a, b, c, d));
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, R a, R b, R c, R d) {
  _mm512_storeu_si512(p, narrow_four<T>(a, b, c, d));
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, T* q, R a, R b, R c, R d) {
  const __m512i v = narrow_four<T>(a, b, c, d);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64(v, 1));
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, T* q, T* r, T* s, R a, R b, R c, R d) {
  const __m512i v = narrow_four<T>(a, b, c, d);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(r), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(s), _mm512_extracti32x4_epi32(v, 3));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_FMA_ASSEMBLY

#endif  // SKIVE_ISA_TILE_AVX512_H
