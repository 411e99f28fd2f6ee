// Chooses the instruction set of this translation unit and the namespace that goes with it.
//
// The emitted source defines SKIVE_TARGET_GENERIC, _AVX2, _AVX512 or _AVX512VNNI before its first
// include. Target avx512vnni is avx512 with other integer dot products.
// Every kernel lives in `namespace skive { inline namespace SKIVE_ISA {`: one template compiled
// twice with different flags into one library would otherwise merge into one weak symbol, and the
// portable entry would run AVX-512 code. SKIVE_HEADERS, which the emitted source defines as well, does the
// same for networks that were compiled with different versions of these headers.
#ifndef SKIVE_ISA_H
#define SKIVE_ISA_H

#include <stddef.h>
#include <stdint.h>

#if defined(SKIVE_TARGET_AVX512VNNI)
#define SKIVE_TARGET_AVX512
#define SKIVE_TARGET avx512vnni
#if !defined(__AVX512VNNI__)
#error "target avx512vnni needs the flags of avx512 and -mavx512vnni"
#endif
#elif defined(SKIVE_TARGET_AVX512)
#define SKIVE_TARGET avx512
#endif

#if defined(SKIVE_TARGET_AVX512)
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "target avx512 needs -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
#endif
#elif defined(SKIVE_TARGET_AVX2)
#define SKIVE_TARGET avx2
#if !defined(__AVX2__) || !defined(__FMA__)
#error "target avx2 needs -mavx2 -mfma"
#endif
#else
#define SKIVE_TARGET generic
#endif

#define SKIVE_JOIN_EXPANDED(a, b) a##_##b
#define SKIVE_JOIN(a, b) SKIVE_JOIN_EXPANDED(a, b)
#if defined(SKIVE_HEADERS)
#define SKIVE_ISA SKIVE_JOIN(SKIVE_TARGET, SKIVE_HEADERS)
#else
#define SKIVE_ISA SKIVE_TARGET
#endif

// Kernels are specialised to one shape each: a call the compiler declines to inline costs more
// than the code it saves, because the constants no longer reach the loop.
#define SKIVE_INLINE inline __attribute__((always_inline))
#define SKIVE_NOINLINE __attribute__((noinline))

namespace skive {
inline namespace SKIVE_ISA {

// One worker's share of a kernel: share `index` of `count`. The split is a pure function of the
// shape and of `count`, and never changes the order of operations inside one output element, so
// the result is the same for any number of threads.
struct Part {
  int index = 0;
  int count = 1;
};

// Bounds [begin, end) of this part's share of `n` work items. The whole is not divided: a 64-bit
// division takes tens of cycles, which a kernel of a small network would feel.
SKIVE_INLINE ptrdiff_t part_begin(ptrdiff_t n, Part p) {
  return p.index == 0 ? 0 : n * p.index / p.count;
}
SKIVE_INLINE ptrdiff_t part_end(ptrdiff_t n, Part p) {
  return p.index + 1 == p.count ? n : n * (p.index + 1) / p.count;
}
// Whether `parts` workers share out `a` items as evenly as `b`: by the largest share, as a part of all.
SKIVE_INLINE bool shared_as_evenly(ptrdiff_t a, ptrdiff_t b, int parts) {
  return parts == 1 || (a + parts - 1) / parts * b <= (b + parts - 1) / parts * a;
}

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_H
