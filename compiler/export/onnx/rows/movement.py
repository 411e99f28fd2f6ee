"""Data movement and indexing."""

from __future__ import annotations

from skive.export.onnx.writer import ELEM_TYPES, Inexpressible, Order, Writer, integers, row, scalar
from skive.ir import Node
from skive.passes.sink_transposes import inverse, through_reshape
from skive.types import DType


@row("reshape")
def reshape(w: Writer, n: Node) -> None:
    """A reshape that keeps axes together keeps the order they have."""
    x = n.inputs[0]
    r = w.order(x)
    if r and 0 not in x.shape and (r[0] == 0 or not w.any_batch):
        shape = [x.shape[a] for a in r]
        split = through_reshape(shape, inverse(r), n.shape)
        if split is not None and split[0] == tuple(range(len(shape))):
            _, middle, back = split
            if back[:1] == (0,) or not w.any_batch:
                w.put(n, w.reshape(w.get(x, r), middle), inverse(back))
                return
    w.put(n, w.reshape(w.get(x), n.shape))


def any_order(w: Writer, x: Node) -> Order:
    return w.order(x) or tuple(range(x.type.rank))


@row("slice")
def slice_(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order = any_order(w, x)
    start, size, step = ([n.attrs[k][a] for a in order] for k in ("start", "size", "step"))
    axes = [i for i, a in enumerate(order) if not (start[i] == 0 and size[i] == x.shape[a] and step[i] == 1)]
    before_first = -(2**62)  # the end of a slice that runs backwards through element 0
    ends = [start[i] + size[i] * step[i] for i in axes]
    ends = [before_first if e < 0 else e for e in ends]
    w.put(n, w.emit("Slice", w.get(x, order), integers(*(start[i] for i in axes)), integers(*ends), integers(*axes),
                    integers(*(step[i] for i in axes))), order)


@row("concat")
def concat(w: Writer, n: Node) -> None:
    orders = [r for r in map(w.order, n.inputs) if r is not None] or [tuple(range(n.type.rank))]
    order = max(sorted(set(orders)), key=lambda r: sum(i.type.bytes for i in n.inputs if w.order(i) == r))
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("Concat", *(w.get(i, order) for i in n.inputs), axis=axis), order)


@row("pad")
def pad(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order = any_order(w, x)
    pads = integers(*(n.attrs[k][a] for k in ("before", "after") for a in order))
    value = scalar(n.attrs["value"], n.dtype) if n.attrs["mode"] == "constant" else ""
    if n.attrs["mode"] == "wrap" and w.opset < 19:
        raise Inexpressible("padding that wraps needs opset 19")
    w.put(n, w.emit("Pad", w.get(x, order), pads, value, mode=n.attrs["mode"]), order)


@row("expand")
def expand(w: Writer, n: Node) -> None:
    w.put(n, w.emit("Expand", w.get(n.inputs[0]), integers(*n.shape)))


@row("gather")
def gather(w: Writer, n: Node) -> None:
    data, index = n.inputs
    w.put(n, w.emit("Gather", w.get(data), w.get(index), axis=n.attrs["axis"] % data.type.rank))


@row("lookup")
def lookup(w: Writer, n: Node) -> None:
    """A Gather; a negative byte k is entry 256 + k, and negative indices count from the end."""
    x, table = n.inputs
    order = any_order(w, x)
    index = w.emit("Cast", w.get(x, order), to=ELEM_TYPES[DType.i32])
    w.put(n, w.emit("Gather", w.get(table), index, axis=0), order)


@row("gather_elements")
def gather_elements(w: Writer, n: Node) -> None:
    w.put(n, w.emit("GatherElements", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank))


@row("gather_nd")
def gather_nd(w: Writer, n: Node) -> None:
    w.put(n, w.emit("GatherND", *map(w.get, n.inputs), batch_dims=n.attrs["batch_dims"]))


@row("scatter_elements")
def scatter_elements(w: Writer, n: Node) -> None:
    w.put(n, w.emit("ScatterElements", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank,
                    reduction=n.attrs["reduction"]))


@row("scatter_nd")
def scatter_nd(w: Writer, n: Node) -> None:
    w.put(n, w.emit("ScatterND", *map(w.get, n.inputs), reduction=n.attrs["reduction"]))
