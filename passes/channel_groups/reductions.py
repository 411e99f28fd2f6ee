"""Rules: operations that mix the elements of an axis, and keep it."""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.passes.channel_groups.labels import Analysis, Axes, Labels, broadcast, rule


@rule("kind reduce")
def _reduction(at: Analysis, node: Node) -> Axes:
    x = node.inputs[0]
    if node.op.startswith("topk"):
        axes, keep = {x.type.rank - 1}, True
    elif "axes" in node.attrs:
        axes, keep = {a % x.type.rank for a in node.attrs["axes"]}, node.attrs["keep"]
    else:
        axes, keep = {node.attrs["axis"] % max(x.type.rank, 1)}, node.attrs.get("keep", True)
    result: list[Labels] = []
    for i, a in enumerate(at(x)):
        if i in axes:
            at.joins.keep(a, f"{node.op} over this axis ({node.label()})")
            if keep:
                size = node.shape[len(result)]
                result.append(a if size == len(a) else at.joins.kept(size, f"reduced ({node.label()})"))
        else:
            result.append(a)
    return tuple(result)


@rule("softmax", "log_softmax")
def _softmax(at: Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    at.joins.keep(x[node.attrs["axis"]], f"softmax over this axis ({node.label()})")
    return x


@rule("layer_norm", "rms_norm", "l2_norm")
def _norm(at: Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    first = node.attrs["axis"] % len(x)
    for a in x[first:]:
        at.joins.keep(a, f"normalised over this axis ({node.label()})")
    for other in node.inputs[1:]:
        broadcast(at, [x, at(other)], node.shape)
    return x


@rule("group_norm")
def _group_norm(at: Analysis, node: Node) -> Axes:
    """Whole groups can go: what is left of one would have another mean."""
    x = at(node.inputs[0])
    groups = node.attrs["groups"]
    for a in x[1:-1]:
        at.joins.keep(a, f"normalised over this axis ({node.label()})")
    if groups == 1:
        at.joins.keep(x[-1], f"normalised over this axis ({node.label()})")
    by_group = x[-1].reshape(groups, -1)
    at.joins.join(x[-1], np.repeat(by_group[:, 0], by_group.shape[1]))
    for other in node.inputs[1:]:
        broadcast(at, [x, at(other)], node.shape)
    return x
