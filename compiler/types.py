"""Types of the IR: element types, quantization, and the tensor type that every value has."""

from __future__ import annotations

import builtins
import enum
import math
from dataclasses import dataclass

import numpy as np

from skive.errors import ShapeError

# A tensor larger than this many elements is refused: the product of the dimensions and every byte
# offset derived from it stay far inside a signed 64-bit integer.
MAX_ELEMENTS = 2**40


class DType(enum.Enum):
    """Element type. The value is its name in the text form; `bool` is stored as one byte, 0 or 1."""

    f32 = "f32"
    f64 = "f64"
    f16 = "f16"
    i8 = "i8"
    i16 = "i16"
    i32 = "i32"
    i64 = "i64"
    u8 = "u8"
    u16 = "u16"
    u32 = "u32"
    u64 = "u64"
    bool = "bool"

    def __repr__(self) -> str:
        return self.value

    @property
    def numpy(self) -> np.dtype:
        return _NUMPY[self]

    @property
    def ctype(self) -> str:
        """The C++ element type."""
        return _CTYPE[self]

    @property
    def bytes(self) -> int:
        return _NUMPY[self].itemsize

    @property
    def is_float(self) -> builtins.bool:
        return self.value[0] == "f"

    @property
    def is_int(self) -> builtins.bool:
        return self.value[0] in "iu"

    @property
    def is_signed(self) -> builtins.bool:
        return self.value[0] in "if"

    @staticmethod
    def of(dtype: np.dtype | type) -> DType:
        """The DType of a numpy dtype; ShapeError-free, KeyError when there is none."""
        return _FROM_NUMPY[np.dtype(dtype)]


_NUMPY = {d: np.dtype(n) for d, n in {
    DType.f32: "float32", DType.f64: "float64", DType.f16: "float16", DType.i8: "int8",
    DType.i16: "int16", DType.i32: "int32", DType.i64: "int64", DType.u8: "uint8",
    DType.u16: "uint16", DType.u32: "uint32", DType.u64: "uint64", DType.bool: "bool"}.items()}
_FROM_NUMPY = {n: d for d, n in _NUMPY.items()}
_CTYPE = {DType.f32: "float", DType.f64: "double", DType.f16: "_Float16", DType.bool: "bool"} | {
    d: f"{n}_t" for d, n in _NUMPY.items() if d.value[0] in "iu"}


@dataclass(frozen=True, slots=True)
class Quant:
    """real = scale * (integer - zero_point), per tensor (axis None) or per index of `axis`.

    A shared exponent (dynamic fixed point) is the per-tensor case whose scale is a power of two.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Which weights are stored: `block4x16` or `2:4`, and the fraction of them that is zero."""

    pattern: str
    fraction: float


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape (row-major), element type and, where they apply, quantization and sparsity."""

    shape: tuple[int, ...]
    dtype: DType
    quant: Quant | None = None
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        if any(d < 0 for d in self.shape):
            raise ShapeError(f"shape {list(self.shape)} has a negative dimension")
        if math.prod(max(d, 1) for d in self.shape) > MAX_ELEMENTS:
            raise ShapeError(f"shape {list(self.shape)} has more than 2^40 elements")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.bytes

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(self.shape, dtype)

    def __str__(self) -> str:
        return f"{self.dtype.value}[{','.join(map(str, self.shape))}]"
