"""The criteria of early exits on integers, for artefacts without a float instruction.

What `criteria` says in real numbers, here of an exit's logits as bytes. A score is an i32 of at most 24 bits, real =
scale * score, so that float32 holds every score and every comparison with a threshold exactly
(`exit_calls.code`). Probabilities count 2^-24; sums of products run in 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import criteria, ops
from skive.errors import ExitError
from skive.exit_calls import LARGEST
from skive.ir import Node, constant
from skive.passes.integer_only import exponentials
from skive.types import DType

if TYPE_CHECKING:
    from skive.exits import Exit

ONE = 2**24  # a probability of 1
UNIT = 1 / ONE
NATS = 2.0**-20  # of an entropy and of a gate's sum
PIECES = 64  # of the logistic function, for each 1 of its argument,
SATURATED = 16  # which from here on is within 2^-23 of 0 or 1

Score = tuple[Node, float]  # integers of 32 or 64 bits, and the real number that a 1 stands for


@dataclass
class IntegerPoint:
    """An exit as a criterion on integers sees it.

    `logits`: bytes, real = scale * (integer - zero), the classes along the last axis. `extra`: the tensor that the
    request names beside the exit. `numbers`, `state`: as in `criteria.Point`.
    """

    name: str
    logits: Node
    scale: float
    zero: int
    extra: Score | None = None
    numbers: tuple[float, ...] = ()
    state: dict[str, Node] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The axis of the classes."""
        return self.logits.type.rank - 1

    @cached_property
    def probabilities(self) -> Node:
        """The softmax of the logits in units of 2^-24, each within 3/4 of a unit and C 2^-31 of itself."""
        return self.softmax(1)

    def softmax(self, power: int) -> Node:
        """i32: the probabilities to this power, divided by their sum."""
        table = constant(exponentials(power * self.scale))
        return ops.make("integer_softmax", self.logits, table, axis=-1, levels=ONE, to=DType.i32)

    @cached_property
    def below(self) -> Node:
        """i64: how many steps each logit lies below the largest."""
        top = ops.make("reduce_max", self.logits, axes=(self.last,))
        return wide(ops.make("sub", top, self.logits))

    def surprise(self, p: Node) -> Node:
        """i64 [..., 1] -log of the largest of `p` in units of 2^-24 / log2(e)."""
        top = ops.make("reduce_max", p, axes=(self.last,))
        return wide(ops.make("sub", whole(24 * ONE), ops.make("log2_fixed", top)))

    def entropy(self, power: int = 1) -> Node:
        """i64 [..., 1] in units of NATS: with d = log(max p / p) that of p is sum(p d) - log(max p)."""
        p = self.probabilities if power == 1 else self.softmax(power)
        total = ops.make("reduce_sum", ops.make("mul", wide(p), self.below), axes=(self.last,))
        spread = times(total, power * self.scale * UNIT / NATS, 2.0**33)
        return ops.make("add", spread, times(self.surprise(p), math.log(2) * UNIT / NATS, 2.0**29))

    def needs_extra(self) -> Score:
        """The tensor beside the exit; ExitError if the request names none."""
        if self.extra is None:
            raise ExitError(f"exit {self.name}: this criterion reads a tensor of the model; name it behind @")
        return self.extra


CRITERIA: dict[str, Callable[[IntegerPoint], Score]] = {}


def criterion(name: str) -> Callable[[Callable[[IntegerPoint], Score]], Callable[[IntegerPoint], Score]]:
    """Registers the integer form of the criterion `name`."""

    def register(fn: Callable[[IntegerPoint], Score]) -> Callable[[IntegerPoint], Score]:
        CRITERIA[name] = fn
        return fn

    return register


def require_forms(exits: Sequence[Exit]) -> None:
    """ExitError for an exit whose criterion has no integer form."""
    for e in exits:
        if e.criterion not in CRITERIA:
            what = "a function builds float32 scores" if callable(e.criterion) else f"{e.criterion} has no integer form"
            raise ExitError(f"exit {e.output}: {what}, and integer_only excludes float32; choose one of "
                            f"{', '.join(CRITERIA)}, or leave integer_only out")


def whole(value: float, dtype: DType = DType.i32) -> Node:
    """An integer constant, `value` rounded."""
    return constant(np.asarray(round(value), dtype.numpy))


def wide(x: Node) -> Node:
    """`x` in 64 bits."""
    return ops.make("cast", x, to=DType.i64)


def long(value: float) -> Node:
    """A constant of 64 bits, `value` rounded."""
    return whole(value, DType.i64)


def times(x: Node, factor: float, reach: float) -> Node:
    """`x` (i64, |x| <= reach) times `factor`, which is cut to what leaves the product in 63 bits; rounded half up."""
    shift = min(62, 61 - math.ceil(math.log2(reach)) - math.frexp(factor)[1])
    if shift < 1:
        raise ExitError(f"a factor of {factor:g} leaves 64 bits: the logits are too large for integer_only")
    product = ops.make("mul", x, long(math.ldexp(factor, shift)))
    return ops.make("shift_right", ops.make("add", product, long(2 ** (shift - 1))), long(shift))


def multiplied(a: Node, b: Node) -> Node:
    """The product of two probabilities, i64 in units of 2^-24."""
    return ops.make("shift_right", ops.make("mul", a, b), long(24))


def bounded(x: Node, low: int, high: int) -> Node:
    return ops.make("clip", x, lo=low, hi=high)


def softmax_input(name: str, output: Node, axis: int) -> tuple[Node, float, int, int] | None:
    """(bytes, scale, zero point, axis of the classes) whose softmax the quantized `output` of exit `name` is; None if
    it is something else. Its own bytes would tell 256 probabilities apart. ExitError if there are no such bytes."""
    rounded, axis = criteria.before_moves(output, axis, ("transpose", "clip"))
    if rounded.op != "quantize":
        return None
    normal, axis = criteria.before_moves(rounded.inputs[0], axis)
    if not criteria.is_softmax(normal, axis):
        return None
    real, axis = criteria.before_moves(normal.inputs[0], axis)
    if real.op != "dequantize" or real.inputs[0].dtype not in (DType.u8, DType.i8) or real.inputs[1].type.size != 1:
        raise ExitError(f"exit {name} ends in a softmax of values that are not stored as bytes; name what goes into it")
    q, scale, zero = real.inputs
    return q, float(scale.value.item()), int(zero.value.item()), axis


def integers(name: str, value: Node, port: Mapping[str, Any] | None) -> Score:
    """A tensor beside an exit, i32 saturated to 24 bits, and its scale: 1 for what is not quantized."""
    if port is None and value.dtype.is_float:
        raise ExitError(f"exit {name}: the tensor beside it is {value.type}, not integers")
    value = ops.make("cast", bounded(wide(value), -LARGEST // 2, LARGEST // 2), to=DType.i32)
    if port and port["zero"]:
        value = ops.make("sub", value, whole(port["zero"]))
    return value, port["scale"] if port else 1.0


def finished(score: Score) -> Score:
    """A score as i32 of at most 24 bits."""
    node, scale = score
    if node.dtype is DType.i64:
        node = ops.make("cast", bounded(node, -LARGEST, LARGEST), to=DType.i32)
    return node, scale


# -------------------------------------------------------------------------------- the criteria


def _two_largest(at: IntegerPoint) -> tuple[Node, Node]:
    two = ops.make("topk_values", at.probabilities, k=2)
    size, step = (*two.shape[:-1], 1), (1,) * two.type.rank
    first, second = (ops.make("slice", two, start=(*(0,) * at.last, i), size=size, step=step) for i in (0, 1))
    return first, second


@criterion("max-prob")
def max_prob(at: IntegerPoint) -> Score:
    """The largest probability."""
    return ops.make("reduce_max", at.probabilities, axes=(at.last,)), UNIT


@criterion("margin")
def margin(at: IntegerPoint) -> Score:
    """The largest probability minus the second largest."""
    return ops.make("sub", *_two_largest(at)), UNIT


@criterion("entropy")
def entropy(at: IntegerPoint) -> Score:
    """The entropy of the probabilities."""
    return at.entropy(), NATS


@criterion("energy")
def energy(at: IntegerPoint) -> Score:
    """log sum exp of the logits: the largest, plus -log of its probability. As fine as 24 bits allow."""
    limits = np.iinfo(at.logits.dtype.numpy)
    reach = at.scale * max(at.zero - int(limits.min), int(limits.max) - at.zero) + math.log(at.logits.shape[-1])
    unit = 2.0 ** max(-20, math.ceil(math.log2(reach + 1)) - 24)
    top = wide(ops.make("reduce_max", at.logits, axes=(at.last,)))
    top = times(ops.make("sub", top, long(at.zero)), at.scale / unit, 2.0**9)
    rest = times(at.surprise(at.probabilities), math.log(2) * UNIT / unit, 2.0**29)
    return ops.make("add", top, rest), unit


@criterion("patience")
def patience(at: IntegerPoint) -> Score:
    """How many exits in a row have agreed with the one before on the class."""
    best = ops.make("argmax", at.logits, axis=at.last)
    agreed = constant(np.zeros(best.shape, np.int32))
    if "best" in at.state:
        before = at.state["agreed"]
        one_more = whole(1) if before.is_const else ops.make("add", before, whole(1))
        agreed = ops.make("where", ops.make("equal", best, at.state["best"]), one_more, whole(0))
    at.state |= {"best": best, "agreed": agreed}
    return agreed, 1.0


@criterion("q-exit")
def q_exit(at: IntegerPoint) -> Score:
    """The probability of having stopped by now; that of stopping here is held to 0 to 1."""
    tensor, scale = at.needs_extra()
    here = bounded(times(wide(tensor), scale / UNIT, 2.0**24), 0, ONE)
    stopped, left = here, ops.make("sub", long(ONE), here)
    if "left" in at.state:
        stopped = ops.make("add", at.state["stopped"], multiplied(at.state["left"], here))
        left = multiplied(at.state["left"], left)
    at.state |= {"left": left, "stopped": stopped}
    return stopped, UNIT


def _logistic(x: Node) -> Node:
    """1 / (1 + exp(-x)) in units of 2^-24, i64, of `x` in units of NATS: lines between the points of a table, which
    are 2^-18 off at most."""
    points = 1 / (1 + np.exp(-np.arange(-SATURATED * PIECES, SATURATED * PIECES + 1) / PIECES))
    table = constant(np.rint(points * ONE).astype(np.int32))
    bits = round(math.log2(1 / NATS / PIECES))
    end = int(SATURATED / NATS)
    place = ops.make("add", bounded(x, -end, end - 1), long(end))
    piece = ops.make("shift_right", place, long(bits))
    left = wide(ops.make("gather", table, piece, axis=0))
    right = wide(ops.make("gather", table, ops.make("add", piece, long(1)), axis=0))
    part = ops.make("mul", ops.make("sub", right, left), ops.make("bit_and", place, long(2**bits - 1)))
    return ops.make("add", left, ops.make("shift_right", ops.make("add", part, long(2 ** (bits - 1))), long(bits)))


@criterion("gate")
def gate(at: IntegerPoint) -> Score:
    """The learned gate: features in units of 2^-24 and NATS, their sum in NATS."""
    *weights, bias = criteria.weights_and_bias(at.name, at.numbers)
    first, second = _two_largest(at)
    features = [(wide(first), UNIT), (at.entropy(), NATS), (wide(ops.make("sub", first, second)), UNIT),
                (at.entropy(2), NATS)]
    total = long(bias / NATS)
    for weight, (feature, unit) in zip(weights, features, strict=True):
        if weight:
            total = ops.make("add", total, times(feature, weight * unit / NATS, 2.0**25))
    opened = here = _logistic(total)
    left = ops.make("sub", long(ONE), here)
    if "left" in at.state:
        share = ops.make("min", opened, ops.make("sub", long(ONE), at.state["opened"]))
        share = ops.make("shift_left", ops.make("max", share, long(0)), long(24))
        here = bounded(ops.make("div", share, ops.make("max", at.state["left"], long(1))), 0, ONE)
        opened = ops.make("add", at.state["opened"], opened)
        left = multiplied(at.state["left"], ops.make("sub", long(ONE), here))
    at.state |= {"opened": opened, "left": left}
    return here, UNIT


@criterion("window")
def window(at: IntegerPoint) -> Score:
    """How far the largest probability lies from the middle of the window."""
    return ops.make("abs", ops.make("sub", max_prob(at)[0], whole(criteria.middle(at.name, at.numbers) * ONE))), UNIT


@criterion("score")
def score(at: IntegerPoint) -> Score:
    """A tensor of the model, in its own steps."""
    return at.needs_extra()
