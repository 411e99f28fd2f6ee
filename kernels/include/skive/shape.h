// Compile-time shape tags. Tensors are dense NHWC unless a pixel stride says otherwise.
#ifndef SKIVE_SHAPE_H
#define SKIVE_SHAPE_H

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

// Input image: batch, height, width, channels.
template <int N_, int H_, int W_, int C_>
struct Image {
  static constexpr int N = N_, H = H_, W = W_, C = C_;
};

// Filter: output channels, height, width (its input channels follow from the image and the groups).
template <int OC_, int KH_, int KW_>
struct Kernel {
  static constexpr int OC = OC_, KH = KH_, KW = KW_;
};

template <int H_, int W_>
struct Stride {
  static constexpr int H = H_, W = W_;
};

// Rows and columns of zeros around the image.
template <int Top_, int Left_, int Bottom_, int Right_>
struct Pad {
  static constexpr int Top = Top_, Left = Left_, Bottom = Bottom_, Right = Right_;
};

template <int H_, int W_>
struct Dilation {
  static constexpr int H = H_, W = W_;
};

// Extents of a dense row-major tensor of any rank; rank 0 holds one element.
template <ptrdiff_t... D>
struct Shape {
  static constexpr int rank = sizeof...(D);
  static constexpr ptrdiff_t size = (ptrdiff_t{1} * ... * D);
  static constexpr ptrdiff_t dim(int i) {
    const ptrdiff_t d[] = {D..., 1};
    return d[i];
  }
  // Elements between neighbours along dimension i.
  static constexpr ptrdiff_t stride(int i) {
    ptrdiff_t s = 1;
    for (int k = i + 1; k < rank; ++k) s *= dim(k);
    return s;
  }
};

// Elements between neighbours along each dimension: 0 broadcasts, negative walks backwards.
template <ptrdiff_t... S>
struct Strides {
  static constexpr int rank = sizeof...(S);
  static constexpr ptrdiff_t stride(int i) {
    const ptrdiff_t s[] = {S..., 1};
    return s[i];
  }
};

// Result dimension i is input dimension P[i].
template <int... P>
struct Perm {
  static constexpr int rank = sizeof...(P);
  static constexpr int at(int i) {
    const int p[] = {P..., 0};
    return p[i];
  }
};

// Calls f(index) for each row (all dimensions but the last) of `S` whose flat number lies in
// [begin, end), with `index` the offset of the row in each of the `Layouts`: an Offsets.
template <int Count>
struct Offsets {
  ptrdiff_t at[Count];
};
template <class S, int D, class F, class... Layouts>
SKIVE_INLINE void for_rows_from(ptrdiff_t begin, ptrdiff_t end, const Offsets<sizeof...(Layouts)>& base,
                                const F& f) {
  if constexpr (D + 1 >= S::rank) {
    static_cast<void>(begin), static_cast<void>(end);
    f(base);
  } else {
    // Rows below one index of dimension D.
    constexpr ptrdiff_t rows = [] {
      ptrdiff_t n = 1;
      for (int k = D + 1; k + 1 < S::rank; ++k) n *= S::dim(k);
      return n;
    }();
    if constexpr (rows > 0) {
      for (ptrdiff_t i = begin / rows; i * rows < end; ++i) {
        const ptrdiff_t first = begin - i * rows, last = end - i * rows;
        Offsets<sizeof...(Layouts)> next = base;
        int k = 0;
        ((next.at[k++] += i * Layouts::stride(D)), ...);
        for_rows_from<S, D + 1, F, Layouts...>(first > 0 ? first : 0, last < rows ? last : rows, next, f);
      }
    }
  }
}
// Rows of a shape: the product of all dimensions but the last.
template <class S>
constexpr ptrdiff_t row_count() {
  ptrdiff_t n = 1;
  for (int k = 0; k + 1 < S::rank; ++k) n *= S::dim(k);
  return n;
}
template <class S, class... Layouts, class F>
SKIVE_INLINE void for_rows(ptrdiff_t begin, ptrdiff_t end, const F& f) {
  if (begin < end) for_rows_from<S, 0, F, Layouts...>(begin, end, {}, f);
}

// Index<0, 1, ..., N - 1>, to expand packs by position.
template <int... I>
struct Index {};
template <int N, int... I>
struct indices : indices<N - 1, N - 1, I...> {};
template <int... I>
struct indices<0, I...> {
  using type = Index<I...>;
};
template <int N>
using Indices = typename indices<N>::type;

// Output extent of a sliding window along one axis, in elements.
constexpr int window_count(int in, int pad_begin, int pad_end, int kernel, int stride, int dilation) {
  return (in + pad_begin + pad_end - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SHAPE_H
