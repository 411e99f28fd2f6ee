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
  static constexpr int kRows = 2;
  static constexpr int kVectors = sizeof(Element) == 1 ? 2 : 1;
  static constexpr int kHeld = 0;
  static constexpr int kWindow = 12;
  static constexpr int kMostProducts = 6;  // with those of a 3x3 window of stride 1, g++ spills most sums

  struct Group {
    __m256i v[kVectors];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    constexpr int bytes = N * static_cast<int>(sizeof(Element));
    const __m128i a = load_bytes<bytes>(at(0));
    const __m128i b = load_bytes<bytes>(at(Rows - 1));
    if constexpr (sizeof(Element) == 1)
      return {{_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b))}};
    else
      return {{_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b))}};
  }
  static SKIVE_INLINE Group fill(int zero) {
    const __m256i v = _mm256_set1_epi16(static_cast<int16_t>(zero));
    if constexpr (kVectors == 2) return {{v, v}};
    else return {{v}};
  }
  static SKIVE_INLINE void put(Weight* p, __m256i pairs) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), pairs);
  }
  static SKIVE_INLINE __m256i weights(const Weight* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m256i x, __m256i w) {
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(x, w))};
  }
  // The addition is the instruction itself: g++ would add the products of several steps first, all
  // of which it then holds.
  static SKIVE_INLINE IVec<> dot_in_order(IVec<> acc, __m256i x, __m256i w) {
    const __m256i products = _mm256_madd_epi16(x, w);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc.v) : "x"(products));
    return acc;
  }
};

template <int N>
SKIVE_INLINE IVec<N> first_lanes(IVec<> a) { return {a.v}; }

template <class T, class A, class B>
SKIVE_INLINE void store_two(T* p, A a, B b) {
  store(p, a);
  store(p + kLanes, b);
}

// Of 8 bits: the packing instructions saturate within halves of a register, which a last step joins.
template <class T, int N, if_byte<T> = 0>
SKIVE_INLINE void store_two(T* p, Rounded<T, kLanes> a, Rounded<T, N> b) {
  const __m256i words = narrow_two(a, Rounded<T, kLanes>{b.v, b.zero});
  const __m256i v = kSigned<T> ? _mm256_packs_epi16(words, words) : _mm256_packus_epi16(words, words);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  T out[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(N == kLanes ? p : out), bytes);
  if constexpr (N < kLanes) __builtin_memcpy(p, out, kLanes + N);
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_DEPTHWISE_AVX2_H
