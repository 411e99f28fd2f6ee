"""Indexing: elements read or written at places that other values name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import Array, Op, axis_within
from skive.types import DType, TensorType

ROWS: list[Op] = []


def _wrap(idx: Array, n: int) -> Array:
    """Negative indices count from the end; anything still outside is clamped (memory safety)."""
    idx = idx.astype(np.int64)
    return np.clip(np.where(idx < 0, idx + n, idx), 0, max(n - 1, 0))


def _infer_gather(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    axis = axis_within(a["axis"], data.rank, "gather")
    if data.shape[axis] == 0 and idx.size:
        raise ShapeError("gather from an empty axis")
    return TensorType(data.shape[:axis] + idx.shape + data.shape[axis + 1:], data.dtype)


def _infer_gather_elements(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    axis = axis_within(a["axis"], data.rank, "gather_elements")
    if idx.rank != data.rank or any(i > d for k, (i, d) in enumerate(zip(idx.shape, data.shape, strict=True)) if k != axis):
        raise ShapeError(f"gather_elements: indices {idx} do not fit {data}")
    return TensorType(idx.shape, data.dtype)


def _ref_gather_elements(x: Sequence[Array], a: FrozenDict) -> Array:
    data, idx = x
    axis = a["axis"] % data.ndim
    grid: list[Array] = list(np.indices(idx.shape, sparse=True))
    grid[axis] = _wrap(idx, data.shape[axis])
    return data[tuple(grid)]


def _infer_gather_nd(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    b = a["batch_dims"]
    if idx.rank < 1 or b >= min(idx.rank, data.rank) or idx.shape[-1] > data.rank - b or data.shape[:b] != idx.shape[:b]:
        raise ShapeError(f"gather_nd: indices {idx} do not fit {data}")
    return TensorType(idx.shape[:-1] + data.shape[b + idx.shape[-1]:], data.dtype)


def _nd_index(idx: Array, shape: tuple[int, ...], batch: int) -> tuple[Array, ...]:
    grids: list[Array] = list(np.indices(idx.shape[:-1], sparse=True)[:batch]) if batch else []
    return (*grids, *(_wrap(idx[..., k], shape[batch + k]) for k in range(idx.shape[-1])))


def _infer_scatter_elements(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx, upd = types
    axis = axis_within(a["axis"], data.rank, "scatter_elements")
    if idx.shape != upd.shape or idx.rank != data.rank or upd.dtype is not data.dtype or any(
            i > d for k, (i, d) in enumerate(zip(idx.shape, data.shape, strict=True)) if k != axis):
        raise ShapeError(f"scatter_elements: indices {idx} and updates {upd} do not fit {data}")
    return data


def _scatter(data: Array, index: tuple[Array, ...], upd: Array, reduction: str) -> Array:
    out = data.copy()
    index = tuple(np.broadcast_to(i, np.broadcast_shapes(*(j.shape for j in index))) for i in index)
    if reduction == "none":
        out[index] = upd
    else:
        {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[reduction].at(out, index, upd)
    return out


def _ref_scatter_elements(x: Sequence[Array], a: FrozenDict) -> Array:
    data, idx, upd = x
    axis = a["axis"] % data.ndim
    grid: list[Array] = list(np.indices(idx.shape, sparse=True))
    grid[axis] = _wrap(idx, data.shape[axis])
    return _scatter(data, tuple(grid), upd, a["reduction"])


def _infer_scatter_nd(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx, upd = types
    if (idx.rank < 1 or idx.shape[-1] > data.rank or upd.dtype is not data.dtype
            or upd.shape != idx.shape[:-1] + data.shape[idx.shape[-1]:]):
        raise ShapeError(f"scatter_nd: indices {idx} and updates {upd} do not fit {data}")
    return data


def _infer_lookup(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, table = types
    if x.dtype not in (DType.u8, DType.i8) or table.shape != (256,):
        raise ShapeError(f"lookup of {x} in {table}")
    return x.with_dtype(table.dtype)


ROWS.append(Op("gather", (2, 2), _infer_gather, lambda x, a: np.take(x[0], _wrap(x[1], x[0].shape[a["axis"]]), a["axis"]),
        {"axis": 0}, "index", doc="data taken at indices along an axis; negative indices count from the end"))
ROWS.append(Op("lookup", (2, 2), _infer_lookup, lambda x, a: x[1][x[0].view(np.uint8)], {}, "index",
        doc="table[x] for x of 8 bits and 256 entries: any function of one byte; a signed x indexes by its bits, so that "
            "entry 255 belongs to -1"))
ROWS.append(Op("gather_elements", (2, 2), _infer_gather_elements, _ref_gather_elements, {"axis": 0}, "index",
        doc="result[i][j] = data[index[i][j]][j] for axis 0"))
ROWS.append(Op("gather_nd", (2, 2), _infer_gather_nd, lambda x, a: x[0][_nd_index(x[1], x[0].shape, a["batch_dims"])],
        {"batch_dims": 0}, "index", doc="slices of data at index tuples"))
ROWS.append(Op("scatter_elements", (3, 3), _infer_scatter_elements, _ref_scatter_elements, {"axis": 0, "reduction": "none"},
        "index", 1e-6, doc="data with updates written (or reduced) at indices along an axis"))
ROWS.append(Op("scatter_nd", (3, 3), _infer_scatter_nd,
        lambda x, a: _scatter(x[0], _nd_index(x[1], x[0].shape, 0), x[2], a["reduction"]),
        {"reduction": "none"}, "index", 1e-6, doc="data with slices written (or reduced) at index tuples"))
