"""`integer-only`: every operation on integers, so that the artefact has no float instruction.

`Storage` decides what is stored: every value but those that a fixed-point expression keeps in registers
(a contraction's sum, its bias, bounds, residual additions), since float32 registers are not there. All are
bytes but the residual sums that normalisations read, which have 16 bits. The pass then turns the real
arithmetic between `dequantize` and `quantize` into integers:

    sums, additions, products, bounds     32-bit integers in units of a fraction of the result's step; factors
                                          are multipliers and shifts (requantize_fixed)
    other functions of one stored value   tables of 256 bytes (`tabulate`)
    softmax, normalisation of rows        integer_softmax, integer_layer_norm
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
from skive.ir import Graph, Node, constant
from skive.passes.fixed_expressions import fixed, is_byte, is_fixed, is_stored
from skive.passes.fuse_elementwise import is_elementwise
from skive.passes.integer_arithmetic import NO_ZERO, RULES, per_tensor
from skive.passes.quantize import PRODUCTS, SUMS, Quantizer, Scheme, affine, constants, is_move
from skive.passes.quantize import Storage as AnyStorage
from skive.passes.tabulate import tabulated
from skive.pipeline import PassManager, pass_
from skive.rewrite import Match, Var, op, rewrite, rule
from skive.types import DType

ROW_NORMS = ("layer_norm", "rms_norm", "l2_norm")
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
        self.root_of = {n: self._end.get(n, n) for n in graph.nodes if n in self._end or n in self.stored}
        self.members_of = {}
        for n, root in self.root_of.items():
            self.members_of.setdefault(root, []).append(n)
        self._interior = set(self._end)
        self.wide = self._precise()

    def _precise(self) -> set[Node]:
        """The stored values that take 16 bits: normalisations read them, or sums that normalisations read, and no
        kernel for bytes. A normalisation makes the small values of one row as large as those of any other."""
        wide: set[Node] = set()
        for node in reversed(self.graph.nodes):
            looked_up = self._mode.get(node) == "table"  # tables hold bytes
            if node not in self.stored or node.op == "input" or self.graph.is_output(node) or looked_up:
                continue
            users = self.graph.users[node]
            normalised = [u.op in ROW_NORMS and u.inputs[0] is node and fits_norm(u, DType.i16) for u in users]
            moved = [u in wide and self.is_moved(u) for u in users]
            added = [self._mode.get(u) == "fixed" and not (u.op == "mul" and len(_computed(u)) > 1) for u in users]
            sums = [u.op in SUMS for u in users]
            read = zip(normalised, moved, added, sums, strict=True)
            leads = any(a and self._end.get(u, u) in wide for a, u in zip(added, users, strict=True))
            if all(map(any, read)) and (any(normalised) or any(moved) or leads):
                wide.add(node)
        return wide

    def is_moved(self, node: Node) -> bool:
        return is_move(node) and any(i in self.stored for i in node.inputs)

    def _is_stored(self, node: Node) -> bool:
        if node.dtype is not DType.f32 or node.is_const or node.type.size == 0:
            return False
        end = self._inside(node)
        if end is None:
            if is_elementwise(node):
                self._mode[node] = "fixed" if is_fixed(node) else "table"
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
        elif not _is_sum(node) and not (is_elementwise(node) and is_fixed(node)):
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


@rule(op("group_norm"))
def rows_of_groups(m: Match) -> Node:
    """The normalisation of groups is that of rows, once each group is a row; scale and bias follow."""
    x, *parameters = m.root.inputs
    groups, eps = m.root.attrs["groups"], m.root.attrs["eps"]
    places, width = math.prod(x.shape[1:-1]), x.shape[-1] // groups

    def make(name: str, *inputs: Node, **attrs: Any) -> Node:
        return ops.make(name, *inputs, origin=m.root.origin, **attrs)

    rows = make("transpose", make("reshape", x, shape=(x.shape[0], places, groups, width)), perm=(0, 2, 1, 3))
    y = make("layer_norm", rows, constant(np.ones((places, width), np.float32)), axis=2, eps=eps)
    y = make("reshape", make("transpose", y, perm=(0, 2, 1, 3)), shape=m.root.shape)
    for name, v in zip(("mul", "add"), parameters, strict=False):
        y = make(name, y, v)
    return y


@rule(op("reduce_sum", where=lambda n: n.dtype is DType.f32))
def multiple_of_mean(m: Match) -> Node:
    (x,) = m.root.inputs
    mean = ops.make("reduce_mean", x, origin=m.root.origin, **m.root.attrs)
    count = constant(np.asarray(x.type.size / max(mean.type.size, 1), np.float32))
    return ops.make("mul", mean, count, origin=m.root.origin, label=m.root.name)


@rule(op("reduce_mean", where=lambda n: n.dtype is DType.f32))
def mean_of_neighbours(m: Match) -> Node | None:
    """Axes that lie apart come to lie side by side."""
    (x,) = m.root.inputs
    axes = sorted(a % x.type.rank for a in m.root.attrs["axes"])
    if not axes or axes[-1] - axes[0] == len(axes) - 1:
        return None
    perm = (*(a for a in range(x.type.rank) if a not in axes), *axes)
    last = tuple(range(len(perm) - len(axes), len(perm)))
    y = ops.make("transpose", x, perm=perm, origin=m.root.origin)
    y = ops.make("reduce_mean", y, axes=last, keep=False, origin=m.root.origin)
    return ops.make("reshape", y, shape=m.root.shape, origin=m.root.origin, label=m.root.name)


def prepared(graph: Graph) -> Graph:
    """The float graph in terms of what has an integer form: attention in single steps, the normalisation of groups as
    that of rows, sums as means."""
    return rewrite(graph, [separate_attention, rows_of_groups, multiple_of_mean, mean_of_neighbours])


# -------------------------------------------------------------------------------------- moves


def _dequantized(m: Match, q: Node, like: Node) -> Node:
    return ops.make("dequantize", q, *like.inputs[1:], origin=m.root.origin)


@rule(op("gather", op("dequantize", name="x", where=is_byte), Var("i")))
def gather_integers(m: Match) -> Node | None:
    q = ops.make("gather", m["x"].inputs[0], m["i"], origin=m.root.origin, label=m.root.name, **m.root.attrs)
    return _dequantized(m, q, m["x"])


@rule(op("quantize", op("gather", Var("table"), Var("i"), name="x", where=lambda n: n.inputs[0].is_const), Var("s"),
         Var("z"), where=per_tensor))
def quantized_table(m: Match) -> Node | None:
    """Rows of a constant are constants."""
    table = m["table"]
    rounded = ops.make("quantize", table, m["s"], m["z"], to=m.root.dtype)
    q = ops.evaluate(rounded, [i.value for i in rounded.inputs])
    return ops.make("gather", constant(q, name=table.name, origin=table.origin), m["i"], origin=m.root.origin,
                    label=m.root.name, **m["x"].attrs)


@rule(op("argmax|argmin", op("dequantize", name="x", where=is_byte)))
def order_of_integers(m: Match) -> Node | None:
    """A positive scale keeps the order."""
    if not float(m["x"].inputs[1].value.item()) > 0:
        return None
    return ops.make(m.root.op, m["x"].inputs[0], origin=m.root.origin, label=m.root.name, **m.root.attrs)


@rule(op("reduce_max|reduce_min", op("dequantize", name="x", where=is_stored)))
def extremum_of_integers(m: Match) -> Node | None:
    q, scale, _ = m["x"].inputs
    if not float(scale.value.item()) > 0:
        return None
    return _dequantized(m, ops.make(m.root.op, q, origin=m.root.origin, label=m.root.name, **m.root.attrs), m["x"])


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
    if is_byte(node):
        return node
    if not node.is_const or node.dtype is not DType.f32 or not node.type.size:
        return None
    form = affine(float(node.value.min()), float(node.value.max()))
    q = constant(form.integers(node.value).astype(np.uint8), name=node.name, origin=node.origin)
    return ops.make("dequantize", q, *constants(form))


@rule(op("resize2d", op("dequantize", name="x", where=is_byte), Var(), Var(), Var(), Var()))
def resampled_integers(m: Match) -> Node | None:
    """Weighted sums along one axis, then the other, with weights of TABLE_BITS bits that add up to one."""
    q, scale, zero = m["x"].inputs
    tables = m.root.inputs[1:]
    if not all(t.is_const for t in tables):
        return None
    value = ops.make("cast", q, to=DType.i32, origin=m.root.origin)
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


MOVING = [gather_integers, quantized_table, order_of_integers, extremum_of_integers, product_of_integers]


# ---------------------------------------------------------------------- softmax and normalisation


def fits_norm(node: Node, dtype: DType) -> bool:
    """True if integer_layer_norm takes the rows of `node` as integers of type `dtype`."""
    return math.prod(node.shape[node.attrs["axis"] % node.type.rank:]) < ops.integer_norm_limit(dtype)


def exponentials(scale: float) -> np.ndarray:
    """[256] u32: exp(-k scale) in units of 2^-30, for `integer_softmax` of bytes in steps of `scale`."""
    return np.rint(np.exp(-np.arange(256.0) * np.float64(scale)) * 2.0**30).astype(np.uint32)


@rule(op("quantize", op("softmax", op("dequantize", name="x", where=is_byte), name="f"), Var("s"), Var("z"),
         where=per_tensor))
def softmax_of_integers(m: Match) -> Node | None:
    """The exponential of the distance to the largest value of a row is a table of 256 entries."""
    q, scale, _ = m["x"].inputs
    levels = int(np.clip(round(1 / float(m["s"].value.item())), 1, 2**31 - 1))
    table = constant(exponentials(scale.value.item()))
    return ops.make("integer_softmax", q, table, origin=m.root.origin, label=m.root.name,
                    axis=m["f"].attrs["axis"], levels=levels, zero=int(m["z"].value.item()), to=m.root.dtype)


@rule(op("quantize", op("|".join(ROW_NORMS), name="f", where=lambda n: n.inputs[0].op == "dequantize"), Var("s"),
         Var("z"), where=per_tensor))
def norm_of_integers(m: Match) -> Node | None:
    """Mean and variance are those of the integers: the scale drops out, and the zero point with the mean."""
    f = m["f"]
    x, *parameters = f.inputs
    if not is_stored(x) or not all(p.is_const for p in parameters):
        return None
    q, scale, zero = x.inputs
    step, axis = np.float64(m["s"].value.item()), f.attrs["axis"] % f.type.rank
    n = math.prod(f.shape[axis:])
    if f.op == "l2_norm":  # of n values the length is sqrt(n) times the root of the mean square
        gamma, eps = np.full(f.shape[axis:], n**-0.5 / step), f.attrs["least"] ** 2 / max(n, 1)
    else:
        gamma, eps = parameters[0].value.astype(np.float64) / step, f.attrs["eps"]
    beta = parameters[1].value.astype(np.float64) / step if len(parameters) > 1 else np.zeros_like(gamma)
    if not fits_norm(f, q.dtype) or np.abs(beta).max(initial=0) >= 2**15 or np.abs(gamma).max(initial=0) >= 2**14:
        return None
    largest = max(np.abs(gamma).max(initial=0), 2.0**-16)
    shift = min(46, 15 + math.floor(math.log2(2.0**30 / largest)))
    eps = int(np.clip(np.rint(eps * (n / np.float64(scale.value.item())) ** 2), 1, 2.0**59))
    centred = f.op == "layer_norm"
    if all((p == p.flat[0]).all() for p in (gamma, beta)):
        gamma, beta = (p.reshape(-1)[:1].reshape(()) for p in (gamma, beta))
    return ops.make("integer_layer_norm", q, constant(np.asarray(np.rint(gamma * 2.0 ** (shift - 15)), np.int32)),
                    constant(np.asarray(np.rint(beta * 2.0**15), np.int32)), origin=m.root.origin, label=m.root.name,
                    axis=f.attrs["axis"], centred=centred, x_zero=0 if centred else int(zero.value.item()), eps=eps,
                    shift=shift, zero=int(m["z"].value.item()), to=m.root.dtype)


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
