"""What one core of this machine can do at most: multiply-adds per second in registers, and reading.

    python benchmarks/limits.py      prints both; the benchmarks of networks use them as a library
"""

from __future__ import annotations

import ctypes
import functools
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / p) for p in ("tests/kernels", "benchmarks/kernels")]
from bench_conv import _PRELUDE  # noqa: E402
from bench_conv_integer import _PEAK  # noqa: E402
from driver import INTEGER_ISA_FLAGS, aligned, compile_library, cpu_isas, pointer  # noqa: E402

_SAMPLES = 60
# Element type -> the tile whose multiply-add is timed.
_TILES = {"float32": "F32Tile", "int16": "I16Tile", "int8": "U8Tile"}

_READ = """
#include "skive/math.h"
namespace skive { inline namespace SKIVE_ISA {
template <int... I> static void read_loop(const float* x, ptrdiff_t n, Index<I...>) {
  struct Chains : Slot<I, Vec<kLanes>>... {} a;
  constexpr ptrdiff_t kStep = static_cast<ptrdiff_t>(sizeof...(I)) * kLanes;
  ((slot<I>(a) = load<kLanes>(x + I * kLanes)), ...);
  for (ptrdiff_t i = 0; i + kStep <= n; i += kStep) {
    ((slot<I>(a) = vmax(slot<I>(a), load<kLanes>(x + i + I * kLanes))), ...);
  }
  static float sink[kLanes];
  (store(sink, slot<I>(a) + load<kLanes>(sink)), ...);
}
extern "C" void read_all(const float* x, long n, int samples, double* seconds) {
  repeat([=] { read_loop(x, n, Indices<8>{}); }, samples, 2e-3, seconds);
}
"""


@functools.cache
def _library(tile: str) -> ctypes.CDLL:
    isa = cpu_isas(INTEGER_ISA_FLAGS)[0]
    peak = _PEAK % tile
    if tile == "F32Tile":  # its operands are floats; the loop is the same
        peak = peak.replace("int32_t", "float").replace("Policy::kStep", "1")
        peak = peak.replace("Policy::narrow<kLanes>(b)", "b").replace("(Policy::kWeightRegisters > 1 ? 4 : 6)", "6")
    text = _PRELUDE + peak + "} }" + _READ + "} }"
    return compile_library(text, isa, Path(tempfile.mkdtemp(prefix="skive-bench-")))


@functools.cache
def peak_gmacs(dtype: str) -> float:
    """Multiply-adds per second, in 1e9, of "float32", "int16" or "int8" operands, from registers."""
    library = _library(_TILES[dtype])
    library.peak.restype = ctypes.c_double
    seconds = np.zeros(_SAMPLES)
    ones = aligned(np.ones(64, np.float32 if dtype == "float32" else np.int32))
    macs = library.peak(pointer(ones), _SAMPLES, pointer(seconds))
    return float(macs / np.median(seconds) / 1e9)  # a short sample may gain from the clock's ticks


def read_gbs(size: int) -> float:
    """GB/s at which `size` bytes are read again and again, from the cache in which they stay or from memory."""
    library = _library(_TILES["int8"])
    n = max(1024, size // 4)
    x, seconds = aligned(np.zeros(n, np.float32)), np.zeros(5)
    library.read_all(pointer(x), ctypes.c_long(n), len(seconds), pointer(seconds))
    return float(4 * n / seconds.min() / 1e9)


def main() -> None:
    print(f"instruction set {cpu_isas(INTEGER_ISA_FLAGS)[0]}")
    for dtype in _TILES:
        print(f"{dtype:<8} {peak_gmacs(dtype):7.1f} GMAC/s")
    for size in (16 << 10, 512 << 10, 4 << 20, 16 << 20, 256 << 20):
        print(f"reading {size >> 10:>7} KiB {read_gbs(size):7.1f} GB/s")


if __name__ == "__main__":
    main()
