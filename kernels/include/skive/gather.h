// Reading and writing at indices. Negative indices count from the end; an index that is still
// outside is clamped to the nearest end, so that no data can make a kernel leave its tensors.
#ifndef SKIVE_GATHER_H
#define SKIVE_GATHER_H

#include "skive/math.h"
#include "skive/shape.h"

namespace skive {
inline namespace SKIVE_ISA {

template <class I>
SKIVE_INLINE ptrdiff_t wrapped(I index, ptrdiff_t n) {
  const auto wide = static_cast<long long>(index);
  const long long i = wide < 0 ? wide + n : wide;
  return static_cast<ptrdiff_t>(i < 0 ? 0 : i >= n ? n - 1 : i);
}

// y[o][j][i] = x[o][index[j]][i] with x [Outer, Axis, Inner], index [Count], y [Outer, Count, Inner].
template <class T, class I, int Outer, int Axis, int Count, int Inner>
struct gather {
  static void run(const T* x, const I* index, T* y, Part part) {
    constexpr ptrdiff_t rows = ptrdiff_t{Outer} * Count;
    for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r) {
      const T* from = x + (r / Count * Axis + wrapped(index[r % Count], Axis)) * Inner;
      __builtin_memcpy(y + r * Inner, from, sizeof(T) * Inner);
    }
  }
};

// Calls f(flat index into At, offset into Data) where Data's coordinate on `Axis` is that of the
// index value and the others are those of the index's own position.
template <class I, class Data, class At, int Axis, class F>
SKIVE_INLINE void for_elements(const I* index, ptrdiff_t begin, ptrdiff_t end, const F& f) {
  for (ptrdiff_t e = begin; e < end; ++e) {
    ptrdiff_t rest = e, offset = 0;
    for (int d = At::rank - 1; d >= 0; --d) {
      const ptrdiff_t at = rest % At::dim(d);
      rest /= At::dim(d);
      offset += (d == Axis ? wrapped(index[e], Data::dim(d)) : at) * Data::stride(d);
    }
    f(e, offset);
  }
}

template <class T, class I, class Data, class At, int Axis>
struct gather_elements {
  static void run(const T* x, const I* index, T* y, Part part) {
    for_elements<I, Data, At, Axis>(index, part_begin(At::size, part), part_end(At::size, part),
                                       [&](ptrdiff_t e, ptrdiff_t offset) { y[e] = x[offset]; });
  }
};

// How a scattered update joins what is there.
struct ScatterNone {
  template <class T> static SKIVE_INLINE T join(T, T update) { return update; }
};
struct ScatterAdd {
  template <class T> static SKIVE_INLINE T join(T old, T update) { return add(old, update); }
};
struct ScatterMul {
  template <class T> static SKIVE_INLINE T join(T old, T update) { return mul(old, update); }
};
struct ScatterMin {
  template <class T> static SKIVE_INLINE T join(T old, T update) { return min_(old, update); }
};
struct ScatterMax {
  template <class T> static SKIVE_INLINE T join(T old, T update) { return max_(old, update); }
};

// y = x, then y[.., index, ..] joined with updates in order. One part: updates may collide.
template <class T, class I, class Op, class Data, class At, int Axis>
struct scatter_elements {
  static void run(const T* x, const I* index, const T* updates, T* y) {
    if (y != x) __builtin_memcpy(y, x, sizeof(T) * Data::size);
    for_elements<I, Data, At, Axis>(index, 0, At::size, [&](ptrdiff_t e, ptrdiff_t offset) {
      y[offset] = Op::join(y[offset], updates[e]);
    });
  }
};

// Offset in elements of the slice that the index tuple at `index` selects in [Indexed..., Inner].
template <class I, class Indexed, int Inner>
SKIVE_INLINE ptrdiff_t tuple_offset(const I* index) {
  ptrdiff_t offset = 0;
  for (int d = 0; d < Indexed::rank; ++d) offset += wrapped(index[d], Indexed::dim(d)) * Indexed::stride(d);
  return offset * Inner;
}

// x [Batch, Indexed..., Inner], index [Batch, Count, rank of Indexed], y [Batch, Count, Inner].
template <class T, class I, int Batch, int Count, class Indexed, int Inner>
struct gather_nd {
  static void run(const T* x, const I* index, T* y, Part part) {
    constexpr ptrdiff_t rows = ptrdiff_t{Batch} * Count;
    for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r) {
      const T* from = x + r / Count * Indexed::size * Inner + tuple_offset<I, Indexed, Inner>(index + r * Indexed::rank);
      __builtin_memcpy(y + r * Inner, from, sizeof(T) * Inner);
    }
  }
};

// y = x, then the slices at the index tuples joined with updates [Count, Inner] in order.
template <class T, class I, class Op, int Count, class Indexed, int Inner>
struct scatter_nd {
  static void run(const T* x, const I* index, const T* updates, T* y) {
    if (y != x) __builtin_memcpy(y, x, sizeof(T) * Indexed::size * Inner);
    for (ptrdiff_t r = 0; r < Count; ++r) {
      T* to = y + tuple_offset<I, Indexed, Inner>(index + r * Indexed::rank);
      for (int i = 0; i < Inner; ++i) to[i] = Op::join(to[i], updates[r * Inner + i]);
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_GATHER_H
