"""Resampling of integers: nearest neighbours copied, weighted sums in float32, equal on every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, check
from driver import cpu_isas
from numpy.typing import NDArray
from test_pool_integer import between_pixels
from test_resize import CASES as SIZES
from test_resize import Case as Size
from test_resize import axis_table

TYPES = [np.uint8, np.int8, np.int16, np.uint16]
_FN = "[](auto v, ptrdiff_t, int) { return v; }"


def literal(values: NDArray[np.generic]) -> str:
    """A function-local C++ table that is passed where a pointer is expected."""
    ctype = "float" if values.dtype == np.float32 else "int32_t"
    text = ", ".join(repr(float(v)) + "f" if ctype == "float" else str(int(v)) for v in values.ravel())
    return f"static const {ctype} {{name}}[] = {{{{{text}}}}}; "


def case_of(size: Size, dtype: type, seed: int, copy: bool) -> Case:
    n, h, w, c = size.image
    info = np.iinfo(dtype)
    x = np.random.default_rng(seed).integers(info.min, info.max, size.image, endpoint=True).astype(dtype)
    axes = [axis_table(length, out, taps) for length, out, taps in zip((h, w), size.size, size.taps, strict=True)]
    text, spelled = "", []
    for name, (sources, weights) in zip(("rows", "columns"), axes, strict=True):
        text += literal(sources).format(name=name)
        if weights is not None:
            text += literal(weights).format(name=name + "_weights")
        spelled.append(f"{{{name}, {'nullptr' if weights is None else name + '_weights'}}}")
    (rows, row_weights), (columns, column_weights) = axes
    if row_weights is None and column_weights is None:
        want = x[:, rows[:, 0]][:, :, columns[:, 0]]
    else:
        rw = np.ones(rows.shape, np.float32) if row_weights is None else row_weights
        cw = np.ones(columns.shape, np.float32) if column_weights is None else column_weights
        want = None
        for r in range(rows.shape[1]):
            for k in range(columns.shape[1]):
                tap = x[:, rows[:, r]][:, :, columns[:, k]].astype(np.float32)
                term = tap * (rw[:, r][:, None] * cw[:, k][None, :])[None, :, :, None]
                want = term if want is None else want + term
    fn = "NoEpilogue{}" if copy else _FN
    call = f"{size.cpp()}::run(x0, {', '.join(spelled)}, y0, nullptr, part, {fn})"
    return Case(text + call, [between_pixels(x, size.xs)], [between_pixels(want, size.ys)])


@pytest.mark.parametrize("isa", cpu_isas())
def test_integers(isa: str, tmp_path: Path) -> None:
    sizes = [*SIZES, Size((1, 5, 6, 70), (9, 4), (1, 1), xs=2, ys=3), Size((2, 3, 3, 128), (6, 6), (2, 2))]
    cases = [case_of(size, TYPES[i % 4], i, copy=False) for i, size in enumerate(sizes)]
    cases += [case_of(size, TYPES[i % 4], i, copy=True) for i, size in enumerate(sizes) if size.taps == (1, 1)]
    assert {CTYPE[c.want[0].dtype] for c in cases} >= {"float", "uint8_t"}
    check(cases, ["resize.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_one_neighbour_with_a_weight(isa: str, tmp_path: Path) -> None:
    """A weight of 0 stands for what lies outside the image."""
    x = np.random.default_rng(1).standard_normal((1, 2, 2, 5)).astype(np.float32)
    tables = "static const int32_t at[] = {0, 1, 1}; static const float w[] = {1.0f, 0.5f, 0.0f}; "
    call = f"resize2d<Image<1, 2, 2, 5>, 3, 3, 1, 1>::run(x0, {{at, w}}, {{at, nullptr}}, y0, nullptr, part, {_FN})"
    want = x[:, [0, 1, 1]][:, :, [0, 1, 1]] * np.array([1, 0.5, 0], np.float32)[None, :, None, None]
    check([Case(tables + call, [x], [want])], ["resize.h"], isa, tmp_path)
