"""`fold-constants`: what depends on constants alone is computed now."""

from __future__ import annotations

from dataclasses import dataclass

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.pipeline import pass_

# The contractions that have kernels for quantized weights, and what may stand between.
READS_WEIGHTS = frozenset({"conv2d", "conv_transpose2d", "linear", "matmul"})
MOVES_WEIGHTS = frozenset({"reshape", "transpose", "slice"})


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """`max_bytes`: a result larger than this is folded only if it is no larger than its operands,
    so that an expanded scalar does not become megabytes of weights."""

    max_bytes: int = 1 << 20


@pass_("fold-constants", exact=True, options=FoldConstants)
def fold_constants(graph: Graph, options: FoldConstants) -> Graph:
    """Every operation on constants, replaced by its value; the quantized weights of contractions stay integers."""
    weights = quantized_weights(graph)
    folded = False

    def fold(node: Node, inputs: tuple[Node, ...]) -> Node:
        nonlocal folded
        stays = node in weights
        node = rebuilt(node, inputs)
        if stays or not inputs or not all(i.is_const for i in inputs):
            return node
        limit = max(options.max_bytes, sum(i.type.bytes for i in inputs))
        if node.type.bytes > limit and node.op != "dequantize":  # which makes at most four bytes of one
            return node
        folded = True
        value = ops.evaluate(node, [i.value for i in inputs])
        return constant(value.copy() if value.base is not None else value, name=node.name, origin=node.origin)

    result = graph.map_nodes(fold)
    return result if folded else graph


def quantized_weights(graph: Graph) -> set[Node]:
    """Each `dequantize` of which a contraction reads the result, directly or after its data have moved."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        users = graph.users[node]
        read = any(u.op in READS_WEIGHTS or (u.op in MOVES_WEIGHTS and u in found) for u in users)
        if read and (node.op == "dequantize" or node.op in MOVES_WEIGHTS):
            found.add(node)
    return {n for n in found if n.op == "dequantize"}
