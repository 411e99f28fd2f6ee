"""Pooling and resampling."""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.lower.abilities import has_fast_kernel
from skive.lower.calls import Lowering, lowers
from skive.lower.convolution import element_tags, window_tags
from skive.lower.strides import image
from skive.types import DType


@lowers("max_pool2d", "avg_pool2d", "sum_pool2d")
def _pool2d(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    kernel = f"Kernel<{x.shape[3]}, {node.attrs['kernel'][0]}, {node.attrs['kernel'][1]}>"
    stride, padding, dilation = window_tags(node.attrs)
    if not has_fast_kernel(node):
        if node.op == "avg_pool2d":
            ctx.problems.append(
                (node.label(), f"average pooling of {x.dtype.value}", "cast the operand to float32")
            )
            return
        ctx.call(
            node,
            "plain_max_pool2d",
            "plain.h",
            [x.dtype.ctype, image(x.shape), kernel, stride, padding, dilation],
            ["x", "y", "part"],
            [ctx.read("x", x), ctx.write("y", node)],
        )
        return
    fn, extra = ctx.epilogue(node)
    template: list[object] = [image(x.shape), kernel, stride, padding]
    if node.op == "avg_pool2d":
        template.append(padding if node.attrs["count_pad"] else "Pad<0, 0, 0, 0>")
    template.append(dilation)
    template += element_tags(ctx, x, node) if node.op == "sum_pool2d" else ctx.pixel_strides(x, node)
    ctx.call(
        node,
        node.op,
        "pool.h",
        template,
        ["x", "y", "nullptr", "part", *(["fn"] if x.dtype is DType.f32 or node.op == "sum_pool2d" else [])],
        [ctx.read("x", x, strided=True), ctx.write("y", node, strided=True), *extra],
        fn,
    )


@lowers("resize2d")
def _resize2d(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    if not has_fast_kernel(node):
        ctx.problems.append(
            (node.label(), "resampling with tables that are not constant", "fix the size of the result")
        )
        return
    args, spelled, taps = [ctx.read("x", x, strided=True)], [], []
    for axis, name in ((1, "rows"), (2, "columns")):
        sources, weights = (i.value for i in node.inputs[2 * axis - 1 : 2 * axis + 1])
        args.append(ctx.packed(name, np.clip(sources, 0, x.shape[axis] - 1)))
        plain = sources.shape[1] == 1 and (weights == 1).all()
        if not plain:
            args.append(ctx.packed(f"{name}_weights", weights))
        spelled.append(f"{{{name}, {'nullptr' if plain else f'{name}_weights'}}}")
        taps.append(sources.shape[1])
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "resize2d",
        "resize.h",
        [image(x.shape), *node.shape[1:3], *taps, ctx.pixel(x), ctx.pixel(node)],
        ["x", *spelled, "y", "nullptr", "part", "fn" if x.dtype is DType.f32 else "NoEpilogue{}"],
        [*args, ctx.write("y", node, strided=True), *extra],
        fn,
    )
