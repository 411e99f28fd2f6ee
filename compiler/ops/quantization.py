"""Between float32 and stored integers: real = scale (integer - zero)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import F32, QUANTIZED, REQUIRED, Array, Op, Reference, broadcast_shapes
from skive.types import DType, TensorType

ROWS: list[Op] = []


def saturate(v: Array, zero: Array, to: DType) -> Array:
    """round_even(v) + zero within the range of `to`; v is float32, NaN gives the lowest value."""
    limits = np.iinfo(to.numpy)
    z = zero.astype(np.float32)
    low = np.float32(limits.min) - z
    v = np.where(v > low, np.minimum(v, np.float32(limits.max) - z), low)
    return (np.rint(v).astype(np.int32) + zero.astype(np.int32)).astype(to.numpy)


def _ref_requantize_fixed(x: Sequence[Array], a: FrozenDict) -> Array:
    v, multiplier, shift, zero = (i.astype(np.int64) for i in x)
    limits = np.iinfo(a["to"].numpy)
    return np.clip(((v * multiplier + (np.int64(1) << (shift - 1))) >> shift) + zero, limits.min, limits.max)


def _quantization(name: str, sources: frozenset[DType], others: tuple[DType, ...], reference: Reference, doc: str,
                  results: frozenset[DType] = QUANTIZED) -> None:
    """A row whose operands are x (of `sources`), `others`, and the zero point in the type of the result `to`."""

    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        got = [t.dtype for t in types]
        if a["to"] not in results or got[0] not in sources or got[1:] != [*others, a["to"]]:
            raise ShapeError(f"{name} to {a['to'].value} of {', '.join(map(str, types))}")
        return TensorType(broadcast_shapes(*(t.shape for t in types)), a["to"])

    arity = 2 + len(others)
    ROWS.append(Op(name, (arity, arity), rule, reference, {"to": REQUIRED}, "elementwise", 0.0, name, doc=doc))


_quantization("quantize", frozenset({F32}), (F32,), lambda x, a: saturate(x[0] / x[1], x[2], a["to"]),
              "saturate(round_even(x / scale) + zero), operands x, scale, zero; NaN gives the lowest value "
              "(ONNX QuantizeLinear)")
_quantization("requantize", frozenset({F32, DType.i32}), (F32,),
              lambda x, a: saturate(x[0].astype(np.float32) * x[1], x[2], a["to"]),
              "saturate(round_even(f32(x) factor) + zero), operands x, factor, zero")
_quantization("requantize_fixed", frozenset({DType.i32}), (DType.i32, DType.i32), _ref_requantize_fixed,
              "saturate(((i64(x) multiplier + 2^(shift-1)) >> shift) + zero), operands x, multiplier, shift in 1..62, "
              "zero; no float instruction", QUANTIZED | {DType.i32})


def _infer_dequantize(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    q, scale, zero = types
    if q.dtype not in QUANTIZED | {DType.i32} or scale.dtype is not F32 or zero.dtype is not q.dtype:
        raise ShapeError(f"dequantize of {', '.join(map(str, types))}")
    return TensorType(broadcast_shapes(q.shape, scale.shape, zero.shape), F32)


ROWS.append(Op("dequantize", (3, 3), _infer_dequantize,
        lambda x, a: (x[0].astype(np.int32) - x[2].astype(np.int32)).astype(np.float32) * x[1], {}, "elementwise", 0.0,
        "dequantize", doc="f32(q - zero) scale, the difference in 32 bits; operands q, scale, zero (ONNX DequantizeLinear)"))
