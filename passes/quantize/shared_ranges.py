"""Which stored values share a scale, and the range that it covers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from skive.ir import Node
from skive.passes.quantize.formats import Range
from skive.passes.quantize.storage import Storage


class SharedRanges:
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
