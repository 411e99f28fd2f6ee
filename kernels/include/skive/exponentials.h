// Exponentials of a row of scores as bytes, for a softmax on integers.
//
//   t = round_even((s - top) * factor), at least -32768      2048 steps to a factor of 2
//   t = 2048 n + f, -1024 <= f < 1024;  h = 32 f
//   r = 16320 * 2^(f / 2048), a cubic polynomial of h        16320 = 64 * 255
//   p = r * 2^n / 64, rounded, halves up: 255 at the largest score, 0 below -9.0 octaves
//
// A product of two 16-bit numbers a and b stands for (a b + 2^14) >> 15 everywhere, what one instruction does on
// 16-bit lanes, twice as many as float32 has. p is within 0.57 of 255 * 2^((s - top) factor / 2048).
//
//   byte_exponentials<N>(s, p, top, factor)   p[0..N) of s[0..N), top >= all of s; the sum of p
//
// Both rows are read and written up to the next multiple of 64: what lies behind s[N - 1] is minus infinity, what lies
// behind p[N - 1] becomes 0, at least to a multiple of 4. NaN gives 0.
#ifndef SKIVE_EXPONENTIALS_H
#define SKIVE_EXPONENTIALS_H

#include "skive/tile.h"
#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr float kExponentialSteps = 2048.0f;
constexpr int16_t kExponential[4] = {16320, 5658, 988, 111};  // of h / 2^15

}  // namespace SKIVE_ISA
}  // namespace skive

#if defined(SKIVE_TARGET_AVX512)
#include "skive/isa/exponentials_avx512.h"
#elif defined(SKIVE_TARGET_AVX2)
#include "skive/isa/exponentials_avx2.h"
#else
#include "skive/isa/exponentials_generic.h"
#endif

#endif  // SKIVE_EXPONENTIALS_H
