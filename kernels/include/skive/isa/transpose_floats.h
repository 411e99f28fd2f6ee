// Squares of floats that change rows and columns in registers.
#ifndef SKIVE_ISA_TRANSPOSE_FLOATS_H
#define SKIVE_ISA_TRANSPOSE_FLOATS_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kFloatSquare = 8;

// to[c * to_stride + r] = from[r * from_stride + c] for all r, c below kFloatSquare.
SKIVE_INLINE void transpose_floats(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
#if defined(SKIVE_TARGET_AVX512) || defined(SKIVE_TARGET_AVX2)
  // Rows r and r + 4 side by side: what then moves stays within the halves of a register.
  __m256 a[8], b[8];
  for (int r = 0; r < 4; ++r) {
    for (int half = 0; half < 2; ++half) {
      const float* const p = from + r * from_stride + half * 4;
      a[half * 4 + r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                             _mm_loadu_ps(p + 4 * from_stride), 1);
    }
  }
  for (int half = 0; half < 8; half += 4) {
    b[half] = _mm256_unpacklo_ps(a[half], a[half + 1]);
    b[half + 1] = _mm256_unpackhi_ps(a[half], a[half + 1]);
    b[half + 2] = _mm256_unpacklo_ps(a[half + 2], a[half + 3]);
    b[half + 3] = _mm256_unpackhi_ps(a[half + 2], a[half + 3]);
    _mm256_storeu_ps(to + half * to_stride, _mm256_shuffle_ps(b[half], b[half + 2], 0x44));
    _mm256_storeu_ps(to + (half + 1) * to_stride, _mm256_shuffle_ps(b[half], b[half + 2], 0xee));
    _mm256_storeu_ps(to + (half + 2) * to_stride, _mm256_shuffle_ps(b[half + 1], b[half + 3], 0x44));
    _mm256_storeu_ps(to + (half + 3) * to_stride, _mm256_shuffle_ps(b[half + 1], b[half + 3], 0xee));
  }
#else
  for (int r = 0; r < kFloatSquare; ++r)
    for (int c = 0; c < kFloatSquare; ++c) to[c * to_stride + r] = from[r * from_stride + c];
#endif
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_TRANSPOSE_FLOATS_H
