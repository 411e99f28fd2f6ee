// Plain C++ form of the registers of the integer depthwise convolution (depthwise_integer.h).
#ifndef SKIVE_ISA_DEPTHWISE_GENERIC_H
#define SKIVE_ISA_DEPTHWISE_GENERIC_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

template <class Element>
struct WeightOf {
  using type = Element;
};
template <>
struct WeightOf<uint8_t> {
  using type = int8_t;
};

template <class Element>
struct ChannelDot {
  using Weight = typename WeightOf<Element>::type;
  static constexpr int kRows = 1;
  static constexpr int kVectors = 1;
  static constexpr int kHeld = 0;
  static constexpr int kWindow = 25;
  static constexpr int kMostProducts = 1 << 20;  // any window

  struct Group {
    IVec<> v[1];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    const Element* p = at(0);
    return {{each_int<kLanes>([&](int i) { return i < N ? p[i] : 0; })}};
  }
  static SKIVE_INLINE Group fill(int zero) { return {{splat<kLanes>(zero)}}; }
  static SKIVE_INLINE IVec<> weights(const Weight* p) { return load<kLanes>(p); }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, IVec<> x, IVec<> w) { return acc + x * w; }
};

template <int N>
SKIVE_INLINE IVec<N> first_lanes(IVec<> a) {
  return each_int<N>([&](int i) { return a.v[i]; });
}

template <class T, class A, class B>
SKIVE_INLINE void store_two(T* p, A a, B b) {
  store(p, a);
  store(p + kLanes, b);
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_DEPTHWISE_GENERIC_H
