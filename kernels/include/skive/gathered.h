// Bytes of a pixel that a block of output channels reads, side by side (sparse.h, Keep > 0).
//
// A policy of tile.h with two more functions. Shuffles work within lanes of 16 bytes, on every instruction set.
//
//   load_order<N>(p)       the order of N bytes, a multiple of 16: of each byte of the result its place in its lane
//                          of x, or 128 for a zero
//   gather<Keep>(to, x, o) N bytes at `to`, the first Keep elements of each lane bytes of x
//
//   target               Element   kStep
//   avx512vnni, generic  uint8_t   4
//   avx512, avx2         int16_t   2
//
// Without VNNI the bytes become 16-bit numbers on the way, which zeros between them do: a pair is one
// multiply-add, where the dense kernel takes four bytes apart for each of its own. So Keep is at most 8 there.
#ifndef SKIVE_GATHERED_H
#define SKIVE_GATHERED_H

#include "skive/tile.h"

#if defined(SKIVE_TARGET_AVX512)
#include "skive/isa/gathered_avx512.h"
#elif defined(SKIVE_TARGET_AVX2)
#include "skive/isa/gathered_avx2.h"
#else
#include "skive/isa/gathered_generic.h"
#endif

namespace skive {
inline namespace SKIVE_ISA {

constexpr int kGatherLane = 16;  // bytes

// The policy of a sparse kernel for an input element type.
template <class Element, bool Gathers>
struct sparse_policy : tile_policy<Element> {};
template <>
struct sparse_policy<uint8_t, true> {
  using type = GatheredTile;
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_GATHERED_H
