// Copies between tensors of different strides: slice, concat, tile, expand, flip and padding.
#ifndef SKIVE_COPY_H
#define SKIVE_COPY_H

#include "skive/shape.h"

namespace skive {
inline namespace SKIVE_ISA {

// out[i] = in[i] over a shape. `out` and `in` point at the element of index 0; strides may be 0
// (in) or negative. The two must not overlap.
template <class T, class S, class Out, class In>
struct copy_strided {
  static void run(T* out, const T* in, Part part) {
    if constexpr (S::size > 0) {
      constexpr int last = S::rank == 0 ? 0 : S::rank - 1;
      constexpr ptrdiff_t inner = S::rank == 0 ? 1 : S::dim(last);
      constexpr ptrdiff_t rows = row_count<S>();
      for_rows<S, Out, In>(part_begin(rows, part), part_end(rows, part), [&](const Offsets<2>& at) {
        T* to = out + at.at[0];
        const T* from = in + at.at[1];
        if constexpr (Out::stride(last) == 1 && In::stride(last) == 1) {
          __builtin_memcpy(to, from, inner * sizeof(T));
        } else {
          for (ptrdiff_t i = 0; i < inner; ++i)
            to[i * Out::stride(last)] = from[i * In::stride(last)];
        }
      });
    }
  }
};

// out[i] = value over a shape.
template <class T, class S, class Out>
struct fill {
  static void run(T* out, T value, Part part) {
    if constexpr (S::size > 0) {
      constexpr int last = S::rank == 0 ? 0 : S::rank - 1;
      constexpr ptrdiff_t inner = S::rank == 0 ? 1 : S::dim(last);
      constexpr ptrdiff_t rows = row_count<S>();
      for_rows<S, Out>(part_begin(rows, part), part_end(rows, part), [&](const Offsets<1>& at) {
        T* to = out + at.at[0];
        for (ptrdiff_t i = 0; i < inner; ++i) to[i * Out::stride(last)] = value;
      });
    }
  }
};

enum class PadMode { constant, edge, reflect, wrap };

// The input index that padded index `i` repeats, i in [-n, 2n) for reflect and wrap; `reflect` does
// not repeat the edge.
template <PadMode Mode>
constexpr ptrdiff_t pad_source(ptrdiff_t i, ptrdiff_t n) {
  if (Mode == PadMode::edge) return i < 0 ? 0 : i >= n ? n - 1 : i;
  if (Mode == PadMode::wrap) return ((i % n) + n) % n;
  if (n == 1) return 0;
  const ptrdiff_t period = 2 * (n - 1), k = ((i % period) + period) % period;
  return k < n ? k : period - k;
}

// `In` is the input's shape, `Out` the result's, `Before` the number of elements added in front of
// each dimension (negative: cut). out is dense.
template <class T, PadMode Mode, class In, class Out, class Before>
struct pad {
  static void run(T* out, const T* in, T value, Part part) {
    if constexpr (kJoined > 0) {
      joined(Indices<In::rank - 1>{}, out, in, value, part);
    } else if constexpr (Out::size > 0) {
      constexpr ptrdiff_t rows = row_count<Out>(),
                          inner = Out::rank == 0 ? 1 : Out::dim(Out::rank - 1);
      for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r)
        row(out + r * inner, in, value, r);
    }
  }

 private:
  // The last dimension, not the first, that stays as it is, 0 if none does: it joins the one before
  // it, which leaves longer or fewer rows.
  static constexpr int kJoined = [] {
    int d = Mode == PadMode::constant ? In::rank - 1 : 0;
    while (d > 0 && (In::dim(d) != Out::dim(d) || Before::stride(d) != 0)) --d;
    return d;
  }();
  // What dimension `d` has then, of `here` in it and `next` in the one behind.
  static constexpr ptrdiff_t extent(int d, ptrdiff_t here, ptrdiff_t next) {
    return d < kJoined - 1 ? here : d == kJoined - 1 ? here * In::dim(kJoined) : next;
  }
  template <int... D>
  static SKIVE_INLINE void joined(Index<D...>, T* out, const T* in, T value, Part part) {
    pad<T, Mode, Shape<extent(D, In::dim(D), In::dim(D + 1))...>,
        Shape<extent(D, Out::dim(D), Out::dim(D + 1))...>,
        Strides<extent(D, Before::stride(D), Before::stride(D + 1))...>>::run(out, in, value, part);
  }
  static SKIVE_INLINE void filled(T* out, ptrdiff_t n, T value) {
    if constexpr (sizeof(T) == 1)
      __builtin_memset(out, static_cast<unsigned char>(value), static_cast<size_t>(n));
    else
      for (ptrdiff_t i = 0; i < n; ++i) out[i] = value;
  }

  static SKIVE_INLINE void row(T* out, const T* in, [[maybe_unused]] T value, ptrdiff_t r) {
    constexpr int last = In::rank - 1;
    if constexpr (In::rank == 0) {
      *out = *in;
    } else {
      constexpr ptrdiff_t n = In::dim(last), width = Out::dim(last), before = Before::stride(last);
      ptrdiff_t offset = 0;
      bool inside = In::size > 0;
      for (int d = last - 1; d >= 0; --d) {
        ptrdiff_t i = r % Out::dim(d) - Before::stride(d);
        r /= Out::dim(d);
        if constexpr (Mode == PadMode::constant)
          inside = inside && i >= 0 && i < In::dim(d);
        else
          i = pad_source<Mode>(i, In::dim(d));
        offset += i * In::stride(d);
      }
      if constexpr (Mode == PadMode::constant) {
        if (!inside) return filled(out, width, value);
      }
      // [left, right) of the result row lies inside the input.
      constexpr ptrdiff_t clipped_left = before > 0 ? before : 0,
                          clipped_right = before + n < width ? before + n : width;
      constexpr ptrdiff_t left = clipped_left < width ? clipped_left : width;
      constexpr ptrdiff_t right = clipped_right > left ? clipped_right : left;
      const T* from = in + offset;
      if constexpr (right > left)
        __builtin_memcpy(out + left, from + (left - before), (right - left) * sizeof(T));
      if constexpr (Mode == PadMode::constant) {
        filled(out, left, value);
        filled(out + right, width - right, value);
      } else {
        for (ptrdiff_t i = 0; i < left; ++i) out[i] = from[pad_source<Mode>(i - before, n)];
        for (ptrdiff_t i = right; i < width; ++i) out[i] = from[pad_source<Mode>(i - before, n)];
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_COPY_H
