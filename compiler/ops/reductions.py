"""Reductions, running sums and orders along axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.elementwise import trunc_div
from skive.ops.table import ANY, I64, NUMBERS, REQUIRED, Array, Op, Reference, axis_within
from skive.types import DType, TensorType

ROWS: list[Op] = []
_name: str
_fn: Callable[..., Array]


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    return tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)


def _reduction(name: str, fn: Callable[..., Array], domain: frozenset[DType], tolerance: float, doc: str) -> None:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        t = types[0]
        if t.dtype not in domain:
            raise ShapeError(f"{name} is not defined for {t.dtype.value}")
        axes = tuple(axis_within(x, t.rank, name) for x in a["axes"])
        empty = any(t.shape[x] == 0 for x in axes) and all(d for i, d in enumerate(t.shape) if i not in axes)
        if empty and name in ("reduce_max", "reduce_min"):
            raise ShapeError(f"{name} of an empty axis has no value")
        return TensorType(_reduced_shape(t.shape, axes, a["keep"]), t.dtype)

    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        v = x[0].astype(np.float64) if x[0].dtype.kind == "f" else x[0]
        if not a["axes"]:
            return x[0]
        return np.asarray(fn(v, axis=tuple(a["axes"]), keepdims=a["keep"])).astype(x[0].dtype)

    ROWS.append(Op(name, (1, 1), rule, reference, {"axes": REQUIRED, "keep": True}, "reduce", tolerance, doc=doc))


def _mean(v: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    if v.dtype.kind == "f":
        return np.mean(v, axis=axis, keepdims=keepdims)
    n = math.prod(v.shape[i] for i in axis)
    return trunc_div(np.sum(v, axis=axis, keepdims=keepdims, dtype=v.dtype), np.asarray(max(n, 1), v.dtype))


_reduction("reduce_sum", lambda v, axis, keepdims: np.sum(v, axis=axis, keepdims=keepdims, dtype=v.dtype), NUMBERS, 1e-5,
           "sum over axes")
_reduction("reduce_mean", _mean, NUMBERS, 1e-5, "mean over axes")
_reduction("reduce_prod", lambda v, axis, keepdims: np.prod(v, axis=axis, keepdims=keepdims, dtype=v.dtype), NUMBERS, 1e-5,
           "product over axes")
_reduction("reduce_max", np.max, ANY, 0.0, "largest over axes")
_reduction("reduce_min", np.min, ANY, 0.0, "smallest over axes")


def _infer_arg(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    axis = axis_within(a["axis"], types[0].rank, "argmax")
    if types[0].shape[axis] == 0:
        raise ShapeError("argmax of an empty axis has no value")
    return TensorType(_reduced_shape(types[0].shape, (axis,), a["keep"]), I64)


def _ref_arg(fn: Callable[..., Array]) -> Reference:
    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        v, axis = x[0], a["axis"]
        r = fn(np.flip(v, axis), axis=axis) if a["last"] else fn(v, axis=axis)
        r = v.shape[axis] - 1 - r if a["last"] else r
        return np.expand_dims(r, axis) if a["keep"] else r

    return reference


for _name, _fn in [("argmax", np.argmax), ("argmin", np.argmin)]:
    ROWS.append(Op(_name, (1, 1), _infer_arg, _ref_arg(_fn), {"axis": REQUIRED, "keep": True, "last": False}, "reduce",
            doc=f"index of the {'largest' if _name == 'argmax' else 'smallest'} element, the first (or last) of equals"))


def _infer_scan(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    axis_within(a["axis"], types[0].rank, "cumulative")
    return types[0]


def _cumulative(fn: Callable[..., Array], neutral: int) -> Reference:
    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        axis = a["axis"]
        v = np.flip(x[0], axis) if a["reverse"] else x[0]
        r = fn(v.astype(np.float64) if v.dtype.kind == "f" else v, axis=axis)
        if a["exclusive"]:
            r = np.roll(r, 1, axis)
            first = [slice(None)] * r.ndim
            first[axis] = slice(0, 1)
            r[tuple(first)] = neutral
        return (np.flip(r, axis) if a["reverse"] else r).astype(x[0].dtype)

    return reference


_scans: list[tuple[str, Callable[..., Array], int]] = [("cumsum", np.cumsum, 0), ("cumprod", np.cumprod, 1)]
for _name, _fn, _zero in _scans:
    ROWS.append(Op(_name, (1, 1), _infer_scan, _cumulative(_fn, _zero),
            {"axis": REQUIRED, "exclusive": False, "reverse": False}, "reduce", 1e-5,
            doc=f"running {'sum' if _zero == 0 else 'product'} along an axis"))


def _infer_topk(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if t.rank == 0 or not 0 <= a["k"] <= t.shape[-1]:
        raise ShapeError(f"topk: k = {a['k']} of {t}")
    return TensorType((*t.shape[:-1], a["k"]), t.dtype)


def _topk_order(v: Array, a: FrozenDict) -> Array:
    if a["largest"]:
        order = v.shape[-1] - 1 - np.argsort(v[..., ::-1], axis=-1, kind="stable")[..., ::-1]
    else:
        order = np.argsort(v, axis=-1, kind="stable")
    return order[..., :a["k"]]


ROWS.append(Op("topk_values", (1, 1), _infer_topk, lambda x, a: np.take_along_axis(x[0], _topk_order(x[0], a), -1),
        {"k": REQUIRED, "largest": True}, "reduce", doc="the k largest (smallest) of the last axis, sorted"))
ROWS.append(Op("topk_indices", (1, 1), lambda t, a: TensorType(_infer_topk(t, a).shape, I64), lambda x, a: _topk_order(x[0], a),
        {"k": REQUIRED, "largest": True}, "reduce", doc="where topk_values come from; the lower index first among equals"))
