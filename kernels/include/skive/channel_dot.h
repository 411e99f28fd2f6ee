// The registers of the integer depthwise convolutions: rows interleaved channel by channel, and the
// instruction that multiplies and sums them.
#ifndef SKIVE_CHANNEL_DOT_H
#define SKIVE_CHANNEL_DOT_H

#include "skive/tile.h"

#if defined(SKIVE_TARGET_AVX512) || defined(SKIVE_TARGET_AVX512VNNI)
#include "skive/isa/depthwise_avx512.h"
#elif defined(SKIVE_TARGET_AVX2)
#include "skive/isa/depthwise_avx2.h"
#else
#include "skive/isa/depthwise_generic.h"
#endif

// Interface that each isa/depthwise_*.h provides:
//   ChannelDot<Element>           Weight, the type of the packed weights
//     kStaged                     depthwise_staged.h has the loops: of those below, kRows, kVectors,
//                                 gather, weights, dot, and put(Weight*, group.v[i])
//     kRows                       G
//     kVectors                    registers of channels that are interleaved together
//     kHeld, kWindow              registers for weights and for interleaved columns, at most
//     Group gather<N, Rows>(at)   N channels of the rows at(0) ... at(Rows - 1), interleaved
//     Group fill(zero)            the same, every element `zero`
//     dot(acc, group.v[i], weights(p))
//   first_lanes<N>(IVec<>), store_two(p, a, b)

#endif  // SKIVE_CHANNEL_DOT_H
