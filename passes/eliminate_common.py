"""`eliminate-common`: equal values are computed, and equal constants stored, once."""

from __future__ import annotations

import numpy as np

from skive.ir import Graph, Node, rebuilt
from skive.pipeline import pass_

BIASED = frozenset({"conv2d", "conv_transpose2d", "linear"})


@pass_("eliminate-common", exact=True)
def eliminate_common(graph: Graph, options: object) -> Graph:
    """One node for all nodes of the same operation, attributes and operands; constants by content.

    But not biases: layers whose biases happen to be equal (all zero, say) do not share one, and pruning would have to
    cut the channels of both alike.
    """
    biases = {i for n in graph.nodes if n.op in BIASED for i in n.inputs[2:] if i.is_const}
    seen: dict[tuple[object, ...], Node] = {}
    constants: dict[tuple[object, ...], list[Node]] = {}
    merged = False

    def same_constant(node: Node) -> Node:
        value = node.value
        # A cheap key first: weights of equal shape differ in their first elements, so whole arrays
        # are compared only when they are very likely equal.
        bucket = constants.setdefault((node.type, value.reshape(-1)[:16].tobytes()), [])
        for other in bucket:
            if np.array_equal(_bits(other.value), _bits(value)):
                return other
        bucket.append(node)
        return node

    def merge(node: Node, inputs: tuple[Node, ...]) -> Node:
        nonlocal merged
        if node.op == "input" or node in biases:
            return node
        if node.is_const:
            first = same_constant(node)
        else:
            node = rebuilt(node, inputs)
            first = seen.setdefault((node.op, repr(node.attrs), *map(id, inputs)), node)
        merged |= first is not node
        return first

    result = graph.map_nodes(merge)
    return result if merged else graph


def _bits(value: np.ndarray) -> np.ndarray:
    """The bytes of `value`: -0.0 is not 0.0, and NaN equals itself."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
