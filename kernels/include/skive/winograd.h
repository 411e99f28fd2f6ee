// Winograd convolution of 4x4 outputs at a time: 3x3 filters, stride 1 or 2, float32, NHWC.
//
// A tile of 4x4 outputs costs 36 multiplications per pair of channels instead of 144, with stride 2 81
// (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, 2016):
//
//   Y = A' [ (G g G') * (B' d B) ] A      d: input tile, g: filter, *: element by element
//
// Summed over input channels, the product in the middle is one independent matrix product
// [tiles x IC] x [IC x OC] for each of its elements, which run on the register tile of the dense
// convolution. `WinogradAxis` has the transforms of one dimension.
//
// The largest error is two to three times that of the direct method, with stride 2 twice
// (benchmarks/kernels/bench_winograd.py prints both). Every constant is exact in float32.
//
// Order: chunks of tiles whose transformed input stays in L2; in it blocks of NB output channels;
// in it the products, then the output transform of that block. Every output element is computed
// by the same operations in the same order whatever the chunk or the number of parts.
//
// Packed weights (compiler/pack.py, pack_winograd): [OC / NB][36][IC][NB], the last block as narrow
// as its channels rounded up to 4; bias as for conv2d.
#ifndef SKIVE_WINOGRAD_H
#define SKIVE_WINOGRAD_H

#include "skive/shape.h"
#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// One dimension: kIn inputs d make kProducts factors, and as many products m four outputs. Both come in
// pairs, so that two dimensions need few registers: factors 2Q and 2Q + 1, and outputs Q and Q + 2.
// A filter has six values; factors first(f) to first(f) + count(f) - 1 are multiplied by value f.
template <int Stride>
struct WinogradAxis;

// F(4, 3) with the points +-a, +-b, 0 and infinity: a smaller rounding error than +-1, +-2, 0.
template <>
struct WinogradAxis<1> {
  static constexpr int kIn = 6, kProducts = 6;
  static constexpr int first(int f) { return f; }
  static constexpr int count(int) { return 1; }

  static constexpr float a = 0.625f, b = 1.5f;
  static constexpr float a2 = a * a, b2 = b * b;

  template <int Q, int N>
  static SKIVE_INLINE void factors(const Vec<N> (&d)[kIn], Vec<N>& even, Vec<N>& odd) {
    if constexpr (Q < 2) {
      constexpr float point = Q == 0 ? a : b, other = Q == 0 ? b2 : a2;
      const Vec<N> evens = fma(splat<N>(-other), d[2], d[4]), odds = fma(splat<N>(-other), d[1], d[3]);
      even = fma(splat<N>(point), odds, evens);
      odd = fma(splat<N>(-point), odds, evens);
    } else {
      even = fma(splat<N>(a2 * b2), d[0], fma(splat<N>(-a2 - b2), d[2], d[4]));
      odd = fma(splat<N>(a2 * b2), d[1], fma(splat<N>(-a2 - b2), d[3], d[5]));
    }
  }

  template <int Q, int N>
  static SKIVE_INLINE void outputs(const Vec<N> (&m)[kProducts], Vec<N>& low, Vec<N>& high) {
    if constexpr (Q == 0) {
      const Vec<N> sum_a = m[0] + m[1], sum_b = m[2] + m[3];
      low = m[4] + (sum_a + sum_b);
      high = fma(splat<N>(a2), sum_a, splat<N>(b2) * sum_b);
    } else {
      const Vec<N> difference_a = m[0] - m[1], difference_b = m[2] - m[3];
      low = fma(splat<N>(a), difference_a, splat<N>(b) * difference_b);
      high = fma(splat<N>(a2 * a), difference_a, fma(splat<N>(b2 * b), difference_b, m[5]));
    }
  }
};

// y[i] = x[2i] g[0] + x[2i + 2] g[2] + x[2i + 1] g[1]: F(4, 2) of the even inputs, points +-1, 0, 2 and
// infinity, and the products of the odd inputs with g[1], the filter's sixth value.
template <>
struct WinogradAxis<2> {
  static constexpr int kIn = 9, kProducts = 9;
  static constexpr int first(int f) { return f; }
  static constexpr int count(int f) { return f < 5 ? 1 : 4; }

  template <int Q, int N>
  static SKIVE_INLINE void factors(const Vec<N> (&d)[kIn], Vec<N>& even, Vec<N>& odd) {
    const Vec<N> minus_two = splat<N>(-2.0f);
    if constexpr (Q == 0) {
      const Vec<N> high = fma(minus_two, d[4], d[6]), low = fma(minus_two, d[2], d[4]);
      even = high + low;
      odd = high - low;
    } else if constexpr (Q == 1) {
      odd = d[6] - d[2];
      even = fma(minus_two, d[4] - d[0], odd);
    } else if constexpr (Q == 2) {
      even = fma(minus_two, d[6] - d[2], d[8] - d[4]);
      odd = d[1];
    } else {
      even = d[4 * Q - 9];
      odd = d[Q < 4 ? 5 : 7];
    }
  }

  template <int Q, int N>
  static SKIVE_INLINE void outputs(const Vec<N> (&m)[kProducts], Vec<N>& low, Vec<N>& high) {
    if constexpr (Q == 0) {
      const Vec<N> sum = m[0] + m[1];
      low = (m[2] + sum) + (m[3] + m[5]);
      high = fma(splat<N>(4.0f), m[3], sum) + m[7];
    } else {
      const Vec<N> difference = m[0] - m[1];
      low = fma(splat<N>(2.0f), m[3], difference) + m[6];
      high = fma(splat<N>(8.0f), m[3], difference) + (m[4] + m[8]);
    }
  }
};

// y[n, oh, ow, :] = epilogue(bias + sum over (kh, kw, ic) of x * w) for 3x3 filters.
// NB: output channels of a packed block. XS, YS: floats between neighbouring pixels of x and y.
// w, bias and scratch: 64-byte aligned, packed by pack_winograd and pack_bias; x and y: 4 bytes.
template <class In, class Filter, class Step, class Padding, int NB, int XS = In::C, int YS = Filter::OC>
struct winograd2d {
  static_assert(Filter::KH == 3 && Filter::KW == 3, "only 3x3 filters");
  static_assert(Step::H == Step::W, "the same stride along rows and columns");
  static_assert(NB > 0 && NB % kChannelQuantum == 0, "a block is a multiple of 4 channels");
  using Policy = F32Tile;
  static constexpr int IC = In::C, OC = Filter::OC;
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, 3, Step::H, 1);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, 3, Step::W, 1);
  static_assert(OH > 0 && OW > 0, "the filter is larger than the padded image");

  using Axis = WinogradAxis<Step::H>;
  static constexpr int kOut = 4, kIn = Axis::kIn, kAxis = Axis::kProducts;
  static constexpr int kProducts = kAxis * kAxis, kFilters = 36;
  static constexpr int kTilesH = (OH + kOut - 1) / kOut, kTilesW = (OW + kOut - 1) / kOut;
  static constexpr int kTiles = In::N * kTilesH * kTilesW;

  static constexpr int kBlocks = (OC + NB - 1) / NB;
  static constexpr int kFirstBlock = OC < NB ? OC : NB;
  static constexpr int kLastBlock = OC - (kBlocks - 1) * NB;
  static constexpr ptrdiff_t weight_floats =  // filled to 64 bytes
      (((kBlocks - 1) * NB + round_up(kLastBlock, kChannelQuantum)) * ptrdiff_t{kFilters} * IC + 15) /
      16 * 16;

  // Rows of the register tile: as many as the registers hold, but dividing the tiles evenly.
  static constexpr int kVectors = (kFirstBlock + kLanes - 1) / kLanes;
  static constexpr int best_rows() {
    constexpr int most = (Policy::kRegisters - 1 - kVectors) / kVectors;
    int best = 1;
    long best_cost = -1;
    for (int rows = 1; rows <= most && rows <= 24; ++rows) {
      const int chains = rows * kVectors;
      const int slots = chains < Policy::kInFlight ? Policy::kInFlight : chains;
      // A step costs its multiply-adds and part of its loads.
      const long cost = long{(kTiles + rows - 1) / rows} * (4 * slots + rows + kVectors);
      if (best_cost < 0 || cost <= best_cost) best_cost = cost, best = rows;
    }
    return best;
  }
  static constexpr int kRows = best_rows();
  static constexpr int kGroups = (kTiles + kRows - 1) / kRows;

  // Transformed input: [kProducts][tiles of a chunk][kInRow]. Neither rows nor planes may start at equal
  // addresses modulo a power of two: they would compete for the same sets of L1.
  static constexpr int kInRow = round_up(IC, 16) + 16;
  static constexpr int kChunkGroups = [] {
    constexpr ptrdiff_t kBudget = 288 * 1024 / sizeof(float);  // of 1 MiB L2, with the products
    constexpr int kLeast = 12;  // tiles; below, the weights' traffic costs more
    int groups = 1;
    while (groups < kGroups &&
           (groups * kRows < kLeast || (groups + 1) * kRows * ptrdiff_t{kProducts} * kInRow <= kBudget))
      ++groups;
    const int chunks = (kGroups + groups - 1) / groups;
    return (kGroups + chunks - 1) / chunks;
  }();
  static constexpr int kChunkTiles = kChunkGroups * kRows;
  static constexpr ptrdiff_t kInPlane = ptrdiff_t{kChunkTiles} * kInRow + 16;
  // Products of one block: [kProducts][tiles of a chunk][kOutRow].
  static constexpr int kOutRow = round_up(kFirstBlock, 16);
  static constexpr ptrdiff_t kOutPlane = ptrdiff_t{kChunkTiles} * kOutRow + 16;
  static constexpr ptrdiff_t kWorkerFloats = kProducts * (kInPlane + kOutPlane);

  // Bytes of scratch that `parts` workers need together.
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kWorkerFloats) * sizeof(float) * static_cast<size_t>(parts);
  }

  template <class Y, class E>
  static void run(const float* x, const float* w, const float* bias, Y* y, void* scratch,
                  Part part, const E& epilogue) {
    // Workers share out groups of tiles, or blocks of channels where that is the more even split.
    const Part whole;
    const bool by_tiles = shared_as_evenly(kGroups, kBlocks, part.count);
    const int g1 = static_cast<int>(part_end(kGroups, by_tiles ? part : whole));
    const int b0 = static_cast<int>(part_begin(kBlocks, by_tiles ? whole : part));
    const int b1 = static_cast<int>(part_end(kBlocks, by_tiles ? whole : part));
    float* const in = static_cast<float*>(scratch) + part.index * kWorkerFloats;
    float* const out = in + kProducts * kInPlane;
    int g = static_cast<int>(part_begin(kGroups, by_tiles ? part : whole));
    for (; g < g1 && b0 < b1; g += kChunkGroups) {
      const int groups = g + kChunkGroups < g1 ? kChunkGroups : g1 - g;
      const int first = g * kRows;
      const int tiles = first + groups * kRows < kTiles ? groups * kRows : kTiles - first;
      for (int t = 0; t < tiles; ++t) transform_input(x, first + t, in + t * kInRow);
      for (int t = tiles; t < groups * kRows; ++t) clear_row(in + t * kInRow);
      for (int b = b0; b < b1; ++b) {
        const float* const wb = w + ptrdiff_t{b} * NB * kFilters * IC;
        if (b < kBlocks - 1)
          compute_block<kFirstBlock>(in, wb, bias, y, out, groups, first, tiles, b * NB, epilogue);
        else
          compute_block<kLastBlock>(in, wb, bias, y, out, groups, first, tiles, b * NB, epilogue);
      }
    }
  }

 private:
  struct Place {
    int n, h, w;  // image, and the tile's first output row and column
  };
  static SKIVE_INLINE Place place(int tile) {
    return {tile / (kTilesH * kTilesW), tile / kTilesW % kTilesH * kOut, tile % kTilesW * kOut};
  }

  // One row of zeros in all planes, for the tiles that fill the last group.
  static SKIVE_NOINLINE void clear_row(float* to) {
    for (int p = 0; p < kProducts; ++p)
      for (int c = 0; c < IC; ++c) to[p * kInPlane + c] = 0.0f;
  }

  static SKIVE_NOINLINE void transform_input(const float* x, int tile, float* to) {
    const Place at = place(tile);
    const int ih = at.h * Step::H - Padding::Top, iw = at.w * Step::W - Padding::Left;
    const float* const image = x + ptrdiff_t{at.n} * In::H * In::W * XS;
    int c = 0;
    for (; c + kLanes <= IC; c += kLanes) transform_vector<kLanes>(image + c, ih, iw, to + c);
    if constexpr (IC % kLanes != 0) transform_vector<IC % kLanes>(image + c, ih, iw, to + c);
  }

  using Pairs = Indices<(kAxis + 1) / 2>;

  template <int N>
  static SKIVE_INLINE void transform_vector(const float* image, int ih, int iw, float* to) {
    const float* const x = image + (ptrdiff_t{ih} * In::W + iw) * XS;
    if (ih >= 0 && iw >= 0 && ih + kIn <= In::H && iw + kIn <= In::W)
      factors<N>(x, to, [](int, int) __attribute__((always_inline)) { return true; }, Pairs{});
    else
      factors<N>(
          x, to,
          [=](int i, int j) __attribute__((always_inline)) {
            return ih + i >= 0 && ih + i < In::H && iw + j >= 0 && iw + j < In::W;
          },
          Pairs{});
  }

  // Two dimensions of factors of the tile at x; where it is not `inside` the image it is zero.
  template <int N, class Inside, int... Q>
  static SKIVE_INLINE void factors(const float* x, float* to, const Inside& inside, Index<Q...> each) {
    (factor_rows<Q, N>(x, to, inside, each), ...);
  }
  template <int P, int N, class Inside, int... Q>
  static SKIVE_INLINE void factor_rows(const float* x, float* to, const Inside& inside, Index<Q...>) {
    Vec<N> even[kIn], odd[kIn];
#pragma GCC unroll 9
    for (int j = 0; j < kIn; ++j) {
      Vec<N> column[kIn];
#pragma GCC unroll 9
      for (int i = 0; i < kIn; ++i)
        column[i] = inside(i, j) ? load<N>(x + (ptrdiff_t{i} * In::W + j) * XS) : zero<N>();
      Axis::template factors<P>(column, even[j], odd[j]);
    }
    (store_factors<2 * P, Q>(even, to), ...);
    if constexpr (2 * P + 1 < kAxis) (store_factors<2 * P + 1, Q>(odd, to), ...);
  }
  template <int I, int Q, int N>
  static SKIVE_INLINE void store_factors(const Vec<N> (&row)[kIn], float* to) {
    Vec<N> even, odd;
    Axis::template factors<Q>(row, even, odd);
    store(to + (I * kAxis + 2 * Q) * kInPlane, even);
    if constexpr (2 * Q + 1 < kAxis) store(to + (I * kAxis + 2 * Q + 1) * kInPlane, odd);
  }

  template <int Channels, class Y, class E>
  static SKIVE_INLINE void compute_block(const float* in, const float* w, const float* bias, Y* y,
                                         float* out, int groups, int first, int tiles, int channel,
                                         const E& epilogue) {
    constexpr int kRow = round_up(Channels, kChannelQuantum);
    for (int f = 0; f < kFilters; ++f)
      for (int i = Axis::first(f / 6); i < Axis::first(f / 6) + Axis::count(f / 6); ++i)
        for (int j = Axis::first(f % 6); j < Axis::first(f % 6) + Axis::count(f % 6); ++j)
          for (int g = 0; g < groups; ++g) {
            const ptrdiff_t p = i * kAxis + j;
            multiply<Channels>(in + p * kInPlane + g * kRows * kInRow, w + ptrdiff_t{f} * IC * kRow,
                               out + p * kOutPlane + g * kRows * kOutRow);
          }
    for (int t = 0; t < tiles; ++t)
      transform_output<Channels>(out + t * kOutRow, bias + channel, y, first + t, channel, epilogue);
  }

  struct Offsets {
    template <int P>
    static constexpr ptrdiff_t at() { return ptrdiff_t{P} * kInRow; }
  };

  // kRows tiles x one block of channels of one of the products.
  template <int Channels>
  static SKIVE_NOINLINE void multiply(const float* in, const float* w, float* out) {
    using T = Tile<Policy, kRows, Channels, Offsets>;
    alignas(64) static constexpr float kZeros[round_up(Channels, 16)] = {};
    typename T::Accumulators acc;
    T::start(acc, kZeros, typename T::EachRegister{});
    T::template run<IC>(acc, in, w);
    T::finish(
        acc, [](int, int, auto value) __attribute__((always_inline)) { return value; },
        [=](int p) __attribute__((always_inline)) { return out + p * kOutRow; });
  }

  template <int Channels, class Y, class E>
  static SKIVE_NOINLINE void transform_output(const float* m, const float* bias, Y* y, int tile,
                                              int channel, const E& epilogue) {
    const Place at = place(tile);
    const int rows = OH - at.h < kOut ? OH - at.h : kOut;
    const int columns = OW - at.w < kOut ? OW - at.w : kOut;
    const ptrdiff_t pixel = (ptrdiff_t{at.n} * OH + at.h) * OW + at.w;
    int c = 0;
    for (; c + kLanes <= Channels; c += kLanes)
      output_vector<kLanes>(m + c, bias + c, y, pixel, rows, columns, channel + c, epilogue);
    if constexpr (Channels % kLanes != 0)
      output_vector<Channels % kLanes>(m + c, bias + c, y, pixel, rows, columns, channel + c, epilogue);
  }

  template <int N, class Y, class E>
  static SKIVE_INLINE void output_vector(const float* m, const float* bias, Y* y, ptrdiff_t pixel,
                                         int rows, int columns, int channel, const E& epilogue) {
    output_rows<0, N>(m, bias, y, pixel, rows, columns, channel, epilogue);
    output_rows<1, N>(m, bias, y, pixel, rows, columns, channel, epilogue);
  }

  // Rows Q and Q + 2 of the tile.
  template <int Q, int N, class Y, class E>
  static SKIVE_INLINE void output_rows(const float* m, const float* bias, Y* y, ptrdiff_t pixel,
                                       int rows, int columns, int channel, const E& epilogue) {
    Vec<N> v[2][kAxis];
#pragma GCC unroll 9
    for (int j = 0; j < kAxis; ++j) {
      Vec<N> column[kAxis];
#pragma GCC unroll 9
      for (int i = 0; i < kAxis; ++i) column[i] = load<N>(m + (i * kAxis + j) * kOutPlane);
      Axis::template outputs<Q>(column, v[0][j], v[1][j]);
    }
    const Vec<N> b = load<N>(bias);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (Q + 2 * i >= rows) break;
      Vec<N> out[kOut];
      Axis::template outputs<0>(v[i], out[0], out[2]);
      Axis::template outputs<1>(v[i], out[1], out[3]);
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        if (j >= columns) break;
        const ptrdiff_t at = pixel + ptrdiff_t{Q + 2 * i} * OW + j;
        store(y + at * YS + channel, epilogue(out[j] + b, at, channel));
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_WINOGRAD_H
