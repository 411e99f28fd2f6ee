"""`skive.Prune`: what is asked for when channels are removed, which are, and weights that make up for them.

`passes/channel_groups.py` says what can be removed together; here groups are scored, as many of the least
important ones are chosen as the target asks for, and the layers that read what is left may be fitted anew to
calibration data.
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from skive import ops
from skive.errors import PruningError
from skive.ir import FrozenDict, Graph, Node, constant, rebuilt
from skive.passes.channel_groups import WINDOW, Groups, channel_groups, without, zeroed
from skive.samples import Samples, fingerprint
from skive.types import TensorType

log = logging.getLogger("skive.pruning")

CRITERIA = ("l1", "l2", "activation", "obspa", "random")
SCOPES = ("global", "layer")
WEIGHTED = frozenset({"conv2d", "conv_transpose2d", "linear"})
DATA_DRIVEN = frozenset({"activation", "obspa"})
NOISE_SAMPLES = 32  # stand in for calibration data where none is given
FIT_SAMPLES = 128  # whose activations decide what the remaining weights become
DAMPING = 0.01  # of the mean second moment: directions that the data does not show
ROWS = 256  # positions of a sample that enter the moments
MOST_INPUTS = 2304  # weights of an output channel: fitting costs the cube of it


@dataclass(frozen=True)
class Prune:
    """What to remove. Checked when it is made: PruningError says which value cannot be.

    `macs` or `parameters`: the fraction of multiply-accumulates, or of weights, to remove; the nearest
    possible amount that is not less. `criterion`: "l1", "l2" (the size of a group's weights, each weight tensor
    counted alike), "activation" (weights times the size of what they multiply: Sun et al., A Simple and
    Effective Pruning Approach for Large Language Models, 2023), "obspa" (what the outputs of the reading
    layers lose if their other weights make up for it: Wang et al., Structurally Prune Anything, 2024),
    "random" (the baseline, by `seed`). `refit`: the layers that read what is left are fitted to what they gave
    before. `scope`: "global" compares all layers, "layer" takes
    the same fraction of each. `multiple`: channels of a layer are kept in multiples of this, as vectors like
    them; None: of 8, or of 4 or less where a layer has fewer than 32. `keep`: patterns of layer names that keep
    all their channels. `calibration`: as for `skive.Quantize`; without it, noise stands in.
    """

    macs: float | None = None
    parameters: float | None = None
    criterion: str = "activation"
    refit: bool = True
    scope: str = "global"
    multiple: int | None = None
    keep: tuple[str, ...] = ()
    calibration: Any = field(default=None, compare=False, repr=False)
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.parameters is None):
            raise PruningError("give one of macs and parameters: the fraction to remove")
        if not 0 <= self.fraction < 1:
            raise PruningError(f"{self.measure} is {self.fraction!r}, not a fraction from 0 to below 1")
        for name, allowed in (("criterion", CRITERIA), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise PruningError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}")
        if self.multiple is not None and self.multiple < 1:
            raise PruningError(f"multiple is {self.multiple!r}, not a positive number")
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", (self.keep,))
        object.__setattr__(self, "keep", tuple(self.keep))

    def options(self) -> dict[str, Any]:
        """All but the data, as plain values."""
        return {k: v for k, v in self.__dict__.items() if k != "calibration"}

    def fingerprint(self) -> str | None:
        """Equal for equal options and data; None for data that can be read only once or cannot be hashed."""
        return fingerprint(self.options(), self.calibration)

    @property
    def measure(self) -> str:
        return "macs" if self.macs is not None else "parameters"

    @property
    def fraction(self) -> float:
        value = self.macs if self.macs is not None else self.parameters
        return value if isinstance(value, (int, float)) else math.nan


def requested(value: Prune | float) -> Prune:
    """`value` as a Prune: a number is the fraction of multiply-accumulates to remove."""
    if isinstance(value, Prune):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Prune(macs=float(value))
    raise PruningError(f"prune is {value!r}; give the fraction of multiply-accumulates or a skive.Prune")


# ------------------------------------------------------------------------------------ measures


class Cost:
    """What is left of a graph's multiply-accumulates or weights when groups are removed."""

    def __init__(self, found: Groups, measure: str):
        self._found = found
        if measure == "macs":
            self._nodes = [n for n in found.graph.nodes if ops.macs(n)]
            self._of = self._macs
        else:
            self._nodes = [n for n in found.graph.nodes if n.is_const]
            self._of = self._elements
        self.whole = self(np.zeros(len(found.groups), bool))

    def __call__(self, removed: np.ndarray) -> int:
        """With the groups that `removed` [groups] bool names gone."""
        return sum(self._of(n, removed) for n in self._nodes)

    def _elements(self, node: Node, removed: np.ndarray) -> int:
        return math.prod(self._found.kept_sizes(removed, node))

    def _macs(self, node: Node, removed: np.ndarray) -> int:
        def sized(n: Node, attrs: FrozenDict) -> Node:
            return replace(n, type=TensorType(self._found.kept_sizes(removed, n), n.dtype), attrs=attrs)

        inputs = tuple(sized(i, i.attrs) for i in node.inputs)
        attrs = dict(node.attrs)
        if attrs.get("groups", 1) == node.inputs[0].shape[-1]:
            attrs["groups"] = inputs[0].shape[-1]  # depthwise
        return ops.macs(replace(sized(node, FrozenDict(attrs)), inputs=inputs))


# ------------------------------------------------------------------------------------ scores


def magnitudes(found: Groups, power: int) -> np.ndarray:
    """[groups] the mean over a group's weight tensors of its share of their L1 or L2 norm; inf for what stays."""
    per_axis = {
        (n, axis): np.power(np.abs(n.value.astype(np.float64)), power).sum(_others(n, axis)) ** (1 / power)
        for n, axis in _weight_axes(found)
    }
    return _aggregated(found, per_axis)


def _others(node: Node, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(node.type.rank) if a != axis)


def _weight_axes(found: Groups) -> list[tuple[Node, int]]:
    """The axes of weights of two and more axes in which some removable group stands."""
    axes = {(n, axis) for f in found.families for n, by_axis in found.groups[f[0]].places.items() for axis in by_axis}
    return [(n, a) for n, a in sorted(axes, key=lambda k: (k[0].label(), k[1])) if sum(d > 1 for d in n.shape) > 1]


def _aggregated(found: Groups, per_axis: Mapping[tuple[Node, int], np.ndarray]) -> np.ndarray:
    """[groups] mean over the axes a group stands in of its values there, relative to its family's mean."""
    scores = np.full(len(found.groups), np.inf)
    for family in found.families:
        total, count = np.zeros(len(family)), 0
        for (node, axis), values in per_axis.items():
            if axis not in found.groups[family[0]].places.get(node, {}):
                continue
            own = np.array([values[found.groups[g].places[node][axis]].sum() for g in family])
            total += own / max(float(own.mean()), 1e-30)
            count += 1
        scores[list(family)] = total / max(1, count)
    return scores


def _readers(found: Groups) -> list[Node]:
    """Dense contractions with constant weights some of whose input channels can be removed."""
    free = np.array([g.reason is None for g in found.groups])
    return [
        n for n in found.graph.nodes
        if n.op in ("conv2d", "linear") and n.attrs.get("groups", 1) == 1
        and all(i.is_const and i.dtype.is_float for i in n.inputs[1:3]) and free[found.axes[n.inputs[1]][-1]].any()
    ]


def moments(found: Groups, samples: Sequence[Sequence[np.ndarray]]) -> dict[Node, np.ndarray]:
    """[K + 1, K + 1] float64 by reader: the mean of x x' over positions, x its inputs and the constant 1."""
    from skive import calibration

    readers = [n for n in _readers(found) if _width(n) <= MOST_INPUTS]
    values = list(dict.fromkeys(n.inputs[0] for n in readers))
    run = calibration.runner(found.graph, values)
    sums: dict[Node, np.ndarray] = {}
    rows: dict[Node, int] = {}
    for turn, sample in enumerate(samples):
        got = dict(zip(values, run(sample), strict=True))
        for n in readers:
            x = _rows(n, got[n.inputs[0]], turn)
            sums[n] = sums[n] + x.T @ x if n in sums else (x.T @ x).astype(np.float64)
            rows[n] = rows.get(n, 0) + len(x)
    return {n: total / rows[n] for n, total in sums.items()}


def _width(reader: Node) -> int:
    return reader.inputs[1].value[0].size


def _channels(reader: Node) -> np.ndarray:
    """[K] the input channel of each weight of an output channel."""
    w = reader.inputs[1]
    return np.tile(np.arange(w.shape[-1]), _width(reader) // w.shape[-1])


def _rows(reader: Node, value: np.ndarray, turn: int) -> np.ndarray:
    """[R, K + 1] what the weights of an output channel multiply at some positions of `value`, and ones."""
    from skive.rounding import patches

    rows = patches(reader, value, ROWS, turn)
    assert rows is not None
    return np.concatenate([rows[:, 0], np.ones((len(rows), 1), rows.dtype)], 1)


def restored(weights: np.ndarray, now: np.ndarray, cross: np.ndarray, keep: np.ndarray, rows: int) -> np.ndarray:
    """Weights [OC, K + 1], bias last, on the inputs that `keep` [K + 1] bool names, zero elsewhere, whose results
    have the least mean squared error against `weights` on the inputs of the whole network.

    `now` [K + 1, K + 1] the mean of x x' over `rows` positions, `cross` that of X x', X the inputs x as they
    were in the whole network (He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017).
    """
    inner = now[np.ix_(keep, keep)]
    # The fewer positions were seen for each weight, the less they say about others; a bias needs few.
    share = DAMPING + np.count_nonzero(keep) / rows
    pull = np.full(len(inner), share * float(np.diagonal(now)[:-1].mean()) + 1e-12)
    if keep[-1]:
        pull[-1] = 1e-12
    old = weights[:, keep]
    target = weights @ cross[:, keep] - old @ inner  # damping pulls towards the old weights, not towards zero
    result = np.zeros_like(weights)
    result[:, keep] = old + np.linalg.solve(inner + np.diag(pull), target.T).T
    return result


def refitted(found: Groups, gone: np.ndarray, samples: Sequence[Sequence[np.ndarray]]) -> Graph:
    """The graph of `found` with the groups `gone` [groups] bool zero and the layers that read what is left
    fitted, first to last, to what they gave in the whole network.

    The network runs twice side by side, whole and with what was fitted so far: a layer makes up for what
    its inputs lost, and no layer for what another has made up for already.
    """
    emptied = dict(zip(found.graph.nodes, zeroed(found, np.flatnonzero(gone)).nodes, strict=True))
    fit = {n for n in _readers(found) if _width(n) <= MOST_INPUTS
           and all(len(found.graph.users[i]) == 1 for i in n.inputs[1:3])}
    last = {i: n for n in found.graph.nodes for i in n.inputs}
    new: dict[Node, Node] = {}
    whole: dict[Node, list[np.ndarray]] = {}
    now: dict[Node, list[np.ndarray]] = {}
    for node in found.graph.nodes:
        if node.is_const:
            new[node] = emptied[node]
            continue
        if node.op == "input":
            new[node] = node
            whole[node] = now[node] = [s[found.graph.inputs.index(node)] for s in samples]
            continue
        if node in fit:
            w, *bias = node.inputs[1:3]
            keep = np.append(~gone[found.axes[w][-1][_channels(node)]], bool(bias))
            if keep[:-1].any() and whole[node.inputs[0]] is not now[node.inputs[0]]:
                weights = _fitted_weights(node, whole[node.inputs[0]], now[node.inputs[0]], keep)
                weights[gone[found.axes[w][0]]] = 0
                new[w] = constant(weights[:, :-1].reshape(w.shape).astype(np.float32), name=w.name, origin=w.origin)
                for b in bias:
                    new[b] = constant(weights[:, -1].astype(np.float32), name=b.name, origin=b.origin)
        new[node] = rebuilt(node, tuple(new[i] for i in node.inputs))
        whole[node] = [_evaluated(node, whole, s) for s in range(len(samples))]
        same = all(a is b for a, b in zip(new[node].inputs, node.inputs, strict=True) if a.is_const) and all(
            whole[i] is now[i] for i in node.inputs if not i.is_const)
        now[node] = whole[node] if same else [_evaluated(new[node], now, s, node) for s in range(len(samples))]
        for i in set(node.inputs):
            if last[i] is node and not i.is_const:
                del whole[i], now[i]
    return found.graph.with_nodes(new)


def _evaluated(node: Node, values: Mapping[Node, Sequence[np.ndarray]], sample: int, old: Node | None = None
               ) -> np.ndarray:
    inputs = (old or node).inputs
    return ops.evaluate(node, [n.value if n.is_const else values[o][sample]
                               for n, o in zip(node.inputs, inputs, strict=True)])


def _fitted_weights(node: Node, whole: Sequence[np.ndarray], now: Sequence[np.ndarray], keep: np.ndarray) -> np.ndarray:
    w, *bias = node.inputs[1:3]
    flat = np.zeros((w.shape[0], _width(node) + 1))
    flat[:, :-1] = w.value.reshape(len(flat), -1)
    for b in bias:
        flat[:, -1] = b.value
    inner, cross, rows = np.zeros((flat.shape[1],) * 2), np.zeros((flat.shape[1],) * 2), 0
    for turn, (old, new) in enumerate(zip(whole, now, strict=True)):
        before, after = _rows(node, old, turn), _rows(node, new, turn)
        inner += after.T @ after
        cross += before.T @ after
        rows += len(after)
    return restored(flat, inner / rows, cross / rows, keep, rows)


def losses(found: Groups, seen: Mapping[Node, np.ndarray]) -> np.ndarray:
    """[groups] what the outputs of the reading layers lose, relative to their size, if the group goes and the
    layer's other weights make up for it: 1/2 w_S (H^-1_SS)^-1 w_S of optimal brain surgery; inf for what stays.
    Groups that no fitted layer reads have their L1 magnitude."""
    scores = magnitudes(found, 1)
    lost = np.zeros(len(found.groups))
    known = np.zeros(len(found.groups), bool)
    for node, m in seen.items():
        w = node.inputs[1].value.reshape(node.inputs[1].shape[0], -1).astype(np.float64)
        h = m[:-1, :-1] - np.outer(m[:-1, -1], m[-1, :-1])  # the bias takes the mean
        inverse = np.linalg.inv(h + (DAMPING * float(np.diagonal(h).mean()) + 1e-12) * np.eye(len(h)))
        power = float(np.einsum("oi,ij,oj->", w, h, w)) + 1e-30
        labels = found.axes[node.inputs[1]][-1][_channels(node)]  # [K]
        for g in np.unique(labels):
            if found.groups[g].reason is None:
                own = np.flatnonzero(labels == g)
                part = w[:, own]
                lost[g] += float(np.einsum("oi,ij,oj->", part, np.linalg.inv(inverse[np.ix_(own, own)]), part)) / power
                known[g] = True
    typical = float(np.median(lost[known])) if known.any() else 1.0
    return np.where(known, lost, scores * typical)


def activations(found: Groups, seen: Mapping[Node, np.ndarray]) -> np.ndarray:
    """[groups] L1 of a reader's weights times the root mean square of what they multiply; inf for what stays."""
    per_axis: dict[tuple[Node, int], np.ndarray] = {}
    for node, m in seen.items():
        w = node.inputs[1]
        size = np.sqrt(np.diagonal(m)[:-1])  # [K]
        by_weight = np.abs(w.value.reshape(w.shape[0], -1).astype(np.float64)).sum(0) * size
        per_axis[w, w.type.rank - 1] = np.bincount(_channels(node), by_weight, w.shape[-1])
    scored = _aggregated(found, per_axis)
    return np.where(scored == 0, magnitudes(found, 1), scored)


# ------------------------------------------------------------------------------------ choice


def _vector_multiple(size: int) -> int:
    return 8 if size >= 32 else max(1, size // 8)


def chosen_groups(found: Groups, scores: np.ndarray, options: Prune, cost: Cost) -> np.ndarray:
    """[groups] bool, the least important ones, so that the wanted fraction of the cost goes. PruningError if it
    cannot be reached."""
    if options.fraction == 0:
        return np.zeros(len(found.groups), bool)
    limit = (1 - options.fraction) * cost.whole
    kept = _kept_by_name(found, options.keep)
    families = [sorted(f, key=lambda g: (scores[g], g)) for f in found.families if f not in kept]
    ranked = sorted((g for f in families for g in f), key=lambda g: (scores[g], g))
    place = {g: i for i, g in enumerate(ranked)}

    def removed_at(level: int) -> np.ndarray:
        """The groups gone when the `level` least important ones (or that share of each layer) are to go."""
        result = np.zeros(len(found.groups), bool)
        for f in families:
            going = (len(f) * level // max(1, len(ranked)) if options.scope == "layer"
                     else sum(place[g] < level for g in f))
            multiple = options.multiple or _vector_multiple(len(f))
            left = max(1, math.ceil((len(f) - going) / multiple)) * multiple
            result[f[: max(0, len(f) - left)]] = True
        return result

    low, high = 0, len(ranked)
    most = 1 - cost(removed_at(high)) / cost.whole
    if most < options.fraction:
        raise PruningError(f"{found.graph.name}: at most {most:.0%} of the {options.measure} can be removed, not "
                           f"{options.fraction:.0%}: {_obstacles(found)}")
    while low < high:
        middle = (low + high) // 2
        if cost(removed_at(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return removed_at(high)


def _per_cost(found: Groups, scores: np.ndarray, cost: Cost) -> np.ndarray:
    """`scores` by what removing a channel of the family saves: loss per multiply-accumulate."""
    result = scores.copy()
    for f in found.families:
        one = np.zeros(len(found.groups), bool)
        one[f[0]] = True
        result[list(f)] /= max(1, cost.whole - cost(one))
    return result


def _kept_by_name(found: Groups, patterns: Sequence[str]) -> set[tuple[int, ...]]:
    """The families of channels that layers of these names make."""
    read = {(n.inputs[1], n.inputs[1].type.rank - 1) for n in found.graph.nodes if n.op in WEIGHTED}
    kept = set()
    for f in found.families:
        made = {n for n, axes in found.groups[f[0]].places.items() if any((n, axis) not in read for axis in axes)}
        names = {name for n in made for name in (n.origin, n.name) if name}
        if any(fnmatch.fnmatchcase(name, p) for p in patterns for name in names):
            kept.add(f)
    return kept


def _obstacles(found: Groups) -> str:
    """The most frequent reasons why weights must stay, for messages."""
    counted: dict[str, int] = {}
    for g in found.groups:
        if g.reason and g.places and not g.reason.startswith(WINDOW):
            size = sum(len(i) for axes in g.places.values() for i in axes.values())
            counted[g.reason] = counted.get(g.reason, 0) + size
    worst = sorted(counted, key=lambda r: (-counted[r], r))[:3]
    return "; ".join(worst) or "every layer keeps at least one vector of channels"


# ------------------------------------------------------------------------------------ apply


def apply(
    graph: Graph, options: Prune, progress: Callable[[str, float], None] = lambda step, fraction: None
) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` with channels removed, the `sparsity` of report.json).

    Deterministic. PruningError if so much cannot be removed.
    """
    progress("prune", 0.1)
    found = channel_groups(graph)
    if options.fraction and not found.removable:
        raise PruningError(f"{graph.name}: no channel can be removed: {_obstacles(found)}")
    cost = Cost(found, options.measure)
    needs = options.fraction and (options.refit or options.criterion in DATA_DRIVEN)
    samples = _samples(graph, options) if needs else []
    if options.criterion == "random":
        scores = np.random.default_rng(options.seed).random(len(found.groups))
    elif options.criterion == "activation" and samples:
        scores = activations(found, moments(found, samples))
    elif options.criterion == "obspa" and samples:
        scores = _per_cost(found, losses(found, moments(found, samples)), cost)
    else:
        scores = magnitudes(found, 2 if options.criterion == "l2" else 1)
    gone = chosen_groups(found, scores, options, cost)
    if options.refit and gone.any():
        progress("prune", 0.15)
        found = channel_groups(refitted(found, gone, samples))
    report = _reported(found, gone, options)
    for measure in ("macs", "parameters"):
        c = cost if measure == options.measure else Cost(found, measure)
        report[f"{measure}_removed"] = 1 - c(gone) / max(1, c.whole)
    return without(found, np.flatnonzero(gone)), report


def _samples(graph: Graph, options: Prune) -> list[Sequence[np.ndarray]]:
    if options.calibration is None:
        from skive.pipeline import random_inputs

        return [random_inputs(graph, seed) for seed in range(NOISE_SAMPLES)]
    return list(itertools.islice(iter(Samples(graph, options.calibration, options.samples)), FIT_SAMPLES))


def _reported(found: Groups, gone: np.ndarray, options: Prune) -> dict[str, Any]:
    """Families with their channels before and after, and what had to stay with its reason."""
    families = []
    for f in found.families:
        places = sorted({n.label() for n in found.groups[f[0]].places})
        families.append({"layers": places, "channels": len(f), "kept": int((~gone[list(f)]).sum())})
    reasons: dict[str, int] = {}
    for g in found.groups:
        if g.reason and g.places and not g.reason.startswith(WINDOW):
            reasons[g.reason] = reasons.get(g.reason, 0) + 1
    return {
        "criterion": options.criterion,
        "refit": options.refit,
        "scope": options.scope,
        "pattern": "channels",
        "groups": families,
        "kept": [{"reason": r, "groups": n} for r, n in sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0]))],
    }
