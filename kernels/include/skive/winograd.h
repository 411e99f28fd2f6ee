// Winograd convolution F(4x4, 3x3): 3x3 filters, stride 1, float32, NHWC.
//
// A tile of 4x4 outputs costs 36 multiplications per pair of channels instead of 144 (Lavin, Gray:
// Fast Algorithms for Convolutional Neural Networks, 2016):
//
//   Y = A' [ (G g G') * (B' d B) ] A      d: 6x6 input tile, g: filter, *: element by element
//
// Summed over input channels, the product in the middle is 36 independent matrix products
// [tiles x IC] x [IC x OC], which run on the register tile of the dense convolution.
//
// Interpolation points 0, +-5/8, +-3/2 and infinity: a smaller rounding error than the usual 0, +-1,
// +-2, and every constant of the transforms is still exact in float32. The largest error is two to
// three times that of the direct method (benchmarks/kernels/bench_winograd.py prints both).
//
// Order: chunks of tiles whose transformed input stays in L2; in it blocks of NB output channels;
// in it the 36 products, then the output transform of that block. Every output element is computed
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

// The one-dimensional transforms. Points 0, +-a, +-b, infinity.
struct WinogradPoints {
  static constexpr float a = 0.625f, b = 1.5f;
  static constexpr float a2 = a * a, b2 = b * b;
  static constexpr float a3 = a2 * a, b3 = b2 * b;
  static constexpr float sum = a2 + b2, product = a2 * b2;

  // B': six inputs, in place.
  template <int N>
  static SKIVE_INLINE void input(Vec<N>& d0, Vec<N>& d1, Vec<N>& d2, Vec<N>& d3, Vec<N>& d4,
                                 Vec<N>& d5) {
    const Vec<N> even_a = fma(splat<N>(-b2), d2, d4), odd_a = fma(splat<N>(-b2), d1, d3);
    const Vec<N> even_b = fma(splat<N>(-a2), d2, d4), odd_b = fma(splat<N>(-a2), d1, d3);
    d0 = fma(splat<N>(product), d0, fma(splat<N>(-sum), d2, d4));
    d5 = fma(splat<N>(product), d1, fma(splat<N>(-sum), d3, d5));
    d1 = fma(splat<N>(a), odd_a, even_a);
    d2 = fma(splat<N>(-a), odd_a, even_a);
    d3 = fma(splat<N>(b), odd_b, even_b);
    d4 = fma(splat<N>(-b), odd_b, even_b);
  }

  // A': six products to four outputs, in the first four places.
  template <int N>
  static SKIVE_INLINE void output(Vec<N>& m0, Vec<N>& m1, Vec<N>& m2, Vec<N>& m3, Vec<N>& m4,
                                  Vec<N>& m5) {
    const Vec<N> sum_a = m1 + m2, difference_a = m1 - m2;
    const Vec<N> sum_b = m3 + m4, difference_b = m3 - m4;
    m0 = m0 + (sum_a + sum_b);
    m1 = fma(splat<N>(a), difference_a, splat<N>(b) * difference_b);
    m2 = fma(splat<N>(a2), sum_a, splat<N>(b2) * sum_b);
    m3 = fma(splat<N>(a3), difference_a, fma(splat<N>(b3), difference_b, m5));
  }
};

// y[n, oh, ow, :] = epilogue(bias + sum over (kh, kw, ic) of x * w) for 3x3 filters of stride 1.
// NB: output channels of a packed block. XS, YS: floats between neighbouring pixels of x and y.
// w, bias and scratch: 64-byte aligned, packed by pack_winograd and pack_bias; x and y: 4 bytes.
template <class In, class Filter, class Padding, int NB, int XS = In::C, int YS = Filter::OC>
struct winograd2d {
  static_assert(Filter::KH == 3 && Filter::KW == 3, "only 3x3 filters");
  static_assert(NB > 0 && NB % kChannelQuantum == 0, "a block is a multiple of 4 channels");
  using Policy = F32Tile;
  static constexpr int IC = In::C, OC = Filter::OC;
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, 3, 1, 1);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, 3, 1, 1);
  static_assert(OH > 0 && OW > 0, "the filter is larger than the padded image");

  static constexpr int kOut = 4, kIn = 6, kProducts = kIn * kIn;
  static constexpr int kTilesH = (OH + kOut - 1) / kOut, kTilesW = (OW + kOut - 1) / kOut;
  static constexpr int kTiles = In::N * kTilesH * kTilesW;

  static constexpr int kBlocks = (OC + NB - 1) / NB;
  static constexpr int kFirstBlock = OC < NB ? OC : NB;
  static constexpr int kLastBlock = OC - (kBlocks - 1) * NB;
  static constexpr ptrdiff_t weight_floats =  // filled to 64 bytes
      (((kBlocks - 1) * NB + round_up(kLastBlock, kChannelQuantum)) * ptrdiff_t{kProducts} * IC + 15) /
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

  // Transformed input: [36][tiles of a chunk][kInRow]. Neither rows nor planes may start at equal
  // addresses modulo a power of two: they would compete for the same sets of L1.
  static constexpr int kInRow = round_up(IC, 16) + 16;
  static constexpr int kChunkGroups = [] {
    constexpr ptrdiff_t kBudget = 288 * 1024 / sizeof(float);  // of 1 MiB L2, with the products
    constexpr int kLeast = 16;  // tiles; below, the weights' traffic costs more
    int groups = 1;
    while (groups < kGroups &&
           (groups * kRows < kLeast || (groups + 1) * kRows * ptrdiff_t{kProducts} * kInRow <= kBudget))
      ++groups;
    const int chunks = (kGroups + groups - 1) / groups;
    return (kGroups + chunks - 1) / chunks;
  }();
  static constexpr int kChunkTiles = kChunkGroups * kRows;
  static constexpr ptrdiff_t kInPlane = ptrdiff_t{kChunkTiles} * kInRow + 16;
  // Products of one block: [36][tiles of a chunk][kOutRow].
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
    const bool by_tiles = share(kGroups, part.count) * kBlocks <= share(kBlocks, part.count) * kGroups;
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
        const float* const wb = w + ptrdiff_t{b} * NB * kProducts * IC;
        if (b < kBlocks - 1)
          compute_block<kFirstBlock>(in, wb, bias, y, out, groups, first, tiles, b * NB, epilogue);
        else
          compute_block<kLastBlock>(in, wb, bias, y, out, groups, first, tiles, b * NB, epilogue);
      }
    }
  }

 private:
  // Largest share of `items` that one of `parts` workers gets.
  static constexpr int share(int items, int parts) { return (items + parts - 1) / parts; }

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
    const int ih = at.h - Padding::Top, iw = at.w - Padding::Left;
    const float* const image = x + ptrdiff_t{at.n} * In::H * In::W * XS;
    if (ih >= 0 && iw >= 0 && ih + kIn <= In::H && iw + kIn <= In::W)
      transform_channels<true>(image, ih, iw, to);
    else
      transform_channels<false>(image, ih, iw, to);
  }

  template <bool Inside>
  static SKIVE_INLINE void transform_channels(const float* image, int ih, int iw, float* to) {
    int c = 0;
    for (; c + kLanes <= IC; c += kLanes) transform_vector<Inside, kLanes>(image + c, ih, iw, to + c);
    if constexpr (IC % kLanes != 0)
      transform_vector<Inside, IC % kLanes>(image + c, ih, iw, to + c);
  }

  template <bool Inside, int N>
  static SKIVE_INLINE void transform_vector(const float* image, int ih, int iw, float* to) {
    Vec<N> d[kIn][kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) {
        const bool inside = Inside || (ih + i >= 0 && ih + i < In::H && iw + j >= 0 && iw + j < In::W);
        const ptrdiff_t at = (ptrdiff_t{ih + i} * In::W + iw + j) * XS;
        d[i][j] = inside ? load<N>(image + at) : zero<N>();
      }
      WinogradPoints::input(d[0][j], d[1][j], d[2][j], d[3][j], d[4][j], d[5][j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) {
      WinogradPoints::input(d[i][0], d[i][1], d[i][2], d[i][3], d[i][4], d[i][5]);
#pragma GCC unroll 6
      for (int j = 0; j < kIn; ++j) store(to + (i * kIn + j) * kInPlane, d[i][j]);
    }
  }

  template <int Channels, class Y, class E>
  static SKIVE_INLINE void compute_block(const float* in, const float* w, const float* bias, Y* y,
                                         float* out, int groups, int first, int tiles, int channel,
                                         const E& epilogue) {
    constexpr int kRow = round_up(Channels, kChannelQuantum);
    for (int p = 0; p < kProducts; ++p)
      for (int g = 0; g < groups; ++g)
        multiply<Channels>(in + p * kInPlane + g * kRows * kInRow, w + ptrdiff_t{p} * IC * kRow,
                           out + p * kOutPlane + g * kRows * kOutRow);
    for (int t = 0; t < tiles; ++t)
      transform_output<Channels>(out + t * kOutRow, bias + channel, y, first + t, channel, epilogue);
  }

  struct Offsets {
    template <int P>
    static constexpr ptrdiff_t at() { return ptrdiff_t{P} * kInRow; }
  };

  // kRows tiles x one block of channels of one of the 36 products.
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
    Vec<N> v[kIn][kIn];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) v[i][j] = load<N>(m + (i * kIn + j) * kOutPlane);
      WinogradPoints::output(v[0][j], v[1][j], v[2][j], v[3][j], v[4][j], v[5][j]);
    }
    const Vec<N> b = load<N>(bias);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      WinogradPoints::output(v[i][0], v[i][1], v[i][2], v[i][3], v[i][4], v[i][5]);
      if (i >= rows) break;
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        if (j >= columns) break;
        const ptrdiff_t at = pixel + ptrdiff_t{i} * OW + j;
        store(y + at * YS + channel, epilogue(v[i][j] + b, at, channel));
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_WINOGRAD_H
