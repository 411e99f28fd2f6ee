"""Attention, in floating point and of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.quantization import saturate
from skive.ops.table import F32, REQUIRED, Array, Op, broadcast_shapes
from skive.types import DType, TensorType

ROWS: list[Op] = []


def heads_first(shape: Sequence[int], token_major: bool) -> tuple[int, ...]:
    """[B, heads, N, D] of an attention operand, whichever of its two layouts it has."""
    return (shape[0], shape[2], shape[1], shape[3]) if token_major else tuple(shape)


def _infer_attention(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if any(t.rank != 4 for t in types[:3]):
        raise ShapeError(f"attention of {', '.join(map(str, types))}")
    q, k, v = (heads_first(t.shape, a["token_major"]) for t in types[:3])
    if q[3] != k[3] or k[:3] != v[:3] or q[:2] != k[:2]:
        raise ShapeError(f"attention of {', '.join(map(str, types))}")
    full = (*q[:3], k[2])
    if len(types) > 3 and broadcast_shapes(types[3].shape, full) != full:
        raise ShapeError(f"attention mask {types[3]} does not broadcast to {list(full)}")
    return TensorType(heads_first((*q[:3], v[3]), a["token_major"]), types[0].dtype)


def _ref_attention(x: Sequence[Array], a: FrozenDict) -> Array:
    q, k, v = (v.astype(np.float64) for v in x[:3])
    if a["token_major"]:
        q, k, v = (np.swapaxes(v, 1, 2) for v in (q, k, v))
    s = q @ np.swapaxes(k, -1, -2) * a["scale"]
    if len(x) > 3:
        s = s + x[3]
    if a["causal"]:
        s = np.where(np.tril(np.ones(s.shape[-2:], bool), 0), s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    if a["levels"]:
        e = np.rint(e * a["levels"])
    y = e / e.sum(-1, keepdims=True) @ v
    return (np.swapaxes(y, 1, 2) if a["token_major"] else y).astype(x[0].dtype)


ROWS.append(Op("attention", (3, 4), _infer_attention, _ref_attention,
        {"scale": REQUIRED, "causal": False, "token_major": False, "levels": 0}, "contract", 1e-5,
        doc="softmax(q k^T scale + mask) v on [B, heads, N, D], or [B, N, heads, D] if token_major (Vaswani et al.: "
            "Attention Is All You Need, 2017). With levels, exp(s - max s) of each score s is rounded to a multiple of "
            "1 / levels before its row is divided by its sum: what quantized_attention computes"))


def _infer_quantized_attention(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if any(t.dtype is not DType.u8 for t in types[:3]) or any(t.dtype is not F32 for t in types[3:]):
        raise ShapeError(f"quantized_attention of {', '.join(map(str, types))}")
    if a["to"] not in (F32, DType.u8):
        raise ShapeError(f"quantized_attention to {a['to'].value}")
    return TensorType(_infer_attention(types, a).shape, a["to"])


def _byte_exponentials(x: Array) -> Array:
    """255 * 2^x of exponentials.h, for float32 x <= 0, in its 16-bit fixed point: whole numbers, NaN gives 0."""

    def product(a: Array, b: Array | int) -> Array:
        return (a * b + (1 << 14)) >> 15

    x = x * np.float32(2048)
    t = np.rint(np.where(x > np.float32(-32768), x, np.float32(-32768))).astype(np.int64)
    n = (t + 1024) >> 11
    h = 32 * (t - 2048 * n)
    r: Array = np.int64(111)  # type: ignore[assignment]
    for c in (988, 5658, 16320):
        r = product(h, r) + c
    return product(r, np.where(n < -9, 0, 512 >> np.minimum(-n, 9)))


def _ref_quantized_attention(x: Sequence[Array], a: FrozenDict) -> Array:
    q, k, v = (i.astype(np.float64) - a[zero] for i, zero in zip(x[:3], ("q_zero", "k_zero", "v_zero"), strict=True))
    if a["token_major"]:
        q, k, v = (np.swapaxes(i, 1, 2) for i in (q, k, v))
    s = (q @ np.swapaxes(k, -1, -2)).astype(np.float32)  # whole numbers: exact in float64
    exponent = np.float32(np.float64(np.float32(a["scale"])) * np.log2(np.e))
    if len(x) > 3:
        s, exponent = s * np.float32(a["scale"]) + x[3], np.float32(np.log2(np.e))
    if a["causal"]:
        s = np.where(np.tril(np.ones(s.shape[-2:], bool), 0), s, np.float32(-np.inf))
    with np.errstate(invalid="ignore"):  # rows of -inf
        p = _byte_exponentials((s - s.max(-1, keepdims=True)) * exponent)
    factor = np.float32(a["factor"]) / p.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    y = (p.astype(np.float64) @ v).astype(np.float32) * factor
    y = np.swapaxes(y, 1, 2) if a["token_major"] else y
    return y if a["to"] is F32 else saturate(y, np.asarray(a["y_zero"], np.uint8), a["to"])


ROWS.append(Op("quantized_attention", (3, 4), _infer_quantized_attention, _ref_quantized_attention,
        {"scale": REQUIRED, "factor": REQUIRED, "q_zero": 0, "k_zero": 0, "v_zero": 0, "y_zero": 0, "to": F32,
         "causal": False, "token_major": False}, "contract", 0.0,
        doc="attention of u8 operands q, k, v. s = sum of (q - q_zero)(k - k_zero), scaled (and masked); weights "
            "p = 255 exp(s - max s), rounded; sum of p (v - v_zero), times factor / sum of p, to `to` plus y_zero. "
            "exp is 2^x by a polynomial in 16-bit fixed point, so that p is exactly defined "
            "(kernels/include/skive/exponentials.h)"))
