"""A row of the op table, the table, and what follows from it: checked nodes, types, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive import expr as expressions
from skive.errors import InvalidModelError, ShapeError
from skive.ir import FrozenDict, Node
from skive.types import DType, TensorType

Array = np.ndarray
Rule = Callable[[Sequence[TensorType], FrozenDict], TensorType]  # (operand types, attributes) -> result type
Reference = Callable[[Sequence[Array], FrozenDict], Array]  # (operands, attributes) -> result
REQUIRED = object()  # an attribute without default

F32, BOOL, I64 = DType.f32, DType.bool, DType.i64
FLOATS = frozenset(d for d in DType if d.is_float)
INTS = frozenset(d for d in DType if d.is_int)
NUMBERS = FLOATS | INTS
ANY = NUMBERS | {BOOL}
QUANTIZED = frozenset({DType.i8, DType.u8, DType.i16, DType.u16})  # what stored values of a quantized network can be



@dataclass(frozen=True)
class Op:
    """One row of the table.

    `infer(types, attrs)` gives the result type or raises ShapeError; `reference(arrays, attrs)`
    gives the result. `tolerance` is the largest accepted |difference| as a fraction of the
    result's range, for float results. `epilogue` is the number of operands before those of a
    fused epilogue, None if the operation cannot carry one.
    """

    name: str
    operands: tuple[int, int]
    infer: Rule
    reference: Reference
    attrs: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    tolerance: float = 0.0
    cxx: str = ""
    epilogue: int | None = None
    doc: str = ""


OPS: dict[str, Op] = {}


def add(rows: Iterable[Op]) -> None:
    """Puts the rows of a family into the table, where no other may have these names."""
    for row in rows:
        if row.name in OPS:
            raise AssertionError(f"{row.name} is twice in the op table")
        OPS[row.name] = row


def op_of(name: str) -> Op:
    """The row of `name`; InvalidModelError if there is none."""
    try:
        return OPS[name]
    except KeyError:
        raise InvalidModelError(f"unknown operation {name!r}") from None


def infer(name: str, types: Sequence[TensorType], attrs: FrozenDict) -> TensorType:
    """The result type of operation `name`, with its epilogue applied."""
    op = op_of(name)
    low, high = op.operands
    epilogue = attrs.get("epilogue", "")
    if epilogue:
        if op.epilogue is None:
            raise ShapeError(f"{name} cannot carry an epilogue")
        base = op.infer(types[:op.epilogue], attrs)
        e = expressions.parse(epilogue)
        extra = types[op.epilogue:]
        if e.arity > 1 + len(extra):
            raise ShapeError(f"{name}: epilogue {epilogue!r} names more operands than there are")
        for t in extra:
            if broadcast_shapes(t.shape, base.shape) != base.shape:
                raise ShapeError(f"{name}: epilogue operand {t} does not broadcast to {base}")
        return TensorType(base.shape, expr_dtype(e, [base.dtype, *(t.dtype for t in extra)]))
    if not low <= len(types) <= high:
        raise ShapeError(f"{name} takes {low} to {high} operands, not {len(types)}")
    return op.infer(types, attrs)


def complete_attrs(name: str, attrs: dict[str, Any]) -> FrozenDict:
    """`attrs` with the defaults of operation `name`; unknown or missing names are refused."""
    op = op_of(name)
    unknown = set(attrs) - set(op.attrs) - ({"epilogue"} if op.epilogue is not None else set())
    if unknown:
        raise InvalidModelError(f"{name} has no attribute {sorted(unknown)[0]!r}")
    full = {}
    for key, default in op.attrs.items():
        value = attrs.get(key, default)
        if value is REQUIRED:
            raise InvalidModelError(f"{name} needs the attribute {key!r}")
        if key == "to" and not isinstance(value, DType):
            raise InvalidModelError(f"{name}: 'to' is {value!r}, not an element type")
        full[key] = value
    if attrs.get("epilogue"):
        full["epilogue"] = attrs["epilogue"]
    return FrozenDict(full)


def make(name: str, *inputs: Node, origin: str = "", label: str = "", **attrs: Any) -> Node:
    """A checked node: attributes completed, result type inferred. ShapeError if operands do not fit."""
    full = complete_attrs(name, attrs)
    return Node(name, tuple(inputs), full, infer(name, [i.type for i in inputs], full), label, origin)


def evaluate(node: Node, arrays: Sequence[Array]) -> Array:
    """The value of `node` on operand values `arrays`, by the table's reference, epilogue included."""
    op = op_of(node.op)
    with np.errstate(all="ignore"):
        epilogue = node.attrs.get("epilogue", "")
        if epilogue:
            base = op.reference(arrays[:op.epilogue], node.attrs)
            result = evaluate_expr(expressions.parse(epilogue), [base, *arrays[op.epilogue:]])
        else:
            result = op.reference(arrays, node.attrs)
    return np.asarray(result, dtype=node.dtype.numpy)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The numpy broadcast of `shapes`; ShapeError if they do not fit."""
    rank = max(map(len, shapes), default=0)
    out = []
    for dims in zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True):
        wide = {d for d in dims if d != 1}
        if len(wide) > 1:
            raise ShapeError(f"shapes {', '.join(str(list(s)) for s in shapes)} do not broadcast")
        out.append(wide.pop() if wide else 1)
    return tuple(out)


def expr_dtype(e: expressions.Expr, operands: Sequence[DType]) -> DType:
    """The element type of expression `e` on operands of these element types."""
    steps: list[DType] = []
    for s in e.steps:
        row = op_of(s.op)
        types = [TensorType((), operands[i] if k == "x" else steps[i]) for k, i in s.args]
        steps.append(row.infer(types, complete_attrs(s.op, dict(s.attrs))).dtype)
    return steps[-1]


def evaluate_expr(e: expressions.Expr, arrays: Sequence[Array]) -> Array:
    """The value of expression `e`, step by step in the element types of the table."""
    steps: list[Array] = []
    with np.errstate(all="ignore"):
        for s in e.steps:
            values = [arrays[i] if k == "x" else steps[i] for k, i in s.args]
            attrs = complete_attrs(s.op, dict(s.attrs))
            types = [TensorType(v.shape, DType.of(v.dtype)) for v in values]
            dtype = infer(s.op, types, attrs).dtype
            steps.append(np.asarray(op_of(s.op).reference(values, attrs), dtype=dtype.numpy))
    return steps[-1]


def axis_within(axis: int, rank: int, what: str) -> int:
    """`axis`, counted from the front; ShapeError if there are not so many."""
    if not -rank <= axis < rank:
        raise ShapeError(f"{what}: axis {axis} is outside rank {rank}")
    return axis % rank
