// Sliding windows over one channel at a time: the loop nest of depthwise convolution and pooling.
//
// The nest walks (image, block of channels, output row, tile of output columns). A tile keeps one
// accumulator per output column in registers; every input vector that a row of taps shares is
// loaded once. Blocks of channels are the outer loop, so that the KH input rows of one block stay in
// L1 while the window slides down.
//
// Borders cost no branch inside a tile. Rows: the range of taps that lie inside the image is
// computed once per output row. Columns: a tile at the left or right edge has compile-time
// coordinates, so taps outside the image are not even compiled; the tiles between them are one loop.
// Windows whose border is wider than one tile (large dilations) take their border columns one by one,
// and very wide windows all of them.
//
// `Op` supplies the arithmetic, on vectors V of N lanes: Vec<N>, IVec<N> or Packed<T, N>, whichever
// `first` returns; inputs are loaded as V too.
//   Row<N> row(c, kh)              what one row of taps needs, e.g. its weights; lives in registers
//   V first<N>(c)                  start value for channels [c, c + N)
//   V step(acc, x, row, kw)        one tap
//   V last(acc, oh, ow, inner)     finished value; `inner` says that all KW columns are inside
#ifndef SKIVE_WINDOW_H
#define SKIVE_WINDOW_H

#include "skive/row.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }

// A vector of type V from consecutive elements at p.
template <class V>
struct Loader;
template <int N>
struct Loader<Vec<N>> {
  static SKIVE_INLINE Vec<N> at(const float* p) { return load<N>(p); }
};
template <int N>
struct Loader<IVec<N>> {
  template <class X>
  static SKIVE_INLINE IVec<N> at(const X* p) { return load<N>(p); }
};
template <class T, int N>
struct Loader<Packed<T, N>> {
  // Bytes become words where T is int16_t.
  template <class X>
  static SKIVE_INLINE Packed<T, N> at(const X* p) {
    if constexpr (sizeof(X) == sizeof(T))
      return load_packed<T, N>(p);
    else
      return load_words_of<N>(p);
  }
};

// The value that goes to memory: what the epilogue makes of it. Packed integers are widened for an
// epilogue, kLanes at a time, through a buffer; NoEpilogue stores them as they are.
struct NoEpilogue {
  template <class V>
  SKIVE_INLINE V operator()(V value, ptrdiff_t, int) const { return value; }
};
template <class Y, class V, class E>
SKIVE_INLINE void finish(Y* y, V value, ptrdiff_t pixel, int c, const E& epilogue) {
  store(y, epilogue(value, pixel, c));
}
template <class T, int N>
SKIVE_INLINE void finish(T* y, Packed<T, N> value, ptrdiff_t, int, const NoEpilogue&) {
  store(y, value);
}
template <class Y, class T, int N, class E>
SKIVE_INLINE void finish(Y* y, Packed<T, N> value, ptrdiff_t pixel, int c, const E& epilogue) {
  T lane[N];
  store(lane, value);
  each_vector<N>([&](ptrdiff_t i, auto lanes) {
    store(y + i, epilogue(load<decltype(lanes)::count>(lane + i), pixel, c + static_cast<int>(i)));
  });
}

// XS, YS: elements between neighbouring pixels of input and output. L: lanes of a whole vector.
template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS,
          int L = kLanes>
struct Window {
  static constexpr int C = In::C, KH = Filter::KH, KW = Filter::KW;
  static constexpr int OH =
      window_count(In::H, Padding::Top, Padding::Bottom, KH, Strides::H, Dilations::H);
  static constexpr int OW =
      window_count(In::W, Padding::Left, Padding::Right, KW, Strides::W, Dilations::W);
  static_assert(OH > 0 && OW > 0, "the window is larger than the padded image");
  static_assert(XS >= C && YS >= C, "pixels overlap");

  // Output columns [kInnerBegin, kInnerEnd) have all their taps inside the image.
  static constexpr int kLastTap = (KW - 1) * Dilations::W - Padding::Left;
  static constexpr int kInnerBegin = min_int(OW, (Padding::Left + Strides::W - 1) / Strides::W);
  static constexpr int kInnerEnd =
      In::W - 1 < kLastTap
          ? kInnerBegin
          : max_int(kInnerBegin, min_int(OW, (In::W - 1 - kLastTap) / Strides::W + 1));

  // A tile compiles a load for every input column under it: it stays below this many, and a window
  // that is wider alone takes all its columns one by one, in loops.
  static constexpr int kSpanMax = 256;
  static constexpr int kReach = (KW - 1) * Dilations::W + 1;  // input columns under a window
  static constexpr bool kTiled = kReach <= kSpanMax;
  // Eight accumulators hide the multiply-add's latency; with more, large windows spill.
  static constexpr int kTileMax =
      kTiled ? min_int(8, (kSpanMax - kReach) / Strides::W + 1) : 1;
  static constexpr int kTiles = (OW + kTileMax - 1) / kTileMax;
  static constexpr int kTile = (OW + kTiles - 1) / kTiles;  // tiles of nearly equal width
  static constexpr int kLastBegin = (OW - 1) / kTile * kTile;
  static constexpr int kLastTile = OW - kLastBegin;
  static constexpr bool kStaticEdges = kInnerBegin <= kTile && kInnerEnd >= kLastBegin;

  static constexpr int kFullBlocks = C / L;
  static constexpr int kRemainder = C % L;
  static constexpr int kBlocks = kFullBlocks + (kRemainder != 0);

  template <class X, class Y, class Op, class E>
  static void run(const X* x, Y* y, Part part, const Op& op, const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kBlocks * OH;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      const int oh = static_cast<int>(i % OH);
      const int block = static_cast<int>(i / OH % kBlocks);
      const int n = static_cast<int>(i / OH / kBlocks);
      if constexpr (kFullBlocks != 0)
        if (block < kFullBlocks) row<L>(x, y, n, oh, block * L, op, epilogue);
      if constexpr (kRemainder != 0)
        if (block == kFullBlocks) row<kRemainder>(x, y, n, oh, block * L, op, epilogue);
    }
  }

 private:
  // Where one output row reads and writes.
  template <class X, class Y>
  struct Line {
    const X* x;         // first input row with a tap inside the image, column 0, channel c
    Y* y;               // output row, column 0, channel c
    ptrdiff_t pixel;    // flat index of the row's first output pixel
    int oh, c;
    int kh_begin, kh_end;
  };

  template <int N, class X, class Y, class Op, class E>
  static void row(const X* x, Y* y, int n, int oh, int c, const Op& op, const E& epilogue) {
    const int top = oh * Strides::H - Padding::Top;
    const int kh_begin = top < 0 ? (-top + Dilations::H - 1) / Dilations::H : 0;
    const int below = In::H - top;  // rows from the window's top to the image's end
    const int kh_end = below <= 0 ? 0 : min_int(KH, (below + Dilations::H - 1) / Dilations::H);
    const ptrdiff_t ih = kh_begin < kh_end ? top + kh_begin * Dilations::H : 0;
    const ptrdiff_t pixel = (ptrdiff_t{n} * OH + oh) * OW;
    const Line<X, Y> line{x + (ptrdiff_t{n} * In::H + ih) * In::W * XS + c, y + pixel * YS + c,
                          pixel, oh, c, kh_begin, kh_end};
    if constexpr (!kTiled) {
      for (int ow = 0; ow < OW; ++ow) edge_column<N>(line, ow, op, epilogue);
    } else if constexpr (kStaticEdges) {
      edge_tile<N, 0, kTile>(line, op, epilogue);
      for (int ow = kTile; ow < kLastBegin; ow += kTile)
        inner_tile<N, kTile>(line, ow, op, epilogue);
      if constexpr (kLastBegin > 0) edge_tile<N, kLastBegin, kLastTile>(line, op, epilogue);
    } else {
      for (int ow = 0; ow < kInnerBegin; ++ow) edge_column<N>(line, ow, op, epilogue);
      int ow = kInnerBegin;
      if constexpr (kInnerEnd - kInnerBegin >= kTile)
        for (; ow <= kInnerEnd - kTile; ow += kTile) inner_tile<N, kTile>(line, ow, op, epilogue);
      for (; ow < kInnerEnd; ++ow) inner_tile<N, 1>(line, ow, op, epilogue);
      for (; ow < OW; ++ow) edge_column<N>(line, ow, op, epilogue);
    }
  }

  // Input columns under a tile of T output columns.
  static constexpr int span(int t) { return (t - 1) * Strides::W + kReach; }
  template <int T>
  using EachColumn = Indices<span(T)>;

  static constexpr bool reads(int t, int kw, int j) {
    return t * Strides::W + kw * Dilations::W == j;
  }
  static constexpr bool any_reads(int columns, int j) {
    for (int t = 0; t < columns; ++t)
      for (int kw = 0; kw < KW; ++kw)
        if (reads(t, kw, j)) return true;
    return false;
  }

  // Input column J of the tile, loaded once for all the taps that read it.
  template <int J, class V, int T, class X, class Row, class Op>
  static SKIVE_INLINE void column(V (&acc)[T], const X* x, const Row& taps, const Op& op) {
    if constexpr (any_reads(T, J)) {
      const V v = in_register(Loader<V>::at(x + ptrdiff_t{J} * XS));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 64
        for (int kw = 0; kw < KW; ++kw)
          if (reads(t, kw, J)) acc[t] = op.step(acc[t], v, taps, kw);
    }
  }
  template <class V, int T, class X, class Row, class Op, int... J>
  static SKIVE_INLINE void inner_columns(V (&acc)[T], const X* x, const Row& taps, const Op& op,
                                         Index<J...>) {
    (column<J>(acc, x, taps, op), ...);
  }

  // The same for a tile whose first input column is IW0; columns outside the image vanish.
  template <int IW0, int J, class V, int T, class X, class Row, class Op>
  static SKIVE_INLINE void edge_column_of_tile(V (&acc)[T], const X* x, const Row& taps,
                                               const Op& op) {
    if constexpr (IW0 + J >= 0 && IW0 + J < In::W) column<J>(acc, x, taps, op);
  }
  template <int IW0, class V, int T, class X, class Row, class Op, int... J>
  static SKIVE_INLINE void edge_columns(V (&acc)[T], const X* x, const Row& taps, const Op& op,
                                        Index<J...>) {
    (edge_column_of_tile<IW0, J>(acc, x, taps, op), ...);
  }

  // T columns from `ow`, all taps inside the image.
  template <int N, int T, class X, class Y, class Op, class E>
  static SKIVE_INLINE void inner_tile(const Line<X, Y>& line, int ow, const Op& op,
                                      const E& epilogue) {
    decltype(op.template first<N>(0)) acc[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t] = op.template first<N>(line.c);
    const X* x = line.x + ptrdiff_t{ow * Strides::W - Padding::Left} * XS;
    for (int kh = line.kh_begin; kh < line.kh_end; ++kh, x += kRowStep)
      inner_columns(acc, x, op.template row<N>(line.c, kh), op, EachColumn<T>{});
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      finish(line.y + (ow + t) * ptrdiff_t{YS}, op.last(acc[t], line.oh, ow + t, true),
             line.pixel + ow + t, line.c, epilogue);
  }

  // T columns from compile-time column OW0, of which some taps lie outside the image.
  template <int N, int OW0, int T, class X, class Y, class Op, class E>
  static SKIVE_INLINE void edge_tile(const Line<X, Y>& line, const Op& op, const E& epilogue) {
    constexpr int iw0 = OW0 * Strides::W - Padding::Left;
    decltype(op.template first<N>(0)) acc[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t] = op.template first<N>(line.c);
    const X* x = line.x + ptrdiff_t{iw0} * XS;
    for (int kh = line.kh_begin; kh < line.kh_end; ++kh, x += kRowStep)
      edge_columns<iw0>(acc, x, op.template row<N>(line.c, kh), op, EachColumn<T>{});
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const bool inner = OW0 + t >= kInnerBegin && OW0 + t < kInnerEnd;
      finish(line.y + (OW0 + t) * ptrdiff_t{YS}, op.last(acc[t], line.oh, OW0 + t, inner),
             line.pixel + OW0 + t, line.c, epilogue);
    }
  }

  // One column at run-time position `ow` whose taps may lie outside the image.
  template <int N, class X, class Y, class Op, class E>
  static void edge_column(const Line<X, Y>& line, int ow, const Op& op, const E& epilogue) {
    auto acc = op.template first<N>(line.c);
    const X* x = line.x;
    for (int kh = line.kh_begin; kh < line.kh_end; ++kh, x += kRowStep) {
      const auto taps = op.template row<N>(line.c, kh);
      for (int kw = 0; kw < KW; ++kw) {
        const int iw = ow * Strides::W - Padding::Left + kw * Dilations::W;
        if (iw >= 0 && iw < In::W)
          acc = op.step(acc, Loader<decltype(acc)>::at(x + ptrdiff_t{iw} * XS), taps, kw);
      }
    }
    finish(line.y + ow * ptrdiff_t{YS}, op.last(acc, line.oh, ow, false), line.pixel + ow, line.c,
           epilogue);
  }

  static constexpr ptrdiff_t kRowStep = ptrdiff_t{Dilations::H} * In::W * XS;
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_WINDOW_H
