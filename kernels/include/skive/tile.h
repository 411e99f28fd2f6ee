// Register tile of dense dot products: `Pixels` output pixels x `Channels` output channels.
//
// The accumulators are not an array but one base class per register, expanded at compile time:
// compilers keep separate members in registers, and spill arrays.
//
// A tile policy (F32Tile, U8Tile and I16Tile in isa/tile_*.h) owns the element types and the
// multiply-add; the loop nests above know neither. One step reads kStep consecutive input elements
// per pixel, four bytes, broadcast to all lanes, and one row of packed weights: kStep for each of
// `Channels` channels, rounded up to kChannelQuantum channels. A lane adds its kStep products.
//
//   policy    Element   Weight   Sum       kStep
//   F32Tile   float     float    float     1
//   U8Tile    uint8_t   int8_t   int32_t   4
//   I16Tile   int16_t   int16_t  int32_t   2       sums wrap
//
// Sums that may leave 32 bits are computed in parts: `spill` moves what stands above the lowest 16 bits
// of each accumulator to memory, so that the sum is 65536 times that plus the accumulator, exactly.
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

// `Rounded<T, N>`: N values saturate(round_even(v) + zero) of the 8- or 16-bit type T that are about to be
// stored; what their stores do anyway, such as saturating, is left to these. The cheapest last
// step of an epilogue: rounded<T>(to_float(sum) * factor, zero) is requantize, rounded<T>(x / scale, zero)
// quantize. With Bounded the caller vouches for |v| < 2^30 (or NaN, which gives the lowest value).
//   rounded<T, Bounded = false>(Vec<N> v, int32_t zero) -> Rounded<T, N>
//   store(T*, Rounded<T, N>)

// For templates on results of 8 bits alone.
template <class T, bool Byte = sizeof(T) == 1>
struct byte_only {};
template <class T>
struct byte_only<T, true> {
  using type = int;
};
template <class T>
using if_byte = typename byte_only<T>::type;

template <class R>
constexpr bool kRounded = false;
template <class T, int N>
constexpr bool kRounded<Rounded<T, N>> = true;
template <class T, int N>
constexpr bool kRounded<const Rounded<T, N>> = true;

// Four full registers of results may make one store (kJoins<T>):
//   store_joined(T* p [, T* q [, T* r, T* s]], a, b, c, d)   as one pixel, as two or as four

// Stores neighbouring vectors of one pixel.
template <class Y, class R, class... Rest>
SKIVE_INLINE void store_row(Y* to, R first, Rest... rest) {
  store(to, first);
  if constexpr (sizeof...(Rest) > 0) store_row(to + kLanes, rest...);
}
template <class P>
struct pointed;
template <class T>
struct pointed<T*> {
  using type = T;
};

// The policy of an input element type.
template <class Element>
struct tile_policy;
template <>
struct tile_policy<float> {
  using type = F32Tile;
};
template <>
struct tile_policy<uint8_t> {
  using type = U8Tile;
};
template <>
struct tile_policy<int16_t> {
  using type = I16Tile;
};

// Pixel p of the tile reads its input at `Offsets::template at<p>()` elements from the tile's base.
// `Ahead`: rows of weights by which to prefetch, 0 where they come from L1 or L2 anyway.
template <class Policy, int Pixels, int Channels, class Offsets, int Ahead = 0>
struct Tile {
  using Element = typename Policy::Element;
  using Weight = typename Policy::Weight;
  using Sum = typename Policy::Sum;
  static constexpr int kStep = Policy::kStep;
  static constexpr int kChannels = round_up(Channels, kChannelQuantum);
  static constexpr int kRow = kChannels * kStep;  // weights per row
  static constexpr int kVectors = div_up(kChannels, kLanes);
  static constexpr int lanes(int v) { return v < kVectors - 1 ? kLanes : kChannels - v * kLanes; }
  static constexpr int channels(int v) {
    return v < kVectors - 1 ? kLanes : Channels - v * kLanes;
  }

  template <class>
  struct Row;
  template <int... V>
  struct Row<Index<V...>> : Slot<V, typename Policy::template Weights<lanes(V)>>... {};
  template <class>
  struct Registers;
  template <int... I>
  struct Registers<Index<I...>> : Slot<I, typename Policy::template Lanes<lanes(I % kVectors)>>... {};

  static constexpr int kRegisters = Pixels * kVectors;
  using EachVector = Indices<kVectors>;
  using EachPixel = Indices<Pixels>;
  using EachRegister = Indices<kRegisters>;
  using WeightRow = Row<EachVector>;
  using Accumulators = Registers<EachRegister>;

  template <int... I>
  static SKIVE_INLINE void start(Accumulators& acc, const Sum* bias, Index<I...>) {
    ((slot<I>(acc) = Policy::template load_lanes<lanes(I % kVectors)>(bias + I % kVectors * kLanes)),
     ...);
  }
  // The same with the lowest 16 bits of the bias alone.
  template <int... I>
  static SKIVE_INLINE void start_low(Accumulators& acc, const Sum* bias, Index<I...>) {
    ((slot<I>(acc) = Policy::low(
          Policy::template load_lanes<lanes(I % kVectors)>(bias + I % kVectors * kLanes))),
     ...);
  }
  // The accumulators' share above 16 bits in memory, kLanes for each; they keep 0..65535.
  struct High {
    alignas(64) int32_t lanes[kRegisters * kLanes];
  };
  template <bool First, int... I>
  static SKIVE_INLINE void spill(Accumulators& acc, High& high, Index<I...>) {
    ((slot<I>(acc) =
          Policy::template spill<First, lanes(I % kVectors)>(slot<I>(acc), high.lanes + I * kLanes)),
     ...);
  }
  template <int... V>
  static SKIVE_INLINE void load_weights(WeightRow& w, const Weight* p, Index<V...>) {
    ((slot<V>(w) = Policy::template load_weights<lanes(V)>(p + V * kLanes * kStep)), ...);
  }
  template <int P, int... V>
  static SKIVE_INLINE void step_pixel(Accumulators& acc, WeightRow& w, const Element* x,
                                      Index<V...>) {
    const Element* const p = x + Offsets::template at<P>();
    // A broadcast of its own pays from two full registers of channels on.
    if constexpr (Policy::kEmbeds && kChannels <= kLanes * 3 / 2) {
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
  static SKIVE_INLINE void step(Accumulators& acc, const Element* x, const Weight* w, Index<P...>) {
    WeightRow row;
    if constexpr (Ahead > 0 && Pixels >= 4) {  // fewer pixels: one plain stream, which hardware follows
      constexpr int kLine = 64 / static_cast<int>(sizeof(Weight));
      for (int i = 0; i < kRow; i += kLine) __builtin_prefetch(w + Ahead * kRow + i);
    }
    load_weights(row, w, EachVector{});
    (step_pixel<P>(acc, row, x, EachVector{}), ...);
  }

  // `Steps` times kStep consecutive input elements against as many weight rows.
  template <int Steps>
  static SKIVE_INLINE void steps(Accumulators& acc, const Element* x, const Weight* w) {
    if constexpr (Steps > 0) {
      step(acc, x, w, EachPixel{});
      steps<Steps - 1>(acc, Policy::opaque(x + kStep), w + kRow);
    }
  }

  // Steps per turn of the loop in `run`: enough to hide the loop's own instructions.
  static constexpr int unroll(int length) {
    return length % 4 == 0 ? 4 : length % 3 == 0 ? 3 : length % 2 == 0 && length > 4 ? 2 : 4;
  }

  // `Length` consecutive input elements against weight rows. Of a length that is not a multiple of
  // kStep the last kStep elements make the last row, with zero weights where they were met before;
  // a length below kStep reads kStep elements. `Whole`: the length of the run of which these are the end.
  template <int Length, int Whole = Length>
  static SKIVE_INLINE void run(Accumulators& acc, const Element* x, const Weight* w) {
    constexpr int kWhole = Length / kStep, U = unroll(kWhole), kRest = Length % kStep;
    const Element* const end = x + kWhole / U * U * kStep;
    for (; x != end; x += U * kStep, w += U * kRow) steps<U>(acc, Policy::opaque(x), w);
    steps<kWhole % U>(acc, x, w);
    if constexpr (kRest != 0) {
      constexpr int kBack = Whole < kStep ? 0 : kStep - kRest;
      steps<1>(acc, Policy::opaque(x + kWhole % U * kStep - kBack), w + kWhole % U * kRow);
    }
  }

  template <int P, int V, class Apply>
  static SKIVE_INLINE auto result(Accumulators& acc, const Apply& apply) {
    return apply(P, V * kLanes,
                 Policy::template finish<channels(V)>(slot<P * kVectors + V>(acc)));
  }
  // The pixels from P.
  template <int P, class Apply, class At, int... V>
  static SKIVE_INLINE void finish_from(Accumulators& acc, const Apply& apply, const At& at,
                                       Index<V...> each) {
    constexpr bool kFull = Channels == kLanes || Channels == 2 * kLanes || Channels == 4 * kLanes;
    constexpr int kTogether = kFull && kJoins<typename pointed<decltype(at(0))>::type> ? 4 / kVectors : 0;
    if constexpr (P >= Pixels) {
      return;
    } else if constexpr (kTogether == 0 || P + kTogether > Pixels) {
      store_row(at(P), result<P, V>(acc, apply)...);
      finish_from<P + 1>(acc, apply, at, each);
    } else {
      if constexpr (kTogether == 1) {
        store_joined(at(P), result<P, V>(acc, apply)...);
      } else if constexpr (kTogether == 2) {
        store_joined(at(P), at(P + 1), result<P, V>(acc, apply)..., result<P + 1, V>(acc, apply)...);
      } else {
        store_joined(at(P), at(P + 1), at(P + 2), at(P + 3), result<P, V>(acc, apply)...,
                     result<P + 1, V>(acc, apply)..., result<P + 2, V>(acc, apply)...,
                     result<P + 3, V>(acc, apply)...);
      }
      finish_from<P + kTogether>(acc, apply, at, each);
    }
  }
  // Stores apply(pixel, first channel, Vec or IVec) of every finished vector; a pixel's at at(pixel).
  template <class Apply, class At>
  static SKIVE_INLINE void finish(Accumulators& acc, const Apply& apply, const At& at) {
    finish_from<0>(acc, apply, at, EachVector{});
  }
};

// The sums of a tile T in Count chains, which are added at the end: a tile of few registers waits for the
// latency of its multiply-adds otherwise. Of integers exact in any order.
template <class Policy, class T, int Count>
struct Chains {
  using Element = typename T::Element;
  using Weight = typename T::Weight;
  using Sum = typename T::Sum;
  using Accumulators = typename T::Accumulators;
  using Each = Indices<Count>;

  template <class>
  struct Set;
  template <int... C>
  struct Set<Index<C...>> : Slot<C, Accumulators>... {};
  Set<Each> set;

  alignas(64) static constexpr Sum kZeros[T::kVectors * kLanes] = {};

  template <int C>
  SKIVE_INLINE Accumulators& chain() { return slot<C>(set); }

  SKIVE_INLINE void start(const Sum* bias) { start(bias, Each{}); }
  template <int... C>
  SKIVE_INLINE void start(const Sum* bias, Index<C...>) {
    (T::start(chain<C>(), C == 0 ? bias : kZeros, typename T::EachRegister{}), ...);
  }

  // As Tile::run: rows of weights go to the chains in turn.
  template <int Length>
  SKIVE_INLINE void run(const Element* x, const Weight* w) {
    constexpr int kWhole = Length / T::kStep, kTurns = kWhole / Count;
    for (int i = 0; i < kTurns; ++i, x += Count * T::kStep, w += Count * T::kRow) steps<0, Count>(x, w);
    steps<0, kWhole % Count>(x, w);
    constexpr int kDone = kWhole % Count * T::kStep;
    if constexpr (Length % T::kStep != 0)
      T::template run<Length % T::kStep, Length>(chain<Count - 1>(), x + kDone, w + kWhole % Count * T::kRow);
  }
  template <int C, int Last>
  SKIVE_INLINE void steps(const Element* x, const Weight* w) {
    if constexpr (C < Last) {
      T::step(chain<C>(), x, w, typename T::EachPixel{});
      steps<C + 1, Last>(Policy::opaque(x + T::kStep), w + T::kRow);
    }
  }

  // Tile::finish of the sums of all chains.
  template <class Apply, class At>
  SKIVE_INLINE void finish(const Apply& apply, const At& at) {
    constexpr int kSize = T::kRegisters * kLanes;
    alignas(64) Sum others[Count > 1 ? (Count - 1) * kSize : 1];
    store<1>(others);
    T::finish(
        chain<0>(),
        [&](int p, int c, auto value) __attribute__((always_inline)) {
          for (int i = 0; i < Count - 1; ++i) {
            value = value + load<decltype(value)::lanes>(others + i * kSize + p * T::kVectors * kLanes + c);
          }
          return apply(p, c, value);
        },
        at);
  }
  // The chains from C on, one behind the other.
  template <int C>
  SKIVE_INLINE void store(Sum* to) {
    if constexpr (C < Count) {
      T::finish(
          chain<C>(), [](int, int, auto value) __attribute__((always_inline)) { return value; },
          [=](int p) __attribute__((always_inline)) { return to + p * T::kVectors * kLanes; });
      store<C + 1>(to + T::kRegisters * kLanes);
    }
  }
};

// Chains of a tile of `registers` accumulators where `in_flight` multiply-adds hide the latency of one.
constexpr int chain_count(int registers, int in_flight) {
  return registers * 4 <= in_flight ? 4 : registers * 2 <= in_flight ? 2 : 1;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TILE_H
