// Indexed reads and writes. A negative index counts from the end of its axis; whatever is then
// still outside is clamped to the axis, so no index can reach memory outside the tensor.
#ifndef SKIVE_GATHER_H
#define SKIVE_GATHER_H

#include "skive/math.h"
#include "skive/shape.h"

namespace skive {
inline namespace SKIVE_ISA {

template <class I>
SKIVE_INLINE ptrdiff_t clamp_index(I index, ptrdiff_t n) {
  // The sum cannot overflow: n > 0 and the index is negative.
  const int64_t i = index < 0 ? static_cast<int64_t>(index) + n : static_cast<int64_t>(index);
  return i < 0 ? 0 : i >= n ? n - 1 : static_cast<ptrdiff_t>(i);
}

// y[outer, count, inner] = data[outer, index[count], inner]; data has Axis positions along its
// axis. With Outer = 1 and Axis the vocabulary: an embedding.
template <class T, class I, ptrdiff_t Outer, ptrdiff_t Axis, ptrdiff_t Count, ptrdiff_t Inner>
struct gather {
  static void run(const T* data, const I* index, T* y, Part part) {
    if constexpr (Axis > 0) {
      constexpr ptrdiff_t rows = Outer * Count;
      for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r) {
        const T* from = data + (r / Count * Axis + clamp_index(index[r % Count], Axis)) * Inner;
        __builtin_memcpy(y + r * Inner, from, Inner * sizeof(T));
      }
    }
  }
};

// Offset of the element at flat position `r` of shape S in a tensor of shape Data, dimension
// AxisDim left out.
template <class S, class Data, int AxisDim>
SKIVE_INLINE ptrdiff_t offset_without_axis(ptrdiff_t r) {
  ptrdiff_t offset = 0;
  for (int d = S::rank - 1; d >= 0; --d) {
    if (d != AxisDim) offset += r % S::dim(d) * Data::stride(d);
    r /= S::dim(d);
  }
  return offset;
}

// y[i, j, k] = data[i, index[i, j, k], k] for axis 1; y has the shape of index.
template <class T, class I, class Data, class IndexShape, int AxisDim>
struct gather_elements {
  static void run(const T* data, const I* index, T* y, Part part) {
    if constexpr (Data::size > 0 && IndexShape::size > 0) {
      constexpr ptrdiff_t n = IndexShape::size;
      for (ptrdiff_t r = part_begin(n, part), end = part_end(n, part); r < end; ++r)
        y[r] = data[offset_without_axis<IndexShape, Data, AxisDim>(r) +
                    clamp_index(index[r], Data::dim(AxisDim)) * Data::stride(AxisDim)];
    }
  }
};

// Offset of the slice named by an index tuple; Dims are the indexed dimensions, Inner what follows
// them.
template <class Dims, ptrdiff_t Inner, class I>
SKIVE_INLINE ptrdiff_t tuple_offset(const I* tuple) {
  ptrdiff_t offset = 0;
  for (int d = 0; d < Dims::rank; ++d)
    offset += clamp_index(tuple[d], Dims::dim(d)) * Dims::stride(d);
  return offset * Inner;
}

// y[batch, t, inner] = data[batch, index[batch, t, :], inner]; data [Batch, Dims..., Inner], index
// [Batch, Tuples, rank of Dims].
template <class T, class I, ptrdiff_t Batch, class Dims, ptrdiff_t Tuples, ptrdiff_t Inner>
struct gather_nd {
  static void run(const T* data, const I* index, T* y, Part part) {
    if constexpr (Dims::size > 0 && Inner > 0) {
      constexpr ptrdiff_t rows = Batch * Tuples;
      for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r) {
        const T* from = data + r / Tuples * Dims::size * Inner +
                        tuple_offset<Dims, Inner>(index + r * Dims::rank);
        __builtin_memcpy(y + r * Inner, from, Inner * sizeof(T));
      }
    }
  }
};

// What a scatter does with the element in place and the update.
struct Replace {
  template <class T>
  static SKIVE_INLINE T apply(T, T update) {
    return update;
  }
};
struct Add {
  template <class T>
  static SKIVE_INLINE T apply(T old, T update) {
    return add(old, update);
  }
};
struct Mul {
  template <class T>
  static SKIVE_INLINE T apply(T old, T update) {
    return mul(old, update);
  }
};
struct Minimum {
  template <class T>
  static SKIVE_INLINE T apply(T old, T update) {
    return min_(old, update);
  }
};
struct Maximum {
  template <class T>
  static SKIVE_INLINE T apply(T old, T update) {
    return max_(old, update);
  }
};

// y = data, then y[i, index[i, j, k], k] = Reduction(y[...], updates[i, j, k]) for axis 1. Indices
// may repeat, so that updates go in order by one worker. data may be y.
template <class T, class I, class Data, class IndexShape, int AxisDim, class Reduction>
struct scatter_elements {
  static void run(const T* data, const I* index, const T* updates, T* y, Part part) {
    if (part.index != 0) return;
    if constexpr (Data::size > 0) {
      if (y != data) __builtin_memcpy(y, data, Data::size * sizeof(T));
      for (ptrdiff_t r = 0; r < IndexShape::size; ++r) {
        T& at = y[offset_without_axis<IndexShape, Data, AxisDim>(r) +
                  clamp_index(index[r], Data::dim(AxisDim)) * Data::stride(AxisDim)];
        at = Reduction::apply(at, updates[r]);
      }
    }
  }
};

// y = data [Dims..., Inner], then the slice y[index[t, :], :] = Reduction(slice, updates[t, :]).
template <class T, class I, class Dims, ptrdiff_t Tuples, ptrdiff_t Inner, class Reduction>
struct scatter_nd {
  static void run(const T* data, const I* index, const T* updates, T* y, Part part) {
    if (part.index != 0) return;
    if constexpr (Dims::size * Inner > 0) {
      if (y != data) __builtin_memcpy(y, data, Dims::size * Inner * sizeof(T));
      for (ptrdiff_t t = 0; t < Tuples; ++t) {
        T* to = y + tuple_offset<Dims, Inner>(index + t * Dims::rank);
        for (ptrdiff_t i = 0; i < Inner; ++i)
          to[i] = Reduction::apply(to[i], updates[t * Inner + i]);
      }
    }
  }
};

// y[outer, depth, inner] = on where depth equals index[outer, inner] (negative: from the end), else
// off; an index outside leaves its column off.
template <class T, class I, ptrdiff_t Outer, ptrdiff_t Depth, ptrdiff_t Inner>
struct one_hot {
  static void run(const I* index, T* y, Part part, T off, T on) {
    for (ptrdiff_t o = part_begin(Outer, part), end = part_end(Outer, part); o < end; ++o) {
      T* to = y + o * Depth * Inner;
      for (ptrdiff_t i = 0; i < Depth * Inner; ++i) to[i] = off;
      for (ptrdiff_t i = 0; i < Inner; ++i) {
        const int64_t raw = static_cast<int64_t>(index[o * Inner + i]),
                      at = raw < 0 ? raw + Depth : raw;
        if (at >= 0 && at < Depth) to[at * Inner + i] = on;
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_GATHER_H
