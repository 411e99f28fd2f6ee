"""What decides whether a network may stop at an exit: functions that build ordinary nodes.

A criterion gives a score for every position of the exit's logits (one for a classifier); the least sure
position decides. What a criterion remembers from one exit to the next (a count, a sum) is a value like any
other, alive from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from skive import image_quality, ops
from skive.errors import ExitError
from skive.ir import Node, constant
from skive.types import DType


@dataclass
class Point:
    """An exit as a criterion sees it.

    `logits`: float32, the classes along the last axis; `normalised`: they are probabilities already. `extra`: the
    float32 tensor that the request names beside the exit (`q-exit@lambda0`). `numbers`: the numbers it gives instead
    (`gate@...`). `state`: what exits before this one with the same criterion left there.
    """

    name: str
    logits: Node
    extra: Node | None = None
    numbers: tuple[float, ...] = ()
    state: dict[str, Node] = field(default_factory=dict)
    normalised: bool = False

    @cached_property
    def probabilities(self) -> Node:
        """The logits' softmax; the logits themselves where the model ends in one."""
        return self.logits if self.normalised else ops.make("softmax", self.logits, axis=-1)

    @cached_property
    def log_probabilities(self) -> Node:
        """log of `probabilities`, at least -100, so that p log p of a class that is impossible is 0."""
        if self.normalised:
            floor = np.float32(1e-37)
            return ops.make("log", ops.make("max", self.logits, constant(np.asarray(floor))))
        return ops.make("max", ops.make("log_softmax", self.logits, axis=-1), number(-100.0))

    def needs_extra(self) -> Node:
        """The tensor beside the exit; ExitError if the request names none."""
        if self.extra is None:
            raise ExitError(f"exit {self.name}: this criterion reads a tensor of the model; name it behind @")
        return self.extra


Criterion = Callable[[Point], Node]
CRITERIA: dict[str, tuple[Criterion, str]] = {}  # name -> (function, how its score leaves)


def criterion(name: str, leaves: str) -> Callable[[Criterion], Criterion]:
    """Registers a criterion; `leaves`: the comparison of score and threshold that ends a call."""

    def register(fn: Criterion) -> Criterion:
        CRITERIA[name] = (fn, leaves)
        return fn

    return register


def number(value: float) -> Node:
    """A float32 constant."""
    return constant(np.asarray(value, np.float32))


def worst(scores: Node, leaves: str) -> Node:
    """The score [1] of the position that is least ready to leave."""
    axes = tuple(range(scores.type.rank))
    if scores.type.size > 1:
        scores = ops.make("reduce_min" if leaves[0] == ">" else "reduce_max", scores, axes=axes)
    return ops.make("reshape", scores, shape=(1,))


@criterion("max-prob", leaves=">")
def max_prob(at: Point) -> Node:
    """The largest class probability (Teerapittayanon et al., BranchyNet, 2016; Hendrycks and Gimpel, 2017)."""
    return ops.make("reduce_max", at.probabilities, axes=(at.logits.type.rank - 1,))


def _two_largest(at: Point) -> tuple[Node, Node]:
    two = ops.make("topk_values", at.probabilities, k=2)
    start = [0] * two.type.rank
    size = (*two.shape[:-1], 1)
    step = (1,) * two.type.rank
    return (ops.make("slice", two, start=tuple(start), size=size, step=step),
            ops.make("slice", two, start=(*start[:-1], 1), size=size, step=step))


@criterion("margin", leaves=">")
def margin(at: Point) -> Node:
    """The largest probability minus the second largest."""
    return ops.make("sub", *_two_largest(at))


def _entropy(log_p: Node) -> Node:
    terms = ops.make("mul", ops.make("exp", log_p), log_p)
    return ops.make("neg", ops.make("reduce_sum", terms, axes=(log_p.type.rank - 1,)))


@criterion("entropy", leaves="<")
def entropy(at: Point) -> Node:
    """The entropy of the class probabilities in nats (BranchyNet, 2016)."""
    return _entropy(at.log_probabilities)


@criterion("energy", leaves=">")
def energy(at: Point) -> Node:
    """log sum exp of the logits (Liu et al., Energy-based Out-of-distribution Detection, 2020)."""
    last = at.logits.type.rank - 1
    top = ops.make("reduce_max", at.logits, axes=(last,))
    rest = ops.make("reduce_sum", ops.make("exp", ops.make("sub", at.logits, top)), axes=(last,))
    return ops.make("add", top, ops.make("log", rest))


@criterion("patience", leaves=">=")
def patience(at: Point) -> Node:
    """How many exits in a row have agreed with the one before on the class (Zhou et al., BERT Loses Patience, 2020)."""
    best = ops.make("argmax", at.logits, axis=at.logits.type.rank - 1)
    agreed = constant(np.zeros(best.shape, np.float32))
    if "best" in at.state:
        same = ops.make("equal", best, at.state["best"])
        before = at.state["agreed"]
        one_more = number(1.0) if before.is_const else ops.make("add", before, number(1.0))
        agreed = ops.make("where", same, one_more, number(0.0))
    at.state |= {"best": best, "agreed": agreed}
    return agreed


@criterion("q-exit", leaves=">")
def q_exit(at: Point) -> Node:
    """The probability of having stopped by now, from the probability of stopping here (`@` names that tensor):
    sum of lambda_i prod (1 - lambda_j) over j < i (Balagansky and Gavrilov, PALBERT, 2022)."""
    here = at.needs_extra()
    stopped, left = here, ops.make("sub", number(1.0), here)
    if "left" in at.state:
        stopped = ops.make("add", at.state["stopped"], ops.make("mul", at.state["left"], here))
        left = ops.make("mul", at.state["left"], left)
    at.state |= {"left": left, "stopped": stopped}
    return stopped


def weights_and_bias(name: str, numbers: tuple[float, ...]) -> tuple[float, ...]:
    """The numbers of a gate; ExitError if they are not five."""
    if len(numbers) != 5:
        raise ExitError(f"exit {name}: gate needs four weights and a bias behind @, not {len(numbers)} numbers")
    return numbers


@criterion("gate", leaves=">=")
def gate(at: Point) -> Node:
    """A learned gate on four features of the class probabilities p: the largest, the entropy, the margin, and the
    entropy of p^2 (Regol et al., Jointly-Learned Exit and Inference, 2024). `@` gives four weights and a bias.

    The score is the probability of leaving here, given that no exit before was taken.
    """
    *weights, bias = weights_and_bias(at.name, at.numbers)
    first, second = _two_largest(at)
    squared = ops.make("log_softmax", ops.make("mul", at.log_probabilities, number(2.0)), axis=-1)
    features = [first, entropy(at), ops.make("sub", first, second), _entropy(ops.make("max", squared, number(-100.0)))]
    total = number(bias)
    for weight, feature in zip(weights, features, strict=True):
        total = ops.make("add", total, ops.make("mul", feature, number(weight)))
    opened = here = ops.make("sigmoid", total)
    left = ops.make("sub", number(1.0), here)
    if "left" in at.state:
        share = ops.make("min", opened, ops.make("sub", number(1.0), at.state["opened"]))
        here = ops.make("div", ops.make("max", share, number(0.0)), ops.make("max", at.state["left"], number(1e-12)))
        opened = ops.make("add", at.state["opened"], opened)
        left = ops.make("mul", at.state["left"], ops.make("sub", number(1.0), here))
    at.state |= {"opened": opened, "left": left}
    return here


def middle(name: str, numbers: tuple[float, ...]) -> float:
    """The number of a window; ExitError if there is not one."""
    if len(numbers) != 1:
        raise ExitError(f"exit {name}: window needs the middle of the window behind @, not {len(numbers)} "
                        "numbers; the threshold is half its width")
    return numbers[0]


@criterion("window", leaves=">")
def window(at: Point) -> Node:
    """How far the largest class probability lies from the middle of a window, which `@` gives: inside the window, where
    the answer is uncertain, the network goes on (Wang et al., Wisdom of Committees, 2022; Xia and Bouganis,
    Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023)."""
    return ops.make("abs", ops.make("sub", max_prob(at), number(middle(at.name, at.numbers))))


@criterion("quality", leaves=">=")
def quality(at: Point) -> Node:
    """The quality of an image without its original (`skive.image_quality`). `@`: pixels per side of the coder's blocks,
    8 (JPEG, the default) or 4 (HEVC)."""
    if at.numbers not in ((), (4.0,), (8.0,)):
        raise ExitError(f"exit {at.name}: quality takes blocks of 8 (JPEG) or 4 (HEVC) pixels behind @")
    return image_quality.nodes(at.name, at.logits, int(at.numbers[0]) if at.numbers else 8)


@criterion("score", leaves=">")
def score(at: Point) -> Node:
    """A tensor of the model, named behind @: whatever `forward` computes to judge its own answer."""
    return at.needs_extra()


def before_moves(value: Node, axis: int, moves: tuple[str, ...] = ("transpose",)) -> tuple[Node, int]:
    """What `value` is a transposition of, and the axis there that became `axis`."""
    axis %= max(1, value.type.rank)
    while value.op in moves:
        axis = value.attrs["perm"][axis] if value.op == "transpose" else axis
        value = value.inputs[0]
    return value, axis


def is_softmax(value: Node, axis: int) -> bool:
    """True for a softmax along `axis`."""
    return value.op == "softmax" and value.attrs["axis"] % value.type.rank == axis


def classes_last(value: Node, axis: int) -> Node:
    """`value` with `axis` moved to the end."""
    axis %= max(1, value.type.rank)
    if axis == value.type.rank - 1:
        return value
    order = (*(i for i in range(value.type.rank) if i != axis), axis)
    return ops.make("transpose", value, perm=order)


def as_float(value: Node) -> Node:
    """`value` as float32."""
    return value if value.dtype is DType.f32 else ops.make("cast", value, to=DType.f32)
