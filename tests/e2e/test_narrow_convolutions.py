"""Quantized convolutions with few output channels: the kernel that takes them, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from skive import _native, lower, ops, passes
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

VNNI = TARGETS["avx512vnni"]


def const(value: object, dtype: type) -> Node:
    return constant(np.asarray(value, dtype))


def real(x: Node, scale: float, zero: int) -> Node:
    return ops.make("dequantize", x, const(scale, np.float32), const(zero, np.uint8), origin=x.origin)


def layer(x: Node, oc: int, kernel: int, zero: int, scale: float = 0.01, **attrs: object) -> Node:
    """The real values of a convolution of u8 `x` with a scale for every channel, padded to x's size."""
    rng = np.random.default_rng(oc * kernel)
    scales = (rng.uniform(0.3, 1, (oc, 1, 1, 1)) * scale).astype(np.float32)
    shape = (oc, kernel, kernel, x.shape[3])
    w = ops.make("dequantize", constant(rng.integers(-127, 128, shape).astype(np.int8)), constant(scales),
                 constant(np.zeros((oc, 1, 1, 1), np.int8)), origin="w")  # fmt: skip
    p = kernel // 2
    return ops.make("conv2d", real(x, 0.05, zero), w, pad=(p, p, p, p), origin=f"conv{oc}", **attrs)


def stored(value: Node, scale: float, zero: int, dtype: DType = DType.u8) -> Node:
    step, at = const(scale, np.float32), const(zero, dtype.numpy)
    return ops.make("quantize", value, step, at, to=dtype, origin=value.origin)


def network(width: int) -> Graph:
    """A block of a pruned residual network, a signed and a swished result, and last layers of few channels."""
    x = ops.make("input", shape=(1, 5, width, 12), dtype=DType.u8, label="x", origin="x")
    inner = stored(ops.make("relu", layer(x, 8, 3, 120), origin="inner"), 0.1, 0)
    total = ops.make("add", layer(inner, 12, 3, 0), real(x, 0.07, 120), origin="sum")
    block = stored(ops.make("relu", total, origin="sum"), 0.1, 0)
    outputs = {
        "block": block,
        "signed": stored(layer(block, 5, 3, 0), 0.1, 3, DType.i8),
        "swish": stored(ops.make("silu", layer(block, 4, 1, 0), origin="swish"), 0.05, 7),
        "one": stored(layer(block, 1, 3, 0), 0.2, 128),
        "three": stored(layer(block, 3, 3, 0), 0.2, 128),
        "real": layer(block, 1, 5, 0),
        "words": stored(layer(block, 4, 3, 0), 0.001, 0, DType.i16),
    }
    return Graph("g", (x,), tuple(outputs.values()), tuple(outputs))


def fused(graph: Graph) -> Graph:
    return PassManager().run(graph, passes.FUSED, check="never")[0]


def kernels(outputs: Sequence[Node], x: Node) -> list[str]:
    graph = Graph("g", (x,), tuple(outputs), tuple(f"y{i}" for i in range(len(outputs))))
    return [c.kernel for c in lower.lower(fused(graph), VNNI, 1).calls if c.macs]


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_of_the_reference(threads: int) -> None:
    if missing := set(VNNI.features) - set(_native.cpu_features()):
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    graph = fused(network(30))
    calls = [c for c in lower.lower(graph, VNNI, threads).calls if c.macs]
    assert [c.kernel for c in calls].count("narrow_conv2d") == len(calls)
    x = np.random.default_rng(1).integers(0, 256, graph.inputs[0].shape).astype(np.uint8)
    results = run_graph(graph, VNNI, threads)([x])
    for name, got, want in zip(graph.output_names, results, evaluate_graph(graph, [x]), strict=True):
        assert len(np.unique(want)) > 20, f"{name} tests little"
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_what_the_kernel_cannot_do_stays_with_the_dense_one() -> None:
    x = ops.make("input", shape=(1, 16, 16, 12), dtype=DType.u8, label="x", origin="x")
    three = ops.make("input", shape=(1, 16, 16, 3), dtype=DType.u8, label="three", origin="three")
    for other in (
        stored(layer(x, 8, 3, 9, stride=(2, 2)), 0.1, 3),
        stored(layer(x, 8, 3, 9, dilation=(2, 2)), 0.1, 3),
        stored(layer(x, 16, 3, 9), 0.1, 3),
        stored(layer(x, 8, 1, 9), 0.001, 3, DType.i16),
    ):
        assert kernels([other], x) == ["conv2d"]
    assert kernels([stored(layer(three, 8, 3, 9), 0.1, 3)], three) == ["conv2d"]
    assert kernels([stored(layer(x, 8, 3, 9), 0.1, 3)], x) == ["narrow_conv2d"]
    floats = real(x, 0.3, 5)
    added = ops.make("add", layer(x, 12, 3, 9), ops.make("exp", floats, origin="e"), origin="sum")
    assert "narrow_conv2d" not in kernels([stored(added, 0.1, 3), ops.make("exp", floats, origin="e")], x)
