"""Reductions, softmax and normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.export.onnx.rows.movement import any_order
from skive.export.onnx.writer import I64, IMAGE, SINCE, Order, Writer, integers, row, scalar
from skive.ir import Node

REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_mean": "ReduceMean", "reduce_prod": "ReduceProd",
              "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def kept_order(order: Order, axes: Sequence[int], keep: bool) -> Order:
    """The order of a reduction's result."""
    if keep:
        return order
    left = [a for a in range(len(order)) if a not in axes]
    return tuple(left.index(a) for a in order if a not in axes)


@row(*REDUCTIONS)
def reduction(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order, keep = any_order(w, x), n.attrs["keep"]
    axes = [a % x.type.rank for a in n.attrs["axes"]]
    image = n.op == "reduce_mean" and keep and sorted(axes) == [1, 2] and x.type.rank == 4 and order == IMAGE
    if image:  # as other runtimes recognise it
        y = w.emit("GlobalAveragePool", w.get(x, order))
    else:
        y = w.emit(REDUCTIONS[n.op], w.get(x, order), integers(*sorted(order.index(a) for a in axes)),
                   keepdims=int(keep), noop_with_empty_axes=1)
    w.put(n, y, kept_order(order, axes, keep))


@row("argmax", "argmin")
def arg(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order, axis = any_order(w, x), n.attrs["axis"] % x.type.rank
    y = w.emit("ArgMax" if n.op == "argmax" else "ArgMin", w.get(x, order), axis=order.index(axis),
               keepdims=int(n.attrs["keep"]), select_last_index=int(n.attrs["last"]))
    w.put(n, y, kept_order(order, [axis], n.attrs["keep"]))


@row("cumsum")
def cumsum(w: Writer, n: Node) -> None:
    order = any_order(w, n.inputs[0])
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("CumSum", w.get(n.inputs[0], order), scalar(axis, I64), exclusive=int(n.attrs["exclusive"]),
                    reverse=int(n.attrs["reverse"])), order)


@row("topk_values", "topk_indices")
def topk(w: Writer, n: Node) -> None:
    x, which = n.inputs[0], ("topk_values", "topk_indices")
    values, indices = w.emit_all("TopK", [w.get(x), integers(n.attrs["k"])], 2, axis=x.type.rank - 1,
                                 largest=int(n.attrs["largest"]))
    w.put(n, (values, indices)[which.index(n.op)])


@row("softmax", "log_softmax")
def softmax(w: Writer, n: Node) -> None:
    order = any_order(w, n.inputs[0])
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("Softmax" if n.op == "softmax" else "LogSoftmax", w.get(n.inputs[0], order), axis=axis), order)


@row("layer_norm")
def layer_norm(w: Writer, n: Node) -> None:
    w.put(n, w.emit("LayerNormalization", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank,
                    epsilon=float(n.attrs["eps"])))


@row("rms_norm")
def rms_norm(w: Writer, n: Node) -> None:
    x, scale = map(w.get, n.inputs)
    axis = n.attrs["axis"] % n.type.rank
    if w.opset >= SINCE["RMSNormalization"]:
        w.put(n, w.emit("RMSNormalization", x, scale, axis=axis, epsilon=float(n.attrs["eps"])))
        return
    squares = w.emit("ReduceMean", w.emit("Mul", x, x), integers(*range(axis, n.type.rank)), keepdims=1)
    root = w.emit("Sqrt", w.emit("Add", squares, scalar(n.attrs["eps"], n.dtype)))
    w.put(n, w.emit("Mul", w.emit("Div", x, root), scale))


@row("l2_norm")
def l2_norm(w: Writer, n: Node) -> None:
    x, rank = w.get(n.inputs[0]), n.type.rank
    length = w.emit("ReduceL2", x, integers(*range(n.attrs["axis"] % rank, rank)), keepdims=1)
    if n.attrs["least"]:
        length = w.emit("Max", length, scalar(n.attrs["least"], n.dtype))
    w.put(n, w.emit("Div", x, length))


@row("group_norm")
def group_norm(w: Writer, n: Node) -> None:
    """As PyTorch writes it, which runtimes know: instance normalisation of each group as one channel."""
    rank, groups = n.type.rank, n.attrs["groups"]
    order = (0, rank - 1, *range(1, rank - 1))
    x, scale, *bias = n.inputs
    places = (1,) * (rank - 2)
    y, eps = w.get(x, order), float(n.attrs["eps"])
    if groups == n.shape[-1]:
        zero = np.zeros(groups, np.float32)
        w.put(n, w.emit("InstanceNormalization", y, w.get(scale), w.get(bias[0]) if bias else zero, epsilon=eps), order)
        return
    one, zero = (np.full(groups, v, np.float32) for v in (1, 0))
    y = w.emit("Reshape", y, integers(n.shape[0], groups, -1))
    y = w.emit("InstanceNormalization", y, one, zero, epsilon=eps)
    y = w.emit("Reshape", y, integers(*(n.shape[a] for a in order)))
    y = w.emit("Mul", y, w.emit("Reshape", w.get(scale), integers(-1, *places)))
    for b in bias:
        y = w.emit("Add", y, w.emit("Reshape", w.get(b), integers(-1, *places)))
    w.put(n, y, order)
