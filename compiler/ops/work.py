"""The arithmetic that an operation takes."""

from __future__ import annotations

import math

from skive.ir import Node
from skive.ops.attention import heads_first
from skive.ops.recurrence import QUANTIZED_STEPS


def macs(node: Node) -> int:
    """Multiply-accumulates of one evaluation of `node` (0 for everything but contractions)."""
    if node.op == "conv2d":
        return node.type.size * math.prod(node.inputs[1].shape[1:])
    if node.op == "conv_transpose2d":
        return node.inputs[0].type.size * math.prod(node.inputs[1].shape[:3]) // node.attrs["groups"]
    if node.op in ("linear", "compressed_linear"):
        return node.type.size * node.inputs[0].shape[-1]
    if node.op == "matmul":
        return node.type.size * node.inputs[0].shape[-2 if node.attrs["trans_a"] else -1]
    if node.op in ("attention", "quantized_attention"):
        q, k, v = (heads_first(i.shape, node.attrs["token_major"]) for i in node.inputs[:3])
        return math.prod(q[:3]) * k[2] * (q[3] + v[3])
    if node.op in QUANTIZED_STEPS or node.op in QUANTIZED_STEPS.values():
        return node.inputs[0].shape[0] * node.inputs[0].shape[1] * node.inputs[1].type.size
    if node.op in ("lstm", "gru", "rnn"):
        return node.inputs[0].shape[0] * node.inputs[0].shape[1] * (node.inputs[1].type.size + node.inputs[2].type.size)
    return 0
