// Pooling, NHWC: maximum over windows of float32 and of integers of 8 and 16 bits, average of
// float32, sum of the integers; the same over whole images.
//
// The shapes are those of depthwise2d (Filter::OC = C). A window that lies wholly in the padding
// yields -inf or the lowest integer (maximum), NaN (average over no element) or 0 (sum). NaN in the
// window gives NaN.
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

// Integers are compared as they are, a register of bytes or words at a time.
template <class T>
struct IntegerMaxTaps {
  template <int N>
  struct Row {};
  template <int N>
  SKIVE_INLINE Packed<T, N> first(int) const {
    return splat_packed<T, N>(static_cast<T>(limits<T>::lowest));
  }
  template <int N>
  SKIVE_INLINE Row<N> row(int, int) const { return {}; }
  template <class V, class R>
  SKIVE_INLINE V step(V acc, V x, const R&, int) const { return vmax(acc, x); }
  template <class V>
  SKIVE_INLINE V last(V acc, int, int, bool) const { return acc; }
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

// Taps of each window in the image and the Counted padding.
template <class In, class Filter, class Strides, class Padding, class Dilations, class Counted>
struct WindowSizes {
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, Filter::KH, Strides::H,
                                         Dilations::H);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, Filter::KW, Strides::W,
                                         Dilations::W);
  struct Counts {
    int32_t rows[OH] = {}, columns[OW] = {};
  };
  static constexpr Counts count() {
    Counts c;
    for (int oh = 0; oh < OH; ++oh)
      c.rows[oh] = counted_taps<In::H, Counted::Top, Counted::Bottom, Filter::KH, Strides::H,
                                Padding::Top, Dilations::H>(oh);
    for (int ow = 0; ow < OW; ++ow)
      c.columns[ow] = counted_taps<In::W, Counted::Left, Counted::Right, Filter::KW, Strides::W,
                                   Padding::Left, Dilations::W>(ow);
    return c;
  }
  static constexpr Counts counts = count();
  static SKIVE_INLINE int at(int oh, int ow) { return counts.rows[oh] * counts.columns[ow]; }
};

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
  SKIVE_INLINE Vec<N> last(Vec<N> acc, int oh, int ow, bool) const {
    using Sizes = WindowSizes<In, Filter, Strides, Padding, Dilations, Counted>;
    return acc / splat<N>(static_cast<float>(Sizes::at(oh, ow)));
  }
};

// Sum of x - Zero: the zero points of the whole window are taken off at the end. Words: in 16 bits,
// of which a register holds twice as many; they wrap on the way, but 128 differences of two bytes fit.
template <class In, class Filter, class Strides, class Padding, class Dilations, int Zero, bool Words>
struct SumTaps {
  template <int N>
  struct Row {};
  template <int N>
  static SKIVE_INLINE auto every_lane(int x) {
    if constexpr (Words)
      return splat_packed<int16_t, N>(static_cast<int16_t>(x));
    else
      return splat<N>(x);
  }
  template <int N>
  SKIVE_INLINE auto first(int) const { return every_lane<N>(0); }
  template <int N>
  SKIVE_INLINE Row<N> row(int, int) const { return {}; }
  template <class V, class R>
  SKIVE_INLINE V step(V acc, V x, const R&, int) const { return acc + x; }
  template <class V>
  SKIVE_INLINE V last(V acc, int oh, int ow, bool) const {
    if constexpr (Zero == 0) {
      return static_cast<void>(oh), static_cast<void>(ow), acc;
    } else {
      using Sizes = WindowSizes<In, Filter, Strides, Padding, Dilations, Pad<0, 0, 0, 0>>;
      const uint32_t size = static_cast<uint32_t>(Sizes::at(oh, ow));  // the product may wrap
      return acc - every_lane<V::lanes>(static_cast<int>(size * static_cast<uint32_t>(Zero)));
    }
  }
};

template <class In, class Filter, class Strides, class Padding = Pad<0, 0, 0, 0>,
          class Dilations = Dilation<1, 1>, int XS = In::C, int YS = In::C>
struct max_pool2d {
  static constexpr size_t scratch_bytes(int = 1) { return 0; }
  template <int L>
  using Nest = Window<In, Filter, Strides, Padding, Dilations, XS, YS, L>;
  static constexpr int OH = Nest<kLanes>::OH, OW = Nest<kLanes>::OW;

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(value, pixel, channel) finishes each vector: Vec for
  // float, IVec for integers.
  template <class X, class Y, class E>
  static void run(const X* x, Y* y, void*, Part part, const E& epilogue) {
    if constexpr (same_type<X, float>)
      Nest<kLanes>::run(x, y, part, MaxTaps{}, epilogue);
    else
      Nest<kRegisterBytes / sizeof(X)>::run(x, y, part, IntegerMaxTaps<X>{}, epilogue);
  }
  // Without an epilogue integers are not even widened.
  template <class X>
  static void run(const X* x, X* y, void*, Part part) {
    run(x, y, nullptr, part, NoEpilogue{});
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
  template <class Y, class E>
  static void run(const float* x, Y* y, void*, Part part, const E& epilogue) {
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
  template <class Y, class E>
  static void run(const float* x, Y* y, void*, Part part, const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kGroups;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      const ptrdiff_t n = i / kGroups;
      const int c = static_cast<int>(i % kGroups) * kGroupChannels;
      const float* px = x + n * kPixels * XS + c;
      Y* py = y + n * In::C + c;
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

  template <int G, int N, class Y, class E>
  static SKIVE_INLINE void group(const float* x, Y* y, ptrdiff_t n, int c, const E& epilogue) {
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

// Sums of x - Zero over each whole image, in 32 bits. Bytes are first added in words, 256 at a time:
// so many do not overflow, and a register holds twice as many words.
template <class In, class T, int Zero, int XS>
struct GlobalSum {
  static constexpr int kPixels = In::H * In::W, kLongest = 256;
  static constexpr bool kWords = sizeof(T) == 1;
  static constexpr int L = kWords ? kRegisterBytes / 2 : kLanes;
  // Vectors that walk over the pixels together: one cache line of bytes or more.
  static constexpr int kGroup = In::C >= 4 * L ? 4 : In::C >= 2 * L ? 2 : 1;
  static constexpr int kChannels = kGroup * L;
  static constexpr int kGroups = (In::C + kChannels - 1) / kChannels;
  static constexpr int kRest = In::C % kChannels;

  template <class Y, class E>
  static void run(const T* x, Y* y, Part part, const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kGroups;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      if constexpr (In::C == 1 && XS == 1) {
        store(y + i, epilogue(splat<1>(row(x + i * kPixels)) - zeros<1>(), i, 0));
        continue;
      }
      const ptrdiff_t n = i / kGroups;
      const int c = static_cast<int>(i % kGroups) * kChannels;
      const T* px = x + n * kPixels * XS + c;
      Y* py = y + n * In::C + c;
      if (kRest == 0 || c + kChannels <= In::C) {
        if constexpr (In::C >= kChannels) group<kGroup, L>(px, py, n, c, epilogue);
        continue;
      }
      int done = 0;
      for (; done + L <= kRest; done += L) group<1, L>(px + done, py + done, n, c + done, epilogue);
      if constexpr (kRest % L != 0)
        group<1, kRest % L>(px + done, py + done, n, c + done, epilogue);
    }
  }

 private:
  template <int N>
  static SKIVE_INLINE IVec<N> zeros() {
    return splat<N>(kPixels) * splat<N>(Zero);
  }
  // The sum of one channel, whose pixels are neighbours.
  static SKIVE_INLINE int32_t row(const T* x) {
    if constexpr (kLanes == 4) {  // plain C++: of the sum of four sums, g++ 12 leaves out half of the elements
      int32_t sum = 0;
      for (int i = 0; i < kPixels; ++i) sum += x[i];
      return sum;
    } else {
      constexpr int rest = kPixels % kLanes;
      IVec<kLanes> sum = splat<kLanes>(0);
      for (int i = 0; i + kLanes <= kPixels; i += kLanes) sum = sum + load<kLanes>(x + i);
      IVec<1> total = splat<1>(hsum(sum));
      if constexpr (rest != 0) total = total + splat<1>(hsum(load<rest>(x + kPixels - rest)));
      return hsum(total);
    }
  }
  template <int N>
  static SKIVE_INLINE auto widened(const T* x) {
    if constexpr (kWords) return load_words_of<N>(x);
    else return load<N>(x);
  }
  // sums = those of `pixels` pixels, or added to what is there.
  template <int G, int N, bool Add>
  static SKIVE_INLINE void add(const T* x, int pixels, int32_t* sums) {
    decltype(widened<N>(x)) acc[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) acc[g] = widened<N>(x + g * L);
#pragma GCC unroll 4
    for (int p = 1; p < pixels; ++p)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[g] = acc[g] + widened<N>(x + ptrdiff_t{p} * XS + g * L);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      if constexpr (kWords) {
        int16_t words[N];
        store(words, acc[g]);
        each_vector<N>([&](ptrdiff_t i, auto lanes) {
          const auto v = load<decltype(lanes)::count>(words + i);
          collect<Add>(sums + g * L + i, is_signed<T> ? v : wrap<uint16_t>(v));
        });
      } else {
        collect<Add>(sums + g * L, acc[g]);
      }
    }
  }
  template <bool Add, int N>
  static SKIVE_INLINE void collect(int32_t* sums, IVec<N> v) {
    if constexpr (Add) v = v + load<N>(sums);
    store(sums, v);
  }

  template <int G, int N, class Y, class E>
  static SKIVE_INLINE void group(const T* x, Y* y, ptrdiff_t n, int c, const E& epilogue) {
    int32_t sums[(G - 1) * L + N];
    add<G, N, false>(x, kPixels < kLongest ? kPixels : kLongest, sums);
    for (int p = kLongest; p < kPixels; p += kLongest) {
      const int left = kPixels - p;
      add<G, N, true>(x + ptrdiff_t{p} * XS, left < kLongest ? left : kLongest, sums);
    }
    each_vector<(G - 1) * L + N>([&](ptrdiff_t i, auto lanes) {
      constexpr int l = decltype(lanes)::count;
      const auto sum = load<l>(sums + i) - zeros<l>();
      store(y + i, epilogue(sum, n, c + static_cast<int>(i)));
    });
  }
};

// Sum of x - Zero over the part of each window inside the image, int32: an average pool before its
// division.
template <class In, class Filter, class Strides, class Padding, class Dilations, int XS, int YS,
          class Element, int Zero = 0>
struct sum_pool2d {
  static constexpr size_t scratch_bytes(int = 1) { return 0; }
  static constexpr bool kWords = sizeof(Element) == 1 && Filter::KH * Filter::KW <= 128;
  using Nest = Window<In, Filter, Strides, Padding, Dilations, XS, YS,
                      kWords ? kRegisterBytes / 2 : kLanes>;
  static constexpr int OH = Nest::OH, OW = Nest::OW;
  static constexpr bool kGlobal = Filter::KH == In::H && Filter::KW == In::W && OH == 1 && OW == 1 &&
                                  Dilations::H == 1 && Dilations::W == 1 && Padding::Top == 0 &&
                                  Padding::Left == 0 && (YS == In::C || In::N == 1);

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(IVec, pixel, channel) finishes each vector.
  template <class Y, class E>
  static void run(const Element* x, Y* y, void*, Part part, const E& epilogue) {
    if constexpr (kGlobal) {
      GlobalSum<In, Element, Zero, XS>::run(x, y, part, epilogue);
    } else {
      Nest::run(x, y, part, SumTaps<In, Filter, Strides, Padding, Dilations, Zero, kWords>{},
                epilogue);
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
