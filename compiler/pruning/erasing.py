"""Residual branches that are removed whole."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skive.errors import PruningError
from skive.ir import Graph, Node


@dataclass(frozen=True)
class Branch:
    """x + f(x): `sum` is the addition, `skip` is x, `inside` are the nodes of f that nothing else needs."""

    sum: Node
    skip: Node
    inside: tuple[Node, ...]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(n.label() for n in self.inside if any(i.is_const for i in n.inputs)))


def branches(graph: Graph) -> list[Branch]:
    """The residual branches of `graph`: additions of a value and of something computed from that value alone."""
    found = []
    for node in graph.nodes:
        if node.op != "add" or any(i.is_const or i.type != node.type for i in node.inputs):
            continue
        for skip, other in (node.inputs, node.inputs[::-1]):
            inside = _between(graph, skip, other)
            if inside is not None and other is not skip:
                found.append(Branch(node, skip, inside))
                break
    return found


def _between(graph: Graph, skip: Node, end: Node) -> tuple[Node, ...] | None:
    """The nodes that only `end` needs; None if `end` also depends on something beside `skip`."""
    todo, seen = [end], set()
    while todo:
        n = todo.pop()
        if n is skip or n in seen or n.is_const:
            continue
        if n.op == "input":
            return None
        seen.add(n)
        todo += n.inputs
    outputs = set(graph.outputs)
    own: set[Node] = set()
    for n in reversed(graph.nodes):  # users before operands
        if n in seen and n not in outputs and (n is end or all(u in own for u in graph.users[n])):
            own.add(n)
    if len([u for u in graph.users[end]]) > 1:
        return None
    return tuple(n for n in graph.nodes if n in own)


def influences(graph: Graph, found: Sequence[Branch], samples: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """What each branch changes: 1 - cosine between x and x + f(x), mean over samples (Men et al., ShortGPT: Layers in
    Large Language Models are More Redundant Than You Expect, 2024)."""
    from skive import calibration

    values = list(dict.fromkeys(v for b in found for v in (b.skip, b.sum)))
    run = calibration.runner(graph, values)
    totals = np.zeros(len(found))
    for sample in samples:
        got = dict(zip(values, run(sample), strict=True))
        for k, b in enumerate(found):
            x, y = (got[v].astype(np.float64).ravel() for v in (b.skip, b.sum))
            totals[k] += 1 - float(x @ y) / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30)
    return list(totals / len(samples))


def erased(graph: Graph, count: int, keep: Sequence[str], samples: Sequence[Sequence[np.ndarray]]
           ) -> tuple[Graph, list[dict[str, Any]]]:
    """(`graph` without the `count` branches that change their input least, what they were). Measured anew after each.
    PruningError if there are fewer."""
    report: list[dict[str, Any]] = []
    for turn in range(count):
        found = [b for b in branches(graph)
                 if not any(fnmatch.fnmatchcase(name, p) for p in keep for name in b.layers)]
        if not found:
            raise PruningError(f"{graph.name}: {turn} residual branches can be erased, not {count}: no other addition "
                               "has a value and something computed from that value alone"
                               + (", but for the layers of keep" if keep else ""))
        changes = influences(graph, found, samples)
        least = int(np.argmin(changes))
        branch = found[least]
        report.append({"sum": branch.sum.label(), "layers": branch.layers, "influence": changes[least]})
        graph = _bypassed(graph, branch)
    return graph, report


def _bypassed(graph: Graph, branch: Branch) -> Graph:
    from skive.ir import rebuilt

    new: dict[Node, Node] = {}
    for n in graph.nodes:
        new[n] = new[branch.skip] if n is branch.sum else rebuilt(n, tuple(new[i] for i in n.inputs))
    return graph.with_nodes(new)
