"""Softmax and layer normalisation without float instructions: equal to the same integer arithmetic in Python, and
within a step of the real functions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, angle, check
from driver import cpu_isas
from numpy.typing import NDArray


def exponentials(scale: float, entries: int, bits: int) -> NDArray[np.uint32]:
    """round(2^bits exp(-k scale)) for k < entries; the last entry stands for all that follow."""
    return np.rint(np.exp(-scale * np.arange(entries)) * 2.0**bits).astype(np.uint32)


def softmax(x: NDArray[np.generic], table: NDArray[np.uint32], levels: int, zero: int, to: type) -> NDArray[np.generic]:
    """The definition in softmax.h along axis 1 of [outer, n, inner], in Python's integers."""
    wide = x.astype(np.int64)
    e = table[np.minimum(wide.max(1, keepdims=True) - wide, table.size - 1)].astype(object)
    r = (levels << 32) // e.sum(1, keepdims=True)
    y = (e * r + (1 << 31)) // (1 << 32) + zero
    return np.clip(y.astype(np.int64), np.iinfo(to).min, np.iinfo(to).max).astype(to)


SOFTMAX: list[tuple[tuple[int, int, int], type, type, float, int]] = [
    ((3, 10, 1), np.uint8, np.uint8, 0.05, 256),
    ((2, 197, 1), np.int8, np.int8, 0.1, 256),
    ((1, 1100, 1), np.uint8, np.uint8, 0.02, 256),
    ((2, 7, 5), np.int8, np.uint8, 0.3, 256),
    ((2, 40, 1), np.int16, np.int16, 0.005, 4096),
    ((1, 1, 1), np.uint8, np.uint8, 1.0, 256),
    ((3, 10, 1), np.uint8, np.int32, 0.05, 256),
    ((1, 1100, 1), np.int8, np.int32, 0.02, 256),
]


@pytest.mark.parametrize("isa", cpu_isas())
def test_softmax(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for shape, dtype, to, scale, entries in SOFTMAX:
        info = np.iinfo(dtype)
        x = np.clip(rng.normal(0, 40 if info.bits == 8 else 3000, shape), info.min, info.max).astype(dtype)
        bits = 30 if to is np.int32 else 16 if info.bits == 8 else 24
        table = exponentials(scale, entries, bits)
        levels, zero = {np.uint8: (256, 0), np.int8: (256, -128), np.int16: (32768, 0), np.int32: (2**24, 0)}[to]
        want = softmax(x, table, levels, zero, to)
        exact = np.exp(scale * (x.astype(float) - x.max(1, keepdims=True)))
        exact = np.clip(exact / exact.sum(1, keepdims=True) * levels + zero, np.iinfo(to).min, np.iinfo(to).max)
        cut = 2.0 ** (bits - 32)  # of the reciprocal
        assert np.abs(want - exact).max() <= 0.5 + cut + (shape[1] + 1) * 2.0**-bits * levels
        kernel = angle("integer_softmax", CTYPE[np.dtype(dtype)], CTYPE[np.dtype(to)], *shape, entries)
        cases.append(Case(f"{kernel}::run(x0, x1, y0, part, {levels}, {zero})", [x, table], [want]))
    check(cases, ["softmax.h"], isa, tmp_path)


def layer_norm(
    x: NDArray[np.generic], scale: NDArray[np.int32], bias: NDArray[np.int32], centred: bool, x_zero: int, eps: int,
    shift: int, zero: int, to: type
) -> NDArray[np.generic]:
    """The definition in norm.h, row by row, in Python's integers."""
    rows = []
    n = x.shape[1]
    for row in x.astype(object) - x_zero:
        s, q = sum(row) if centred else 0, sum(row * row)
        v = n * q - s * s + eps
        t = 0
        while v << 2 * t < 1 << 60:
            t += 1
        inverse = (1 << 61) // math.isqrt(v << 2 * t)
        z = ((n * row - s) * inverse + (1 << (45 - t))) >> (46 - t)
        y = ((z * scale.astype(object) + (bias.astype(object) << (shift - 15)) + (1 << (shift - 1))) >> shift) + zero
        rows.append([min(max(v, np.iinfo(to).min), np.iinfo(to).max) for v in y])
    return np.array(rows).astype(to)


@pytest.mark.parametrize("isa", cpu_isas())
def test_layer_norm(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cases = []
    shapes: list[tuple[int, int, type, type, int | None]] = [
        (3, 64, np.uint8, np.uint8, None), (2, 192, np.int8, np.int8, None), (2, 33, np.int16, np.int16, None),
        (1, 1, np.uint8, np.uint8, None), (2, 9, np.uint16, np.int16, None),
        (3, 64, np.uint8, np.uint8, 131), (2, 19, np.int16, np.int16, 0), (1, 1, np.int8, np.uint8, -7),
        (2, 32767, np.uint16, np.int8, 0), (3, 40, np.uint16, np.uint8, 65535), (2, 70000, np.uint8, np.uint8, None),
    ]  # fmt: skip
    for rows, n, dtype, to, about in shapes:
        centred, x_zero = about is None, about or 0
        info, limits = np.iinfo(dtype), np.iinfo(to)
        x = rng.integers(info.min, info.max, (rows, n), endpoint=True).astype(dtype)
        if rows > 1:
            x[-1] = info.max  # no variance
            x[-1, -1] -= 1
        uniform = n > 192
        gamma, beta = rng.uniform(-2, 2, 1 if uniform else n), rng.uniform(-1, 1, 1 if uniform else n)
        step, zero, shift = (0.04, (limits.min + limits.max + 1) // 2, 36) if limits.bits == 8 else (1e-3, 0, 32)
        scale = np.rint(gamma / step * 2.0 ** (shift - 15)).astype(np.int32)
        bias = np.rint(beta / step * 2.0**15).astype(np.int32)
        want = layer_norm(x, scale, bias, centred, x_zero, 1, shift, zero, to)
        wide = x.astype(float) - (x.mean(1, keepdims=True) if centred else x_zero)
        spread = np.sqrt((wide**2).mean(1, keepdims=True) + 1.0 / n**2)
        exact = (wide / spread * gamma + beta) / step + zero
        assert np.abs(want - np.clip(exact, limits.min, limits.max)).max() <= 0.5 + 2.0**-13 / step
        types = (CTYPE[np.dtype(t)] for t in (dtype, to))
        flags = (str(flag).lower() for flag in (centred, uniform))
        kernel = angle("integer_layer_norm", *types, rows, n, *flags)
        call = f"{kernel}::run(x0, x1, x2, y0, part, 1, {shift}, {x_zero}, {zero})"
        cases.append(Case(call, [x, scale, bias], [want]))
    check(cases, ["norm.h"], isa, tmp_path)
