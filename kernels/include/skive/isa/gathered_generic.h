// Plain C++ policy of gathered bytes, see gathered.h.
#ifndef SKIVE_ISA_GATHERED_GENERIC_H
#define SKIVE_ISA_GATHERED_GENERIC_H

#include "skive/tile.h"

namespace skive {
inline namespace SKIVE_ISA {

struct GatheredTile : U8Tile {
  template <int N>
  struct Order {
    const int8_t* p;
  };
  template <int N>
  static SKIVE_INLINE Order<N> load_order(const int8_t* p) {
    return {p};
  }
  template <int Keep, int N>
  static SKIVE_INLINE void gather(uint8_t* to, const uint8_t* x, Order<N> order) {
    for (int lane = 0; lane < N; lane += 16) {
      for (int k = 0; k < Keep; ++k) to[lane + k] = x[lane + order.p[lane + k]];
    }
  }
};

}  // namespace SKIVE_ISA
}  // namespace skive

#endif  // SKIVE_ISA_GATHERED_GENERIC_H
