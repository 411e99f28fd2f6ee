"""skive.Prune: what is removed, how much of it, and weights that make up for it."""

from __future__ import annotations

import numpy as np
import pytest

from skive import ops, pruning, sparsity
from skive.errors import PruningError
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.channel_groups import channel_groups, zeroed
from skive.pipeline import total_macs
from skive.pruning import Cost, Importance, Prune
from skive.pruning.choice import chosen_groups, places_by_loss
from skive.pruning.fit import restored_wide
from skive.pruning.scores import magnitudes
from skive.pruning.sensitivity import marginal
from skive.reference import evaluate_graph
from skive.sparsity import Sparsify
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
    rounding = report["rounding"]
    assert rounding["removed_exactly"] >= 0.3 and rounding["removed"] == pytest.approx(report["macs_removed"])


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
    ({}, "one of macs, parameters, bytes, latency"),
    ({"macs": 0.5, "parameters": 0.5}, "one of macs, parameters"),
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


def test_the_report_says_what_the_fit_rests_on(caplog: pytest.LogCaptureFixture) -> None:
    graph = network()
    _, report = pruning.apply(graph, Prune(macs=0.4, calibration=data()))
    assert report["fit"] == {"data": "calibration", "samples": 24, "not_fitted": []} and not caplog.records
    _, report = pruning.apply(graph, Prune(macs=0.4))
    assert report["fit"]["data"] == "noise" and "noise stands in" in caplog.text
    _, report = pruning.apply(graph, Prune(macs=0.4, criterion="l1", refit=False))
    assert report["fit"] == {"data": None, "samples": 0, "not_fitted": []}


def test_layers_that_are_not_fitted_are_named() -> None:
    rng = np.random.default_rng(0)
    x = ops.make("input", shape=(1, 8), dtype=DType.f32, label="x", origin="x")
    shared = constant(rng.standard_normal((8, 8)).astype(np.float32), name="w", origin="shared")
    first = ops.make("linear", x, constant(rng.standard_normal((8, 8)).astype(np.float32)), origin="first")
    y = ops.make("add", ops.make("linear", first, shared, origin="a"), ops.make("linear", first, shared, origin="b"))
    y = ops.make("linear", y, constant(rng.standard_normal((2, 8)).astype(np.float32)), origin="last")
    _, report = pruning.apply(Graph("g", (x,), (y,), ("y",)), Prune(macs=0.2, criterion="random"))
    assert {(n["layer"], "shared" in n["reason"]) for n in report["fit"]["not_fitted"]} == {("a", True), ("b", True)}


def test_wide_layers_are_fitted_in_the_space_of_the_samples() -> None:
    """The same problem, solved through rows or through columns."""
    rng = np.random.default_rng(2)
    before = np.concatenate([rng.standard_normal((50, 30)), np.ones((50, 1))], 1)
    after = np.where(np.arange(31) % 3 == 0, 0, before)
    after[:, -1] = 1
    weights, keep = rng.standard_normal((4, 31)), np.arange(31) % 3 > 0
    keep[-1] = True
    wide = restored_wide(weights, before, after, keep)
    plain = pruning.restored(weights, after.T @ after / 50, before.T @ after / 50, keep, 50)
    assert not wide[:, ~keep].any()
    assert np.abs(wide - plain).max() < 1e-6


@pytest.mark.parametrize("measure", ["bytes", "parameters"])
def test_bytes_are_four_to_a_weight(measure: str) -> None:
    _, report = pruning.apply(network(), Prune(**{measure: 0.5}, criterion="l1", refit=False))
    assert report["bytes_removed"] == pytest.approx(report["parameters_removed"]) and report["bytes_removed"] >= 0.5


def dead(graph: Graph, name: str, channels: list[int]) -> Graph:
    """`graph` with these output channels of a layer zero, bias and all: what other tools leave as a mask."""
    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.is_const and node.origin == name:
            value = node.value.copy()
            value[channels] = 0
            return constant(value, name=node.name, origin=node.origin)
        return rebuilt(node, inputs)

    return graph.map_nodes(one)


def test_zeros_of_other_tools_go_exactly() -> None:
    graph = dead(network(), "one", [2, 3, 11])
    small, report = pruning.apply(graph, Prune(zeros=True))
    assert report["zero_channels"] == 3 and report["macs_removed"] > 0 and report["fit"]["data"] is None
    assert error(graph, small) < 1e-6
    stem = dead(network(), "stem", [2])  # the residual branch writes to that channel
    same, report = pruning.apply(stem, Prune(zeros=True))
    assert report["zero_channels"] == 0 and same is stem


def test_channels_that_nothing_reads_are_zero_too() -> None:
    graph = network()

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.is_const and node.name == "two.w":
            value = node.value.copy()
            value[..., [4, 5]] = 0
            return constant(value, name=node.name, origin=node.origin)
        return rebuilt(node, inputs)

    graph = graph.map_nodes(one)
    small, report = pruning.apply(graph, Prune(zeros=True))
    assert report["zero_channels"] == 2 and error(graph, small) < 1e-6


def test_what_a_function_makes_of_zero_is_not_zero() -> None:
    """A sigmoid turns a dead channel into one half."""
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x", origin="x")
    w = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    w[3] = 0
    h = ops.make("linear", x, constant(w), origin="first")
    last = constant(np.ones((2, 8), np.float32))
    for op, gone in (("relu", 1), ("sigmoid", 0)):
        y = ops.make("linear", ops.make(op, h), last, origin="last")
        _, report = pruning.apply(Graph("g", (x,), (y,), ("y",)), Prune(zeros=True))
        assert report["zero_channels"] == gone, op


def test_a_branch_that_changes_little_is_erased() -> None:
    graph = network()

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.is_const and node.origin == "two":
            return constant(node.value * np.float32(1e-6), name=node.name, origin=node.origin)
        return rebuilt(node, inputs)

    quiet = graph.map_nodes(one)
    small, report = pruning.apply(quiet, Prune(erase=1, calibration=data()))
    verify(small)
    (gone,) = report["erased"]
    assert set(gone["layers"]) == {"one", "two"} and gone["influence"] < 1e-6
    assert {n.origin for n in small.nodes if n.op == "conv2d"} == {"stem"} and report["macs_removed"] > 0.5
    assert error(quiet, small) < 1e-4
    with pytest.raises(PruningError, match="1 residual branches can be erased, not 2"):
        pruning.apply(quiet, Prune(erase=2, calibration=data()))
    with pytest.raises(PruningError, match="layers of keep"):
        pruning.apply(quiet, Prune(erase=1, keep="two", calibration=data()))


def test_a_branch_that_something_else_reads_stays_a_graph() -> None:
    """What another node needs of a branch is kept."""
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x", origin="x")
    a = ops.make("linear", x, constant(np.eye(4, dtype=np.float32)), origin="a")
    f = ops.make("linear", a, constant(np.eye(4, dtype=np.float32)), origin="f")
    g = ops.make("linear", f, constant(np.eye(4, dtype=np.float32)), origin="g")
    y = ops.make("add", a, g)
    small, report = pruning.apply(Graph("g", (x,), (y, ops.make("relu", f)), ("y", "z")), Prune(erase=1))
    verify(small)
    assert report["erased"][0]["layers"] == ["g"]


@pytest.mark.parametrize(("text", "options"), [
    ("0.4", {"macs": 0.4}), ("latency=0.5", {"latency": 0.5}), ("zeros", {"zeros": True}),
    ("erase=2,macs=0.3", {"erase": 2, "macs": 0.3}), ("zeros, bytes=0.2", {"zeros": True, "bytes": 0.2}),
])
def test_as_the_command_line_says_it(text: str, options: dict) -> None:
    assert pruning.requested(text) == Prune(**options)


@pytest.mark.parametrize("text", ["half", "speed=0.5", "macs=0.2,macs=0.3", "erase=1.5", "macs=0.3,bytes=0.4", "",
                                  "1.5"])
def test_what_the_command_line_cannot_say(text: str) -> None:
    with pytest.raises(PruningError):
        pruning.requested(text)


def test_importances_of_another_network_are_refused() -> None:
    graph = network()
    keys = pruning.constant_keys(graph)
    every = {k: np.abs(n.value) for n, k in keys.items()}
    small, report = pruning.apply(graph, Prune(macs=0.3, criterion=Importance("taylor", every), refit=False))
    assert report["criterion"] == "taylor" and total_macs(small) < total_macs(graph)
    for wrong in ({"other#1": np.ones(3)}, {next(iter(every)): np.ones((1, 2))}):
        with pytest.raises(PruningError, match="another network"):
            pruning.apply(graph, Prune(macs=0.3, criterion=Importance("taylor", wrong)))


def test_importance_decides() -> None:
    graph = network()
    key, node = next((k, n) for n, k in pruning.constant_keys(graph).items() if n.name == "one.w")
    values = {key: np.arange(16.0)[:, None, None, None] * np.ones(node.shape)}
    options = Prune(macs=0.2, criterion=Importance("snip", values), refit=False, multiple=1, keep="stem")
    small, _ = pruning.apply(graph, options)
    left = next(n for n in small.nodes if n.name == "one.w")
    assert left.shape[0] < 16 and np.array_equal(left.value, node.value[16 - left.shape[0]:])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_more_goes_than_the_multiples_make_necessary(scope: str) -> None:
    """No layer could get its next multiple of channels back."""

    def weights(*shape: int) -> Node:
        return constant(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))

    x = y = ops.make("input", shape=(1, 6, 6, 3), dtype=DType.f32, label="x")
    for size in (64, 48, 16):
        y = ops.make("relu", ops.make("conv2d", y, weights(size, 3, 3, y.shape[-1]), pad=(1,) * 4))
    found = channel_groups(Graph("g", (x,), (ops.make("conv2d", y, weights(4, 1, 1, 16)),), ("y",)))
    cost = pruning.Cost(found, "macs")
    options = Prune(macs=0.3, multiple=8, scope=scope, refit=False)
    gone = chosen_groups(found, magnitudes(found, 1), options, cost)
    assert cost(gone) <= 0.7 * cost.whole
    for f in found.families:
        assert int((~gone[list(f)]).sum()) % 8 == 0
        if removed := [g for g in f if gone[g]]:
            more = gone.copy()
            more[removed[:8]] = False
            assert cost(more) > 0.7 * cost.whole


def test_what_the_outputs_do_not_see_goes_first() -> None:
    """A branch that adds a thousandth to its stream loses its channels before the stream loses one."""
    graph = network()
    loud = next(n for n in graph.nodes if n.name == "two.w")
    quiet = graph.map_nodes(lambda n, inputs: constant(n.value / 1000, name=n.name, origin=n.origin) if n is loud
                            else rebuilt(n, inputs))
    kept = {}
    for scope in ("measured", "layer"):
        _, report = pruning.apply(quiet, Prune(macs=0.3, scope=scope, multiple=4, calibration=data()))
        inner, stream = sorted(report["groups"], key=lambda g: "stem" in g["layers"])
        kept[scope] = inner["kept"], stream["kept"]
        assert ("lost_alone" in inner) == (scope == "measured")
        assert ("measured_with" in report["fit"]) == (scope == "measured")
    _, report = pruning.apply(quiet, Prune(macs=0.1, scope="measured", multiple=4, keep="one", calibration=data()))
    inner, stream = sorted(report["groups"], key=lambda g: "stem" in g["layers"])
    assert (inner["kept"], "lost_alone" in inner) == (16, False) and stream["kept"] < 16
    assert report["fit"]["measured_with"] == "all"
    assert kept["measured"][0] < 12 and kept["measured"][1] == 16 and kept["layer"][1] < 16


def test_marginal_losses_follow_the_hull_of_a_curve() -> None:
    found = channel_groups(network())
    scores = magnitudes(found, 1)
    curves = [[(4, 0.5), (8, 0.4), (12, 0.8), (15, 2.0)]] * len(found.families)
    slopes = marginal(found, scores, curves)
    for f in found.families:
        family = sorted(f, key=lambda g: (scores[g], g))
        assert slopes[family] == pytest.approx([0.05] * 8 + [0.1] * 4 + [0.4] * 4, rel=1e-6)
        assert sorted(f, key=lambda g: (slopes[g], g)) == family
    assert np.isinf(slopes[[i for i, g in enumerate(found.groups) if g.reason is not None]]).all()


def test_greedy_places_are_those_of_trying_every_family_each_time() -> None:
    found = channel_groups(network(width=24))
    cost = Cost(found, "macs")
    losses = np.full(len(found.groups), np.inf)
    rng = np.random.default_rng(3)
    for f in found.families:
        losses[list(f)] = np.sort(rng.random(len(f)))
    options = Prune(macs=0.3, multiple=4, refit=False)
    places = places_by_loss(found, losses, options, cost)
    gone = np.zeros(len(found.groups), bool)
    for place in range(0, int(np.isfinite(losses).sum()), 4):
        rates = []
        for f in found.families:
            waiting = sorted((g for g in f if not gone[g]), key=lambda g: losses[g])[:4]
            more = gone.copy()
            more[waiting] = True
            if waiting:
                rates.append((losses[waiting].sum() / max(1, cost(gone) - cost(more)), waiting))
        gone[min(rates)[1]] = True
        assert set(np.flatnonzero(places < place + 4)) == set(np.flatnonzero(gone))


def test_keep_that_names_nothing_is_an_error() -> None:
    """A layer that was to stay would go."""
    with pytest.raises(PruningError, match="keep names 'oen', which no layer matches; there are one"):
        pruning.apply(network(), Prune(macs=0.2, criterion="l1", refit=False, keep="oen"))
    with pytest.raises(PruningError, match="which no layer matches"):
        sparsity.apply(network(), Sparsify("block4x16", 0.5, keep="layer9*"))
