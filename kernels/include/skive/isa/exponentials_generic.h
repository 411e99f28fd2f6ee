// Plain C++ exponentials of a row of scores, see exponentials.h.
#ifndef SKIVE_ISA_EXPONENTIALS_GENERIC_H
#define SKIVE_ISA_EXPONENTIALS_GENERIC_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

template <int N>
inline int32_t byte_exponentials(const float* s, uint8_t* p, float top, float factor) {
  const auto rounded_product = [](int a, int b) { return (a * b + (1 << 14)) >> 15; };
  int32_t sum = 0;
  for (int i = 0; i < N; i += kLanes) {
    const Vec<kLanes> x = (load<kLanes>(s + i) - splat<kLanes>(top)) * splat<kLanes>(factor);
    int32_t steps[kLanes];
    store(steps, round_to_int(vmax(x, splat<kLanes>(-32768.0f))));
    for (int j = 0; j < kLanes && i + j < N; ++j) {
      const int n = (steps[j] + 1024) >> 11, h = 32 * (steps[j] - 2048 * n);
      int r = rounded_product(h, kExponential[3]) + kExponential[2];
      r = rounded_product(r, h) + kExponential[1];
      r = rounded_product(r, h) + kExponential[0];
      const int e = n < -9 ? 0 : rounded_product(r, 512 >> -n);
      p[i + j] = static_cast<uint8_t>(e);
      sum += e;
    }
  }
  for (int i = N; i < round_up(N, 4); ++i) p[i] = 0;
  return sum;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_EXPONENTIALS_GENERIC_H
