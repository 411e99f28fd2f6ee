"""`integer-only`: every operation on integers, so that the artefact has no float instruction.

`Storage` decides what is stored: every value but those that a fixed-point expression keeps in registers
(a contraction's sum, its bias, bounds, residual additions), since float32 registers are not there. All are
bytes but the residual sums that normalisations read, which have 16 bits. The pass then turns the real
arithmetic between `dequantize` and `quantize` into integers:

    sums, additions, products, bounds     32-bit integers in units of a fraction of the result's step; factors
                                          are multipliers and shifts (requantize_fixed)
    other functions of one stored value   tables of 256 bytes (`tabulate`)
    softmax, layer normalisation          integer_softmax, integer_layer_norm
    products of two activations           matmul on bytes
    linear resampling                     weights of 11 bits

What is left is one error that names every node. Jacob et al., Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference, 2018; Kim et al., I-BERT: Integer-only BERT Quantization, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from skive import ops
from skive.errors import UnsupportedOpError
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.fuse_elementwise import is_elementwise
from skive.passes.integer_arithmetic import NO_ZERO, RULES, _per_tensor, limits, reach
from skive.passes.quantize import PRODUCTS, SUMS, Quantizer, Scheme, _constants, _is_move, affine
from skive.passes.quantize import Storage as AnyStorage
from skive.passes.tabulate import tabulated
from skive.pipeline import PassManager, pass_
from skive.rewrite import Match, Var, op, rewrite, rule
from skive.types import DType

I32 = DType.i32
# What fixed-point expressions hold, besides contractions and sums.
FIXED = frozenset({"add", "sub", "mul", "div", "neg", "abs", "relu", "clip", "min", "max", "leaky_relu", "prelu"})
MOVES = frozenset({"reshape", "transpose", "slice", "expand"})
FINEST = 14  # bits below the result's step that an expression keeps, at most
COARSEST = 6  # and at least: then sums are held to LARGEST, far beyond what the result can hold
LARGEST = 2.0**27
ROOM = 2.0**30  # of every value in an expression
EXACT = 2.0**12  # integers from here on stand for factors of bytes: an error of 2^-13
TABLE_BITS = 11  # of the weights of a linear resampling, per axis


# ------------------------------------------------------------------------------ what is stored


class Storage(AnyStorage):
    """Which values are stored where no value can be float32: all but those inside fixed-point expressions
    and inside functions of one stored value."""

    integer_only = True

    def __init__(self, graph: Graph, keep: Callable[[Node], bool] = lambda node: False):
        self._mode: dict[Node, str] = {}  # what computes an elementwise value: "fixed" or "table"
        self._end: dict[Node, Node] = {}  # of a value in registers: the stored one that it becomes
        super().__init__(graph, keep)
        # The report's layers: what is computed together.
        self._root = {n: self._end.get(n, n) for n in graph.nodes if n in self._end or n in self.stored}
        self._members = {}
        for n, root in self._root.items():
            self._members.setdefault(root, []).append(n)
        self._interior = set(self._end)
        self.wide = self._precise()

    def _precise(self) -> set[Node]:
        """The stored values that take 16 bits: normalisations read them, or sums that normalisations read, and no
        kernel for bytes. A normalisation makes the small values of one row as large as those of any other."""
        wide: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if node not in self.stored or node.op == "input" or self.graph.is_output(node):
                continue
            users = self.graph.users[node]
            normalised = [u.op == "layer_norm" and u.inputs[0] is node for u in users]
            moved = [u in wide and self.is_moved(u) for u in users]
            added = [self._mode.get(u) == "fixed" and not (u.op == "mul" and len(_computed(u)) > 1) for u in users]
            sums = [u.op in SUMS for u in users]
            read = zip(normalised, moved, added, sums, strict=True)
            leads = any(a and self._end.get(u, u) in wide for a, u in zip(added, users, strict=True))
            if all(map(any, read)) and (any(normalised) or any(moved) or leads):
                wide.add(node)
        return wide

    def is_moved(self, node: Node) -> bool:
        return _is_move(node) and any(i in self.stored for i in node.inputs)

    def _is_stored(self, node: Node) -> bool:
        if node.dtype is not DType.f32 or node.is_const or node.type.size == 0:
            return False
        end = self._inside(node)
        if end is None:
            if is_elementwise(node):
                self._mode[node] = "fixed" if _is_fixed(node) else "table"
            return True
        self._end[node] = end
        return False

    def _inside(self, node: Node) -> Node | None:
        """The stored value whose expression holds `node` in registers; None if `node` is stored itself."""
        users = set(self.graph.users[node])
        if len(users) != 1 or self.graph.is_output(node):
            return None
        (user,) = users
        if user not in self._mode or user.shape != node.shape or user.dtype is not DType.f32:
            return None
        mode = self._mode[user]
        others = [i for i in user.inputs if i is not node]
        if mode == "table":
            if not (is_elementwise(node) and all(map(_one_value, others)) and len(_computed(node)) == 1
                    and all(i.shape == node.shape for i in _computed(node))
                    and all(map(_one_value, (i for i in node.inputs if i.is_const)))):
                return None
        elif not _is_sum(node) and not (is_elementwise(node) and _is_fixed(node)):
            return None
        elif user.op == "mul" and not all(i.is_const for i in others):
            return None  # the product of two bytes is exact
        if is_elementwise(node):
            self._mode[node] = mode
        return self._end.get(user, user)


def _one_value(node: Node) -> bool:
    return node.is_const and node.type.size == 1


def _computed(node: Node) -> set[Node]:
    return {i for i in node.inputs if not i.is_const}


def _is_sum(node: Node) -> bool:
    """True for what the integers of its operands give exactly, in 32 bits."""
    if node.op in PRODUCTS:
        return all(i.is_const for i in node.inputs[1:])
    return node.op in SUMS or node.op == "matmul"


def _is_fixed(node: Node) -> bool:
    """True for an elementwise operation that fixed-point expressions hold."""
    if node.op in ("div", "prelu"):
        return node.inputs[1].is_const
    return node.op in FIXED


@rule(op("attention"))
def separate_attention(m: Match) -> Node | None:
    """softmax(q k^T scale) v in single steps, each of which is stored. Masks have no range that fits 8 bits."""
    if len(m.root.inputs) > 3 or m.root.attrs["causal"]:
        return None

    def make(name: str, *inputs: Node, **attrs: Any) -> Node:
        return ops.make(name, *inputs, origin=m.root.origin, **attrs)

    q, k, v = m.root.inputs
    tokens = m.root.attrs["token_major"]
    if tokens:
        q, k, v = (make("transpose", i, perm=(0, 2, 1, 3)) for i in (q, k, v))
    scores = make("matmul", q, make("transpose", k, perm=(0, 1, 3, 2)))  # bytes are exchanged faster than read so
    scaled = make("mul", scores, constant(np.asarray(m.root.attrs["scale"], np.float32)))
    result = make("matmul", make("softmax", scaled, axis=-1), v)
    return make("transpose", result, perm=(0, 2, 1, 3)) if tokens else result


def prepared(graph: Graph) -> Graph:
    """The float graph in terms of what has an integer form: attention in single steps."""
    return rewrite(graph, [separate_attention])


# -------------------------------------------------------------------------------------- moves


def _dequantized(m: Match, q: Node, like: Node) -> Node:
    return ops.make("dequantize", q, *like.inputs[1:], origin=m.root.origin)


def _is_stored(node: Node) -> bool:
    """`dequantize` of 8- or 16-bit values with one scale."""
    return node.op == "dequantize" and node.inputs[0].dtype in ops.QUANTIZED and _per_tensor(node)


def _is_byte(node: Node) -> bool:
    """`dequantize` of 8-bit values with one scale."""
    return node.op == "dequantize" and node.inputs[0].dtype in (DType.u8, DType.i8) and _per_tensor(node)


@rule(op("gather", op("dequantize", name="x", where=_is_byte), Var("i")))
def gather_integers(m: Match) -> Node | None:
    q = ops.make("gather", m["x"].inputs[0], m["i"], origin=m.root.origin, label=m.root.name, **m.root.attrs)
    return _dequantized(m, q, m["x"])


@rule(op("quantize", op("gather", Var("table"), Var("i"), name="x", where=lambda n: n.inputs[0].is_const), Var("s"),
         Var("z"), where=_per_tensor))
def quantized_table(m: Match) -> Node | None:
    """Rows of a constant are constants."""
    table = m["table"]
    rounded = ops.make("quantize", table, m["s"], m["z"], to=m.root.dtype)
    q = ops.evaluate(rounded, [i.value for i in rounded.inputs])
    return ops.make("gather", constant(q, name=table.name, origin=table.origin), m["i"], origin=m.root.origin,
                    label=m.root.name, **m["x"].attrs)


@rule(op("argmax|argmin", op("dequantize", name="x", where=_is_byte)))
def order_of_integers(m: Match) -> Node | None:
    """A positive scale keeps the order."""
    if not float(m["x"].inputs[1].value.item()) > 0:
        return None
    return ops.make(m.root.op, m["x"].inputs[0], origin=m.root.origin, label=m.root.name, **m.root.attrs)


@rule(op("matmul", Var("a"), Var("b")))
def product_of_integers(m: Match) -> Node | None:
    """A product of two activations; a constant operand becomes bytes of one scale."""
    a, b = (_as_bytes(m[v]) for v in "ab")
    if a is None or b is None or m.root.attrs.get("epilogue") or m["a"].is_const and m["b"].is_const:
        return None
    zeros = [int(i.inputs[2].value.item()) for i in (a, b)]
    scale = np.float32(np.float64(a.inputs[1].value.item()) * np.float64(b.inputs[1].value.item()))
    attrs = {**m.root.attrs, "a_zero": zeros[0], "b_zero": zeros[1]}
    depth = m["a"].shape[-2 if m.root.attrs["trans_a"] else -1]
    if depth * 2**16 >= 2**31:
        return None
    y = ops.make("matmul", a.inputs[0], b.inputs[0], origin=m.root.origin, label=m.root.name, **attrs)
    return ops.make("dequantize", y, constant(np.asarray(scale)), NO_ZERO, origin=m.root.origin)


def _as_bytes(node: Node) -> Node | None:
    if _is_byte(node):
        return node
    if not node.is_const or node.dtype is not DType.f32 or not node.type.size:
        return None
    form = affine(float(node.value.min()), float(node.value.max()))
    q = constant(form.integers(node.value).astype(np.uint8), name=node.name, origin=node.origin)
    return ops.make("dequantize", q, *_constants(form))


@rule(op("resize2d", op("dequantize", name="x", where=_is_byte), Var(), Var(), Var(), Var()))
def resampled_integers(m: Match) -> Node | None:
    """Weighted sums along one axis, then the other, with weights of TABLE_BITS bits that add up to one."""
    q, scale, zero = m["x"].inputs
    tables = m.root.inputs[1:]
    if not all(t.is_const for t in tables):
        return None
    value = ops.make("cast", q, to=I32, origin=m.root.origin)
    for axis, sources, weights in ((1, tables[0], tables[1]), (2, tables[2], tables[3])):
        w = _weights(weights.value)
        if w is None:
            return None
        places = np.clip(sources.value, 0, q.shape[axis] - 1).astype(np.int64)
        total: Node | None = None
        for tap in range(places.shape[1]):
            taken = ops.make("gather", value, constant(places[:, tap].copy()), axis=axis, origin=m.root.origin)
            spread = [1] * 4
            spread[axis] = len(places)
            factor = constant(np.ascontiguousarray(w[:, tap]).reshape(spread))
            part = ops.make("mul", taken, factor, origin=m.root.origin)
            total = part if total is None else ops.make("add", total, part, origin=m.root.origin)
        assert total is not None
        value = total
    unit = 2.0 ** (2 * TABLE_BITS)
    offset = int(zero.value.item()) * int(unit)
    if offset:
        value = ops.make("sub", value, constant(np.asarray(offset, np.int32)), origin=m.root.origin)
    step = np.float32(np.float64(scale.value.item()) / unit)
    return ops.make("dequantize", value, constant(np.asarray(step)), NO_ZERO, origin=m.root.origin, label=m.root.name)


def _weights(real: np.ndarray) -> np.ndarray | None:
    """[n, taps] int32 weights whose sum is one in units of 2^-TABLE_BITS; None if the real ones add up to
    something else or are so large that 32 bits do not hold their sums with bytes."""
    one = 2**TABLE_BITS
    if not np.allclose(real.sum(1), 1, atol=1e-3) or np.abs(real).sum(1).max(initial=0) > 1.4:
        return None
    w = np.rint(real.astype(np.float64) * one).astype(np.int32)
    w[np.arange(len(w)), np.abs(w).argmax(1)] += one - w.sum(1)
    return w


MOVING = [gather_integers, quantized_table, order_of_integers, product_of_integers]


# ---------------------------------------------------------------------- softmax and normalisation


@rule(op("quantize", op("softmax", op("dequantize", name="x", where=_is_byte), name="f"), Var("s"), Var("z"),
         where=_per_tensor))
def softmax_of_integers(m: Match) -> Node | None:
    """The exponential of the distance to the largest value of a row is a table of 256 entries."""
    q, scale, _ = m["x"].inputs
    table = np.rint(np.exp(-np.arange(256.0) * np.float64(scale.value.item())) * 2.0**30).astype(np.uint32)
    levels = int(np.clip(round(1 / float(m["s"].value.item())), 1, 2**31 - 1))
    return ops.make("integer_softmax", q, constant(table), origin=m.root.origin, label=m.root.name,
                    axis=m["f"].attrs["axis"], levels=levels, zero=int(m["z"].value.item()), to=m.root.dtype)


@rule(op("quantize", op("layer_norm", name="f", where=lambda n: n.inputs[0].op == "dequantize"), Var("s"), Var("z"),
         where=_per_tensor))
def norm_of_integers(m: Match) -> Node | None:
    """Mean and variance are those of the integers: scale and zero point drop out."""
    x, *parameters = m["f"].inputs
    if not _is_stored(x) or not all(p.is_const for p in parameters):
        return None
    q, scale, _ = x.inputs
    step = np.float64(m["s"].value.item())
    gamma = parameters[0].value.astype(np.float64) / step
    beta = parameters[1].value.astype(np.float64) / step if len(parameters) > 1 else np.zeros_like(gamma)
    if gamma.size >= 2**15 or np.abs(beta).max(initial=0) >= 2**15 or np.abs(gamma).max(initial=0) >= 2**14:
        return None
    largest = max(np.abs(gamma).max(initial=0), 2.0**-16)
    shift = min(46, 15 + math.floor(math.log2(2.0**30 / largest)))
    eps = int(np.clip(np.rint(m["f"].attrs["eps"] * (gamma.size / np.float64(scale.value.item())) ** 2), 1, 2.0**59))
    return ops.make("integer_layer_norm", q, constant(np.rint(gamma * 2.0 ** (shift - 15)).astype(np.int32)),
                    constant(np.rint(beta * 2.0**15).astype(np.int32)), origin=m.root.origin, label=m.root.name,
                    axis=m["f"].attrs["axis"], eps=eps, shift=shift, zero=int(m["z"].value.item()), to=m.root.dtype)


# ------------------------------------------------------------------------- fixed-point expressions


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
        if not _is_byte(x):
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


# ------------------------------------------------------------------------------------- the pass


def problems(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """(node, reason, way out) of everything that is left of float arithmetic."""
    hint = "leave integer_only out, or replace the operation"
    for node in graph.nodes:
        reads = [i for i in node.inputs if not i.is_const and i.dtype.is_float]
        if node.is_const or not (node.dtype.is_float or reads):
            continue
        if node.op in ("dequantize", "quantize", "requantize"):
            continue
        if any(i.op not in ("dequantize", "input") for i in reads):
            continue  # behind a node that is named
        if node.op == "input":
            yield node.label(), f"the input is {node.dtype.value} but not quantized", "report it"
        elif node.op == "attention":
            yield node.label(), "attention with a mask has no integer form: its values do not fit 8 bits", hint
        elif len(_computed(node)) > 1:
            yield node.label(), f"{node.op} of {len(_computed(node))} computed values has no integer form", hint
        else:
            yield node.label(), f"{node.op} has no integer form", hint


@pass_("integer-only", exact=False)
def integer_only(graph: Graph, options: object) -> Graph:
    """No float arithmetic at all; UnsupportedOpError names what has no integer form."""
    rules = [*MOVING, *RULES, softmax_of_integers, norm_of_integers]
    graph = rewrite(graph, rules)
    graph = rewrite(graph, [resampled_integers])
    graph = fixed(tabulated(rewrite(graph, rules), always=True))
    found = list(problems(graph))
    left = [n for n in graph.nodes if not n.is_const and n.dtype.is_float]
    if found or left:
        raise UnsupportedOpError(found or [(n.label(), f"{n.op} is left in float32", "report it") for n in left])
    return graph


def require_integer_forms(graph: Graph) -> None:
    """UnsupportedOpError with every operation of the `prepared` float graph that has no integer form: what
    calibrating would be in vain for."""
    storage = Storage(graph)
    draft = Quantizer(graph, Scheme(dict.fromkeys(storage.sources, (-8.0, 8.0))), storage)
    PassManager().run(draft.build(), ["integer-arithmetic", "integer-only"], check="never")
