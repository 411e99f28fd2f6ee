"""The IR: immutable nodes with one result each, graphs of them, and nothing else.

A node *is* its value. Nodes are compared by identity; a pass builds new nodes and returns a new
graph. Construct nodes through `skive.ops.make`, which checks the operands and infers the type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from skive.errors import InvalidModelError
from skive.types import DType, TensorType


class FrozenDict(Mapping[str, Any]):
    """An immutable, insertion-ordered mapping for node attributes."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] = {}):  # noqa: B006 - never mutated
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operation and its result.

    `name` is unique within what the user sees (the tensor's name in the source model where there
    is one); `origin` is the source layer and survives every rewrite: errors, profiles and emitted
    comments print it.
    """

    op: str
    inputs: tuple[Node, ...]
    attrs: FrozenDict
    type: TensorType
    name: str = ""
    origin: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def value(self) -> np.ndarray:
        """The array of a `const` node."""
        return self.attrs["value"]

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    def label(self) -> str:
        """What to call this node in a message: its source layer, else its name, else its op."""
        return self.origin or self.name or self.op

    def __repr__(self) -> str:
        return f"<{self.op} {self.name or self.origin} {self.type}>"


def constant(value: np.ndarray, *, name: str = "", origin: str = "") -> Node:
    """A `const` node that owns a read-only copy-free view of `value`."""
    value = np.asarray(value, order="C")
    value.flags.writeable = False
    return Node("const", (), FrozenDict({"value": value}),
                TensorType(value.shape, DType.of(value.dtype)), name, origin)


def content_hash(value: np.ndarray) -> str:
    """First 12 hexadecimal digits of the SHA-256 of dtype, shape and bytes."""
    h = hashlib.sha256(f"{value.dtype.str}{value.shape}".encode())
    h.update(np.ascontiguousarray(value).data)
    return h.hexdigest()[:12]


def topological(roots: Iterable[Node]) -> tuple[Node, ...]:
    """Every node reachable from `roots`, operands before users, in a deterministic order.

    Iterative: a model may be a chain of thousands of nodes.
    """
    order: list[Node] = []
    done: set[Node] = set()
    open_: set[Node] = set()
    for root in roots:
        stack: list[tuple[Node, int]] = [(root, 0)]
        while stack:
            node, i = stack.pop()
            if node in done:
                continue
            if i == 0:
                if node in open_:
                    raise InvalidModelError(f"{node.label()}: the graph has a cycle")
                open_.add(node)
            if i < len(node.inputs):
                stack.append((node, i + 1))
                if node.inputs[i] not in done:
                    stack.append((node.inputs[i], 0))
            else:
                done.add(node)
                open_.discard(node)
                order.append(node)
    return tuple(order)


@dataclass(frozen=True)
class Graph:
    """A straight-line program: inputs, named outputs, and the nodes between them.

    `batch_max`: None for fixed shapes; otherwise the graph describes one sample (dimension 0 of
    every input and output is 1) and the artefact runs it for 1 to `batch_max` samples a call.
    """

    name: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    output_names: tuple[str, ...]
    batch_max: int | None = None
    states: tuple[tuple[Node, Node], ...] = field(default=())
    exit_points: tuple[str, ...] = ()  # outputs that the model marks as exits and does not return

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in execution order; unused inputs come first."""
        return topological((*self.inputs, *self.outputs))

    @cached_property
    def users(self) -> dict[Node, list[Node]]:
        """For each node, the nodes that read it, one entry per operand position."""
        users: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            for i in n.inputs:
                users[i].append(n)
        return users

    def is_output(self, node: Node) -> bool:
        return any(node is o for o in self.outputs)

    def map_nodes(self, fn: Callable[[Node, tuple[Node, ...]], Node]) -> Graph:
        """The graph with every node replaced by `fn(node, new_operands)`, operands first."""
        new: dict[Node, Node] = {}
        for n in self.nodes:
            new[n] = fn(n, tuple(new[i] for i in n.inputs))
        return self.with_nodes(new)

    def with_nodes(self, new: Mapping[Node, Node]) -> Graph:
        """The graph with inputs and outputs looked up in `new`."""
        return replace(self, inputs=tuple(new[i] for i in self.inputs),
                       outputs=tuple(new[o] for o in self.outputs),
                       states=tuple((new[a], new[b]) for a, b in self.states))


def rebuilt(node: Node, inputs: tuple[Node, ...]) -> Node:
    """`node` on other operands of the same types; the very same node if nothing changed."""
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return node
    return replace(node, inputs=inputs)
