"""Graph -> Plan: chooses kernels, packs weights, gives every value its place in memory.

Three steps: `legalise` rewrites what no kernel takes as it stands into what one does; `storage` decides
which values share memory; then one function per operation (`@lowers`, a module per family) appends kernel
calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from skive.ir import Graph, Node
from skive.lower import (
    batches,
    branches,
    compressed,
    convolution,
    elementwise,
    indexing,
    loops,
    movement,
    pooling,
    products,
    recurrence,
    reductions,
)
from skive.lower.branches import guards_of
from skive.lower.calls import LOWER, Lowering, lowers
from skive.lower.legalise import legalise
from skive.plan import Plan
from skive.program import ExitTest, Program
from skive.targets.base import Target
from skive.tuning import Tuning
from skive.types import DType

__all__ = ["LOWER", "NOT_COMPUTED", "Lowering", "lower", "lowers"]

# Each registers the lowering of its operations.
FAMILIES = (
    branches, compressed, convolution, pooling, elementwise, movement, indexing, recurrence, reductions, products
)

NOT_COMPUTED = ("input", "const", "reshape", "sample", "batch")  # memory, or a view of it


def lower(graph: Graph, target: Target, threads: int = 1, tuning: Tuning | None = None,
          exits: tuple[ExitTest, ...] = ()) -> Plan:
    """The plan of `graph` on `target`, with the variants that `tuning` chooses, and the ways out in `exits`.

    UnsupportedOpError lists every node without a kernel.
    """
    graph = legalise(graph)
    turns = batches.Turns(graph) if exits else batches.one_by_one(graph, target, threads)
    graph = turns.graph
    guards = guards_of(graph)
    program = Program(graph, exits) if exits else None
    stages = program.stages() if program else (graph.nodes,)
    rolled = loops.rolled(graph, stages, guards)
    ctx = Lowering(rolled.graph, target, threads, tuning or Tuning(), rolled.loops)
    if not program:
        ctx.samples = turns.samples
        _lower_nodes(ctx, turns.nodes, rolled)
        ctx.end_turns()
        ctx.samples = 1
        _lower_nodes(ctx, rolled.stages[0][len(turns.nodes):], rolled)
        return ctx.finish()
    reached: list[Node] = []
    for i, nodes in enumerate(rolled.stages):
        _lower_nodes(ctx, nodes, rolled)
        reached += stages[i]
        ctx.end_stage([program.exit_of(n) == i for n in graph.output_names], branches.path_macs(reached, guards))
    return ctx.finish(exits)


def _lower_nodes(ctx: Lowering, nodes: Sequence[Node], rolled: loops.Rolled) -> None:
    """Appends the calls that compute `nodes`."""
    starts = {loop.repeated[0]: loop for loop in rolled.loops}
    loop, first = None, 0
    for node in nodes:
        if node in starts:
            loop, first = starts[node], len(ctx.calls)
        if node.op not in NOT_COMPUTED and node.type.size:
            ctx.guards = rolled.guards[node]
            _lower_node(ctx, node)
            ctx.guards = ()
        if loop and node is loop.repeated[-1]:
            ctx.end_loop(loop, first)


def _lower_node(ctx: Lowering, node: Node) -> None:
    if node.dtype is DType.f16 or any(i.dtype is DType.f16 for i in node.inputs):
        ctx.problems.append((node.label(), f"{node.op} on float16", "cast the model to float32"))
    elif node.op in LOWER:
        LOWER[node.op](ctx, node)
    else:
        ctx.problems.append((node.label(), f"{node.op} has no kernel", "report it"))
