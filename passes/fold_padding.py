"""`fold-padding`: a constant padding before a window becomes the window's own padding.

The reverse too: rows and columns that are cut off before a window which would not reach them stay.
"""

from __future__ import annotations

import math

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node
from skive.pipeline import pass_
from skive.rewrite import Declined, Match, Var, op, rewrite, rule


def _spatial(node: Node) -> bool:
    """A constant padding of the two image axes only."""
    a = node.attrs
    return (a["mode"] == "constant" and node.type.rank == 4
            and a["before"][0] == a["after"][0] == a["before"][3] == a["after"][3] == 0)


def _sides(pad: Node) -> tuple[int, int, int, int]:
    (_, top, left, _), (_, bottom, right, _) = pad.attrs["before"], pad.attrs["after"]
    return top, left, bottom, right


@rule(op("conv2d|max_pool2d|avg_pool2d", where=lambda n: n.inputs[0].op == "pad" and _spatial(n.inputs[0])))
def pad_before_window(m: Match) -> Node | Declined | None:
    node, pad = m.root, m.root.inputs[0]
    attrs, own = dict(node.attrs), node.attrs["pad"]
    neutral = -math.inf if node.op == "max_pool2d" else attrs.get("zero", 0)
    if pad.attrs["value"] != neutral:
        return Declined(f"the padding is {pad.attrs['value']}, not {neutral}")
    if node.op == "avg_pool2d":
        if any(own) and not attrs["count_pad"]:
            return Declined("the mean counts one padding and not the other")
        attrs["count_pad"] = True
    attrs["pad"] = tuple(a + b for a, b in zip(own, _sides(pad), strict=True))
    try:
        return ops.make(node.op, pad.inputs[0], *node.inputs[1:], origin=node.origin, label=node.name, **attrs)
    except ShapeError as e:
        return Declined(str(e))


@rule(op("conv2d|max_pool2d|avg_pool2d", where=lambda n: n.inputs[0].op == "slice" and not any(n.attrs["pad"])))
def crop_before_window(m: Match) -> Node | Declined | None:
    """Exporters cut what a stride does not reach; the windows start at the same places without that."""
    node, cut = m.root, m.root.inputs[0]
    x, a = cut.inputs[0], cut.attrs
    if any(a["start"]) or any(s != 1 for s in a["step"]) or (x.shape[0], x.shape[3]) != (cut.shape[0], cut.shape[3]):
        return None
    whole = ops.make(node.op, x, *node.inputs[1:], origin=node.origin, label=node.name, **node.attrs)
    return whole if whole.shape == node.shape else Declined("the windows reach what is cut off")


@rule(op("pad", op("pad", Var("x"), name="inner", exclusive=True)))
def pad_of_pad(m: Match) -> Node | None:
    a, b = m["inner"].attrs, m.root.attrs
    if a["mode"] != "constant" or b["mode"] != "constant" or a["value"] != b["value"]:
        return None
    return ops.make("pad", m["x"], before=tuple(map(sum, zip(a["before"], b["before"]))),
                    after=tuple(map(sum, zip(a["after"], b["after"]))), value=a["value"], origin=m.root.origin,
                    label=m.root.name)


@pass_("fold-padding", exact=True)
def fold_padding(graph: Graph, options: object) -> Graph:
    """No padding by the neutral value, and no needless cropping, directly before a convolution or pooling."""
    return rewrite(graph, [pad_of_pad, pad_before_window, crop_before_window])
