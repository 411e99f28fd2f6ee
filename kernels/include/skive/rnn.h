// Recurrent layers over a whole sequence, one direction: LSTM, GRU and the plain cell.
//
// Weights are transposed, w [I, G*H] and r [H, G*H], so that one step is a sum of rows: vectors run
// over the gates and nothing is reduced across lanes. bias [2, G*H].
#ifndef SKIVE_RNN_H
#define SKIVE_RNN_H

#include "skive/math.h"

namespace skive {
inline namespace SKIVE_ISA {

struct SigmoidGate {
  template <class V> static SKIVE_INLINE V of(V x) { return sigmoid(x); }
};
struct TanhGate {
  template <class V> static SKIVE_INLINE V of(V x) { return tanh_(x); }
};
struct ReluGate {
  template <class V> static SKIVE_INLINE V of(V x) { return relu(x); }
};
struct IdentityGate {
  template <class V> static SKIVE_INLINE V of(V x) { return x; }
};

// Calls f(vector tag of N lanes, first element) over [0, Count).
template <int N>
struct Lanes {
  static constexpr int value = N;
};
template <int Count, class F>
SKIVE_INLINE void for_lanes(const F& f) {
  int i = 0;
  for (; i + kLanes <= Count; i += kLanes) f(Lanes<kLanes>{}, i);
  if constexpr (Count % kLanes != 0) f(Lanes<Count % kLanes>{}, i);
}

// y[0..Count) = start + sum over k of x[k] * w[k * Row + ..].
template <int K, int Count, int Row, class Start>
SKIVE_INLINE void weighted_rows(const float* x, const float* w, float* y, const Start& start) {
  for_lanes<Count>([&](auto tag, int i) {
    constexpr int N = decltype(tag)::value;
    Vec<N> acc = start(tag, i);
    for (int k = 0; k < K; ++k) acc = fma(splat<N>(x[k]), load<N>(w + ptrdiff_t{k} * Row + i), acc);
    store(y + i, acc);
  });
}

// x [T, B, I], h0 and c0 [B, H], peep [3, H] or null; gates in the order i o f c.
// y [T, 2, B, H]: hidden state and cell of every step. scratch: 4 * H floats per part.
template <int T, int B, int I, int H, class F, class G, class Out>
struct lstm {
  static constexpr size_t scratch_bytes(int parts) { return sizeof(float) * 4 * H * static_cast<size_t>(parts); }

  static void run(const float* x, const float* w, const float* r, const float* bias, const float* h0,
                  const float* c0, const float* peep, float* y, void* scratch, Part part) {
    float* gates = static_cast<float*>(scratch) + ptrdiff_t{part.index} * 4 * H;
    for (ptrdiff_t b = part_begin(B, part), end = part_end(B, part); b < end; ++b) {
      const float* h = h0 + b * H;
      const float* c = c0 + b * H;
      for (int t = 0; t < T; ++t) {
        float* yh = y + (ptrdiff_t{t} * 2 * B + b) * H;
        float* yc = yh + ptrdiff_t{B} * H;
        weighted_rows<I, 4 * H, 4 * H>(x + (ptrdiff_t{t} * B + b) * I, w, gates, [&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          return load<N>(bias + i) + load<N>(bias + 4 * H + i);
        });
        weighted_rows<H, 4 * H, 4 * H>(h, r, gates, [&](auto tag, int i) { return load<decltype(tag)::value>(gates + i); });
        for_lanes<H>([&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          Vec<N> gi = load<N>(gates + i), go = load<N>(gates + H + i), gf = load<N>(gates + 2 * H + i);
          const Vec<N> old = load<N>(c + i);
          if (peep) {
            gi = fma(load<N>(peep + i), old, gi);
            gf = fma(load<N>(peep + 2 * H + i), old, gf);
          }
          const Vec<N> cell = F::of(gf) * old + F::of(gi) * G::of(load<N>(gates + 3 * H + i));
          if (peep) go = fma(load<N>(peep + H + i), cell, go);
          store(yc + i, cell);
          store(yh + i, F::of(go) * Out::of(cell));
        });
        h = yh;
        c = yc;
      }
    }
  }
};

// x [T, B, I], h0 [B, H]; gates in the order z r h; y [T, B, H]. ResetAfter: the reset gate
// multiplies the product with the recurrent weights, not the state. scratch: 5 * H floats per part.
template <int T, int B, int I, int H, class F, class G, bool ResetAfter>
struct gru {
  static constexpr size_t scratch_bytes(int parts) { return sizeof(float) * 5 * H * static_cast<size_t>(parts); }

  static void run(const float* x, const float* w, const float* r, const float* bias, const float* h0, float* y,
                  void* scratch, Part part) {
    float* gates = static_cast<float*>(scratch) + ptrdiff_t{part.index} * 5 * H;
    float* recurrent = gates + 3 * H;
    float* reset = gates + 4 * H;
    for (ptrdiff_t b = part_begin(B, part), end = part_end(B, part); b < end; ++b) {
      const float* h = h0 + b * H;
      for (int t = 0; t < T; ++t) {
        float* yh = y + (ptrdiff_t{t} * B + b) * H;
        weighted_rows<I, 3 * H, 3 * H>(x + (ptrdiff_t{t} * B + b) * I, w, gates,
                                       [&](auto tag, int i) { return load<decltype(tag)::value>(bias + i); });
        weighted_rows<H, 2 * H, 3 * H>(h, r, gates, [&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          return load<N>(gates + i) + load<N>(bias + 3 * H + i);
        });
        for_lanes<H>([&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          const Vec<N> gate = F::of(load<N>(gates + H + i));
          store(reset + i, ResetAfter ? gate : gate * load<N>(h + i));
        });
        weighted_rows<H, H, 3 * H>(ResetAfter ? h : reset, r + 2 * H, recurrent, [&](auto tag, int i) {
          return load<decltype(tag)::value>(bias + 5 * H + i);
        });
        for_lanes<H>([&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          const Vec<N> part_h = load<N>(recurrent + i);
          const Vec<N> candidate =
              G::of(load<N>(gates + 2 * H + i) + (ResetAfter ? load<N>(reset + i) * part_h : part_h));
          const Vec<N> z = F::of(load<N>(gates + i));
          store(yh + i, (splat<N>(1.0f) - z) * candidate + z * load<N>(h + i));
        });
        h = yh;
      }
    }
  }
};

// x [T, B, I], h0 [B, H]; y [T, B, H].
template <int T, int B, int I, int H, class F>
struct rnn {
  static void run(const float* x, const float* w, const float* r, const float* bias, const float* h0, float* y, Part part) {
    for (ptrdiff_t b = part_begin(B, part), end = part_end(B, part); b < end; ++b) {
      const float* h = h0 + b * H;
      for (int t = 0; t < T; ++t) {
        float* yh = y + (ptrdiff_t{t} * B + b) * H;
        weighted_rows<I, H, H>(x + (ptrdiff_t{t} * B + b) * I, w, yh, [&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          return load<N>(bias + i) + load<N>(bias + H + i);
        });
        weighted_rows<H, H, H>(h, r, yh, [&](auto tag, int i) { return load<decltype(tag)::value>(yh + i); });
        for_lanes<H>([&](auto tag, int i) {
          constexpr int N = decltype(tag)::value;
          store(yh + i, F::of(load<N>(yh + i)));
        });
        h = yh;
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_RNN_H
