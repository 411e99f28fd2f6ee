"""Whole networks: an imported CNN is left without transposes, and time grows with the network's size."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from skive import ops
from skive.frontend.onnx import import_onnx
from skive.ir import Graph, Node, constant
from skive.passes import optimize, sink_transposes
from skive.types import DType

KEYWORDS = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting" / "kws_dscnn.onnx"


class Net:
    """Builds a network in channels-first order, each window between two transposes, as importers do."""

    def __init__(self, channels: int, size: int) -> None:
        self.rng = np.random.default_rng(0)
        self.x = ops.make("input", shape=(1, channels, size, size), dtype=DType.f32, label="x")

    def weights(self, *shape: int) -> Node:
        return constant((self.rng.standard_normal(shape) / max(np.prod(shape[1:]), 1) ** 0.5).astype(np.float32))

    def window(self, name: str, x: Node, *operands: Node, **attrs: object) -> Node:
        y = ops.make(name, ops.make("transpose", x, perm=(0, 2, 3, 1)), *operands, **attrs)
        return ops.make("transpose", y, perm=(0, 3, 1, 2))

    def conv(self, x: Node, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> Node:
        """Convolution and batch normalization."""
        w = self.weights(channels, kernel, kernel, x.shape[1] // groups)
        y = self.window("conv2d", x, w, stride=(stride, stride), pad=(kernel // 2,) * 4, groups=groups)
        scaled = ops.make("mul", y, self.weights(1, channels, 1, 1))
        return ops.make("add", scaled, self.weights(channels, 1, 1))

    def residual(self, x: Node) -> Node:
        c = x.shape[1]
        y = self.conv(ops.make("relu", self.conv(x, c, 3)), c, 3)
        return ops.make("relu", ops.make("add", x, y))

    def excited(self, x: Node) -> Node:
        """Squeeze and excite (Hu, Shen, Sun: Squeeze-and-Excitation Networks, 2018)."""
        m = ops.make("reduce_mean", x, axes=(2, 3), keep=True)
        gate = ops.make("sigmoid", self.conv(ops.make("relu", self.conv(m, 4, 1)), x.shape[1], 1))
        return ops.make("mul", x, gate)

    def shuffled(self, x: Node, groups: int) -> Node:
        """Channel shuffle (Zhang et al.: ShuffleNet, 2018)."""
        n, c, h, w = x.shape
        split = ops.make("reshape", x, shape=(n, groups, c // groups, h, w))
        return ops.make("reshape", ops.make("transpose", split, perm=(0, 2, 1, 3, 4)), shape=x.shape)

    def classified(self, x: Node) -> Graph:
        """Flattened without pooling, so that the order of the features matters."""
        flat = ops.make("reshape", x, shape=(1, x.type.size))
        y = ops.make("softmax", ops.make("linear", flat, self.weights(10, x.type.size), self.weights(10)))
        return Graph("net", (self.x,), (y,), ("y",))


def test_no_transpose_is_left_but_the_input() -> None:
    net = Net(3, 16)
    y = ops.make("relu", net.conv(net.x, 8, 3))
    y = net.excited(net.residual(y))
    y = ops.make("concat", y, net.window("max_pool2d", y, kernel=(3, 3), pad=(1, 1, 1, 1)), axis=1)
    y = ops.make("hard_swish", net.conv(y, 16, 3, stride=2, groups=16))
    y = ops.make("pad", y, before=(0, 0, 1, 1), after=(0, 0, 1, 1))
    y = ops.make("slice", y, start=(0, 0, 0, 0), size=(1, 16, 9, 9), step=(1, 1, 1, 1))
    after, _ = optimize(net.classified(net.conv(y, 8, 3)), check="always")
    count = Counter(n.op for n in after.nodes)
    assert [n.inputs[0] for n in after.nodes if n.op == "transpose"] == list(after.inputs)
    assert count["map"] == 1  # the gate; everything else is in an epilogue
    assert count["reshape"] == 1  # the flattening


def test_channel_shuffle_keeps_one_transpose_of_its_own() -> None:
    net = Net(6, 8)
    y = net.shuffled(net.conv(net.x, 6, 1, groups=2), 2)
    after, _ = optimize(net.classified(net.conv(y, 6, 3, groups=6)), check="always")
    assert [n.attrs["perm"] for n in after.nodes if n.op == "transpose"] == [(0, 2, 3, 1), (0, 1, 2, 4, 3)]


def test_one_channel_needs_no_transpose_at_all() -> None:
    net = Net(1, 8)
    after, _ = optimize(net.classified(net.residual(net.conv(net.x, 4, 3))), check="always")
    assert all(n.op != "transpose" for n in after.nodes)


def test_keyword_model() -> None:
    after, records = optimize(import_onnx(KEYWORDS, batch_max=8), check="always")
    count = Counter(n.op for n in after.nodes if n.op not in ("const", "input"))
    assert count["transpose"] == count["map"] == 0
    assert count["conv2d"] == 9 and count["linear"] == 1
    assert all(n.attrs["epilogue"] == "t0=relu(x0)" for n in after.nodes if n.op == "conv2d")
    assert records[-1].macs == records[0].macs


def test_a_transpose_rises_through_a_long_chain_at_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(3, 4)
    z = ops.make("input", shape=(1, 4, 4, 3), dtype=DType.f32, label="z")
    y = ops.make("add", net.x, ops.make("transpose", z, perm=(0, 3, 1, 2)))
    for i in range(200):
        y = ops.make("tanh", ops.make("mul", y, net.weights(3, 1, 1)) if i % 2 else y)
    y = ops.make("transpose", y, perm=(0, 2, 3, 1))
    graph = Graph("chain", (net.x, z), (y,), ("y",))
    after = sink_transposes(graph)
    assert [n.inputs[0] for n in after.nodes if n.op == "transpose"] == [after.inputs[0]]
    assert not caplog.records


@pytest.mark.slow
def test_time_grows_with_the_network_not_faster() -> None:
    def seconds(blocks: int) -> float:
        net = Net(2, 4)
        y = net.conv(net.x, 2, 1)
        for _ in range(blocks):
            y = net.residual(y)
        graph = net.classified(y)
        start = time.process_time()
        optimize(graph, check="never")
        return time.process_time() - start

    seconds(10)
    # Ten times the nodes take 12 times the processor time; quadratic would be a hundred times.
    assert seconds(400) < 40 * min(seconds(40) for _ in range(3))
