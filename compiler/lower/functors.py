"""Expressions of elementwise functions as the functors that kernels run on their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from skive import expr as expressions
from skive import ops
from skive.division import divides_exactly
from skive.ir import Node
from skive.plan import Access, FnStep
from skive.types import DType, TensorType

# Operations whose function in math.h or functions.h has an overload for Vec<N>; the others run on scalars.
VECTOR = frozenset(
    """
    less less_equal greater greater_equal equal not_equal and or xor not where is_nan is_inf add sub
    mul div neg abs sqrt rsqrt exp log sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh
    erf floor ceil round_even trunc sign reciprocal relu clip min max pow mod fmod sigmoid silu gelu
    gelu_tanh hard_sigmoid hard_swish leaky_relu elu selu celu softplus softsign mish prelu
    thresholded_relu shrink piecewise
    """.split()
)


# The same for integers in vectors of 32-bit lanes: what never leaves the range of its type, and what may.
VECTOR_INT = frozenset("quantize requantize requantize_fixed dequantize cast min max relu clip".split())
VECTOR_I32 = VECTOR_INT | frozenset("add sub mul neg abs".split())
IN_VECTORS = frozenset((DType.f32, DType.i8, DType.u8, DType.i16, DType.u16, DType.i32))


def in_vectors(e: expressions.Expr, operands: Sequence[DType]) -> bool:
    """Whether every step of `e` on operands of these types has a function over vectors."""
    types: list[DType] = []
    for s in e.steps:
        args = [operands[i] if k == "x" else types[i] for k, i in s.args]
        to = ops.infer(s.op, [TensorType((), t) for t in args], ops.complete_attrs(s.op, dict(s.attrs))).dtype
        types.append(to)
        involved = {to, *args}
        if involved <= {DType.f32, DType.bool}:
            known = s.op in VECTOR
        elif not involved <= IN_VECTORS:
            known = False
        elif s.op == "cast":  # truncation and wrapping have no vector form
            known = args[0] is not DType.f32 and (to is DType.f32 or to is DType.i32)
        else:
            known = s.op in (VECTOR_I32 if involved <= {DType.i32} else VECTOR_INT)
        if not known:
            return False
    return types[-1] in IN_VECTORS


def literal(value: Any, dtype: DType) -> str:
    """A C++ literal of exactly this value and type."""
    if dtype is DType.bool:
        return "true" if value else "false"
    if dtype.is_float:
        v = dtype.numpy.type(value)
        suffix = "f" if dtype is DType.f32 else ""
        if np.isnan(v):
            return f'__builtin_nan{suffix}("")'
        if np.isinf(v):
            return f"{'-' if v < 0 else ''}__builtin_inf{suffix}()"
        text = repr(float(v)) if dtype is not DType.f32 else np.format_float_scientific(v, unique=True)
        return text.rstrip(".") + suffix if "e" in text or "." in text else f"{text}.0{suffix}"
    v = int(value)
    if dtype is DType.u64:
        return f"uint64_t{{{v}ull}}"
    if v == -(2**63):
        return "(-9223372036854775807ll - 1)"
    return f"static_cast<{dtype.ctype}>({v}{'ll' if dtype is DType.i64 else ''})"


def fusible_operand(extra: Node, base: Node) -> Access | None:
    """How an epilogue reads `extra` beside a result of `base`'s shape; None if it cannot."""
    shape, full = extra.shape, base.shape
    if extra.dtype not in IN_VECTORS:
        return None
    if extra.type.size == 1:
        return Access("literal", text=literal(extra.value.item(), extra.dtype)) if extra.is_const else Access("scalar")
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    c = full[-1]
    if padded == full:
        return Access("full", stride=c)
    if padded[-1] == c and all(d == 1 for d in padded[:-1]):
        return Access("channel")
    if padded[-1] == 1 and padded[:-1] == full[:-1]:
        return Access("pixel")
    if len(full) > 2 and padded[-1] == c and padded[0] == full[0] and all(d == 1 for d in padded[1:-1]):
        return Access("sample", stride=c, pixels=math.prod(full[1:-1]))
    return None


def sum_dtype(node: Node) -> DType:
    """The element type that the kernel of `node` hands to its epilogue."""
    floats = node.inputs[0].dtype is DType.f32 or node.attrs.get("chain")
    return DType.f32 if floats else DType.i32


def steps_of(e: expressions.Expr, dtypes: Sequence[DType]) -> tuple[FnStep, ...]:
    """The expression in C++ function names and literals."""
    steps: list[FnStep] = []
    types: list[DType] = []
    for s in e.steps:
        row = ops.op_of(s.op)
        operand_types = [dtypes[i] if k == "x" else types[i] for k, i in s.args]
        attrs = ops.complete_attrs(s.op, dict(s.attrs))
        types.append(row.infer([TensorType((), t) for t in operand_types], attrs).dtype)
        if s.op == "piecewise":
            table = ops.piecewise_table(attrs)
            name = f"piecewise<{attrs['lowest']}, {table.shape[1]}, {attrs['degree']}>"
            steps.append(FnStep(name, tuple(f"{k}{i}" for k, i in s.args),
                                table=tuple(literal(v, DType.f32) for v in table.reshape(-1))))
            continue
        name, tail = row.cxx, []
        for v in attrs.values():
            if isinstance(v, DType):
                name += f"<{v.ctype}>"
            elif isinstance(v, bool):
                tail.append("true" if v else "false")
            else:
                tail.append(literal(v, operand_types[0]))
        steps.append(FnStep(name, tuple(f"{k}{i}" for k, i in s.args), tuple(tail)))
    return tuple(steps)


def without_divisions(
    e: expressions.Expr, steps: tuple[FnStep, ...], operands: Sequence[Node | None]
) -> tuple[FnStep, ...]:
    """`steps` on vectors in which `quantize` multiplies where that gives the same integers as its division."""

    def value(arg: tuple[str, int]) -> Node | None:
        node = operands[arg[1]] if arg[0] == "x" else None
        return node if node is not None and node.is_const and node.type.size == 1 else None

    done = list(steps)
    for n, s in enumerate(e.steps):
        scale, zero = (value(a) for a in s.args[1:3]) if s.op == "quantize" else (None, None)
        if scale is None or zero is None:
            continue
        limits, z = np.iinfo(zero.dtype.numpy), int(zero.value.item())
        divisor = scale.value.reshape(())[()]
        if divides_exactly(float(divisor), limits.min - z, limits.max - z):
            texts = (literal(v, DType.f32) for v in (divisor, np.float32(1) / divisor))
            name = steps[n].name.replace("quantize<", "quantize_by<")
            done[n] = FnStep(name, steps[n].args[:1], (*texts, literal(z, zero.dtype)))
    return tuple(done)


def rounded_by_store(
    node: Node | None,
    e: expressions.Expr,
    steps: tuple[FnStep, ...],
    operands: Sequence[Access],
    types: Sequence[DType],
) -> tuple[FnStep, ...]:
    """`steps` with a quantizing last step as `rounded` (tile.h), whose store saturates several registers at once.
    `node`: the contraction of which `e` is the epilogue."""
    last, name = e.steps[-1], steps[-1].name
    if node is not None and _is_relu_of_rounded(e, operands):  # sums of integers hold no NaN
        before = rounded_by_store(node, expressions.Expr(e.steps[:-1]), steps[:-1], operands, types)
        if before[-1].name.startswith("rounded<"):
            bound, store = FnStep("relu", before[-1].args), before[-1]
            return *before[:-1], bound, FnStep(store.name, (f"t{len(before) - 1}",), store.tail)
    if last.op not in ("quantize", "requantize") or last.args[2][0] != "x":
        return steps
    zero, (kind, index) = operands[last.args[2][1]], last.args[0]
    to = name[name.index("<") + 1 : -1]
    if zero.mode != "literal" or to not in ("uint8_t", "int8_t", "int16_t"):
        return steps
    value, factor = (f"{k}{i}" for k, i in last.args[:2])
    done = list(steps[:-1])
    dtype = types[index] if kind == "x" else ops.expr_dtype(expressions.Expr(e.steps[: index + 1]), types)
    if dtype is not DType.f32:
        done.append(FnStep("cast<float>", (value,)))
        value = f"t{len(done) - 1}"
    one = last.args[1][0] == "x" and operands[last.args[1][1]].text == literal(1.0, DType.f32)
    small = node is not None and last.op == "requantize" and _reach(node, e, ("t", len(e.steps) - 1)) < 2**30
    if name.startswith("quantize_by"):
        done.append(FnStep("quotient", (value,), steps[-1].tail[:2]))
        small = True
    elif not one or last.op != "requantize":
        times = "mul" if node is not None else "scaled"  # a map's own multiplications are other arithmetic
        done.append(FnStep(times if last.op == "requantize" else "div_", (value, factor)))
    if len(done) > len(steps) - 1 + (dtype is not DType.f32):
        value = f"t{len(done) - 1}"
    done.append(FnStep(f"rounded<{to}, {'true' if small else 'false'}>", (value,), (zero.text,)))
    return tuple(done)


def _is_relu_of_rounded(e: expressions.Expr, operands: Sequence[Access]) -> bool:
    """Whether the last two steps are a rounding and the bound of its integers at the zero point."""
    if len(e.steps) < 2 or e.steps[-1].op != "clip" or e.steps[-2].op not in ("quantize", "requantize"):
        return False
    bound, rounding = dict(e.steps[-1].attrs), e.steps[-2]
    kind, index = rounding.args[2]
    to = dict(rounding.attrs)["to"]
    if kind != "x" or operands[index].text != literal(bound["lo"], to):
        return False
    return int(bound["hi"]) >= np.iinfo(to.numpy).max


def _reach(node: Node, e: expressions.Expr, value: tuple[str, int]) -> float:
    """How far from 0 a value of the epilogue `e` of the integer contraction `node` can come, before it is rounded;
    infinite where that is not known."""
    return float(np.max(_reaches(node, e, value), initial=0.0))


def _reaches(node: Node, e: expressions.Expr, value: tuple[str, int]) -> np.ndarray:
    """The same by output channel, or one number."""
    x, w, *rest = node.inputs
    unknown = np.asarray(np.inf)
    kind, index = value
    if kind == "x" and index > 0:
        operand = rest[index]
        if operand.is_const:
            return _by_channel(np.abs(operand.value.astype(np.float64)), w.shape[0])
        limits = None if operand.dtype.is_float else np.iinfo(operand.dtype.numpy)
        return unknown if limits is None else np.asarray(max(-float(limits.min), float(limits.max)))
    if kind == "x":
        return unknown if x.dtype.is_float or node.attrs.get("chain") else largest_sums(node).astype(np.float64)
    step = e.steps[index]
    of = [_reaches(node, e, a) for a in step.args]
    if step.op in ("requantize", "mul", "dequantize"):  # the zero point of dequantize is taken out before
        return (of[0] + of[2] if step.op == "dequantize" else of[0]) * of[1]
    if step.op in ("add", "sub"):
        return of[0] + of[1]
    if step.op in ("relu", "cast"):
        return of[0]
    return np.maximum(of[0], of[1]) if step.op in ("min", "max") else unknown


def largest_sums(node: Node) -> np.ndarray:
    """[OC] int64: how far from 0 the sums of an integer contraction can come, by its weights and its bias."""
    x, w, bias = node.inputs[:3]
    limits = np.iinfo(x.dtype.numpy)
    sums = np.abs(w.value.astype(np.int64)).reshape(w.shape[0], -1).sum(1) * (int(limits.max) - int(limits.min))
    return np.asarray(sums + np.abs(bias.value.astype(np.int64)))


def _by_channel(values: np.ndarray, channels: int) -> np.ndarray:
    """[channels] the largest for each, or one for all."""
    if values.ndim and values.shape[-1] == channels:
        return values.reshape(-1, channels).max(0)
    return values.max(initial=0.0)
