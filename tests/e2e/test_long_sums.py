"""Sums of 16-bit products that 32 bits do not hold: exact on every instruction set, where the plain sum wraps."""

from __future__ import annotations

import numpy as np
import pytest

from skive import _native, ops, passes
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.passes.quantize import Quantizer, Scheme, Storage
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS

RNG = np.random.default_rng(5)


def runnable(target: str) -> bool:
    return set(TARGETS[target].features) <= set(_native.cpu_features())


def image(*shape: int) -> Node:
    return ops.make("input", shape=shape, dtype=ops.F32, label="x", origin="x")


def weights(*shape: int) -> Node:
    """Positive ones, which is where sums are largest."""
    return constant(RNG.uniform(0.5, 1, shape).astype(np.float32))


def product(kind: str) -> Node:
    bias = constant(RNG.uniform(-50, 50, 12).astype(np.float32))
    if kind == "linear":
        return ops.make("linear", image(3, 770), weights(12, 770), bias, origin="y")
    groups = 2 if kind == "grouped" else 1
    kernel, channels = ((1, 1), 600) if kind == "pointwise" else ((3, 3), 99 if kind == "odd" else 96)
    stride = (2, 1) if kind == "strided" else (1, 1)
    return ops.make("conv2d", image(1, 6, 7, channels), weights(12, *kernel, channels // groups), bias, origin="y",
                    pad=(kernel[0] // 2,) * 4, stride=stride, groups=groups)


@pytest.mark.parametrize(("kind", "rounded"), [("linear", False), ("pointwise", True), ("window", False),
                                               ("odd", True), ("strided", False), ("grouped", True)])
def test_sums_beyond_32_bits(kind: str, rounded: bool) -> None:
    y = product(kind)
    if rounded:  # to 16 bits, for a layer that reads the result
        y = ops.make("relu", y, origin="relu")
        y = ops.make("linear", y, weights(4, 12), origin="z")
    node = y.inputs[0].inputs[0] if rounded else y
    graph = Graph("g", (node.inputs[0],), (y,), ("y",))
    storage = Storage(graph)
    most = float(node.inputs[1].value.reshape(12, -1).sum(1).max())
    ranges = {n: (-1.0, 1.0) if n.op == "input" else (0.0, most) for n in storage.sources}
    quantizer = Quantizer(graph, Scheme(ranges, "int16"), storage)
    fused, _ = PassManager().run(quantizer.build(), passes.FUSED, check="never")
    chained = next(n for n in fused.nodes if n.attrs.get("chain"))
    q = quantizer.format_of(node.inputs[0]).integers(np.ones((), np.float32))
    sums = quantizer.layers[node].weights.astype(np.int64).reshape(12, -1).sum(1) * int(q)
    assert (sums > 2**31).all() and (sums.astype(np.int32) != sums).all()
    assert chained.attrs["chain"] < node.inputs[1].value[0].size

    inputs = [np.full(node.inputs[0].shape, v, np.float32) for v in (1.0, -1.0)]
    inputs += [RNG.uniform(-1, 1, node.inputs[0].shape).astype(np.float32) for _ in range(3)]
    for target in filter(runnable, TARGETS):
        run = run_graph(fused, TARGETS[target], 2)
        for x in inputs:
            got, want = run([x])[0], evaluate_graph(fused, [x])[0]
            np.testing.assert_array_equal(got, want, err_msg=target)
            exact = evaluate_graph(graph, [x])[0]
            assert np.abs(got - exact).max() < 1e-3 * np.abs(evaluate_graph(graph, inputs[:1])[0]).max()
