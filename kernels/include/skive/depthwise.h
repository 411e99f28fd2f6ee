// Depthwise convolution, NHWC float32: every channel has its own KH x KW filter.
//
// Packed weights (compiler/pack.py, pack_depthwise): [ceil(C / 16)][KH * KW][16], zero-filled, one
// contiguous run of taps per 16 channels whatever the instruction set; bias [ceil(C / 16) * 16].
// With a channel multiplier (Filter::OC = m * C, m > 1) the output channel c * m + j filters input
// channel c, and the packed weights are [KH * KW][OC], bias [OC].
#ifndef SKIVE_DEPTHWISE_H
#define SKIVE_DEPTHWISE_H

#include "skive/window.h"

namespace skive {
inline namespace SKIVE_ISA {

// The multiply-accumulate step of a float depthwise convolution.
template <class Filter>
struct DepthwiseTaps {
  static constexpr int kBlock = 16;  // channels per packed block
  const float* w;
  const float* bias;

  template <int N>
  struct Row {
    Vec<N> w[Filter::KW];
  };

  template <int N>
  SKIVE_INLINE Vec<N> first(int c) const { return load<N>(bias + c); }

  template <int N>
  SKIVE_INLINE Row<N> row(int c, int kh) const {
    const float* p = w + (c / kBlock * Filter::KH + kh) * Filter::KW * kBlock + c % kBlock;
    Row<N> r;
#pragma GCC unroll 64
    for (int kw = 0; kw < Filter::KW; ++kw) r.w[kw] = load<N>(p + kw * kBlock);
    return r;
  }

  template <int N>
  SKIVE_INLINE Vec<N> step(Vec<N> acc, Vec<N> x, const Row<N>& r, int kw) const {
    return fma(x, r.w[kw], acc);
  }

  template <int N>
  SKIVE_INLINE Vec<N> last(Vec<N> acc, int, int, bool) const { return acc; }
};

template <class In, class Filter, class Strides = Stride<1, 1>, class Padding = Pad<0, 0, 0, 0>,
          class Dilations = Dilation<1, 1>, int XS = In::C, int YS = Filter::OC,
          class Element = float, int Zero = 0>
struct depthwise2d {
  static_assert(sizeof(Element) == 4 && Zero == 0, "integers: depthwise_integer.h");
  static_assert(Filter::OC % In::C == 0, "output channels must be a multiple of the input channels");
  static constexpr int M = Filter::OC / In::C;  // channel multiplier
  static constexpr size_t scratch_bytes(int = 1) { return 0; }

  // A signal along the height alone (W = 1) is the same memory as one along the width.
  static constexpr bool kTall = In::W == 1 && Filter::KW == 1 && Padding::Left == 0 &&
                                Padding::Right == 0 && Strides::W == 1;
  static constexpr int OH =
      window_count(In::H, Padding::Top, Padding::Bottom, Filter::KH, Strides::H, Dilations::H);
  static constexpr int OW =
      window_count(In::W, Padding::Left, Padding::Right, Filter::KW, Strides::W, Dilations::W);

  // x [N, H, W, C] -> y [N, OH, OW, OC]; epilogue(acc, pixel, channel) finishes each vector.
  template <class Y, class E>
  static void run(const float* x, const float* w, const float* bias, Y* y, void*, Part part,
                  const E& epilogue) {
    if constexpr (M != 1) {
      multiplied(x, w, bias, y, part, epilogue);
    } else if constexpr (kTall) {
      using Flat = Window<Image<In::N, 1, In::H, In::C>, Kernel<Filter::OC, 1, Filter::KH>,
                          Stride<1, Strides::H>, Pad<0, Padding::Top, 0, Padding::Bottom>,
                          Dilation<1, Dilations::H>, XS, YS>;
      Flat::run(x, y, part, DepthwiseTaps<Kernel<Filter::OC, 1, Filter::KH>>{w, bias}, epilogue);
    } else {
      using Nest = Window<In, Filter, Strides, Padding, Dilations, XS, YS>;
      Nest::run(x, y, part, DepthwiseTaps<Filter>{w, bias}, epilogue);
    }
  }

 private:
  // Each input channel feeds M neighbouring output channels: vectors run over those.
  template <class Y, class E>
  static void multiplied(const float* x, const float* w, const float* bias, Y* y, Part part,
                         const E& epilogue) {
    constexpr ptrdiff_t pixels = ptrdiff_t{In::N} * OH * OW;
    const ptrdiff_t end = part_end(pixels, part);
    for (ptrdiff_t p = part_begin(pixels, part); p < end; ++p) {
      const int ow = static_cast<int>(p % OW);
      const int oh = static_cast<int>(p / OW % OH);
      const float* image = x + p / OW / OH * In::H * In::W * XS;
      for (int c = 0; c < In::C; ++c) {
        int j = 0;
        for (; j + kLanes <= M; j += kLanes)
          lanes<kLanes>(image + c, w, bias, y, p, oh, ow, c * M + j, epilogue);
        if constexpr (M % kLanes != 0)
          lanes<M % kLanes>(image + c, w, bias, y, p, oh, ow, c * M + j, epilogue);
      }
    }
  }

  template <int N, class Y, class E>
  static SKIVE_INLINE void lanes(const float* x, const float* w, const float* bias, Y* y,
                                 ptrdiff_t pixel, int oh, int ow, int oc, const E& epilogue) {
    Vec<N> acc = load<N>(bias + oc);
    for (int kh = 0; kh < Filter::KH; ++kh) {
      const int ih = oh * Strides::H - Padding::Top + kh * Dilations::H;
      if (ih < 0 || ih >= In::H) continue;
      for (int kw = 0; kw < Filter::KW; ++kw) {
        const int iw = ow * Strides::W - Padding::Left + kw * Dilations::W;
        if (iw < 0 || iw >= In::W) continue;
        acc = fma(splat<N>(x[(ptrdiff_t{ih} * In::W + iw) * XS]),
                  load<N>(w + (kh * Filter::KW + kw) * Filter::OC + oc), acc);
      }
    }
    store(y + pixel * YS + oc, epilogue(acc, pixel, oc));
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_DEPTHWISE_H
