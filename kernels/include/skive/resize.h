// Resampling of NHWC float32 images with tables computed when the model is compiled.
//
// Output row oh is the weighted sum of the input rows rows[oh * TH + i], i < TH; columns likewise
// with TW. One tap is nearest neighbour, two are linear, four are cubic; a table can express every
// coordinate convention and antialiasing, and indices at the border repeat or carry weight 0.
#ifndef SKIVE_RESIZE_H
#define SKIVE_RESIZE_H

#include "skive/shape.h"
#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

// One axis of OutputLength * Taps source indices and their weights. `weights` may be null for one
// tap: the value is then copied as it is.
struct ResizeAxis {
  const int32_t* sources;
  const float* weights;
};

// OH, OW: output extent. TH, TW: taps per axis. XS, YS: floats between neighbouring pixels.
template <class In, int OH, int OW, int TH, int TW, int XS = In::C, int YS = In::C>
struct resize2d {
  static_assert(OH > 0 && OW > 0 && TH > 0 && TW > 0, "a resampled image has pixels and taps");
  static constexpr int C = In::C;
  static constexpr size_t scratch_bytes(int = 1) { return 0; }

  // x [N, H, W, C] -> y [N, OH, OW, C]; epilogue(value, pixel, channel) finishes each vector.
  template <class E>
  static void run(const float* x, ResizeAxis rows, ResizeAxis columns, float* y, void*, Part part,
                  const E& epilogue) {
    constexpr ptrdiff_t items = ptrdiff_t{In::N} * OH;
    const ptrdiff_t end = part_end(items, part);
    for (ptrdiff_t i = part_begin(items, part); i < end; ++i) {
      const int oh = static_cast<int>(i % OH);
      const float* const image = x + i / OH * In::H * In::W * XS;
      for (int ow = 0; ow < OW; ++ow) {
        const float* taps[TH * TW];
        float weights[TH * TW];
        for (int r = 0; r < TH; ++r)
          for (int c = 0; c < TW; ++c) {
            const int ih = rows.sources[oh * TH + r], iw = columns.sources[ow * TW + c];
            taps[r * TW + c] = image + (ptrdiff_t{ih} * In::W + iw) * XS;
            if constexpr (kWeighted)
              weights[r * TW + c] = weight(rows, oh * TH + r) * weight(columns, ow * TW + c);
          }
        pixel(taps, weights, y, i * OW + ow, epilogue);
      }
    }
  }

 private:
  static constexpr bool kWeighted = TH > 1 || TW > 1;

  static SKIVE_INLINE float weight(const ResizeAxis& axis, int i) {
    return axis.weights == nullptr ? 1.0f : axis.weights[i];
  }

  template <class E>
  static SKIVE_INLINE void pixel(const float* const (&taps)[TH * TW], const float (&weights)[TH * TW],
                                 float* y, ptrdiff_t at, const E& epilogue) {
    int c = 0;
    for (; c + kLanes <= C; c += kLanes) vector<kLanes>(taps, weights, y, at, c, epilogue);
    if constexpr (C % kLanes != 0) vector<C % kLanes>(taps, weights, y, at, c, epilogue);
  }

  template <int N, class E>
  static SKIVE_INLINE void vector(const float* const (&taps)[TH * TW],
                                  const float (&weights)[TH * TW], float* y, ptrdiff_t at, int c,
                                  const E& epilogue) {
    Vec<N> value = load<N>(taps[0] + c);
    if constexpr (kWeighted) {
      value = value * splat<N>(weights[0]);
      for (int t = 1; t < TH * TW; ++t)
        value = fma(load<N>(taps[t] + c), splat<N>(weights[t]), value);
    } else {
      static_cast<void>(weights);
    }
    store(y + at * YS + c, epilogue(value, at, c));
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_RESIZE_H
