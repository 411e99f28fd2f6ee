"""Sums that come out of an integer contraction as float32: one multiply-add instead of a conversion and a product.

A sum that starts at the bits of 2^23 is, below 2^23, the bits of the float32 number 2^23 + sum. Times the
factor, less 2^23 times the factor, with one rounding: exactly the product of the converted sum. Negative sums give
half of what they should, which is negative too: right where only the saturation to unsigned bytes follows.
"""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.lower.calls import Lowering
from skive.lower.functors import largest_sums, literal
from skive.lower.storage import View
from skive.plan import Access, Arg, Fn, FnStep
from skive.types import DType

START = 0x4B000000  # the bits of 2^23
_WHOLE = 2.0**23  # from here to twice that, float32 numbers are 1 apart


def shifted_sums(
    ctx: Lowering, node: Node, fn: Fn, args: list[tuple[View, Arg]]
) -> tuple[Fn, list[tuple[View, Arg]], int]:
    """(epilogue, its arguments, what every sum of `node` starts with besides its bias): as given, and 0, where the
    conversion has to stay. Plain C++ keeps it, so that it checks the others."""
    unchanged = fn, args, 0
    if ctx.target.vectors == "generic" or node.inputs[0].dtype is not DType.u8 or len(fn.steps) < 2:
        return unchanged
    first, last = fn.steps[0], fn.steps[-1]
    if last.name != "rounded<uint8_t, true>" or last.tail != (literal(0, DType.u8),):
        return unchanged
    if first == FnStep("cast<float>", ("x0",)) and fn.steps[1].name == "mul" and fn.steps[1].args[0] == "t0":
        done, factor_name = 2, fn.steps[1].args[1]
    elif first.name == "dequantize" and first.args[0] == "x0" and _text(fn, first.args[2]) == literal(0, DType.i32):
        done, factor_name = 1, first.args[1]
    else:
        return unchanged
    between = fn.steps[done:-1]
    bounds = all(s.name == "min_" and s.args[0] == f"t{done - 1 + i}" and s.args[1][0] == "x"
                 for i, s in enumerate(between))
    if not bounds or not factor_name.startswith("x") or max(largest_sums(node), default=0) >= _WHOLE:
        return unchanged
    number = int(factor_name[1:])
    factor, access = node.inputs[2 + number], fn.operands[number]
    if not factor.is_const or access.mode not in ("channel", "literal"):
        return unchanged
    values = factor.value.reshape(-1)
    if not ((values > 2.0**-60) & (values < 2.0**60)).all():
        return unchanged
    offsets = (values * np.float32(-_WHOLE)).astype(np.float32)
    name = f"e{len(fn.operands)}"
    if access.mode == "literal":
        offset = Access("literal", text=literal(offsets[0], DType.f32))
    else:
        args = [*args, ctx.packed(name, offsets)]
        offset = Access("channel", arg=name)
    steps = [FnStep("scaled_sum", ("x0", factor_name, f"x{len(fn.operands)}"))]
    steps += [FnStep(s.name, (f"t{i}", s.args[1]), s.tail) for i, s in enumerate(between)]
    steps.append(FnStep(last.name, (f"t{len(steps) - 1}",), last.tail))
    return Fn(tuple(steps), (*fn.operands, offset), fn.epilogue, fn.vector), args, START


def _text(fn: Fn, name: str) -> str:
    return fn.operands[int(name[1:])].text if name.startswith("x") else ""
