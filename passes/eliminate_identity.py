"""`eliminate-identity`: operations that change nothing, and pairs that one operation can replace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Const, Match, Var, op, rewrite, rule, scalar
from skive.types import DType

ELEMENTWISE = "|".join(n for n, o in ops.OPS.items() if o.kind == "elementwise")
UNARY = "|".join(n for n, o in ops.OPS.items() if o.kind == "elementwise" and o.operands == (1, 1))


def _same_shape(m: Match) -> Node | None:
    return m["x"] if m["x"].type == m.root.type else None


def _make(m: Match, name: str, *inputs: Node, **attrs: object) -> Node:
    return ops.make(name, *inputs, origin=m.root.origin, label=m.root.name, **attrs)


# ------------------------------------------------------------------------------------ movement

SAME_TYPE = rule(op("reshape|expand|cast", Var("x")), _same_shape)


@rule(op("reshape", op("reshape", Var("x"))))
def reshape_of_reshape(m: Match) -> Node | None:
    return _make(m, "reshape", m["x"], shape=m.root.shape)


@rule(op("transpose", op("transpose", Var("x"), name="inner")))
def transpose_of_transpose(m: Match) -> Node | None:
    p = m["inner"].attrs["perm"]
    return _make(m, "transpose", m["x"], perm=tuple(p[i] for i in m.root.attrs["perm"]))


@rule(op("transpose", Var("x")))
def transpose_that_moves_nothing(m: Match) -> Node | None:
    """Only axes of length 1 change places: a reshape, or nothing."""
    x, perm = m["x"], m.root.attrs["perm"]
    moved = [a for a in perm if x.shape[a] != 1]
    if moved != sorted(moved):
        return None
    return x if x.shape == m.root.shape else _make(m, "reshape", x, shape=m.root.shape)


@rule(op("slice", Var("x")))
def whole_slice(m: Match) -> Node | None:
    a = m.root.attrs
    forward = all(s == 1 or d <= 1 for s, d in zip(a["step"], a["size"]))
    return _same_shape(m) if forward else None


@rule(op("slice", op("slice", Var("x"), name="inner")))
def slice_of_slice(m: Match) -> Node | None:
    a, b = m["inner"].attrs, m.root.attrs
    if 0 in m.root.shape:
        return None
    start = tuple(s + t * step for s, step, t in zip(a["start"], a["step"], b["start"]))
    step = tuple(s * t for s, t in zip(a["step"], b["step"]))
    return _make(m, "slice", m["x"], start=start, size=b["size"], step=step)


@rule(op("slice", op("concat", name="joined")))
def slice_of_concat(m: Match) -> Node | None:
    """A slice that lies within one operand of a concatenation reads that operand."""
    joined, a = m["joined"], m.root.attrs
    axis = joined.attrs["axis"] % joined.type.rank
    if 0 in m.root.shape:
        return None
    ends = (a["start"][axis], a["start"][axis] + (a["size"][axis] - 1) * a["step"][axis])
    offset = 0
    for part in joined.inputs:
        if offset <= min(ends) and max(ends) < offset + part.shape[axis]:
            start = tuple(s - offset if i == axis else s for i, s in enumerate(a["start"]))
            return _make(m, "slice", part, start=start, size=a["size"], step=a["step"])
        offset += part.shape[axis]
    return None


@rule(op("gather", Var("x"), Const("i")))
def gather_in_steps(m: Match) -> Node | None:
    """Evenly spaced places are a slice: so PyTorch writes a global average of rows, and `as_strided` at large."""
    x, axis = m["x"], m.root.attrs["axis"] % m["x"].type.rank
    places = m["i"].value.reshape(-1).astype(np.int64)
    if not len(places) or x.is_const:
        return None
    places = np.where(places < 0, places + x.shape[axis], places)
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if step == 0 or (np.diff(places) != step).any() or not (places.min() >= 0 and places.max() < x.shape[axis]):
        return None
    start, size, steps = [0] * x.type.rank, [*x.shape], [1] * x.type.rank
    start[axis], size[axis], steps[axis] = int(places[0]), len(places), step
    y = _make(m, "slice", x, start=tuple(start), size=tuple(size), step=tuple(steps))
    return y if y.shape == m.root.shape else _make(m, "reshape", y, shape=m.root.shape)


@rule(op("pad", Var("x")))
def empty_pad(m: Match) -> Node | None:
    return _same_shape(m)


@rule(op("concat"))
def concat_operands(m: Match) -> Node | None:
    """A concatenation of one operand, of empty operands, or of concatenations along the same axis."""
    axis = m.root.attrs["axis"] % m.root.type.rank
    parts: list[Node] = []
    for i in m.root.inputs:
        if i.op == "concat" and i.attrs["axis"] % i.type.rank == axis and m.only_use(i):
            parts.extend(i.inputs)
        elif i.shape[axis] != 0:
            parts.append(i)
    if len(parts) == 1 and parts[0].type == m.root.type:
        return parts[0]
    if not parts or tuple(parts) == m.root.inputs:
        return None
    return _make(m, "concat", *parts, axis=axis)


@rule(op(ELEMENTWISE))
def operand_of_expand(m: Match) -> Node | None:
    """Elementwise operations broadcast by themselves: an expanded operand need not be made."""
    inputs = list(m.root.inputs)
    for k, i in enumerate(inputs):
        if i.op == "expand":
            inputs[k] = i.inputs[0]
            if ops.broadcast_shapes(*(n.shape for n in inputs)) != m.root.shape:
                inputs[k] = i
    if all(a is b for a, b in zip(inputs, m.root.inputs)):
        return None
    return _make(m, m.root.op, *inputs, **m.root.attrs)


@rule(op("reshape", op(UNARY, op("reshape", Var("x"), exclusive=True), name="f", exclusive=True)))
def reshapes_around_unary(m: Match) -> Node | None:
    """reshape(f(reshape(x))) = reshape(f(x)): f does not see the shape."""
    f = ops.make(m["f"].op, m["x"], origin=m["f"].origin, label=m["f"].name, **m["f"].attrs)
    return f if f.shape == m.root.shape else _make(m, "reshape", f, shape=m.root.shape)


# -------------------------------------------------------------------------------------- casts

# Operations whose results are values of these operands; of a resize, where it copies its neighbours.
CHOOSING: dict[str, slice] = {
    **dict.fromkeys(("clip", "concat", "max", "min", "relu"), slice(None)), "where": slice(1, 3),
    **dict.fromkeys(("expand", "max_pool2d", "pad", "reduce_max", "reduce_min", "reshape", "resize2d", "slice",
                     "transpose"), slice(1))}


def _narrow_attrs(node: Node, to: DType) -> dict[str, Any] | None:
    """The attributes of a choosing `node` for integers of type `to`; None if it can give other values."""
    attrs, limits = dict(node.attrs), np.iinfo(to.numpy)
    for name in {"clip": ("lo", "hi"), "pad": ("value",)}.get(node.op, ()):
        v = attrs[name]
        if (name, v) in (("lo", -math.inf), ("hi", math.inf)):
            v = limits.min if name == "lo" else limits.max
        if not limits.min <= v <= limits.max or v != int(v):
            return None
        attrs[name] = int(v)
    return attrs


@rule(op("cast", where=lambda n: n.dtype.is_int))
def choice_of_integers(m: Match) -> Node | None:
    """Integers that go through a wider type only to be chosen among and moved are so as they are."""
    to = m.root.dtype

    def narrow(node: Node) -> Node | None:
        if not np.can_cast(to.numpy, node.dtype.numpy):
            return None
        if node.op == "cast" and node.inputs[0].dtype is to:
            return node.inputs[0]
        if node.is_const:
            value = ops.evaluate(ops.make("cast", node, to=to), [node.value])
            return constant(value, name=node.name, origin=node.origin) if (value == node.value).all() else None
        attrs = _narrow_attrs(node, to) if node.op in CHOOSING and m.only_use(node) else None
        if attrs is None or attrs.get("epilogue") or node.op == "resize2d" and not ops.copies_neighbours(node):
            return None
        inputs, chosen = list(node.inputs), node.inputs[CHOOSING[node.op]]
        found = [n for n in map(narrow, chosen) if n is not None]
        if len(found) < len(chosen):
            return None
        inputs[CHOOSING[node.op]] = found
        try:
            return ops.make(node.op, *inputs, origin=node.origin, label=node.name, **attrs)
        except ShapeError:  # no such operation of integers
            return None

    return None if m.root.inputs[0].is_const else narrow(m.root.inputs[0])


# ------------------------------------------------------------------------------------ arithmetic

NEUTRAL = [rule(op("add|sub", Var("x"), scalar(0)), _same_shape),
           rule(op("mul|div|pow", Var("x"), scalar(1)), _same_shape)]


def _powers_of_two(c: np.ndarray) -> bool:
    return c.dtype.kind == "f" and bool((np.abs(np.frexp(c)[0]) == 0.5).all())


@rule(op("div", Var("x"), Const("c", _powers_of_two)))
def division_by_power_of_two(m: Match) -> Node | None:
    """x / 2^k = x 2^-k, without any rounding; a multiplication is several times as fast."""
    inverse = 1 / m["c"].value
    if not np.isfinite(inverse).all() or (np.abs(inverse) < np.finfo(inverse.dtype).tiny).any():
        return None
    return _make(m, "mul", m["x"], constant(inverse, origin=m.root.origin))


@rule(op("relu", op("relu|sigmoid|exp|abs|softplus|hard_sigmoid|sqrt", name="inner")))
def relu_of_nonnegative(m: Match) -> Node | None:
    # The absolute value of the least integer wraps to itself.
    return m["inner"] if m.root.dtype.is_float or m["inner"].op == "relu" else None


@rule(op("neg|not|bit_not", op("neg|not|bit_not", Var("x"), name="inner")))
def involution(m: Match) -> Node | None:
    return m["x"] if m["inner"].op == m.root.op else None


def _bounds(node: Node) -> tuple[float, float]:
    return (0.0, math.inf) if node.op == "relu" else (node.attrs["lo"], node.attrs["hi"])


@rule(op("relu|clip", op("relu|clip", Var("x"), name="inner")))
def clip_of_clip(m: Match) -> Node | None:
    (a, b), (c, d) = _bounds(m["inner"]), _bounds(m.root)
    if a > b or c > d or not m.root.dtype.is_float:
        return None  # an empty interval: hi wins, which is not an interval again
    lo, hi = min(max(a, c), d), max(min(b, d), c)
    return _clip(m, m["x"], lo, hi)


def _clip(m: Match, x: Node, lo: float, hi: float) -> Node:
    if lo == 0 and hi == math.inf:
        return _make(m, "relu", x)
    return _make(m, "clip", x, lo=lo, hi=hi)


@rule(op("clip", Var("x"), where=lambda n: n.attrs["lo"] == 0 and n.attrs["hi"] == math.inf))
def clip_is_relu(m: Match) -> Node | None:
    return _make(m, "relu", m["x"])


def _uniform(c: np.ndarray) -> bool:
    return c.size > 0 and bool((c == c.flat[0]).all())


@rule(op("min|max", Var("x"), Const("c", _uniform), where=lambda n: n.dtype.is_float))
def bound_is_clip(m: Match) -> Node | None:
    bound = float(m["c"].value.flat[0])
    if m["x"].shape != m.root.shape:
        return None
    return _clip(m, m["x"], *((bound, math.inf) if m.root.op == "max" else (-math.inf, bound)))


@rule(op("where|choose", Const("c", _uniform), Var("a"), Var("b")))
def decided_where(m: Match) -> Node | None:
    chosen = m["a"] if m["c"].value.flat[0] else m["b"]
    return chosen if chosen.type == m.root.type else None


@rule(op("choose", Var("c"), Var("a"), Var("b"), where=lambda n: n.inputs[1] is n.inputs[2]))
def one_choice(m: Match) -> Node | None:
    return m["a"]


# ------------------------------------------------------------------------------------ reductions


@rule(op("reduce_sum|reduce_mean|reduce_max|reduce_min|reduce_prod", Var("x")))
def reduction_of_one(m: Match) -> Node | None:
    """Over axes of length 1 nothing is reduced."""
    x, axes = m["x"], m.root.attrs["axes"]
    left = tuple(a for a in axes if x.shape[a] != 1)
    if len(left) == len(axes):
        return None
    y = _make(m, m.root.op, x, axes=left, keep=True) if left else x
    return y if y.shape == m.root.shape else _make(m, "reshape", y, shape=m.root.shape)


@rule(op("avg_pool2d", Var("x"), where=lambda n: n.shape[1:3] == (1, 1) and not n.attrs.get("epilogue")))
def global_average(m: Match) -> Node | None:
    """A mean over the whole image is a reduction."""
    x, a = m["x"], m.root.attrs
    if a["kernel"] != x.shape[1:3] or any(a["pad"]) or tuple(a["dilation"]) != (1, 1):
        return None
    return _make(m, "reduce_mean", x, axes=(1, 2), keep=True)


RULES = [SAME_TYPE, reshape_of_reshape, transpose_of_transpose, transpose_that_moves_nothing, whole_slice,
         slice_of_slice, slice_of_concat, gather_in_steps, empty_pad, concat_operands, operand_of_expand,
         reshapes_around_unary, choice_of_integers, *NEUTRAL, division_by_power_of_two, relu_of_nonnegative, involution,
         clip_of_clip, clip_is_relu, bound_is_clip, decided_where, reduction_of_one, global_average]


@pass_("eliminate-identity", exact=True)
def eliminate_identity(graph: Graph, options: object) -> Graph:
    """No operation that only renames its operand, and no two in a row that are one."""
    return rewrite(graph, RULES)
