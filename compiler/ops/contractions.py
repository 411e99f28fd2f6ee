"""Contractions of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import F32, REQUIRED, Array, Op, Reference, broadcast_shapes
from skive.types import DType, TensorType

ROWS: list[Op] = []


_NARROW = {(DType.u8, DType.i8), (DType.i8, DType.i8), (DType.i16, DType.i16)}


def product_dtype(name: str, types: Sequence[TensorType], zero: int, chain: int = 0) -> DType:
    """The element type of x w + bias: 32-bit sums of 8- and 16-bit integers, else that of x; float32 if
    a sum of 16-bit integers may need more (`chain`)."""
    x, w = types[0].dtype, types[1].dtype
    sums = DType.i32 if (x, w) in _NARROW else x
    if (sums is x and w is not x) or any(t.dtype is not sums for t in types[2:3]):
        raise ShapeError(f"{name} of {', '.join(map(str, types[:3]))}")
    if zero and (sums is x or not np.iinfo(x.numpy).min <= zero <= np.iinfo(x.numpy).max):
        raise ShapeError(f"{name} of {x.value} with the zero point {zero}")
    if chain and (chain < 0 or x is not DType.i16 or zero):
        raise ShapeError(f"{name}: chain={chain} goes with 16-bit integers and the zero point 0")
    return F32 if chain else sums


def exact(reference: Reference, *zeros: str,
           ) -> Reference:
    """`reference` on 8- and 16-bit integers: operand i minus attribute zeros[i], in float64, whose 53 bits hold
    every sum of fewer than 2^22 products; the result wraps to 32 bits, or with `chain` is rounded to float32."""

    def run(x: Sequence[Array], a: FrozenDict) -> Array:
        if x[0].dtype.kind not in "iu" or x[0].dtype.itemsize > 2:
            return reference(x, a)
        exact = reference([v.astype(np.float64) - (a[zeros[i]] if i < len(zeros) else 0) for i, v in enumerate(x)], a)
        return exact.astype(np.float32) if a.get("chain") else exact.astype(np.int64).astype(np.int32)

    return run


def _infer_matmul(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, y = types
    if x.rank < 2 or y.rank < 2:
        raise ShapeError("matmul needs operands of rank 2 or more")
    m, k = x.shape[-2:][::-1] if a["trans_a"] else x.shape[-2:]
    k2, n = y.shape[-2:][::-1] if a["trans_b"] else y.shape[-2:]
    narrow = frozenset({DType.i8, DType.u8, DType.i16})
    if k != k2 or not (x.dtype is y.dtype or {x.dtype, y.dtype} <= {DType.i8, DType.u8}):
        raise ShapeError(f"matmul of {x} and {y}")
    dtype = DType.i32 if x.dtype in narrow else x.dtype
    if dtype is x.dtype and (a["a_zero"] or a["b_zero"]):
        raise ShapeError(f"matmul of {x.dtype.value} with a zero point")
    return TensorType((*broadcast_shapes(x.shape[:-2], y.shape[:-2]), m, n), dtype)


def _ref_matmul(x: Sequence[Array], a: FrozenDict) -> Array:
    p = np.swapaxes(x[0], -1, -2) if a["trans_a"] else x[0]
    q = np.swapaxes(x[1], -1, -2) if a["trans_b"] else x[1]
    return np.matmul(p, q)


ROWS.append(Op("matmul", (2, 2), _infer_matmul, exact(_ref_matmul, "a_zero", "b_zero"),
        {"trans_a": False, "trans_b": False, "a_zero": 0, "b_zero": 0}, "contract", 1e-5,
        epilogue=2, doc="batched matrix product with broadcast batch axes"))


def _infer_linear(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, w = types[:2]
    if x.rank < 1 or w.rank != 2 or x.shape[-1] != w.shape[1] or (len(types) > 2 and types[2].shape != w.shape[:1]):
        raise ShapeError(f"linear of {', '.join(map(str, types))}")
    return TensorType((*x.shape[:-1], w.shape[0]), product_dtype("linear", types, a["zero"], a["chain"]))


ROWS.append(Op("linear", (2, 3), _infer_linear, exact(lambda x, a: x[0] @ x[1].T + (x[2] if len(x) > 2 else 0), "zero"),
        {"zero": 0, "chain": 0}, "contract", 1e-5, epilogue=3,
        doc="x w^T + b with constant w [OC, K] and b [OC]; x [..., K]; chain as for conv2d"))


def _infer_compressed(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, q, scale, zero, bias = types
    bits, group = a["bits"], a["group"]
    if bits not in (4, 8) or a["activation"] not in (8, 16, 32):
        raise ShapeError(f"compressed_linear with weights of {bits} bits and activations of {a['activation']}")
    if x.dtype is not F32 or x.rank < 1 or q.rank != 2 or q.dtype is not DType.u8 or x.shape[-1] != q.shape[1]:
        raise ShapeError(f"compressed_linear of {x} and {q}")
    oc, k = q.shape
    if k < 1 or not (group == k or (0 < group < k and group % (32 // bits) == 0)):
        raise ShapeError(f"compressed_linear: groups of {group} of {k} weights of {bits} bits")
    groups = TensorType((oc, -(-k // group)), F32)
    if scale != groups or zero != groups.with_dtype(DType.u8) or bias != TensorType((oc,), F32):
        raise ShapeError(f"compressed_linear: {q} with scale {scale}, zero point {zero} and bias {bias}")
    return TensorType((*x.shape[:-1], oc), F32)


def rounded_rows(x: Array, bits: int) -> Array:
    """The rows of `x` as compressed_linear multiplies them, in float64; `bits` of 32 leaves them alone."""
    if bits == 32 or not x.size:
        return x.astype(np.float64)
    limit = np.float32(32639 if bits == 16 else 127)
    top = np.max(np.abs(x), -1, keepdims=True)
    inverse = np.where(top > np.float32(1e-30), limit / top, np.float32(0))
    whole = np.rint(x * inverse).astype(np.float64) * (top / limit).astype(np.float64)
    return np.where(np.isfinite(x).all(-1, keepdims=True), whole, np.nan)


def compressed_weights(q: Array, scale: Array, zero: Array, group: int) -> Array:
    """[OC, K] the real numbers that the weights of a compressed_linear stand for."""
    each = np.arange(q.shape[1]) // group
    return (q.astype(np.int32) - zero[:, each].astype(np.int32)).astype(np.float32) * scale[:, each]


ROWS.append(Op("compressed_linear", (5, 5), _infer_compressed,
        lambda x, a: (rounded_rows(x[0], a["activation"])
                      @ compressed_weights(x[1], x[2], x[3], a["group"]).astype(np.float64).T + x[4]).astype(np.float32),
        {"bits": REQUIRED, "group": REQUIRED, "activation": 32}, "contract", 1e-5, epilogue=5,
        doc="linear on weights that stay integers: x' w^T + bias with w[o, k] = (q[o, k] - zero[o, g]) scale[o, g], "
            "g = k / group; operands x [..., K], q u8 [OC, K] of `bits` bits, scale and zero [OC, groups], bias [OC]. "
            "x' is x, or with activation 16 or 8 each row rounded to 32639 or 127 steps of its largest magnitude "
            "(NaN where a row is not finite)"))
