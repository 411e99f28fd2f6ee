"""What may differ between an artefact and the reference of its integer graph, and what may not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from skive import check, ops
from skive.check import Exactness, exactness
from skive.ir import Graph, Node, constant, rebuilt
from skive.reference import evaluate_wide
from skive.types import DType

SCALE, ZERO = constant(np.float32(0.05)), constant(np.uint8(128))


def quantize(x: Node) -> Node:
    return ops.make("quantize", x, SCALE, ZERO, to=DType.u8)


def mapped(x: Node, text: str) -> Node:
    return ops.make("map", x, SCALE, ZERO, fn=text)


@pytest.mark.parametrize(("got", "message"), [
    (np.ones((2, 0), np.float32), "in shape"), (np.ones((1, 2), np.float32), "in shape"), (np.ones(2), "in shape"),
    (np.array([1, np.nan], np.float32), "finite"), (np.array([1, 1.5], np.float32), "by 0.5 of the output's range")])
def test_what_differs_is_said(got: np.ndarray, message: str) -> None:
    verdict = check.compare([(got, np.ones(2, np.float32))], "numpy", 1)
    assert not verdict.passed and message in verdict.distance


@pytest.mark.parametrize(("build", "expected"), [
    (lambda x: quantize(x), Exactness(True, False)),
    (lambda x: quantize(ops.make("add", x, x)), Exactness(True, False)),
    (lambda x: ops.make("exp", x), Exactness(False, False)),
    (lambda x: quantize(ops.make("exp", x)), Exactness(False, True)),
    (lambda x: quantize(ops.make("linear", x, constant(np.ones((8, 8), np.float32)))), Exactness(False, True)),
    (lambda x: ops.make("exp", ops.make("dequantize", quantize(x), SCALE, ZERO)), Exactness(False, False)),
    (lambda x: mapped(x, "t0=relu(x0);t1=quantize(t0,x1,x2,to=u8)"), Exactness(True, False)),
    (lambda x: mapped(x, "t0=tanh(x0);t1=quantize(t0,x1,x2,to=u8)"), Exactness(False, True)),
])
def test_what_is_exact(build: Callable[[Node], Node], expected: Exactness) -> None:
    x = ops.make("input", shape=(1, 8), dtype=DType.f32, label="x", origin="x")
    assert exactness(Graph("g", (x,), (build(x),), ("y",))) == expected


def epilogue(x: Node, text: str) -> Graph:
    rng = np.random.default_rng(0)
    w = constant(rng.integers(-9, 9, (8, 8)).astype(x.dtype.numpy if x.dtype is DType.f32 else np.int8))
    bias = constant(np.zeros(8, np.float32 if x.dtype is DType.f32 else np.int32))
    y = ops.make("linear", x, w, bias, SCALE, ZERO, epilogue=text)
    return Graph("g", (x,), (y,), ("y",))


@pytest.mark.parametrize(("dtype", "text", "expected"), [
    (DType.u8, "t0=requantize(x0,x1,x2,to=u8)", Exactness(True, False)),
    (DType.f32, "t0=quantize(x0,x1,x2,to=u8)", Exactness(False, True)),
    (DType.u8, "t0=cast(x0,to=f32);t1=sigmoid(t0);t2=quantize(t1,x1,x2,to=u8)", Exactness(False, True)),
    (DType.u8, "t0=cast(x0,to=f32);t1=mul(t0,x1)", Exactness(True, False)),
])
def test_what_is_exact_in_an_epilogue(dtype: DType, text: str, expected: Exactness) -> None:
    x = ops.make("input", shape=(1, 8), dtype=dtype, label="x", origin="x")
    assert exactness(epilogue(x, text)) == expected


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_the_allowed_weight_error_is_what_float32_kernels_make(channels: int) -> None:
    """FLOAT_ERROR changes sums by no less than the kernels here do, Winograd's among them, and by little more."""
    from skive import _native
    from skive.execute import run_graph
    from skive.targets.base import resolve

    rng = np.random.default_rng(channels)
    x = ops.make("input", shape=(1, 16, 16, channels), dtype=DType.f32, label="x", origin="x")
    w = (rng.standard_normal((channels, 3, 3, channels)) / np.sqrt(9 * channels)).astype(np.float32)
    plain = Graph("g", (x,), (ops.make("conv2d", x, constant(w), pad=(1, 1, 1, 1)),), ("y",))
    data = [np.maximum(rng.standard_normal(x.shape), 0).astype(np.float32)]

    def shaken(node: Node, operands: tuple[Node, ...]) -> Node:
        if node.op != "conv2d":
            return rebuilt(node, operands)
        moved = w * (1 + check.FLOAT_ERROR * rng.uniform(-1, 1, w.shape))
        return rebuilt(node, (operands[0], constant(moved.astype(np.float32))))

    (exact,), (moved,) = evaluate_wide(plain, data), evaluate_wide(plain.map_nodes(shaken), data)
    (got,) = run_graph(plain, resolve("host", _native.cpu_features()), 1)(data)
    error, allowed = (float(np.linalg.norm(y - exact)) for y in (got, moved))
    assert error < 1.5 * allowed and allowed < 16 * error
