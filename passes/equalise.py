"""`equalise`: the channels of a stored value get ranges that suit what reads it.

One scale for a whole tensor wastes bits on channels with small values. Multiplying channel c of a
value by f[c] and dividing the weights that read it by f[c] changes nothing in exact arithmetic. Where
the value comes from a convolution through an activation with act(f x) = f act(x), or from a
normalisation with constant scale and bias, f joins their constants; elsewhere it is one more
multiplication in the expression that makes the value, taken if it pays. A depthwise convolution
divides its own channel's scale only, so before one all channels can fill the range. With 16 bits,
whose scale is a power of two, one more factor for all channels makes a range fill the integers.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, 2019; the
balance between activations and weights is that of Xiao et al., SmoothQuant, 2023, with the migration
strength found for each value from the noise it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.fuse_elementwise import is_elementwise
from skive.passes.quantize import HEADROOM as MARGIN
from skive.passes.quantize import PRODUCTS, Storage
from skive.pipeline import pass_

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu"})  # act(f x) = f act(x) for f > 0
NORMS = frozenset({"layer_norm", "rms_norm"})
STRENGTHS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)  # how much of the unevenness leaves the activations
FLOOR = 2.0**-8  # channels smaller than this against the largest are treated as if they had this size
# Where every channel fills the range, every channel can leave it on other data: balanced values need
# room above the largest one seen, and so must gain more than the room costs. By bytes of an element:
HEADROOM = {1: 1.2, 2: 2.0}
WORTH = {1: 0.6, 2: 0.2}  # the noise power that must be left at most, as a share
MULTIPLIED = 0.7  # times that, for factors which need a multiplication of their own
# A scale of 16 bits is a power of two, and a range rarely is: one factor for all channels makes it fill the
# integers, where it costs nothing and brings more than this (0.5 dB).
FILLS = 1.06


@dataclass
class Channels:
    """What is known of the channels of a value: [C] largest magnitudes and mean squares."""

    magnitude: np.ndarray
    power: np.ndarray


@dataclass
class Equalised:
    """The new graph, where each node of the old one went, and the factors of the values that changed; `balanced`
    are those whose channels got different ones."""

    graph: Graph
    node: dict[Node, Node] = field(default_factory=dict)
    factors: dict[Node, np.ndarray] = field(default_factory=dict)  # by old node, [C] float64
    balanced: set[Node] = field(default_factory=set)


def _readers(storage: Storage, value: Node) -> list[Node] | None:
    """The contractions that read `value`, directly or its window maxima; None if anything else does."""
    found: list[Node] = []
    graph = storage.graph
    if graph.is_output(value):
        return None
    for user in graph.users[value]:
        if user.op == "max_pool2d" and user in storage.stored:
            behind = _readers(storage, user)
            if behind is None:
                return None
            found += behind
        elif user.op in PRODUCTS and storage.is_product(user) and user.inputs[0] is value:
            if user.op == "conv_transpose2d" and user.attrs["groups"] != 1:
                return None
            found.append(user)
        else:
            return None
    return list(dict.fromkeys(found)) or None


def _input_factors(product: Node, factors: np.ndarray) -> np.ndarray:
    """`factors` of the input channels, shaped so that they broadcast over the weights."""
    w = product.inputs[1]
    groups = product.attrs.get("groups", 1)
    per_group = factors.reshape(groups, -1)  # [G, IC/G]
    rows = np.repeat(per_group, w.shape[0] // groups, 0)  # [OC, IC/G]
    return rows.reshape(w.shape[0], *(1,) * (w.type.rank - 2), rows.shape[1])


def _column_magnitude(product: Node, channels: int) -> np.ndarray:
    """[C] the largest |weight| that multiplies each input channel."""
    w = np.abs(product.inputs[1].value)
    groups = product.attrs.get("groups", 1)
    w = w.reshape(groups, w.shape[0] // groups, -1, w.shape[-1])
    return w.max((1, 2)).reshape(channels)


def _noise(product: Node, channels: Channels, factors: np.ndarray, levels: tuple[int, int]) -> float:
    """Noise power in the sums of `product` from rounding the activations and the weights."""
    w = product.inputs[1].value.astype(np.float64)
    groups = product.attrs.get("groups", 1)
    scaled = (w / _input_factors(product, factors)).reshape(w.shape[0], -1, w.shape[-1])
    step = float((channels.magnitude * factors).max()) / levels[0]
    activations = step**2 * float(np.square(scaled).sum())
    per_channel = np.abs(scaled).max((1, 2)) / levels[1]  # [OC] step of the weights
    power = (channels.power * factors**2).reshape(groups, -1).sum(1) * scaled.shape[1]  # [G] sum of x^2 in a window
    weights = float((per_channel.reshape(groups, -1) ** 2 * power[:, None]).sum())
    return (activations + weights) / 12


def _best(
    readers: Sequence[Node], channels: Channels, strengths: Sequence[float], levels: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """(factors [C] with the least noise, that noise as a share of the noise without them)."""
    count = len(channels.magnitude)
    top = float(channels.magnitude.max())
    a = np.maximum(channels.magnitude.astype(np.float64), top * FLOOR)
    b = np.max([_column_magnitude(r, count) for r in readers], 0).astype(np.float64)
    b = np.maximum(b, b.max() * FLOOR)
    ones = np.ones(count)
    if not b.any():
        return ones, 1.0
    # Relative to each reader's own noise: layers differ in the size of their results.
    plain = [_noise(r, channels, ones, levels) for r in readers]
    best, chosen = float(len(readers)), ones
    for strength in strengths:
        factors = b ** (1 - strength) / a**strength
        factors *= top / float((channels.magnitude * factors).max())
        share = sum(_noise(r, channels, factors, levels) / max(n, 1e-300) for r, n in zip(readers, plain, strict=True))
        if share < best:
            best, chosen = share, factors
    return chosen, best / len(readers)


def _filling(largest: float) -> float:
    """The factor, 1 to 2, with which a range up to `largest` fills 16 bits whose scale is a power of two."""
    mantissa = math.frexp(largest * MARGIN / 32767)[0]  # 0.5 to 1
    return max(1.0, (1 - 2.0**-10) / mantissa)


def equalised(
    graph: Graph,
    storage: Storage,
    channels: Mapping[Node, Channels],
    *,
    norms: Sequence[float] = STRENGTHS,
    convolutions: bool = True,
    multiply: bool = True,
    bytes_: int = 1,
    worth: float | None = None,
) -> Equalised:
    """`graph` with the channels of its stored values balanced; the same function of its inputs.

    `channels`: of the sources that were observed. `norms`: migration strengths to try behind
    normalisations (none: leave them). `multiply`: factors may cost a multiplication. `bytes_` of an
    element. `worth`: the share of the noise power that may be left, WORTH[bytes_] if not given.
    """
    levels = (255, 127) if bytes_ == 1 else (32767, 16383)
    most = WORTH[bytes_] if worth is None else worth
    factors: dict[Node, np.ndarray] = {}  # of values
    explicit: set[Node] = set()
    even: set[Node] = set()
    rows: dict[Node, np.ndarray] = {}  # producer -> factors of its output channels
    columns: dict[Node, np.ndarray] = {}  # product -> factors of its input channels
    for value in storage.sources:
        known = channels.get(value)
        readers = _readers(storage, value)
        if known is None or readers is None or value.op == "input" or not known.magnitude.max() > 1e-20:
            continue
        if any(r in columns for r in readers):
            continue
        producer = _producer(graph, value)
        if producer is not None and producer.op in NORMS:
            strengths: Sequence[float] = norms
        else:
            strengths = STRENGTHS if convolutions else ()
        if not strengths:
            continue
        # A multiplication joins elementwise work; behind any other kernel it would be a pass, and one more
        # value to store.
        if producer is None and not (multiply and is_elementwise(value)):
            continue
        chosen, share = _best(readers, known, strengths, levels)
        balanced = share < (most if producer is not None else most * MULTIPLIED)
        if not balanced:
            chosen = np.ones(len(known.magnitude))
        if bytes_ == 2 and (producer is not None or balanced):
            largest = float((known.magnitude * chosen).max())
            fill = _filling(largest * (HEADROOM[bytes_] if balanced else 1.0))
            chosen = chosen * (fill if fill > FILLS else 1.0)
        if (chosen == 1).all():
            continue
        factors[value] = chosen
        if balanced:
            even.add(value)
        if producer is None:
            explicit.add(value)
        else:
            rows[producer] = chosen
        for r in readers:
            columns[r] = chosen
    if not factors:
        return Equalised(graph, {n: n for n in graph.nodes})
    new: dict[Node, Node] = {}
    for node in graph.nodes:
        inputs = [new[i] for i in node.inputs]
        if node in rows or node in columns:
            inputs[1:] = _scaled(node, rows.get(node), columns.get(node))
            new[node] = ops.make(node.op, *inputs, origin=node.origin, label=node.name, **node.attrs)
        else:
            new[node] = rebuilt(node, tuple(inputs))
        if node in explicit:
            by = constant(factors[node].astype(np.float32), origin=node.origin)
            new[node] = ops.make("mul", new[node], by, origin=node.origin)
    return Equalised(graph.with_nodes(new), new, factors, even)


def _producer(graph: Graph, value: Node) -> Node | None:
    """The contraction or normalisation whose constants can take the factors of `value`; None if none can."""
    node = value
    while node.op in HOMOGENEOUS:
        if node is not value and (len(graph.users[node]) != 1 or graph.is_output(node)):
            return None
        if node.op == "prelu" and (node.inputs[1].type.size != 1 and node.inputs[1].shape[-1] != node.shape[-1]):
            return None
        node = node.inputs[0]
    if node is not value and (len(graph.users[node]) != 1 or graph.is_output(node)):
        return None
    if node.op in PRODUCTS | NORMS and all(i.is_const for i in node.inputs[1:]):
        return node if node.op in PRODUCTS or node.inputs[1].type.rank == 1 else None
    return None


def _scaled(node: Node, rows: np.ndarray | None, columns: np.ndarray | None) -> list[Node]:
    """The constants of `node` with output channels multiplied by `rows` and input channels divided by `columns`."""
    arrays = [i.value.astype(np.float64) for i in node.inputs[1:]]
    if columns is not None:
        arrays[0] = arrays[0] / _input_factors(node, columns)
    if rows is not None:
        arrays[0] = arrays[0] * rows.reshape(-1, *(1,) * (arrays[0].ndim - 1))
        arrays[1:] = [a * rows for a in arrays[1:]]
    return [constant(a.astype(np.float32), name=i.name, origin=i.origin) for a, i in zip(arrays, node.inputs[1:])]


@pass_("equalise", exact=True)
def equalise(graph: Graph, options: object) -> Graph:
    """Weights of neighbouring layers with balanced channels, found from the weights alone."""
    storage = Storage(graph)
    channels = {}
    for value in storage.sources:
        producer = _producer(graph, value)
        if producer is None or producer.op in NORMS:
            continue
        w = np.abs(producer.inputs[1].value.astype(np.float64)).reshape(producer.inputs[1].shape[0], -1)
        magnitude = w.max(1, initial=0)
        channels[value] = Channels(magnitude, np.square(magnitude) / 9)
    return equalised(graph, storage, channels, norms=(), multiply=False, worth=0.98).graph

