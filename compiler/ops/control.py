"""Which values are computed at all, and what a trip of a loop leaves to the next."""

from __future__ import annotations

from collections.abc import Sequence

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import BOOL, Op
from skive.types import TensorType

ROWS: list[Op] = []


def _infer_choose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype is not BOOL or types[0].size != 1 or types[1] != types[2]:
        raise ShapeError(f"choose needs one bool and two operands of one type, not {', '.join(map(str, types))}")
    return types[1]


ROWS.append(Op("choose", (3, 3), _infer_choose, lambda x, a: x[1] if bool(x[0].reshape(-1)[0]) else x[2], {}, "control",
        doc="a if the condition, one bool, holds, else b; what only the other operand needs is not computed"))
ROWS.append(Op("copy", (1, 1), lambda types, a: types[0], lambda x, a: x[0], {}, "control",
        doc="its operand, in other memory: what one trip of a loop leaves to the next"))
