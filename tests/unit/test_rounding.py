"""Adapted rounding: never worse than nearest on its data, always a neighbour of the real weight."""

from __future__ import annotations

import numpy as np
import pytest

from skive import ops, rounding
from skive.ir import Graph, constant
from skive.passes.quantize import Quantizer, Scheme
from skive.rounding import adapt, patches
from skive.types import DType

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_patches_are_what_the_convolution_sums(groups: int, stride: int, dilation: int) -> None:
    x = ops.make("input", shape=(2, 7, 6, 4), dtype=DType.f32, label="x")
    w = constant(RNG.standard_normal((8, 3, 2, 4 // groups)).astype(np.float32))
    node = ops.make("conv2d", x, w, pad=(1, 1, 2, 0), stride=(stride,) * 2, dilation=(dilation,) * 2, groups=groups)
    value = RNG.standard_normal(x.shape).astype(np.float32)
    rows = patches(node, value, 10**6, 0)
    assert rows is not None
    sums = np.einsum("rgk,gok->rgo", rows, w.value.reshape(groups, 8 // groups, -1)).reshape(node.shape)
    np.testing.assert_allclose(sums, ops.evaluate(node, [value, w.value]), rtol=1e-4, atol=1e-5)


def test_sums_lose_less_than_with_nearest_rounding() -> None:
    x = ops.make("input", shape=(16, 24), dtype=DType.f32, label="x")
    w = constant(RNG.standard_normal((6, 24)).astype(np.float32))
    graph = Graph("g", (x,), (ops.make("linear", x, w, origin="fc"),), ("y",))
    # Correlated inputs with a large mean: what cancels in the sums depends on all weights together.
    mix = RNG.standard_normal((4, 24))
    samples = [((RNG.standard_normal((16, 4)) @ mix + 3).astype(np.float32),) for _ in range(20)]
    quantizer = Quantizer(graph, Scheme({x: (-10.0, 16.0)}))
    node, layer = next(iter(quantizer.layers.items()))
    nearest = layer.real_weights
    found, biases = adapt(quantizer, lambda s: [s[0]], samples)
    scales = layer.shaped(layer.scales)
    assert np.abs(found[node] - w.value / scales).max() <= 1 + 1e-4
    stored = quantizer.format_of(x).real(np.concatenate([s[0] for s in samples]))

    def loss(weights: np.ndarray) -> float:
        return float(np.square(stored @ (weights - w.value).T).sum())

    assert loss(found[node] * scales) < 0.5 * loss(nearest)
    got = stored @ (found[node] * scales).T + biases[node]
    want = np.concatenate([s[0] for s in samples]) @ w.value.T
    np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-3)


def test_behind_the_limit_of_work_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    first = ops.make("linear", x, constant(RNG.standard_normal((3, 4)).astype(np.float32)))
    graph = Graph("g", (x,), (ops.make("linear", first, constant(np.ones((2, 3), np.float32))),), ("y",))
    quantizer = Quantizer(graph, Scheme({x: (-1.0, 1.0), first: (-1.0, 1.0)}))
    one = np.ones((1, 4), np.float32)
    monkeypatch.setattr(rounding, "MOST_WORK", 3 * 4 * 4)
    found, biases = adapt(quantizer, lambda s: [s[0], s[0][:, :3]], [(one,)])
    assert list(found) == [first] and len(biases) == 2
