"""`compress-weights`: weights stay integers of 8 or 4 bits in memory, activations stay as they are.

    linear(x, w, b)              ->   compressed_linear(x, q, scale, zero, b)
    conv2d of a 1x1 window       ->   the same: its pixels are the rows
    gather(table, i)             ->   dequantize(gather(q, i), gather(scale, i), zero)

No data is needed. With 8 bits a channel has one scale unless `group` says otherwise; with 4 bits every
`group` neighbouring weights have one, which is searched for the least squared error. Tables that are
gathered from, and of several layers the one that makes an output, get 8 bits in either case: they decide
more than they weigh.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from skive import ops
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant, rebuilt
from skive.pipeline import pass_
from skive.types import DType

log = logging.getLogger("skive.passes.compress_weights")

LEAST_WEIGHTS = 1024  # a layer of fewer is not worth a scale
LEAST_TABLE = 16384  # elements of a table
GROUP = 64  # weights of 4 bits that share a scale
LONGEST_BYTES = 65536  # weights of one group whose sum of bytes fits 32 bits
# Shares of the largest magnitude at which a group of 4-bit weights may saturate.
# Weights that came as integers, one scale a channel, stay so where this many rows read at least so many: float32
# arithmetic on them then waits for memory. With scales in blocks they always stay.
FEW_ROWS, MANY_WEIGHTS = 4, 1 << 18
_SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)


@dataclass(frozen=True)
class Compressed:
    """Integers of the weights [OC, K] of a layer, their scales and zero points [OC, groups]."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: int

    @property
    def real(self) -> np.ndarray:
        """[OC, K] what they stand for."""
        return ops.compressed_weights(self.q, self.scale, self.zero, self.group)

    @property
    def bytes(self) -> int:
        """Of integers and scales, without zero points that are all alike."""
        points = self.zero.size if (self.zero != 1 << (self.bits - 1)).any() else 0
        return self.q.size * self.bits // 8 + self.scale.nbytes + points


def group_of(depth: int, bits: int, wanted: int | None) -> int:
    """Weights that share a scale, of a layer with `depth` weights a channel."""
    group = wanted or (GROUP if bits == 4 else depth)
    return group if group < depth else depth


def compressed(w: np.ndarray, bits: int, group: int) -> Compressed:
    """The weights `w` [OC, K] rounded to nearest, symmetric about the zero point 2^(bits - 1).

    With 8 bits the largest magnitude of a group is 127. With 4 bits the value of the largest magnitude is -8 or
    beyond: the scale, which may be negative, is the one of _SHRINK with the least squared error.
    """
    oc, depth = w.shape
    groups = -(-depth // group)
    filled = np.zeros((oc, groups * group), np.float32)
    filled[:, :depth] = w
    parts = filled.reshape(oc, groups, group)
    at = np.abs(parts).argmax(-1)[..., None]
    peak = np.take_along_axis(parts, at, -1)[..., 0]  # [OC, groups], signed
    if bits == 8:
        scale = np.abs(peak) / np.float32(127)
    else:
        scale = np.zeros_like(peak)
        least = np.full(peak.shape, np.inf, np.float32)
        for share in _SHRINK:
            tried = peak * (-share / np.float32(8))
            inverse = (1 / np.where(np.abs(tried) > 1e-30, tried, np.inf))[..., None]
            error = parts - np.clip(np.rint(parts * inverse), -8, 7) * tried[..., None]
            cost = np.einsum("ogk,ogk->og", error, error)
            better = cost < least
            scale, least = np.where(better, tried, scale), np.where(better, cost, least)
    scale = np.where(np.abs(scale) > 1e-30, scale, np.float32(1)).astype(np.float32)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    q = np.clip(np.rint(parts / scale[..., None]), low, high).astype(np.int16) + (1 << (bits - 1))
    return Compressed(
        np.ascontiguousarray(q.reshape(oc, -1)[:, :depth]).astype(np.uint8),
        scale,
        np.full(scale.shape, 1 << (bits - 1), np.uint8),
        bits,
        group,
    )


@dataclass
class Scheme:
    """What `compress` is to do. `weights`: of single layers, where they are known already."""

    bits: int = 8
    group: int | None = None
    activation: int = 16
    keep: Callable[[Node], bool] = lambda node: False
    weights: Mapping[Node, Compressed] = field(default_factory=dict)


def _makes_output(node: Node, graph: Graph) -> bool:
    """True if an output is `node`, or follows from it without another contraction."""
    todo, seen = [node], set[Node]()
    while todo:
        n = todo.pop()
        if graph.is_output(n):
            return True
        fresh = [u for u in graph.users[n] if u not in seen and not ops.macs(u) and u.op != "layer_norm"]
        seen.update(fresh)
        todo += fresh
    return False


def _is_pointwise(node: Node) -> bool:
    a = node.attrs
    return node.inputs[1].shape[1:3] == (1, 1) and a["stride"] == (1, 1) and not any(a["pad"]) and a["groups"] == 1


def matrix_of(node: Node) -> np.ndarray | None:
    """[OC, K] the constant weights of a layer that is a product of rows and a matrix; None for others."""
    if node.op not in ("linear", "conv2d") or node.attrs.get("epilogue") or node.dtype is not DType.f32:
        return None
    if not all(i.is_const for i in node.inputs[1:]) or node.inputs[0].is_const:
        return None
    w = node.inputs[1].value
    if node.op == "conv2d" and not _is_pointwise(node):
        return None
    w = w.reshape(w.shape[0], -1)
    return w if w.size >= LEAST_WEIGHTS and node.type.size and np.isfinite(w).all() else None


def stored(node: Node) -> Compressed | None:
    """The weights of a layer as `matrix_of` takes them, that are integers in the model; None for others."""
    if node.op not in ("linear", "conv2d") or node.attrs.get("epilogue") or node.dtype is not DType.f32:
        return None
    w = node.inputs[1]
    if w.op != "dequantize" or not all(i.is_const for i in w.inputs) or w.inputs[0].dtype not in (DType.i8, DType.u8):
        return None
    if node.op == "conv2d" and not _is_pointwise(node) or not w.type.size or not node.type.size:
        return None
    q, scale, zero = (np.broadcast_to(i.value, w.shape).reshape(w.shape[0], -1) for i in w.inputs)
    lift = 128 if w.inputs[0].dtype is DType.i8 else 0
    whole, points = q.astype(np.int16) + lift, zero.astype(np.int16) + lift
    bits, low = 8, 0
    first = 120 if lift else 0  # of 4 bits: -8 to 7 or 0 to 15
    if all(first <= v.min() and v.max() <= first + 15 for v in (whole, points)):
        bits, low = 4, first
    changes = ((scale[:, 1:] != scale[:, :-1]) | (points[:, 1:] != points[:, :-1])).any(0)
    group = math.gcd(*(np.flatnonzero(changes) + 1).tolist()) or q.shape[1]
    if bits == 4 and group % 8 and group < q.shape[1]:
        bits, low = 8, 0
    if group % 4 and group < q.shape[1]:
        return None
    starts = np.arange(0, q.shape[1], group)
    return Compressed(
        (whole - low).astype(np.uint8),
        np.ascontiguousarray(scale[:, starts]),
        (points[:, starts] - low).astype(np.uint8),
        bits,
        group,
    )


def keep_weights(graph: Graph) -> Graph:
    """Weights that came as integers, in layers on float32 activations, stay integers where that pays."""

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        c = stored(node)
        if c is None:
            return rebuilt(node, inputs)
        rows, depth = node.type.size // len(c.q), c.q.shape[1]
        if c.group == depth and (rows > FEW_ROWS or c.q.size < MANY_WEIGHTS):
            return rebuilt(node, inputs)
        bias = _bias(node)
        return rebuilt(node, inputs) if bias is None else compressed_node(node, inputs[0], c, bias, 32)

    return graph.map_nodes(one)


def _bias(node: Node) -> np.ndarray | None:
    """[OC] float32, zeros where there is none; None if it is computed."""
    if len(node.inputs) < 3:
        return np.zeros(node.shape[-1], np.float32)
    b = node.inputs[2]
    if b.op == "dequantize" and all(i.is_const for i in b.inputs):
        return ops.evaluate(b, [i.value for i in b.inputs])
    return b.value if b.is_const else None


def is_table(node: Node) -> bool:
    """True for a `gather` of rows of a large constant matrix."""
    if node.op != "gather" or not node.inputs[0].is_const or node.inputs[0].dtype is not DType.f32:
        return False
    table = node.inputs[0]
    return table.type.rank == 2 and node.attrs["axis"] % 2 == 0 and table.type.size >= LEAST_TABLE


def compressed_node(node: Node, x: Node, c: Compressed, bias: np.ndarray, activation: int) -> Node:
    """`node` as a product of `x` and compressed weights."""
    if activation < 32 and c.group > LONGEST_BYTES:
        activation = 32
    w = node.inputs[1]
    operands = [
        constant(c.q, name=w.name, origin=w.origin),
        constant(c.scale),
        constant(c.zero),
        constant(np.array(bias, np.float32)),
    ]
    attrs = {"bits": c.bits, "group": c.group, "activation": activation}
    return ops.make("compressed_linear", x, *operands, origin=node.origin, label=node.name, **attrs)


def compress(graph: Graph, scheme: Scheme) -> tuple[Graph, dict[Node, Compressed]]:
    """(the canonical `graph` on compressed weights, those weights by the node of `graph` that reads them)."""
    found: dict[Node, Compressed] = {}
    layers = [n for n in graph.nodes if matrix_of(n) is not None and not scheme.keep(n)]
    last = {n for n in layers if len(layers) > 1 and _makes_output(n, graph)}
    tables: dict[Node, tuple[Node, Node]] = {}

    def table_of(table: Node) -> tuple[Node, Node]:
        if table not in tables:
            c = compressed(table.value, 8, table.shape[1])
            tables[table] = constant(c.q, name=table.name, origin=table.origin), constant(c.scale)
        return tables[table]

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if scheme.keep(node):
            return rebuilt(node, inputs)
        if is_table(node):
            q, scale = table_of(node.inputs[0])
            found[node] = Compressed(q.value, scale.value, np.full(scale.shape, 128, np.uint8), 8, q.shape[1])
            rows, scales = (ops.make("gather", v, inputs[1], axis=0, origin=node.origin) for v in (q, scale))
            zero = constant(np.asarray(128, np.uint8))
            return ops.make("dequantize", rows, scales, zero, origin=node.origin, label=node.name)
        w, c = matrix_of(node), scheme.weights.get(node) or stored(node)
        if c is None and w is not None:
            bits = 8 if node in last else scheme.bits
            c = compressed(w, bits, group_of(w.shape[1], bits, scheme.group))
        bias = None if c is None else _bias(node)
        if c is None or bias is None:
            return rebuilt(node, inputs)
        found[node] = c
        return compressed_node(node, inputs[0], c, bias, scheme.activation)

    result = graph.map_nodes(one)
    return (result, found) if found else (graph, found)


@dataclass(frozen=True, slots=True)
class CompressWeights:
    """`bits`: 8 or 4. `group`: weights that share a scale, 0 for a channel (8 bits) or 64 (4 bits).
    `activation`: 32, or 16 or 8 bits to which each row of activations is rounded. `keep`: names, joined by `;`."""

    bits: int = 8
    group: int = 0
    activation: int = 16
    keep: str = ""


@pass_("compress-weights", exact=False, options=CompressWeights)
def compress_weights(graph: Graph, options: CompressWeights) -> Graph:
    """Weights of fully connected layers and tables as integers of 8 or 4 bits, without calibration."""
    if options.bits not in (4, 8) or options.activation not in (8, 16, 32) or options.group % 8:
        raise QuantizationError(f"{options} is not bits=4|8, activation=8|16|32, group a multiple of 8")
    names = set(filter(None, options.keep.split(";")))
    keep = lambda n: n.origin in names or n.name in names  # noqa: E731
    return compress(graph, Scheme(options.bits, options.group or None, options.activation, keep))[0]
