// AVX2 registers of the dot-product tile (tile.h): float32, uint8 x int8 and int16 x int16.
#ifndef SKIVE_ISA_TILE_AVX2_H
#define SKIVE_ISA_TILE_AVX2_H

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
  static constexpr int kRegisters = 16;
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;  // of a pixel; of a vector of channels
  // Independent multiply-adds that hide the latency of one (4 cycles, 2 per cycle).
  static constexpr int kInFlight = 11;
  static constexpr int kChained = 0;

  template <int W, class = void> struct Register { using type = __m256; };
  template <class T> struct Register<4, T> { using type = __m128; };

  // L lanes: 4 or 8.
  template <int L>
  struct Lanes {
    typename Register<L>::type v;
  };

  template <int L>
  using Weights = Lanes<L>;

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    if constexpr (L == 8) return {_mm256_loadu_ps(p)};
    else return {_mm_loadu_ps(p)};
  }
  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const float* p) {
    return load_lanes<L>(p);
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> broadcast(const float* p) {
    if constexpr (L == 8) return {_mm256_set1_ps(*p)};
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
    if constexpr (L == From) return a;
    else return {_mm256_castps256_ps128(a.v)};
  }
  // acc + x * w. g++ gets the instruction that overwrites its accumulator: given the choice it often
  // overwrites `x`, lets the accumulators wander, and copies them back at the end of a loop.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
#if defined(SKIVE_FMA_ASSEMBLY)
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc.v) : "x"(x.v), "x"(w.v));
    return acc;
#else
    if constexpr (L == 8) return {_mm256_fmadd_ps(x.v, w.v, acc.v)};
    else return {_mm_fmadd_ps(x.v, w.v, acc.v)};
#endif
  }
  // acc + *x * w, for an input element that is used once.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add_broadcast(Lanes<L> acc, const float* x, Lanes<L> w) {
    return multiply_add(acc, broadcast<L>(x), w);
  }
  template <int N, int L>
  static SKIVE_INLINE Vec<N> finish(Lanes<L> a) {
    if constexpr (L == 8) return {a.v};
    else return {_mm256_castps128_ps256(a.v)};
  }
};

// Integer sums: L lanes of int32, 4 or 8. An input is four bytes of one pixel in every lane, a weight
// four bytes per lane.
template <class E, class W>
struct IntegerTile {
  using Element = E;
  using Weight = W;
  using Sum = int32_t;
  static constexpr int kStep = 4 / sizeof(E);
  static constexpr bool kEmbeds = false;
  static constexpr int kRegisters = 16;
  static constexpr int kInFlight = 4;  // an addition of one cycle ends each step
  static constexpr int kChained = 0;

  template <int R, class = void> struct Register { using type = __m256i; };
  template <class T> struct Register<4, T> { using type = __m128i; };

  template <int L>
  struct Lanes {
    typename Register<L>::type v;
  };

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const void* p) {
    if constexpr (L == 8) return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
    else return {_mm_loadu_si128(static_cast<const __m128i*>(p))};
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> broadcast_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    if constexpr (L == 8) return {_mm256_set1_epi32(four)};
    else return {_mm_set1_epi32(four)};
  }
  static SKIVE_INLINE const E* opaque(const E* p) {
    __asm__("" : "+r"(p));
    return p;
  }
  template <int L, int From>
  static SKIVE_INLINE Lanes<L> first(Lanes<From> a) {
    if constexpr (L == From) return a;
    else return {_mm256_castsi256_si128(a.v)};
  }
  // acc + the sum of the two products of 16-bit pairs, which wraps. The addition is the
  // instruction itself: g++ would add the products of several steps first, all of which it then holds.
  template <int L>
  static SKIVE_INLINE Lanes<L> add_pairs(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
    Lanes<L> p;
    if constexpr (L == 8) p.v = _mm256_madd_epi16(x.v, w.v);
    else p.v = _mm_madd_epi16(x.v, w.v);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc.v) : "x"(p.v));
    return acc;
  }
  // The lowest 16 bits of `acc`; the others, as signed numbers, are added to `high`, the First ones stored.
  template <bool First, int L>
  static SKIVE_INLINE Lanes<L> spill(Lanes<L> acc, int32_t* high) {
    if constexpr (L == 8) {
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
    if constexpr (L == 8) return {_mm256_srli_epi32(_mm256_slli_epi32(acc.v, 16), 16)};
    else return {_mm_srli_epi32(_mm_slli_epi32(acc.v, 16), 16)};
  }
  template <int N, int L>
  static SKIVE_INLINE IVec<N> finish(Lanes<L> a) {
    if constexpr (L == 8) return {a.v};
    else return {_mm256_castsi128_si256(a.v)};
  }
};

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
    if constexpr (L == 8) return {{_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8)}, {_mm256_srai_epi16(v, 8)}};
    else return {{_mm_srai_epi16(_mm_slli_epi16(v, 8), 8)}, {_mm_srai_epi16(v, 8)}};
  }
  template <int L>
  static SKIVE_INLINE Pairs<L> broadcast(const uint8_t* p) {
    const auto v = broadcast_bytes<L>(p).v;
    if constexpr (L == 8) return {{_mm256_and_si256(v, _mm256_set1_epi16(0xff))}, {_mm256_srli_epi16(v, 8)}};
    else return {{_mm_and_si128(v, _mm_set1_epi16(0xff))}, {_mm_srli_epi16(v, 8)}};
  }
  template <int L, int From>
  static SKIVE_INLINE Pairs<L> narrow(Pairs<From> a) {
    return {first<L>(a.even), first<L>(a.odd)};
  }
  // acc + the sum of the four products.
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
  // acc + the sum of the two products.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Weights<L> w) {
    return add_pairs<L>(acc, x, w);
  }
};

template <class T> constexpr bool kSigned = T(-1) < T(0);

// See tile.h. `v` is rounded; of 8 bits without the zero point, which 16-bit lanes add with saturation.
template <class T, int N>
struct Rounded {
  static constexpr int lanes = N;
  __m256i v;
  int32_t zero;
};
// NaN and what lies below the range of int32 converts to its lowest value, but so does what lies above.
template <class T, bool Bounded = false, int N>
SKIVE_INLINE Rounded<T, N> rounded(Vec<N> v, int32_t zero) {
  __m256 x = v.v;
  if constexpr (!Bounded) x = _mm256_min_ps(_mm256_set1_ps(0x1p30f), x);
  if constexpr (sizeof(T) == 1) return {_mm256_cvtps_epi32(x), zero};
  x = _mm256_max_ps(x, _mm256_set1_ps(-0x1p30f));
  return {_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero)), 0};
}
template <class T>
SKIVE_INLINE __m256i narrow_two(Rounded<T, 8> a, Rounded<T, 8> b) {
  const __m256i words = _mm256_packs_epi32(a.v, b.v);
  if (a.zero == 0) return words;
  return _mm256_adds_epi16(words, _mm256_set1_epi16(static_cast<short>(a.zero)));
}
template <class T, int N>
SKIVE_INLINE void store(T* p, Rounded<T, N> a) {
  const Rounded<T, 8> full{a.v, a.zero};
  __m256i v = narrow_two(full, full);
  if constexpr (sizeof(T) == 1) v = kSigned<T> ? _mm256_packs_epi16(v, v) : _mm256_packus_epi16(v, v);
  // The low half of each half of the register.
  T out[8];
  if constexpr (sizeof(T) == 1) {
    const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(N == 8 ? p : out), bytes);
  } else {
    const __m128i words = _mm_unpacklo_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(N == 8 ? p : out), words);
  }
  if constexpr (N < 8) __builtin_memcpy(p, out, N * sizeof(T));
}

// Four full registers of results of 8 bits make one of bytes, stored as one, two or four pixels. The
// packing instructions saturate, and work within halves of a register: a last step puts these
// together.
template <class T> constexpr bool kJoins = sizeof(T) == 1;
SKIVE_INLINE __m256i narrow_two(IVec<8> a, IVec<8> b) { return _mm256_packs_epi32(a.v, b.v); }
template <class T, class R>
SKIVE_INLINE __m256i narrow_four(R a, R b, R c, R d) {
  const __m256i ab = narrow_two(a, b), cd = narrow_two(c, d);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(kSigned<T> ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd),
                                     order);
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, R a, R b, R c, R d) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_four<T>(a, b, c, d));
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, T* q, R a, R b, R c, R d) {
  const __m256i v = narrow_four<T>(a, b, c, d);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_extracti128_si256(v, 1));
}
template <class T, class R>
SKIVE_INLINE void store_joined(T* p, T* q, T* r, T* s, R a, R b, R c, R d) {
  const __m256i v = narrow_four<T>(a, b, c, d);
  const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
  _mm_storeh_pi(reinterpret_cast<__m64*>(q), _mm_castsi128_ps(low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(r), high);
  _mm_storeh_pi(reinterpret_cast<__m64*>(s), _mm_castsi128_ps(high));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_FMA_ASSEMBLY

#endif  // SKIVE_ISA_TILE_AVX2_H
