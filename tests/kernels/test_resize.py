"""Resampling from tables against the same weighted sums in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import ISA_FLAGS, aligned, compile_library, cpu_isas, pointer
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """`taps` source positions per axis; `xs` and `ys` are extra floats between pixels."""

    image: tuple[int, int, int, int]
    size: tuple[int, int]
    taps: tuple[int, int]
    xs: int = 0
    ys: int = 0

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.image[0], *self.size, self.image[3]

    def cpp(self) -> str:
        image = ", ".join(map(str, self.image))
        numbers = [*self.size, *self.taps, self.image[3] + self.xs, self.image[3] + self.ys]
        return f"resize2d<Image<{image}>, {', '.join(map(str, numbers))}>"


CASES = [
    Case((1, 4, 5, 16), (8, 10), (1, 1)),
    Case((2, 3, 7, 33), (5, 3), (1, 1), xs=3, ys=1),
    Case((1, 8, 8, 3), (16, 16), (2, 2)),
    Case((2, 5, 4, 17), (9, 13), (2, 2), ys=2),
    Case((1, 1, 6, 1), (1, 11), (1, 2)),
    Case((1, 9, 3, 7), (4, 3), (2, 1), xs=2),
    Case((1, 6, 6, 40), (13, 11), (4, 4)),
]

_CASE = """
extern "C" void run_%(i)d(const float* x, const int32_t* rows, const float* row_weights,
                          const int32_t* columns, const float* column_weights, float* y, int part,
                          int parts, const float* scale, const float* shift) {
  %(type)s::run(x, {rows, row_weights}, {columns, column_weights}, y, nullptr, Part{part, parts},
                [=](auto acc, ptrdiff_t pixel, int channel) {
                  return acc * load<decltype(acc)::lanes>(scale + channel) +
                         splat<decltype(acc)::lanes>(shift[pixel]);
                });
}
"""


def axis_table(
    length: int, size: int, taps: int
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Sources and weights of half-pixel nearest (1 tap), linear (2) or cubic (4) resampling."""
    position = (np.arange(size) + 0.5) * length / size - 0.5
    if taps == 1:
        return np.clip(np.round(position), 0, length - 1).astype(np.int32)[:, None], None
    first = np.floor(position).astype(int) - (taps // 2 - 1)
    t = position - np.floor(position)
    if taps == 2:
        weights = np.stack([1 - t, t], 1)
    else:
        distance = np.abs(t[:, None] - np.arange(-1, 3))
        a = -0.75
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    sources = np.clip(first[:, None] + np.arange(taps), 0, length - 1)
    return sources.astype(np.int32), weights.astype(np.float32)


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
    source = '#include "skive/resize.h"\nusing namespace skive;\n' + body
    return compile_library(source, isa, libraries, flags=("-O1",))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_float64(library: ctypes.CDLL, index: int) -> None:
    case = CASES[index]
    rng = np.random.default_rng(index)
    n, h, w, c = case.image
    x = rng.standard_normal(case.image).astype(np.float32)
    scale = rng.standard_normal(c).astype(np.float32)
    shift = rng.standard_normal(n * case.size[0] * case.size[1]).astype(np.float32)
    rows, row_weights = axis_table(h, case.size[0], case.taps[0])
    columns, column_weights = axis_table(w, case.size[1], case.taps[1])
    null = ctypes.c_void_p(None)
    source, scales, shifts = strided(x, case.xs), aligned(scale), aligned(shift)

    results = []
    for parts in (1, 3):
        y = strided(np.full(case.output, 7.0, np.float32), case.ys)
        for part in range(parts):
            getattr(library, f"run_{index}")(
                pointer(source),
                pointer(rows), null if row_weights is None else pointer(row_weights),
                pointer(columns), null if column_weights is None else pointer(column_weights),
                pointer(y), part, parts, pointer(scales), pointer(shifts),
            )  # fmt: skip
        assert np.isnan(y[:, c:]).all(), "wrote between the pixels"
        results.append(y[:, :c].copy())

    assert results[0].tobytes() == results[1].tobytes(), "the result depends on the parts"
    wr = np.ones(rows.shape) if row_weights is None else row_weights.astype(float)
    wc = np.ones(columns.shape) if column_weights is None else column_weights.astype(float)
    resampled = np.einsum("nitwc,it->niwc", x.astype(float)[:, rows], wr)
    resampled = np.einsum("nijtc,jt->nijc", resampled[:, :, columns], wc)
    expected = resampled * scale + shift.reshape(n, *case.size, 1)
    error = np.abs(results[0].reshape(case.output) - expected).max()
    assert error <= 2e-6 * (1 + np.abs(expected).max())
