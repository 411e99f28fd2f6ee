"""Normalisations, in floating point and in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import QUANTIZED, REQUIRED, Array, Op, axis_within
from skive.types import DType, TensorType

ROWS: list[Op] = []


def _infer_softmax(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if "axis" in a:  # an attribute that is missing is found elsewhere
        axis_within(a["axis"], types[0].rank, "softmax")
    if not types[0].dtype.is_float:
        raise ShapeError(f"softmax is not defined for {types[0].dtype.value}; cast to float32 first")
    return types[0]


def _ref_softmax(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.float64)
    e = np.exp(v - np.max(v, axis=a["axis"], keepdims=True)) if v.size else v
    return (e / np.sum(e, axis=a["axis"], keepdims=True)).astype(x[0].dtype)


def _ref_log_softmax(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.float64)
    v = v - np.max(v, axis=a["axis"], keepdims=True) if v.size else v
    return (v - np.log(np.sum(np.exp(v), axis=a["axis"], keepdims=True))).astype(x[0].dtype)


ROWS.append(Op("softmax", (1, 1), _infer_softmax, _ref_softmax, {"axis": -1}, "normalize", 4e-6,
        doc="exp(x) / sum(exp(x)) along an axis"))
ROWS.append(Op("log_softmax", (1, 1), _infer_softmax, _ref_log_softmax, {"axis": -1}, "normalize", 4e-6,
        doc="log(softmax(x))"))


def _infer_norm(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x = types[0]
    tail = x.shape[axis_within(a["axis"], x.rank, "norm"):]
    if any(t.shape != tail for t in types[1:]) or not x.dtype.is_float:
        raise ShapeError(f"norm over {list(tail)} with {', '.join(map(str, types[1:]))}")
    return x


def _ref_layer_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.float64)
    axes = tuple(range(a["axis"] % v.ndim, v.ndim))
    d = v - v.mean(axes, keepdims=True)
    y = d / np.sqrt((d * d).mean(axes, keepdims=True) + a["eps"]) * x[1]
    return (y + (x[2] if len(x) > 2 else 0)).astype(x[0].dtype)


def _ref_rms_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.float64)
    axes = tuple(range(a["axis"] % v.ndim, v.ndim))
    return (v / np.sqrt((v * v).mean(axes, keepdims=True) + a["eps"]) * x[1]).astype(x[0].dtype)


def _ref_l2_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.float64)
    axes = tuple(range(a["axis"] % v.ndim, v.ndim))
    return (v / np.maximum(np.sqrt((v * v).sum(axes, keepdims=True)), a["least"])).astype(x[0].dtype)


def _infer_group_norm(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x = types[0]
    if x.rank < 3 or x.dtype is not DType.f32 or any(t != TensorType(x.shape[-1:], x.dtype) for t in types[1:]):
        raise ShapeError(f"group_norm of {', '.join(map(str, types))}")
    if a["groups"] < 1 or x.shape[-1] % a["groups"]:
        raise ShapeError(f"group_norm with {a['groups']} groups of {x}")
    return x


def _ref_group_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    shape = x[0].shape
    v = x[0].astype(np.float64).reshape(shape[0], -1, a["groups"], shape[-1] // a["groups"])
    d = v - v.mean((1, 3), keepdims=True)
    y = (d / np.sqrt((d * d).mean((1, 3), keepdims=True) + a["eps"])).reshape(shape) * x[1]
    return (y + (x[2] if len(x) > 2 else 0)).astype(x[0].dtype)


def _infer_integer_softmax(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, table = types
    if x.dtype not in (DType.u8, DType.i8) or table != TensorType((256,), DType.u32) \
            or a["to"] not in QUANTIZED | {DType.i32}:
        raise ShapeError(f"integer_softmax to {a['to'].value} of {x} with exponentials {table}")
    if not 1 <= a["levels"] < 2**31:
        raise ShapeError(f"integer_softmax with {a['levels']} levels")
    axis_within(a["axis"], x.rank, "integer_softmax")
    return x.with_dtype(a["to"])


def _ref_integer_softmax(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.int64)
    e = x[1][np.max(v, a["axis"], keepdims=True) - v].astype(np.uint64) if v.size else v.astype(np.uint64)
    inverse = np.uint64(a["levels"] << 32) // np.maximum(e.sum(a["axis"], dtype=np.uint64, keepdims=True), np.uint64(1))
    y = ((e * inverse + np.uint64(2**31)) >> np.uint64(32)).astype(np.int64) + a["zero"]
    limits = np.iinfo(a["to"].numpy)
    return np.clip(y, limits.min, limits.max).astype(a["to"].numpy)


ROWS.append(Op("integer_softmax", (2, 2), _infer_integer_softmax, _ref_integer_softmax,
        {"axis": -1, "levels": REQUIRED, "zero": 0, "to": REQUIRED}, "normalize", 0.0,
        doc="softmax of bytes without a float instruction: e = table[max x - x], r = floor(levels 2^32 / sum e), "
            "saturate(((e r + 2^31) >> 32) + zero); operands x and the u32 table of 2^F exp(-k scale); levels is 1 / scale "
            "of the result (after Kim et al.: I-BERT, 2021)"))


def integer_norm_limit(dtype: DType) -> int:
    """Rows of integers of type `dtype` that integer_layer_norm takes are shorter."""
    return int(2 ** (31 - 8 * dtype.bytes))


def _infer_integer_layer_norm(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, scale, bias = types
    tail = TensorType(x.shape[axis_within(a["axis"], x.rank, "integer_layer_norm"):], DType.i32)
    if x.dtype not in QUANTIZED or a["to"] not in QUANTIZED or scale not in (tail, TensorType((), DType.i32)) \
            or bias != scale or tail.size >= integer_norm_limit(x.dtype):
        raise ShapeError(f"integer_layer_norm to {a['to'].value} of {', '.join(map(str, types))}")
    if not (16 <= a["shift"] <= 46 and 1 <= a["eps"] < 2**60):
        raise ShapeError(f"integer_layer_norm with eps {a['eps']} and shift {a['shift']}")
    if a["x_zero"] and (a["centred"] or not np.iinfo(x.dtype.numpy).min <= a["x_zero"] <= np.iinfo(x.dtype.numpy).max):
        raise ShapeError(f"integer_layer_norm about {a['x_zero']}")
    return x.with_dtype(a["to"])


def _ref_integer_layer_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    n = math.prod(x[0].shape[a["axis"] % x[0].ndim:])
    v = x[0].astype(np.int64).reshape(-1, n) - a["x_zero"]
    scale, bias = (p.astype(np.int64).reshape(-1) for p in x[1:])
    total = v.sum(1, keepdims=True) * a["centred"]
    variance = n * (v * v).sum(1, keepdims=True) - total * total + a["eps"]
    bits = np.zeros_like(variance)
    for _ in range(30):
        small = variance < 2**60
        variance, bits = np.where(small, variance << 2, variance), bits + small
    root = np.frompyfunc(math.isqrt, 1, 1)(variance).astype(np.int64) if v.size else variance
    z = ((n * v - total) * (np.int64(2**61) // root) + (np.int64(1) << (45 - bits))) >> (46 - bits)
    y = ((z * scale + (bias << (a["shift"] - 15)) + (np.int64(1) << (a["shift"] - 1))) >> a["shift"]) + a["zero"]
    limits = np.iinfo(a["to"].numpy)
    return np.clip(y, limits.min, limits.max).astype(a["to"].numpy).reshape(x[0].shape)


ROWS.append(Op("integer_layer_norm", (3, 3), _infer_integer_layer_norm, _ref_integer_layer_norm,
        {"axis": -1, "centred": True, "x_zero": 0, "eps": REQUIRED, "shift": REQUIRED, "zero": 0, "to": REQUIRED},
        "normalize", 0.0,
        doc="layer normalisation of integers without a float instruction, over the axes from `axis`: with s and q the sums "
            "of x - x_zero and its square of N values, s = 0 unless centred (that is rms_norm and l2_norm), "
            "z = (N (x - x_zero) - s) / sqrt(N q - s^2 + eps) with 15 fraction bits, "
            "saturate(((z scale + bias 2^(shift-15) + 2^(shift-1)) >> shift) + zero); each rounding as in norm.h; scale and "
            "bias i32, of each value or one of all (after Kim et al.: I-BERT, 2021)"))
ROWS.append(Op("layer_norm", (2, 3), _infer_norm, _ref_layer_norm, {"axis": -1, "eps": 1e-5}, "normalize", 1e-5,
        epilogue=3, doc="(x - mean) / sqrt(var + eps) scale + bias over the axes from `axis` (Ba, Kiros, Hinton: Layer Normalization, 2016)"))
ROWS.append(Op("rms_norm", (2, 2), _infer_norm, _ref_rms_norm, {"axis": -1, "eps": 1e-5}, "normalize", 1e-5,
        epilogue=2, doc="x / sqrt(mean(x^2) + eps) scale (Zhang, Sennrich: Root Mean Square Layer Normalization, 2019)"))
ROWS.append(Op("l2_norm", (1, 1), _infer_norm, _ref_l2_norm, {"axis": -1, "least": 0.0}, "normalize", 1e-5,
        epilogue=1, doc="x / max(sqrt(sum(x^2)), least) over the axes from `axis`"))
ROWS.append(Op("group_norm", (2, 3), _infer_group_norm, _ref_group_norm, {"groups": REQUIRED, "eps": 1e-5}, "normalize", 1e-5,
        epilogue=3, doc="(x - mean) / sqrt(var + eps) scale + bias of x [N, ..., C], mean and variance over all places and the "
                        "C / groups channels of a group (Wu, He: Group Normalization, 2018); a channel each is instance "
                        "normalisation (Ulyanov, Vedaldi, Lempitsky: Instance Normalization, 2016)"))
