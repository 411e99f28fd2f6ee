"""Kernel calls as they are collected, and the table of what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from skive import exit_calls, ops
from skive import expr as expressions
from skive.errors import UnsupportedOpError
from skive.ir import Graph, Node
from skive.lower.abilities import is_integer_conv, is_integer_depthwise
from skive.lower.functors import fusible_operand, rounded_by_store, steps_of, sum_dtype, without_divisions
from skive.lower.storage import Guards, Loop, Root, Storage, View
from skive.plan import Access, Arg, Block, Call, Exit, Fn, Guard, Plan, Port, Stage, Step, aligned, place
from skive.program import ExitTest
from skive.targets.base import Target
from skive.tuning import Tuning
from skive.types import DType


class Lowering(Storage):
    """Collects the calls of one graph."""

    def __init__(self, graph: Graph, target: Target, threads: int, tuning: Tuning, loops: Sequence[Loop] = ()):
        super().__init__(graph, target.lanes, loops)
        self.target, self.threads, self.tuning = target, threads, tuning
        self.calls: list[Call] = []
        self.problems: list[tuple[str, str, str]] = []
        self._pending: list[tuple[list[tuple[Root, int, Arg]], int, tuple[bool, ...]]] = []
        self._stages: list[Stage] = []
        self._computed: list[Node] = []  # by each call
        self._repeated: list[tuple[int, int, Loop]] = []  # calls of a trip: the first, behind the last
        self.guards: Guards = ()  # of the calls that are appended next
        self.samples = 1  # for each of which these run

    def read(self, name: str, node: Node, strided: bool = False) -> tuple[View, Arg]:
        """An operand; `strided`: of a kernel that heeds `pixel(node)`."""
        assert strided or not self.view(node).pixel, f"{node.label()}: read as if its pixels were neighbours"
        return self.view(node), Arg(name, node.dtype.ctype, "")

    def write(self, name: str, node: Node, strided: bool = False) -> tuple[View, Arg]:
        """The result; `strided` as for `read`."""
        assert strided or not self.view(node).pixel, f"{node.label()}: written as if its pixels were neighbours"
        return self.view(node), Arg(name, node.dtype.ctype, "", const=False)

    def packed(self, name: str, array: np.ndarray) -> tuple[View, Arg]:
        """A constant in the layout its kernel reads."""
        return (
            View(Root("weights", array.nbytes, offset=self.weights.add(array))),
            Arg(name, DType.of(array.dtype).ctype, ""),
        )

    def temporary(self, name: str, nbytes: int) -> tuple[View, Arg]:
        """Memory that lives from the first to the last call that names it."""
        return View(self._new_root("arena", nbytes)), Arg(name, "unsigned char", "", const=False)

    def call(
        self,
        node: Node,
        kernel: str,
        header: str,
        template: Sequence[object],
        order: Sequence[str],
        args: Sequence[tuple[View, Arg]],
        fn: Fn | None = None,
        parallel: bool = True,
        scratch: int = 0,
    ) -> None:
        """Appends one kernel call that computes (a part of) `node`.

        `scratch`: bytes of working memory; the argument called `scratch` in `order`, null if 0.
        """
        index, samples = len(self.calls), self.samples
        if scratch:
            args = [
                *args,
                (View(self._new_root("arena", scratch)), Arg("scratch", "unsigned char", "", const=False)),
            ]
        else:
            order = ["nullptr" if o == "scratch" else o for o in order]
        moved = 0
        for view, _ in args:
            moved += view.root.bytes * (1 if view.step else samples)
            if view.root.block:
                view.root.block.first = min(view.root.block.first, 0 if view.step else index)
                view.root.block.last = max(view.root.block.last, index)
        conditions = [(self.view(c), Arg("", "bool", "")) for c, _ in self.guards]
        for view, _ in conditions:  # read by the host program right before the call
            if view.root.block:
                view.root.block.last = max(view.root.block.last, index)
        pending = [(v.root, v.offset, replace(a, step=v.step)) for v, a in (*args, *conditions)]
        self._computed.append(node)
        self._pending.append((pending, index, tuple(holds for _, holds in self.guards)))
        self.calls.append(
            Call(
                kernel,
                header,
                tuple(map(str, template)),
                tuple(order),
                (),
                fn,
                node.label(),
                node.op,
                ops.macs(node) * samples,
                moved,
                parallel,
                scratch,
                samples=samples,
            )
        )

    def end_loop(self, loop: Loop, first: int) -> None:
        """The calls since number `first` are one trip of `loop`: what it reads from in front stays to its end."""
        end = len(self.calls)
        self._repeated.append((first, end, loop))
        for root in self._roots:
            if root.block and root.block.first < first <= root.block.last:
                root.block.last = max(root.block.last, end - 1)

    def end_turns(self) -> None:
        """All calls so far run for every sample: what holds a batch of them stays to the last one."""
        end = len(self.calls) - 1
        for args, _, _ in self._pending:
            for root, _, arg in args:
                if arg.step and root.block:
                    root.block.last = max(root.block.last, end)

    def _write_outputs(self, numbers: Iterable[int]) -> None:
        """Copies these outputs out, unless their kernels wrote them in place."""
        for i in numbers:
            o = self.graph.outputs[i]
            view = self.view(o)
            if view.root.kind == "output" and view.root.index == i and view.offset == 0:
                continue
            target = View(self._new_root("output", o.type.bytes, i))
            if o.type.size:
                dense = f"Shape<{o.type.size}>"
                self.call(
                    o,
                    "copy_strided",
                    "copy.h",
                    [o.dtype.ctype, dense, dense, dense],
                    ["y", "x", "part"],
                    [self.read("x", o), (target, Arg("y", o.dtype.ctype, "", const=False))],
                )

    def end_stage(self, outputs: Sequence[bool], macs: tuple[int, int]) -> None:
        """What was lowered since the last stage's end is a stage, which gives these of the graph's outputs; `macs`:
        the fewest and the most multiply-accumulates of a call that ends here."""
        self._write_outputs(i for i, given in enumerate(outputs) if given)
        first = self._stages[-1].end if self._stages else 0
        before = sum(s.macs for s in self._stages)
        self._stages.append(Stage(first, len(self.calls), macs[1] - before, 0, macs[0]))

    def finish(self, exits: Sequence[ExitTest] = ()) -> Plan:
        """Places the blocks and resolves every argument."""
        graph = self.graph
        if not exits:
            self._write_outputs(range(len(graph.outputs)))
        if self.problems:
            raise UnsupportedOpError(self.problems)
        blocks = [b for r in self._roots if (b := r.block) and b.last >= 0]
        size, bound = place(blocks)
        calls = list(self.calls)
        for args, index, holds in self._pending:
            resolved = []
            for root, offset, arg in args:
                base = root.block.offset if root.block else root.offset
                resolved.append(replace(arg, kind=root.kind, index=root.index, offset=base + offset))
            own = len(resolved) - len(holds)
            guards = tuple(Guard(a, h) for a, h in zip(resolved[own:], holds, strict=True))
            calls[index] = replace(calls[index], args=tuple(resolved[:own]), guards=guards)
        ports = [
            tuple(Port(name, n.shape, n.dtype.numpy.name, n.type.bytes) for name, n in side)
            for side in (
                [(n.name, n) for n in graph.inputs],
                list(zip(graph.output_names, graph.outputs, strict=True)),
            )
        ]
        stages, ways, steps = self._host_program(exits, blocks)
        calls, stages = self._all_trips(calls, stages)
        return Plan(
            graph.name,
            self.target.name,
            self.threads,
            ports[0],
            ports[1],
            tuple(calls),
            self.weights.blob(),
            size,
            bound,
            graph.batch_max,
            stages,
            ways,
            steps,
        )

    def _all_trips(self, calls: Sequence[Call], stages: Sequence[Stage]) -> tuple[list[Call], tuple[Stage, ...]]:
        """The calls with those of a trip once for each trip, and the stages of these."""
        found: list[Call] = []
        ends = [0]  # for a number of calls with one trip, how many those are with all
        loops = {first: (end, loop) for first, end, loop in self._repeated}
        while len(ends) <= len(calls):
            first = len(ends) - 1
            end, loop = loops.get(first, (first + 1, None))
            for names in loop.names if loop else ({},):
                found += [replace(c, origin=names.get(n, c.origin))
                          for c, n in zip(calls[first:end], self._computed[first:end], strict=True)]
            ends += [len(found)] * (end - first)
        return found, tuple(replace(s, first=ends[s.first], end=ends[s.end]) for s in stages)

    def _host_program(
        self, exits: Sequence[ExitTest], blocks: Sequence[Block]
    ) -> tuple[tuple[Stage, ...], tuple[Exit, ...], tuple[Step, ...]]:
        """The stages with what they need of the arena, the exits, and the order of both."""
        number = {n: i for i, n in enumerate(self.graph.output_names)}
        stages = tuple(
            replace(s, arena_bytes=max((b.offset + aligned(b.bytes) for b in blocks if b.first < s.end), default=0))
            for s in self._stages
        )
        ways = tuple(
            Exit(e.name, tuple(number[n] for n in e.outputs), e.criterion,
                 number[e.score] if e.score else None, e.test if e.score else "", e.threshold, e.scale,
                 exit_calls.code(e.test, e.threshold, e.scale) if e.scale is not None else None)
            for e in exits
        )
        steps = [
            step
            for i, way in enumerate(ways)
            for step in (Step("call", i), Step("return" if way.score is None else "leave", i))
        ]
        return stages, ways, tuple(steps)

    def epilogue(self, node: Node) -> tuple[Fn, list[tuple[View, Arg]]]:
        """The functor of `node`'s epilogue and the pointers it reads."""
        text = node.attrs.get("epilogue", "")
        if not text:
            return Fn((), (Access("value"),), True, True), []
        e = expressions.parse(text)
        extras = node.inputs[ops.op_of(node.op).epilogue or 0 :]
        operands, args = [Access("value")], []
        for i, extra in enumerate(extras, 1):
            access = fusible_operand(extra, node)
            assert access is not None, "legalise() lets only fusible epilogues through"
            if access.mode != "literal":
                access = replace(access, arg=f"e{i}")
                if access.mode in ("full", "sample"):
                    access = replace(access, stride=self.pixel(extra))
                args.append(self.read(f"e{i}", extra, strided=access.mode in ("full", "sample")))
            operands.append(access)
        types = [sum_dtype(node), *(i.dtype for i in extras)]
        steps = without_divisions(e, steps_of(e, types), [None, *extras])
        if is_integer_conv(node) or is_integer_depthwise(node):
            steps = rounded_by_store(node, e, steps, operands, types)
        elif node.op in ("group_norm", "l2_norm", "layer_norm", "rms_norm"):
            steps = rounded_by_store(None, e, steps, operands, types)
        return Fn(steps, tuple(operands), True, True), args


LOWER: dict[str, Callable[[Lowering, Node], None]] = {}


def lowers(*names: str) -> Callable[[Callable[[Lowering, Node], None]], Callable[[Lowering, Node], None]]:
    """Registers the lowering of operations."""

    def register(fn: Callable[[Lowering, Node], None]) -> Callable[[Lowering, Node], None]:
        for n in names:
            LOWER[n] = fn
        return fn

    return register
