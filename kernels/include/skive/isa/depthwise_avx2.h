// AVX2 registers of the integer depthwise convolution (depthwise_integer.h).
#ifndef SKIVE_ISA_DEPTHWISE_AVX2_H
#define SKIVE_ISA_DEPTHWISE_AVX2_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

// Pairs of words of two rows of eight channels. Bytes are widened: vpmaddubsw would saturate.
template <class Element>
struct ChannelDot {
  using Weight = int16_t;
  static constexpr int kRows = 2;
  static constexpr int kVectors = 1;
  static constexpr int kHeld = 0;
  static constexpr int kWindow = 12;

  struct Group {
    __m256i v[1];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    constexpr int bytes = N * static_cast<int>(sizeof(Element));
    const __m128i a = load_bytes<bytes>(at(0));
    const __m128i b = load_bytes<bytes>(at(Rows - 1));
    if constexpr (sizeof(Element) == 1)
      return {{_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b))}};
    else
      return {{_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b))}};
  }
  static SKIVE_INLINE Group fill(int zero) {
    return {{_mm256_set1_epi16(static_cast<int16_t>(zero))}};
  }
  static SKIVE_INLINE __m256i weights(const Weight* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m256i x, __m256i w) {
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(x, w))};
  }
};

template <int N>
SKIVE_INLINE IVec<N> first_lanes(IVec<> a) { return {a.v}; }

template <class T, class A, class B>
SKIVE_INLINE void store_two(T* p, A a, B b) {
  store(p, a);
  store(p + kLanes, b);
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_DEPTHWISE_AVX2_H
