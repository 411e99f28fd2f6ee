"""Control flow recovered from data flow: what only one side of a `choose` needs runs only if that side is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from skive import ops
from skive.ir import Graph, Node
from skive.lower.calls import Lowering, lowers
from skive.lower.storage import Guards


def guards_of(graph: Graph) -> dict[Node, Guards]:
    """For every node the conditions, outermost first, without which nothing needs it.

    All uses of a node agree on a prefix of conditions; that prefix is its own. A condition is always computed
    before what it guards: it is the first operand of the `choose` through which alone that is reached.
    """
    found: dict[Node, Guards] = {}
    outputs = set(graph.outputs)
    for node in reversed(graph.nodes):
        uses: list[Guards] = [()] if node in outputs or not graph.users[node] else []
        for user in set(graph.users[node]):
            around = found[user]
            if user.op != "choose":
                uses.append(around)
                continue
            condition, a, b = user.inputs
            if node is condition:
                uses.append(around)
            if node is a:
                uses.append((*around, (condition, True)))
            if node is b:
                uses.append((*around, (condition, False)))
        common = uses[0]
        for other in uses[1:]:
            length = 0
            while length < min(len(common), len(other)) and common[length] == other[length]:
                length += 1
            common = common[:length]
        found[node] = common
    return found


def path_macs(nodes: Iterable[Node], guards: Mapping[Node, Guards]) -> tuple[int, int]:
    """(fewest, most) multiply-accumulates of `nodes` over all ways through their branches.

    Conditions count as independent: where two exclude each other, no call may reach the one or the other figure.
    """
    found = [(guards[n], m) for n in nodes if (m := ops.macs(n))]
    return _extreme(found, 0, min), _extreme(found, 0, max)


def _extreme(found: Sequence[tuple[Guards, int]], depth: int, pick: Callable[[int, int], int]) -> int:
    total = sum(m for g, m in found if len(g) == depth)
    sides: dict[Node, tuple[list[tuple[Guards, int]], list[tuple[Guards, int]]]] = {}
    for g, m in found:
        if len(g) > depth:
            condition, holds = g[depth]
            sides.setdefault(condition, ([], []))[holds].append((g, m))
    return total + sum(pick(*(_extreme(side, depth + 1, pick) for side in both)) for both in sides.values())


@lowers("choose")
def _choose(ctx: Lowering, node: Node) -> None:
    """Two copies, of which one runs; none of a side that is computed where the result lies."""
    condition, a, b = node.inputs
    dense = f"Shape<{node.type.size}>"
    around = ctx.guards
    for value, holds in ((a, True), (b, False)):
        place, target = ctx.view(value), ctx.view(node)
        if place.root is target.root and place.offset == target.offset:
            continue
        ctx.guards = (*around, (condition, holds))
        ctx.call(
            node,
            "copy_strided",
            "copy.h",
            [node.dtype.ctype, dense, dense, dense],
            ["y", "x", "part"],
            [ctx.write("y", node), ctx.read("x", value)],
        )
    ctx.guards = around


@lowers("copy")
def _copy(ctx: Lowering, node: Node) -> None:
    """Nothing where the operand was computed in place."""
    (x,) = node.inputs
    if ctx.view(x) != ctx.view(node):
        dense = f"Shape<{node.type.size}>"
        ctx.call(node, "copy_strided", "copy.h", [node.dtype.ctype, dense, dense, dense], ["y", "x", "part"],
                 [ctx.write("y", node), ctx.read("x", x)])
