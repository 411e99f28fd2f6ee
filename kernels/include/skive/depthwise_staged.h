// Depthwise convolution of 8- and 16-bit integers where the window of depthwise_integer.h is more
// than the registers hold: interleaved rows go through a stage, a buffer in L1.
//
// What a strip of output rows reads, pairs of input rows interleaved channel by channel and widened
// to words, is written to the stage once, border included: the loop over the outputs has no
// conditions, and a window serves all columns of the filter and all strips that share its rows. The
// outputs of a tile, four columns of a strip, are summed in registers; a vector of weights is read
// once for the four and a vector of the stage once for the rows of the strip.
//
// Along a strip the stage is a ring of row pairs where strips share rows. Of an image of one column
// (a signal) the strips take the place of the columns: the stage has the whole signal in it, pair by
// pair. Packed weights and bias are those of depthwise_integer.h.
#ifndef SKIVE_DEPTHWISE_STAGED_H
#define SKIVE_DEPTHWISE_STAGED_H

#include "skive/channel_dot.h"
#include "skive/depthwise.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// N channels of a pixel beside the image; of depthwise_integer.h, too.
template <class Element, int N>
struct BorderPixel {
  Element pixel[N];
  static constexpr BorderPixel of(int zero) {
    BorderPixel b{};
    for (int i = 0; i < N; ++i) b.pixel[i] = static_cast<Element>(zero);
    return b;
  }
};

// `Dot` is the ChannelDot<Element> of channel_dot.h.
template <class Dot, class In, class Filter, class Strides, class Padding, class Dilations, int XS,
          int YS, class Element, int Zero>
struct StagedWindow {
  using Weight = typename Dot::Weight;
  using Group = typename Dot::Group;
  static constexpr int C = In::C, KH = Filter::KH, KW = Filter::KW;
  static constexpr int OH =
      window_count(In::H, Padding::Top, Padding::Bottom, KH, Strides::H, Dilations::H);
  static constexpr int OW =
      window_count(In::W, Padding::Left, Padding::Right, KW, Strides::W, Dilations::W);
  static_assert(OH > 0 && OW > 0, "the window is larger than the padded image");
  static_assert(XS >= C && YS >= C, "pixels overlap");
  static_assert(Dot::kRows == 2, "the stage holds pairs of rows");

  // Strips and groups are those of the packing.
  static constexpr int G = Dot::kRows;
  static constexpr int kSpread = Strides::H % Dilations::H == 0 ? Strides::H / Dilations::H : 0;
  static constexpr int kGroups = (KH + G - 1) / G;
  static constexpr int kStrip =
      kSpread == 0 ? 1 : min_int(4, 1 + (kGroups * G - KH) / kSpread);
  static constexpr int kStrips = (OH + kStrip - 1) / kStrip;
  static constexpr int kLastStrip = OH - (kStrips - 1) * kStrip;

  // Image rows between strips and between the groups of one strip. A pair stands for its first row;
  // the pairs of all strips are kUnit rows apart.
  static constexpr int kStripStep = kStrip * Strides::H, kGroupStep = G * Dilations::H;
  static constexpr bool kSignal = In::W == 1 && OW == 1 && KW == 1 && Padding::Left == 0;
  static constexpr int kShared = greatest_divisor(kStripStep, kGroupStep);
  static constexpr bool kRing = !kSignal && kStripStep / kShared < kGroups &&
                                (kGroups - 1) * kGroupStep / kShared < 2 * kGroups;
  static constexpr int kUnit = kRing || kSignal ? kShared : kGroupStep;
  static constexpr int kGroupUnits = kGroupStep / kUnit;
  static constexpr int kSpan = (kGroups - 1) * kGroupUnits + 1;  // pairs from the first to the last

  // The stage: [vector of channels][kSlots][columns][kPair]. Tile positions (output columns, or strips
  // of a signal) are kAcross stage columns apart.
  static constexpr int kSlots = kSignal ? 1 : kSpan;
  static constexpr int kNew = kRing ? kStripStep / kUnit : kSlots;  // pairs of a next strip
  static constexpr int kAcross = kSignal ? kStripStep / kUnit : Strides::W;
  static constexpr int kPair = kLanes * G;
  static constexpr ptrdiff_t columns(int count) {
    return ptrdiff_t{count - 1} * kAcross + (kSignal ? kSpan : (KW - 1) * Dilations::W + 1);
  }
  static constexpr int kStageBytes = 16384;
  static constexpr ptrdiff_t stage_bytes(int vectors, int count) {
    return vectors * kSlots * columns(count) * kPair * static_cast<int>(sizeof(Weight));
  }

  // Tile positions and vectors of channels that are staged together: channels of half a cache line
  // if enough positions fit beside one another.
  static constexpr int kTile = 4;
  static constexpr int kPositions = kSignal ? kStrips : OW;
  static constexpr int fitting(int vectors) {
    int count = kTile;
    while (count < kPositions && stage_bytes(vectors, count + kTile) <= kStageBytes) count += kTile;
    return min_int(count, kPositions);
  }
  static constexpr int kMost = max_int(Dot::kVectors, 32 / static_cast<int>(sizeof(Element)) / kLanes);
  static constexpr int kVectors =
      fitting(kMost) >= min_int(kPositions, 16) ? kMost : Dot::kVectors;
  static constexpr int kChunk = fitting(kVectors);
  static constexpr int kChunks = (kPositions + kChunk - 1) / kChunk;
  static constexpr int kLastChunk = kPositions - (kChunks - 1) * kChunk;
  // Dilations and filters of hundreds of rows or columns may need more than a stack should give.
  static constexpr bool kFits = stage_bytes(kVectors, kChunk) <= 4 * kStageBytes;
  static constexpr int kColumns = static_cast<int>(columns(kChunk));
  static constexpr int kSlot = kColumns * kPair;  // elements of the stage
  static constexpr int kStagedVector = kSlots * kSlot;

  static constexpr int kBlock = kVectors * kLanes;  // channels
  static constexpr int kFullBlocks = C / kBlock;
  static constexpr int kRemainder = C % kBlock;
  static constexpr int kBlocks = kFullBlocks + (kRemainder != 0);
  static constexpr int kVectorWeights = KW * kGroups * kStrip * kPair;

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const int32_t* bias, Y* y, Part part,
                  const E& epilogue) {
    alignas(64) Weight stage[kVectors * kStagedVector];
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * kBlocks * (kSignal ? 1 : kChunks) * kStrips;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end;) {
      const int strip = static_cast<int>(i % kStrips);
      const ptrdiff_t above = i / kStrips;
      const int chunk = kSignal ? 0 : static_cast<int>(above % kChunks);
      const int block = static_cast<int>(above / (kSignal ? 1 : kChunks) % kBlocks);
      const ptrdiff_t n = above / (kSignal ? 1 : kChunks) / kBlocks;
      const ptrdiff_t left = end - i;
      const int count = left < kStrips - strip ? static_cast<int>(left) : kStrips - strip;
      const int c = block * kBlock;
      const Job<Y> job{x + n * In::H * In::W * XS + c, w + ptrdiff_t{block} * kVectors * kVectorWeights,
                       bias + c, y + n * OH * OW * YS + c, n * OH * OW, c, stage};
      if constexpr (kFullBlocks != 0)
        if (block < kFullBlocks) strips<kBlock>(job, strip, strip + count, chunk, epilogue);
      if constexpr (kRemainder != 0)
        if (block == kFullBlocks) strips<kRemainder>(job, strip, strip + count, chunk, epilogue);
      i += count;
    }
  }

 private:
  // One block of channels of one image.
  template <class Y>
  struct Job {
    const Element* x;
    const Weight* w;
    const int32_t* bias;
    Y* y;
    ptrdiff_t pixel;  // flat index of the first output pixel
    int c;
    Weight* stage;
  };
  static constexpr auto kBorder = BorderPixel<Element, kBlock>::of(Zero);
  static constexpr bool inside(int row) { return row >= 0 && row < In::H; }

  template <int N, class Y, class E>
  static SKIVE_NOINLINE void strips(const Job<Y>& at, int strip, int end, int chunk, const E& finisher) {
    const E epilogue = finisher;  // what lies behind a reference is read again after each store
    const Job<Y> job = at;
    if constexpr (kSignal) {
      for (; strip < end; strip += kChunk) {
        const int count = min_int(kChunk, end - strip);
        stage_signal<N>(job, strip, count);
        const bool partial = kLastStrip != kStrip && strip + count == kStrips;
        tiles<N, kStrip>(job, Slots{{job.stage}}, strip * kStrip, count - partial, epilogue);
        if (partial)
          tiles<N, kLastStrip>(job, Slots{{job.stage + (count - 1) * (kAcross * kPair)}},
                               (kStrips - 1) * kStrip, 1, epilogue);
      }
    } else {
      const int column = chunk * kChunk, first = strip;
      const int count = kChunks != 1 && chunk == kChunks - 1 ? kLastChunk : kChunk;
      for (; strip < end; ++strip) {
        for (int pair = strip == first ? 0 : kSlots - kNew; pair < kSlots; ++pair)
          stage_rows<N>(job, strip * kStripStep - Padding::Top + pair * kUnit,
                        column * Strides::W - Padding::Left, static_cast<int>(columns(count)),
                        slot(strip, pair), strip == first);
        Slots slots;
        for (int g = 0; g < kGroups; ++g) slots.at[g] = job.stage + slot(strip, g * kGroupUnits) * kSlot;
        const int pixel = strip * (kStrip * OW) + column;
        if (kLastStrip != kStrip && strip == kStrips - 1)
          tiles<N, kLastStrip>(job, slots, pixel, count, epilogue);
        else
          tiles<N, kStrip>(job, slots, pixel, count, epilogue);
      }
    }
  }

  // Where the stage has the pair that lies `pair` units below the first row of `strip`.
  static SKIVE_INLINE int slot(int strip, int pair) {
    return kRing ? (strip * kNew + pair) % kSlots : pair;
  }

  // `count` pairs, of pixels `a` and `b` and those `a_step` and `b_step` elements further on, in
  // neighbouring columns of the stage.
  template <int N>
  static SKIVE_INLINE void stage_pairs(const Element* a, ptrdiff_t a_step, const Element* b,
                                       ptrdiff_t b_step, int count, Weight* to) {
    constexpr int together = Dot::kVectors * kLanes;
    for (int c = 0; c + together <= N; c += together)
      stage_channels<together>(a + c, a_step, b + c, b_step, count, to + c / kLanes * kStagedVector);
    if constexpr (N % together != 0) {
      constexpr int c = N / together * together;
      stage_channels<N % together>(a + c, a_step, b + c, b_step, count, to + c / kLanes * kStagedVector);
    }
  }
  template <int N>
  static SKIVE_INLINE void stage_channels(const Element* a, ptrdiff_t a_step, const Element* b,
                                          ptrdiff_t b_step, int count, Weight* to) {
    for (int i = 0; i < count; ++i) {
      const Group pair =
          Dot::template gather<N, 2>([&](int row) { return row == 0 ? a + i * a_step : b + i * b_step; });
      for (int v = 0; v * kLanes < N; ++v) Dot::put(to + v * kStagedVector + i * kPair, pair.v[v]);
    }
  }

  // Columns `left` to left + count - 1 of the rows `row` and row + Dilations::H. Columns outside the
  // image stay the same while the slot serves one strip after the other: the first one writes them.
  template <int N, class Y>
  static SKIVE_NOINLINE void stage_rows(const Job<Y>& job, int row, int left, int count, int slot,
                                        bool fresh) {
    Weight* to = job.stage + slot * kSlot;
    const int begin = left < 0 ? min_int(-left, count) : 0;
    const int end = max_int(begin, min_int(count, In::W - left));
    if (fresh) {
      stage_border<N>(0, begin, to);
      stage_border<N>(end, count, to);
    }
    if (begin < end) {
      const auto pixels = [&](int r) {
        return inside(r) ? job.x + (ptrdiff_t{r} * In::W + left + begin) * XS : kBorder.pixel;
      };
      const int below = row + Dilations::H;
      stage_pairs<N>(pixels(row), inside(row) ? XS : 0, pixels(below), inside(below) ? XS : 0,
                     end - begin, to + begin * kPair);
    }
  }
  template <int N>
  static SKIVE_INLINE void stage_border(int begin, int end, Weight* to) {
    if (begin < end) stage_pairs<N>(kBorder.pixel, 0, kBorder.pixel, 0, end - begin, to + begin * kPair);
  }

  // The pairs of `count` strips of a signal.
  template <int N, class Y>
  static SKIVE_NOINLINE void stage_signal(const Job<Y>& job, int strip, int count) {
    constexpr ptrdiff_t step = ptrdiff_t{kUnit} * XS;
    const int top = strip * kStripStep - Padding::Top, pairs = static_cast<int>(columns(count));
    for (int i = 0; i < pairs;) {
      const int row = top + i * kUnit, below = row + Dilations::H;
      const bool both = inside(row) && inside(below);
      const int run = both ? min_int(pairs - i, (In::H - 1 - below) / kUnit + 1) : 1;
      const auto pixel = [&](int r) { return inside(r) ? job.x + ptrdiff_t{r} * XS : kBorder.pixel; };
      stage_pairs<N>(pixel(row), step, pixel(below), step, run, job.stage + i * kPair);
      i += run;
    }
  }

  // The groups of one strip.
  struct Slots {
    const Weight* at[kSignal ? 1 : kGroups];
    SKIVE_INLINE const Weight* group(int g) const {
      if constexpr (kSignal) return at[0] + g * (kGroupUnits * kPair);
      else return at[g];
    }
  };

  // `count` positions of a strip of R rows, from output pixel `pixel` of the image.
  template <int N, int R, class Y, class E>
  static SKIVE_INLINE void tiles(const Job<Y>& job, const Slots& slots, int pixel, int count,
                                 const E& epilogue) {
    for (int v = 0; v < N / kLanes; ++v) vector<kLanes, R>(job, slots, v, pixel, count, epilogue);
    if constexpr (N % kLanes != 0)
      vector<N % kLanes, R>(job, slots, N / kLanes, pixel, count, epilogue);
  }
  template <int N, int R, class Y, class E>
  static SKIVE_INLINE void vector(const Job<Y>& job, const Slots& slots, int v, int pixel, int count,
                                  const E& epilogue) {
    const Weight* w = job.w + v * kVectorWeights;
    int i = 0;
    for (; i + kTile <= count; i += kTile)
      positions<N, R, kTile>(job, slots, v, w, pixel, i, epilogue);
    if constexpr (kSignal) {
      for (; i < count; ++i) positions<N, R, 1>(job, slots, v, w, pixel, i, epilogue);
    } else if constexpr (kLastChunk % kTile != 0) {
      if (i < count) positions<N, R, kLastChunk % kTile>(job, slots, v, w, pixel, i, epilogue);
    }
  }
  // Output pixels from a position to the next one, and from a row of a strip to the next one.
  template <int R>
  static constexpr int kPositionPixels = kSignal ? R : 1;
  static constexpr int kRowPixels = kSignal ? 1 : OW;

  // Positions i to i + T - 1 of one vector of channels.
  template <int N, int R, int T, class Y, class E>
  static SKIVE_INLINE void positions(const Job<Y>& job, const Slots& slots, int v, const Weight* w,
                                     int pixel, int i, const E& epilogue) {
    const int c = v * kLanes, offset = v * kStagedVector + i * (kAcross * kPair);
    IVec<> sums[R][T];
    const IVec<> start = load<kLanes>(job.bias + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[r][t] = start;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const Weight* from = slots.group(g) + offset;
      const Weight* taps = w + g * (kStrip * kPair);
#pragma GCC unroll 7
      for (int kw = 0; kw < KW; ++kw) {
        decltype(Dot::weights(taps)) x[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          x[t] = Dot::weights(from + (t * kAcross + kw * Dilations::W) * kPair);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const auto weights = Dot::weights(taps + (kw * (kGroups * kStrip) + r) * kPair);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) sums[r][t] = Dot::dot_in_order(sums[r][t], x[t], weights);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int first = pixel + i * kPositionPixels<R> + r * kRowPixels;
      finish<N, kPositionPixels<R>>(sums[r], job.y + ptrdiff_t{first} * YS + c, job.pixel + first,
                                    job.c + c, epilogue);
    }
  }

  template <int N, int Step, int T, class Y, class E>
  static SKIVE_INLINE void finish(const IVec<> (&sums)[T], Y* y, ptrdiff_t pixel, int c,
                                  const E& epilogue) {
    using Result = decltype(epilogue(first_lanes<N>(sums[0]), pixel, c));
    Result a[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) a[t] = epilogue(first_lanes<N>(sums[t]), pixel + t * Step, c);
    constexpr ptrdiff_t step = ptrdiff_t{Step} * YS;
    if constexpr (kRounded<Result> && N == kLanes && T > 1 && kJoins<Y>) {
      constexpr int second = min_int(2, T - 1), third = T - 1;  // the last one, again, where T < 4
      store_joined(y, y + step, y + second * step, y + third * step, a[0], a[1], a[second], a[third]);
    } else {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) store(y + t * step, a[t]);
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_DEPTHWISE_STAGED_H
