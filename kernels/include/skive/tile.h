// Register tile of dense dot products: `Pixels` output pixels x `Channels` output channels.
//
// The accumulators are not an array but one base class per register, expanded at compile time:
// compilers keep separate members in registers, and spill arrays.
//
// A tile policy (F32Tile in isa/tile_*.h) owns the element types and the multiply-add; the loop
// nests above know neither. One step reads one input element per pixel, broadcast to all lanes, and
// one row of packed weights: `Channels` rounded up to kChannelQuantum floats.
#ifndef SKIVE_TILE_H
#define SKIVE_TILE_H

#include "skive/shape.h"
#include "skive/vec.h"

#if defined(SKIVE_TARGET_AVX512)
#include "skive/isa/tile_avx512.h"
#elif defined(SKIVE_TARGET_AVX2)
#include "skive/isa/tile_avx2.h"
#else
#include "skive/isa/tile_generic.h"
#endif

namespace skive {
inline namespace SKIVE_ISA {

// A block of packed weights is a whole number of these, so that its loads need no mask.
constexpr int kChannelQuantum = 4;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int div_up(int n, int d) { return (n + d - 1) / d; }

template <int I, class T>
struct Slot {
  T value;
};
template <int I, class T>
SKIVE_INLINE T& slot(Slot<I, T>& s) { return s.value; }

// Pixel p of the tile reads its input at `Offsets::template at<p>()` floats from the tile's base.
// `Ahead`: rows of weights by which to prefetch, 0 where they come from L1 or L2 anyway.
template <class Policy, int Pixels, int Channels, class Offsets, int Ahead = 0>
struct Tile {
  static constexpr int kRow = round_up(Channels, kChannelQuantum);  // floats per weight row
  static constexpr int kVectors = div_up(kRow, kLanes);
  static constexpr int lanes(int v) { return v < kVectors - 1 ? kLanes : kRow - v * kLanes; }
  static constexpr int channels(int v) {
    return v < kVectors - 1 ? kLanes : Channels - v * kLanes;
  }

  template <int V>
  using Lanes = typename Policy::template Lanes<lanes(V)>;

  template <class>
  struct Row;
  template <int... V>
  struct Row<Index<V...>> : Slot<V, Lanes<V>>... {};
  template <class>
  struct Registers;
  template <int... I>
  struct Registers<Index<I...>> : Slot<I, Lanes<I % kVectors>>... {};

  using EachVector = Indices<kVectors>;
  using EachPixel = Indices<Pixels>;
  using EachRegister = Indices<Pixels * kVectors>;
  using Weights = Row<EachVector>;
  using Accumulators = Registers<EachRegister>;

  template <int... I>
  static SKIVE_INLINE void start(Accumulators& acc, const float* bias, Index<I...>) {
    ((slot<I>(acc) = Policy::template load_lanes<lanes(I % kVectors)>(bias + I % kVectors * kLanes)),
     ...);
  }
  template <int... V>
  static SKIVE_INLINE void load_weights(Weights& w, const float* p, Index<V...>) {
    ((slot<V>(w) = Policy::template load_lanes<lanes(V)>(p + V * kLanes)), ...);
  }
  template <int P, int... V>
  static SKIVE_INLINE void step_pixel(Accumulators& acc, Weights& w, const float* x,
                                      Index<V...>) {
    const float* const p = x + Offsets::template at<P>();
    // A broadcast of its own pays from two full registers of channels on.
    if constexpr (kRow <= kLanes * 3 / 2) {
      ((slot<P * kVectors + V>(acc) =
            Policy::multiply_add_broadcast(slot<P * kVectors + V>(acc), p, slot<V>(w))),
       ...);
    } else {
      const auto b = Policy::template broadcast<lanes(0)>(p);
      ((slot<P * kVectors + V>(acc) = Policy::multiply_add(
            slot<P * kVectors + V>(acc), Policy::template narrow<lanes(V)>(b), slot<V>(w))),
       ...);
    }
  }
  template <int... P>
  static SKIVE_INLINE void step(Accumulators& acc, const float* x, const float* w, Index<P...>) {
    Weights row;
    if constexpr (Ahead > 0 && Pixels >= 4) {  // fewer pixels: one plain stream, which hardware follows
      for (int i = 0; i < kRow; i += 16) __builtin_prefetch(w + Ahead * kRow + i);
    }
    load_weights(row, w, EachVector{});
    (step_pixel<P>(acc, row, x, EachVector{}), ...);
  }

  // `Steps` consecutive input elements against as many weight rows.
  template <int Steps>
  static SKIVE_INLINE void steps(Accumulators& acc, const float* x, const float* w) {
    if constexpr (Steps > 0) {
      step(acc, x, w, EachPixel{});
      steps<Steps - 1>(acc, Policy::opaque(x + 1), w + kRow);
    }
  }

  // Elements per turn of the loop in `run`: enough to hide the loop's own instructions.
  static constexpr int unroll(int length) {
    return length % 4 == 0 ? 4 : length % 3 == 0 ? 3 : length % 2 == 0 && length > 4 ? 2 : 4;
  }

  // `Length` consecutive input elements against as many weight rows.
  template <int Length>
  static SKIVE_INLINE void run(Accumulators& acc, const float* x, const float* w) {
    constexpr int U = unroll(Length);
    const float* const end = x + Length / U * U;
    for (; x != end; x += U, w += U * kRow) steps<U>(acc, Policy::opaque(x), w);
    steps<Length % U>(acc, x, w);
  }

  template <int I, class Emit>
  static SKIVE_INLINE void emit_one(Accumulators& acc, const Emit& emit) {
    constexpr int v = I % kVectors;
    emit(I / kVectors, v * kLanes, Policy::template finish<channels(v)>(slot<I>(acc)));
  }
  // Calls emit(pixel, first channel, Vec) for every finished vector.
  template <class Emit, int... I>
  static SKIVE_INLINE void finish(Accumulators& acc, const Emit& emit, Index<I...>) {
    (emit_one<I>(acc, emit), ...);
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TILE_H
