// The K largest or smallest elements of each row, sorted; the lower index first among equals.
#ifndef SKIVE_TOPK_H
#define SKIVE_TOPK_H

#include "skive/math.h"

namespace skive {
inline namespace SKIVE_ISA {

// x [Outer, N] -> values and indices [Outer, K]; either may be null. NaN counts as the largest
// value. A heap of the K best seen so far, worst on top: N log K steps in the worst case, and about
// N when the row is not sorted against it.
template <class T, ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t K, bool Largest>
struct topk {
  static_assert(K <= N, "k is at most the length of the row");
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>((K * sizeof(int64_t) + 63) / 64 * 64) * static_cast<size_t>(parts);
  }

  static void run(const T* x, T* values, int64_t* indices, void* scratch, Part part) {
    if constexpr (K > 0) {
      int64_t* const heap =
          reinterpret_cast<int64_t*>(static_cast<char*>(scratch) + part.index * scratch_bytes());
      for (ptrdiff_t r = part_begin(Outer, part), end = part_end(Outer, part); r < end; ++r) {
        const T* row = x + r * N;
        for (ptrdiff_t i = 0; i < K; ++i) heap[i] = i;
        for (ptrdiff_t i = K / 2; i-- > 0;) sink(row, heap, i, K);
        for (ptrdiff_t i = K; i < N; ++i) {
          if (before(row, i, heap[0])) {
            heap[0] = i;
            sink(row, heap, 0, K);
          }
        }
        for (ptrdiff_t last = K - 1; last >= 0; --last) {  // the worst of the rest goes last
          const int64_t worst = heap[0];
          heap[0] = heap[last];
          sink(row, heap, 0, last);
          if (values) values[r * K + last] = row[worst];
          if (indices) indices[r * K + last] = worst;
        }
      }
    }
  }

 private:
  // Element i of the row is better than element j.
  static SKIVE_INLINE bool before(const T* row, int64_t i, int64_t j) {
    const T a = row[i], b = row[j];
    if (is_nan(a) || is_nan(b)) {
      if (is_nan(a) == is_nan(b)) return i < j;
      return is_nan(a) == Largest;
    }
    if (a == b) return i < j;
    return Largest ? a > b : a < b;
  }
  // Restores the heap below position i of n: each parent is worse than its children.
  static SKIVE_INLINE void sink(const T* row, int64_t* heap, ptrdiff_t i, ptrdiff_t n) {
    for (;;) {
      ptrdiff_t child = 2 * i + 1;
      if (child >= n) return;
      if (child + 1 < n && before(row, heap[child], heap[child + 1])) ++child;
      if (!before(row, heap[i], heap[child])) return;
      const int64_t t = heap[i];
      heap[i] = heap[child];
      heap[child] = t;
      i = child;
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_TOPK_H
