"""Channels that are zero already: masks and zero groups that other tools have left."""

from __future__ import annotations

import numpy as np

from skive import ops
from skive.ir import Graph, Node
from skive.passes.channel_groups import Groups
from skive.pruning.readers import input_channels, readers_of

LINEAR = frozenset({"conv2d", "conv_transpose2d", "linear", "matmul", "avg_pool2d", "reduce_sum", "reduce_mean"})
JOINED = frozenset({"mul"})  # zero where an operand is
MOVED = frozenset({"reshape", "transpose", "slice", "concat", "pad", "expand"})
MOST_ELEMENTS = 1 << 26  # of a value: what is larger counts as nowhere zero


def alive(graph: Graph) -> dict[Node, np.ndarray]:
    """Of each value, an array of its shape that is 0 where it is zero whatever the inputs are, 1 elsewhere.

    Sound: products and sums are followed in absolute values, functions of one operand if f(0) = 0; what is not
    known counts as not zero.
    """
    found: dict[Node, np.ndarray] = {}
    for n in graph.nodes:
        found[n] = (_alive(n, found) > 0).astype(np.float32)  # 0 or 1: nothing is lost to underflow
    return found


def _alive(n: Node, found: dict[Node, np.ndarray]) -> np.ndarray:
    if n.is_const:
        return (n.value != 0).astype(np.float32)
    x = [found[i] for i in n.inputs]
    floats = n.dtype.is_float and all(i.dtype.is_float for i in n.inputs)
    if not floats or n.type.size > MOST_ELEMENTS or n.attrs.get("epilogue"):
        return np.ones(n.shape, np.float32)
    if n.op == "pad" and (n.attrs["mode"] != "constant" or n.attrs["value"] != 0):
        return np.ones(n.shape, np.float32)
    if n.op in LINEAR or n.op in MOVED or n.op in JOINED:
        return ops.evaluate(n, x)
    if n.op == "max_pool2d":  # padding is never the largest
        return ops.evaluate(n, x)
    if n.op in ("add", "sub"):
        return np.broadcast_to(x[0] + x[1], n.shape)
    if ops.op_of(n.op).kind == "elementwise" and len(x) == 1:
        zero = ops.op_of(n.op).reference([np.zeros(1, n.inputs[0].dtype.numpy)], n.attrs)
        return x[0] if zero[0] == 0 else np.ones(n.shape, np.float32)
    return np.ones(n.shape, np.float32)


def zero_groups(found: Groups) -> np.ndarray:
    """[groups] bool: those whose removal changes nothing, as every value they stand for is zero, or as every
    layer that reads them multiplies them by zero."""
    lives = alive(found.graph)
    count = len(found.groups)
    some = np.zeros(count, bool)  # alive somewhere
    for node, axes in found.axes.items():
        if node.is_const:
            continue
        for axis, groups in enumerate(axes):
            others = tuple(a for a in range(node.type.rank) if a != axis)
            some[groups[lives[node].max(others, initial=0) > 0]] = True
    readers = set(readers_of(found))
    read = np.zeros(count, bool)  # by weights that are not all zero, or by what is no reader of weights
    reading = np.zeros(count, bool)
    for node in found.graph.nodes:
        if node in readers:
            w = node.inputs[1]
            used = np.abs(w.value).reshape(w.shape[0], -1).max(0) > 0
            groups = found.axes[w][-1][input_channels(node)]
            read[groups[used]] = True
            reading[groups] = True
            inner = [(i, a) for i in node.inputs[:1] for a in found.axes[i][:-1]]
        elif _by_channel(node):
            continue
        else:
            inner = [(i, a) for i in node.inputs for a in found.axes[i]]
        for i, a in inner:
            if not i.is_const:
                read[a] = True
    removable = np.array([g.reason is None for g in found.groups])
    return removable & (~some | (reading & ~read))


def _by_channel(node: Node) -> bool:
    """Whether a channel of the result follows from the same channel of the operands."""
    if node.op == "conv2d":
        return node.attrs["groups"] == node.inputs[0].shape[-1] > 1
    moves = ops.op_of(node.op).kind in ("elementwise", "movement")
    return moves or node.op in ("input", "const", "max_pool2d", "avg_pool2d", "resize2d")
