// AVX2 registers of the float32 dot-product tile (tile.h).
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
  static constexpr int kRegisters = 16;
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
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    if constexpr (L == 8) return {_mm256_loadu_ps(p)};
    else return {_mm_loadu_ps(p)};
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

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_FMA_ASSEMBLY

#endif  // SKIVE_ISA_TILE_AVX2_H
