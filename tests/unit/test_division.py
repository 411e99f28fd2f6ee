"""Quantizers that multiply instead of dividing: the same integers, at every threshold, from every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native
from skive.division import divides_exactly
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.text import parse_graph

ZEROS = {"u8": 7, "i8": -3, "u16": 9, "i16": 5}
STEP = float(np.float32(0.0373))


@pytest.mark.parametrize("target", [t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())])
def test_thresholds_infinities_and_nan(target: str, tmp_path: Path) -> None:
    """Arguments within three float32 values of every second threshold of 8 bits, and of many of 16."""
    lines = ["graph @g(%x: f32[65,67]) {", f"  %s = const {STEP} : f32[]", "  %f = const 3.7 : f32[]"]
    for dtype, zero in ZEROS.items():
        lines += [f"  %z{dtype} = const {zero} : {dtype}[]",
                  f"  %y{dtype} = quantize %x, %s, %z{dtype} {{to={dtype}}} : {dtype}[65,67]"]
        lines += [f"  %r{dtype} = requantize %x, %f, %z{dtype} {{to={dtype}}} : {dtype}[65,67]"]
    lines += ["  return " + ", ".join(f'%y{d} as "{d}", %r{d} as "times {d}"' for d in ZEROS), "}"]
    graph = parse_graph("\n".join(lines))
    rng = np.random.default_rng(1)
    k = rng.integers(-300, 300, (65, 67))
    k[32:] = rng.integers(-40000, 70000, (33, 67))
    near = ((k + 0.5) * STEP).astype(np.float32)
    x = (near.view(np.int32) + rng.integers(-3, 4, k.shape).astype(np.int32)).view(np.float32)
    x.reshape(-1)[:8] = [np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 0, -0.0]
    module = skive.compile(graph, output=tmp_path / "a", target=target)
    texts = "".join(p.read_text() for p in (tmp_path / "a").rglob("*.cpp"))
    assert texts.count("quotient(") == len(ZEROS) - 1 and texts.count("quantize_by<uint16_t>(") == 1
    names = [n for d in ZEROS for n in (d, f"times {d}")]
    for name, got, want in zip(names, module(x), evaluate_graph(graph, [x]), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_what_is_refused() -> None:
    """Steps whose reciprocal or remainders are no normal numbers, and more thresholds than are looked at."""
    assert divides_exactly(STEP, -128, 127)
    assert not divides_exactly(1e-30, -128, 127)
    assert not divides_exactly(-STEP, -128, 127)
    assert not divides_exactly(float("nan"), -128, 127)
    assert not divides_exactly(STEP, -(2**31), 2**31 - 1)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_argument_is_rounded_differently(seed: int) -> None:
    """Thresholds and everything between them, in float64 where its rounding cannot matter."""
    rng = np.random.default_rng(seed)
    step = np.float32(np.exp(rng.uniform(-9, 2)))
    assert divides_exactly(float(step), -255, 255)
    x = np.concatenate([rng.uniform(-260, 260, 200_000) * step, (np.arange(-260, 260) + 0.5) * step]).astype(np.float32)
    x = (x.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).view(np.float32)
    reciprocal = np.float32(1) / step
    q = (x * reciprocal).astype(np.float64)
    rest = (x - q * np.float64(step)).astype(np.float32).astype(np.float64)
    got = np.rint((q + rest * np.float64(reciprocal)).astype(np.float32))
    np.testing.assert_array_equal(got, np.rint(x / step))
