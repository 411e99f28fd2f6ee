"""A fixed batch whose first layers run sample by sample.

The values of several samples together leave the caches where those of one do not; layers with more weights than that
rather see all samples at once. So the nodes at the front of a graph that treat every sample alike are built again for
one sample, up to the place where that costs the least traffic, and run in a loop; behind it the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node, rebuilt, topological
from skive.lower.loops import OrderedGraph
from skive.targets.base import Target
from skive.types import DType

# A value up to here stays in the caches until it is read. On a Zen 4 (1 MiB of L2 for each core) layers of MobileNetV2
# with such operands and results cost a batch of 8 what they cost eight samples, above 1.2 to 4 times as much.
CACHED_BYTES = 2 << 20
# What one more call costs, as bytes that come from memory in that time: estimates for about 0.2 us, and 2 us with a
# pool of threads.
CALL_BYTES, POOLED_CALL_BYTES = 4 << 10, 40 << 10

_ALONG_AN_AXIS = frozenset(
    ("softmax", "log_softmax", "integer_softmax", "integer_layer_norm", "l2_norm", "layer_norm", "rms_norm", "concat")
)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_mean", "reduce_prod", "reduce_max", "reduce_min"))


@dataclass(frozen=True)
class Turns:
    """The nodes of a graph that run once for each of `samples`: all of its first ones, none if that is 1."""

    graph: Graph
    nodes: tuple[Node, ...] = ()
    samples: int = 1


def one_by_one(graph: Graph, target: Target, threads: int = 1) -> Turns:
    """The graph with its first nodes for one sample, where that saves traffic; values that later ones read go through
    `batch`."""
    samples = next((n.shape[0] for n in graph.inputs if n.type.rank), 1)
    if samples < 2 or graph.batch_max or graph.states or any(n.op == "choose" for n in graph.nodes):
        return Turns(graph)
    single: dict[Node, Node] = {}  # of a sample, by those of the batch
    for n in graph.nodes:
        if n.op == "input" and n.shape[:1] == (samples,):
            single[n] = ops.make("sample", n, origin=n.label())
        elif not n.is_const and n.op != "input" and (one := _of_a_sample(n, single, samples)):
            single[n] = one
    order = [n for n in graph.nodes if n in single and n.op != "input"]
    front = _cheapest(graph, order, samples, target, threads)
    return _joined(graph, front, single, samples) if front else Turns(graph)


def _of_a_sample(n: Node, single: Mapping[Node, Node], samples: int) -> Node | None:
    """`n` for one sample; None if it is not the same function of every sample or a part of it."""
    if n.shape[:1] != (samples,) or not n.type.size or all(i.is_const for i in n.inputs):
        return None
    operands = []
    for i in n.inputs:
        if not i.is_const and i not in single:
            return None
        operands.append(single.get(i, i))
    if not _treats_alike(n):
        return None
    attrs = dict(n.attrs)
    if n.op in ("reshape", "slice"):
        name = "shape" if n.op == "reshape" else "size"
        attrs[name] = (1, *attrs[name][1:])
    try:
        one = ops.make(n.op, *operands, label=n.name, origin=n.origin, **attrs)
    except ShapeError:  # a constant has a value for each sample
        return None
    return one if one.type == replace(n.type, shape=(1, *n.shape[1:])) else None


def _treats_alike(n: Node) -> bool:
    """Whether the first axis of the result is that of the operands, and nothing passes between its places."""
    row, x, rank = ops.op_of(n.op), n.inputs[0], n.type.rank
    if row.kind == "elementwise" or n.op == "concat":
        first = 0
    else:
        first = len(n.inputs) if row.epilogue is None else row.epilogue
    if not all(i.is_const for i in n.inputs[1:first]):
        return False
    if not all(i.is_const or i.type.rank == rank for i in n.inputs[first:]):  # spread over other axes than its own
        return False
    if n.op == "reshape":
        return x.shape[:1] == n.shape[:1]
    if n.op == "transpose":
        return bool(n.attrs["perm"][0] == 0)
    if n.op == "slice":
        return n.attrs["start"][0] == 0 and n.attrs["step"][0] == 1
    if n.op == "pad":
        return n.attrs["before"][0] == n.attrs["after"][0] == 0
    if n.op in _REDUCTIONS:
        return all(a % x.type.rank for a in n.attrs["axes"])
    if n.op in _ALONG_AN_AXIS:
        return bool(n.attrs["axis"] % rank)
    return n.op in ("linear", "lookup", "group_norm") or row.kind in ("elementwise", "window")


def _cheapest(graph: Graph, order: list[Node], samples: int, target: Target, threads: int) -> list[Node]:
    """The nodes of `order` up to where the traffic is least if they run for one sample after the other."""
    unread = {n: len(graph.users[n]) + graph.is_output(n) for n in order}  # times that what lies behind reads a value
    best, most, saved = 0, 0, 0
    for i, n in enumerate(order, 1):
        if n.op == "reshape":  # no call: its operand's memory, which its readers count
            continue
        weights = sum(x.type.bytes for x in n.inputs if x.is_const)
        if n.op == "conv2d" and n.dtype is DType.f32 and n.inputs[1].is_const and target.winograd_pays(n):
            weights *= 4
        saved -= (samples - 1) * (weights + (CALL_BYTES if threads == 1 else POOLED_CALL_BYTES))
        for x in n.inputs:
            if x in unread:
                unread[x] -= 1
                saved += _nearer(x, samples) * (1 if unread[x] else 2)  # the last reader spares that it is written, too
        if saved > most:
            best, most = i, saved
    return order[:best]


def _nearer(value: Node, samples: int) -> int:
    """Bytes of a batch of `value` that its samples, one by one, spare from beyond the caches."""
    size = value.type.bytes
    return size if size // samples <= CACHED_BYTES < size else 0


def _joined(graph: Graph, front: list[Node], single: Mapping[Node, Node], samples: int) -> Turns:
    """The graph of `front` for one sample and the rest for all."""
    inside, new = set(front), dict[Node, Node]()
    for n in graph.nodes:
        if n not in inside or n.op in ("reshape", "slice"):  # these are made where they are read
            new[n] = rebuilt(n, tuple(new[i] for i in n.inputs))
        else:
            new[n] = ops.make("batch", single[n], samples=samples, label=n.name, origin=n.origin)
    joined = graph.with_nodes(new)
    turns = topological(n.inputs[0] for n in joined.nodes if n.op == "batch")
    first = set(turns)
    order = (*turns, *(n for n in joined.nodes if n not in first))
    ordered = OrderedGraph(joined.name, joined.inputs, joined.outputs, joined.output_names, order=order)
    return Turns(ordered, turns, samples)
