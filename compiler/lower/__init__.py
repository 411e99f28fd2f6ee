"""Graph -> Plan: chooses kernels, packs weights, gives every value its place in memory.

Three steps: `legalise` rewrites what no kernel takes as it stands into what one does; `storage` decides
which values share memory; then one function per operation (`@lowers`, a module per family) appends kernel
calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from skive.ir import Graph, Node
from skive.lower import (
    branches,
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
from skive.lower.branches import guards_of
from skive.lower.calls import LOWER, Lowering, lowers
from skive.lower.legalise import legalise
from skive.lower.storage import Guards
from skive.plan import Plan
from skive.program import ExitTest, Program
from skive.targets.base import Target
from skive.tuning import Tuning
from skive.types import DType

__all__ = ["LOWER", "Lowering", "lower", "lowers"]

# Each registers the lowering of its operations.
FAMILIES = (
    branches, compressed, convolution, pooling, elementwise, movement, indexing, recurrence, reductions, products
)


def lower(graph: Graph, target: Target, threads: int = 1, tuning: Tuning | None = None,
          exits: tuple[ExitTest, ...] = ()) -> Plan:
    """The plan of `graph` on `target`, with the variants that `tuning` chooses, and the ways out in `exits`.

    UnsupportedOpError lists every node without a kernel.
    """
    graph = legalise(graph)
    ctx = Lowering(graph, target, threads, tuning or Tuning())
    guards = guards_of(graph)
    if not exits:
        _lower_nodes(ctx, graph.nodes, guards)
        return ctx.finish()
    program = Program(graph, exits)
    reached: list[Node] = []
    for i, nodes in enumerate(program.stages()):
        _lower_nodes(ctx, nodes, guards)
        reached += nodes
        ctx.end_stage([program.exit_of(n) == i for n in graph.output_names], branches.path_macs(reached, guards))
    return ctx.finish(exits)


def _lower_nodes(ctx: Lowering, nodes: Sequence[Node], guards: Mapping[Node, Guards]) -> None:
    """Appends the calls that compute `nodes`."""
    for node in nodes:
        if node.op in ("input", "const", "reshape") or not node.type.size:
            continue
        ctx.guards = guards[node]
        if node.dtype is DType.f16 or any(i.dtype is DType.f16 for i in node.inputs):
            ctx.problems.append((node.label(), f"{node.op} on float16", "cast the model to float32"))
        elif node.op in LOWER:
            LOWER[node.op](ctx, node)
        else:
            ctx.problems.append((node.label(), f"{node.op} has no kernel", "report it"))
        ctx.guards = ()
