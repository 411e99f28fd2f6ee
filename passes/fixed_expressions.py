"""Real expressions between `dequantize` and `quantize` as arithmetic of 32-bit integers.

Sums, products and bounds are computed in units of a fraction of the result's step, as fine as every value of the
expression fits 32 bits, which its bounds prove; factors are multipliers and shifts (requantize_fixed). Jacob et
al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.integer_arithmetic import NO_ZERO, limits, per_tensor, reach
from skive.passes.quantize import PRODUCTS
from skive.types import DType

I32 = DType.i32
# What an expression holds, besides contractions and sums.
FIXED = frozenset({"add", "sub", "mul", "div", "neg", "abs", "relu", "clip", "min", "max", "leaky_relu", "prelu"})
MOVES = frozenset({"reshape", "transpose", "slice", "expand"})
FINEST = 14  # bits below the result's step that an expression keeps, at most
COARSEST = 6  # and at least: then sums are held to LARGEST, far beyond what the result can hold
LARGEST = 2.0**27
ROOM = 2.0**30  # of every value in an expression
EXACT = 2.0**12  # integers from here on stand for factors of bytes: an error of 2^-13


def is_fixed(node: Node) -> bool:
    """True for an elementwise operation that expressions hold."""
    if node.op in ("div", "prelu"):
        return node.inputs[1].is_const
    return node.op in FIXED


def is_stored(node: Node) -> bool:
    """`dequantize` of 8- or 16-bit values with one scale."""
    return node.op == "dequantize" and node.inputs[0].dtype in ops.QUANTIZED and per_tensor(node)


def is_byte(node: Node) -> bool:
    """`dequantize` of 8-bit values with one scale."""
    return node.op == "dequantize" and node.inputs[0].dtype in (DType.u8, DType.i8) and per_tensor(node)


class _Wide(Exception):
    """A value of an expression may leave 32 bits in these units."""


class _None(Exception):
    """No integer form."""


Fixed = tuple[Node, float]  # 32-bit integers, and how far from 0 they can come


def multiplier(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i32 multipliers, i32 shifts) with multiplier 2^-shift = `factor` to 2^-31 of it, or to 2^-20 where one
    shift then serves all. OverflowError if a factor is 2^30 or more."""
    factor = np.asarray(factor, np.float64)
    mantissa, exponent = np.frexp(factor)
    exponent = np.where(mantissa == 0, exponent.min(initial=0), exponent)
    common = np.full_like(exponent, exponent.max(initial=0))
    used = common if ((common - exponent)[mantissa != 0] <= 10).all() else exponent
    shift = np.minimum(31 - used, 62)
    whole_ = np.rint(np.ldexp(factor, shift))
    over = np.abs(whole_) >= 2**31  # rounded up to the next power of two
    shift = shift - (over.any() if used is common else over)
    whole_ = np.rint(np.ldexp(factor, shift))
    if (shift < 1).any():
        raise OverflowError(f"a factor of {np.abs(factor).max()}")
    if shift.size and (shift == shift.flat[0]).all():
        shift = np.asarray(shift.flat[0])
    return whole_.astype(np.int32), shift.astype(np.int32)


class _Expression:
    """The integers of one real expression. `origin` names its nodes."""

    def __init__(self, origin: str, saturate: bool):
        self.origin, self.saturate = origin, saturate

    def make(self, name: str, *inputs: Node, **attrs: Any) -> Node:
        return ops.make(name, *inputs, origin=self.origin, **attrs)

    def const(self, value: np.ndarray | float) -> Node:
        value = np.rint(np.asarray(value, np.float64))
        if np.abs(value).max(initial=0) > ROOM:
            raise _Wide
        return constant(value.astype(np.int32))

    def checked(self, node: Node, bound: float) -> Fixed:
        if not bound <= ROOM:
            raise _Wide
        return node, bound

    def rescaled(self, node: Node, factor: np.ndarray, bound: float) -> Fixed:
        """`node` times `factor`, rounded once."""
        try:
            m, s = multiplier(factor)
        except OverflowError:
            raise _Wide from None
        y = self.make("requantize_fixed", node, constant(m), constant(s), NO_ZERO, to=I32)
        reached = bound * float(np.abs(factor).max(initial=0)) + 1
        if self.saturate and reached > LARGEST:
            y, reached = self.make("clip", y, lo=-int(LARGEST), hi=int(LARGEST)), LARGEST
        return self.checked(y, reached)

    def value(self, x: Node, units: np.ndarray) -> Fixed:
        """`x` in integers of `units` for each 1; an array of units belongs to the last axes."""
        if x.is_const:
            v = x.value.astype(np.float64) * units
            return self.const(v), float(np.abs(v).max(initial=0)) + 1
        handler = getattr(self, f"_{x.op}", None)
        if handler is None:
            raise _None
        found: Fixed = handler(x, units)
        return found

    def leaf(self, x: Node) -> Fixed:
        """The integers less their zero point, of a `dequantize`."""
        q, _, zero = x.inputs
        if not zero.is_const:
            raise _None
        z = int(zero.value.flat[0])
        if (zero.value != z).any():
            raise _None
        if q.dtype is I32:
            node, bound = q, sum_bound(q)
            bound += abs(z)
        else:
            low, high = limits(q)
            node, bound = self.make("cast", q, to=I32), float(max(abs(low - z), abs(high - z)))
        return (self.make("sub", node, constant(np.asarray(z, np.int32))) if z else node), bound

    def _dequantize(self, x: Node, units: np.ndarray) -> Fixed:
        if not x.inputs[1].is_const:
            raise _None
        node, bound = self.leaf(x)
        factor = x.inputs[1].value.astype(np.float64) * units
        return self.scaled(node, factor, bound)

    def scaled(self, node: Node, factor: np.ndarray, bound: float) -> Fixed:
        reached = bound * float(np.abs(factor).max(initial=0))
        smallest = float(np.abs(factor).min(initial=np.inf))
        if bound <= 2**16 and smallest >= EXACT and reached <= ROOM:
            return self.checked(self.make("mul", node, self.const(factor)), reached + bound)
        return self.rescaled(node, factor, bound)

    def _add(self, x: Node, units: np.ndarray) -> Fixed:
        (a, p), (b, q) = (self.value(i, units) for i in x.inputs)
        return self.checked(self.make(x.op, a, b), p + q)

    _sub = _add

    def _neg(self, x: Node, units: np.ndarray) -> Fixed:
        return self.value(x.inputs[0], -units)

    def _div(self, x: Node, units: np.ndarray) -> Fixed:
        a, b = x.inputs
        if not b.is_const or not b.value.all():
            raise _None
        return self.value(a, units / b.value)

    def _mul(self, x: Node, units: np.ndarray) -> Fixed:
        a, b = x.inputs
        if a.is_const:
            a, b = b, a
        if b.is_const:
            return self.value(a, units * b.value)
        (p, reach_p, step_p), (q, reach_q, step_q) = map(self._operand, (a, b))
        if reach_p * reach_q > ROOM:
            raise _None
        return self.scaled(self.make("mul", p, q), step_p * step_q * units, reach_p * reach_q)

    def _operand(self, x: Node) -> tuple[Node, float, np.ndarray]:
        """(integers, how far they can come, the step of their unit) of a factor of a product."""
        if not is_byte(x):
            raise _None
        node, bound = self.leaf(x)
        return node, bound, x.inputs[1].value.astype(np.float64).reshape(())

    def positive(self, x: Node, units: np.ndarray, fn: Callable[[np.ndarray], Fixed]) -> Fixed:
        """fn of the magnitudes of the units, with their signs applied to the result."""
        node, bound = fn(np.abs(units))
        if (units < 0).any():
            node = self.make("mul", node, constant(np.sign(units).astype(np.int32)))
        return node, bound

    def _relu(self, x: Node, units: np.ndarray) -> Fixed:
        def fn(u: np.ndarray) -> Fixed:
            node, bound = self.value(x.inputs[0], u)
            return self.make("relu", node), bound

        return self.positive(x, units, fn)

    def _abs(self, x: Node, units: np.ndarray) -> Fixed:
        def fn(u: np.ndarray) -> Fixed:
            node, bound = self.value(x.inputs[0], u)
            return self.make("max", node, self.make("neg", node)), bound

        return self.positive(x, units, fn)

    def _clip(self, x: Node, units: np.ndarray) -> Fixed:
        def fn(u: np.ndarray) -> Fixed:
            node, bound = self.value(x.inputs[0], u)
            for limit, name in ((x.attrs["lo"], "max"), (x.attrs["hi"], "min")):
                if abs(limit) * float(u.max(initial=0)) < ROOM:
                    node = self.make(name, node, self.const(float(limit) * u))
            return node, bound

        return self.positive(x, units, fn)

    def _min(self, x: Node, units: np.ndarray) -> Fixed:
        def fn(u: np.ndarray) -> Fixed:
            (a, p), (b, q) = (self.value(i, u) for i in x.inputs)
            return self.make(x.op, a, b), max(p, q)

        return self.positive(x, units, fn)

    _max = _min

    def _leaky_relu(self, x: Node, units: np.ndarray) -> Fixed:
        return self._sloped(x, units, np.asarray(x.attrs["alpha"], np.float64))

    def _prelu(self, x: Node, units: np.ndarray) -> Fixed:
        if not x.inputs[1].is_const:
            raise _None
        return self._sloped(x, units, x.inputs[1].value.astype(np.float64))

    def _sloped(self, x: Node, units: np.ndarray, slope: np.ndarray) -> Fixed:
        def fn(u: np.ndarray) -> Fixed:
            node, bound = self.value(x.inputs[0], u)
            below, p = self.rescaled(self.make("min", node, NO_ZERO), slope, bound)
            return self.checked(self.make("add", self.make("relu", node), below), bound + p)

        return self.positive(x, units, fn)

    def _moved(self, x: Node, units: np.ndarray) -> Fixed:
        largest = np.asarray(np.abs(units).max(initial=0))
        node, bound = self.value(x.inputs[0], largest)
        node = self.make(x.op, node, **x.attrs)
        return (node, bound) if units.ndim == 0 and units > 0 else self.rescaled(node, units / largest, bound)

    _reshape = _transpose = _slice = _expand = _moved


def sum_bound(q: Node) -> float:
    """How far from 0 the 32-bit integers `q` can come."""
    while q.op in MOVES:
        q = q.inputs[0]
    if q.op in PRODUCTS and q.inputs[1].is_const:
        bias = np.abs(q.inputs[2].value.astype(np.float64)) if len(q.inputs) > 2 and q.inputs[2].is_const else 0
        if len(q.inputs) < 3 or q.inputs[2].is_const:
            return float((reach(q.inputs[0], q.attrs["zero"], q.inputs[1].value) + bias).max(initial=0))
    if q.op == "sum_pool2d":
        low, high = (v - q.attrs["zero"] for v in limits(q.inputs[0]))
        return float(math.prod(q.attrs["kernel"]) * max(abs(low), abs(high)))
    if q.op == "matmul":
        depth = q.inputs[0].shape[-2 if q.attrs["trans_a"] else -1]
        return float(depth) * 255 * 255
    return 2.0**31


def _rounded(node: Node) -> Node | None:
    """The integers of `quantize` or `requantize` of a real expression, or of a 32-bit sum; None if there is no
    integer form."""
    x, s, z = node.inputs
    if not (s.is_const and z.is_const):
        return None
    step = s.value.astype(np.float64)
    units = 1 / step if node.op == "quantize" else step
    if x.op == "dequantize" and x.inputs[1].is_const:
        units, x = units * x.inputs[1].value.astype(np.float64), _Expression(node.origin, False).leaf(x)[0]
    if x.dtype is I32:
        try:
            m, shift = multiplier(units)
        except OverflowError:
            return None
        return ops.make("requantize_fixed", x, constant(m), constant(shift), z, to=node.dtype, origin=node.origin,
                        label=node.name)
    for bits in range(FINEST, COARSEST - 1, -1):
        try:
            value, _ = _Expression(node.origin, bits == COARSEST).value(x, units * 2.0**bits)
        except _Wide:
            continue
        except _None:
            return None
        one = constant(np.asarray(1, np.int32))
        return ops.make("requantize_fixed", value, one, constant(np.asarray(bits, np.int32)), z, to=node.dtype,
                        origin=node.origin, label=node.name)
    return None


def fixed(graph: Graph) -> Graph:
    """`graph` with every rounding of a real expression in integers, where that has an integer form."""

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        node = rebuilt(node, inputs)
        if node.op in ("quantize", "requantize") and not all(i.is_const for i in inputs):
            return _rounded(node) or node
        return node

    return graph.map_nodes(one)
