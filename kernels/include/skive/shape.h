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

// Output extent of a sliding window along one axis, in elements.
constexpr int window_count(int in, int pad_begin, int pad_end, int kernel, int stride, int dilation) {
  return (in + pad_begin + pad_end - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SHAPE_H
