"""`join-factors`: a quantized image times one value per channel is one multiplication per element.

    quantize(dequantize(q, s, z) * a * c, t)   ->   requantize(float(q - z) * (a * (c s / t)), 1)

The scales and the constants of the product join its smallest factors (the gates of squeeze-and-excitation,
[N, 1, 1, C]), where a multiplication costs nothing; the division by the step t goes with them. Only the order in which
float32 rounds changes.
"""

from __future__ import annotations

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


@pass_("join-factors", exact=False)
def join_factors(graph: Graph, options: object) -> Graph:
    """One multiplication per element of a quantized value that is scaled by smaller ones."""
    return rewrite(graph, [gates])
