"""Data movement: the same elements in another shape, order or place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import REQUIRED, Array, Op, axis_within, broadcast_shapes
from skive.types import TensorType

ROWS: list[Op] = []


def _infer_reshape(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if math.prod(a["shape"]) != types[0].size:
        raise ShapeError(f"reshape of {types[0]} to {list(a['shape'])} changes the number of elements")
    return TensorType(tuple(a["shape"]), types[0].dtype)


def _infer_transpose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    perm = a["perm"]
    if sorted(perm) != list(range(types[0].rank)):
        raise ShapeError(f"transpose: {list(perm)} is not a permutation of rank {types[0].rank}")
    return TensorType(tuple(types[0].shape[p] for p in perm), types[0].dtype)


def _slices(a: FrozenDict) -> tuple[slice, ...]:
    out = []
    for start, size, step in zip(a["start"], a["size"], a["step"], strict=True):
        stop = start + size * step
        out.append(slice(start, stop if stop >= 0 else None, step))
    return tuple(out)


def _infer_slice(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if not len(a["start"]) == len(a["size"]) == len(a["step"]) == t.rank:
        raise ShapeError("slice: start, size and step need one entry per axis")
    for d, start, size, step in zip(t.shape, a["start"], a["size"], a["step"], strict=True):
        last = start + (size - 1) * step
        if size and (step == 0 or not (0 <= start < d and 0 <= last < d)):
            raise ShapeError(f"slice of {t} leaves the tensor")
    return TensorType(tuple(a["size"]), t.dtype)


def _ref_slice(x: Sequence[Array], a: FrozenDict) -> Array:
    if 0 in a["size"]:
        return np.zeros(a["size"], x[0].dtype)
    return x[0][_slices(a)]


def _infer_concat(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    axis = axis_within(a["axis"], types[0].rank, "concat")
    first = types[0]
    for t in types:
        if t.dtype is not first.dtype or t.rank != first.rank or any(
                p != q for i, (p, q) in enumerate(zip(t.shape, first.shape, strict=True)) if i != axis):
            raise ShapeError(f"concat along axis {axis} of {', '.join(map(str, types))}")
    shape = list(first.shape)
    shape[axis] = sum(t.shape[axis] for t in types)
    return TensorType(tuple(shape), first.dtype)


def _infer_pad(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if len(a["before"]) != t.rank or len(a["after"]) != t.rank:
        raise ShapeError("pad: before and after need one entry per axis")
    shape = []
    for d, b, e in zip(t.shape, a["before"], a["after"], strict=True):
        if b < 0 or e < 0:
            raise ShapeError("pad: negative pads are slices")
        if a["mode"] == "reflect" and d and max(b, e) >= d:
            raise ShapeError("pad: reflection is wider than the tensor")
        if a["mode"] != "constant" and d == 0 and b + e:
            raise ShapeError("pad: nothing to repeat in an empty tensor")
        shape.append(d + b + e)
    return TensorType(tuple(shape), t.dtype)


def _ref_pad(x: Sequence[Array], a: FrozenDict) -> Array:
    widths = list(zip(a["before"], a["after"], strict=True))
    if not widths:  # numpy cannot pad a tensor without axes
        return x[0]
    if a["mode"] == "constant":
        return np.pad(x[0], widths, constant_values=a["value"])
    return np.pad(x[0], widths, mode=a["mode"])


def _infer_expand(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    shape = tuple(a["shape"])
    if broadcast_shapes(types[0].shape, shape) != shape:
        raise ShapeError(f"expand of {types[0]} to {list(shape)}")
    return TensorType(shape, types[0].dtype)


ROWS.append(Op("reshape", (1, 1), _infer_reshape, lambda x, a: x[0].reshape(a["shape"]), {"shape": REQUIRED}, "movement",
        doc="the same elements in another shape; no data moves"))
ROWS.append(Op("transpose", (1, 1), _infer_transpose, lambda x, a: np.array(x[0].transpose(a["perm"]), order="C"),
        {"perm": REQUIRED}, "movement", doc="axes permuted: result axis i is operand axis perm[i]"))
ROWS.append(Op("slice", (1, 1), _infer_slice, _ref_slice, {"start": REQUIRED, "size": REQUIRED, "step": REQUIRED}, "movement",
        doc="per axis `size` elements from `start`, `step` apart (negative steps reverse)"))
ROWS.append(Op("concat", (1, 4096), _infer_concat, lambda x, a: np.concatenate(x, a["axis"]), {"axis": REQUIRED}, "movement",
        doc="operands joined along an axis"))
ROWS.append(Op("pad", (1, 1), _infer_pad, _ref_pad, {"before": REQUIRED, "after": REQUIRED, "value": 0.0, "mode": "constant"},
        "movement", doc="elements added around a tensor: constant, reflect, edge or wrap"))
ROWS.append(Op("expand", (1, 1), _infer_expand, lambda x, a: np.broadcast_to(x[0], a["shape"]).copy(), {"shape": REQUIRED},
        "movement", doc="broadcast made real"))
