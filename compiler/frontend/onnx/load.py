"""Model files: reading one without trusting it, and its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper

from skive.errors import InvalidModelError
from skive.types import MAX_ELEMENTS, DType

DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: DType.f32, TensorProto.DOUBLE: DType.f64, TensorProto.FLOAT16: DType.f16,
    TensorProto.INT8: DType.i8, TensorProto.INT16: DType.i16, TensorProto.INT32: DType.i32,
    TensorProto.INT64: DType.i64, TensorProto.UINT8: DType.u8, TensorProto.UINT16: DType.u16,
    TensorProto.UINT32: DType.u32, TensorProto.UINT64: DType.u64, TensorProto.BOOL: DType.bool}
ELEM_TYPES = {d: e for e, d in DTYPES.items()}


def load_model(model: str | Path | ModelProto) -> tuple[ModelProto, Path | None]:
    """The model and the folder of its external data; InvalidModelError if it is not an ONNX model."""
    if isinstance(model, ModelProto):
        return model, None
    path = Path(model)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InvalidModelError(f"{path}: {e.strerror or e}") from None
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise InvalidModelError(f"{path}: not an ONNX model, or a damaged one") from None
    return proto, path.parent


def tensor_array(tensor: TensorProto, folder: Path | None) -> np.ndarray:
    """The value of an initialiser or tensor attribute."""
    return numpy_helper.to_array(tensor, base_dir=str(folder or ""))


def model_sha256(model: str | Path | ModelProto) -> str:
    """SHA-256 (hexadecimal) of the model."""
    proto, _ = load_model(model)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
