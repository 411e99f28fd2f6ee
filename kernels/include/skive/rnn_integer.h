// The steps of a recurrent layer on 8-bit recurrent weights (ops/recurrence.py has the meaning). The
// inputs' share `pre` of the gates is computed beforehand, by a product that can be shared by workers.
//
//   pre [T, N, G H], h0 and c0 [N, H], scale [G H]; r [G H, H] and bias as pack_conv2d_u8 and pack_bias_i32
//   make them for the zero point 128, K padded to a multiple of four by zeros
//
// At each step a row of h becomes bytes round_even(h 127 / max |h|) + 128, times r exactly in 32 bits. All
// else is float32, every operation correctly rounded and none a fused multiply-add: all targets give the
// same bits. Steps depend on each other: one worker does the whole layer and the others return at once.
#ifndef SKIVE_RNN_INTEGER_H
#define SKIVE_RNN_INTEGER_H

#include "skive/conv.h"
#include "skive/row.h"

namespace skive {
inline namespace SKIVE_ISA {

// 2^x, relative error 2e-7 (minimax); x is held to -125 to 125, NaN becomes -125.
template <int N>
SKIVE_INLINE Vec<N> exact_exponential(Vec<N> x) {
  x = vmin(vmax(x, splat<N>(-125.0f)), splat<N>(125.0f));
  const Vec<N> n = round_even(x), f = x - n;
  Vec<N> p = splat<N>(0.0013276472454890609f);
  p = p * f + splat<N>(0.009675540961325169f);
  p = p * f + splat<N>(0.05550713092088699f);
  p = p * f + splat<N>(0.24022120237350464f);
  p = p * f + splat<N>(0.6931469440460205f);
  p = p * f + splat<N>(1.0000001192092896f);
  return scale_exponent(p, n);
}
template <int N>
SKIVE_INLINE Vec<N> exact_sigmoid(Vec<N> x) {
  const Vec<N> one = splat<N>(1.0f);
  return one / (one + exact_exponential(x * splat<N>(-1.442695041f)));
}
template <int N>
SKIVE_INLINE Vec<N> exact_tanh(Vec<N> x) {
  const Vec<N> one = splat<N>(1.0f);
  return one - splat<N>(2.0f) / (one + exact_exponential(x * splat<N>(2.885390082f)));
}

// h [N, H] times the transpose of r [G, H]: gates [N, G]. NB: channels of a packed block.
template <int N, int H, int G, int NB>
struct quantized_gates {
  static constexpr int K = round_up(H, 4);
  // Whole cache lines, but not of a page.
  static constexpr int kRow = round_up(K, 64) % 4096 == 0 ? round_up(K, 64) + 64 : round_up(K, 64);
  using Product = conv2d<Image<1, 1, N, K>, Kernel<G, 1, 1>, Stride<1, 1>, Pad<0, 0, 0, 0>, Dilation<1, 1>,
                         NB, kRow, G, uint8_t, 128>;
  static_assert(Product::scratch_bytes() == 0, "rows do not lie pages apart");
  // Scratch: bytes of h, a step for each row, gates.
  static constexpr ptrdiff_t steps = ptrdiff_t{N} * kRow, gates = steps + round_up(N, 16) * 4;
  static constexpr ptrdiff_t bytes = gates + (ptrdiff_t{N} * G * 4 + 63) / 64 * 64;

  static SKIVE_INLINE float* gates_of(void* scratch) {
    return reinterpret_cast<float*>(static_cast<char*>(scratch) + gates);
  }
  static SKIVE_INLINE void clear(void* scratch) {
    __builtin_memset(scratch, 128, static_cast<size_t>(ptrdiff_t{N} * kRow));
  }
  static SKIVE_NOINLINE void run(const float* h, const int8_t* r, const int32_t* bias, const float* scale,
                                 void* scratch) {
    uint8_t* const rows = static_cast<uint8_t*>(scratch);
    float* const step = reinterpret_cast<float*>(rows + steps);
    for (int n = 0; n < N; ++n) {
      const float* const from = h + n * H;
      uint8_t* const to = rows + n * kRow;
      const float top =
          max_row<H>([&](ptrdiff_t u, auto lanes) { return abs_(load<decltype(lanes)::count>(from + u)); });
      const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;  // of less it may be infinite
      step[n] = top / 127.0f;
      each_vector<H>([&](ptrdiff_t u, auto lanes) {
        constexpr int l = decltype(lanes)::count;
        store(to + u, round_to_int(load<l>(from + u) * splat<l>(inverse)) + splat<l>(128));
      });
    }
    Product::run(rows, r, bias, gates_of(scratch), nullptr, Part{},
                 [=](auto acc, ptrdiff_t row, int g) __attribute__((always_inline)) {
                   constexpr int l = decltype(acc)::lanes;
                   return to_float(acc) * (load<l>(scale + g) * splat<l>(step[row]));
                 });
  }
};

// y [T, 2, N, H]: h and c after each step. Gates i o f c.
template <int T, int N, int H, int NB>
struct quantized_lstm {
  using Gates = quantized_gates<N, H, 4 * H, NB>;
  static constexpr size_t scratch_bytes(int = 1) { return static_cast<size_t>(Gates::bytes); }

  static void run(const float* pre, const int8_t* r, const int32_t* bias, const float* scale, const float* h0,
                  const float* c0, float* y, void* scratch, Part part) {
    if (part.index != 0) return;
    Gates::clear(scratch);
    const float *h = h0, *c = c0;
    for (int t = 0; t < T; ++t, pre += N * 4 * H, y += 2 * N * H) {
      Gates::run(h, r, bias, scale, scratch);
      for (int n = 0; n < N; ++n)
        step(pre + n * 4 * H, Gates::gates_of(scratch) + n * 4 * H, c + n * H, y + n * H, y + (N + n) * H);
      h = y;
      c = y + N * H;
    }
  }

 private:
  static SKIVE_NOINLINE void step(const float* pre, const float* gates, const float* c, float* next_h,
                                  float* next_c) {
    each_vector<H>([&](ptrdiff_t u, auto lanes) {
      constexpr int l = decltype(lanes)::count;
      const auto gate = [&](int k) __attribute__((always_inline)) {
        return load<l>(pre + k * H + u) + load<l>(gates + k * H + u);
      };
      const auto cell = exact_sigmoid(gate(2)) * load<l>(c + u) + exact_sigmoid(gate(0)) * exact_tanh(gate(3));
      store(next_c + u, cell);
      store(next_h + u, exact_sigmoid(gate(1)) * exact_tanh(cell));
    });
  }
};

// y [T, N, H]. Gates z r h; the reset gate scales the recurrent product and its bias `candidate` [H].
template <int T, int N, int H, int NB>
struct quantized_gru {
  using Gates = quantized_gates<N, H, 3 * H, NB>;
  static constexpr size_t scratch_bytes(int = 1) { return static_cast<size_t>(Gates::bytes); }

  static void run(const float* pre, const int8_t* r, const int32_t* bias, const float* scale,
                  const float* candidate, const float* h0, float* y, void* scratch, Part part) {
    if (part.index != 0) return;
    Gates::clear(scratch);
    const float* h = h0;
    for (int t = 0; t < T; ++t, pre += N * 3 * H, h = y, y += N * H) {
      Gates::run(h, r, bias, scale, scratch);
      for (int n = 0; n < N; ++n)
        step(pre + n * 3 * H, Gates::gates_of(scratch) + n * 3 * H, candidate, h + n * H, y + n * H);
    }
  }

 private:
  static SKIVE_NOINLINE void step(const float* pre, const float* gates, const float* candidate, const float* h,
                                  float* y) {
    each_vector<H>([&](ptrdiff_t u, auto lanes) {
      constexpr int l = decltype(lanes)::count;
      const auto z = exact_sigmoid(load<l>(pre + u) + load<l>(gates + u));
      const auto reset = exact_sigmoid(load<l>(pre + H + u) + load<l>(gates + H + u));
      const auto rec = load<l>(gates + 2 * H + u) + load<l>(candidate + u);
      const auto fresh = exact_tanh(load<l>(pre + 2 * H + u) + reset * rec);
      store(y + u, fresh + z * (load<l>(h + u) - fresh));
    });
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_RNN_INTEGER_H
