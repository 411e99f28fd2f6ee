"""Reductions over any axes, extremum positions, running sums, top k."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas
from numpy.typing import NDArray

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((7,), (0,)),
    ((5, 33), (1,)),
    ((33, 5), (0,)),
    ((2, 9, 17), (0, 2)),
    ((3, 49, 64), (1,)),
    ((2, 5, 130), (1,)),
    ((4, 1000), (1,)),
    ((1, 20011), (1,)),
    ((2, 3, 4, 5), (1, 3)),
    ((2, 3, 4, 5), (0, 1, 2, 3)),
    ((3, 0), (1,)),
    ((300, 3), (0,)),
    ((6, 2, 3), (0,)),
    ((17, 2), (1,)),
]

OPS: dict[str, tuple[Callable[..., NDArray[np.float64]], float]] = {
    "Sum": (np.sum, 1e-6),
    "Mean": (np.mean, 1e-6),
    "Max": (np.max, 0),
    "Min": (np.min, 0),
    "Prod": (np.prod, 1e-5),
}


def kernel(op: str, ctype: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    kept = [i for i in range(len(shape)) if i not in axes]
    tags = [
        angle(tag, *(source[i] for i in dims))
        for dims in (kept, axes)
        for tag, source in (("Shape", shape), ("Strides", strides))
    ]
    return angle("reduce", op, ctype, *tags)


@pytest.mark.parametrize("isa", cpu_isas())
def test_float(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    cases = []
    for n, (shape, axes) in enumerate(SHAPES):
        for k, (op, (fn, tolerance)) in enumerate(OPS.items()):
            if op != "Sum" and k % 4 != n % 4:  # each operation on a quarter of the shapes
                continue
            if 0 in shape and op in ("Max", "Min", "Mean"):
                continue
            x = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            want = np.asarray(fn(x.astype(np.float64), axis=axes)).astype(np.float32)
            if op == "Prod" and math.prod(shape[a] for a in axes) > 100:
                continue
            cases.append(Case(f"{kernel(op, 'float', shape, axes)}::run(x0, y0, part)", [x], [want], atol=tolerance))
    check(cases, ["reduce.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_integers_wrap(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    cases = []
    for shape, axes in SHAPES[1:4]:
        for dtype, ctype in ((np.int8, "int8_t"), (np.uint8, "uint8_t"), (np.int32, "int32_t"), (np.int64, "int64_t")):
            info = np.iinfo(dtype)
            x = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
            for op, want in (
                ("Sum", np.sum(x, axes, dtype=dtype)),
                ("Max", np.max(x, axes)),
                ("Min", np.min(x, axes)),
                ("Prod", np.prod(x, axes, dtype=dtype)),
            ):
                cases.append(Case(f"{kernel(op, ctype, shape, axes)}::run(x0, y0, part)", [x], [np.asarray(want)]))
    check(cases, ["reduce.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_nan_reaches_the_result(isa: str, tmp_path: Path) -> None:
    x = np.arange(2 * 37, dtype=np.float32).reshape(2, 37)
    x[0, 20] = np.nan
    cases = []
    for op, fn in (("Max", np.max), ("Min", np.min), ("Sum", np.sum)):
        for axes in ((0,), (1,)):
            cases.append(Case(f"{kernel(op, 'float', x.shape, axes)}::run(x0, y0, part)", [x], [fn(x, axes)]))
    check(cases, ["reduce.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_sum_of_many(isa: str, tmp_path: Path) -> None:
    """Blocked summation: a million terms of one sign stay within a few units of the last place."""
    x = np.random.default_rng(7).uniform(0, 1, 1_000_003).astype(np.float32)
    want = np.asarray(x.astype(np.float64).sum(), np.float32)
    wide = np.random.default_rng(8).uniform(0, 1, (100_003, 3)).astype(np.float32)
    cases = [
        Case(f"{kernel('Sum', 'float', x.shape, (0,))}::run(x0, y0, part)", [x], [want], rtol=5e-7),
        Case(
            f"{kernel('Sum', 'float', wide.shape, (0,))}::run(x0, y0, part)",
            [wide],
            [wide.astype(np.float64).sum(0).astype(np.float32)],
            rtol=3e-6,
        ),
    ]
    check(cases, ["reduce.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_extremum_scan_topk(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    cases = []
    for o, n, i in [(1, 1, 1), (3, 17, 1), (2, 5, 33), (1, 9, 70), (4, 8, 1), (3, 200, 1), (2, 20, 32)]:
        x = rng.integers(-4, 5, (o, n, i)).astype(np.float32)
        x[-1, -1, -1] = x[-1, n // 2, -1] = np.inf  # beyond all others, in a row without NaN
        if n > 4:
            x[0, 3, 0] = x[0, 1, 0] = np.nan
        for largest in (True, False):
            fn = np.argmax if largest else np.argmin
            for last in (True, False):
                want = n - 1 - fn(x[:, ::-1], 1) if last else fn(x, 1)
                k = angle("arg_extremum", "float", o, n, i, str(largest).lower(), str(last).lower())
                cases.append(Case(f"{k}::run(x0, y0, part)", [x], [want]))
        for dtype, ctype in ((np.float32, "float"), (np.int32, "int32_t")):
            v = rng.integers(-3, 4, (o, n, i)).astype(dtype)
            for op, fn, start in (("Sum", np.cumsum, 0), ("Prod", np.cumprod, 1)):
                for exclusive in (False, True):
                    for reverse in (False, True):
                        w = v[:, ::-1] if reverse else v
                        r = fn(w, axis=1, dtype=dtype)
                        if exclusive:
                            r = np.concatenate([np.full((o, 1, i), start, dtype), r[:, :-1]], 1)
                        r = r[:, ::-1] if reverse else r
                        if exclusive != reverse and ctype == "int32_t":
                            continue
                        k = angle("scan", op, ctype, o, n, i, str(exclusive).lower(), str(reverse).lower())
                        cases.append(Case(f"{k}::run(x0, y0, part)", [v], [np.ascontiguousarray(r)], rtol=1e-6))
    for o, n, k in [(3, 1, 1), (2, 17, 5), (5, 100, 100), (4, 1000, 7), (1, 5, 0)]:
        for largest in (True, False):
            x = rng.integers(-20, 20, (o, n)).astype(np.float32)
            order = np.argsort(-x if largest else x, axis=1, kind="stable")[:, :k]
            kernel_name = angle("topk", "float", o, n, k, str(largest).lower())
            cases.append(
                Case(
                    f"{kernel_name}::run(x0, y0, y1, scratch, part)",
                    [x],
                    [np.take_along_axis(x, order, 1), order.astype(np.int64)],
                    kernel_name,
                )
            )
    check(cases, ["reduce.h", "topk.h"], isa, tmp_path)
