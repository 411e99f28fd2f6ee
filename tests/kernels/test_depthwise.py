"""Depthwise convolution against a float64 sum over the taps."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer
from numpy.typing import NDArray

from skive import pack


@dataclass(frozen=True)
class Case:
    """One depthwise convolution; `xs` and `ys` are extra floats between pixels."""

    image: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    xs: int = 0
    ys: int = 0

    @property
    def channels(self) -> int:
        return self.image[3] * self.multiplier

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        oh = (h + t + b - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        ow = (w + left + r - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return n, oh, ow, self.channels

    def cpp(self) -> str:
        def tag(name: str, *values: int) -> str:
            return f"{name}<{', '.join(map(str, values))}>"

        shape = [tag("Image", *self.image), tag("Kernel", self.channels, *self.kernel),
                 tag("Stride", *self.stride), tag("Pad", *self.pad),
                 tag("Dilation", *self.dilation)]  # fmt: skip
        return (
            f"depthwise2d<{', '.join(shape)}, {self.image[3] + self.xs}, {self.channels + self.ys}>"
        )


def random_cases(count: int) -> list[Case]:
    """Random shapes with a non-empty output; the same ones on every run."""
    choose = random.Random(1)
    cases: list[Case] = []
    while len(cases) < count:
        case = Case(
            image=(choose.choice([1, 2]), choose.randint(1, 14), choose.randint(1, 30),
                   choose.choice([1, 3, 7, 16, 17, 33, 40])),
            kernel=(choose.choice([1, 2, 3, 5]), choose.choice([1, 2, 3, 5, 7])),
            stride=(choose.choice([1, 2]), choose.choice([1, 2, 3])),
            pad=(choose.randint(0, 3), choose.randint(0, 3), choose.randint(0, 3),
                 choose.randint(0, 3)),
            dilation=(choose.choice([1, 1, 2]), choose.choice([1, 1, 2, 5])),
            multiplier=choose.choice([1, 1, 1, 2, 5]),
            xs=choose.choice([0, 5]),
            ys=choose.choice([0, 3]),
        )  # fmt: skip
        if min(case.output) > 0:
            cases.append(case)
    return cases


CASES = [
    Case((1, 14, 14, 33), (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 15, 15, 16), (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((1, 7, 7, 48), (5, 5), pad=(2, 2, 2, 2)),
    Case((1, 40, 41, 8), (5, 5), stride=(2, 2), pad=(1, 1, 2, 2)),
    Case((1, 1, 100, 17), (1, 3), pad=(0, 32, 0, 0), dilation=(1, 16)),  # causal, wide border
    Case((1, 100, 1, 17), (3, 1), pad=(32, 0, 0, 0), dilation=(16, 1)),  # the same along the height
    Case((1, 1, 12, 5), (1, 3), pad=(0, 20, 0, 20), dilation=(1, 20)),  # no column has all its taps
    Case((1, 3, 40, 4), (1, 31), pad=(0, 15, 0, 15)),
    Case((1, 5, 6, 1), (3, 3), pad=(1, 1, 1, 1), multiplier=20),
    *random_cases(16),
]

# The epilogue scales by a value per channel and adds one per pixel: it sees both coordinates.
_CASE = """
using Case%(i)d = %(type)s;
extern "C" void run_%(i)d(const float* x, const float* w, const float* bias, float* y, int part,
                          int parts, const float* scale, const float* shift) {
  static_assert(Case%(i)d::scratch_bytes(2) == 0, "needs no scratch");
  Case%(i)d::run(x, w, bias, y, nullptr, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   return acc * load<decltype(acc)::lanes>(scale + channel) +
                          splat<decltype(acc)::lanes>(shift[pixel]);
                 });
}
"""


def reference(x: NDArray[np.float64], w: NDArray[np.float64], case: Case) -> NDArray[np.float64]:
    """x [N, H, W, C], w [C * multiplier, KH, KW] -> [N, OH, OW, C * multiplier] in float64."""
    t, left, b, r = case.pad
    padded = np.pad(x, ((0, 0), (t, b), (left, r), (0, 0))).repeat(case.multiplier, axis=-1)
    _, oh, ow, _ = case.output
    (sh, sw), (dh, dw) = case.stride, case.dilation
    y = np.zeros(case.output)
    for kh in range(case.kernel[0]):
        for kw in range(case.kernel[1]):
            window = padded[:, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh,
                            kw * dw : kw * dw + (ow - 1) * sw + 1 : sw]  # fmt: skip
            y += window * w[:, kh, kw]
    return y


def strided(values: NDArray[np.float32], extra: int) -> NDArray[np.float32]:
    """Pixels of `values` with `extra` floats of NaN between them, 4-byte aligned only."""
    flat = values.reshape(-1, values.shape[-1])
    wide = np.full((flat.shape[0], flat.shape[1] + extra), np.nan, np.float32)
    wide[:, : flat.shape[1]] = flat
    return aligned(wide, offset=1)


@pytest.fixture(scope="module", params=list(ISA_FLAGS))
def library(
    request: pytest.FixtureRequest, libraries: Path
) -> ctypes.CDLL:
    isa = request.param
    if isa not in cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(_CASE % {"i": i, "type": c.cpp()} for i, c in enumerate(CASES))
    source = '#include "skive/depthwise.h"\nusing namespace skive;\n' + body
    return compile_library(source, isa, libraries, flags=("-O1",))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_float64(library: ctypes.CDLL, index: int) -> None:
    case = CASES[index]
    rng = np.random.default_rng(index)
    n, oh, ow, oc = case.output
    x = rng.standard_normal(case.image).astype(np.float32)
    w = rng.standard_normal((oc, *case.kernel)).astype(np.float32)
    bias, scale = rng.standard_normal((2, oc)).astype(np.float32)
    shift = rng.standard_normal(n * oh * ow).astype(np.float32)
    packed, packed_bias = map(aligned, pack.pack_depthwise(w, bias, case.multiplier))
    source, scales, shifts = strided(x, case.xs), aligned(scale), aligned(shift)

    results = []
    for parts in (1, 3):
        y = strided(np.full(case.output, 7.0, np.float32), case.ys)
        for part in range(parts):
            getattr(library, f"run_{index}")(
                pointer(source), pointer(packed), pointer(packed_bias), pointer(y), part, parts,
                pointer(scales), pointer(shifts),
            )  # fmt: skip
        assert np.isnan(y[:, oc:]).all(), "wrote between the pixels"
        results.append(y[:, :oc].copy())

    assert results[0].tobytes() == results[1].tobytes(), "the result depends on the parts"
    plain = reference(x.astype(float), w.astype(float), case) + bias
    expected = plain * scale + shift.reshape(n, oh, ow, 1)
    error = np.abs(results[0].reshape(case.output) - expected).max()
    assert error <= 2e-6 * (1 + np.abs(expected).max()) * np.sqrt(np.prod(case.kernel))


def test_nan_and_infinity_reach_exactly_their_windows(library: ctypes.CDLL) -> None:
    case = CASES[0]  # 3x3, padding 1
    x = np.ones(case.image, np.float32)
    x[0, 5, 6, 2], x[0, 0, 0, 32] = np.nan, np.inf
    w, bias = map(aligned, pack.pack_depthwise(np.ones((33, 3, 3), np.float32), None))
    y = aligned(np.zeros(case.output, np.float32))
    scale, shift = aligned(np.ones(33, np.float32)), aligned(np.zeros(14 * 14, np.float32))
    library.run_0(pointer(x), pointer(w), pointer(bias), pointer(y), 0, 1,
                  pointer(scale), pointer(shift))  # fmt: skip
    nan = np.zeros(case.output, bool)
    nan[0, 4:7, 5:8, 2] = True
    infinite = np.zeros(case.output, bool)
    infinite[0, 0:2, 0:2, 32] = True
    assert np.array_equal(np.isnan(y), nan)
    assert np.array_equal(np.isposinf(y), infinite)


def test_packing_refuses_a_multiplier_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple"):
        pack.pack_depthwise(np.zeros((7, 3, 3), np.float32), None, multiplier=2)
