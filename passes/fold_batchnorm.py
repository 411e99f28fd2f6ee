"""`fold-batchnorm`: scales and shifts by constants move into the weights beside them.

An inference batch normalization is a multiplication and an addition per channel. After a
convolution both go into its weights and bias; before one the scale always does (a padding of zeros
stays zero), the shift only where nothing is padded.
"""

from __future__ import annotations

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Const, Declined, Match, Var, op, rewrite, rule

HOSTS = "conv2d|linear|conv_transpose2d"


def _is_float(node: Node) -> bool:
    return node.dtype.is_float


def _foldable(node: Node) -> bool:
    """A host without epilogue whose weights and bias are constants."""
    return node.dtype.is_float and not node.attrs.get("epilogue") and all(i.is_const for i in node.inputs[1:])


def channel_vector(c: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`c` as one value per channel (last axis of `shape`); None if it varies along another axis."""
    if c.ndim > len(shape) or any(d != 1 for d in c.shape[:-1]):
        return None
    return np.broadcast_to(c.reshape(-1), shape[-1:]) if c.size in (1, shape[-1]) else None


def with_weights(host: Node, weights: np.ndarray, bias: np.ndarray | None, *, x: Node | None = None,
                 label: str = "") -> Node:
    """`host` with other weights and bias, on operand `x` if given."""
    w = host.inputs[1]
    operands = [x or host.inputs[0], constant(weights.astype(w.value.dtype), name=w.name, origin=w.origin)]
    if bias is not None:
        operands.append(constant(bias.astype(w.value.dtype), origin=host.origin))
    return ops.make(host.op, *operands, origin=host.origin, label=label or host.name, **host.attrs)


def _bias(host: Node) -> np.ndarray:
    return host.inputs[2].value if len(host.inputs) > 2 else np.zeros(host.shape[-1], host.dtype.numpy)


@rule(op("mul", op(HOSTS, name="host", where=_foldable, exclusive=True), Const("c")))
def scale_after(m: Match) -> Node | Declined | None:
    return _scaled(m, m["c"].value)


@rule(op("div", op(HOSTS, name="host", where=_foldable, exclusive=True), Const("c", lambda c: bool((c != 0).all()))))
def division_after(m: Match) -> Node | Declined | None:
    return _scaled(m, 1 / m["c"].value)


def _scaled(m: Match, c: np.ndarray) -> Node | Declined | None:
    host = m["host"]
    scale = channel_vector(c, host.shape)
    if scale is None or m.root.shape != host.shape:
        return Declined("the factor is not one per channel")
    if not np.isfinite(scale).all():
        return Declined("the factor is not finite")
    w = host.inputs[1].value
    bias = host.inputs[2].value * scale if len(host.inputs) > 2 else None
    return with_weights(host, w * scale.reshape(-1, *[1] * (w.ndim - 1)), bias, label=m.root.name)


@rule(op("add", op(HOSTS, name="host", where=_foldable, exclusive=True), Const("c")))
def shift_after(m: Match) -> Node | Declined | None:
    return _shifted(m, m["c"].value)


@rule(op("sub", op(HOSTS, name="host", where=_foldable, exclusive=True), Const("c")))
def subtraction_after(m: Match) -> Node | Declined | None:
    return _shifted(m, -m["c"].value)


def _shifted(m: Match, c: np.ndarray) -> Node | Declined | None:
    host = m["host"]
    shift = channel_vector(c, host.shape)
    if shift is None or m.root.shape != host.shape:
        return Declined("the summand is not one per channel")
    return with_weights(host, host.inputs[1].value, _bias(host) + shift, label=m.root.name)


def _per_input_channel(host: Node, v: np.ndarray) -> np.ndarray:
    """`v`, one value per input channel, in the shape that multiplies the weights of `host`."""
    w = host.inputs[1].value
    if host.op == "linear":
        return v[None, :]
    groups = host.attrs["groups"]
    return np.repeat(v.reshape(groups, w.shape[3]), w.shape[0] // groups, axis=0)[:, None, None, :]


@rule(op(HOSTS, name="host", where=lambda n: _foldable(n) and n.inputs[0].op in ("mul", "add", "sub")))
def before(m: Match) -> Node | Declined | None:
    """host(x * c) and host(x + c), with c one per input channel, as host(x) with other weights."""
    host = m["host"]
    inner = host.inputs[0]
    if not m.only_use(inner):
        return None
    a, b = inner.inputs
    if a.is_const and inner.op != "sub":
        a, b = b, a
    if not b.is_const or a.is_const or a.shape != inner.shape:
        return None
    v = channel_vector(b.value, inner.shape)
    if v is None:
        return Declined("the constant is not one per input channel")
    if not np.isfinite(v).all():
        return Declined("the constant is not finite")
    w = host.inputs[1].value
    per_weight = _per_input_channel(host, v)
    if inner.op == "mul":
        return with_weights(host, w * per_weight, host.inputs[2].value if len(host.inputs) > 2 else None, x=a)
    if host.op == "conv_transpose2d" or (host.op == "conv2d" and any(host.attrs["pad"])):
        return Declined("the padding is not shifted")
    sign = -1 if inner.op == "sub" else 1
    shift = sign * (w.astype(np.float64) * per_weight).sum(axis=tuple(range(1, w.ndim)))
    return with_weights(host, w, _bias(host) + shift, x=a)


def _merged(m: Match, value: np.ndarray, name: str) -> Node | None:
    if value.size > max(m["c"].type.size, m["d"].type.size) or not np.isfinite(value).all():
        return None
    return ops.make(name, m["x"], constant(value, origin=m.root.origin), origin=m.root.origin, label=m.root.name)


@rule(op("mul", op("mul", Var("x"), Const("c"), exclusive=True, where=_is_float), Const("d")))
def two_scales(m: Match) -> Node | None:
    return _merged(m, m["c"].value * m["d"].value, "mul")


@rule(op("add", op("add", Var("x"), Const("c"), exclusive=True, where=_is_float), Const("d")))
def two_shifts(m: Match) -> Node | None:
    return _merged(m, m["c"].value + m["d"].value, "add")


@rule(op("sub", op("add", Var("x"), Const("c"), exclusive=True, where=_is_float), Const("d")))
def shift_and_back(m: Match) -> Node | None:
    return _merged(m, m["c"].value - m["d"].value, "add")


@pass_("fold-batchnorm", exact=True)
def fold_batchnorm(graph: Graph, options: object) -> Graph:
    """No scale or shift by a constant per channel directly after or before a convolution or linear layer."""
    return rewrite(graph, [scale_after, division_after, shift_after, subtraction_after, before, two_scales,
                           two_shifts, shift_and_back])
