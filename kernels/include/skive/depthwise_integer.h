// Depthwise convolution of 8- and 16-bit integers, NHWC: uint8 by int8 and int16 by int16, exact
// int32 sums. The pixels outside the image count as the zero point.
//
// One multiply-accumulate instruction sums several products in each of its 32-bit lanes (4 of bytes
// with VNNI, 2 of words elsewhere). The taps that it sums here are rows of one column of the window:
// G neighbouring input rows are interleaved channel by channel once, and such a group then serves
// every window over it: those of the columns to its left, and those of the output rows below, whose
// weights sit in the group's spare slots. A 3x3 window has three rows, so with G = 4 one group holds
// the columns of two output rows: weights [w0 w1 w2 0] give the first one, [0 w0 w1 w2] the second.
//
// A strip of R output rows is computed together, R as large as fits the groups of one row. The KW
// interleaved columns of a window stay in registers while it slides to the right.
//
// Packed weights (compiler/pack.py, pack_depthwise_integer):
//   [ceil(C / L)][KW][groups][R][L][G], L channels of a register, G and R as above
// and bias [ceil(C / 16) * 16] with -Zero * (sum of the weights) added, zero-filled. With a channel
// multiplier (Filter::OC = m * C, m > 1) the weights are [KH * KW][OC] and the bias [OC].
#ifndef SKIVE_DEPTHWISE_INTEGER_H
#define SKIVE_DEPTHWISE_INTEGER_H

#include "skive/depthwise_staged.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr ptrdiff_t min_ptrdiff(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS,
          class Element, int Zero>
struct IntegerWindow {
  using Dot = ChannelDot<Element>;
  using Weight = typename Dot::Weight;
  using Group = typename Dot::Group;
  static constexpr int C = In::C, KH = Filter::KH, KW = Filter::KW;
  static constexpr int OH =
      window_count(In::H, Padding::Top, Padding::Bottom, KH, Strides::H, Dilations::H);
  static constexpr int OW =
      window_count(In::W, Padding::Left, Padding::Right, KW, Strides::W, Dilations::W);
  static_assert(OH > 0 && OW > 0, "the window is larger than the padded image");
  static_assert(XS >= C && YS >= C, "pixels overlap");

  // Rows are counted in dilations from here on. Windows of neighbouring output rows are kSpread rows
  // apart; 0: they have no rows in common.
  static constexpr int G = Dot::kRows, V = Dot::kVectors;
  static constexpr int kSpread = Strides::H % Dilations::H == 0 ? Strides::H / Dilations::H : 0;
  static constexpr int kGroups = (KH + G - 1) / G;
  static constexpr int kStrip =
      kSpread == 0 ? 1 : min_int(4, 1 + (kGroups * G - KH) / kSpread);
  static constexpr int kStrips = (OH + kStrip - 1) / kStrip;
  static constexpr int kLastStrip = OH - (kStrips - 1) * kStrip;
  static constexpr int input_rows(int r) { return (r - 1) * kSpread + KH; }
  // Strips [kInnerBegin, kInnerEnd) have all their rows inside the image.
  static constexpr int kStripStep = kStrip * Strides::H;
  static constexpr int kInnerBegin = (Padding::Top + kStripStep - 1) / kStripStep;
  static constexpr int kBelow = In::H - 1 + Padding::Top - (input_rows(kStrip) - 1) * Dilations::H;
  static constexpr int kInnerEnd =
      kBelow < 0 ? 0 : min_int(OH / kStrip, kBelow / kStripStep + 1);
  // An image of one column: strips, not columns, are what the innermost loop goes through.
  static constexpr bool kColumn = In::W == 1 && OW == 1;

  static constexpr int kBlock = V * kLanes;  // channels
  static constexpr int kFullBlocks = C / kBlock;
  static constexpr int kRemainder = C % kBlock;
  static constexpr int kBlocks = kFullBlocks + (kRemainder != 0);
  // Blocks that share cache lines follow one another; a panel of them walks down the image, so that
  // its rows stay in L1.
  static constexpr int kPanel = max_int(1, 64 / static_cast<int>(sizeof(Element)) / kBlock);
  static constexpr int kPanels = (kBlocks + kPanel - 1) / kPanel;

  static constexpr bool kSliding =
      (Dilations::W == 1 || KW == 1) && KW * kGroups * V <= Dot::kWindow;
  static constexpr int kKept = kSliding ? max_int(0, KW - Strides::W) : 0;  // columns of the last window

  // Columns that are interleaved before they are needed, to hide the latency, if there is room.
  static constexpr int kAhead =
      kSliding && KW > Strides::W && (KW + 1) * kGroups * V <= Dot::kWindow / 2 ? 1 : 0;
  static constexpr ptrdiff_t kRowStep = ptrdiff_t{Dilations::H} * In::W * XS;
  static constexpr int kVectorWeights = kLanes * G;
  static constexpr ptrdiff_t kBlockWeights =
      ptrdiff_t{V} * KW * kGroups * kStrip * kVectorWeights;

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const int32_t* bias, Y* y, Part part,
                  const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kPanels * kStrips;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end;) {
      const int strip = static_cast<int>(i % kStrips);
      const int panel = static_cast<int>(i / kStrips % kPanels);
      const int n = static_cast<int>(i / kStrips / kPanels);
      const int count = kColumn ? static_cast<int>(min_ptrdiff(kStrips - strip, end - i)) : 1;
      const int last = min_int((panel + 1) * kPanel, kBlocks);
      for (int block = panel * kPanel; block < last; ++block) {
        const int c = block * kBlock;
        const Element* image = x + ptrdiff_t{n} * In::H * In::W * XS + c;
        const Weight* taps = w + block * kBlockWeights;
        const ptrdiff_t pixel = ptrdiff_t{n} * OH * OW;
        if constexpr (kFullBlocks != 0)
          if (block < kFullBlocks)
            strips<kBlock>(image, taps, bias + c, y + c, pixel, strip, count, c, epilogue);
        if constexpr (kRemainder != 0)
          if (block == kFullBlocks)
            strips<kRemainder>(image, taps, bias + c, y + c, pixel, strip, count, c, epilogue);
      }
      i += count;
    }
  }

 private:
  // One strip of one block of channels.
  template <class Y>
  struct Job {
    const Weight* w;
    const int32_t* bias;
    Y* y;             // first output row, column 0, channel c
    ptrdiff_t pixel;  // flat index of that pixel
    int count;        // strips
    int c;
  };

  // The rows under a strip: all inside the image, or some of them the border.
  struct InnerRows {
    const Element* first;
    SKIVE_INLINE const Element* at(int i, ptrdiff_t column) const {
      return first + i * kRowStep + column * XS;
    }
    SKIVE_INLINE InnerRows strip(int i) const {
      return {first + i * (ptrdiff_t{kStripStep} * In::W * XS)};
    }
  };
  template <int R>
  struct EdgeRows {
    const Element* row[input_rows(R)];
    ptrdiff_t step[input_rows(R)];
    SKIVE_INLINE const Element* at(int i, ptrdiff_t column) const {
      return row[i] + column * step[i];
    }
    SKIVE_INLINE const EdgeRows& strip(int) const { return *this; }
  };
  static constexpr auto kBorder = BorderPixel<Element, kBlock>::of(Zero);

  // `count` strips from `strip` of one image, whose first output pixel has the flat index `pixel`.
  // Arguments travel one by one, in registers: a struct would be written in pieces and read back in
  // one, which stalls.
  template <int N, class Y, class E>
  static SKIVE_INLINE void strips(const Element* x, const Weight* w, const int32_t* bias, Y* y,
                                  ptrdiff_t pixel, int strip, int count, int c, const E& epilogue) {
    for (const int end = strip + count; strip < end;) {
      const ptrdiff_t first = pixel + ptrdiff_t{strip} * kStrip * OW;
      const int top = strip * kStrip * Strides::H - Padding::Top;
      if (kLastStrip != kStrip && strip == kStrips - 1) {
        edge<N, kLastStrip>(x, w, bias, y + first * YS, first, top, c, epilogue);
        ++strip;
      } else if (strip < kInnerBegin || strip >= kInnerEnd) {
        edge<N, kStrip>(x, w, bias, y + first * YS, first, top, c, epilogue);
        ++strip;
      } else {
        const int inside = min_int(end, kInnerEnd) - strip;
        inner<N, kStrip>(x + ptrdiff_t{top} * In::W * XS, w, bias, y + first * YS, first, inside, c,
                         epilogue);
        strip += inside;
      }
    }
  }
  template <int N, int R, class Y, class E>
  static SKIVE_NOINLINE void inner(const Element* x, const Weight* w, const int32_t* bias, Y* y,
                                   ptrdiff_t pixel, int count, int c, const E& epilogue) {
    columns<N, R>(InnerRows{x}, Job<Y>{w, bias, y, pixel, kColumn ? count : 1, c}, epilogue);
  }
  template <int N, int R, class Y, class E>
  static SKIVE_NOINLINE void edge(const Element* x, const Weight* w, const int32_t* bias, Y* y,
                                  ptrdiff_t pixel, int top, int c, const E& epilogue) {
    EdgeRows<R> source;
    for (int i = 0; i < input_rows(R); ++i) {
      const int ih = top + i * Dilations::H;
      const bool inside = ih >= 0 && ih < In::H;
      source.row[i] = inside ? x + ptrdiff_t{ih} * In::W * XS : kBorder.pixel;
      source.step[i] = inside ? XS : 0;
    }
    columns<N, R>(source, Job<Y>{w, bias, y, pixel, 1, c}, epilogue);
  }

  // Rows G * g to G * g + Count - 1 of one column.
  template <int N, int Count, class Source>
  static SKIVE_INLINE Group group(const Source& rows, int g, int column) {
    if (column < 0 || column >= In::W) return Dot::fill(Zero);
    return Dot::template gather<N, Count>([&](int i) { return rows.at(g * G + i, column); });
  }
  static constexpr int rows_of_group(int r, int g) { return min_int(G, input_rows(r) - g * G); }

  struct Column {
    Group g[kGroups];
  };
  template <int N, int R, class Source, int... I>
  static SKIVE_INLINE Column column(const Source& rows, int iw, Index<I...>) {
    return {{group<N, rows_of_group(R, I)>(rows, I, iw)...}};
  }

  template <int N>
  static constexpr int kVectors = (N + kLanes - 1) / kLanes;
  template <int N, int R>
  struct Sums {
    IVec<> a[R][kVectors<N>];
  };
  static constexpr int weights_at(int v, int kw, int g, int r) {
    return (((v * KW + kw) * kGroups + g) * kStrip + r) * kVectorWeights;
  }
  template <int N, int R>
  static SKIVE_INLINE Sums<N, R> start(const int32_t* bias) {
    Sums<N, R> s;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors<N>; ++v) s.a[r][v] = load<kLanes>(bias + v * kLanes);
    return s;
  }

  // The weights of a strip: in registers where those suffice.
  template <int N, int R>
  struct Taps {
    static constexpr int kCount = KW * kGroups * R * kVectors<N>;
    static constexpr bool kHeld = kSliding && kCount <= Dot::kHeld;
    using Register = decltype(Dot::weights(static_cast<const Weight*>(nullptr)));
    const Weight* w;
    Register held[kHeld ? kCount : 1];

    static constexpr int index(int v, int kw, int g, int r) {
      return ((v * KW + kw) * kGroups + g) * R + r;
    }
    explicit SKIVE_INLINE Taps(const Weight* p) : w(p) {
      if constexpr (kHeld) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors<N>; ++v)
#pragma GCC unroll 25
          for (int kw = 0; kw < KW; ++kw)
#pragma GCC unroll 25
            for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r)
                held[index(v, kw, g, r)] = Dot::weights(w + weights_at(v, kw, g, r));
      }
    }
    SKIVE_INLINE Register at(int v, int kw, int g, int r) const {
      if constexpr (kHeld) return held[index(v, kw, g, r)];
      else return Dot::weights(w + weights_at(v, kw, g, r));
    }
  };

  template <int N, int R, class Source, class Y, class E>
  static SKIVE_INLINE void columns(const Source& source, const Job<Y>& job, const E& finisher) {
    const E epilogue = finisher;  // what lies behind a reference is read again after each store
    const Taps<N, R> taps(job.w);
    for (int i = 0; i < job.count; ++i) {
      const auto& rows = source.strip(i);
      const Job<Y> strip{job.w, job.bias, job.y + ptrdiff_t{i} * R * OW * YS,
                         job.pixel + ptrdiff_t{i} * R * OW, 1, job.c};
      if constexpr (kSliding) sliding<N, R>(rows, strip, taps, epilogue);
      else tap_by_tap<N, R>(rows, strip, epilogue);
    }
  }

  // The window moves to output column `ow`; its sums.
  template <int N, int R, class Source>
  static SKIVE_INLINE Sums<N, R> advance(Column (&window)[KW + kAhead], const Source& rows,
                                         const int32_t* bias, const Taps<N, R>& taps, int ow) {
#pragma GCC unroll 25
    for (int k = 0; k < kKept + kAhead; ++k) window[k] = window[k + Strides::W];
#pragma GCC unroll 25
    for (int kw = kKept + kAhead; kw < KW + kAhead; ++kw)
      window[kw] = column<N, R>(rows, ow * Strides::W - Padding::Left + kw, Indices<kGroups>{});
    Sums<N, R> sums = start<N, R>(bias);
#pragma GCC unroll 25
    for (int kw = 0; kw < KW; ++kw)
#pragma GCC unroll 25
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors<N>; ++v)
            sums.a[r][v] = Dot::dot(sums.a[r][v], window[kw].g[g].v[v], taps.at(v, kw, g, r));
    return sums;
  }

  template <int N, int R, class Source, class Y, class E>
  static SKIVE_INLINE void sliding(const Source& rows, const Job<Y>& job, const Taps<N, R>& taps,
                                   const E& epilogue) {
    Column window[KW + kAhead];
#pragma GCC unroll 25
    for (int k = 0; k < kKept + kAhead; ++k)
      window[k + Strides::W] = column<N, R>(rows, k - Padding::Left, Indices<kGroups>{});
    if constexpr (kAhead == 0) {
      for (int ow = 0; ow < OW; ++ow)
        finish(advance(window, rows, job.bias, taps, ow), job, ow, epilogue);
    } else {
      // One column is finished while the next one is summed: the epilogue's latency is as long.
      Sums<N, R> sums = advance(window, rows, job.bias, taps, 0);
      for (int ow = 1; ow < OW; ++ow) {
        const Sums<N, R> next = advance(window, rows, job.bias, taps, ow);
        finish(sums, job, ow - 1, epilogue);
        sums = next;
      }
      finish(sums, job, OW - 1, epilogue);
    }
  }

  // Windows that share no columns or do not fit the registers.
  template <int N, int R, class Source, class Y, class E>
  static SKIVE_INLINE void tap_by_tap(const Source& rows, const Job<Y>& job, const E& epilogue) {
    for (int ow = 0; ow < OW; ++ow) {
      Sums<N, R> sums = start<N, R>(job.bias);
      for (int kw = 0; kw < KW; ++kw) {
        const int iw = ow * Strides::W - Padding::Left + kw * Dilations::W;
        for (int g = 0; g < kGroups - 1; ++g)
          add_group(sums, group<N, G>(rows, g, iw), job.w + weights_at(0, kw, g, 0));
        add_group(sums, group<N, rows_of_group(R, kGroups - 1)>(rows, kGroups - 1, iw),
                  job.w + weights_at(0, kw, kGroups - 1, 0));
      }
      finish(sums, job, ow, epilogue);
    }
  }

  template <int N, int R>
  static SKIVE_INLINE void add_group(Sums<N, R>& sums, const Group& x, const Weight* w) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors<N>; ++v)
        sums.a[r][v] = Dot::dot(sums.a[r][v], x.v[v], Dot::weights(w + weights_at(v, 0, 0, r)));
  }

  template <int N, int R, class Y, class E>
  static SKIVE_INLINE void finish(const Sums<N, R>& sums, const Job<Y>& job, int ow, const E& epilogue) {
    constexpr int first = min_int(N, kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Y* y = job.y + (ptrdiff_t{r} * OW + ow) * YS;
      const ptrdiff_t pixel = job.pixel + ptrdiff_t{r} * OW + ow;
      const auto a = epilogue(first_lanes<first>(sums.a[r][0]), pixel, job.c);
      if constexpr (N > kLanes)
        store_two(y, a, epilogue(first_lanes<N - kLanes>(sums.a[r][1]), pixel, job.c + kLanes));
      else
        store(y, a);
    }
  }
};

template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS,
          class Element, int Zero>
struct IntegerDepthwise {
  static_assert(Filter::OC % In::C == 0, "output channels must be a multiple of the input channels");
  static constexpr int M = Filter::OC / In::C;  // channel multiplier
  static constexpr size_t scratch_bytes(int = 1) { return 0; }

  // Rows that are independent of one another are so many images, and the width takes the place of
  // the height, where taps are interleaved.
  static constexpr bool kFlat =
      Filter::KH == 1 && Strides::H == 1 && Padding::Top == 0 && Padding::Bottom == 0;
  static constexpr int OH =
      window_count(In::H, Padding::Top, Padding::Bottom, Filter::KH, Strides::H, Dilations::H);
  static constexpr int OW =
      window_count(In::W, Padding::Left, Padding::Right, Filter::KW, Strides::W, Dilations::W);

  // x [N, H, W, C] -> y [N, OH, OW, OC]; epilogue(sum, pixel, channel) finishes each vector.
  template <class W, class Y, class E>
  static void run(const Element* x, const W* w, const int32_t* bias, Y* y, void*, Part part,
                  const E& epilogue) {
    if constexpr (M != 1) {
      multiplied(x, w, bias, y, part, epilogue);
    } else if constexpr (kFlat) {
      windows<Image<In::N * In::H, In::W, 1, In::C>, Kernel<Filter::OC, Filter::KW, 1>,
              Stride<Strides::W, 1>, Pad<Padding::Left, 0, Padding::Right, 0>,
              Dilation<Dilations::W, 1>>(x, w, bias, y, part, epilogue);
    } else {
      windows<In, Filter, Strides, Padding, Dilations>(x, w, bias, y, part, epilogue);
    }
  }

 private:
  template <class I, class F, class S, class P, class D, class W, class Y, class E>
  static SKIVE_INLINE void windows(const Element* x, const W* w, const int32_t* bias, Y* y, Part part,
                                   const E& epilogue) {
    using Window = IntegerWindow<I, F, S, P, D, XS, YS, Element, Zero>;
    using Dot = ChannelDot<Element>;
    if constexpr (F::KW * Window::kGroups * Window::kStrip > Dot::kMostProducts) {
      using Staged = StagedWindow<Dot, I, F, S, P, D, XS, YS, Element, Zero>;
      if constexpr (Staged::kFits) Staged::run(x, w, bias, y, part, epilogue);
      else Window::run(x, w, bias, y, part, epilogue);
    } else {
      Window::run(x, w, bias, y, part, epilogue);
    }
  }

  // Each input channel feeds M neighbouring output channels: vectors run over those.
  template <class W, class Y, class E>
  static void multiplied(const Element* x, const W* w, const int32_t* bias, Y* y, Part part,
                         const E& epilogue) {
    constexpr ptrdiff_t pixels = ptrdiff_t{In::N} * OH * OW;
    const ptrdiff_t end = part_end(pixels, part);
    for (ptrdiff_t p = part_begin(pixels, part); p < end; ++p) {
      const int ow = static_cast<int>(p % OW);
      const int oh = static_cast<int>(p / OW % OH);
      const Element* image = x + p / OW / OH * In::H * In::W * XS;
      for (int c = 0; c < In::C; ++c) {
        int j = 0;
        for (; j + kLanes <= M; j += kLanes)
          lanes<kLanes>(image + c, w, bias, y, p, oh, ow, c * M + j, epilogue);
        if constexpr (M % kLanes != 0)
          lanes<M % kLanes>(image + c, w, bias, y, p, oh, ow, c * M + j, epilogue);
      }
    }
  }

  template <int N, class W, class Y, class E>
  static SKIVE_INLINE void lanes(const Element* x, const W* w, const int32_t* bias, Y* y,
                                 ptrdiff_t pixel, int oh, int ow, int oc, const E& epilogue) {
    IVec<N> acc = load<N>(bias + oc);
    for (int kh = 0; kh < Filter::KH; ++kh) {
      const int ih = oh * Strides::H - Padding::Top + kh * Dilations::H;
      for (int kw = 0; kw < Filter::KW; ++kw) {
        const int iw = ow * Strides::W - Padding::Left + kw * Dilations::W;
        const bool inside = ih >= 0 && ih < In::H && iw >= 0 && iw < In::W;
        const int32_t value = inside ? x[(ptrdiff_t{ih} * In::W + iw) * XS] : Zero;
        acc = acc + splat<N>(value) * load<N>(w + (kh * Filter::KW + kw) * Filter::OC + oc);
      }
    }
    store(y + pixel * YS + oc, epilogue(acc, pixel, oc));
  }
};

template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS, int Zero>
struct depthwise2d<In, Filter, Strides, Padding, Dilations, XS, YS, uint8_t, Zero>
    : IntegerDepthwise<In, Filter, Strides, Padding, Dilations, XS, YS, uint8_t, Zero> {};
template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS, int Zero>
struct depthwise2d<In, Filter, Strides, Padding, Dilations, XS, YS, int16_t, Zero>
    : IntegerDepthwise<In, Filter, Strides, Padding, Dilations, XS, YS, int16_t, Zero> {};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_DEPTHWISE_INTEGER_H
