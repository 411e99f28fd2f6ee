"""What is joined is a group: from the labels of a graph to the channels that can only be removed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from skive import ops
from skive.ir import Graph, Node
from skive.passes.channel_groups import elementwise, movement, products, recurrent, reductions, windows  # noqa: F401 - registers their rules
from skive.passes.channel_groups.labels import Analysis, Axes, Labels
from skive.passes.channel_groups.movement import factors


@dataclass(frozen=True)
class Group:
    """Indices that live or die together. `places`: of each constant, per axis, its indices in the group."""

    places: Mapping[Node, Mapping[int, np.ndarray]]
    reason: str | None  # why it must stay; None if it can be removed

    @property
    def label(self) -> str:
        """A layer in which the group stands, for messages."""
        return next((n.label() for n in self.places if n.label() != "const"), "")


@dataclass(frozen=True)
class Groups:
    """The groups of a graph.

    `axes`: of each value, per axis, the group of each index. `families`: groups that stand in the same
    axes of the same weights, such as the channels of a residual stage; only those that can be removed.
    """

    graph: Graph
    axes: Mapping[Node, tuple[Labels, ...]]
    groups: Sequence[Group]
    families: Sequence[tuple[int, ...]] = field(default=())

    @property
    def removable(self) -> list[int]:
        return [i for i, g in enumerate(self.groups) if g.reason is None]

    def kept_sizes(self, removed: np.ndarray, node: Node) -> tuple[int, ...]:
        """The shape of `node` without the groups that `removed` [groups] bool names."""
        return tuple(int(len(a) - np.count_nonzero(removed[a])) for a in self.axes[node])


def _splits(graph: Graph) -> list[Node]:
    """The reshapes that make several axes of one."""
    return [
        n for n in graph.nodes if n.op == "reshape" and any(
            sum(n.inputs[0].shape[i] != 1 for i in a) == 1 and sum(n.shape[j] != 1 for j in b) > 1
            for a, b in factors(n.inputs[0].shape, n.shape))
    ]


def _feeds_heads(graph: Graph, node: Node) -> bool:
    """Whether moves and elementwise functions lead from `node` to attention or a product of activations."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        for u in graph.users[n]:
            if u in seen:
                continue
            seen.add(u)
            if u.op in ("attention", "matmul"):
                return True
            if ops.op_of(u.op).kind in ("movement", "elementwise", "normalize") and u.op != "reshape":
                todo.append(u)
    return False


def channel_groups(graph: Graph) -> Groups:
    """The groups of the canonical `graph`.

    An axis that a reshape splits is removed by its inner parts (the same channels of every block), by its
    outer ones where those are attention heads or the inner ones must stay.
    """
    splits = _splits(graph)
    outer = {n for n in splits if _feeds_heads(graph, n)}
    at = Analysis(graph, outer)
    for n in splits:
        if n in outer:
            continue
        changed = Analysis(graph, outer | {n})
        if _free(changed) > _free(at):
            outer.add(n)
            at = changed
    return _collected(at)


def _free(at: Analysis) -> int:
    """Indices of constants that can be removed."""
    kept = {at.joins.find(x) for x in at.joins.reasons}
    constants = (axes for n, axes in at.axes.items() if n.is_const)
    return sum(at.joins.find(x) not in kept for axes in constants for a in axes for x in a.tolist())


def _collected(at: Analysis) -> Groups:
    joins = at.joins
    roots = np.fromiter((joins.find(x) for x in range(len(joins.parent))), np.int64, len(joins.parent))
    reasons: dict[int, str] = {}
    for x, reason in joins.reasons.items():
        reasons.setdefault(int(roots[x]), reason)
    number: dict[int, int] = {}
    axes: dict[Node, Axes] = {}
    places: list[dict[Node, dict[int, np.ndarray]]] = []
    for node in at.graph.nodes:
        numbered = []
        for a in at.axes[node]:
            if len(set(roots[a].tolist())) == 1:
                reasons.setdefault(int(roots[a[0]]), f"all there is along an axis ({node.label()})")
            ids = np.fromiter((number.setdefault(int(r), len(number)) for r in roots[a]), np.int64, len(a))
            numbered.append(ids)
        axes[node] = tuple(numbered)
        places.extend({} for _ in range(len(number) - len(places)))
        if node.is_const:
            for axis, ids in enumerate(numbered):
                order = np.argsort(ids, kind="stable")
                bounds = np.flatnonzero(np.diff(ids[order])) + 1
                for part in np.split(order, bounds):
                    if len(part):
                        places[ids[part[0]]].setdefault(node, {})[axis] = part
    by_number = {n: reasons.get(root) for root, n in number.items()}
    groups = [Group(p, by_number[n]) for n, p in enumerate(places)]
    # A group in no weight stands for indices of an axis that nothing computes: nothing to remove.
    groups = [Group(g.places, g.reason if g.reason or g.places else "no weight has it") for g in groups]
    return Groups(at.graph, axes, groups, _families(groups))


def _families(groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
    found: dict[frozenset[tuple[Node, int]], list[int]] = {}
    for n, g in enumerate(groups):
        if g.reason is None:
            found.setdefault(frozenset((node, axis) for node, axes in g.places.items() for axis in axes), []).append(n)
    return tuple(map(tuple, found.values()))
