// 1x1 convolutions and fully connected layers in float32 whose zero weights lie anywhere.
//
// A weight that is left multiplies one input channel of many pixels at once. Pixels of a chunk are
// therefore turned first: kChunk of them side by side for each channel, in scratch. Outputs are made
// `Together` neighbouring channels at a time, which read the same input channels (1: each its own), and
// turned back a register of channels at a time for the epilogue.
//
//   index    int32: one number for each group of Together channels and one more, where its inputs begin;
//            then the inputs of all groups, as input channel * kChunk.
//   weights  [inputs][Together]
//
// A sum starts at the bias and takes its inputs in the order of the list; with Together 1 every second
// one is added apart.
//
// After Elsen et al., Fast Sparse ConvNets, 2020, where the network's values lie in this order all along.
#ifndef SKIVE_SPMM_H
#define SKIVE_SPMM_H

#include "skive/conv.h"
#include "skive/isa/transpose_floats.h"

namespace skive {
inline namespace SKIVE_ISA {

// y[r, :] = epilogue(bias + W x[r, :]) of Rows pixels, XS and YS floats apart. `epilogue` as for conv2d.
template <int Rows, int IC, int OC, int Together, int XS = IC, int YS = OC>
struct sparse_rows {
  static constexpr int kVectors = 4;  // of pixels
  static constexpr int kChunk = kVectors * kLanes;
  static constexpr int kChunks = div_up(Rows, kChunk);
  static constexpr int kBlocks = div_up(OC, kLanes);
  static_assert(kLanes % Together == 0, "a register of channels is a whole number of groups");
  static constexpr int kGroups = div_up(OC, Together);
  static constexpr ptrdiff_t kTurned = static_cast<ptrdiff_t>(IC) * kChunk, kResults = kLanes * kChunk;

  // Bytes of scratch that `parts` workers need together.
  static constexpr size_t scratch_bytes(int parts = 1) {
    return sizeof(float) * static_cast<size_t>(kTurned + 2 * kResults) * static_cast<size_t>(parts);
  }

  // to[c * kChunk + r] = x[r * XS + c] for `Count` pixels.
  template <int Count>
  static SKIVE_NOINLINE void turn(const float* x, float* to) {
    constexpr int kWhole = Count / kFloatSquare * kFloatSquare, kChannels = IC / kFloatSquare * kFloatSquare;
    for (int r = 0; r < kWhole; r += kFloatSquare) {
      for (int c = 0; c < kChannels; c += kFloatSquare) {
        transpose_floats(x + static_cast<ptrdiff_t>(r) * XS + c, XS, to + c * kChunk + r, kChunk);
      }
      for (int c = kChannels; c < IC; ++c) {
        for (int i = r; i < r + kFloatSquare; ++i) to[c * kChunk + i] = x[static_cast<ptrdiff_t>(i) * XS + c];
      }
    }
    constexpr int kFilled = round_up(Count, kLanes);
    for (int c = 0; c < IC; ++c) {
      for (int r = kWhole; r < Count; ++r) to[c * kChunk + r] = x[static_cast<ptrdiff_t>(r) * XS + c];
      for (int r = Count; r < kFilled; ++r) to[c * kChunk + r] = 0;
    }
  }

  template <class>
  struct Registers;
  template <int... I>
  struct Registers<Index<I...>> : Slot<I, Vec<kLanes>>... {};

  template <int V, int First, int... I, class R>
  static SKIVE_INLINE void add_input(R& acc, const float* x, const float* w, Index<I...>) {
    ((slot<First + I>(acc) = fma(load(x + I % V * kLanes), splat(w[I / V]), slot<First + I>(acc))), ...);
  }
  template <int V, int... I, class R>
  static SKIVE_INLINE void start(R& acc, const float* bias, int channels, Index<I...>) {
    ((slot<I>(acc) = I / V < channels ? splat(bias[I / V]) : zero<kLanes>()), ...);
  }
  template <int First, int... I, class R>
  static SKIVE_INLINE void merge(R& acc, Index<I...>) {
    ((slot<I>(acc) = slot<I>(acc) + slot<First + I>(acc)), ...);
  }
  template <int V, int... I, class R>
  static SKIVE_INLINE void keep(R& acc, float* to, Index<I...>) {
    (store(to + I / V * kChunk + I % V * kLanes, slot<I>(acc)), ...);
  }

  // V vectors of pixels of one group of channels, from `x` turned to `to` [Together][kChunk].
  template <int V>
  static SKIVE_NOINLINE void group(const float* x, const float* w, const int32_t* at, const int32_t* end,
                                   const float* bias, float* to) {
    constexpr int kOwn = Together * V, kChains = Together == 1 ? 2 : 1;
    Registers<Indices<kOwn * kChains>> acc;
    start<V>(acc, bias, Together, Indices<kOwn * kChains>{});
    if constexpr (kChains == 2) {
      for (; end - at >= 2; at += 2, w += 2) {
        add_input<V, 0>(acc, x + at[0], w, Indices<kOwn>{});
        add_input<V, kOwn>(acc, x + at[1], w + 1, Indices<kOwn>{});
      }
    }
    for (; at != end; ++at, w += Together) add_input<V, 0>(acc, x + *at, w, Indices<kOwn>{});
    if constexpr (kChains == 2) merge<kOwn>(acc, Indices<kOwn>{});
    keep<V>(acc, to, Indices<kOwn>{});
  }

  // One register of channels from `channel` on of `Count` pixels: made, turned back, and stored.
  template <int Count, int Channels, class E>
  static SKIVE_INLINE void block(const float* turned, const float* w, const int32_t* index, const float* bias,
                                 float* y, float* results, ptrdiff_t pixel, int channel, const E& epilogue) {
    constexpr int V = div_up(Count, kLanes);
    const int32_t* const inputs = index + kGroups + 1;
    for (int c = 0; c < Channels; c += Together) {
      const int g = (channel + c) / Together;
      group<V>(turned, w + static_cast<ptrdiff_t>(index[g]) * Together, inputs + index[g], inputs + index[g + 1],
               bias + channel + c, results + c * kChunk);
    }
    float* const rows = results + kResults;  // [kChunk][kLanes]
    constexpr int kSide = kLanes < kFloatSquare ? kLanes : kFloatSquare;
    if constexpr (kSide == kFloatSquare) {
      for (int r = 0; r < round_up(Count, kFloatSquare); r += kFloatSquare) {
        for (int c = 0; c < Channels; c += kFloatSquare) {
          transpose_floats(results + c * kChunk + r, kChunk, rows + r * kLanes + c, kLanes);
        }
      }
    } else {
      for (int r = 0; r < Count; ++r)
        for (int c = 0; c < Channels; ++c) rows[r * kLanes + c] = results[c * kChunk + r];
    }
    for (int r = 0; r < Count; ++r) {
      store(y + (pixel + r) * YS + channel, epilogue(load<Channels>(rows + r * kLanes), pixel + r, channel));
    }
  }

  template <int Count, class E>
  static SKIVE_INLINE void chunk(const float* x, const float* w, const int32_t* index, const float* bias, float* y,
                                 float* scratch, ptrdiff_t pixel, int b0, int b1, const E& epilogue) {
    turn<Count>(x + pixel * XS, scratch);
    constexpr int kLast = OC - (kBlocks - 1) * kLanes;
    for (int b = b0; b < b1; ++b) {
      if (kLast == kLanes || b < kBlocks - 1) {
        block<Count, OC < kLanes ? OC : kLanes>(scratch, w, index, bias, y, scratch + kTurned, pixel, b * kLanes,
                                                epilogue);
      } else {
        block<Count, kLast>(scratch, w, index, bias, y, scratch + kTurned, pixel, b * kLanes, epilogue);
      }
    }
  }

  template <class E>
  static void run(const float* x, const float* w, const int32_t* index, const float* bias, float* y, void* scratch,
                  Part part, const E& epilogue) {
    // Workers share out the chunks, or the blocks of channels where there are too few of these.
    const bool by_chunk = kChunks >= part.count || kChunks >= kBlocks;
    const Part whole;
    const int c0 = static_cast<int>(part_begin(kChunks, by_chunk ? part : whole));
    const int c1 = static_cast<int>(part_end(kChunks, by_chunk ? part : whole));
    const int b0 = static_cast<int>(part_begin(kBlocks, by_chunk ? whole : part));
    const int b1 = static_cast<int>(part_end(kBlocks, by_chunk ? whole : part));
    float* const own = static_cast<float*>(scratch) + part.index * (kTurned + 2 * kResults);
    constexpr int kLast = Rows - (kChunks - 1) * kChunk;
    for (int c = c0; c < c1; ++c) {
      const ptrdiff_t pixel = static_cast<ptrdiff_t>(c) * kChunk;
      if (kLast == kChunk || c < kChunks - 1) {
        chunk<(Rows < kChunk ? Rows : kChunk)>(x, w, index, bias, y, own, pixel, b0, b1, epilogue);
      } else {
        chunk<kLast>(x, w, index, bias, y, own, pixel, b0, b1, epilogue);
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SPMM_H
