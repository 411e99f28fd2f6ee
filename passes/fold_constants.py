"""`fold-constants`: what depends on constants alone is computed now."""

from __future__ import annotations

from dataclasses import dataclass

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.pipeline import pass_


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """`max_bytes`: a result larger than this is folded only if it is no larger than its operands,
    so that an expanded scalar does not become megabytes of weights."""

    max_bytes: int = 1 << 20


@pass_("fold-constants", exact=True, options=FoldConstants)
def fold_constants(graph: Graph, options: FoldConstants) -> Graph:
    """Every operation on constants, replaced by its value in the numpy reference."""
    folded = False

    def fold(node: Node, inputs: tuple[Node, ...]) -> Node:
        nonlocal folded
        node = rebuilt(node, inputs)
        if not inputs or not all(i.is_const for i in inputs):
            return node
        if node.type.bytes > max(options.max_bytes, sum(i.type.bytes for i in inputs)):
            return node
        folded = True
        value = ops.evaluate(node, [i.value for i in inputs])
        return constant(value.copy() if value.base is not None else value, name=node.name, origin=node.origin)

    result = graph.map_nodes(fold)
    return result if folded else graph
