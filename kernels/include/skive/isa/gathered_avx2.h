// AVX2 policy of gathered bytes, see gathered.h.
#ifndef SKIVE_ISA_GATHERED_AVX2_H
#define SKIVE_ISA_GATHERED_AVX2_H

#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// Bytes become 16-bit numbers on the way; weights stay bytes in memory.
struct GatheredTile : I16Tile {
  using Weight = int8_t;
  template <int L>
  static SKIVE_INLINE Weights<L> load_weights(const int8_t* p) {
    if constexpr (L == 8) return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    else return {_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }

  template <int N, class = void> struct Bytes { using type = __m256i; };
  template <class T> struct Bytes<16, T> { using type = __m128i; };
  template <int N>
  struct Order {
    typename Bytes<N>::type v;
  };
  template <int N>
  static SKIVE_INLINE Order<N> load_order(const void* p) {
    if constexpr (N == 32) return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
    else return {_mm_loadu_si128(static_cast<const __m128i*>(p))};
  }
  template <int Keep, int N>
  static SKIVE_INLINE void gather(void* to, const uint8_t* x, Order<N> order) {
    const auto bytes = load_order<N>(x).v;
    if constexpr (N == 32) _mm256_store_si256(static_cast<__m256i*>(to), _mm256_shuffle_epi8(bytes, order.v));
    else _mm_store_si128(static_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, order.v));
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_GATHERED_AVX2_H
