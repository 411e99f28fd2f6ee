// Dense convolution and matrix product, NHWC: float32, uint8 x int8 and int16 x int16.
//
// One loop nest for all of them: a matrix product is a 1x1 convolution over a column of rows, a fully
// connected layer one whose window is the image. Weights are packed by compiler/pack.py as
// [OC/NB][KH][KW][IC][NB]; the last block is as narrow as its channels, rounded up to 4.
//
// Integers meet in groups of four bytes (tile.h): [OC/NB][KH][steps of a run][NB][4 or 2]. A run is the
// input channels of a tap, or, without dilation, those of all taps of a filter row; what is left of
// it after whole groups is the end of its last four bytes (see Tile::run). Their sums are exact (of
// 16 bits: modulo 2^32), so their order is free, and the border holds the input's zero point: the
// bias has the zero point's share taken out, uniformly for every pixel.
//
// With Spill > 0 a sum of 16-bit products may be larger than 32 bits hold, up to 2^40: no more than Spill
// rows of weights are multiplied before the accumulators are spilled (tile.h), and the epilogue gets the
// exact sum in float32, rounded once. The caller vouches that 65535 plus the products of any Spill * kStep
// consecutive elements of a window stay below 2^31.
//
// The nest: chunks of output rows (whose input stays in L2), blocks of NB output channels (whose
// weights then are reused by every tile of the chunk), register tiles (tile.h), filter rows, filter
// columns, input channels. Each output element is one chain of multiply-adds in the order
// (kh, kw, ic) that starts at the bias, whatever the tile or the number of parts.
//
// Padding: the rows of a chunk are copied into a scratch buffer with their border of zeros, which
// costs one pass over data that is about to be read from there OC/16 * KH * KW times. Without padding
// nothing is copied, except where the pixels of a tile would fight over one set of the L1 cache.
// Windows with wide gaps (dilations) would read mostly border: see `borderless`.
#ifndef SKIVE_CONV_H
#define SKIVE_CONV_H

#include "skive/shape.h"
#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// What is left of a convolution once layout is told apart from arithmetic.
struct ConvShape {
  int images, oh, ow;           // output
  int h, w;                     // input
  int kh, kw, run;              // taps, and the consecutive elements read at each tap
  int sh, sw, dh, dw;
  int top, left;                // border before the image; negative: where the first window starts
  ptrdiff_t image, row, pixel;  // input strides, elements
  bool copy;                    // through the padded scratch rows
  // Flat index of the first output pixel, and its steps along the output dimensions.
  ptrdiff_t first, to_image, to_row, to_pixel;
};

// The same convolution over the fewest dimensions: pixels merge into rows, images into rows, taps
// into runs, wherever their memory is contiguous. The flat index of an output pixel never changes.
// `step`: elements that weights are packed by; runs that are no multiple of it merge along a filter row
// only, and do so always.
constexpr ConvShape canonical(ConvShape s, int step) {
  const bool unit = s.sh == 1 && s.sw == 1;
  const bool dense =
      s.first == 0 && s.to_pixel == 1 && s.to_row == s.ow && s.to_image == s.to_row * s.oh;
  if (!s.copy && s.kh == 1 && s.kw == 1 && unit && dense && s.oh == s.h && s.ow == s.w) {
    // A matrix product: one row per pixel.
    s.oh = s.h = s.images * s.oh * s.ow;
    s.ow = s.w = s.images = 1;
    s.image = 0;
    s.row = s.pixel;
    s.to_image = 0, s.to_row = 1;
  } else if (!s.copy && s.oh == 1 && s.ow == 1 && s.kw == s.w && s.pixel == s.run && s.dh == 1 &&
             s.dw == 1 && (s.kh == 1 || s.kw * s.run % step == 0)) {
    // The window covers the image: one row per image.
    s.run *= s.kh * s.kw;
    s.oh = s.h = s.images;
    s.row = s.image;
    s.w = s.kh = s.kw = s.images = s.sh = s.sw = 1;
    s.image = 0;
    s.pixel = s.run;
    s.to_row = s.to_image, s.to_image = 0;
  } else if (s.h == 1 && s.kh == 1 && s.oh == 1 && s.top == 0 &&
             (s.run % step == 0 || s.kw == 1 || s.dw != 1)) {
    // One dimension: its only axis becomes the rows.
    s.h = s.w, s.oh = s.ow, s.kh = s.kw, s.sh = s.sw, s.dh = s.dw, s.top = s.left;
    s.row = s.pixel;
    s.w = s.ow = s.kw = s.sw = s.dw = 1;
    s.left = 0;
    s.to_row = s.to_pixel;
  }
  return s;
}

// Dilated windows whose neighbouring taps lie at least this many output pixels apart need no border: the
// pixels of a row fall into stretches that have the same taps inside the image, no shorter than that at its
// ends, and a tile leaves out the other taps, which would add zeros. pack.py knows it, too.
constexpr int kWideGap = 2;
constexpr bool borderless(ConvShape s) {
  const bool tall = s.kh > 1 && s.dh >= kWideGap * s.sh, wide = s.kw > 1 && s.dw >= kWideGap * s.sw;
  const bool inside = s.left <= 0 && (s.ow - 1) * s.sw + (s.kw - 1) * s.dw - s.left < s.w;
  return s.copy && (wide || (tall && (s.kw == 1 || s.dw > 1) && inside));
}
// A column of pixels as a row, so that a tile takes several.
constexpr ConvShape lain_down(ConvShape s) {
  if (s.w == 1 && s.kw == 1 && s.ow == 1 && s.left == 0) {
    s.w = s.h, s.ow = s.oh, s.kw = s.kh, s.sw = s.sh, s.dw = s.dh, s.left = s.top;
    s.pixel = s.row;
    s.h = s.oh = s.kh = s.sh = s.dh = 1;
    s.top = 0;
    s.to_pixel = s.to_row;
  }
  return s;
}
// Taps [begin, end) of one axis that lie inside an image of `size` for output pixel `at`.
struct TapRange {
  int begin, end;
};
constexpr TapRange taps_inside(int at, int stride, int border, int taps, int dilation, int size) {
  const int first = at * stride - border;  // what tap 0 reads
  const int begin = first >= 0 ? 0 : (-first + dilation - 1) / dilation;
  const int end = first >= size ? 0 : (size - first + dilation - 1) / dilation;
  return {begin < taps ? begin : taps, end < taps ? end : taps};
}

// Register tile: rows x columns of output pixels.
struct TileShape {
  int rows, columns;
};

// Multiply-add slots that one step of a tile of `pixels` x `vectors` takes: its own, or the latency
// of one when the tile is too small to hide it; and a little for its loads.
template <class Policy>
constexpr int tile_cost(int pixels, int vectors) {
  const int chains = pixels * vectors;
  return 8 * (chains > Policy::kInFlight ? chains : Policy::kInFlight) + pixels + vectors;
}

template <class Policy>
constexpr int max_pixels(int vectors) {
  const int n = (Policy::kRegisters - Policy::kInputRegisters - vectors * Policy::kWeightRegisters) / vectors;
  return n < 1 ? 1 : n > 14 ? 14 : n;
}

// The cheapest tile for an oh x ow image, of at most `most` pixels. Tiles of several rows take whole
// columns, so that at most two shapes of tile are compiled.
template <class Policy>
constexpr TileShape best_tile(int oh, int ow, int vectors, int most) {
  TileShape best{1, 1};
  long best_cost = -1;
  for (int r = 1; r <= most && r <= oh; ++r) {
    for (int c = 1; c * r <= most && c <= ow; ++c) {
      if (r > 1 && ow % c != 0) continue;
      const long columns = ow / c, rest = ow % c;
      long cost = columns * tile_cost<Policy>(r * c, vectors) * (oh / r);
      if (rest != 0) cost += tile_cost<Policy>(static_cast<int>(rest), vectors) * oh;
      if (oh % r != 0) cost += columns * tile_cost<Policy>(oh % r * c, vectors);
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = {r, c};
      }
    }
  }
  return best;
}

template <class Policy>
constexpr TileShape best_tile(int oh, int ow, int vectors) {
  return best_tile<Policy>(oh, ow, vectors, max_pixels<Policy>(vectors));
}

// Copies N elements; for lengths known at compile time.
template <int N>
SKIVE_INLINE void copy_floats(float* to, const float* from) {
  int i = 0;
  for (; i + kLanes <= N; i += kLanes) store(to + i, load(from + i));
  if constexpr (N % kLanes != 0) store(to + i, load<N % kLanes>(from + i));
}
template <int N, class T>
SKIVE_INLINE void copy_elements(T* to, const T* from) {
  if constexpr (sizeof(T) == sizeof(float)) copy_floats<N>(to, from);
  else __builtin_memcpy(to, from, sizeof(T) * N);
}
// Sets `n` elements to Value.
template <int Value, class T>
SKIVE_INLINE void fill_elements(T* to, ptrdiff_t n) {
  if constexpr (sizeof(T) == 1) {
    __builtin_memset(to, Value, static_cast<size_t>(n));
  } else {
    ptrdiff_t i = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; i + kLanes <= n; i += kLanes) store(to + i, splat(static_cast<float>(Value)));
    }
    for (; i < n; ++i) to[i] = static_cast<T>(Value);
  }
}

// The loop nest. Geometry has `shape` (a canonical ConvShape), OC and YS. The border is `Zero`.
template <class Geometry, int NB, class Element = float, int Zero = 0, int Spill = 0>
struct DenseConv {
  static_assert(Spill == 0 || Zero == 0, "parts of a sum know no zero point");
  using Policy = typename tile_policy<Element>::type;
  using Weight = typename Policy::Weight;
  using Sum = typename Policy::Sum;
  static constexpr int kStep = Policy::kStep;
  static constexpr ConvShape kLainDown = lain_down(Geometry::shape);
  static constexpr bool kBorderless = Zero == 0 && Spill == 0 && borderless(kLainDown) && kLainDown.run >= kStep;
  static constexpr ConvShape shape = kBorderless ? kLainDown : Geometry::shape;
  static constexpr int OC = Geometry::OC, YS = Geometry::YS;
  static_assert(NB > 0 && NB % kChannelQuantum == 0, "a block is a multiple of 4 channels");

  static constexpr int kBlocks = div_up(OC, NB);
  static constexpr int kLastBlock = OC - (kBlocks - 1) * NB;
  static constexpr int kFirstBlock = OC < NB ? OC : NB;

  static constexpr ptrdiff_t kBytes = sizeof(Element);
  // Without a border, at most as many pixels as an 8-way L1 cache holds where they lie whole pages apart.
  static constexpr int kMost = max_pixels<Policy>(div_up(kFirstBlock, kLanes));
  static constexpr TileShape tile =
      !kBorderless ? best_tile<Policy>(shape.oh, shape.ow, div_up(kFirstBlock, kLanes))
                   : TileShape{1, shape.sw * shape.pixel * kBytes % 4096 == 0 && kMost > 7 ? 7 : kMost};
  static constexpr int kStrips = div_up(shape.oh, tile.rows);  // per image, tile.rows rows each

  // Runs that are no multiple of kStep are packed as one per filter row.
  static constexpr bool kJoined = shape.run % kStep != 0 && shape.kw > 1 && shape.dw == 1;
  // Only the copy may be read beyond the end of a run, and has the taps of a joined run side by side.
  static constexpr bool kApart = kJoined && shape.pixel != shape.run;
  static constexpr bool kShort =
      shape.kh * shape.kw > 0 && shape.run * (kJoined ? shape.kw : 1) < kStep;

  // A tile walks its pixels in steps of kPitch elements. If that is a multiple of 4 KiB, all of them
  // fall into one set of an 8-way L1 cache and evict each other at every step; such rows are copied
  // with a cache line between the pixels.
  static constexpr ptrdiff_t kPitch =
      shape.ow > 1 ? shape.sw * (shape.copy ? shape.run : shape.pixel) : shape.sh * shape.row;
  static constexpr bool kConflict = !kBorderless && shape.kh * shape.kw * shape.run > 0 && !kJoined &&
                                    kPitch * kBytes % 4096 == 0 && tile.rows * tile.columns > 7;
  static constexpr bool kCopy = (shape.copy && !kBorderless) || kConflict || kApart || kShort;
  // The copy of a 1x1 window leaves out what its strides skip.
  static constexpr bool kGather = kConflict && !shape.copy && shape.kh == 1 && shape.kw == 1;
  static constexpr int kStrideH = kGather ? 1 : shape.sh, kStrideW = kGather ? 1 : shape.sw;

  // The rows that tiles read: x itself, or the scratch copy with its border.
  static constexpr int kCopiedColumns = (shape.ow - 1) * kStrideW + (shape.kw - 1) * shape.dw + 1;
  static constexpr ptrdiff_t kPixel =
      kCopy ? shape.run + (kConflict ? 64 / kBytes : 0) : shape.pixel;
  static constexpr ptrdiff_t kRow = kCopy ? kCopiedColumns * kPixel : shape.row;
  // Taps of a filter row that lie side by side are one run.
  static constexpr bool kMerged = kPixel == shape.run && shape.dw == 1;
  static_assert(kMerged || !kJoined, "a joined run is read as one");
  static constexpr int kTaps = kMerged ? 1 : shape.kw;
  static constexpr int kRun = kMerged ? shape.kw * shape.run : shape.run;

  // Weight rows per block; elements of the packed weights and of the packed bias, with their fill to
  // 64 bytes.
  static constexpr int kWeightRows = shape.kh * kTaps * div_up(kRun, kStep);
  static constexpr ptrdiff_t weight_count =
      (static_cast<ptrdiff_t>(kWeightRows) *
           ((kBlocks - 1) * NB + round_up(kLastBlock, kChannelQuantum)) + 15) / 16 * 16 * kStep;
  static constexpr ptrdiff_t bias_count = round_up(kBlocks * NB, 16);

  static constexpr int rows_read(int output_rows) {
    return (output_rows - 1) * kStrideH + (shape.kh - 1) * shape.dh + 1;
  }
  // Weights that come from beyond L2: 512 KiB are half of a common one.
  static constexpr bool kHeavy = weight_count * static_cast<ptrdiff_t>(sizeof(Weight)) > 512 * 1024;
  static constexpr int kAhead = kHeavy ? 32 : 0;  // 2 to 4 KiB ahead of the tile

  // Strips whose input stays in L2 while all blocks of weights pass by. Weights beyond the size of L2
  // pass by less often when the chunk takes more of it; the scratch copy stays small for the arena's sake.
  static constexpr int chunk_strips() {
    constexpr ptrdiff_t kBudget = (kHeavy && !kCopy ? 768 : 192) * 1024 / kBytes;
    if (kBorderless) {  // rows far apart: either the weights pass by once a row, or the image once a block
      constexpr ptrdiff_t kImage = shape.h * shape.row * kBytes, kWeights = weight_count * sizeof(Weight);
      return kWeights * kStrips > kImage * kBlocks ? kStrips : 1;
    }
    int strips = 1;
    while (strips < kStrips && rows_read((strips + 1) * tile.rows) * kRow <= kBudget) ++strips;
    return strips;
  }
  static constexpr int kChunk = chunk_strips();
  // Bytes of the copy, and a step to read beyond it.
  static constexpr ptrdiff_t kCopyBytes =
      kCopy ? (rows_read(kChunk * tile.rows < shape.oh ? kChunk * tile.rows : shape.oh) * kRow * kBytes +
               (kShort ? 4 : 0) + 63) / 64 * 64
            : 0;

  // Bytes of scratch that `parts` workers need together.
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kCopyBytes) * static_cast<size_t>(parts);
  }

  // Rows of weights from which on adding up several chains at the end of a tile is worth it.
  static constexpr int kLongRun = 32;

  template <int Columns>
  struct Offsets {
    template <int P>
    static constexpr ptrdiff_t at() {
      return P / Columns * kStrideH * kRow + P % Columns * kStrideW * kPixel;
    }
  };

  // One register tile: Rows x Columns pixels from flat output pixel `pixel`, Channels channels.
  // Without a border, `ranges` are the rows and columns of taps that are not left out.
  template <int Rows, int Columns, int Channels, class Y, class E, class... Ranges>
  static SKIVE_NOINLINE void compute_tile(const Element* x, const Weight* w, const Sum* bias,
                                          Y* y, ptrdiff_t pixel, int channel,
                                          const E& epilogue, Ranges... ranges) {
    using T = Tile<Policy, Rows * Columns, Channels, Offsets<Columns>, kAhead>;
    const auto at = [=](int p) __attribute__((always_inline)) {
      return pixel + p / Columns * shape.to_row + p % Columns * shape.to_pixel;
    };
    const auto to = [&](int p) __attribute__((always_inline)) { return y + at(p) * YS + channel; };
    constexpr int kChains = sizeof...(Ranges) > 0 || div_up(kRun, kStep) < kLongRun
                                ? 1 : chain_count(T::kRegisters, Policy::kChained);
    if constexpr (Spill == 0 && kChains > 1) {
      Chains<Policy, T, kChains> sums;
      sums.start(bias);
      for (int kh = 0; kh < shape.kh; ++kh) {
        for (int kw = 0; kw < kTaps; ++kw) {
          sums.template run<kRun>(x + kh * shape.dh * kRow + kw * shape.dw * kPixel, w);
          w += div_up(kRun, kStep) * T::kRow;
        }
      }
      sums.finish(
          [&](int p, int c, auto value) __attribute__((always_inline)) {
            return epilogue(value, at(p), channel + c);
          },
          to);
      return;
    }
    typename T::Accumulators acc;
    if constexpr (Spill == 0) {
      T::start(acc, bias, typename T::EachRegister{});
      if constexpr (sizeof...(Ranges) > 0) {
        multiply_some<T>(acc, x, w, ranges...);
      } else {
        for (int kh = 0; kh < shape.kh; ++kh) {
          for (int kw = 0; kw < kTaps; ++kw) {
            T::template run<kRun>(acc, x + kh * shape.dh * kRow + kw * shape.dw * kPixel, w);
            w += div_up(kRun, kStep) * T::kRow;
          }
        }
      }
      T::finish(
          acc,
          [&](int p, int c, auto value) __attribute__((always_inline)) {
            return epilogue(value, at(p), channel + c);
          },
          to);
    } else {
      typename T::High high = {};  // compilers do not see that the first spill writes it
      T::start_low(acc, bias, typename T::EachRegister{});
      sum_in_parts<T>(acc, high, x, w);
      T::finish(
          acc,
          [&](int p, int c, auto last) __attribute__((always_inline)) {
            // Three parts above the lowest 16 bits: the bias's, what was spilled, and that of the last sums.
            constexpr int N = decltype(last)::lanes;
            auto above = shift_lanes_right<16>(last) + shift_lanes_right<16>(load<N>(bias + c));
            if constexpr (kWeightRows > Spill) above = above + load<N>(high.lanes + p * T::kVectors * kLanes + c);
            const auto low = last & splat<N>(0xffff);
            // Both are exact in float32, and so is the product: the addition rounds the sum.
            return epilogue(to_float(above) * splat<N>(65536.0f) + to_float(low), at(p), channel + c);
          },
          to);
    }
  }

  // The products of some taps.
  template <class T>
  static SKIVE_INLINE void multiply_some(typename T::Accumulators& acc, const Element* x, const Weight* w,
                                         TapRange rows, TapRange columns) {
    constexpr ptrdiff_t kTap = div_up(kRun, kStep) * T::kRow;
    for (int kh = rows.begin; kh < rows.end; ++kh) {
      for (int kw = columns.begin; kw < columns.end; ++kw) {
        T::template run<kRun>(acc, x + kh * shape.dh * kRow + kw * shape.dw * kPixel,
                              w + (kh * kTaps + kw) * kTap);
      }
    }
  }

  // All products: accumulators are spilled after no more than Spill rows of weights, not at the end.
  template <class T>
  static SKIVE_INLINE void sum_in_parts(typename T::Accumulators& acc, typename T::High& high, const Element* x,
                                        const Weight* w) {
    constexpr int kRows = div_up(kRun, kStep), kParts = (kRows - 1) / Spill;  // full ones; something follows
    bool first = true;
    const auto spill = [&]() __attribute__((always_inline)) {
      if (first) T::template spill<true>(acc, high, typename T::EachRegister{});
      else T::template spill<false>(acc, high, typename T::EachRegister{});
      first = false;
    };
    int rows = 0;
    for (int kh = 0; kh < shape.kh; ++kh) {
      for (int kw = 0; kw < kTaps; ++kw) {
        const Element* p = x + kh * shape.dh * kRow + kw * shape.dw * kPixel;
        if (rows > 0 && rows + kRows > Spill) {
          spill();
          rows = 0;
        }
        for (int part = 0; part < kParts; ++part) {
          T::template run<Spill * kStep>(acc, p, w);
          spill();
          p += Spill * kStep;
          w += Spill * T::kRow;
        }
        constexpr int kRest = kRows - kParts * Spill;
        T::template run<kRun - kParts * Spill * kStep, kRun>(acc, p, w);
        w += kRest * T::kRow;
        rows = kParts > 0 ? Spill : rows + kRows;
      }
    }
  }

  // One strip: Rows output rows from `pixel`, one block of channels.
  template <int Rows, int Channels, class Y, class E>
  static SKIVE_INLINE void compute_strip(const Element* x, const Weight* w, const Sum* bias, Y* y,
                                         ptrdiff_t pixel, int channel, const E& epilogue) {
    constexpr int kRest = shape.ow % tile.columns;
    for (int c = 0; c < shape.ow - kRest; c += tile.columns) {
      compute_tile<Rows, tile.columns, Channels>(x + c * kStrideW * kPixel, w, bias, y,
                                                 pixel + c * shape.to_pixel, channel, epilogue);
    }
    if constexpr (kRest != 0) {
      constexpr int c = shape.ow - kRest;
      compute_tile<Rows, kRest, Channels>(x + c * kStrideW * kPixel, w, bias, y,
                                          pixel + c * shape.to_pixel, channel, epilogue);
    }
  }

  template <int N>
  struct Width {
    static constexpr int pixels = N;
  };
  static constexpr TapRange columns_inside(int column) {
    return taps_inside(column, shape.sw, shape.left, kTaps, shape.dw, shape.w);
  }
  // The end of the stretch of columns with the same taps that begins at `column`.
  static constexpr int stretch_end(int column) {
    const TapRange here = columns_inside(column);
    int c = column + 1;
    while (c < shape.ow && columns_inside(c).begin == here.begin && columns_inside(c).end == here.end) ++c;
    return c;
  }
  // Stretches of output row `row` from column Begin on, in tiles of nearly equal width.
  template <int Channels, int Begin, class Y, class E>
  static SKIVE_INLINE void compute_stretches(const Element* x, const Weight* w, const Sum* bias, Y* y,
                                             ptrdiff_t pixel, TapRange rows, int channel, const E& epilogue) {
    constexpr int kEnd = stretch_end(Begin), kWidth = kEnd - Begin, kTiles = div_up(kWidth, tile.columns);
    constexpr int kColumns = div_up(kWidth, kTiles), kRest = kWidth - (kTiles - 1) * kColumns;
    const auto compute = [&](auto width, int c) __attribute__((always_inline)) {
      compute_tile<1, decltype(width)::pixels, Channels>(x + c * shape.sw * kPixel, w, bias, y,
                                                        pixel + c * shape.to_pixel, channel, epilogue, rows,
                                                        columns_inside(Begin));
    };
    for (int c = Begin; c + kColumns <= kEnd; c += kColumns) compute(Width<kColumns>{}, c);
    if constexpr (kRest != kColumns) compute(Width<kRest>{}, kEnd - kRest);
    if constexpr (kEnd < shape.ow)
      compute_stretches<Channels, kEnd>(x, w, bias, y, pixel, rows, channel, epilogue);
  }

  // Strips [begin, end) of one image, one block of channels. `x`: where strip `begin` reads first.
  template <int Channels, class Y, class E>
  static SKIVE_INLINE void compute_block(const Element* x, const Weight* w, const Sum* bias, Y* y,
                                         int image, int begin, int end, int channel,
                                         const E& epilogue) {
    constexpr int kRestRows = shape.oh % tile.rows;
    ptrdiff_t pixel =
        shape.first + image * shape.to_image + begin * tile.rows * shape.to_row;
    const int full = end * tile.rows <= shape.oh ? end : end - 1;
    for (int s = begin; s < full; ++s) {
      if constexpr (kBorderless)
        compute_stretches<Channels, 0>(x - shape.left * kPixel, w, bias, y, pixel,
                                       taps_inside(s, shape.sh, shape.top, shape.kh, shape.dh, shape.h), channel,
                                       epilogue);
      else
        compute_strip<tile.rows, Channels>(x, w, bias, y, pixel, channel, epilogue);
      x += tile.rows * kStrideH * kRow;
      pixel += tile.rows * shape.to_row;
    }
    if constexpr (kRestRows != 0) {
      if (full != end) {
        compute_strip<kRestRows, Channels>(x, w, bias, y, pixel, channel, epilogue);
      }
    }
  }

  // Copies input rows [begin, begin + count) of an image with their border; of a gathered
  // image only the rows and pixels that are read count.
  static SKIVE_NOINLINE void copy_rows(const Element* x, Element* to, int begin, int count) {
    constexpr int kHeight = kGather ? shape.oh : shape.h, kWidth = kGather ? shape.ow : shape.w;
    constexpr ptrdiff_t kFromRow = shape.row * (kGather ? shape.sh : 1);
    constexpr ptrdiff_t kFromPixel = shape.pixel * (kGather ? shape.sw : 1);
    // The image's columns that the copy holds: the last window may end before the image does, and a
    // border may be wider than the copy.
    constexpr int kLeft = shape.left < 0               ? 0
                          : shape.left < kCopiedColumns ? shape.left
                                                        : kCopiedColumns;
    constexpr int kSkip = shape.left >= 0 ? 0 : -shape.left < kWidth ? -shape.left : kWidth;
    constexpr int kRoom = kCopiedColumns - kLeft;
    constexpr int kInside = kRoom < kWidth - kSkip ? kRoom : kWidth - kSkip;
    for (int r = begin; r < begin + count; ++r, to += kRow) {
      if (r < 0 || r >= kHeight) {
        fill_elements<Zero>(to, kRow);
        continue;
      }
      fill_elements<Zero>(to, kLeft * kPixel);
      const Element* const from = x + r * kFromRow + kSkip * kFromPixel;
      Element* const inside = to + kLeft * kPixel;
      if constexpr (kFromPixel == kPixel && kPixel == shape.run) {
        copy_elements<kInside * static_cast<int>(kPixel)>(inside, from);
      } else {
        for (int c = 0; c < kInside; ++c) {
          copy_elements<shape.run>(inside + c * kPixel, from + c * kFromPixel);
        }
      }
      fill_elements<Zero>(inside + kInside * kPixel, (kRoom - kInside) * kPixel);
    }
  }

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const Sum* bias, Y* y, void* scratch,
                  Part part, const E& epilogue) {
    // Workers share out the strips, or the blocks of channels where that is the more even split.
    constexpr int kAllStrips = shape.images * kStrips;
    const bool by_strip = shared_as_evenly(kAllStrips, kBlocks, part.count);
    const Part whole;
    const int s0 = static_cast<int>(part_begin(kAllStrips, by_strip ? part : whole));
    const int s1 = static_cast<int>(part_end(kAllStrips, by_strip ? part : whole));
    const int b0 = static_cast<int>(part_begin(kBlocks, by_strip ? whole : part));
    const int b1 = static_cast<int>(part_end(kBlocks, by_strip ? whole : part));
    Element* const rows = static_cast<Element*>(scratch) + part.index * (kCopyBytes / kBytes);

    for (int s = s0; s < s1;) {
      const int image = s / kStrips, begin = s % kStrips;
      int end = begin + kChunk < kStrips ? begin + kChunk : kStrips;
      if (end - begin > s1 - s) end = begin + (s1 - s);
      const int first = begin * tile.rows * kStrideH - shape.top;
      const Element* from = rows;
      if constexpr (!kCopy) {
        from = x + image * shape.image + first * shape.row;
      } else {
        const int last = end * tile.rows < shape.oh ? end * tile.rows : shape.oh;
        copy_rows(x + image * shape.image, rows, first, rows_read(last - begin * tile.rows));
      }
      for (int b = b0; b < b1; ++b) {
        const Weight* const wb = w + static_cast<ptrdiff_t>(b) * NB * kWeightRows * kStep;
        if (b < kBlocks - 1) {
          compute_block<kFirstBlock>(from, wb, bias + b * NB, y, image, begin, end, b * NB, epilogue);
        } else {
          compute_block<kLastBlock>(from, wb, bias + b * NB, y, image, begin, end, b * NB, epilogue);
        }
      }
      s += end - begin;
    }
  }
};

// y[n, oh, ow, :] = epilogue(bias + sum over (kh, kw, ic) of x * w).
// NB: output channels of a packed block. XS, YS: elements between neighbouring pixels of x and y.
// `epilogue(Vec<L> acc, ptrdiff_t pixel, int channel)` gets every finished vector once and returns
// what is stored; `pixel` is the flat output pixel (n*OH + oh)*OW + ow.
// Element float, uint8_t (weights int8_t) or int16_t (weights int16_t); of the integers the sum is an
// IVec<L>, the bias int32_t, the border Zero, and what the epilogue returns is stored as y's type.
// w, bias and scratch: 64-byte aligned, packed by pack_conv2d and pack_bias, pack_conv2d_u8, pack_conv2d_i16
// and pack_bias_i32; x and y: aligned to their elements.
template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS_,
          int Step = 1>
struct ConvGeometry {
  static constexpr int OC = Filter::OC, YS = YS_;
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, Filter::KH,
                                         Strides::H, Dilations::H);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, Filter::KW,
                                         Strides::W, Dilations::W);
  static_assert(OH > 0 && OW > 0, "the window is larger than the padded image");
  static constexpr ConvShape shape = canonical(
      {In::N, OH, OW, In::H, In::W, Filter::KH, Filter::KW, In::C, Strides::H, Strides::W,
       Dilations::H, Dilations::W, Padding::Top, Padding::Left,
       static_cast<ptrdiff_t>(In::H) * In::W * XS, static_cast<ptrdiff_t>(In::W) * XS, XS,
       Padding::Top != 0 || Padding::Left != 0 || Padding::Bottom != 0 || Padding::Right != 0, 0,
       static_cast<ptrdiff_t>(OH) * OW, OW, 1},
      Step);
};
template <class Element>
constexpr int tile_step() { return tile_policy<Element>::type::kStep; }
template <class In, class Filter, class Strides, class Padding, class Dilations, int NB,
          int XS = In::C, int YS = Filter::OC, class Element = float, int Zero = 0, int Spill = 0>
struct conv2d
    : DenseConv<ConvGeometry<In, Filter, Strides, Padding, Dilations, XS, YS, tile_step<Element>()>, NB,
                Element, Zero, Spill> {};

// Groups of channels side by side: each is a dense convolution over a slice of x and of y.
// Weights and bias: those of the groups one after the other, each packed as for conv2d.
template <class In, class Filter, class Strides, class Padding, class Dilations, int Groups, int NB,
          int XS = In::C, int YS = Filter::OC, class Element = float, int Zero = 0, int Spill = 0>
struct grouped_conv2d {
  static_assert(In::C % Groups == 0 && Filter::OC % Groups == 0, "groups divide the channels");
  static constexpr int IC = In::C / Groups, OC = Filter::OC / Groups;
  using Dense = conv2d<Image<In::N, In::H, In::W, IC>, Kernel<OC, Filter::KH, Filter::KW>, Strides,
                       Padding, Dilations, NB, XS, YS, Element, Zero, Spill>;
  using Weight = typename Dense::Weight;
  using Sum = typename Dense::Sum;
  static constexpr ptrdiff_t weight_count = Groups * Dense::weight_count;
  static constexpr ptrdiff_t bias_count = Groups * Dense::bias_count;

  static constexpr size_t scratch_bytes(int parts = 1) { return Dense::scratch_bytes(parts); }

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const Sum* bias, Y* y, void* scratch, Part part,
                  const E& epilogue) {
    for (int g = 0; g < Groups; ++g) {
      const int channel = g * OC;
      Dense::run(x + g * IC, w + g * Dense::weight_count, bias + g * Dense::bias_count, y + channel,
                 scratch, part,
                 [&](auto acc, ptrdiff_t pixel, int c) __attribute__((always_inline)) {
                   return epilogue(acc, pixel, channel + c);
                 });
    }
  }
};

// One axis of a transposed convolution, for the output positions `offset`, `offset` + stride, ...
// Position o collects x[i] * w[k] for all i * stride + k * dilation = o + pad. The taps that ever
// reach these positions are every step-th one; reversed, they are an ordinary convolution of stride 1.
struct Phase {
  int tap, taps;  // first tap, and how many
  int step;       // taps between them
  int dilation;   // of the ordinary convolution
  int pad;        // border before x; negative: where the first window starts
  int outputs;
};
constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }
constexpr Phase phase_of(int offset, int pad, int kernel, int stride, int dilation, int out) {
  const int g = common_divisor(dilation, stride);
  Phase p{0, 0, stride / g, dilation / g, 0, out > offset ? (out - offset - 1) / stride + 1 : 0};
  while (p.tap < p.step && (offset + pad - p.tap * dilation) % stride != 0) ++p.tap;
  if (p.tap < p.step && p.tap < kernel) p.taps = (kernel - p.tap - 1) / p.step + 1;
  if (p.taps > 0) {
    p.pad = (p.taps - 1) * p.dilation - (offset + pad - p.tap * dilation) / stride;
  }
  return p;
}

// The output pixels of a transposed convolution that share (oh mod stride, ow mod stride).
template <class In, int OC_, class Strides, class Out, int Y, int X, int XS, int YS_, int KH, int KW,
          class Padding, class Dilations, int Step = 1>
struct PhaseGeometry {
  static constexpr int OC = OC_, YS = YS_;
  static constexpr Phase rows =
      phase_of(Y, Padding::Top, KH, Strides::H, Dilations::H, Out::H);
  static constexpr Phase columns =
      phase_of(X, Padding::Left, KW, Strides::W, Dilations::W, Out::W);
  static constexpr bool kEmpty = rows.outputs == 0 || columns.outputs == 0;
  static constexpr bool kTaps = rows.taps > 0 && columns.taps > 0;
  static constexpr bool inside(Phase p, int in) {
    return p.pad == 0 && p.outputs + (p.taps - 1) * p.dilation <= in;
  }
  static constexpr ConvShape shape = canonical(
      {In::N, rows.outputs, columns.outputs, In::H, In::W, kTaps ? rows.taps : 0,
       kTaps ? columns.taps : 0, In::C, 1, 1, rows.dilation, columns.dilation, rows.pad, columns.pad,
       static_cast<ptrdiff_t>(In::H) * In::W * XS, static_cast<ptrdiff_t>(In::W) * XS, XS,
       kTaps && !(inside(rows, In::H) && inside(columns, In::W)),
       static_cast<ptrdiff_t>(Y) * Out::W + X, static_cast<ptrdiff_t>(Out::H) * Out::W,
       static_cast<ptrdiff_t>(Strides::H) * Out::W, Strides::W},
      Step);
};

// y = epilogue(bias + the transpose of conv2d): x[n, ih, iw, :] is added, times w[kh, kw], to
// y[n, ih*SH + kh*DH - Top, iw*SW + kw*DW - Left, :]. `Out` gives the output's height and width; output
// paddings are part of it. One ordinary convolution per phase (oh mod SH, ow mod SW): no zeros are
// multiplied. Weights: packed by pack_conv_transpose2d, or, with a bias for each phase (the zero point's
// share depends on its taps), by pack_conv_transpose2d_u8 or _i16 and pack_conv_transpose2d_bias_i32.
// Dumoulin and Visin, A guide to convolution arithmetic for deep learning, 2016.
template <class In, class Filter, class Strides, class Padding, class Dilations, class Out, int Groups,
          int NB, int XS = In::C, int YS = Filter::OC, class Element = float, int Zero = 0>
struct conv_transpose2d {
  static_assert(In::C % Groups == 0 && Filter::OC % Groups == 0, "groups divide the channels");
  static constexpr int IC = In::C / Groups, OC = Filter::OC / Groups;
  static constexpr int kPhases = Strides::H * Strides::W;
  template <int P>
  using Geometry = PhaseGeometry<Image<In::N, In::H, In::W, IC>, OC, Strides, Out, P / Strides::W,
                                 P % Strides::W, XS, YS, Filter::KH, Filter::KW, Padding, Dilations,
                                 tile_step<Element>()>;
  template <int P>
  using Dense = DenseConv<Geometry<P>, NB, Element, Zero>;
  using Weight = typename tile_policy<Element>::type::Weight;
  using Sum = typename tile_policy<Element>::type::Sum;

  template <int P>
  static constexpr ptrdiff_t phase_weights() {
    if constexpr (Geometry<P>::kTaps) return Dense<P>::weight_count;
    else return 0;
  }
  template <int P>
  static constexpr size_t phase_scratch(int parts) {
    if constexpr (Geometry<P>::kEmpty) return 0;
    else return Dense<P>::scratch_bytes(parts);
  }
  template <int P>
  static constexpr size_t most_scratch(int parts) {
    if constexpr (P == kPhases) {
      return 0;
    } else {
      const size_t mine = phase_scratch<P>(parts), rest = most_scratch<P + 1>(parts);
      return mine > rest ? mine : rest;
    }
  }
  static constexpr size_t scratch_bytes(int parts = 1) { return most_scratch<0>(parts); }
  static constexpr ptrdiff_t kGroupBias = round_up(div_up(OC, NB) * NB, 16);
  static constexpr ptrdiff_t kPhaseBias = sizeof(Element) == sizeof(float) ? 0 : Groups * kGroupBias;

  template <int P, class Y, class E>
  static SKIVE_INLINE void run_phases(const Element* x, const Weight* w, const Sum* bias, Y* y,
                                      void* scratch, Part part, const E& epilogue) {
    if constexpr (P < kPhases) {
      if constexpr (!Geometry<P>::kEmpty) {
        // Workers pass through the phases without waiting for each other: each one's share of the
        // scratch is as large as its largest phase needs.
        char* const own_scratch =
            static_cast<char*>(scratch) + part.index * (most_scratch<0>(1) - phase_scratch<P>(1));
        for (int g = 0; g < Groups; ++g) {
          const int channel = g * OC;
          Dense<P>::run(x + g * IC, w + g * phase_weights<P>(), bias + g * kGroupBias, y + channel,
                        own_scratch, part,
                        [&](auto acc, ptrdiff_t pixel, int c) __attribute__((always_inline)) {
                          return epilogue(acc, pixel, channel + c);
                        });
        }
      }
      run_phases<P + 1>(x, w + Groups * phase_weights<P>(), bias + kPhaseBias, y, scratch, part,
                        epilogue);
    }
  }

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const Sum* bias, Y* y, void* scratch, Part part,
                  const E& epilogue) {
    run_phases<0>(x, w, bias, y, scratch, part, epilogue);
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_CONV_H
