"""`quantize`: what is written to memory between two kernels is stored as integers.

A float graph and the ranges of its values become a graph in which `quantize` and `dequantize` stand
around float operations (stage 1 of docs/decisions/0007-quantized-ir.md). A value is stored as
integers if a contraction reads it, directly or through operations that only move values, or if it
merely passes from one integer kernel to another; a value that lives inside a fused expression is
never rounded, so one operand of a residual addition is the convolution's own sum. Operations without
an integer form read and write float32: islands.

8 bit: activations u8 with a zero point (0 is exact), weights i8 per output channel and symmetric,
biases i32 (Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018). 16 bit: dynamic fixed point (Das et al., Mixed Precision
Training of Convolutional Neural Networks using Integer Operations, 2018): i16 with one exponent per
tensor, of weights a scale per output channel. No input can make a sum leave 32 bits: either activations and
weights have few enough bits for that, or the sum is added up in parts that fit (a chain is spilled),
whichever costs less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive import ops
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.fuse_elementwise import FuseElementwise, _Fusion, is_elementwise
from skive.passes.integer_arithmetic import WIDEST, may_spill, window_reach
from skive.pipeline import pass_
from skive.types import DType

PRODUCTS = frozenset({"conv2d", "conv_transpose2d", "linear"})
MOVES = frozenset({"reshape", "transpose", "slice", "concat", "pad", "expand", "max_pool2d"})
SUMS = frozenset({"avg_pool2d", "reduce_mean"})
# A concatenated value that others read too takes the scale of the whole unless that widens its own
# range by more than this: a quarter more costs 2 dB, a copy with its own rounding costs time.
WIDENING = 1.25
# 16-bit ranges keep at least this much room above the largest value seen, and whatever their power of two
# leaves: saturation costs more than half a bit where rounding noise lies 70 dB below the signal.
HEADROOM = 1.6
# A value this much smaller than what is computed from it is left alone if no contraction reads it:
# a gate of a squeeze-and-excitation block.
SMALL = 4
INT32 = 2**31 - 1
# Attention in bytes: features of a head with which scores are exact in float32, and keys with which the sums
# of their values fit 32 bits.
ATTENTION_WIDTH, ATTENTION_KEYS = 256, 32768
# A chain of 16-bit products is spilled after so many, if at all. A spill takes about as long as SPILL products
# (measured: 6 on AVX-512, 2 to 6 on AVX2); for PRICE dB less noise a layer may take one per cent more time.
CHAINS = (1024, 512, 256, 128, 64, 32)
SPILL = 6
PRICE = 0.02

Range = tuple[float, float]


@dataclass(frozen=True)
class Format:
    """real = scale * (integer - zero), integers of `dtype` within low..high."""

    dtype: DType
    scale: float
    zero: int
    low: int
    high: int

    @property
    def saturates(self) -> bool:
        """True if low..high is the whole range of the type."""
        limits = np.iinfo(self.dtype.numpy)
        return (self.low, self.high) == (limits.min, limits.max)

    @property
    def bits(self) -> int:
        """Bits that a value takes, sign included."""
        if self.dtype is DType.u8:
            return 8
        return max(~self.low, self.high).bit_length() + 1

    @property
    def range(self) -> Range:
        return (self.low - self.zero) * self.scale, (self.high - self.zero) * self.scale

    def integers(self, x: np.ndarray) -> np.ndarray:
        """`x` quantized, as int32."""
        q = np.rint(x / np.float32(self.scale)) + self.zero
        return np.clip(q, self.low, self.high).astype(np.int32)

    def real(self, x: np.ndarray) -> np.ndarray:
        """`x` as it is read back."""
        return (self.integers(x) - self.zero).astype(np.float32) * np.float32(self.scale)


@dataclass
class Layer:
    """A contraction in fixed point. `weights` are integers, `scales` per output channel or one."""

    node: Node
    source: Node  # whose stored form it reads
    weights: np.ndarray
    scales: np.ndarray  # [OC] float32
    weight_bits: int = 8
    chain: int = 0  # products that are added before the sum is spilled, 0: all of them

    @property
    def real_weights(self) -> np.ndarray:
        return self.weights.astype(np.float32) * self.shaped(self.scales)

    def shaped(self, per_channel: np.ndarray) -> np.ndarray:
        """[OC] as [OC, 1, ...], which broadcasts over the weights."""
        return per_channel.reshape(-1, *(1,) * (self.weights.ndim - 1))


@dataclass
class Scheme:
    """What the pass works from. Ranges are looked up by node of the float graph.

    `power`: mean squares of the values, which decide how 16-bit layers split their bits (a quarter of the
    range if unknown). `dtypes`: the element type of single contractions, where it is not `dtype`: a value is
    stored for the widest that reads it, and all that read it follow. `spill`: chains of 16-bit products may be
    spilled, which needs float32. `weights`: replaced float weights or
    biases by constant node are not a part of this; see `biases` (float, by contraction) and `rounded`
    (integers, by contraction). `flat`: the values of channels [C] in uniform parts of images (NaN: none), such as the
    border of a picture that was made square. There rounding is the same error everywhere, which sums do not average
    out: what only contractions read is stored with an offset per channel that makes it exact, and their biases take
    the offset back.
    """

    ranges: Mapping[Node, Range]
    dtype: str = "int8"
    per_channel: bool = True
    keep: Callable[[Node], bool] = lambda node: False
    power: Mapping[Node, float] = field(default_factory=dict)
    biases: Mapping[Node, np.ndarray] = field(default_factory=dict)
    rounded: Mapping[Node, np.ndarray] = field(default_factory=dict)
    dtypes: Mapping[Node, str] = field(default_factory=dict)
    flat: Mapping[Node, np.ndarray] = field(default_factory=dict)
    spill: bool = True

    @property
    def attention(self) -> bool:
        """True if all stored values are bytes, which attention can read."""
        return "int16" not in {self.dtype, *self.dtypes.values()}

    def dtype_of(self, products: Iterable[Node]) -> str:
        """The element type in which what `products` share is stored."""
        return "int16" if "int16" in ({self.dtypes.get(p, self.dtype) for p in products} or {self.dtype}) else "int8"


def _is_move(node: Node) -> bool:
    """True if the integers of the operands, moved, are the integers of `node`."""
    return node.op in MOVES and not (node.op == "pad" and node.attrs["mode"] == "constant" and node.attrs["value"])


class Storage:
    """Which values of a float graph are stored as integers, and which of them share a scale.

    `sources`: values that are quantized where they are computed; their ranges must be known.
    `products`: contractions with constant weights that read integers. `attention`: attention reads its
    operands as bytes (there is no such kernel of 16 bits). `source_of` leads from a stored value through
    operations that only move it to the source (or concatenation) whose format it has.
    """

    def __init__(self, graph: Graph, keep: Callable[[Node], bool] = lambda node: False, attention: bool = True):
        self.graph = graph
        self._attention = attention
        fusion = _Fusion(graph, FuseElementwise())
        regions = fusion.regions()
        self._root = {n: r.root for r in regions.values() for n in r.nodes}
        self._members = {r.root: r.nodes for r in regions.values()}
        self._interior = {n for n, root in self._root.items() if n is not root}
        self._keep = keep
        self.stored: set[Node] = set()
        for node in reversed(graph.nodes):
            if self._is_stored(node):
                self.stored.add(node)
        self.products = [n for n in graph.nodes if self.is_product(n) and n.inputs[0] in self.stored]
        self.sources = [n for n in graph.nodes if n in self.stored and not self.is_moved(n)]

    integer_only = False  # whether the inputs and outputs of the graph are integers too
    wide: frozenset[Node] | set[Node] = frozenset()  # stored values that take 16 bits whatever else takes 8

    def is_product(self, node: Node) -> bool:
        """True for a contraction with constant weights that may be computed in integers."""
        return (
            node.op in PRODUCTS
            and node.dtype is DType.f32
            and node.inputs[1].is_const
            and all(b.is_const for b in node.inputs[2:])
            and node.type.size > 0
            and not self._keep(node)
        )

    def is_attention(self, node: Node) -> bool:
        """True for attention whose queries, keys and values may be read as bytes."""
        if not self._attention or node.op != "attention" or node.dtype is not DType.f32 or self._keep(node):
            return False
        keys, width = ops.heads_first(node.inputs[1].shape, node.attrs["token_major"])[2:]
        fits = width % 4 == 0 and width <= ATTENTION_WIDTH and 0 < keys <= ATTENTION_KEYS and node.type.size > 0
        return fits and not any(i.is_const for i in node.inputs[:3])

    def _reads_integers(self, user: Node, node: Node) -> bool:
        """True if `user` multiplies the stored integers of `node`."""
        if self.is_attention(user):
            return node in user.inputs[:3] and node not in user.inputs[3:]
        return self.is_product(user) and user.inputs[0] is node

    def is_moved(self, node: Node) -> bool:
        """True if the stored `node` is made by moving stored integers."""
        return _is_move(node) and node not in self._interior and any(i in self.stored for i in node.inputs)

    def _is_stored(self, node: Node) -> bool:
        """Whether `node` is stored as integers, all its users being decided."""
        if node.dtype is not DType.f32 or node.is_const or node in self._interior or node.type.size == 0:
            return False
        product = move = total = other = False
        passed: list[Node] = []
        for user in self.graph.users[node]:
            if self._keep(user):
                other = True
            elif self._reads_integers(user, node):
                product = True
            elif _is_move(user) and user in self.stored:
                move = True
            elif user.op in SUMS:
                total = True
            elif is_elementwise(user) or user.op in MOVES or (user.op == "resize2d" and user.inputs[0] is node):
                passed.append(self._root.get(user, user))
            else:
                other = True
        if product or move:
            return True
        if other or not self._from_integers(node):
            return False
        return total or any(u in self.stored and node.type.size * SMALL > u.type.size for u in passed)

    def _from_integers(self, node: Node) -> bool:
        """True if an integer kernel computes `node`: a contraction, or what moves or sums values."""
        return any(self.is_product(n) or n.op in MOVES or n.op in SUMS for n in self._members.get(node, [node]))

    def only_products(self, node: Node) -> bool:
        """True if contractions alone read the channels of the image `node`, directly, joined with others or as
        window maxima."""
        for user in self.graph.users[node]:
            if self.is_product(user) and user.op == "conv2d" and user.inputs[0] is node:
                continue
            moves = user.op == "max_pool2d" or user.op == "concat" and user.attrs["axis"] % user.type.rank == 3
            if not (moves and user in self.stored and self.is_moved(user) and self.only_products(user)):
                return False
        return node.type.rank == 4 and not self.integer_only and not self.graph.is_output(node)

    def source_of(self, node: Node) -> Node:
        """The source or concatenation whose format the stored `node` has."""
        while node.op != "concat" and self.is_moved(node):
            node = node.inputs[0]
        return node


class _Scales:
    """One range per group of values that share a format; concatenations merge groups."""

    def __init__(self, storage: Storage, ranges: Mapping[Node, Range], widening: float):
        self._parent: dict[Node, Node] = {}
        self.range: dict[Node, Range] = {}
        self._own: dict[Node, float] = {}  # the narrowest range that others read in a group
        for node in storage.sources:
            lo, hi = ranges[node]
            self._parent[node] = node
            self.range[node] = (min(0.0, lo), max(0.0, hi))
            self._own[node] = math.inf
        readers = self._readers(storage)
        for node in storage.graph.nodes:
            if node.op != "concat" or node not in storage.stored:
                continue
            parts = [storage.source_of(i) for i in node.inputs if i in storage.stored]
            groups = list(dict.fromkeys(self.find(p) for p in parts))
            lo = min([self.range[g][0] for g in groups] + [0.0])
            hi = max([self.range[g][1] for g in groups] + [0.0])
            for i in node.inputs:
                if i.is_const:
                    lo, hi = min(lo, float(i.value.min(initial=0))), max(hi, float(i.value.max(initial=0)))
            self._parent[node] = node
            self.range[node] = (lo, hi)
            self._own[node] = math.inf
            for p in parts:
                g = self.find(p)
                if g is self.find(node):
                    continue
                width = self.range[g][1] - self.range[g][0]
                narrowest = min(self._own[g], width if readers[p] > 1 else math.inf)
                if hi - lo <= widening * narrowest:
                    self._parent[g] = self.find(node)
                    self._own[node] = min(self._own[node], narrowest)

    def find(self, node: Node) -> Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    @staticmethod
    def _readers(storage: Storage) -> dict[Node, int]:
        """How many kernels read each source or concatenation, through moves."""
        count: dict[Node, int] = {}
        for node in storage.stored:
            origin = storage.source_of(node)
            users = [u for u in storage.graph.users[node] if u not in storage.stored or u.op == "concat"
                     or storage.source_of(u) is u]
            count[origin] = count.get(origin, 0) + len(users) + storage.graph.is_output(node)
        return count


def affine(low: float, high: float) -> Format:
    """The u8 format whose range covers low..high and holds 0 exactly."""
    low, high = min(0.0, low), max(0.0, high)
    scale = float(np.float32((high - low) / 255))
    if not scale > 1e-30:
        return Format(DType.u8, 1.0, 0, 0, 255)
    return Format(DType.u8, scale, int(np.clip(round(-low / scale), 0, 255)), 0, 255)


def fixed(low: float, high: float, bits: int) -> Format:
    """The i16 format with the smallest power-of-two scale for which `bits` bits cover low..high.

    Integers are held to `bits` bits, and to one sign if the interval has one: how far a sum can go depends on it.
    """
    limit = 2 ** (bits - 1) - 1
    magnitude = max(abs(low), abs(high))
    exponent = max(-100, math.ceil(math.log2(magnitude / limit))) if magnitude > 1e-30 else 0
    bottom, top = limit + 1 if low < -1e-30 else 0, limit if high > 1e-30 else 0
    return Format(DType.i16, 2.0**exponent, 0, -bottom, top)


def reach(form: Format, weights: np.ndarray) -> np.ndarray:
    """[OC] how far from 0 the sum of weights [OC, K] times any activations in `form` can come."""
    low, high = form.low - form.zero, form.high - form.zero
    up, down = np.maximum(weights, 0).sum(1), np.maximum(-weights, 0).sum(1)
    return np.maximum(high * up - low * down, high * down - low * up)


class Quantizer:
    """The steps of the pass: formats of the stored values, integers of the weights, the new graph.

    Ranges of `storage.sources` must be in the scheme, or QuantizationError names the first that is not.
    """

    def __init__(self, graph: Graph, scheme: Scheme, storage: Storage | None = None):
        self.graph, self.scheme = graph, scheme
        self.storage = storage or Storage(graph, scheme.keep, scheme.attention)
        for node in self.storage.sources:
            lo, hi = scheme.ranges.get(node, (math.nan, math.nan))
            if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
                raise QuantizationError(f"{node.label()}: the range of this value is not known; calibrate the network")
        self._power: dict[Node, float] = {}
        self._scales = _Scales(self.storage, scheme.ranges, WIDENING if scheme.dtype == "int8" else 4.0)
        self._formats: dict[Node, Format] = {}
        self._offsets: dict[Node, np.ndarray] = {}
        self._reach: dict[tuple[Node, int], np.ndarray] = {}
        self._readers: dict[Node, list[Node]] = {}
        for node in self.storage.products:
            self._readers.setdefault(self._group(node.inputs[0]), []).append(node)
        for node in self.storage.sources:
            group = self._scales.find(node)
            self._power[group] = max(self._power.get(group, 0.0), scheme.power.get(node, 0.0))
        for node in dict.fromkeys(map(self._scales.find, self._scales.range)):
            self._formats[node] = self._format(node)
        self._offsets = {v: self._offset(v, row) for v, row in scheme.flat.items() if self.storage.only_products(v)}
        self.layers = {n: self._layer(n) for n in self.storage.products}

    def _group(self, node: Node) -> Node:
        return self._scales.find(self.storage.source_of(node))

    def format_of(self, node: Node) -> Format:
        """The format of a stored value."""
        return self._formats[self._group(node)]

    def _offset(self, node: Node, flat: np.ndarray) -> np.ndarray:
        """[C] float32, at most half a step: `flat` plus this is stored exactly."""
        form = self.format_of(node)
        x = np.nan_to_num(flat).astype(np.float32)
        offset = form.real(x) - x
        return np.where(np.isfinite(flat) & (np.abs(offset) <= 0.501 * form.scale), offset, 0).astype(np.float32)

    def offset_of(self, node: Node) -> np.ndarray | None:
        """[C] what the stored integers of `node` are larger by than it, None if nothing."""
        if node in self._offsets or not self._offsets or not self.storage.is_moved(node):
            return self._offsets.get(node)
        parts = [self.offset_of(i) for i in node.inputs]
        if node.op != "concat" or all(p is None for p in parts):
            return parts[0]
        return np.concatenate([np.zeros(i.shape[-1], np.float32) if p is None else p
                               for p, i in zip(parts, node.inputs, strict=True)])

    def groups(self) -> list[tuple[list[Node], list[Node]]]:
        """(sources, contractions) that have one element type, in execution order; a contraction is in one group.

        Contractions that read one format share its type. What only sums and additions read goes with the
        contraction that makes it.
        """
        sources: dict[Node, list[Node]] = {}
        for node in self.storage.sources:
            sources.setdefault(self._scales.find(node), []).append(node)
        found = {group: (sources.get(group, []), readers) for group, readers in self._readers.items()}
        for group, nodes in sources.items():
            if group not in self._readers:
                for maker in self._sharing(group):
                    found[self._group(maker.inputs[0])][0].extend(nodes)
        return list(found.values())

    def _sharing(self, group: Node) -> list[Node]:
        """The contractions whose element type decides that of `group`."""
        if group in self._readers:
            return self._readers[group]
        products, todo = set(self.storage.products), [group]
        seen: set[Node] = set()
        while todo:
            node = todo.pop(0)
            if node in products:
                return [node]
            todo += [i for i in node.inputs if i not in seen]
            seen.update(node.inputs)
        return []

    def _format(self, group: Node) -> Format:
        lo, hi = self._scales.range[group]
        members = [n for n in self.storage.stored if self._group(n) is group]
        if self.storage.wide and self.storage.wide.issuperset(members):
            return Format(DType.i16, float(np.float32(max(-lo, hi, 1e-30) * HEADROOM / 32767)), 0, -32768, 32767)
        if self.scheme.dtype_of(self._sharing(group)) == "int8":
            return affine(lo, hi)
        lo, hi = lo * HEADROOM, hi * HEADROOM
        readers = self._readers.get(group, [])
        if not readers:
            form = fixed(lo, hi, 16)
            return Format(form.dtype, form.scale, 0, -32768, 32767)

        def noise(form: Format) -> float:
            """dB of the noise that rounding adds to the sums of all readers, and what the spilling of chains costs."""
            return sum(self._chain(r, form)[1] for r in readers)

        return min((fixed(lo, hi, bits) for bits in range(16, 7, -1)), key=noise)

    def _chain(self, node: Node, form: Format) -> tuple[int, float]:
        """(after how many products to spill, the dB of relative noise and of price that this means)."""
        w = node.inputs[1].value
        largest = max(abs(form.low), abs(form.high)) * form.scale
        power = self._power[self._group(node.inputs[0])] or (largest / 4) ** 2 or 1.0
        square = max(float(np.mean(np.square(w))), 1e-30)
        count = w[0].size
        allowed = CHAINS if self.scheme.spill and may_spill(node) else ()
        best = (0, math.inf)
        for n in (0, *(c for c in allowed if c < count)):
            step = self._step_16(node, form, n)
            total = form.scale**2 / power + float(np.mean(step**2)) / square
            price = PRICE * 100 * SPILL * (1 / n + 1 / count) if n else 0.0  # one more where the sum ends
            cost = 10 * math.log10(total) + price
            if cost < best[1]:
                best = n, cost
        return best

    # ------------------------------------------------------------------------------- weights

    def _bias(self, node: Node) -> np.ndarray:
        """[OC] float64, without what offsets of the inputs add to the sums."""
        w, offset = node.inputs[1].value, self.offset_of(node.inputs[0])
        bias = np.zeros(len(w))
        if node in self.scheme.biases:
            bias = self.scheme.biases[node].astype(np.float64)
        elif len(node.inputs) > 2:
            bias = node.inputs[2].value.astype(np.float64)
        if offset is None:
            return bias
        groups = node.attrs.get("groups", 1)
        taps = w.astype(np.float64).reshape(groups, len(w) // groups, -1, w.shape[-1]).sum(2)  # [G, OC/G, IC/G]
        return bias - np.einsum("goi,gi->go", taps, offset.reshape(groups, -1)).reshape(-1)

    def _layer(self, node: Node) -> Layer:
        form = self.format_of(node.inputs[0])
        w = node.inputs[1].value
        chain = 0 if form.dtype is DType.u8 else self._chain(node, form)[0]
        scales = self._scale_8(node, form) if form.dtype is DType.u8 else self._scale_16(node, form, chain)
        limit = 127 if form.dtype is DType.u8 else 32767
        layer = Layer(node, self.storage.source_of(node.inputs[0]), np.zeros_like(w, np.int32), scales, chain=chain)
        if node in self.scheme.rounded:
            layer.weights = self.scheme.rounded[node].astype(np.int32)
        else:
            real = w.astype(np.float32 if form.dtype is DType.u8 else np.float64)  # as `_scale_16` rounded them
            layer.weights = np.clip(np.rint(real / layer.shaped(scales)), -limit, limit).astype(np.int32)
        layer.weight_bits = int(np.abs(layer.weights).max(initial=0)).bit_length() + 1
        return layer

    def _per_channel(self, values: np.ndarray) -> np.ndarray:
        """[OC] of the wanted scales as they may be: all alike unless each channel has its own."""
        return values if self.scheme.per_channel else np.full_like(values, values.max(initial=-np.inf))

    def _scale_8(self, node: Node, form: Format) -> np.ndarray:
        """[OC] scales with which the weights fit -127..127, and bias and sums 32 bits."""
        w = np.abs(node.inputs[1].value.astype(np.float64)).reshape(node.inputs[1].shape[0], -1)
        reach = 255.0 * w.sum(1) + np.abs(self._bias(node)) / form.scale  # of a sum, in units of w
        rounding = 128 * w.shape[1] + 1  # what rounding the weights and the bias may add to a sum
        scale = np.maximum(w.max(1, initial=0) / 127, reach / (INT32 - rounding))
        scale = self._per_channel(np.where(scale > 1e-30, scale, 1.0))
        return scale.astype(np.float32)

    def _scale_16(self, node: Node, form: Format, chain: int) -> np.ndarray:
        """[OC] scales with which weights fit 16 bits and no input makes a sum, or a part of it, leave 32 bits.

        The bound holds for any activations in `form`: the largest times the positive weights, the
        smallest times the negative ones, plus the bias (an L1 bound of the channel's rounded weights).
        """
        w = node.inputs[1].value.astype(np.float64).reshape(node.inputs[1].shape[0], -1)
        bias = np.abs(self._bias(node)) / form.scale
        step = self._step_16(node, form, chain)
        while True:
            step = step.astype(np.float32).astype(np.float64)  # as it is stored
            integers = np.rint(w / step[:, None]).astype(np.int64)
            total = reach(form, integers) + np.rint(bias / step)
            over = total > INT32
            if chain:
                over = (total >= WIDEST) | (window_reach(integers, form.low, form.high, chain) > INT32 - 65535)
            if not over.any():
                return step.astype(np.float32)
            step = step * np.where(over, 1.002, 1.0) if self.scheme.per_channel else step * 1.002

    def _step_16(self, node: Node, form: Format, chain: int) -> np.ndarray:
        """[OC] the same before the weights are rounded."""
        w = node.inputs[1].value.reshape(node.inputs[1].shape[0], -1)
        # What a sum reaches is proportional to the range, but for its rounding to integers.
        if (node, chain) not in self._reach:
            unit = 1 / max(1, form.high - form.low)
            self._reach[node, chain] = window_reach(w, form.low * unit, form.high * unit, chain or w.shape[1])
        if (node, -1) not in self._reach:
            self._reach[node, -1] = np.abs(w).max(1, initial=0)
            self._reach[node, -2] = np.abs(w).sum(1, dtype=np.float64)
        whole = self._reach[node, chain] * max(1, form.high - form.low)
        if not chain:
            whole = whole + np.abs(self._bias(node)) / form.scale
        need = np.maximum(self._reach[node, -1] / 32767, whole / (INT32 - (65535 if chain else 0)))
        if chain:
            total = 2.0**15 * self._reach[node, -2] + np.abs(self._bias(node)) / form.scale
            need = np.maximum(need, total / (WIDEST - 2**36))
        return self._per_channel(np.where(need > 1e-30, need, 2.0**-31))

    # --------------------------------------------------------------------------------- graph

    def build(self) -> Graph:
        """The graph with integers where values are stored."""
        storage, graph = self.storage, self.graph
        floats: dict[Node, Node] = {}  # what a float reader of an old node reads now
        exact: dict[Node, Node] = {}  # the value before it was rounded, for the outputs of the graph
        self.integers: dict[Node, Node] = {}
        for node in graph.nodes:
            value: Node | None = None
            if node in storage.stored and storage.is_moved(node):
                integers = self._moved(node, floats)
            elif node in storage.stored and node.op == "input" and storage.integer_only:
                integers = ops.make("input", shape=node.shape, dtype=self.format_of(node).dtype, label=node.name)
            else:
                value = self._float(node, floats)
                if node not in storage.stored:
                    floats[node] = exact[node] = value
                    continue
                stored = value
                if node in self._offsets:
                    stored = ops.make("add", value, constant(self._offsets[node]), origin=node.origin)
                integers = self._quantized(stored, self.format_of(node), node)
            self.integers[node] = integers
            form = self.format_of(node)
            floats[node] = ops.make("dequantize", integers, *_constants(form), origin=node.origin)
            exact[node] = integers if storage.integer_only else value if value is not None else floats[node]
        return graph.with_nodes(exact)

    def _float(self, node: Node, floats: Mapping[Node, Node]) -> Node:
        """`node` on the operands as they are read now; a contraction on integer weights."""
        inputs = tuple(floats[i] for i in node.inputs)
        if self.storage.is_attention(node) and all(
            i in self.storage.stored and self.format_of(i).dtype is DType.u8 for i in node.inputs[:3]
        ):
            return ops.make(node.op, *inputs, origin=node.origin, label=node.name, **{**node.attrs, "levels": 255})
        if node not in self.layers:
            return rebuilt(node, inputs)
        layer, form = self.layers[node], self.format_of(node.inputs[0])
        dtype = DType.i8 if form.dtype is DType.u8 else DType.i16
        w, scales = node.inputs[1], layer.scales
        if not self.scheme.per_channel:
            scales = scales[:1]
        shape = (len(scales),) + (1,) * (w.type.rank - 1) if len(scales) > 1 else ()
        weights = ops.make(
            "dequantize",
            constant(layer.weights.astype(dtype.numpy), name=w.name, origin=w.origin),
            constant(scales.reshape(shape)),
            constant(np.zeros(shape, dtype.numpy)),
            origin=node.origin,
        )
        operands = [inputs[0], weights]
        bias = self._bias(node)
        if bias.any():
            steps = (np.float32(form.scale) * scales).astype(np.float32)
            steps = steps if len(scales) > 1 else steps.reshape(())
            name = node.inputs[2].name if len(node.inputs) > 2 else ""
            if layer.chain and (np.abs(bias / steps) > INT32).any():
                operands.append(constant(bias.astype(np.float32), name=name, origin=node.origin))
                return ops.make(node.op, *operands, origin=node.origin, label=node.name, **node.attrs)
            whole = np.clip(np.rint(bias / steps), -INT32, INT32).astype(np.int32)
            operands.append(
                ops.make(
                    "dequantize",
                    constant(whole, name=name, origin=node.origin),
                    constant(np.asarray(steps, np.float32)),
                    constant(np.zeros(np.shape(steps), np.int32)),
                    origin=node.origin,
                )
            )
        return ops.make(node.op, *operands, origin=node.origin, label=node.name, **node.attrs)

    def _quantized(self, value: Node, form: Format, node: Node) -> Node:
        """`value` in `form`. A bound that saturation keeps in any case is not computed."""
        low, high = form.low, form.high
        while value.op in ("relu", "clip"):
            lo, hi = (0.0, math.inf) if value.op == "relu" else (float(value.attrs["lo"]), float(value.attrs["hi"]))
            bottom, top = (int(form.integers(np.asarray(v, np.float32))) for v in (lo, hi))
            if value.op == "clip" and (bottom > form.low or top < form.high):
                break
            if value.op == "relu" and bottom > form.low and form.dtype is DType.u8:
                break
            low = max(low, bottom)
            value = value.inputs[0]
        q = ops.make("quantize", value, *_constants(form), to=form.dtype, origin=node.origin, label=node.name)
        limits = np.iinfo(form.dtype.numpy)
        if (low, high) != (limits.min, limits.max):
            q = ops.make("clip", q, lo=low, hi=high, origin=node.origin, label=node.name)
        return q

    def _moved(self, node: Node, floats: Mapping[Node, Node]) -> Node:
        """The integers of a stored value that is made by moving others."""
        form, attrs = self.format_of(node), dict(node.attrs)
        operands = []
        for i in node.inputs:
            if i in self.integers and self.format_of(i) == form:
                operands.append(self.integers[i])
            elif i.is_const:
                operands.append(constant(form.integers(i.value).astype(form.dtype.numpy), origin=i.origin))
            else:
                operands.append(self._quantized(floats[i], form, i))
        if node.op == "pad" and attrs["mode"] == "constant":
            attrs["value"] = form.zero
        return ops.make(node.op, *operands, origin=node.origin, label=node.name, **attrs)


def _constants(form: Format) -> tuple[Node, Node]:
    """(scale, zero point) as operands."""
    return constant(np.asarray(form.scale, np.float32)), constant(np.asarray(form.zero, form.dtype.numpy))


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`dtype`: int8 or int16. `ranges`: `name:low:high` joined by `;`, by the name of a value; `*` stands for
    all that are not listed. A calibrated compile fills these in; here they are written down."""

    dtype: str = "int8"
    ranges: str = "*:-8:8"
    per_channel: bool = True
    keep: str = ""


@pass_("quantize", exact=False, options=QuantizeOptions)
def quantize(graph: Graph, options: QuantizeOptions) -> Graph:
    """Integers wherever a value is written to memory between two kernels that can work on them."""
    if options.dtype not in ("int8", "int16"):
        raise QuantizationError(f"quantize: dtype is {options.dtype!r}, not int8 or int16")
    keep = set(filter(None, options.keep.split(";")))
    storage = Storage(graph, lambda n: n.origin in keep or n.name in keep, options.dtype == "int8")
    if not storage.sources:
        return graph
    given: dict[str, Range] = {}
    for item in filter(None, options.ranges.split(";")):
        try:
            name, low, high = item.rsplit(":", 2)
            given[name] = (float(low), float(high))
        except ValueError:
            raise QuantizationError(f"quantize: range {item!r} is not name:low:high") from None
    ranges = {n: given.get(n.name, given.get("*", (math.nan, math.nan))) for n in storage.sources}
    scheme: Any = Scheme(ranges, options.dtype, options.per_channel, storage._keep)
    return Quantizer(graph, scheme, storage).build()
