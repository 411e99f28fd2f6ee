// Plain C++ registers of the dot-product tile (tile.h): float32, uint8 x int8 and int16 x int16.
#ifndef SKIVE_ISA_TILE_GENERIC_H
#define SKIVE_ISA_TILE_GENERIC_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

struct F32Tile {
  using Element = float;
  using Weight = float;
  using Sum = float;
  static constexpr int kStep = 1;
  static constexpr bool kEmbeds = true;  // multiply_add_broadcast saves a load
  // What baseline x86-64 and 32-bit Arm have; more registers only widen the tile.
  static constexpr int kRegisters = 16;
  static constexpr int kInputRegisters = 1, kWeightRegisters = 1;  // of a pixel; of a vector of channels
  static constexpr int kInFlight = 8;
  static constexpr int kChained = 0;

  // L lanes: always 4. A vector type of GNU C++, which every target has: SIMD where there is some,
  // four scalars otherwise. Unlike an array it stays in registers and compiles fast.
  template <int L>
  struct Lanes {
    typedef float Register __attribute__((vector_size(L * sizeof(float))));
    Register v;
  };

  template <int L>
  using Weights = Lanes<L>;

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const float* p) {
    Lanes<L> r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const float* p) {
    return load_lanes<L>(p);
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

// Integer sums, which wrap: kStep elements of a pixel against as many weights for each of 4 channels.
template <class E, class W>
struct IntegerTile {
  using Element = E;
  using Weight = W;
  using Sum = int32_t;
  static constexpr int kStep = 4 / sizeof(E);
  static constexpr bool kEmbeds = false;
  static constexpr int kRegisters = 16;
  static constexpr int kInputRegisters = 2, kWeightRegisters = kStep;
  static constexpr int kInFlight = 4;
  static constexpr int kChained = 0;

  typedef uint32_t Register __attribute__((vector_size(16)));
  template <int L>
  struct Lanes {
    Register v;
  };
  // Weight k of every channel.
  template <int L>
  struct Weights {
    Register k[kStep];
  };
  struct Input {
    const E* p;
  };

  template <int L>
  static SKIVE_INLINE Lanes<L> load_lanes(const int32_t* p) {
    Lanes<L> r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static SKIVE_INLINE uint32_t wide(int32_t a) { return static_cast<uint32_t>(a); }
  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const W* p) {
    Weights<L> r;
    for (int k = 0; k < kStep; ++k) {
      r.k[k] = Register{wide(p[k]), wide(p[kStep + k]), wide(p[2 * kStep + k]), wide(p[3 * kStep + k])};
    }
    return r;
  }
  template <int L>
  static SKIVE_INLINE Input broadcast(const E* p) {
    return {p};
  }
  static SKIVE_INLINE const E* opaque(const E* p) { return p; }
  template <int L>
  static SKIVE_INLINE Input narrow(Input a) {
    return a;
  }
  // acc + the sum of the kStep products.
  template <int L>
  static SKIVE_INLINE Lanes<L> multiply_add(Lanes<L> acc, Input x, Weights<L> w) {
    for (int k = 0; k < kStep; ++k) acc.v += wide(x.p[k]) * w.k[k];
    return acc;
  }
  // The lowest 16 bits of `acc`; the others, as signed numbers, are added to `high`, the First ones stored.
  template <bool First, int L>
  static SKIVE_INLINE Lanes<L> spill(Lanes<L> acc, int32_t* high) {
    for (int i = 0; i < 4; ++i) high[i] = (First ? 0 : high[i]) + (static_cast<int32_t>(acc.v[i]) >> 16);
    return low(acc);
  }
  // The lowest 16 bits.
  template <int L>
  static SKIVE_INLINE Lanes<L> low(Lanes<L> acc) {
    return {acc.v & 0xffff};
  }
  template <int N, int L>
  static SKIVE_INLINE IVec<N> finish(Lanes<L> a) {
    IVec<N> r;
    for (int i = 0; i < N; ++i) r.v[i] = static_cast<int32_t>(a.v[i]);
    return r;
  }
};
using U8Tile = IntegerTile<uint8_t, int8_t>;
using I16Tile = IntegerTile<int16_t, int16_t>;

// See tile.h. `v` is what is stored.
template <class T, int N>
struct Rounded {
  static constexpr int lanes = N;
  T v[N];
};
template <class T, bool Bounded = false, int N>
SKIVE_INLINE Rounded<T, N> rounded(Vec<N> v, int32_t zero) {
  constexpr int32_t bits = 8 * sizeof(T), low = T(-1) < T(0) ? -(1 << (bits - 1)) : 0;
  constexpr int32_t high = low + (1 << bits) - 1;
  Rounded<T, N> r;
  for (int i = 0; i < N; ++i) {
    // Not inside the range of int32, or NaN: the end of the range that is meant.
    const float x = __builtin_rintf(v.v[i]);
    const int32_t q = x >= 0x1p30f ? 1 << 30 : x > -0x1p30f ? static_cast<int32_t>(x) : -(1 << 30);
    const int32_t y = q + zero;
    r.v[i] = static_cast<T>(y < low ? low : y > high ? high : y);
  }
  return r;
}
template <class T, int N>
SKIVE_INLINE void store(T* p, Rounded<T, N> a) {
  for (int i = 0; i < N; ++i) p[i] = a.v[i];
}
template <class T> constexpr bool kJoins = false;

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_TILE_GENERIC_H
