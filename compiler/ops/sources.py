"""Where values come from."""

from __future__ import annotations

from collections.abc import Sequence

from skive.errors import InvalidModelError
from skive.ir import FrozenDict
from skive.ops.table import REQUIRED, Array, Op
from skive.types import DType, TensorType

ROWS: list[Op] = []


def _no_reference(x: Sequence[Array], a: FrozenDict) -> Array:
    raise InvalidModelError("an input has no value of its own")


ROWS.append(Op("input", (0, 0), lambda t, a: TensorType(tuple(a["shape"]), a["dtype"]), _no_reference,
        {"shape": REQUIRED, "dtype": REQUIRED}, "source", doc="a value given by the caller"))
ROWS.append(Op("const", (0, 0), lambda t, a: TensorType(a["value"].shape, DType.of(a["value"].dtype)), lambda x, a: a["value"],
        {"value": REQUIRED}, "source", doc="a value known when the model is compiled"))
