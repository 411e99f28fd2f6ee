"""Fully connected layers on weights of 4 and 8 bits, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import INTEGER_ISA_FLAGS, cpu_isas

from skive import pack

LIMIT = {16: 32639, 8: 127}

# M, K, N, group, zero points
SHAPES = [
    (1, 64, 128, 32, False),
    (1, 13, 5, 13, False),
    (1, 96, 77, 16, True),
    (2, 40, 70, 40, True),
    (3, 72, 33, 32, False),  # the last group is shorter
    (4, 128, 64, 64, False),
    (5, 64, 100, 32, True),
    (7, 24, 16, 8, False),
    (9, 33, 65, 33, True),
    (70, 1030, 20, 1030, False),  # rows in chunks
]


def rounded(x: np.ndarray, activation: int) -> np.ndarray:
    """What the kernel multiplies by, in float64."""
    if activation == 32:
        return x.astype(np.float64)
    top = np.abs(x).max(-1, keepdims=True)
    limit = np.float32(LIMIT[activation])
    inverse = np.where(top > np.float32(1e-30), limit / np.maximum(top, np.float32(1e-30)), np.float32(0))
    return np.rint(x * inverse.astype(np.float32)).astype(np.float64) * (top / limit).astype(np.float64)


def dense(q: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int) -> np.ndarray:
    """The weights as real numbers."""
    k = q.shape[1]
    each = np.arange(k) // group
    z = np.full(scale.shape, 1 << (bits - 1)) if zero is None else zero
    return (q.astype(np.int32) - z[:, each]) * scale[:, each].astype(np.float64)


@pytest.mark.parametrize("activation", [32, 16, 8])
@pytest.mark.parametrize("isa", cpu_isas(INTEGER_ISA_FLAGS))
def test_products(isa: str, activation: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    cases = []
    for bits in (4, 8):
        for m, k, n, group, zeros in SHAPES:
            x = (rng.standard_normal((m, k)) + 0.5).astype(np.float32)
            x[m // 2] *= 1e-6  # rows have steps of their own
            q = rng.integers(0, 1 << bits, (n, k), np.uint8)
            scale = rng.uniform(-1, 1, (n, -(-k // group))).astype(np.float32)
            zero = rng.integers(0, 1 << bits, scale.shape, np.uint8) if zeros else None
            bias = rng.standard_normal(n).astype(np.float32)
            want = rounded(x, activation) @ dense(q, scale, zero, bits, group).T + bias
            packed = pack.pack_compressed(q, scale, zero, bias, bits, isa, activation)
            kernel = angle("compressed_linear", bits, activation, m, k, n, group, str(zeros).lower())
            inputs = [x, packed[0], packed[1], packed[2] if zeros else np.zeros(1, np.uint8), packed[3]]
            text = f"{kernel}::run(x0, x1, x2, x3, x4, y0, scratch, part, [](auto v, ptrdiff_t, int) {{ return v; }})"
            need = pack.compressed_scratch_bytes(m, k, bits, activation, group, isa)
            text = f'static_assert({kernel}::scratch_bytes() == {need}, "as planned"); {text}'
            cases.append(Case(text, inputs, [want.astype(np.float32)], kernel, rtol=2e-6, atol=2e-6))
    level = "-O1" if isa == "generic" else "-O2"  # unrolled scalar code takes a minute otherwise
    check(cases, ["compressed.h"], isa, tmp_path, flags=(level, "-ffp-contract=off"))


@pytest.mark.parametrize("isa", cpu_isas(INTEGER_ISA_FLAGS))
def test_epilogue_sees_row_and_channel(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    cases = []
    for m, n in ((1, 40), (6, 70)):
        x = rng.standard_normal((m, 32)).astype(np.float32)
        q = rng.integers(0, 16, (n, 32), np.uint8)
        scale = rng.uniform(0.5, 1, (n, 1)).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        residual = rng.standard_normal((m, n)).astype(np.float32)
        want = np.maximum(x.astype(np.float64) @ dense(q, scale, None, 4, 32).T + bias + residual, 0)
        packed = pack.pack_compressed(q, scale, None, bias, 4, isa, 32)
        kernel = angle("compressed_linear", 4, 32, m, 32, n, 32, "false")
        fn = f"[=](auto v, ptrdiff_t r, int c) {{ return relu(v + load<decltype(v)::lanes>(x4 + r * {n} + c)); }}"
        text = f"{kernel}::run(x0, x1, x2, nullptr, x3, y0, scratch, part, {fn})"
        inputs = [x, packed[0], packed[1], packed[3], residual]
        cases.append(Case(text, inputs, [want.astype(np.float32)], kernel, rtol=1e-6, atol=2e-6))
    check(cases, ["compressed.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas(INTEGER_ISA_FLAGS))
def test_rows_that_cannot_be_rounded(isa: str, tmp_path: Path) -> None:
    """Zeros and tiny values give the bias, NaN and infinity a row of NaN; other rows stay what they are."""
    rng = np.random.default_rng(7)
    cases = []
    for activation in (16, 8):
        x = rng.standard_normal((6, 40)).astype(np.float32)
        x[0] = 0
        x[1] = 1e-31
        x[2, 39] = np.nan
        x[3, 0] = np.inf
        x[4, 17] = -np.inf
        q = rng.integers(0, 256, (20, 40), np.uint8)
        scale = rng.uniform(0.5, 1, (20, 1)).astype(np.float32)
        bias = rng.standard_normal(20).astype(np.float32)
        want = np.tile(bias.astype(np.float64), (6, 1))
        want[2:5] = np.nan
        want[5] += rounded(x[5:], activation)[0] @ dense(q, scale, None, 8, 40).T
        packed = pack.pack_compressed(q, scale, None, bias, 8, isa, activation)
        kernel = angle("compressed_linear", 8, activation, 6, 40, 20, 40, "false")
        text = f"{kernel}::run(x0, x1, x2, nullptr, x3, y0, scratch, part, [](auto v, ptrdiff_t, int) {{ return v; }})"
        inputs = [x, packed[0], packed[1], packed[3]]
        cases.append(Case(text, inputs, [want.astype(np.float32)], kernel, rtol=1e-5, atol=1e-6))
    check(cases, ["compressed.h"], isa, tmp_path)
