"""`fit-functions`: a smooth function in front of a quantizer is a table of polynomials.

    dequantize, silu, quantize   ->   dequantize, piecewise, requantize

A quantizer's steps are coarse beside float32: polynomials of degree 2 to 4 on 16 or 32 intervals, chosen by a
permutation of registers, come to a sixteenth of a step, an eighth of what rounding itself may do. That takes 0.4
of the time of exp and two divisions (`benchmarks/kernels/bench_quantize.py`). `piecewise` is exact: where the
last bit of exp decided, all processors now agree. A function that is not that smooth stays, and one that is no
line towards both ends, as far as the quantizer can tell.

The polynomials interpolate at Chebyshev nodes; the bound is checked on their float32 values.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from skive import ops
from skive.ir import FrozenDict, Graph, Node, constant, rebuilt
from skive.passes.fuse_elementwise import is_elementwise
from skive.passes.tabulate import EASY
from skive.pipeline import pass_
from skive.types import DType

TOLERANCE = 1 / 16  # of a quantizer's step
FORMS = ((2, 16), (2, 32), (3, 16), (3, 32), (4, 32))  # (degree, intervals), the cheapest first
NEAREST, FARTHEST = 1e-3, 1e6  # arguments that are looked at, in geometric steps
LARGEST = 1e30  # results beyond it, infinite ones too, count as this
RATIO = 2**0.5  # of steps that are looked at together
POINTS = 32  # checked in each interval


@dataclass(frozen=True)
class Function:
    """Elementwise operations from one float32 value to another. `nodes` in execution order, the last is the
    result; `sources` are the same value, read several times."""

    sources: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        values: dict[Node, np.ndarray] = dict.fromkeys(self.sources, np.asarray(x, np.float32))
        with np.errstate(all="ignore"):
            for n in self.nodes:
                values[n] = ops.evaluate(n, [values[i] if i in values else i.value.reshape(()) for i in n.inputs])
        return np.clip(values[self.nodes[-1]].astype(np.float64), -LARGEST, LARGEST)


def _function(graph: Graph, root: Node, index: dict[Node, int]) -> Function | None:
    """The longest chain from one float32 value to `root` whose other values nothing else reads."""
    members = {root}
    leaves: list[Node] = []
    heap = [-index[i] for i in set(root.inputs)]
    heapq.heapify(heap)
    seen = set(heap)
    while heap:
        node = graph.nodes[-heapq.heappop(heap)]  # the latest: all its users are decided
        if node.is_const and node.type.size == 1:
            continue
        private = not graph.is_output(node) and all(u in members for u in graph.users[node])
        floats = node.dtype is DType.f32 and all(i.dtype is DType.f32 for i in node.inputs)
        varied = any(i.is_const and i.type.size != 1 for i in node.inputs)
        if not (is_elementwise(node) and node.shape == root.shape and private and floats) or varied:
            leaves.append(node)
            continue
        members.add(node)
        for i in {-index[i] for i in node.inputs} - seen:
            seen.add(i)
            heapq.heappush(heap, i)
    if not leaves or any(not _same(leaves[0], leaf) for leaf in leaves) or leaves[0].shape != root.shape:
        return None
    return Function(tuple(leaves), tuple(sorted(members, key=index.__getitem__)))


def _same(a: Node, b: Node) -> bool:
    """True for one value: of a `dequantize` every reader has its own."""
    return a is b or (a.op == b.op == "dequantize" and a.inputs == b.inputs)


def _is_sum(source: Node) -> bool:
    """True for integers times a constant factor: finite, and a division can join the factor."""
    if source.op == "mul":
        return bool(source.inputs[0].attrs.get("chain")) and source.inputs[1].is_const
    return source.op == "dequantize" and source.inputs[1].is_const


@dataclass(frozen=True)
class Fit:
    """A function of x as `piecewise` of x / width: [degree + 1, intervals] coefficients."""

    width: float
    lowest: int
    table: np.ndarray  # float64

    def attrs(self, unit: float) -> dict[str, Any]:
        """Those of a `piecewise` whose results are multiples of `unit`."""
        text = " ".join(str(v) for v in (self.table / unit).astype(np.float32).reshape(-1))
        return {"lowest": self.lowest, "degree": len(self.table) - 1, "table": text}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        argument = (x * (1 / np.float32(self.width))).astype(np.float32)
        return ops.OPS["piecewise"].reference([argument], FrozenDict(self.attrs(1.0))).astype(np.float64)


@dataclass(frozen=True)
class Quantizers:
    """What rounds the function: `steps` of the channels, the largest at most RATIO times the smallest of a group;
    every group holds lowest..highest of its steps."""

    steps: np.ndarray  # [groups, 2]: the smallest and the largest step of each
    lowest: int
    highest: int

    def bounded(self, y: np.ndarray) -> np.ndarray:
        """What all channels can tell apart of y."""
        largest = self.steps.max()
        return np.clip(y, (self.lowest - 1) * largest, (self.highest + 1) * largest)

    def allowed(self, y: np.ndarray) -> np.ndarray:
        """The error that no channel notices: a part of its step, and what lies beyond its range."""
        result = np.full(y.shape, np.inf)
        for small, large in self.steps:
            beyond = np.maximum(y - (self.highest + 1) * large, (self.lowest - 1) * large - y)
            np.minimum(result, TOLERANCE * small + np.maximum(beyond, 0), out=result)
        return result


def _grouped(steps: np.ndarray) -> np.ndarray:
    """[groups, 2] smallest and largest of the steps that lie within one factor of RATIO."""
    powers = np.floor(np.log(steps) / np.log(RATIO))
    return np.array([(g.min(), g.max()) for g in (steps[powers == p] for p in np.unique(powers))])


@dataclass(frozen=True)
class Line:
    """What a function is from `begin` on, away from 0."""

    begin: float
    value: float  # there
    slope: float

    def __call__(self, x: Any) -> Any:
        return self.value + self.slope * (x - self.begin)


def _end(x: np.ndarray, y: np.ndarray, quantizers: Quantizers) -> Line | None:
    """The longest line that ends y(x), x away from 0: to half of what is allowed; None if even the last points
    lie on none."""
    want, allowed = quantizers.bounded(y), quantizers.allowed(quantizers.bounded(y)) / 2
    inside = np.flatnonzero(want == y)

    def line(i: int) -> Line | None:
        j = max(i + 1, int(inside[-1]) if len(inside) else 0)
        found = Line(float(x[i]), float(y[i]), float((y[j] - y[i]) / (x[j] - x[i])))
        fits = np.abs(quantizers.bounded(found(x[i:])) - want[i:]) <= allowed[i:]
        return found if fits.all() else None

    low, high = 0, len(x) - 3
    if line(high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if line(middle) else (middle + 1, high)
    return line(high)


def fit(function: Function, quantizers: Quantizers) -> Fit | None:
    """The cheapest form that every quantizer rounds as it would the function, to TOLERANCE of its step; None if
    none is. The outer polynomials are lines, which hold beyond the intervals."""
    far = np.geomspace(NEAREST, FARTHEST, 2048)
    x = np.concatenate([-far[::-1], far])
    values = function(x)
    if np.isnan(values).any():
        return None
    left, right = _end(-far, values[2047::-1], quantizers), _end(far, values[2048:], quantizers)
    if left is None or right is None:
        return None
    for degree, intervals in FORMS:
        width = float(np.float32((right.begin - left.begin) / (intervals - 3)))
        lowest = int(np.floor(left.begin / width - 0.5))
        n = np.arange(lowest, lowest + intervals)
        nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) / 2
        values = function((n[:, None] + nodes) * width)
        table = np.zeros((degree + 1, intervals))
        table[:, n % intervals] = np.linalg.solve(np.vander(nodes, increasing=True), values.T)
        for line, k in ((left, n[0]), (right, n[-1])):
            table[:, k % intervals] = 0
            table[:2, k % intervals] = line(k * width), line.slope * width
        found = Fit(width, lowest, table)
        dense = np.concatenate([x, ((n[:, None] + (np.arange(POINTS) + 0.5) / POINTS - 0.5) * width).reshape(-1)])
        want, got = quantizers.bounded(function(dense)), quantizers.bounded(found(dense))
        if (np.abs(got - want) <= quantizers.allowed(want)).all():
            return found
    return None


def _fitted(graph: Graph, root: Node, index: dict[Node, int]) -> tuple[Function, Fit, np.ndarray, np.ndarray] | None:
    """(function, its form, the steps of the quantizer, what it adds to the function) if the operand of the quantizer
    `root` has a form."""
    value, scale, zero = root.inputs
    if not (scale.is_const and zero.is_const and scale.type.size):
        return None
    steps = scale.value.astype(np.float64)
    steps = steps if root.op == "quantize" else 1 / steps
    user, added = root, np.zeros(())
    if value.op == "add" and value.inputs[1].is_const and graph.users[value] == [user]:
        user, value, added = value, value.inputs[0], value.inputs[1].value.astype(np.float64)
    while value.op == "mul" and value.inputs[1].is_const and graph.users[value] == [user]:
        steps = steps / value.inputs[1].value.astype(np.float64)  # a factor of the channel: smaller steps
        added = added / value.inputs[1].value.astype(np.float64)
        user, value = value, value.inputs[0]
    if value.dtype is not DType.f32 or not is_elementwise(value) or value.shape != root.shape:
        return None
    if graph.users[value] != [user] or graph.is_output(value) or not (np.isfinite(steps) & (steps > 0)).all():
        return None
    function = _function(graph, value, index)
    if function is None or not _is_sum(function.sources[0]):
        return None
    if all(ops.op_of(n.op).tolerance <= EASY for n in function.nodes):
        return None
    limits, zeros = np.iinfo(root.dtype.numpy), zero.value.astype(np.int64)
    quantizers = Quantizers(_grouped(steps.reshape(-1)), limits.min - int(zeros.max()), limits.max - int(zeros.min()))
    found = fit(function, quantizers)
    return None if found is None else (function, found, steps, added)


def _argument(source: Node, width: float) -> Node:
    """source / width for a sum times a factor, which the division joins."""

    def divided(factor: Node) -> Node:
        return constant((factor.value / np.float32(width)).astype(np.float32), origin=factor.origin)

    return ops.make(source.op, source.inputs[0], divided(source.inputs[1]), *source.inputs[2:], origin=source.origin)


@pass_("fit-functions", exact=False)
def fit_functions(graph: Graph, options: object) -> Graph:
    """Functions in front of quantizers as polynomials, to 1/16 of the quantizer's step."""
    index = {n: i for i, n in enumerate(graph.nodes)}
    fits = {}
    for node in graph.nodes:
        if node.op in ("quantize", "requantize") and (fitted := _fitted(graph, node, index)) is not None:
            fits[node] = fitted
    if not fits:
        return graph
    new: dict[Node, Node] = {}
    for n in graph.nodes:
        new[n] = rebuilt(n, tuple(new[i] for i in n.inputs))
        if n not in fits:
            continue
        function, found, steps, added = fits[n]
        origin = function.nodes[-1].origin
        argument = _argument(new[function.sources[0]], found.width)
        unit = float(steps.min())
        values = ops.make("piecewise", argument, origin=origin, **found.attrs(unit))
        if added.any():
            values = ops.make("add", values, constant(np.asarray(added / unit, np.float32)), origin=origin)
        factor = np.asarray(unit / steps, np.float32)
        new[n] = ops.make("requantize", values, constant(factor), new[n.inputs[2]], to=n.dtype, origin=n.origin,
                          label=n.name)
    return graph.with_nodes(new)
