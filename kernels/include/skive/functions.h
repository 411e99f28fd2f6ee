// Functions of fused elementwise expressions beyond arithmetic: exponentials, logarithms, trigonometry, powers and the
// activations made of them, for scalars and for `Vec<N>`, as math.h has the others.
//
// The scalar overloads call the C library (correctly rounded or within 1 ulp); the Vec overloads
// are polynomials, their measured errors are in tests/kernels/test_math.py.
//
// Polynomial coefficients are minimax fits (Lawson's iteratively reweighted least squares on
// Chebyshev nodes, C. L. Lawson, 1961) of the reduced function, rounded to float.
#ifndef SKIVE_FUNCTIONS_H
#define SKIVE_FUNCTIONS_H

#include "skive/math.h"

namespace skive {
inline namespace SKIVE_ISA {

// -------------------------------------------------------------------------------------- scalars

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

// -------------------------------------------------------------------------------------- vectors

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

// e^x = 2^n (1 + p), n in sixteenths: the rest of the exponent is below ln 2 / 32, where a short polynomial serves
// (after Tang, Table-driven implementation of the exponential function, 1989). The bits of `sum` end in 16 n.
template <int N>
struct SixteenthParts {
  Vec<N> sum, n, p;
};
template <int N>
SKIVE_INLINE SixteenthParts<N> sixteenth_parts(Vec<N> x) {
  const Vec<N> magic = splat<N>(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths
  const Vec<N> sum = fma(x, splat<N>(1.44269504f), magic), n = sum - magic;
  Vec<N> r = fma(n, splat<N>(-0.693359375f), x);
  r = fma(n, splat<N>(2.12194440e-4f), r);
  return {sum, n, fma(r * r, fma(r, splat<N>(0.16666667f), splat<N>(0.5f)), r)};
}
// 2^(k / 16).
alignas(64) inline constexpr float kSixteenths[16] = {
    1.0f, 1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f, 1.2968396f, 1.3542556f,
    1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f, 1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
// The same, less k 2^19 in their bits: 16 n, shifted so that it adds whole powers of two, adds that as well.
alignas(64) inline constexpr float kSixteenthsLess[16] = {
    1.0f, 0.99088687f, 0.9827539f, 0.9756443f, 0.96960354f, 0.9646789f, 0.9609198f, 0.9583778f,
    0.95710677f, 0.9571631f, 0.9586054f, 0.96149516f, 0.9658964f, 0.9718761f, 0.97950405f, 0.9888533f};

// x is clamped to [-105, 90], beyond which the result is 0 or infinity; NaN passes through.
template <int N>
SKIVE_INLINE Vec<N> exp_(Vec<N> x) {
  const auto e = sixteenth_parts(vmin(splat<N>(90.0f), vmax(splat<N>(-105.0f), x)));
  const Vec<N> t = entries<16>(kSixteenths, bits(e.sum));
  return scale_exponent(fma(e.p, t, t), floor_(e.n));
}
// e^x of |x| <= 87, where neither x nor the result leaves the normal numbers.
template <int N>
SKIVE_INLINE Vec<N> exp_normal(Vec<N> x) {
  const auto e = sixteenth_parts(x);
  const IVec<N> k = bits(e.sum);
  const Vec<N> t = from_bits(bits(entries<16>(kSixteenthsLess, k)) + shift_lanes_left<19>(k));
  return fma(e.p, t, t);
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

// Below -87 as at -87, 1.6e-38.
template <int N>
SKIVE_INLINE Vec<N> sigmoid(Vec<N> x) {
  const Vec<N> one = splat<N>(1.0f);
  return one / (one + exp_normal(-vmin(splat<N>(87.0f), vmax(splat<N>(-87.0f), x))));
}
template <int N>
SKIVE_INLINE Vec<N> silu(Vec<N> x) {
  const Vec<N> v = vmax(splat<N>(-87.0f), x);
  return v / (splat<N>(1.0f) + exp_normal(-vmin(splat<N>(87.0f), v)));
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
// clip(alpha x + beta, 0, 1). Product and sum are rounded one by one, on scalars too: a quantizer behind gives the same
// integers on every instruction set.
template <class T, class A, if_float<T> = 0>
SKIVE_INLINE T hard_sigmoid_(T x, A alpha, A beta) {
  return clip(x * static_cast<T>(alpha) + static_cast<T>(beta), T{0}, T{1});
}
template <int N, class A>
SKIVE_INLINE Vec<N> hard_sigmoid_(Vec<N> x, A alpha, A beta) {
  return clip(x * splat<N>(static_cast<float>(alpha)) + splat<N>(static_cast<float>(beta)), 0.0f, 1.0f);
}
template <class T>
SKIVE_INLINE T hard_swish_(T x) {
  return x * hard_sigmoid_(x, 1.0 / 6, 0.5);
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

#endif  // SKIVE_FUNCTIONS_H
