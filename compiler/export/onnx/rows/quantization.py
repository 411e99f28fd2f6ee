"""Quantization and its inverse."""

from __future__ import annotations

import numpy as np

from skive.export.onnx.rows.elementwise import spelled
from skive.export.onnx.rows.windows import window
from skive.export.onnx.writer import (
    ELEM_TYPES,
    F32,
    I64,
    IMAGE,
    Inexpressible,
    Writer,
    axis_attr,
    dequantize,
    fuses,
    known_parameters,
    row,
    scalar,
)
from skive.ir import Node


@row("dequantize")
def dequantize_row(w: Writer, n: Node) -> None:
    if n.inputs[0].shape != n.shape:
        raise Inexpressible("dequantize of a value that its scales broadcast")
    order = w.common_order(n.inputs[:1], n.shape)
    w.put(n, dequantize(w, n, order), order)


@row("quantize")
def quantize(w: Writer, n: Node) -> None:
    order = w.common_order(n.inputs[:1], n.shape)
    scale, zero, axis = known_parameters(w, n, order)
    x = w.broadcast(n.inputs[0], n.type.rank, order)
    w.put(n, w.emit("QuantizeLinear", x, scale, zero, **axis_attr(scale, axis)), order)


@row("requantize")
def requantize(w: Writer, n: Node) -> None:
    """f32(x) * factor, rounded as QuantizeLinear with the scale 1 rounds; or one QLinearConv."""
    total, factor, zero = n.inputs
    one = scalar(1, F32)
    if fuses(n) and (total, IMAGE) not in w.tensors and total not in w.orders:
        x, weights, *bias = total.inputs
        scales = np.broadcast_to(factor.value.reshape(-1), weights.shape[:1])
        y = w.emit("QLinearConv", w.get(x, IMAGE), one, scalar(total.attrs["zero"], x.dtype), w.get(weights, IMAGE),
                   scales, np.zeros(weights.shape[0], np.int8), one, scalar(int(zero.value.flat[0]), n.dtype),
                   w.get(bias[0]) if bias else "", **window(total.attrs, weights), group=total.attrs["groups"])
        w.put(n, y, IMAGE)
        return
    order = w.common_order(n.inputs[:1], n.shape)
    if not zero.is_const or (zero.value != zero.value.flat[0]).any():
        raise Inexpressible("requantize with several zero points")
    real = w.broadcast(total, n.type.rank, order)
    real = real if total.dtype is F32 else w.emit("Cast", real, to=ELEM_TYPES[F32])
    scaled = w.emit("Mul", real, w.broadcast(factor, n.type.rank, order))
    w.put(n, w.emit("QuantizeLinear", scaled, one, scalar(int(zero.value.flat[0]), n.dtype)), order)


@spelled("requantize_fixed")
def requantize_fixed(w: Writer, n: Node, x: str, multiplier: str, shift_by: str, zero: str) -> str:
    """In 64 bits; the shift is a division that rounds down, spelled as the one that rounds to zero."""
    wide = [w.emit("Cast", v, to=ELEM_TYPES[I64]) for v in (x, multiplier, zero)]
    if not n.inputs[2].is_const:
        raise Inexpressible("requantize_fixed with a computed shift")
    by = np.int64(1) << n.inputs[2].value.astype(np.int64)
    if n.inputs[2].type.size != 1:
        raise Inexpressible("requantize_fixed with several shifts")
    by = by.reshape(())
    total = w.emit("Add", w.emit("Mul", wide[0], wide[1]), by >> 1)
    # floor(a / b) = (a - (a mod b)) / b, where ONNX's mod has the sign of b.
    floor = w.emit("Div", w.emit("Sub", total, w.emit("Mod", total, by)), by)
    limits = np.iinfo(n.dtype.numpy)
    moved = w.emit("Clip", w.emit("Add", floor, wide[2]), scalar(limits.min, I64), scalar(limits.max, I64))
    return w.emit("Cast", moved, to=ELEM_TYPES[n.dtype])
