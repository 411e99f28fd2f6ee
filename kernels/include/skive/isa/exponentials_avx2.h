// AVX2 exponentials of a row of scores, see exponentials.h.
#ifndef SKIVE_ISA_EXPONENTIALS_AVX2_H
#define SKIVE_ISA_EXPONENTIALS_AVX2_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

template <int N>
SKIVE_INLINE int32_t byte_exponentials(const float* s, uint8_t* p, float top, float factor) {
  const __m256 largest = _mm256_set1_ps(top), times = _mm256_set1_ps(factor);
  const __m256i c3 = _mm256_set1_epi16(kExponential[3]), c2 = _mm256_set1_epi16(kExponential[2]),
                c1 = _mm256_set1_epi16(kExponential[1]), c0 = _mm256_set1_epi16(kExponential[0]);
  // The low and the high byte of 2^k, k = 0 to 9; a place of 128 and more gives 0.
  const __m256i low_byte = _mm256_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0,
                                            1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0),
                high_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0,
                                             0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0);
  const __m256i place = _mm256_set1_epi16(1024 + (9 << 11)), only_low = _mm256_set1_epi16(-256),
                only_high = _mm256_set1_epi16(128);
  // Packing takes two lanes of 16 bytes one after the other; here they come back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto steps = [&](int i) __attribute__((always_inline)) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(s + i), largest), times));
  };
  const auto exponentials = [&](__m256i t) __attribute__((always_inline)) {
    const __m256i h = _mm256_slli_epi16(t, 5), k = _mm256_srai_epi16(_mm256_add_epi16(t, place), 11);
    const __m256i power =
        _mm256_or_si256(_mm256_shuffle_epi8(low_byte, _mm256_or_si256(k, only_low)),
                        _mm256_shuffle_epi8(high_byte, _mm256_or_si256(_mm256_slli_epi16(k, 8), only_high)));
    __m256i r = _mm256_add_epi16(_mm256_mulhrs_epi16(h, c3), c2);
    r = _mm256_add_epi16(_mm256_mulhrs_epi16(r, h), c1);
    r = _mm256_add_epi16(_mm256_mulhrs_epi16(r, h), c0);
    return _mm256_mulhrs_epi16(r, power);
  };
  __m256i sums = _mm256_setzero_si256();
  for (int i = 0; i < N; i += 32) {
    const __m256i low = exponentials(_mm256_packs_epi32(steps(i), steps(i + 8))),
                  high = exponentials(_mm256_packs_epi32(steps(i + 16), steps(i + 24)));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), bytes);
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
  }
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_EXPONENTIALS_AVX2_H
