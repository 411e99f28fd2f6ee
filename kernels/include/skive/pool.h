// Pooling, NHWC float32: maximum and average over windows, and over whole images.
//
// The shapes are those of depthwise2d (Filter::OC = C). A window that lies wholly in the padding
// yields -inf (maximum) or NaN (average over no element). NaN in the window gives NaN.
#ifndef SKIVE_POOL_H
#define SKIVE_POOL_H

#include "skive/window.h"

namespace skive {
inline namespace SKIVE_ISA {

// Maximum that keeps a NaN of either operand; vmax alone would forget one.
template <int N>
SKIVE_INLINE Vec<N> max_or_nan(Vec<N> acc, Vec<N> x) {
  return select(equal(x, x), vmax(x, acc), x);
}

struct MaxTaps {
  template <int N>
  struct Row {};
  template <int N>
  SKIVE_INLINE Vec<N> first(int) const { return splat<N>(-__builtin_inff()); }
  template <int N>
  SKIVE_INLINE Row<N> row(int, int) const { return {}; }
  template <int N>
  SKIVE_INLINE Vec<N> step(Vec<N> acc, Vec<N> x, const Row<N>&, int) const {
    return max_or_nan(acc, x);
  }
  template <int N>
  SKIVE_INLINE Vec<N> last(Vec<N> acc, int, int, bool) const { return acc; }
};

// Number of taps of one axis that fall into [-before, extent + after).
template <int Extent, int Before, int After, int K, int S, int P, int D>
constexpr int counted_taps(int o) {
  int count = 0;
  for (int k = 0; k < K; ++k) {
    const int i = o * S - P + k * D;
    count += i >= -Before && i < Extent + After;
  }
  return count;
}

template <class In, class Filter, class Strides, class Padding, class Dilations, class Counted>
struct AverageTaps {
  template <int N>
  struct Row {};
  template <int N>
  SKIVE_INLINE Vec<N> first(int) const { return zero<N>(); }
  template <int N>
  SKIVE_INLINE Row<N> row(int, int) const { return {}; }
  template <int N>
  SKIVE_INLINE Vec<N> step(Vec<N> acc, Vec<N> x, const Row<N>&, int) const { return acc + x; }
  template <int N>
  SKIVE_INLINE Vec<N> last(Vec<N> acc, int oh, int ow, bool inner) const {
    const int rows = counted_taps<In::H, Counted::Top, Counted::Bottom, Filter::KH, Strides::H,
                                  Padding::Top, Dilations::H>(oh);
    const int columns = inner ? Filter::KW
                              : counted_taps<In::W, Counted::Left, Counted::Right, Filter::KW,
                                             Strides::W, Padding::Left, Dilations::W>(ow);
    return acc / splat<N>(static_cast<float>(rows * columns));
  }
};

template <class In, class Filter, class Strides, class Padding = Pad<0, 0, 0, 0>,
          class Dilations = Dilation<1, 1>, int XS = In::C, int YS = In::C>
struct max_pool2d {
  static constexpr size_t scratch_bytes(int = 1) { return 0; }
  using Nest = Window<In, Filter, Strides, Padding, Dilations, XS, YS>;
  static constexpr int OH = Nest::OH, OW = Nest::OW;

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(value, pixel, channel) finishes each vector.
  template <class E>
  static void run(const float* x, float* y, void*, Part part, const E& epilogue) {
    Nest::run(x, y, part, MaxTaps{}, epilogue);
  }
};

// Counted: the padding whose zeros count in the divisor. Pad<0, 0, 0, 0> leaves all padding out,
// Padding itself counts all of it; a rounded-up output size ("ceil mode") enlarges Padding at the
// bottom and right but not Counted.
template <class In, class Filter, class Strides, class Padding = Pad<0, 0, 0, 0>,
          class Counted = Pad<0, 0, 0, 0>, class Dilations = Dilation<1, 1>, int XS = In::C,
          int YS = In::C>
struct avg_pool2d {
  static constexpr size_t scratch_bytes(int = 1) { return 0; }
  using Nest = Window<In, Filter, Strides, Padding, Dilations, XS, YS>;
  static constexpr int OH = Nest::OH, OW = Nest::OW;

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(value, pixel, channel) finishes each vector.
  template <class E>
  static void run(const float* x, float* y, void*, Part part, const E& epilogue) {
    Nest::run(x, y, part,
              AverageTaps<In, Filter, Strides, Padding, Dilations, Counted>{}, epilogue);
  }
};

struct GlobalAverage {
  static constexpr float kStart = 0.0f;
  template <int N>
  static SKIVE_INLINE Vec<N> join(Vec<N> a, Vec<N> b) { return a + b; }
  template <int N>
  static SKIVE_INLINE Vec<N> last(Vec<N> a, int count) {
    return a / splat<N>(static_cast<float>(count));
  }
};

struct GlobalMax {
  static constexpr float kStart = -__builtin_inff();
  template <int N>
  static SKIVE_INLINE Vec<N> join(Vec<N> a, Vec<N> b) { return max_or_nan(a, b); }
  template <int N>
  static SKIVE_INLINE Vec<N> last(Vec<N> a, int) { return a; }
};

// Reduces each image to one pixel. Op: GlobalAverage or GlobalMax.
template <class In, class Op, int XS = In::C>
struct global_pool2d {
  static constexpr size_t scratch_bytes(int = 1) { return 0; }

  // x [N, H, W, C] -> y [N, C]; the epilogue's pixel is the image's index.
  template <class E>
  static void run(const float* x, float* y, void*, Part part, const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kGroups;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      const ptrdiff_t n = i / kGroups;
      const int c = static_cast<int>(i % kGroups) * kGroupChannels;
      const float* px = x + n * kPixels * XS + c;
      float* py = y + n * In::C + c;
      if (kFullGroups == kGroups || c < kFullGroups * kGroupChannels) {
        if constexpr (kFullGroups != 0) group<kGroup, kLanes>(px, py, n, c, epilogue);
      } else {
        // The last group: whole vectors one by one, then the remaining lanes.
        constexpr int left = In::C % kGroupChannels;
        int done = 0;
        for (; done + kLanes <= left; done += kLanes)
          group<1, kLanes>(px + done, py + done, n, c + done, epilogue);
        if constexpr (left % kLanes != 0)
          group<1, left % kLanes>(px + done, py + done, n, c + done, epilogue);
      }
    }
  }

 private:
  static constexpr int kPixels = In::H * In::W;
  // Eight chains hide the adder's latency: neighbouring vectors first, since many channels make
  // pixels of one block fall into few sets of L1 and many pages, then pixels.
  static constexpr int kChains = 8;
  static constexpr int kGroup = In::C >= kChains * kLanes ? kChains : 2;
  static constexpr int kGroupChannels = kGroup * kLanes;
  static constexpr int kFullGroups = In::C / kGroupChannels;
  static constexpr int kGroups = kFullGroups + (In::C % kGroupChannels != 0);

  template <int G, int N, class E>
  static SKIVE_INLINE void group(const float* x, float* y, ptrdiff_t n, int c, const E& epilogue) {
    constexpr int P = kChains / G;  // pixels at a time
    Vec<N> acc[P][G];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) acc[p][g] = splat<N>(Op::kStart);
    int pixel = 0;
    for (; pixel + P <= kPixels; pixel += P, x += P * XS)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g)
          acc[p][g] = Op::join(acc[p][g], load<N>(x + p * XS + g * kLanes));
    for (; pixel < kPixels; ++pixel, x += XS)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) acc[0][g] = Op::join(acc[0][g], load<N>(x + g * kLanes));
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int p = 1; p < P; ++p) acc[0][g] = Op::join(acc[0][g], acc[p][g]);
      store(y + g * kLanes, epilogue(Op::last(acc[0][g], kPixels), n, c + g * kLanes));
    }
  }
};

template <class In, int XS = In::C>
using global_avg_pool2d = global_pool2d<In, GlobalAverage, XS>;
template <class In, int XS = In::C>
using global_max_pool2d = global_pool2d<In, GlobalMax, XS>;

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_POOL_H
