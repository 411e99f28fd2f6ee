// Fully connected layers whose weights stay integers of 4 or 8 bits in memory: few rows of
// activations read every weight once, so that their bytes decide the time.
//
// y[m, n] = epilogue(bias[n] + sum over k of x'[m, k] * (q[n, k] - zero) * scale), scale and zero
// being those of channel n and of the group of `Group` neighbouring k. Activation says what x' is:
//   32   x itself, in float32
//   16   x rounded to 16 bits: step * round_even(x / step) with step = max |x[m]| / 32639
//    8   the same to 8 bits, with 127
// (a row without a magnitude above 1e-30 rounds to 0; a row with NaN or infinity gives NaN). The sum
// of a group is then exact in 32 bits, and groups are added in float32.
//
// Packed weights: a word is 32 / Bits weights of one channel along K, rows of words are blocks of
// four vectors of channels (the last block: as many vectors as it needs), one row behind the other.
// Byte b of a word is weight k + b; of 4 bits the low half is k + b, the high half k + 4 + b. Where
// the processor multiplies bytes (kMultipliesBytes, Activation below 32) the integers are stored
// unsigned, else less 2^(Bits-1), signed. Scales and zero points: [group][channel] of each block.
#ifndef SKIVE_COMPRESSED_H
#define SKIVE_COMPRESSED_H

#include "skive/row.h"
#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

#if defined(SKIVE_TARGET_AVX512VNNI)
constexpr bool kMultipliesBytes = true;
#else
constexpr bool kMultipliesBytes = false;
#endif

template <class T, class Each>
struct RegisterBank;
template <class T, int... I>
struct RegisterBank<T, Index<I...>> : Slot<I, T>... {};

// Rows of activations as the tiles read them. `kDepth` elements, zeros behind the first K.
template <int Bits, int Activation, int K, int Group>
struct CompressedInput {
  static constexpr bool kBytes = kMultipliesBytes && Activation < 32;
  static constexpr int kWordDepth = 32 / Bits;
  static constexpr int kDepth = round_up(K, kWordDepth);
  static constexpr int kGroups = div_up(K, Group);
  static constexpr int kHalves = kBytes ? Activation / 8 : 1;
  // Bytes of a row, or of a half of it; a line more, so that rows do not clash in the L1 cache.
  static constexpr int kHalfBytes = round_up(kDepth * (kBytes ? 1 : 4), 64) + 64;
  static constexpr int kSums = kBytes ? kGroups * kHalves : 0;  // int32: of a group's elements
  static constexpr int kRowBytes = round_up(kHalfBytes * kHalves + 4 * kSums, 64) + 64;
  static constexpr int kStep = kRowBytes - 4;  // where the step of the row is

  static SKIVE_INLINE float* step(unsigned char* row) {
    return reinterpret_cast<float*>(row + kStep);
  }

  static void prepare(const float* x, unsigned char* row) {
    __builtin_memset(row, 0, kRowBytes);
    if constexpr (Activation == 32) {
      __builtin_memcpy(row, x, K * sizeof(float));
    } else {
      constexpr float kLimit = Activation == 16 ? 32639.0f : 127.0f;
      Vec<kLanes> most = zero(), poison = zero();
      each_vector<K>(
          [&](ptrdiff_t k, auto lanes) {
            constexpr int l = decltype(lanes)::count;
            const Vec<l> v = load<l>(x + k);
            float part[kLanes] = {}, none[kLanes] = {};
            if constexpr (l == kLanes) {
              most = vmax(abs_(v), most);
              poison = poison + v * zero();
            } else {
              store(part, abs_(v));
              store(none, v * zero<l>());
              most = vmax(load(part), most);
              poison = poison + load(none);
            }
          });
      const float top = hmax(most);
      const float inverse = top > 1e-30f ? kLimit / top : 0.0f;
      const float size = top / kLimit + hsum(poison);
      *step(row) = size;
      if (size != size) return;  // the elements stay 0
      for (int g = 0; g < kGroups - 1; ++g) group<Group>(x, inverse, row, g);
      group<K - (kGroups - 1) * Group>(x, inverse, row, kGroups - 1);
    }
  }

 private:
  template <int Length>
  static SKIVE_INLINE void group(const float* x, float inverse, unsigned char* row, int g) {
    int32_t sums[2] = {0, 0};
    each_vector<Length>([&](ptrdiff_t i, auto lanes) {
      constexpr int l = decltype(lanes)::count;
      const ptrdiff_t k = g * static_cast<ptrdiff_t>(Group) + i;
      const IVec<l> q = round_to_int(load<l>(x + k) * splat<l>(inverse));
      if constexpr (!kBytes) {
        store(reinterpret_cast<float*>(row) + k, to_float(q));
      } else {
        const IVec<l> low = shift_lanes_right<24>(shift_lanes_left<24>(q));
        store(reinterpret_cast<int8_t*>(row) + k, low);
        sums[0] += hsum(low);
        if constexpr (kHalves == 2) {
          const IVec<l> high = shift_lanes_right<8>(q - low);
          store(reinterpret_cast<int8_t*>(row) + kHalfBytes + k, high);
          sums[1] += hsum(high);
        }
      }
    });
    if constexpr (kBytes) {
      int32_t* const to = reinterpret_cast<int32_t*>(row + kHalfBytes * kHalves);
      for (int h = 0; h < kHalves; ++h) to[g * kHalves + h] = sums[h];
    }
  }
};

// One group of R rows times V vectors of channels in float32. `words` rows of packed words, a row
// `row_words` long.
template <int Bits, bool Zeros, class Input, int R, int V>
struct FloatWeights {
  using Totals = RegisterBank<Vec<kLanes>, Indices<R * V>>;
  using EachRow = Indices<R>;

  static SKIVE_INLINE void group(Totals& total, const unsigned char* x, int g, ptrdiff_t k,
                                 const int32_t* w, ptrdiff_t row_words, int words,
                                 const float* scale, const uint8_t* zeros) {
    static_cast<void>(g);
    Totals sum;
    clear(sum, Indices<R * V>{});
    const float* from = reinterpret_cast<const float*>(x) + k;
    for (int i = 0; i < words; ++i, w += row_words, from += 32 / Bits)
      vectors(sum, from, w, zeros, Indices<V>{});
    scaled(total, sum, scale, Indices<R * V>{});
  }

 private:
  template <int... I>
  static SKIVE_INLINE void clear(Totals& t, Index<I...>) {
    ((slot<I>(t) = zero()), ...);
  }
  template <int... I>
  static SKIVE_INLINE void scaled(Totals& total, Totals& sum, const float* scale, Index<I...>) {
    ((slot<I>(total) = fma(slot<I>(sum), load(scale + I % V * kLanes), slot<I>(total))), ...);
  }
  template <int... W>
  static SKIVE_INLINE void vectors(Totals& sum, const float* x, const int32_t* w,
                                   const uint8_t* zeros, Index<W...>) {
    (elements<W>(sum, x, load(w + W * kLanes), zeros, Indices<32 / Bits>{}), ...);
  }
  template <int W, int... E>
  static SKIVE_INLINE void elements(Totals& sum, const float* x, IVec<kLanes> word,
                                    const uint8_t* zeros, Index<E...>) {
    (element<W, E>(sum, x, word, zeros), ...);
  }
  // Element E of a word counts from its lowest bits.
  template <int W, int E>
  static SKIVE_INLINE void element(Totals& sum, const float* x, IVec<kLanes> word,
                                   const uint8_t* zeros) {
    constexpr int kAt = Bits == 8 ? E : E / 2 + E % 2 * 4;
    IVec<kLanes> q = shift_lanes_right<32 - Bits>(shift_lanes_left<32 - Bits - E * Bits>(word));
    if constexpr (Zeros)
      q = q - (load(zeros + W * kLanes) - splat<kLanes>(1 << (Bits - 1)));
    rows<W>(sum, x + kAt, to_float(q), EachRow{});
  }
  template <int W, int... P>
  static SKIVE_INLINE void rows(Totals& sum, const float* x, Vec<kLanes> q, Index<P...>) {
    ((slot<P * V + W>(sum) =
          fma(splat<kLanes>(x[P * (Input::kRowBytes / 4)]), q, slot<P * V + W>(sum))),
     ...);
  }
};

#if defined(SKIVE_TARGET_AVX512VNNI)
// The same in integers: one half of the activations' bits at a time.
template <int Bits, bool Zeros, class Input, int R, int V>
struct ByteWeights {
  using Totals = RegisterBank<Vec<kLanes>, Indices<R * V>>;
  static constexpr int H = Input::kHalves;
  using Word = U8Tile::Lanes<kLanes>;
  using Sums = RegisterBank<Word, Indices<R * V * H>>;

  static SKIVE_INLINE void group(Totals& total, const unsigned char* x, int g, ptrdiff_t k,
                                 const int32_t* w, ptrdiff_t row_words, int words,
                                 const float* scale, const uint8_t* zeros) {
    Sums sum;
    const unsigned char* const sums = x + Input::kHalfBytes * H + g * H * 4;
    start(sum, sums, zeros, Indices<R * V * H>{});
    const unsigned char* from = x + k;
    for (int i = 0; i < words; ++i, w += row_words, from += 32 / Bits) {
      if constexpr (Bits == 8) {
        bytes<0>(sum, from, w, Indices<V>{});
      } else {
        bytes<0>(sum, from, w, Indices<V>{});
        bytes<4>(sum, from + 4, w, Indices<V>{});
      }
    }
    scaled(total, sum, scale, Indices<R * V>{});
  }

 private:
  // The zero point's share, which the sum starts with; register (row * V + vector) * H + half.
  template <int I>
  static SKIVE_INLINE Word started(const unsigned char* sums, const uint8_t* zeros) {
    int32_t s;
    __builtin_memcpy(&s, sums + I / (V * H) * Input::kRowBytes + I % H * 4, 4);
    if constexpr (Zeros) return {(load(zeros + I / H % V * kLanes) * splat<kLanes>(-s)).v};
    else return {splat<kLanes>(-s * (1 << (Bits - 1))).v};
  }
  template <int... I>
  static SKIVE_INLINE void start(Sums& sum, const unsigned char* sums, const uint8_t* zeros,
                                 Index<I...>) {
    ((slot<I>(sum) = started<I>(sums, zeros)), ...);
  }
  template <int Shift, int... W>
  static SKIVE_INLINE void bytes(Sums& sum, const unsigned char* x, const int32_t* w, Index<W...>) {
    const auto word = [&](int v) __attribute__((always_inline)) {
      IVec<kLanes> q = load(w + v * kLanes);
      if constexpr (Shift != 0) q = shift_lanes_right<Shift>(q);
      if constexpr (Bits == 4) q = q & splat<kLanes>(0x0f0f0f0f);
      return Word{q.v};
    };
    RegisterBank<Word, Index<W...>> row;
    ((slot<W>(row) = word(W)), ...);
    halves(sum, x, row, Indices<R * H>{}, Index<W...>{});
  }
  template <int... P, int... W>
  static SKIVE_INLINE void halves(Sums& sum, const unsigned char* x,
                                  RegisterBank<Word, Index<W...>>& row, Index<P...>, Index<W...> e) {
    (half<P>(sum, x, row, e), ...);
  }
  // P: row * H + half.
  template <int P, int... W>
  static SKIVE_INLINE void half(Sums& sum, const unsigned char* x,
                                RegisterBank<Word, Index<W...>>& row, Index<W...>) {
    const Word b = U8Tile::broadcast_bytes<kLanes>(x + P / H * Input::kRowBytes + P % H * Input::kHalfBytes);
    ((slot<(P / H * V + W) * H + P % H>(sum) = U8Tile::multiply_add(
          slot<(P / H * V + W) * H + P % H>(sum), slot<W>(row), b)),
     ...);
  }
  template <int I>
  static SKIVE_INLINE Vec<kLanes> whole(Sums& sum) {
    const Vec<kLanes> low = to_float(IVec<kLanes>{slot<I * H>(sum).v});
    if constexpr (H == 1) return low;
    else return fma(to_float(IVec<kLanes>{slot<I * H + H - 1>(sum).v}), splat<kLanes>(256.0f), low);
  }
  template <int... I>
  static SKIVE_INLINE void scaled(Totals& total, Sums& sum, const float* scale, Index<I...>) {
    ((slot<I>(total) = fma(whole<I>(sum), load(scale + I % V * kLanes), slot<I>(total))), ...);
  }
};
#else
template <int Bits, bool Zeros, class Input, int R, int V>
struct ByteWeights;
#endif

template <bool Bytes, int Bits, bool Zeros, class Input, int R, int V>
struct compressed_tile {
  using type = FloatWeights<Bits, Zeros, Input, R, V>;
};
template <int Bits, bool Zeros, class Input, int R, int V>
struct compressed_tile<true, Bits, Zeros, Input, R, V> {
  using type = ByteWeights<Bits, Zeros, Input, R, V>;
};

// x [M, K], y [M, N]. Without Zeros every zero point is 2^(Bits-1). `Group` is a multiple of
// 32 / Bits, or K. bias, scale and zero are filled with zeros up to whole vectors. The epilogue's
// pixel is the row.
template <int Bits, int Activation, int M, int K, int N, int Group, bool Zeros>
struct compressed_linear {
  using Input = CompressedInput<Bits, Activation, K, Group>;
  static_assert(Bits == 4 || Bits == 8, "bits of a weight");
  static_assert(Activation == 8 || Activation == 16 || Activation == 32, "bits of an activation");
  static_assert(Group % Input::kWordDepth == 0 || Group == K, "groups are whole words");
  static_assert(!Input::kBytes || Group <= 65536, "sums of a group fit 32 bits");
  static constexpr int kVectors = div_up(N, kLanes);
  static constexpr int kBlocks = div_up(kVectors, 4);
  static constexpr int kWords = Input::kDepth / Input::kWordDepth;  // rows of packed words
  // Rows of activations that stay in the L2 cache while all weights pass.
  static constexpr int rows() {
    const int r = 256 * 1024 / Input::kRowBytes / 4 * 4;
    return r < 4 ? (M < 4 ? M : 4) : r < M ? r : M;
  }
  static constexpr int kRows = rows();
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kRows) * Input::kRowBytes * static_cast<size_t>(parts);
  }

  template <class Y, class E>
  static void run(const float* x, const uint8_t* w, const float* scale, const uint8_t* zeros,
                  const float* bias, Y* y, void* scratch, Part part, const E& epilogue) {
    const int begin = static_cast<int>(part_begin(kBlocks, part));
    const int end = static_cast<int>(part_end(kBlocks, part));
    if (begin == end) return;
    unsigned char* const input =
        static_cast<unsigned char*>(scratch) + static_cast<ptrdiff_t>(part.index) * kRows * Input::kRowBytes;
    for (int m = 0; m < M; m += kRows) {
      const int count = M - m < kRows ? M - m : kRows;
      for (int r = 0; r < count; ++r)
        Input::prepare(x + (m + r) * static_cast<ptrdiff_t>(K), input + r * static_cast<ptrdiff_t>(Input::kRowBytes));
      const auto at = Place<Y>{reinterpret_cast<const int32_t*>(w), scale, zeros, bias, y, input, m, count};
      for (int b = begin; b < end; ++b) {
        if (b < kBlocks - 1) block<4>(at, b, epilogue);
        else block<kVectors - (kBlocks - 1) * 4>(at, b, epilogue);
      }
    }
  }

 private:
  template <class Y>
  struct Place {
    const int32_t* w;
    const float* scale;
    const uint8_t* zeros;
    const float* bias;
    Y* y;
    unsigned char* input;
    int first, count;  // rows
  };

  // All rows times block b, of `Width` vectors of channels.
  template <int Width, class Y, class E>
  static SKIVE_INLINE void block(const Place<Y>& at, int b, const E& epilogue) {
    constexpr int kRest = M % 4;
    int r = 0;
    if constexpr (M >= 4)
      for (; r + 4 <= at.count; r += 4) strip<4, 2, Width>(at, b, r, epilogue);
    if constexpr (kRest > 0)
      if (r < at.count) strip<kRest, kRest < 3 ? 4 : 2, Width>(at, b, r, epilogue);
  }
  // R rows times the vectors of a block, `Most` at a time.
  template <int R, int Most, int Width, class Y, class E>
  static SKIVE_INLINE void strip(const Place<Y>& at, int b, int r, const E& epilogue) {
    constexpr int kRest = Width % Most;
    for (int v = 0; v + Most <= Width; v += Most) tile<R, Most>(at, b, v, Width * kLanes, r, epilogue);
    if constexpr (kRest > 0) tile<R, kRest>(at, b, Width - kRest, Width * kLanes, r, epilogue);
  }
  // R rows times V vectors from number `first` on of block b, which is `width` channels wide.
  template <int R, int V, class Y, class E>
  static SKIVE_NOINLINE void tile(const Place<Y>& at, int b, int first, ptrdiff_t width, int r, const E& epilogue) {
    using Tile = typename compressed_tile<Input::kBytes, Bits, Zeros, Input, R, V>::type;
    typename Tile::Totals total;
    clear(total, Indices<R * V>{});
    const int32_t* w = at.w + static_cast<ptrdiff_t>(b) * 4 * kLanes * kWords + first * kLanes;
    ptrdiff_t side = static_cast<ptrdiff_t>(b) * 4 * kLanes * Input::kGroups + first * kLanes;
    unsigned char* const x = at.input + r * static_cast<ptrdiff_t>(Input::kRowBytes);
    constexpr int kWhole = Group / Input::kWordDepth;
    for (int g = 0; g < Input::kGroups; ++g, w += kWhole * width, side += width) {
      const int left = kWords - g * kWhole;
      const int words = Input::kGroups == 1 ? kWords : left < kWhole ? left : kWhole;
      Tile::group(total, x, g, g * static_cast<ptrdiff_t>(Group), w, width, words, at.scale + side,
                  Zeros ? at.zeros + side : nullptr);
    }
    finish<V>(total, at, r, (b * 4 + first) * kLanes, x, epilogue, Indices<R * V>{});
  }
  template <class Bank, int... I>
  static SKIVE_INLINE void clear(Bank& t, Index<I...>) {
    ((slot<I>(t) = zero()), ...);
  }
  template <int V, class Bank, class Y, class E, int... I>
  static SKIVE_INLINE void finish(Bank& total, const Place<Y>& at, int r, int channel, unsigned char* x,
                                  const E& epilogue, Index<I...>) {
    (one(slot<I>(total), at, r + I / V, channel + I % V * kLanes, x + I / V * static_cast<ptrdiff_t>(Input::kRowBytes),
         epilogue),
     ...);
  }
  template <class Y, class E>
  static SKIVE_INLINE void one(Vec<kLanes> sum, const Place<Y>& at, int r, int channel, unsigned char* x,
                               const E& epilogue) {
    const Vec<kLanes> bias = load(at.bias + channel);
    Vec<kLanes> v;
    if constexpr (Activation == 32) v = sum + bias;
    else v = fma(sum, splat<kLanes>(*Input::step(x)), bias);
    const ptrdiff_t row = at.first + r;
    Y* const to = at.y + row * N + channel;
    constexpr int kTail = N % kLanes;
    if constexpr (kTail != 0) {
      if (channel + kLanes > N) {
        float all[kLanes];
        store(all, v);
        store(to, epilogue(load<kTail>(all), row, channel));
        return;
      }
    }
    store(to, epilogue(v, row, channel));
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_COMPRESSED_H
