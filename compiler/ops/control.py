"""Which values are computed at all, and what a trip of a loop leaves to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.table import BOOL, REQUIRED, Op
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


def _infer_sample(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if not types[0].rank or not types[0].shape[0]:
        raise ShapeError(f"sample needs an operand with an axis of samples, not {types[0]}")
    return TensorType((1, *types[0].shape[1:]), types[0].dtype)


def _infer_batch(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].shape[:1] != (1,) or a["samples"] < 1:
        raise ShapeError(f"batch of {a['samples']} needs an operand whose first dimension is 1, not {types[0]}")
    return TensorType((a["samples"], *types[0].shape[1:]), types[0].dtype)


# Between these two a graph is lowered once for each sample (lower/batches.py); evaluated, they stand for equal samples.
ROWS.append(Op("sample", (1, 1), _infer_sample, lambda x, a: x[0][:1], {}, "control",
        doc="one sample of a batch whose first layers run for one after the other"))
ROWS.append(Op("batch", (1, 1), _infer_batch, lambda x, a: np.repeat(x[0], a["samples"], 0), {"samples": REQUIRED},
        "control", doc="what those layers gave for each of `samples` samples"))
