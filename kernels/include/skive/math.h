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
// Exponentials and what else takes more than a few instructions stand in functions.h.
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
// clip(alpha x + beta, 0, 1), with one rounding in vectors; artefacts call hard_sigmoid_ and hard_swish_ of functions.h.
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

// --------------------------------------------------------------------------- roots and roundings

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
template <int N>
SKIVE_INLINE Vec<N> reciprocal(Vec<N> x) {
  return splat<N>(1.0f) / x;
}
template <int N>
SKIVE_INLINE Vec<N> rsqrt(Vec<N> x) {
  return splat<N>(1.0f) / sqrt_(x);
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

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_MATH_H
