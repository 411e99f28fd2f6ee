"""`skive.Sparsify`: what is asked for when blocks of weights become zero, which do, and weights that make up for them.

A layer stays as large as it is: the zeros are ordinary weights, and lowering finds them (`lower/sparse.py`).
Functions that take weights expect [OC, KH, KW, IC], or [OC, IC] of a fully connected layer; torch's
[OC, IC, KH, KW] is `w.permute(0, 2, 3, 1)`.
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skive import ops
from skive.errors import PruningError
from skive.ir import Graph, Node, constant, rebuilt
from skive.samples import Samples, fingerprint

log = logging.getLogger("skive.sparsity")

CRITERIA = ("magnitude", "activation", "reconstruction", "random")
SCOPES = ("layer", "global")
FIT_SAMPLES = 128  # whose activations decide what the remaining weights become,
FIT_BYTES = 256 << 20  # or fewer, so that all of them fit here at the largest value
DAMPING = 0.01  # of the mean second moment: directions that the data does not show
MOST_INPUTS = 2304  # weights of an output channel: reconstruction costs the cube of it
MOST_WORK = 2_000_000_000_000  # multiply-adds of inverting second moments, of all layers together
ROUNDS = 4  # in which a layer loses its blocks: what is left makes up for those of a round before the next
OUTPUTS = 16  # output channels that share their zeros in an n:m pattern that names none

# What may stand between a layer and an output of the network for it to be a last one.
_TRAILING = frozenset({"softmax", "log_softmax", "sigmoid", "reshape", "transpose", "slice"})


@dataclass(frozen=True)
class Pattern:
    """Which weights become zero together: `inputs` consecutive input channels of one tap by `outputs`
    consecutive output channels. With `group`, `keep` of each `group` consecutive input channels stay."""

    inputs: int
    outputs: int
    keep: int = 0
    group: int = 0

    @staticmethod
    def parse(text: str) -> Pattern:
        """`block4x16` (input x output channels), `2:4` or `2:4x32` (of the input channels of 16 or of 32 output
        channels each), `1x1`."""
        if match := re.fullmatch(r"block(\d+)x(\d+)", text):
            inputs, outputs = map(int, match.groups())
            if 1 <= inputs <= 64 and 1 <= outputs <= 256:
                return Pattern(inputs, outputs)
        elif match := re.fullmatch(r"(\d+):(\d+)(?:x(\d+))?", text):
            keep, group, outputs = (int(n) if n else OUTPUTS for n in match.groups())
            if 1 <= keep < group <= 64 and 1 <= outputs <= 256:
                return Pattern(1, outputs, keep, group)
        elif text == "1x1":
            return Pattern(1, 1)
        raise PruningError(f"pattern is {text!r}; it can be block4x16 (4 input by 16 output channels, or other numbers "
                           "up to 64 and 256), 2:4 or 2:4x32 (n of m input channels, the same for 16 or 32 output "
                           "channels), or 1x1 (single weights)")

    def __str__(self) -> str:
        if self.group:
            return f"{self.keep}:{self.group}" + (f"x{self.outputs}" if self.outputs != OUTPUTS else "")
        return "1x1" if self.inputs == self.outputs == 1 else f"block{self.inputs}x{self.outputs}"


@dataclass(frozen=True)
class Sparsify:
    """Which weights are to become zero. Checked when it is made: PruningError says which value cannot be.

    `pattern`: see `Pattern.parse`. `fraction`: of the blocks of each layer (`scope` "layer"), or of the
    multiply-accumulates of all of them ("global", where the least important blocks of all layers go); an n:m
    pattern says it itself. `criterion`: "magnitude" (a block's squared weights), "activation" (the same of weights
    times the size of what they multiply), "reconstruction" (what a layer's outputs lose if its other weights
    make up for the block, and then they do: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal
    Brain Surgeon, 1993; Frantar and Alistarh, SparseGPT, 2023), "random" (the baseline, by `seed`); None is
    "reconstruction" where there is calibration data and "magnitude" without. `keep`: patterns of layer names
    that stay as they are. `first_last`: layers that read the network's input or make its output, too.
    `calibration`: as for `skive.Quantize`.
    """

    pattern: str = "block4x16"
    fraction: float | None = None
    criterion: str | None = None
    scope: str = "layer"
    keep: tuple[str, ...] = ()
    first_last: bool = False
    calibration: Any = field(default=None, compare=False, repr=False)
    samples: int = FIT_SAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        form = self.form
        if form.group:
            implied = 1 - form.keep / form.group
            if self.fraction is None:
                object.__setattr__(self, "fraction", implied)
            elif abs(self.fraction - implied) > 1e-6 or self.scope != "layer":
                raise PruningError(f"pattern {self.pattern} makes {implied:.0%} of every layer zero, "
                                   f"not {self.fraction:.0%} by {self.scope}")
        if not isinstance(self.fraction, (int, float)) or not 0 <= self.fraction < 1:
            raise PruningError(f"fraction is {self.fraction!r}, not a fraction from 0 to below 1; "
                               f"{self.pattern}@0.75 makes three quarters of the blocks zero")
        if self.criterion is None:
            object.__setattr__(self, "criterion", "magnitude" if self.calibration is None else "reconstruction")
        for name, allowed in (("criterion", CRITERIA), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise PruningError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}")
        if self.criterion in ("activation", "reconstruction") and self.calibration is None:
            raise PruningError(f"criterion {self.criterion!r} needs calibration data; give Sparsify(calibration=...) "
                               "or --calibrate FILE.npz")
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", (self.keep,))
        object.__setattr__(self, "keep", tuple(self.keep))

    @property
    def form(self) -> Pattern:
        return Pattern.parse(self.pattern)

    def options(self) -> dict[str, Any]:
        """All but the data, as plain values."""
        return {k: v for k, v in self.__dict__.items() if k != "calibration"}

    def fingerprint(self) -> str | None:
        """Equal for equal options and data; None for data that can be read only once or cannot be hashed."""
        return fingerprint(self.options(), self.calibration)


def requested(value: Sparsify | str) -> Sparsify:
    """`value` as a Sparsify: `PATTERN@FRACTION` or `n:m`."""
    if isinstance(value, Sparsify):
        return value
    if isinstance(value, str):
        pattern, at, text = value.partition("@")
        try:
            return Sparsify(pattern, float(text) if at else None)
        except ValueError:
            pass
    raise PruningError(f"sparsify is {value!r}; give PATTERN@FRACTION, such as block4x16@0.75, or a skive.Sparsify")


# ------------------------------------------------------------------------------- blocks and masks


def _flat(weights: np.ndarray) -> np.ndarray:
    """[OC, taps, IC]"""
    return weights.reshape(weights.shape[0], -1, weights.shape[-1])


def block_scores(values: np.ndarray, pattern: Pattern) -> NDArray[np.float64]:
    """[output blocks, taps, input groups] the sum of `values` (of the shape of the weights) over each block."""
    flat = _flat(values).astype(np.float64)
    by_input = np.add.reduceat(flat, np.arange(0, flat.shape[2], pattern.inputs), axis=2)
    return np.add.reduceat(by_input, np.arange(0, flat.shape[0], pattern.outputs), axis=0)


def kept_blocks(scores: np.ndarray, pattern: Pattern, fraction: float) -> NDArray[np.bool_]:
    """Which blocks stay, of the shape of `scores`: all but the lowest `fraction`; of n:m the best of each group."""
    if pattern.group:
        size = scores.shape[-1]
        padded = np.full((*scores.shape[:-1], -(-size // pattern.group) * pattern.group), -np.inf)
        padded[..., :size] = scores
        groups = padded.reshape(*scores.shape[:-1], -1, pattern.group)
        rank = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1, kind="stable")
        return (rank < pattern.keep).reshape(padded.shape)[..., :size]
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores, axis=None, kind="stable")[: round(fraction * scores.size)]] = False
    return kept.reshape(scores.shape)


def spread(blocks: np.ndarray, pattern: Pattern, shape: Sequence[int]) -> np.ndarray:
    """`blocks` [output blocks, taps, input groups] repeated to weights of `shape`."""
    by_output = np.repeat(blocks, pattern.outputs, axis=0)[: shape[0]]
    return np.repeat(by_output, pattern.inputs, axis=2)[:, :, : shape[-1]].reshape(shape)


def mask(weights: np.ndarray, pattern: str, fraction: float | None = None) -> NDArray[np.bool_]:
    """Which of `weights` [OC, KH, KW, IC] or [OC, IC] stay when the blocks of the least squared weights go.

    Of the shape of `weights`; blocks count from the first output and the first input channel, and the
    last ones may be smaller. `pattern` and `fraction` as for `Sparsify`. For training: multiply the
    weights by it after each step, and skive finds the zeros when it compiles the network.
    """
    asked = Sparsify(pattern, fraction)
    form = asked.form
    kept = kept_blocks(block_scores(np.square(weights, dtype=np.float64), form), form, float(asked.fraction or 0))
    return spread(kept, form, weights.shape)


# ----------------------------------------------------------------------------------------- layers


def layers(graph: Graph, options: Sparsify) -> tuple[list[Node], list[tuple[str, str]]]:
    """(the layers of the canonical float `graph` whose weights become zero, (name, reason) of those that stay)."""
    chosen, left = [], []
    readers = {n for n in graph.nodes if ops.macs(n)}
    firsts, lasts = _firsts(graph, readers), _lasts(graph, readers)
    for node in graph.nodes:
        if node.op not in ("conv2d", "linear", "conv_transpose2d"):
            continue
        reason = _reason(graph, node, options, node in firsts, node in lasts)
        if reason:
            left.append((node.label(), reason))
        else:
            chosen.append(node)
    return chosen, left


def _reason(graph: Graph, node: Node, options: Sparsify, first: bool, last: bool) -> str | None:
    """Why the weights of `node` stay as they are."""
    if any(fnmatch.fnmatchcase(name, p) for p in options.keep for name in (node.origin, node.name) if name):
        return "named by keep"
    if node.op == "conv_transpose2d":
        return "a transposed convolution has no sparse kernel"
    if node.attrs.get("groups", 1) > 1:
        return "each output channel reads few input channels: depthwise or grouped"
    if node.inputs[1].op == "dequantize":
        return "its weights are integers: give the float model, and quantize it in the same compile"
    if not (node.inputs[1].is_const and node.inputs[1].dtype.is_float):
        return "its weights are not constants"
    if len(graph.users[node.inputs[1]]) > 1:
        return "its weights are shared with another layer, whose outputs need other blocks"
    if node.inputs[1].shape[-1] < 4:
        return "fewer than 4 input channels"
    if not options.first_last and (first or last):
        return "it reads the network's input" if first else "it makes the network's output"
    return None


def _firsts(graph: Graph, readers: set[Node]) -> set[Node]:
    """The layers that a float input of the network reaches through no other one."""
    raw = {n for n in graph.inputs if n.dtype.is_float}
    found = set()
    for n in graph.nodes:
        given = [i for i in n.inputs if not i.is_const]
        if given and all(i in raw for i in given):  # a residual sum is no longer the input
            if n in readers:
                found.add(n)
            else:
                raw.add(n)
    return found


def _lasts(graph: Graph, readers: set[Node]) -> set[Node]:
    """The layers whose result is an output of the network, but for what is in _TRAILING."""
    found, waiting = set(), list(graph.outputs)
    while waiting:
        n = waiting.pop()
        if n in readers:
            found.add(n)
        elif n.op in _TRAILING:
            waiting += [i for i in n.inputs[:1] if not i.is_const]
    return found


# ------------------------------------------------------------------------------------- second moments


def _rows(layer: Node, value: np.ndarray, turn: int) -> np.ndarray:
    """[R, K + 1] what the weights of an output channel multiply at some positions of `value`, and ones."""
    from skive.rounding import patches

    rows = patches(layer, value, max(64, 256 * 1024 // max(1, layer.inputs[1].value[0].size)), turn)
    assert rows is not None
    return np.concatenate([rows[:, 0], np.ones((len(rows), 1), rows.dtype)], 1)


def _obs_scores(weights: np.ndarray, inverse: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[places] what the outputs lose if the weights of each place go and the others make up for them.

    `weights` [rows, K], `inverse` [K, K] of the second moments, `places` [places, inputs] indices into K:
    w_S (H^-1_SS)^-1 w_S, summed over the rows.
    """
    parts = weights[:, places].transpose(1, 2, 0)  # [places, inputs, rows]
    inner = inverse[places[:, :, None], places[:, None, :]]
    return np.einsum("pir,pir->p", parts, np.linalg.solve(inner, parts))


def _damped(moments: np.ndarray) -> np.ndarray:
    """Second moments [K, K] without the means, which the bias takes over, and regular."""
    h = moments[:-1, :-1] - np.outer(moments[:-1, -1], moments[-1, :-1])
    return h + (DAMPING * float(np.diagonal(h).mean()) + 1e-12) * np.eye(len(h))


def _reconstructed(
    layer: Node, now: np.ndarray, cross: np.ndarray, rows: int, pattern: Pattern, fraction: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(weights [OC, K + 1], bias last, kept blocks) that give what `layer` gave, with the wanted blocks zero.

    `now` [K + 1, K + 1] the mean of x x' over `rows` positions, x the inputs of the layer in the sparse
    network, `cross` that of X x', X those in the whole network.
    """
    from skive.pruning import restored

    w, *bias = layer.inputs[1:3]
    whole = np.zeros((w.shape[0], w.value[0].size + 1))
    whole[:, :-1] = w.value.reshape(len(whole), -1)
    if bias:
        whole[:, -1] = bias[0].value
    taps, groups = _flat(w.value).shape[1], -(-w.shape[-1] // pattern.inputs)
    index = np.arange(whole.shape[1] - 1).reshape(taps, -1)  # [taps, IC]
    blocks = -(-w.shape[0] // pattern.outputs)
    kept = np.ones((blocks, taps, groups), bool)
    weights, h = whole.copy(), _damped(now)
    inverse = np.linalg.inv(h)
    for turn in range(1, rounds + 1):
        scores = np.zeros(kept.shape)
        for b in range(blocks):
            own = slice(b * pattern.outputs, (b + 1) * pattern.outputs)
            support = spread(kept[b : b + 1], Pattern(pattern.inputs, 1), (1, taps, w.shape[-1])).ravel()
            if turn > 1:
                inverse = np.zeros_like(h)
                inverse[np.ix_(support, support)] = np.linalg.inv(h[np.ix_(support, support)])
            for size in {pattern.inputs, w.shape[-1] % pattern.inputs} - {0}:
                last = size < pattern.inputs  # the group of channels left over
                here = kept[b, :, -1:] if last else kept[b, :, : w.shape[-1] // pattern.inputs]
                at = np.argwhere(here)
                if not len(at):
                    continue
                group = at[:, 1] + (groups - 1 if last else 0)
                places = index[at[:, 0][:, None], group[:, None] * pattern.inputs + np.arange(size)]
                scores[b, at[:, 0], group] = _obs_scores(weights[own, :-1], inverse, places)
        if pattern.group:
            kept = kept_blocks(np.where(kept, scores, -np.inf), _gradual(pattern, turn, rounds), 0.0)
        else:
            # A cube makes the first rounds, whose scores know least of the others, the smaller ones.
            share = 1 - (1 - fraction) ** (turn / rounds)
            kept = kept_blocks(np.where(kept, scores, -np.inf), pattern, share)
        for b in range(blocks):
            own = slice(b * pattern.outputs, (b + 1) * pattern.outputs)
            keep = np.append(spread(kept[b : b + 1], Pattern(pattern.inputs, 1), (1, taps, w.shape[-1])).ravel(),
                             bool(bias))
            weights[own] = restored(whole[own], now, cross, keep, rows) if keep[:-1].any() else 0
            if bias and not keep[:-1].any():
                weights[own, -1] = whole[own] @ cross[:, -1]
    return weights, kept


def _gradual(pattern: Pattern, turn: int, rounds: int) -> Pattern:
    """`pattern`, with as many of a group as are left after `turn` of `rounds`."""
    keep = pattern.group - (pattern.group - pattern.keep) * turn // rounds
    return Pattern(pattern.inputs, pattern.outputs, keep, pattern.group)


# ------------------------------------------------------------------------------------------ apply


def _block_macs(node: Node, pattern: Pattern) -> int:
    """Multiply-accumulates of one block of `node`, of the full size."""
    return max(1, ops.macs(node) * pattern.inputs * pattern.outputs // node.inputs[1].type.size)


def _plain_scores(node: Node, options: Sparsify, size: np.ndarray | None, seed: int) -> np.ndarray:
    """Block scores that need no inverse; `size` [K]: mean square of what each weight multiplies."""
    w = node.inputs[1].value
    if options.criterion == "random":
        return np.random.default_rng((options.seed, seed)).random(block_scores(w, options.form).shape)
    squared = np.square(w, dtype=np.float64)
    if size is not None:
        squared = (squared.reshape(len(w), -1) * size).reshape(w.shape)
    return block_scores(squared, options.form)


def _shares(
    chosen: Sequence[Node], options: Sparsify, sizes: Mapping[Node, np.ndarray]
) -> dict[Node, float]:
    """The fraction of the blocks of each layer that go."""
    fraction = float(options.fraction or 0)
    if options.scope == "layer":
        return dict.fromkeys(chosen, fraction)
    # What a layer loses, relative to its size, per multiply-accumulate: least first, until enough are gone.
    scores, costs, owners = [], [], []
    for i, node in enumerate(chosen):
        s = _plain_scores(node, options, sizes.get(node), i).ravel()
        scores.append(s / max(float(s.sum()), 1e-30) / _block_macs(node, options.form))
        costs.append(np.full(s.size, _block_macs(node, options.form), np.float64))
        owners.append(np.full(s.size, i))
    order = np.argsort(np.concatenate(scores), kind="stable")
    spent = np.cumsum(np.concatenate(costs)[order])
    gone = np.concatenate(owners)[order[spent <= fraction * spent[-1] * (1 + 1e-9)]]
    counts = np.bincount(gone, minlength=len(chosen))
    # A layer that lost everything would cut the network in two.
    return {n: min(float(counts[i]) / scores[i].size, 1 - 1 / scores[i].size) for i, n in enumerate(chosen)}


def apply(
    graph: Graph, options: Sparsify, progress: Callable[[str, float], None] = lambda step, fraction: None
) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` with blocks of weights zero, the `sparsity` of report.json).

    Deterministic. PruningError if there is no layer for it.
    """
    from skive.pruning import check_keep

    progress("sparsify", 0.12)
    check_keep(graph, options.keep)
    chosen, left = layers(graph, options)
    if options.fraction and not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left[:3]) or "it has no convolution or linear layer"
        raise PruningError(f"{graph.name}: no weights can become zero: {reasons}")
    masks: dict[Node, np.ndarray] = {}
    replaced: dict[Node, Node] = {}
    if options.fraction:
        samples = _samples(graph, options) if options.criterion in ("activation", "reconstruction") else []
        if samples:
            replaced, masks = _fitted(graph, chosen, options, samples, progress)
        else:
            shares = _shares(chosen, options, {})
            for i, node in enumerate(chosen):
                kept = kept_blocks(_plain_scores(node, options, None, i), options.form, shares[node])
                masks[node], replaced = _with_zeros(node, kept, options.form, replaced)
    result = graph.with_nodes(_rebuilt(graph, replaced)) if replaced else graph
    whole = sum(ops.macs(n) for n in graph.nodes) or 1
    zero = sum(ops.macs(n) * (1 - np.count_nonzero(m) / m.size) for n, m in masks.items())
    return result, {
        "macs_removed": zero / whole,
        "groups": [],
        "pattern": options.pattern,
        "fraction": options.fraction,
        "criterion": options.criterion,
        "scope": options.scope,
        "unchanged": [{"name": name, "reason": reason} for name, reason in left],
    }


def _with_zeros(
    node: Node, kept: np.ndarray, pattern: Pattern, replaced: dict[Node, Node]
) -> tuple[np.ndarray, dict[Node, Node]]:
    w = node.inputs[1]
    stays = spread(kept, pattern, w.shape)
    new = constant(np.where(stays, w.value, 0).astype(w.dtype.numpy), name=w.name, origin=w.origin)
    return stays, {**replaced, w: new}


def _rebuilt(graph: Graph, replaced: Mapping[Node, Node]) -> dict[Node, Node]:
    new: dict[Node, Node] = {}
    for n in graph.nodes:
        new[n] = replaced.get(n, n) if n.is_const or n.op == "input" else rebuilt(n, tuple(new[i] for i in n.inputs))
    return new


def _samples(graph: Graph, options: Sparsify) -> list[Sequence[np.ndarray]]:
    largest = max(n.type.bytes for n in graph.nodes if not n.is_const)
    count = max(8, min(FIT_SAMPLES, FIT_BYTES // max(1, largest)))
    return list(itertools.islice(iter(Samples(graph, options.calibration, options.samples)), count))


def _mean_squares(graph: Graph, chosen: Sequence[Node], samples: Sequence[Sequence[np.ndarray]]
                  ) -> dict[Node, np.ndarray]:
    """[K] by layer: the mean square of what each weight of an output channel multiplies."""
    from skive import calibration

    run = calibration.runner(graph, [n.inputs[0] for n in chosen])
    sums: dict[Node, np.ndarray] = {}
    for turn, sample in enumerate(samples):
        for node, value in zip(chosen, run(sample), strict=True):
            mean = np.square(_rows(node, value, turn)[:, :-1], dtype=np.float64).mean(0)
            sums[node] = sums[node] + mean if node in sums else mean
    return {n: s / len(samples) for n, s in sums.items()}


def _rounds(node: Node, pattern: Pattern, share: float, spent: int) -> tuple[int, int]:
    """(rounds of reconstruction that `node` can have, the multiply-adds spent then); 0 where it is too wide."""
    width, blocks = node.inputs[1].value[0].size, -(-node.inputs[1].shape[0] // pattern.outputs)
    for rounds in (ROUNDS, 2, 1):
        left = [width * (1 - share) ** (turn / rounds) for turn in range(1, rounds + 1)]
        work = width**3 + blocks * int(sum(k**3 for k in left) + sum(k**3 for k in left[:-1]))
        if spent + work <= MOST_WORK and width <= MOST_INPUTS:
            return rounds, spent + work
    return 0, spent


def _fitted(
    graph: Graph,
    chosen: Sequence[Node],
    options: Sparsify,
    samples: Sequence[Sequence[np.ndarray]],
    progress: Callable[[str, float], None],
) -> tuple[dict[Node, Node], dict[Node, np.ndarray]]:
    """(new constants, the weights that stay [OC, ...] bool by layer), chosen and fitted first to last.

    The network runs twice side by side, whole and with what was done so far: a layer makes up for what its
    inputs lost, and no layer for what another has made up for already.
    """
    shares = _shares(chosen, options, _mean_squares(graph, chosen, samples) if options.scope == "global" else {})
    number = {n: i for i, n in enumerate(chosen)}
    last = {i: n for n in graph.nodes for i in n.inputs}
    replaced: dict[Node, Node] = {}
    masks: dict[Node, np.ndarray] = {}
    new: dict[Node, Node] = {}
    whole: dict[Node, list[np.ndarray]] = {}
    now: dict[Node, list[np.ndarray]] = {}
    spent = 0
    for node in graph.nodes:
        if node.is_const:
            continue
        if node.op == "input":
            new[node] = node
            whole[node] = now[node] = [s[graph.inputs.index(node)] for s in samples]
            continue
        if node in number:
            progress("sparsify", 0.12 + 0.08 * number[node] / len(chosen))
            x = node.inputs[0]
            rounds = 0
            if options.criterion == "reconstruction":
                rounds, spent = _rounds(node, options.form, shares[node], spent)
            if rounds:
                masks[node] = _reconstruct_into(replaced, node, whole[x], now[x], options, shares[node], rounds)
            else:
                squares = [np.square(_rows(node, v, t)[:, :-1], dtype=np.float64).mean(0) for t, v in enumerate(now[x])]
                scores = _plain_scores(node, options, np.mean(squares, 0), number[node])
                kept = kept_blocks(scores, options.form, shares[node])
                masks[node], replaced = _with_zeros(node, kept, options.form, replaced)
        new[node] = rebuilt(node, tuple(replaced.get(i, i) if i.is_const else new[i] for i in node.inputs))
        whole[node] = [_evaluated(node, node, whole, s) for s in range(len(samples))]
        same = all(i not in replaced if i.is_const else whole[i] is now[i] for i in node.inputs)
        now[node] = whole[node] if same else [_evaluated(new[node], node, now, s) for s in range(len(samples))]
        for i in set(node.inputs):
            if last[i] is node and not i.is_const:
                del whole[i], now[i]
    return replaced, masks


def _evaluated(node: Node, old: Node, values: Mapping[Node, Sequence[np.ndarray]], sample: int) -> np.ndarray:
    """The value of `node`, whose operands have the values of those of `old`."""
    return ops.evaluate(node, [n.value if n.is_const else values[o][sample]
                               for n, o in zip(node.inputs, old.inputs, strict=True)])


def _reconstruct_into(
    replaced: dict[Node, Node],
    node: Node,
    whole: Sequence[np.ndarray],
    now: Sequence[np.ndarray],
    options: Sparsify,
    share: float,
    rounds: int,
) -> np.ndarray:
    """Adds the new weights and bias of `node` to `replaced`; [OC, ...] bool which weights stay."""
    w, *bias = node.inputs[1:3]
    size = w.value[0].size + 1
    inner, cross, rows = np.zeros((size, size)), np.zeros((size, size)), 0
    for turn, (before, after) in enumerate(zip(whole, now, strict=True)):
        old, new = _rows(node, before, turn), _rows(node, after, turn)
        inner += new.T @ new
        cross += old.T @ new
        rows += len(new)
    weights, kept = _reconstructed(node, inner / rows, cross / rows, rows, options.form, share, rounds)
    stays = spread(kept, options.form, w.shape)
    fitted = np.where(stays, weights[:, :-1].reshape(w.shape), 0).astype(np.float32)
    replaced[w] = constant(fitted, name=w.name, origin=w.origin)
    for b in bias:
        replaced[b] = constant(weights[:, -1].astype(np.float32), name=b.name, origin=b.origin)
    return stays
