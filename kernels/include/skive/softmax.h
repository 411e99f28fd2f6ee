// softmax and log_softmax along the middle axis of [Outer, N, Inner]; Inner = 1 is the last axis.
// Each row is read three times (maximum, exponentials, scaling), the later times from cache.
#ifndef SKIVE_SOFTMAX_H
#define SKIVE_SOFTMAX_H

#include "skive/functions.h"
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

// Softmax of quantized values without a float instruction.
//   e_n = exponentials[min(max x - x_n, Entries - 1)], the caller's table of round(2^F exp(-k scale))
//   r = floor(levels 2^32 / sum of e), y_n = saturate(((e_n r + 2^31) >> 32) + zero)
// levels is 1 / scale of y. Rounding r down costs e_n / 2^32 of a step at most. Entries: 256 serves
// any 8-bit x; for 16 bits as many as are not zero, and one.
template <class T, class Y, ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t Inner, ptrdiff_t Entries = 256>
struct integer_softmax {
  static void run(const T* x, const uint32_t* exponentials, Y* y, Part part, uint32_t levels,
                  int32_t zero) {
    if constexpr (Outer * N * Inner > 0) {
      for (ptrdiff_t r = part_begin(Outer * Inner, part), end = part_end(Outer * Inner, part);
           r < end; ++r) {
        const ptrdiff_t at = r / Inner * N * Inner + r % Inner;
        row(x + at, exponentials, y + at, levels, zero);
      }
    }
  }

 private:
  static SKIVE_INLINE ptrdiff_t entry(T top, T x) {
    const ptrdiff_t k = ptrdiff_t{top} - ptrdiff_t{x};
    return k < Entries ? k : Entries - 1;
  }
  static SKIVE_INLINE Y level(uint32_t e, uint64_t r, int32_t zero) {
    const int64_t v = static_cast<int64_t>((e * r + (uint64_t{1} << 31)) >> 32) + zero;
    constexpr int32_t low = limits<Y>::lowest, high = limits<Y>::highest;
    return static_cast<Y>(v < low ? low : v > high ? high : v);
  }
  static SKIVE_INLINE void row(const T* x, const uint32_t* exponentials, Y* y, uint32_t levels,
                               int32_t zero) {
    T top = x[0];
    for (ptrdiff_t i = 1; i < N; ++i) top = x[i * Inner] > top ? x[i * Inner] : top;
    uint64_t sum = 0;
    for (ptrdiff_t i = 0; i < N; ++i) sum += exponentials[entry(top, x[i * Inner])];
    const uint64_t r = (static_cast<uint64_t>(levels) << 32) / sum;
    if constexpr (Entries <= 256 && N >= 4 * Entries) {  // a long row: each result once
      Y results[Entries];
      for (ptrdiff_t k = 0; k < Entries; ++k) results[k] = level(exponentials[k], r, zero);
      for (ptrdiff_t i = 0; i < N; ++i) y[i * Inner] = results[entry(top, x[i * Inner])];
    } else {
      for (ptrdiff_t i = 0; i < N; ++i)
        y[i * Inner] = level(exponentials[entry(top, x[i * Inner])], r, zero);
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_SOFTMAX_H
