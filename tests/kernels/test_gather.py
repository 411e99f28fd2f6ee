"""Indexed reads and writes, with bad indices among the good ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, angle, check
from driver import cpu_isas
from numpy.typing import NDArray


def wrap(index: NDArray[np.generic], n: int) -> NDArray[np.int64]:
    i = index.astype(np.int64)
    return np.clip(np.where(i < 0, i + n, i), 0, n - 1)


def some_index(rng: np.random.Generator, shape: tuple[int, ...], n: int, dtype: type) -> NDArray[np.generic]:
    """Indices in range, negative, and (a few) far outside."""
    index = np.asarray(rng.integers(-n, n, shape)).astype(dtype)
    if index.size > 3:
        index.flat[0] = np.iinfo(dtype).max
        index.flat[1] = np.iinfo(dtype).min
    return index


@pytest.mark.parametrize("isa", cpu_isas())
def test_reads(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    cases = []
    for itype in (np.int32, np.int64):
        ic = CTYPE[np.dtype(itype)]
        for dtype in (np.float32, np.uint8, np.int64):
            tc = CTYPE[np.dtype(dtype)]
            for outer, axis, count, inner in [(1, 10, 7, 33), (3, 5, 4, 1), (2, 1, 5, 17)]:
                x = rng.integers(0, 100, (outer, axis, inner)).astype(dtype)
                i = some_index(rng, (count,), axis, itype)
                k = angle("gather", tc, ic, outer, axis, count, inner)
                cases.append(Case(f"{k}::run(x0, x1, y0, part)", [x, i], [x[:, wrap(i, axis)]]))
            x = rng.integers(0, 100, (4, 5, 6)).astype(dtype)
            for axis, shape in ((0, (7, 5, 3)), (1, (4, 2, 6)), (2, (1, 5, 9))):
                i = some_index(rng, shape, x.shape[axis], itype)
                grid = list(np.indices(shape, sparse=True))
                grid[axis] = wrap(i, x.shape[axis])
                k = angle("gather_elements", tc, ic, "Shape<4, 5, 6>", angle("Shape", *shape), axis)
                cases.append(Case(f"{k}::run(x0, x1, y0, part)", [x, i], [x[tuple(grid)]]))
            i = some_index(rng, (3, 2), 4, itype)
            k = angle("gather_nd", tc, ic, 1, "Shape<4, 5>", 3, 6)
            cases.append(Case(f"{k}::run(x0, x1, y0, part)", [x, i], [x[wrap(i[:, 0], 4), wrap(i[:, 1], 5)]]))
            i = some_index(rng, (4, 3, 1), 5, itype)
            k = angle("gather_nd", tc, ic, 4, "Shape<5>", 3, 6)
            cases.append(Case(f"{k}::run(x0, x1, y0, part)", [x, i], [x[np.arange(4)[:, None], wrap(i[..., 0], 5)]]))
    check(cases, ["gather.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_writes(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(16)
    reductions = {"Add": np.add, "Mul": np.multiply, "Minimum": np.minimum, "Maximum": np.maximum}
    cases = []
    for dtype in (np.float32, np.int32):
        tc = CTYPE[np.dtype(dtype)]
        x = rng.integers(-9, 9, (4, 5)).astype(dtype)
        for axis, shape in ((0, (6, 3)), (1, (4, 7))):
            i = some_index(rng, shape, x.shape[axis], np.int64)
            u = rng.integers(-3, 3, shape).astype(dtype)
            grid = list(np.indices(shape, sparse=True))
            grid[axis] = wrap(i, x.shape[axis])
            for name, fn in reductions.items():
                want = x.copy()
                fn.at(want, tuple(grid), u)
                k = angle("scatter_elements", tc, "int64_t", "Shape<4, 5>", angle("Shape", *shape), axis, name)
                cases.append(Case(f"{k}::run(x0, x1, x2, y0, part)", [x, i, u], [want]))
        want = x.copy()
        i = np.array([[0, -1, 2]], np.int32)
        want[:1, [0, 4, 2]] = [[7, 8, 9]]
        k = angle("scatter_elements", tc, "int32_t", "Shape<4, 5>", "Shape<1, 3>", 1, "Replace")
        cases.append(Case(f"{k}::run(x0, x1, x2, y0, part)", [x, i, np.array([[7, 8, 9]], dtype)], [want]))
        i = some_index(rng, (5, 1), 4, np.int64)
        u = rng.integers(-3, 3, (5, 5)).astype(dtype)
        for name, fn in reductions.items():
            want = x.copy()
            fn.at(want, wrap(i[:, 0], 4), u)
            k = angle("scatter_nd", tc, "int64_t", "Shape<4>", 5, 5, name)
            cases.append(Case(f"{k}::run(x0, x1, x2, y0, part)", [x, i, u], [want]))
    i = np.array([[0, -1, 3], [7, 2, -9]], np.int64)
    want = np.full((2, 4, 3), 2, np.float32)
    for o in range(2):
        for j in range(3):
            at = i[o, j] + 4 if i[o, j] < 0 else i[o, j]
            if 0 <= at < 4:
                want[o, at, j] = 5
    cases.append(Case("one_hot<float, int64_t, 2, 4, 3>::run(x0, y0, part, 2.0f, 5.0f)", [i], [want]))
    check(cases, ["gather.h"], isa, tmp_path)
