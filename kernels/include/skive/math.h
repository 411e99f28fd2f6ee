// Scalar functions of fused elementwise expressions, by the names of the IR's elementwise
// operations: one overload for scalars (float, double, every integer type, bool), one for
// `Vec<N>` and, where integers have the operation, one for `IVec<N>`, the int32 lanes into which
// integers of 8 and 16 bits are widened. A generic lambda over these names therefore serves the
// scalar loop and the vector loop.
//
// Meaning, everywhere:
//   integers   arithmetic wraps; x / 0 = 0, x mod 0 = 0, INT_MIN / -1 = INT_MIN, INT_MIN mod -1 =
//   0;
//              a shift count outside [0, width) shifts every bit out
//   floats     IEEE: NaN propagates through min, max, clip and relu; nothing is flushed
//   cast       float to integer truncates and then wraps as the conversion to int64 does; NaN and
//              values beyond int64 become INT64_MIN first (uint64 keeps [2^63, 2^64))
// The scalar overloads call the C library (correctly rounded or within 1 ulp); the Vec overloads
// are polynomials, their measured errors are in tests/kernels/test_math.py.
//
// Polynomial coefficients are minimax fits (Lawson's iteratively reweighted least squares on
// Chebyshev nodes, C. L. Lawson, 1961) of the reduced function, rounded to float.
#ifndef SKIVE_MATH_H
#define SKIVE_MATH_H

#include "skive/vec.h"

namespace skive {
inline namespace SKIVE_ISA {

// ---------------------------------------------------------------------------------- type traits

template <bool Condition, class T = int>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

template <class T>
constexpr bool is_number = false;
template <>
inline constexpr bool is_number<bool> = true;
template <>
inline constexpr bool is_number<int8_t> = true;
template <>
inline constexpr bool is_number<uint8_t> = true;
template <>
inline constexpr bool is_number<int16_t> = true;
template <>
inline constexpr bool is_number<uint16_t> = true;
template <>
inline constexpr bool is_number<int32_t> = true;
template <>
inline constexpr bool is_number<uint32_t> = true;
template <>
inline constexpr bool is_number<int64_t> = true;
template <>
inline constexpr bool is_number<uint64_t> = true;
template <>
inline constexpr bool is_number<float> = true;
template <>
inline constexpr bool is_number<double> = true;

template <class T>
constexpr bool is_float = same_type<T, float> || same_type<T, double>;
template <class T>
constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(0);

// Constrains an overload to scalars, or to floating-point scalars.
template <class T>
using if_number = typename enable_if<is_number<T>>::type;
template <class T>
using if_float = typename enable_if<is_float<T>>::type;

// The unsigned type in which arithmetic on T wraps without being promoted to a signed int.
template <size_t Bytes>
struct wrapping {
  using type = uint32_t;
};
template <>
struct wrapping<8> {
  using type = uint64_t;
};
template <class T>
using wrapping_t = typename wrapping<sizeof(T)>::type;

// The Vec type of an operation on A and B of which one is a Vec and the other a Vec or a float.
template <class A, class B>
struct lanes_of {};
template <int N>
struct lanes_of<Vec<N>, Vec<N>> {
  using type = Vec<N>;
};
template <int N>
struct lanes_of<Vec<N>, float> {
  using type = Vec<N>;
};
template <int N>
struct lanes_of<float, Vec<N>> {
  using type = Vec<N>;
};
template <int N>
struct lanes_of<IVec<N>, IVec<N>> {
  using type = IVec<N>;
};
template <int N>
struct lanes_of<IVec<N>, int32_t> {
  using type = IVec<N>;
};
template <int N>
struct lanes_of<int32_t, IVec<N>> {
  using type = IVec<N>;
};
// Integers that an IVec holds count as int32_t.
template <class T>
constexpr bool is_lane = same_type<T, int8_t> || same_type<T, uint8_t> || same_type<T, int16_t> ||
                         same_type<T, uint16_t> || same_type<T, int32_t>;
template <class T, bool Lane = is_lane<T>>
struct promoted {
  using type = T;
};
template <class T>
struct promoted<T, true> {
  using type = int32_t;
};
template <class A, class B>
using lanes_t = typename lanes_of<typename promoted<A>::type, typename promoted<B>::type>::type;
template <class V>
constexpr bool is_integer_vec = false;
template <int N>
constexpr bool is_integer_vec<IVec<N>> = true;

template <class V>
SKIVE_INLINE V widen(V a) {
  return a;
}
template <class V>
SKIVE_INLINE V widen(float a) {
  return splat<V::lanes>(a);
}
template <class V>
SKIVE_INLINE V widen(int32_t a) {
  return splat<V::lanes>(a);
}

// c[0] + x (c[1] + x (c[2] + ...)).
template <int N>
SKIVE_INLINE Vec<N> polynomial(Vec<N>, float c) {
  return splat<N>(c);
}
template <int N, class... C>
SKIVE_INLINE Vec<N> polynomial(Vec<N> x, float c, C... rest) {
  return fma(polynomial(x, rest...), x, splat<N>(c));
}

// f(a) lane by lane: the way out for arguments no polynomial covers.
template <int N, class F>
SKIVE_NOINLINE Vec<N> per_lane(Vec<N> a, F f) {
  float lane[N];
  store(lane, a);
  for (int i = 0; i < N; ++i) lane[i] = f(lane[i]);
  return load<N>(lane);
}
template <int N, class F>
SKIVE_NOINLINE Vec<N> per_lane(Vec<N> a, Vec<N> b, F f) {
  float lane[N], other[N];
  store(lane, a);
  store(other, b);
  for (int i = 0; i < N; ++i) lane[i] = f(lane[i], other[i]);
  return load<N>(lane);
}

// Four vectors to consecutive memory; isa/*.h has overloads for narrow integers.
template <class T, class V>
SKIVE_INLINE void store(T* p, V a, V b, V c, V d) {
  store(p, a);
  store(p + V::lanes, b);
  store(p + 2 * V::lanes, c);
  store(p + 3 * V::lanes, d);
}

// ----------------------------------------------------------------------------------- arithmetic

template <class T, if_number<T> = 0>
SKIVE_INLINE T add(T a, T b) {
  if constexpr (is_float<T>)
    return a + b;
  else
    return static_cast<T>(wrapping_t<T>(a) + wrapping_t<T>(b));
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T sub(T a, T b) {
  if constexpr (is_float<T>)
    return a - b;
  else
    return static_cast<T>(wrapping_t<T>(a) - wrapping_t<T>(b));
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T mul(T a, T b) {
  if constexpr (is_float<T>)
    return a * b;
  else
    return static_cast<T>(wrapping_t<T>(a) * wrapping_t<T>(b));
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T neg(T a) {
  if constexpr (is_float<T>)
    return -a;
  else
    return static_cast<T>(wrapping_t<T>(0) - wrapping_t<T>(a));
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T div_(T a, T b) {
  if constexpr (is_float<T>) {
    return a / b;
  } else {
    if (b == 0) return 0;
    if constexpr (is_signed<T>) {
      if (b == static_cast<T>(-1)) return neg(a);
    }
    return static_cast<T>(a / b);
  }
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V add(A a, B b) {
  return widen<V>(a) + widen<V>(b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V sub(A a, B b) {
  return widen<V>(a) - widen<V>(b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V mul(A a, B b) {
  return widen<V>(a) * widen<V>(b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V div_(A a, B b) {
  return widen<V>(a) / widen<V>(b);
}
template <int N>
SKIVE_INLINE Vec<N> neg(Vec<N> a) {
  return -a;
}
template <int N>
SKIVE_INLINE IVec<N> neg(IVec<N> a) {
  return -a;
}

// -------------------------------------------------------------------- comparison, logic, choice

template <class T, if_number<T> = 0>
SKIVE_INLINE bool less(T a, T b) {
  return a < b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool less_equal(T a, T b) {
  return a <= b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool greater(T a, T b) {
  return a > b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool greater_equal(T a, T b) {
  return a >= b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool equal_(T a, T b) {
  return a == b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool not_equal_(T a, T b) {
  return a != b;
}

template <int N>
SKIVE_INLINE Mask<N> less(Vec<N> a, float b) {
  return less(a, splat<N>(b));
}
template <int N>
SKIVE_INLINE Mask<N> less(float a, Vec<N> b) {
  return less(splat<N>(a), b);
}
template <int N>
SKIVE_INLINE Mask<N> less_equal(Vec<N> a, float b) {
  return less_equal(a, splat<N>(b));
}
template <int N>
SKIVE_INLINE Mask<N> less_equal(float a, Vec<N> b) {
  return less_equal(splat<N>(a), b);
}
template <int N>
SKIVE_INLINE Mask<N> less(IVec<N> a, int32_t b) {
  return less(a, splat<N>(b));
}
template <int N>
SKIVE_INLINE Mask<N> less(int32_t a, IVec<N> b) {
  return less(splat<N>(a), b);
}
template <int N>
SKIVE_INLINE Mask<N> less_equal(IVec<N> a, int32_t b) {
  return less_equal(a, splat<N>(b));
}
template <int N>
SKIVE_INLINE Mask<N> less_equal(int32_t a, IVec<N> b) {
  return less_equal(splat<N>(a), b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE Mask<V::lanes> greater(A a, B b) {
  return less(widen<V>(b), widen<V>(a));
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE Mask<V::lanes> greater_equal(A a, B b) {
  return less_equal(widen<V>(b), widen<V>(a));
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE Mask<V::lanes> equal_(A a, B b) {
  return equal(widen<V>(a), widen<V>(b));
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE Mask<V::lanes> not_equal_(A a, B b) {
  return not_equal(widen<V>(a), widen<V>(b));
}
template <int N>
SKIVE_INLINE Mask<N> equal_(Mask<N> a, Mask<N> b) {
  return !(a ^ b);
}
template <int N>
SKIVE_INLINE Mask<N> not_equal_(Mask<N> a, Mask<N> b) {
  return a ^ b;
}

// Logic on bool, stored as uint8_t 0 or 1.
template <class T, if_number<T> = 0>
SKIVE_INLINE bool and_(T a, T b) {
  return a != 0 && b != 0;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool or_(T a, T b) {
  return a != 0 || b != 0;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool xor_(T a, T b) {
  return (a != 0) != (b != 0);
}
template <class T, if_number<T> = 0>
SKIVE_INLINE bool not_(T a) {
  return a == 0;
}
// A bool read from storage is uint8_t, one just computed is bool: both may meet in one expression.
SKIVE_INLINE bool and_(bool a, uint8_t b) { return a && b != 0; }
SKIVE_INLINE bool and_(uint8_t a, bool b) { return a != 0 && b; }
SKIVE_INLINE bool or_(bool a, uint8_t b) { return a || b != 0; }
SKIVE_INLINE bool or_(uint8_t a, bool b) { return a != 0 || b; }
SKIVE_INLINE bool xor_(bool a, uint8_t b) { return a != (b != 0); }
SKIVE_INLINE bool xor_(uint8_t a, bool b) { return (a != 0) != b; }
template <int N>
SKIVE_INLINE Mask<N> and_(Mask<N> a, Mask<N> b) {
  return a & b;
}
template <int N>
SKIVE_INLINE Mask<N> or_(Mask<N> a, Mask<N> b) {
  return a | b;
}
template <int N>
SKIVE_INLINE Mask<N> xor_(Mask<N> a, Mask<N> b) {
  return a ^ b;
}
template <int N>
SKIVE_INLINE Mask<N> not_(Mask<N> a) {
  return !a;
}

template <class C, class T, if_number<C> = 0>
SKIVE_INLINE T where(C condition, T a, T b) {
  return condition != 0 ? a : b;
}
template <int N, class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V where(Mask<N> condition, A a, B b) {
  return select(condition, widen<V>(a), widen<V>(b));
}
template <int N>
SKIVE_INLINE Vec<N> where(Mask<N> condition, float a, float b) {
  return select(condition, splat<N>(a), splat<N>(b));
}
template <int N>
SKIVE_INLINE IVec<N> where(Mask<N> condition, int32_t a, int32_t b) {
  return select(condition, splat<N>(a), splat<N>(b));
}
template <int N>
SKIVE_INLINE Mask<N> where(Mask<N> condition, Mask<N> a, Mask<N> b) {
  return (condition & a) | (!condition & b);
}

template <class T, if_number<T> = 0>
SKIVE_INLINE bool is_nan(T a) {
  if constexpr (is_float<T>)
    return a != a;
  else
    return static_cast<void>(a), false;
}
template <int N>
SKIVE_INLINE Mask<N> is_nan(Vec<N> a) {
  return not_equal(a, a);
}
// Infinite, and of a wanted sign.
template <class T, if_number<T> = 0>
SKIVE_INLINE bool is_inf(T a, bool negative, bool positive) {
  if constexpr (is_float<T>) {
    const T inf = static_cast<T>(__builtin_inf());
    return (positive && a == inf) || (negative && a == -inf);
  } else {
    return static_cast<void>(a), static_cast<void>(negative), static_cast<void>(positive), false;
  }
}
template <int N>
SKIVE_INLINE Mask<N> is_inf(Vec<N> a, bool negative, bool positive) {
  const float inf = __builtin_inff(), nan = __builtin_nanf("");  // nothing equals NaN
  return equal(a, splat<N>(positive ? inf : nan)) | equal(a, splat<N>(negative ? -inf : nan));
}

// ------------------------------------------------------------------------------------------ cast

template <class To, class From, if_number<From> = 0>
SKIVE_INLINE To cast(From x) {
  if constexpr (same_type<To, bool>) {
    return x != 0;
  } else if constexpr (is_float<From> && !is_float<To>) {
    // Both bounds are exact in float and double; the comparisons are false for NaN.
    constexpr From low = -9223372036854775808.0f, high = 9223372036854775808.0f;
    if constexpr (same_type<To, uint64_t>) {
      if (x >= high && x < 2 * high) return static_cast<uint64_t>(x);
    }
    const int64_t wide = x >= low && x < high ? static_cast<int64_t>(x) : INT64_MIN;
    return static_cast<To>(static_cast<uint64_t>(wide));
  } else {
    return static_cast<To>(x);
  }
}
template <class To, int N>
SKIVE_INLINE auto cast(Vec<N> x) {
  static_assert(is_number<To> && (same_type<To, float> || same_type<To, bool>),
                "vectors hold float or bool");
  if constexpr (same_type<To, bool>)
    return not_equal(x, zero<N>());
  else
    return x;
}
// An integer of To's width, as an IVec holds it.
template <class To, int N>
SKIVE_INLINE IVec<N> wrap(IVec<N> x) {
  if constexpr (sizeof(To) == 4) {
    return x;
  } else if constexpr (is_signed<To>) {
    constexpr int unused = 32 - 8 * static_cast<int>(sizeof(To));
    return shift_lanes_right<unused>(shift_lanes_left<unused>(x));
  } else {
    return x & splat<N>((1 << 8 * sizeof(To)) - 1);
  }
}
template <class To, int N>
SKIVE_INLINE auto cast(IVec<N> x) {
  static_assert(same_type<To, float> || same_type<To, bool> || is_lane<To>,
                "vectors hold float, bool and integers of up to 32 bits");
  if constexpr (same_type<To, bool>)
    return not_equal(x, splat<N>(0));
  else if constexpr (same_type<To, float>)
    return to_float(x);
  else
    return wrap<To>(x);
}
template <class To, int N>
SKIVE_INLINE auto cast(Mask<N> x) {
  static_assert(same_type<To, float> || same_type<To, bool> || is_lane<To>,
                "vectors hold float, bool and integers of up to 32 bits");
  if constexpr (same_type<To, bool>)
    return x;
  else if constexpr (same_type<To, float>)
    return select(x, splat<N>(1.0f), zero<N>());
  else
    return select(x, splat<N>(1), splat<N>(0));
}

// The bits of x as another type of the same width.
template <class To, class From, if_number<From> = 0>
SKIVE_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation keeps the width");
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

// ------------------------------------------------------------------------------- integer functions

template <class T, if_number<T> = 0>
SKIVE_INLINE T bit_and(T a, T b) {
  return static_cast<T>(a & b);
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T bit_or(T a, T b) {
  return static_cast<T>(a | b);
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T bit_xor(T a, T b) {
  return static_cast<T>(a ^ b);
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T bit_not(T a) {
  return static_cast<T>(~a);
}
// A shift count outside [0, width) shifts every bit out: 0 remains, of a negative number shifted to
// the right -1.
template <class T, if_number<T> = 0>
SKIVE_INLINE T shift_left(T a, T b) {
  constexpr uint64_t width = 8 * sizeof(T);
  const uint64_t count = static_cast<uint64_t>(b);
  return count < width ? static_cast<T>(wrapping_t<T>(a) << count) : T{0};
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T shift_right(T a, T b) {
  constexpr uint64_t width = 8 * sizeof(T);
  const uint64_t count = static_cast<uint64_t>(b);
  return static_cast<T>(count < width ? a >> count : a < 0 ? -1 : 0);
}

template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V bit_and(A a, B b) {
  return widen<V>(a) & widen<V>(b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V bit_or(A a, B b) {
  return widen<V>(a) | widen<V>(b);
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V bit_xor(A a, B b) {
  return widen<V>(a) ^ widen<V>(b);
}
template <int N>
SKIVE_INLINE IVec<N> bit_not(IVec<N> a) {
  return a ^ splat<N>(-1);
}
template <int N>
SKIVE_INLINE IVec<N> shift_left(IVec<N> a, int32_t count) {
  return shift_left(a, splat<N>(count));
}
template <int N>
SKIVE_INLINE IVec<N> shift_right(IVec<N> a, int32_t count) {
  return shift_right(a, splat<N>(count));
}

// --------------------------------------------------------------- minimum, maximum, piecewise
// linear

template <class T, if_number<T> = 0>
SKIVE_INLINE T min_(T a, T b) {
  return a < b || is_nan(a) ? a : b;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T max_(T a, T b) {
  return a > b || is_nan(a) ? a : b;
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V min_(A a, B b) {
  const V x = widen<V>(a);
  if constexpr (is_integer_vec<V>)
    return vmin(x, widen<V>(b));
  else
    return select(is_nan(x), x, vmin(x, widen<V>(b)));  // vmin gives its second operand for NaN
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V max_(A a, B b) {
  const V x = widen<V>(a);
  if constexpr (is_integer_vec<V>)
    return vmax(x, widen<V>(b));
  else
    return select(is_nan(x), x, vmax(x, widen<V>(b)));
}

template <class T, if_number<T> = 0>
SKIVE_INLINE T abs_(T a) {
  if constexpr (same_type<T, float>)
    return __builtin_fabsf(a);
  else if constexpr (same_type<T, double>)
    return __builtin_fabs(a);
  else if constexpr (is_signed<T>)
    return a < 0 ? neg(a) : a;
  else
    return a;
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T sign(T a) {
  if (is_nan(a)) return a;
  if constexpr (is_signed<T>)
    return static_cast<T>((a > 0) - (a < 0));
  else
    return static_cast<T>(a != 0);
}
template <int N>
SKIVE_INLINE Vec<N> sign(Vec<N> a) {
  const Vec<N> up = select(less(zero<N>(), a), splat<N>(1.0f), zero<N>());
  const Vec<N> r = select(less(a, zero<N>()), splat<N>(-1.0f), up);
  return select(is_nan(a), a, r);
}

template <class T, if_number<T> = 0>
SKIVE_INLINE T relu(T a) {
  return a < T{0} ? T{0} : a;
}
template <int N>
SKIVE_INLINE Vec<N> relu(Vec<N> a) {
  return vmax(zero<N>(), a);
}
template <int N>
SKIVE_INLINE IVec<N> sign(IVec<N> a) {
  return vmin(vmax(a, splat<N>(-1)), splat<N>(1));
}
template <int N>
SKIVE_INLINE IVec<N> relu(IVec<N> a) {
  return vmax(a, splat<N>(0));
}
// min(max(x, lo), hi): hi where lo > hi.
template <class T, class L, if_number<T> = 0>
SKIVE_INLINE T clip(T x, L lo, L hi) {
  const T low = static_cast<T>(lo), high = static_cast<T>(hi);
  const T r = x < low ? low : x;
  return r > high ? high : r;
}
template <int N, class L>
SKIVE_INLINE Vec<N> clip(Vec<N> x, L lo, L hi) {
  const Vec<N> r = vmax(widen<Vec<N>>(static_cast<float>(lo)), x);
  return vmin(splat<N>(static_cast<float>(hi)), r);
}
template <int N, class L>
SKIVE_INLINE IVec<N> clip(IVec<N> x, L lo, L hi) {
  const IVec<N> r = vmax(x, splat<N>(static_cast<int32_t>(lo)));
  return vmin(r, splat<N>(static_cast<int32_t>(hi)));
}
template <class T, class A, if_number<T> = 0>
SKIVE_INLINE T leaky_relu(T x, A alpha) {
  return x < T{0} ? static_cast<T>(alpha) * x : x;
}
template <int N>
SKIVE_INLINE Vec<N> leaky_relu(Vec<N> x, double alpha) {
  return select(less(x, zero<N>()), x * splat<N>(static_cast<float>(alpha)), x);
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T prelu(T x, T slope) {
  return x < T{0} ? mul(slope, x) : x;
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V prelu(A a, B slope) {
  const V x = widen<V>(a);
  return select(less(x, zero<V::lanes>()), x * widen<V>(slope), x);
}
template <class T, class A, if_number<T> = 0>
SKIVE_INLINE T thresholded_relu(T x, A alpha) {
  return x > static_cast<T>(alpha) ? x : T{0};
}
template <int N>
SKIVE_INLINE Vec<N> thresholded_relu(Vec<N> x, double alpha) {
  return select(less(splat<N>(static_cast<float>(alpha)), x), x, zero<N>());
}
// clip(alpha x + beta, 0, 1).
template <class T, class A, if_float<T> = 0>
SKIVE_INLINE T hard_sigmoid(T x, A alpha, A beta) {
  return clip(static_cast<T>(alpha) * x + static_cast<T>(beta), T{0}, T{1});
}
template <int N, class A>
SKIVE_INLINE Vec<N> hard_sigmoid(Vec<N> x, A alpha, A beta) {
  return clip(fma(x, splat<N>(static_cast<float>(alpha)), splat<N>(static_cast<float>(beta))), 0.0f,
              1.0f);
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T hard_swish(T x) {
  return x * hard_sigmoid(x, 1.0 / 6, 0.5);
}
template <int N>
SKIVE_INLINE Vec<N> hard_swish(Vec<N> x) {
  return x * hard_sigmoid(x, 1.0 / 6, 0.5);
}
// x + bias below -lambd, x - bias above lambd, 0 between (NaN stays NaN).
template <class T, class A, if_number<T> = 0>
SKIVE_INLINE T shrink(T x, A bias, A lambd) {
  if (static_cast<double>(x) < -static_cast<double>(lambd)) return add(x, static_cast<T>(bias));
  if (static_cast<double>(x) > static_cast<double>(lambd)) return sub(x, static_cast<T>(bias));
  return is_nan(x) ? x : T{0};
}
template <int N, class A>
SKIVE_INLINE Vec<N> shrink(Vec<N> x, A bias, A lambd) {
  const Vec<N> b = splat<N>(static_cast<float>(bias)), l = splat<N>(static_cast<float>(lambd));
  const Vec<N> r = select(less(l, x), x - b, select(is_nan(x), x, zero<N>()));
  return select(less(x, -l), x + b, r);
}

// --------------------------------------------------------------------------------- quantization

template <class T>
struct limits;
template <>
struct limits<int8_t> {
  static constexpr int32_t lowest = INT8_MIN, highest = INT8_MAX;
};
template <>
struct limits<uint8_t> {
  static constexpr int32_t lowest = 0, highest = UINT8_MAX;
};
template <>
struct limits<int16_t> {
  static constexpr int32_t lowest = INT16_MIN, highest = INT16_MAX;
};
template <>
struct limits<uint16_t> {
  static constexpr int32_t lowest = 0, highest = UINT16_MAX;
};
template <>
struct limits<int32_t> {
  static constexpr int32_t lowest = INT32_MIN, highest = INT32_MAX;
};

// float(a) for |a| < 2^22 by integer arithmetic, which compilers fold where a is constant; they do
// not fold the conversion instruction.
template <int N>
SKIVE_INLINE Vec<N> small_to_float(IVec<N> a) {
  const Vec<N> magic = splat<N>(12582912.0f);  // 1.5 * 2^23: the integer lies in the low bits
  return from_bits(bits(magic) + a) - magic;
}

// round_even(v) + zero within the range of T; NaN gives the lowest value. The limits, less the zero
// point, are integers, so clamping before rounding is the same and keeps the conversion in range.
template <class T, int N>
SKIVE_INLINE IVec<N> saturate(Vec<N> v, IVec<N> zero) {
  const Vec<N> low = small_to_float(splat<N>(limits<T>::lowest) - zero);
  const Vec<N> high = small_to_float(splat<N>(limits<T>::highest) - zero);
  return round_to_int(vmin(vmax(v, low), high)) + zero;
}
template <class T>
SKIVE_INLINE T saturate(float v, int32_t zero) {
  const float low = static_cast<float>(limits<T>::lowest - zero);
  const float high = static_cast<float>(limits<T>::highest - zero);
  const float inside = v > low ? v < high ? v : high : low;  // low for NaN
  const float big = __builtin_copysignf(8388608.0f, inside);  // 2^23: no room for a fraction
  return static_cast<T>(static_cast<int32_t>((inside + big) - big) + zero);
}

// x times the factor of a rounding: a multiplication that reports tell from others by its name.
template <class X, class S>
SKIVE_INLINE auto scaled(X x, S factor) {
  return mul(x, factor);
}

// x / divisor to a unit in the last place, |x| clipped to 2^20 divisor: one correction of x * reciprocal by
// what it leaves over (P. Markstein, Computation of elementary functions on the IBM RISC System/6000 processor,
// 1990), in a third of the time of a division.
template <int N>
SKIVE_INLINE Vec<N> quotient(Vec<N> x, float divisor, float reciprocal) {
  const float most = divisor * 1048576.0f;
  x = vmin(splat<N>(most), vmax(splat<N>(-most), x));  // NaN stays
  if constexpr (kFusedMultiplyAdd) {
    const Vec<N> factor = splat<N>(reciprocal), q = x * factor;
    return fma(fma(q, splat<N>(-divisor), x), factor, q);
  } else {
    return x / splat<N>(divisor);
  }
}

// saturate(round_even(x / scale) + zero), ONNX QuantizeLinear. x is float, scale and zero constants
// or per lane.
template <class T, int N, class S, class Z>
SKIVE_INLINE IVec<N> quantize(Vec<N> x, S scale, Z zero) {
  return saturate<T>(x / widen<Vec<N>>(scale), widen<IVec<N>>(zero));
}
template <class T>
SKIVE_INLINE T quantize(float x, float scale, int32_t zero) {
  return saturate<T>(x / scale, zero);
}

// The same for a constant scale > 0 for which compiler/division.py has shown that `quotient` rounds to the
// same integers as x / scale. `reciprocal` is 1 / scale, rounded.
template <class T, int N>
SKIVE_INLINE IVec<N> quantize_by(Vec<N> x, float scale, float reciprocal, int32_t zero) {
  return saturate<T>(quotient(x, scale, reciprocal), splat<N>(zero));
}

// float(q - zero) * scale, the difference in 32 bits, ONNX DequantizeLinear.
template <int N, class S, class Z>
SKIVE_INLINE Vec<N> dequantize(IVec<N> q, S scale, Z zero) {
  return to_float(q - widen<IVec<N>>(zero)) * widen<Vec<N>>(scale);
}
SKIVE_INLINE float dequantize(int32_t q, float scale, int32_t zero) {
  return static_cast<float>(sub(q, zero)) * scale;
}

// float(sum) * factor of sums 0 <= sum < 2^23 that come as `x` = sum + the bits of 2^23, which are the bits of
// 2^23 + sum; `offset` is -2^23 factor. Down to -2^23 the result is not positive.
template <int N, class S, class O>
SKIVE_INLINE Vec<N> scaled_sum(IVec<N> x, S factor, O offset) {
  const Vec<N> shifted = from_bits(x), by = widen<Vec<N>>(factor);
  if constexpr (kFusedMultiplyAdd) return fma(shifted, by, widen<Vec<N>>(offset));
  else return (shifted - splat<N>(8388608.0f)) * by;
}

// saturate(round_even(float(x) * factor) + zero); x is int32 or float.
template <class T, int N, class S, class Z>
SKIVE_INLINE IVec<N> requantize(Vec<N> x, S factor, Z zero) {
  return saturate<T>(x * widen<Vec<N>>(factor), widen<IVec<N>>(zero));
}
template <class T, int N, class S, class Z>
SKIVE_INLINE IVec<N> requantize(IVec<N> x, S factor, Z zero) {
  return requantize<T>(to_float(x), factor, zero);
}
template <class T, class X, if_number<X> = 0>
SKIVE_INLINE T requantize(X x, float factor, int32_t zero) {
  return saturate<T>(static_cast<float>(x) * factor, zero);
}

// saturate(((int64(x) * multiplier + 2^(shift-1)) >> shift) + zero), 1 <= shift <= 62: no float
// instruction.
template <class T, int N, class M, class S, class Z>
SKIVE_INLINE IVec<N> requantize_fixed(IVec<N> x, M multiplier, S shift, Z zero) {
  return scale_fixed(x, widen<IVec<N>>(multiplier), widen<IVec<N>>(shift), widen<IVec<N>>(zero),
                     limits<T>::lowest, limits<T>::highest);
}
template <class T>
SKIVE_INLINE T requantize_fixed(int32_t x, int32_t multiplier, int32_t shift, int32_t zero) {
  const int64_t sum = int64_t{x} * multiplier + (int64_t{1} << (shift - 1));
  const int64_t y = (sum >> shift) + zero;
  constexpr int32_t low = limits<T>::lowest, high = limits<T>::highest;
  return static_cast<T>(y < low ? low : y > high ? high : y);
}

// log2(max(x, 1)) in units of 2^-24, by repeated squaring: each square is cut to 31 fraction bits, and whether it
// reached 2 is the next bit of the logarithm.
SKIVE_INLINE int32_t log2_fixed(int32_t x) {
  const uint32_t v = x < 1 ? 1 : static_cast<uint32_t>(x);
  const int zeros = __builtin_clz(v);
  uint64_t mantissa = uint64_t{v} << zeros;
  uint32_t y = static_cast<uint32_t>(31 - zeros);
  for (int i = 0; i < 24; ++i) {
    mantissa = mantissa * mantissa >> 31;
    const uint32_t bit = static_cast<uint32_t>(mantissa >> 32);
    mantissa >>= bit;
    y = 2 * y + bit;
  }
  return static_cast<int32_t>(y);
}

// ---------------------------------------------------------------------------- scalar C library

// One line per function: `f` for float, `d` for double, inlined into one `if constexpr`.
template <class T, class F, class D>
SKIVE_INLINE T by_type(T x, F f, D d) {
  if constexpr (same_type<T, double>)
    return static_cast<void>(f), d(x);
  else
    return static_cast<void>(d), static_cast<T>(f(static_cast<float>(x)));
}

template <class T, if_float<T> = 0>
SKIVE_INLINE T sqrt_(T x) {
  return by_type(
      x, [](float v) { return __builtin_sqrtf(v); }, [](double v) { return __builtin_sqrt(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T exp_(T x) {
  return by_type(
      x, [](float v) { return __builtin_expf(v); }, [](double v) { return __builtin_exp(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T log_(T x) {
  return by_type(
      x, [](float v) { return __builtin_logf(v); }, [](double v) { return __builtin_log(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T sin_(T x) {
  return by_type(
      x, [](float v) { return __builtin_sinf(v); }, [](double v) { return __builtin_sin(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T cos_(T x) {
  return by_type(
      x, [](float v) { return __builtin_cosf(v); }, [](double v) { return __builtin_cos(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T tan_(T x) {
  return by_type(
      x, [](float v) { return __builtin_tanf(v); }, [](double v) { return __builtin_tan(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T asin_(T x) {
  return by_type(
      x, [](float v) { return __builtin_asinf(v); }, [](double v) { return __builtin_asin(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T acos_(T x) {
  return by_type(
      x, [](float v) { return __builtin_acosf(v); }, [](double v) { return __builtin_acos(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T atan_(T x) {
  return by_type(
      x, [](float v) { return __builtin_atanf(v); }, [](double v) { return __builtin_atan(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T sinh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_sinhf(v); }, [](double v) { return __builtin_sinh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T cosh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_coshf(v); }, [](double v) { return __builtin_cosh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T tanh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_tanhf(v); }, [](double v) { return __builtin_tanh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T asinh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_asinhf(v); }, [](double v) { return __builtin_asinh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T acosh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_acoshf(v); }, [](double v) { return __builtin_acosh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T atanh_(T x) {
  return by_type(
      x, [](float v) { return __builtin_atanhf(v); }, [](double v) { return __builtin_atanh(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T erf_(T x) {
  return by_type(
      x, [](float v) { return __builtin_erff(v); }, [](double v) { return __builtin_erf(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T expm1_(T x) {
  return by_type(
      x, [](float v) { return __builtin_expm1f(v); }, [](double v) { return __builtin_expm1(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T log1p_(T x) {
  return by_type(
      x, [](float v) { return __builtin_log1pf(v); }, [](double v) { return __builtin_log1p(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T floor_(T x) {
  return by_type(
      x, [](float v) { return __builtin_floorf(v); }, [](double v) { return __builtin_floor(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T ceil_(T x) {
  return by_type(
      x, [](float v) { return __builtin_ceilf(v); }, [](double v) { return __builtin_ceil(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T trunc_(T x) {
  return by_type(
      x, [](float v) { return __builtin_truncf(v); }, [](double v) { return __builtin_trunc(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T round_even(T x) {
  return by_type(
      x, [](float v) { return __builtin_rintf(v); }, [](double v) { return __builtin_rint(v); });
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T reciprocal(T x) {
  return T{1} / x;
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T rsqrt(T x) {
  return T{1} / sqrt_(x);
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T sigmoid(T x) {
  const T e = exp_(-abs_(x));
  return (x < T{0} ? e : T{1}) / (T{1} + e);
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T silu(T x) {
  return x * sigmoid(x);
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T gelu(T x) {
  return T{0.5} * x * (T{1} + erf_(x * static_cast<T>(0.70710678118654752440)));
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T gelu_tanh(T x) {
  const T inner =
      static_cast<T>(0.79788456080286535588) * (x + static_cast<T>(0.044715) * x * x * x);
  return T{0.5} * x * (T{1} + tanh_(inner));
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T softplus(T x) {
  return max_(x, T{0}) + log1p_(exp_(-abs_(x)));
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T softsign(T x) {
  return x / (T{1} + abs_(x));
}
template <class T, if_float<T> = 0>
SKIVE_INLINE T mish(T x) {
  return x * tanh_(softplus(x));
}
template <class T, class A, if_float<T> = 0>
SKIVE_INLINE T elu(T x, A alpha) {
  return x > T{0} ? x : static_cast<T>(alpha) * expm1_(x);
}
template <class T, class A, if_float<T> = 0>
SKIVE_INLINE T selu(T x, A alpha, A gamma) {
  return static_cast<T>(gamma) * elu(x, alpha);
}
template <class T, class A, if_float<T> = 0>
SKIVE_INLINE T celu(T x, A alpha) {
  return x > T{0} ? x : static_cast<T>(alpha) * expm1_(x / static_cast<T>(alpha));
}

// Remainder with the sign of the dividend (fmod_) or of the divisor (mod_, as in Python).
template <class T, if_number<T> = 0>
SKIVE_INLINE T fmod_(T a, T b) {
  if constexpr (same_type<T, float>) {
    return __builtin_fmodf(a, b);
  } else if constexpr (same_type<T, double>) {
    return __builtin_fmod(a, b);
  } else {
    if (b == 0) return 0;
    if constexpr (is_signed<T>) {
      if (b == static_cast<T>(-1)) return 0;
    }
    return static_cast<T>(a % b);
  }
}
template <class T, if_number<T> = 0>
SKIVE_INLINE T mod_(T a, T b) {
  const T r = fmod_(a, b);
  if constexpr (is_float<T>) {
    if (r == 0) return b < 0 ? -abs_(r) : abs_(r);
    return (r < 0) != (b < 0) ? r + b : r;
  } else {
    return r != 0 && (r < 0) != (b < 0) ? static_cast<T>(r + b) : r;
  }
}
// a to the power b in the type of a. An integer base wraps; with a negative exponent it gives what
// truncating the real result gives (0 to the negative: 0).
template <class T, class E, if_number<T> = 0, if_number<E> = 0>
SKIVE_INLINE T pow_(T a, E b) {
  if constexpr (same_type<T, float> && same_type<E, float>) {
    return __builtin_powf(a, b);
  } else if constexpr (is_float<T> || is_float<E>) {
    return cast<T>(__builtin_pow(static_cast<double>(a), static_cast<double>(b)));
  } else {
    if (b < 0) {
      if (a == 1) return 1;
      if constexpr (is_signed<T>) {
        if (a == static_cast<T>(-1)) return static_cast<T>(b % 2 == 0 ? 1 : -1);
      }
      return 0;
    }
    T result = 1;
    for (uint64_t e = static_cast<uint64_t>(b); e != 0; e >>= 1) {
      if (e & 1) result = mul(result, a);
      a = mul(a, a);
    }
    return result;
  }
}

// ------------------------------------------------------------------------------- vector functions

template <int N>
SKIVE_INLINE Vec<N> reciprocal(Vec<N> x) {
  return splat<N>(1.0f) / x;
}
template <int N>
SKIVE_INLINE Vec<N> rsqrt(Vec<N> x) {
  return splat<N>(1.0f) / sqrt_(x);
}

// |a| with the sign of b.
template <int N>
SKIVE_INLINE Vec<N> copysign_(Vec<N> a, Vec<N> b) {
  return from_bits((bits(a) & splat<N>(0x7fffffff)) | (bits(b) & splat<N>(INT32_MIN)));
}

// e^x as mantissa and exponent: e^x = (1 + tail) 2^n, |tail| < 0.42. x is clamped to [-105, 90],
// beyond which the result is 0 or infinity; NaN passes through.
template <int N>
struct ExpParts {
  Vec<N> tail, n;
};
template <int N>
SKIVE_INLINE ExpParts<N> exp_parts(Vec<N> x) {
  x = vmin(splat<N>(90.0f), vmax(splat<N>(-105.0f), x));
  const Vec<N> magic = splat<N>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<N> n = fma(x, splat<N>(1.44269504f), magic) - magic;
  // ln 2 in two parts, the first of 9 bits so that n times it is exact.
  Vec<N> r = fma(n, splat<N>(-0.693359375f), x);
  r = fma(n, splat<N>(2.12194440e-4f), r);
  const Vec<N> p =
      polynomial(r, 0.5f, 0.16666666f, 0.04166628f, 0.0083335042f, 0.0013945752f, 0.00019789266f);
  return {fma(r * r, p, r), n};
}
template <int N>
SKIVE_INLINE Vec<N> exp_(Vec<N> x) {
  const ExpParts<N> e = exp_parts(x);
  return scale_exponent(e.tail + splat<N>(1.0f), e.n);
}
// e^x - 1 without cancellation near 0: 2^n tail + (2^n - 1).
template <int N>
SKIVE_INLINE Vec<N> expm1_(Vec<N> x) {
  const ExpParts<N> e = exp_parts(x);
  const Vec<N> two_n = scale_exponent(splat<N>(1.0f), vmin(splat<N>(127.0f), e.n));
  const Vec<N> r = fma(two_n, e.tail, two_n - splat<N>(1.0f));
  return select(less(splat<N>(88.0f), x), exp_(x), select(equal(x, zero<N>()), x, r));
}

template <int N>
SKIVE_INLINE Vec<N> log_(Vec<N> x) {
  const Mask<N> tiny = less(x, splat<N>(1.17549435e-38f));  // subnormal: scale by 2^23 first
  const Vec<N> normal = select(tiny, x * splat<N>(8388608.0f), x);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const IVec<N> offset = splat<N>(0x3f3504f3);
  const IVec<N> i = bits(normal) - offset;
  const Vec<N> e = to_float(shift_lanes_right<23>(i)) - select(tiny, splat<N>(23.0f), zero<N>());
  const Vec<N> f = from_bits((i & splat<N>(0x007fffff)) + offset) - splat<N>(1.0f);
  const Vec<N> p = polynomial(f, 0.33333313f, -0.25000009f, 0.20002119f, -0.16667996f, 0.14219551f,
                              -0.12405591f, 0.11888175f, -0.11675641f, 0.067466013f);
  const Vec<N> square = f * f;
  Vec<N> r = square * f * p;
  r = fma(e, splat<N>(-2.12194440e-4f), r);
  r = fma(square, splat<N>(-0.5f), r) + f;
  r = fma(e, splat<N>(0.693359375f), r);
  const Vec<N> inf = splat<N>(__builtin_inff());
  const Vec<N> low = select(equal(x, zero<N>()), -inf, splat<N>(__builtin_nanf("")));
  return select(equal(x, inf), inf, select(less(zero<N>(), x), r, low));
}
// log(1 + x): the rounding error of 1 + x is divided back in (W. Kahan's correction), unless 1 + x
// is so large that it does not count.
template <int N>
SKIVE_INLINE Vec<N> log1p_(Vec<N> x) {
  const Vec<N> u = x + splat<N>(1.0f), l = log_(u);
  const Vec<N> r = l + (x - (u - splat<N>(1.0f))) / u;
  const Mask<N> corrected = less(zero<N>(), u) & less(u, splat<N>(3e38f));
  return select(less(abs_(x), splat<N>(1e-7f)), x, select(corrected, r, l));
}

// Odd rational approximation x P(x^2) / Q(x^2) on [-9.02, 9.02], where tanh rounds to 1.
template <int N>
SKIVE_INLINE Vec<N> tanh_(Vec<N> x) {
  const Vec<N> v = vmin(splat<N>(9.02f), vmax(splat<N>(-9.02f), x)), t = v * v;
  const Vec<N> p = polynomial(t, 1.0f, 0.136799127f, 0.00386832468f, 2.80073926e-05f,
                              3.05848573e-08f, -1.22033297e-11f);
  const Vec<N> q =
      polynomial(t, 1.0f, 0.470132440f, 0.0272458270f, 0.000393862545f, 1.28735969e-06f);
  const Vec<N> y = v * p / q, one = splat<N>(1.0f);
  return vmin(one, vmax(-one, y));
}
// As tanh_, on [-3.95, 3.95].
template <int N>
SKIVE_INLINE Vec<N> erf_(Vec<N> x) {
  const Vec<N> v = vmin(splat<N>(3.95f), vmax(splat<N>(-3.95f), x)), t = v * v;
  const Vec<N> p = polynomial(t, 1.12837923f, 0.185168996f, 0.0542748086f, 0.00384337455f,
                              0.000377938850f, 4.64048753e-06f, -1.29673273e-08f);
  const Vec<N> q = polynomial(t, 1.0f, 0.497435153f, 0.113911018f, 0.0154437330f, 0.00130406616f,
                              6.26930123e-05f);
  const Vec<N> y = v * p / q, one = splat<N>(1.0f);
  return vmin(one, vmax(-one, y));
}

template <int N>
SKIVE_INLINE Vec<N> sigmoid(Vec<N> x) {
  const Vec<N> one = splat<N>(1.0f), e = exp_(-abs_(x));  // never overflows
  return select(less(x, zero<N>()), e, one) / (one + e);
}
template <int N>
SKIVE_INLINE Vec<N> silu(Vec<N> x) {
  return x * sigmoid(x);
}
template <int N>
SKIVE_INLINE Vec<N> gelu(Vec<N> x) {
  const Vec<N> half = x * splat<N>(0.5f);
  return fma(half, erf_(x * splat<N>(0.707106781f)), half);
}
template <int N>
SKIVE_INLINE Vec<N> gelu_tanh(Vec<N> x) {
  const Vec<N> half = x * splat<N>(0.5f);
  const Vec<N> inner = x * fma(x * x, splat<N>(0.0356774081f), splat<N>(0.797884561f));
  return fma(half, tanh_(inner), half);
}
template <int N>
SKIVE_INLINE Vec<N> softplus(Vec<N> x) {
  return vmax(zero<N>(), x) + log1p_(exp_(-abs_(x)));
}
template <int N>
SKIVE_INLINE Vec<N> softsign(Vec<N> x) {
  return x / (splat<N>(1.0f) + abs_(x));
}
// tanh(softplus(x)) = w / (w + 2), w = e^x (e^x + 2); 1 in float from x = 20 on.
template <int N>
SKIVE_INLINE Vec<N> mish(Vec<N> x) {
  const Vec<N> e = exp_(vmin(splat<N>(20.0f), x)), two = splat<N>(2.0f), w = e * (e + two);
  return x * (w / (w + two));
}
template <int N>
SKIVE_INLINE Vec<N> elu(Vec<N> x, double alpha) {
  const Vec<N> low = splat<N>(static_cast<float>(alpha)) * expm1_(vmin(zero<N>(), x));
  return select(less(zero<N>(), x), x, low);
}
template <int N>
SKIVE_INLINE Vec<N> selu(Vec<N> x, double alpha, double gamma) {
  return splat<N>(static_cast<float>(gamma)) * elu(x, alpha);
}
template <int N>
SKIVE_INLINE Vec<N> celu(Vec<N> x, double alpha) {
  const Vec<N> a = splat<N>(static_cast<float>(alpha));
  return select(less(zero<N>(), x), x, a * expm1_(vmin(zero<N>(), x) / a));
}

// Quadrant and remainder: x = n pi/2 + r, |r| <= pi/4. pi/2 in four parts, the first three of 11
// bits so that n times them is exact for |n| < 2^13, the limit of kTrigLimit.
constexpr float kTrigLimit = 10000.0f;
template <int N>
struct TrigParts {
  Vec<N> sine, cosine;  // of r
  IVec<N> quadrant;
};
template <int N>
SKIVE_INLINE TrigParts<N> trig_parts(Vec<N> x) {
  const Vec<N> magic = splat<N>(12582912.0f);
  const Vec<N> shifted = fma(x, splat<N>(0.636619772f), magic), n = shifted - magic;
  Vec<N> r = fma(n, splat<N>(-1.5703125f), x);
  r = fma(n, splat<N>(-4.837512969970703e-4f), r);
  r = fma(n, splat<N>(-7.549533620476723e-8f), r);
  r = fma(n, splat<N>(-2.563344e-12f), r);
  const Vec<N> t = r * r;
  const Vec<N> s = polynomial(t, -0.166666672f, 0.00833332911f, -0.000198393042f, 2.71804652e-06f);
  const Vec<N> c = polynomial(t, 0.0416666679f, -0.00138888834f, 2.47994521e-05f, -2.72050443e-07f);
  return {fma(t * r, s, r), fma(t * t, c, fma(t, splat<N>(-0.5f), splat<N>(1.0f))), bits(shifted)};
}
template <int N>
SKIVE_INLINE Mask<N> odd(IVec<N> a) {
  return equal(to_float(a & splat<N>(1)), splat<N>(1.0f));
}
template <int N>
SKIVE_INLINE Vec<N> flip_sign_by_bit1(Vec<N> a, IVec<N> q) {
  return from_bits(bits(a) ^ shift_lanes_left<30>(q & splat<N>(2)));
}
template <int N>
SKIVE_INLINE Vec<N> sin_(Vec<N> x) {
  const TrigParts<N> t = trig_parts(x);
  Vec<N> y = flip_sign_by_bit1(select(odd(t.quadrant), t.cosine, t.sine), t.quadrant);
  y = select(equal(x, zero<N>()), x, y);  // keeps -0
  if (__builtin_expect(any(less(splat<N>(kTrigLimit), abs_(x))), 0))
    y = per_lane(x, [](float v) { return __builtin_sinf(v); });
  return y;
}
template <int N>
SKIVE_INLINE Vec<N> cos_(Vec<N> x) {
  const TrigParts<N> t = trig_parts(x);
  const IVec<N> q = t.quadrant + splat<N>(1);
  Vec<N> y = flip_sign_by_bit1(select(odd(t.quadrant), t.sine, t.cosine), q);
  if (__builtin_expect(any(less(splat<N>(kTrigLimit), abs_(x))), 0))
    y = per_lane(x, [](float v) { return __builtin_cosf(v); });
  return y;
}
template <int N>
SKIVE_INLINE Vec<N> tan_(Vec<N> x) {
  const TrigParts<N> t = trig_parts(x);
  const Mask<N> swap = odd(t.quadrant);
  Vec<N> y = select(swap, -t.cosine, t.sine) / select(swap, t.sine, t.cosine);
  y = select(equal(x, zero<N>()), x, y);
  if (__builtin_expect(any(less(splat<N>(kTrigLimit), abs_(x))), 0))
    y = per_lane(x, [](float v) { return __builtin_tanf(v); });
  return y;
}

template <int N>
SKIVE_INLINE Vec<N> atan_(Vec<N> x) {
  const Vec<N> a = abs_(x), one = splat<N>(1.0f);
  const Mask<N> invert = less(one, a);
  const Vec<N> z = select(invert, -one / a, a), t = z * z;  // atan(a) = pi/2 + atan(-1/a)
  const Vec<N> p =
      polynomial(t, -0.333332986f, 0.199985489f, -0.142642409f, 0.109521851f, -0.0840344802f,
                 0.0579575486f, -0.0311777983f, 0.0109145781f, -0.00179361505f);
  const Vec<N> y = fma(z * t, p, z);
  return copysign_(select(invert, splat<N>(1.57079637f) + y, y), x);
}
// asin(t) for t in [0, 1/2], given z = t^2.
template <int N>
SKIVE_INLINE Vec<N> asin_half(Vec<N> t, Vec<N> z) {
  const Vec<N> p = polynomial(z, 0.166666597f, 0.0750050396f, 0.0445169583f, 0.0318076909f,
                              0.0144387009f, 0.0375163257f);
  return fma(t * z, p, t);
}
template <int N>
SKIVE_INLINE Vec<N> asin_(Vec<N> x) {
  const Vec<N> a = abs_(x), half = splat<N>(0.5f);
  const Mask<N> upper = less(half, a);  // asin(a) = pi/2 - 2 asin(sqrt((1 - a) / 2))
  const Vec<N> z = select(upper, (splat<N>(1.0f) - a) * half, a * a);
  const Vec<N> y = asin_half(select(upper, sqrt_(z), a), z);
  return copysign_(select(upper, fma(y, splat<N>(-2.0f), splat<N>(1.57079637f)), y), x);
}
template <int N>
SKIVE_INLINE Vec<N> acos_(Vec<N> x) {
  const Vec<N> a = abs_(x), half = splat<N>(0.5f), pi_2 = splat<N>(1.57079637f);
  const Mask<N> upper = less(half, a), negative = less(x, zero<N>());
  const Vec<N> z = select(upper, (splat<N>(1.0f) - a) * half, a * a);
  const Vec<N> y = asin_half(select(upper, sqrt_(z), a), z), twice = y + y;
  const Vec<N> outer = select(negative, splat<N>(3.14159274f) - twice, twice);
  return select(upper, outer, select(negative, pi_2 + y, pi_2 - y));
}

// The polynomial of the integer n in [Lowest, Lowest + Segments) that is nearest to x, of x - n: sum over k of
// table[k * Segments + n mod Segments] (x - n)^k. Every operation is rounded on its own, so that all
// targets give the same bits. The table is 64-byte aligned.
template <int Lowest, int Segments, int Degree, int N>
SKIVE_INLINE Vec<N> piecewise(Vec<N> x, const float* table) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the lowest bits of a sum are those of n
  const Vec<N> sum = vmin(vmax(x + splat<N>(kMagic), splat<N>(kMagic + Lowest)),
                          splat<N>(kMagic + (Lowest + Segments - 1)));
  const Vec<N> r = x - (sum - splat<N>(kMagic));
  const IVec<N> n = bits(sum);
  Vec<N> y = entries<Segments>(table + Degree * Segments, n);
  for (int k = Degree - 1; k >= 0; --k) y = y * r + entries<Segments>(table + k * Segments, n);
  return y;
}
template <int Lowest, int Segments, int Degree>
SKIVE_INLINE float piecewise(float x, const float* table) {
  float y;
  store(&y, piecewise<Lowest, Segments, Degree>(splat<1>(x), table));
  return y;
}

// e^|x| / 2, finite for every x whose hyperbolic sine is.
template <int N>
SKIVE_INLINE Vec<N> half_exp(Vec<N> x) {
  const ExpParts<N> e = exp_parts(abs_(x));
  return scale_exponent(e.tail + splat<N>(1.0f), e.n - splat<N>(1.0f));
}
template <int N>
SKIVE_INLINE Vec<N> sinh_(Vec<N> x) {
  const Vec<N> h = half_exp(x), t = x * x;
  const Vec<N> large = copysign_(h - splat<N>(0.25f) / h, x);
  const Vec<N> p = polynomial(t, 0.166666672f, 0.00833334960f, 0.000198361595f, 2.81695111e-06f);
  return select(less(abs_(x), splat<N>(1.0f)), fma(x * t, p, x), large);
}
template <int N>
SKIVE_INLINE Vec<N> cosh_(Vec<N> x) {
  const Vec<N> h = half_exp(x);
  return h + splat<N>(0.25f) / h;
}
template <int N>
SKIVE_INLINE Vec<N> asinh_(Vec<N> x) {
  const Vec<N> a = abs_(x), t = a * a, one = splat<N>(1.0f);
  const Vec<N> small = log1p_(a + t / (one + sqrt_(t + one)));
  const Vec<N> large = log_(a) + splat<N>(0.693147181f);  // from 1e9 on a^2 swamps the 1
  return copysign_(select(less(a, splat<N>(1e9f)), small, large), x);
}
template <int N>
SKIVE_INLINE Vec<N> acosh_(Vec<N> x) {
  const Vec<N> t = x - splat<N>(1.0f);
  const Vec<N> small = log1p_(t + sqrt_(t + t + t * t));
  const Vec<N> large = log_(x) + splat<N>(0.693147181f);
  const Vec<N> r = select(less(splat<N>(1e9f), x), large, small);
  return select(less(x, splat<N>(1.0f)), splat<N>(__builtin_nanf("")), r);
}
template <int N>
SKIVE_INLINE Vec<N> atanh_(Vec<N> x) {
  const Vec<N> a = abs_(x), one = splat<N>(1.0f);
  const Vec<N> r = splat<N>(0.5f) * log1p_((a + a) / (one - a));
  return copysign_(r, x);
}

template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V fmod_(A a, B b) {
  return per_lane(widen<V>(a), widen<V>(b), [](float x, float y) { return fmod_(x, y); });
}
template <class A, class B, class V = lanes_t<A, B>>
SKIVE_INLINE V mod_(A a, B b) {
  return per_lane(widen<V>(a), widen<V>(b), [](float x, float y) { return mod_(x, y); });
}
template <int N>
SKIVE_INLINE Vec<N> pow_(Vec<N> a, Vec<N> b) {
  return per_lane(a, b, [](float x, float y) { return __builtin_powf(x, y); });
}
template <int N>
SKIVE_INLINE Vec<N> pow_(float a, Vec<N> b) {
  return pow_(splat<N>(a), b);
}
// A constant exponent folds to the few operations it stands for.
template <int N>
SKIVE_INLINE Vec<N> pow_(Vec<N> a, float b) {
  if (b == 2.0f) return a * a;
  if (b == 3.0f) return a * a * a;
  if (b == 1.0f) return a;
  if (b == -1.0f) return splat<N>(1.0f) / a;
  return pow_(a, splat<N>(b));
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_MATH_H
