"""Reductions over axes."""

from __future__ import annotations

import math

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Unsupported, checked_axis, onnx_op
from skive.ir import Node
from skive.types import DType


def reduction_axes(c: Call, x: Node) -> tuple[tuple[int, ...], bool]:
    """The axes of a ReduceX operator, and whether they stay as 1; empty axes mean all of them."""
    axes = c.ints_or_attr(1, "axes", ())
    if not axes and not c.attr("noop_with_empty_axes", 0):
        axes = range(x.type.rank)
    return tuple(sorted({checked_axis(int(a), x.type.rank) for a in axes})), bool(c.attr("keepdims", 1))


PLAIN = {"ReduceSum": "reduce_sum", "ReduceMean": "reduce_mean", "ReduceProd": "reduce_prod",
         "ReduceMax": "reduce_max", "ReduceMin": "reduce_min"}


@onnx_op(*PLAIN)
def plain(c: Call) -> Node:
    x = c[0]
    axes, keep = reduction_axes(c, x)
    if not axes:
        return x
    if c.op_type in ("ReduceMax", "ReduceMin") and any(x.shape[a] == 0 for a in axes):
        shape = [1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes]
        return c.full(shape, extreme(x.dtype, c.op_type == "ReduceMin"), x.dtype)
    return c.make(PLAIN[c.op_type], x, axes=axes, keep=keep)


def extreme(dtype: DType, largest: bool) -> float | int | bool:
    """The largest or smallest value of an element type: the result of reducing nothing."""
    if dtype is DType.bool:
        return largest
    if dtype.is_float:
        return math.inf if largest else -math.inf
    limits = np.iinfo(dtype.numpy)
    return int(limits.max if largest else limits.min)


@onnx_op("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
def composed(c: Call) -> Node:
    x = c[0]
    axes, keep = reduction_axes(c, x)

    def total(v: Node) -> Node:
        return c.make("reduce_sum", v, axes=axes, keep=keep) if axes else v

    if c.op_type == "ReduceL1":
        return total(c.make("abs", x))
    if c.op_type == "ReduceSumSquare":
        return total(c.make("mul", x, x))
    if c.op_type == "ReduceL2":
        return c.make("sqrt", total(c.make("mul", x, x)))
    if c.op_type == "ReduceLogSum":
        return c.make("log", total(x))
    if not x.dtype.is_float or not axes or any(x.shape[a] == 0 for a in axes):
        return c.make("log", total(c.make("exp", x)))
    # exp of a large x overflows: the largest one is taken out, where it is finite.
    top = c.make("reduce_max", x, axes=axes, keep=True)
    top = c.make("where", c.make("less", c.make("abs", top), float("inf")), top, 0.0)
    rest = c.make("log", total(c.make("exp", c.make("sub", x, top))))
    return c.make("add", rest, c.reshape(top, rest.shape))


@onnx_op("ArgMax", "ArgMin")
def arg(c: Call) -> Node:
    axis = checked_axis(int(c.attr("axis", 0)), c[0].type.rank)
    return c.make(c.op_type.lower(), c[0], axis=axis, keep=bool(c.attr("keepdims", 1)),
                  last=bool(c.attr("select_last_index", 0)))


@onnx_op("TopK")
def topk(c: Call) -> list[Node]:
    x = c[0]
    k = int(c.const(1, "k").reshape(-1)[0]) if c.has(1) else int(c.required("k"))
    axis = checked_axis(int(c.attr("axis", -1)), x.type.rank)
    perm = [i for i in range(x.type.rank) if i != axis] + [axis]
    back = [perm.index(i) for i in range(x.type.rank)]
    moved = c.transpose(x, perm)
    largest = bool(c.attr("largest", 1))
    return [c.transpose(c.make(op, moved, k=k, largest=largest), back) for op in ("topk_values", "topk_indices")]


@onnx_op("CumSum", "CumProd")
def cumulative(c: Call) -> Node:
    axis = checked_axis(int(c.const(1, "axis").reshape(-1)[0]), c[0].type.rank)
    return c.make(c.op_type.lower(), c[0], axis=axis, exclusive=bool(c.attr("exclusive", 0)),
                  reverse=bool(c.attr("reverse", 0)))


@onnx_op("Hardmax")
def hardmax(c: Call) -> Node:
    x = c[0]
    axis = checked_axis(int(c.attr("axis", -1 if c.opset >= 13 else 1)), x.type.rank)
    flat = x if c.opset >= 13 else c.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
    axis = axis if c.opset >= 13 else 1
    c.room(flat.shape[axis], "an axis")
    steps = np.arange(flat.shape[axis]).reshape([-1 if i == axis else 1 for i in range(flat.type.rank)])
    best = c.make("equal", c.make("argmax", flat, axis=axis, keep=True), c.lit(steps, np.int64))
    return c.reshape(c.cast(best, x.dtype), x.shape)


@onnx_op("Det")
def determinant(c: Call) -> Node:
    """By Laplace expansion along the first row, for matrices of up to 4 x 4."""
    x = c[0]
    if x.type.rank < 2 or x.shape[-1] != x.shape[-2]:
        raise InvalidModelError(f"determinant of {x.type}")
    if x.shape[-1] > 4:
        raise Unsupported(f"the determinant of a matrix of {x.shape[-1]} x {x.shape[-1]}")
    return minor(c, x, 0, tuple(range(x.shape[-1])))


def minor(c: Call, x: Node, row: int, columns: tuple[int, ...]) -> Node:
    """The determinant of the rows from `row` and the given columns."""
    if not columns:
        return c.lit(np.ones(x.shape[:-2]), x.dtype)
    terms = []
    for k, column in enumerate(columns):
        entry = c.index(c.index(x, x.type.rank - 2, row), x.type.rank - 2, column)
        entry = c.make("mul", entry, minor(c, x, row + 1, columns[:k] + columns[k + 1:])) if len(columns) > 1 else entry
        terms.append(c.make("neg", entry) if k % 2 else entry)
    return c.fold("add", terms)
