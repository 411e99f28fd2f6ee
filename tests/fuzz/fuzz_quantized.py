"""Compiles random networks in fixed point and compares every stored integer with the numpy reference.

    python tests/fuzz/fuzz_quantized.py --seconds 600

Network n is drawn from seed n alone: convolutions of every kind, pools, sums, joined and sliced
channels, activations and now and then a float32 operation between integers; then 8 or 16 bits, scales
per channel or not, ranges from random data. Inputs go far beyond those ranges, so that integers
saturate. Several networks are compiled side by side as one artefact; a batch that fails is tried one
by one and the first diverging node is named.

Where nothing but integer arithmetic and exactly rounded float operations precede a value it must be
equal bit for bit; behind a function such as exp, roundings may go either way (check.rounds_alike).
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emit"))
from fixed_point import fixed_point  # noqa: E402

from skive import _native, ops  # noqa: E402
from skive.check import exactness, first_divergence, rounds_alike  # noqa: E402
from skive.execute import run_graph  # noqa: E402
from skive.ir import Graph, Node, constant  # noqa: E402
from skive.reference import evaluate_graph  # noqa: E402
from skive.targets.base import TARGETS  # noqa: E402
from skive.types import DType  # noqa: E402

SIDE_BY_SIDE = 8  # networks in one artefact
NARROW = (DType.u8, DType.i8, DType.i16)
# Float operations that IEEE 754 defines to the last bit.
EXACT = frozenset("quantize dequantize requantize requantize_fixed add sub mul neg abs relu clip min max cast".split())


# What the next operation is, by how often.
KINDS = ["conv"] * 6 + ["residual"] * 2 + ["concat", "slice", "pad", "max", "avg", "moved", "softmax"]


class Maker:
    """Grows one float network from a seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.values: list[Node] = []
        self.inputs: list[Node] = []

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def upto(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def weights(self, *shape: int) -> Node:
        """Normal values of about unit gain; now and then an outlier, a channel of zeros or one 30 times as large."""
        w = self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        if self.chance(0.2):
            w.flat[self.upto(0, w.size - 1)] *= 50
        if self.chance(0.2):
            w[self.upto(0, shape[0] - 1)] *= 0 if self.chance(0.5) else 30
        return constant(w.astype(np.float32))

    def bias(self, oc: int) -> list[Node]:
        values = self.rng.standard_normal(oc) * self.rng.choice([0.1, 1, 20])
        return [constant(values.astype(np.float32))] if self.chance(0.7) else []

    def window(self, x: Node) -> dict[str, tuple[int, ...]] | None:
        """Stride, pad, dilation and kernel of a window that fits `x`; None if none was found."""
        for _ in range(5):
            kernel = self.upto(1, 4), self.upto(1, 4)
            dilation = (self.upto(1, 2), self.upto(1, 2)) if self.chance(0.3) else (1, 1)
            pad = tuple(self.upto(0, k - 1) for k in (*kernel, *kernel))
            spans = [x.shape[a + 1] + pad[a] + pad[a + 2] - (kernel[a] - 1) * dilation[a] for a in (0, 1)]
            if min(spans) >= 1:
                stride = self.upto(1, 3), self.upto(1, 3)
                return {"kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation}
        return None

    def convolution(self, x: Node) -> Node | None:
        window, c = self.window(x), x.shape[3]
        if window is None:
            return None
        kernel = window.pop("kernel")
        divisors = [g for g in range(2, c) if c % g == 0]
        kind = self.rng.choice(["dense", "dense", "depthwise", "grouped", "transposed"])
        if kind == "depthwise" and c > 1:
            oc, groups = c * self.upto(1, 2), c
        elif kind == "grouped" and divisors:
            groups = int(self.rng.choice(divisors))
            oc = groups * self.upto(1, 6)
        else:
            oc, groups = self.upto(1, 40), 1
        w = self.weights(oc, *kernel, c // groups)
        if kind == "transposed" and max(x.shape[1:3]) <= 8:
            pad = tuple(min(p, k - 1) for p, k in zip(window["pad"], (*kernel, *kernel), strict=True))
            sizes = [(x.shape[a + 1] - 1) * window["stride"][a] + kernel[a] - pad[a] - pad[a + 2] for a in (0, 1)]
            if min(sizes) < 1:
                return None
            return ops.make("conv_transpose2d", x, w, *self.bias(oc), stride=window["stride"], pad=pad)
        return ops.make("conv2d", x, w, *self.bias(oc), groups=groups, **window)

    def activated(self, x: Node) -> Node:
        kind = self.rng.choice(["relu", "relu", "relu", "clip", "none", "none", "silu", "sigmoid"])
        if kind == "none":
            return x
        if kind == "clip":
            return ops.make("clip", x, lo=0.0, hi=float(self.rng.choice([1.0, 6.0])))
        return ops.make(kind, x)

    def step(self, x: Node) -> Node | None:
        """One more operation on `x`, [N, H, W, C]."""
        n, h, w, c = x.shape
        kind = self.rng.choice(KINDS)
        if kind == "conv":
            y = self.convolution(x)
            return None if y is None else self.activated(y)
        if kind == "residual":
            y = ops.make("conv2d", x, self.weights(c, 1, 1, c), *self.bias(c))
            others = [v for v in self.values if v.shape == x.shape]
            return self.activated(ops.make("add", y, others[self.upto(0, len(others) - 1)]))
        if kind == "concat":
            others = [v for v in self.values if v.shape[:3] == x.shape[:3] and v is not x]
            other = others[self.upto(0, len(others) - 1)] if others else ops.make(
                "conv2d", x, self.weights(self.upto(1, 20), 1, 1, c))
            return ops.make("concat", x, other, axis=3)
        if kind == "slice" and c > 2:
            start = self.upto(0, c - 2)
            return ops.make("slice", x, start=(0, 0, 0, start), size=(n, h, w, self.upto(1, c - start)), step=(1,) * 4)
        if kind == "pad":
            return ops.make("pad", x, before=(0, self.upto(0, 2), self.upto(0, 2), 0), after=(0, self.upto(0, 2), 0, 0),
                            mode="constant", value=0.0)
        if kind in ("max", "avg"):
            window = self.window(x)
            if window is None:
                return None
            more = {"count_pad": self.chance(0.5)} if kind == "avg" else {}
            return ops.make(f"{kind}_pool2d", x, **window, **more)
        if kind == "moved" and h > 1:
            return ops.make("transpose", x, perm=(0, 2, 1, 3))
        if kind == "softmax" and self.chance(0.5):
            return ops.make("softmax", x)
        return None

    def graph(self) -> Graph:
        shape = (self.upto(1, 2), self.upto(3, 12), self.upto(3, 12), self.upto(1, 24))
        x = ops.make("input", shape=shape, dtype=DType.f32, label=f"x{self.seed}")
        self.inputs.append(x)
        self.values.append(x)
        while len(self.values) < self.upto(3, 9):
            y = self.step(self.values[-1] if self.chance(0.8) else self.values[self.upto(0, len(self.values) - 1)])
            if y is not None and 0 < y.type.size <= 20_000:
                self.values.append(y)
        last = self.values[-1]
        outputs = [ops.make("conv2d", last, self.weights(5, 1, 1, last.shape[3]), *self.bias(5))]
        if self.chance(0.5):
            mean = ops.make("reduce_mean", last, axes=(1, 2), keep=False)
            hidden = ops.make("relu", ops.make("linear", mean, self.weights(16, last.shape[3]), *self.bias(16)))
            outputs.append(ops.make("linear", hidden, self.weights(10, 16), *self.bias(10)))
        return Graph(f"g{self.seed}", tuple(self.inputs), tuple(outputs), tuple(f"y{i}" for i in range(len(outputs))))


@dataclass
class Case:
    """A network in fixed point as it is lowered, its inputs, and whether it is defined to the last bit."""

    seed: int
    graph: Graph
    inputs: list[np.ndarray]
    exact: bool


def random_case(seed: int) -> Case:
    """The case of `seed`. In half of them every stored integer is an output of the network."""
    maker = Maker(seed)
    graph = maker.graph()
    rng = maker.rng
    shapes = [i.shape for i in graph.inputs]
    size = rng.choice([0.1, 1, 30])
    samples = [[(rng.standard_normal(s) * size).astype(np.float32) for s in shapes] for _ in range(2)]
    fused = fixed_point(graph, str(rng.choice(["int8", "int16"])), per_channel=maker.chance(0.8), samples=samples)
    if maker.chance(0.5):
        stored = [n for n in fused.nodes if n.dtype in NARROW and not n.is_const and n.op != "input"]
        outputs = tuple(dict.fromkeys([*fused.outputs, *stored]))
        fused = replace(fused, outputs=outputs, output_names=tuple(f"y{i}" for i in range(len(outputs))))
    wild = rng.choice([0.5, 1, 1, 40])
    return Case(seed, fused, [a * np.float32(wild) for a in samples[0]], exactness(fused).exact)


def merged(cases: Sequence[Case]) -> tuple[Graph, list[np.ndarray]]:
    """All networks as one, with the inputs and outputs of each in order."""
    outputs = [o for c in cases for o in c.graph.outputs]
    graph = Graph("fuzz", tuple(i for c in cases for i in c.graph.inputs), tuple(outputs),
                  tuple(f"y{i}" for i in range(len(outputs))))
    return graph, [a for c in cases for a in c.inputs]


def differences(case: Case, got: Sequence[np.ndarray]) -> str | None:
    """What is wrong with the outputs `got` of `case`, in words; None if nothing is."""
    for name, g, w in zip(case.graph.output_names, got, evaluate_graph(case.graph, case.inputs), strict=True):
        if g.dtype != w.dtype or g.shape != w.shape:
            return f"{name} is {g.dtype} {g.shape}, not {w.dtype} {w.shape}"
        if case.exact and g.tobytes() != w.tobytes() and not np.array_equal(g, w):  # 0 and -0 are equal
            at = np.argwhere(g != w)
            return f"{name} differs in {len(at)} of {g.size} elements, first at {at[0].tolist()}: " \
                   f"{g[tuple(at[0])]} instead of {w[tuple(at[0])]}"
        if not case.exact and not rounds_alike([(g, w)]):
            return f"{name} differs by more than single roundings"
    return None


def problems_of(cases: Sequence[Case], target: str, threads: int) -> dict[int, str]:
    """By seed what is wrong with the compiled networks of `cases`."""
    try:
        graph, inputs = merged(cases)
        got = iter(run_graph(graph, TARGETS[target], threads)(inputs))
    except Exception as e:  # noqa: BLE001 - that is what is looked for
        if len(cases) == 1:
            return {cases[0].seed: f"{target}: {type(e).__name__}: {e}"}
        return {k: v for c in cases for k, v in problems_of([c], target, threads).items()}
    found = {}
    for case in cases:
        problem = differences(case, [next(got) for _ in case.graph.outputs])
        if problem:
            node = first_divergence(case.graph, case.inputs, lambda g: run_graph(g, TARGETS[target], threads), 0.0)
            where = f"; first at {node.label()}: {node.op} {dict(node.attrs)}" if node else ""
            found[case.seed] = f"{target}, {threads} threads: {problem}{where}"
    return found


@dataclass
class Result:
    graphs: int = 0
    exact: int = 0
    nodes: int = 0
    elements: int = 0
    operations: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: dict[int, str] = field(default_factory=dict)


def runnable() -> list[str]:
    """The targets whose code this processor runs."""
    features = set(_native.cpu_features())
    return [t.name for t in TARGETS.values() if set(t.features) <= features]


def fuzz(*, first: int = 0, count: int | None = None, seconds: float | None = None, target: str | None = None,
         announce: bool = False) -> Result:
    """Runs networks from seed `first` until `count` or `seconds` are spent; targets take turns unless one is given."""
    result, started = Result(), time.monotonic()
    targets = [target] if target else runnable()
    seed = first
    with tempfile.TemporaryDirectory() as cache:
        before = {k: os.environ.get(k) for k in ("SKIVE_CACHE", "SKIVE_CXXFLAGS")}
        os.environ["SKIVE_CACHE"] = cache  # artefacts that nobody needs again
        os.environ.setdefault("SKIVE_CXXFLAGS", "-O1")  # half the compile time, the same code paths
        try:
            while (count is None or seed < first + count) and (seconds is None or time.monotonic() - started < seconds):
                end = seed + SIDE_BY_SIDE if count is None else min(seed + SIDE_BY_SIDE, first + count)
                cases = [random_case(s) for s in range(seed, end)]
                turn = seed // SIDE_BY_SIDE
                found = problems_of(cases, targets[turn % len(targets)], 1 + turn % 3)
                for c in cases:
                    result.graphs += 1
                    result.exact += c.exact
                    result.nodes += len(c.graph.nodes)
                    result.elements += sum(o.type.size for o in c.graph.outputs)
                    result.operations.update(f"{n.op} {n.inputs[0].dtype.value}" for n in c.graph.nodes if n.inputs)
                result.problems |= found
                if announce:
                    for s, text in found.items():
                        print(f"seed {s}: {text}", flush=True)
                seed = end
        finally:
            for k, v in before.items():
                if v is None:
                    os.environ.pop(k, None)
                else:
                    os.environ[k] = v
    return result


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seed", "--first", dest="first", type=int, default=0, help="the first seed")
    p.add_argument("--count", type=int, help="networks to run (400 unless --seconds is given)")
    p.add_argument("--seconds", type=float, help="start no more networks after this time")
    p.add_argument("--target", help="this one only")
    p.add_argument("--show", action="store_true", help="print the network of --seed and stop")
    a = p.parse_args()
    if a.show:
        from skive import text

        print(text.print_graph(random_case(a.first).graph))
        return 0
    count = a.count if a.count is not None or a.seconds is not None else 400
    started = time.monotonic()
    result = fuzz(first=a.first, count=count, seconds=a.seconds, target=a.target, announce=True)
    print(f"{result.graphs} networks of {result.nodes} nodes ({result.exact} exact), {result.elements:,} results, "
          f"seeds {a.first} to {a.first + result.graphs - 1}, in {time.monotonic() - started:.0f} s; "
          f"{len(result.problems)} wrong")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
