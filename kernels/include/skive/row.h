// Loops over one contiguous row of floats whose length is known at compile time.
#ifndef SKIVE_ROW_H
#define SKIVE_ROW_H

#include "skive/math.h"
#include "skive/shape.h"

namespace skive {
inline namespace SKIVE_ISA {

SKIVE_INLINE void clear_floats(float* to, ptrdiff_t n) {
  __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(float));
}

template <int N>
struct Lanes {
  static constexpr int count = N;
};

// Calls f(i, Lanes<n>) for the vectors of a row of N floats: n = kLanes, at the end the remainder.
template <ptrdiff_t N, class F>
SKIVE_INLINE void each_vector(const F& f) {
  constexpr int tail = static_cast<int>(N % kLanes);
  for (ptrdiff_t i = 0; i < N - tail; i += kLanes) f(i, Lanes<kLanes>{});
  if constexpr (tail != 0) f(N - tail, Lanes<tail>{});
}

// Folds the vectors value(i, Lanes<n>) of a row with combine(a, b) and the lanes with
// across(Vec): four chains of vectors, then in a fixed tree, so the order depends on N alone.
template <ptrdiff_t N, class Value, class Combine, class Across>
SKIVE_INLINE float fold_row(const Value& value, const Combine& combine, const Across& across) {
  constexpr int tail = static_cast<int>(N % kLanes);
  constexpr ptrdiff_t whole = N - tail, block = 4 * kLanes;
  using Full = Lanes<kLanes>;
  if constexpr (whole == 0) {
    return across(value(ptrdiff_t{0}, Lanes<tail>{}));
  } else {
    Vec<kLanes> a = value(ptrdiff_t{0}, Full{});
    if constexpr (whole >= 2 * block) {
      Vec<kLanes> b = value(ptrdiff_t{kLanes}, Full{}), c = value(ptrdiff_t{2 * kLanes}, Full{}),
                  d = value(ptrdiff_t{3 * kLanes}, Full{});
      ptrdiff_t i = block;
      for (; i + block <= whole; i += block) {
        a = combine(a, value(i, Full{}));
        b = combine(b, value(i + kLanes, Full{}));
        c = combine(c, value(i + 2 * kLanes, Full{}));
        d = combine(d, value(i + 3 * kLanes, Full{}));
      }
      for (; i < whole; i += kLanes) a = combine(a, value(i, Full{}));
      a = combine(combine(a, b), combine(c, d));
    } else {
      for (ptrdiff_t i = kLanes; i < whole; i += kLanes) a = combine(a, value(i, Full{}));
    }
    const float r = across(a);
    if constexpr (tail == 0) {
      return r;
    } else {
      const float t = across(value(whole, Lanes<tail>{}));
      return across(combine(splat<1>(r), splat<1>(t)));
    }
  }
}
template <ptrdiff_t N, class Value>
SKIVE_INLINE float sum_row(const Value& value) {
  return fold_row<N>(value, [](auto a, auto b) { return a + b; }, [](auto a) { return hsum(a); });
}
// Not a NaN-propagating maximum: where a NaN matters, the caller meets it again in its next pass.
template <ptrdiff_t N, class Value>
SKIVE_INLINE float max_row(const Value& value) {
  return fold_row<N>(
      value, [](auto a, auto b) { return vmax(a, b); }, [](auto a) { return hmax(a); });
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ROW_H
