"""Elementwise operations: functions, arithmetic, comparisons, conversions, and `map`, expressions of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from skive import expr as expressions
from skive.errors import InvalidModelError, ShapeError
from skive.ir import FrozenDict
from skive.ops.table import (
    ANY,
    BOOL,
    F32,
    FLOATS,
    INTS,
    NUMBERS,
    REQUIRED,
    Array,
    Op,
    broadcast_shapes,
    evaluate_expr,
    expr_dtype,
)
from skive.types import DType, TensorType

ROWS: list[Op] = []
_name: str
_fn: Callable[..., Array]
_domain: frozenset[DType]


def _elementwise(name: str, arity: int, fn: Callable[..., Array], domain: frozenset[DType] = FLOATS, *,
                 result: DType | None = None, cxx: str = "", attrs: dict[str, Any] | None = None,
                 tolerance: float = 0.0, doc: str = "") -> None:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        for t in types:
            if t.dtype not in domain:
                raise ShapeError(f"{name} is not defined for {t.dtype.value}")
        if len({t.dtype for t in types}) > 1:
            raise ShapeError(f"{name} needs equal element types, not {', '.join(t.dtype.value for t in types)}")
        return TensorType(broadcast_shapes(*(t.shape for t in types)), result or types[0].dtype)

    keys = tuple(attrs or ())
    ROWS.append(Op(name, (arity, arity), rule, lambda x, a: fn(*x, *(a[k] for k in keys)), attrs or {},
            "elementwise", tolerance, cxx or name, None, doc))


def _float(fn: Callable[..., Array]) -> Callable[..., Array]:
    """`fn` evaluated in float64: the reference of a transcendental function is exact to its type."""
    return lambda x, *a: fn(np.asarray(x, np.float64), *a).astype(x.dtype)


def trunc_div(a: Array, b: Array) -> Array:
    """a / b; of integers truncated toward zero, 0 for b = 0."""
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


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), which no x makes overflow."""
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


def _like(v: float, x: Array) -> Any:
    """`v` in the element type of `x`."""
    return x.dtype.type(v)


_SMOOTH = 2e-6  # a vectorised transcendental: a few units in the last place

_TRANSCENDENTAL: dict[str, Callable[..., Array]] = {
    "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "erf": erf}
for _name, _fn in _TRANSCENDENTAL.items():
    _elementwise(_name, 1, _float(_fn), cxx=_name + "_", tolerance=_SMOOTH, doc=f"{_name}(x)")

_elementwise("rsqrt", 1, _float(lambda x: 1 / np.sqrt(x)), tolerance=_SMOOTH, doc="1 / sqrt(x)")
_elementwise("sigmoid", 1, _float(sigmoid), tolerance=_SMOOTH, doc="1 / (1 + exp(-x))")
_elementwise("silu", 1, _float(lambda x: x * sigmoid(x)), tolerance=_SMOOTH, doc="x sigmoid(x), also called swish")
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

_elementwise("softsign", 1, lambda x: x / (1 + np.abs(x)), doc="x / (1 + |x|)")
_elementwise("reciprocal", 1, lambda x: 1 / x, doc="1 / x")
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
_elementwise("relu", 1, lambda x: np.maximum(x, _like(0, x)), NUMBERS, doc="max(x, 0)")
_elementwise("clip", 1, lambda x, lo, hi: np.minimum(np.maximum(x, _like(lo, x)), _like(hi, x)), NUMBERS,
             attrs={"lo": REQUIRED, "hi": REQUIRED}, doc="min(max(x, lo), hi)")
_elementwise("leaky_relu", 1, lambda x, alpha: np.where(x < 0, _like(alpha, x) * x, x), attrs={"alpha": 0.01},
             doc="x if x >= 0 else alpha x")
_elementwise("thresholded_relu", 1, lambda x, alpha: np.where(x > _like(alpha, x), x, _like(0, x)),
             attrs={"alpha": 1.0}, doc="x if x > alpha else 0")
_elementwise("hard_sigmoid", 1, lambda x, alpha, beta: np.clip(_like(alpha, x) * x + _like(beta, x), 0, 1),
             attrs={"alpha": 0.2, "beta": 0.5}, cxx="hard_sigmoid_", doc="clip(alpha x + beta, 0, 1)")


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
_elementwise("hard_swish", 1, lambda x: x * np.clip(x * _like(1 / 6, x) + _like(0.5, x), 0, 1), cxx="hard_swish_",
             doc="x clip(x / 6 + 1/2, 0, 1)")
_elementwise("shrink", 1, lambda x, bias, lambd: np.where(x < -lambd, x + _like(bias, x),
                                                          np.where(x > lambd, x - _like(bias, x), x * 0)),
             NUMBERS, attrs={"bias": 0.0, "lambd": 0.5}, tolerance=1e-6, doc="soft or hard shrinkage")
_elementwise("not", 1, np.logical_not, frozenset({BOOL}), cxx="not_", doc="logical not")
_elementwise("bit_not", 1, np.invert, INTS, doc="bitwise not")
_elementwise("is_nan", 1, np.isnan, result=BOOL, doc="x is not a number")
_elementwise("is_inf", 1, lambda x, neg, pos: (np.isneginf(x) & neg) | (np.isposinf(x) & pos), result=BOOL,
             attrs={"neg": True, "pos": True}, doc="x is infinite, of the wanted sign")


def _infer_cast(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    return TensorType(types[0].shape, a["to"])


ROWS.append(Op("cast", (1, 1), _infer_cast, lambda x, a: _cast(x[0], a["to"]), {"to": REQUIRED}, "elementwise", 0.0, "cast",
        doc="x in another element type; float to integer truncates, integers wrap, bool is x != 0"))

def _infer_bit_cast(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, to = types[0], a["to"]
    if to.bytes != x.dtype.bytes or (to is BOOL and x.dtype is not BOOL):  # a bool is 0 or 1, no other bits
        raise ShapeError(f"bit_cast of {x} to {to.value}")
    return TensorType(x.shape, to)


def _ref_bit_cast(x: Sequence[Array], a: FrozenDict) -> Array:
    return np.frombuffer(x[0].tobytes(), a["to"].numpy).reshape(x[0].shape)


ROWS.append(Op("bit_cast", (1, 1), _infer_bit_cast, _ref_bit_cast, {"to": REQUIRED}, "elementwise", 0.0, "bit_cast",
        doc="the bits of x as another element type of the same width"))

_BINARY: list[tuple[str, Callable[..., Array], frozenset[DType]]] = [
        ("add", np.add, NUMBERS), ("sub", np.subtract, NUMBERS), ("mul", np.multiply, NUMBERS),
        ("div", trunc_div, NUMBERS), ("min", np.minimum, NUMBERS), ("max", np.maximum, NUMBERS),
        ("bit_and", np.bitwise_and, INTS), ("bit_or", np.bitwise_or, INTS), ("bit_xor", np.bitwise_xor, INTS)]
for _name, _fn, _domain in _BINARY:
    _elementwise(_name, 2, _fn, _domain, cxx=_name + "_" if _name in ("div", "min", "max") else _name,  # libc has them too
                 doc=f"{_name}(a, b)")
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
_elementwise("prelu", 2, lambda x, s: np.where(x < 0, s * x, x), NUMBERS, doc="x if x >= 0 else slope x")


def _infer_where(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype is not BOOL or types[1].dtype is not types[2].dtype:
        raise ShapeError("where needs a bool condition and two operands of one element type")
    return TensorType(broadcast_shapes(*(t.shape for t in types)), types[1].dtype)


ROWS.append(Op("where", (3, 3), _infer_where, lambda x, a: np.where(*x), {}, "elementwise", 0.0, "where",
        doc="a where the condition holds, else b"))


def _infer_map(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    e = expressions.parse(a["fn"])
    if e.arity > len(types):
        raise ShapeError(f"map: {a['fn']!r} names more operands than there are")
    return TensorType(broadcast_shapes(*(t.shape for t in types)), expr_dtype(e, [t.dtype for t in types]))


def _ref_map(x: Sequence[Array], a: FrozenDict) -> Array:
    shape = np.broadcast_shapes(*(v.shape for v in x))
    return np.broadcast_to(evaluate_expr(expressions.parse(a["fn"]), x), shape)


ROWS.append(Op("map", (1, 64), _infer_map, _ref_map, {"fn": REQUIRED}, "elementwise", 4e-6,
        doc="a fused elementwise expression over broadcast operands"))
