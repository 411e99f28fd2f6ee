// `Vec<N>`: N float lanes, 1 <= N <= kLanes, N known at compile time. `IVec<N>`: N lanes of int32,
// into which integers of 8 and 16 bits are widened.
//
// All loops are written once over Vec<kLanes> and a remainder Vec<N>; a Vec<N> never reads or
// writes memory beyond its N lanes, so kernels need no padding in the caller's buffers.
// The scalar functions of math.h have the same names, so one generic lambda serves both.
#ifndef SKIVE_VEC_H
#define SKIVE_VEC_H

#include "skive/isa.h"

#if defined(SKIVE_TARGET_AVX512)
#include "skive/isa/avx512.h"
#elif defined(SKIVE_TARGET_AVX2)
#include "skive/isa/avx2.h"
#else
#include "skive/isa/generic.h"
#endif

// Interface that each isa/*.h provides:
//   constexpr int kLanes;                        float lanes of a full register
//   template <int N = kLanes> struct Vec;        N active lanes; inactive lanes are unspecified
//   load<N>(const float*), store(float*, Vec<N>) exactly N floats, any alignment
//   splat<N>(float), zero<N>()
//   in_register(a): a itself, loaded once even where the compiler would repeat the load
//   operators + - * / and unary -, fma(a, b, c) = a * b + c
//   constexpr bool kFusedMultiplyAdd: whether fma rounds once
//   vmin, vmax (ordered as the instruction: second operand if either is NaN)
//   Mask<N> = a < b etc. through less(a, b), equal(a, b); select(mask, yes, no)
//   hsum, hmax, hmin: horizontal reductions over the N active lanes
//   IVec<N>: load<N>(const T*) and store(T*, IVec<N>) for T of int8_t, uint8_t, int16_t, uint16_t,
//     int32_t (the store keeps the low bits), splat<N>(int32_t), operators + - * & | ^ (wrapping),
//     shift_lanes_left<K>, shift_lanes_right<K>, shift_left(a, counts), shift_right(a, counts),
//     vmin, vmax, abs_, comparisons, select, hsum, hmax, hmin
//   to_float(IVec<N>), round_to_int(Vec<N>) (ties to even), bits(Vec<N>), from_bits(IVec<N>)
//   entries<S>(table, i): table[i mod S] of S = 16 or 32 floats, 64-byte aligned
//   scale_fixed: multiplication and rounding shift in 64 bits
//   Packed<T, N>: N integers of 8 or 16 bits, N * sizeof(T) <= kRegisterBytes: load_packed<T, N>,
//     store, splat_packed, vmax, in_register; load_words_of<N>(bytes), operators + - on words
//   ByteTable(table).look_up(x, y): kRegisterBytes entries of a table of 256 bytes
//   transpose_square<T>, interleave3, deinterleave3: movement of bytes and words

#endif  // SKIVE_VEC_H
