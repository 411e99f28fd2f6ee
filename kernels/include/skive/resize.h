// Resampling of NHWC images of float32 or of integers of 8 to 32 bits with tables computed when the
// model is compiled. Weighted sums are float32; nearest neighbours stay integers.
//
// Output row oh is the weighted sum of the input rows rows[oh * TH + i], i < TH; columns likewise
// with TW. One tap is nearest neighbour, two are linear, four are cubic; a table can express every
// coordinate convention and antialiasing, and indices at the border repeat or carry weight 0.
#ifndef SKIVE_RESIZE_H
#define SKIVE_RESIZE_H

#include "skive/window.h"

namespace skive {
inline namespace SKIVE_ISA {

// One axis of OutputLength * Taps source indices and their weights. `weights` may be null for one
// tap: the value is then copied as it is.
struct ResizeAxis {
  const int32_t* sources;
  const float* weights;
};

// OH, OW: output extent. TH, TW: taps per axis. XS, YS: elements between neighbouring pixels.
template <class In, int OH, int OW, int TH, int TW, int XS = In::C, int YS = In::C>
struct resize2d {
  static_assert(OH > 0 && OW > 0 && TH > 0 && TW > 0, "a resampled image has pixels and taps");
  static constexpr int C = In::C;
  static constexpr size_t scratch_bytes(int = 1) { return 0; }

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(value, pixel, channel) finishes each vector: a Vec,
  // or an IVec where one neighbour of an integer is copied. NoEpilogue copies pixels as they are.
  template <class X, class Y, class E>
  static void run(const X* x, ResizeAxis rows, ResizeAxis columns, Y* y, void*, Part part,
                  const E& epilogue) {
    if constexpr (TH > 1 || TW > 1) {
      images<true>(x, rows, columns, y, part, epilogue);
    } else if constexpr (same_type<X, float>) {
      if (rows.weights != nullptr || columns.weights != nullptr)
        images<true>(x, rows, columns, y, part, epilogue);
      else
        images<false>(x, rows, columns, y, part, epilogue);
    } else {
      images<false>(x, rows, columns, y, part, epilogue);
    }
  }

 private:
  template <bool Weighted, class X, class Y, class E>
  static SKIVE_INLINE void images(const X* x, ResizeAxis rows, ResizeAxis columns, Y* y, Part part,
                                  const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * OH;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      const int oh = static_cast<int>(i % OH);
      const X* const image = x + i / OH * In::H * In::W * XS;
      for (int ow = 0; ow < OW; ++ow) {
        const X* taps[TH * TW];
        float weights[TH * TW];
        for (int r = 0; r < TH; ++r)
          for (int c = 0; c < TW; ++c) {
            const int ih = rows.sources[oh * TH + r], iw = columns.sources[ow * TW + c];
            taps[r * TW + c] = image + (ptrdiff_t{ih} * In::W + iw) * XS;
            if constexpr (Weighted)
              weights[r * TW + c] = weight(rows, oh * TH + r) * weight(columns, ow * TW + c);
          }
        pixel<Weighted>(taps, weights, y, i * OW + ow, epilogue);
      }
    }
  }

  static SKIVE_INLINE float weight(const ResizeAxis& axis, int i) {
    return axis.weights == nullptr ? 1.0f : axis.weights[i];
  }

  template <bool Weighted, class X, class Y, class E>
  static SKIVE_INLINE void pixel(const X* const (&taps)[TH * TW], const float (&weights)[TH * TW],
                                 Y* y, ptrdiff_t at, const E& epilogue) {
    if constexpr (!Weighted && same_type<E, NoEpilogue>) {
      static_cast<void>(weights), static_cast<void>(epilogue);
      __builtin_memcpy(y + at * YS, taps[0], C * sizeof(X));
    } else {
      each_vector<C>([&](ptrdiff_t c, auto lanes) {
        constexpr int n = decltype(lanes)::count;
        const int channel = static_cast<int>(c);
        if constexpr (Weighted)
          store(y + at * YS + c, epilogue(weighted<n>(taps, weights, c), at, channel));
        else
          store(y + at * YS + c, epilogue(load<n>(taps[0] + c), at, channel));
      });
      if constexpr (!Weighted) static_cast<void>(weights);
    }
  }

  // Integers without fused multiply-add: the same bits whether a processor has one or not.
  template <int N, class X>
  static SKIVE_INLINE Vec<N> weighted(const X* const (&taps)[TH * TW],
                                      const float (&weights)[TH * TW], ptrdiff_t c) {
    Vec<N> value = cast<float>(load<N>(taps[0] + c)) * splat<N>(weights[0]);
    for (int t = 1; t < TH * TW; ++t) {
      const Vec<N> v = cast<float>(load<N>(taps[t] + c));
      if constexpr (same_type<X, float>)
        value = fma(v, splat<N>(weights[t]), value);
      else
        value = value + v * splat<N>(weights[t]);
    }
    return value;
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_RESIZE_H
