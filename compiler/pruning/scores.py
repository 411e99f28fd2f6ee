"""How much each group of channels counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skive import ops
from skive.errors import PruningError
from skive.ir import Graph, Node
from skive.passes.channel_groups import Groups
from skive.pruning.readers import DAMPING, MOST_INPUTS, input_channels, readers_of, rows_of, width


@dataclass(frozen=True, eq=False)
class Importance:
    """What every weight of a network counts, as `skive.torch.importance` measures it. `kind`: how; `values`: by
    constant of the canonical graph (`constant_keys`), arrays of its shape."""

    kind: str
    values: Mapping[str, np.ndarray]


def constant_keys(graph: Graph) -> dict[Node, str]:
    """A name for every constant, the same whenever the same model is read."""
    seen: dict[str, int] = {}
    keys = {}
    for n in graph.nodes:
        if n.is_const:
            label = n.label()
            seen[label] = seen.get(label, 0) + 1
            keys[n] = f"{label}#{seen[label]}"
    return keys


def summed(found: Groups, importance: Importance) -> np.ndarray:
    """[groups] the sum over a group's weights; inf for what stays. PruningError if the network is another."""
    keys = constant_keys(found.graph)
    for node, key in keys.items():
        value = importance.values.get(key)
        if value is not None and value.shape != node.shape:
            raise PruningError(f"the importance was measured on another network: {key} is {list(value.shape)} there "
                               f"and {list(node.shape)} here")
    if missing := set(importance.values) - set(keys.values()):
        raise PruningError(f"the importance was measured on another network: {min(missing)} is not in this one")
    scores = np.full(len(found.groups), np.inf)
    for f in found.families:
        total = np.zeros(len(f))
        for node, by_axis in found.groups[f[0]].places.items():
            if keys[node] not in importance.values:
                continue
            for axis in by_axis:
                value = importance.values[keys[node]].sum(_others(node, axis))
                total += [value[found.groups[g].places[node][axis]].sum() for g in f]
        scores[list(f)] = total
    return scores


def magnitudes(found: Groups, power: int) -> np.ndarray:
    """[groups] the mean over a group's weight tensors of its share of their L1 or L2 norm; inf for what stays."""
    per_axis = {
        (n, axis): np.power(np.abs(_weights(found, n)), power).sum(_others(n, axis)) ** (1 / power)
        for n, axis in _weight_axes(found)
    }
    return _aggregated(found, per_axis)


def _weights(found: Groups, node: Node) -> np.ndarray:
    """The values of a constant, float64; of integers that are only dequantized, what they stand for."""
    users = found.graph.users[node]
    alone = len(users) == 1 and users[0].op == "dequantize" and users[0].inputs[0] is node
    if alone and all(i.is_const for i in users[0].inputs):
        return ops.evaluate(users[0], [i.value for i in users[0].inputs]).astype(np.float64)
    return node.value.astype(np.float64)


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


def moments(found: Groups, samples: Sequence[Sequence[np.ndarray]]) -> dict[Node, np.ndarray]:
    """[K + 1, K + 1] float64 by reader: the mean of x x' over positions, x its inputs and the constant 1;
    of readers wider than MOST_INPUTS the diagonal alone, [K + 1]."""
    from skive import calibration

    readers = readers_of(found)
    values = list(dict.fromkeys(n.inputs[0] for n in readers))
    run = calibration.runner(found.graph, values)
    sums: dict[Node, np.ndarray] = {}
    rows: dict[Node, int] = {}
    for turn, sample in enumerate(samples):
        got = dict(zip(values, run(sample), strict=True))
        for n in readers:
            x = rows_of(n, got[n.inputs[0]], turn)
            part = x.T @ x if width(n) <= MOST_INPUTS else np.square(x).sum(0)
            sums[n] = sums[n] + part if n in sums else part.astype(np.float64)
            rows[n] = rows.get(n, 0) + len(x)
    return {n: total / rows[n] for n, total in sums.items()}


def losses(found: Groups, seen: Mapping[Node, np.ndarray]) -> np.ndarray:
    """[groups] what the outputs of the reading layers lose, relative to their size, if the group goes and the
    layer's other weights make up for it: 1/2 w_S (H^-1_SS)^-1 w_S of optimal brain surgery; inf for what stays.
    Groups that no fitted layer reads have their L1 magnitude."""
    scores = magnitudes(found, 1)
    lost = np.zeros(len(found.groups))
    known = np.zeros(len(found.groups), bool)
    for node, m in seen.items():
        if m.ndim == 1:
            continue
        w = node.inputs[1].value.reshape(node.inputs[1].shape[0], -1).astype(np.float64)
        h = m[:-1, :-1] - np.outer(m[:-1, -1], m[-1, :-1])  # the bias takes the mean
        inverse = np.linalg.inv(h + (DAMPING * float(np.diagonal(h).mean()) + 1e-12) * np.eye(len(h)))
        power = float(np.einsum("oi,ij,oj->", w, h, w)) + 1e-30
        labels = found.axes[node.inputs[1]][-1][input_channels(node)]  # [K]
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
        size = np.sqrt((m if m.ndim == 1 else np.diagonal(m))[:-1])  # [K]
        by_weight = np.abs(w.value.reshape(w.shape[0], -1).astype(np.float64)).sum(0) * size
        per_axis[w, w.type.rank - 1] = np.bincount(input_channels(node), by_weight, w.shape[-1])
    scored = _aggregated(found, per_axis)
    return np.where(scored == 0, magnitudes(found, 1), scored)
