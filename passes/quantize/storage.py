"""Which values of a float graph are stored as integers, and which contractions read them."""

from __future__ import annotations

from collections.abc import Callable

from skive import ops
from skive.ir import Graph, Node
from skive.passes.fuse_elementwise import FuseElementwise, Fusion, is_elementwise
from skive.types import DType

PRODUCTS = frozenset({"conv2d", "conv_transpose2d", "linear"})
MOVES = frozenset({"reshape", "transpose", "slice", "concat", "pad", "expand", "max_pool2d"})
SUMS = frozenset({"avg_pool2d", "reduce_mean"})
# A value this much smaller than what is computed from it is left alone if no contraction reads it:
# a gate of a squeeze-and-excitation block.
SMALL = 4
# An average of this many bytes has digits that a byte has not, and takes half of their room as float32.
AVERAGED = 8
# Attention in bytes: features of a head with which scores are exact in float32, and keys with which the sums
# of their values fit 32 bits.
ATTENTION_WIDTH, ATTENTION_KEYS = 256, 32768


def is_move(node: Node) -> bool:
    """True if the integers of the operands, moved, are the integers of `node`."""
    return node.op in MOVES and not (node.op == "pad" and node.attrs["mode"] == "constant" and node.attrs["value"])


class Storage:
    """Which values of a float graph are stored as integers, and which of them share a scale.

    `sources`: values that are quantized where they are computed; their ranges must be known.
    `products`: contractions with constant weights that read integers. `attention`: attention reads its
    operands as bytes (there is no such kernel of 16 bits). `source_of` leads from a stored value through
    operations that only move it to the source (or concatenation) whose format it has. `root_of`: the last
    operation of the kernel that a fused one will run in; `members_of`: all operations of that kernel.
    """

    def __init__(self, graph: Graph, keep: Callable[[Node], bool] = lambda node: False, attention: bool = True):
        self.graph = graph
        self._attention = attention
        fusion = Fusion(graph, FuseElementwise())
        regions = fusion.regions()
        self.root_of = {n: r.root for r in regions.values() for n in r.nodes}
        self.members_of = {r.root: r.nodes for r in regions.values()}
        self._interior = {n for n, root in self.root_of.items() if n is not root}
        self._keep = keep
        self.stored: set[Node] = set()
        for node in reversed(graph.nodes):
            if self._is_stored(node):
                self.stored.add(node)
        self.products = [n for n in graph.nodes if self.is_product(n) and n.inputs[0] in self.stored]
        self.sources = [n for n in graph.nodes if n in self.stored and not self.is_moved(n)]

    integer_only = False  # whether the inputs and outputs of the graph are integers too
    wide: frozenset[Node] | set[Node] = frozenset()  # stored values that take 16 bits whatever else takes 8

    def is_product(self, node: Node) -> bool:
        """True for a contraction with constant weights that may be computed in integers."""
        return (
            node.op in PRODUCTS
            and node.dtype is DType.f32
            and node.inputs[1].is_const
            and all(b.is_const for b in node.inputs[2:])
            and node.type.size > 0
            and not self._keep(node)
        )

    def is_attention(self, node: Node) -> bool:
        """True for attention whose queries, keys and values may be read as bytes."""
        if not self._attention or node.op != "attention" or node.dtype is not DType.f32 or self._keep(node):
            return False
        keys, width = ops.heads_first(node.inputs[1].shape, node.attrs["token_major"])[2:]
        fits = width % 4 == 0 and width <= ATTENTION_WIDTH and 0 < keys <= ATTENTION_KEYS and node.type.size > 0
        return fits and not any(i.is_const for i in node.inputs[:3])

    def _reads_integers(self, user: Node, node: Node) -> bool:
        """True if `user` multiplies the stored integers of `node`."""
        if self.is_attention(user):
            return node in user.inputs[:3] and node not in user.inputs[3:]
        return self.is_product(user) and user.inputs[0] is node

    def is_moved(self, node: Node) -> bool:
        """True if the stored `node` is made by moving stored integers."""
        return is_move(node) and node not in self._interior and any(i in self.stored for i in node.inputs)

    def _is_stored(self, node: Node) -> bool:
        """Whether `node` is stored as integers, all its users being decided."""
        if node.dtype is not DType.f32 or node.is_const or node in self._interior or node.type.size == 0:
            return False
        if node.op in ("lstm", "lstm_steps"):  # h is within -1 and 1, c is not: their slices have ranges of their own
            return False
        product = move = total = other = False
        passed: list[Node] = []
        for user in self.graph.users[node]:
            if self._keep(user):
                other = True
            elif self._reads_integers(user, node):
                product = True
            elif is_move(user) and user in self.stored:
                move = True
            elif user.op in SUMS:
                total = True
            elif is_elementwise(user) or user.op in MOVES or (user.op == "resize2d" and user.inputs[0] is node):
                passed.append(self.root_of.get(user, user))
            else:
                other = True
        if product or move:
            return True
        if other or not self._from_integers(node):
            return False
        return total or not self._is_summary(node) and any(
            u in self.stored and node.type.size * SMALL > u.type.size for u in passed)

    def _is_summary(self, node: Node) -> bool:
        """True for averages over many values, maxima beside them, their multiples and what joins them: elementwise
        work, such as a normalisation that enlarges small differences, reads them unrounded."""
        if node.op == "mul" and node.inputs[1].is_const:
            return self._is_summary(node.inputs[0])
        if node.op in SUMS or node.op == "max_pool2d":
            return node.inputs[0].type.size >= AVERAGED * node.type.size
        return node.op in MOVES - {"expand", "pad"} and all(self._is_summary(i) for i in node.inputs)

    def _from_integers(self, node: Node) -> bool:
        """True if an integer kernel computes `node`: a contraction, or what moves or sums values."""
        return any(self.is_product(n) or n.op in MOVES or n.op in SUMS for n in self.members_of.get(node, [node]))

    def takes_offsets(self, node: Node) -> bool:
        """True if what reads the channels of the image `node`, directly, joined with others or as window maxima, can
        take an offset of each channel back: contractions in their bias, elementwise work by a subtraction."""
        for user in self.graph.users[node]:
            if is_elementwise(user) or self.is_product(user) and user.op == "conv2d" and user.inputs[0] is node:
                continue
            moves = user.op == "max_pool2d" or user.op == "concat" and user.attrs["axis"] % user.type.rank == 3
            if not (moves and user in self.stored and self.is_moved(user) and self.takes_offsets(user)):
                return False
        return node.type.rank == 4 and not self.integer_only and not self.graph.is_output(node)

    def source_of(self, node: Node) -> Node:
        """The source or concatenation whose format the stored `node` has."""
        while node.op != "concat" and self.is_moved(node):
            node = node.inputs[0]
        return node
