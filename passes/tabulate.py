"""`tabulate`: what is computed from one byte alone is read from a table of its 256 values.

    dequantize, sigmoid, mul, quantize   ->   lookup

The table holds what the reference gives for each byte: the same bits as the chain, of exp and its like
even the correctly rounded ones. Looking up takes a third of the time of the cheapest chain that passes
through float32 and a tenth of one with a division (`benchmarks/kernels/bench_quantize.py`). Where the
byte is made by a kernel that could run the chain on its registers, that saves writing and reading it, so
only chains with a transcendental function leave such a kernel.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.fuse_elementwise import has_epilogue, is_elementwise
from skive.pipeline import pass_
from skive.types import DType

BYTES = frozenset({DType.u8, DType.i8})
EASY = 1e-6  # tolerance of what takes a few instructions: transcendental functions have a larger one


@dataclass(frozen=True)
class Chain:
    """Elementwise operations from one byte to another. `nodes` in execution order, the last is the result."""

    source: Node
    nodes: tuple[Node, ...]

    def table(self) -> np.ndarray:
        """[256] results by the bits of the source."""
        every = np.arange(256, dtype=np.uint8).view(self.source.dtype.numpy)
        values: dict[Node, np.ndarray] = {self.source: every}
        for n in self.nodes:
            operands = [values[i] if i in values else i.value.reshape(()) for i in n.inputs]
            values[n] = ops.evaluate(n, operands)
        return np.ascontiguousarray(np.broadcast_to(values[self.nodes[-1]], (256,)))


def _chain(graph: Graph, root: Node, index: dict[Node, int], through_bytes: bool = True) -> Chain | None:
    """A chain from one byte to `root` whose other values nothing else reads; None if there is none. The longest,
    or if not `through_bytes` the one from the nearest byte."""
    members = {root}
    leaves: set[Node] = set()
    heap = [-index[i] for i in set(root.inputs)]
    heapq.heapify(heap)
    seen = set(heap)
    while heap and len(leaves) <= 1:
        node = graph.nodes[-heapq.heappop(heap)]  # the latest: all its users are decided
        if node.is_const and node.type.size == 1:
            continue
        private = not graph.is_output(node) and all(u in members for u in graph.users[node])
        # A dequantize costs nothing where the chain is not computed: others may read it as well.
        inside = is_elementwise(node) and (through_bytes or node.dtype not in BYTES)
        if not (inside and node.shape == root.shape and (private or node.op == "dequantize")):
            leaves.add(node)
            continue
        members.add(node)
        for i in {-index[i] for i in node.inputs} - seen:
            seen.add(i)
            heapq.heappush(heap, i)
    if len(leaves) != 1:
        return None
    (source,) = leaves
    if source.is_const or source.dtype not in BYTES or source.shape != root.shape:
        return None
    return Chain(source, tuple(sorted(members, key=index.__getitem__)))


def _pays(graph: Graph, chain: Chain) -> bool:
    """Whether looking up is faster than computing."""
    maker = chain.source
    while is_elementwise(maker) and len(graph.users[maker]) == 1 and maker.inputs[0].shape == maker.shape:
        maker = maker.inputs[0]
    if not has_epilogue(maker) or len({*graph.users[chain.source]} - {*chain.nodes}):
        return True
    return any(ops.op_of(n.op).tolerance > EASY for n in chain.nodes)


def tabulated(graph: Graph, always: bool = False) -> Graph:
    """`graph` with functions of one byte that pass through floats as tables, where that pays or `always`."""
    index = {n: i for i, n in enumerate(graph.nodes)}
    chains: dict[Node, Chain] = {}
    inside: set[Node] = set()
    for root in reversed(graph.nodes):
        if root.dtype not in BYTES or not is_elementwise(root) or root in inside or not root.type.size:
            continue
        chain = _chain(graph, root, index) or _chain(graph, root, index, through_bytes=False)
        if chain is not None and any(n.dtype.is_float for n in chain.nodes) and (always or _pays(graph, chain)):
            chains[root] = chain
            inside.update(chain.nodes)
    if not chains:
        return graph
    new: dict[Node, Node] = {}
    for n in graph.nodes:
        if n in chains:
            table = constant(chains[n].table(), origin=n.origin)
            new[n] = ops.make("lookup", new[chains[n].source], table, origin=n.origin, label=n.name)
        else:
            new[n] = rebuilt(n, tuple(new[i] for i in n.inputs))
    return graph.with_nodes(new)


@pass_("tabulate", exact=True)
def tabulate(graph: Graph, options: object) -> Graph:
    """Functions of one byte as tables."""
    return tabulated(graph)
