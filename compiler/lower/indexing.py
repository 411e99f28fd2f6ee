"""Gathers, scatters and the largest of a row."""

from __future__ import annotations

import math

from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.strides import boolean, collapse, tag
from skive.plan import aligned


@lowers("gather")
def _gather(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    axis = node.attrs["axis"] % x.type.rank
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        math.prod(x.shape[:axis]),
        x.shape[axis],
        index.type.size,
        math.prod(x.shape[axis + 1 :]),
    ]
    ctx.call(
        node,
        "gather",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


@lowers("lookup")
def _lookup(ctx: Lowering, node: Node) -> None:
    x, table = node.inputs
    pixel = ctx.view(node).pixel
    dims, walks = collapse(node.shape, [ctx.strides(node), ctx.strides(x)])
    ctx.call(
        node,
        "lookup_to" if pixel else "lookup",
        "map.h",
        [tag("Shape", dims), *(tag("Strides", w) for w in walks[0 if pixel else 1 :])],
        ["y", "part", "table", "x"],
        [ctx.read("table", table), ctx.read("x", x, strided=True), ctx.write("y", node, strided=True)],
    )


@lowers("gather_elements")
def _gather_elements(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        tag("Shape", x.shape),
        tag("Shape", index.shape),
        node.attrs["axis"] % x.type.rank,
    ]
    ctx.call(
        node,
        "gather_elements",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


@lowers("gather_nd")
def _gather_nd(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    b, q = node.attrs["batch_dims"], index.shape[-1]
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        math.prod(x.shape[:b]),
        tag("Shape", x.shape[b : b + q]),
        math.prod(index.shape[b:-1]),
        math.prod(x.shape[b + q :]),
    ]
    ctx.call(
        node,
        "gather_nd",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


_SCATTER = {"none": "Replace", "add": "Add", "mul": "Mul", "min": "Minimum", "max": "Maximum"}


@lowers("scatter_elements", "scatter_nd")
def _scatter(ctx: Lowering, node: Node) -> None:
    x, index, updates = node.inputs
    template: list[object] = [x.dtype.ctype, index.dtype.ctype]
    if node.op == "scatter_elements":
        template += [tag("Shape", x.shape), tag("Shape", index.shape), node.attrs["axis"] % x.type.rank]
    else:
        q = index.shape[-1]
        template += [tag("Shape", x.shape[:q]), math.prod(index.shape[:-1]), math.prod(x.shape[q:])]
    ctx.call(
        node,
        node.op,
        "gather.h",
        [*template, _SCATTER[node.attrs["reduction"]]],
        ["x", "i", "u", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.read("u", updates), ctx.write("y", node)],
    )


@lowers("topk_values", "topk_indices")
def _topk(ctx: Lowering, node: Node) -> None:
    x, k = node.inputs[0], node.attrs["k"]
    template = [x.dtype.ctype, x.type.size // x.shape[-1], x.shape[-1], k, boolean(node.attrs["largest"])]
    results = ["y", "nullptr"] if node.op == "topk_values" else ["nullptr", "y"]
    ctx.call(
        node,
        "topk",
        "topk.h",
        template,
        ["x", *results, "scratch", "part"],
        [ctx.read("x", x), ctx.write("y", node)],
        scratch=aligned(8 * k) * ctx.threads,
    )
