"""Slices, concatenations, transpositions, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.functors import literal
from skive.lower.storage import View
from skive.lower.strides import broadcast_strides, collapse, row_strides, tag
from skive.plan import Arg
from skive.types import DType


def _shift(arg: tuple[View, Arg], elements: int, dtype: DType) -> tuple[View, Arg]:
    """The same argument, `elements` further on."""
    view, a = arg
    return View(view.root, view.offset + elements * dtype.bytes, step=view.step), a


def _copy(
    ctx: Lowering,
    node: Node,
    x: tuple[View, Arg],
    y: tuple[View, Arg],
    shape: Sequence[int],
    x_strides: Sequence[int],
    y_strides: Sequence[int],
) -> None:
    dims, (to, start) = collapse(shape, [y_strides, x_strides])
    ctx.call(
        node,
        "copy_strided",
        "copy.h",
        [node.dtype.ctype, tag("Shape", dims), tag("Strides", to), tag("Strides", start)],
        ["y", "x", "part"],
        [x, y],
    )


@lowers("slice")
def _slice(ctx: Lowering, node: Node) -> None:
    if ctx.is_view(node):
        return
    x = node.inputs[0]
    strides = ctx.strides(x)
    start = sum(s * b for s, b in zip(strides, node.attrs["start"], strict=True))
    steps = [s * st for s, st in zip(strides, node.attrs["step"], strict=True)]
    _copy(
        ctx,
        node,
        _shift(ctx.read("x", x, strided=True), start, x.dtype),
        ctx.write("y", node, strided=True),
        node.shape,
        steps,
        ctx.strides(node),
    )


@lowers("concat")
def _concat(ctx: Lowering, node: Node) -> None:
    axis, offset = node.attrs["axis"] % node.type.rank, 0
    strides = ctx.strides(node)
    view = ctx.view(node)
    for x in node.inputs:
        place_of = View(view.root, view.offset + offset * strides[axis] * node.dtype.bytes)
        if x.type.size and not (ctx.view(x).root is view.root and ctx.view(x).offset == place_of.offset):
            _copy(
                ctx,
                node,
                ctx.read("x", x, strided=True),
                _shift(ctx.write("y", node, strided=True), offset * strides[axis], node.dtype),
                x.shape,
                ctx.strides(x),
                strides,
            )
        offset += x.shape[axis]


@lowers("expand")
def _expand(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    _copy(
        ctx,
        node,
        ctx.read("x", x, strided=True),
        ctx.write("y", node),
        node.shape,
        broadcast_strides(x.shape, node.shape, ctx.strides(x)),
        row_strides(node.shape),
    )


@lowers("transpose")
def _transpose(ctx: Lowering, node: Node) -> None:
    x, perm = node.inputs[0], node.attrs["perm"]
    kept = [i for i in range(x.type.rank) if x.shape[i] != 1]
    dims = [x.shape[i] for i in kept]
    order = [kept.index(p) for p in perm if p in kept]
    # Input axes that stay neighbours in the result are one axis.
    groups: list[list[int]] = []
    for p in order:
        if groups and groups[-1][-1] + 1 == p:
            groups[-1].append(p)
        else:
            groups.append([p])
    by_input = sorted(groups)
    shape = [math.prod(dims[i] for i in g) for g in by_input] or [1]
    new_perm = [by_input.index(g) for g in groups] or [0]
    ctx.call(
        node,
        "transpose",
        "transpose.h",
        [node.dtype.ctype, tag("Shape", shape), tag("Perm", new_perm)],
        ["y", "x", "part"],
        [ctx.read("x", x), ctx.write("y", node)],
    )


@lowers("pad")
def _pad(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    ctx.call(
        node,
        "pad",
        "copy.h",
        [
            node.dtype.ctype,
            f"PadMode::{node.attrs['mode']}",
            tag("Shape", x.shape),
            tag("Shape", node.shape),
            tag("Strides", node.attrs["before"]),
        ],
        ["y", "x", literal(node.attrs["value"], node.dtype), "part"],
        [ctx.read("x", x), ctx.write("y", node)],
    )
