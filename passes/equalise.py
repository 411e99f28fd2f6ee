"""`equalise`: the channels of a stored value get ranges that suit what reads it.

One scale for a whole tensor wastes bits on channels with small values. Multiplying channel c of a
value by f[c] and dividing the weights that read it by f[c] changes nothing in exact arithmetic. Where
the value comes from a convolution through an activation with act(f x) = f act(x), or from a
normalisation with constant scale and bias, f joins their constants; elsewhere it is one more
multiplication in the expression that makes the value, taken if it pays. A depthwise convolution
divides its own channel's scale only, so before one all channels can fill the range. Values that a
concatenation joins share a scale and are balanced together, at all the sizes they are read at. With 16 bits,
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
NORMS = frozenset({"group_norm", "layer_norm", "rms_norm"})
STRENGTHS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)  # how much of the unevenness leaves the activations
# Channels smaller than this against the largest are treated as if they had this size; joined ones are channels of
# several layers, of which the small ones are the seldom ones: on other data they are larger.
FLOOR, JOINED_FLOOR = 2.0**-8, 0.25
# Where every channel fills the range, every channel can leave it on other data: balanced values need
# room above the largest one seen, and so must gain more than the room costs. By bytes of an element:
HEADROOM = {1: 1.2, 2: 2.0}
WORTH = {1: 0.6, 2: 0.2}  # the noise power that must be left at most, as a share
MULTIPLIED = 0.7  # times that, for factors which need a multiplication of their own
ROUNDS = 20  # over the weights alone, at most
# An average or maximum of this many places is so much smaller that multiplying it costs nothing. One that is stored
# stays as it is: its multiple would be another value to store, never observed.
SUMMARY = 8
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


@dataclass
class Shared:
    """Values side by side that one scale covers: one alone, or those that a concatenation joins.

    `start`: where the channels of each value begin among those of all. `readers`: for each contraction that reads
    them [IC] which of these channels each of its own is, -1 for one that stays as it is; `resized`: the same of other
    sizes of them; `summaries`: of averages and maxima that are not rounded. `joined`: the concatenations. `beside`: the
    largest magnitude known of what they join and stays.
    """

    start: dict[Node, int] = field(default_factory=dict)
    readers: dict[Node, np.ndarray] = field(default_factory=dict)
    resized: dict[Node, np.ndarray] = field(default_factory=dict)
    summaries: dict[Node, np.ndarray] = field(default_factory=dict)
    joined: set[Node] = field(default_factory=set)
    beside: float = 0.0

    def slice(self, value: Node) -> slice:
        """The channels of `value` among those of all."""
        return slice(self.start[value], self.start[value] + value.shape[-1])


@dataclass
class _Read:
    """What reads the channels of a value: contractions, and on the way there other sizes of it, averages and maxima
    that are not rounded, all with the first of their channels that is one of the value's, and concatenations."""

    products: list[tuple[Node, int]] = field(default_factory=list)
    resized: list[tuple[Node, int]] = field(default_factory=list)
    summaries: list[tuple[Node, int]] = field(default_factory=list)
    joined: list[Node] = field(default_factory=list)


def _read(storage: Storage, value: Node) -> _Read | None:
    """What reads `value`: contractions, directly or through window maxima, resizing and concatenations of channels,
    and whatever takes its averages and maxima over many places unrounded; None if anything else does."""
    found = _Read()
    graph, todo = storage.graph, [(value, 0)]
    while todo:
        node, first = todo.pop()
        if graph.is_output(node):
            return None
        for user in dict.fromkeys(graph.users[node]):
            last = user.type.rank - 1
            if user.op == "concat" and user in storage.stored and user.attrs["axis"] % user.type.rank == last:
                found.joined.append(user)
                widths = np.cumsum([0, *(i.shape[-1] for i in user.inputs)])
                todo += [(user, first + int(widths[k])) for k, i in enumerate(user.inputs) if i is node]
            elif user not in storage.stored and _is_summary(user):
                found.summaries.append((user, first))
            elif user.op in ("max_pool2d", "resize2d") and user in storage.stored:
                found.resized += [(user, first)] if user.op == "resize2d" else []
                todo.append((user, first))
            elif user.op in PRODUCTS and storage.is_product(user) and user.inputs[0] is node:
                if user.op == "conv_transpose2d" and user.attrs["groups"] != 1:
                    return None
                found.products.append((user, first))
            else:
                return None
    return found if found.products else None


def _is_summary(node: Node) -> bool:
    """True for averages and maxima over many places of the channels of an image."""
    if node.op not in ("max_pool2d", "avg_pool2d", "reduce_mean") or node.inputs[0].type.rank != 4:
        return False
    if node.op == "reduce_mean" and any(a % 4 in (0, 3) for a in node.attrs["axes"]):
        return False
    return node.inputs[0].type.size >= SUMMARY * node.type.size


def _shared(storage: Storage, read: Mapping[Node, _Read], channels: Mapping[Node, Channels]) -> list[Shared]:
    """The values of `read` in groups that share a scale, in order."""
    group: dict[Node, Shared] = {}  # of values and of concatenations
    for value, how in read.items():
        mine = Shared({value: 0})
        for other in {id(group[j]): group[j] for j in how.joined if j in group}.values():
            width = sum(v.shape[-1] for v in mine.start)
            mine.start |= {v: width + at for v, at in other.start.items()}
        for member in (*mine.start, *(j for v in mine.start for j in read[v].joined)):
            group[member] = mine
    found = list({id(group[v]): group[v] for v in read}.values())
    for shared in found:
        for value, start in shared.start.items():
            shared.joined |= {*read[value].joined}
            for places, reached in ((shared.readers, read[value].products), (shared.resized, read[value].resized),
                                    (shared.summaries, read[value].summaries)):
                for node, first in reached:
                    place = places.setdefault(node, np.full(node.inputs[0].shape[-1], -1))
                    place[first : first + value.shape[-1]] = start + np.arange(value.shape[-1])
        inside = {*shared.start, *shared.resized}
        for join in shared.joined:
            others = [storage.source_of(i) for i in join.inputs if i in storage.stored]
            shared.beside = max([shared.beside, *(float(channels[o].magnitude.max()) for o in others
                                                  if o not in inside and o in channels)])
    return found


def _input_factors(product: Node, factors: np.ndarray) -> np.ndarray:
    """`factors` of the input channels, shaped so that they broadcast over the weights."""
    w = product.inputs[1]
    groups = product.attrs.get("groups", 1)
    per_group = factors.reshape(groups, -1)  # [G, IC/G]
    rows = np.repeat(per_group, w.shape[0] // groups, 0)  # [OC, IC/G]
    return rows.reshape(w.shape[0], *(1,) * (w.type.rank - 2), rows.shape[1])


def _at(place: np.ndarray, values: np.ndarray, else_: float) -> np.ndarray:
    """[IC] the `values` of the channels that a reader's own are."""
    return np.where(place < 0, else_, values[place])


def _column_magnitude(product: Node, place: np.ndarray, count: int) -> np.ndarray:
    """[C] the largest |weight| that multiplies each of the `count` channels."""
    w = np.abs(product.inputs[1].value)
    groups = product.attrs.get("groups", 1)
    own = w.reshape(groups, w.shape[0] // groups, -1, w.shape[-1]).max((1, 2)).reshape(-1)
    found = np.zeros(count)
    np.maximum.at(found, place[place >= 0], own[place >= 0])
    return found


def _noise(product: Node, place: np.ndarray, power: np.ndarray, factors: np.ndarray, largest: float,
           levels: tuple[int, int]) -> float:
    """Noise power in the sums of `product` from rounding its input, up to `largest`, and its weights."""
    w = product.inputs[1].value.astype(np.float64)
    groups = product.attrs.get("groups", 1)
    own = _at(place, factors, 1.0)
    scaled = (w / _input_factors(product, own)).reshape(w.shape[0], -1, w.shape[-1])
    activations = (largest / levels[0]) ** 2 * float(np.square(scaled).sum())
    per_channel = np.abs(scaled).max((1, 2)) / levels[1]  # [OC] step of the weights
    window = (_at(place, power, 0.0) * own**2).reshape(groups, -1).sum(1) * scaled.shape[1]  # [G] sum of x^2
    weights = float((per_channel.reshape(groups, -1) ** 2 * window[:, None]).sum())
    return (activations + weights) / 12


def _best(
    shared: Shared, magnitude: np.ndarray, power: np.ndarray, strengths: Sequence[float], levels: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """(factors [C] with the least noise, that noise as a share of the noise without them)."""
    count = len(magnitude)
    top = max(float(magnitude.max()), shared.beside)
    a = np.maximum(magnitude.astype(np.float64), top * (JOINED_FLOOR if shared.joined else FLOOR))
    b = np.max([_column_magnitude(r, place, count) for r, place in shared.readers.items()], 0).astype(np.float64)
    b = np.maximum(b, b.max() * FLOOR)
    ones = np.ones(count)
    if not b.any():
        return ones, 1.0

    def noises(factors: np.ndarray) -> np.ndarray:
        largest = max(float((magnitude * factors).max()), shared.beside)
        return np.asarray([_noise(r, place, power, factors, largest, levels) for r, place in shared.readers.items()])

    # Relative to each reader's own noise: layers differ in the size of their results. Weights of zero have none.
    plain = noises(ones)
    best, chosen, noisy = 1.0, ones, plain > 0
    for strength in strengths:
        factors = b ** (1 - strength) / a**strength
        factors *= top / float((magnitude * factors).max())
        share = float((noises(factors)[noisy] / plain[noisy]).mean())
        if share < best:
            best, chosen = share, factors
    return chosen, best


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
    undone: dict[Node, np.ndarray] = {}  # summary -> factors of its channels
    read: dict[Node, _Read] = {}
    for value in storage.sources:
        known = channels.get(value)
        if value.op in ("input", "resize2d") or known is None or not known.magnitude.max() > 1e-20:
            continue
        how, producer = _read(storage, value), _producer(graph, value)
        # Rectified channels are zero most of the time: what is seen of them says little of how large they get, and
        # where several layers fill one range they leave it, as SqueezeNet does on photos unlike its calibration.
        if how is None or (how.joined and producer is not None):
            continue
        # A multiplication joins elementwise work; behind any other kernel it would be a pass, and one more
        # value to store.
        if producer is None and not (multiply and is_elementwise(value)):
            continue
        if norms if producer is not None and producer.op in NORMS else convolutions:
            read[value] = how
    for shared in _shared(storage, read, channels):
        makers = {v: _producer(graph, v) for v in shared.start}
        if any(r in columns for r in shared.readers):
            continue
        magnitude = np.concatenate([channels[v].magnitude for v in shared.start])
        power = np.concatenate([channels[v].power for v in shared.start])
        norm = any(m is not None and m.op in NORMS for m in makers.values())
        chosen, share = _best(shared, magnitude, power, norms if norm else STRENGTHS, levels)
        balanced = share < (most * MULTIPLIED if None in makers.values() else most)
        if not balanced:
            chosen = np.ones(len(magnitude))
        if bytes_ == 2 and not shared.joined and (None not in makers.values() or balanced):
            largest = float((magnitude * chosen).max())
            fill = _filling(largest * (HEADROOM[bytes_] if balanced else 1.0))
            chosen = chosen * (fill if fill > FILLS else 1.0)
        if (chosen == 1).all():
            continue
        for value, maker in makers.items():
            factors[value] = chosen[shared.slice(value)]
            if maker is None:
                explicit.add(value)
            else:
                rows[maker] = factors[value]
        for value, place in shared.resized.items():
            factors[value] = _at(place, chosen, 1.0)
        if balanced:
            even |= {*makers, *shared.resized}
        for r, place in shared.readers.items():
            columns[r] = _at(place, chosen, 1.0)
        for n, place in shared.summaries.items():
            undone[n] = _at(place, chosen, 1.0)
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
        if node in undone:
            by = constant((1 / undone[node]).astype(np.float32), origin=node.origin)
            new[node] = ops.make("mul", new[node], by, origin=node.origin)
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
    # What balances one layer's inputs changes the weights that another's outputs are judged by.
    for _ in range(ROUNDS):
        before, graph = graph, _balanced_by_weights(graph)
        if graph is before:
            break
    return graph


def _balanced_by_weights(graph: Graph) -> Graph:
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
