"""Control flow, sequences and optionals: everything that is decided while the model is imported."""

from __future__ import annotations

import itertools

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.load import DTYPES
from skive.frontend.onnx.table import (
    UNKNOWN,
    Call,
    OptionalValue,
    SequenceValue,
    UnknownValue,
    Unsupported,
    Value,
    checked_axis,
    onnx_op,
)
from skive.ir import Node
from skive.types import DType

MAX_ITERATIONS = 4096  # of a loop that is unrolled


def truth(c: Call, node: Value, what: str) -> bool:
    """The value of a constant condition."""
    if not isinstance(node, Node):
        raise InvalidModelError(f"{what} is not a tensor")
    return bool(c.known(node, what).reshape(-1)[0])


@onnx_op("If")
def if_(c: Call) -> list[Value]:
    """The branch that a constant condition takes; else the results are chosen, and a call computes one of them."""
    if c[0].is_const:
        return c.subgraph("then_branch" if truth(c, c[0], "the condition") else "else_branch")
    condition = c.reshape(c[0], ())
    branches = c.subgraph("then_branch"), c.subgraph("else_branch")
    return [selected(c, condition, a, b) for a, b in zip(*branches, strict=True)]


def selected(c: Call, condition: Node, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`; Unsupported unless both have the same shape or structure."""
    if isinstance(a, UnknownValue) or isinstance(b, UnknownValue):
        return UNKNOWN
    if isinstance(a, Node) and isinstance(b, Node) and a.type == b.type:
        return c.make("choose", condition, a, b)
    if isinstance(a, SequenceValue) and isinstance(b, SequenceValue) and len(a.items) == len(b.items):
        return SequenceValue(tuple(selected(c, condition, x, y) for x, y in zip(a.items, b.items, strict=True)))
    raise Unsupported(f"{c.op_type} with a condition that is no constant and branches whose results differ in shape",
                      "export the branch that is needed")


@onnx_op("Choose", domain="skive")
def choose(c: Call) -> Node:
    """A decision of a PyTorch model's `forward`."""
    if c[0].is_const:
        return c[1] if truth(c, c[0], "the condition") else c[2]
    return c.make("choose", c.reshape(c[0], ()), c[1], c[2])


@onnx_op("Loop")
def loop(c: Call) -> list[Value]:
    """The body as often as the constant trip count and condition say, one copy after the other.

    Where values decide when it ends, as often as the trip count allows, or a counter in the condition: what an
    iteration computes is chosen while the loop is alive.
    """
    trips = int(c.const(0, "the trip count").reshape(-1)[0]) if c.has(0) else None
    state = [c.value(i) for i in range(2, len(c.inputs))]
    scans: list[list[Node]] = []
    body = c.required("body")
    count = len(body.output) - 1 - len(state)
    if count < 0:
        raise InvalidModelError("the body gives fewer values than it takes")
    going, flag = _goes_on(c, c[1], known=count > 0) if c.has(1) else (True, None)
    counted = any(body.input[0].name in n.input or any(a.HasField("g") for a in n.attribute) for n in body.node)
    flags, states = [], [state]  # in front of each trip: the condition where only values say it, and the state
    for i in itertools.count():
        if not going or (trips is not None and i >= trips):
            break
        changes = counted or i == 0 or constants(states[-2]) != constants(state)
        if i >= MAX_ITERATIONS or (flag and trips is None and not changes):
            raise Unsupported(
                f"a loop of more than {MAX_ITERATIONS} iterations" + (", or that its values alone end" if flag else ""),
                "count the iterations and end it at a number as well, as in (i < 10) & ..." if flag else "")
        flags.append(flag)
        results = c.subgraph("body", c.lit(i, np.int64), c.lit(True, np.bool_), *state)
        state = results[1:1 + len(state)]
        states.append(state)
        scans.append([need_tensor(c, v) for v in results[1 + len(state):]])
        going, flag = _goes_on(c, need_tensor(c, results[0]), known=count > 0)
    for flag, ended in zip(reversed(flags), reversed(states[:-1]), strict=True):
        state = [selected(c, flag, a, b) for a, b in zip(state, ended, strict=True)] if flag else state
    if scans:
        return [*state, *(c.stack(list(column), 0) for column in zip(*scans))]
    if count:  # what the body would have given decides the shape of the empty results
        results = c.subgraph("body", c.lit(0, np.int64), c.lit(True, np.bool_), *state)
        return [*state, *(c.lit(np.zeros((0, *need_tensor(c, v).shape), need_tensor(c, v).dtype.numpy))
                          for v in results[1 + len(state):])]
    return state


def _goes_on(c: Call, condition: Node, *, known: bool) -> tuple[bool, Node | None]:
    """Whether a loop may go on, and the condition if only values say so; Unsupported if it must be `known`, as where
    results of each trip are collected: how often decides their shapes."""
    if condition.is_const or known:
        return truth(c, condition, "the condition"), None
    return not never(condition), c.reshape(condition, ())


def constants(state: list[Value]) -> list[bytes]:
    """The values of what is constant of a loop's state: counters."""
    return [v.value.tobytes() for v in state if isinstance(v, Node) and v.is_const]


def never(condition: Node) -> bool:
    """True for what is false whatever its computed operands are."""
    if condition.is_const:
        return not condition.value.any()
    if condition.op in ("reshape", "expand", "cast"):
        return never(condition.inputs[0])
    return condition.op in ("and", "bit_and") and any(map(never, condition.inputs))


def need_tensor(c: Call, value: object) -> Node:
    """`value`, if it is a tensor; a tensor that an unsupported node would have made is unsupported."""
    if isinstance(value, Node):
        return value
    raise Unsupported("the body has unsupported nodes")


@onnx_op("Scan")
def scan(c: Call) -> list[Value]:
    if c.opset < 9:
        if c.has(0):
            raise Unsupported("Scan of opset 8 with sequence lengths")
        return scan_batches(c)
    return scan_once(c, [c[i] for i in range(len(c.inputs))])


def scan_batches(c: Call) -> list[Value]:
    """Scan of opset 8: every sample of axis 0 on its own."""
    operands = [c[i] for i in range(1, len(c.inputs))]
    samples = [scan_once(c, [c.index(v, 0, b) for v in operands]) for b in range(operands[0].shape[0])]
    return [c.stack([need_tensor(c, v) for v in column], 0) for column in zip(*samples)]


def scan_once(c: Call, operands: list[Node]) -> list[Value]:
    count = int(c.required("num_scan_inputs"))
    if not 1 <= count <= len(operands):
        raise InvalidModelError(f"{count} scan inputs among {len(operands)}")
    state: list[Value] = list(operands[:len(operands) - count])
    sequences = operands[len(operands) - count:]
    outputs = len(c.required("body").output) - len(state)
    in_axes = [checked_axis(a, s.type.rank) for a, s in zip(c.attr("scan_input_axes", [0] * count), sequences)]
    in_back = c.attr("scan_input_directions", c.attr("directions", [0] * count))
    out_axes = c.attr("scan_output_axes", [0] * outputs)
    out_back = c.attr("scan_output_directions", [0] * outputs)
    length = sequences[0].shape[in_axes[0]]
    if length > MAX_ITERATIONS:
        raise Unsupported(f"a scan of more than {MAX_ITERATIONS} iterations")
    steps: list[list[Node]] = []
    for t in range(length):
        parts = [c.index(s, a, length - 1 - t if back else t) for s, a, back in zip(sequences, in_axes, in_back)]
        results = c.subgraph("body", *state, *parts)
        state = results[:len(state)]
        steps.append([need_tensor(c, v) for v in results[len(state):]])
    stacked = []
    for i, column in enumerate(zip(*steps)):
        column = column[::-1] if out_back[i] else column
        stacked.append(c.stack(list(column), checked_axis(out_axes[i], column[0].type.rank + 1)))
    return [*state, *stacked]


# ---------------------------------------------------------------------------------------- sequences


def sequence(c: Call, i: int) -> SequenceValue:
    value = c.value(i)
    if isinstance(value, OptionalValue) and isinstance(value.item, SequenceValue):
        value = value.item
    if not isinstance(value, SequenceValue):
        raise InvalidModelError(f"input {i} is not a sequence")
    return value


def position(c: Call, i: int, length: int, default: int) -> int:
    """A constant position in a sequence; InvalidModelError if it is outside."""
    at = int(c.const(i, "the position").reshape(-1)[0]) if c.has(i) else default
    if not -length <= at <= length:
        raise InvalidModelError(f"position {at} in a sequence of {length}")
    return at + length if at < 0 else at


@onnx_op("SequenceEmpty")
def sequence_empty(c: Call) -> Value:
    return SequenceValue(())


@onnx_op("SequenceConstruct")
def sequence_construct(c: Call) -> Value:
    return SequenceValue(tuple(c.tensors))


@onnx_op("SequenceInsert")
def sequence_insert(c: Call) -> Value:
    items = sequence(c, 0).items
    at = position(c, 2, len(items), len(items))
    return SequenceValue((*items[:at], c.value(1), *items[at:]))


@onnx_op("SequenceErase")
def sequence_erase(c: Call) -> Value:
    items = sequence(c, 0).items
    at = position(c, 1, len(items), len(items) - 1)
    return SequenceValue(items[:at] + items[at + 1:])


@onnx_op("SequenceAt")
def sequence_at(c: Call) -> Value:
    items = sequence(c, 0).items
    at = position(c, 1, len(items), 0)
    if at >= len(items):
        raise InvalidModelError(f"position {at} in a sequence of {len(items)}")
    return items[at]


@onnx_op("SequenceLength")
def sequence_length(c: Call) -> Node:
    return c.lit(len(sequence(c, 0).items), np.int64)


@onnx_op("SplitToSequence")
def split_to_sequence(c: Call) -> Value:
    x = c[0]
    axis = checked_axis(int(c.attr("axis", 0)), x.type.rank)
    size = x.shape[axis]
    c.room(size, "a sequence")
    keep = True
    if not c.has(1):
        sizes, keep = [1] * size, bool(c.attr("keepdims", 1))
    else:
        split = c.const(1, "split")
        chunk = int(split.reshape(-1)[0]) if split.ndim == 0 else 0
        if split.ndim == 0 and chunk < 1:
            raise InvalidModelError(f"split into parts of {chunk}")
        sizes = [min(chunk, size - s) for s in range(0, size, chunk)] if split.ndim == 0 else [int(v) for v in split]
    if sum(sizes) != size or min(sizes, default=0) < 0:
        raise InvalidModelError(f"split of {x.type} into {sizes}")
    starts = np.cumsum([0, *sizes])
    parts = [c.slice(x, axis, int(s), n) if keep else c.index(x, axis, int(s)) for s, n in zip(starts, sizes)]
    return SequenceValue(tuple(parts))


@onnx_op("ConcatFromSequence")
def concat_from_sequence(c: Call) -> Node:
    parts = [need_tensor(c, v) for v in sequence(c, 0).items]
    if not parts:
        raise InvalidModelError("concatenation of an empty sequence")
    axis = int(c.required("axis"))
    if c.attr("new_axis", 0):
        return c.stack(parts, checked_axis(axis, parts[0].type.rank + 1))
    return c.concat(parts, checked_axis(axis, parts[0].type.rank))


@onnx_op("SequenceMap")
def sequence_map(c: Call) -> list[Value]:
    lists = [sequence(c, i).items if i == 0 or isinstance(c.value(i), SequenceValue) else None
             for i in range(len(c.inputs))]
    columns = []
    for k in range(len(lists[0] or ())):
        columns.append(c.subgraph("body", *(c.value(i) if v is None else v[k] for i, v in enumerate(lists))))
    return [SequenceValue(tuple(need_tensor(c, v) for v in column)) for column in zip(*columns)]


# ---------------------------------------------------------------------------------------- optionals


@onnx_op("Optional")
def optional(c: Call) -> Value:
    return OptionalValue(c.value(0) if c.has(0) else None)


@onnx_op("OptionalHasElement")
def optional_has_element(c: Call) -> Node:
    value = c.value(0) if c.has(0) else OptionalValue(None)
    return c.lit(not isinstance(value, OptionalValue) or value.item is not None, np.bool_)


@onnx_op("OptionalGetElement")
def optional_get_element(c: Call) -> Value:
    value = c.value(0)
    if not isinstance(value, OptionalValue):
        return value
    if value.item is None:
        raise InvalidModelError("the optional is empty")
    return value.item


# ------------------------------------------------------------------------------------------ sources


@onnx_op("EyeLike")
def eye_like(c: Call) -> Node:
    x = c[0]
    if x.type.rank != 2:
        raise InvalidModelError(f"EyeLike of {x.type}")
    to = int(c.attr("dtype", 0))
    if to and to not in DTYPES:
        raise Unsupported("the element type that EyeLike produces is not supported")
    c.room(x.type.size, "an identity matrix")
    return c.lit(np.eye(x.shape[0], x.shape[1], k=int(c.attr("k", 0))), DTYPES[to] if to else x.dtype)


@onnx_op("Range")
def range_(c: Call) -> Node:
    start, limit, delta = (c.const(i, w).reshape(-1)[0] for i, w in enumerate(("start", "limit", "delta")))
    if delta == 0:
        raise InvalidModelError("a range with a step of 0")
    count = max(0, int(np.ceil((float(limit) - float(start)) / float(delta))))
    c.room(count, "a range")
    dtype = c[0].dtype.numpy
    return c.lit((start + np.arange(count).astype(dtype) * delta).astype(dtype))


@onnx_op("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
         refused=True)
def random(c: Call) -> Node:
    raise Unsupported(f"{c.op_type} draws random numbers", "feed random numbers as an input")


@onnx_op("NonZero", constant="X")
def non_zero(c: Call) -> Node:
    return c.lit(np.array(np.nonzero(c.const(0, "an operand whose values decide the shape", data=True))), np.int64)


@onnx_op("Compress", constant="condition")
def compress(c: Call) -> Node:
    keep = np.flatnonzero(c.const(1, "a condition, which decides the shape,", data=True)).astype(np.int64)
    x = c[0] if "axis" in c.attrs else c.reshape(c[0], (c[0].type.size,))
    axis = c.axis("axis", 0, x.type.rank)
    return c.make("gather", x, c.lit(keep[keep < x.shape[axis]]), axis=axis)


@onnx_op("Unique", constant="X")
def unique(c: Call) -> list[Node]:
    x = c.const(0, "an operand whose values decide the shape", data=True)
    axis = c.attr("axis")
    axis = None if axis is None else checked_axis(int(axis), x.ndim)
    values, first, inverse, counts = np.unique(x, return_index=True, return_inverse=True, return_counts=True, axis=axis)
    inverse = inverse.reshape(-1)
    if not c.attr("sorted", 1):  # in the order of first occurrence
        order = np.argsort(first)
        rank = np.argsort(order)
        values = np.take(values, order, axis=axis or 0)
        first, inverse, counts = first[order], rank[inverse], counts[order]
    return [c.lit(values), *(c.lit(v, np.int64) for v in (first, inverse, counts))]


@onnx_op("OneHot")
def one_hot(c: Call) -> Node:
    indices, values = c[0], c[2]
    depth = int(c.const(1, "depth").reshape(-1)[0])
    if depth < 0 or values.shape != (2,):
        raise InvalidModelError(f"one-hot vectors of depth {depth} and values {values.type}")
    c.room(depth, "a one-hot axis")
    axis = checked_axis(int(c.attr("axis", -1)), indices.type.rank + 1)
    i = c.cast(indices, DType.i64)
    i = c.make("where", c.make("less", i, 0), c.make("add", i, depth), i)
    i = c.reshape(i, (*i.shape[:axis], 1, *i.shape[axis:]))
    steps = c.lit(np.arange(depth).reshape(-1, *[1] * (indices.type.rank - axis)), np.int64)
    return c.make("where", c.make("equal", i, steps), c.index(values, 0, 1), c.index(values, 0, 0))


@onnx_op("Trilu")
def trilu(c: Call) -> Node:
    x = c[0]
    k = int(c.const(1, "k").reshape(-1)[0]) if c.has(1) else 0
    if x.type.rank < 2:
        raise InvalidModelError(f"Trilu of {x.type}")
    k = max(-x.shape[-2] - 1, min(k, x.shape[-1] + 1))
    c.room(x.shape[-2] * x.shape[-1], "a triangle")
    ones = np.ones(x.shape[-2:], np.bool_)
    return c.make("where", c.lit(np.triu(ones, k) if c.attr("upper", 1) else np.tril(ones, k)), x, c.lit(0, x.dtype))
