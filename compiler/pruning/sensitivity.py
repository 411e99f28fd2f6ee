"""How much of each layer goes, by what the network's outputs lose when channels of that layer alone go.

The analysis of Li et al., Pruning Filters for Efficient ConvNets (2017), with weights that make up for what goes: a
layer whose loss nobody sees, such as one inside a residual block, may lose most of its channels, and a residual
stream that everything reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from skive import ops
from skive.ir import Node
from skive.passes.channel_groups import Groups, emptied
from skive.pipeline import total_macs
from skive.pruning.fit import refitted, restored, unfit
from skive.pruning.readers import MOST_INPUTS, ROWS, input_channels, readers_of, width

SHARES = (0.25, 0.5, 0.75, 0.9375)  # of a layer's channels, by which its loss is measured
PROBES = 32  # samples that it is measured on
FEWEST = 8  # samples by which all layers can be fitted
WORK = 1e12  # multiply-accumulates that may be spent: a minute or two


def damages(found: Groups, scores: np.ndarray, seen: Mapping[Node, np.ndarray], samples: Sequence[Sequence[np.ndarray]],
            kept: Collection[tuple[int, ...]], progress: Callable[[str, float], None]
            ) -> tuple[list[list[tuple[int, float]]], str]:
    """(by family: (channels gone, what the outputs lose, relative to their variance), the least important ones by
    `scores` [groups] first, nothing for those of `kept`; which layers made up for it: "all", "readers" or "none").
    `seen`: the moments of `samples`; none if nothing is fitted.

    As in the network that comes of it, all layers behind what is gone are fitted; of a network for which that is too
    much work only those that read it.
    """
    families = [[] if f in kept else sorted(f, key=lambda g: (scores[g], g)) for f in found.families]
    share = WORK / max(1, len(families) * len(SHARES))  # of a measurement
    solving = sum(min(width(n), MOST_INPUTS) ** 3 for n in readers_of(found))
    count = int(np.clip((share - solving) // (3 * total_macs(found.graph) + _moments(found)), 0, PROBES))
    everything = bool(seen) and count >= FEWEST
    probes = samples[: count if everything else int(np.clip(share // max(1, total_macs(found.graph)), 2, PROBES))]
    probe = Probe(found, probes)
    result = []
    for i, family in enumerate(families):
        progress("prune", 0.1 + 0.05 * i / len(families))
        curve = []
        counts = {min(max(1, round(share * len(family))), len(family) - 1) for share in SHARES if family}
        for count in sorted(counts - {0}):
            gone = np.zeros(len(found.groups), bool)
            gone[family[:count]] = True
            if everything:
                fitted = zip(found.graph.nodes, refitted(found, gone, probes).nodes, strict=True)
                changed = {old: new.value for old, new in fitted if old.is_const and new is not old}
            else:
                changed = weights_without(found, gone, seen, len(samples))
            curve.append((count, probe.loss(changed)))
        result.append(curve)
    return result, "all" if everything else "readers" if seen else "none"


def _moments(found: Groups) -> int:
    """Multiply-accumulates of what a sample adds to the moments of all layers that are fitted."""
    return sum(2 * ROWS * min(width(n), MOST_INPUTS) ** 2 for n in readers_of(found))


def weights_without(found: Groups, gone: np.ndarray, seen: Mapping[Node, np.ndarray], samples: int
                    ) -> dict[Node, np.ndarray]:
    """The constants that change when the groups `gone` [groups] bool go, and the layers that read them make up for it
    as far as the moments `seen` of the whole network say how."""
    new = {n: value for n in found.graph.nodes if n.is_const and (value := emptied(found, n, gone)) is not None}
    for node in readers_of(found):
        w, *bias = node.inputs[1:3]
        keep = np.append(~gone[found.axes[w][-1][input_channels(node)]], bool(bias))
        moment = seen.get(node)
        if moment is None or moment.ndim == 1 or keep[:-1].all() or not keep[:-1].any() or unfit(found, node):
            continue
        flat = np.zeros((w.shape[0], width(node) + 1))
        flat[:, :-1] = w.value.reshape(len(flat), -1)
        for b in bias:
            flat[:, -1] = b.value
        rows = samples * min(ROWS, node.type.size // w.shape[0])
        fitted = restored(flat, moment, moment, keep, rows)
        fitted[gone[found.axes[w][0]]] = 0
        new[w] = fitted[:, :-1].reshape(w.shape).astype(np.float32)
        for b in bias:
            new[b] = fitted[:, -1].astype(np.float32)
    return new


class Probe:
    """What a network gives on `samples`, and how far it is off when some of its constants change."""

    def __init__(self, found: Groups, samples: Sequence[Sequence[np.ndarray]]):
        self._graph, self._count = found.graph, len(samples)
        self._whole: dict[Node, list[np.ndarray]] = {}
        for node in self._graph.nodes:
            if node.op == "input":
                self._whole[node] = [s[self._graph.inputs.index(node)] for s in samples]
            elif not node.is_const:
                self._whole[node] = self._values(node, {}, {})
        self._outputs = [o for o in self._graph.outputs if o.dtype.is_float and not o.is_const] or [
            o for o in self._graph.outputs if not o.is_const]

    def _values(self, node: Node, constants: Mapping[Node, np.ndarray], changed: Mapping[Node, list[np.ndarray]]
                ) -> list[np.ndarray]:
        def value(i: Node, sample: int) -> np.ndarray:
            return constants.get(i, i.value) if i.is_const else (changed if i in changed else self._whole)[i][sample]

        return [ops.evaluate(node, [value(i, s) for i in node.inputs]) for s in range(self._count)]

    def loss(self, constants: Mapping[Node, np.ndarray]) -> float:
        """The mean squared error of the outputs over their variance, mean over outputs, with these constants."""
        changed: dict[Node, list[np.ndarray]] = {}
        for node in self._graph.nodes:
            if node in self._whole and any(i in constants or i in changed for i in node.inputs):
                changed[node] = self._values(node, constants, changed)
        losses = [0.0]
        for o in self._outputs:
            if o in changed:
                before, after = (np.stack(v).astype(np.float64) for v in (self._whole[o], changed[o]))
                losses.append(float(np.square(after - before).mean() / (before.var() + 1e-30)))
        return sum(losses) / max(1, len(self._outputs))


def marginal(found: Groups, scores: np.ndarray, curves: Sequence[Sequence[tuple[int, float]]]) -> np.ndarray:
    """[groups] what the outputs lose by each group, if those of its family that `scores` has below it have gone: the
    slope of the lower convex hull of the family's curve, so that the order within families stays."""
    result = np.full(len(scores), np.inf)
    for f, curve in zip(found.families, curves, strict=True):
        family = sorted(f, key=lambda g: (scores[g], g))
        counts = np.array([0, *(c for c, _ in curve)])
        losses = np.array([0.0, *(loss for _, loss in curve)])
        at, slopes = 0, np.zeros(len(family))
        while at < len(counts) - 1:
            rates = np.maximum(losses[at + 1:] - losses[at], 0) / (counts[at + 1:] - counts[at])
            to = at + 1 + int(np.flatnonzero(rates == rates.min())[-1])
            slopes[counts[at]: counts[to]] = rates.min()
            at = to
        slopes[counts[-1]:] = slopes[counts[-1] - 1] if counts[-1] else 0.0
        result[family] = slopes * (1 + 1e-9 * np.arange(len(family))) + 1e-30 * np.arange(len(family))
    return result
