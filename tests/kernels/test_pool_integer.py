"""Pooling of 8- and 16-bit integers equals NumPy bit for bit: maxima without and with an epilogue, sums of x - zero
over windows and over whole images."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, check
from driver import cpu_isas
from numpy.typing import NDArray
from test_pool import CASES as WINDOWS
from test_pool import Case as Window
from test_pool import random_cases, taps

TYPES = [np.uint8, np.int8, np.int16, np.uint16]


def between_pixels(values: NDArray[np.generic], extra: int) -> NDArray[np.generic]:
    """The pixels of `values` as a buffer of results holds them: `extra` untouched elements behind each."""
    flat = values.reshape(-1, values.shape[-1])
    wide = np.full((flat.shape[0], flat.shape[1] + extra), 77, values.dtype)
    wide[:, : flat.shape[1]] = flat
    return wide


def draw(case: Window, dtype: type, seed: int) -> NDArray[np.generic]:
    info = np.iinfo(dtype)
    x = np.random.default_rng(seed).integers(info.min, info.max, case.image, endpoint=True).astype(dtype)
    x[..., ::3] = info.max if seed % 2 else info.min  # the largest sums
    return x


# The sum of channel and pixel numbers shows that the epilogue gets both.
_NUMBERED = """
template <int N>
IVec<N> numbered(IVec<N> v, ptrdiff_t pixel, int channel) {
  int32_t number[kLanes];
  for (int i = 0; i < kLanes; ++i) number[i] = channel + i;
  return v + splat<N>(static_cast<int32_t>(pixel)) + load<N>(number);
}
"""
_FN = "[](auto v, ptrdiff_t pixel, int channel) { return numbered(v, pixel, channel); }"


def number(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.arange(int(np.prod(shape[:-1]))).reshape(*shape[:-1], 1) + np.arange(shape[-1])


def cases_of(window: Window, seed: int) -> list[Case]:
    dtype = TYPES[seed % len(TYPES)]
    info, t = np.iinfo(dtype), CTYPE[np.dtype(dtype)]
    x = draw(window, dtype, seed)
    source = between_pixels(x, window.xs)
    wide = x.astype(np.float64)
    names = window.cpp()
    top = taps(wide, window, info.min).max(0).astype(dtype)
    zero = [0, info.max, 3][seed % 3]
    total = taps(wide - zero, window, 0.0).sum(0).astype(np.int64)
    shape = window.output
    sums = names["max"].replace("max_pool2d", "sum_pool2d")[:-1] + f", {t}, {zero}>"
    as_float = f"[](auto v, ptrdiff_t pixel, int channel) {{ return to_float({_FN}(v, pixel, channel)); }}"
    cases = [
        Case(f"{names['max']}::run(x0, y0, nullptr, part)", [source], [between_pixels(top, window.ys)]),
        Case(f"{names['max']}::run(x0, y0, nullptr, part, {_FN})", [source],
             [between_pixels((top.astype(np.int64) + number(shape)).astype(np.int32), window.ys)]),
        Case(f"{sums}::run(x0, y0, nullptr, part, {_FN})", [source],
             [between_pixels((total + number(shape)).astype(np.int32), window.ys)]),
    ]  # fmt: skip
    if seed % 4 == 0:
        want = between_pixels((total + number(shape)).astype(np.float32), window.ys)
        cases.append(Case(f"{sums}::run(x0, y0, nullptr, part, {as_float})", [source], [want]))
    return cases


@pytest.mark.parametrize("isa", cpu_isas())
def test_windows(isa: str, tmp_path: Path) -> None:
    choose = random.Random(9)
    cases = []
    for i, window in enumerate([*WINDOWS[:11], *WINDOWS[-2:], *random_cases(14)[12:]]):
        channels = choose.choice([0, 64, 65, 96, 130])  # more than a register of bytes
        if channels and i % 2:
            window = Window((*window.image[:3], channels), *(getattr(window, f) for f in (
                "kernel", "stride", "pad", "counted", "dilation", "xs", "ys")))  # fmt: skip
        cases += cases_of(window, i)
    check(cases, ["pool.h"], isa, tmp_path, prelude=_NUMBERED, flags=("-O1",))


@pytest.mark.parametrize("isa", cpu_isas())
def test_whole_images(isa: str, tmp_path: Path) -> None:
    """More pixels than words hold, every remainder of channels, strided pixels, several images."""
    cases = []
    images = [
        (1, 7, 7, 1280), (2, 19, 28, 33), (1, 40, 40, 3), (1, 5, 5, 100), (3, 1, 257, 17), (1, 16, 16, 64),
        (1, 2, 1, 130), (5, 1, 77, 1), (2, 8, 15, 1), (2, 8, 15, 1),
    ]  # fmt: skip
    for i, image in enumerate(images):
        for k, dtype in enumerate(TYPES):
            info = np.iinfo(dtype)
            window = Window(image, image[1:3], xs=(i + k) % 2 * 5)
            x = draw(window, dtype, i + k)
            zero = info.min if k % 2 else info.max
            total = (x.astype(np.int64) - zero).sum((1, 2))
            want = (total + number(total.shape)).astype(np.int32)
            n, h, w, c = image
            name = (f"sum_pool2d<Image<{n}, {h}, {w}, {c}>, Kernel<{c}, {h}, {w}>, Stride<1, 1>, Pad<0, 0, 0, 0>, "
                    f"Dilation<1, 1>, {c + window.xs}, {c}, {CTYPE[np.dtype(dtype)]}, {zero}>")  # fmt: skip
            source = between_pixels(x, window.xs)
            cases.append(Case(f"{name}::run(x0, y0, nullptr, part, {_FN})", [source], [want]))
    # As shipped: g++ 12 at -O2 miscompiled four sums of one channel in plain C++.
    check(cases, ["pool.h"], isa, tmp_path, prelude=_NUMBERED, flags=("-O2",))
