"""Pooling over windows and over whole images against numpy."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """One window; `counted` is the padding that enters the average's divisor."""

    image: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    counted: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    xs: int = 0
    ys: int = 0

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, c = self.image
        t, left, b, r = self.pad
        oh = (h + t + b - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        ow = (w + left + r - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return n, oh, ow, c

    def cpp(self) -> dict[str, str]:
        def tag(name: str, *values: int) -> str:
            return f"{name}<{', '.join(map(str, values))}>"

        c = self.image[3]
        shape = [tag("Image", *self.image), tag("Kernel", c, *self.kernel),
                 tag("Stride", *self.stride), tag("Pad", *self.pad)]  # fmt: skip
        rest = [tag("Dilation", *self.dilation), f"{c + self.xs}, {c + self.ys}"]
        return {
            "max": f"max_pool2d<{', '.join([*shape, *rest])}>",
            "average": f"avg_pool2d<{', '.join([*shape, tag('Pad', *self.counted), *rest])}>",
            "image": tag("Image", *self.image),
            "xs": str(c + self.xs),
        }


def random_cases(count: int) -> list[Case]:
    """Random shapes with a non-empty output; the same ones on every run."""
    choose = random.Random(2)
    cases: list[Case] = []
    while len(cases) < count:
        pad = tuple(choose.randint(0, 2) for _ in range(4))
        case = Case(
            image=(choose.choice([1, 2]), choose.randint(1, 14), choose.randint(1, 30),
                   choose.choice([1, 3, 7, 16, 17, 33, 40])),
            kernel=(choose.choice([1, 2, 3, 5]), choose.choice([1, 2, 3, 7])),
            stride=(choose.choice([1, 2]), choose.choice([1, 2, 3])),
            pad=pad,
            counted=choose.choice([(0, 0, 0, 0), pad, (pad[0], pad[1], 0, 0)]),
            dilation=(choose.choice([1, 1, 2]), choose.choice([1, 1, 2])),
            xs=choose.choice([0, 5]),
            ys=choose.choice([0, 3]),
        )  # fmt: skip
        if min(case.output) > 0:
            cases.append(case)
    return cases


CASES = [
    Case((1, 14, 15, 33), (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((2, 8, 8, 16), (2, 2), stride=(2, 2)),
    Case((1, 9, 9, 7), (3, 3), stride=(2, 2), pad=(0, 0, 1, 1), counted=(0, 0, 0, 0)),  # ceil mode
    Case((1, 6, 6, 70), (6, 6)),
    Case((1, 1, 50, 3), (1, 9), pad=(0, 4, 0, 4), counted=(0, 4, 0, 4)),
    *random_cases(12),
    Case((1, 1, 400, 3), (1, 40), stride=(1, 10), pad=(0, 100, 0, 91), dilation=(1, 10)),  # wider than any tile
    Case((1, 2, 300, 5), (1, 30), stride=(1, 20), dilation=(1, 8)),  # tiles of two columns
]

_CASE = """
extern "C" void max_%(i)d(const float* x, float* y, int part, int parts, const float* shift) {
  %(max)s::run(x, y, nullptr, Part{part, parts}, Shift{shift});
}
extern "C" void average_%(i)d(const float* x, float* y, int part, int parts, const float* shift) {
  %(average)s::run(x, y, nullptr, Part{part, parts}, Shift{shift});
}
extern "C" void global_max_%(i)d(const float* x, float* y, int part, int parts, const float* shift) {
  global_max_pool2d<%(image)s, %(xs)s>::run(x, y, nullptr, Part{part, parts}, Shift{shift});
}
extern "C" void global_average_%(i)d(const float* x, float* y, int part, int parts,
                                     const float* shift) {
  global_avg_pool2d<%(image)s, %(xs)s>::run(x, y, nullptr, Part{part, parts}, Shift{shift});
}
"""

# The epilogue adds one value per pixel and the channel's number: it sees both coordinates.
_SOURCE = """
#include "skive/pool.h"
using namespace skive;
struct Shift {
  const float* shift;
  template <int N>
  Vec<N> operator()(Vec<N> value, ptrdiff_t pixel, int channel) const {
    float number[kLanes];
    for (int i = 0; i < kLanes; ++i) number[i] = static_cast<float>(channel + i);
    return value + splat<N>(shift[pixel]) + load<N>(number);
  }
};
"""


def taps(x: NDArray[np.float64], case: Case, fill: float) -> NDArray[np.float64]:
    """[KH * KW, N, OH, OW, C]: what each tap of every window reads, `fill` outside the image."""
    t, left, b, r = case.pad
    padded = np.pad(x, ((0, 0), (t, b), (left, r), (0, 0)), constant_values=fill)
    _, oh, ow, _ = case.output
    (sh, sw), (dh, dw) = case.stride, case.dilation
    return np.stack([
        padded[:, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh,
               kw * dw : kw * dw + (ow - 1) * sw + 1 : sw]
        for kh in range(case.kernel[0]) for kw in range(case.kernel[1])
    ])  # fmt: skip


def average(x: NDArray[np.float64], case: Case) -> NDArray[np.float64]:
    """Sums over the windows by the number of their taps that lie in the counted area."""
    n, h, w, _ = case.image
    t, left, b, r = case.pad
    ct, cl, cb, cr = case.counted
    area = np.zeros((n, t + h + b, left + w + r, 1))
    area[:, t - ct : t + h + cb, left - cl : left + w + cr] = 1.0
    whole = Case(area.shape, case.kernel, case.stride, dilation=case.dilation)
    with np.errstate(invalid="ignore"):
        return taps(x, case, 0.0).sum(0) / taps(area, whole, 0.0).sum(0)


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
    body = "".join(_CASE % {"i": i, **c.cpp()} for i, c in enumerate(CASES))
    return compile_library(_SOURCE + body, isa, libraries, flags=("-O1",))


def run(
    library: ctypes.CDLL, name: str, x: NDArray[np.float32], xs: int, ys: int,
    output: tuple[int, ...], shift: NDArray[np.float32],
) -> NDArray[np.float32]:  # fmt: skip
    """The kernel's output without the epilogue's share; checks that it is the same in 3 parts."""
    source, shifts, results = strided(x, xs), aligned(shift), []
    for parts in (1, 3):
        y = strided(np.full(output, 7.0, np.float32), ys)
        for part in range(parts):
            getattr(library, name)(pointer(source), pointer(y), part, parts, pointer(shifts))
        assert np.isnan(y[:, output[-1] :]).all(), "wrote between the pixels"
        results.append(y[:, : output[-1]].copy())
    assert results[0].tobytes() == results[1].tobytes(), "the result depends on the parts"
    return results[0].reshape(output) - shift.reshape(*output[:-1], 1) - np.arange(output[-1])


def input_of(case: Case, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(case.image).astype(np.float32)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_windows(library: ctypes.CDLL, index: int) -> None:
    case = CASES[index]
    x = input_of(case, index)
    shift = np.arange(np.prod(case.output[:-1]), dtype=np.float32) % 50
    got = run(library, f"max_{index}", x, case.xs, case.ys, case.output, shift)
    np.testing.assert_allclose(got, taps(x.astype(float), case, -np.inf).max(0), atol=2e-5)
    got = run(library, f"average_{index}", x, case.xs, case.ys, case.output, shift)
    np.testing.assert_allclose(got, average(x.astype(float), case), atol=2e-5)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_whole_images(library: ctypes.CDLL, index: int) -> None:
    case = CASES[index]
    x = input_of(case, index)
    n, _, _, c = case.image
    shift = np.arange(n, dtype=np.float32)
    got = run(library, f"global_max_{index}", x, case.xs, 0, (n, c), shift)
    np.testing.assert_allclose(got, x.max((1, 2)), atol=2e-5)
    got = run(library, f"global_average_{index}", x, case.xs, 0, (n, c), shift)
    np.testing.assert_allclose(got, x.astype(float).mean((1, 2)), atol=2e-5)


@pytest.mark.parametrize("at", [0, 1, 7, 13])
def test_nan_survives_wherever_it_stands_in_the_window(library: ctypes.CDLL, at: int) -> None:
    case = CASES[0]
    x = input_of(case, 0)
    x[0, at, at, 4] = np.nan
    zeros = np.zeros(np.prod(case.output[:-1]), np.float32)
    for name, want in [("max_0", taps(x.astype(float), case, -np.inf).max(0)),
                       ("average_0", average(x.astype(float), case))]:  # fmt: skip
        got = run(library, name, x, 0, 0, case.output, zeros)
        assert np.isnan(want).any()
        assert np.array_equal(np.isnan(got), np.isnan(want))
    got = run(library, "global_max_0", x, 0, 0, (1, case.image[3]), zeros[:1])
    assert np.array_equal(np.isnan(got[0]), np.arange(case.image[3]) == 4)
