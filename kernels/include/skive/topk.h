// The K largest or smallest elements of each row, sorted; the lower index comes first among equals.
#ifndef SKIVE_TOPK_H
#define SKIVE_TOPK_H

#include "skive/isa.h"

namespace skive {
inline namespace SKIVE_ISA {

struct TopkValue {
  template <class T> static SKIVE_INLINE T of(const T* row, ptrdiff_t i) { return row[i]; }
};
struct TopkIndex {
  template <class T> static SKIVE_INLINE int64_t of(const T*, ptrdiff_t i) { return i; }
};

// x [Rows, N] -> y [Rows, K]: the values or the indices, as What says. Sorted insertion into a list
// of K positions: linear in N for the small K of a classifier. NaN ranks as the largest.
template <class T, class R, class What, int Rows, int N, int K, bool Largest>
struct topk {
  static void run(const T* x, R* y, Part part) {
    for (ptrdiff_t r = part_begin(Rows, part), end = part_end(Rows, part); r < end; ++r) {
      const T* row = x + r * N;
      int best[K];
      int kept = 0;
      for (int i = 0; i < N; ++i) {
        if (kept == K && !before(row[i], row[best[K - 1]])) continue;
        int at = kept < K ? kept++ : K - 1;
        for (; at > 0 && before(row[i], row[best[at - 1]]); --at) best[at] = best[at - 1];
        best[at] = i;
      }
      for (int k = 0; k < K; ++k) y[r * K + k] = What::of(row, best[k]);
    }
  }

 private:
  // Strictly ahead of: equal elements keep the order in which they come.
  static SKIVE_INLINE bool before(T a, T b) {
    if (a != a) return Largest && b == b;
    if (b != b) return !Largest;
    return Largest ? a > b : a < b;
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TOPK_H
