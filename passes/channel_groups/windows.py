"""Rules: convolutions, pooling, resizing."""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.passes.channel_groups.labels import WINDOW, Analysis, Axes, rule, with_epilogue


@rule("conv2d", "conv_transpose2d")
def _convolution(at: Analysis, node: Node) -> Axes:
    x, w = at(node.inputs[0]), at(node.inputs[1])
    for a in (*x[1:3], *w[1:3]):
        at.joins.keep(a, f"{WINDOW} ({node.label()})")
    groups = node.attrs["groups"]
    outs, ins = len(w[0]), len(x[3])
    if groups == 1:
        at.joins.join(w[3], x[3])
    elif groups == ins:  # depthwise: an output channel has one input channel
        at.joins.join(w[0], x[3][np.arange(outs) // (outs // ins)])
        at.joins.keep(w[3], f"one input channel per group ({node.label()})")
    else:  # the same positions in every group
        at.joins.join(x[3], np.tile(w[3], groups))
        per_group = w[0].reshape(groups, -1)
        at.joins.join(w[0], np.tile(per_group[0], groups))
    for bias in node.inputs[2:3]:
        at.joins.join(w[0], at(bias)[0])
    spatial = (at.joins.kept(d, f"{WINDOW} ({node.label()})") for d in node.shape[1:3])
    return with_epilogue(at, node, 3, (x[0], *spatial, w[0]))


@rule("max_pool2d", "avg_pool2d", "sum_pool2d", "resize2d")
def _window(at: Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    for a in (*x[1:3], *(a for i in node.inputs[1:] for a in at(i))):
        at.joins.keep(a, f"{WINDOW} ({node.label()})")
    spatial = (at.joins.kept(d, f"{WINDOW} ({node.label()})") for d in node.shape[1:3])
    return (x[0], *spatial, x[3])
