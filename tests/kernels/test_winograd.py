"""Winograd convolution against a float64 sum over the taps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer
from numpy.typing import NDArray

from skive import pack


@dataclass(frozen=True)
class Case:
    """A 3x3 convolution; `xs` and `ys` are extra floats between pixels."""

    image: tuple[int, int, int, int]
    channels: int
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    xs: int = 0
    ys: int = 0
    block: int | None = None
    stride: int = 1

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        return n, (h + t + b - 3) // self.stride + 1, (w + left + r - 3) // self.stride + 1, self.channels

    def nb(self, isa: str) -> int:
        return self.block or pack.winograd_block(self.channels, isa)

    def cpp(self, isa: str) -> str:
        image, pad = ", ".join(map(str, self.image)), ", ".join(map(str, self.pad))
        return (
            f"winograd2d<Image<{image}>, Kernel<{self.channels}, 3, 3>, Stride<{self.stride}, {self.stride}>, "
            f"Pad<{pad}>, {self.nb(isa)}, "
            f"{self.image[3] + self.xs}, {self.channels + self.ys}>"
        )


CASES = [
    Case((1, 8, 8, 16), 16),
    Case((2, 7, 7, 33), 40),
    Case((1, 4, 4, 1), 1),
    Case((1, 1, 9, 3), 7),
    Case((1, 3, 3, 17), 20, pad=(0, 0, 0, 0)),
    Case((3, 9, 6, 7), 3, pad=(0, 2, 1, 0)),
    Case((1, 14, 13, 64), 100, xs=3, ys=5),
    Case((1, 40, 37, 8), 36, block=16),
    Case((2, 5, 30, 24), 12, pad=(2, 2, 2, 2), xs=1),
    Case((1, 11, 10, 200), 8, ys=1),
    Case((1, 16, 16, 16), 16, stride=2),
    Case((2, 15, 9, 33), 40, stride=2, pad=(0, 0, 1, 1)),
    Case((1, 3, 3, 1), 1, stride=2, pad=(0, 0, 0, 0)),
    Case((1, 2, 18, 17), 7, stride=2, pad=(1, 1, 1, 1)),
    Case((3, 8, 23, 24), 100, stride=2, pad=(2, 2, 2, 2), xs=3, ys=5),
    Case((1, 37, 40, 8), 36, stride=2, block=16, ys=1),
]

_SOURCE = """
#include "skive/winograd.h"
using namespace skive;
"""

# The epilogue scales by a value per channel and adds one per pixel: it sees both coordinates.
_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" long weights_%(i)d() { return static_cast<long>(Case%(i)d::weight_floats); }
extern "C" void run_%(i)d(const float* x, const float* w, const float* bias, float* y, void* scratch,
                          int part, int parts, const float* scale, const float* shift) {
  Case%(i)d::run(x, w, bias, y, scratch, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   return acc * load<decltype(acc)::lanes>(scale + channel) +
                          splat<decltype(acc)::lanes>(shift[pixel]);
                 });
}
"""


def reference(x: NDArray[np.float64], w: NDArray[np.float64], case: Case) -> NDArray[np.float64]:
    """Convolution in float64: x [N, H, W, C], w [OC, 3, 3, C] -> [N, OH, OW, OC]."""
    t, left, b, r = case.pad
    padded = np.pad(x, ((0, 0), (t, b), (left, r), (0, 0)))
    _, oh, ow, _ = case.output
    y = np.zeros(case.output)
    for kh in range(3):
        for kw in range(3):
            y += padded[:, kh :: case.stride, kw :: case.stride][:, :oh, :ow] @ w[:, kh, kw].T
    return y


def strided(values: NDArray[np.float32], extra: int) -> NDArray[np.float32]:
    """Pixels of `values` with `extra` floats of NaN between them, 4-byte aligned only."""
    flat = values.reshape(-1, values.shape[-1])
    wide = np.full((flat.shape[0], flat.shape[1] + extra), np.nan, np.float32)
    wide[:, : flat.shape[1]] = flat
    return aligned(wide, offset=1)


Library = tuple[str, ctypes.CDLL]


@pytest.fixture(scope="module", params=list(ISA_FLAGS))
def library(request: pytest.FixtureRequest, libraries: Path) -> Library:
    isa = request.param
    if isa not in cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(_CASE % {"i": i, "type": c.cpp(isa)} for i, c in enumerate(CASES))
    return isa, compile_library(_SOURCE + body, isa, libraries, flags=("-O1",))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_float64(library: Library, index: int) -> None:
    isa, lib = library
    case = CASES[index]
    rng = np.random.default_rng(index)
    oc, ic = case.channels, case.image[3]
    n, oh, ow, _ = case.output
    x = rng.standard_normal(case.image).astype(np.float32)
    w = rng.standard_normal((oc, 3, 3, ic)).astype(np.float32)
    bias, scale = rng.standard_normal((2, oc)).astype(np.float32)
    shift = rng.standard_normal(n * oh * ow).astype(np.float32)

    block = case.nb(isa)
    packed = aligned(pack.pack_winograd(w, block, case.stride))
    weight_floats = getattr(lib, f"weights_{index}")
    weight_floats.restype = ctypes.c_long
    assert packed.size == weight_floats()
    packed_bias = aligned(pack.pack_bias(bias, block))
    source, scales, shifts = strided(x, case.xs), aligned(scale), aligned(shift)
    scratch_bytes = getattr(lib, f"scratch_{index}")
    scratch_bytes.restype = ctypes.c_long

    results = []
    for parts in (1, 2, 3):
        size = scratch_bytes(parts)
        assert size <= pack.winograd_scratch_bytes(case.image, case.pad, case.stride, oc, block, parts)
        scratch = aligned(np.full(size // 4, np.nan, np.float32))
        y = strided(np.full(case.output, 7.0, np.float32), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(
                pointer(source), pointer(packed), pointer(packed_bias), pointer(y),
                pointer(scratch), part, parts, pointer(scales), pointer(shifts),
            )  # fmt: skip
        assert np.isnan(y[:, oc:]).all(), "wrote between the pixels"
        results.append(y[:, :oc].copy())

    assert all(r.tobytes() == results[0].tobytes() for r in results), "depends on the parts"
    plain = reference(x.astype(float), w.astype(float), case)
    expected = (plain + bias) * scale + shift.reshape(n, oh, ow, 1)
    error = np.abs(results[0].reshape(case.output) - expected).max()
    assert error <= 2e-5 * (1 + np.abs(plain).max()) * np.abs(scale).max()


def test_packing_refuses_other_filters() -> None:
    with pytest.raises(ValueError, match="3x3"):
        pack.pack_winograd(np.zeros((4, 5, 5, 3)), 4)
