"""The graph with integers: the formats of its values, the layers in fixed point, what is written where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from skive import ops
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant, rebuilt
from skive.ops.recurrence import QUANTIZED_STEPS
from skive.passes.fuse_elementwise import is_elementwise
from skive.passes.quantize.formats import HEADROOM, Format, Range, affine, fixed
from skive.passes.quantize.nodes import constants, contraction, quantized, recurrent
from skive.passes.quantize.shared_ranges import SharedRanges
from skive.passes.quantize.storage import Storage
from skive.passes.quantize.weights import Layer, Weights
from skive.types import DType

# A concatenated value that others read too takes the scale of the whole unless that widens its own
# range by more than this: a quarter more costs 2 dB, a copy with its own rounding costs time.
WIDENING = 1.25


@dataclass
class Scheme:
    """What the pass works from. Ranges are looked up by node of the float graph.

    `power`: mean squares of the values, which decide how 16-bit layers split their bits (a quarter of the
    range if unknown). `dtypes`: the element type of single contractions, where it is not `dtype`: a value is
    stored for the widest that reads it, and all that read it follow. `spill`: chains of 16-bit products may be
    spilled, which needs float32. `biases` (float) and `rounded` (integers): what stands for the bias or the weights
    of a contraction. `flat`: the values of channels [C] in uniform parts of images (NaN: none), such as the
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
        """True if all stored values are bytes, which attention and recurrent layers can read."""
        return "int16" not in {self.dtype, *self.dtypes.values()}

    def dtype_of(self, products: Iterable[Node]) -> str:
        """The element type in which what `products` share is stored."""
        return "int16" if "int16" in ({self.dtypes.get(p, self.dtype) for p in products} or {self.dtype}) else "int8"


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
        self._shared = SharedRanges(self.storage, scheme.ranges, WIDENING if scheme.dtype == "int8" else 4.0)
        self._formats: dict[Node, Format] = {}
        self._offsets: dict[Node, np.ndarray] = {}
        self._weights = {n: Weights(n, scheme.per_channel) for n in self.storage.products}
        self._readers: dict[Node, list[Node]] = {}
        for node in self.storage.products:
            self._readers.setdefault(self._group(node.inputs[0]), []).append(node)
        for node in self.storage.sources:
            group = self._shared.find(node)
            self._power[group] = max(self._power.get(group, 0.0), scheme.power.get(node, 0.0))
        for node in dict.fromkeys(map(self._shared.find, self._shared.range)):
            self._formats[node] = self._format(node)
        self._offsets = {v: self._offset(v, row) for v, row in scheme.flat.items() if self.storage.takes_offsets(v)}
        self.layers = {n: self._layer(n) for n in self.storage.products}

    def _group(self, node: Node) -> Node:
        return self._shared.find(self.storage.source_of(node))

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
            sources.setdefault(self._shared.find(node), []).append(node)
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
        lo, hi = self._shared.range[group]
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
        power = self._power.get(self._group(node.inputs[0]), 0.0)
        return self._weights[node].chain(form, self.bias_of(node), power, self.scheme.spill)

    def bias_of(self, node: Node) -> np.ndarray:
        """[OC] float64, the bias of a contraction without what offsets of its inputs add to the sums."""
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
        source, form = self.storage.source_of(node.inputs[0]), self.format_of(node.inputs[0])
        chain = 0 if form.dtype is DType.u8 else self._chain(node, form)[0]
        return self._weights[node].layer(source, form, self.bias_of(node), chain, self.scheme.rounded.get(node))

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
                integers = quantized(stored, self.format_of(node), node)
            self.integers[node] = integers
            form = self.format_of(node)
            floats[node] = ops.make("dequantize", integers, *constants(form), origin=node.origin)
            exact[node] = integers if storage.integer_only else value if value is not None else floats[node]
        return graph.with_nodes(exact)

    def _float(self, node: Node, floats: Mapping[Node, Node]) -> Node:
        """`node` on the operands as they are read now; a contraction on integer weights."""
        inputs = tuple(self._without_offset(i, floats[i]) if is_elementwise(node) else floats[i] for i in node.inputs)
        if self.storage.is_attention(node) and all(
            i in self.storage.stored and self.format_of(i).dtype is DType.u8 for i in node.inputs[:3]
        ):
            return ops.make(node.op, *inputs, origin=node.origin, label=node.name, **{**node.attrs, "levels": 255})
        if self.is_recurrent(node):
            return recurrent(node, inputs)
        if node not in self.layers:
            return rebuilt(node, inputs)
        form = self.format_of(node.inputs[0])
        return contraction(inputs[0], self.layers[node], form, self.bias_of(node), self.scheme.per_channel)

    def _without_offset(self, node: Node, value: Node) -> Node:
        """`value`, as it is read of the old `node`, less what that is stored with too much."""
        offset = self.offset_of(node) if node in self.storage.stored else None
        return value if offset is None else ops.make("sub", value, constant(offset), origin=node.origin)

    def is_recurrent(self, node: Node) -> bool:
        """True for the steps of a recurrent layer that run on 8-bit weights."""
        return (node.op in QUANTIZED_STEPS and self.scheme.attention and not self.scheme.keep(node)
                and node.inputs[1].is_const)

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
                operands.append(quantized(floats[i], form, i))
        if node.op == "pad" and attrs["mode"] == "constant":
            attrs["value"] = form.zero
        return ops.make(node.op, *operands, origin=node.origin, label=node.name, **attrs)
