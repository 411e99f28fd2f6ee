"""A fixed batch whose first layers run sample by sample gives what all layers on the whole batch give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native, ops
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.lower import batches, legalise, lower
from skive.profiling import profile
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

SAMPLES = 3
IMAGE = (SAMPLES, 3, 10, 9)
RNG = np.random.default_rng(4)


def const(*shape: int, dtype: type = np.float32) -> Node:
    return constant(RNG.uniform(-1, 1, shape).astype(dtype))


def given(shape: tuple[int, ...], name: str = "x") -> Node:
    return ops.make("input", shape=shape, dtype=DType.f32, label=name, origin=name)


def conv(x: Node, channels: int, name: str, **attrs: object) -> Node:
    return ops.make("conv2d", x, const(channels, 3, 3, x.shape[3]), const(channels), label=name, origin=name,
                    pad=(1, 1, 1, 1), **attrs)


def network() -> Graph:
    """Values that only the loop needs and that both sides need, outputs of either, and what the loop cannot do."""
    x, late = given(IMAGE), given((SAMPLES, 5), "late")
    image = ops.make("transpose", x, perm=(0, 2, 3, 1))
    a = ops.make("relu", conv(image, 20, "a"))
    b = conv(a, 20, "b")
    joined = ops.make("concat", conv(a, 16, "left"), ops.make("add", a, b), axis=3, label="joined", origin="joined")
    upper = ops.make("slice", joined, start=(0, 1, 0, 0), size=(SAMPLES, 4, 9, 36), step=(1, 2, 1, 1))
    part = ops.make("slice", joined, start=(0, 0, 0, 16), size=(SAMPLES, 10, 9, 20), step=(1, 1, 1, 1))
    pooled = ops.make("reduce_mean", ops.make("pad", part, before=(0, 1, 0, 0), after=(0, 0, 2, 0), value=0.5),
                      axes=(1, 2), keep=False)
    flat = ops.make("reshape", joined, shape=(SAMPLES, 10 * 9 * 36))
    last = ops.make("linear", flat, const(5, 10 * 9 * 36), const(5), label="last", origin="last")
    across = ops.make("softmax", ops.make("add", last, late), axis=0)
    rows = ops.make("softmax", ops.make("add", pooled, const(SAMPLES, 20)), axis=1)
    outputs = {"across": across, "rows": rows, "b": b, "upper": upper, "flat": flat}
    return Graph("g", (x, late), tuple(outputs.values()), tuple(outputs))


def turns(graph: Graph, target: str = "generic") -> batches.Turns:
    return batches.one_by_one(legalise(graph), TARGETS[target])


def divide(patch: pytest.MonkeyPatch) -> None:
    """All that can runs sample by sample, however small."""
    patch.setattr(batches, "_cheapest", lambda graph, order, *about: order)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", list(TARGETS))
def test_the_results_are_those_of_the_whole_batch(target: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := set(TARGETS[target].features) - set(_native.cpu_features()):
        pytest.skip(f"this processor has no {', '.join(missing)}")
    graph = network()
    data = [RNG.standard_normal(i.shape).astype(np.float32) for i in graph.inputs]
    whole = run_graph(graph, TARGETS[target], threads)(data)
    assert turns(graph, target).samples == 1, "it fits the caches"
    divide(monkeypatch)
    found = turns(graph, target)
    assert found.samples == SAMPLES and {"a", "b", "left", "joined"} < {n.origin for n in found.nodes}
    got = run_graph(graph, TARGETS[target], threads)(data)
    for name, one, other, exact in zip(graph.output_names, got, whole, evaluate_graph(graph, data), strict=True):
        assert np.array_equal(one, other), name
        assert np.abs(one - exact).max() < 1e-4, name


@pytest.mark.parametrize("target", list(TARGETS))
def test_no_kernel_adds_up_in_another_order(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows, tiles and blocks a kernel chooses for a batch."""
    if missing := set(TARGETS[target].features) - set(_native.cpu_features()):
        pytest.skip(f"this processor has no {', '.join(missing)}")
    rows, image = given((8, 1100), "rows"), given((8, 14, 14, 48), "image")
    small = ops.make("slice", image, start=(0, 0, 0, 0), size=(8, 2, 3, 48), step=(1, 1, 1, 1))
    outputs = {
        "linear": ops.make("linear", rows, const(70, 1100), const(70)),
        "softmax": ops.make("softmax", rows, axis=1),
        "norm": ops.make("layer_norm", rows, const(1100), const(1100), axis=1),
        "winograd": conv(image, 64, "winograd"),
        "strided": conv(image, 64, "strided", stride=(2, 2)),
        "direct": ops.make("conv2d", small, const(100, 2, 3, 48), const(100)),
        "depthwise": ops.make("conv2d", image, const(48, 5, 5, 1), groups=48),
        "grouped": ops.make("conv2d", image, const(96, 3, 3, 12), groups=4),
        "transposed": ops.make("conv_transpose2d", small, const(20, 3, 3, 48), stride=(2, 2)),
        "mean": ops.make("reduce_mean", image, axes=(1, 3), keep=False),
    }
    graph = Graph("g", (rows, image), tuple(outputs.values()), tuple(outputs))
    data = [RNG.standard_normal(i.shape).astype(np.float32) for i in graph.inputs]
    whole = run_graph(graph, TARGETS[target], 1)(data)
    divide(monkeypatch)
    assert sum(n.op == "batch" for n in turns(graph, target).graph.nodes) == len(outputs)
    one_by_one = run_graph(graph, TARGETS[target], 1)(data)
    assert not [name for name, a, b in zip(outputs, whole, one_by_one, strict=True) if not np.array_equal(a, b)]


def test_what_holds_a_batch_is_not_used_for_the_next_sample(divided: None) -> None:
    plan = lower(network(), TARGETS["generic"])
    front = [c for c in plan.calls if c.samples > 1]
    assert front == list(plan.calls[: len(front)]) and all(c.samples == SAMPLES for c in front)
    whole = [(a.offset, a.offset + SAMPLES * a.step) for c in front for a in c.args if a.step and a.kind == "arena"]
    inner = [a.offset for c in front for a in c.args if a.kind == "arena" and not a.step]
    assert whole and inner
    assert not any(begin <= at < end for begin, end in whole for at in inner)
    assert {a.step for c in front for a in c.args if a.kind == "weights"} == {0}
    assert not any(a.step for c in plan.calls[len(front):] for a in c.args)


def layers(samples: int, *channels: int) -> Graph:
    """1x1 convolutions; the last two halve the image."""
    x = y = given((samples, 16, 16, 8))
    for i, count in enumerate(channels):
        y = ops.make("conv2d", y, const(count, 1, 1, y.shape[3]), origin=f"layer {i}", label=f"layer {i}",
                     stride=(2, 2) if i >= len(channels) - 2 else (1, 1))
    return Graph("g", (x,), (y,), ("y",))


def test_layers_with_many_weights_see_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = layers(8, 8, 8, 128, 256)
    monkeypatch.setattr(batches, "CACHED_BYTES", 40_000)  # values have 8, 8 and 32 KiB for each sample
    assert [n.origin for n in turns(graph).nodes if n.op == "conv2d"] == ["layer 0", "layer 1", "layer 2"]
    plan = lower(graph, TARGETS["generic"])
    assert sum(c.macs for c in plan.calls) == sum(map(ops.macs, graph.nodes)), "those of all samples"


def test_a_loop_is_worth_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CACHED_BYTES", 20_000)
    assert turns(layers(8, 8)).samples == 1, "what comes from the caller and goes to it is as far in any case"
    assert turns(layers(8, 8, 8, 8, 8)).samples == 8
    assert batches.one_by_one(layers(8, 8, 8, 8, 8), TARGETS["generic"], threads=2).samples == 1
    small = given((512, 2, 2, 8))
    chain = ops.make("conv2d", ops.make("conv2d", small, const(8, 1, 1, 8)), const(8, 1, 1, 8))
    assert turns(Graph("g", (small,), (chain,), ("y",))).samples == 1


@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (8,), (4, 8)])
def test_a_value_is_not_spread_over_other_samples(shape: tuple[int, ...], divided: None) -> None:
    """What has fewer axes than the result has none of samples, however long its first one is."""
    x, other = given((8, 4, 4, 8)), given(shape, "other")
    for y in (
        ops.make("add", x, other),
        ops.make("conv2d", x, const(8, 1, 1, 8), const(8), other, epilogue="t0=add(x0,x1)"),
    ):
        assert not any(other in n.inputs for n in turns(Graph("g", (x, other), (y,), ("y",))).nodes)


@pytest.mark.parametrize("quantize", [None, "int8", "int16"])
def test_an_artefact_is_verified_and_measured(quantize: str | None, monkeypatch: pytest.MonkeyPatch,
                                              tmp_path: Path) -> None:
    graph = network()
    data = [RNG.standard_normal(i.shape).astype(np.float32) for i in graph.inputs]
    lossy = skive.Quantize(quantize, calibration={"x": data[0], "late": data[1]}) if quantize else None
    whole = skive.compile(graph, output=tmp_path / "whole", quantize=lossy)(*data)
    divide(monkeypatch)
    module = skive.compile(graph, output=tmp_path / "divided", quantize=lossy, threads=2)
    assert f"m.sample < {SAMPLES}" in (tmp_path / "divided" / "g.cpp").read_text()
    assert module.report["verification"]["passed"]
    layers = profile(module, rounds=3)["layers"]
    assert sum(layer["macs"] for layer in layers) == module.report["compiled"]["macs"]
    assert all(np.array_equal(a, b) for a, b in zip(module(*data), whole, strict=True))
