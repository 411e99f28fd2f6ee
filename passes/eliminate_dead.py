"""`eliminate-dead`: operands that a fused expression does not read, and steps that it does not use."""

from __future__ import annotations

from dataclasses import replace

from skive import ops
from skive.expr import Expr, parse, renumber
from skive.ir import FrozenDict, Graph, Node
from skive.pipeline import pass_
from skive.rewrite import Match, op, rewrite, rule


def live_steps(e: Expr) -> Expr:
    """`e` without the steps that its result does not depend on."""
    live = {len(e.steps) - 1}
    for n in reversed(range(len(e.steps))):
        if n in live:
            live.update(i for kind, i in e.steps[n].args if kind == "t")
    new = {old: n for n, old in enumerate(sorted(live))}
    return Expr(tuple(replace(e.steps[old], args=tuple((k, new[i] if k == "t" else i) for k, i in e.steps[old].args))
                      for old in new))


def _without_unread(node: Node, attribute: str, base: int, offset: int) -> Node | None:
    """`node` without unread expression operands; the first `base` operands are not the expression's,
    and operand i of the node is x(i - base + offset) of the expression."""
    e = live_steps(parse(node.attrs[attribute]))
    read = {i for s in e.steps for k, i in s.args if k == "x"}
    kept = [i for i in range(base, len(node.inputs)) if i - base + offset in read]
    if len(kept) == len(node.inputs) - base and str(e) == node.attrs[attribute]:
        return None
    if base == 0:
        # A map's shape is the broadcast of its operands: an unread one may still widen the result.
        shape = ops.broadcast_shapes(*(node.inputs[i].shape for i in kept)) if kept else None
        if shape != node.shape:
            return None
    new = list(range(1 + max(read, default=0)))
    for position, i in enumerate(kept):
        new[i - base + offset] = position + offset
    attrs = FrozenDict({**node.attrs, attribute: str(renumber(e, new))})
    return replace(node, inputs=(*node.inputs[:base], *(node.inputs[i] for i in kept)), attrs=attrs)


@rule(op("map"))
def map_operands(m: Match) -> Node | None:
    return _without_unread(m.root, "fn", 0, 0)


HOSTS = "|".join(n for n, o in ops.OPS.items() if o.epilogue is not None)


@rule(op(HOSTS, where=lambda n: bool(n.attrs.get("epilogue"))))
def epilogue_operands(m: Match) -> Node | None:
    base = ops.op_of(m.root.op).epilogue
    assert base is not None
    return _without_unread(m.root, "epilogue", base, 1)


@pass_("eliminate-dead", exact=True)
def eliminate_dead(graph: Graph, options: object) -> Graph:
    """No operand and no step of a fused expression that the result does not depend on.

    A node that no output depends on needs no pass: a graph holds what its outputs reach.
    """
    return rewrite(graph, [map_operands, epilogue_operands])
