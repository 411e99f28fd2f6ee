"""softmax and log_softmax along each kind of axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

SHAPES = [(5, 1, 1), (4, 3, 1), (3, 17, 1), (7, 33, 1), (2, 1000, 1), (2, 5, 3), (1, 21, 33), (3, 7, 130), (0, 4, 1)]


@pytest.mark.parametrize("isa", cpu_isas())
def test_softmax(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cases = []
    for shape in SHAPES:
        for log in (False, True):
            x = (rng.standard_normal(shape) * 8).astype(np.float32)
            v = x.astype(np.float64)
            e = np.exp(v - v.max(1, keepdims=True)) if x.size else v
            y = e / e.sum(1, keepdims=True)
            y = v - v.max(1, keepdims=True) - np.log(e.sum(1, keepdims=True)) if log and x.size else y
            kernel = angle("softmax", *shape, "true" if log else "false")
            cases.append(Case(f"{kernel}::run(x0, y0, part)", [x], [y.astype(np.float32)], rtol=1e-6, atol=1e-6))
    check(cases, ["softmax.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_softmax_of_infinities_and_nan(isa: str, tmp_path: Path) -> None:
    inf, nan = np.inf, np.nan
    x = np.array(
        [[0, -inf, 1, -inf, 3], [-inf, -inf, -inf, -inf, -inf], [1, nan, 2, 3, 4], [1e38, -1e38, 0, 0, 0]], np.float32
    )
    with np.errstate(invalid="ignore", over="ignore"):
        v = x.astype(np.float64)
        e = np.exp(v - v.max(1, keepdims=True))
        want = (e / e.sum(1, keepdims=True)).astype(np.float32)
    cases = [Case("softmax<4, 5, 1>::run(x0, y0, part)", [x], [want], rtol=1e-6)]
    cases.append(
        Case(
            "softmax<1, 5, 4>::run(x0, y0, part)",
            [np.ascontiguousarray(x.T)],
            [np.ascontiguousarray(want.T)],
            rtol=1e-6,
        )
    )
    check(cases, ["softmax.h"], isa, tmp_path)
