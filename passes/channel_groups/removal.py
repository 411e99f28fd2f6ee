"""A graph without groups of channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from skive import ops
from skive.ir import FrozenDict, Graph, Node, constant
from skive.passes.channel_groups.groups import Groups
from skive.types import DType


def without(found: Groups, removed: Iterable[int]) -> Graph:
    """The graph of `found` without these groups; the very same graph if there are none.

    Constants lose their slices; the sizes that reshapes, slices, paddings and groups of channels state are
    computed anew. ValueError if a group must stay or nothing of an axis would be left.
    """
    gone = np.zeros(len(found.groups), bool)
    gone[list(removed)] = True
    if not gone.any():
        return found.graph
    for n in np.flatnonzero(gone).tolist():
        if found.groups[n].reason is not None:
            raise ValueError(f"the group of {found.groups[n].label} must stay: {found.groups[n].reason}")
    new: dict[Node, Node] = {}
    for node in found.graph.nodes:
        keep = [~gone[a] for a in found.axes[node]]
        if any(len(k) and not k.any() for k in keep):
            raise ValueError(f"{node.label()}: nothing would be left of an axis")
        inputs = tuple(new[i] for i in node.inputs)
        if all(k.all() for k in keep) and all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            new[node] = node
        elif node.is_const:
            new[node] = constant(node.value[np.ix_(*keep)], name=node.name, origin=node.origin)
        else:
            new[node] = _shrunk(node, inputs, keep, [[~gone[a] for a in found.axes[i]] for i in node.inputs])
    return found.graph.with_nodes(new)


def _shrunk(node: Node, inputs: tuple[Node, ...], keep: Sequence[np.ndarray], kept: Sequence[Sequence[np.ndarray]]
            ) -> Node:
    """`node` on its shrunken operands; `keep`: what stays of its axes, `kept`: of those of its operands."""
    shape = tuple(int(k.sum()) for k in keep)
    attrs = dict(node.attrs)
    if node.op in ("reshape", "expand"):
        attrs["shape"] = shape
    elif node.op == "slice":
        start = []
        for b, k, size, step in zip(attrs["start"], kept[0], attrs["size"], attrs["step"], strict=True):
            taken = np.arange(size) * step + b
            left = taken[k[taken]]
            start.append(int(k[: left[0]].sum()) if len(left) else 0)
        attrs["start"], attrs["size"] = tuple(start), shape
    elif node.op == "pad":
        sides = [(int(k[:b].sum()), int(k[len(k) - a :].sum()) if a else 0)
                 for k, b, a in zip(keep, attrs["before"], attrs["after"], strict=True)]
        attrs["before"], attrs["after"] = (tuple(s[i] if s[i] or n >= 0 else n for s, n in zip(sides, attrs[key]))
                                           for i, key in enumerate(("before", "after")))
    elif node.op in ("conv2d", "conv_transpose2d"):
        if attrs["groups"] == node.inputs[0].shape[3] > 1:
            attrs["groups"] = inputs[0].shape[3]
    elif node.op == "group_norm":
        attrs["groups"] = shape[-1] * attrs["groups"] // node.shape[-1]
    elif node.op == "gather" and node.inputs[1].is_const and node.inputs[1].type.rank == 1:
        axis = attrs["axis"] % node.inputs[0].type.rank
        k = kept[0][axis]
        index = node.inputs[1].value[keep[axis]]
        moved = (np.cumsum(k) - 1)[np.where(index < 0, index + len(k), index)]
        inputs = (inputs[0], constant(moved.astype(index.dtype), origin=node.inputs[1].origin))
    made = ops.make(node.op, *inputs, origin=node.origin, label=node.name, **FrozenDict(attrs))
    assert made.shape == shape, f"{node.label()}: {made.shape} instead of {shape}"
    return made


def zeroed(found: Groups, removed: Iterable[int]) -> Graph:
    """The graph of `found` with every weight of these groups zero, of the old shape: what `without` equals."""
    gone = np.zeros(len(found.groups), bool)
    gone[list(removed)] = True

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if not node.is_const:
            return node if all(a is b for a, b in zip(inputs, node.inputs, strict=True)) else ops.make(
                node.op, *inputs, origin=node.origin, label=node.name, **node.attrs)
        value = emptied(found, node, gone)
        return node if value is None else constant(value, name=node.name, origin=node.origin)

    return found.graph.map_nodes(one)


def emptied(found: Groups, node: Node, gone: np.ndarray) -> np.ndarray | None:
    """The values of a constant with the groups `gone` [groups] bool zero; None if it holds none of them."""
    masks = [gone[a] for a in found.axes[node]]
    if node.dtype in (DType.i64, DType.bool) or not any(m.any() for m in masks):
        return None
    value = node.value.copy()
    for axis, m in enumerate(masks):
        value[(slice(None),) * axis + (m,)] = 0
    return value
