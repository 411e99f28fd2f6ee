// Convolution and pooling in plain C++ for any element type and for weights that are not known when
// the model is compiled. No packing, no tiles: the meaning of the operation, and its oracle.
#ifndef SKIVE_PLAIN_H
#define SKIVE_PLAIN_H

#include "skive/math.h"
#include "skive/shape.h"

namespace skive {
inline namespace SKIVE_ISA {

// Calls f(kh, kw, ih, iw) for each tap of the window at (oh, ow) that lies inside the image.
template <class In, class Window, class Strides, class Padding, class Dilations, class F>
SKIVE_INLINE void for_taps(int oh, int ow, const F& f) {
  for (int kh = 0; kh < Window::KH; ++kh) {
    const int ih = oh * Strides::H - Padding::Top + kh * Dilations::H;
    if (ih < 0 || ih >= In::H) continue;
    for (int kw = 0; kw < Window::KW; ++kw) {
      const int iw = ow * Strides::W - Padding::Left + kw * Dilations::W;
      if (iw >= 0 && iw < In::W) f(kh, kw, ih, iw);
    }
  }
}

// x [N, H, W, C], w [OC, KH, KW, C / Groups], bias [OC] or null, y [N, OH, OW, OC]. Integer
// arithmetic wraps; floats are summed in the order kh, kw, c.
template <class T, class In, class Filter, class Strides, class Padding, class Dilations, int Groups>
struct plain_conv2d {
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, Filter::KH, Strides::H, Dilations::H);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, Filter::KW, Strides::W, Dilations::W);
  static constexpr int IC = In::C / Groups, OCG = Filter::OC / Groups;

  static void run(const T* x, const T* w, const T* bias, T* y, Part part) {
    constexpr ptrdiff_t pixels = ptrdiff_t{In::N} * OH * OW;
    for (ptrdiff_t p = part_begin(pixels, part), end = part_end(pixels, part); p < end; ++p) {
      const int ow = static_cast<int>(p % OW), oh = static_cast<int>(p / OW % OH);
      const T* image = x + p / OW / OH * In::H * In::W * In::C;
      for (int oc = 0; oc < Filter::OC; ++oc) {
        T acc = 0;
        for_taps<In, Filter, Strides, Padding, Dilations>(oh, ow, [&](int kh, int kw, int ih, int iw) {
          const T* px = image + (ptrdiff_t{ih} * In::W + iw) * In::C + oc / OCG * IC;
          const T* pw = w + ((ptrdiff_t{oc} * Filter::KH + kh) * Filter::KW + kw) * IC;
          for (int c = 0; c < IC; ++c) acc = add(acc, mul(px[c], pw[c]));
        });
        y[p * Filter::OC + oc] = bias ? add(acc, bias[oc]) : acc;
      }
    }
  }
};

// The transpose of plain_conv2d: w [OC, KH, KW, C / Groups]; Out is the result's image.
template <class T, class In, class Filter, class Strides, class Padding, class Dilations, int Groups, class Out>
struct plain_conv_transpose2d {
  static constexpr int IC = In::C / Groups, OCG = Filter::OC / Groups;

  static void run(const T* x, const T* w, const T* bias, T* y, Part part) {
    constexpr ptrdiff_t pixels = ptrdiff_t{Out::N} * Out::H * Out::W;
    for (ptrdiff_t p = part_begin(pixels, part), end = part_end(pixels, part); p < end; ++p) {
      const int ow = static_cast<int>(p % Out::W), oh = static_cast<int>(p / Out::W % Out::H);
      const T* image = x + p / Out::W / Out::H * In::H * In::W * In::C;
      for (int oc = 0; oc < Filter::OC; ++oc) {
        T acc = bias ? bias[oc] : T{0};
        for (int kh = 0; kh < Filter::KH; ++kh) {
          const int h = oh + Padding::Top - kh * Dilations::H;
          if (h < 0 || h % Strides::H || h / Strides::H >= In::H) continue;
          for (int kw = 0; kw < Filter::KW; ++kw) {
            const int v = ow + Padding::Left - kw * Dilations::W;
            if (v < 0 || v % Strides::W || v / Strides::W >= In::W) continue;
            const T* px = image + (ptrdiff_t{h / Strides::H} * In::W + v / Strides::W) * In::C + oc / OCG * IC;
            const T* pw = w + ((ptrdiff_t{oc} * Filter::KH + kh) * Filter::KW + kw) * IC;
            for (int c = 0; c < IC; ++c) acc = add(acc, mul(px[c], pw[c]));
          }
        }
        y[p * Filter::OC + oc] = acc;
      }
    }
  }
};

// Largest element of each window; the lowest value of T (minus infinity) outside the image.
template <class T, class In, class Window, class Strides, class Padding, class Dilations>
struct plain_max_pool2d {
  static constexpr int OH = window_count(In::H, Padding::Top, Padding::Bottom, Window::KH, Strides::H, Dilations::H);
  static constexpr int OW = window_count(In::W, Padding::Left, Padding::Right, Window::KW, Strides::W, Dilations::W);

  static void run(const T* x, T* y, Part part) {
    constexpr ptrdiff_t pixels = ptrdiff_t{In::N} * OH * OW;
    for (ptrdiff_t p = part_begin(pixels, part), end = part_end(pixels, part); p < end; ++p) {
      const int ow = static_cast<int>(p % OW), oh = static_cast<int>(p / OW % OH);
      const T* image = x + p / OW / OH * In::H * In::W * In::C;
      for (int c = 0; c < In::C; ++c) {
        bool first = true;
        T best = 0;
        for_taps<In, Window, Strides, Padding, Dilations>(oh, ow, [&](int, int, int ih, int iw) {
          const T v = image[(ptrdiff_t{ih} * In::W + iw) * In::C + c];
          best = first || v > best || v != v ? v : best;
          first = false;
        });
        y[p * In::C + c] = best;
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_PLAIN_H
