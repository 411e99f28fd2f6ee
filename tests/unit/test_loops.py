"""Trips of a loop that are the same computation become one: run in numpy on the memory that the plan gives them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from skive import ops
from skive.emit import cxx, host
from skive.ir import Graph, Node, constant
from skive.lower import _lower_nodes, lower
from skive.lower.branches import guards_of
from skive.lower.calls import Lowering
from skive.lower.legalise import legalise
from skive.lower.loops import rolled
from skive.passes import optimize
from skive.passes.quantize import Quantizer, Scheme, Storage
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.tuning import Tuning
from skive.types import DType

WIDTH = 4


class Net:
    """Layers with fixed random weights, and x."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.weights = [constant((rng.standard_normal((WIDTH, WIDTH)) / 2).astype(np.float32)) for _ in range(3)]
        self.bias = constant((rng.standard_normal(WIDTH) / 4).astype(np.float32))
        self.x = ops.make("input", shape=(1, WIDTH), dtype=DType.f32, label="x")

    def dense(self, x: Node, layer: int = 0, label: str = "dense") -> Node:
        return ops.make("linear", x, self.weights[layer], self.bias, origin=label)

    def above(self, x: Node, value: float = 0.5) -> Node:
        mean = ops.make("reduce_mean", x, axes=(0, 1), keep=False)
        return ops.make("greater", mean, constant(np.asarray(value, np.float32)))


def number(value: float) -> Node:
    return constant(np.asarray(value, np.float32))


def broken(bound: int, body: Callable[[Net, Node], Node], *, counted: bool = False, last: bool = False) -> Graph:
    """for i in range(bound): if above(h): break; h = body(h). `counted`: i is a result; `last`: one more test."""
    net = Net()
    states = [net.x]
    flags = []
    for _ in range(bound):
        flags.append(net.above(states[-1]))
        states.append(body(net, states[-1]))
    result, count = states[-1], constant(np.int64(bound))
    if last:
        result = ops.make("choose", net.above(result), ops.make("exp", result), result)
    for i in reversed(range(bound)):
        result = ops.make("choose", flags[i], states[i], result)
        count = ops.make("choose", flags[i], constant(np.int64(i)), count)
    outputs = (net.dense(result, 2, "head"), *([count] if counted else []))
    return Graph("loop", (net.x,), outputs, ("y", "n")[:len(outputs)])


def alive(bound: int, body: Callable[[Net, Node], Node]) -> Graph:
    """As ONNX Loop is imported: while the loop is alive each state is chosen, else the one before stays."""
    net = Net()
    state, going = net.x, ops.make("not", net.above(net.x))
    steps = ops.make("reduce_mean", net.x, axes=(0, 1), keep=False)
    for _ in range(bound):
        new = body(net, state)
        flag = ops.make("not", net.above(new))
        state = ops.make("choose", going, new, state)
        steps = ops.make("choose", going, ops.make("add", steps, number(1)), steps)
        going = ops.make("choose", going, flag, constant(np.asarray(False)))
    return Graph("loop", (net.x,), (net.dense(state, 2, "head"), steps), ("y", "n"))


def two_ways_out(bound: int) -> Graph:
    """Two breaks in a trip, with two states: h, and the mean of all h so far."""
    net = Net()
    h, m = net.x, net.x
    links = []
    for _ in range(bound):
        first = net.above(h, 0.6)
        kept = h, m
        h = ops.make("add", h, ops.make("mul", net.dense(h), number(0.25)))
        second = net.above(ops.make("neg", h), 0.4)
        links += [(first, kept), (second, (h, m))]
        m = ops.make("mul", ops.make("add", m, h), number(0.5))
        h = ops.make("add", h, number(0.03125))
    results = (h, m)
    for flag, left in reversed(links):
        results = tuple(ops.make("choose", flag, a, b) for a, b in zip(left, results, strict=True))  # type: ignore
    return Graph("loop", (net.x,), results, ("h", "m"))


def in_sequence(bound: int) -> Graph:
    """Two loops, the second on what the first left; the longer one is found first."""
    net = Net()
    h = net.x
    for layer, limit, trips in ((0, 0.5, bound), (1, 0.75, bound + 4)):
        states, flags = [h], []
        for _ in range(trips):
            flags.append(net.above(states[-1], limit))
            states.append(step(net, states[-1], layer))
        h = states[-1]
        for flag, state in reversed(list(zip(flags, states, strict=False))):
            h = ops.make("choose", flag, state, h)
    return Graph("loop", (net.x,), (net.dense(h, 2, "head"),), ("y",))


def step(net: Net, h: Node, layer: int = 0) -> Node:
    """Grows slowly, whatever the weights."""
    return ops.make("add", ops.make("add", h, ops.make("mul", net.dense(h, layer), number(0.0625))), number(0.0625))


def twice(net: Net, h: Node) -> Node:
    return net.dense(ops.make("tanh", net.dense(h)), 1)


def with_input(net: Net, h: Node) -> Node:
    """Reads x in every trip, beside the state in one value."""
    both = ops.make("concat", h, net.dense(net.x, 1, "once"), axis=1)
    half = ops.make("slice", both, start=(0, 2), size=(1, WIDTH), step=(1, 1))
    return ops.make("add", ops.make("mul", net.dense(half), number(0.125)), ops.make("add", h, number(0.0625)))


def shifted(net: Net, h: Node) -> Node:
    """A state that is a part of the value that the trip before left, beside another: it lies in memory of its own."""
    both = ops.make("concat", h, ops.make("tanh", h), axis=1)
    return ops.make("add", ops.make("slice", both, start=(0, 2), size=(1, WIDTH), step=(1, 1)), number(0.0625))


def window(bound: int) -> Graph:
    """Two states side by side; the second becomes what lies across both."""
    net = Net()
    a, b = net.x, net.dense(net.x)
    links = []
    for _ in range(bound):
        links.append((net.above(a), (a, b)))
        both = ops.make("concat", a, b, axis=1)
        a = ops.make("add", a, number(0.0625))
        b = ops.make("slice", both, start=(0, 2), size=(1, WIDTH), step=(1, 1))
    results = (a, b)
    for flag, left in reversed(links):
        results = tuple(ops.make("choose", flag, x, y) for x, y in zip(left, results, strict=True))  # type: ignore
    return Graph("loop", (net.x,), results, ("a", "b"))


def branching(net: Net, h: Node) -> Node:
    """An if inside the body."""
    small = net.above(h, 0.25)
    new = ops.make("choose", small, net.dense(h, 1, "then"), ops.make("tanh", net.dense(h, 0, "else")))
    return ops.make("add", ops.make("mul", new, number(0.0625)), ops.make("add", h, number(0.0625)))


class Machine:
    """The plan of a graph, each node run by its reference on the memory that the plan gives it."""

    def __init__(self, graph: Graph):
        self.graph = graph = legalise(graph)
        self.rolled = rolled(graph, (graph.nodes,), guards_of(graph))
        self.ctx = Lowering(self.rolled.graph, TARGETS["generic"], 1, Tuning(), self.rolled.loops)
        _lower_nodes(self.ctx, self.rolled.stages[0], self.rolled)
        self.plan = self.ctx.finish()

    def run(self, x: np.ndarray) -> tuple[list[np.ndarray], int]:
        """(the outputs, how many nodes ran)."""
        self.x = x
        self.arena = np.full(self.plan.arena_bytes, 0xA5, np.uint8)
        self.outputs = [np.full(p.bytes, 0xA5, np.uint8) for p in self.plan.outputs]
        self.ran = 0
        starts = {loop.repeated[0]: loop for loop in self.rolled.loops}
        inside = {n for loop in self.rolled.loops for n in loop.repeated}
        for node in self.rolled.stages[0]:
            if node in starts:
                for _ in starts[node].names:
                    for n in starts[node].repeated:
                        self.execute(n)
            elif node not in inside:
                self.execute(node)
        return [self.value(o).copy() for o in self.rolled.graph.outputs], self.ran

    def value(self, node: Node) -> np.ndarray:
        """The array in the memory of a node."""
        if node.is_const:
            return node.value
        view = self.ctx.view(node)
        root = view.root
        memory = {"input": self.x.view(np.uint8).reshape(-1), "arena": self.arena,
                  "output": self.outputs[root.index if root.kind == "output" else 0]}[root.kind]
        start = (root.block.offset if root.block else root.offset) + view.offset
        strides = [s * node.dtype.bytes for s in self.ctx.strides(node)]
        return np.ndarray(node.shape, node.dtype.numpy, memory, start, strides)

    def execute(self, node: Node) -> None:
        """Computes a node, unless its conditions say otherwise."""
        if node.op in ("input", "const", "reshape") or self.ctx.is_view(node):
            return
        if all(bool(self.value(condition)) is holds for condition, holds in self.rolled.guards[node]):
            self.ran += 1
            self.value(node)[...] = ops.evaluate(node, [self.value(i).copy() for i in node.inputs])


MAKE: dict[str, Callable[[int], Graph]] = {
    "break": lambda n: broken(n, step),
    "two layers": lambda n: broken(n, twice),
    "counted": lambda n: broken(n, step, counted=True),
    "test behind": lambda n: broken(n, step, last=True),
    "input": lambda n: broken(n, with_input),
    "shifted": lambda n: broken(n, shifted),
    "window": window,
    "if inside": lambda n: broken(n, branching),
    "alive": lambda n: alive(n, step),
    "alive, input": lambda n: alive(n, with_input),
    "two ways out": two_ways_out,
    "in sequence": in_sequence,
}


@pytest.mark.parametrize("name", MAKE)
def test_one_trip_gives_what_all_give(name: str) -> None:
    graph = MAKE[name](12)
    machine = Machine(graph)
    assert len(machine.rolled.loops) == (2 if name == "in sequence" else 1)
    rng = np.random.default_rng(0)
    work = set()
    for i in range(30):
        x = (rng.standard_normal((1, WIDTH)) / 2 + rng.uniform(-0.8, 0.6)).astype(np.float32)
        if i == 0:
            x[:] = 4
        want = evaluate_graph(graph, [x])
        got, ran = machine.run(x)
        work.add(ran)
        for a, b in zip(got, want, strict=True):
            assert a.tobytes() == np.asarray(b).tobytes(), (i, a, b)
    assert len(work) >= 3 or name in ("two layers", "shifted")  # few and many trips


@pytest.mark.parametrize("name", MAKE)
def test_the_source_does_not_grow_with_the_bound(name: str) -> None:
    small, large = (lower(MAKE[name](n), TARGETS["generic"]) for n in (12, 64))
    lines = [sum(f.count("\n") for f in cxx.emit(p, TARGETS["generic"]).files.values()) for p in (small, large)]
    assert lines[0] == lines[1]
    assert small.arena_bytes == large.arena_bytes
    assert len(large.calls) > 4 * len(small.calls)  # reports name every trip
    assert len({c.origin for c in large.calls}) >= len({c.origin for c in small.calls})


@pytest.mark.parametrize("own", [False, True])
def test_integers(own: bool) -> None:
    """Trips of equal scales are one; those with scales of their own stay as they are. Both give the same bytes."""

    def body(net: Net, h: Node) -> Node:
        new = net.dense(ops.make("relu", net.dense(h)), 1)
        return ops.make("add", ops.make("add", h, ops.make("mul", new, number(0.0625))), number(0.0625))

    graph, _ = optimize(broken(10, body, counted=True), check="never")
    storage = Storage(graph)
    ranges = {n: (-2.0 - own * i / 4, 2.0) for i, n in enumerate(storage.sources)}
    graph, _ = optimize(Quantizer(graph, Scheme(ranges), storage).build(), check="never")
    machine = Machine(graph)
    assert bool(machine.rolled.loops) is not own
    assert own or any(n.dtype in ops.QUANTIZED for n in machine.rolled.loops[0].trip)
    rng = np.random.default_rng(2)
    counts = set()
    for _ in range(12):
        x = (rng.standard_normal((1, WIDTH)) / 2 + rng.uniform(-0.8, 0.6)).astype(np.float32)
        got, _ = machine.run(x)
        for a, b in zip(got, evaluate_graph(machine.graph, [x]), strict=True):
            assert a.tobytes() == np.asarray(b).tobytes()
        counts.add(int(got[1]))
    assert len(counts) >= 3


def test_what_lies_in_a_concatenation_is_not_written_again_while_that_is_read() -> None:
    net = Net()
    a, b = net.dense(net.x), net.dense(net.x, 1)
    both = ops.make("concat", a, b, axis=1)
    middle = ops.make("slice", both, start=(0, 2), size=(1, WIDTH), step=(1, 1))
    first = ops.make("add", net.dense(middle), ops.make("tanh", b))  # the last to read b
    graph = Graph("parts", (net.x,), (net.dense(ops.make("add", first, ops.make("exp", middle))), both), ("y", "z"))
    x = np.linspace(-1, 1, WIDTH, dtype=np.float32).reshape(1, WIDTH)
    for got, want in zip(Machine(graph).run(x)[0], evaluate_graph(graph, [x]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_short_loops_and_other_bodies_stay_as_they_are() -> None:
    graph = legalise(broken(4, step))
    assert not rolled(graph, (graph.nodes,), guards_of(graph)).loops
    layers = iter(range(100))
    graph = legalise(broken(12, lambda net, h: ops.make("add", net.dense(h), number(next(layers)))))
    assert not rolled(graph, (graph.nodes,), guards_of(graph)).loops


def test_runs() -> None:
    assert host.runs("abcabcabcx") == [("abc", 3), ("x", 1)]
    assert host.runs("xyaaaaz") == [("xy", 1), ("a", 4), ("z", 1)]
    assert host.runs("abab") == [("abab", 1)] and host.runs("") == []
    lines = host.guarded([("p && q", "f"), ("p && !r", "g")] * 3, "")
    assert lines[:2] == ["for (int trip = 0; trip < 3; ++trip) {", "  if (!p) break;"]
