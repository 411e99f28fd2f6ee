"""Products of activations: matrix products and attention."""

from __future__ import annotations

import math

import numpy as np

from skive import ops, pack
from skive.errors import UnsupportedOpError
from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.functors import literal
from skive.lower.strides import boolean, broadcast_strides, collapse, row_strides, tag
from skive.types import DType


@lowers("matmul")
def _matmul(ctx: Lowering, node: Node) -> None:
    a, b = node.inputs[:2]
    batch, (m, n) = node.shape[:-2], node.shape[-2:]
    k = a.shape[-2] if node.attrs["trans_a"] else a.shape[-1]
    trans = [boolean(node.attrs["trans_a"]), boolean(node.attrs["trans_b"])]
    strides = [[s * math.prod(x.shape[-2:]) for s in broadcast_strides(x.shape[:-2], batch)] for x in (a, b)]
    dims, (_, wa, wb) = collapse(batch, [row_strides(batch), *strides])
    template = [tag("Shape", dims), m, k, n, tag("Strides", wa), tag("Strides", wb), *trans]
    args = [ctx.read("a", a), ctx.read("b", b), ctx.write("y", node)]
    if node.inputs[0].dtype is not DType.f32:
        t = node.dtype.ctype
        ctx.call(node, "plain_matmul", "matmul.h", [t, t, *template], ["a", "b", "y", "part"], args)
        return
    fn, extra = ctx.epilogue(node)
    scratch = (
        pack.matmul_scratch_bytes(math.prod(dims), m, k, n, node.attrs["trans_a"], ctx.target.name) * ctx.threads
    )
    ctx.call(
        node,
        "matmul",
        "matmul.h",
        template,
        ["a", "b", "y", "scratch", "part", "fn"],
        [*args, *extra],
        fn,
        scratch=scratch,
    )


@lowers("attention", "quantized_attention")
def _attention(ctx: Lowering, node: Node) -> None:
    q, k, v = node.inputs[:3]
    if node.attrs.get("levels"):
        raise UnsupportedOpError([(node.label(), node.op, "rounded weights of operands that are not bytes")])
    tokens = node.attrs["token_major"]  # [B, N, heads, D] instead of [B, heads, N, D]
    b, heads, nq, d = ops.heads_first(q.shape, tokens)
    nk, dv = ops.heads_first(k.shape, tokens)[2], v.shape[3]

    def head_strides(x: Node) -> str:
        s = row_strides(x.shape)
        return tag("HeadStrides", [s[0], s[2], s[1]] if tokens else s[:3])

    args = [ctx.read("q", q), ctx.read("k", k), ctx.read("v", v)]
    mask, name = "NoMask", "nullptr"
    if len(node.inputs) > 3:
        walk = broadcast_strides(node.inputs[3].shape, (b, heads, nq, nk))
        mask, name = tag("MaskStrides", walk), "mask"
        args.append(ctx.read("mask", node.inputs[3]))
    template = [
        b,
        heads,
        nq,
        nk,
        d,
        dv,
        head_strides(q),
        head_strides(k),
        head_strides(v),
        head_strides(node),
        mask,
        boolean(node.attrs["causal"]),
    ]
    query_row = row_strides(q.shape)[1 if tokens else 2]
    if node.op == "quantized_attention":
        zeros = [node.attrs[z] for z in ("q_zero", "k_zero", "v_zero")]
        scale, factor = np.float32(node.attrs["scale"]), np.float32(node.attrs["factor"])
        exponent = np.float32(np.float64(scale) * np.log2(np.e))
        ctx.call(
            node,
            "quantized_attention",
            "attention_integer.h",
            [node.dtype.ctype, *template, *zeros],
            ["q", "k", "v", name, "y", "scratch", "part", *(literal(f, DType.f32) for f in (scale, exponent, factor)),
             str(node.attrs["y_zero"])],
            [*args, ctx.write("y", node)],
            scratch=pack.quantized_attention_scratch_bytes(nq, nk, d, dv, query_row, ctx.target.name) * ctx.threads,
        )
        return
    ctx.call(
        node,
        "attention",
        "attention.h",
        template,
        ["q", "k", "v", name, "y", "scratch", "part", literal(node.attrs["scale"], DType.f32)],
        [*args, ctx.write("y", node)],
        scratch=pack.attention_scratch_bytes(nq, nk, d, dv, query_row, ctx.target.name) * ctx.threads,
    )
