"""`join-factors`: factors and the division by a step join constants, where they cost nothing.

    quantize(dequantize(q, s, z) * a * c, t)   ->   requantize(float(q - z) * (a * (c s / t)), 1)
    quantize(dequantize(p, r, y) + dequantize(q, s, z), t)
                                  ->   requantize(dequantize(p, r / t, y) + dequantize(q, s / t, z), 1)

The first is an image times one value per channel (the gates of squeeze-and-excitation, [N, 1, 1, C]), whose
factors join the smallest of them. The second is any sum of quantized values, such as a residual one, within bounds
or not: they are added in units of the result's step. Only the order in which float32 rounds changes.
"""

from __future__ import annotations

import math

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Match, Var, op, rewrite, rule

SMALLER = 8  # times: by which the product must be larger than the factors that are multiplied instead


def _factors(m: Match, product: Node) -> list[Node]:
    """What the multiplications of whole images above `product` multiply, from left to right."""
    found: list[Node] = []
    todo = [product]
    while todo:
        n = todo.pop()
        if n is product or (n.op == "mul" and n.shape == product.shape and m.only_use(n)):
            todo += reversed(n.inputs)
        else:
            found.append(n)
    return found


@rule(op("quantize|requantize", op("mul", name="product", exclusive=True), Var("s"), Var("z")))
def gates(m: Match) -> Node | None:
    """Constants and scales join the factors that are smaller than the product."""
    root, product, s, z = m.root, m["product"], m["s"], m["z"]
    factors = _factors(m, product)
    images = [f for f in factors if f.shape == root.shape]
    if len(images) != 1 or images[0].op != "dequantize" or not m.only_use(images[0]) or not s.is_const:
        return None
    q, scale, zero = images[0].inputs
    constants = [f for f in factors if f.is_const]
    small = [f for f in factors if f is not images[0] and not f.is_const]
    if q.dtype not in ops.QUANTIZED or not small or not (scale.is_const and zero.is_const):
        return None
    step = s.value.astype(np.float64) if root.op == "quantize" else 1 / s.value.astype(np.float64)
    total = scale.value.astype(np.float64) / step
    for c in constants:
        total = total * c.value.astype(np.float64)
    gate = small[0]
    for f in small[1:]:
        gate = ops.make("mul", gate, f, origin=product.origin)
    gate = ops.make("mul", gate, constant(np.asarray(total, np.float32)), origin=product.origin)
    if gate.type.size * SMALLER > root.type.size:
        return None
    one = constant(np.asarray(1, np.float32))
    value = ops.make("mul", ops.make("dequantize", q, one, zero, origin=root.origin), gate, origin=product.origin)
    if value.shape != root.shape or (total.ndim == 0 and float(total) == 1 and root.op == "requantize"):
        return None
    return ops.make("requantize", value, one, z, to=root.dtype, origin=root.origin, label=root.name)


def _bounds(node: Node) -> tuple[float, float]:
    return (0.0, math.inf) if node.op == "relu" else (float(node.attrs["lo"]), float(node.attrs["hi"]))


def _within(node: Node, low: np.ndarray | None, high: np.ndarray | None) -> Node:
    """`node` within constant bounds; None: there is none."""

    def bound(name: str, value: np.ndarray) -> Node:
        return ops.make(name, node, constant(np.asarray(value, np.float32)), origin=node.origin)

    if low is not None:
        node = ops.make("relu", node, origin=node.origin) if not np.any(low) else bound("max", low)
    return node if high is None else bound("min", high)


def _product(m: Match, node: Node) -> tuple[Node, np.ndarray] | None:
    """(x, c) of x times a constant that one use reads."""
    if node.op != "mul" or not m.only_use(node):
        return None
    for x, c in (node.inputs, node.inputs[::-1]):
        if c.is_const and not x.is_const and x.shape == node.shape:
            return x, c.value.astype(np.float64)
    return None


def _times(m: Match, node: Node, factor: np.ndarray) -> Node | None:
    """`node` times `factor` without a multiplication of its own; None if some constant cannot take it."""
    if node.is_const:
        return constant(np.asarray(node.value * factor, np.float32), origin=node.origin)
    if not m.only_use(node):
        return None
    if node.op == "dequantize" and node.inputs[1].is_const:
        q, scale, zero = node.inputs
        total = np.asarray(scale.value * factor, np.float32)
        per_channel = total.size == total.shape[-1] == node.shape[-1] if total.ndim else True
        if not per_channel and total.size != 1:
            return None
        return ops.make("dequantize", q, constant(total), zero, origin=node.origin, label=node.name)
    if node.op in ("add", "sub"):
        a, b = (_times(m, i, factor) for i in node.inputs)
        made = ops.make(node.op, a, b, origin=node.origin, label=node.name) if a and b else None
        return made if made is not None and made.shape == node.shape else None
    if node.op in ("relu", "clip") and (factor > 0).all():
        x = _times(m, node.inputs[0], factor)
        low, high = (None if math.isinf(v) else v * factor for v in _bounds(node))
        return None if x is None else _within(x, low, high)
    if product := _product(m, node):
        total = product[1] * factor
        joined = _times(m, product[0], total)
        if joined is not None:
            return joined
        by = constant(np.asarray(total, np.float32))
        return ops.make("mul", product[0], by, origin=node.origin, label=node.name)
    return None


@rule(op("quantize|requantize", op("add|sub|mul|relu|clip", name="value", exclusive=True), Var("s"), Var("z")))
def steps(m: Match) -> Node | None:
    """The division by the step joins the scales of what is added; bounds that saturation keeps go."""
    root, value, s, z = m.root, m["value"], m["s"], m["z"]
    if not (s.is_const and z.is_const and s.type.size == z.type.size == 1 and np.all(s.value > 0)):
        return None
    step = s.value.astype(np.float64).reshape(())
    factor = 1 / step if root.op == "quantize" else step
    if product := _product(m, value):
        value, factor = product[0], product[1] * factor
    elif factor == 1:
        return None  # as this rule leaves it
    limits, zero = np.iinfo(root.dtype.numpy), int(z.value.item())
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    if value.op in ("relu", "clip") and m.only_use(value) and (factor > 0).all():
        low, high = (v * factor for v in _bounds(value))
        value = value.inputs[0]
        low = None if (np.rint(low) + zero <= limits.min).all() else low
        high = None if (np.rint(high) + zero >= limits.max).all() else high
    joined = None if value.is_const else _times(m, value, factor)
    if joined is None or joined.shape != root.shape:
        return None
    one = constant(np.asarray(1, np.float32))
    value = _within(joined, low, high)
    return ops.make("requantize", value, one, z, to=root.dtype, origin=root.origin, label=root.name)


@pass_("join-factors", exact=False)
def join_factors(graph: Graph, options: object) -> Graph:
    """One multiplication per element of a quantized value that is scaled by smaller ones; sums in units of the step."""
    return rewrite(graph, [gates, steps])
