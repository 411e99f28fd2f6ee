"""Timing of kernels in C++: what the benchmarks of the spatial kernels share."""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))
from driver import INTEGER_ISA_FLAGS, aligned, compile_library, cpu_isas, pointer  # noqa: E402

__all__ = ["aligned", "arguments", "build", "peak_gmacs", "pointer", "print_rows", "seconds"]

SAMPLES = 15

# Twelve independent chains, each with an unknown start, hide the latency of a multiply-add.
_PRELUDE = """
#include <time.h>

#include "skive/tile.h"
namespace skive { inline namespace SKIVE_ISA {
static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
template <class F> static void repeat(F f, int samples, double* seconds) {
  int turns = 1;
  for (;; turns *= 2) {
    const double t = now();
    for (int i = 0; i < turns; ++i) f();
    if (now() - t > 2e-3) break;
  }
  for (int s = 0; s < samples; ++s) {
    const double t = now();
    for (int i = 0; i < turns; ++i) f();
    seconds[s] = (now() - t) / turns;
  }
}
template <int... I> static void peak_loop(const float* x, Index<I...>) {
  struct Chains : Slot<I, F32Tile::Lanes<kLanes>>... {} a;
  const auto b = F32Tile::broadcast<kLanes>(x);
  ((slot<I>(a) = F32Tile::load_lanes<kLanes>(x + I)), ...);
  for (int i = 0; i < 10000; ++i) {
    ((slot<I>(a) = F32Tile::multiply_add(slot<I>(a), slot<I>(a), b)), ...);
  }
  static float sink[kLanes];
  (store(sink, load(sink) + F32Tile::finish<kLanes>(slot<I>(a))), ...);
}
extern "C" double peak(const float* x, int samples, double* seconds) {
  repeat([=] { peak_loop(x, Indices<12>{}); }, samples, seconds);
  return 12.0 * kLanes * 10000;
}
struct Relu {
  template <int N>
  Vec<N> operator()(Vec<N> a, ptrdiff_t, int) const { return vmax(a, zero<N>()); }
};
} }
using namespace skive;
"""


def arguments(description: str | None) -> argparse.Namespace:
    """`--isa`, `--only` (part of a network's or layer's name), `--opt` and `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--isa", choices=list(INTEGER_ISA_FLAGS), default=cpu_isas(INTEGER_ISA_FLAGS)[0])
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--opt", default="-O2", help="optimisation level")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def build(headers: Sequence[str], body: str, isa: str, opt: str) -> ctypes.CDLL:
    """A library of `repeat`, `Relu`, `peak` and `body`, compiled for `isa`."""
    includes = "".join(f'#include "skive/{h}.h"\n' for h in headers)
    folder = Path(tempfile.mkdtemp(prefix="skive-bench-"))
    return compile_library(includes + _PRELUDE + body, isa, folder, flags=(opt,))


def seconds(function: Any, *args: Any) -> np.ndarray:
    """SAMPLES timings in seconds per call of `function(*args, samples, seconds*)`."""
    times = np.zeros(SAMPLES)
    function(*args, SAMPLES, pointer(times))
    return times


def peak_gmacs(library: ctypes.CDLL) -> float:
    """Multiply-adds per second that registers alone sustain, in 1e9."""
    library.peak.restype = ctypes.c_double
    x, times = aligned(np.full(64, 0.5, np.float32)), np.zeros(SAMPLES)
    macs = library.peak(pointer(x), SAMPLES, pointer(times))
    return float(macs / times.min() * 1e-9)


def print_rows(rows: list[dict[str, Any]], *, as_json: bool, **facts: Any) -> None:
    """One line per row with its keys as columns; with `as_json` one document of facts and rows."""
    if as_json:
        print(json.dumps({**facts, "rows": rows}, indent=1))
        return
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    if not rows:
        return
    text = [[f"{v:.3g}" if isinstance(v, float) and v < 10 else f"{v:.1f}"
             if isinstance(v, float) else str(v) for v in row.values()] for row in rows]  # fmt: skip
    table = [list(rows[0]), *text]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        first = line[0].ljust(widths[0])
        print("  ".join([first, *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))
