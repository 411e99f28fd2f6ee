// AVX2 registers of the integer depthwise convolution (depthwise_integer.h).
#ifndef SKIVE_ISA_DEPTHWISE_AVX2_H
#define SKIVE_ISA_DEPTHWISE_AVX2_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

// Pairs of words of two rows, of sixteen channels of bytes or eight of words. Bytes are widened:
// vpmaddubsw would saturate.
template <class Element>
struct ChannelDot {
  using Weight = int16_t;
  static constexpr bool kStaged = true;
  static constexpr int kRows = 2;
  static constexpr int kVectors = sizeof(Element) == 1 ? 2 : 1;

  struct Group {
    __m256i v[kVectors];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    static_assert(Rows == 2, "pairs");
    constexpr int bytes = N * static_cast<int>(sizeof(Element));
    const __m128i a = load_bytes<bytes>(at(0));
    const __m128i b = load_bytes<bytes>(at(1));
    if constexpr (sizeof(Element) == 1)
      return {{_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b))}};
    else
      return {{_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b))}};
  }
  static SKIVE_INLINE void put(Weight* p, __m256i pairs) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), pairs);
  }
  static SKIVE_INLINE __m256i weights(const Weight* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // The addition is the instruction itself: g++ would add the products of several steps first, all
  // of which it then holds.
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m256i x, __m256i w) {
    const __m256i products = _mm256_madd_epi16(x, w);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc.v) : "x"(products));
    return acc;
  }
};

template <int N>
SKIVE_INLINE IVec<N> first_lanes(IVec<> a) { return {a.v}; }

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_DEPTHWISE_AVX2_H
