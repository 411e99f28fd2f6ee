"""Labels of the indices of every axis, joined by the rules of the operations.

A rule takes the analysis and a node and returns the labels of its axes; `rule("name", ...)` registers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skive import ops
from skive.ir import Graph, Node

WINDOW = "a window moves along this axis"  # no channels: not worth a line in a report
Labels = np.ndarray  # [n] int64, the label of each index of an axis


class Joins:
    """Union-find over labels."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}
        self._done: set[tuple[int, int]] = set()
        self._alive: list[Labels] = []  # ids in `_done` stay those of these arrays

    def fresh(self, count: int) -> Labels:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, label: int) -> int:
        parent = self.parent
        while parent[label] != label:
            parent[label] = label = parent[parent[label]]
        return label

    def join(self, a: Labels, b: Labels) -> Labels:
        """Index i of one axis is index i of the other; returns either."""
        assert len(a) == len(b)
        if a is b or (id(a), id(b)) in self._done:
            return a
        self._done.add((id(a), id(b)))
        self._alive += [a, b]
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                self.parent[max(x, y)] = min(x, y)
        return a

    def keep(self, labels: Labels, reason: str) -> Labels:
        """These indices must stay."""
        for x in labels.tolist():
            self.reasons.setdefault(x, reason)
        return labels

    def kept(self, count: int, reason: str) -> Labels:
        return self.keep(self.fresh(count), reason)


Axes = tuple[Labels, ...]


class Analysis:
    """Labels of one graph; `outer`: reshapes that split an axis whose groups are the outer parts."""

    def __init__(self, graph: Graph, outer: set[Node]):
        self.graph, self.outer = graph, outer
        self.joins = Joins()
        self.axes: dict[Node, Axes] = {}
        for node in graph.nodes:
            axes = _rule_of(node.op)(self, node)
            assert tuple(map(len, axes)) == node.shape, f"{node.label()}: {node.op} labelled {list(map(len, axes))}"
            self.axes[node] = axes
        for n in graph.outputs:
            self.keep_all(n, f"an output of the network ({n.label()})")
        for pair in graph.states:
            for n in pair:
                self.keep_all(n, f"a state of the network ({n.label()})")

    def keep_all(self, node: Node, reason: str) -> None:
        for a in self.axes[node]:
            self.joins.keep(a, reason)

    def keep_operands(self, node: Node, reason: str) -> Axes:
        """Nothing of the operands and nothing of the result can be removed."""
        for i in node.inputs:
            self.keep_all(i, reason)
        return tuple(self.joins.kept(d, reason) for d in node.shape)

    def __call__(self, node: Node) -> Axes:
        return self.axes[node]


Rule = Callable[[Analysis, Node], Axes]
_RULES: dict[str, Rule] = {}  # by operation, or by kind of operation as the table of operations has it


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of these operations, or of all operations of a kind without a rule of their own."""

    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def _rule_of(name: str) -> Rule:
    return _RULES.get(name) or _RULES.get(f"kind {ops.op_of(name).kind}") or (
        lambda at, node: at.keep_operands(node, f"{node.op} has no rule ({node.label()})"))


def broadcast(at: Analysis, shapes: Sequence[Axes], result: Sequence[int]) -> Axes:
    """Labels of a result of this shape whose operands are broadcast to it."""
    axes = []
    for back in range(len(result), 0, -1):
        d = result[-back]
        full = [a[-back] for a in shapes if len(a) >= back and len(a[-back]) == d]
        assert full
        for other in full[1:]:
            at.joins.join(full[0], other)
        axes.append(full[0])
    return tuple(axes)


def with_epilogue(at: Analysis, node: Node, count: int, axes: Axes) -> Axes:
    """The result's labels joined with those of an epilogue's operands."""
    for extra in node.inputs[count:] if node.attrs.get("epilogue") else ():
        broadcast(at, [axes, at(extra)], node.shape)
    return axes
