// Convolution and matrix product whose weights are zero in whole blocks: only what is left is multiplied.
//
// A block of NB output channels has a list of the places of its window that it reads: for each one the
// distance in elements from the window's first element, and Depth rows of weights, one after the
// other, in the layout of tile.h. The list is data; the register tile, the epilogue and the walk
// over the image are those of a dense convolution (conv.h), so that a place that is left costs what it costs
// there. Nothing else is known of the weights at compile time, and the code does not grow with them.
//
//   index   int32: kBlocks + 1 numbers, the first place of each block and the end of the last one; then
//           the distances of all places, block by block.
//   weights [places][Depth / kStep][NB][kStep]; the last block is as narrow as its channels, rounded up to 4.
//
// Distances are those in x, or, with Pitch > 0, in the copy with a border that is made first: pixels Pitch
// elements apart, rows as wide as the windows reach. A place reads Depth consecutive input channels;
// those of a window that were read before have zero weights.
//
// With Keep > 0, for bytes, a place reads no more than Keep of each 16 of its Depth consecutive bytes: n:m
// sparsity. Those of each pixel of the tile are put side by side first (gathered.h), by shuffles whose order
// stands before the weights of the place:
//
//   weights [places]: Depth bytes of order; [Depth / 16 * Keep / kStep][NB][kStep]
//
// Integer sums are exact, and so are equal to those of the dense kernel. In float32 an output is one
// chain of multiply-adds in the order of the list, from the bias; of tiles too small to keep the
// multiply-adds busy it is the sum of several chains.
//
// After Elsen et al., Fast Sparse ConvNets, 2020, whose blocks are single weights.
#ifndef SKIVE_SPARSE_H
#define SKIVE_SPARSE_H

#include "skive/conv.h"
#include "skive/gathered.h"

namespace skive {
inline namespace SKIVE_ISA {

// Group: neighbouring blocks whose outputs are stored together, which costs less, from tiles of fewer pixels.
// Depth: consecutive input elements per place. XS, YS: elements between neighbouring pixels of x and y.
// Pitch: 0, or the elements between the pixels of the copy, at least the channels of x. Share: sixteenths of
// the places that are left, about, so that layers alike share their code. Zero: what the border holds.
// Epilogue and alignments as for conv2d.
template <class In, class Filter, class Strides, class Padding, class Dilations, int NB, int Group, int Depth,
          int XS, int YS, int Pitch, int Share, class Element = float, int Zero = 0, int Keep = 0>
struct sparse_conv2d {
  static constexpr bool kGathers = Keep > 0;
  using Policy = typename sparse_policy<Element, kGathers>::type;
  using Read = typename Policy::Element;  // what is multiplied: Element, or what gathered bytes become
  using Weight = typename Policy::Weight;
  using Sum = typename Policy::Sum;
  using Geometry = ConvGeometry<In, Filter, Strides, Padding, Dilations, XS, YS>;
  static constexpr int kStep = Policy::kStep;
  static_assert(NB > 0 && NB % kChannelQuantum == 0, "a block is a multiple of 4 channels");
  static_assert(Group == 1 || NB % kLanes == 0, "blocks of a group are whole registers");
  static_assert(kGathers || (Depth % kStep == 0 && Depth <= In::C), "a place is a whole number of steps of one pixel");
  static_assert(!kGathers || (Depth % kGatherLane == 0 && Keep % kStep == 0), "whole lanes, whole steps");

  static constexpr bool kCopy = Pitch > 0;
  static constexpr ConvShape shape = [] {
    ConvShape s{In::N, Geometry::OH, Geometry::OW, In::H, In::W, Filter::KH, Filter::KW, In::C, Strides::H,
                Strides::W, Dilations::H, Dilations::W, Padding::Top, Padding::Left,
                static_cast<ptrdiff_t>(In::H) * In::W * XS, static_cast<ptrdiff_t>(In::W) * XS, XS, kCopy, 0,
                static_cast<ptrdiff_t>(Geometry::OH) * Geometry::OW, Geometry::OW, 1};
    return canonical(s, 1);
  }();
  static_assert(!kCopy || Pitch >= In::C, "pixels of the copy overlap");
  static_assert(kCopy || (Padding::Top == 0 && Padding::Left == 0 && Padding::Bottom == 0 && Padding::Right == 0),
                "a border needs the copy");

  static constexpr int OC = Filter::OC;
  static constexpr int kBlocks = div_up(OC, NB);
  static constexpr int kWide = Group * NB, kGroups = div_up(OC, kWide);
  static constexpr int kLast = OC - (kGroups - 1) * kWide;  // channels of the last group of blocks
  static constexpr int kFirst = OC < kWide ? OC : kWide;
  // Rows of weights of a place, and the bytes before them.
  static constexpr int kSteps = kGathers ? Depth / kGatherLane * Keep / kStep : Depth / kStep;
  static constexpr int kOrder = kGathers ? Depth : 0;

  // Only the weights of one block are in registers at a time.
  static constexpr int kVectors = div_up(kFirst, kLanes), kBlockVectors = div_up(kFirst < NB ? kFirst : NB, kLanes);
  static constexpr int max_pixels() {
    constexpr int n =
        (Policy::kRegisters - Policy::kInputRegisters - kBlockVectors * Policy::kWeightRegisters) / kVectors;
    return n < 1 ? 1 : n > 14 ? 14 : n;
  }
  static constexpr TileShape tile = best_tile<Policy>(shape.oh, shape.ow, kVectors, max_pixels());
  static constexpr int kStrips = div_up(shape.oh, tile.rows);  // per image, tile.rows rows each

  // The rows that tiles read: x itself, or the copy with its border.
  static constexpr int kCopiedColumns = (shape.ow - 1) * shape.sw + (shape.kw - 1) * shape.dw + 1;
  static constexpr ptrdiff_t kPixel = kCopy ? Pitch : shape.pixel;
  static constexpr ptrdiff_t kRow = kCopy ? kCopiedColumns * kPixel : shape.row;
  static constexpr int rows_read(int output_rows) {
    return (output_rows - 1) * shape.sh + (shape.kh - 1) * shape.dh + 1;
  }

  // Weights that come from beyond L2: 512 KiB are half of a common one.
  static constexpr ptrdiff_t kWeightBytes =
      static_cast<ptrdiff_t>(OC) * Filter::KH * Filter::KW * In::C * sizeof(Weight) * Share / 16;
  static constexpr bool kHeavy = kWeightBytes > 512 * 1024;
  static constexpr int kAhead = kHeavy ? 32 : 0;  // rows, 2 to 4 KiB

  // Strips whose input stays in L2 while all blocks of weights pass by.
  static constexpr ptrdiff_t kBytes = sizeof(Element);
  static constexpr int chunk_strips() {
    constexpr ptrdiff_t kBudget = (kHeavy && !kCopy ? 768 : 192) * 1024 / kBytes;
    int strips = 1;
    while (strips < kStrips && rows_read((strips + 1) * tile.rows) * kRow <= kBudget) ++strips;
    return strips;
  }
  static constexpr int kChunk = chunk_strips();
  static constexpr ptrdiff_t kCopyBytes =
      kCopy ? (rows_read(kChunk * tile.rows < shape.oh ? kChunk * tile.rows : shape.oh) * kRow * kBytes + 63) / 64 * 64
            : 0;

  // Bytes of scratch that `parts` workers need together.
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kCopyBytes) * static_cast<size_t>(parts);
  }

  template <int Columns>
  struct Offsets {
    template <int P>
    static constexpr ptrdiff_t at() {
      return P / Columns * shape.sh * kRow + P % Columns * shape.sw * kPixel;
    }
  };

  // Gathered pixels, Depth bytes each, in lanes that start with their Keep elements.
  struct Gathered {
    static constexpr int kPixel = Depth / static_cast<int>(sizeof(Read));
    template <int P>
    static constexpr ptrdiff_t at() {
      return P * kPixel;
    }
    // Where row R of a place's weights reads.
    static constexpr int row(int r) {
      constexpr int kRows = kGathers ? Keep / kStep : 1;
      return r / kRows * (kGatherLane / static_cast<int>(sizeof(Read))) + r % kRows * kStep;
    }
  };

  // Weights, places and bias of the blocks of one tile.
  struct Blocks {
    const Weight* w;
    const int32_t *starts, *places;
    const Sum* bias;
    int channel;
  };

  // `Count` vectors of channels from vector `First` of a tile T: those of one block.
  template <class T, class Offsets, int First, int Count>
  struct Walk {
    template <class>
    struct Row;
    template <int... V>
    struct Row<Index<V...>> : Slot<V, typename Policy::template Weights<T::lanes(First + V)>>... {};
    using EachVector = Indices<Count>;
    using WeightRow = Row<EachVector>;
    static constexpr int kChannels = (Count - 1) * kLanes + T::lanes(First + Count - 1);
    static constexpr int kRow = kChannels * kStep;  // weights per row
    template <int... P>
    static constexpr int count(Index<P...>) {
      return sizeof...(P);
    }
    static constexpr int kPixels = count(typename T::EachPixel{});

    template <int... V>
    static SKIVE_INLINE void load_weights(WeightRow& row, const Weight* w, Index<V...>) {
      ((slot<V>(row) = Policy::template load_weights<T::lanes(First + V)>(w + V * kLanes * kStep)), ...);
    }
    template <int P, int... V>
    static SKIVE_INLINE void step_pixel(typename T::Accumulators& acc, WeightRow& row, const Read* p, Index<V...>) {
      if constexpr (Policy::kEmbeds && kChannels <= kLanes * 3 / 2) {
        ((slot<P * T::kVectors + First + V>(acc) =
              Policy::multiply_add_broadcast(slot<P * T::kVectors + First + V>(acc), p, slot<V>(row))),
         ...);
      } else {
        const auto b = Policy::template broadcast<T::lanes(First)>(p);
        ((slot<P * T::kVectors + First + V>(acc) =
              Policy::multiply_add(slot<P * T::kVectors + First + V>(acc),
                                   Policy::template narrow<T::lanes(First + V)>(b), slot<V>(row))),
         ...);
      }
    }
    template <class At, int... P>
    static SKIVE_INLINE void step(typename T::Accumulators& acc, const Read* x, const Weight* w, Index<P...>) {
      WeightRow row;
      if constexpr (kHeavy && T::kVectors * sizeof...(P) >= 4) {
        constexpr int kLine = 64 / static_cast<int>(sizeof(Weight));
        for (int i = 0; i < kRow; i += kLine) __builtin_prefetch(w + kAhead * kRow + i);
      }
      load_weights(row, w, EachVector{});
      (step_pixel<P>(acc, row, x + At::template at<P>(), EachVector{}), ...);
    }
    // The rows of weights of one place from Row on.
    template <int Row = 0>
    static SKIVE_INLINE void rows(typename T::Accumulators& acc, const Read* x, const Weight* w) {
      if constexpr (Row < kSteps) {
        if constexpr (kGathers) step<Gathered>(acc, x + Gathered::row(Row), w + Row * kRow, typename T::EachPixel{});
        else step<Offsets>(acc, Policy::opaque(x + Row * kStep), w + Row * kRow, typename T::EachPixel{});
        rows<Row + 1>(acc, x, w);
      }
    }
    template <int... P>
    static SKIVE_INLINE void gather(Read* to, const Element* x, const Weight* w, Index<P...>) {
      const auto order = Policy::template load_order<Depth>(w);
      (Policy::template gather<Keep>(to + Gathered::template at<P>(), x + Offsets::template at<P>(), order), ...);
    }
    static constexpr int kPlace = kOrder + kSteps * kRow;
    // The weights of one place, at x.
    static SKIVE_INLINE void place(typename T::Accumulators& acc, const Element* x, const Weight* w) {
      if constexpr (kGathers) {
        alignas(64) Read pixels[kPixels * Gathered::kPixel];
        gather(pixels, x, w, typename T::EachPixel{});
        rows(acc, Policy::opaque(pixels), w + kOrder);
      } else {
        rows(acc, x, w);
      }
    }
  };

  template <class W, int... C, class Sums>
  static SKIVE_INLINE void add_places(Sums& sums, const Element* x, const int32_t* at, const Weight* w, Index<C...>) {
    (W::place(sums.template chain<C>(), x + at[C], w + C * W::kPlace), ...);
  }
  // All places of the blocks from B on.
  template <class T, class Offsets, int Channels, int Count, int B, class Sums>
  static SKIVE_INLINE void add_blocks(Sums& sums, const Element* x, const Blocks& blocks) {
    if constexpr (B * NB < Channels) {
      constexpr int kCount = div_up(Channels - B * NB < NB ? Channels - B * NB : NB, kLanes);
      using W = Walk<T, Offsets, B * div_up(NB, kLanes), kCount>;
      const Weight* w = blocks.w + static_cast<ptrdiff_t>(blocks.starts[B]) * (kOrder + kSteps * kStep * NB);
      const int32_t* at = blocks.places + blocks.starts[B];
      const int32_t* const end = blocks.places + blocks.starts[B + 1];
      if constexpr (Count > 1) {
        for (; end - at >= Count; at += Count, w += Count * W::kPlace) add_places<W>(sums, x, at, w, Indices<Count>{});
      }
      for (; at != end; ++at, w += W::kPlace) W::place(sums.template chain<0>(), x + *at, w);
      add_blocks<T, Offsets, Channels, Count, B + 1>(sums, x, blocks);
    }
  }
  // One register tile: Rows x Columns pixels from flat output pixel `pixel`, Channels channels.
  template <int Rows, int Columns, int Channels, class Y, class E>
  static SKIVE_NOINLINE void compute_tile(const Element* x, const Blocks& blocks, Y* y, ptrdiff_t pixel,
                                          const E& epilogue) {
    using T = Tile<Policy, Rows * Columns, Channels, Offsets<Columns>>;
    constexpr int kChains = Group > 1 ? 1 : chain_count(T::kRegisters, Policy::kInFlight + 1);
    const auto number = [=](int p) __attribute__((always_inline)) {
      return pixel + p / Columns * shape.to_row + p % Columns * shape.to_pixel;
    };
    Chains<Policy, T, kChains> sums;
    sums.start(blocks.bias);
    add_blocks<T, Offsets<Columns>, Channels, kChains, 0>(sums, x, blocks);
    const int channel = blocks.channel;
    sums.finish(
        [&](int p, int c, auto value) __attribute__((always_inline)) {
          return epilogue(value, number(p), channel + c);
        },
        [&](int p) __attribute__((always_inline)) { return y + number(p) * YS + channel; });
  }

  // One strip: Rows output rows from `pixel`, one block of channels.
  template <int Rows, int Channels, class Y, class E>
  static SKIVE_INLINE void compute_strip(const Element* x, const Blocks& blocks, Y* y, ptrdiff_t pixel,
                                         const E& epilogue) {
    constexpr int kRest = shape.ow % tile.columns;
    for (int c = 0; c < shape.ow - kRest; c += tile.columns) {
      compute_tile<Rows, tile.columns, Channels>(x + c * shape.sw * kPixel, blocks, y, pixel + c * shape.to_pixel,
                                                 epilogue);
    }
    if constexpr (kRest != 0) {
      constexpr int c = shape.ow - kRest;
      compute_tile<Rows, kRest, Channels>(x + c * shape.sw * kPixel, blocks, y, pixel + c * shape.to_pixel, epilogue);
    }
  }

  // Strips [begin, end) of one image, one block of channels. `x`: where strip `begin` reads first.
  template <int Channels, class Y, class E>
  static SKIVE_INLINE void compute_block(const Element* x, const Blocks& blocks, Y* y, int image, int begin, int end,
                                         const E& epilogue) {
    constexpr int kRestRows = shape.oh % tile.rows;
    ptrdiff_t pixel = shape.first + image * shape.to_image + begin * tile.rows * shape.to_row;
    const int full = end * tile.rows <= shape.oh ? end : end - 1;
    for (int s = begin; s < full; ++s) {
      compute_strip<tile.rows, Channels>(x, blocks, y, pixel, epilogue);
      x += tile.rows * shape.sh * kRow;
      pixel += tile.rows * shape.to_row;
    }
    if constexpr (kRestRows != 0) {
      if (full != end) compute_strip<kRestRows, Channels>(x, blocks, y, pixel, epilogue);
    }
  }

  // Copies input rows [begin, begin + count) of an image with their border.
  static SKIVE_NOINLINE void copy_rows(const Element* x, Element* to, int begin, int count) {
    // The image's columns that the copy holds: the last window may end before the image does, and a
    // border may be wider than the copy.
    constexpr int kLeft = shape.left < kCopiedColumns ? shape.left : kCopiedColumns;
    constexpr int kRoom = kCopiedColumns - kLeft;
    constexpr int kInside = kRoom < shape.w ? kRoom : shape.w;
    for (int r = begin; r < begin + count; ++r, to += kRow) {
      if (r < 0 || r >= shape.h) {
        fill_elements<Zero>(to, kRow);
        continue;
      }
      fill_elements<Zero>(to, kLeft * kPixel);
      const Element* const from = x + r * shape.row;
      Element* const inside = to + kLeft * kPixel;
      if constexpr (shape.pixel == kPixel && kPixel == In::C) {
        copy_elements<kInside * static_cast<int>(kPixel)>(inside, from);
      } else {
        for (int c = 0; c < kInside; ++c) copy_elements<In::C>(inside + c * kPixel, from + c * shape.pixel);
      }
      fill_elements<Zero>(inside + kInside * kPixel, (kRoom - kInside) * kPixel);
    }
  }

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const int32_t* index, const Sum* bias, Y* y, void* scratch,
                  Part part, const E& epilogue) {
    // Workers share out the strips, or the blocks of channels where that is the more even split.
    constexpr int kAllStrips = shape.images * kStrips;
    const bool by_strip = shared_as_evenly(kAllStrips, kGroups, part.count);
    const Part whole;
    const int s0 = static_cast<int>(part_begin(kAllStrips, by_strip ? part : whole));
    const int s1 = static_cast<int>(part_end(kAllStrips, by_strip ? part : whole));
    const int g0 = static_cast<int>(part_begin(kGroups, by_strip ? whole : part));
    const int g1 = static_cast<int>(part_end(kGroups, by_strip ? whole : part));
    Element* const rows = static_cast<Element*>(scratch) + part.index * (kCopyBytes / kBytes);
    const int32_t* const places = index + kBlocks + 1;

    for (int s = s0; s < s1;) {
      const int image = s / kStrips, begin = s % kStrips;
      int end = begin + kChunk < kStrips ? begin + kChunk : kStrips;
      if (end - begin > s1 - s) end = begin + (s1 - s);
      const int first = begin * tile.rows * shape.sh - shape.top;
      const Element* from = rows;
      if constexpr (!kCopy) {
        from = x + image * shape.image + first * shape.row;
      } else {
        const int last = end * tile.rows < shape.oh ? end * tile.rows : shape.oh;
        copy_rows(x + image * shape.image, rows, first, rows_read(last - begin * tile.rows));
      }
      for (int g = g0; g < g1; ++g) {
        const Blocks blocks{w, index + g * Group, places, bias + g * kWide, g * kWide};
        if (g < kGroups - 1) compute_block<kFirst>(from, blocks, y, image, begin, end, epilogue);
        else compute_block<kLast>(from, blocks, y, image, begin, end, epilogue);
      }
      s += end - begin;
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SPARSE_H
