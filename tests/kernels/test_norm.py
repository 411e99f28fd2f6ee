"""layer_norm, rms_norm, l2_norm and group_norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

EPS = 1e-5


@pytest.mark.parametrize("isa", cpu_isas())
def test_rows(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    cases = []
    for rows, n in [(4, 1), (3, 3), (2, 17), (4, 33), (7, 64), (1, 1029)]:
        x = (rng.standard_normal((rows, n)) * 3 + 5).astype(np.float32)
        scale, bias = rng.standard_normal((2, n)).astype(np.float32)
        v = x.astype(np.float64)
        d = v - v.mean(1, keepdims=True)
        y = d / np.sqrt((d * d).mean(1, keepdims=True) + EPS) * scale
        r = v / np.sqrt((v * v).mean(1, keepdims=True) + EPS) * scale
        tail = f"part, {EPS}f, [](auto v, ptrdiff_t, int) {{ return v; }})"
        norm = angle("layer_norm", rows, n)
        cases += [
            Case(f"{norm}::run(x0, x1, x2, y0, {tail}", [x, scale, bias], [(y + bias).astype(np.float32)], atol=2e-6),
            Case(f"{norm}::run(x0, x1, nullptr, y0, {tail}", [x, scale], [y.astype(np.float32)], atol=2e-6),
            Case(
                f"{angle('rms_norm', rows, n)}::run(x0, x1, y0, {tail}", [x, scale], [r.astype(np.float32)], atol=2e-6
            ),
        ]
        short = x / np.float32(1000)
        short[0] = 0
        length = np.maximum(np.sqrt((short.astype(np.float64) ** 2).sum(1, keepdims=True)), 0.0625)
        tail = "part, 0.0625f, [](auto v, ptrdiff_t, int) { return v; })"
        want = (short / length).astype(np.float32)
        cases.append(Case(f"{angle('l2_norm', rows, n)}::run(x0, y0, {tail}", [short], [want], atol=1e-6))
    check(cases, ["norm.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_layer_norm_of_a_large_offset(isa: str, tmp_path: Path) -> None:
    """The variance comes from the differences, so an offset of 1000 deviations does no harm."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((4, 256)) + 1000).astype(np.float32)
    d = x.astype(np.float64) - x.astype(np.float64).mean(1, keepdims=True)
    want = (d / np.sqrt((d * d).mean(1, keepdims=True) + EPS)).astype(np.float32)
    ones = np.ones(256, np.float32)
    plain = "[](auto v, ptrdiff_t, int) { return v; }"
    case = Case(f"layer_norm<4, 256>::run(x0, x1, nullptr, y0, part, {EPS}f, {plain})", [x, ones], [want], atol=1e-4)
    check([case], ["norm.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_an_epilogue_meets_rows_and_columns(isa: str, tmp_path: Path) -> None:
    """Values that depend on their place, as bytes."""
    rng = np.random.default_rng(5)
    rows, n = 5, 77
    x, column = rng.standard_normal((rows, n)).astype(np.float32), (10 * rng.standard_normal(n)).astype(np.float32)
    scale, bias = np.full(n, 20, np.float32), np.full(n, 100, np.float32)
    d = x - x.mean(1, keepdims=True, dtype=np.float64)
    place = column + 3 * np.arange(rows)[:, None]
    centred = d / np.sqrt((d * d).mean(1, keepdims=True) + EPS) * 20 + 100 + place
    scaled = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + EPS) * 20 + place
    bytes_ = "quantize<uint8_t>(v + load<n>(x3 + column) + splat<n>(3.0f * row), splat<n>(1.0f), 0)"
    epilogue = f"[=](auto v, ptrdiff_t row, int column) {{ constexpr int n = decltype(v)::lanes; return {bytes_}; }}"
    cases = [
        Case(f"{angle(name, rows, n)}::run({operands}, y0, part, {EPS}f, {epilogue})", [x, scale, bias, column],
             [np.clip(np.rint(want), 0, 255).astype(np.uint8)], atol=1.01 / 255)  # one step
        for name, operands, want in (("layer_norm", "x0, x1, x2", centred), ("rms_norm", "x0, x1", scaled))]
    check(cases, ["math.h", "norm.h"], isa, tmp_path)


# Slices of whole groups that fill vectors, in one and in several; groups that no vector ends with; one pixel.
GROUPS = [(1, 9, 3, 1), (2, 49, 17, 17), (3, 30, 33, 3), (2, 100, 64, 32), (4, 1, 8, 2), (1, 70, 192, 24),
          (2, 65, 128, 128), (1, 64, 120, 4), (1, 130, 96, 1)]


@pytest.mark.parametrize("isa", cpu_isas())
def test_groups(isa: str, tmp_path: Path) -> None:
    """As floats, without a bias too, and as bytes that depend on their place."""
    rng = np.random.default_rng(4)
    cases = []
    for n, pixels, c, groups in GROUPS:
        x = (rng.standard_normal((n, pixels, c)) + 2).astype(np.float32)
        scale, bias = rng.standard_normal((2, c)).astype(np.float32)
        v = x.astype(np.float64).reshape(n, pixels, groups, c // groups)
        d = v - v.mean((1, 3), keepdims=True)
        y = (d / np.sqrt((d * d).mean((1, 3), keepdims=True) + EPS)).reshape(x.shape)
        kernel = angle("group_norm", n, pixels, c, groups)
        tail = f"y0, scratch, part, {EPS}f"
        plain = "[](auto v, ptrdiff_t, int) { return v; }"
        cases += [
            Case(f"{kernel}::run(x0, x1, x2, {tail}, {plain})", [x, scale, bias],
                 [(y * scale + bias).astype(np.float32)], kernel, atol=5e-6),
            Case(f"{kernel}::run(x0, x1, nullptr, {tail}, {plain})", [x, scale], [(y * scale).astype(np.float32)],
                 kernel, atol=5e-6)]
        column = (10 * rng.standard_normal(c)).astype(np.float32)
        want = y * 20 + 100 + column + 0.25 * np.arange(n * pixels).reshape(n, pixels, 1)
        bytes_ = "quantize<uint8_t>(v + load<l>(x3 + channel) + splat<l>(0.25f * pixel), splat<l>(1.0f), 0)"
        cases.append(
            Case(f"{kernel}::run(x0, x1, x2, {tail}, [=](auto v, ptrdiff_t pixel, int channel) {{ "
                 f"constexpr int l = decltype(v)::lanes; return {bytes_}; }})",
                 [x, np.full(c, 20, np.float32), np.full(c, 100, np.float32), column],
                 [np.clip(np.rint(want), 0, 255).astype(np.uint8)], kernel, atol=1.5 / 255))  # one step
    check(cases, ["math.h", "norm.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_group_norm_of_a_large_offset(isa: str, tmp_path: Path) -> None:
    """The variance comes from the differences here too."""
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((1, 100, 32)) + 1000).astype(np.float32)
    v = x.astype(np.float64).reshape(1, 100, 4, 8)
    d = v - v.mean((1, 3), keepdims=True)
    want = (d / np.sqrt((d * d).mean((1, 3), keepdims=True) + EPS)).reshape(x.shape).astype(np.float32)
    kernel = angle("group_norm", 1, 100, 32, 4)
    plain = "[](auto v, ptrdiff_t, int) { return v; }"
    case = Case(f"{kernel}::run(x0, x1, nullptr, y0, scratch, part, {EPS}f, {plain})", [x, np.ones(32, np.float32)],
                [want], kernel, atol=1e-4)
    check([case], ["norm.h"], isa, tmp_path)
