"""`integer-arithmetic`: what stands between `dequantize` and `quantize` runs on the integers themselves.

    dequantize, conv2d, relu, quantize   ->   conv2d : i32, requantize

Four steps: activations of type i8 become u8 (the processor multiplies u8 by i8); `dequantize` sinks
below operations that only move values; contractions and sums take integer operands; `quantize` of a
32-bit sum becomes one multiplication. What cannot be expressed so keeps its float32 arithmetic.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.compress_weights import keep_weights
from skive.pipeline import pass_
from skive.rewrite import Declined, Match, Var, op, rewrite, rule
from skive.types import DType

log = logging.getLogger("skive.passes.integer_arithmetic")

I32 = DType.i32
MOVES = "reshape|transpose|slice|expand|max_pool2d"
PRODUCTS = "conv2d|conv_transpose2d|linear"
QUANTIZERS = "quantize|requantize"
_SHIFT = 128  # between an i8 and the u8 that stands for it


def _uniform(node: Node) -> bool:
    """A constant that holds one value."""
    return node.is_const and node.type.size == 1


def per_tensor(node: Node) -> bool:
    """`dequantize` or `quantize` with one scale and one zero point."""
    return _uniform(node.inputs[1]) and _uniform(node.inputs[2])


def _like(m: Match, name: str, *inputs: Node, **attrs: object) -> Node:
    return ops.make(name, *inputs, origin=m.root.origin, label=m.root.name, **attrs)


def _scalar(node: Node) -> Node:
    """A constant of one value, without axes."""
    return node if node.shape == () else constant(node.value.reshape(()))


def _f32(value: np.ndarray | float) -> Node:
    return constant(np.asarray(value, np.float32))


NO_ZERO = constant(np.asarray(0, np.int32))

# ------------------------------------------------------------------------------------- signedness


def unsigned(graph: Graph) -> Graph:
    """The graph with every i8 activation that feeds arithmetic replaced by the u8 that is 128 more."""
    twin: dict[Node, Node] = {}  # i8 node of the new graph -> its u8 form

    def shifted(node: Node) -> Node:
        """The u8 form of the i8 value `node`."""
        if node not in twin:
            if node.is_const:
                twin[node] = constant((node.value.astype(np.int16) + _SHIFT).astype(np.uint8), origin=node.origin)
            elif node.op in ("quantize", "requantize", "requantize_fixed"):
                twin[node] = ops.make(node.op, *node.inputs[:-1], shifted(node.inputs[-1]), to=DType.u8,
                                      origin=node.origin, label=node.name)
            elif node.op in ("reshape", "transpose", "slice", "expand", "max_pool2d", "concat"):
                twin[node] = ops.make(node.op, *map(shifted, node.inputs), origin=node.origin, label=node.name,
                                      **node.attrs)
            elif node.op == "clip":
                bounds = {k: int(v) + _SHIFT for k, v in node.attrs.items()}
                twin[node] = ops.make("clip", shifted(node.inputs[0]), origin=node.origin, label=node.name, **bounds)
            else:
                bits = ops.make("bit_cast", node, to=DType.u8, origin=node.origin)
                twin[node] = ops.make("bit_xor", bits, constant(np.asarray(_SHIFT, np.uint8)), origin=node.origin)
        return twin[node]

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        node = rebuilt(node, inputs)
        if not inputs or inputs[0].dtype is not DType.i8 or inputs[0].is_const:
            return node
        x, *rest = inputs
        if node.op == "dequantize" and node.inputs[2].is_const:
            return ops.make("dequantize", shifted(x), rest[0], shifted(rest[1]), origin=node.origin, label=node.name)
        if node.op in ("conv2d", "conv_transpose2d", "linear", "sum_pool2d") and node.dtype is I32:
            attrs = {**node.attrs, "zero": node.attrs["zero"] + _SHIFT}
            return ops.make(node.op, shifted(x), *rest, origin=node.origin, label=node.name, **attrs)
        return node

    return graph.map_nodes(one)


# --------------------------------------------------------------------------------- moves and sums


@rule(op(MOVES, op("dequantize", name="x", where=per_tensor)))
def move_integers(m: Match) -> Node | None:
    """Moving and comparing commute with a positive scale."""
    q, scale, zero = m["x"].inputs
    if q.dtype is I32 or m.root.attrs.get("epilogue") or not float(scale.value.item()) > 0:
        return None
    return _like(m, "dequantize", _like(m, m.root.op, q, **m.root.attrs), _scalar(scale), _scalar(zero))


@rule(op("resize2d", op("dequantize", name="x", where=per_tensor), Var(), Var(), Var(), Var()))
def nearest_integers(m: Match) -> Node | None:
    """Nearest neighbours are copied as integers."""
    q, scale, zero = m["x"].inputs
    if not ops.copies_neighbours(m.root) or q.dtype not in ops.QUANTIZED or m.root.attrs.get("epilogue"):
        return None
    return _like(m, "dequantize", _like(m, "resize2d", q, *m.root.inputs[1:]), _scalar(scale), _scalar(zero))


@rule(op("concat"))
def concat_integers(m: Match) -> Node | None:
    """Operands with one scale and zero point are joined as integers."""
    parts = m.root.inputs
    if not all(p.op == "dequantize" and per_tensor(p) for p in parts):
        return None
    _, scale, zero = parts[0].inputs
    if any(p.inputs[1].value.item() != scale.value.item() or p.inputs[2].value.item() != zero.value.item()
           or p.inputs[0].dtype is not zero.dtype for p in parts):
        return None
    joined = _like(m, "concat", *(p.inputs[0] for p in parts), axis=m.root.attrs["axis"])
    return _like(m, "dequantize", joined, _scalar(scale), _scalar(zero))


@rule(op("pad", op("dequantize", name="x", where=per_tensor)))
def pad_integers(m: Match) -> Node | None:
    """A border of copies, or of zeros: the zero point."""
    q, scale, zero = m["x"].inputs
    if m.root.attrs["mode"] == "constant" and m.root.attrs["value"] != 0:
        return None
    attrs = {**m.root.attrs, "value": int(zero.value.item())}
    return _like(m, "dequantize", _like(m, "pad", q, **attrs), _scalar(scale), _scalar(zero))


def _windows_inside(attrs: dict[str, Any], shape: Sequence[int]) -> np.ndarray:
    """Positions of each window that lie inside the image: [1, OH, OW, 1]."""
    ones = constant(np.ones((1, *shape[1:3], 1), np.uint8))
    window = {k: attrs[k] for k in ("kernel", "stride", "pad", "dilation")}
    return ops.evaluate(ops.make("sum_pool2d", ones, **window), [ones.value])


def _sum(m: Match, q: Node, scale: float, zero: Node, count: np.ndarray | int, **attrs: Any) -> Node | None:
    """dequantize(the sum of each window of q) with the division by `count` in the scale."""
    kernel = attrs["kernel"]
    if math.prod(kernel) * 2 ** (8 * q.dtype.bytes) >= 2**31:
        return None
    total = _like(m, "sum_pool2d", q, zero=int(zero.value.item()), **attrs)
    return ops.make("dequantize", total, _f32(np.float64(scale) / count), NO_ZERO, origin=m.root.origin)


@rule(op("avg_pool2d", op("dequantize", name="x", where=per_tensor)))
def average_of_integers(m: Match) -> Node | None:
    """Sums of windows; the division joins the scale."""
    q, scale, zero = m["x"].inputs
    a = dict(m.root.attrs)
    if a.pop("epilogue", ""):
        return None
    inside = _windows_inside(a, q.shape)
    count: np.ndarray | int = np.maximum(inside, 1)
    if a.pop("count_pad"):
        count = math.prod(a["kernel"])
    elif (inside == inside.flat[0]).all():
        count = int(inside.flat[0])
    return _sum(m, q, scale.value.item(), zero, count, **a)


@rule(op("reduce_mean", op("dequantize", name="x", where=per_tensor)))
def mean_of_integers(m: Match) -> Node | None:
    """A mean over neighbouring axes is a pool over [outer, n, 1, inner]."""
    q, scale, zero = m["x"].inputs
    axes = sorted(a % q.type.rank for a in m.root.attrs["axes"])
    if not axes or axes[-1] - axes[0] != len(axes) - 1:
        return None
    outer, inner = math.prod(q.shape[:axes[0]]), math.prod(q.shape[axes[-1] + 1:])
    n = math.prod(q.shape[a] for a in axes)
    if min(outer, inner, n) < 1:
        return None
    flat = _like(m, "reshape", q, shape=(outer, n, 1, inner))
    mean = _sum(m, flat, scale.value.item(), zero, n, kernel=(n, 1))
    return None if mean is None else _like(m, "reshape", mean, shape=m.root.shape)


# ---------------------------------------------------------------------------------- contractions


def limits(q: Node) -> tuple[int, int]:
    """(lowest, highest) value of the integers `q`, by the clips that made them or by their type."""
    lowest, highest = 2**31, -(2**31)
    todo, seen = [q], set()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op in ("reshape", "transpose", "slice", "expand", "max_pool2d", "concat", "pad"):
            todo += n.inputs
            low = high = int(n.attrs["value"]) if n.op == "pad" else None
        elif n.op == "clip":
            low, high = int(n.attrs["lo"]), int(n.attrs["hi"])
        elif n.is_const and n.type.size:
            low, high = int(n.value.min()), int(n.value.max())
        else:
            low, high = np.iinfo(n.dtype.numpy).min, np.iinfo(n.dtype.numpy).max
        if low is not None and high is not None:
            lowest, highest = min(lowest, low), max(highest, high)
    return lowest, highest


def reach(q: Node, zero: int, weights: np.ndarray) -> np.ndarray:
    """[OC] how far from 0 the sum of (q - zero) times weights [OC, ...] can come, whatever q holds."""
    low, high = (v - zero for v in limits(q))
    w = weights.astype(np.int64).reshape(len(weights), -1)
    up, down = np.maximum(w, 0).sum(1), np.maximum(-w, 0).sum(1)
    low, high = min(low, 0), max(high, 0)  # the border counts as 0
    return np.maximum(high * up - low * down, high * down - low * up)


WIDEST = 2**40  # sums below it are exact in float32 but for one rounding, as conv.h adds their parts
SHORTEST = 8  # products in a row, below which spilling takes more time than they do


def window_reach(weights: np.ndarray, low: float, high: float, size: int) -> np.ndarray:
    """[OC] how far from 0 the sum of any `size` consecutive products of weights [OC, ...] and values in low..high
    can come; low <= 0 <= high. Exact for integers."""
    w = weights.reshape(len(weights), -1)
    kind = np.int64 if w.dtype.kind in "iu" else np.float64
    size = min(size, w.shape[1])
    found = np.zeros(len(w), kind)
    rows = max(1, 2**21 // max(1, w.shape[1]))
    for i in range(0, len(w), rows):
        part = w[i:i + rows].astype(kind)
        up, down = np.zeros((2, len(part), w.shape[1] + 1), kind)  # sums of what stands before
        np.cumsum(np.maximum(part, 0), 1, out=up[:, 1:])
        np.cumsum(np.maximum(-part, 0), 1, out=down[:, 1:])
        p, m = (v[:, size:] - v[:, : w.shape[1] + 1 - size] for v in (up, down))
        found[i:i + rows] = np.maximum(high * p - low * m, high * m - low * p).max(1)
    return found


def chain(q: Node, weights: np.ndarray) -> int:
    """How many products of q and consecutive weights [OC, ...] always fit 32 bits together with 65535, for every
    channel and every q: a multiple of SHORTEST, 0 if there are not that many."""
    low, high = limits(q)
    size, found, step = weights[0].size, 0, SHORTEST
    while step < size:
        step *= 2
    while step >= SHORTEST:
        if window_reach(weights, min(low, 0), max(high, 0), found + step).max(initial=0) + 65535 < 2**31:
            found += step
        step //= 2
    return found


def _weights(node: Node, x: DType) -> np.ndarray | None:
    """The integers of a `dequantize` of constants as `x` is multiplied by them; None if they do not fit."""
    q, _, zero = node.inputs
    want = np.int16 if x is DType.i16 else np.int8
    w = q.value.astype(np.int32) - zero.value.astype(np.int32)
    limits = np.iinfo(want)
    if w.size and (w.min() < limits.min or w.max() > limits.max):
        return None
    return w.astype(want)


def _channel_scale(scale: Node, oc: int) -> np.ndarray | None:
    """Scales of the output channels: [] or [OC]; None if they vary along another axis."""
    v = scale.value
    if v.size == 1:
        return v.reshape(())
    return v.reshape(-1) if v.shape[0] == v.size == oc else None


def _input_scale(product: Node, scale: Node) -> np.ndarray | None:
    """The scale of the input by output channel, [] or [OC]: one for all, or one per channel of a depthwise
    convolution, whose sums are each over one channel. None for any other."""
    if not scale.is_const or scale.type.size == 0:
        return None
    if scale.type.size == 1:
        return scale.value.reshape(())
    w, channels = product.inputs[1], product.inputs[0].shape[-1]
    if product.op == "conv2d" and product.attrs["groups"] == channels == scale.type.size == scale.shape[-1]:
        return np.repeat(scale.value.reshape(-1), w.shape[0] // channels)
    return None


def _is_weight(node: Node) -> bool:
    return node.op == "dequantize" and all(i.is_const for i in node.inputs)


@rule(op(PRODUCTS, where=lambda n: n.dtype is DType.f32 and n.inputs[0].op == "dequantize" and _is_weight(n.inputs[1])))
def integer_product(m: Match) -> Node | Declined | None:
    """(sx (q - zx)) (sw v) + b = sx sw ((q - zx) v + b / (sx sw))."""
    node = m.root
    x, w, *biases = node.inputs
    q, scale, zero = x.inputs
    scale_x = _input_scale(node, scale)
    if node.attrs.get("epilogue") or scale_x is None or not zero.is_const or np.ptp(zero.value) != 0:
        return None
    oc, zero_x = w.shape[0], int(zero.value.flat[0])
    values = _weights(w, q.dtype)
    scales = _channel_scale(w.inputs[1], oc)
    if q.dtype not in (DType.u8, DType.i16) or values is None or scales is None:
        return Declined(f"{q.dtype.value} times {w.inputs[0].dtype.value} with these scales has no integer kernel")
    factor = scale_x * scales  # float32, in onnxruntime's order
    total = np.zeros(oc, np.int64)
    extra: Node | None = None
    if biases:
        b = biases[0]
        if _is_weight(b) and b.inputs[0].dtype is I32 and np.allclose(b.inputs[1].value.reshape(-1), factor, 1e-5, 0):
            total = b.inputs[0].value.astype(np.int64)
        elif b.is_const or _is_weight(b):
            extra = b if b.is_const else constant(ops.evaluate(b, [i.value for i in b.inputs]), origin=b.origin)
        else:
            return Declined("the bias is not constant")
    bound = reach(q, zero_x, values) + np.abs(total)
    operands = [q, constant(values, origin=w.origin)]
    attrs = {**node.attrs, "zero": zero_x}
    if bound.size and bound.max() >= 2**31:
        if q.dtype is not DType.i16 or zero_x or not may_spill(node) or bound.max() >= WIDEST:
            return Declined(f"a sum may reach {bound.max():,}, more than 32 bits hold")
        attrs["chain"] = chain(q, values)
        if not attrs["chain"]:
            return Declined(f"{SHORTEST} products may leave 32 bits")
    if total.any():
        operands.append(constant(total.astype(np.int32), origin=node.origin))
    sums = _like(m, node.op, *operands, **attrs)
    if attrs.get("chain"):
        y = ops.make("mul", sums, _f32(factor), origin=node.origin)
    else:
        y = ops.make("dequantize", sums, _f32(factor), NO_ZERO, origin=node.origin)
    return y if extra is None else ops.make("add", y, extra, origin=node.origin)


def may_spill(node: Node) -> bool:
    """True if a kernel adds up sums of `node` that 32 bits do not hold, on 16-bit operands with the zero point 0."""
    depthwise = node.attrs.get("groups", 1) > 1 and node.inputs[1].shape[-1] == 1
    return node.op in ("conv2d", "linear") and not depthwise


# -------------------------------------------------------------------------------------- attention


@rule(op("attention", where=lambda n: n.attrs["levels"] == 255 and all(i.op == "dequantize" for i in n.inputs[:3])))
def attention_of_bytes(m: Match) -> Node | Declined:
    """Both products on integers; the scales of q and k join that of the scores, v's that of the result."""
    operands = m.root.inputs[:3]
    if not all(x.inputs[0].dtype is DType.u8 and per_tensor(x) for x in operands):
        return Declined("queries, keys and values are not bytes with one scale each")
    sq, sk, sv = (float(x.inputs[1].value.item()) for x in operands)
    zeros = {f"{n}_zero": int(x.inputs[2].value.item()) for n, x in zip("qkv", operands, strict=True)}
    attrs = {k: v for k, v in m.root.attrs.items() if k != "levels"}
    attrs["scale"] = float(np.float32(attrs["scale"] * sq * sk))
    return _like(m, "quantized_attention", *(x.inputs[0] for x in operands), *m.root.inputs[3:], factor=sv,
                 **zeros, **attrs)


@rule(op("quantize", op("quantized_attention", name="x", exclusive=True), Var("s"), Var("z"), where=per_tensor))
def attention_to_bytes(m: Match) -> Node | None:
    """The step of the result joins the division by the sum of the weights."""
    x, s, z = m["x"], m["s"], m["z"]
    if m.root.dtype is not DType.u8 or x.dtype is not DType.f32:
        return None
    factor = np.float32(x.attrs["factor"]) / np.float32(s.value.item())
    attrs = {**x.attrs, "to": DType.u8, "factor": float(factor), "y_zero": int(z.value.item())}
    return _like(m, "quantized_attention", *x.inputs, **attrs)


# ----------------------------------------------------------------------------------- requantizing


def _is_sum(node: Node) -> bool:
    """True for the real value of an integer sum."""
    if node.op == "dequantize":
        return node.inputs[0].dtype is I32
    return node.op == "mul" and bool(node.inputs[0].attrs.get("chain")) and node.inputs[1].is_const


def _equal(a: Node, b: Node) -> bool:
    return a.dtype is b.dtype and bool(np.array_equal(a.value.reshape(-1), b.value.reshape(-1)))


@rule(op(QUANTIZERS, op("dequantize", name="x"), Var("s"), Var("z"), where=per_tensor))
def requantized(m: Match) -> Node | None:
    """Integers that come back as they were; a 32-bit sum times one factor."""
    q, scale, zero = m["x"].inputs
    s, z = m["s"], m["z"]
    if not (scale.is_const and zero.is_const):
        return None
    if q.dtype is I32:
        factor = scale.value / s.value if m.root.op == "quantize" else scale.value * s.value
        return _like(m, "requantize", q, _f32(factor), _scalar(z), to=m.root.dtype)
    same = scale.value.item() == s.value.item() if m.root.op == "quantize" and scale.type.size == 1 else (
        scale.type.size == 1 and abs(scale.value.item() * s.value.item() - 1) < 1e-6)
    return q if same and _equal(zero, z) and q.dtype is m.root.dtype else None


@rule(op("quantize", Var("x"), Var("s"), Var("z"), where=lambda n: n.dtype is DType.i16 and per_tensor(n)))
def scaled_by_a_power_of_two(m: Match) -> Node | None:
    """A division by 2^k is a multiplication by 2^-k, which costs less; one by a factor before it joins that."""
    x, s, z = m["x"], m["s"], m["z"]
    scale = float(s.value.item())
    if x.dtype is not DType.f32 or math.frexp(scale)[0] != 0.5 or not 2.0**-126 < scale < 2.0**126:
        return None
    factor = _f32(1 / scale)
    if _is_sum(x) and x.op == "mul":
        x, factor = x.inputs[0], _f32(x.inputs[1].value * factor.value)
    return _like(m, "requantize", x, factor, _scalar(z), to=m.root.dtype)


@rule(op(QUANTIZERS, op("relu|clip", Var("v"), name="bound", exclusive=True), Var("s"), Var("z"), where=per_tensor))
def bounds_of_integers(m: Match) -> Node | None:
    """Rounding is monotonic: quantize(clip(v)) = clip(quantize(v)) with quantized bounds."""
    v, bound, to = m["v"], m["bound"], m.root.dtype
    if v.op != "dequantize" or v.inputs[0].dtype is not I32:
        return None
    limits = np.iinfo(to.numpy)
    edges = (0.0, np.inf) if bound.op == "relu" else (float(bound.attrs["lo"]), float(bound.attrs["hi"]))
    inner = _like(m, m.root.op, v, m["s"], m["z"], to=to)
    lo, hi = (int(ops.evaluate(inner, [np.asarray(e, np.float32), m["s"].value.reshape(()), m["z"].value.reshape(())]))
              for e in edges)
    return inner if (lo, hi) == (limits.min, limits.max) else _like(m, "clip", inner, lo=lo, hi=hi)


@rule(op(QUANTIZERS, op("reshape", op("dequantize|mul", name="v"), exclusive=True), Var("s"), Var("z"),
         where=per_tensor))
def quantize_before_reshape(m: Match) -> Node | None:
    """A sum is quantized where it is made; the reshape follows."""
    if not _is_sum(m["v"]):
        return None
    quantized = _like(m, m.root.op, m["v"], m["s"], m["z"], to=m.root.dtype)
    return _like(m, "reshape", quantized, shape=m.root.shape)


RULES = [move_integers, nearest_integers, concat_integers, pad_integers, average_of_integers, mean_of_integers,
         integer_product, requantized, scaled_by_a_power_of_two, bounds_of_integers, quantize_before_reshape,
         attention_of_bytes, attention_to_bytes]


def _own_dequantize(graph: Graph) -> Graph:
    """A `dequantize` of its own for every elementwise reader: it costs less than a float copy in memory."""

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        node = rebuilt(node, inputs)
        if ops.op_of(node.op).kind != "elementwise":
            return node
        return rebuilt(node, tuple(replace(i) if i.op == "dequantize" else i for i in inputs))

    return graph.map_nodes(one)


def _folded(graph: Graph) -> Graph:
    """`dequantize` of constants that no integer kernel takes: the float values."""
    return graph.map_nodes(lambda n, i: constant(ops.evaluate(n, [v.value for v in i]), name=n.name, origin=n.origin)
                           if n.op == "dequantize" and all(v.is_const for v in i) else rebuilt(n, i))


@pass_("integer-arithmetic", exact=False)
def integer_arithmetic(graph: Graph, options: object) -> Graph:
    """Contractions, sums and moves of quantized values on integers, each result rounded once."""
    if not any(n.op in ("dequantize", "quantize", "requantize") or (n.dtype is I32 and ops.macs(n))
               for n in graph.nodes):
        return graph
    return _folded(_own_dequantize(keep_weights(rewrite(unsigned(graph), RULES))))
