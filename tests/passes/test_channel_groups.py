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


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_group_alone(name: str) -> None:
    found = analysed(name)
    assert len(found.families) == TOPOLOGIES[name][2]
    for group in found.removable:
        agree(found, [group])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_half_of_every_family(name: str) -> None:
    found = analysed(name)
    rng = np.random.default_rng(1)
    half = [int(g) for f in found.families for g in rng.permutation(f)[: len(f) // 2]]
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
