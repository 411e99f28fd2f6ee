"""Normalisation operators: batch, instance, group, layer; softmax and its relatives."""

from __future__ import annotations

import math

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Decline, checked_axis, onnx_op
from skive.ir import Node
from skive.types import DType


def per_channel(c: Call, v: Node, rank: int) -> Node:
    """[C] shaped to broadcast along axis 1 of a tensor of the given rank."""
    return c.reshape(v, (v.type.size, *[1] * (rank - 2)))


@onnx_op("BatchNormalization")
def batch_normalization(c: Call) -> list[Node]:
    x, scale, bias, mean, var = (c[i] for i in range(5))
    rank = x.type.rank
    if rank < 2:
        raise InvalidModelError(f"needs an operand [N, C, ...], not {x.type}")
    running: list[Node] = []
    if c.attr("training_mode", 0):
        axes = tuple(i for i in range(rank) if i != 1)
        momentum = float(c.attr("momentum", 0.9))
        here = c.make("reduce_mean", x, axes=axes, keep=False)
        d = c.make("sub", x, per_channel(c, here, rank))
        spread = c.make("reduce_mean", c.make("mul", d, d), axes=axes, keep=False)
        running = [c.make("add", c.make("mul", old, momentum), c.make("mul", new, 1 - momentum))
                   for old, new in ((mean, here), (var, spread))]
        mean, var = here, spread
    factor = c.make("mul", scale, c.make("rsqrt", c.make("add", var, float(c.attr("epsilon", 1e-5)))))
    offset = c.make("sub", bias, c.make("mul", mean, factor))
    y = c.make("add", c.make("mul", x, per_channel(c, factor, rank)), per_channel(c, offset, rank))
    return [y, *running]


def normalized(c: Call, x: Node, axes: tuple[int, ...], eps: float) -> Node:
    """(x - mean) / sqrt(variance + eps) over axes."""
    d = c.make("sub", x, c.make("reduce_mean", x, axes=axes, keep=True))
    var = c.make("reduce_mean", c.make("mul", d, d), axes=axes, keep=True)
    return c.make("mul", d, c.make("rsqrt", c.make("add", var, eps)))


def is_image(x: Node) -> bool:
    """True for float32 [N, C, ...] with at least one place."""
    return x.type.rank > 2 and x.dtype is DType.f32 and x.type.size > 0


def normalized_groups(c: Call, x: Node, groups: int, scale: Node, bias: Node) -> Node:
    """group_norm of x [N, C, ...] with a scale and a bias of each channel [C]."""
    perm = (0, *range(2, x.type.rank), 1)
    y = c.make("group_norm", c.transpose(x, perm), scale, bias, groups=groups, eps=float(c.attr("epsilon", 1e-5)))
    return c.back(y, perm)


@onnx_op("InstanceNormalization")
def instance_normalization(c: Call) -> Node:
    x, scale, bias = c[0], c[1], c[2]
    if is_image(x) and scale.shape == bias.shape == x.shape[1:2]:
        return normalized_groups(c, x, x.shape[1], scale, bias)
    y = normalized(c, x, tuple(range(2, x.type.rank)), float(c.attr("epsilon", 1e-5)))
    return c.make("add", c.make("mul", y, per_channel(c, scale, x.type.rank)), per_channel(c, bias, x.type.rank))


@onnx_op("LayerNormalization")
def layer_normalization(c: Call) -> list[Node]:
    x, scale, bias = c[0], c[1], c.get(2)
    axis = checked_axis(int(c.attr("axis", -1)), x.type.rank)
    eps = float(c.attr("epsilon", 1e-5))
    axes = tuple(range(axis, x.type.rank))
    tail = x.shape[axis:]
    if not c.wants(1) and not c.wants(2) and all(p is None or math.prod(tail) == p.type.size for p in (scale, bias)):
        affine = [c.reshape(p, tail) for p in (scale, bias) if p is not None]
        return [c.make("layer_norm", x, *affine, axis=axis, eps=eps)]
    mean = c.make("reduce_mean", x, axes=axes, keep=True)
    d = c.make("sub", x, mean)
    inverse = c.make("rsqrt", c.make("add", c.make("reduce_mean", c.make("mul", d, d), axes=axes, keep=True), eps))
    y = c.make("mul", c.make("mul", d, inverse), scale)
    return [y if bias is None else c.make("add", y, bias), mean, inverse]


@onnx_op("Softmax", "LogSoftmax")
def softmax(c: Call) -> Node:
    x = c[0]
    op = "softmax" if c.op_type == "Softmax" else "log_softmax"
    axis = checked_axis(int(c.attr("axis", -1 if c.opset >= 13 else 1)), max(x.type.rank, 1))
    if x.type.rank == 0:
        return c.reshape(c.make(op, c.reshape(x, (1,)), axis=0), ())
    if c.opset >= 13 or axis == x.type.rank - 1:
        return c.make(op, x, axis=axis)
    flat = c.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
    return c.reshape(c.make(op, flat, axis=1), x.shape)


@onnx_op("RMSNormalization")
def rms_normalization(c: Call) -> Node:
    x, scale = c[0], c[1]
    axis = checked_axis(int(c.attr("axis", -1)), x.type.rank)
    tail = x.shape[axis:]
    if scale.type.size != math.prod(tail) or scale.dtype is not x.dtype:
        raise Decline("a scale of another shape than the normalised axes")
    return c.make("rms_norm", x, c.reshape(scale, tail), axis=axis, eps=float(c.attr("epsilon", 1e-5)))


def repeated(c: Call, v: Node, size: int) -> Node:
    """[G] as [size]: each element size / G times in a row."""
    each = size // v.type.size
    return v if each == 1 else c.reshape(c.expand(c.reshape(v, (v.type.size, 1)), (v.type.size, each)), (size,))


@onnx_op("GroupNormalization")
def group_normalization(c: Call) -> Node:
    x, scale, bias = c[0], c[1], c[2]
    groups = int(c.required("num_groups"))
    if x.type.rank < 3 or groups < 1 or x.shape[1] % groups:
        raise InvalidModelError(f"{groups} groups of {x.type}")
    size = groups if c.opset < 21 else x.shape[1]  # scale and bias are per group, or per channel
    if is_image(x) and scale.shape == bias.shape == (size,):
        return normalized_groups(c, x, groups, *(repeated(c, v, x.shape[1]) for v in (scale, bias)))
    y = c.reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    y = normalized(c, y, (2,), float(c.attr("epsilon", 1e-5)))
    if c.opset < 21:
        y = c.make("add", c.make("mul", y, c.reshape(scale, (groups, 1))), c.reshape(bias, (groups, 1)))
        return c.reshape(y, x.shape)
    y = c.reshape(y, x.shape)
    return c.make("add", c.make("mul", y, per_channel(c, scale, x.type.rank)), per_channel(c, bias, x.type.rank))


@onnx_op("LRN")
def local_response_normalization(c: Call) -> Node:
    x = c[0]
    size = int(c.required("size"))
    if size < 1 or x.type.rank < 3:
        raise InvalidModelError(f"LRN over {size} channels of {x.type}")
    front = (size - 1) // 2
    square = c.make("mul", x, x)
    padded = c.make("pad", square, before=(0, front, *[0] * (x.type.rank - 2)),
                    after=(0, size - 1 - front, *[0] * (x.type.rank - 2)))
    total = c.slice(padded, 1, 0, x.shape[1])
    for k in range(1, size):
        total = c.make("add", total, c.slice(padded, 1, k, x.shape[1]))
    alpha, beta, bias = float(c.attr("alpha", 1e-4)), float(c.attr("beta", 0.75)), float(c.attr("bias", 1.0))
    return c.make("mul", x, c.make("pow", c.make("add", c.make("mul", total, alpha / size), bias), -beta))


@onnx_op("LpNormalization")
def lp_normalization(c: Call) -> Node:
    x = c[0]
    axis = checked_axis(int(c.attr("axis", -1)), x.type.rank)
    if int(c.attr("p", 2)) == 2 and x.dtype is DType.f32 and x.type.size:
        perm = (*(a for a in range(x.type.rank) if a != axis), axis)
        # Of zeros it is zero: no other float32 row is shorter than 1e-22.
        return c.back(c.make("l2_norm", c.transpose(x, perm), least=1e-30), perm)
    if int(c.attr("p", 2)) == 1:
        norm = c.make("reduce_sum", c.make("abs", x), axes=(axis,), keep=True)
    else:
        norm = c.make("sqrt", c.make("reduce_sum", c.make("mul", x, x), axes=(axis,), keep=True))
    y = c.make("div", x, norm)
    return c.make("where", c.make("equal", norm, 0.0), c.lit(0, x.dtype), y)
