// Plain C++ registers of the float32 dot-product tile (tile.h).
#ifndef SKIVE_ISA_TILE_GENERIC_H
#define SKIVE_ISA_TILE_GENERIC_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

struct F32Tile {
  using Element = float;
  // What baseline x86-64 and 32-bit Arm have; more registers only widen the tile.
  static constexpr int kRegisters = 16;
  static constexpr int kInFlight = 8;

  // L lanes: always 4. A vector type of GNU C++, which every target has: SIMD where there is some,
  // four scalars otherwise. Unlike an array it stays in registers and compiles fast.
  template <int L>
  struct Lanes {
    typedef float Register __attribute__((vector_size(L * sizeof(float))));
    Register v;
  };

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    Lanes<L> r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  template <int L>
  static SKIVE_INLINE Lanes<L> broadcast(const float* p) {
    return {typename Lanes<L>::Register{*p, *p, *p, *p}};
  }
  // Where a target's compiler keeps too much in registers across steps, its file hides the pointer.
  static SKIVE_INLINE const float* opaque(const float* p) { return p; }
  // The first L of the lanes of a wider register.
  template <int L, int From>
  static SKIVE_INLINE Lanes<L> narrow(Lanes<From> a) {
    static_assert(L == From, "every register has 4 lanes");
    return a;
  }
  // acc + x * w
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Lanes<L> x, Lanes<L> w) {
    return {x.v * w.v + acc.v};
  }
  // acc + *x * w, for an input element that is used once.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add_broadcast(Lanes<L> acc, const float* x, Lanes<L> w) {
    return multiply_add(acc, broadcast<L>(x), w);
  }
  template <int N, int L>
  static SKIVE_INLINE Vec<N> finish(Lanes<L> a) {
    Vec<N> r;
    for (int i = 0; i < N; ++i) r.v[i] = a.v[i];
    return r;
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_TILE_GENERIC_H
