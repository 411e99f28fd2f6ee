"""Quantized operators, spelled out in integer and float operations with the rounding of ONNX."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.load import DTYPES
from skive.frontend.onnx.rows.windows import convolve
from skive.frontend.onnx.table import Call, Unsupported, checked_axis, onnx_op
from skive.ir import Node
from skive.types import DType


def along(c: Call, v: Node, x: Node, axis: int, block: int) -> Node:
    """A scale or zero point of `x` shaped to broadcast: per tensor, per index of an axis, or per block."""
    if v.type.size == 1 and v.type.rank <= 1:
        return c.reshape(v, ())
    axis = checked_axis(axis, x.type.rank)
    if v.type.rank == 1 and not block:
        if v.shape[0] != x.shape[axis]:
            raise InvalidModelError(f"{v.type} along axis {axis} of {x.type}")
        return c.reshape(v, [v.shape[0] if i == axis else 1 for i in range(x.type.rank)])
    if v.type.rank != x.type.rank:
        raise InvalidModelError(f"{v.type} for blocks of {x.type}")
    block = block or -(-x.shape[axis] // v.shape[axis])
    shape = v.shape
    v = c.reshape(v, (*shape[:axis + 1], 1, *shape[axis + 1:]))
    v = c.expand(v, (*shape[:axis + 1], block, *shape[axis + 1:]))
    v = c.reshape(v, (*shape[:axis], shape[axis] * block, *shape[axis + 1:]))
    if v.shape[axis] < x.shape[axis]:
        raise InvalidModelError(f"blocks of {block} do not cover axis {axis} of {x.type}")
    return c.slice(v, axis, 0, x.shape[axis])


def saturated(c: Call, v: Node, zero: Node | None, to: DType) -> Node:
    """round(v) + zero, clipped to the range of `to`; v is a float, zero has the type `to`."""
    v = c.make("round_even", v)
    if zero is not None:
        v = c.make("add", v, c.cast(zero, v.dtype))
    limits = np.iinfo(to.numpy)
    return c.cast(c.make("clip", v, lo=float(limits.min), hi=float(limits.max)), to)


@onnx_op("QuantizeLinear")
def quantize_linear(c: Call) -> Node:
    x, scale, zero = c[0], c[1], c.get(2)
    axis, block = int(c.attr("axis", 1)), int(c.attr("block_size", 0))
    wanted = int(c.attr("output_dtype", 0))
    if wanted and wanted not in DTYPES:
        raise Unsupported("the element type that QuantizeLinear produces is not supported")
    to = zero.dtype if zero is not None else DTYPES[wanted] if wanted else DType.u8
    if to not in (DType.i8, DType.u8, DType.i16, DType.u16):
        raise Unsupported(f"quantization to {to.value}")
    scale = along(c, scale, x, axis, block)
    if x.dtype is not scale.dtype:
        x, scale = c.cast(x, DType.f32), c.cast(scale, DType.f32)
    return saturated(c, c.make("div", x, scale), None if zero is None else along(c, zero, x, axis, block), to)


@onnx_op("DequantizeLinear")
def dequantize_linear(c: Call) -> Node:
    x, scale, zero = c[0], c[1], c.get(2)
    axis, block = int(c.attr("axis", 1)), int(c.attr("block_size", 0))
    v = c.cast(x, DType.i32)
    if zero is not None and not (zero.is_const and not zero.value.any()):
        v = c.make("sub", v, c.cast(along(c, zero, x, axis, block), DType.i32))
    return c.make("mul", c.cast(v, scale.dtype), along(c, scale, x, axis, block))


@onnx_op("DynamicQuantizeLinear")
def dynamic_quantize_linear(c: Call) -> list[Node]:
    x = c[0]
    axes = tuple(range(x.type.rank))
    low = c.make("min", c.make("reduce_min", x, axes=axes, keep=False), 0.0)
    high = c.make("max", c.make("reduce_max", x, axes=axes, keep=False), 0.0)
    scale = c.make("div", c.make("sub", high, low), 255.0)
    zero = saturated(c, c.make("neg", c.make("div", low, scale)), None, DType.u8)
    return [saturated(c, c.make("div", x, scale), zero, DType.u8), scale, zero]


def centred(c: Call, x: Node, zero: Node | None, axis: int | None) -> Node:
    """x - zero in 32 bits; a zero point of several elements lies along `axis`."""
    v = c.cast(x, DType.i32)
    if zero is None or (zero.is_const and not zero.value.any()):
        return v
    zero = c.cast(zero, DType.i32)
    if zero.type.size == 1:
        zero = c.reshape(zero, ())
    elif zero.type.rank == 1 and axis is not None:
        zero = c.reshape(zero, [zero.shape[0] if i == axis % x.type.rank else 1 for i in range(x.type.rank)])
    return c.make("sub", v, zero)


@onnx_op("MatMulInteger")
def matmul_integer(c: Call) -> Node:
    a, b = c[0], c[1]
    return integer_product(c, centred(c, a, c.get(2), -2), centred(c, b, c.get(3), -1))


def integer_product(c: Call, a: Node, b: Node) -> Node:
    if a.type.rank < 2 or b.type.rank < 2:
        raise Unsupported("an integer product with a vector")
    return c.make("matmul", a, b)


@onnx_op("ConvInteger")
def conv_integer(c: Call) -> Node:
    return convolve(c, centred(c, c[0], c.get(2), None), centred(c, c[1], c.get(3), 0), None)


def requantized(c: Call, total: Node, factor: Node, zero: Node) -> Node:
    """A 32-bit sum times a real factor, in the 8-bit type of `zero`."""
    return saturated(c, c.make("mul", c.cast(total, DType.f32), c.cast(factor, DType.f32)), zero, zero.dtype)


@onnx_op("QLinearMatMul")
def qlinear_matmul(c: Call) -> Node:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (c[i] for i in range(8))
    total = integer_product(c, centred(c, a, a_zero, -2), centred(c, b, b_zero, -1))

    def shaped(v: Node, x: Node, axis: int) -> Node:
        if v.type.size == 1:
            return c.reshape(v, ())
        return v if v.type.rank != 1 else c.reshape(v, (v.shape[0], 1) if axis == -2 else (1, v.shape[0]))

    factor = c.make("div", c.make("mul", shaped(a_scale, a, -2), shaped(b_scale, b, -1)), shaped(y_scale, total, -2))
    return requantized(c, total, factor, shaped(y_zero, total, -2))


@onnx_op("QLinearConv")
def qlinear_conv(c: Call) -> Node:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (c[i] for i in range(8))
    bias = c.get(8)
    total = convolve(c, centred(c, x, x_zero, None), centred(c, w, w_zero, 0), None)
    if bias is not None:
        total = c.make("add", total, c.reshape(bias, (bias.shape[0], *[1] * (total.type.rank - 2))))
    if w_scale.type.size > 1:
        w_scale = c.reshape(w_scale, (w_scale.shape[0], *[1] * (total.type.rank - 2)))
    else:
        w_scale = c.reshape(w_scale, ())
    factor = c.make("div", c.make("mul", c.reshape(x_scale, ()), w_scale), c.reshape(y_scale, ()))
    return requantized(c, total, factor, c.reshape(y_zero, ()))
