"""Which groups go."""

from __future__ import annotations

import difflib
import fnmatch
import heapq
import math
from collections.abc import Sequence

import numpy as np

from skive.errors import PruningError
from skive.ir import Graph, Node
from skive.passes.channel_groups import WINDOW, Groups
from skive.pipeline import require_matches
from skive.pruning.cost import Cost, Latency
from skive.pruning.request import Prune

WEIGHTED = frozenset({"conv2d", "conv_transpose2d", "linear"})


def vector_multiple(size: int) -> int:
    """Channels are kept in multiples of this where a layer has `size`: what reads them takes 4 bytes at a time, what
    makes them 16 integers or 8 to 16 floats, and of two half empty registers none is saved."""
    if size >= 128:
        return 16
    return 8 if size >= 24 else 4 if size >= 16 else max(1, size // 8)


def chosen_groups(found: Groups, scores: np.ndarray, options: Prune, cost: Cost | Latency) -> np.ndarray:
    """[groups] bool, the least important ones, so that the wanted fraction of the cost goes. PruningError if it
    cannot be reached."""
    if options.fraction == 0:
        return np.zeros(len(found.groups), bool)
    limit = (1 - options.fraction) * cost.whole
    kept = kept_by_name(found, options.keep)
    families = [sorted(f, key=lambda g: (scores[g], g)) for f in found.families if f not in kept]
    ranked = sorted((g for f in families for g in f), key=lambda g: (scores[g], g))
    place = {g: i for i, g in enumerate(ranked)}

    def removed_at(level: int) -> np.ndarray:
        """The groups gone when the `level` least important ones (or that share of each layer) are to go."""
        result = np.zeros(len(found.groups), bool)
        for f in families:
            going = (len(f) * level // max(1, len(ranked)) if options.scope == "layer"
                     else sum(place[g] < level for g in f))
            multiple = options.multiple or vector_multiple(len(f))
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
    return _given_back(removed_at(high), families, scores, options, cost, limit)


def _given_back(gone: np.ndarray, families: Sequence[Sequence[int]], scores: np.ndarray, options: Prune,
                cost: Cost | Latency, limit: float) -> np.ndarray:
    """`gone` without the most important channels that need not go: the last step can be a large one, as channels
    go in multiples, of a residual stream for many layers at once, and with scope "layer" of all layers together."""
    if isinstance(cost, Latency):
        return gone  # each question to it is a compilation
    gone = gone.copy()
    waiting = {i: int(gone[list(f)].sum()) for i, f in enumerate(families)}
    while waiting := {i: count for i, count in waiting.items() if count}:
        steps = {i: list(families[i])[max(0, count - (options.multiple or vector_multiple(len(families[i])))) : count]
                 for i, count in waiting.items()}
        i = max(steps, key=lambda i: (float(scores[steps[i]].mean()), -i))
        gone[steps[i]] = False
        if cost(gone) > limit:
            gone[steps[i]] = True
            del waiting[i]
        else:
            waiting[i] -= len(steps[i])
    return gone


def per_cost(found: Groups, scores: np.ndarray, cost: Cost | Latency) -> np.ndarray:
    """`scores` by what removing a channel of the family saves: loss per multiply-accumulate."""
    result = scores.copy()
    for f in found.families:
        one = np.zeros(len(found.groups), bool)
        one[f[0]] = True
        result[list(f)] /= max(1, cost.whole - cost(one))
    return result


def places_by_loss(found: Groups, losses: np.ndarray, options: Prune, cost: Cost) -> np.ndarray:
    """[groups] when each goes, if always those go next that lose least for what they save of what is left; inf for
    what stays, as layers of `options.keep` do. `losses` [groups] do not fall within a family as it goes.

    What a channel saves only shrinks as others go, so a family whose turn was computed earlier is looked at again
    when it comes first (Minoux, Accelerated Greedy Algorithms, 1978).
    """
    result = np.full(len(losses), np.inf)
    gone = np.zeros(len(losses), bool)
    left = cost.whole
    kept = kept_by_name(found, options.keep)
    waiting = {i: sorted(f, key=lambda g: (losses[g], g)) for i, f in enumerate(found.families) if f not in kept}
    queue = [(0.0, i) for i in waiting]
    place = 0
    while queue:
        _, i = heapq.heappop(queue)
        family = waiting[i]
        step = (len(family) - 1) % (options.multiple or vector_multiple(len(found.families[i]))) + 1
        gone[family[:step]] = True
        after = cost(gone)
        rate = float(losses[family[:step]].sum()) / max(1, left - after)
        if queue and rate > queue[0][0]:
            gone[family[:step]] = False
            heapq.heappush(queue, (rate, i))
            continue
        result[family[:step]] = np.arange(place, place + step)
        left, place = after, place + step
        waiting[i] = family[step:]
        if waiting[i]:
            heapq.heappush(queue, (rate, i))
    return result


def read_axes(found: Groups) -> set[tuple[Node, int]]:
    """The axes of weights along which layers read channels."""
    return {(n.inputs[1], n.inputs[1].type.rank - 1) for n in found.graph.nodes if n.op in WEIGHTED}


def kept_by_name(found: Groups, patterns: Sequence[str]) -> set[tuple[int, ...]]:
    """The families of channels that layers of these names make."""
    read = read_axes(found)
    kept = set()
    for f in found.families:
        made = {n for n, axes in found.groups[f[0]].places.items() if any((n, axis) not in read for axis in axes)}
        names = {name for n in made for name in (n.origin, n.name) if name}
        if any(fnmatch.fnmatchcase(name, p) for p in patterns for name in names):
            kept.add(f)
    return kept


def named_families(found: Groups) -> dict[str, tuple[int, ...]]:
    """The families of channels by the first layer that makes them, `#2` and so on behind further ones of a layer."""
    read = read_axes(found)
    result: dict[str, tuple[int, ...]] = {}
    seen: dict[str, int] = {}
    for f in found.families:
        places = found.groups[f[0]].places
        made = [n.label() for n, axes in places.items() if any((n, axis) not in read for axis in axes)]
        name = (made or [n.label() for n in places])[0]
        seen[name] = seen.get(name, 0) + 1
        result[f"{name}#{seen[name]}" if seen[name] > 1 else name] = f
    return result


def given_groups(found: Groups, scores: np.ndarray, options: Prune) -> np.ndarray:
    """[groups] bool, the least important ones, so that the widths of `options` are left. PruningError for what the
    network does not have."""
    families = named_families(found)
    kept = kept_by_name(found, options.keep)
    gone = np.zeros(len(found.groups), bool)
    for name, width in options.widths.items():
        if name not in families:
            near = difflib.get_close_matches(name, families, 3, 0.3) or sorted(families)[:3]
            raise PruningError(f"{found.graph.name}: a width is given for {name!r}, which makes no channels that can "
                               f"be removed; there are {', '.join(near) or 'none'}: {obstacles(found)}")
        f = families[name]
        if width > len(f) or (width < len(f) and f in kept):
            raise PruningError(f"{found.graph.name}: {name} has {len(f)} channels"
                               f"{' that keep names' if f in kept else ''}, {width} cannot be left of them")
        gone[sorted(f, key=lambda g: (scores[g], g))[: len(f) - width]] = True
    return gone


def check_keep(graph: Graph, patterns: Sequence[str]) -> None:
    """PruningError if one of `patterns` names nothing of the network: a layer that was to stay would go."""
    require_matches(graph, patterns, PruningError)


def obstacles(found: Groups) -> str:
    """The most frequent reasons why weights must stay, for messages."""
    counted: dict[str, int] = {}
    for g in found.groups:
        if g.reason and g.places and not g.reason.startswith(WINDOW):
            size = sum(len(i) for axes in g.places.values() for i in axes.values())
            counted[g.reason] = counted.get(g.reason, 0) + size
    worst = sorted(counted, key=lambda r: (-counted[r], r))[:3]
    return "; ".join(worst) or "every layer keeps at least one vector of channels"
