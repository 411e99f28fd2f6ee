"""Reductions over axes."""

from __future__ import annotations

from skive.frontend.onnx.table import Call, checked_axis, onnx_op
from skive.ir import Node


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
    axes, keep = reduction_axes(c, c[0])
    return c.make(PLAIN[c.op_type], c[0], axes=axes, keep=keep) if axes else c[0]


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
    return c.make("log", total(c.make("exp", x)))


@onnx_op("ArgMax", "ArgMin")
def arg(c: Call) -> Node:
    axis = checked_axis(int(c.attr("axis", 0)), c[0].type.rank)
    return c.make(c.op_type.lower(), c[0], axis=axis, keep=bool(c.attr("keepdims", 1)),
                  last=bool(c.attr("select_last_index", 0)))
