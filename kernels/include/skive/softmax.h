// softmax and log_softmax along the middle axis of [Outer, N, Inner]; Inner = 1 is the last axis.
// Each row is read three times (maximum, exponentials, scaling), the later times from cache.
#ifndef SKIVE_SOFTMAX_H
#define SKIVE_SOFTMAX_H

#include "skive/row.h"

namespace skive {
inline namespace SKIVE_ISA {

// y = exp(x - max x) / sum of those, one contiguous row of N; x may be y.
template <ptrdiff_t N, bool Log = false>
SKIVE_INLINE void softmax_row(const float* x, float* y) {
  const float top =
      max_row<N>([&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(x + i); });
  if constexpr (Log) {
    const float sum = sum_row<N>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      return exp_(load<n>(x + i) - splat<n>(top));
    });
    const float log_sum = log_(sum);
    each_vector<N>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      store(y + i, load<n>(x + i) - splat<n>(top) - splat<n>(log_sum));
    });
  } else {
    const float sum = sum_row<N>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      const Vec<n> e = exp_(load<n>(x + i) - splat<n>(top));
      store(y + i, e);
      return e;
    });
    const float scale = 1.0f / sum;
    each_vector<N>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      store(y + i, load<n>(y + i) * splat<n>(scale));
    });
  }
}

template <ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t Inner, bool Log = false>
struct softmax {
  static void run(const float* x, float* y, Part part) {
    if constexpr (Outer * N * Inner > 0) {
      if constexpr (Inner == 1) {
        for (ptrdiff_t r = part_begin(Outer, part), end = part_end(Outer, part); r < end; ++r)
          softmax_row<N, Log>(x + r * N, y + r * N);
      } else {
        constexpr ptrdiff_t blocks = (Inner + kLanes - 1) / kLanes;
        constexpr int tail = static_cast<int>(Inner % kLanes);
        for (ptrdiff_t r = part_begin(Outer * blocks, part), end = part_end(Outer * blocks, part);
             r < end; ++r) {
          const ptrdiff_t at = r / blocks * N * Inner + r % blocks * kLanes;
          if constexpr (tail != 0) {
            if (r % blocks == blocks - 1) {
              columns<tail>(x + at, y + at);
              continue;
            }
          }
          columns<kLanes>(x + at, y + at);
        }
      }
    }
  }

 private:
  template <int L>
  static SKIVE_INLINE void columns(const float* x, float* y) {
    Vec<L> top = load<L>(x), sum = zero<L>();
    for (ptrdiff_t i = 1; i < N; ++i) top = vmax(top, load<L>(x + i * Inner));
    for (ptrdiff_t i = 0; i < N; ++i) {
      const Vec<L> shifted = load<L>(x + i * Inner) - top, e = exp_(shifted);
      sum = sum + e;
      store(y + i * Inner, Log ? shifted : e);
    }
    const Vec<L> last = Log ? log_(sum) : splat<L>(1.0f) / sum;
    for (ptrdiff_t i = 0; i < N; ++i) {
      const Vec<L> v = load<L>(y + i * Inner);
      store(y + i * Inner, Log ? v - last : v * last);
    }
  }
};
template <ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t Inner>
using log_softmax = softmax<Outer, N, Inner, true>;

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SOFTMAX_H
