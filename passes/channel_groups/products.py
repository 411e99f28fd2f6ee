"""Rules: matrix products and attention."""

from __future__ import annotations

from skive.ir import Node
from skive.passes.channel_groups.labels import Analysis, Axes, broadcast, rule, with_epilogue


@rule("linear")
def _linear(at: Analysis, node: Node) -> Axes:
    x, w = at(node.inputs[0]), at(node.inputs[1])
    at.joins.join(w[1], x[-1])
    for bias in node.inputs[2:3]:
        at.joins.join(w[0], at(bias)[0])
    return with_epilogue(at, node, 3, (*x[:-1], w[0]))


@rule("matmul")
def _matmul(at: Analysis, node: Node) -> Axes:
    a, b = at(node.inputs[0]), at(node.inputs[1])
    m, k = a[-2:] if not node.attrs["trans_a"] else (a[-1], a[-2])
    other, n = b[-2:] if not node.attrs["trans_b"] else (b[-1], b[-2])
    at.joins.join(k, other)
    batch = broadcast(at, [a[:-2], b[:-2]], node.shape[:-2])
    return with_epilogue(at, node, 2, (*batch, m, n))


@rule("attention")
def _attention(at: Analysis, node: Node) -> Axes:
    token_major = node.attrs["token_major"]
    heads, tokens = (2, 1) if token_major else (1, 2)
    q, k, v = (at(i) for i in node.inputs[:3])
    at.joins.join(q[3], k[3])
    at.joins.join(k[tokens], v[tokens])
    for axis in (0, heads):
        at.joins.join(q[axis], k[axis])
        at.joins.join(q[axis], v[axis])
    at.joins.keep(k[tokens], f"softmax over this axis ({node.label()})")
    for mask in node.inputs[3:]:
        full = (q[0], q[heads], q[tokens], k[tokens])
        broadcast(at, [full, at(mask)], tuple(map(len, full)))
    return (q[0], q[1], q[2], v[3])
