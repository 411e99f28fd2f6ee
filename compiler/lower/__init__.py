"""Graph -> Plan: chooses kernels, packs weights, gives every value its place in memory.

Three steps: `legalise` rewrites what no kernel takes as it stands into what one does; `storage` decides
which values share memory; then one function per operation (`@lowers`, a module per family) appends kernel
calls.
"""

from __future__ import annotations

from skive.ir import Graph
from skive.lower import (
    compressed,
    convolution,
    elementwise,
    indexing,
    movement,
    pooling,
    products,
    recurrence,
    reductions,
)
from skive.lower.calls import LOWER, Lowering, lowers
from skive.lower.legalise import legalise
from skive.plan import Plan
from skive.targets.base import Target
from skive.tuning import Tuning
from skive.types import DType

__all__ = ["LOWER", "Lowering", "lower", "lowers"]

# Each registers the lowering of its operations.
FAMILIES = (compressed, convolution, pooling, elementwise, movement, indexing, recurrence, reductions, products)


def lower(graph: Graph, target: Target, threads: int = 1, tuning: Tuning | None = None) -> Plan:
    """The plan of `graph` on `target`, with the variants that `tuning` chooses.

    UnsupportedOpError lists every node without a kernel.
    """
    graph = legalise(graph)
    ctx = Lowering(graph, target, threads, tuning or Tuning())
    for node in graph.nodes:
        if node.op in ("input", "const", "reshape") or not node.type.size:
            continue
        if node.dtype is DType.f16 or any(i.dtype is DType.f16 for i in node.inputs):
            ctx.problems.append((node.label(), f"{node.op} on float16", "cast the model to float32"))
        elif node.op in LOWER:
            LOWER[node.op](ctx, node)
        else:
            ctx.problems.append((node.label(), f"{node.op} has no kernel", "report it"))
    return ctx.finish()
