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
//     kRows                       G
//     kVectors                    registers of channels that are interleaved together
//     kHeld, kWindow              registers for weights and for interleaved columns, at most
//     Group gather<N, Rows>(at)   N channels of the rows at(0) ... at(Rows - 1), interleaved
//     Group fill(zero)            the same, every element `zero`
//     dot(acc, group.v[i], weights(p))
//     kMostProducts               a window with more products of groups and weights goes to
//                                 depthwise_staged.h, which needs these two:
//     dot_in_order(...)           dot, in the order of the calls
//     put(Weight*, group.v[i])    to memory aligned to a register
//   first_lanes<N>(IVec<>), store_two(p, a, b)

#endif  // SKIVE_CHANNEL_DOT_H
