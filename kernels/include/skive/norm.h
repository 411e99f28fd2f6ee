// Normalisations: of rows (layer_norm, rms_norm, l2_norm) and of groups of channels of an NHWC image
// (group_norm; one channel per group is instance normalisation). float32, several partial sums.
#ifndef SKIVE_NORM_H
#define SKIVE_NORM_H

#include "skive/row.h"
#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// y[0, N) = value(i, Lanes<n>), four vectors at a time, so that bytes fill a register.
template <ptrdiff_t N, class Y, class Value>
SKIVE_INLINE void write_row(Y* y, const Value& value) {
  constexpr ptrdiff_t block = 4 * kLanes, whole = N / block * block;
  for (ptrdiff_t i = 0; i < whole; i += block) {
    const auto at = [&](int k) __attribute__((always_inline)) { return value(i + k * kLanes, Lanes<kLanes>{}); };
    const auto a = at(0), b = at(1), c = at(2), d = at(3);
    if constexpr (!kRounded<decltype(a)>) store(y + i, a, b, c, d);
    else if constexpr (kJoins<Y>) store_joined(y + i, a, b, c, d);
    else store_row(y + i, a, b, c, d);
  }
  each_vector<N - whole>([&](ptrdiff_t i, auto lanes) { store(y + whole + i, value(whole + i, lanes)); });
}

// Calls measure(row) for a few rows and then finish(row, what it gave) for these: the roots and divisions of
// one row need not wait for what is written of the row before.
template <class Measure, class Finish>
SKIVE_INLINE void by_rows(ptrdiff_t begin, ptrdiff_t end, const Measure& measure, const Finish& finish) {
  constexpr ptrdiff_t kMost = 8;
  for (ptrdiff_t r = begin; r < end; r += kMost) {
    const ptrdiff_t count = end - r < kMost ? end - r : kMost;
    decltype(measure(r)) found[kMost];
    for (ptrdiff_t i = 0; i < count; ++i) found[i] = measure(r + i);
    for (ptrdiff_t i = 0; i < count; ++i) finish(r + i, found[i]);
  }
}

// y = epilogue((x - mean) / sqrt(variance + eps) * scale + bias, row, column) for each of Rows rows of N floats;
// scale and bias [N], bias may be null. The variance is that of the differences, read from cache.
template <ptrdiff_t Rows, ptrdiff_t N>
struct layer_norm {
  template <class Y, class E>
  static void run(const float* x, const float* scale, const float* bias, Y* y, Part part, float eps,
                  const E& epilogue) {
    if constexpr (N > 0) {
      if (bias)
        rows<true>(x, scale, bias, y, part, eps, epilogue);
      else
        rows<false>(x, scale, bias, y, part, eps, epilogue);
    }
  }

 private:
  struct Moments {
    float mean, factor;  // 1 / sqrt(variance + eps)
  };
  static SKIVE_INLINE Moments moments(const float* x, float eps) {
    const float mean =
        sum_row<N>([&](ptrdiff_t i, auto lanes) { return load<decltype(lanes)::count>(x + i); }) /
        N;
    const float square = sum_row<N>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      const Vec<n> d = load<n>(x + i) - splat<n>(mean);
      return d * d;
    });
    return {mean, 1.0f / sqrt_(square / N + eps)};
  }
  template <bool Bias, class Y, class E>
  static SKIVE_INLINE void rows(const float* x, const float* scale, const float* bias, Y* y, Part part, float eps,
                                const E& epilogue) {
    by_rows(
        part_begin(Rows, part), part_end(Rows, part), [&](ptrdiff_t r) { return moments(x + r * N, eps); },
        [&](ptrdiff_t r, Moments m) __attribute__((always_inline)) {
          write_row<N>(y + r * N, [&](ptrdiff_t i, auto lanes) __attribute__((always_inline)) {
            constexpr int n = decltype(lanes)::count;
            const Vec<n> v = (load<n>(x + r * N + i) - splat<n>(m.mean)) * splat<n>(m.factor);
            if constexpr (Bias)
              return epilogue(fma(v, load<n>(scale + i), load<n>(bias + i)), r, static_cast<int>(i));
            else
              return epilogue(v * load<n>(scale + i), r, static_cast<int>(i));
          });
        });
  }
};

template <ptrdiff_t N>
SKIVE_INLINE float sum_of_squares(const float* x) {
  return sum_row<N>([&](ptrdiff_t i, auto lanes) {
    const auto v = load<decltype(lanes)::count>(x + i);
    return v * v;
  });
}

// y = epilogue(x / sqrt(mean(x^2) + eps) * scale, row, column).
template <ptrdiff_t Rows, ptrdiff_t N>
struct rms_norm {
  template <class Y, class E>
  static void run(const float* x, const float* scale, Y* y, Part part, float eps, const E& epilogue) {
    if constexpr (N > 0) {
      by_rows(
          part_begin(Rows, part), part_end(Rows, part),
          [&](ptrdiff_t r) { return 1.0f / sqrt_(sum_of_squares<N>(x + r * N) / N + eps); },
          [&](ptrdiff_t r, float factor) __attribute__((always_inline)) {
            write_row<N>(y + r * N, [&](ptrdiff_t i, auto lanes) __attribute__((always_inline)) {
              constexpr int n = decltype(lanes)::count;
              return epilogue(load<n>(x + r * N + i) * splat<n>(factor) * load<n>(scale + i), r,
                              static_cast<int>(i));
            });
          });
    }
  }
};

// y = epilogue(x / max(sqrt(sum(x^2)), least), row, column).
template <ptrdiff_t Rows, ptrdiff_t N>
struct l2_norm {
  template <class Y, class E>
  static void run(const float* x, Y* y, Part part, float least, const E& epilogue) {
    if constexpr (N > 0) {
      by_rows(
          part_begin(Rows, part), part_end(Rows, part),
          [&](ptrdiff_t r) {
            const float length = sqrt_(sum_of_squares<N>(x + r * N));
            return 1.0f / (length < least ? least : length);
          },
          [&](ptrdiff_t r, float factor) __attribute__((always_inline)) {
            write_row<N>(y + r * N, [&](ptrdiff_t i, auto lanes) __attribute__((always_inline)) {
              constexpr int n = decltype(lanes)::count;
              return epilogue(load<n>(x + r * N + i) * splat<n>(factor), r, static_cast<int>(i));
            });
          });
    }
  }
};

// x, y [Images, Pixels, C]; each of Groups groups of C / Groups neighbouring channels is normalised over its channels
// and all pixels of its image: y = epilogue((x - mean) / sqrt(variance + eps) * scale + bias, pixel of all, channel);
// scale and bias [C], bias may be null. One worker takes whole groups, as many as fill some vectors.
template <ptrdiff_t Images, ptrdiff_t Pixels, ptrdiff_t C, ptrdiff_t Groups>
struct group_norm {
  static_assert(C % Groups == 0, "groups divide the channels");
  static constexpr ptrdiff_t width = C / Groups;

  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(2 * padded) * sizeof(float) * static_cast<size_t>(parts);
  }

  template <class Y, class E>
  static void run(const float* x, const float* scale, const float* bias, Y* y, void* scratch, Part part, float eps,
                  const E& epilogue) {
    float* const mean = static_cast<float*>(scratch) + part.index * 2 * padded;
    float* const factor = mean + padded;
    for (ptrdiff_t u = part_begin(Images * slices, part), end = part_end(Images * slices, part); u < end; ++u) {
      const ptrdiff_t first = u / slices * Pixels, c = u % slices * slice;
      const float* image = x + first * C + c;
      channel_sums(image, mean, [](auto v, ptrdiff_t) { return v; });
      share(mean, [](float sum) { return sum / (Pixels * width); });
      channel_sums(image, factor, [&](auto v, ptrdiff_t i) {
        const auto d = v - load<decltype(v)::lanes>(mean + i);
        return d * d;
      });
      share(factor, [&](float square) { return 1.0f / sqrt_(square / (Pixels * width) + eps); });
      each_vector<slice>([&](ptrdiff_t i, auto lanes) {
        constexpr int n = decltype(lanes)::count;
        store(factor + i, load<n>(factor + i) * load<n>(scale + c + i));
      });
      if (bias) write<true>(image, mean, factor, bias + c, y + first * C + c, first, c, epilogue);
      else write<false>(image, mean, factor, nullptr, y + first * C + c, first, c, epilogue);
    }
  }

 private:
  // Channels of a slice: the fewest whole groups that fill four vectors, or as many as there are; all channels
  // where groups and vectors do not meet.
  static constexpr ptrdiff_t slice_of() {
    for (ptrdiff_t n = width; n < C; n += width)
      if (C % n == 0 && n % kLanes == 0 && n >= 4 * kLanes) return n;
    return C;
  }
  static constexpr ptrdiff_t slice = slice_of(), slices = C / slice, padded = (slice + 15) / 16 * 16;

  // sums[i] = sum over pixels of f(x[p, i], i): blocks of 64 pixels, then the sum of those.
  template <class F>
  static SKIVE_INLINE void channel_sums(const float* x, float* sums, const F& f) {
    constexpr ptrdiff_t block = 4 * kLanes, whole = slice / block * block;
    for (ptrdiff_t i = 0; i < whole; i += block) {
      const auto four = [&](const float* p) __attribute__((always_inline)) {
        const auto at = [&](int k) __attribute__((always_inline)) {
          return f(load<kLanes>(p + k * kLanes), i + k * kLanes);
        };
        return Four{at(0), at(1), at(2), at(3)};
      };
      const Four total = sum_pixels(x + i, Four{}, four);
      store(sums + i, total.a);
      store(sums + i + kLanes, total.b);
      store(sums + i + 2 * kLanes, total.c);
      store(sums + i + 3 * kLanes, total.d);
    }
    each_vector<slice - whole>([&](ptrdiff_t i, auto lanes) {
      constexpr int n = decltype(lanes)::count;
      store(sums + whole + i, sum_pixels(x + whole + i, zero<n>(), [&](const float* p) { return f(load<n>(p), whole + i); }));
    });
  }
  struct Four {
    Vec<kLanes> a = zero<kLanes>(), b = a, c = a, d = a;
    friend SKIVE_INLINE Four operator+(const Four& p, const Four& q) {
      return {p.a + q.a, p.b + q.b, p.c + q.c, p.d + q.d};
    }
  };
  template <class V, class Value>
  static SKIVE_INLINE V sum_pixels(const float* x, V total, const Value& value) {
    for (ptrdiff_t p = 0; p < Pixels;) {
      V block = value(x + p++ * C);
      const ptrdiff_t end = p + 63 < Pixels ? p + 63 : Pixels;
      for (; p < end; ++p) block = block + value(x + p * C);
      total = total + block;
    }
    return total;
  }
  // Replaces each group's channels by f(their sum).
  template <class F>
  static SKIVE_INLINE void share(float* v, const F& f) {
    for (ptrdiff_t g = 0; g < slice; g += width) {
      float sum = 0;
      for (ptrdiff_t k = 0; k < width; ++k) sum += v[g + k];
      const float r = f(sum);
      for (ptrdiff_t k = 0; k < width; ++k) v[g + k] = r;
    }
  }
  template <bool Bias, class Y, class E>
  static SKIVE_INLINE void write(const float* x, const float* mean, const float* factor, const float* bias, Y* y,
                                 ptrdiff_t first, ptrdiff_t channel, const E& epilogue) {
    for (ptrdiff_t p = 0; p < Pixels; ++p)
      write_row<slice>(y + p * C, [&](ptrdiff_t i, auto lanes) __attribute__((always_inline)) {
        constexpr int n = decltype(lanes)::count;
        const Vec<n> d = load<n>(x + p * C + i) - load<n>(mean + i);
        Vec<n> v;
        if constexpr (Bias) v = fma(d, load<n>(factor + i), load<n>(bias + i));
        else v = d * load<n>(factor + i);
        return epilogue(v, first + p, static_cast<int>(channel + i));
      });
  }
};

// floor(sqrt(v)), one bit of the result at a time.
SKIVE_INLINE uint32_t integer_sqrt(uint64_t v) {
  uint64_t root = 0;
  for (uint64_t bit = uint64_t{1} << 62; bit != 0; bit >>= 2) {
    const bool fits = v >= root + bit;
    if (fits) v -= root + bit;
    root = (root >> 1) + (fits ? bit : 0);
  }
  return static_cast<uint32_t>(root);
}

// Layer normalisation of quantized values, 8 or 16 bits, without a float instruction. With u = x - x_zero,
// s and q the sums of u and of u^2 in a row, and s = 0 unless Centred (x / sqrt(mean(x^2)), as of rms_norm and l2_norm):
//   d = N u - s and v = N q - s^2 + eps        N (x - mean) and N^2 variance, exact in 64 bits
//   root = floor(sqrt(v 4^t)), t the largest with v 4^t < 2^62; r = floor(2^61 / root)
//   z = (d r + 2^(45 - t)) >> (46 - t)         (x - mean) / sqrt(variance) with 15 fraction bits
//   y = saturate(((z scale + (bias << (shift - 15)) + 2^(shift - 1)) >> shift) + zero)
// eps counts in units of N^2 times the square of x's scale and is at least 1; scale [N] is
// 2^(shift - 15) gamma / scale of y, bias [N] is 2^15 beta / scale of y, or both are one value if Uniform;
// 16 <= shift <= 46. Centred, x_zero does not matter and is 0. N < 2^15, of bytes 2^23, so that nothing overflows.
template <class T, class Y, ptrdiff_t Rows, ptrdiff_t N, bool Centred, bool Uniform>
struct integer_layer_norm {
  static_assert(N < (1 << (31 - 8 * sizeof(T))), "sums of squares times N stay below 2^62");

  static void run(const T* x, const int32_t* scale, const int32_t* bias, Y* y, Part part,
                  int64_t eps, int shift, int32_t x_zero, int32_t zero) {
    if constexpr (N > 0) {
      for (ptrdiff_t r = part_begin(Rows, part), end = part_end(Rows, part); r < end; ++r)
        row(x + r * N, scale, bias, y + r * N, eps, shift, x_zero, zero);
    }
  }

 private:
  static SKIVE_INLINE void row(const T* x, const int32_t* scale, const int32_t* bias, Y* y,
                               int64_t eps, int shift, int32_t x_zero, int32_t zero) {
    int64_t sum = 0, squares = 0;
    for (ptrdiff_t i = 0; i < N; ++i) {
      const int64_t v = x[i] - x_zero;
      if constexpr (Centred) sum += v;
      squares += v * v;
    }
    uint64_t variance = static_cast<uint64_t>(N * squares - sum * sum + eps);
    int t = 0;
    for (; variance < uint64_t{1} << 60; variance <<= 2) ++t;
    const int64_t inverse = (int64_t{1} << 61) / integer_sqrt(variance);
    const int64_t half = int64_t{1} << (45 - t);
    for (ptrdiff_t i = 0; i < N; ++i) {
      const int64_t z = ((int64_t{N} * (x[i] - x_zero) - sum) * inverse + half) >> (46 - t);
      const int64_t wide = z * scale[Uniform ? 0 : i] + bias[Uniform ? 0 : i] * (int64_t{1} << (shift - 15));
      const int64_t v = ((wide + (int64_t{1} << (shift - 1))) >> shift) + zero;
      constexpr int32_t low = limits<Y>::lowest, high = limits<Y>::highest;
      y[i] = static_cast<Y>(v < low ? low : v > high ? high : v);
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_NORM_H
