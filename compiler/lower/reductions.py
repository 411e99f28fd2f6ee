"""Reductions, scans, softmax and normalisations along axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skive.ir import Node
from skive.lower.abilities import REDUCTIONS
from skive.lower.calls import Lowering, lowers
from skive.lower.functors import literal
from skive.lower.strides import boolean, collapse, image, tag
from skive.plan import Access, Fn, aligned
from skive.types import DType


def _outer_axis_inner(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    axis %= max(len(shape), 1)
    return math.prod(shape[:axis]), shape[axis] if shape else 1, math.prod(shape[axis + 1 :])


_PLAIN = Fn((), (Access("value"),), True, True)  # an epilogue that changes nothing


@lowers(*REDUCTIONS)
def _reduce(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    axes = {a % x.type.rank for a in node.attrs["axes"]}
    strides, pixel = ctx.strides(x), ctx.view(x).pixel
    kept = [i for i in range(x.type.rank) if i not in axes]
    reduced = sorted(axes)
    # The mean over the middle of [outer, n, inner] is a pooling window: vectors run over inner.
    if node.op == "reduce_mean" and x.dtype is DType.f32 and reduced and reduced[-1] - reduced[0] == len(reduced) - 1:
        outer, n, inner = (
            math.prod(x.shape[: reduced[0]]),
            math.prod(x.shape[i] for i in reduced),
            math.prod(x.shape[reduced[-1] + 1 :]),
        )
        if inner > 1 and outer and n and (not pixel or reduced[-1] == x.type.rank - 2):
            ctx.call(
                node,
                "global_pool2d",
                "pool.h",
                [image((outer, 1, n, inner)), "GlobalAverage", *([pixel] if pixel else [])],
                ["x", "y", "nullptr", "part", "fn"],
                [ctx.read("x", x, strided=True), ctx.write("y", node)],
                _PLAIN,
            )
            return
    template: list[object] = [REDUCTIONS[node.op], x.dtype.ctype]
    for group in (kept, reduced):
        dims, (walk,) = collapse([x.shape[i] for i in group], [[strides[i] for i in group]])
        template += [tag("Shape", dims), tag("Strides", walk)]
    args = [ctx.read("x", x, strided=True), ctx.write("y", node)]
    ctx.call(node, "reduce", "reduce.h", template, ["x", "y", "part"], args)


@lowers("argmax", "argmin")
def _arg(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [
        x.dtype.ctype,
        *_outer_axis_inner(x.shape, node.attrs["axis"]),
        boolean(node.op == "argmax"),
        boolean(node.attrs["last"]),
    ]
    ctx.call(
        node, "arg_extremum", "reduce.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)]
    )


@lowers("cumsum", "cumprod")
def _scan(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [
        "Sum" if node.op == "cumsum" else "Prod",
        x.dtype.ctype,
        *_outer_axis_inner(x.shape, node.attrs["axis"]),
        boolean(node.attrs["exclusive"]),
        boolean(node.attrs["reverse"]),
    ]
    ctx.call(node, "scan", "reduce.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)])


@lowers("softmax", "log_softmax")
def _softmax(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [*_outer_axis_inner(x.shape, node.attrs["axis"]), boolean(node.op == "log_softmax")]
    ctx.call(node, "softmax", "softmax.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)])


@lowers("integer_softmax")
def _integer_softmax(ctx: Lowering, node: Node) -> None:
    x, table = node.inputs
    ctx.call(
        node,
        "integer_softmax",
        "softmax.h",
        [x.dtype.ctype, node.dtype.ctype, *_outer_axis_inner(x.shape, node.attrs["axis"])],
        ["x", "exponentials", "y", "part", f"{node.attrs['levels']}u", literal(node.attrs["zero"], DType.i32)],
        [ctx.read("x", x), ctx.read("exponentials", table), ctx.write("y", node)],
    )


@lowers("integer_layer_norm")
def _integer_layer_norm(ctx: Lowering, node: Node) -> None:
    x, scale, bias = node.inputs
    axis = node.attrs["axis"] % x.type.rank
    parameters = [literal(node.attrs["eps"], DType.i64), str(node.attrs["shift"]),
                  *(literal(node.attrs[z], DType.i32) for z in ("x_zero", "zero"))]
    ctx.call(
        node,
        "integer_layer_norm",
        "norm.h",
        [x.dtype.ctype, node.dtype.ctype, math.prod(x.shape[:axis]), math.prod(x.shape[axis:]),
         boolean(node.attrs["centred"]), boolean(scale.shape == ())],
        ["x", "scale", "bias", "y", "part", *parameters],
        [ctx.read("x", x), ctx.read("scale", scale), ctx.read("bias", bias), ctx.write("y", node)],
    )


@lowers("layer_norm", "rms_norm", "l2_norm")
def _norm(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    axis = node.attrs["axis"] % x.type.rank
    template = [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])]
    limit = node.attrs["least" if node.op == "l2_norm" else "eps"]
    args, order = [ctx.read("x", x)], ["x"]
    if node.op != "l2_norm":
        args, order = [*args, ctx.read("scale", node.inputs[1])], [*order, "scale"]
    if node.op == "layer_norm":
        order.append("bias" if len(node.inputs) > 2 else "nullptr")
        args += [ctx.read("bias", b) for b in node.inputs[2:3]]
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        node.op,
        "norm.h",
        template,
        [*order, "y", "part", literal(limit, DType.f32), "fn"],
        [*args, ctx.write("y", node), *extra],
        fn,
    )


@lowers("group_norm")
def _group_norm(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    images, *places, channels = x.shape
    bias = "bias" if len(node.inputs) > 2 else "nullptr"
    args = [ctx.read("x", x), ctx.read("scale", node.inputs[1])]
    args += [ctx.read("bias", b) for b in node.inputs[2:3]]
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "group_norm",
        "norm.h",
        [images, math.prod(places), channels, node.attrs["groups"]],
        ["x", "scale", bias, "y", "scratch", "part", literal(node.attrs["eps"], DType.f32), "fn"],
        [*args, ctx.write("y", node), *extra],
        fn,
        scratch=2 * aligned(4 * channels) * ctx.threads,
    )
