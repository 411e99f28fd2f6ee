"""Removing a group of channels is what zeroing its weights is, for every group of every topology."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from skive import frontend, ops, passes
from skive.ir import Graph, constant
from skive.passes.channel_groups import Groups, channel_groups, without, zeroed
from skive.pipeline import PassManager, random_inputs, total_macs
from skive.reference import evaluate_graph
from skive.types import DType
from skive.verify import verify

torch = pytest.importorskip("torch")
from topologies import TOPOLOGIES  # noqa: E402


@lru_cache
def analysed(name: str) -> Groups:
    torch.manual_seed(7)
    make, example, _ = TOPOLOGIES[name]
    module = make().eval()
    for m in module.modules():  # statistics and scales of a trained network: none is 0 or 1
        if isinstance(m, torch.nn.modules.batchnorm._NormBase) and m.running_mean is not None:
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 1.5)
        for p in ("weight", "bias"):
            if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d, torch.nn.GroupNorm)):
                torch.nn.init.uniform_(getattr(m, p), 0.2, 1.2)
    graph = frontend.open_model(module, example_inputs=example).graph()
    return channel_groups(PassManager().run(graph, passes.CANONICAL, check="never")[0])


def agree(found: Groups, removed: list[int]) -> None:
    small = without(found, removed)
    verify(small)
    data = random_inputs(found.graph)
    for want, got in zip(evaluate_graph(zeroed(found, removed), data), evaluate_graph(small, data), strict=True):
        scale = float(np.abs(want).max()) or 1.0
        assert np.abs(got - want).max() <= 1e-5 * scale


def half_of(found: Groups) -> list[int]:
    rng = np.random.default_rng(1)
    return [int(g) for f in found.families for g in rng.permutation(f)[: len(f) // 2]]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_group_alone(name: str) -> None:
    found = analysed(name)
    assert len(found.families) == TOPOLOGIES[name][2]
    for group in found.removable:
        agree(found, [group])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_half_of_every_family(name: str) -> None:
    found = analysed(name)
    half = half_of(found)
    agree(found, half)
    assert total_macs(without(found, half)) < total_macs(found.graph)


def test_nothing_removed_is_the_same_graph() -> None:
    found = analysed("resnet")
    assert without(found, []) is found.graph


def test_what_must_stay_says_why() -> None:
    found = analysed("bert")
    reasons = {g.reason for g in found.groups if g.reason and g.places}
    assert any("normalised" in r for r in reasons) and any("output of the network" in r for r in reasons)
    kept = next(i for i, g in enumerate(found.groups) if g.reason)
    with pytest.raises(ValueError, match="must stay"):
        without(found, [kept])


def test_heads_leave_whole() -> None:
    """A group of attention is a head: all its rows of queries, keys and values, all its columns of the output."""
    found = analysed("vit")
    heads = next(f for f in found.families if len(f) == 3)
    for h in heads:
        assert {len(ids) for places in found.groups[h].places.values() for ids in places.values()} == {4}


def test_an_axis_is_never_emptied() -> None:
    found = analysed("vgg")
    with pytest.raises(ValueError, match="nothing would be left"):
        without(found, list(found.families[0]))


def test_scales_of_quantized_weights_go_with_their_channels() -> None:
    x = ops.make("input", shape=(1, 6, 6, 3), dtype=DType.f32, label="x")
    rng = np.random.default_rng(0)

    def weights(o: int, i: int) -> tuple:
        q = constant(rng.integers(-99, 99, (o, 3, 3, i)).astype(np.int8))
        scale = constant(rng.uniform(0.01, 0.02, (o, 1, 1, 1)).astype(np.float32))
        return ops.make("dequantize", q, scale, constant(np.zeros((o, 1, 1, 1), np.int8))), scale

    (a, scale), (b, _) = weights(8, 3), weights(4, 8)
    y = ops.make("conv2d", ops.make("relu", ops.make("conv2d", x, a)), b)
    found = channel_groups(Graph("g", (x,), (y,), ("y",)))
    (family,) = found.families
    assert len(family) == 8 and all(scale in found.groups[g].places for g in family)
    agree(found, [family[2], family[5]])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_written_as_onnx_it_computes_the_same(name: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    from skive.export.onnx import export_onnx

    found = analysed(name)
    small = without(found, half_of(found))
    session = ort.InferenceSession(export_onnx(small).SerializeToString(), providers=["CPUExecutionProvider"])
    data = random_inputs(small)
    got = session.run(list(small.output_names), {n.name: v for n, v in zip(small.inputs, data, strict=True)})
    for g, want in zip(got, evaluate_graph(small, data), strict=True):
        assert np.abs(g - want).max() <= 1e-4 * (float(np.abs(want).max()) or 1.0)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "squeeze_excite"])
def test_the_order_of_cutting_and_quantizing_does_not_matter(name: str) -> None:
    """Same groups, same ranges: the same sources. (Weights may have other scales: a row may lose its largest one.)"""
    from skive import _native
    from skive.emit import cxx
    from skive.lower import lower
    from skive.passes.quantize import Quantizer, Scheme, Storage
    from skive.targets.base import resolve

    found = analysed(name)
    target = resolve("host", _native.cpu_features())

    def quantized(graph: Graph, ranges: dict) -> Graph:
        return Quantizer(graph, Scheme(ranges, "int8"), Storage(graph)).build()

    def emitted(graph: Graph) -> dict[str, str]:
        return dict(cxx.emit(lower(PassManager().run(graph, passes.FUSED, check="never")[0], target, 1), target).files)

    ranges = {n: (-4.0, 4.0) for n in found.graph.nodes}
    whole = quantized(found.graph, ranges)
    later = channel_groups(whole)
    floats = {n.origin: n for n in found.graph.nodes if n.op in ("conv2d", "linear")}
    gone = half_of(found)
    removed = np.zeros(len(found.groups), bool)
    removed[gone] = True
    removed_later = np.zeros(len(later.groups), bool)
    for n in whole.nodes:
        if n.op in ("conv2d", "linear"):
            was = floats[n.origin]
            for axis in (0, n.inputs[1].type.rank - 1):
                removed_later[later.axes[n.inputs[1]][axis][removed[found.axes[was.inputs[1]][axis]]]] = True
    first = without(found, gone)
    after = quantized(first, {n: (-4.0, 4.0) for n in first.nodes})
    before = without(later, np.flatnonzero(removed_later))
    assert total_macs(after) == total_macs(before) < total_macs(whole)
    assert emitted(after) == emitted(before) != emitted(whole)
