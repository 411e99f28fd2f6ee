// Batched matrix product of two operands that are known only at run time.
//
// Each item of work is one matrix of the batch times one panel of columns: the panel is packed into
// scratch ([columns / NB][K][NB], as conv.h reads its weights) and the 1x1 convolution of conv.h
// does the rest. A product of few rows reads its right operand once, so it is not worth packing.
#ifndef SKIVE_MATMUL_H
#define SKIVE_MATMUL_H

#include "skive/conv.h"
#include "skive/row.h"

namespace skive {
inline namespace SKIVE_ISA {

// Channels per packed block for `columns` columns: two registers, or all if that is at most three.
constexpr int panel_block(int columns) {
  return columns <= 3 * kLanes ? round_up(columns, kChannelQuantum) : 2 * kLanes;
}

// Copies the K x N matrix b[k * row_stride + n * column_stride] to blocks of NB columns.
template <int K, int N, int NB, ptrdiff_t RowStride, ptrdiff_t ColumnStride>
struct pack_panel {
  static constexpr int kBlocks = div_up(N, NB);
  static constexpr int kLast = N - (kBlocks - 1) * NB;
  // Floats, with the fill to 64 bytes.
  static constexpr ptrdiff_t floats =
      (static_cast<ptrdiff_t>(K) * ((kBlocks - 1) * NB + round_up(kLast, kChannelQuantum)) + 15) /
      16 * 16;

  static void run(const float* b, float* to) {
    for (int i = 0; i < kBlocks - 1; ++i) {
      block<NB>(b + i * NB * ColumnStride, to);
      to += static_cast<ptrdiff_t>(K) * NB;
    }
    block<kLast>(b + (kBlocks - 1) * static_cast<ptrdiff_t>(NB) * ColumnStride, to);
  }

 private:
  template <int Width>
  static SKIVE_INLINE void block(const float* b, float* to) {
    constexpr int kRow = round_up(Width, kChannelQuantum);
    if constexpr (ColumnStride == 1) {
      for (int k = 0; k < K; ++k) {
        copy_floats<Width>(to + k * kRow, b + k * RowStride);
        for (int j = Width; j < kRow; ++j) to[k * kRow + j] = 0.0f;
      }
    } else {
      // Strips of rows that stay in L1 while each column passes.
      constexpr int kStrip = 64;
      for (int k0 = 0; k0 < K; k0 += kStrip) {
        const int k1 = k0 + kStrip < K ? k0 + kStrip : K;
        for (int j = 0; j < Width; ++j)
          for (int k = k0; k < k1; ++k) to[k * kRow + j] = b[k * RowStride + j * ColumnStride];
        for (int j = Width; j < kRow; ++j)
          for (int k = k0; k < k1; ++k) to[k * kRow + j] = 0.0f;
      }
    }
  }
};

// a [M, K] (a row every LDA floats) times a packed panel: y[m * LDY + n], no bias.
template <int M, int K, int N, int NB, int LDA, int LDY>
using packed_product = conv2d<Image<1, 1, M, K>, Kernel<N, 1, 1>, Stride<1, 1>, Pad<0, 0, 0, 0>,
                              Dilation<1, 1>, NB, LDA, LDY>;

// Floats of scratch in which packed_product copies rows that lie whole pages apart (conv.h): an upper bound.
constexpr ptrdiff_t product_copy(int m, int k, ptrdiff_t lda) {
  if (k == 0 || lda % 1024 != 0) return 0;
  const int room = 48 * 1024 / (k + 16), most = room < 14 ? 14 : room;
  return round_up((m < most ? m : most) * (k + 16), 16);
}

// y[batch, M, N] = epilogue(op(a) op(b)); Batch is the result's batch shape, AStrides and BStrides
// the floats between neighbouring matrices (0 broadcasts). a is [M, K], or [K, M] if TransA, with
// LDA floats between rows as stored; b likewise. The epilogue's pixel is the flat row of y, its
// channel the column.
template <class Batch, int M, int K, int N, class AStrides, class BStrides, bool TransA = false,
          bool TransB = false, int LDA = TransA ? M : K, int LDB = TransB ? K : N>
struct matmul {
  static constexpr int NB = panel_block(N);
  static constexpr bool kDirect = M <= 4;
  // Columns per item: a panel of at most 256 KiB, and at least four items so that workers can
  // share.
  static constexpr int columns() {
    int c = 256 * 1024 / 4 / (K > 0 ? K : 1) / NB * NB;
    const int quarter = round_up(div_up(N, 4), NB);
    if (Batch::size < 4 && c > quarter) c = quarter;
    if (c < NB) c = NB;
    return c < N ? c : N;
  }
  static constexpr int kColumns = columns();
  static constexpr int kPanels = div_up(N, kColumns);
  static constexpr int kLastColumns = N - (kPanels - 1) * kColumns;
  static constexpr ptrdiff_t kRowStride = TransB ? 1 : LDB, kColumnStride = TransB ? LDB : 1;
  static constexpr ptrdiff_t kPanelFloats =
      pack_panel<K, kColumns, NB, kRowStride, kColumnStride>::floats;
  static constexpr ptrdiff_t kZeroFloats = round_up(kColumns + NB, 16);
  static constexpr ptrdiff_t kAFloats = TransA ? round_up(M * K, 16) : 0;
  static constexpr ptrdiff_t kCopyFloats = product_copy(M, K, TransA ? K : LDA);
  static constexpr ptrdiff_t kSlice =
      kDirect ? 0 : kPanelFloats + kZeroFloats + kAFloats + kCopyFloats;
  static constexpr size_t scratch_bytes(int parts = 1) {
    return static_cast<size_t>(kSlice) * sizeof(float) * static_cast<size_t>(parts);
  }

  template <class Y, class E>
  static void run(const float* a, const float* b, Y* y, void* scratch, Part part,
                  const E& epilogue) {
    if constexpr (Batch::size > 0 && M > 0 && N > 0) {
      if constexpr (K == 0) {
        static_cast<void>(a), static_cast<void>(b), static_cast<void>(scratch);
        const ptrdiff_t rows = Batch::size * M;
        for (ptrdiff_t r = part_begin(rows, part), end = part_end(rows, part); r < end; ++r)
          each_vector<N>([&](ptrdiff_t c, auto lanes) {
            store(y + r * N + c, epilogue(zero<decltype(lanes)::count>(), r, static_cast<int>(c)));
          });
      } else {
        items(a, b, y, scratch, part, epilogue);
      }
    }
  }

 private:
  template <class Y, class E>
  static SKIVE_INLINE void items(const float* a, const float* b, Y* y, void* scratch, Part part,
                                 const E& epilogue) {
    float* const panel = static_cast<float*>(scratch) + part.index * kSlice;
    float* const zeros = panel + kPanelFloats;
    float* const rows = zeros + kZeroFloats;
    if constexpr (!kDirect) clear_floats(zeros, kZeroFloats);
    constexpr ptrdiff_t count = Batch::size * kPanels;
    const ptrdiff_t begin = part_begin(count, part), end = part_end(count, part);
    using Rows = typename with_panels<Batch, AStrides, BStrides>::type;
    ptrdiff_t matrix = begin / kPanels;
    Rows::each(matrix, (end + kPanels - 1) / kPanels, [&](ptrdiff_t at_a, ptrdiff_t at_b) {
      const ptrdiff_t p0 = matrix * kPanels < begin ? begin - matrix * kPanels : 0;
      const ptrdiff_t p1 = (matrix + 1) * kPanels > end ? end - matrix * kPanels : kPanels;
      const float* left = a + at_a;
      if constexpr (TransA && !kDirect) {
        for (int k = 0; k < K; ++k)
          for (int m = 0; m < M; ++m) rows[m * K + k] = left[k * static_cast<ptrdiff_t>(LDA) + m];
        left = rows;
      }
      for (ptrdiff_t p = p0; p < p1; ++p) {
        const ptrdiff_t column = p * kColumns;
        const float* right = b + at_b + column * kColumnStride;
        Y* to = y + matrix * M * N + column;
        const auto fn = [&](auto acc, ptrdiff_t row, int c) __attribute__((always_inline)) {
          return epilogue(acc, matrix * M + row, static_cast<int>(column) + c);
        };
        if (p < kPanels - 1)
          one<kColumns>(left, right, to, panel, zeros, fn);
        else
          one<kLastColumns>(left, right, to, panel, zeros, fn);
      }
      ++matrix;
    });
  }
  template <int Columns, class Y, class E>
  static SKIVE_INLINE void one(const float* a, const float* b, Y* y, float* panel,
                               const float* zeros, const E& fn) {
    if constexpr (!kDirect) {
      using Product = packed_product<M, K, Columns, NB, TransA ? K : LDA, N>;
      static_assert(Product::scratch_bytes() <= kCopyFloats * sizeof(float), "room for the copied rows");
      pack_panel<K, Columns, NB, kRowStride, kColumnStride>::run(b, panel);
      Product::run(a, panel, zeros, y, panel + kPanelFloats + kZeroFloats + kAFloats, Part{}, fn);
    } else {
      static_cast<void>(panel), static_cast<void>(zeros);
      constexpr ptrdiff_t am = TransA ? 1 : LDA, ak = TransA ? LDA : 1;
      for (int m = 0; m < M; ++m) {
        if constexpr (TransB && !TransA) {
          for (int n = 0; n < Columns; ++n) {
            const float sum = sum_row<K>([&](ptrdiff_t k, auto lanes) {
              constexpr int l = decltype(lanes)::count;
              return load<l>(a + m * am + k) * load<l>(b + n * static_cast<ptrdiff_t>(LDB) + k);
            });
            store(y + m * static_cast<ptrdiff_t>(N) + n, fn(splat<1>(sum), m, n));
          }
        } else if constexpr (TransB) {
          for (int n = 0; n < Columns; ++n) {
            float sum = 0;
            for (int k = 0; k < K; ++k)
              sum += a[m * am + k * ak] * b[n * static_cast<ptrdiff_t>(LDB) + k];
            store(y + m * static_cast<ptrdiff_t>(N) + n, fn(splat<1>(sum), m, n));
          }
        } else {
          row_times_matrix<Columns, ak>(a + m * am, b, y + m * static_cast<ptrdiff_t>(N), m, fn);
        }
      }
    }
  }
  // One row of y, eight vectors of columns at a time.
  template <int Columns, ptrdiff_t AStep, class Y, class E>
  static SKIVE_INLINE void row_times_matrix(const float* a, const float* b, Y* y, int m,
                                            const E& fn) {
    constexpr int kWide = 8, kStep = kWide * kLanes;
    int c = 0;
    for (; c + kStep <= Columns; c += kStep)
      wide<AStep>(a, b + c, y + c, m, c, fn, Indices<kWide>{});
    constexpr int kRest = Columns % kStep;
    if constexpr (kRest > 0) {
      each_vector<kRest>([&](ptrdiff_t i, auto lanes) {
        constexpr int l = decltype(lanes)::count;
        Vec<l> acc = zero<l>();
        for (int k = 0; k < K; ++k)
          acc = fma(splat<l>(a[k * AStep]), load<l>(b + k * static_cast<ptrdiff_t>(LDB) + c + i),
                    acc);
        store(y + c + i, fn(acc, m, c + static_cast<int>(i)));
      });
    }
  }
  template <ptrdiff_t AStep, class Y, class E, int... I>
  static SKIVE_INLINE void wide(const float* a, const float* b, Y* y, int m, int c, const E& fn,
                                Index<I...>) {
    struct Accumulators : Slot<I, Vec<kLanes>>... {
    } acc;
    ((slot<I>(acc) = zero()), ...);
    for (int k = 0; k < K; ++k) {
      const Vec<kLanes> s = splat<kLanes>(a[k * AStep]);
      ((slot<I>(acc) =
            fma(s, load(b + k * static_cast<ptrdiff_t>(LDB) + I * kLanes), slot<I>(acc))),
       ...);
    }
    (store(y + I * kLanes, fn(slot<I>(acc), m, c + I * kLanes)), ...);
  }

  // Walks the matrices of a batch: each(begin, end, f) calls f(offset in a, offset in b).
  template <class, class, class>
  struct with_panels;
  template <ptrdiff_t... D, ptrdiff_t... A, ptrdiff_t... B>
  struct with_panels<Shape<D...>, Strides<A...>, Strides<B...>> {
    struct type {
      template <class F>
      static SKIVE_INLINE void each(ptrdiff_t begin, ptrdiff_t end, const F& f) {
        for_rows<Shape<D..., 1>, Strides<A..., 0>, Strides<B..., 0>>(
            begin, end, [&](const Offsets<2>& at) { f(at.at[0], at.at[1]); });
      }
    };
  };
};

// The same for any element type, summed in the result's type (integers wrap). Trans and strides as
// above.
template <class T, class Y, class Batch, int M, int K, int N, class AStrides, class BStrides,
          bool TransA = false, bool TransB = false>
struct plain_matmul;
template <class T, class Y, ptrdiff_t... D, int M, int K, int N, ptrdiff_t... A, ptrdiff_t... B,
          bool TransA, bool TransB>
struct plain_matmul<T, Y, Shape<D...>, M, K, N, Strides<A...>, Strides<B...>, TransA, TransB> {
  static void run(const T* a, const T* b, Y* y, Part part) {
    using Rows = Shape<D..., M, 1>;
    if constexpr (Rows::size > 0) {
      const ptrdiff_t begin = part_begin(Rows::size, part), end = part_end(Rows::size, part);
      Y* to = y + begin * N;
      for_rows<Rows, Strides<A..., (TransA ? 1 : K), 0>, Strides<B..., 0, 0>>(
          begin, end, [&](const Offsets<2>& at) {
            row(a + at.at[0], b + at.at[1], to);
            to += N;
          });
    }
  }

 private:
  static constexpr ptrdiff_t left_step = TransA ? M : 1;
  static constexpr bool vector = same_type<T, int32_t> && same_type<Y, int32_t> && !TransB;

  static SKIVE_INLINE void row(const T* a, const T* b, Y* to) {
    if constexpr (vector) {
      each_vector<N>([&](ptrdiff_t n, auto lanes) {
        constexpr int count = decltype(lanes)::count;
        IVec<count> sum = splat<count>(int32_t{0});
        for (ptrdiff_t k = 0; k < K; ++k)
          sum = sum + splat<count>(a[k * left_step]) * load<count>(b + k * N + n);
        store(to + n, sum);
      });
    } else {
      for (int n = 0; n < N; ++n) to[n] = 0;
      for (ptrdiff_t k = 0; k < K; ++k) {
        const Y left = static_cast<Y>(a[k * left_step]);
        const T* right = b + k * (TransB ? 1 : N);
        for (ptrdiff_t n = 0; n < N; ++n)
          to[n] = add(to[n], mul(left, static_cast<Y>(right[n * (TransB ? K : 1)])));
      }
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_MATMUL_H
