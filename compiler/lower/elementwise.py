"""Elementwise functions and maps."""

from __future__ import annotations

from skive import expr as expressions
from skive import ops
from skive.ir import Node
from skive.lower.calls import LOWER, Lowering
from skive.lower.functors import IN_VECTORS, in_vectors, literal, rounded_by_store, steps_of, without_divisions
from skive.lower.strides import broadcast_strides, collapse, tag
from skive.plan import Access, Fn


def _elementwise(ctx: Lowering, node: Node) -> None:
    if node.op == "map":
        e = expressions.parse(node.attrs["fn"])
    else:
        e = expressions.Expr(
            (
                expressions.Step(
                    node.op, tuple(("x", i) for i in range(len(node.inputs))), tuple(node.attrs.items())
                ),
            )
        )
    e_types = [i.dtype for i in node.inputs]
    vector = in_vectors(e, e_types) and set(e_types) <= IN_VECTORS
    operands, args, strides = [], [], []
    for i, x in enumerate(node.inputs):
        if x.is_const and x.type.size == 1:
            operands.append(Access("literal", text=literal(x.value.item(), x.dtype)))
        else:
            operands.append(Access("value"))
            args.append(ctx.read(f"x{i}", x, strided=True))
            strides.append(broadcast_strides(x.shape, node.shape, ctx.strides(x)))
    pixel = ctx.view(node).pixel
    dims, walks = collapse(node.shape, [ctx.strides(node), *strides])
    template = [node.dtype.ctype, tag("Shape", dims), *(tag("Strides", w) for w in walks[0 if pixel else 1 :])]
    steps = steps_of(e, e_types)
    if vector:
        steps = without_divisions(e, steps, node.inputs)
        steps = rounded_by_store(None, e, steps, operands, e_types)
    ctx.call(
        node,
        ("vmap" if vector else "map") + ("_to" if pixel else ""),
        "map.h",
        template[1:] if vector else template,
        ["y", "part", "fn", *(a.name for _, a in args)],
        [ctx.write("y", node, strided=True), *args],
        Fn(steps, tuple(operands), False, vector),
    )


for _op in ops.OPS.values():
    if _op.kind == "elementwise":
        LOWER[_op.name] = _elementwise
