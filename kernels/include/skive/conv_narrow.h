// Dense convolution uint8 x int8, NHWC, of few output channels: pixels lie in the lanes.
//
// A register of conv.h holds the sums of one pixel's channels, and what the channels do not fill is
// computed in vain. Here it holds those of one channel and kPixelLanes neighbouring pixels of a row. One
// step multiplies four bytes of every pixel, side by side in memory, by four bytes of weights of a channel, which all
// lanes share. For this the rows of the input are copied as planes of dwords,
//
//   [row][input channels / 4][columns, with the border][4 bytes]
//
// Weights and bias are those of conv.h with all output channels in one block: pack_conv2d_u8, pack_bias_i32.
// Sums are exact, so results are those of conv.h.
//
// The epilogue is called as epilogue(IVec<N> sums, pixel, channel): `pixel` is the flat index of the first of N
// neighbouring pixels, `channel` a Channel<c>. It reads its operands by load_channel, load_pixel and
// load_full, and returns what is stored.
#ifndef SKIVE_CONV_NARROW_H
#define SKIVE_CONV_NARROW_H

#include "skive/conv.h"

#if defined(SKIVE_TARGET_AVX512VNNI)
#include "skive/isa/narrow_avx512.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kPixelLanes = 16;

template <int C>
struct Channel {
  static constexpr int value = C;
};

// What an epilogue reads for N pixels of one channel: one value for each channel of e, one for each pixel, and bytes
// [pixels][S].
template <int N, class T, int C>
SKIVE_INLINE auto load_channel(const T* e, Channel<C>) {
  if constexpr (T(0.5) != T(0)) return splat<N>(static_cast<float>(e[C]));
  else return splat<N>(static_cast<int32_t>(e[C]));
}
template <int N, class T>
SKIVE_INLINE auto load_pixel(const T* e, ptrdiff_t pixel) { return load<N>(e + pixel); }
template <int N, int S, int C>
SKIVE_INLINE IVec<N> load_full(const uint8_t* e, ptrdiff_t pixel, Channel<C>) {
  return bytes_of_pixels<N, S, C>(e + pixel * S);
}

// Register tile: rows x vectors of kPixelLanes pixels.
struct PixelTile {
  int rows, vectors;
};

// Cycles of one step of a tile of `vectors` of pixels: a multiply-add for each sum, or the loads of the weights
// and of the pixels, which cross cache lines, or the latency of a multiply-add; and a little for the tile itself.
constexpr int pixel_tile_cost(int channels, int vectors) {
  const int products = channels * vectors, loads = channels + 2 * vectors;
  const int most = products > loads ? products : loads;
  return 8 * (most > 5 ? most : 5) + 8;
}

constexpr int kMostTileRows = 8;
// The cheapest tile whose sums, pixels and weights fit the registers. Tiles of several rows take a whole number
// of tiles to a row, so that few shapes are compiled.
constexpr PixelTile best_pixel_tile(int oh, int row_vectors, int channels) {
  PixelTile best{1, 1};
  long best_cost = -1;
  for (int r = 1; r <= kMostTileRows && r <= oh; ++r) {
    for (int v = 1; v <= row_vectors && r * v <= 8; ++v) {
      if (r * v > 1 && (channels + 1) * r * v + 1 > 32) continue;
      if (r > 1 && row_vectors % v != 0) continue;
      const long columns = row_vectors / v, rest = row_vectors % v;
      long cost = columns * pixel_tile_cost(channels, r * v) * (oh / r);
      if (rest != 0) cost += pixel_tile_cost(channels, static_cast<int>(rest)) * oh;
      if (oh % r != 0) cost += columns * pixel_tile_cost(channels, oh % r * v);
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = {r, v};
      }
    }
  }
  return best;
}

// The sums of `Channels` channels and `Vectors` vectors of pixels, and what is done with them.
template <int Channels, int Vectors>
struct PixelSums {
  template <class>
  struct Registers;
  template <int... I>
  struct Registers<Index<I...>> : Slot<I, IVec<kPixelLanes>>... {};
  using Each = Indices<Channels * Vectors>;  // sum c of vector v is number v * Channels + c
  using EachChannel = Indices<Channels>;
  using EachVector = Indices<Vectors>;
  using Sums = Registers<Each>;
  using Pixels = Registers<EachVector>;

  template <int... I>
  static SKIVE_INLINE void start(Sums& sums, const int32_t* bias, Index<I...>) {
    ((slot<I>(sums) = splat(bias[I % Channels])), ...);
  }
  template <int C, int... V>
  static SKIVE_INLINE void step_channel(Sums& sums, Pixels& x, const int8_t* w, Index<V...>) {
    int32_t four;
    __builtin_memcpy(&four, w + 4 * C, sizeof four);
    const IVec<kPixelLanes> weights = splat(four);
    ((slot<V * Channels + C>(sums) = multiply_add_pixels(slot<V * Channels + C>(sums), slot<V>(x), weights)), ...);
  }
  template <class Offsets, int... V>
  static SKIVE_INLINE void load(Pixels& x, const uint8_t* p, Index<V...>) {
    ((slot<V>(x) = load_dwords<kPixelLanes>(p + Offsets::template at<V>())), ...);
  }
  template <int... C>
  static SKIVE_INLINE void step(Sums& sums, Pixels& x, const int8_t* w, Index<C...>) {
    (step_channel<C>(sums, x, w, EachVector{}), ...);
  }

  // Results of channels 4 * G to 4 * G + 3; the last one stands for those that do not exist.
  template <int V, int N, int G, class T, class E>
  static SKIVE_INLINE IVec<kPixelLanes> joined(Sums& sums, ptrdiff_t pixel, const E& epilogue) {
    const auto result = [&](auto number) __attribute__((always_inline)) {
      constexpr int wanted = 4 * G + decltype(number)::value, c = wanted < Channels ? wanted : Channels - 1;
      return epilogue(IVec<N>{slot<V * Channels + c>(sums).v}, pixel, Channel<c>{});
    };
    return join_channels<T>(result(Channel<0>{}), result(Channel<1>{}), result(Channel<2>{}),
                            result(Channel<3>{}));
  }
  template <int V, int N, int Stride, class T, class E, int... G>
  static SKIVE_INLINE void finish_bytes(Sums& sums, T* y, ptrdiff_t pixel, const E& epilogue, Index<G...>) {
    const IVec<kPixelLanes> planes[] = {joined<V, N, G, T>(sums, pixel, epilogue)...};
    store_pixels<N, Channels, Stride>(reinterpret_cast<uint8_t*>(y + pixel * Stride), planes);
  }
  template <int V, int N, int Stride, class T, class E, int... C>
  static SKIVE_INLINE void finish_words(Sums& sums, T* y, ptrdiff_t pixel, const E& epilogue, Index<C...>) {
    if constexpr (Stride == 1) {
      store(y + pixel, epilogue(IVec<N>{slot<V>(sums).v}, pixel, Channel<0>{}));
    } else {
      alignas(64) T planes[Channels][kPixelLanes];
      (store(planes[C], epilogue(IVec<N>{slot<V * Channels + C>(sums).v}, pixel, Channel<C>{})), ...);
      T* to = y + pixel * Stride;
      for (int i = 0; i < N; ++i, to += Stride) {
        for (int c = 0; c < Channels; ++c) to[c] = planes[c][i];
      }
    }
  }
  template <int V, int N, int Stride, class T, class E>
  static SKIVE_INLINE void finish_vector(Sums& sums, T* y, ptrdiff_t pixel, const E& epilogue) {
    if constexpr (sizeof(T) == 1) finish_bytes<V, N, Stride>(sums, y, pixel, epilogue, Indices<div_up(Channels, 4)>{});
    else finish_words<V, N, Stride>(sums, y, pixel, epilogue, EachChannel{});
  }
};

// Arguments as for conv2d. Stride and dilation 1, a whole number of dwords of input channels, an unpadded image
// or a border narrower than the window.
template <class In, class Filter, class Strides, class Padding, class Dilations, int NB, int XS, int YS,
          class Element, int Zero>
struct narrow_conv2d {
  static constexpr int IC = In::C, OC = Filter::OC, KH = Filter::KH, KW = Filter::KW;
  static_assert(sizeof(Element) == 1 && Element(-1) > 0, "bytes without a sign");
  static_assert(Strides::H == 1 && Strides::W == 1 && Dilations::H == 1 && Dilations::W == 1,
                "neighbouring pixels read neighbouring pixels");
  static_assert(IC % 4 == 0 && IC > 0 && NB == round_up(OC, kChannelQuantum), "weights as they are read here");
  static_assert(OC <= 14, "the sums of two vectors of pixels, these and a weight in 32 registers");
  static_assert(Padding::Top < KH && Padding::Bottom < KH && Padding::Left < KW && Padding::Right < KW,
                "every window has pixels of the image");
  using Weight = int8_t;
  using Sum = int32_t;

  // Without a window all pixels are one row, cut into rows that tiles like.
  static constexpr bool kPointwise = KH == 1 && KW == 1;
  static constexpr int kPixels = In::N * In::H * In::W;
  static constexpr int kCut = kPixels % 64 == 0 ? 64 : kPixels % 32 == 0 ? 32 : kPixels % 16 == 0 ? 16 : In::W;
  static constexpr int kImages = kPointwise ? 1 : In::N;
  static constexpr int kWidth = kPointwise ? kCut : In::W, kHeight = kPointwise ? kPixels / kCut : In::H;
  static constexpr int OH = kHeight + Padding::Top + Padding::Bottom - KH + 1;
  static constexpr int OW = kWidth + Padding::Left + Padding::Right - KW + 1;
  static_assert(OH > 0 && OW > 0, "the window is larger than the padded image");

  static constexpr int kVectors = div_up(OW, kPixelLanes);
  static constexpr int kTail = OW - (kVectors - 1) * kPixelLanes;  // pixels of a row's last vector
  static constexpr PixelTile tile = best_pixel_tile(OH, kVectors, OC);
  static constexpr int kStrips = div_up(OH, tile.rows);  // per image

  // The copy: columns that vectors load and that the copying of whole vectors writes.
  static constexpr int kGroups = IC / 4;
  static constexpr int kLoaded = kVectors * kPixelLanes + KW - 1;
  static constexpr int kWritten = Padding::Left + round_up(kWidth, kPixelLanes);
  static constexpr int kColumns = round_up(kLoaded > kWritten ? kLoaded : kWritten, 16);
  static constexpr ptrdiff_t kPlane = kColumns * 4, kRow = kPlane * kGroups;  // bytes

  static constexpr ptrdiff_t weight_count = round_up(KH * KW * kGroups * NB, 16) * 4;
  static constexpr ptrdiff_t bias_count = round_up(NB, 16);

  // Strips whose input stays in half of L1.
  static constexpr int rows_read(int output_rows) { return output_rows + KH - 1; }
  static constexpr int chunk_strips() {
    int strips = 1;
    while (strips < kStrips && rows_read((strips + 1) * tile.rows) * kRow <= 24 * 1024) ++strips;
    return strips;
  }
  static constexpr int kChunk = chunk_strips();
  static constexpr ptrdiff_t kCopyBytes =
      rows_read(kChunk * tile.rows < OH ? kChunk * tile.rows : OH) * kRow;

  // Bytes of scratch that `parts` workers need together.
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kCopyBytes) * static_cast<size_t>(parts);
  }

  template <int V>
  struct Offsets {
    template <int I>
    static constexpr ptrdiff_t at() {
      return I / V * kRow + I % V * kPixelLanes * 4;
    }
  };

  // Rows x V vectors of pixels from flat output pixel `pixel`; the last one of a row has Last pixels.
  template <int Rows, int V, int Last, class Y, class E>
  static SKIVE_NOINLINE void compute_tile(const uint8_t* x, const int8_t* w, const int32_t* bias, Y* y,
                                          ptrdiff_t pixel, const E& epilogue) {
    using T = PixelSums<OC, Rows * V>;
    typename T::Sums sums;
    T::start(sums, bias, typename T::Each{});
    for (int kh = 0; kh < KH; ++kh) {
      for (int kw = 0; kw < KW; ++kw) {
        const uint8_t* p = x + kh * kRow + kw * 4;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g, p += kPlane, w += 4 * NB) {
          typename T::Pixels pixels;
          T::template load<Offsets<V>>(pixels, p, typename T::EachVector{});
          T::step(sums, pixels, w, typename T::EachChannel{});
        }
      }
    }
    finish<T, V, Last>(sums, y, pixel, epilogue, typename T::EachVector{});
  }
  template <class T, int V, int Last, class Y, class E, int... I>
  static SKIVE_INLINE void finish(typename T::Sums& sums, Y* y, ptrdiff_t pixel, const E& epilogue, Index<I...>) {
    (T::template finish_vector<I, I % V == V - 1 ? Last : kPixelLanes, YS>(
         sums, y, pixel + I / V * OW + I % V * kPixelLanes, epilogue),
     ...);
  }

  template <int Rows, class Y, class E>
  static SKIVE_INLINE void compute_strip(const uint8_t* x, const int8_t* w, const int32_t* bias, Y* y,
                                         ptrdiff_t pixel, const E& epilogue) {
    constexpr int kRest = kVectors % tile.vectors, kWhole = kVectors - kRest;
    constexpr int kFull = kRest == 0 && kTail != kPixelLanes ? kWhole - tile.vectors : kWhole;
    constexpr ptrdiff_t kStep = tile.vectors * kPixelLanes;
    int v = 0;
    for (; v < kFull; v += tile.vectors, x += 4 * kStep, pixel += kStep) {
      compute_tile<Rows, tile.vectors, kPixelLanes>(x, w, bias, y, pixel, epilogue);
    }
    if constexpr (kFull < kWhole) compute_tile<Rows, tile.vectors, kTail>(x, w, bias, y, pixel, epilogue);
    if constexpr (kRest != 0) compute_tile<Rows, kRest, kTail>(x, w, bias, y, pixel, epilogue);
  }

  // The dwords of `count` pixels, one by one.
  static SKIVE_INLINE void copy_dwords(const uint8_t* from, uint8_t* to, int count) {
    for (int i = 0; i < count; ++i) {
      for (int g = 0; g < kGroups; ++g) __builtin_memcpy(to + g * kPlane + 4 * i, from + i * XS + 4 * g, 4);
    }
  }
  // Copies input rows [begin, begin + count) of an image with their border.
  static SKIVE_NOINLINE void copy_rows(const uint8_t* x, uint8_t* to, int begin, int count) {
    constexpr int kWhole = kWidth / kPixelLanes * kPixelLanes, kRest = kWidth - kWhole;
    for (int r = begin; r < begin + count; ++r, to += kRow) {
      if (r < 0 || r >= kHeight) {
        fill_elements<Zero>(to, kRow);
        continue;
      }
      const uint8_t* from = x + static_cast<ptrdiff_t>(r) * kWidth * XS;
      uint8_t* inside = to + Padding::Left * 4;
      for (int c = 0; c < kWhole; c += kPixelLanes, from += kPixelLanes * XS, inside += kPixelLanes * 4) {
        if constexpr (kGroups <= 4 && XS == IC) {
          split_pixels<kPixelLanes, kGroups>(from, inside, kPlane, Indices<kGroups>{});
        } else if constexpr (kGroups >= 4) {
          for (int g = 0; g + 4 <= kGroups; g += 4) {
            split_quads(from + 4 * g, XS, inside + g * kPlane, kPlane);
          }
          if constexpr (kGroups % 4 != 0) {  // the last four again
            split_quads(from + IC - 16, XS, inside + (kGroups - 4) * kPlane, kPlane);
          }
        } else {
          copy_dwords(from, inside, kPixelLanes);
        }
      }
      if constexpr (kRest != 0) {
        if constexpr (kGroups <= 4 && XS == IC) {
          split_pixels<kRest, kGroups>(from, inside, kPlane, Indices<kGroups>{});
        } else {
          copy_dwords(from, inside, kRest);
        }
      }
      for (int g = 0; g < kGroups; ++g) {
        fill_elements<Zero>(to + g * kPlane, Padding::Left * 4);
        fill_elements<Zero>(to + g * kPlane + (Padding::Left + kWidth) * 4, Padding::Right * 4);
      }
    }
  }

  template <class Y, class E>
  static void run(const Element* x, const Weight* w, const Sum* bias, Y* y, void* scratch, Part part,
                  const E& epilogue) {
    constexpr int kAllStrips = kImages * kStrips;
    const int s1 = static_cast<int>(part_end(kAllStrips, part));
    uint8_t* const rows = static_cast<uint8_t*>(scratch) + part.index * kCopyBytes;
    for (int s = static_cast<int>(part_begin(kAllStrips, part)); s < s1;) {
      const int image = s / kStrips, begin = s % kStrips;
      int end = begin + kChunk < kStrips ? begin + kChunk : kStrips;
      if (end - begin > s1 - s) end = begin + (s1 - s);
      const int first = begin * tile.rows, last = end * tile.rows < OH ? end * tile.rows : OH;
      copy_rows(x + static_cast<ptrdiff_t>(image) * kHeight * kWidth * XS, rows, first - Padding::Top,
                rows_read(last - first));
      const uint8_t* from = rows;
      int row = first;
      for (; row + tile.rows <= last; row += tile.rows, from += tile.rows * kRow) {
        compute_strip<tile.rows>(from, w, bias, y, (static_cast<ptrdiff_t>(image) * OH + row) * OW, epilogue);
      }
      if constexpr (OH % tile.rows != 0) {
        if (row < last) {
          compute_strip<OH % tile.rows>(from, w, bias, y, (static_cast<ptrdiff_t>(image) * OH + row) * OW, epilogue);
        }
      }
      s += end - begin;
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TARGET_AVX512VNNI

#endif  // SKIVE_CONV_NARROW_H
