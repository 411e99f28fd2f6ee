// AVX-512 registers of the float32 dot-product tile (tile.h).
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
  static constexpr int kRegisters = 32;
  // Independent multiply-adds that must be in flight to hide the latency of one (4 cycles, 1 per
  // cycle).
  static constexpr int kInFlight = 5;

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
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    if constexpr (L == 16) return {_mm512_loadu_ps(p)};
    else if constexpr (L == 12) return {_mm512_maskz_loadu_ps(0xfff, p)};
    else if constexpr (L == 8) return {_mm256_loadu_ps(p)};
    else return {_mm_loadu_ps(p)};
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

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_FMA_ASSEMBLY

#endif  // SKIVE_ISA_TILE_AVX512_H
