"""Proof that a model treats the samples of a batch independently.

The model is imported for one sample and for two. Walking both graphs together shows for every value
whether it is the same for all samples, or the values of the samples one after the other along an
axis. An operation whose rule cannot show that is refused, so the answer "separable" is never wrong
for a graph whose structure does not depend on the batch in some other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node

# The axis along which the samples lie, or None for a value that all samples share.
Axis: TypeAlias = "int | None"


class _Mixed(Exception):
    """The rule of an operation cannot show that samples stay apart."""


def check_separable(one: Graph, two: Graph) -> None:
    """ShapeError, naming the first node that may mix samples, unless every output is batch-major.

    `one` and `two` are the same model imported for batches of 1 and of 2.
    """
    known: dict[tuple[Node, Node], Axis] = dict.fromkeys(zip(one.inputs, two.inputs), 0)
    for node, other in zip(one.inputs, two.inputs):
        if not node.shape or (node.shape[0], other.shape[0]) != (1, 2):
            raise ShapeError(f"input {node.name!r} has no batch dimension of its own: {node.type}; compile for a fixed "
                             "batch, or give this input a fixed value")
    for name, a, b in zip(one.output_names, one.outputs, two.outputs):
        axis = follow(a, b, known)
        if axis != 0 or a.shape[0] != 1:
            raise ShapeError(f"output {name!r}: {a.type} is not one result per sample; compile for a fixed batch")


def follow(one: Node, two: Node, known: dict[tuple[Node, Node], Axis]) -> Axis:
    """The axis of the pair (one, two), operands first; ShapeError if samples may mix."""
    stack = [(one, two)]
    while stack:
        pair = stack[-1]
        if pair in known:
            stack.pop()
            continue
        a, b = pair
        try:
            below = operand_pairs(a, b)
            waiting = [p for p in below if p not in known]
            if waiting:
                if len(stack) > 1_000_000:
                    raise _Mixed("the graph is too deep")
                stack += waiting
                continue
            known[pair] = axis_of(a, b, [known[p] for p in below])
        except _Mixed as e:
            raise ShapeError(f"{b.label()}: {e}, so samples of a batch are not independent here; compile for a fixed "
                             "batch") from None
        stack.pop()
    return known[one, two]


def operand_pairs(a: Node, b: Node) -> list[tuple[Node, Node]]:
    """The operands to compare. With one sample some reshapes and expands of `b` do nothing and are absent."""
    if by_rows(a, b):
        return [(source_of_rows(a), source_of_rows(b))]  # type: ignore[list-item]
    if a.op == b.op and len(a.inputs) == len(b.inputs):
        return list(zip(a.inputs, b.inputs))
    if b.op in ("reshape", "expand"):
        return [(a, b.inputs[0])]
    raise _Mixed(f"the model is another one for a batch of 2 ({a.op} becomes {b.op})")


def source_of_rows(node: Node) -> Node | None:
    """The value that `node` takes as a matrix of rows, computes each row by itself, and reshapes to [..., C] again."""
    if node.op != "reshape":
        return None
    n = node.inputs[0]
    while n.type.rank == 2 and n.op != "reshape":
        if n.op == "linear" and all(i.is_const for i in n.inputs[1:]):
            n = n.inputs[0]
        elif ops.op_of(n.op).kind == "elementwise":
            varying = [i for i in n.inputs if not i.is_const]
            if len(varying) != 1 or any(i.type.rank == 2 and i.shape[0] != 1 for i in n.inputs if i.is_const):
                return None
            n = varying[0]
        else:
            return None
    if n is node.inputs[0] or n.op != "reshape" or n.type.rank != 2:
        return None
    return n.inputs[0] if node.inputs[0].shape[-1:] == node.shape[-1:] else None


def by_rows(a: Node, b: Node) -> bool:
    """Whether both nodes compute the rows of a value in the same way, so that the order of rows is of no account."""
    x, y, end_a, end_b = a, b, source_of_rows(a), source_of_rows(b)
    if end_a is None or end_b is None:
        return False
    while x is not end_a and y is not end_b:
        if x.op != y.op or len(x.inputs) != len(y.inputs) or x.op != "reshape" and not same(x, y):
            return False
        ways = [(i, j) for i, j in zip(x.inputs, y.inputs) if not (i.is_const and j.is_const)]
        shared = [(i, j) for i, j in zip(x.inputs, y.inputs) if i.is_const and j.is_const]
        if len(ways) != 1 or not all(i.dtype is j.dtype and np.array_equal(i.value, j.value) for i, j in shared):
            return False
        ((x, y),) = ways
    return x is end_a and y is end_b


def doubled(one: tuple[int, ...], two: tuple[int, ...]) -> Axis:
    """The one axis that is twice as long in `two`, None if the shapes are equal."""
    if len(one) != len(two):
        raise _Mixed(f"shape {list(one)} becomes {list(two)} for a batch of 2")
    differ = [i for i, (d, e) in enumerate(zip(one, two)) if d != e]
    if not differ:
        return None
    if len(differ) > 1 or two[differ[0]] != 2 * one[differ[0]]:
        raise _Mixed(f"shape {list(one)} becomes {list(two)} for a batch of 2")
    return differ[0]


def axis_of(a: Node, b: Node, axes: list[Axis]) -> Axis:
    """The axis of `b`, given those of its operands; `a` is the same node for one sample."""
    result = doubled(a.shape, b.shape)
    if b.is_const and a.is_const:
        expected = a.value if result is None else np.concatenate([a.value, a.value], result)
        if a.dtype is not b.dtype or not np.array_equal(expected, b.value, equal_nan=a.dtype.is_float):
            raise _Mixed("a constant depends on the size of the batch")
        return result
    if axes[0] is not None and by_rows(a, b):
        before = source_of_rows(a).shape[:axes[0]]  # type: ignore[union-attr]
        need(result is not None and result < b.type.rank - 1 and math.prod(before) == math.prod(a.shape[:result]),
             "rows of several samples meet")
        return result
    if a.op != b.op:  # `b` is a reshape or expand that one sample does not need
        found = RULES[b.op](a, b, [a.shape], axes)
    else:
        if all(x is None for x in axes) and b.op != "expand":
            if result is not None or not same(a, b):
                raise _Mixed(f"{b.op} depends on the size of the batch")
            return None
        rule = RULES.get(b.op, RULES["elementwise"] if ops.op_of(b.op).kind == "elementwise" else None)
        if rule is None:
            raise _Mixed(f"no rule shows that {b.op} keeps samples apart")
        found = rule(a, b, [i.shape for i in a.inputs], axes)
    if found != result:
        raise _Mixed(f"{b.op} has {list(b.shape)} where samples of {list(a.shape)} were expected")
    return found


def same(a: Node, b: Node, *but: str) -> bool:
    """Whether the attributes of both nodes agree, except the named ones."""
    return all(a.attrs.get(k) == v for k, v in b.attrs.items() if k not in but)


def need(condition: bool, why: str) -> None:
    if not condition:
        raise _Mixed(why)


def only(axes: Sequence[Axis], why: str) -> int:
    """The axis that all operands share."""
    need(len(set(axes)) == 1 and axes[0] is not None, why)
    return axes[0]  # type: ignore[return-value]


Rule: TypeAlias = "Callable[[Node, Node, list[tuple[int, ...]], list[Axis]], Axis]"
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


@rule("elementwise", "choose")
def _elementwise(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), f"{b.op} changes with the batch")
    return broadcast_axis(b.type.rank, shapes, axes, b.op)


def broadcast_axis(rank: int, shapes: Sequence[tuple[int, ...]], axes: Sequence[Axis], op: str) -> int:
    """The axis of a broadcast: what all samples share must have size 1 there, or not reach it."""
    found = only([rank - len(s) + x for s, x in zip(shapes, axes) if x is not None], f"{op} joins different axes")
    for s, x in zip(shapes, axes):
        own = found - (rank - len(s))
        need(x is not None or own < 0 or s[own] == 1, f"{op} joins samples with something along their axis")
    return found


@rule("reshape")
def _reshape(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "reshape of a shared value")
    result = doubled(a.shape, b.shape)
    need(result is not None and math.prod(shapes[0][:axis]) == math.prod(a.shape[:result]),
         "reshape moves elements from one sample to another")
    return result


@rule("expand")
def _expand(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    result = doubled(a.shape, b.shape)
    if axes[0] is None:
        own = None if result is None else result - (b.type.rank - len(shapes[0]))
        need(own is None or own < 0 or shapes[0][own] == 1, "expand repeats a shared value")
        return result
    need(result == axes[0] + b.type.rank - len(shapes[0]), "expand repeats samples")
    return result


@rule("transpose")
def _transpose(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), "transpose changes with the batch")
    return b.attrs["perm"].index(axes[0])


@rule("slice")
def _slice(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "")
    for k in ("start", "size", "step"):
        others = [(x, y) for i, (x, y) in enumerate(zip(a.attrs[k], b.attrs[k])) if i != axis]
        need(all(x == y for x, y in others), "slice changes with the batch")
    need(b.attrs["start"][axis] == 0 and b.attrs["step"][axis] == 1 and b.shape[axis] == b.inputs[0].shape[axis],
         "slice picks samples")
    return axis


@rule("concat")
def _concat(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "concat joins samples with shared values")
    need(same(a, b) and b.attrs["axis"] % b.type.rank != axis, "concat along the axis of the samples")
    return axis


@rule("pad")
def _pad(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "")
    need(same(a, b) and b.attrs["before"][axis] == b.attrs["after"][axis] == 0, "pad along the axis of the samples")
    return axis


@rule("gather")
def _gather(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), "gather changes with the batch")
    data, index = axes
    k = b.attrs["axis"] % len(shapes[0])
    if data is None:
        return None if index is None else k + index
    need(index is None and data != k, "gather picks samples")
    return data if data < k else data + len(shapes[1]) - 1


@rule("gather_elements", "scatter_elements")
def _elements(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, f"{b.op} joins samples with shared values")
    need(same(a, b) and b.attrs["axis"] % b.type.rank != axis, f"{b.op} along the axis of the samples")
    need(len({s[axis] for s in shapes}) == 1, f"{b.op} of a part of the samples")
    return axis


@rule("gather_nd")
def _gather_nd(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), "gather_nd changes with the batch")
    data, index = axes
    if data is None:
        need(b.attrs["batch_dims"] == 0 and index != len(shapes[1]) - 1, "gather_nd mixes samples")
        return index
    if index is None:  # the same slices of every sample
        picked = shapes[1][-1] + b.attrs["batch_dims"]  # axes that the tuples tell
        need(b.attrs["batch_dims"] == 0 and data >= picked, "gather_nd picks samples")
        return data - picked + len(shapes[1]) - 1
    need(data == index and data < b.attrs["batch_dims"], "gather_nd picks samples")
    return data


@rule("scatter_nd")
def _scatter_nd(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    data, index, updates = axes
    picked = shapes[1][-1]
    need(same(a, b) and index is None and data is not None and updates is not None and data >= picked
         and updates == data - picked + len(shapes[1]) - 1, "scatter_nd picks samples")
    return data


def _kept(b: Node, axis: int, gone: Sequence[int], rank: int) -> int:
    summed = {g % rank for g in gone}
    need(axis not in summed, f"{b.op} over the axis of the samples")
    return axis if b.attrs["keep"] else axis - sum(g < axis for g in summed)


@rule("reduce_sum", "reduce_mean", "reduce_prod", "reduce_max", "reduce_min")
def _reduce(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), f"{b.op} changes with the batch")
    return _kept(b, only(axes, ""), b.attrs["axes"], len(shapes[0]))


@rule("argmax", "argmin")
def _arg(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), f"{b.op} changes with the batch")
    return _kept(b, only(axes, ""), [b.attrs["axis"]], len(shapes[0]))


@rule("softmax", "log_softmax", "cumsum", "cumprod")
def _along(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "")
    need(same(a, b) and b.attrs["axis"] % b.type.rank != axis, f"{b.op} along the axis of the samples")
    return axis


@rule("topk_values", "topk_indices")
def _topk(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes, "")
    need(same(a, b) and axis != b.type.rank - 1, f"{b.op} along the axis of the samples")
    return axis


@rule("layer_norm", "rms_norm", "l2_norm")
def _norm(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = axes[0]
    separate = axis is not None and axis < b.attrs["axis"] % b.type.rank and axes[1:] == [None] * len(axes[1:])
    need(same(a, b) and separate, f"{b.op} over the axis of the samples")
    return axis


@rule("group_norm")
def _group_norm(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = axes[0]
    need(same(a, b) and axis == 0 and axes[1:] == [None] * len(axes[1:]), f"{b.op} over the axis of the samples")
    return axis


@rule("linear")
def _linear(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = axes[0]
    separate = axis is not None and axis < b.type.rank - 1 and axes[1:] == [None] * len(axes[1:])
    need(separate, "a product over the axis of the samples")
    return axis


@rule("matmul")
def _matmul(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b), "matmul changes with the batch")
    rank = b.type.rank
    free = []  # the axis of each operand that is neither batch nor summed
    for shape, transposed, first in zip(shapes, (b.attrs["trans_a"], b.attrs["trans_b"]), (True, False)):
        free.append(len(shape) - (2 if transposed != first else 1))
    for i in range(2):
        own = axes[i]
        if own is not None and own >= len(shapes[i]) - 2:
            need(own == free[i] and axes[1 - i] is None, "a product over the axis of the samples")
            return rank - 2 + i
    return broadcast_axis(rank, shapes, axes, "matmul")


@rule("conv2d", "conv_transpose2d")
def _conv(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b) and axes[0] == 0 and not any(x is not None for x in axes[1:]), f"{b.op} across samples")
    return 0


@rule("max_pool2d", "avg_pool2d", "sum_pool2d")
def _pool(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b) and axes[0] in (0, 3), f"{b.op} across samples")
    return axes[0]


@rule("resize2d")
def _resize(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    need(same(a, b) and axes[0] in (0, 3) and not any(x is not None for x in axes[1:]), f"{b.op} across samples")
    return axes[0]


@rule("attention")
def _attention(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    axis = only(axes[:3], "attention joins samples with shared values")
    need(same(a, b) and axis < 2, "attention across samples")
    return broadcast_axis(4, shapes, axes, "attention")


@rule("lstm", "gru", "rnn")
def _recurrent(a: Node, b: Node, shapes: list[tuple[int, ...]], axes: list[Axis]) -> Axis:
    states = 2 if b.op == "lstm" else 1
    expected: list[Any] = [1, None, None, None, *[0] * states, *[None] * (len(axes) - 4 - states)]
    need(same(a, b) and axes == expected, f"{b.op} across samples")
    return 2 if b.op == "lstm" else 1
