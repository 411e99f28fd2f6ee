"""Dense, grouped and transposed convolution against a float64 sum over the taps."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer
from numpy.typing import NDArray

from skive import pack


@dataclass(frozen=True)
class Case:
    """One convolution; `xs` and `ys` are extra floats between pixels of input and output."""

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    xs: int = 0
    ys: int = 0
    block: int | None = None

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        oc, kh, kw = self.kernel
        oh = (h + t + b - self.dilation[0] * (kh - 1) - 1) // self.stride[0] + 1
        ow = (w + left + r - self.dilation[1] * (kw - 1) - 1) // self.stride[1] + 1
        return n, oh, ow, oc

    def nb(self, isa: str) -> int:
        return self.block or pack.conv2d_block(
            self.kernel[0] // self.groups, isa, math.prod(self.output[:3])
        )

    def tags(self) -> list[str]:
        """Shape and window as template arguments."""
        named = [("Image", self.image), ("Kernel", self.kernel), ("Stride", self.stride), ("Pad", self.pad),
                 ("Dilation", self.dilation)]  # fmt: skip
        return [f"{name}<{', '.join(map(str, values))}>" for name, values in named]

    def pitches(self) -> str:
        """The distances between pixels as template arguments."""
        return f"{self.image[3] + self.xs}, {self.kernel[0] + self.ys}"

    def cpp(self, isa: str) -> str:
        kind = "conv2d" if self.groups == 1 else "grouped_conv2d"
        groups = "" if self.groups == 1 else f"{self.groups}, "
        return f"{kind}<{', '.join(self.tags())}, {groups}{self.nb(isa)}, {self.pitches()}>"


# Every kind of border, tile remainder and channel remainder that the nest distinguishes.
CASES = [
    Case((1, 1, 1, 7), (3, 1, 1)),
    Case((1, 7, 7, 33), (33, 1, 1)),
    Case((2, 9, 11, 17), (40, 1, 1), stride=(2, 2)),
    Case((1, 8, 8, 3), (17, 3, 3), pad=(1, 1, 1, 1)),
    Case((2, 7, 7, 16), (64, 3, 3), pad=(1, 1, 1, 1)),
    Case((1, 14, 14, 7), (33, 3, 3), stride=(2, 2), pad=(0, 0, 1, 1)),
    Case((1, 23, 19, 3), (24, 7, 7), stride=(2, 2), pad=(3, 3, 3, 3)),
    Case((1, 10, 31, 1), (9, 5, 5), pad=(2, 2, 2, 2)),
    Case((2, 49, 10, 1), (64, 10, 4), stride=(2, 2), pad=(4, 1, 5, 1)),
    Case((1, 32, 32, 3), (40, 16, 16), stride=(16, 16)),
    Case((1, 12, 13, 5), (10, 3, 3), pad=(2, 0, 1, 3), dilation=(2, 3)),
    Case((1, 9, 9, 4), (7, 3, 3), dilation=(2, 2)),
    # Taps far apart: no border, stretches of columns, taps that no pixel has inside.
    Case((2, 11, 13, 5), (33, 3, 3), pad=(4, 6, 4, 6), dilation=(4, 6)),
    Case((1, 6, 5, 8), (17, 3, 3), pad=(7, 9, 7, 9), dilation=(7, 9)),
    Case((1, 17, 37, 6), (20, 3, 4), stride=(1, 2), pad=(2, 9, 5, 3), dilation=(3, 4), xs=3, ys=2),
    Case((1, 20, 9, 7), (12, 5, 1), pad=(8, 0, 3, 0), dilation=(3, 1)),
    Case((2, 20, 9, 4), (12, 3, 2), pad=(6, 0, 6, 0), dilation=(6, 2), groups=2),
    Case((3, 1, 50, 6), (40, 1, 3), pad=(0, 16, 0, 0), dilation=(1, 8)),
    Case((2, 30, 1, 9), (8, 3, 1), pad=(4, 0, 4, 0), dilation=(4, 1)),
    Case((1, 5, 12, 1024), (32, 3, 3), pad=(2, 2, 2, 2), dilation=(2, 2)),
    Case((1, 4, 4, 3), (5, 2, 2), pad=(20, 20, 20, 20), dilation=(30, 30)),
    Case((1, 6, 5, 3), (1, 3, 2), stride=(3, 1), pad=(2, 3, 0, 4)),
    Case((2, 1, 40, 5), (12, 1, 9), pad=(0, 4, 0, 4)),
    Case((1, 1, 33, 7), (20, 1, 4), stride=(1, 3)),
    Case((3, 1, 1, 65), (50, 1, 1)),
    Case((2, 4, 3, 9), (31, 4, 3)),
    Case((1, 1, 37, 19), (100, 1, 1)),
    Case((1, 9, 7, 6), (18, 3, 3), pad=(1, 1, 1, 1), xs=5, ys=3),
    Case((2, 5, 5, 12), (48, 1, 1), xs=1, ys=7),
    Case((1, 5, 6, 8), (28, 2, 2), xs=3),
    Case((1, 40, 6, 3), (8, 3, 3), pad=(1, 1, 1, 1)),
    Case((1, 1, 6, 3), (8, 1, 3), stride=(2, 1), pad=(1, 0, 0, 0)),
    Case((1, 50, 50, 32), (4, 3, 3), pad=(1, 1, 1, 1)),
    Case((1, 3, 3, 5), (21, 5, 5), pad=(2, 2, 2, 2)),
    Case((1, 2, 2, 3), (6, 1, 1), pad=(1, 2, 0, 1)),
    Case((1, 1, 30, 1024), (20, 1, 1)),
    Case((1, 5, 33, 512), (16, 1, 1), stride=(2, 2)),
    Case((1, 4, 16, 1024), (32, 1, 2), pad=(0, 0, 0, 1)),
    Case((9, 8, 8, 16), (5, 8, 8)),
    Case((2, 9, 8, 12), (18, 3, 3), pad=(1, 1, 1, 1), groups=3),
    Case((1, 7, 7, 8), (40, 1, 1), stride=(2, 1), groups=2, xs=2, ys=1),
]

@dataclass(frozen=True)
class Transposed(Case):
    """A transposed convolution; `extra` is added to the output's height and width."""

    extra: tuple[int, int] = (0, 0)

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        oc, kh, kw = self.kernel
        oh = (h - 1) * self.stride[0] + self.dilation[0] * (kh - 1) + 1 - t - b + self.extra[0]
        ow = (w - 1) * self.stride[1] + self.dilation[1] * (kw - 1) + 1 - left - r + self.extra[1]
        return n, oh, ow, oc

    def cpp(self, isa: str) -> str:
        out = ", ".join(map(str, self.output))
        return (f"conv_transpose2d<{', '.join(self.tags())}, Image<{out}>, {self.groups}, "
                f"{self.nb(isa)}, {self.pitches()}>")  # fmt: skip


# Phases with unequal numbers of taps, without taps, without outputs, and with cropped input.
CASES += [
    Transposed((1, 5, 6, 7), (9, 3, 3), stride=(2, 2), pad=(1, 1, 1, 1), extra=(1, 1)),
    Transposed((2, 4, 5, 16), (33, 4, 4), stride=(2, 2), pad=(1, 1, 1, 1)),
    Transposed((1, 8, 8, 17), (3, 2, 2), stride=(2, 2)),
    Transposed((1, 3, 4, 3), (17, 1, 2), stride=(3, 2), extra=(2, 0)),
    Transposed((1, 6, 7, 5), (8, 3, 3)),
    Transposed((1, 5, 5, 4), (6, 3, 2), stride=(2, 3), dilation=(2, 2), pad=(0, 1, 2, 0)),
    Transposed((1, 7, 6, 4), (20, 5, 5), stride=(2, 1), pad=(4, 4, 3, 4), xs=2, ys=1),
    Transposed((2, 6, 7, 5), (8, 3, 3), dilation=(3, 2), pad=(2, 1, 0, 3)),
    Transposed((1, 4, 5, 6), (9, 2, 3), stride=(2, 1), dilation=(4, 5), pad=(1, 4, 2, 5)),
    Transposed((1, 1, 9, 6), (10, 1, 4), stride=(1, 2), pad=(0, 1, 0, 1), groups=2),
    Transposed((1, 6, 6, 12), (6, 3, 3), stride=(2, 2), pad=(1, 0, 0, 1), groups=3),
]

_SOURCE = """
#include "skive/conv.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""

# The epilogue scales by a value per channel and adds one per pixel: it sees both coordinates.
_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const float* x, const float* w, const float* bias, float* y, void* scratch,
                          int part, int parts, const float* scale, const float* shift) {
  Case%(i)d::run(x, w, bias, y, scratch, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   return acc * load<decltype(acc)::lanes>(scale + channel) +
                          splat<decltype(acc)::lanes>(shift[pixel]);
                 });
}
"""


def reference(
    case: Case, x: NDArray[np.float64], w: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Convolution in float64: x [N, H, W, C], w [OC, KH, KW, C / groups] -> [N, OH, OW, OC]."""
    n, oh, ow, oc = case.output
    t, left, b, r = case.pad
    if isinstance(case, Transposed):
        return transposed_reference(case, x, w, bias)
    padded = np.pad(x, ((0, 0), (t, b), (left, r), (0, 0)))
    ic = case.image[3] // case.groups
    y = np.broadcast_to(bias, case.output).copy()
    for g in range(case.groups):
        out = slice(g * oc // case.groups, (g + 1) * oc // case.groups)
        for kh in range(case.kernel[1]):
            for kw in range(case.kernel[2]):
                h0, w0 = kh * case.dilation[0], kw * case.dilation[1]
                window = padded[:, h0 : h0 + (oh - 1) * case.stride[0] + 1 : case.stride[0],
                                w0 : w0 + (ow - 1) * case.stride[1] + 1 : case.stride[1],
                                g * ic : (g + 1) * ic]  # fmt: skip
                y[..., out] += window @ w[out, kh, kw].T
    return y


def transposed_reference(
    case: Transposed, x: NDArray[np.float64], w: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Every input pixel scattered over its window: x [N, H, W, C], w [OC, KH, KW, C / groups]."""
    n, oh, ow, oc = case.output
    _, h, wd, c = case.image
    t, left = case.pad[:2]
    ic = c // case.groups
    big = np.zeros((n, oh + t + 99, ow + left + 99, oc))  # more than any case reaches
    for g in range(case.groups):
        out = slice(g * oc // case.groups, (g + 1) * oc // case.groups)
        for kh in range(case.kernel[1]):
            for kw in range(case.kernel[2]):
                h0, w0 = kh * case.dilation[0], kw * case.dilation[1]
                big[:, h0 : h0 + (h - 1) * case.stride[0] + 1 : case.stride[0],
                    w0 : w0 + (wd - 1) * case.stride[1] + 1 : case.stride[1],
                    out] += x[..., g * ic : (g + 1) * ic] @ w[out, kh, kw].T  # fmt: skip
    return big[:, t : t + oh, left : left + ow] + bias


def strided(values: NDArray[np.float64], extra: int) -> NDArray[np.float32]:
    """Pixels of `values` with `extra` floats of NaN between them, 4-byte aligned only."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float32)
    wide = np.full((flat.shape[0], flat.shape[1] + extra), np.nan, np.float32)
    wide[:, : flat.shape[1]] = flat
    return aligned(wide, offset=1)


@pytest.fixture(scope="module", params=list(ISA_FLAGS))
def library(request: pytest.FixtureRequest, libraries: Path):
    isa = request.param
    if isa not in cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(_CASE % {"i": i, "type": c.cpp(isa)} for i, c in enumerate(CASES))
    return isa, compile_library(_SOURCE % body, isa, libraries, flags=("-O1",))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_float64(library: tuple[str, ctypes.CDLL], index: int) -> None:
    isa, lib = library
    case = CASES[index]
    rng = np.random.default_rng(index)
    oc, kh, kw = case.kernel
    x = rng.standard_normal(case.image)
    w = rng.standard_normal((oc, kh, kw, case.image[3] // case.groups))
    bias, scale = rng.standard_normal(oc), rng.standard_normal(oc)
    n, oh, ow, _ = case.output
    shift = rng.standard_normal(n * oh * ow)

    block = case.nb(isa)
    attrs = {"stride": case.stride, "pad": case.pad, "dilation": case.dilation,
             "groups": case.groups}  # fmt: skip
    transposed = isinstance(case, Transposed)
    if transposed:
        packed = aligned(pack.pack_conv_transpose2d(w, attrs, case.output, block))
    else:
        groups = [pack.pack_conv2d(g, block) for g in np.split(w, case.groups)]
        packed = aligned(np.concatenate(groups))
    packed_bias = aligned(
        np.concatenate([pack.pack_bias(g, block) for g in np.split(bias, case.groups)])
    )
    source = strided(x, case.xs)
    scales = aligned(scale.astype(np.float32))
    shifts = aligned(shift.astype(np.float32))
    scratch_bytes = getattr(lib, f"scratch_{index}")
    scratch_bytes.restype = ctypes.c_long

    results = []
    for parts in (1, 3):
        if transposed:
            bound = pack.conv_transpose2d_scratch_bytes(
                case.image, attrs, (kh, kw), case.output, parts
            )
        else:
            bound = pack.conv2d_scratch_bytes(
                case.image, attrs, (kh, kw), parts, case.image[3] + case.xs
            )
        assert scratch_bytes(parts) <= bound
        scratch = aligned(np.full(scratch_bytes(parts) // 4, np.nan, np.float32))
        y = strided(np.full(case.output, 7.0), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(
                pointer(source), pointer(packed), pointer(packed_bias), pointer(y),
                pointer(scratch), part, parts, pointer(scales), pointer(shifts),
            )  # fmt: skip
        assert np.isnan(y[:, oc:]).all(), "wrote between the pixels"
        results.append(y[:, :oc].copy())

    assert results[0].tobytes() == results[1].tobytes(), "the result depends on the parts"
    x32, w32 = x.astype(np.float32).astype(float), w.astype(np.float32).astype(float)
    expected = reference(case, x32, w32, bias.astype(np.float32).astype(float))
    expected = expected * scales + shifts.reshape(n, oh, ow, 1)
    error = np.abs(results[0].reshape(case.output) - expected).max()
    assert error <= 2e-6 * (1 + np.abs(expected).max()) * np.sqrt(kh * kw * case.image[3])
