// Fused elementwise loops: out[i] = fn(a[i], b[i], ...), all operands broadcast to one shape by
// strides known at compile time.
//
//   vmap<Shape<...>, Strides<...> per operand>::run(T* out, part, fn, const A*... operand)
//       float and integers of up to 32 bits in any mixture, a generic lambda over Vec<N> (float) and
//       IVec<N> (the integers, widened): vectorised along the last dimension; what it returns may be
//       Rounded (tile.h)
//   map<T, Shape<...>, Strides<...> per operand>::run(T* out, part, fn, const A*... operand)
//       any element types, a lambda over scalars; bool is stored as uint8_t 0 or 1
//   vmap_to / map_to / lookup_to: the same with the result's Strides after the shape (a slice of a larger
//       tensor); otherwise the result is dense.
//   lookup<Shape<...>, Strides<...> of x>::run(Y* out, part, const Y* table, const X* x)
//       out[i] = table[x[i]], x of 8 bits, 256 entries: any function of one byte. A signed x indexes
//       by its bits: table[255] belongs to -1. Fastest where entries are bytes
// The result may be one of the operands if both have the same strides; other overlap is not
// allowed.
#ifndef SKIVE_MAP_H
#define SKIVE_MAP_H

#include "skive/math.h"
#include "skive/shape.h"
#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// How a map is shared among workers: by rows if there are plenty, else by ranges of each row.
template <class S>
struct MapSplit {
  static constexpr ptrdiff_t inner = S::rank == 0 ? 1 : S::dim(S::rank - 1);
  static constexpr ptrdiff_t rows = row_count<S>();
  static constexpr bool by_rows = rows >= 16 || inner < 256;
  // Ranges begin at multiples of 64 elements: no two workers write one cache line of 4-byte values
  // in an aligned row, and vectors stay whole.
  static constexpr ptrdiff_t chunks = (inner + 63) / 64;

  static SKIVE_INLINE ptrdiff_t row_begin(Part p) { return by_rows ? part_begin(rows, p) : 0; }
  static SKIVE_INLINE ptrdiff_t row_end(Part p) { return by_rows ? part_end(rows, p) : rows; }
  static SKIVE_INLINE ptrdiff_t begin(Part p) { return by_rows ? 0 : part_begin(chunks, p) * 64; }
  static SKIVE_INLINE ptrdiff_t end(Part p) {
    const ptrdiff_t e = by_rows ? inner : part_end(chunks, p) * 64;
    return e < inner ? e : inner;
  }
};

template <class S, class Out, class... In>
struct vmap_to {
  using Split = MapSplit<S>;
  static constexpr int last = S::rank == 0 ? 0 : S::rank - 1;
  static constexpr bool vector = S::rank > 0 && Out::stride(last) == 1 &&
                                 ((In::stride(last) == 0 || In::stride(last) == 1) && ...);

  template <int N, ptrdiff_t Step, class A>
  static SKIVE_INLINE auto operand(const A* p, ptrdiff_t i) {
    if constexpr (Step == 0)
      return splat<N>(*p);
    else
      return load<N>(p + i);
  }
  template <int N, class T, class F, class... P>
  static SKIVE_INLINE void step(T* out, ptrdiff_t i, const F& fn, P... p) {
    store(out + i, fn(operand<N, In::stride(last)>(p, i)...));
  }
  template <class F, class... P>
  static SKIVE_INLINE auto value(ptrdiff_t i, const F& fn, P... p) {
    return fn(operand<kLanes, In::stride(last)>(p, i)...);
  }
  // Four vectors together, so that the long dependent chains of the polynomials overlap and bytes
  // fill a register. Loads and functions of the whole block first, then its stores: the result may
  // be an operand, so the compiler could not move a load above an earlier store.
  template <class T, class F, class... P>
  static SKIVE_INLINE void block(T* out, ptrdiff_t i, const F& fn, P... p) {
    const auto a = value(i, fn, p...), b = value(i + kLanes, fn, p...),
               c = value(i + 2 * kLanes, fn, p...), d = value(i + 3 * kLanes, fn, p...);
    if constexpr (!kRounded<decltype(a)>) store(out + i, a, b, c, d);
    else if constexpr (kJoins<T>) store_joined(out + i, a, b, c, d);
    else store_row(out + i, a, b, c, d);
  }
  template <class T, class F, class... P>
  static SKIVE_INLINE void row(T* out, ptrdiff_t begin, ptrdiff_t end, const F& fn, P... p) {
    if constexpr (vector) {
      constexpr ptrdiff_t whole = Split::inner / kLanes * kLanes;
      constexpr int tail = static_cast<int>(Split::inner - whole);
      constexpr ptrdiff_t wide = 4 * kLanes;
      ptrdiff_t i = begin;
      if constexpr (whole >= wide) {
        for (; i + wide <= end; i += wide) block(out, i, fn, p...);
      }
      if constexpr (whole > 0) {
        for (; i + kLanes <= end; i += kLanes) step<kLanes>(out, i, fn, p...);
      }
      if constexpr (tail > 0) {
        if (i < end) step<tail>(out, i, fn, p...);
      }
    } else {
      for (ptrdiff_t i = begin; i < end; ++i)
        store(out + i * Out::stride(last), fn(load<1>(p + i * In::stride(last))...));
    }
  }
  template <int... I, class T, class F, class... P>
  static SKIVE_INLINE void row_at(Index<I...>, T* out, const Offsets<1 + sizeof...(In)>& at,
                                  ptrdiff_t begin, ptrdiff_t end, const F& fn, const P*... p) {
    row(out + at.at[0], begin, end, fn, (p + at.at[I + 1])...);
  }
  template <class T, class F, class... P>
  static void run(T* out, Part part, const F& fn, const P*... p) {
    static_assert(sizeof...(P) == sizeof...(In), "one Strides per operand");
    if constexpr (S::size > 0) {
      const ptrdiff_t begin = Split::begin(part), end = Split::end(part);
      for_rows<S, Out, In...>(Split::row_begin(part), Split::row_end(part),
                              [&](const Offsets<1 + sizeof...(In)>& at) {
                                row_at(Indices<sizeof...(In)>{}, out, at, begin, end, fn, p...);
                              });
    }
  }
};

template <class T, class S, class Out, class... In>
struct map_to {
  using Split = MapSplit<S>;
  static constexpr int last = S::rank == 0 ? 0 : S::rank - 1;

  template <class F, class... P>
  static SKIVE_INLINE void row(T* out, ptrdiff_t begin, ptrdiff_t end, const F& fn, const P*... p) {
    for (ptrdiff_t i = begin; i < end; ++i)
      out[i * Out::stride(last)] = static_cast<T>(fn(p[i * In::stride(last)]...));
  }
  template <int... I, class F, class... P>
  static SKIVE_INLINE void row_at(Index<I...>, T* out, const Offsets<1 + sizeof...(In)>& at,
                                  ptrdiff_t begin, ptrdiff_t end, const F& fn, const P*... p) {
    row(out + at.at[0], begin, end, fn, (p + at.at[I + 1])...);
  }
  template <class F, class... P>
  static void run(T* out, Part part, const F& fn, const P*... p) {
    static_assert(sizeof...(P) == sizeof...(In), "one Strides per operand");
    if constexpr (S::size > 0) {
      const ptrdiff_t begin = Split::begin(part), end = Split::end(part);
      for_rows<S, Out, In...>(Split::row_begin(part), Split::row_end(part),
                              [&](const Offsets<1 + sizeof...(In)>& at) {
                                row_at(Indices<sizeof...(In)>{}, out, at, begin, end, fn, p...);
                              });
    }
  }
};

template <class S, class Out, class In>
struct lookup_to {
  using Split = MapSplit<S>;
  static constexpr int last = S::rank == 0 ? 0 : S::rank - 1;

  template <class Y, class X>
  static void run(Y* out, Part part, const Y* table, const X* x) {
    static_assert(sizeof(X) == 1, "an index is a byte");
    if constexpr (S::size > 0) {
      const ptrdiff_t begin = Split::begin(part), end = Split::end(part);
      const uint8_t* const index = reinterpret_cast<const uint8_t*>(x);
      for_rows<S, Out, In>(Split::row_begin(part), Split::row_end(part), [&](const Offsets<2>& at) {
        if constexpr (sizeof(Y) == 1 && Out::stride(last) == 1 && In::stride(last) == 1) {
          bytes(reinterpret_cast<const uint8_t*>(table), index + at.at[1] + begin,
                reinterpret_cast<uint8_t*>(out) + at.at[0] + begin, end - begin);
        } else {
          for (ptrdiff_t i = begin; i < end; ++i)
            out[at.at[0] + i * Out::stride(last)] = table[index[at.at[1] + i * In::stride(last)]];
        }
      });
    }
  }

 private:
  static SKIVE_INLINE void bytes(const uint8_t* table, const uint8_t* x, uint8_t* y, ptrdiff_t n) {
    const ByteTable entries(table);
    ptrdiff_t i = 0;
    for (; i + kRegisterBytes <= n; i += kRegisterBytes) entries.look_up(x + i, y + i);
    if (i < n) {
      uint8_t block[kRegisterBytes] = {};
      __builtin_memcpy(block, x + i, static_cast<size_t>(n - i));
      entries.look_up(block, block);
      __builtin_memcpy(y + i, block, static_cast<size_t>(n - i));
    }
  }
};

// The Shape itself serves as the dense result's strides.
template <class S, class... In>
using vmap = vmap_to<S, S, In...>;
template <class T, class S, class... In>
using map = map_to<T, S, S, In...>;
template <class S, class In>
using lookup = lookup_to<S, S, In>;

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_MAP_H
