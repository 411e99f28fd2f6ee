"""Fused elementwise loops, strided copies, padding and transposition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, angle, check
from driver import cpu_isas

# result shape, shape of the second operand (broadcast)
BROADCASTS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((1,), (1,)),
    ((7,), (1,)),
    ((1000,), (1000,)),
    ((5, 33), (33,)),
    ((5, 33), (5, 1)),
    ((2, 3, 17), (3, 1)),
    ((2, 3, 4, 5), (2, 1, 4, 1)),
    ((40, 3), (3,)),
    ((2, 4097), (4097,)),
    ((0, 5), (5,)),
    ((2, 1, 2, 1, 3, 2, 1, 9), (3, 1, 1, 9)),
]


def broadcast_strides(shape: tuple[int, ...], full: tuple[int, ...]) -> list[int]:
    padded = (1,) * (len(full) - len(shape)) + shape
    return [0 if d == 1 else math.prod(padded[i + 1 :]) for i, d in enumerate(padded)]


@pytest.mark.parametrize("isa", cpu_isas())
def test_map(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    cases = []
    for full, other in BROADCASTS:
        tags = (
            angle("Shape", *full),
            angle("Strides", *broadcast_strides(full, full)),
            angle("Strides", *broadcast_strides(other, full)),
        )
        fn = "[](auto a, auto b) { return relu(add(mul(a, b), 0.5f)); }"
        a = np.asarray(rng.standard_normal(full)).astype(np.float32)
        b = np.asarray(rng.standard_normal(other)).astype(np.float32)
        want = np.maximum(a.astype(np.float64) * b + 0.5, 0).astype(np.float32)
        cases.append(Case(f"{angle('vmap', *tags)}::run(y0, part, {fn}, x0, x1)", [a, b], [want], atol=1e-6))
        i, j = (np.asarray(rng.integers(-100, 100, s)).astype(t) for s, t in ((full, np.int8), (other, np.int64)))
        less = "[](auto a, auto b) { return less(cast<int64_t>(a), b); }"
        cases.append(
            Case(f"{angle('map', 'uint8_t', *tags)}::run(y0, part, {less}, x0, x1)", [i, j], [np.asarray(i < j)])
        )
    check(cases, ["map.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_into_a_slice(isa: str, tmp_path: Path) -> None:
    """A strided result leaves what lies between its rows alone; operands may be strided too."""
    x = np.random.default_rng(21).standard_normal((6, 20)).astype(np.float32)
    want = np.full((6, 30), 77, np.float32)
    want[:, 5:25] = -x
    text = "vmap_to<Shape<6, 20>, Strides<30, 1>, Strides<20, 1>>::run(y0 + 5, part, [](auto a) { return neg(a); }, x0)"
    every_other = "vmap<Shape<6, 10>, Strides<20, 2>>::run(y0, part, [](auto a) { return neg(a); }, x0)"
    check([Case(text, [x], [want]), Case(every_other, [x], [-x[:, ::2]])], ["map.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_transpose(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(22)
    cases = []
    shapes = [(5,), (3, 7), (33, 17), (64, 64), (3, 100), (50, 70), (2, 40, 3), (1, 3, 19, 5), (2, 17, 33, 3)]
    for shape in shapes:
        perms = list(itertools.permutations(range(len(shape))))
        for perm in perms if len(perms) < 7 else [perms[k] for k in (1, 5, 9, 16, 20, 23)]:
            for dtype in (np.float32, np.uint8, np.int16)[: 5 - len(shape)]:
                x = rng.integers(0, 255, shape).astype(dtype)
                kernel = angle("transpose", CTYPE[np.dtype(dtype)], angle("Shape", *shape), angle("Perm", *perm))
                cases.append(Case(f"{kernel}::run(y0, x0, part)", [x], [np.ascontiguousarray(x.transpose(perm))]))
    check(cases, ["transpose.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", ["generic"])
def test_copies(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(23)
    x = rng.integers(0, 100, (4, 5, 6)).astype(np.int16)
    want = np.full((2, 5, 9), 77, np.int16)
    want[:, :, 3:9] = x[::-2]
    tiled = np.tile(x[:1], (3, 1, 1))
    cases = [
        Case(
            "copy_strided<int16_t, Shape<2, 5, 6>, Strides<45, 9, 1>, Strides<-60, 6, 1>>::run(y0 + 3, x0 + 90, part)",
            [x],
            [want],
        ),
        Case("copy_strided<int16_t, Shape<3, 30>, Strides<30, 1>, Strides<0, 1>>::run(y0, x0, part)", [x], [tiled]),
        Case(
            "copy_strided<int16_t, Shape<4, 5, 6>, Strides<30, 6, 1>, Strides<-30, 6, -1>>::run(y0, x0 + 95, part)",
            [x],
            [np.ascontiguousarray(x[::-1, :, ::-1])],
        ),
        Case(
            "fill<int16_t, Shape<4, 5, 6>, Strides<30, 6, 1>>::run(y0, int16_t{9}, part)",
            [],
            [np.full((4, 5, 6), 9, np.int16)],
        ),
    ]
    paddings = [((1, 0, 2), (0, 3, 1)), ((0, 0, 0), (1, 1, 1)), ((3, 4, 5), (3, 4, 5))]
    paddings += [((1, 2, 0), (0, 3, 0)), ((2, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 0, 0))]  # whole rows
    paddings += [((0, 0, 2), (0, 0, 3)), ((1, 0, 2), (0, 0, 1)), ((0, 2, 0), (0, 1, 0))]  # dimensions that join
    for before, after in paddings:
        out = tuple(d + p + q for d, p, q in zip(x.shape, before, after, strict=True))
        for mode in ("constant", "edge", "reflect", "wrap"):
            options = {"constant_values": 42} if mode == "constant" else {}
            y = np.pad(x, list(zip(before, after, strict=True)), mode=mode, **options)  # type: ignore[call-overload]
            kernel = angle(
                "pad", "int16_t", f"PadMode::{mode}", "Shape<4, 5, 6>", angle("Shape", *out), angle("Strides", *before)
            )
            cases.append(Case(f"{kernel}::run(y0, x0, int16_t{{42}}, part)", [x], [y]))
            if mode == "constant":
                byte = kernel.replace("int16_t", "int8_t")
                cases.append(Case(f"{byte}::run(y0, x0, int8_t{{42}}, part)", [x.astype(np.int8)], [y.astype(np.int8)]))
    cut = "pad<int16_t, PadMode::constant, Shape<4, 5, 6>, Shape<3, 6, 2>, Strides<-1, 1, -2>>"
    want = np.pad(x, [(0, 0), (1, 0), (0, 0)], constant_values=42)[1:, :, 2:4]
    cases.append(Case(f"{cut}::run(y0, x0, int16_t{{42}}, part)", [x], [np.ascontiguousarray(want)]))
    check(cases, ["copy.h"], isa, tmp_path)
