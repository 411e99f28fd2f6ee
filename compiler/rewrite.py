"""Declarative rewriting: patterns over operations, rules, and one engine that applies them.

A pattern is matched against the operands of a node, backtracking over the operand order of
commutative operations. A rule's function gets the match and returns the replacement, None if the
match is not for it, or `Declined(reason)`, which is logged (`-v`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from skive.errors import InvalidModelError
from skive.ir import Graph, Node, rebuilt

log = logging.getLogger("skive.rewrite")

COMMUTATIVE = frozenset({"add", "mul", "min", "max", "and", "or", "xor", "bit_and", "bit_or", "bit_xor", "equal",
                         "not_equal"})
# One node is rewritten at most this often in one sweep: two rules that undo each other are a bug,
# not an endless loop.
MAX_STEPS = 64


@dataclass(frozen=True, slots=True)
class Declined:
    """A rule matched but must not be applied, for `reason`."""

    reason: str


class Pattern:
    """What a node may look like; `bind` yields every way it fits."""

    def bind(self, node: Node, captures: dict[str, Node]) -> Iterator[dict[str, Node]]:
        raise NotImplementedError


def _captured(name: str, node: Node, captures: dict[str, Node]) -> dict[str, Node] | None:
    """`captures` with `name` bound to `node`; None if the name already means another node."""
    if not name:
        return captures
    if name in captures:
        return captures if captures[name] is node else None
    return {**captures, name: node}


@dataclass(frozen=True, slots=True)
class Var(Pattern):
    """Any node; the same name twice means the same node twice."""

    name: str = ""

    def bind(self, node: Node, captures: dict[str, Node]) -> Iterator[dict[str, Node]]:
        c = _captured(self.name, node, captures)
        if c is not None:
            yield c


@dataclass(frozen=True, slots=True)
class Const(Pattern):
    """A constant whose array satisfies `where`."""

    name: str = ""
    where: Callable[[np.ndarray], bool] | None = None

    def bind(self, node: Node, captures: dict[str, Node]) -> Iterator[dict[str, Node]]:
        if node.is_const and (self.where is None or self.where(node.value)):
            c = _captured(self.name, node, captures)
            if c is not None:
                yield c


def scalar(value: float, *, relative: float = 0.0, name: str = "") -> Const:
    """A constant all of whose elements are `value`, to within `relative` times |value|."""

    def where(array: np.ndarray) -> bool:
        if array.size == 0 or array.dtype.kind not in "fiu":
            return False
        first = array.flat[0]
        return bool(abs(float(first) - value) <= relative * abs(value) and (array.size == 1 or (array == first).all()))

    return Const(name, where)


@dataclass(frozen=True)
class OpPattern(Pattern):
    """A node of one of `ops` whose operands match `operands` (all of them, or any if None).

    `where` is a predicate on the node; `exclusive` asks that the match be the node's only user,
    so that the rewrite leaves no copy of it behind.
    """

    ops: frozenset[str]
    operands: tuple[Pattern, ...] | None
    name: str = ""
    where: Callable[[Node], bool] | None = None
    exclusive: bool = False

    def bind(self, node: Node, captures: dict[str, Node]) -> Iterator[dict[str, Node]]:
        if node.op not in self.ops or (self.where is not None and not self.where(node)):
            return
        start = _captured(self.name, node, captures)
        if start is None:
            return
        if self.exclusive:
            # A key no capture name can spell; the engine checks the users of these nodes.
            start = {**start, f"\0{id(node)}": node}
        if self.operands is None:
            yield start
            return
        if len(self.operands) != len(node.inputs):
            return
        orders: list[tuple[Node, ...]] = [node.inputs]
        if node.op in COMMUTATIVE and node.inputs[0] is not node.inputs[1]:
            orders.append(node.inputs[::-1])
        for order in orders:
            yield from _bind_all(self.operands, order, start)


def _bind_all(patterns: tuple[Pattern, ...], nodes: tuple[Node, ...],
              captures: dict[str, Node]) -> Iterator[dict[str, Node]]:
    if not patterns:
        yield captures
        return
    for c in patterns[0].bind(nodes[0], captures):
        yield from _bind_all(patterns[1:], nodes[1:], c)


def op(names: str, *operands: Pattern, name: str = "", where: Callable[[Node], bool] | None = None,
       exclusive: bool = False) -> OpPattern:
    """A pattern for the operations `names` (separated by `|`); without operands, any operands fit."""
    return OpPattern(frozenset(names.split("|")), operands or None, name, where, exclusive)


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern bound. `match["x"]` is a captured node, `uses` counts the users of a node."""

    root: Node
    captures: dict[str, Node]
    uses: dict[Node, int] = field(repr=False)

    def __getitem__(self, name: str) -> Node:
        return self.captures[name]

    def only_use(self, node: Node) -> bool:
        """True if `node` has one user, counted once per operand position and graph output."""
        return self.uses.get(node, 0) <= 1


@dataclass(frozen=True, slots=True)
class Rule:
    """`fn(match)` replaces what `pattern` matches."""

    name: str
    pattern: OpPattern
    fn: Callable[[Match], Node | Declined | None]


def rule(pattern: OpPattern, fn: Callable[[Match], Node | Declined | None] | None = None) -> Any:
    """The rule `pattern -> fn`; without `fn`, a decorator that turns a function into that rule."""
    if fn is None:
        return lambda f: rule(pattern, f)
    return Rule(fn.__name__.strip("_").replace("_", "-"), pattern, fn)


class _Uses(dict[Node, int]):
    """User counts that stay exact while nodes are replaced one by one."""

    def __init__(self, graph: Graph) -> None:
        super().__init__({n: len(users) for n, users in graph.users.items()})
        for o in (*graph.outputs, *(b for _, b in graph.states)):
            self[o] += 1

    def moved(self, old: Node, new: Node) -> None:
        """Every user of `old` now reads `new`."""
        fresh = [new] if new not in self else []
        while fresh:
            n = fresh.pop()
            self.setdefault(n, 0)
            for i in n.inputs:
                if i not in self:
                    self[i] = 0
                    fresh.append(i)
                self[i] += 1
        self[new] += self[old]
        self[old] = 0
        dead = [old]
        while dead:
            for i in dead.pop().inputs:
                self[i] -= 1
                if self[i] == 0 and i.op != "input":
                    dead.append(i)


def rewrite(graph: Graph, rules: Sequence[Rule], *, sweeps: int = 32) -> Graph:
    """`graph` with `rules` applied, operands first, until none applies or after `sweeps` sweeps.

    The very same graph if nothing matched. Each sweep is linear in the graph; a replacement is
    seen by the users of its node in the same sweep. Raises InvalidModelError if a rule changes a
    value's shape or element type.
    """
    by_op: dict[str, list[Rule]] = {}
    for r in rules:
        for name in sorted(r.pattern.ops):
            by_op.setdefault(name, []).append(r)
    for _ in range(sweeps):
        swept = _sweep(graph, by_op)
        if swept is graph:
            return graph
        graph = swept
    log.warning("%s: rewriting stopped after %d sweeps", graph.name, sweeps)
    return graph


def _sweep(graph: Graph, by_op: dict[str, list[Rule]]) -> Graph:
    uses = _Uses(graph)
    new: dict[Node, Node] = {}
    changed = False
    for n in graph.nodes:
        node = rebuilt(n, tuple(new[i] for i in n.inputs))
        if node is not n:
            uses[node] = uses.pop(n)
        for _ in range(MAX_STEPS):
            replacement = _apply(node, by_op.get(node.op, ()), uses)
            if replacement is None:
                break
            uses.moved(node, replacement)
            node, changed = replacement, True
        new[n] = node
    return graph.with_nodes(new) if changed else graph


def _apply(node: Node, rules: Sequence[Rule], uses: _Uses) -> Node | None:
    for r in rules:
        for captures in r.pattern.bind(node, {}):
            if any(k[0] == "\0" and n is not node and uses.get(n, 0) > 1 for k, n in captures.items()):
                continue
            result = r.fn(Match(node, captures, uses))
            if isinstance(result, Declined):
                log.info("%s: %s declined: %s", node.label(), r.name, result.reason)
                continue
            if result is None or result is node:
                continue
            if result.type != node.type:
                raise InvalidModelError(f"{node.label()}: rule {r.name} replaced {node.type} by {result.type}")
            log.info("%s: %s", node.label(), r.name)
            if result.origin or result in uses:
                return result  # named already, or a node that others read: a copy would double it
            return replace(result, origin=node.origin, name=result.name or node.name)
    return None
