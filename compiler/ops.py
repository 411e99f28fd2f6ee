"""THE op table: one row per operation of the IR.

A row holds the name, the operands, the attributes with their defaults, the shape rule, the numpy
reference (which *is* the meaning of the operation), the tolerance of a compiled float32 kernel
against it, and for elementwise operations the name of the C++ function. Importers, passes, the
verifier, the reference evaluator, the fuzzer and the generated documentation all read this table.

Conventions: images are channels-last, `[N, H, W, C]`; convolution weights are `[OC, KH, KW, IC/groups]`;
pads are `(top, left, bottom, right)`; integer arithmetic wraps; integer division truncates toward
zero and is 0 for a zero divisor. Contractions of 8- and 16-bit integers give 32-bit sums of
(x - zero) w, where the attribute `zero` is the zero point of x (docs/decisions/0007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive import expr as expressions
from skive.errors import InvalidModelError, ShapeError
from skive.ir import FrozenDict, Node
from skive.types import DType, TensorType

Array = np.ndarray
REQUIRED = object()  # an attribute without default

F32, BOOL, I64 = DType.f32, DType.bool, DType.i64
FLOATS = frozenset(d for d in DType if d.is_float)
INTS = frozenset(d for d in DType if d.is_int)
NUMBERS = FLOATS | INTS
ANY = NUMBERS | {BOOL}


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
    infer: Callable[[Sequence[TensorType], FrozenDict], TensorType]
    reference: Callable[[Sequence[Array], FrozenDict], Array]
    attrs: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    tolerance: float = 0.0
    cxx: str = ""
    epilogue: int | None = None
    doc: str = ""


OPS: dict[str, Op] = {}
_name: str
_fn: Callable[..., Array]
_domain: frozenset[DType]


def _add(op: Op) -> None:
    if op.name in OPS:
        raise AssertionError(f"{op.name} is twice in the op table")
    OPS[op.name] = op


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


# ------------------------------------------------------------------------------------ elementwise


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


def _elementwise(name: str, arity: int, fn: Callable[..., Array], domain: frozenset[DType] = FLOATS, *,
                 result: DType | None = None, cxx: str = "", attrs: dict[str, Any] | None = None,
                 tolerance: float = 0.0, doc: str = "", mixed: bool = False) -> None:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        for t in types:
            if t.dtype not in domain:
                raise ShapeError(f"{name} is not defined for {t.dtype.value}")
        if not mixed and len({t.dtype for t in types}) > 1:
            raise ShapeError(f"{name} needs equal element types, not {', '.join(t.dtype.value for t in types)}")
        return TensorType(broadcast_shapes(*(t.shape for t in types)), result or types[0].dtype)

    keys = tuple(attrs or ())
    _add(Op(name, (arity, arity), rule, lambda x, a: fn(*x, *(a[k] for k in keys)), attrs or {},
            "elementwise", tolerance, cxx or name, None, doc))


def _float(fn: Callable[..., Array]) -> Callable[..., Array]:
    """`fn` evaluated in float64: the reference of a transcendental function is exact to its type."""
    return lambda x, *a: fn(np.asarray(x, np.float64), *a).astype(x.dtype)


def _trunc_div(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    zero = b == 0
    safe = np.where(zero, 1, b).astype(b.dtype)
    q = np.floor_divide(a, safe)
    q = q + ((np.remainder(a, safe) != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, 0, q).astype(a.dtype)


def _power(a: Array, b: Array) -> Array:
    if a.dtype.kind != "i":
        return np.power(a, b)
    inverse = np.where(np.abs(a) == 1, np.where(b % 2 == 0, 1, a), 0)  # 1 / a^|b|, truncated
    return np.where(b < 0, inverse, np.power(a, np.maximum(b, 0))).astype(a.dtype)


def _mod(a: Array, b: Array, fn: Callable[..., Array]) -> Array:
    return fn(a, b) if a.dtype.kind == "f" else np.where(b == 0, 0, fn(a, np.where(b == 0, 1, b)))


def _shift(a: Array, b: Array, fn: Callable[..., Array]) -> Array:
    bits = a.dtype.itemsize * 8
    inside = (b >= 0) & (b < bits)
    beyond = np.where((a < 0) & (fn is np.right_shift), -1, 0).astype(a.dtype)  # 64-bit integers have no wider type
    return np.where(inside, fn(a, np.where(inside, b, 0)), beyond)


_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function, elementwise, in float64."""
    return np.asarray(_erf(np.asarray(x, np.float64)), np.float64)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _cast(x: Array, to: DType) -> Array:
    """Float to integer truncates toward zero; out of range or NaN gives the value that the
    conversion through int64 wraps to (as x86 does), never undefined behaviour."""
    if x.dtype.kind == "f" and to.is_int:
        wide = np.where(np.isfinite(x) & (np.abs(x) < 2.0**63), x, -(2.0**63))
        if to is DType.u64:
            big = (x >= 2.0**63) & (x < 2.0**64)
            return np.where(big, np.where(big, x, 0).astype(np.uint64), wide.astype(np.int64).astype(np.uint64))
        return wide.astype(np.int64).astype(to.numpy)
    return x.astype(to.numpy)


def _log2_fixed(x: Array) -> Array:
    x = np.maximum(x, 1).astype(np.uint64)
    whole = np.zeros_like(x)
    for k in (16, 8, 4, 2, 1):
        whole += np.where(x >> whole >= np.uint64(2**k), np.uint64(k), np.uint64(0))
    y, mantissa = whole, x << (np.uint64(31) - whole)
    for _ in range(24):
        mantissa = mantissa * mantissa >> np.uint64(31)
        bit = mantissa >> np.uint64(32)
        y, mantissa = 2 * y + bit, mantissa >> bit
    return y.astype(np.int32)


def _f32(x: float, like: Array) -> Any:
    return like.dtype.type(x)


_SMOOTH = 2e-6  # a vectorised transcendental: a few units in the last place

_TRANSCENDENTAL: dict[str, Callable[..., Array]] = {
    "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "erf": erf}
for _name, _fn in _TRANSCENDENTAL.items():
    _elementwise(_name, 1, _float(_fn), cxx=_name + "_", tolerance=_SMOOTH, doc=f"{_name}(x)")

_elementwise("rsqrt", 1, _float(lambda x: 1 / np.sqrt(x)), tolerance=_SMOOTH, doc="1 / sqrt(x)")
_elementwise("sigmoid", 1, _float(_sigmoid), tolerance=_SMOOTH, doc="1 / (1 + exp(-x))")
_elementwise("silu", 1, _float(lambda x: x * _sigmoid(x)), tolerance=_SMOOTH, doc="x sigmoid(x), also called swish")
_elementwise("gelu", 1, _float(lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))), tolerance=_SMOOTH,
             doc="x Phi(x) (Hendrycks, Gimpel: Gaussian Error Linear Units, 2016)")
_elementwise("gelu_tanh", 1, _float(lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
             tolerance=_SMOOTH, doc="the tanh approximation of gelu")
_elementwise("softplus", 1, _float(_softplus), tolerance=_SMOOTH, doc="log(1 + exp(x))")
_elementwise("mish", 1, _float(lambda x: x * np.tanh(_softplus(x))), tolerance=_SMOOTH, doc="x tanh(softplus(x))")
_elementwise("elu", 1, _float(lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))),
             attrs={"alpha": 1.0}, tolerance=_SMOOTH, doc="x if x > 0 else alpha (exp(x) - 1)")
_elementwise("selu", 1, _float(lambda x, alpha, gamma: gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))),
             attrs={"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}, tolerance=_SMOOTH,
             doc="gamma elu(x, alpha)")
_elementwise("celu", 1, _float(lambda x, alpha: np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))),
             attrs={"alpha": 1.0}, tolerance=_SMOOTH, doc="max(x, 0) + min(0, alpha (exp(x / alpha) - 1))")

_elementwise("softsign", 1, lambda x: x / (1 + np.abs(x)), tolerance=1e-6, doc="x / (1 + |x|)")
_elementwise("reciprocal", 1, lambda x: 1 / x, tolerance=1e-6, doc="1 / x")
_elementwise("floor", 1, np.floor, cxx="floor_", doc="largest integer not above x")
_elementwise("ceil", 1, np.ceil, cxx="ceil_", doc="smallest integer not below x")
_elementwise("trunc", 1, np.trunc, cxx="trunc_", doc="x without its fraction")
_elementwise("round_even", 1, np.rint, doc="nearest integer, halves to even")
_elementwise("abs", 1, np.abs, NUMBERS, cxx="abs_", doc="|x|")
_elementwise("neg", 1, np.negative, NUMBERS, doc="-x")
_elementwise("sign", 1, np.sign, NUMBERS, doc="-1, 0 or 1")
_elementwise("log2_fixed", 1, _log2_fixed, frozenset({DType.i32}),
             doc="log2(max(x, 1)) in units of 2^-24, rounded down, less 1 at most: repeated squaring of 31 fraction bits "
                 "(Turner: A Fast Binary Logarithm Algorithm, 2010)")
_elementwise("relu", 1, lambda x: np.maximum(x, _f32(0, x)), NUMBERS, doc="max(x, 0)")
_elementwise("clip", 1, lambda x, lo, hi: np.minimum(np.maximum(x, _f32(lo, x)), _f32(hi, x)), NUMBERS,
             attrs={"lo": REQUIRED, "hi": REQUIRED}, doc="min(max(x, lo), hi)")
_elementwise("leaky_relu", 1, lambda x, alpha: np.where(x < 0, _f32(alpha, x) * x, x), attrs={"alpha": 0.01},
             tolerance=1e-6, doc="x if x >= 0 else alpha x")
_elementwise("thresholded_relu", 1, lambda x, alpha: np.where(x > _f32(alpha, x), x, _f32(0, x)),
             attrs={"alpha": 1.0}, doc="x if x > alpha else 0")
_elementwise("hard_sigmoid", 1, lambda x, alpha, beta: np.clip(_f32(alpha, x) * x + _f32(beta, x), 0, 1),
             attrs={"alpha": 0.2, "beta": 0.5}, tolerance=1e-6, doc="clip(alpha x + beta, 0, 1)")


def piecewise_table(a: FrozenDict | dict[str, Any]) -> Array:
    """[degree + 1, segments] coefficients of `piecewise`, float32; InvalidModelError if they are not that many."""
    try:
        table = np.array(a["table"].split(), np.float32).reshape(a["degree"] + 1, -1)
    except ValueError:
        table = np.zeros((0, 0), np.float32)
    if table.shape[1] not in (16, 32):
        raise InvalidModelError(f"piecewise: not 16 or 32 polynomials of degree {a['degree']}: {a['table'][:40]!r}")
    return table


def _piecewise(x: Array, lowest: int, degree: int, table: str) -> Array:
    c = piecewise_table({"degree": degree, "table": table})
    n = np.fmin(np.fmax(np.rint(x), np.float32(lowest)), np.float32(lowest + c.shape[1] - 1))
    i, r = n.astype(np.int32) % c.shape[1], x - n
    y = c[degree][i]
    for k in range(degree - 1, -1, -1):
        y = y * r + c[k][i]
    return y


_elementwise("piecewise", 1, _piecewise, frozenset({F32}), attrs={"lowest": REQUIRED, "degree": REQUIRED, "table": REQUIRED},
             doc="sum over k of c[k][n mod S] (x - n)^k with n = round_even(x) clipped to [lowest, lowest + S - 1]; table: the "
                 "float32 values c[degree + 1][S], S 16 or 32; every operation is rounded on its own")
_elementwise("hard_swish", 1, lambda x: x * np.clip(x * _f32(1 / 6, x) + _f32(0.5, x), 0, 1), tolerance=1e-6,
             doc="x clip(x / 6 + 1/2, 0, 1)")
_elementwise("shrink", 1, lambda x, bias, lambd: np.where(x < -lambd, x + _cast_like(bias, x),
                                                          np.where(x > lambd, x - _cast_like(bias, x), x * 0)),
             NUMBERS, attrs={"bias": 0.0, "lambd": 0.5}, tolerance=1e-6, doc="soft or hard shrinkage")
_elementwise("not", 1, np.logical_not, frozenset({BOOL}), cxx="not_", doc="logical not")
_elementwise("bit_not", 1, np.invert, INTS, doc="bitwise not")
_elementwise("is_nan", 1, np.isnan, result=BOOL, doc="x is not a number")
_elementwise("is_inf", 1, lambda x, neg, pos: (np.isneginf(x) & neg) | (np.isposinf(x) & pos), result=BOOL,
             attrs={"neg": True, "pos": True}, doc="x is infinite, of the wanted sign")


def _cast_like(v: float, x: Array) -> Any:
    return x.dtype.type(v)


def _infer_cast(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    return TensorType(types[0].shape, a["to"])


_add(Op("cast", (1, 1), _infer_cast, lambda x, a: _cast(x[0], a["to"]), {"to": REQUIRED}, "elementwise", 0.0, "cast",
        doc="x in another element type; float to integer truncates, integers wrap, bool is x != 0"))

def _infer_bit_cast(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, to = types[0], a["to"]
    if to.bytes != x.dtype.bytes or (to is BOOL and x.dtype is not BOOL):  # a bool is 0 or 1, no other bits
        raise ShapeError(f"bit_cast of {x} to {to.value}")
    return TensorType(x.shape, to)


def _ref_bit_cast(x: Sequence[Array], a: FrozenDict) -> Array:
    return np.frombuffer(x[0].tobytes(), a["to"].numpy).reshape(x[0].shape)


_add(Op("bit_cast", (1, 1), _infer_bit_cast, _ref_bit_cast, {"to": REQUIRED}, "elementwise", 0.0, "bit_cast",
        doc="the bits of x as another element type of the same width"))

_BINARY: list[tuple[str, Callable[..., Array], frozenset[DType]]] = [
        ("add", np.add, NUMBERS), ("sub", np.subtract, NUMBERS), ("mul", np.multiply, NUMBERS),
        ("div", _trunc_div, NUMBERS), ("min", np.minimum, NUMBERS), ("max", np.maximum, NUMBERS),
        ("bit_and", np.bitwise_and, INTS), ("bit_or", np.bitwise_or, INTS), ("bit_xor", np.bitwise_xor, INTS)]
for _name, _fn, _domain in _BINARY:
    _elementwise(_name, 2, _fn, _domain, cxx=_name + "_" if _name in ("div", "min", "max") else _name,  # libc has them too
                 tolerance=1e-6 if _name == "div" else 0.0, doc=f"{_name}(a, b)")
for _name, _fn in [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)]:
    _elementwise(_name, 2, _fn, frozenset({BOOL}), cxx=_name + "_", doc=f"logical {_name}")
for _name, _fn in [("less", np.less), ("less_equal", np.less_equal), ("greater", np.greater),
                   ("greater_equal", np.greater_equal), ("equal", np.equal), ("not_equal", np.not_equal)]:
    _elementwise(_name, 2, _fn, ANY if "equal" in (_name, _name[4:]) else NUMBERS, result=BOOL,
                 cxx={"equal": "equal_", "not_equal": "not_equal_"}.get(_name, _name), doc=f"{_name}(a, b)")
_elementwise("pow", 2, _power, NUMBERS, cxx="pow_", tolerance=_SMOOTH,
             doc="a to the power b; of integers with b < 0 the inverse, truncated: 0, or 1 or -1 for |a| = 1")
_elementwise("mod", 2, lambda a, b: _mod(a, b, np.mod), NUMBERS, cxx="mod_", tolerance=1e-6,
             doc="remainder with the sign of b")
_elementwise("fmod", 2, lambda a, b: _mod(a, b, np.fmod), NUMBERS, cxx="fmod_", tolerance=1e-6,
             doc="remainder with the sign of a")
_elementwise("shift_left", 2, lambda a, b: _shift(a, b, np.left_shift), INTS, doc="a << b, 0 if b is negative or too large")
_elementwise("shift_right", 2, lambda a, b: _shift(a, b, np.right_shift), INTS, doc="a >> b; if b is negative or too large only the sign remains: 0 or -1")
_elementwise("prelu", 2, lambda x, s: np.where(x < 0, s * x, x), NUMBERS, tolerance=1e-6, doc="x if x >= 0 else slope x")


def _infer_where(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype is not BOOL or types[1].dtype is not types[2].dtype:
        raise ShapeError("where needs a bool condition and two operands of one element type")
    return TensorType(broadcast_shapes(*(t.shape for t in types)), types[1].dtype)


_add(Op("where", (3, 3), _infer_where, lambda x, a: np.where(*x), {}, "elementwise", 0.0, "where",
        doc="a where the condition holds, else b"))


def _infer_choose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype is not BOOL or types[0].size != 1 or types[1] != types[2]:
        raise ShapeError(f"choose needs one bool and two operands of one type, not {', '.join(map(str, types))}")
    return types[1]


_add(Op("choose", (3, 3), _infer_choose, lambda x, a: x[1] if bool(x[0].reshape(-1)[0]) else x[2], {}, "control",
        doc="a if the condition, one bool, holds, else b; what only the other operand needs is not computed"))
_add(Op("copy", (1, 1), lambda types, a: types[0], lambda x, a: x[0], {}, "control",
        doc="its operand, in other memory: what one trip of a loop leaves to the next"))


def _infer_map(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    e = expressions.parse(a["fn"])
    if e.arity > len(types):
        raise ShapeError(f"map: {a['fn']!r} names more operands than there are")
    return TensorType(broadcast_shapes(*(t.shape for t in types)), expr_dtype(e, [t.dtype for t in types]))


def _ref_map(x: Sequence[Array], a: FrozenDict) -> Array:
    shape = np.broadcast_shapes(*(v.shape for v in x))
    return np.broadcast_to(evaluate_expr(expressions.parse(a["fn"]), x), shape)


_add(Op("map", (1, 64), _infer_map, _ref_map, {"fn": REQUIRED}, "elementwise", 4e-6,
        doc="a fused elementwise expression over broadcast operands"))

QUANTIZED = frozenset({DType.i8, DType.u8, DType.i16, DType.u16})


def _saturate(v: Array, zero: Array, to: DType) -> Array:
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


def _quantization(name: str, sources: frozenset[DType], others: tuple[DType, ...],
                  reference: Callable[[Sequence[Array], FrozenDict], Array], doc: str,
                  results: frozenset[DType] = QUANTIZED) -> None:
    """A row whose operands are x (of `sources`), `others`, and the zero point in the type of the result `to`."""

    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        got = [t.dtype for t in types]
        if a["to"] not in results or got[0] not in sources or got[1:] != [*others, a["to"]]:
            raise ShapeError(f"{name} to {a['to'].value} of {', '.join(map(str, types))}")
        return TensorType(broadcast_shapes(*(t.shape for t in types)), a["to"])

    arity = 2 + len(others)
    _add(Op(name, (arity, arity), rule, reference, {"to": REQUIRED}, "elementwise", 0.0, name, doc=doc))


_quantization("quantize", frozenset({F32}), (F32,), lambda x, a: _saturate(x[0] / x[1], x[2], a["to"]),
              "saturate(round_even(x / scale) + zero), operands x, scale, zero; NaN gives the lowest value "
              "(ONNX QuantizeLinear)")
_quantization("requantize", frozenset({F32, DType.i32}), (F32,),
              lambda x, a: _saturate(x[0].astype(np.float32) * x[1], x[2], a["to"]),
              "saturate(round_even(f32(x) factor) + zero), operands x, factor, zero")
_quantization("requantize_fixed", frozenset({DType.i32}), (DType.i32, DType.i32), _ref_requantize_fixed,
              "saturate(((i64(x) multiplier + 2^(shift-1)) >> shift) + zero), operands x, multiplier, shift in 1..62, "
              "zero; no float instruction", QUANTIZED | {DType.i32})


def _infer_dequantize(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    q, scale, zero = types
    if q.dtype not in QUANTIZED | {DType.i32} or scale.dtype is not F32 or zero.dtype is not q.dtype:
        raise ShapeError(f"dequantize of {', '.join(map(str, types))}")
    return TensorType(broadcast_shapes(q.shape, scale.shape, zero.shape), F32)


_add(Op("dequantize", (3, 3), _infer_dequantize,
        lambda x, a: (x[0].astype(np.int32) - x[2].astype(np.int32)).astype(np.float32) * x[1], {}, "elementwise", 0.0,
        "dequantize", doc="f32(q - zero) scale, the difference in 32 bits; operands q, scale, zero (ONNX DequantizeLinear)"))

# -------------------------------------------------------------------------------- data movement


def _axis(axis: int, rank: int, what: str) -> int:
    if not -rank <= axis < rank:
        raise ShapeError(f"{what}: axis {axis} is outside rank {rank}")
    return axis % rank


def _infer_reshape(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if math.prod(a["shape"]) != types[0].size:
        raise ShapeError(f"reshape of {types[0]} to {list(a['shape'])} changes the number of elements")
    return TensorType(tuple(a["shape"]), types[0].dtype)


def _infer_transpose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    perm = a["perm"]
    if sorted(perm) != list(range(types[0].rank)):
        raise ShapeError(f"transpose: {list(perm)} is not a permutation of rank {types[0].rank}")
    return TensorType(tuple(types[0].shape[p] for p in perm), types[0].dtype)


def _slices(shape: tuple[int, ...], a: FrozenDict) -> tuple[slice, ...]:
    out = []
    for start, size, step in zip(a["start"], a["size"], a["step"], strict=True):
        stop = start + size * step
        out.append(slice(start, stop if stop >= 0 else None, step))
    return tuple(out)


def _infer_slice(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if not len(a["start"]) == len(a["size"]) == len(a["step"]) == t.rank:
        raise ShapeError("slice: start, size and step need one entry per axis")
    for d, start, size, step in zip(t.shape, a["start"], a["size"], a["step"], strict=True):
        last = start + (size - 1) * step
        if size and (step == 0 or not (0 <= start < d and 0 <= last < d)):
            raise ShapeError(f"slice of {t} leaves the tensor")
    return TensorType(tuple(a["size"]), t.dtype)


def _ref_slice(x: Sequence[Array], a: FrozenDict) -> Array:
    if 0 in a["size"]:
        return np.zeros(a["size"], x[0].dtype)
    return x[0][_slices(x[0].shape, a)]


def _infer_concat(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    axis = _axis(a["axis"], types[0].rank, "concat")
    first = types[0]
    for t in types:
        if t.dtype is not first.dtype or t.rank != first.rank or any(
                p != q for i, (p, q) in enumerate(zip(t.shape, first.shape, strict=True)) if i != axis):
            raise ShapeError(f"concat along axis {axis} of {', '.join(map(str, types))}")
    shape = list(first.shape)
    shape[axis] = sum(t.shape[axis] for t in types)
    return TensorType(tuple(shape), first.dtype)


def _infer_pad(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if len(a["before"]) != t.rank or len(a["after"]) != t.rank:
        raise ShapeError("pad: before and after need one entry per axis")
    shape = []
    for d, b, e in zip(t.shape, a["before"], a["after"], strict=True):
        if b < 0 or e < 0:
            raise ShapeError("pad: negative pads are slices")
        if a["mode"] == "reflect" and d and max(b, e) >= d:
            raise ShapeError("pad: reflection is wider than the tensor")
        if a["mode"] != "constant" and d == 0 and b + e:
            raise ShapeError("pad: nothing to repeat in an empty tensor")
        shape.append(d + b + e)
    return TensorType(tuple(shape), t.dtype)


def _ref_pad(x: Sequence[Array], a: FrozenDict) -> Array:
    widths = list(zip(a["before"], a["after"], strict=True))
    if not widths:  # numpy cannot pad a tensor without axes
        return x[0]
    if a["mode"] == "constant":
        return np.pad(x[0], widths, constant_values=a["value"])
    return np.pad(x[0], widths, mode=a["mode"])


def _infer_expand(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    shape = tuple(a["shape"])
    if broadcast_shapes(types[0].shape, shape) != shape:
        raise ShapeError(f"expand of {types[0]} to {list(shape)}")
    return TensorType(shape, types[0].dtype)


_add(Op("reshape", (1, 1), _infer_reshape, lambda x, a: x[0].reshape(a["shape"]), {"shape": REQUIRED}, "movement",
        doc="the same elements in another shape; no data moves"))
_add(Op("transpose", (1, 1), _infer_transpose, lambda x, a: np.array(x[0].transpose(a["perm"]), order="C"),
        {"perm": REQUIRED}, "movement", doc="axes permuted: result axis i is operand axis perm[i]"))
_add(Op("slice", (1, 1), _infer_slice, _ref_slice, {"start": REQUIRED, "size": REQUIRED, "step": REQUIRED}, "movement",
        doc="per axis `size` elements from `start`, `step` apart (negative steps reverse)"))
_add(Op("concat", (1, 4096), _infer_concat, lambda x, a: np.concatenate(x, a["axis"]), {"axis": REQUIRED}, "movement",
        doc="operands joined along an axis"))
_add(Op("pad", (1, 1), _infer_pad, _ref_pad, {"before": REQUIRED, "after": REQUIRED, "value": 0.0, "mode": "constant"},
        "movement", doc="elements added around a tensor: constant, reflect, edge or wrap"))
_add(Op("expand", (1, 1), _infer_expand, lambda x, a: np.broadcast_to(x[0], a["shape"]).copy(), {"shape": REQUIRED},
        "movement", doc="broadcast made real"))

# ------------------------------------------------------------------------------------ indexing


def _wrap(idx: Array, n: int) -> Array:
    """Negative indices count from the end; anything still outside is clamped (memory safety)."""
    idx = idx.astype(np.int64)
    return np.clip(np.where(idx < 0, idx + n, idx), 0, max(n - 1, 0))


def _infer_gather(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    axis = _axis(a["axis"], data.rank, "gather")
    if data.shape[axis] == 0 and idx.size:
        raise ShapeError("gather from an empty axis")
    return TensorType(data.shape[:axis] + idx.shape + data.shape[axis + 1:], data.dtype)


def _infer_gather_elements(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    axis = _axis(a["axis"], data.rank, "gather_elements")
    if idx.rank != data.rank or any(i > d for k, (i, d) in enumerate(zip(idx.shape, data.shape, strict=True)) if k != axis):
        raise ShapeError(f"gather_elements: indices {idx} do not fit {data}")
    return TensorType(idx.shape, data.dtype)


def _ref_gather_elements(x: Sequence[Array], a: FrozenDict) -> Array:
    data, idx = x
    axis = a["axis"] % data.ndim
    grid: list[Array] = list(np.indices(idx.shape, sparse=True))
    grid[axis] = _wrap(idx, data.shape[axis])
    return data[tuple(grid)]


def _infer_gather_nd(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx = types
    b = a["batch_dims"]
    if idx.rank < 1 or b >= min(idx.rank, data.rank) or idx.shape[-1] > data.rank - b or data.shape[:b] != idx.shape[:b]:
        raise ShapeError(f"gather_nd: indices {idx} do not fit {data}")
    return TensorType(idx.shape[:-1] + data.shape[b + idx.shape[-1]:], data.dtype)


def _nd_index(idx: Array, shape: tuple[int, ...], batch: int) -> tuple[Array, ...]:
    grids: list[Array] = list(np.indices(idx.shape[:-1], sparse=True)[:batch]) if batch else []
    return (*grids, *(_wrap(idx[..., k], shape[batch + k]) for k in range(idx.shape[-1])))


def _infer_scatter_elements(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx, upd = types
    axis = _axis(a["axis"], data.rank, "scatter_elements")
    if idx.shape != upd.shape or idx.rank != data.rank or upd.dtype is not data.dtype or any(
            i > d for k, (i, d) in enumerate(zip(idx.shape, data.shape, strict=True)) if k != axis):
        raise ShapeError(f"scatter_elements: indices {idx} and updates {upd} do not fit {data}")
    return data


def _scatter(data: Array, index: tuple[Array, ...], upd: Array, reduction: str) -> Array:
    out = data.copy()
    index = tuple(np.broadcast_to(i, np.broadcast_shapes(*(j.shape for j in index))) for i in index)
    if reduction == "none":
        out[index] = upd
    else:
        {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[reduction].at(out, index, upd)
    return out


def _ref_scatter_elements(x: Sequence[Array], a: FrozenDict) -> Array:
    data, idx, upd = x
    axis = a["axis"] % data.ndim
    grid: list[Array] = list(np.indices(idx.shape, sparse=True))
    grid[axis] = _wrap(idx, data.shape[axis])
    return _scatter(data, tuple(grid), upd, a["reduction"])


def _infer_scatter_nd(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    data, idx, upd = types
    if (idx.rank < 1 or idx.shape[-1] > data.rank or upd.dtype is not data.dtype
            or upd.shape != idx.shape[:-1] + data.shape[idx.shape[-1]:]):
        raise ShapeError(f"scatter_nd: indices {idx} and updates {upd} do not fit {data}")
    return data


def _infer_lookup(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, table = types
    if x.dtype not in (DType.u8, DType.i8) or table.shape != (256,):
        raise ShapeError(f"lookup of {x} in {table}")
    return x.with_dtype(table.dtype)


_add(Op("gather", (2, 2), _infer_gather, lambda x, a: np.take(x[0], _wrap(x[1], x[0].shape[a["axis"]]), a["axis"]),
        {"axis": 0}, "index", doc="data taken at indices along an axis; negative indices count from the end"))
_add(Op("lookup", (2, 2), _infer_lookup, lambda x, a: x[1][x[0].view(np.uint8)], {}, "index",
        doc="table[x] for x of 8 bits and 256 entries: any function of one byte; a signed x indexes by its bits, so that "
            "entry 255 belongs to -1"))
_add(Op("gather_elements", (2, 2), _infer_gather_elements, _ref_gather_elements, {"axis": 0}, "index",
        doc="result[i][j] = data[index[i][j]][j] for axis 0"))
_add(Op("gather_nd", (2, 2), _infer_gather_nd, lambda x, a: x[0][_nd_index(x[1], x[0].shape, a["batch_dims"])],
        {"batch_dims": 0}, "index", doc="slices of data at index tuples"))
_add(Op("scatter_elements", (3, 3), _infer_scatter_elements, _ref_scatter_elements, {"axis": 0, "reduction": "none"},
        "index", 1e-6, doc="data with updates written (or reduced) at indices along an axis"))
_add(Op("scatter_nd", (3, 3), _infer_scatter_nd,
        lambda x, a: _scatter(x[0], _nd_index(x[1], x[0].shape, 0), x[2], a["reduction"]),
        {"reduction": "none"}, "index", 1e-6, doc="data with slices written (or reduced) at index tuples"))

# ------------------------------------------------------------------------------------ reductions


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    return tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)


def _reduction(name: str, fn: Callable[..., Array], domain: frozenset[DType], tolerance: float, doc: str) -> None:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        t = types[0]
        if t.dtype not in domain:
            raise ShapeError(f"{name} is not defined for {t.dtype.value}")
        axes = tuple(_axis(x, t.rank, name) for x in a["axes"])
        empty = any(t.shape[x] == 0 for x in axes) and all(d for i, d in enumerate(t.shape) if i not in axes)
        if empty and name in ("reduce_max", "reduce_min"):
            raise ShapeError(f"{name} of an empty axis has no value")
        return TensorType(_reduced_shape(t.shape, axes, a["keep"]), t.dtype)

    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        v = x[0].astype(np.float64) if x[0].dtype.kind == "f" else x[0]
        if not a["axes"]:
            return x[0]
        return np.asarray(fn(v, axis=tuple(a["axes"]), keepdims=a["keep"])).astype(x[0].dtype)

    _add(Op(name, (1, 1), rule, reference, {"axes": REQUIRED, "keep": True}, "reduce", tolerance, doc=doc))


def _mean(v: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    if v.dtype.kind == "f":
        return np.mean(v, axis=axis, keepdims=keepdims)
    n = math.prod(v.shape[i] for i in axis)
    return _trunc_div(np.sum(v, axis=axis, keepdims=keepdims, dtype=v.dtype), np.asarray(max(n, 1), v.dtype))


_reduction("reduce_sum", lambda v, axis, keepdims: np.sum(v, axis=axis, keepdims=keepdims, dtype=v.dtype), NUMBERS, 1e-5,
           "sum over axes")
_reduction("reduce_mean", _mean, NUMBERS, 1e-5, "mean over axes")
_reduction("reduce_prod", lambda v, axis, keepdims: np.prod(v, axis=axis, keepdims=keepdims, dtype=v.dtype), NUMBERS, 1e-5,
           "product over axes")
_reduction("reduce_max", np.max, ANY, 0.0, "largest over axes")
_reduction("reduce_min", np.min, ANY, 0.0, "smallest over axes")


def _infer_arg(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    axis = _axis(a["axis"], types[0].rank, "argmax")
    if types[0].shape[axis] == 0:
        raise ShapeError("argmax of an empty axis has no value")
    return TensorType(_reduced_shape(types[0].shape, (axis,), a["keep"]), I64)


def _ref_arg(fn: Callable[..., Array]) -> Callable[[Sequence[Array], FrozenDict], Array]:
    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        v, axis = x[0], a["axis"]
        r = fn(np.flip(v, axis), axis=axis) if a["last"] else fn(v, axis=axis)
        r = v.shape[axis] - 1 - r if a["last"] else r
        return np.expand_dims(r, axis) if a["keep"] else r

    return reference


for _name, _fn in [("argmax", np.argmax), ("argmin", np.argmin)]:
    _add(Op(_name, (1, 1), _infer_arg, _ref_arg(_fn), {"axis": REQUIRED, "keep": True, "last": False}, "reduce",
            doc=f"index of the {'largest' if _name == 'argmax' else 'smallest'} element, the first (or last) of equals"))


def _infer_scan(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    _axis(a["axis"], types[0].rank, "cumulative")
    return types[0]


def _cumulative(fn: Callable[..., Array], neutral: int) -> Callable[[Sequence[Array], FrozenDict], Array]:
    def reference(x: Sequence[Array], a: FrozenDict) -> Array:
        axis = a["axis"]
        v = np.flip(x[0], axis) if a["reverse"] else x[0]
        r = fn(v.astype(np.float64) if v.dtype.kind == "f" else v, axis=axis)
        if a["exclusive"]:
            r = np.roll(r, 1, axis)
            first = [slice(None)] * r.ndim
            first[axis] = slice(0, 1)
            r[tuple(first)] = neutral
        return (np.flip(r, axis) if a["reverse"] else r).astype(x[0].dtype)

    return reference


_scans: list[tuple[str, Callable[..., Array], int]] = [("cumsum", np.cumsum, 0), ("cumprod", np.cumprod, 1)]
for _name, _fn, _zero in _scans:
    _add(Op(_name, (1, 1), _infer_scan, _cumulative(_fn, _zero),
            {"axis": REQUIRED, "exclusive": False, "reverse": False}, "reduce", 1e-5,
            doc=f"running {'sum' if _zero == 0 else 'product'} along an axis"))


def _infer_topk(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    t = types[0]
    if t.rank == 0 or not 0 <= a["k"] <= t.shape[-1]:
        raise ShapeError(f"topk: k = {a['k']} of {t}")
    return TensorType((*t.shape[:-1], a["k"]), t.dtype)


def _topk_order(v: Array, a: FrozenDict) -> Array:
    if a["largest"]:
        order = v.shape[-1] - 1 - np.argsort(v[..., ::-1], axis=-1, kind="stable")[..., ::-1]
    else:
        order = np.argsort(v, axis=-1, kind="stable")
    return order[..., :a["k"]]


_add(Op("topk_values", (1, 1), _infer_topk, lambda x, a: np.take_along_axis(x[0], _topk_order(x[0], a), -1),
        {"k": REQUIRED, "largest": True}, "reduce", doc="the k largest (smallest) of the last axis, sorted"))
_add(Op("topk_indices", (1, 1), lambda t, a: TensorType(_infer_topk(t, a).shape, I64), lambda x, a: _topk_order(x[0], a),
        {"k": REQUIRED, "largest": True}, "reduce", doc="where topk_values come from; the lower index first among equals"))

# ------------------------------------------------------------------------------------ contractions

_NARROW = {(DType.u8, DType.i8), (DType.i8, DType.i8), (DType.i16, DType.i16)}


def _product_dtype(name: str, types: Sequence[TensorType], zero: int, chain: int = 0) -> DType:
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


def _exact(reference: Callable[[Sequence[Array], FrozenDict], Array], *zeros: str,
           ) -> Callable[[Sequence[Array], FrozenDict], Array]:
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


_add(Op("matmul", (2, 2), _infer_matmul, _exact(_ref_matmul, "a_zero", "b_zero"),
        {"trans_a": False, "trans_b": False, "a_zero": 0, "b_zero": 0}, "contract", 1e-5,
        epilogue=2, doc="batched matrix product with broadcast batch axes"))


def _infer_linear(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, w = types[:2]
    if x.rank < 1 or w.rank != 2 or x.shape[-1] != w.shape[1] or (len(types) > 2 and types[2].shape != w.shape[:1]):
        raise ShapeError(f"linear of {', '.join(map(str, types))}")
    return TensorType((*x.shape[:-1], w.shape[0]), _product_dtype("linear", types, a["zero"], a["chain"]))


_add(Op("linear", (2, 3), _infer_linear, _exact(lambda x, a: x[0] @ x[1].T + (x[2] if len(x) > 2 else 0), "zero"),
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


_add(Op("compressed_linear", (5, 5), _infer_compressed,
        lambda x, a: (rounded_rows(x[0], a["activation"])
                      @ compressed_weights(x[1], x[2], x[3], a["group"]).astype(np.float64).T + x[4]).astype(np.float32),
        {"bits": REQUIRED, "group": REQUIRED, "activation": 32}, "contract", 1e-5, epilogue=5,
        doc="linear on weights that stay integers: x' w^T + bias with w[o, k] = (q[o, k] - zero[o, g]) scale[o, g], "
            "g = k / group; operands x [..., K], q u8 [OC, K] of `bits` bits, scale and zero [OC, groups], bias [OC]. "
            "x' is x, or with activation 16 or 8 each row rounded to 32639 or 127 steps of its largest magnitude "
            "(NaN where a row is not finite)"))


def window_out(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    """Positions of a window of `kernel` taps, `dilation` apart, moved by `stride` over a padded axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _check_window(name: str, a: FrozenDict, kernel: tuple[int, ...]) -> None:
    if (len(a["stride"]) != 2 or min(a["stride"]) < 1 or len(kernel) != 2 or min(kernel) < 1
            or len(a["pad"]) != 4 or min(a["pad"]) < 0 or min(a.get("dilation", (1, 1))) < 1):
        raise ShapeError(f"{name}: kernel {list(kernel)}, stride {list(a['stride'])}, pad {list(a['pad'])}, "
                         f"dilation {list(a.get('dilation', (1, 1)))} are not a window")


def _window_shape(name: str, x: TensorType, a: FrozenDict, kernel: tuple[int, ...]) -> tuple[int, int]:
    if x.rank != 4:
        raise ShapeError(f"{name} needs an operand [N, H, W, C], not {x}")
    _check_window(name, a, kernel)
    out = tuple(window_out(x.shape[1 + i], a["pad"][i], a["pad"][2 + i], kernel[i], a["stride"][i], a["dilation"][i])
                for i in range(2))
    if min(out) < 1:
        raise ShapeError(f"{name}: window {list(kernel)} does not fit {x}")
    return out  # type: ignore[return-value]


def _infer_conv(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, w = types[:2]
    if w.rank != 4 or x.rank != 4:
        raise ShapeError(f"conv2d of {x} and {w}")
    oc, kh, kw, ic = w.shape
    g = a["groups"]
    if g < 1 or x.shape[3] != ic * g or oc % g or (len(types) > 2 and types[2].shape != (oc,)):
        raise ShapeError(f"conv2d: {', '.join(map(str, types))} with {g} groups")
    if a["chain"] and g == x.shape[3] > 1:
        raise ShapeError("conv2d: a depthwise convolution has no chain that could be too long")
    return TensorType((x.shape[0], *_window_shape("conv2d", x, a, (kh, kw)), oc),
                      _product_dtype("conv2d", types, a["zero"], a["chain"]))


def _padded(x: Array, pad: tuple[int, int, int, int], value: float = 0.0) -> Array:
    t, left, b, r = pad
    return np.pad(x, [(0, 0), (t, b), (left, r), (0, 0)], constant_values=value) if any(pad) else x


def _taps(x: Array, kernel: tuple[int, ...], out: tuple[int, ...], a: FrozenDict) -> Any:
    """(kh, kw, view [N, OH, OW, C]) of every tap of a window over the padded image x."""
    (sh, sw), (dh, dw) = a["stride"], a.get("dilation", (1, 1))
    for kh in range(kernel[0]):
        for kw in range(kernel[1]):
            yield kh, kw, x[:, kh * dh:kh * dh + (out[0] - 1) * sh + 1:sh, kw * dw:kw * dw + (out[1] - 1) * sw + 1:sw]


def _ref_conv(x: Sequence[Array], a: FrozenDict) -> Array:
    img, w = x[:2]
    oc, kh, kw, ic = w.shape
    g = a["groups"]
    pt, pl, pb, pr = a["pad"]
    out = (window_out(img.shape[1], pt, pb, kh, a["stride"][0], a["dilation"][0]),
           window_out(img.shape[2], pl, pr, kw, a["stride"][1], a["dilation"][1]))
    n = img.shape[0]
    y = np.zeros((n, *out, g, oc // g), img.dtype)
    for i, j, tap in _taps(_padded(img, a["pad"]), (kh, kw), out, a):
        tap = tap.reshape(n, *out, g, ic)
        wt = w[:, i, j].reshape(g, oc // g, ic)
        if ic == 1:
            y += tap * wt[:, :, 0]
        elif g == 1:
            y[..., 0, :] += tap[..., 0, :] @ wt[0].T
        else:
            y += np.matmul(tap[..., None, :], np.swapaxes(wt, 1, 2))[..., 0, :]
    y = y.reshape(n, *out, oc)
    return y + x[2] if len(x) > 2 else y


_WINDOW = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
_add(Op("conv2d", (2, 3), _infer_conv, _exact(_ref_conv, "zero"),
        {**_WINDOW, "groups": 1, "zero": 0, "chain": 0}, "window", 1e-5, epilogue=3,
        doc="convolution of [N, H, W, C] with [OC, KH, KW, C/groups] and bias [OC]; groups = C is depthwise; "
            "with chain, float32 of the exact sum of 16-bit products, of which so many in a row fit 32 bits"))


def _infer_conv_transpose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, w = types[:2]
    if w.rank != 4 or x.rank != 4:
        raise ShapeError(f"conv_transpose2d of {x} and {w}")
    oc, kh, kw, ic = w.shape
    g = a["groups"]
    if g < 1 or x.shape[3] != ic * g or oc % g or (len(types) > 2 and types[2].shape != (oc,)):
        raise ShapeError(f"conv_transpose2d: {', '.join(map(str, types))} with {g} groups")
    _check_window("conv_transpose2d", a, (kh, kw))
    out = []
    for i in range(2):
        full = (x.shape[1 + i] - 1) * a["stride"][i] + a["dilation"][i] * ((kh, kw)[i] - 1) + 1 + a["out_pad"][i]
        out.append(full - a["pad"][i] - a["pad"][2 + i])
    if min(out) < 1 or min(a["out_pad"]) < 0:
        raise ShapeError(f"conv_transpose2d of {x} and {w} has an empty result")
    return TensorType((x.shape[0], *out, oc), _product_dtype("conv_transpose2d", types, a["zero"]))


def _ref_conv_transpose(x: Sequence[Array], a: FrozenDict) -> Array:
    img, w = x[:2]
    oc, kh, kw, ic = w.shape
    g, (sh, sw), (dh, dw) = a["groups"], a["stride"], a["dilation"]
    n, h, wd, _ = img.shape
    full = np.zeros((n, (h - 1) * sh + dh * (kh - 1) + 1 + a["out_pad"][0],
                     (wd - 1) * sw + dw * (kw - 1) + 1 + a["out_pad"][1], oc), img.dtype)
    grouped = img.reshape(n, h, wd, g, ic)
    for i in range(kh):
        for j in range(kw):
            wt = w[:, i, j].reshape(g, oc // g, ic)
            part = np.matmul(grouped[..., None, :], np.swapaxes(wt, 1, 2))[..., 0, :].reshape(n, h, wd, oc)
            full[:, i * dh:i * dh + (h - 1) * sh + 1:sh, j * dw:j * dw + (wd - 1) * sw + 1:sw] += part
    t, left, b, r = a["pad"]
    y = full[:, t:full.shape[1] - b, left:full.shape[2] - r]
    return y + x[2] if len(x) > 2 else y


_add(Op("conv_transpose2d", (2, 3), _infer_conv_transpose, _exact(_ref_conv_transpose, "zero"),
        {**_WINDOW, "groups": 1, "out_pad": (0, 0), "zero": 0}, "window", 1e-5, epilogue=3,
        doc="the transpose of conv2d: weights [OC, KH, KW, IC/groups], pads cut from the full result"))


def _pool_rule(name: str) -> Callable[[Sequence[TensorType], FrozenDict], TensorType]:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        x = types[0]
        shape = (x.shape[0], *_window_shape(name, x, a, a["kernel"]), x.shape[3])
        for i in range(2):
            if max(a["pad"][i], a["pad"][2 + i]) > a["dilation"][i] * (a["kernel"][i] - 1):
                raise ShapeError(f"{name}: a window lies wholly in the padding")
        return TensorType(shape, x.dtype)

    return rule


def _ref_max_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    low = -np.inf if x[0].dtype.kind == "f" else np.iinfo(x[0].dtype).min
    pt, pl, pb, pr = a["pad"]
    out = tuple(window_out(x[0].shape[1 + i], a["pad"][i], a["pad"][2 + i], a["kernel"][i], a["stride"][i], a["dilation"][i])
                for i in range(2))
    y = None
    for _, _, tap in _taps(_padded(x[0], a["pad"], low), a["kernel"], out, a):
        y = tap if y is None else np.maximum(y, tap)
    return np.array(y)


def _ref_avg_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    out = tuple(window_out(x[0].shape[1 + i], a["pad"][i], a["pad"][2 + i], a["kernel"][i], a["stride"][i], a["dilation"][i])
                for i in range(2))
    ones = np.ones((1, *x[0].shape[1:3], 1), np.float64)
    total = count = 0.0
    for (_, _, tap), (_, _, one) in zip(_taps(_padded(x[0].astype(np.float64), a["pad"]), a["kernel"], out, a),
                                        _taps(_padded(ones, a["pad"]), a["kernel"], out, a), strict=True):
        total, count = total + tap, count + one
    if a["count_pad"]:
        count = math.prod(a["kernel"])
    return (total / np.maximum(count, 1)).astype(x[0].dtype)


_add(Op("max_pool2d", (1, 1), _pool_rule("max_pool2d"), _ref_max_pool, {"kernel": REQUIRED, **_WINDOW}, "window", 0.0,
        epilogue=1, doc="largest element of each window of [N, H, W, C]"))
_add(Op("avg_pool2d", (1, 1), _pool_rule("avg_pool2d"), _ref_avg_pool, {"kernel": REQUIRED, **_WINDOW, "count_pad": False},
        "window", 1e-6, epilogue=1, doc="mean of each window; `count_pad` counts the padding as zeros"))


def _infer_sum_pool(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype not in QUANTIZED:
        raise ShapeError(f"sum_pool2d of {types[0]}")
    return _pool_rule("sum_pool2d")(types, a).with_dtype(DType.i32)


def _ref_sum_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    (t, left, b, r), (sh, sw), (dh, dw) = a["pad"], a["stride"], a["dilation"]
    out = (window_out(x[0].shape[1], t, b, a["kernel"][0], sh, dh), window_out(x[0].shape[2], left, r, a["kernel"][1], sw, dw))
    v = _padded(x[0].astype(np.int32) - a["zero"], a["pad"])
    return np.asarray(np.sum([tap for _, _, tap in _taps(v, a["kernel"], out, a)], axis=0, dtype=np.int32))


_add(Op("sum_pool2d", (1, 1), _infer_sum_pool, _ref_sum_pool, {"kernel": REQUIRED, **_WINDOW, "zero": 0}, "window", 0.0,
        epilogue=1, doc="32-bit sum of (x - zero) over the part of each window that lies inside [N, H, W, C] of 8- or 16-bit "
                        "integers: an average pool before its division"))



def _infer_resize(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, *tables = types
    if x.rank != 4 or not (x.dtype is F32 or (x.dtype in QUANTIZED and all(t.shape[1:] == (1,) for t in tables))):
        raise ShapeError(f"resize2d of {x}")
    for i, (sources, weights) in enumerate((tables[:2], tables[2:])):
        if (sources.dtype, weights.dtype) != (DType.i32, F32) or sources.rank != 2 or sources.shape != weights.shape:
            raise ShapeError(f"resize2d: tables {sources} and {weights}")
        if sources.size == 0 or x.shape[1 + i] == 0:
            raise ShapeError(f"resize2d of {x} with tables {sources}: nothing to sample")
    return TensorType((x.shape[0], tables[0].shape[0], tables[2].shape[0], x.shape[3]), x.dtype)


def _ref_resize(x: Sequence[Array], a: FrozenDict) -> Array:
    image = x[0].astype(np.float64)
    for axis, sources, weights in ((1, x[1], x[2]), (2, x[3], x[4])):
        places = np.clip(sources, 0, image.shape[axis] - 1)
        taps = np.moveaxis(np.take(image, places, axis), axis + 1, -1)  # the sources of each result as the last axis
        spread = [1, 1, 1, 1, weights.shape[1]]
        spread[axis] = weights.shape[0]
        image = np.sum(taps * weights.astype(np.float64).reshape(spread), -1)
    return image.astype(x[0].dtype)


_add(Op("resize2d", (5, 5), _infer_resize, _ref_resize, {}, "window", 1e-5, epilogue=5,
        doc="image [N, H, W, C] resampled: row i of the result is the sum over t of row_weights[i, t] times row rows[i, t], "
            "columns likewise; operands x, rows, row_weights [OH, T], columns, column_weights [OW, S]; of 8- and 16-bit "
            "integers one neighbour of weight 1"))

# ------------------------------------------------------------------------------------ normalisation


def _infer_softmax(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if "axis" in a:  # an attribute that is missing is found elsewhere
        _axis(a["axis"], types[0].rank, "softmax")
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


_add(Op("softmax", (1, 1), _infer_softmax, _ref_softmax, {"axis": -1}, "normalize", 4e-6,
        doc="exp(x) / sum(exp(x)) along an axis"))
_add(Op("log_softmax", (1, 1), _infer_softmax, _ref_log_softmax, {"axis": -1}, "normalize", 4e-6,
        doc="log(softmax(x))"))


def _infer_norm(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x = types[0]
    tail = x.shape[_axis(a["axis"], x.rank, "norm"):]
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




def _infer_integer_softmax(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, table = types
    if x.dtype not in (DType.u8, DType.i8) or table != TensorType((256,), DType.u32) \
            or a["to"] not in QUANTIZED | {DType.i32}:
        raise ShapeError(f"integer_softmax to {a['to'].value} of {x} with exponentials {table}")
    if not 1 <= a["levels"] < 2**31:
        raise ShapeError(f"integer_softmax with {a['levels']} levels")
    _axis(a["axis"], x.rank, "integer_softmax")
    return x.with_dtype(a["to"])


def _ref_integer_softmax(x: Sequence[Array], a: FrozenDict) -> Array:
    v = x[0].astype(np.int64)
    e = x[1][np.max(v, a["axis"], keepdims=True) - v].astype(np.uint64) if v.size else v.astype(np.uint64)
    inverse = np.uint64(a["levels"] << 32) // np.maximum(e.sum(a["axis"], dtype=np.uint64, keepdims=True), np.uint64(1))
    y = ((e * inverse + np.uint64(2**31)) >> np.uint64(32)).astype(np.int64) + a["zero"]
    limits = np.iinfo(a["to"].numpy)
    return np.clip(y, limits.min, limits.max).astype(a["to"].numpy)


_add(Op("integer_softmax", (2, 2), _infer_integer_softmax, _ref_integer_softmax,
        {"axis": -1, "levels": REQUIRED, "zero": 0, "to": REQUIRED}, "normalize", 0.0,
        doc="softmax of bytes without a float instruction: e = table[max x - x], r = floor(levels 2^32 / sum e), "
            "saturate(((e r + 2^31) >> 32) + zero); operands x and the u32 table of 2^F exp(-k scale); levels is 1 / scale "
            "of the result (after Kim et al.: I-BERT, 2021)"))


def _infer_integer_layer_norm(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, scale, bias = types
    tail = TensorType(x.shape[_axis(a["axis"], x.rank, "integer_layer_norm"):], DType.i32)
    if x.dtype not in QUANTIZED or a["to"] not in QUANTIZED or scale != tail or bias != tail or tail.size >= 2**15:
        raise ShapeError(f"integer_layer_norm to {a['to'].value} of {', '.join(map(str, types))}")
    if not (16 <= a["shift"] <= 46 and 1 <= a["eps"] < 2**60):
        raise ShapeError(f"integer_layer_norm with eps {a['eps']} and shift {a['shift']}")
    return x.with_dtype(a["to"])


def _ref_integer_layer_norm(x: Sequence[Array], a: FrozenDict) -> Array:
    n = x[1].size
    v = x[0].astype(np.int64).reshape(-1, n)
    scale, bias = (p.astype(np.int64).reshape(-1) for p in x[1:])
    total = v.sum(1, keepdims=True)
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


_add(Op("integer_layer_norm", (3, 3), _infer_integer_layer_norm, _ref_integer_layer_norm,
        {"axis": -1, "eps": REQUIRED, "shift": REQUIRED, "zero": 0, "to": REQUIRED}, "normalize", 0.0,
        doc="layer normalisation of integers without a float instruction, over the axes from `axis`: with s and q the sums "
            "of x and x^2 of N values, z = (N x - s) / sqrt(N q - s^2 + eps) with 15 fraction bits, "
            "saturate(((z scale + bias 2^(shift-15) + 2^(shift-1)) >> shift) + zero); each rounding as in norm.h; scale and "
            "bias i32 (after Kim et al.: I-BERT, 2021)"))
_add(Op("layer_norm", (2, 3), _infer_norm, _ref_layer_norm, {"axis": -1, "eps": 1e-5}, "normalize", 1e-5,
        doc="(x - mean) / sqrt(var + eps) scale + bias over the axes from `axis` (Ba, Kiros, Hinton: Layer Normalization, 2016)"))
_add(Op("rms_norm", (2, 2), _infer_norm, _ref_rms_norm, {"axis": -1, "eps": 1e-5}, "normalize", 1e-5,
        doc="x / sqrt(mean(x^2) + eps) scale (Zhang, Sennrich: Root Mean Square Layer Normalization, 2019)"))


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


_add(Op("attention", (3, 4), _infer_attention, _ref_attention,
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


def _byte_exponential(x: Array) -> Array:
    """255 * 2^x of attention_integer.h, for x <= 0, in its order of float32 operations."""
    f32 = np.float32
    x = np.where(x > f32(-30), x, f32(-30))
    n = np.rint(x)
    f = x - n
    p = f32(2.443626)
    for c in (14.256141, 61.26145, 176.74667, 255.0):
        p = p * f + f32(c)
    return np.ldexp(p, n.astype(np.int32))


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
    p = np.rint(_byte_exponential((s - s.max(-1, keepdims=True)) * exponent))
    factor = np.float32(a["factor"]) / p.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    y = (p.astype(np.float64) @ v).astype(np.float32) * factor
    y = np.swapaxes(y, 1, 2) if a["token_major"] else y
    return y if a["to"] is F32 else _saturate(y, np.asarray(a["y_zero"], np.uint8), a["to"])


_add(Op("quantized_attention", (3, 4), _infer_quantized_attention, _ref_quantized_attention,
        {"scale": REQUIRED, "factor": REQUIRED, "q_zero": 0, "k_zero": 0, "v_zero": 0, "y_zero": 0, "to": F32,
         "causal": False, "token_major": False}, "contract", 0.0,
        doc="attention of u8 operands q, k, v. s = sum of (q - q_zero)(k - k_zero), scaled (and masked); weights "
            "p = round_even(255 exp(s - max s)); sum of p (v - v_zero), times factor / sum of p, to `to` plus y_zero. "
            "exp is 2^x by a polynomial in float32 whose operations are each correctly rounded, so that p is exactly "
            "defined (kernels/include/skive/attention_integer.h)"))

# ------------------------------------------------------------------------------------ recurrence

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sigmoid": _sigmoid, "tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x}


def _infer_rnn(gates: int, states: int) -> Callable[[Sequence[TensorType], FrozenDict], TensorType]:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        x, w, r, b = types[:4]
        if x.rank != 3 or w.rank != 2 or r.rank != 2:
            raise ShapeError(f"recurrence of {', '.join(map(str, types))}")
        t, n, _ = x.shape
        h = r.shape[1]
        if w.shape != (gates * h, x.shape[2]) or r.shape != (gates * h, h) or b.shape != (2, gates * h) or any(
                s.shape != (n, h) for s in types[4:4 + states]):
            raise ShapeError(f"recurrence of {', '.join(map(str, types))}")
        return TensorType((t, states, n, h) if states > 1 else (t, n, h), x.dtype)

    return rule


def _ref_lstm(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h, c = (v.astype(np.float64) for v in x[:6])
    peep = x[6].astype(np.float64).reshape(3, -1) if len(x) > 6 else np.zeros((3, r.shape[1]))
    f, g, hh = (ACTIVATIONS[n] for n in a["activations"])
    out = []
    for xt in seq:
        i, o, fo, ce = np.split(xt @ w.T + h @ r.T + b[0] + b[1], 4, -1)
        i, fo = f(i + peep[0] * c), f(fo + peep[2] * c)
        c = fo * c + i * g(ce)
        h = f(o + peep[1] * c) * hh(c)
        out.append(np.stack([h, c]))
    return np.stack(out).astype(x[0].dtype)


def _ref_gru(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h = (v.astype(np.float64) for v in x[:5])
    f, g = (ACTIVATIONS[n] for n in a["activations"])
    (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
    (bz, br, bh), (cz, cr, ch) = np.split(b[0], 3), np.split(b[1], 3)
    out = []
    for xt in seq:
        z, rt = f(xt @ wz.T + h @ rz.T + bz + cz), f(xt @ wr.T + h @ rr.T + br + cr)
        n = g(xt @ wh.T + rt * (h @ rh.T + ch) + bh) if a["reset_after"] else g(xt @ wh.T + (rt * h) @ rh.T + ch + bh)
        h = (1 - z) * n + z * h
        out.append(h)
    return np.stack(out).astype(x[0].dtype)


def _ref_rnn(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h = (v.astype(np.float64) for v in x[:5])
    f = ACTIVATIONS[a["activations"][0]]
    out = []
    for xt in seq:
        h = f(xt @ w.T + h @ r.T + b[0] + b[1])
        out.append(h)
    return np.stack(out).astype(x[0].dtype)


_add(Op("lstm", (6, 7), _infer_rnn(4, 2), _ref_lstm, {"activations": ("sigmoid", "tanh", "tanh")}, "contract", 1e-5,
        doc="x [T,N,I], w [4H,I], r [4H,H], b [2,4H], h0 and c0 [N,H], peepholes [3H]; gates i o f c; "
            "result [T, 2, N, H] holds h and c of each step (Hochreiter, Schmidhuber: Long Short-Term Memory, 1997)"))
_add(Op("gru", (5, 5), _infer_rnn(3, 1), _ref_gru, {"activations": ("sigmoid", "tanh"), "reset_after": False}, "contract", 1e-5,
        doc="x [T,N,I], w [3H,I], r [3H,H], b [2,3H], h0 [N,H]; gates z r h; result [T, N, H] (Cho et al., 2014)"))
_add(Op("rnn", (5, 5), _infer_rnn(1, 1), _ref_rnn, {"activations": ("tanh",)}, "contract", 1e-5,
        doc="x [T,N,I], w [H,I], r [H,H], b [2,H], h0 [N,H]; result [T, N, H]"))


# ------------------------------------------------------------------------------------ sources


def _no_reference(x: Sequence[Array], a: FrozenDict) -> Array:
    raise InvalidModelError("an input has no value of its own")


_add(Op("input", (0, 0), lambda t, a: TensorType(tuple(a["shape"]), a["dtype"]), _no_reference,
        {"shape": REQUIRED, "dtype": REQUIRED}, "source", doc="a value given by the caller"))
_add(Op("const", (0, 0), lambda t, a: TensorType(a["value"].shape, DType.of(a["value"].dtype)), lambda x, a: a["value"],
        {"value": REQUIRED}, "source", doc="a value known when the model is compiled"))


def macs(node: Node) -> int:
    """Multiply-accumulates of one evaluation of `node` (0 for everything but contractions)."""
    if node.op == "conv2d":
        return node.type.size * math.prod(node.inputs[1].shape[1:])
    if node.op == "conv_transpose2d":
        return node.inputs[0].type.size * math.prod(node.inputs[1].shape[:3]) // node.attrs["groups"]
    if node.op in ("linear", "compressed_linear"):
        return node.type.size * node.inputs[0].shape[-1]
    if node.op == "matmul":
        return node.type.size * node.inputs[0].shape[-2 if node.attrs["trans_a"] else -1]
    if node.op in ("attention", "quantized_attention"):
        q, k, v = (heads_first(i.shape, node.attrs["token_major"]) for i in node.inputs[:3])
        return math.prod(q[:3]) * k[2] * (q[3] + v[3])
    if node.op in ("lstm", "gru", "rnn"):
        return node.inputs[0].shape[0] * node.inputs[0].shape[1] * (node.inputs[1].type.size + node.inputs[2].type.size)
    return 0
