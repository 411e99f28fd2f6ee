"""Elementwise operators, casts and selection."""

from __future__ import annotations

import math

from skive.errors import InvalidModelError
from skive.frontend.onnx.load import DTYPES
from skive.frontend.onnx.table import Call, Unsupported, Value, onnx_op
from skive.ir import Node
from skive.ops import broadcast_shapes
from skive.types import DType

UNARY = {
    "Abs": "abs", "Acos": "acos", "Acosh": "acosh", "Asin": "asin", "Asinh": "asinh", "Atan": "atan",
    "Atanh": "atanh", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Erf": "erf", "Exp": "exp",
    "Floor": "floor", "HardSwish": "hard_swish", "IsNaN": "is_nan", "Log": "log", "Mish": "mish",
    "Neg": "neg", "Not": "not", "BitwiseNot": "bit_not", "Reciprocal": "reciprocal", "Relu": "relu",
    "Round": "round_even", "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin", "Sinh": "sinh",
    "Softplus": "softplus", "Softsign": "softsign", "Sqrt": "sqrt", "Tan": "tan", "Tanh": "tanh"}
BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "And": "and", "Or": "or", "Xor": "xor",
    "BitwiseAnd": "bit_and", "BitwiseOr": "bit_or", "BitwiseXor": "bit_xor", "Equal": "equal",
    "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less",
    "LessOrEqual": "less_equal"}
# operator -> (IR operation, {attribute: default})
WITH_ATTRIBUTES = {
    "Elu": ("elu", {"alpha": 1.0}),
    "Selu": ("selu", {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "Celu": ("celu", {"alpha": 1.0}),
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "ThresholdedRelu": ("thresholded_relu", {"alpha": 1.0}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": 0.2, "beta": 0.5}),
    "Shrink": ("shrink", {"bias": 0.0, "lambd": 0.5})}


@onnx_op(*UNARY)
def unary(c: Call) -> Node:
    return c.make(UNARY[c.op_type], c[0])


@onnx_op(*WITH_ATTRIBUTES)
def parametric(c: Call) -> Node:
    op, defaults = WITH_ATTRIBUTES[c.op_type]
    return c.make(op, c[0], **{k: float(c.attr(k, v)) for k, v in defaults.items()})


@onnx_op(*BINARY)
def binary(c: Call) -> Node:
    a, b = c[0], c[1]
    if c.attr("broadcast") and "axis" in c.attrs and b.type.rank:  # opset 6: b starts at an axis of a
        tail = a.type.rank - int(c.attr("axis")) - b.type.rank
        if tail < 0:
            raise InvalidModelError(f"{b.type} does not fit {a.type} at axis {c.attr('axis')}")
        b = c.reshape(b, (*b.shape, *[1] * tail))
    return c.make(BINARY[c.op_type], a, b)


@onnx_op("Sum", "Min", "Max", "Mean")
def variadic(c: Call) -> Node:
    op = {"Sum": "add", "Mean": "add", "Min": "min", "Max": "max"}[c.op_type]
    total = c.fold(op, c.tensors)
    if c.op_type == "Mean" and len(c.inputs) > 1:
        return c.make("mul", total, 1.0 / len(c.inputs))
    return total


@onnx_op("Pow")
def power(c: Call) -> Node:
    base, exponent = c[0], c[1]
    if exponent.is_const and exponent.type.size == 1 and exponent.type.rank <= base.type.rank:
        value = float(exponent.value.reshape(-1)[0])
        if value == 2.0:
            return c.make("mul", base, base)
        if value == 3.0:
            return c.make("mul", c.make("mul", base, base), base)
        if base.dtype.is_float and value in (0.5, -0.5, -1.0):
            return c.make({0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}[value], base)
    if base.dtype is exponent.dtype:
        return c.make("pow", base, exponent)
    if base.dtype.is_int and exponent.dtype.is_float:
        return c.cast(c.make("pow", c.cast(base, DType.f64), c.cast(exponent, DType.f64)), base.dtype)
    if base.dtype.is_int:  # the low bits of a wide power are the narrow power; a negative exponent stays negative
        return c.cast(c.make("pow", c.cast(base, DType.i64), c.cast(exponent, DType.i64)), base.dtype)
    return c.make("pow", base, c.cast(exponent, base.dtype))


@onnx_op("Mod")
def modulo(c: Call) -> Node:
    return c.make("fmod" if c.attr("fmod", 0) else "mod", c[0], c[1])


@onnx_op("PRelu")
def prelu(c: Call) -> Node:
    x, slope = c[0], c[1]
    if c.opset < 7 and slope.type.rank == 1 and x.type.rank > 2 and slope.shape[0] != 1:
        slope = c.reshape(slope, (*slope.shape, *[1] * (x.type.rank - 2)))
    return c.make("prelu", x, slope)


@onnx_op("BitShift")
def bit_shift(c: Call) -> Node:
    x, by = c[0], c[1]
    if c.choice("direction", "LEFT", "RIGHT") == "LEFT":
        return c.make("shift_left", x, by)
    if x.dtype.is_signed:  # shifting out every bit leaves copies of the sign
        by = c.make("min", by, x.dtype.bytes * 8 - 1)
    return c.make("shift_right", x, by)


@onnx_op("Clip")
def clip(c: Call) -> Node:
    x = c[0]
    low, high = c.get(1), c.get(2)
    if c.opset < 11:
        low = c.lit(c.attr("min"), x.dtype) if "min" in c.attrs else None
        high = c.lit(c.attr("max"), x.dtype) if "max" in c.attrs else None
    if low is not None and high is not None and low.is_const and high.is_const:
        lo, hi = low.value.reshape(-1)[0].item(), high.value.reshape(-1)[0].item()
        if math.isfinite(lo) and math.isfinite(hi):
            return c.make("clip", x, lo=lo, hi=hi)
    if low is not None:
        relu = low.is_const and not low.value.any()
        x = c.make("relu", x) if relu else c.make("max", x, c.reshape(low, ()))
    return x if high is None else c.make("min", x, c.reshape(high, ()))


@onnx_op("Gelu")
def gelu(c: Call) -> Node:
    return c.make("gelu_tanh" if c.choice("approximate", "none", "tanh") == "tanh" else "gelu", c[0])


@onnx_op("Swish")
def swish(c: Call) -> Node:
    alpha = float(c.attr("alpha", 1.0))
    if alpha == 1.0:
        return c.make("silu", c[0])
    return c.make("mul", c[0], c.make("sigmoid", c.make("mul", c[0], alpha)))


@onnx_op("IsInf")
def is_inf(c: Call) -> Node:
    return c.make("is_inf", c[0], neg=bool(c.attr("detect_negative", 1)), pos=bool(c.attr("detect_positive", 1)))


@onnx_op("Where")
def where(c: Call) -> Node:
    condition, a, b = c[0], c[1], c[2]
    for taken, other, always in ((a, b, True), (b, a, False)):
        if (condition.is_const and (condition.value == always).all() and taken.dtype is other.dtype
                and broadcast_shapes(condition.shape, a.shape, b.shape) == taken.shape):
            return taken
    return c.make("where", condition, a, b)


@onnx_op("Cast")
def cast(c: Call) -> Node:
    to = c.required("to")
    if to not in DTYPES:
        raise Unsupported("the element type that Cast produces is not supported")
    return c.cast(c[0], DTYPES[to])


@onnx_op("BitCast")
def bit_cast(c: Call) -> Node:
    to = c.required("to")
    source, target = c[0].dtype, DTYPES.get(to)
    if target is None or target.bytes != source.bytes or (target is DType.bool and source is not DType.bool):
        raise Unsupported(f"BitCast of {source.value} to {target.value if target else f'element type {to}'}")
    return c.make("bit_cast", c[0], to=target)


@onnx_op("CastLike")
def cast_like(c: Call) -> Node:
    return c.cast(c[0], c[1].dtype)


@onnx_op("Identity")
def identity(c: Call) -> Value:
    return c.value(0)


@onnx_op("Dropout")
def dropout(c: Call) -> list[Node]:
    """Inference only: the input, and a mask that keeps everything."""
    if c.has(2) and c.const(2, "training_mode").reshape(-1)[0]:
        ratio = c.const(1, "ratio").reshape(-1)[0] if c.has(1) else 0.5
        if ratio != 0:
            raise Unsupported("Dropout in training mode draws random numbers", "export the model for inference")
    x = c[0]
    return [x, c.full(x.shape, True, DType.bool)] if c.wants(1) else [x]
