// AVX-512 exponentials of a row of scores, see exponentials.h.
#ifndef SKIVE_ISA_EXPONENTIALS_AVX512_H
#define SKIVE_ISA_EXPONENTIALS_AVX512_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

template <int N>
SKIVE_INLINE int32_t byte_exponentials(const float* s, uint8_t* p, float top, float factor) {
  const __m512 largest = _mm512_set1_ps(top), times = _mm512_set1_ps(factor);
  const __m512i c3 = _mm512_set1_epi16(kExponential[3]), c2 = _mm512_set1_epi16(kExponential[2]),
                c1 = _mm512_set1_epi16(kExponential[1]), c0 = _mm512_set1_epi16(kExponential[0]),
                half = _mm512_set1_epi16(1024);
  // 2^(9 + n) by the five bits of n, -16 to 0.
  const __m512i powers = _mm512_set_epi16(256, 128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0,
                                          0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 512);
  // Packing takes four lanes of 16 bytes one after the other; here they come back in order.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const auto steps = [&](int i) __attribute__((always_inline)) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + i), largest), times));
  };
  const auto exponentials = [&](__m512i t) __attribute__((always_inline)) {
    const __m512i h = _mm512_slli_epi16(t, 5), n = _mm512_srli_epi16(_mm512_add_epi16(t, half), 11);
    __m512i r = _mm512_add_epi16(_mm512_mulhrs_epi16(h, c3), c2);
    r = _mm512_add_epi16(_mm512_mulhrs_epi16(r, h), c1);
    r = _mm512_add_epi16(_mm512_mulhrs_epi16(r, h), c0);
    return _mm512_mulhrs_epi16(r, _mm512_permutexvar_epi16(n, powers));
  };
  __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < N; i += 64) {
    const __m512i low = exponentials(_mm512_packs_epi32(steps(i), steps(i + 16))),
                  high = exponentials(_mm512_packs_epi32(steps(i + 32), steps(i + 48)));
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
    _mm512_storeu_si512(p + i, bytes);
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(bytes, _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sums));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_EXPONENTIALS_AVX512_H
