"""Batched products of dynamic operands, float32 and integer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

# batch of a, batch of b, M, K, N
SHAPES = [
    ((), (), 1, 1, 1),
    ((), (), 1, 64, 100),
    ((), (), 3, 17, 33),
    ((), (), 5, 7, 3),
    ((), (), 40, 33, 200),
    ((2,), (2,), 9, 16, 17),
    ((3, 1), (1, 2), 6, 5, 7),
    ((2, 3), (), 11, 8, 65),
    ((), (4,), 2, 9, 40),
    ((2,), (2,), 7, 0, 3),
    ((), (), 33, 130, 70),
    ((2,), (), 20, 1024, 17),  # rows a page apart
]


def strides(batch: tuple[int, ...], full: tuple[int, ...], matrix: int) -> list[int]:
    padded = (1,) * (len(full) - len(batch)) + batch
    return [0 if d == 1 else matrix * math.prod(padded[i + 1 :]) for i, d in enumerate(padded)]


@pytest.mark.parametrize("isa", cpu_isas())
def test_float(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    cases = []
    for n_shape, (ba, bb, m, k, n) in enumerate(SHAPES):
        full = np.broadcast_shapes(ba, bb)
        for ta in (False, True):
            for tb in (False, True):
                if 2 * ta + tb not in (n_shape % 4, (n_shape + 1) % 4):  # two of four transpositions per shape
                    continue
                a = rng.standard_normal((*ba, k, m) if ta else (*ba, m, k)).astype(np.float32)
                b = rng.standard_normal((*bb, n, k) if tb else (*bb, k, n)).astype(np.float32)
                left = np.swapaxes(a, -1, -2) if ta else a
                right = np.swapaxes(b, -1, -2) if tb else b
                want = left.astype(np.float64) @ right.astype(np.float64)
                kernel = angle(
                    "matmul",
                    angle("Shape", *full),
                    m,
                    k,
                    n,
                    angle("Strides", *strides(ba, full, m * k)),
                    angle("Strides", *strides(bb, full, k * n)),
                    str(ta).lower(),
                    str(tb).lower(),
                )
                text = f"{kernel}::run(x0, x1, y0, scratch, part, [](auto v, ptrdiff_t, int) {{ return v; }})"
                cases.append(Case(text, [a, b], [want.astype(np.float32)], kernel, rtol=1e-5, atol=1e-6))
    check(cases, ["matmul.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_epilogue_sees_row_and_column(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    cases = []
    for m, n in ((2, 40), (9, 70)):
        a = rng.standard_normal((2, m, 8)).astype(np.float32)
        b = rng.standard_normal((2, 8, n)).astype(np.float32)
        residual = rng.standard_normal((2, m, n)).astype(np.float32)
        want = np.maximum(a.astype(np.float64) @ b + residual, 0).astype(np.float32)
        kernel = angle("matmul", "Shape<2>", m, 8, n, angle("Strides", m * 8), angle("Strides", 8 * n))
        fn = f"[=](auto v, ptrdiff_t r, int c) {{ return relu(v + load<decltype(v)::lanes>(x2 + r * {n} + c)); }}"
        cases.append(
            Case(f"{kernel}::run(x0, x1, y0, scratch, part, {fn})", [a, b, residual], [want], kernel, atol=1e-6)
        )
    check(cases, ["matmul.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_integers(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    cases = []
    kinds = [(np.int32, np.int32, 9), (np.int32, np.int32, 37), (np.int64, np.int64, 9), (np.uint8, np.int32, 9),
             (np.int8, np.int32, 9)]
    for dtype, result, columns in kinds:
        info = np.iinfo(dtype)
        for ta in (False, True):
            for tb in (False, True):
                a = rng.integers(info.min, info.max, (2, 7, 5) if ta else (2, 5, 7), dtype, endpoint=True)
                b = rng.integers(info.min, info.max, (columns, 7) if tb else (7, columns), dtype, endpoint=True)
                left = (np.swapaxes(a, -1, -2) if ta else a).astype(result)
                with np.errstate(over="ignore"):
                    want = np.matmul(left, (b.T if tb else b).astype(result))
                names = {np.int32: "int32_t", np.int64: "int64_t", np.uint8: "uint8_t", np.int8: "int8_t"}
                kernel = angle(
                    "plain_matmul",
                    names[dtype],
                    names[result],
                    "Shape<2>",
                    5,
                    7,
                    columns,
                    "Strides<35>",
                    "Strides<0>",
                    str(ta).lower(),
                    str(tb).lower(),
                )
                cases.append(Case(f"{kernel}::run(x0, x1, y0, part)", [a, b], [want]))
    check(cases, ["matmul.h"], isa, tmp_path)
