"""Elementwise operations."""

from __future__ import annotations

import math
from collections.abc import Callable

from skive.export.onnx.writer import ELEM_TYPES, SINCE, Inexpressible, Writer, row, scalar
from skive.ir import Node

# IR operation -> ONNX operator of the same operands and no attributes.
PLAIN = {
    "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "sigmoid": "Sigmoid", "softplus": "Softplus",
    "mish": "Mish", "softsign": "Softsign", "reciprocal": "Reciprocal", "floor": "Floor", "ceil": "Ceil",
    "round_even": "Round", "abs": "Abs", "neg": "Neg", "sign": "Sign", "relu": "Relu", "hard_swish": "HardSwish",
    "not": "Not", "bit_not": "BitwiseNot", "is_nan": "IsNaN", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "min": "Min", "max": "Max", "bit_and": "BitwiseAnd", "bit_or": "BitwiseOr", "bit_xor": "BitwiseXor",
    "and": "And", "or": "Or", "xor": "Xor", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "equal": "Equal", "pow": "Pow", "prelu": "PRelu", "where": "Where"}
# IR operation -> (ONNX operator, {ONNX attribute: IR attribute}).
WITH_ATTRIBUTES = {
    "elu": ("Elu", {"alpha": "alpha"}), "selu": ("Selu", {"alpha": "alpha", "gamma": "gamma"}),
    "celu": ("Celu", {"alpha": "alpha"}), "leaky_relu": ("LeakyRelu", {"alpha": "alpha"}),
    "thresholded_relu": ("ThresholdedRelu", {"alpha": "alpha"}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": "alpha", "beta": "beta"}),
    "shrink": ("Shrink", {"bias": "bias", "lambd": "lambd"})}


@row(*PLAIN)
def plain(w: Writer, n: Node) -> None:
    order, names = w.operands(n)
    w.put(n, w.emit(PLAIN[n.op], *names), order)


@row(*WITH_ATTRIBUTES)
def parametric(w: Writer, n: Node) -> None:
    order, names = w.operands(n)
    op, attrs = WITH_ATTRIBUTES[n.op]
    w.put(n, w.emit(op, *names, **{k: float(n.attrs[v]) for k, v in attrs.items()}), order)


def spelled(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers `fn(writer, node, *operand tensors)`, which spells an elementwise operation in several."""

    def register(fn: Callable[..., str]) -> Callable[..., str]:
        @row(*names)
        def write(w: Writer, n: Node) -> None:
            order, operands = w.operands(n)
            w.put(n, fn(w, n, *operands), order)

        return fn

    return register


@spelled("rsqrt")
def rsqrt(w: Writer, n: Node, x: str) -> str:
    return w.emit("Reciprocal", w.emit("Sqrt", x))


@spelled("silu")
def silu(w: Writer, n: Node, x: str) -> str:
    return w.emit("Mul", x, w.emit("Sigmoid", x))


@spelled("gelu", "gelu_tanh")
def gelu(w: Writer, n: Node, x: str) -> str:
    if w.opset >= SINCE["Gelu"] or n.op == "gelu_tanh":
        return w.emit("Gelu", x, approximate="none" if n.op == "gelu" else "tanh")
    half = w.emit("Mul", x, scalar(0.5, n.dtype))
    erf = w.emit("Erf", w.emit("Mul", x, scalar(math.sqrt(0.5), n.dtype)))
    return w.emit("Mul", half, w.emit("Add", erf, scalar(1, n.dtype)))


@spelled("trunc")
def trunc(w: Writer, n: Node, x: str) -> str:
    return w.emit("Mul", w.emit("Sign", x), w.emit("Floor", w.emit("Abs", x)))


@spelled("clip")
def clip(w: Writer, n: Node, x: str) -> str:
    lo, hi = (v if math.isfinite(v) else None for v in (n.attrs["lo"], n.attrs["hi"]))
    return w.emit("Clip", x, "" if lo is None else scalar(lo, n.dtype), "" if hi is None else scalar(hi, n.dtype))


@spelled("is_inf")
def is_inf(w: Writer, n: Node, x: str) -> str:
    return w.emit("IsInf", x, detect_negative=int(n.attrs["neg"]), detect_positive=int(n.attrs["pos"]))


@spelled("cast")
def cast(w: Writer, n: Node, x: str) -> str:
    return w.emit("Cast", x, to=ELEM_TYPES[n.dtype])


@spelled("not_equal")
def not_equal(w: Writer, n: Node, a: str, b: str) -> str:
    return w.emit("Not", w.emit("Equal", a, b))


@spelled("mod")
def mod(w: Writer, n: Node, a: str, b: str) -> str:
    if n.dtype.is_int:
        return w.emit("Mod", a, b)
    remainder = w.emit("Mod", a, b, fmod=1)  # with the sign of a
    other_sign = w.emit("Less", w.emit("Mul", remainder, b), scalar(0, n.dtype))
    return w.emit("Where", other_sign, w.emit("Add", remainder, b), remainder)


@spelled("fmod")
def fmod(w: Writer, n: Node, a: str, b: str) -> str:
    return w.emit("Mod", a, b, fmod=1)


@spelled("shift_left", "shift_right")
def shift(w: Writer, n: Node, a: str, b: str) -> str:
    if n.dtype.is_signed:
        raise Inexpressible("ONNX shifts unsigned integers only")
    return w.emit("BitShift", a, b, direction="LEFT" if n.op == "shift_left" else "RIGHT")
