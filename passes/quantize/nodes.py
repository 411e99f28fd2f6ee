"""What the graph with integers is made of: a value rounded to its format, a contraction on integer weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive import ops
from skive.ir import Node, constant
from skive.ops.recurrence import QUANTIZED_STEPS
from skive.passes.quantize.formats import Format
from skive.passes.quantize.weights import INT32, Layer
from skive.types import DType


def constants(form: Format) -> tuple[Node, Node]:
    """(scale, zero point) as operands."""
    return constant(np.asarray(form.scale, np.float32)), constant(np.asarray(form.zero, form.dtype.numpy))


def quantized(value: Node, form: Format, node: Node) -> Node:
    """`value` in `form`. A bound that saturation keeps in any case is not computed."""
    low, high = form.low, form.high
    while value.op in ("relu", "clip"):
        lo, hi = (0.0, math.inf) if value.op == "relu" else (float(value.attrs["lo"]), float(value.attrs["hi"]))
        bottom, top = (int(form.integers(np.asarray(v, np.float32))) for v in (lo, hi))
        if value.op == "clip" and (bottom > form.low or top < form.high):
            break
        if value.op == "relu" and bottom > form.low and form.dtype is DType.u8:
            break
        low = max(low, bottom)
        value = value.inputs[0]
    q = ops.make("quantize", value, *constants(form), to=form.dtype, origin=node.origin, label=node.name)
    limits = np.iinfo(form.dtype.numpy)
    if (low, high) != (limits.min, limits.max):
        q = ops.make("clip", q, lo=low, hi=high, origin=node.origin, label=node.name)
    return q


def contraction(x: Node, layer: Layer, form: Format, bias: np.ndarray, per_channel: bool) -> Node:
    """`layer` on `x`, which reads integers in `form`; `bias` [OC] is rounded where it fits 32 bits."""
    node, scales = layer.node, layer.scales if per_channel else layer.scales[:1]
    dtype = DType.i8 if form.dtype is DType.u8 else DType.i16
    w = node.inputs[1]
    shape = (len(scales),) + (1,) * (w.type.rank - 1) if len(scales) > 1 else ()
    weights = ops.make(
        "dequantize",
        constant(layer.weights.astype(dtype.numpy), name=w.name, origin=w.origin),
        constant(scales.reshape(shape)),
        constant(np.zeros(shape, dtype.numpy)),
        origin=node.origin,
    )
    operands = [x, weights]
    if bias.any():
        steps = (np.float32(form.scale) * scales).astype(np.float32)
        steps = steps if len(scales) > 1 else steps.reshape(())
        name = node.inputs[2].name if len(node.inputs) > 2 else ""
        if layer.chain and (np.abs(bias / steps) > INT32).any():
            operands.append(constant(bias.astype(np.float32), name=name, origin=node.origin))
            return ops.make(node.op, *operands, origin=node.origin, label=node.name, **node.attrs)
        whole = np.clip(np.rint(bias / steps), -INT32, INT32).astype(np.int32)
        operands.append(
            ops.make(
                "dequantize",
                constant(whole, name=name, origin=node.origin),
                constant(np.asarray(steps, np.float32)),
                constant(np.zeros(np.shape(steps), np.int32)),
                origin=node.origin,
            )
        )
    return ops.make(node.op, *operands, origin=node.origin, label=node.name, **node.attrs)


def recurrent(node: Node, inputs: Sequence[Node]) -> Node:
    """The steps of a recurrent layer on 8-bit weights, a scale for each gate of each unit."""
    pre, r, *rest = inputs
    largest = np.abs(r.value).max(1, initial=0)
    scale = np.where(largest > 1e-30, largest / np.float32(127), np.float32(1)).astype(np.float32)
    weights = np.clip(np.rint(r.value / scale[:, None]), -127, 127).astype(np.int8)
    return ops.make(QUANTIZED_STEPS[node.op], pre, constant(weights, name=r.name, origin=r.origin),
                    constant(scale, origin=node.origin), *rest, origin=node.origin, label=node.name)  # fmt: skip
