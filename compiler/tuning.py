"""Compile-time tuning: which of the ways to compute a layer is the fastest on this processor.

Lowering asks a `Tuning` for each contraction: the first variant is what the rules of `pack` and
`targets` choose, the others are candidates. `tune` compiles the candidates of many layers into one
library, times each call, and keeps what it measured in the table of `speed`, so that a layer is measured
once for each processor. The space is small on purpose (a handful of blocks that fit the register file,
direct or Winograd), after Jia et al., Empowering In-Browser Deep Learning Inference on Edge Devices with
Just-in-Time Kernel Optimizations, 2024: dozens of candidates find what thousands do.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from skive import expr as expressions
from skive import pack
from skive.ir import Graph, Node
from skive.targets.base import Target
from skive.types import DType

if TYPE_CHECKING:
    from skive.plan import Call, Plan
    from skive.speed import SpeedTable

log = logging.getLogger("skive.tuning")

FASTER = 0.97  # a candidate must take at most this share of what the default takes
MEASURE_SECONDS = 1.5  # for one library of candidates
BATCH = 24  # kernels of one library: the more, the fewer libraries; the fewer, the closer to the time limit
BLOCKS = (1, 2, 3, 4)  # registers of output channels

Progress = Callable[[str, float], None]


class Variant(NamedTuple):
    """One way to compute a contraction: the kernel and its block of output channels."""

    kernel: str
    block: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.block}"


def contraction_variants(node: Node, target: Target) -> list[Variant]:
    """The variants of a dense or grouped `conv2d`, `linear` or `conv_transpose2d` that has a packed kernel.

    The first is the one that is taken without measuring.
    """
    x, w = node.inputs[:2]
    oc, size, isa = w.shape[0] // node.attrs.get("groups", 1), x.dtype.bytes, target.name
    depth = w.type.size // w.shape[0]
    direct = "conv_transpose2d" if node.op == "conv_transpose2d" else "conv2d"
    if node.op == "conv2d" and node.attrs["groups"] > 1:
        direct = "grouped_conv2d"
    if node.op == "conv_transpose2d":
        block = pack.conv2d_block(oc, isa, element_size=size)
    else:
        pixels = math.prod(node.shape[:-1])
        block = pack.conv2d_block(oc, isa, pixels, element_size=size, depth=depth)
    whole = -(-oc // 4) * 4
    blocks = dict.fromkeys([block, *(min(n * target.lanes, whole) for n in BLOCKS)])
    found = [Variant(direct, b) for b in blocks]
    if node.op == "conv2d" and x.dtype is DType.f32 and target.winograd_pays(node):
        best = pack.winograd_block(oc, isa)
        found = [*(Variant("winograd2d", b) for b in dict.fromkeys([best, *blocks]) if b <= best), *found]
    return found


def layer_key(node: Node) -> str:
    """Text that is equal for contractions with the same answer: types, shapes, attributes, fused steps."""
    attrs = {k: v for k, v in node.attrs.items() if k not in ("epilogue", "zero")}
    epilogue = node.attrs.get("epilogue", "")
    steps = "+".join(s.op for s in expressions.parse(epilogue).steps) if epilogue else ""
    settings = ",".join(f"{k}={json.dumps(v)}" for k, v in attrs.items())
    return f"{node.op} {node.inputs[0].type} {node.inputs[1].type} {settings} {steps}".replace('"', "").strip()


@dataclass
class Tuning:
    """What lowering asks: the chosen variant by layer key; layers that are not in it take the first."""

    choices: Mapping[str, Variant] = field(default_factory=dict)

    def choose(self, node: Node, variants: Sequence[Variant]) -> Variant:
        wanted = self.choices.get(layer_key(node), variants[0]) if self.choices else variants[0]
        return wanted if wanted in variants else variants[0]

    def to_json(self) -> dict[str, str]:
        return {k: str(v) for k, v in sorted(self.choices.items())}

    @staticmethod
    def from_json(d: Mapping[str, str]) -> Tuning:
        pairs = ((k, v.rpartition(" ")) for k, v in d.items())
        return Tuning({k: Variant(kernel, int(block)) for k, (kernel, _, block) in pairs})


@dataclass
class _Trial(Tuning):
    """Takes variant number `turn` of each layer, where there is one, and notes who asked."""

    turn: int = 0
    asked: list[tuple[str, tuple[Variant, ...]]] = field(default_factory=list)

    def choose(self, node: Node, variants: Sequence[Variant]) -> Variant:
        self.asked.append((layer_key(node), tuple(variants)))
        return variants[self.turn] if self.turn < len(variants) else variants[0]


@dataclass
class _Layer:
    """One layer key: how often it occurs, and the call of each variant."""

    count: int
    calls: dict[Variant, Call] = field(default_factory=dict)


def _layers(graph: Graph, target: Target, threads: int) -> dict[str, _Layer]:
    """Every layer with a choice, with the calls that the variants are lowered to."""
    from skive.lower import lower

    found: dict[str, _Layer] = {}
    for turn in itertools.count():
        trial = _Trial(turn=turn)
        plan = lower(graph, target, threads, trial)
        kernels = {v.kernel for _, variants in trial.asked for v in variants}
        calls = [c for c in plan.calls if c.kernel in kernels and c.op in ("conv2d", "linear", "conv_transpose2d")]
        for (key, variants), call in zip(trial.asked, calls, strict=True):
            layer = found.setdefault(key, _Layer(0))
            layer.count += turn == 0
            if turn < len(variants):
                layer.calls.setdefault(variants[turn], call)
        if turn + 1 >= max((len(variants) for _, variants in trial.asked), default=0):
            return {k: v for k, v in found.items() if len(v.calls) > 1}
    raise AssertionError("unreachable")


def tune(
    graph: Graph,
    target: Target,
    threads: int,
    seconds: float,
    progress: Progress = lambda step, fraction: None,
    table: SpeedTable | None = None,
) -> Tuning:
    """The fastest variant of each layer of the fused `graph`, as far as `seconds` of measuring go.

    Layers that take most of the time are measured first; what the table knows already costs nothing.
    """
    from skive import speed

    started, rate = time.perf_counter(), speed.COMPILED_PER_SECOND
    table = table or speed.SpeedTable(target, threads)
    layers = _layers(graph, target, threads)

    def expected(layer: _Layer) -> float:
        return layer.count * table.us(next(iter(layer.calls.values())))

    waiting = sorted((k for k, v in layers.items() if any(c not in table for c in v.calls.values())),
                     key=lambda k: -expected(layers[k]))  # fmt: skip
    total = len(waiting)
    while waiting:
        left = seconds - (time.perf_counter() - started)
        room = min(BATCH, int((left - MEASURE_SECONDS) * rate))
        batch: list[str] = []
        while waiting and len(batch) < len(waiting) and sum(
            len(layers[k].calls) for k in [*batch, waiting[0]]
        ) <= max(room, 0):
            batch.append(waiting.pop(0))
        if not batch:
            break
        # Turn by turn over the layers, so that no variant finds its operands where the one before left them.
        rows = [list(layers[k].calls.values()) for k in batch]
        ordered = [(i, r[t]) for t in range(max(map(len, rows))) for i, r in enumerate(rows) if t < len(r)]
        begun = time.perf_counter()
        us, _ = speed.measure(_bench(ordered, graph.name, target, threads), target, MEASURE_SECONDS)
        rate = len(ordered) / max(time.perf_counter() - begun - MEASURE_SECONDS, 0.1)
        for (_, call), t in zip(ordered, us, strict=True):
            table.add(call, float(t))
        table.save()
        progress("tune", 0.25 + 0.05 * (1 - len(waiting) / total))
    choices = {}
    for key, layer in layers.items():
        if all(c in table for c in layer.calls.values()):
            default = next(iter(layer.calls))
            best = min(layer.calls, key=lambda v: table.us(layer.calls[v]))
            if table.us(layer.calls[best]) <= FASTER * table.us(layer.calls[default]):
                choices[key] = best
    log.info("%s: %d of %d layers measured", graph.name, len(layers) - len(waiting), len(layers))
    return Tuning(choices)


def _bench(calls: Sequence[tuple[int, Call]], name: str, target: Target, threads: int) -> Plan:
    """A plan of (layer number, call) pairs on zeros: each layer with room of its own for its weights."""
    from skive.plan import Plan, aligned

    room: dict[int, int] = {}
    for layer, call in calls:
        room[layer] = max(room.get(layer, 0), aligned(call.bytes))
    starts = dict(zip(room, itertools.accumulate(room.values(), initial=0)))
    placed = []
    for layer, call in calls:
        # All that a call touches is an upper bound for each operand of it.
        others = [a.name for a in call.args if a.kind != "weights"]
        args = [
            replace(a, offset=starts[layer])
            if a.kind == "weights"
            else replace(a, kind="arena", index=0, offset=others.index(a.name) * aligned(call.bytes))
            for a in call.args
        ]
        placed.append(replace(call, args=tuple(args)))
    arena = max(aligned(c.bytes) * len(c.args) for c in placed)
    return Plan(name, target.name, threads, (), (), tuple(placed), bytes(sum(room.values())), arena, arena)
