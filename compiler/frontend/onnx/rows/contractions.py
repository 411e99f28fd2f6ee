"""Matrix products."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, onnx_op
from skive.ir import Node


def matmul(c: Call, a: Node, b: Node) -> Node:
    """numpy.matmul(a, b); a product with a constant matrix becomes `linear`."""
    if a.type.rank == 0 or b.type.rank == 0:
        raise InvalidModelError("matrix product of a scalar")
    if b.is_const and b.type.rank == 2 and not a.is_const:
        return c.make("linear", a, c.transpose(b, (1, 0)))
    rows = c.reshape(a, (1, *a.shape)) if a.type.rank == 1 else a
    columns = c.reshape(b, (*b.shape, 1)) if b.type.rank == 1 else b
    y = c.make("matmul", rows, columns)
    shape = list(y.shape)
    if b.type.rank == 1:
        del shape[-1]
    if a.type.rank == 1:
        del shape[-1 if b.type.rank == 1 else -2]
    return c.reshape(y, shape)


@onnx_op("MatMul")
def matmul_op(c: Call) -> Node:
    return matmul(c, c[0], c[1])


@onnx_op("Gemm")
def gemm(c: Call) -> Node:
    a, b, bias = c[0], c[1], c.get(2)
    alpha, beta = float(c.attr("alpha", 1.0)), float(c.attr("beta", 1.0))
    trans_a, trans_b = bool(c.attr("transA", 0)), bool(c.attr("transB", 0))
    if a.type.rank != 2 or b.type.rank != 2:
        raise InvalidModelError(f"Gemm of {a.type} and {b.type}")
    if bias is not None and beta != 1.0:
        bias = c.make("mul", bias, beta)
    if b.is_const:
        w = b if trans_b else c.transpose(b, (1, 0))
        w = c.make("mul", w, alpha) if alpha != 1.0 else w
        x = c.transpose(a, (1, 0)) if trans_a else a
        columns = w.shape[0]
        if bias is None:
            return c.make("linear", x, w)
        if bias.is_const and (bias.type.size == 1 or bias.shape in ((columns,), (1, columns))):
            return c.make("linear", x, w, c.lit(np.broadcast_to(bias.value.reshape(-1), (columns,))))
        return c.make("add", c.make("linear", x, w), bias)
    y = c.make("matmul", a, b, trans_a=trans_a, trans_b=trans_b)
    y = c.make("mul", y, alpha) if alpha != 1.0 else y
    return y if bias is None else c.make("add", y, bias)
