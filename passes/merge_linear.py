"""`merge-linear`: two linear maps in a row become one where that saves multiplications."""

from __future__ import annotations

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Declined, Match, op, rewrite, rule


def _plain(node: Node) -> bool:
    """Constant float weights, no epilogue; of convolutions only ungrouped 1x1 without padding."""
    if not node.dtype.is_float or node.attrs.get("epilogue") or not all(i.is_const for i in node.inputs[1:]):
        return False
    return node.op == "linear" or (node.inputs[1].shape[1:3] == (1, 1) and node.attrs["groups"] == 1
                                   and not any(node.attrs["pad"]))


def _bias(node: Node) -> np.ndarray:
    return node.inputs[2].value.astype(np.float64) if len(node.inputs) > 2 else np.zeros(node.shape[-1])


@rule(op("linear|conv2d", where=lambda n: _plain(n) and n.inputs[0].op == n.op and _plain(n.inputs[0])))
def two_in_a_row(m: Match) -> Node | Declined | None:
    """w2 (w1 x + b1) + b2 = (w2 w1) x + (w2 b1 + b2)."""
    second, first = m.root, m.root.inputs[0]
    if not m.only_use(first):
        return Declined("the value between them has other users")
    w1, w2 = (n.inputs[1].value.reshape(n.shape[-1], -1).astype(np.float64) for n in (first, second))
    w = (w2 @ w1).astype(second.inputs[1].value.dtype)
    b = (w2 @ _bias(first) + _bias(second)).astype(w.dtype)
    attrs = dict(second.attrs)
    if second.op == "conv2d":
        w = w.reshape(w.shape[0], 1, 1, w.shape[1])
        attrs["stride"] = tuple(s * t for s, t in zip(first.attrs["stride"], attrs["stride"]))
    merged = ops.make(second.op, first.inputs[0], constant(w, origin=second.origin), constant(b, origin=second.origin),
                      origin=second.origin, label=second.name, **attrs)
    two = ops.macs(first) + ops.macs(second)
    if ops.macs(merged) >= two:
        return Declined(f"one map needs {ops.macs(merged)} multiplications, two need {two}")
    return merged


@pass_("merge-linear", exact=True)
def merge_linear(graph: Graph, options: object) -> Graph:
    """No two linear layers or 1x1 convolutions in a row that one could replace with fewer multiplications."""
    return rewrite(graph, [two_in_a_row])
