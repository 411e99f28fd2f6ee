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
  static constexpr int kRegisters = 16;
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;  // of a pixel; of a vector of channels
  // Independent multiply-adds that hide the latency of one (4 cycles, 2 per cycle).
  static constexpr int kInFlight = 11;

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
  static constexpr int kRegisters = 16;
  static constexpr int kInFlight = 4;  // an addition of one cycle ends each step

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
  // acc + the sum of the two products of 16-bit pairs, which wraps.
  template <int L>
  static SKIVE_INLINE Lanes<L> add_pairs(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
    if constexpr (L == 8) return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(x.v, w.v))};
    else return {_mm_add_epi32(acc.v, _mm_madd_epi16(x.v, w.v))};
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
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add_broadcast(Lanes<L> acc, const uint8_t* x, Weights<L> w) {
    return multiply_add(acc, broadcast<L>(x), w);
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
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add_broadcast(Lanes<L> acc, const int16_t* x, Weights<L> w) {
    return multiply_add(acc, broadcast<L>(x), w);
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_FMA_ASSEMBLY

#endif  // SKIVE_ISA_TILE_AVX2_H
