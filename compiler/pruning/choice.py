"""Which groups go."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import numpy as np

from skive.errors import PruningError
from skive.passes.channel_groups import WINDOW, Groups
from skive.pruning.cost import Cost, Latency
from skive.pruning.request import Prune

WEIGHTED = frozenset({"conv2d", "conv_transpose2d", "linear"})


def _vector_multiple(size: int) -> int:
    return 8 if size >= 32 else max(1, size // 8)


def chosen_groups(found: Groups, scores: np.ndarray, options: Prune, cost: Cost | Latency) -> np.ndarray:
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
                           f"{options.fraction:.0%}: {obstacles(found)}")
    while low < high:
        middle = (low + high) // 2
        if cost(removed_at(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return removed_at(high)


def per_cost(found: Groups, scores: np.ndarray, cost: Cost | Latency) -> np.ndarray:
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


def obstacles(found: Groups) -> str:
    """The most frequent reasons why weights must stay, for messages."""
    counted: dict[str, int] = {}
    for g in found.groups:
        if g.reason and g.places and not g.reason.startswith(WINDOW):
            size = sum(len(i) for axes in g.places.values() for i in axes.values())
            counted[g.reason] = counted.get(g.reason, 0) + size
    worst = sorted(counted, key=lambda r: (-counted[r], r))[:3]
    return "; ".join(worst) or "every layer keeps at least one vector of channels"
