"""What follows an integer contraction, up to its bytes: every target gives those of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from skive import _native, lower, ops, passes
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

RNG = np.random.default_rng(7)
SHAPE = (1, 5, 9, 24)


def const(value: object, dtype: type) -> Node:
    return constant(np.asarray(value, dtype))


def contraction(x: Node, channels: int, seed: int, zero: int, *, depthwise: bool = False, scale: float = 0.02) -> Node:
    """The real value of a convolution of u8 `x`, with a scale for every channel."""
    rng = np.random.default_rng(seed)
    shape = (channels, 3, 3, 1) if depthwise else (channels, 1, 1, x.shape[-1])
    scales = (rng.uniform(0.3, 1, (channels, 1, 1, 1)) * scale).astype(np.float32)
    w = ops.make("dequantize", constant(rng.integers(-127, 128, shape).astype(np.int8)), constant(scales),
                 constant(np.zeros((channels, 1, 1, 1), np.int8)), origin=f"w{seed}")
    attrs = {"pad": (1, 1, 1, 1), "groups": channels} if depthwise else {}
    real = ops.make("dequantize", x, const(0.05, np.float32), const(zero, np.uint8), origin=f"x{seed}")
    bias = ops.make("dequantize", constant(rng.integers(-900, 900, channels).astype(np.int32)),
                    constant(np.float32(0.05) * scales.reshape(-1)), constant(np.zeros(channels, np.int32)))
    return ops.make("conv2d", real, w, bias, origin=f"conv{seed}", **attrs)


def stored(value: Node, scale: float, zero: int, dtype: DType = DType.u8) -> Node:
    step, at = const(scale, np.float32), const(zero, dtype.numpy)
    return ops.make("quantize", value, step, at, to=dtype, origin=value.origin)


def network() -> Graph:
    x = ops.make("input", shape=SHAPE, dtype=DType.u8, label="x", origin="x")
    r = ops.make("input", shape=(*SHAPE[:3], 40), dtype=DType.u8, label="r", origin="r")
    residual = ops.make("dequantize", r, const(0.07, np.float32), const(131, np.uint8), origin="r")
    total = ops.make("add", contraction(x, 40, 0, 120), residual, origin="sum")
    six = ops.make("clip", contraction(x, 72, 1, 120), lo=0.0, hi=6.0, origin="six")
    uneven = constant(RNG.uniform(0.5, 3, 72).astype(np.float32))
    outputs = {
        "sum": stored(ops.make("relu", total, origin="sum"), 0.06, 0),
        "signed": stored(ops.make("sub", residual, contraction(x, 40, 6, 120), origin="signed"), 0.06, 119),
        "six": stored(ops.make("mul", six, uneven, origin="six"), 0.04, 0),
        "wide": stored(ops.make("relu", contraction(x, 136, 2, 120), origin="wide"), 0.08, 0),
        "flat": stored(ops.make("relu", contraction(x, 33, 3, 7), origin="flat"), 0.3, 0),
        "three": stored(contraction(x, 24, 4, 120, depthwise=True), 0.05, 0),
        "above": stored(ops.make("relu", contraction(x, 20, 8, 120), origin="above"), 0.05, 119),
        "words": stored(ops.make("relu", contraction(x, 20, 5, 120), origin="words"), 0.001, 0, DType.i16),
    }
    return Graph("g", (x, r), tuple(outputs.values()), tuple(outputs))


def inputs() -> list[np.ndarray]:
    return [RNG.integers(0, 256, shape).astype(np.uint8) for shape in (SHAPE, (*SHAPE[:3], 40))]


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_target_gives_the_bytes_of_the_reference(target: str) -> None:
    if missing := set(TARGETS[target].features) - set(_native.cpu_features()):
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    fused, _ = PassManager().run(network(), passes.FUSED, check="always")
    arrays = inputs()
    want = evaluate_graph(fused, arrays)
    results = run_graph(fused, TARGETS[target], 1)(arrays)
    for name, got, expected in zip(fused.output_names, results, want, strict=True):
        if name != "words":
            lowest = 119 if name == "above" else 0
            assert expected.min() == lowest and expected.max() == 255, f"{name} tests no saturation"
        np.testing.assert_array_equal(got, expected, err_msg=f"{name} on {target}")


def test_no_division_and_no_bound_is_left() -> None:
    """Steps join the scales, and what saturation keeps is not computed again."""
    fused, _ = PassManager().run(network(), passes.FUSED, check="never")
    steps = [[s.name for s in c.fn.steps] for c in lower.lower(fused, TARGETS["avx2"], 1).calls if c.fn]
    assert sum(s[0] == "scaled_sum" for s in steps) == 4, "six, wide, flat and three"
    assert all(s[-1].startswith("rounded<") for s in steps)
    names = {n for s in steps for n in s}
    assert {"min_", "add", "sub"} <= names and not names & {"quotient", "div_", "clip"}
    assert not {n for n in names if n.startswith("rounded") and "true" not in n}
