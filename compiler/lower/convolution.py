"""Convolutions and fully connected layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from skive import pack
from skive.ir import Node
from skive.lower.abilities import INTEGER_PACKING, has_fast_kernel, is_depthwise
from skive.lower.calls import Lowering, lowers
from skive.lower.functors import sum_dtype
from skive.lower.narrow import narrow_pays
from skive.lower.shifted import shifted_sums
from skive.lower.sparse import ONE, lower_sparse, sparse_choice
from skive.lower.strides import image
from skive.tuning import Variant, contraction_variants
from skive.types import DType


def window_tags(a: Any) -> list[str]:
    t, left, b, r = a["pad"]
    tags = [f"Stride<{a['stride'][0]}, {a['stride'][1]}>", f"Pad<{t}, {left}, {b}, {r}>"]
    return [*tags, f"Dilation<{a['dilation'][0]}, {a['dilation'][1]}>"] if "dilation" in a else tags


def bias_of(node: Node, oc: int) -> np.ndarray:
    return node.inputs[2].value if len(node.inputs) > 2 else np.zeros(oc, sum_dtype(node).numpy)


def element_tags(ctx: Lowering, x: Node, node: Node) -> list[object]:
    """The template arguments behind the block of a convolution: XS and YS, and of integers type, zero point and
    the steps between two spills of a sum beyond 32 bits."""
    if x.dtype is DType.f32:
        return [*ctx.pixel_strides(x, node)]
    spill = [node.attrs["chain"] // 2] if node.attrs.get("chain") else []  # two elements a step
    return [ctx.pixel(x), ctx.pixel(node), x.dtype.ctype, node.attrs["zero"], *spill]


def _packed_conv(
    node: Node, w: np.ndarray, bias: np.ndarray, block: int, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [OC, KH, KW, IC] and bias of a dense convolution as its kernel reads them; integer sums begin
    at `start`."""
    x = node.inputs[0].dtype
    if x is DType.f32:
        return pack.pack_conv2d(w, block), pack.pack_bias(bias, block)
    dilation = node.attrs.get("dilation", (1, 1))
    whole = pack.pack_bias_i32(np.asarray(bias, np.int64) + start, w, node.attrs["zero"], block)
    return INTEGER_PACKING[x](w, block, dilation), whole


@lowers("conv2d")
def _conv2d(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    oc, kh, kw, _ = w.shape
    groups, c = node.attrs["groups"], x.shape[3]
    tags = [image(x.shape), f"Kernel<{oc}, {kh}, {kw}>", *window_tags(node.attrs)]
    if not has_fast_kernel(node):
        _plain_conv(ctx, node, "plain_conv2d", [w.dtype.ctype, *tags, groups])
        return
    strides = element_tags(ctx, x, node)
    fn, extra = ctx.epilogue(node)
    order = ["x", "w", "bias", "y", "scratch", "part", "fn"]

    def run(
        kernel: str, header: str, template: list[object], weights: np.ndarray, bias: np.ndarray, scratch: int = 0
    ) -> None:
        ctx.call(
            node,
            kernel,
            header,
            template,
            order,
            [
                ctx.read("x", x, strided=True),
                ctx.packed("w", weights),
                ctx.packed("bias", bias),
                ctx.write("y", node, strided=True),
                *extra,
            ],
            fn,
            scratch=scratch,
        )

    if is_depthwise(node):
        taps, bias = w.value[..., 0], bias_of(node, oc)
        weights: np.ndarray
        biases: np.ndarray
        if x.dtype is DType.f32:
            weights, biases = pack.pack_depthwise(taps, bias, oc // c)
        else:
            fn, extra, start = shifted_sums(ctx, node, fn, extra)
            packing = pack.pack_depthwise_u8 if x.dtype is DType.u8 else pack.pack_depthwise_i16
            starts: np.ndarray = np.asarray(bias, np.int64) + start
            weights, biases = packing(taps, starts, node.attrs["zero"], node.attrs, ctx.target.name, oc // c)
        header = "depthwise.h" if x.dtype is DType.f32 else "depthwise_integer.h"
        run("depthwise2d", header, [*tags, *strides], weights, biases)
        return
    sparse = sparse_choice(node, ctx.target)
    if sparse and not sparse.refused:
        lower_sparse(ctx, node, sparse, tags, bias_of(node, oc))
        return
    variants = contraction_variants(node, ctx.target)
    if narrow_pays(node, ctx.target, fn):
        variants.insert(0, Variant("narrow_conv2d", -(-oc // 4) * 4))
    kernel, block = ctx.tuning.choose(node, variants)
    if kernel == "winograd2d":
        run(
            kernel,
            "winograd.h",
            [*tags[:4], block, *strides],
            pack.pack_winograd(w.value, block, node.attrs["stride"][0]),
            pack.pack_bias(bias_of(node, oc), block),
            pack.winograd_scratch_bytes(
                x.shape, node.attrs["pad"], node.attrs["stride"][0], oc, block, ctx.threads
            ),
        )
    else:
        fn, extra, start = shifted_sums(ctx, node, fn, extra)
        template = [*tags, block] if groups == 1 else [*tags, groups, block]
        if kernel == "narrow_conv2d":
            header, scratch = "conv_narrow.h", pack.narrow_scratch_bytes(x.shape, node.attrs, (kh, kw), ctx.threads)
        else:
            header = "conv.h"
            border = None if node.attrs.get("chain") else node.attrs.get("zero", 0)
            scratch = pack.conv2d_scratch_bytes(
                x.shape, node.attrs, (kh, kw), ctx.threads, ctx.pixel(x), x.dtype.bytes, border
            )
        run(
            kernel,
            header,
            [*template, *strides],
            *_joined(_packed_conv(node, g, b, block, start)
                     for g, b in zip(np.split(w.value, groups), np.split(bias_of(node, oc), groups), strict=True)),
            scratch,
        )


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The packed weights, and the packed biases, of groups one after the other."""
    weights, biases = zip(*parts, strict=True)
    return np.concatenate(weights), np.concatenate(biases)


def _plain_conv(ctx: Lowering, node: Node, kernel: str, template: list[object]) -> None:
    args = [ctx.read("x", node.inputs[0]), ctx.read("w", node.inputs[1])]
    if len(node.inputs) > 2:
        args.append(ctx.read("bias", node.inputs[2]))
    bias = "bias" if len(node.inputs) > 2 else "nullptr"
    ctx.call(node, kernel, "plain.h", template, ["x", "w", bias, "y", "part"], [*args, ctx.write("y", node)])


@lowers("conv_transpose2d")
def _conv_transpose2d(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    oc, kh, kw, _ = w.shape
    tags = [image(x.shape), f"Kernel<{oc}, {kh}, {kw}>", *window_tags(node.attrs)]
    groups = node.attrs["groups"]
    if not has_fast_kernel(node):
        _plain_conv(ctx, node, "plain_conv_transpose2d", [w.dtype.ctype, *tags, groups, image(node.shape)])
        return
    fn, extra = ctx.epilogue(node)
    _, block = ctx.tuning.choose(node, contraction_variants(node, ctx.target))
    weights: np.ndarray
    bias: np.ndarray
    if x.dtype is DType.f32:
        weights = pack.pack_conv_transpose2d(w.value, node.attrs, node.shape, block)
        bias = np.concatenate([pack.pack_bias(g, block) for g in np.split(bias_of(node, oc), groups)])
    else:
        packing = pack.pack_conv_transpose2d_u8 if x.dtype is DType.u8 else pack.pack_conv_transpose2d_i16
        weights = packing(w.value, node.attrs, node.shape, block)
        bias = pack.pack_conv_transpose2d_bias_i32(
            bias_of(node, oc), w.value, node.attrs["zero"], node.attrs, node.shape, block
        )
    ctx.call(
        node,
        "conv_transpose2d",
        "conv.h",
        [*tags, image(node.shape), groups, block, *element_tags(ctx, x, node)],
        ["x", "w", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", weights),
            ctx.packed("bias", bias),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=pack.conv_transpose2d_scratch_bytes(
            x.shape, node.attrs, (kh, kw), node.shape, ctx.threads, x.dtype.bytes
        ),
    )


@lowers("linear")
def _linear(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    if not has_fast_kernel(node):
        ctx.problems.append(
            (node.label(), f"linear on {x.dtype.value} or with weights that are not constant", "use matmul")
        )
        return
    oc, k = w.shape
    rows = x.type.size // k
    tags = [image((1, 1, rows, k)), f"Kernel<{oc}, 1, 1>", *window_tags(ONE)]
    sparse = sparse_choice(node, ctx.target)
    if sparse and not sparse.refused:
        lower_sparse(ctx, node, sparse, tags, bias_of(node, oc))
        return
    fn, extra = ctx.epilogue(node)
    _, block = ctx.tuning.choose(node, contraction_variants(node, ctx.target))
    fn, extra, start = shifted_sums(ctx, node, fn, extra)
    weights, bias = _packed_conv(node, w.value.reshape(oc, 1, 1, k), bias_of(node, oc), block, start)
    ctx.call(
        node,
        "conv2d",
        "conv.h",
        [*tags, block, *element_tags(ctx, x, node)],
        ["x", "w", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", weights),
            ctx.packed("bias", bias),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=pack.conv2d_scratch_bytes((1, 1, rows, k), ONE, (1, 1), ctx.threads, ctx.pixel(x), x.dtype.bytes),
    )
