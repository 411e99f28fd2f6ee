"""skive.Prune: what is removed, how much of it, and weights that make up for it."""

from __future__ import annotations

import numpy as np
import pytest

from skive import ops, pruning
from skive.errors import PruningError
from skive.ir import Graph, Node, constant
from skive.passes.channel_groups import channel_groups, zeroed
from skive.pipeline import total_macs
from skive.pruning import Cost, Prune
from skive.reference import evaluate_graph
from skive.types import DType
from skive.verify import verify


def network(seed: int = 0, width: int = 16) -> Graph:
    """A stem, a residual block and a classifier, with correlated channels."""
    rng = np.random.default_rng(seed)
    x = ops.make("input", shape=(1, 8, 8, 3), dtype=DType.f32, label="x", origin="x")

    def conv(v: Node, channels: int, name: str, relu: bool = True) -> Node:
        few = rng.standard_normal((channels, 4)) @ rng.standard_normal((4, 9 * v.shape[3])) / 6
        w = (few + 0.1 * rng.standard_normal(few.shape)).reshape(channels, 3, 3, v.shape[3]).astype(np.float32)
        b = rng.standard_normal(channels).astype(np.float32) / 4
        weights, bias = (constant(a, name=f"{name}.{k}", origin=name) for k, a in (("w", w), ("b", b)))
        y = ops.make("conv2d", v, weights, bias, pad=(1, 1, 1, 1), origin=name, label=name)
        return ops.make("relu", y, origin=name) if relu else y

    a = conv(x, width, "stem")
    y = ops.make("add", conv(conv(a, width, "one"), width, "two", relu=False), a, origin="skip")
    y = ops.make("reshape", ops.make("reduce_mean", y, axes=(1, 2)), shape=(1, width))
    w = constant(rng.standard_normal((5, width)).astype(np.float32), name="head.w", origin="head")
    return Graph("net", (x,), (ops.make("linear", y, w, origin="head"),), ("y",))


def data(count: int = 24) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 1, 8, 8, 3)).astype(np.float32)


def error(graph: Graph, small: Graph, seed: int = 5) -> float:
    """Relative L2 error over samples that nothing was fitted to."""
    total = scale = 0.0
    for x in np.random.default_rng(seed).standard_normal((8, 1, 8, 8, 3)).astype(np.float32):
        (want,), (got,) = evaluate_graph(graph, [x]), evaluate_graph(small, [x])
        total, scale = total + float(np.square(got - want).sum()), scale + float(np.square(want).sum())
    return (total / scale) ** 0.5


@pytest.mark.parametrize("criterion", pruning.CRITERIA)
@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_at_least_the_fraction_goes_and_little_more(criterion: str, scope: str) -> None:
    graph = network()
    asked = Prune(macs=0.4, criterion=criterion, scope=scope, calibration=data(), multiple=1)
    small, report = pruning.apply(graph, asked)
    verify(small)
    gone = 1 - total_macs(small) / total_macs(graph)
    assert 0.4 <= gone <= 0.5 and gone == pytest.approx(report["macs_removed"])
    again, _ = pruning.apply(graph, asked)
    for a, b in zip(small.nodes, again.nodes, strict=True):
        assert a.type == b.type and (not a.is_const or np.array_equal(a.value, b.value))


def test_parameters_are_another_measure() -> None:
    graph = network()
    small, report = pruning.apply(graph, Prune(parameters=0.5, criterion="l1", refit=False))
    left = sum(n.type.size for n in small.nodes if n.is_const) / sum(n.type.size for n in graph.nodes if n.is_const)
    assert 0.3 < left <= 0.5 and report["parameters_removed"] == pytest.approx(1 - left)


def test_what_is_left_makes_up_for_what_went() -> None:
    graph = network()
    plain, fitted = (pruning.apply(graph, Prune(macs=0.4, calibration=data(), refit=r))[0] for r in (False, True))
    assert error(graph, fitted) < 0.5 * error(graph, plain)


def test_a_fit_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(3)
    whole = np.concatenate([rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 6)), np.ones((4000, 1))], 1)
    now = whole + np.append(0.1 * rng.standard_normal(6), 0)
    weights, keep = rng.standard_normal((3, 7)), np.array([1, 1, 0, 1, 1, 0, 1], bool)
    got = pruning.restored(weights, now.T @ now / 4000, whole.T @ now / 4000, keep, 10**9)
    want, *_ = np.linalg.lstsq(now[:, keep], whole @ weights.T, rcond=None)
    assert not got[:, ~keep].any()
    lost = [float(np.square(whole @ weights.T - now[:, keep] @ w).sum()) for w in (got[:, keep].T, want)]
    assert lost[0] < 1.02 * lost[1]  # damping costs a little


def test_a_fit_of_a_whole_network_changes_nothing() -> None:
    graph = network()
    found = channel_groups(graph)
    same = pruning.refitted(found, np.zeros(len(found.groups), bool), [(x,) for x in data(3)])
    assert all(a.value is b.value for a, b in zip(same.nodes, graph.nodes, strict=True) if a.is_const)


def test_fitted_and_cut_is_fitted() -> None:
    """Cutting what a fit left at zero changes nothing."""
    graph = network()
    found = channel_groups(graph)
    gone = np.zeros(len(found.groups), bool)
    gone[[f[i] for f in found.families for i in (1, 4, 6)]] = True
    fitted = channel_groups(pruning.refitted(found, gone, [(x,) for x in data(8)]))
    from skive.passes.channel_groups import without

    assert error(zeroed(fitted, np.flatnonzero(gone)), without(fitted, np.flatnonzero(gone))) < 1e-5
    assert error(fitted.graph, without(fitted, np.flatnonzero(gone))) < 1e-5


def test_nothing_asked_nothing_done() -> None:
    graph = network()
    small, report = pruning.apply(graph, Prune(macs=0.0))
    assert small is graph and report["macs_removed"] == 0


def test_counts_suit_vectors() -> None:
    graph = network(width=64)
    small, report = pruning.apply(graph, Prune(macs=0.3, criterion="random", refit=False))
    assert all(g["kept"] % 8 == 0 for g in report["groups"]) and any(g["kept"] < 64 for g in report["groups"])


def test_layers_can_be_kept() -> None:
    graph = network()
    _, report = pruning.apply(graph, Prune(macs=0.2, criterion="l1", refit=False, keep="one"))
    kept = next(g for g in report["groups"] if "one" in g["layers"] and "stem" not in g["layers"])
    assert kept["kept"] == kept["channels"]


def test_cost_of_a_cut_is_that_of_the_cut_graph() -> None:
    from skive.passes.channel_groups import without

    found = channel_groups(network())
    gone = np.zeros(len(found.groups), bool)
    gone[[f[0] for f in found.families]] = True
    assert Cost(found, "macs")(gone) == total_macs(without(found, np.flatnonzero(gone)))


@pytest.mark.parametrize(("options", "message"), [
    ({}, "one of macs and parameters"),
    ({"macs": 0.5, "parameters": 0.5}, "one of macs and parameters"),
    ({"macs": 1.0}, "fraction"),
    ({"macs": -0.1}, "fraction"),
    ({"macs": "half"}, "fraction"),
    ({"macs": 0.5, "criterion": "best"}, "l1, l2"),
    ({"macs": 0.5, "scope": "world"}, "global"),
    ({"macs": 0.5, "multiple": 0}, "multiple"),
])
def test_what_cannot_be_asked(options: dict, message: str) -> None:
    with pytest.raises(PruningError, match=message):
        Prune(**options)


def test_too_much_is_refused_with_the_reason() -> None:
    with pytest.raises(PruningError, match=r"at most \d+% of the macs can be removed, not 99%"):
        pruning.apply(network(), Prune(macs=0.99, criterion="l1"))


def test_a_network_without_channels_to_remove() -> None:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x", origin="x")
    y = ops.make("linear", x, constant(np.ones((2, 4), np.float32)), origin="fc")
    with pytest.raises(PruningError, match="no channel can be removed.*output of the network"):
        pruning.apply(Graph("g", (x,), (y,), ("y",)), Prune(macs=0.5))
