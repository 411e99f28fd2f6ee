"""The plan: what the artefact does, as plain data. The narrow waist between lowering and emission.

A plan is a list of kernel calls on buffers with fixed places. It names kernels, template arguments
and byte offsets, knows nothing of the IR, and can be written as JSON.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

IMPROVEMENTS = 1000  # moves tried on an arena that is larger than its lower bound
ALIGN = 64  # bytes: one cache line and one AVX-512 register


def aligned(n: int) -> int:
    """`n` bytes rounded up to whole cache lines."""
    return -(-n // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Arg:
    """A pointer parameter: `kind` is input, output, arena or weights; `index` the input or output
    ordinal; `offset` in bytes from there; `step` bytes between the samples of a call that runs for each."""

    name: str
    ctype: str
    kind: str
    index: int = 0
    offset: int = 0
    const: bool = True
    step: int = 0


@dataclass(frozen=True, slots=True)
class Access:
    """How a fused expression reads operand `arg` at output position (pixel, channel).

    mode: `value` (a lambda parameter, the case of a map), `full` (pixel * stride + channel),
    `channel`, `scalar`, `pixel` (one value for all channels), `sample` (pixel / pixels * stride +
    channel: one row of channels per image), `literal` (the C++ literal `text`).
    """

    mode: str
    arg: str = ""
    stride: int = 0
    pixels: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class FnStep:
    """`name(args..., tail...)`: args are `x<i>` or `t<i>`, the tail is literal C++ text. `table`: float32
    literals of a constant array that is the last argument, if there are any."""

    name: str
    args: tuple[str, ...]
    tail: tuple[str, ...] = ()
    table: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fn:
    """A fused expression. `operands[i]` says how `x<i>` is read; in an epilogue `x0` is the
    accumulator. `vector`: the values are Vec<N>, else scalars."""

    steps: tuple[FnStep, ...]
    operands: tuple[Access, ...]
    epilogue: bool
    vector: bool


@dataclass(frozen=True, slots=True)
class Guard:
    """A call runs only if the bool at `arg` is `holds`."""

    arg: Arg
    holds: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: `kernel<template...>::run(args..., part, fn)`.

    `order` is the spelling of the argument list: argument names, `part`, `fn`, literals. `samples`: neighbouring
    calls of more than one run one behind the other for the first sample, then for the next; `macs` and `bytes` are
    those of all. They are the first ones of a plan.
    """

    kernel: str
    header: str
    template: tuple[str, ...]
    order: tuple[str, ...]
    args: tuple[Arg, ...]
    fn: Fn | None = None
    origin: str = ""
    op: str = ""
    macs: int = 0
    bytes: int = 0
    parallel: bool = True
    scratch_bytes: int = 0  # given to the kernel; the emitted code asserts that it is enough
    guards: tuple[Guard, ...] = ()
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Port:
    """A graph input or output as the caller sees it; `bytes` of one sample. Integers that stand for real numbers
    have a `scale`: real = scale (integer - zero)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    scale: float | None = None
    zero: int | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Calls `first` to `end` - 1: a straight line. `arena_bytes`: of the arena that is used from the start up to here;
    `macs` of this stage alone, `least_macs` from the start up to here on the cheapest way through branches."""

    first: int
    end: int
    macs: int
    arena_bytes: int
    least_macs: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """One result of a network with early exits: the numbers of its `outputs`; `score` is the number of the output
    that is compared with the threshold, None of the last exit. Where scores are integers, a 1 stands for `scale`, and
    `code` is what they are compared with."""

    name: str
    outputs: tuple[int, ...]
    criterion: str = ""
    score: int | None = None
    test: str = ""
    threshold: float = 0.0
    scale: float | None = None
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the host program. `call`: run stage `index`; `leave`: end with exit `index` if its test holds;
    `return`: end with exit `index`."""

    op: str
    index: int


@dataclass(frozen=True)
class Plan:
    """A network on the target `isa`: `calls` in order, with their places in an arena of `arena_bytes` and in the blob
    of packed `weights`. `arena_lower_bound`: what no placement can do without."""

    name: str
    isa: str
    threads: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: tuple[Call, ...]
    weights: bytes
    arena_bytes: int
    arena_lower_bound: int
    batch_max: int | None = None
    stages: tuple[Stage, ...] = ()  # of a network with early exits; empty without
    exits: tuple[Exit, ...] = ()
    host: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-compatible data."""
        d = asdict(self)
        d["weights"] = len(self.weights)
        return d


class WeightPool:
    """Packed constants, each content once, each at a 64-byte boundary."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._offsets: dict[bytes, int] = {}
        self._size = 0

    def add(self, array: np.ndarray) -> int:
        """The byte offset of `array` in the blob."""
        data = np.ascontiguousarray(array).tobytes()
        if data not in self._offsets:
            self._offsets[data] = self._size
            self._chunks.append(data + b"\0" * (aligned(len(data)) - len(data)))
            self._size += aligned(len(data))
        return self._offsets[data]

    def blob(self) -> bytes:
        """All constants, each at its offset."""
        return b"".join(self._chunks)


@dataclass(slots=True)
class Block:
    """A piece of the arena that lives from call `first` to call `last`, both included."""

    bytes: int
    first: int
    last: int
    offset: int = field(default=-1)


def place(blocks: list[Block]) -> tuple[int, int]:
    """Gives every block an offset so that blocks alive together do not overlap.

    Returns (arena bytes, lower bound): the bound is the largest sum of live blocks at any call.
    Greedy best fit in several orders (Pisarchyk, Lee: Efficient Memory Management for Deep Neural
    Net Inference, 2020, find size order near optimal); where none reaches the bound, the best order
    is improved by moving single blocks to another turn or end of their gap, with a fixed seed.
    """
    live = [b for b in blocks if b.bytes]
    events: dict[int, int] = {}
    for b in live:
        events[b.first] = events.get(b.first, 0) + aligned(b.bytes)
        events[b.last + 1] = events.get(b.last + 1, 0) - aligned(b.bytes)
    bound = total = 0
    for t in sorted(events):
        total += events[t]
        bound = max(bound, total)
    keys = [
        lambda b: (-b.bytes, b.first),
        lambda b: (b.first, -b.bytes),
        lambda b: (-(b.last - b.first), -b.bytes),
        lambda b: (-b.bytes * (b.last - b.first + 1), b.first),
    ]
    tried = []
    for key in keys:
        order = sorted(range(len(live)), key=lambda i: key(live[i]))
        tried.append((*_best_fit(order, live, bound, frozenset())[::-1], order))
    height, offsets, _ = min(tried, key=lambda t: t[0])
    rng = random.Random(0)
    for start_height, start_offsets, start in tried:
        if height == bound:
            break
        climbed = _improve(start_height, start_offsets, start, live, bound, rng)
        height, offsets = min((height, offsets), climbed, key=lambda t: t[0])
    for b, offset in zip(live, offsets, strict=True):
        b.offset = offset
    for b in blocks:
        if not b.bytes:
            b.offset = 0
    return height, bound


def _improve(
    height: int, offsets: list[int], order: list[int], live: list[Block], bound: int, rng: random.Random
) -> tuple[int, list[int]]:
    """(height, offsets) after moves that never raise the height."""
    high: frozenset[int] = frozenset()
    for _ in range(min(IMPROVEMENTS, 1_000_000 // (len(live) ** 2 + 1))):
        new_order, new_high = order.copy(), high
        if rng.random() < 0.5:
            new_order.insert(rng.randrange(len(live)), new_order.pop(rng.randrange(len(live))))
        else:
            new_high = high ^ {rng.randrange(len(live))}
        new_offsets, new_height = _best_fit(new_order, live, bound, new_high)
        if new_height <= height:
            height, offsets, order, high = new_height, new_offsets, new_order, new_high
        if height == bound:
            break
    return height, offsets


def _best_fit(
    order: list[int], blocks: list[Block], bound: int, high: frozenset[int]
) -> tuple[list[int], int]:
    """(offsets, height) of placing blocks in `order`, each into the smallest gap below `bound` that
    holds it (at the gap's upper end if in `high`), or on top of what is there."""
    placed: list[int] = []
    offsets = [0] * len(blocks)
    height = 0
    for i in order:
        b = blocks[i]
        size = aligned(b.bytes)
        taken = sorted(
            (offsets[j], offsets[j] + aligned(blocks[j].bytes))
            for j in placed
            if blocks[j].first <= b.last and b.first <= blocks[j].last
        )
        at, gap, end = None, None, 0
        for lo, hi in [*taken, (bound, 0)]:  # the bound ends a gap and takes no room
            room = min(lo, bound) - end
            if room >= size and (gap is None or room < gap):
                at, gap = (end + room - size if i in high else end), room
            end = max(end, hi)
        offsets[i] = end if at is None else at
        height = max(height, offsets[i] + size)
        placed.append(i)
    return offsets, height
