"""Which values share memory: views, in-place elementwise, concatenations written in place.

The channels of a value may lie between those of other values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skive.ir import Graph, Node
from skive.lower.abilities import overwrites, reads_channel_slices, writes_channel_slices
from skive.lower.strides import row_strides
from skive.plan import Block, WeightPool

Guards = tuple[tuple[Node, bool], ...]  # conditions and what they must be, outermost first


@dataclass(frozen=True)
class Slot:
    """A place that one trip of a loop leaves to the next: `entry` fills it in front of the first trip, `exit` puts
    `value` there at the end of each. `flag`: calls of the trip run under it. `together`: the nodes of the trip that
    never run where `value` is not computed."""

    entry: Node
    value: Node
    exit: Node
    flag: bool
    together: frozenset[Node]


@dataclass(frozen=True)
class Loop:
    """Nodes of a graph that run several times: one trip. `names`: of every trip, what its nodes are called."""

    slots: tuple[Slot, ...]
    trip: tuple[Node, ...]
    names: tuple[Mapping[Node, str], ...]

    @property
    def repeated(self) -> tuple[Node, ...]:
        """What runs in every trip, in order."""
        return (*self.trip, *(s.exit for s in self.slots))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What fills the slots, and then a trip."""
        return (*(s.entry for s in self.slots), *self.repeated)

    def mapped(self, new: Mapping[Node, Node]) -> Loop:
        """The loop in a graph with other nodes."""

        def now(n: Node) -> Node:
            return new.get(n, n)

        slots = tuple(
            Slot(now(s.entry), now(s.value), now(s.exit), s.flag, frozenset(map(now, s.together))) for s in self.slots
        )
        return Loop(slots, tuple(map(now, self.trip)), tuple({now(k): v for k, v in t.items()} for t in self.names))


@dataclass
class Root:
    """Memory that one or more values share."""

    kind: str
    bytes: int
    index: int = 0
    offset: int = 0
    block: Block | None = None
    values: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A value's place: bytes `offset` into `root`; `pixel` elements between neighbours along the last
    axis but one where the value is a slice of channels of a wider one, 0 if it is dense; `step` bytes from one
    sample to the next where `root` holds a batch that is computed sample by sample."""

    root: Root
    offset: int = 0
    pixel: int = 0
    step: int = 0


class Storage:
    """The place of every value of one graph; `lanes`: floats of a vector of the target."""

    def __init__(self, graph: Graph, lanes: int, loops: Sequence[Loop] = ()):
        self.graph, self._lanes, self._loops = graph, lanes, loops
        self.weights = WeightPool()
        self._roots: list[Root] = []
        self._views: dict[Node, View] = {}
        self._const_roots: dict[Node, Root] = {}
        self._aliases: set[Node] = set()  # slices that are views of their operand
        self._strided_readers = self._read_as_channel_slices()
        self._assign_storage()

    def _new_root(self, kind: str, nbytes: int, index: int = 0) -> Root:
        root = Root(kind, nbytes, index)
        if kind == "arena":
            root.block = Block(nbytes, 1 << 30, -1)
            self._roots.append(root)
        return root

    def _read_as_channel_slices(self) -> set[Node]:
        """The values that may lie with other values' channels in between: all that read them can."""
        found: set[Node] = set()
        outputs = set(self.graph.outputs)
        for n in reversed(self.graph.nodes):
            if n.is_const or n.type.rank < 2 or not n.type.size or n in outputs:
                continue
            if all(
                u in found and u.shape[-1] == n.shape[-1]
                if u.op == "reshape"
                else reads_channel_slices(u, n, self._lanes)
                for u in self.graph.users[n]
            ):
                found.add(n)
        return found

    def _assign_storage(self) -> None:
        graph = self.graph
        position = {n: i for i, n in enumerate(graph.nodes)}
        last_use = {n: max([position[u] for u in users], default=position[n]) for n, users in graph.users.items()}
        for loop in self._loops:  # what a trip reads from in front of it, the next one reads too
            first, last = position[loop.repeated[0]], position[loop.repeated[-1]]
            for x in {x for n in loop.repeated for x in n.inputs if position[x] < first}:
                last_use[x] = max(last_use[x], last)
        entry_of = {s.exit: s.entry for loop in self._loops for s in loop.slots}
        self._entries = set(entry_of.values())  # their memory is written at the end of a trip: no part of another value
        self._position, self._last_use = position, last_use
        outputs = set(graph.outputs)
        for i, n in enumerate(graph.inputs):
            self._views[n] = View(self._new_root("input", n.type.bytes, i))
        for n in graph.nodes:
            if n.op in ("input", "const"):
                continue
            if n in entry_of:
                view: View | None = self._views[entry_of[n]]
            else:
                view = self._view_of_samples(n) or self._shared_view(n, position, last_use, outputs)
            view = view or View(self._new_root("arena", n.type.bytes))
            self._views[n] = view
            view.root.values.append(n)
            if n.op == "slice" and n.inputs[0] in self._views and view.root is self._views[n.inputs[0]].root:
                self._aliases.add(n)
        for i, o in enumerate(graph.outputs):
            settled = self._views.get(o)
            if (
                settled
                and settled.root.kind == "arena"
                and settled.offset == 0
                and settled.root.bytes == o.type.bytes
            ):
                settled.root.kind, settled.root.index = "output", i
                self._roots.remove(settled.root)
                settled.root.block = None
        for n in graph.nodes:  # a concat whose place is known takes its operands in
            if n.op == "concat":
                self._concat_in_place(n, outputs)
                self._concat_channels_in_place(n)
        for loop in self._loops:
            in_slots = {v for slot in loop.slots for v in self._compute_in_slot(loop, slot)}
            homes = [self._views[slot.entry].root for slot in loop.slots]
            for slot in loop.slots:  # slots are filled one after the other
                assert slot.value in in_slots or all(self._views[slot.value].root is not home for home in homes)

    def _compute_in_slot(self, loop: Loop, slot: Slot) -> Sequence[Node]:
        """The value of a slot is computed right there, if all that read what the trip before left do so before; gives
        all values that now lie there."""
        home, own = self._views[slot.entry], self._views[slot.value]
        root, inside = own.root, set(loop.trip)
        if slot.flag or root not in self._roots or root is home.root or (own.offset, own.pixel) != (0, 0):
            return ()
        if (home.offset, home.pixel) != (0, 0) or not root.bytes == home.root.bytes == slot.value.type.bytes:
            return ()
        left = [v for v in home.root.values if v is slot.entry or v in inside]
        readers = {n for v in left for n in self.graph.users[v]} & {*loop.repeated}
        # A choice between a new value and what the slot holds writes nothing where that stays.
        stays = slot.value.op == "choose" and slot.value is root.values[-1] and slot.entry in slot.value.inputs[1:]
        moved = [slot.value] if stays else root.values
        if any(v not in slot.together for v in moved):
            return ()
        first = min(moved, key=self._position.__getitem__)
        if any(self._position[n] >= self._position[first] for n in readers):
            over = [x for x in first.inputs[first.op == "choose":] if x is slot.entry]
            if any(self._position[n] > self._position[first] for n in readers) or not overwrites(first):
                return ()
            if len(over) != 1 or over[0].type != first.type or any(x in left for x in first.inputs if x is not over[0]):
                return ()
        for v in moved:
            self._views[v] = View(home.root, self._views[v].offset, self._views[v].pixel)
        home.root.values.extend(moved)
        root.values = [v for v in root.values if v not in moved]
        if not root.values:
            self._roots.remove(root)
        return moved

    def _view_of_samples(self, n: Node) -> View | None:
        """Where a sample lies in its batch, or a batch that is computed sample by sample."""
        if n.op == "sample":
            return View(self._views[n.inputs[0]].root, step=n.type.bytes)
        if n.op == "batch":
            return View(self._views[n.inputs[0]].root)
        batch = next((u for u in self.graph.users[n] if u.op == "batch"), None)
        return View(self._new_root("arena", batch.type.bytes), step=n.type.bytes) if batch else None

    def _shared_view(
        self, n: Node, position: dict[Node, int], last_use: dict[Node, int], outputs: set[Node]
    ) -> View | None:
        """The memory that `n` takes over from an operand; None if it needs its own."""
        if not n.type.size:
            return None
        if n.op == "reshape" and not n.inputs[0].is_const:
            return self._views[n.inputs[0]]
        if n.op == "slice" and not n.inputs[0].is_const:
            return self._slice_view(n)
        if overwrites(n):
            for x in n.inputs[n.op == "choose":]:  # the condition is read again after one side is written
                view = self._views.get(x)
                if (
                    view
                    and view.root.kind == "arena"
                    and view.offset == 0
                    and view.root.bytes == n.type.bytes == x.type.bytes
                    and x.shape == n.shape
                    and not any(v in outputs for v in view.root.values)
                    and all(last_use[v] <= position[n] for v in view.root.values)
                    and sum(i is x for i in n.inputs) == 1
                    and not any(
                        self._views.get(i) and self._views[i].root is view.root for i in n.inputs if i is not x
                    )
                ):
                    return view
        return None

    def _slice_view(self, n: Node) -> View | None:
        """Where a slice lies inside its operand; None if no kernel could read it there."""
        x = n.inputs[0]
        whole, width = self._views[x], self.pixel(x)
        if any(s != 1 and d > 1 for s, d in zip(n.attrs["step"], n.shape, strict=True)):
            return None
        # The pixels must be neighbours; of what lies around them only whole outer parts may be left out.
        cut = [i for i in range(n.type.rank - 1) if n.shape[i] != x.shape[i]]
        if any(n.shape[i] != 1 for i in range(cut[-1] if cut else 0)):
            return None
        dense = n.type.size == math.prod(n.shape[-1:]) or n.shape[-1] == width
        if not dense and n not in self._strided_readers:
            return None
        start = sum(s * b for s, b in zip(self.strides(x), n.attrs["start"], strict=True))
        return View(whole.root, whole.offset + start * n.dtype.bytes, 0 if dense else width, whole.step)

    def _concat_in_place(self, n: Node, outputs: set[Node]) -> None:
        """Operands that nothing else shares memory with are computed right where they end up."""
        axis = n.attrs["axis"] % n.type.rank
        if math.prod(n.shape[:axis]) != 1:
            return
        view, offset = self._views[n], self._views[n].offset
        # An in-place operation on the result would destroy an operand that is read again later.
        if any(overwrites(v) for v in view.root.values) and any(
            self._last_use[v] > self._position[n]
            for x in n.inputs
            for v in (self._views[x].root.values if x in self._views else [])
        ):
            return
        for x in n.inputs:
            own = self._views.get(x)
            if (
                own
                and own.root.kind == "arena"
                and own.offset == 0
                and own.root.bytes == x.type.bytes
                and own.root is not view.root
                and own.root in self._roots
                and not any(v in outputs or v in self._entries for v in own.root.values)
                and sum(i is x for i in n.inputs) == 1
                and not self._destroys(own.root, n)
            ):
                self._roots.remove(own.root)
                for v in own.root.values:
                    inner = self._views[v]
                    self._views[v] = View(view.root, offset + inner.offset, inner.pixel, inner.step or view.step)
                view.root.values.extend(own.root.values)
            offset += x.type.bytes

    def _destroys(self, root: Root, n: Node) -> bool:
        """Whether the memory of an operand is written again behind the concatenation `n`, which is still read then."""
        end, outputs = len(self._position), set(self.graph.outputs)
        last = max(end if v in outputs else self._last_use[v] for v in self._views[n].root.values)
        return any(
            self._position[n] < self._position[v] < last and v.op != "reshape" and v not in self._aliases
            for v in root.values
        )

    def _concat_channels_in_place(self, n: Node) -> None:
        """Operands are written as slices of the result's channels, if all that write and read them can.

        What moves is the whole memory of an operand, with the views of it and the values computed in
        place: one operand, or neighbours that together are all channels of what they are slices of.
        """
        if n.attrs["axis"] % n.type.rank != n.type.rank - 1 or math.prod(n.shape[:-1]) in (0, 1):
            return
        channel = 0
        for i, x in enumerate(n.inputs):
            own = self._views.get(x)
            if own and self._fills_channels(own.root, n, i):
                self._move_into_channels(own.root, n, channel)
            channel += x.shape[-1]

    def _fills_channels(self, root: Root, n: Node, first: int) -> bool:
        """Whether the operands of `n` from number `first` on are all of `root`, which can be moved there."""
        result, size = self._views[n].root, n.dtype.bytes
        width, rest = divmod(root.bytes, size * math.prod(n.shape[:-1]))  # channels
        if rest or root not in self._roots or root is result or self._destroys(root, n):
            return False
        channel = 0
        for x in n.inputs[first:]:
            view = self._views.get(x)
            if channel == width or not view or view.root is not root or view.offset != channel * size:
                break
            channel += x.shape[-1]
        overwritten = any(
            overwrites(v) and self._position[v] > self._position[n] for v in result.values
        )
        return channel == width and all(
            v in self._strided_readers
            and (v.op == "reshape" or writes_channel_slices(v))
            and v.dtype is n.dtype
            and self.pixel(v) == width
            and not (overwritten and self._last_use[v] > self._position[n])
            for v in root.values
        )

    def _move_into_channels(self, root: Root, n: Node, channel: int) -> None:
        """Every value in `root` becomes a part of the channels of `n` from number `channel` on."""
        result, size, pixel = self._views[n], n.dtype.bytes, self.pixel(n)
        width = root.bytes // math.prod(n.shape[:-1])  # bytes
        self._roots.remove(root)
        for v in root.values:
            pixels, rest = divmod(self._views[v].offset, width)
            offset = result.offset + (pixels * pixel + channel) * size + rest
            self._views[v] = View(result.root, offset, pixel, result.step)
        result.root.values.extend(root.values)

    def pixel(self, node: Node) -> int:
        """Elements between neighbouring pixels of `node` where it lies."""
        return self.view(node).pixel or math.prod(node.shape[-1:])

    def strides(self, node: Node) -> list[int]:
        """Elements between neighbours along each axis of `node` where it lies."""
        strides, pixel = row_strides(node.shape), self.view(node).pixel
        return [s // node.shape[-1] * pixel for s in strides[:-1]] + [1] if pixel else strides

    def pixel_strides(self, x: Node, node: Node) -> list[int]:
        """XS and YS of a kernel that reads `x` and writes `node`; nothing where both are dense."""
        return [self.pixel(x), self.pixel(node)] if self.view(x).pixel or self.view(node).pixel else []

    def is_view(self, node: Node) -> bool:
        """Whether `node` is a slice that lies inside its operand: nothing computes it."""
        return node in self._aliases

    def view(self, node: Node) -> View:
        """Where `node` lies; constants are placed in the weights when first used unpacked."""
        if node.is_const:
            if node not in self._const_roots:
                self._const_roots[node] = Root("weights", node.type.bytes, offset=self.weights.add(node.value))
            return View(self._const_roots[node])
        return self._views[node]
