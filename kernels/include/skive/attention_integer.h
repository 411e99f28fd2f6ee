// Scaled dot-product attention of 8-bit operands, softmax(q k^T scale + mask) v, with both products in
// integers (strides and masks as in attention.h).
//
//   s = sum over d of (q - QZero)(k - KZero)                       exact, in 32 bits
//   x = (s - max s) exponent, or, with a mask, t = s scale + mask, x = (t - max t) log2(e)
//   p = 255 * 2^x in 16-bit fixed point (exponentials.h), 0 to 255  255 at the largest score of each row
//   y = (sum over keys of p (v - VZero)) * (factor / sum of p)     the sums exact, in 32 bits
//
// The weights p are relative to their row's maximum and divided by the sum of what they were rounded
// to: the 8 bits are used fully whatever the number of keys, and the weights of a row sum to 1. Every
// operation on floats is correctly rounded and none is a fused multiply-add, so all targets give the same bits
// (the `quantized_attention` row of ops/attention.py). Per head the keys and values are packed once in groups of
// four bytes.
#ifndef SKIVE_ATTENTION_INTEGER_H
#define SKIVE_ATTENTION_INTEGER_H

#include "skive/attention.h"
#include "skive/exponentials.h"
#include "skive/isa/transpose_floats.h"

namespace skive {
inline namespace SKIVE_ISA {

// Four bytes, each less 128.
SKIVE_INLINE void copy_quad(int8_t* to, const uint8_t* from) {
  uint32_t quad;
  __builtin_memcpy(&quad, from, sizeof quad);
  quad ^= 0x80808080u;
  __builtin_memcpy(to, &quad, sizeof quad);
}

// The layout that the tiles of conv.h read, [N / NB][K / 4][NB][4], each value less 128, of the K x N
// matrix b whose columns are contiguous, Column bytes apart.
template <int K, int N, int NB, ptrdiff_t Column>
struct pack_byte_columns {
  static_assert(K % 4 == 0, "whole groups");
  static constexpr int kBlocks = div_up(N, NB);
  static constexpr int kLast = N - (kBlocks - 1) * NB;
  static constexpr ptrdiff_t bytes =
      (static_cast<ptrdiff_t>(K) * ((kBlocks - 1) * NB + round_up(kLast, kChannelQuantum)) + 63) / 64 * 64;

  static void run(const uint8_t* b, int8_t* to) {
    for (int i = 0; i < kBlocks - 1; ++i) {
      block<NB>(b + i * NB * Column, to);
      to += static_cast<ptrdiff_t>(K) * NB;
    }
    block<kLast>(b + (kBlocks - 1) * NB * Column, to);
  }

 private:
  template <int Width>
  static SKIVE_INLINE void block(const uint8_t* b, int8_t* to) {
    constexpr int kRow = round_up(Width, kChannelQuantum);
    // Groups of four bytes change places like floats.
    constexpr int kSquare = kFloatSquare, kColumns = kLanes >= kSquare && K % (4 * kSquare) == 0 && Column % 4 == 0
                                                         ? Width / kSquare * kSquare
                                                         : 0;
    if constexpr (kColumns > 0) {
      for (int j = 0; j < kColumns; j += kSquare)
        for (int k = 0; k < K; k += 4 * kSquare)
          transpose_floats(reinterpret_cast<const float*>(b + j * Column + k), Column / 4,
                           reinterpret_cast<float*>(to + k * kRow + 4 * j), kRow);
      int32_t* const groups = reinterpret_cast<int32_t*>(to);
      for (int k = 0; k < K / 4; ++k)
        each_vector<kColumns>([&](ptrdiff_t j, auto lanes) {
          constexpr int n = decltype(lanes)::count;
          int32_t* const at = groups + k * kRow + j;
          store(at, load<n>(at) ^ splat<n>(static_cast<int32_t>(0x80808080u)));
        });
    }
    for (int j = kColumns; j < Width; ++j)
      for (int k = 0; k < K; k += 4) copy_quad(to + k * kRow + 4 * j, b + j * Column + k);
    for (int j = Width; j < kRow; ++j)
      for (int k = 0; k < K; k += 4) __builtin_memset(to + k * kRow + 4 * j, 0, 4);
  }
};

// The same of a matrix whose rows are contiguous, Row bytes apart; K is rounded up to a multiple of 4 by
// rows of zeros.
template <int K, int N, int NB, ptrdiff_t Row>
struct pack_byte_rows {
  static constexpr int kBlocks = div_up(N, NB);
  static constexpr int kLast = N - (kBlocks - 1) * NB;
  static constexpr int kRows = round_up(K, 4);
  static constexpr ptrdiff_t bytes =
      (static_cast<ptrdiff_t>(kRows) * ((kBlocks - 1) * NB + round_up(kLast, kChannelQuantum)) + 63) / 64 * 64;

  static void run(const uint8_t* b, int8_t* to) {
    for (int i = 0; i < kBlocks - 1; ++i) {
      block<NB>(b + i * NB, to);
      to += static_cast<ptrdiff_t>(kRows) * NB;
    }
    block<kLast>(b + (kBlocks - 1) * NB, to);
  }

 private:
  template <int Width>
  static SKIVE_INLINE void block(const uint8_t* b, int8_t* to) {
    constexpr int kRow = round_up(Width, kChannelQuantum);
    int k = 0;
    for (; k + 4 <= K; k += 4) rows<Width, 4>(b + k * Row, to + k * kRow);
    if constexpr (K % 4 != 0) rows<Width, K % 4>(b + k * Row, to + k * kRow);
  }
  // Count rows as one row of groups.
  template <int Width, int Count>
  static SKIVE_INLINE void rows(const uint8_t* b, int8_t* to) {
    int32_t* const groups = reinterpret_cast<int32_t*>(to);
    each_vector<Width>([&](ptrdiff_t j, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      IVec<n> v = load<n>(b + j);
      if constexpr (Count > 1) v = v | shift_lanes_left<8>(load<n>(b + Row + j));
      if constexpr (Count > 2) v = v | shift_lanes_left<16>(load<n>(b + 2 * Row + j));
      if constexpr (Count > 3) v = v | shift_lanes_left<24>(load<n>(b + 3 * Row + j));
      store(groups + j, v ^ splat<n>(static_cast<int32_t>(0x80808080u)));
    });
    constexpr int kRow = round_up(Width, kChannelQuantum);
    for (int j = Width; j < kRow; ++j) groups[j] = 0;
  }
};

// x [M, K] of bytes (a row every LDX) times packed bytes: y[m * LDY + n].
template <int M, int K, int N, int NB, int LDX, int LDY>
using byte_product = conv2d<Image<1, 1, M, K>, Kernel<N, 1, 1>, Stride<1, 1>, Pad<0, 0, 0, 0>,
                            Dilation<1, 1>, NB, LDX, LDY, uint8_t>;

// Out: float or uint8_t. Causal: query i sees keys 0 to i.
template <class Out, int B, int Heads, int Nq, int Nk, int D, int Dv, class Q, class K, class V, class Y,
          class Mask, bool Causal, int QZero, int KZero, int VZero>
struct quantized_attention {
  static_assert(!Mask::present || Mask::Key == 0 || Mask::Key == 1,
                "a mask is contiguous along the keys");
  static_assert(D % 4 == 0 && D <= 256, "scores are exact in float32");
  static_assert(Nk <= 32768, "sums of weights times values fit 32 bits");
  static constexpr int kScoreBlock = panel_block(Nk), kValueBlock = panel_block(Dv);
  // Query rows whose scores take about 24 KiB, in blocks of nearly one size.
  static constexpr int rows() {
    int r = 24 * 1024 / 4 / Nk;
    r = r < 8 ? 8 : r > 64 ? 64 : r;
    return div_up(Nq, div_up(Nq, r));
  }
  static constexpr int kRows = rows();
  static constexpr int kBlocks = div_up(Nq, kRows);
  static constexpr int kLastRows = Nq - (kBlocks - 1) * kRows;
  static constexpr int kKeys = round_up(Nk, 4);  // of a row of weights
  static constexpr int kScoreRow = round_up(Nk, 64);  // minus infinity behind the last score
  // A multiple of 64, but not of a page.
  static constexpr int kWeightRow = round_up(Nk, 64) % 4096 == 0 ? round_up(Nk, 64) + 64 : round_up(Nk, 64);
  using PackKeys = pack_byte_columns<D, Nk, kScoreBlock, K::Row>;
  using PackValues = pack_byte_rows<Nk, Dv, kValueBlock, V::Row>;
  template <int Rows>
  using Scores = byte_product<Rows, D, Nk, kScoreBlock, Q::Row, kScoreRow>;
  template <int Rows>
  using Results = byte_product<Rows, kKeys, Dv, kValueBlock, kWeightRow, Y::Row>;

  // Bytes of one worker's scratch, each a multiple of 64.
  static constexpr ptrdiff_t kBiasBytes = round_up(Nk + 3 * kLanes, 16) * 4;
  static constexpr ptrdiff_t kZeroBytes = round_up(Dv + 3 * kLanes, 16) * 4;
  static constexpr ptrdiff_t kScoreBytes = ptrdiff_t{kRows} * kScoreRow * 4;
  static constexpr ptrdiff_t kWeightBytes = ptrdiff_t{kRows} * kWeightRow;
  static constexpr ptrdiff_t kRowBytes = round_up(kRows, 16) * 4;  // a number for each row
  static constexpr ptrdiff_t kCopyBytes = Q::Row % 4096 == 0 ? kRows * round_up(D + 64, 64) : 0;
  static constexpr ptrdiff_t kSlice = PackKeys::bytes + PackValues::bytes + kBiasBytes + kZeroBytes +
                                      kScoreBytes + kWeightBytes + 3 * kRowBytes + kCopyBytes;
  static_assert(static_cast<ptrdiff_t>(Scores<kRows>::scratch_bytes()) <= kCopyBytes &&
                    static_cast<ptrdiff_t>(Scores<kLastRows>::scratch_bytes()) <= kCopyBytes &&
                    Results<kRows>::scratch_bytes() == 0 && Results<kLastRows>::scratch_bytes() == 0,
                "room for the rows that are copied");
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kSlice) * static_cast<size_t>(parts);
  }

  // mask may be null if there is NoMask. exponent = scale log2(e). y_zero: of a uint8_t result.
  static void run(const uint8_t* q, const uint8_t* k, const uint8_t* v, const float* mask, Out* y,
                  void* scratch, Part part, float scale, float exponent, float factor, int32_t y_zero) {
    char* at = static_cast<char*>(scratch) + part.index * kSlice;
    const auto take = [&](ptrdiff_t bytes) {
      char* const mine = at;
      at += bytes;
      return mine;
    };
    Room room;
    room.keys = reinterpret_cast<int8_t*>(take(PackKeys::bytes));
    room.values = reinterpret_cast<int8_t*>(take(PackValues::bytes));
    room.bias = reinterpret_cast<int32_t*>(take(kBiasBytes));
    room.zeros = reinterpret_cast<int32_t*>(take(kZeroBytes));
    room.scores = reinterpret_cast<float*>(take(kScoreBytes));
    room.weights = reinterpret_cast<uint8_t*>(take(kWeightBytes));
    room.offset = reinterpret_cast<int32_t*>(take(kRowBytes));
    room.factor = reinterpret_cast<float*>(take(kRowBytes));
    room.shift = reinterpret_cast<int32_t*>(take(kRowBytes));
    room.copy = take(kCopyBytes);
    __builtin_memset(room.zeros, 0, static_cast<size_t>(kZeroBytes));
    for (int r = 0; r < kRows; ++r)
      for (int i = Nk; i < kScoreRow; ++i) room.scores[r * ptrdiff_t{kScoreRow} + i] = -__builtin_inff();
    const Numbers numbers{scale, exponent, factor, y_zero};

    constexpr ptrdiff_t count = ptrdiff_t{B} * Heads * kBlocks;
    ptrdiff_t packed = -1;
    for (ptrdiff_t item = part_begin(count, part), end = part_end(count, part); item < end; ++item) {
      const ptrdiff_t head = item / kBlocks, b = head / Heads, h = head % Heads;
      if (packed != head) {
        PackKeys::run(k + b * K::Batch + h * K::Head, room.keys);
        key_bias(room);
        PackValues::run(v + b * V::Batch + h * V::Head, room.values);
        packed = head;
      }
      const int first = static_cast<int>(item % kBlocks) * kRows;
      const Block block{
          q + b * Q::Batch + h * Q::Head + first * static_cast<ptrdiff_t>(Q::Row),
          Mask::present ? mask + b * Mask::Batch + h * Mask::Head + first * Mask::Query : nullptr,
          y + b * Y::Batch + h * Y::Head + first * static_cast<ptrdiff_t>(Y::Row), first};
      if (first + kRows <= Nq)
        rows_of<kRows>(block, room, numbers);
      else
        rows_of<kLastRows>(block, room, numbers);
    }
  }

 private:
  static constexpr int kKeyShift = KZero - 128, kValueShift = VZero - 128;  // zero points as packed
  struct Room {
    int8_t* keys;
    int8_t* values;
    int32_t* bias;     // of each key: what the zero point of the queries adds
    int32_t* zeros;
    float* scores;     // whole numbers
    uint8_t* weights;
    int32_t* offset;   // of each row: what the zero point of the keys adds to its scores
    float* factor;     // of each row: its largest score, then factor / sum of the weights
    int32_t* shift;    // of each row: what the zero point of the values adds
    char* copy;
  };
  struct Numbers {
    float scale, exponent, factor;
    int32_t y_zero;
  };
  struct Block {
    const uint8_t* q;
    const float* mask;
    Out* y;
    int first;  // query row
  };

  // bias = -QZero * sum of each key.
  static SKIVE_NOINLINE void key_bias(const Room& room) {
    __builtin_memset(room.bias, 0, static_cast<size_t>(kBiasBytes));
    if constexpr (QZero != 0) {
      alignas(64) uint8_t ones[D];
      __builtin_memset(ones, 1, D);
      float* const sums = room.scores;  // free until the first block of queries
      byte_product<1, D, Nk, kScoreBlock, D, kScoreRow>::run(
          ones, room.keys, room.bias, sums, nullptr, Part{},
          [](auto acc, ptrdiff_t, int) __attribute__((always_inline)) { return to_float(acc); });
      for (int i = 0; i < Nk; ++i) room.bias[i] = -QZero * static_cast<int32_t>(sums[i]);
    }
  }

  template <int Rows>
  static SKIVE_INLINE void rows_of(const Block& at, const Room& room, const Numbers& numbers) {
    // A term that all scores of a row share changes no softmax; before a mask it is rounded with them.
    constexpr bool kOffset = Mask::present && kKeyShift != 0;
    if constexpr (kOffset) {
      for (int r = 0; r < Rows; ++r) {
        int32_t sum = -QZero * D;
        for (int d = 0; d < D; ++d) sum += at.q[r * static_cast<ptrdiff_t>(Q::Row) + d];
        room.offset[r] = kKeyShift * sum;
      }
    }
    Scores<Rows>::run(at.q, room.keys, room.bias, room.scores, room.copy, Part{},
                      [=](auto acc, ptrdiff_t row, int key) __attribute__((always_inline)) {
                        constexpr int n = decltype(acc)::lanes;
                        if constexpr (kOffset) acc = acc - splat<n>(room.offset[row]);
                        auto s = to_float(acc);
                        if constexpr (Mask::present) s = s * splat<n>(numbers.scale);
                        return masked<Mask, Causal>(s, at, row, key);
                      });
    // All maxima first: a row's exponentials need not wait for its own.
    for (int r = 0; r < Rows; ++r) {
      const float* const s = room.scores + static_cast<ptrdiff_t>(r) * kScoreRow;
      room.factor[r] =
          max_row<Nk>([&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(s + i); });
    }
    for (int r = 0; r < Rows; ++r) {
      const int32_t sum = byte_exponentials<Nk>(
          room.scores + static_cast<ptrdiff_t>(r) * kScoreRow, room.weights + static_cast<ptrdiff_t>(r) * kWeightRow,
          room.factor[r], (Mask::present ? 1.442695041f : numbers.exponent) * kExponentialSteps);
      room.factor[r] = numbers.factor / static_cast<float>(sum);
      room.shift[r] = kValueShift * sum;
    }
    Results<Rows>::run(room.weights, room.values, room.zeros, at.y, nullptr, Part{},
                       [=](auto acc, ptrdiff_t row, int) __attribute__((always_inline)) {
                         constexpr int n = decltype(acc)::lanes;
                         if constexpr (kValueShift != 0) acc = acc - splat<n>(room.shift[row]);
                         const auto v = to_float(acc) * splat<n>(room.factor[row]);
                         if constexpr (sizeof(Out) == sizeof(float))
                           return v;
                         else
                           return rounded<Out>(v, numbers.y_zero);
                       });
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ATTENTION_INTEGER_H
