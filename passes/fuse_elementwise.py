"""`fuse-elementwise`: elementwise operations run inside the kernel that makes their operand.

First each kernel that can carry an epilogue takes in the elementwise operations behind it, as long
as one single value leaves the region; then what is left is gathered into `map` nodes. No value is
computed twice, and nothing is fused across a change of shape.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive import ops
from skive.expr import Expr, Step, parse
from skive.ir import Graph, Node, constant, rebuilt
from skive.pipeline import pass_
from skive.types import DType


@dataclass(frozen=True, slots=True)
class FuseElementwise:
    """`max_operands`, `max_steps`: bounds of one fused expression (registers, code size).
    `lookahead`: how many operations a region may try before its values must meet again."""

    max_operands: int = 16
    max_steps: int = 48
    lookahead: int = 12


# Element types that kernels with an epilogue compute on.
VALUES = frozenset({DType.f32, DType.i8, DType.u8, DType.i16, DType.u16, DType.i32})


def has_epilogue(node: Node) -> bool:
    """True for float32 kernels and for 32-bit sums of narrow integers, where their operation allows one. A
    normalisation over several axes has no channels that one could read by."""
    return ops.op_of(node.op).epilogue is not None and node.attrs.get("axis", -1) in (-1, node.type.rank - 1) and (
        node.dtype is DType.f32 or (node.dtype is DType.i32 and node.inputs[0].dtype in ops.QUANTIZED))


def is_elementwise(node: Node) -> bool:
    return ops.op_of(node.op).kind == "elementwise"


def fits_epilogue(operand: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """True if an epilogue on `shape` can read `operand`: whole, one value, or one per channel,
    per pixel or per sample and channel."""
    full = (1,) * (len(shape) - len(operand)) + operand
    if len(full) > len(shape):
        return False
    same = [d == s for d, s in zip(full, shape, strict=True)]
    ones = [d == 1 for d in full]
    return (all(same) or all(ones) or (all(ones[:-1]) and same[-1]) or (all(same[:-1]) and ones[-1])
            or (same[0] and all(ones[1:-1]) and same[-1]))


@dataclass
class _Region:
    """Nodes that become one: `root` is the only value that leaves."""

    nodes: list[Node]
    root: Node
    host: Node | None = None


@dataclass
class Fusion:
    graph: Graph
    options: FuseElementwise
    index: dict[Node, int] = field(default_factory=dict)
    inside: dict[Node, _Region] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {n: i for i, n in enumerate(self.graph.nodes)}
        self.outputs = {*self.graph.outputs, *(b for _, b in self.graph.states)}

    def escapes(self, node: Node, members: set[Node]) -> bool:
        return node in self.outputs or any(u not in members for u in self.graph.users[node])

    def regions(self) -> dict[Node, _Region]:
        """Root -> region, for every region; later kernels first, so that of two convolutions that
        are added the later one adds."""
        for node in reversed(self.graph.nodes):
            if has_epilogue(node):
                self._claim(self._behind(node))
        for node in reversed(self.graph.nodes):
            if is_elementwise(node) and node not in self.inside:
                self._claim(self._above(node))
        return {r.root: r for r in self.inside.values()}

    def _claim(self, region: _Region | None) -> None:
        if region is not None:
            for n in region.nodes:
                self.inside[n] = region

    def _joins(self, node: Node, host: Node) -> bool:
        """True if `node` may become a step of an epilogue of `host`."""
        return (is_elementwise(node) and node not in self.inside and node.shape == host.shape
                and node.dtype in VALUES and all(i.dtype in VALUES for i in node.inputs))

    def _read_as_float(self, node: Node, operand: Node, host: Node) -> bool:
        """True if `operand` of `node` is a `dequantize` that the epilogue of `host` can do while it reads."""
        return (operand.op == "dequantize" and operand.shape == host.shape and operand not in self.inside
                and self.graph.users[operand] == [node] and operand not in self.outputs
                and all(fits_epilogue(i.shape, host.shape) for i in operand.inputs))

    def _behind(self, host: Node) -> _Region | None:
        """The largest region of `host` and elementwise users from which one value leaves."""
        members, order, operands = {host}, [host], 0
        best, root = 1, host
        open_: set[Node] = {host} if self.escapes(host, members) else set()
        # Users wait in execution order: when one is tried, its operands inside were tried before.
        heap = [self.index[u] for u in set(self.graph.users[host])]
        heapq.heapify(heap)
        seen = set(heap)
        while heap and len(order) - best <= self.options.lookahead:
            node = self.graph.nodes[heapq.heappop(heap)]
            others = [i for i in node.inputs if i not in members]
            if not self._joins(node, host) or not all(
                    fits_epilogue(i.shape, host.shape) or fits_epilogue(_narrow(i).shape, host.shape) for i in others):
                continue
            reads = [i for i in others if self._read_as_float(node, i, host)]
            others = [i for i in others if i not in reads] + [i for r in reads for i in r.inputs]
            if len(order) >= self.options.max_steps or operands + len(others) > self.options.max_operands:
                break
            members.update((*reads, node))
            order += [*reads, node]
            operands += len(others)
            open_ = {v for v in (*open_, node) if self.escapes(v, members)}
            for u in set(self.graph.users[node]):
                if self.index[u] not in seen:
                    seen.add(self.index[u])
                    heapq.heappush(heap, self.index[u])
            if len(open_) == 1 and node in open_:
                best, root = len(order), node
        return _Region(order[:best], root, host) if best > 1 else None

    def _above(self, root: Node) -> _Region:
        """`root` and the elementwise operations of its shape that only the region reads."""
        members = {root}
        heap = [-self.index[i] for i in set(root.inputs)]
        heapq.heapify(heap)
        seen = set(heap)
        operands = len(heap)
        while heap:
            node = self.graph.nodes[-heapq.heappop(heap)]  # the latest: all its users are decided
            fresh = {-self.index[i] for i in node.inputs} - seen
            if (not is_elementwise(node) or node in self.inside or node.shape != root.shape
                    or self.escapes(node, members) or len(members) >= self.options.max_steps
                    or operands + len(fresh) - 1 > self.options.max_operands):
                continue
            members.add(node)
            operands += len(fresh) - 1
            seen |= fresh
            for i in fresh:
                heapq.heappush(heap, i)
        return _Region(sorted(members, key=self.index.__getitem__), root)


def _plain(value: Any) -> Any:
    """An attribute as the Python number that the expression text can spell."""
    return value.item() if isinstance(value, np.generic) else value


class _Builder:
    """Collects the steps and operands of one expression."""

    def __init__(self, first: Sequence[Node] = ()) -> None:
        self.operands: list[Node] = list(first)
        self.steps: list[Step] = []
        self.values: dict[Node, tuple[str, int]] = {n: ("x", i) for i, n in enumerate(self.operands)}

    def operand(self, node: Node, new: Node) -> tuple[str, int]:
        if node not in self.values:
            for i, known in enumerate(self.operands):
                if known is new:
                    self.values[node] = ("x", i)
                    break
            else:
                self.values[node] = ("x", len(self.operands))
                self.operands.append(new)
        return self.values[node]

    def inline(self, e: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
        """The value of `e` on `args`, its steps appended."""
        base = len(self.steps)
        for s in e.steps:
            self.steps.append(Step(s.op, tuple(args[i] if k == "x" else ("t", base + i) for k, i in s.args), s.attrs))
        return "t", len(self.steps) - 1

    def add(self, node: Node, args: list[tuple[str, int]]) -> None:
        if node.op == "map":
            self.values[node] = self.inline(parse(node.attrs["fn"]), args)
        else:
            self.steps.append(Step(node.op, tuple(args), tuple((k, _plain(v)) for k, v in node.attrs.items())))
            self.values[node] = ("t", len(self.steps) - 1)


def _narrow(node: Node) -> Node:
    """A constant operand in its smallest form: one value if uniform, no leading axes of length 1."""
    if not node.is_const or node.type.size == 0:
        return node
    v = node.value
    if v.ndim and (v.size == 1 or bool((v == v.flat[0]).all())):
        return constant(v.reshape(-1)[0].reshape(()), name=node.name, origin=node.origin)
    shape = v.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    return node if shape == v.shape else constant(v.reshape(shape), name=node.name, origin=node.origin)


def _fused(region: _Region, new: dict[Node, Node], narrow: dict[Node, Node]) -> Node:
    """The one node that computes `region`, on rewritten operands."""
    host = region.host

    def outside(i: Node) -> Node:
        if new[i] not in narrow:
            narrow[new[i]] = _narrow(new[i])
        return narrow[new[i]]

    if host is None:
        b = _Builder()
        for n in region.nodes:
            b.add(n, [b.values[i] if i in b.values else b.operand(i, outside(i)) for i in n.inputs])
        if ops.broadcast_shapes(*(o.shape for o in b.operands)) != region.root.shape:
            # A uniform constant was the only operand of full shape: keep the constants as they are.
            b = _Builder()
            for n in region.nodes:
                b.add(n, [b.values[i] if i in b.values else b.operand(i, new[i]) for i in n.inputs])
        return ops.make("map", *b.operands, fn=str(Expr(tuple(b.steps))), origin=region.root.origin,
                        label=region.root.name)
    base = ops.op_of(host.op).epilogue
    assert base is not None
    carried = bool(host.attrs.get("epilogue"))
    inputs = [new[i] for i in (host.inputs[:base] if carried else host.inputs)]
    if len(inputs) < base:  # an epilogue follows the bias: make it explicit
        sums = DType.i32 if host.inputs[0].dtype in ops.QUANTIZED else host.dtype
        inputs.append(constant(np.zeros(host.shape[-1], sums.numpy), origin=host.origin))
    b = _Builder([host])
    if carried:
        extra = [b.operand(i, outside(i)) for i in host.inputs[base:]]
        b.values[host] = b.inline(parse(host.attrs["epilogue"]), [("x", 0), *extra])
    for n in region.nodes[1:]:
        b.add(n, [b.values[i] if i in b.values else b.operand(i, outside(i)) for i in n.inputs])
    attrs = {**host.attrs, "epilogue": str(Expr(tuple(b.steps)))}
    return ops.make(host.op, *inputs, *b.operands[1:], origin=host.origin, label=region.root.name, **attrs)


@pass_("fuse-elementwise", exact=True, options=FuseElementwise)
def fuse_elementwise(graph: Graph, options: FuseElementwise) -> Graph:
    """Every elementwise operation as a step of an epilogue or of a `map`."""
    fusion = Fusion(graph, options)
    regions = fusion.regions()
    if all(len(r.nodes) == 1 and r.root.op == "map" for r in regions.values()):
        return graph
    new: dict[Node, Node] = {}
    narrow: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in regions:
            new[node] = _fused(regions[node], new, narrow)
        elif node not in fusion.inside:
            new[node] = rebuilt(node, tuple(new[i] for i in node.inputs))
    return graph.with_nodes(new)
