// Recurrent layers over a whole sequence, one direction (ONNX semantics; the caller runs the second
// direction on the reversed sequence).
//
//   x [T, N, I], w [G H, I], r [G H, H], bias [2, G H] (input, recurrent), h0 and c0 [N, H]
//   gates  LSTM i o f c,  GRU z r h,  RNN one
//
// The input's share of every gate is one matrix product over all T N rows before the loop; a step
// is then one product with the recurrent weights and one pass over the gates. Steps depend on each
// other, so one worker does the whole layer and the others return at once. Weights are transposed
// and packed into scratch at the start of `run` (Packed = false), or were packed like that when the
// model was compiled: blocks of `block` gates, [G H / block][I][block].
#ifndef SKIVE_RNN_H
#define SKIVE_RNN_H

#include "skive/functions.h"
#include "skive/matmul.h"

namespace skive {
inline namespace SKIVE_ISA {

// The activations by their names in the IR.
struct SigmoidFn {
  template <class V>
  static SKIVE_INLINE V apply(V x) {
    return sigmoid(x);
  }
};
struct TanhFn {
  template <class V>
  static SKIVE_INLINE V apply(V x) {
    return tanh_(x);
  }
};
struct ReluFn {
  template <class V>
  static SKIVE_INLINE V apply(V x) {
    return relu(x);
  }
};
struct IdentityFn {
  template <class V>
  static SKIVE_INLINE V apply(V x) {
    return x;
  }
};

// Gates per packed block: with one row per step, eight registers of chains hide the latency of the
// multiply-add; with more rows the tile of conv.h has chains enough.
constexpr int rnn_block(int gates, int rows) {
  const int wide = rows == 1 ? 8 * kLanes : 2 * kLanes;
  return gates < wide ? round_up(gates, kChannelQuantum) : wide;
}

// [Rows, K] times the transpose of w [G, K], plus bias.
template <int Rows, int K, int G, int LDX = K>
struct gate_product {
  static constexpr int block = rnn_block(G, Rows);
  using Pack = pack_panel<K, G, block, 1, K>;
  using Product = packed_product<Rows, K, G, block, LDX, G>;
  static constexpr ptrdiff_t weight_floats = Pack::floats;
  static constexpr ptrdiff_t bias_floats = Product::bias_count;
};

// Scratch of the steps of a recurrent layer, in floats, each at a multiple of 16.
template <int N, int H, int G>
struct StepShape {
  using Step = gate_product<N, H, G * H>;
  static constexpr ptrdiff_t gates = 0;
  static constexpr ptrdiff_t none = gates + round_up(N * G * H, 16);  // the bias of a product without one
  static constexpr ptrdiff_t none_size = Step::bias_floats;
  // Rows of states that lie whole pages apart are copied here by the products.
  static constexpr ptrdiff_t copy = none + none_size;
  static constexpr ptrdiff_t end = copy + product_copy(N, H, H);
};

// Scratch of a recurrent layer but for its steps.
template <int T, int N, int I, int H, int G, bool Packed>
struct RecurrentShape {
  using Input = gate_product<T * N, I, G * H>;
  using Step = gate_product<N, H, G * H>;
  static constexpr ptrdiff_t pre = 0;  // [T, N, G H]
  static constexpr ptrdiff_t bias = pre + round_up(T * N * G * H, 16);
  static constexpr ptrdiff_t w = bias + Input::bias_floats;
  static constexpr ptrdiff_t r = w + (Packed ? 0 : Input::weight_floats);
  static constexpr ptrdiff_t copy = r + (Packed ? 0 : Step::weight_floats);
  static constexpr ptrdiff_t end = copy + product_copy(T * N, I, I);
};

// y [T, 2, N, H]: h and c after each step. peephole [3 H] (i o f) or null. The inputs' share of the gates,
// biases included, is there: pre [T, N, 4 H].
template <int T, int N, int H, class F = SigmoidFn, class Cell = TanhFn, class Out = TanhFn>
struct lstm_steps {
  using S = StepShape<N, H, 4>;
  static constexpr size_t scratch_bytes(int = 1) { return static_cast<size_t>(S::end) * sizeof(float); }

  static void run(const float* pre, const float* r, const float* h0, const float* c0, const float* peephole,
                  float* y, void* scratch, Part part) {
    if (part.index != 0) return;
    float* const base = static_cast<float*>(scratch);
    clear_floats(base + S::none, S::none_size);
    const float* h = h0;
    const float* c = c0;
    for (int t = 0; t < T; ++t, pre += N * 4 * H) {
      float* const next_h = y + static_cast<ptrdiff_t>(t) * 2 * N * H;
      float* const next_c = next_h + N * H;
      S::Step::Product::run(h, r, base + S::none, base + S::gates, base + S::copy, Part{},
                            [=](auto v, ptrdiff_t row, int g) {
                              return v + load<decltype(v)::lanes>(pre + row * 4 * H + g);
                            });
      for (int n = 0; n < N; ++n) {
        const float* const gates = base + S::gates + n * 4 * H;
        if (peephole)
          step<true>(gates, c + n * H, peephole, next_h + n * H, next_c + n * H);
        else
          step<false>(gates, c + n * H, peephole, next_h + n * H, next_c + n * H);
      }
      h = next_h;
      c = next_c;
    }
  }

 private:
  template <bool Peephole>
  static SKIVE_NOINLINE void step(const float* gates, const float* c, const float* peephole,
                                  float* next_h, float* next_c) {
    each_vector<H>([&](ptrdiff_t u, auto lanes) {
      constexpr int l = decltype(lanes)::count;
      auto in = load<l>(gates + u), out = load<l>(gates + H + u),
           forget = load<l>(gates + 2 * H + u);
      const auto old = load<l>(c + u);
      if constexpr (Peephole) {
        in = fma(load<l>(peephole + u), old, in);
        forget = fma(load<l>(peephole + 2 * H + u), old, forget);
      }
      const auto cell =
          fma(F::apply(forget), old, F::apply(in) * Cell::apply(load<l>(gates + 3 * H + u)));
      if constexpr (Peephole) out = fma(load<l>(peephole + H + u), cell, out);
      store(next_c + u, cell);
      store(next_h + u, F::apply(out) * Out::apply(cell));
    });
  }
};

template <int T, int N, int I, int H, class F = SigmoidFn, class Cell = TanhFn, class Out = TanhFn,
          bool Packed = false>
struct lstm {
  using S = RecurrentShape<T, N, I, H, 4, Packed>;
  using Steps = lstm_steps<T, N, H, F, Cell, Out>;
  static constexpr size_t scratch_bytes(int = 1) {
    return static_cast<size_t>(S::end) * sizeof(float) + Steps::scratch_bytes();
  }

  static void run(const float* x, const float* w, const float* r, const float* bias,
                  const float* h0, const float* c0, const float* peephole, float* y, void* scratch,
                  Part part) {
    if (part.index != 0) return;
    float* const base = static_cast<float*>(scratch);
    float* const both = base + S::bias;
    clear_floats(both, S::Input::bias_floats);
    for (int g = 0; g < 4 * H; ++g) both[g] = bias[g] + bias[4 * H + g];
    if constexpr (!Packed) {
      S::Input::Pack::run(w, base + S::w);
      S::Step::Pack::run(r, base + S::r);
      w = base + S::w;
      r = base + S::r;
    }
    S::Input::Product::run(x, w, both, base + S::pre, base + S::copy, Part{},
                           [](auto v, ptrdiff_t, int) { return v; });
    Steps::run(base + S::pre, r, h0, c0, peephole, y, base + S::end, part);
  }
};

// y [T, N, H]. ResetAfter (linear_before_reset): the reset gate scales the recurrent product with its bias
// `candidate` [H] (`pre` has the other biases), else it scales the state before it. The recurrent weights
// are two panels: z and r, then h.
template <int T, int N, int H, class F = SigmoidFn, class Cell = TanhFn, bool ResetAfter = true>
struct gru_steps {
  using S = StepShape<N, H, 3>;
  using Gates = gate_product<N, H, 2 * H>;  // z and r
  using Candidate = gate_product<N, H, H>;  // h
  static constexpr ptrdiff_t hidden = S::end, scaled = hidden + round_up(N * H, 16),
                             candidate_bias = scaled + round_up(N * H, 16),
                             end = candidate_bias + Candidate::bias_floats;
  static constexpr size_t scratch_bytes(int = 1) { return static_cast<size_t>(end) * sizeof(float); }

  static void run(const float* pre, const float* r, const float* candidate, const float* h0, float* y,
                  void* scratch, Part part) {
    if (part.index != 0) return;
    float* const base = static_cast<float*>(scratch);
    clear_floats(base + S::none, S::none_size);
    clear_floats(base + candidate_bias, end - candidate_bias);
    for (int g = 0; g < H; ++g) base[candidate_bias + g] = candidate[g];
    const float* h = h0;
    for (int t = 0; t < T; ++t, h = y, y += N * H, pre += N * 3 * H) {
      float* const gates = base + S::gates;
      Gates::Product::run(h, r, base + S::none, gates, base + S::copy, Part{},
                          [=](auto v, ptrdiff_t row, int g) {
                            return F::apply(v + load<decltype(v)::lanes>(pre + row * 3 * H + g));
                          });
      const float* operand = h;
      if constexpr (!ResetAfter) {
        for (int n = 0; n < N; ++n)
          each_vector<H>([&](ptrdiff_t u, auto lanes) {
            constexpr int l = decltype(lanes)::count;
            store(base + scaled + n * H + u,
                  load<l>(gates + n * 2 * H + H + u) * load<l>(h + n * H + u));
          });
        operand = base + scaled;
      }
      Candidate::Product::run(operand, r + Gates::weight_floats, base + candidate_bias, base + hidden,
                              base + S::copy, Part{}, [](auto v, ptrdiff_t, int) { return v; });
      for (int n = 0; n < N; ++n)
        each_vector<H>([&](ptrdiff_t u, auto lanes) {
          constexpr int l = decltype(lanes)::count;
          auto rec = load<l>(base + hidden + n * H + u);
          if constexpr (ResetAfter) rec = rec * load<l>(gates + n * 2 * H + H + u);
          const auto fresh = Cell::apply(load<l>(pre + n * 3 * H + 2 * H + u) + rec);
          const auto z = load<l>(gates + n * 2 * H + u);
          store(y + n * H + u, fma(z, load<l>(h + n * H + u) - fresh, fresh));
        });
    }
  }
};

template <int T, int N, int I, int H, class F = SigmoidFn, class Cell = TanhFn,
          bool ResetAfter = false, bool Packed = false>
struct gru {
  using S = RecurrentShape<T, N, I, H, 3, Packed>;
  using Steps = gru_steps<T, N, H, F, Cell, ResetAfter>;
  // Two panels of recurrent weights.
  static constexpr ptrdiff_t r = S::end;
  static constexpr ptrdiff_t end =
      r + (Packed ? 0 : Steps::Gates::weight_floats + Steps::Candidate::weight_floats);
  static constexpr size_t scratch_bytes(int = 1) {
    return static_cast<size_t>(end) * sizeof(float) + Steps::scratch_bytes();
  }

  static void run(const float* x, const float* w, const float* weights, const float* bias,
                  const float* h0, float* y, void* scratch, Part part) {
    if (part.index != 0) return;
    float* const base = static_cast<float*>(scratch);
    float* const sum = base + S::bias;
    clear_floats(sum, S::Input::bias_floats);
    for (int g = 0; g < 2 * H; ++g) sum[g] = bias[g] + bias[3 * H + g];
    for (int g = 0; g < H; ++g) sum[2 * H + g] = bias[2 * H + g];
    if constexpr (!Packed) {
      S::Input::Pack::run(w, base + S::w);
      Steps::Gates::Pack::run(weights, base + r);
      Steps::Candidate::Pack::run(weights + 2 * H * H, base + r + Steps::Gates::weight_floats);
      w = base + S::w;
      weights = base + r;
    }
    S::Input::Product::run(x, w, sum, base + S::pre, base + S::copy, Part{},
                           [](auto v, ptrdiff_t, int) { return v; });
    Steps::run(base + S::pre, weights, bias + 5 * H, h0, y, base + end, part);
  }
};

// y [T, N, H] = F(w x + r h + bias).
template <int T, int N, int I, int H, class F = TanhFn, bool Packed = false>
struct rnn {
  using S = RecurrentShape<T, N, I, H, 1, Packed>;
  using Steps = StepShape<N, H, 1>;
  static constexpr size_t scratch_bytes(int = 1) {
    return static_cast<size_t>(S::end + Steps::end) * sizeof(float);
  }

  static void run(const float* x, const float* w, const float* r, const float* bias,
                  const float* h0, float* y, void* scratch, Part part) {
    if (part.index != 0) return;
    float* const base = static_cast<float*>(scratch);
    float* const both = base + S::bias;
    float* const steps = base + S::end;
    clear_floats(both, S::Input::bias_floats);
    clear_floats(steps + Steps::none, Steps::none_size);
    for (int g = 0; g < H; ++g) both[g] = bias[g] + bias[H + g];
    if constexpr (!Packed) {
      S::Input::Pack::run(w, base + S::w);
      S::Step::Pack::run(r, base + S::r);
      w = base + S::w;
      r = base + S::r;
    }
    S::Input::Product::run(x, w, both, base + S::pre, base + S::copy, Part{},
                           [](auto v, ptrdiff_t, int) { return v; });
    const float* h = h0;
    for (int t = 0; t < T; ++t, h = y, y += N * H) {
      const float* const pre = base + S::pre + static_cast<ptrdiff_t>(t) * N * H;
      S::Step::Product::run(h, r, steps + Steps::none, y, steps + Steps::copy, Part{},
                            [=](auto v, ptrdiff_t row, int g) {
                              return F::apply(v + load<decltype(v)::lanes>(pre + row * H + g));
                            });
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_RNN_H
