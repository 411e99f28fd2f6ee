"""Convolutions, pooling and resizing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from skive import ops
from skive.export.onnx.writer import (
    ELEM_TYPES,
    F32,
    I32,
    IMAGE,
    Inexpressible,
    Writer,
    integers,
    is_quantized_constant,
    row,
    scalar,
)
from skive.ir import Node
from skive.types import DType


def window(a: Any, weights: Node | None = None) -> dict[str, Any]:
    """The attributes of a window that ONNX shares with the IR."""
    kernel = weights.shape[1:3] if weights is not None else a["kernel"]
    return {"kernel_shape": list(kernel), "strides": list(a["stride"]), "pads": list(a["pad"]),
            "dilations": list(a["dilation"])}


@row("conv2d")
def conv2d(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    image, kernel = w.get(x, IMAGE), w.get(weights, IMAGE)
    attrs = {**window(n.attrs, weights), "group": n.attrs["groups"]}
    if n.dtype is x.dtype:
        w.put(n, w.emit("Conv", image, kernel, w.get(bias[0]) if bias else "", **attrs), IMAGE)
        return
    if x.dtype is not DType.u8:
        raise Inexpressible(f"an integer convolution of {x.dtype.value}: ONNX has one of u8")
    y = w.emit("ConvInteger", image, kernel, scalar(n.attrs["zero"], x.dtype), **attrs)
    if bias:
        y = w.emit("Add", y, w.broadcast(bias[0], 4, IMAGE))
    w.put(n, y, IMAGE)


@row("conv_transpose2d")
def conv_transpose2d(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    if n.dtype is not x.dtype:
        raise Inexpressible("ONNX has no transposed convolution of integers")
    oc, kh, kw, ic = weights.shape
    g = n.attrs["groups"]
    # [G OC/G, KH, KW, IC/G] as [G IC/G, OC/G, KH, KW]
    if g == 1:
        kernel = w.get(weights, (3, 0, 1, 2))
    elif weights.is_const or is_quantized_constant(weights):  # written as floats: no axis holds a scale per channel
        real = weights.value if weights.is_const else ops.evaluate(weights, [i.value for i in weights.inputs])
        value = real.reshape(g, oc // g, kh, kw, ic).transpose(0, 4, 1, 2, 3)
        kernel = w.initializer(np.ascontiguousarray(value).reshape(g * ic, oc // g, kh, kw))
    else:
        raise Inexpressible("a grouped transposed convolution whose weights are not plain constants")
    y = w.emit("ConvTranspose", w.get(x, IMAGE), kernel, w.get(bias[0]) if bias else "", **window(n.attrs, weights),
               group=g, output_padding=list(n.attrs["out_pad"]))
    w.put(n, y, IMAGE)


@row("max_pool2d")
def max_pool2d(w: Writer, n: Node) -> None:
    w.put(n, w.emit("MaxPool", w.get(n.inputs[0], IMAGE), **window(n.attrs)), IMAGE)


def averaged(w: Writer, n: Node, image: str, count_pad: bool) -> str:
    attrs = window(n.attrs)
    if tuple(attrs["dilations"]) == (1, 1):
        del attrs["dilations"]  # younger than the operator; onnxruntime's quantized form does not know it
    elif w.opset < 19:
        raise Inexpressible("an average pool with dilation needs opset 19")
    return w.emit("AveragePool", image, **attrs, count_include_pad=int(count_pad))


@row("avg_pool2d")
def avg_pool2d(w: Writer, n: Node) -> None:
    w.put(n, averaged(w, n, w.get(n.inputs[0], IMAGE), n.attrs["count_pad"]), IMAGE)


@row("sum_pool2d")
def sum_pool2d(w: Writer, n: Node) -> None:
    """The mean of the centred integers times their number; rounding makes it the integer it must be."""
    x = n.inputs[0]
    real = w.emit("DequantizeLinear", w.get(x, IMAGE), scalar(1, F32), scalar(n.attrs["zero"], x.dtype))
    count = scalar(math.prod(n.attrs["kernel"]), F32)
    total = w.emit("Round", w.emit("Mul", averaged(w, n, real, True), count))
    w.put(n, w.emit("Cast", total, to=ELEM_TYPES[I32]), IMAGE)


# The spellings of Resize that are tried, the usual ones first.
RESIZES = [{"mode": mode, "coordinate_transformation_mode": transform, **extra}
           for mode, extras in (("linear", [{}]), ("cubic", [{}, {"cubic_coeff_a": -0.5}]),
                                ("nearest", [{"nearest_mode": m} for m in ("floor", "round_prefer_floor")]))
           for extra in extras
           for transform in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")]


def resize_tables(attrs: dict[str, Any], size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources, weights) [out, taps] of one axis under the rules of ONNX Resize."""
    from skive.frontend.onnx.rows import resize

    mode = attrs["mode"]
    x = resize.source_positions(attrs["coordinate_transformation_mode"], size, out, out / size, (0.0, 1.0), whole=True,
                                real=np.float32 if mode == "nearest" else np.float64)
    if mode == "nearest":
        table = resize.nearest(attrs["nearest_mode"], x, size)
        return table.astype(np.int32)[:, None], np.ones((out, 1), np.float32)
    kernel, reach = (resize.triangle, 1) if mode == "linear" else (resize.cubic, 2)
    taps = np.floor(x).astype(np.int64)[:, None] + np.arange(-reach, reach + 2)
    weights = kernel(taps - x[:, None], float(attrs.get("cubic_coeff_a", -0.75)))
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(taps, 0, size - 1)), weights / weights.sum(1, keepdims=True))
    return resize.taps_of(matrix)


def dense(sources: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """The matrix [out, size] of a table of taps."""
    matrix = np.zeros((len(sources), size), np.float32)
    np.add.at(matrix, (np.arange(len(sources))[:, None], np.clip(sources, 0, size - 1)), weights)
    return matrix


def _resize(w: Writer, n: Node, x: str, attrs: dict[str, Any]) -> str:
    """Sizes or scales of all four axes: with `axes`, ONNX Runtime 1.31 refuses a Resize between DequantizeLinear and
    QuantizeLinear. An open batch has no size."""
    if not w.any_batch:
        return w.emit("Resize", x, "", "", integers(n.shape[0], n.shape[3], *n.shape[1:3]), **attrs)
    old, new = (np.asarray(shape[1:3], np.float32) for shape in (n.inputs[0].shape, n.shape))
    if (np.floor(old * (new / old)) == new).all():
        return w.emit("Resize", x, "", np.asarray([1, 1, *new / old], np.float32), **attrs)
    return w.emit("Resize", x, "", "", integers(*n.shape[1:3]), axes=[2, 3], **attrs)


@row("resize2d")
def resize2d(w: Writer, n: Node) -> None:
    """One Resize where a mode of it has the same tables, else a gather or a product along each axis."""
    x, *tables = n.inputs
    if not all(t.is_const for t in tables):
        raise Inexpressible("resize2d with computed tables")
    wanted = [dense(tables[2 * i].value, tables[2 * i + 1].value, x.shape[1 + i]) for i in range(2)]
    for attrs in RESIZES:
        own = [dense(*resize_tables(attrs, x.shape[1 + i], n.shape[1 + i]), x.shape[1 + i]) for i in range(2)]
        if all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(own, wanted, strict=True)):
            w.put(n, _resize(w, n, w.get(x, IMAGE), attrs), IMAGE)
            return
    y = w.get(x, IMAGE)
    for i, matrix in enumerate(wanted):
        if np.array_equal(matrix, np.eye(x.shape[1 + i])):
            continue
        if ((matrix != 0).sum(1) == 1).all() and (matrix.max(1) == 1).all():
            y = w.emit("Gather", y, matrix.argmax(1).astype(np.int64), axis=2 + i)
        else:
            y = w.emit("MatMul", matrix, y) if i == 0 else w.emit("MatMul", y, np.ascontiguousarray(matrix.T))
    w.put(n, y, IMAGE)
