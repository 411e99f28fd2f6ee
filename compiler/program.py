"""A graph with early exits: straight-line stages, and where a call may end between them.

Nothing is copied when a network is split. Stage i is what exit i and its test need and no earlier stage has
computed; the order of the graph's outputs decides it, because the nodes of a graph come in the order in
which its outputs need them.
"""

from __future__ import annotations

from dataclasses import dataclass

from skive import ops
from skive.ir import Graph, Node

TESTS = (">", ">=", "<", "<=")


@dataclass(frozen=True)
class ExitTest:
    """One way out of a network: `outputs` are its results, by name. The call ends here if the first element of the
    output called `score` compares with the threshold as `test` says; the last exit has no score and is always taken.
    `scale`: of a score that is integers, the real number that a 1 stands for; the threshold is real in any case."""

    name: str
    outputs: tuple[str, ...]
    criterion: str = ""
    score: str | None = None
    test: str = ">"
    threshold: float = 0.0
    scale: float | None = None


@dataclass(frozen=True)
class Program:
    """`graph` and its exits in the order in which they are reached; the last one is the whole network.

    Every output of the graph belongs to one exit, as a result or as its score, and the outputs of an exit
    stand before those of later ones.
    """

    graph: Graph
    exits: tuple[ExitTest, ...]

    def __post_init__(self) -> None:
        named = [n for e in self.exits for n in (*e.outputs, *([e.score] if e.score else []))]
        assert sorted(named) == sorted(self.graph.output_names), "every output belongs to one exit"
        order = [self.exit_of(n) for n in self.graph.output_names]
        assert order == sorted(order), "the outputs stand in the order of the exits"

    def exit_of(self, output: str) -> int:
        """The index of the exit that an output belongs to."""
        return next(i for i, e in enumerate(self.exits) if output in e.outputs or output == e.score)

    def stages(self) -> tuple[tuple[Node, ...], ...]:
        """The nodes of every stage in execution order; together the nodes of the graph."""
        return stages(self.graph, tuple(self.exit_of(n) for n in self.graph.output_names))

    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulates from the start to each exit."""
        total, spent = 0, []
        for nodes in self.stages():
            total += sum(map(ops.macs, nodes))
            spent.append(total)
        return tuple(spent)


def stages(graph: Graph, exits: tuple[int, ...]) -> tuple[tuple[Node, ...], ...]:
    """The nodes of `graph`, in order, cut behind the last node that each exit needs; `exits[i]` is that of output i."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    ends = [0] * (max(exits, default=-1) + 1)
    for o, e in zip(graph.outputs, exits, strict=True):
        ends[e] = max(ends[e], position[o] + 1)
    cut, start = [], 0
    for end in ends:
        cut.append(graph.nodes[start : max(start, end)])
        start = max(start, end)
    return tuple(cut)
