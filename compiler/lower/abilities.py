"""What the kernels of an operation can do: types, packed weights, slices of channels in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skive import ops, pack
from skive.ir import Node
from skive.lower.functors import fusible_operand
from skive.types import DType

PRODUCTS = frozenset(("conv2d", "linear", "conv_transpose2d"))
INTEGER_PACKING: dict[DType, Callable[..., np.ndarray]] = {
    DType.u8: pack.pack_conv2d_u8,
    DType.i16: pack.pack_conv2d_i16,
}
# Operations whose fast kernel takes the floats between neighbouring pixels of operand and result.
STRIDED = frozenset(
    ("conv2d", "conv_transpose2d", "linear", "max_pool2d", "avg_pool2d", "sum_pool2d", "resize2d")
)
REDUCTIONS = {
    "reduce_sum": "Sum",
    "reduce_mean": "Mean",
    "reduce_max": "Max",
    "reduce_min": "Min",
    "reduce_prod": "Prod",
}


def has_fast_kernel(node: Node) -> bool:
    """Whether a packed, vectorised kernel exists for `node` (else the plain one runs)."""
    x = node.inputs[0].dtype
    if x is not DType.f32:
        if node.op in PRODUCTS:
            return x in INTEGER_PACKING and all(i.is_const for i in node.inputs[1:3])
        if node.op == "resize2d":
            return ops.copies_neighbours(node)
        if node.op in ("sum_pool2d", "quantized_attention"):
            return True
        return node.op == "max_pool2d" and x in (DType.u8, DType.i8, DType.i16)
    if node.op in PRODUCTS:
        return all(i.is_const for i in node.inputs[1:3])
    if node.op == "resize2d":
        return all(i.is_const for i in node.inputs[1:5])
    return True


def is_integer_conv(node: Node) -> bool:
    """Whether the integer kernels of conv.h compute `node`."""
    if node.op not in PRODUCTS or node.inputs[0].dtype is DType.f32:
        return False
    return node.op != "conv2d" or not is_depthwise(node)


def is_integer_depthwise(node: Node) -> bool:
    """Whether the kernels of depthwise_integer.h compute `node`."""
    integers = node.op == "conv2d" and node.inputs[0].dtype is not DType.f32
    return integers and is_depthwise(node) and has_fast_kernel(node)


def is_depthwise(conv: Node) -> bool:
    groups, channels = conv.attrs["groups"], conv.inputs[0].shape[3]
    return groups == channels and conv.inputs[1].shape[0] % channels == 0 and groups > 1


def overwrites(node: Node) -> bool:
    """Whether the kernel of `node` may write its result over an operand of the same size."""
    return node.op in ("lookup", "choose") or ops.op_of(node.op).kind == "elementwise"


def writes_channel_slices(node: Node) -> bool:
    """Whether the kernel of `node` can write its result with other values' channels in between."""
    if node.op in STRIDED:
        return has_fast_kernel(node)
    return node.op in ("slice", "concat", "lookup") or ops.op_of(node.op).kind == "elementwise"


def reads_channel_slices(node: Node, x: Node, lanes: int) -> bool:
    """Whether the kernel of `node` can read `x` with other values' channels in between."""
    row = ops.op_of(node.op)
    if row.kind == "elementwise" or (node.op == "lookup" and x is not node.inputs[1]):
        return x.shape[-1] >= lanes  # a row of less leaves most of each vector empty
    if node.op in ("slice", "concat", "expand") or node.op in REDUCTIONS:
        return True
    if node.op not in STRIDED or not has_fast_kernel(node):
        return False
    count = row.epilogue or 0
    extras = [fusible_operand(i, node) for i in node.inputs[count:] if i is x]
    return x not in node.inputs[1:count] and all(a and a.mode in ("full", "sample") for a in extras)
