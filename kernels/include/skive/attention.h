// Scaled dot-product attention, softmax(q k^T scale + mask) v, over [B, heads, N, D] given by
// strides (A. Vaswani et al., Attention Is All You Need, 2017).
//
// Per head the keys (transposed) and the values are packed once; then blocks of query rows pass:
// their scores stay in L1 or L2, the division by the row sum is part of the second product's
// epilogue.
#ifndef SKIVE_ATTENTION_H
#define SKIVE_ATTENTION_H

#include "skive/functions.h"
#include "skive/matmul.h"

namespace skive {
inline namespace SKIVE_ISA {

// Floats between neighbouring batches, heads and positions; neighbouring features are adjacent.
template <ptrdiff_t Batch_, ptrdiff_t Head_, int Row_>
struct HeadStrides {
  static constexpr ptrdiff_t Batch = Batch_, Head = Head_;
  static constexpr int Row = Row_;
};
// Strides of an additive mask [B, heads, Nq, Nk]; Key is 0 or 1.
template <ptrdiff_t Batch_, ptrdiff_t Head_, ptrdiff_t Query_, ptrdiff_t Key_>
struct MaskStrides {
  static constexpr bool present = true;
  static constexpr ptrdiff_t Batch = Batch_, Head = Head_, Query = Query_, Key = Key_;
};
struct NoMask {
  static constexpr bool present = false;
  static constexpr ptrdiff_t Batch = 0, Head = 0, Query = 0, Key = 0;
};

// The lane numbers of a vector as floats.
template <int N>
SKIVE_INLINE Vec<N> lane_numbers() {
  static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<N>(numbers);
}

// The scores `s` of the keys from `key` on, of query `row` of a block that starts at query `at.first`
// and whose mask starts at `at.mask`: with the mask added and, if Causal, -inf for later keys.
template <class Mask, bool Causal, class S, class Block>
SKIVE_INLINE S masked(S s, const Block& at, ptrdiff_t row, int key) {
  constexpr int n = S::lanes;
  if constexpr (Mask::present) {
    const float* m = at.mask + row * Mask::Query;
    if constexpr (Mask::Key == 1)
      s = s + load<n>(m + key);
    else
      s = s + splat<n>(*m);
  }
  if constexpr (Causal) {
    const auto number = lane_numbers<n>() + splat<n>(static_cast<float>(key));
    s = select(less(splat<n>(static_cast<float>(at.first + row)), number), splat<n>(-__builtin_inff()), s);
  }
  return s;
}

// Causal: query i sees keys 0 to i.
template <int B, int Heads, int Nq, int Nk, int D, int Dv, class Q, class K, class V, class Y,
          class Mask, bool Causal>
struct attention {
  static_assert(!Mask::present || Mask::Key == 0 || Mask::Key == 1,
                "a mask is contiguous along the keys");
  static constexpr int kScoreBlock = panel_block(Nk), kValueBlock = panel_block(Dv);
  // Query rows whose scores take at most 128 KiB.
  static constexpr int rows() {
    int r = 128 * 1024 / 4 / Nk / 8 * 8;
    r = r < 8 ? 8 : r > 64 ? 64 : r;
    return r < Nq ? r : Nq;
  }
  static constexpr int kRows = rows();
  static constexpr int kBlocks = div_up(Nq, kRows);
  static constexpr int kLastRows = Nq - (kBlocks - 1) * kRows;
  using PackKeys = pack_panel<D, Nk, kScoreBlock, 1, K::Row>;
  using PackValues = pack_panel<Nk, Dv, kValueBlock, V::Row, 1>;
  static constexpr int kScoreRow = Nk % 1024 == 0 ? Nk + 16 : Nk;  // not whole pages, see conv.h
  static constexpr ptrdiff_t kScoreFloats = round_up(kRows * kScoreRow, 16);
  static constexpr ptrdiff_t kCopyFloats = product_copy(kRows, D, Q::Row);
  static constexpr ptrdiff_t kZeroFloats = round_up((Nk > Dv ? Nk : Dv) + 3 * kLanes, 16);
  static constexpr ptrdiff_t kSlice =
      PackKeys::floats + PackValues::floats + kScoreFloats + kZeroFloats + round_up(kRows, 16) +
      kCopyFloats;
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kSlice) * sizeof(float) * static_cast<size_t>(parts);
  }

  // mask may be null if there is NoMask.
  static void run(const float* q, const float* k, const float* v, const float* mask, float* y,
                  void* scratch, Part part, float scale) {
    float* const keys = static_cast<float*>(scratch) + part.index * kSlice;
    float* const values = keys + PackKeys::floats;
    float* const scores = values + PackValues::floats;
    float* const zeros = scores + kScoreFloats;
    float* const inverse = zeros + kZeroFloats;
    float* const copy = inverse + round_up(kRows, 16);
    clear_floats(zeros, kZeroFloats);
    constexpr ptrdiff_t count = ptrdiff_t{B} * Heads * kBlocks;
    ptrdiff_t packed = -1;
    for (ptrdiff_t item = part_begin(count, part), end = part_end(count, part); item < end;
         ++item) {
      const ptrdiff_t head = item / kBlocks, b = head / Heads, h = head % Heads;
      if (packed != head) {
        PackKeys::run(k + b * K::Batch + h * K::Head, keys);
        PackValues::run(v + b * V::Batch + h * V::Head, values);
        packed = head;
      }
      const int first = static_cast<int>(item % kBlocks) * kRows;
      const Block at{
          q + b * Q::Batch + h * Q::Head + first * static_cast<ptrdiff_t>(Q::Row),
          Mask::present ? mask + b * Mask::Batch + h * Mask::Head + first * Mask::Query : nullptr,
          y + b * Y::Batch + h * Y::Head + first * static_cast<ptrdiff_t>(Y::Row), first};
      if (first + kRows <= Nq)
        block<kRows>(at, keys, values, scores, zeros, inverse, copy, scale);
      else
        block<kLastRows>(at, keys, values, scores, zeros, inverse, copy, scale);
    }
  }

 private:
  struct Block {
    const float* q;
    const float* mask;
    float* y;
    int first;  // query row
  };
  template <int Rows>
  static SKIVE_INLINE void block(const Block& at, const float* keys, const float* values,
                                 float* scores, const float* zeros, float* inverse, float* copy, float scale) {
    using Scores = packed_product<Rows, D, Nk, kScoreBlock, Q::Row, kScoreRow>;
    using Results = packed_product<Rows, Nk, Dv, kValueBlock, kScoreRow, Y::Row>;
    static_assert(Scores::scratch_bytes() <= kCopyFloats * sizeof(float) && Results::scratch_bytes() == 0,
                  "room for the copied rows");
    Scores::run(
        at.q, keys, zeros, scores, copy, Part{},
        [=](auto acc, ptrdiff_t row, int key) __attribute__((always_inline)) {
          return masked<Mask, Causal>(acc * splat<decltype(acc)::lanes>(scale), at, row, key);
        });
    for (int r = 0; r < Rows; ++r)
      inverse[r] = 1.0f / exp_row(scores + static_cast<ptrdiff_t>(r) * kScoreRow);
    Results::run(
        scores, values, zeros, at.y, nullptr, Part{},
        [=](auto acc, ptrdiff_t row, int) __attribute__((always_inline)) {
          return acc * splat<decltype(acc)::lanes>(inverse[row]);
        });
  }
  // Replaces a row of scores by exp(score - max); returns their sum.
  static SKIVE_NOINLINE float exp_row(float* s) {
    const float top =
        max_row<Nk>([&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(s + i); });
    return sum_row<Nk>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      const Vec<n> e = exp_(load<n>(s + i) - splat<n>(top));
      store(s + i, e);
      return e;
    });
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ATTENTION_H
