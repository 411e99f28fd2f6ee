"""Trips of a loop that are the same computation share one copy of it: the calls of one trip, run again.

Front ends unroll loops that values end (docs/decisions/0010). Here the copies are found again, in the order of the
nodes: a stretch that repeats with a period, whose operands lie in the same trip, in the trip before or in front of all,
and whose trips run under the condition that no trip before ended the loop. One trip is kept. What it takes over from
the trip before lies in a place of its own (a slot), filled in front of the first trip and at the end of each. A trip
that does not run leaves the slots as they are, so that behind the loop they hold what the last trip left there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, content_hash, rebuilt
from skive.lower.storage import Guards, Loop, Slot

FEWEST = 4  # trips that are worth a loop
PERIODS = 4  # that are tried, those that cover most first
LONGEST = 1024  # nodes of a trip

Test = tuple[int, bool]  # the number of a condition in its trip, and what it must be


@dataclass(frozen=True)
class OrderedGraph(Graph):
    """A graph whose nodes come in a given order."""

    order: tuple[Node, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.order


@dataclass(frozen=True)
class Rolled:
    """A graph for storage and lowering: the nodes of every stage, under which conditions each runs, and its loops."""

    graph: Graph
    stages: tuple[tuple[Node, ...], ...]
    guards: Mapping[Node, Guards]
    loops: tuple[Loop, ...] = ()


class _Differs(Exception):
    """These nodes are not the trips of one loop."""


def rolled(graph: Graph, stages: Sequence[Sequence[Node]], guards: Mapping[Node, Guards]) -> Rolled:
    """The graph with one trip of each loop; unchanged where no trips are the same computation."""
    done = Rolled(graph, tuple(map(tuple, stages)), guards)
    if all(n.op != "choose" for n in graph.nodes):
        return done
    for started in (done, replace(done, stages=tuple(_by_level(nodes, guards) for nodes in stages))):
        found: Rolled | None = started
        while found is not None:
            last, found = found, _next(found)
        if last.loops:
            return last
    return done


def _by_level(nodes: Sequence[Node], guards: Mapping[Node, Guards]) -> tuple[Node, ...]:
    """`nodes` with those first that wait for the fewest others: the trips of states that do not need each other, which
    come one loop behind the other where several results need them, side by side."""
    level: dict[Node, int] = {}
    for n in nodes:
        needed = () if n.is_const else (*n.inputs, *(c for c, _ in guards[n]))
        level[n] = max((level[i] + 1 for i in needed if i in level), default=0)
    return tuple(sorted(nodes, key=level.__getitem__))


def _next(done: Rolled) -> Rolled | None:
    """`done` with one loop more."""
    taken = {n for loop in done.loops for n in loop.nodes}
    conditions = {c for around in done.guards.values() for c, _ in around}
    for number, nodes in enumerate(done.stages):
        for segment in _segments(nodes, taken):
            for first, period, trips in _candidates(segment, conditions):
                try:
                    return _Rolling(done, number, segment, first, period, trips).result()
                except _Differs:
                    continue
    return None


def _segments(nodes: Sequence[Node], taken: set[Node]) -> Iterator[list[Node]]:
    """The nodes that run, between those that are `taken`."""
    segment: list[Node] = []
    for n in nodes:
        if n in taken:
            yield segment
            segment = []
        elif n.op not in ("input", "const"):
            segment.append(n)
    yield segment


def _plain(value: Any) -> Any:
    """An attribute as it can be compared."""
    if isinstance(value, np.ndarray):
        return content_hash(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return repr(value)


def _labels(nodes: Sequence[Node]) -> np.ndarray:
    """Equal numbers for equal operations on equal types and constants."""
    contents = {i: content_hash(i.value) for n in nodes for i in n.inputs if i.is_const}
    known: dict[Any, int] = {}
    found = []
    for n in nodes:
        key = (n.op, tuple((k, _plain(v)) for k, v in n.attrs.items()), str(n.type),
               tuple((str(i.type), contents.get(i)) for i in n.inputs))
        found.append(known.setdefault(key, len(known)))
    return np.asarray(found)


def _candidates(nodes: Sequence[Node], conditions: set[Node]) -> Iterator[tuple[int, int, int]]:
    """(first node of a trip, nodes of a trip, trips) of what repeats, where a condition is the last of a trip and one
    trip more lies in front. With fewer trips too: what comes behind a loop may begin as the loop does."""
    if len(nodes) <= FEWEST:
        return
    labels = _labels(nodes)
    runs = []
    for period in range(1, min(LONGEST, len(nodes) // FEWEST) + 1):
        breaks = np.flatnonzero(np.concatenate([[True], labels[period:] != labels[:-period], [True]]))
        longest = int(np.argmax(np.diff(breaks)))
        start, length = int(breaks[longest]), int(np.diff(breaks)[longest]) - 1
        if length >= FEWEST * period:
            runs.append((-length, period, start))
    for length, period, start in sorted(runs)[:PERIODS]:
        end = start - length + period
        for first in range(start + period, start + 3 * period):
            if nodes[first - 1] in conditions and nodes[first - 1 + period] in conditions:
                trips = (end - first) // period
                yield from ((first, period, trips - fewer) for fewer in range(3))


@dataclass(frozen=True)
class _Conditions:
    """What the guards of a node of a trip are on: what lies in front of the loop, flags of all trips before, flags of
    the trip before alone, conditions of the same trip."""

    front: frozenset[tuple[Node, bool]]
    every: frozenset[Test]
    previous: frozenset[Test]
    inner: frozenset[Test]


class _Rolling:
    """The trips of `period` nodes from number `first` of `nodes` on, a part of stage `number`.

    Raises _Differs where they are not one loop, or where something behind it needs a value of its inner trips.
    """

    def __init__(self, done: Rolled, number: int, nodes: list[Node], first: int, period: int, trips: int):
        self.done, self.number, self.nodes, self.first, self.period = done, number, nodes, first, period
        self.at = {n: i for i, n in enumerate(nodes)}
        self.trips = self._same_operands(trips)
        if self.trips < FEWEST:
            raise _Differs
        self.end = first + self.trips * period
        self.behind = self._behind()
        self.conditions = [self._same_guards(j) for j in range(period)]
        self.flags = {k for c in self.conditions for k, _ in c.every | c.previous}
        self._flags_stay()
        self.carried = set(self.flags)  # numbers in the trip of what the next trip or what lies behind reads
        for n in self._trip(1):
            self.carried |= {j for i in n.inputs if (j := self._from_before(i)) is not None}
        self.dropped: set[Node] = set()  # choices behind the loop between values of its trips, which it makes itself
        self.kept: dict[Node, Node] = {}  # the first of a chain of such choices -> that on the last trip
        self.links: set[Node] = set()  # all choices of a chain that are on the last trip
        self.counts: dict[Node, tuple[int, np.ndarray, np.ndarray]] = {}  # link -> condition, value in front, step
        self._chains()
        if any(n in self.dropped for loop in done.loops for n in loop.nodes):
            raise _Differs
        for n in self.behind:
            if n not in self.dropped and n not in self.links:
                for i in n.inputs:
                    self._read_behind(i)
        for o in done.graph.outputs:
            self._read_behind(o)
        for j in self.carried:
            self._own_memory(j)

    # ---- the trips

    def _trip(self, t: int) -> list[Node]:
        return self.nodes[self.first + t * self.period : self.first + (t + 1) * self.period]

    def _place(self, n: Node) -> tuple[int, int] | None:
        """(trip, number in the trip); None outside."""
        i = self.at.get(n, -1)
        return divmod(i - self.first, self.period) if self.first <= i < self.end else None

    def _from_before(self, operand: Node) -> int | None:
        """The number in its trip of what trip 1 reads from trip 0."""
        place = self._place(operand)
        return place[1] if place and place[0] == 0 else None

    def _same_operands(self, trips: int) -> int:
        """The number of trips that read the same of themselves, of the trip before and of what lies in front."""
        first, period = self.first, self.period
        for t in range(1, trips):
            start = first + t * period
            for i in range(start, start + period):
                for a, b in zip(self.nodes[i - period].inputs, self.nodes[i].inputs, strict=True):
                    now = self.at.get(b, -1)
                    same = now < first if a is b else now - self.at.get(a, -1) == period and now >= start - period
                    if not b.is_const and not same:
                        return t
        return trips

    def _guards(self, node: Node) -> tuple[set[tuple[Node, bool]], set[tuple[int, int, bool]]]:
        """The guards of a node on conditions outside the loop, and on those inside: trip, number, what it must be."""
        outside, inside = set(), set()
        for c, holds in self.done.guards[node]:
            if place := self._place(c):
                inside.add((*place, holds))
            else:
                outside.add((c, holds))
        return outside, inside

    def _same_guards(self, j: int) -> _Conditions:
        """What node `j` of every trip depends on."""
        found = [self._guards(self._trip(t)[j]) for t in range(self.trips)]
        inner = frozenset((k, h) for u, k, h in found[0][1] if u == 0)
        every = frozenset((k, h) for u, k, h in found[2][1] if u == 0)
        previous = frozenset((k, h) for u, k, h in found[2][1] if u == 1) - every
        front = frozenset(found[1][0])
        entered = {(self.nodes[self.first - self.period + k], h) for k, h in every | previous}
        for t, (outside, inside) in enumerate(found):
            wanted = {(u, k, h) for u in range(t) for k, h in every} | {(t, k, h) for k, h in inner}
            wanted |= {(t - 1, k, h) for k, h in previous if t}
            if inside != wanted or outside != (front if t else front | entered):
                raise _Differs
        return _Conditions(front, every, previous, inner)

    def _flags_stay(self) -> None:
        """A flag that ends the loop is not computed anew; flags are renewed one by one at the end of a trip, and none
        under another that was just renewed and may say something else."""
        if not self.flags:
            raise _Differs  # nothing ends the loop early
        for c in self.conditions:
            if any((k, h) not in self.conditions[k].every for k, h in c.every):
                raise _Differs
        for k in self.flags:
            c = self.conditions[k]
            if any(j < k and (j, h) not in c.inner for j, h in c.every | c.previous):
                raise _Differs

    def _own_memory(self, j: int) -> None:
        """Raises _Differs if node `j` may lie in memory that the trip before left to this one."""
        n = self._trip(1)[j]
        while n.op in ("reshape", "slice"):
            n = n.inputs[0]
            if self._from_before(n) is not None:
                raise _Differs

    # ---- what lies behind

    def _behind(self) -> list[Node]:
        """The nodes behind the loop, in order."""
        nodes = self.done.stages[self.number]
        later = [n for stage in self.done.stages[self.number + 1 :] for n in stage]
        later = [*nodes[nodes.index(self.nodes[self.end - 1]) + 1 :], *later]
        return [n for n in later if n.op not in ("input", "const")]

    def _read_behind(self, operand: Node) -> None:
        """What is read behind the loop, beside chains, is of the last trip."""
        if place := self._place(operand):
            if place[0] != self.trips - 1:
                raise _Differs
            self.carried.add(place[1])

    def _goes_on(self, condition: int) -> bool | None:
        """What a condition is where the loop goes on; None if it does not decide that."""
        found = [h for k, h in self.conditions[condition].every if k == condition]
        return found[0] if len(found) == 1 else None

    def _chains(self) -> None:
        """Choices between what the trips left, one inside the other: when the loop ends, its slots have made them."""
        outputs, users = set(self.done.graph.outputs), self.done.graph.users
        seen: set[Node] = set()
        for head in reversed(self.behind):
            links: list[tuple[Node, int, int, Node]] = []  # choice, trip and number of its condition, what ends there
            node = head
            while node.op == "choose" and node not in seen and not self._place(node):
                if not (place := self._place(node.inputs[0])):
                    break
                on = self._goes_on(place[1])
                if on is None or links and (node in outputs or any(u is not links[-1][0] for u in users[node])):
                    break
                links.append((node, *place, node.inputs[2 if on else 1]))
                node = node.inputs[1 if on else 2]
            if not links or links[0][1] != 0:
                continue
            seen.update(link[0] for link in links)
            self._chain(links)

    def _chain(self, links: Sequence[tuple[Node, int, int, Node]]) -> None:
        """The choices of one chain, outermost first: those on the last trip stand for all."""
        group = sum(t == 0 for _, t, _, _ in links)
        if len(links) != group * self.trips:
            raise _Differs
        for i in range(group):
            column = links[i::group]
            if any(t != u or k != column[0][2] for u, (_, t, k, _) in enumerate(column)):
                raise _Differs
            self._stops(column[-1][0], column[0][2], [stop for _, _, _, stop in column])
        last = [link[0] for link in links[-group:]]
        self.dropped.update(link[0] for link in links[:-group])
        self.links.update(last)
        self.kept[links[0][0]] = last[0]

    def _stops(self, link: Node, condition: int, values: Sequence[Node]) -> None:
        """Where a condition ends the loop, its slot holds the one of `values` that is of that trip."""
        if all(v.is_const for v in values):
            if len({content_hash(v.value) for v in values}) > 1:
                self._counts(link, condition, [v.value for v in values])
            return
        if all(v is values[0] for v in values) and self._place(values[0]) is None:
            return
        start = self.at.get(values[0], -1)
        if any(self.at.get(v, -1) != start + t * self.period for t, v in enumerate(values)):
            raise _Differs
        trip, j = divmod(start - self.first, self.period)
        on = self._goes_on(condition)
        stays = (condition, on) in self.conditions[j].inner  # not computed in a trip that this condition ends
        if trip != (-1 if stays else 0) or (condition, on) not in self.conditions[j].every:
            raise _Differs
        self.carried.add(j)

    def _counts(self, link: Node, condition: int, values: Sequence[np.ndarray]) -> None:
        """Constants that grow by one step from trip to trip are counted."""
        if values[0].dtype.kind not in "iuf":
            raise _Differs
        step = values[1] - values[0]
        for value, after in zip([values[0] - step, *values], values, strict=False):
            if (value + step).tobytes() != after.tobytes():
                raise _Differs
        self.counts[link] = condition, values[0] - step, step

    # ---- the graph with one trip

    def result(self) -> Rolled:
        """One trip in place of all."""
        guards: dict[Node, Guards] = {}
        slots = {j: self._entry(self.nodes[self.first - self.period + j], guards) for j in self.carried}
        new: dict[Node, Node] = {}
        trip: list[Node] = []
        for n, c in zip(self._trip(1), self.conditions, strict=True):
            inputs = tuple(new.get(i, i) if (j := self._from_before(i)) is None else slots[j] for i in n.inputs)
            new[n] = replace(n, inputs=inputs)
            trip.append(new[n])
            front = [g for g in self.done.guards[n] if g in c.front]
            tests = [(slots[k], h) for k, h in sorted(c.every | c.previous)]
            guards[new[n]] = (*front, *tests, *((trip[k], h) for k, h in sorted(c.inner)))
        found = []
        for link, (condition, start, step) in self.counts.items():
            before = self.nodes[self.first - self.period + condition]
            entry = ops.make("copy", constant(np.asarray(start)), origin=link.label())
            count = ops.make("add", entry, constant(np.asarray(step)), origin=link.label())
            guards[entry], guards[count] = self.done.guards[before], guards[trip[condition]]
            trip.append(count)
            found.append((entry, count, False))
        found += [(slots[j], trip[j], j in self.flags) for j in sorted(slots, key=lambda j: (j in self.flags, j))]
        loop_slots = []
        for entry, value, flag in found:  # flags last: what is copied before is under them
            under = set(guards[value])
            together = frozenset(n for n in trip if under <= set(guards[n]))
            loop_slots.append(Slot(entry, value, ops.make("copy", value, origin=value.label()), flag, together))
            guards[loop_slots[-1].exit] = guards[value]
        counted = {link: loop_slots[i].exit for i, link in enumerate(self.counts)}
        exits = dict(zip(sorted(slots, key=lambda j: (j in self.flags, j)),
                         (s.exit for s in loop_slots[len(self.counts) :]), strict=True))
        names = tuple({a: b.label() for a, b in zip(trip, self._trip(t))} for t in range(self.trips))
        return self._joined(Loop(tuple(loop_slots), tuple(trip), names), guards, exits, counted)

    def _entry(self, before: Node, guards: dict[Node, Guards]) -> Node:
        """The slot of what `before` is in front of the loop."""
        entry = ops.make("copy", before, origin=before.label())
        guards[entry] = self.done.guards[before]
        return entry

    def _joined(self, loop: Loop, guards: dict[Node, Guards], exits: Mapping[int, Node],
                counted: Mapping[Node, Node]) -> Rolled:
        """The loop between what lies in front of it and what lies behind."""
        done = self.done
        new: dict[Node, Node] = {}

        def now(n: Node) -> Node:
            place = self._place(n)
            n = self.kept.get(n, n)
            return exits[place[1]] if place else new.get(n, n)

        for n in self.behind:
            if n not in self.dropped:
                inputs = [now(i) for i in n.inputs]
                if n in counted:
                    condition = self.counts[n][0]
                    inputs[2 if self._goes_on(condition) else 1] = counted[n]
                new[n] = rebuilt(n, tuple(inputs))
                guards[new[n]] = self._guards_behind(n, new, exits)
        for head, last in self.kept.items():
            if self._guards(head)[0] != self._guards(last)[0] or self._guards(head)[1]:
                raise _Differs
        inside = set(self.nodes[self.first : self.end])
        stages = []
        for nodes in done.stages:
            stage: list[Node] = []
            for n in nodes:
                if n is self.nodes[self.first]:
                    stage += loop.nodes
                elif n not in inside and n not in self.dropped:
                    stage.append(new.get(n, n))
            stages.append(tuple(stage))
        gone = {*new, *inside, *self.dropped}
        guards |= {n: g for n, g in done.guards.items() if n not in gone and not n.is_const}
        outputs = tuple(map(now, done.graph.outputs))
        order: dict[Node, None] = dict.fromkeys(done.graph.inputs)
        for n in (n for stage in stages for n in stage):
            order.update(dict.fromkeys((*(i for i in n.inputs if i.is_const), n)))
        order.update(dict.fromkeys(outputs))
        graph = OrderedGraph(done.graph.name, done.graph.inputs, outputs, done.graph.output_names,
                             done.graph.batch_max, order=tuple(order))
        return Rolled(graph, tuple(stages), guards, (*(old.mapped(new) for old in done.loops), loop))

    def _guards_behind(self, n: Node, new: Mapping[Node, Node], exits: Mapping[int, Node]) -> Guards:
        """The guards of a node behind the loop, on the slots: these hold the flags of the last trip that ran."""
        outside = [(self.kept.get(c, c), h) for c, h in self.done.guards[n] if not self._place(c)]
        front = [(new.get(c, c), h) for c, h in outside]
        trips: dict[Test, set[int]] = {}
        for t, k, h in self._guards(n)[1]:
            trips.setdefault((k, h), set()).add(t)
        last = self.trips - 1
        tests = []
        for (k, h), found in sorted(trips.items()):
            if n in self.links:  # now for all trips: whether one before ended the loop is what it chooses by
                if self._goes_on(k) is not h or found - {last} != set(range(last)):
                    raise _Differs
            elif (k, h) in self.conditions[k].every:
                if found != set(range(self.trips)):
                    raise _Differs
            elif self.conditions[k].every or found != {last}:
                raise _Differs
            if last in found:
                tests.append((exits[k], h))
        return (*front, *tests)
