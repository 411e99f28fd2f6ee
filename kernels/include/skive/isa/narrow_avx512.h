// AVX-512 VNNI registers of conv_narrow.h: 16 pixels side by side, four bytes or one sum of each.
#ifndef SKIVE_ISA_NARROW_AVX512_H
#define SKIVE_ISA_NARROW_AVX512_H

#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

// acc + the sums of the four products of each pixel's bytes `x` and the weights `w`. The instruction itself:
// for its intrinsic g++ copies the accumulator before each one.
SKIVE_INLINE IVec<16> multiply_add_pixels(IVec<16> acc, IVec<16> x, IVec<16> w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
  return acc;
}

// 16 pixels of G dwords each are G registers, in the order of memory or one for each dword of a pixel. `Planes`:
// from memory's order to planes. Lane i of result r is lane at[r][i] of a source; bit 4 chooses the second
// of the first two, mask[r][s] the lanes from source s >= 2.
template <int G, bool Planes>
struct DwordOrder {
  alignas(64) int32_t at[G][16];
  __mmask16 mask[G][G];
};
template <int G, bool Planes>
constexpr DwordOrder<G, Planes> dword_order() {
  DwordOrder<G, Planes> o{};
  for (int r = 0; r < G; ++r) {
    for (int i = 0; i < 16; ++i) {
      const int from = Planes ? i * G + r : 16 * r + i;  // plane to memory: pixel from / G, dword from % G
      const int source = Planes ? from / 16 : from % G, lane = Planes ? from % 16 : from / G;
      o.at[r][i] = lane + (source == 1 ? 16 : 0);
      o.mask[r][source] = static_cast<__mmask16>(o.mask[r][source] | 1u << i);
    }
  }
  return o;
}
template <int G, bool Planes, int R>
SKIVE_INLINE IVec<16> reordered(const IVec<16> (&from)[G]) {
  if constexpr (G == 1) {
    return from[0];
  } else {
    static constexpr DwordOrder<G, Planes> order = dword_order<G, Planes>();
    const __m512i at = _mm512_load_si512(order.at[R]);
    __m512i r = _mm512_permutex2var_epi32(from[0].v, at, from[1].v);
#pragma GCC unroll 4
    for (int s = 2; s < G; ++s) r = _mm512_mask_permutexvar_epi32(r, order.mask[R][s], at, from[s].v);
    return {r};
  }
}

// The first N dwords at p, nothing read beyond them.
template <int N>
SKIVE_INLINE IVec<16> load_dwords(const void* p) {
  if constexpr (N >= 16) return {_mm512_loadu_si512(p)};
  else if constexpr (N > 0) return {_mm512_maskz_loadu_epi32(active<N>(), p)};
  else return {_mm512_setzero_si512()};
}
template <int N, int G, int... R>
SKIVE_INLINE void load_pixels(IVec<16> (&to)[G], const uint8_t* p, Index<R...>) {
  ((to[R] = load_dwords<N * G - 16 * R>(p + 64 * R)), ...);
}

// N pixels of 4 * G bytes to G planes, `plane` bytes apart, of 16 dwords: those beyond N are zeros.
template <int N, int G, int... R>
SKIVE_INLINE void split_pixels(const uint8_t* from, uint8_t* to, ptrdiff_t plane, Index<R...> each) {
  IVec<16> in[G];
  load_pixels<N>(in, from, each);
  (_mm512_storeu_si512(to + R * plane, reordered<G, true, R>(in).v), ...);
}
// 16 pixels, `pixel` bytes apart, of 16 bytes each to four planes.
SKIVE_INLINE void split_quads(const uint8_t* from, ptrdiff_t pixel, uint8_t* to, ptrdiff_t plane) {
  const auto load = [=](int p) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * pixel));
  };
  // Pixels j, j + 4, j + 8 and j + 12.
  const auto four = [=](int j) __attribute__((always_inline)) {
    __m512i v = _mm512_castsi128_si512(load(j));
    v = _mm512_inserti32x4(v, load(j + 4), 1);
    v = _mm512_inserti32x4(v, load(j + 8), 2);
    return _mm512_inserti32x4(v, load(j + 12), 3);
  };
  const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ef = _mm512_unpackhi_epi32(a, b), gh = _mm512_unpackhi_epi32(c, d);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(ab, cd));
  _mm512_storeu_si512(to + plane, _mm512_unpackhi_epi64(ab, cd));
  _mm512_storeu_si512(to + 2 * plane, _mm512_unpacklo_epi64(ef, gh));
  _mm512_storeu_si512(to + 3 * plane, _mm512_unpackhi_epi64(ef, gh));
}

// The results of four channels of 16 pixels as bytes: one dword for each pixel.
template <class T, class R>
SKIVE_INLINE IVec<16> join_channels(R a, R b, R c, R d) {
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_shuffle_epi8(quarters_of_four<T>(a, b, c, d), _mm512_broadcast_i32x4(transpose))};
}

template <int N>
SKIVE_INLINE void store_dwords(uint8_t* p, IVec<16> v) {
  if constexpr (N >= 16) _mm512_storeu_si512(p, v.v);
  else if constexpr (N > 0) _mm512_mask_storeu_epi32(p, active<N>(), v.v);
}
template <int N, int G, int... R>
SKIVE_INLINE void store_whole_pixels(uint8_t* p, const IVec<16> (&planes)[G], Index<R...>) {
  (store_dwords<N * G - 16 * R>(p + 64 * R, reordered<G, false, R>(planes)), ...);
}
// N pixels of `Channels` bytes, Stride bytes apart, from planes of four channels.
template <int N, int Channels, int Stride, int G>
SKIVE_INLINE void store_pixels(uint8_t* p, const IVec<16> (&planes)[G]) {
  if constexpr (Channels == 4 * G && Stride == Channels) {
    store_whole_pixels<N>(p, planes, Indices<G>{});
  } else if constexpr (Channels < 4 && Stride == Channels) {
    // The bytes of four pixels side by side, then their dwords.
    alignas(16) static constexpr int8_t bytes[3][16] = {
        {0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1},
        {0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1},
        {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1}};
    alignas(64) static constexpr int32_t dwords[3][16] = {
        {0, 4, 8, 12}, {0, 1, 4, 5, 8, 9, 12, 13}, {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14}};
    const __m128i four = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[Channels - 1]));
    const __m512i v = _mm512_permutexvar_epi32(_mm512_load_si512(dwords[Channels - 1]),
                                               _mm512_shuffle_epi8(planes[0].v, _mm512_broadcast_i32x4(four)));
    _mm512_mask_storeu_epi8(p, (__mmask64{1} << N * Channels) - 1, v);
  } else {
    alignas(64) uint8_t whole[16 * 4 * G];
    store_whole_pixels<16>(whole, planes, Indices<G>{});
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) __builtin_memcpy(p + i * Stride, whole + i * 4 * G, Channels);
  }
}

// Byte C of N pixels of S bytes, a multiple of 4.
template <int N, int S, int C>
SKIVE_INLINE IVec<N> bytes_of_pixels(const uint8_t* p) {
  IVec<16> in[S / 4];
  load_pixels<N>(in, p, Indices<S / 4>{});
  constexpr char k = C % 4;
  const __m128i byte = _mm_setr_epi8(k, -1, -1, -1, 4 + k, -1, -1, -1, 8 + k, -1, -1, -1, 12 + k, -1, -1, -1);
  return {_mm512_shuffle_epi8(reordered<S / 4, true, C / 4>(in).v, _mm512_broadcast_i32x4(byte))};
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_NARROW_AVX512_H
