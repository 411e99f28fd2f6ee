// AVX-512 registers of the integer depthwise convolution (depthwise_integer.h).
#ifndef SKIVE_ISA_DEPTHWISE_AVX512_H
#define SKIVE_ISA_DEPTHWISE_AVX512_H

#include "skive/vec.h"

// g++ copies the accumulator of these intrinsics before each use; the instruction itself overwrites
// it. Sanitizers do not see what assembly does.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define SKIVE_DOT_ASSEMBLY
#endif

namespace skive {
inline namespace SKIVE_ISA {

template <class Element>
struct ChannelDot;

// acc + the sum of four products of an unsigned and a signed byte, or of two of signed words.
SKIVE_INLINE __m512i dot_words(__m512i acc, __m512i x, __m512i w) {
#if !defined(SKIVE_TARGET_AVX512VNNI)
  return _mm512_add_epi32(acc, _mm512_madd_epi16(x, w));
#elif defined(SKIVE_DOT_ASSEMBLY)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "vm"(w));
  return acc;
#else
  return _mm512_dpwssd_epi32(acc, x, w);
#endif
}
#if defined(SKIVE_TARGET_AVX512VNNI)
SKIVE_INLINE __m512i dot_bytes(__m512i acc, __m512i x, __m512i w) {
#if defined(SKIVE_DOT_ASSEMBLY)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "vm"(w));
  return acc;
#else
  return _mm512_dpbusd_epi32(acc, x, w);
#endif
}
#endif

// The words 0 16 1 17 ... 15 31: pairs of words out of two halves.
SKIVE_INLINE __m512i pairs_of_halves(__m512i a) {
  const __m512i low = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005,
                                        0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b,
                                        0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  return _mm512_permutexvar_epi16(low, a);
}

template <>
struct ChannelDot<int16_t> {
  using Weight = int16_t;
  static constexpr int kRows = 2;
  static constexpr int kVectors = 1;
  static constexpr int kHeld = 12;     // weight registers that leave enough for the rest
  static constexpr int kWindow = 20;   // registers of interleaved input that do
  static constexpr int kMostProducts = 1 << 20;  // any window

  struct Group {
    __m512i v[1];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    const __m512i first = _mm512_castsi256_si512(load_words<N>(at(0)));
    if constexpr (Rows == 1) return {{pairs_of_halves(first)}};
    else return {{pairs_of_halves(_mm512_inserti64x4(first, load_words<N>(at(1)), 1))}};
  }
  static SKIVE_INLINE Group fill(int zero) {
    return {{_mm512_set1_epi16(static_cast<int16_t>(zero))}};
  }
  static SKIVE_INLINE __m512i weights(const Weight* p) { return _mm512_loadu_si512(p); }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m512i x, __m512i w) {
    return {dot_words(acc.v, x, w)};
  }
};

#if defined(SKIVE_TARGET_AVX512VNNI)
template <>
struct ChannelDot<uint8_t> {
  using Weight = int8_t;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 2;
  static constexpr int kHeld = 12;
  static constexpr int kWindow = 20;
  static constexpr int kMostProducts = 1 << 20;  // any window

  struct Group {
    __m512i v[2];
  };

  template <int N>
  static SKIVE_INLINE __m256i load_row(const uint8_t* p) {
    if constexpr (N == 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    else if constexpr (N == 16) return _mm256_castsi128_si256(load_bytes<16>(p));
    else return _mm256_maskz_loadu_epi8((1u << N % 32) - 1u, p);
  }
  // Rows 0 and 2 (1 and 3) of 32 channels each in one register; what is missing has weight 0.
  template <int N, int Row, int Rows, class At>
  static SKIVE_INLINE __m512i two_rows(const At& at) {
    if constexpr (Row >= Rows) return _mm512_setzero_si512();
    else if constexpr (Row + 2 >= Rows) return _mm512_castsi256_si512(load_row<N>(at(Row)));
    else
      return _mm512_inserti64x4(_mm512_castsi256_si512(load_row<N>(at(Row))),
                                load_row<N>(at(Row + 2)), 1);
  }

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    const __m512i even = two_rows<N, 0, Rows>(at), odd = two_rows<N, 1, Rows>(at);
    // Dword c of the first result: byte c of the four rows.
#if defined(__AVX512VBMI__)
    const __m512i low = _mm512_setr_epi32(
        0x60204000, 0x61214101, 0x62224202, 0x63234303, 0x64244404, 0x65254505, 0x66264606,
        0x67274707, 0x68284808, 0x69294909, 0x6a2a4a0a, 0x6b2b4b0b, 0x6c2c4c0c, 0x6d2d4d0d,
        0x6e2e4e0e, 0x6f2f4f0f);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi8(16));
    const __m512i first = _mm512_permutex2var_epi8(even, low, odd);
    if constexpr (N <= 16) return {{first, first}};
    else return {{first, _mm512_permutex2var_epi8(even, high, odd)}};
#else
    // Channels 0-7 and 16-23 of rows 0 and 1, then of rows 2 and 3; the others.
    const __m512i a = _mm512_unpacklo_epi8(even, odd), b = _mm512_unpackhi_epi8(even, odd);
    const __m512i low = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x300020,
        0x310021, 0x320022, 0x330023, 0x340024, 0x350025, 0x360026, 0x370027);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(8));
    const __m512i first = _mm512_permutex2var_epi16(a, low, b);
    if constexpr (N <= 16) return {{first, first}};
    else return {{first, _mm512_permutex2var_epi16(a, high, b)}};
#endif
  }
  static SKIVE_INLINE Group fill(int zero) {
    const __m512i all = _mm512_set1_epi8(static_cast<char>(zero));
    return {{all, all}};
  }
  static SKIVE_INLINE __m512i weights(const Weight* p) { return _mm512_loadu_si512(p); }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m512i x, __m512i w) {
    return {dot_bytes(acc.v, x, w)};
  }
};
#else
template <>
struct ChannelDot<uint8_t> {
  using Weight = int16_t;
  static constexpr int kRows = 2;
  static constexpr int kVectors = 1;
  static constexpr int kHeld = 12;
  static constexpr int kWindow = 20;
  static constexpr int kMostProducts = 1 << 20;  // any window

  struct Group {
    __m512i v[1];
  };

  template <int N, int Rows, class At>
  static SKIVE_INLINE Group gather(const At& at) {
    __m256i rows = _mm256_castsi128_si256(load_bytes<N>(at(0)));
    if constexpr (Rows == 2) rows = _mm256_inserti128_si256(rows, load_bytes<N>(at(1)), 1);
    return {{pairs_of_halves(_mm512_cvtepu8_epi16(rows))}};
  }
  static SKIVE_INLINE Group fill(int zero) {
    return {{_mm512_set1_epi16(static_cast<int16_t>(zero))}};
  }
  static SKIVE_INLINE __m512i weights(const Weight* p) { return _mm512_loadu_si512(p); }
  static SKIVE_INLINE IVec<> dot(IVec<> acc, __m512i x, __m512i w) {
    return {dot_words(acc.v, x, w)};
  }
};
#endif

// The first N lanes of a full register.
template <int N>
SKIVE_INLINE IVec<N> first_lanes(IVec<> a) { return {a.v}; }

// Two neighbouring vectors of results.
template <class T, class A, class B>
SKIVE_INLINE void store_two(T* p, A a, B b) {
  store(p, a);
  store(p + kLanes, b);
}
// Of 8 bits: the packing instructions saturate within quarters of a register, which a last step joins.
template <class T, int N, if_byte<T> = 0>
SKIVE_INLINE void store_two(T* p, Rounded<T, kLanes> a, Rounded<T, N> b) {
  const __m512i words = narrow_two(a, Rounded<T, kLanes>{b.v, b.zero});
  const __m512i packed = kSigned<T> ? _mm512_packs_epi16(words, words) : _mm512_packus_epi16(words, words);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
  const __m256i bytes = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, packed));
  if constexpr (N == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
  else _mm256_mask_storeu_epi8(p, 0xffffu | static_cast<uint32_t>(active<N>()) << 16, bytes);
}
#if defined(__AVX512VBMI__)
// One permutation narrows both to bytes.
template <int N>
SKIVE_INLINE void store_two(uint8_t* p, IVec<> a, IVec<N> b) {
  const __m512i low = _mm512_setr_epi32(0x0c080400, 0x1c181410, 0x2c282420, 0x3c383430, 0x4c484440,
                                        0x5c585450, 0x6c686460, 0x7c787470, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m256i bytes = _mm512_castsi512_si256(_mm512_permutex2var_epi8(a.v, low, b.v));
  if constexpr (N == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
  else _mm256_mask_storeu_epi8(p, 0xffffu | static_cast<uint32_t>(active<N>()) << 16, bytes);
}
template <int N>
SKIVE_INLINE void store_two(int8_t* p, IVec<> a, IVec<N> b) {
  store_two(reinterpret_cast<uint8_t*>(p), a, b);
}
#endif

}  // namespace SKIVE_ISA
}  // namespace skive

#undef SKIVE_DOT_ASSEMBLY

#endif  // SKIVE_ISA_DEPTHWISE_AVX512_H
