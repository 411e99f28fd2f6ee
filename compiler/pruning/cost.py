"""What is left of a network when groups of channels are removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from skive import ops
from skive.errors import PruningError
from skive.ir import FrozenDict, Graph, Node
from skive.passes.channel_groups import Groups, without
from skive.plan import Plan
from skive.targets.base import Target
from skive.types import TensorType

Progress = Callable[[str, float], None]
MEASURING = 30.0  # seconds that compiling and timing kernels may take, for each plan


class Cost:
    """What is left of a graph's multiply-accumulates, weights or bytes of weights when groups are removed."""

    def __init__(self, found: Groups, measure: str):
        self._found = found
        if measure == "macs":
            self._nodes = [n for n in found.graph.nodes if ops.macs(n)]
            self._of = self._macs
        else:
            self._nodes = [n for n in found.graph.nodes if n.is_const]
            self._of = self._elements if measure == "parameters" else self._bytes
        self.whole = self(np.zeros(len(found.groups), bool))

    def __call__(self, removed: np.ndarray) -> int:
        """With the groups that `removed` [groups] bool names gone."""
        return sum(self._of(n, removed) for n in self._nodes)

    def _elements(self, node: Node, removed: np.ndarray) -> int:
        return math.prod(self._found.kept_sizes(removed, node))

    def _bytes(self, node: Node, removed: np.ndarray) -> int:
        return self._elements(node, removed) * node.dtype.bytes

    def _macs(self, node: Node, removed: np.ndarray) -> int:
        def sized(n: Node, attrs: FrozenDict) -> Node:
            return replace(n, type=TensorType(self._found.kept_sizes(removed, n), n.dtype), attrs=attrs)

        inputs = tuple(sized(i, i.attrs) for i in node.inputs)
        attrs = dict(node.attrs)
        if attrs.get("groups", 1) == node.inputs[0].shape[-1]:
            attrs["groups"] = inputs[0].shape[-1]  # depthwise
        return ops.macs(replace(sized(node, FrozenDict(attrs)), inputs=inputs))

    def measure(self, removed: np.ndarray) -> None:
        """Nothing has to be measured to count."""


class Latency:
    """Microseconds of one run without the groups, `dtype` what the products are in: the sum over kernel calls of
    the measured table."""

    def __init__(self, found: Groups, target: Target, threads: int, progress: Progress, dtype: str = "float32"):
        from skive import _native, speed

        if not set(target.features) <= set(_native.cpu_features()):
            raise PruningError(f"latency is measured on this processor, which cannot run target {target.name}; "
                               "give macs instead")
        self._found, self._target, self._threads, self._progress = found, target, threads, progress
        self._dtype = dtype
        self._table = speed.SpeedTable(target, threads)
        nothing = np.zeros(len(found.groups), bool)
        self.measure(nothing)
        for part in (2, 4):  # kernels of about the sizes that will be left; others are estimated by these
            some = nothing.copy()
            for f in found.families:
                left = max(1, len(f) // part // 8) * 8
                some[list(f[left:])] = True
            self.measure(some)
        self.whole = self(nothing)

    def __call__(self, removed: np.ndarray) -> float:
        return sum(map(self._table.us, self._plan(removed).calls))

    def measure(self, removed: np.ndarray) -> None:
        """Times the kernels that this choice needs and the table does not have."""
        from skive import speed

        speed.fill(self._table, [self._plan(removed)], MEASURING, self._progress)

    def _plan(self, removed: np.ndarray) -> Plan:
        from skive import passes
        from skive.lower import lower
        from skive.passes.quantize import Quantizer, Scheme, Storage
        from skive.pipeline import PassManager
        from skive.speed import guessed_range

        graph: Graph = replace(without(self._found, np.flatnonzero(removed)), batch_max=None)
        if self._dtype != "float32":  # time does not depend on the ranges, which are measured later
            storage = Storage(graph, attention=self._dtype == "int8")
            ranges = {n: guessed_range(n) for n in storage.sources}
            graph = Quantizer(graph, Scheme(ranges, self._dtype), storage).build()
        return lower(PassManager().run(graph, passes.FUSED, check="never")[0], self._target, self._threads)
