// Reductions over any set of axes, argument of the extremum, and running sums.
//
// reduce<Op, T, Kept, KeptStrides, Reduced, ReducedStrides>::run(x, y, part)
//   y is dense over the shape Kept; each element folds x over the shape Reduced; the strides are
//   those of x. Axes need no order: a reduction over axes 0 and 2 of [A, B, C] is Kept = Shape<B>,
//   Strides<C>, Reduced = Shape<A, C>, Strides<B * C, 1>.
// Floats are summed in blocks (partial sums of at most kFoldBlock terms per lane, then the sum of
// those), so the rounding error grows with n / kFoldBlock rather than with n. Integers wrap.
#ifndef SKIVE_REDUCE_H
#define SKIVE_REDUCE_H

#include "skive/functions.h"
#include "skive/row.h"

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kFoldBlock = 64;

template <class T>
constexpr T lowest() {
  if constexpr (same_type<T, float>)
    return -__builtin_inff();
  else if constexpr (same_type<T, double>)
    return -__builtin_inf();
  else if constexpr (is_signed<T>)
    return static_cast<T>(uint64_t{1} << (8 * sizeof(T) - 1));
  else
    return 0;
}
template <class T>
constexpr T highest() {
  if constexpr (is_float<T>)
    return -lowest<T>();
  else if constexpr (same_type<T, bool>)
    return true;
  else
    return static_cast<T>(~static_cast<uint64_t>(lowest<T>()));
}

// A reduction: elements folded by combine from identity, then finish(r, n). across(Vec) folds the lanes.
struct Plain {
  template <class T>
  static SKIVE_INLINE T finish(T r, ptrdiff_t) {
    return r;
  }
};
struct Sum : Plain {
  template <class T>
  static constexpr T identity() {
    return 0;
  }
  template <class V>
  static SKIVE_INLINE V combine(V a, V b) {
    return add(a, b);
  }
  template <int N>
  static SKIVE_INLINE float across(Vec<N> a) {
    return hsum(a);
  }
};
struct Mean : Sum {
  // 0 / 0 of an empty float axis is NaN; of an empty integer axis 0.
  template <class T>
  static SKIVE_INLINE T finish(T r, ptrdiff_t n) {
    return div_(r, static_cast<T>(n));
  }
};
struct Max : Plain {
  template <class T>
  static constexpr T identity() {
    return lowest<T>();
  }
  template <class V>
  static SKIVE_INLINE V combine(V a, V b) {
    return max_(a, b);
  }
  template <int N>
  static SKIVE_INLINE float across(Vec<N> a) {
    return any(is_nan(a)) ? __builtin_nanf("") : hmax(a);
  }
};
struct Min : Plain {
  template <class T>
  static constexpr T identity() {
    return highest<T>();
  }
  template <class V>
  static SKIVE_INLINE V combine(V a, V b) {
    return min_(a, b);
  }
  template <int N>
  static SKIVE_INLINE float across(Vec<N> a) {
    return any(is_nan(a)) ? __builtin_nanf("") : hmin(a);
  }
};
struct Prod : Plain {
  template <class T>
  static constexpr T identity() {
    return 1;
  }
  template <class V>
  static SKIVE_INLINE V combine(V a, V b) {
    return mul(a, b);
  }
  template <int N>
  static SKIVE_INLINE float across(Vec<N> a) {
    float lane[N];
    store(lane, a);
    float r = lane[0];
    for (int i = 1; i < N; ++i) r *= lane[i];
    return r;
  }
};
template <class>
struct with_unit;
template <ptrdiff_t... D>
struct with_unit<Shape<D...>> {
  using type = Shape<D..., 1>;
};
template <ptrdiff_t... D>
struct with_unit<Strides<D...>> {
  using type = Strides<D..., 0>;
};

template <class Op, class T, class Kept, class KeptStrides, class Reduced, class ReducedStrides>
struct reduce {
  static constexpr int kept_last = Kept::rank - 1,
                       last = Reduced::rank == 0 ? 0 : Reduced::rank - 1;
  static constexpr ptrdiff_t inner = Reduced::rank == 0 ? 1 : Reduced::dim(last);
  static constexpr ptrdiff_t step = ReducedStrides::stride(last);
  static constexpr bool is_f32 = same_type<T, float>;
  // Vectors along the reduced axis, or along the kept one.
  static constexpr bool along = is_f32 && step == 1 && inner >= 4;
  static constexpr bool across = is_f32 && !along && Kept::rank > 0 &&
                                 KeptStrides::stride(kept_last) == 1;

  static void run(const T* x, T* y, Part part) {
    if constexpr (Kept::size > 0) {
      if constexpr (across) {
        columns(x, y, part);
      } else {
        using K = typename with_unit<Kept>::type;
        const ptrdiff_t begin = part_begin(Kept::size, part), end = part_end(Kept::size, part);
        T* to = y + begin;
        for_rows<K, typename with_unit<KeptStrides>::type>(begin, end, [&](const Offsets<1>& at) {
          *to++ = Op::finish(one(x + at.at[0]), Reduced::size);
        });
      }
    }
  }

 private:
  // Folds value(offset of a reduced row) over all of them, in blocks.
  template <class V, class Value>
  static SKIVE_INLINE V fold(V start, const Value& value) {
    V total = start, block = start;
    int terms = 0;
    for_rows<Reduced, ReducedStrides>(0, Reduced::size > 0 ? row_count<Reduced>() : 0,
                                      [&](const Offsets<1>& at) {
                                        block = Op::combine(block, value(at.at[0]));
                                        if (++terms == kFoldBlock) {
                                          total = Op::combine(total, block);
                                          block = start;
                                          terms = 0;
                                        }
                                      });
    return Op::combine(total, block);
  }

  static SKIVE_INLINE T one(const T* x) {
    const T start = Op::template identity<T>();
    if constexpr (Reduced::size == 0)
      return static_cast<void>(x), start;
    else
      return fold(start, [&](ptrdiff_t at) { return row(x + at); });
  }
  // One reduced row.
  static SKIVE_INLINE T row(const T* x) {
    if constexpr (along) {
      return long_row<inner>(x);
    } else {
      T total = Op::template identity<T>();
      for (ptrdiff_t i = 0; i < inner;) {
        T block = Op::template identity<T>();
        const ptrdiff_t end = i + kFoldBlock < inner ? i + kFoldBlock : inner;
        for (; i < end; ++i) block = Op::combine(block, x[i * step]);
        total = Op::combine(total, block);
      }
      return total;
    }
  }
  template <ptrdiff_t N>
  static SKIVE_INLINE float short_row(const float* x) {
    return fold_row<N>(
        [&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(x + i); },
        [](auto a, auto b) { return Op::combine(a, b); }, [](auto a) { return Op::across(a); });
  }
  template <ptrdiff_t N>
  static SKIVE_INLINE float long_row(const float* x) {
    constexpr ptrdiff_t block = ptrdiff_t{kFoldBlock} * 4 * kLanes;
    if constexpr (N <= block) {
      return short_row<N>(x);
    } else {
      float total = Op::template identity<float>();
      for (ptrdiff_t b = 0; b < N / block; ++b)
        total = Op::combine(total, short_row<block>(x + b * block));
      if constexpr (N % block != 0)
        total = Op::combine(total, short_row<N % block>(x + N / block * block));
      return total;
    }
  }

  // Four vectors of kept elements at a time.
  static SKIVE_INLINE void columns(const float* x, float* y, Part part) {
    constexpr ptrdiff_t width = Kept::dim(kept_last), block = 4 * kLanes,
                        blocks = (width + block - 1) / block;
    constexpr ptrdiff_t rows = row_count<Kept>();
    // Rows and blocks of columns are shared out as one list.
    const ptrdiff_t begin = part_begin(rows * blocks, part), end = part_end(rows * blocks, part);
    for_rows<Kept, Kept, KeptStrides>(
        begin / blocks, (end + blocks - 1) / blocks, [&](const Offsets<2>& at) {
          const ptrdiff_t r = at.at[0] / width;
          const ptrdiff_t from = begin > r * blocks ? begin - r * blocks : 0;
          const ptrdiff_t to = end < (r + 1) * blocks ? end - r * blocks : blocks;
          for (ptrdiff_t b = from; b < to; ++b) {
            const float* px = x + at.at[1] + b * block;
            float* py = y + at.at[0] + b * block;
            if constexpr (width % block != 0) {
              if (b == blocks - 1) {
                column_tail<width % block>(px, py);
                continue;
              }
            }
            wide(px, py);
          }
        });
  }
  struct Four {
    Vec<kLanes> a, b, c, d;
  };
  static SKIVE_INLINE Four combine(const Four& p, const Four& q) {
    return {Op::combine(p.a, q.a), Op::combine(p.b, q.b), Op::combine(p.c, q.c),
            Op::combine(p.d, q.d)};
  }
  template <class V, class Load, class Combine>
  static SKIVE_INLINE V fold_columns(V start, const Load& value, const Combine& combine) {
    V total = start, block = start;
    int terms = 0;
    if constexpr (Reduced::size > 0) {
      for_rows<Reduced, ReducedStrides>(0, row_count<Reduced>(), [&](const Offsets<1>& at) {
        for (ptrdiff_t i = 0; i < inner; ++i) {
          block = combine(block, value(at.at[0] + i * step));
          if (++terms == kFoldBlock) {
            total = combine(total, block);
            block = start;
            terms = 0;
          }
        }
      });
    }
    return combine(total, block);
  }
  static SKIVE_INLINE void wide(const float* x, float* y) {
    const Vec<kLanes> s = splat<kLanes>(Op::template identity<float>());
    const Four r = fold_columns(
        Four{s, s, s, s},
        [&](ptrdiff_t at) {
          const float* p = x + at;
          return Four{load(p), load(p + kLanes), load(p + 2 * kLanes), load(p + 3 * kLanes)};
        },
        [](const Four& p, const Four& q) { return combine(p, q); });
    finish(y, r.a);
    finish(y + kLanes, r.b);
    finish(y + 2 * kLanes, r.c);
    finish(y + 3 * kLanes, r.d);
  }
  template <ptrdiff_t W>
  static SKIVE_INLINE void column_tail(const float* x, float* y) {
    each_vector<W>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      finish(y + i, fold_columns(
                        splat<n>(Op::template identity<float>()),
                        [&](ptrdiff_t at) { return load<n>(x + at + i); },
                        [](Vec<n> p, Vec<n> q) { return Op::combine(p, q); }));
    });
  }
  template <int N>
  static SKIVE_INLINE void finish(float* y, Vec<N> r) {
    if constexpr (same_type<Op, Mean>)
      store(y, r / splat<N>(static_cast<float>(Reduced::size)));
    else
      store(y, Op::finish(r, Reduced::size));
  }
};

// y[outer, inner] = index along n of the largest (Largest) or smallest x[outer, n, inner]: the
// first, or the last (Last), of equals. A NaN counts as the extremum, as in NumPy.
// Of floats the extremum is found first, in vectors, and then its place: no branch depends on the data but one a row.
template <class T, ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t Inner, bool Largest, bool Last>
struct arg_extremum {
  static void run(const T* x, int64_t* y, Part part) {
    if constexpr (same_type<T, float> && Inner > 1) {
      constexpr ptrdiff_t blocks = (Inner + kLanes - 1) / kLanes;
      for (ptrdiff_t r = part_begin(Outer * blocks, part), end = part_end(Outer * blocks, part); r < end; ++r) {
        const ptrdiff_t outer = r / blocks, at = r % blocks * kLanes;
        const float* p = x + outer * N * Inner + at;
        int64_t* to = y + outer * Inner + at;
        if (Inner % kLanes == 0 || r % blocks != blocks - 1)
          columns<kLanes>(p, to);
        else
          columns<tail>(p, to);
      }
    } else {
      for (ptrdiff_t r = part_begin(Outer * Inner, part), end = part_end(Outer * Inner, part); r < end; ++r) {
        const T* p = x + r / Inner * N * Inner + r % Inner;
        if constexpr (same_type<T, float> && N >= 8)
          y[r] = row(p);
        else
          y[r] = step_by_step(p);
      }
    }
  }

 private:
  static constexpr int tail = Inner % kLanes != 0 ? static_cast<int>(Inner % kLanes) : 1;

  static SKIVE_INLINE ptrdiff_t step_by_step(const T* p) {
    ptrdiff_t best = 0;
    for (ptrdiff_t i = 1; i < N; ++i)
      if (beats(p[i * Inner], p[best * Inner])) best = i;
    return best;
  }
  static SKIVE_INLINE bool beats(T a, T b) {
    if (is_nan(b)) return Last && is_nan(a);
    if (is_nan(a) || (Last && a == b)) return true;
    return Largest ? a > b : a < b;
  }

  template <class V>
  static SKIVE_INLINE V further(V a, V b) {
    if constexpr (Largest) return Max::combine(a, b);
    else return Min::combine(a, b);
  }
  template <int L>
  static SKIVE_INLINE float across(Vec<L> a) {
    return Largest ? Max::across(a) : Min::across(a);
  }
  static SKIVE_INLINE ptrdiff_t row(const float* p) {
    const float top = fold_row<N>([&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(p + i); },
                                  [](auto a, auto b) { return further(a, b); }, [](auto a) { return across(a); });
    // Where there is a NaN, `top` is one.
    ptrdiff_t i = Last ? N - 1 : 0;
    while (!(p[i] == top || is_nan(p[i]))) i += Last ? -1 : 1;
    return i;
  }
  template <int L>
  static SKIVE_INLINE void columns(const float* p, int64_t* y) {
    Vec<L> top = load<L>(p);
    for (ptrdiff_t i = 1; i < N; ++i) top = further(top, load<L>(p + i * Inner));
    IVec<L> place = splat<L>(int32_t{0});
    for (ptrdiff_t k = 0; k < N; ++k) {  // what is found last stays
      const ptrdiff_t i = Last ? k : N - 1 - k;
      const Vec<L> v = load<L>(p + i * Inner);
      place = select(equal(v, top) | is_nan(v), splat<L>(static_cast<int32_t>(i)), place);
    }
    int32_t lanes[L];
    store(lanes, place);
    for (int i = 0; i < L; ++i) y[i] = lanes[i];
  }
};

// Running Sum or Prod of x[outer, n, inner] along n; Exclusive leaves the element itself out.
// Floats accumulate in double.
template <class Op, class T, ptrdiff_t Outer, ptrdiff_t N, ptrdiff_t Inner, bool Exclusive,
          bool Reverse>
struct scan {
  static void run(const T* x, T* y, Part part) {
    constexpr ptrdiff_t block = Inner < 64 ? Inner : 64,
                        blocks = Inner > 0 ? (Inner + block - 1) / block : 0;
    for (ptrdiff_t r = part_begin(Outer * blocks, part), end = part_end(Outer * blocks, part);
         r < end; ++r) {
      const ptrdiff_t c0 = r % blocks * block, width = c0 + block < Inner ? block : Inner - c0;
      const ptrdiff_t base = r / blocks * N * Inner + c0;
      Accumulator acc[block];
      for (ptrdiff_t c = 0; c < width; ++c) acc[c] = Op::template identity<Accumulator>();
      for (ptrdiff_t k = 0; k < N; ++k) {
        const ptrdiff_t at = base + (Reverse ? N - 1 - k : k) * Inner;
        for (ptrdiff_t c = 0; c < width; ++c) {
          const Accumulator before = acc[c];
          acc[c] = Op::combine(before, static_cast<Accumulator>(x[at + c]));
          y[at + c] = static_cast<T>(Exclusive ? before : acc[c]);
        }
      }
    }
  }

 private:
  template <class U, bool>
  struct accumulator {
    using type = U;
  };
  template <class U>
  struct accumulator<U, true> {
    using type = double;
  };
  using Accumulator = typename accumulator<T, is_float<T>>::type;
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_REDUCE_H
