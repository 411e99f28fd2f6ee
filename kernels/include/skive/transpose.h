// General permutation of dimensions. Where the last dimension moves, the two last dimensions (of
// the input and of the result) are walked in square tiles, so that both sides use whole cache
// lines; elements of one or two bytes change places in registers.
#ifndef SKIVE_TRANSPOSE_H
#define SKIVE_TRANSPOSE_H

#include "skive/shape.h"
#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

// out[i_0, i_1, ...] has dimensions S::dim(P[0]), S::dim(P[1]), ...; `S` is the input's shape.
template <class T, class S, class P>
struct transpose {
  static constexpr int rank = S::rank;
  static constexpr int last = rank - 1;

  static constexpr ptrdiff_t out_dim(int i) { return S::dim(P::at(i)); }
  static constexpr ptrdiff_t out_stride(int i) {
    ptrdiff_t s = 1;
    for (int k = i + 1; k < rank; ++k) s *= out_dim(k);
    return s;
  }
  // Result dimension that walks the input's last dimension.
  static constexpr int lane() {
    for (int i = 0; i < rank; ++i)
      if (P::at(i) == last) return i;
    return 0;
  }

  static void run(T* out, const T* in, Part part) {
    if constexpr (S::size > 0) {
      if constexpr (rank < 2) {
        if (part.index == 0) __builtin_memcpy(out, in, S::size * sizeof(T));
      } else if constexpr (lane() == last) {
        rows(out, in, part);
      } else {
        tiles(out, in, part);
      }
    }
  }

 private:
  // The last dimension stays: each row is one contiguous copy.
  static SKIVE_INLINE void rows(T* out, const T* in, Part part) {
    rows_at(Indices<rank>{}, out, in, part);
  }
  template <int... D>
  static SKIVE_INLINE void rows_at(Index<D...>, T* out, const T* in, Part part) {
    using Result = Shape<out_dim(D)...>;
    constexpr ptrdiff_t inner = S::dim(last), count = S::size / inner;
    for_rows<Result, Result, Strides<S::stride(P::at(D))...>>(
        part_begin(count, part), part_end(count, part), [&](const Offsets<2>& at) {
          __builtin_memcpy(out + at.at[0], in + at.at[1], inner * sizeof(T));
        });
  }

  // Matrices of A (the input's last dimension) by B (the result's last dimension), one per index of
  // the other dimensions: out[a * sa + b] = in[b * sb + a].
  static constexpr ptrdiff_t A = S::dim(last), B = out_dim(last);
  static constexpr ptrdiff_t sa = out_stride(lane()), sb = S::stride(P::at(last));
  static constexpr ptrdiff_t edge = 64 / sizeof(T) > 8 ? 64 / sizeof(T) : 8;
  static constexpr ptrdiff_t tiles_a = (A + edge - 1) / edge;

  static SKIVE_INLINE void tiles(T* out, const T* in, Part part) {
    constexpr ptrdiff_t count = S::size / A / B * tiles_a;
    for (ptrdiff_t r = part_begin(count, part), end = part_end(count, part); r < end; ++r) {
      ptrdiff_t rest = r / tiles_a, from = 0, to = 0;
      for (int d = last - 1; d >= 0; --d) {
        if (d == lane()) continue;
        const ptrdiff_t i = rest % out_dim(d);
        rest /= out_dim(d);
        from += i * S::stride(P::at(d));
        to += i * out_stride(d);
      }
      const ptrdiff_t a0 = r % tiles_a * edge, a1 = a0 + edge < A ? a0 + edge : A;
      band(out + to, in + from, a0, a1);
    }
  }
  static SKIVE_INLINE void band(T* out, const T* in, ptrdiff_t a0, ptrdiff_t a1) {
    if constexpr (sizeof(T) == 1 && B == 3 && sa == 3) {
      const uint8_t* const from = reinterpret_cast<const uint8_t*>(in);
      uint8_t* const to = reinterpret_cast<uint8_t*>(out);
      ptrdiff_t a = a0;
      for (; a + kThreePixels <= a1; a += kThreePixels) interleave3(from + a, sb, to + a * sa);
      scalar(out, in, a, a1, 0, B);
      return;
    }
    if constexpr (sizeof(T) == 1 && A == 3 && sb == 3) {
      const uint8_t* const from = reinterpret_cast<const uint8_t*>(in);
      uint8_t* const to = reinterpret_cast<uint8_t*>(out);
      constexpr ptrdiff_t whole = B / kThreePixels * kThreePixels;
      for (ptrdiff_t b = 0; b < whole; b += kThreePixels) deinterleave3(from + b * sb, to + b, sa);
      scalar(out, in, a0, a1, whole, B);
      return;
    }
    if constexpr (B == 3 && sa == 3) {
      for (; a0 + edge <= a1; a0 += edge) pixels(out + a0 * 3, in + a0, in + sb + a0, in + 2 * sb + a0);
    }
    for (ptrdiff_t b0 = 0; b0 < B; b0 += edge) {
      const ptrdiff_t b1 = b0 + edge < B ? b0 + edge : B;
      if constexpr (A == 3 && sb == 3) {
        if (b1 - b0 == edge) {
          planes(out + b0, out + sa + b0, out + 2 * sa + b0, in + b0 * 3);
          continue;
        }
      }
      if constexpr (sizeof(T) <= 2 && A >= square && B >= square) {
        ptrdiff_t a = a0;
        for (; a + square <= a1; a += square) {
          ptrdiff_t b = b0;
          for (; b + square <= b1; b += square)
            transpose_square<T>(in + b * sb + a, sb, out + a * sa + b, sa);
          scalar(out, in, a, a + square, b, b1);
        }
        scalar(out, in, a, a1, b0, b1);
      } else {
        scalar(out, in, a0, a1, b0, b1);
      }
    }
  }
  // `edge` pixels of three from their planes: a loop whose length is known, which compilers turn into
  // permutations of registers.
  static SKIVE_INLINE void pixels(T* __restrict out, const T* __restrict x, const T* __restrict y,
                                  const T* __restrict z) {
    for (ptrdiff_t i = 0; i < edge; ++i) {
      out[3 * i] = x[i];
      out[3 * i + 1] = y[i];
      out[3 * i + 2] = z[i];
    }
  }
  // And back.
  static SKIVE_INLINE void planes(T* __restrict x, T* __restrict y, T* __restrict z, const T* __restrict in) {
    for (ptrdiff_t i = 0; i < edge; ++i) {
      x[i] = in[3 * i];
      y[i] = in[3 * i + 1];
      z[i] = in[3 * i + 2];
    }
  }
  static SKIVE_INLINE void scalar(T* out, const T* in, ptrdiff_t a0, ptrdiff_t a1, ptrdiff_t b0,
                                  ptrdiff_t b1) {
    for (ptrdiff_t a = a0; a < a1; ++a)
      for (ptrdiff_t b = b0; b < b1; ++b) out[a * sa + b] = in[b * sb + a];
  }
  static constexpr ptrdiff_t square = 16 / static_cast<ptrdiff_t>(sizeof(T));
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TRANSPOSE_H
