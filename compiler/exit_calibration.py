"""Thresholds for early exits from validation data: what they cost, what they gain, and which to take.

A setting of all thresholds is a point (accuracy, mean cost). The curve of good settings is found by minimising
errors + price x cost one threshold at a time, for a range of prices.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skive.errors import ExitError
from skive.exit_calls import COMPARE
from skive.runtime import Module

CANDIDATES = 48  # thresholds tried for each exit, between all that its scores distinguish
SHARED_CANDIDATES = 1000  # the same for one threshold of all exits
PRICES = 40  # points of the curve before the worse ones are left out
SWEEPS = 6
BETWEEN = 8  # settings tried between two neighbours of the curve
TIMED_CALLS = 60
KINDS = ("accuracy", "accuracy-drop", "macs", "latency", "risk")


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    `accuracy`: at least so many percent, `accuracy-drop`: at most so many points less than the whole network, as
    cheap as possible. `macs`, `latency`: at most this fraction of the whole network's, as accurate as possible.
    `risk`: an answer that is wrong where the whole network's is right, on at most this fraction of inputs, with
    this confidence; as cheap as possible.
    """

    kind: str
    value: float
    confidence: float = 0.95

    @staticmethod
    def parse(text: str) -> Goal:
        """`accuracy=90`, `accuracy-drop=0.5`, `macs=0.6`, `latency=0.6` or `risk=0.05@0.95`; else ExitError."""
        kind, _, rest = text.partition("=")
        value, _, confidence = rest.partition("@")
        try:
            goal = Goal(kind, float(value), float(confidence or 0.95))
        except ValueError:
            goal = Goal("", 0)
        top = 100 if kind.startswith("accuracy") else 1
        if goal.kind not in KINDS or not 0 <= goal.value <= top or not 0 < goal.confidence < 1:
            raise ExitError(f"the goal is {text!r}; it can be accuracy=90 (percent), accuracy-drop=0.5 (points), "
                            "macs=0.6, latency=0.6 (fraction of the whole network) or risk=0.05@0.95 (fraction of "
                            "inputs, confidence)")
        return goal


@dataclass(frozen=True)
class Evidence:
    """What n inputs did: `scores` [n, k] and `right` [n, k + 1], whether the answer of each exit is the label's;
    `cost` [k + 1] of a call that ends there, as a fraction of the whole network's; `tests` of the k scores."""

    scores: np.ndarray
    right: np.ndarray
    cost: np.ndarray
    tests: tuple[str, ...]

    def part(self, rows: Any) -> Evidence:
        """The evidence of some of the samples."""
        return Evidence(self.scores[rows], self.right[rows], self.cost, self.tests)

    def leaves(self, k: int, threshold: Any) -> np.ndarray:
        """Which samples leave at exit `k` if they come there."""
        return COMPARE[self.tests[k]](self.scores[:, k], threshold)

    def taken(self, thresholds: np.ndarray) -> np.ndarray:
        """The exit of each sample."""
        leave = [self.leaves(k, t) for k, t in enumerate(thresholds)]
        return np.argmax(np.stack([*leave, np.ones(len(self.scores), bool)]), axis=0)


@dataclass(frozen=True)
class Setting:
    """Thresholds, and what they do: `accuracy` in percent, mean `cost` as a fraction, `shares` of samples by exit,
    `risk`: the fraction of samples whose answer is wrong where the whole network's is right."""

    thresholds: np.ndarray
    accuracy: float
    cost: float
    shares: np.ndarray
    risk: float


def collect(module: Module, calls: Iterable[Sequence[np.ndarray]], labels: np.ndarray | None,
            latency: bool = False) -> Evidence:
    """The evidence of running every exit on all samples; without `labels` the whole network's answer counts as right.

    `latency`: cost is measured time instead of multiply-accumulates. ExitError if the module has no exits or
    an exit gives no class scores.
    """
    if not module.exits:
        raise ExitError(f"{module.folder} has no exits; compile it with --exit NAME:CRITERION=VALUE")
    kept: list[list[np.ndarray]] = []
    first: Sequence[np.ndarray] | None = None
    for call in calls:
        first = call if first is None else first
        kept.append(list(module.all_outputs(*call)))
    if first is None:
        raise ExitError("there is no sample to calibrate exits with")
    values = [np.concatenate([row[i].reshape(-1) if p.shape in ((1,), (-1,)) else row[i] for row in kept])
              for i, p in enumerate(module.outputs)]
    answers = []
    for way in module.exits:
        scores = values[way.outputs[0]]
        if scores.ndim != 2:
            raise ExitError(f"exit {way.name} gives {scores.ndim - 1} axes per sample; calibration compares classes, "
                            "one axis")
        answers.append(scores.argmax(-1))
    truth = answers[-1] if labels is None else labels
    if len(truth) != len(answers[0]):
        raise ExitError(f"there are {len(answers[0])} samples and {len(truth)} labels")
    ways = module.exits[:-1]
    cost = exit_seconds(module, first) if latency else np.asarray([w.macs for w in module.exits], np.float64)
    return Evidence(np.stack([w.real(values[w.score]) for w in ways if w.score is not None], 1),
                    np.stack([a == truth for a in answers], 1), cost / cost[-1], tuple(str(w.test) for w in ways))


def exit_seconds(module: Module, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Seconds of a call that ends at each exit: the smallest of many."""
    before = module.thresholds
    one = [a[:1] if module.manifest["batch_max"] and a.ndim else a for a in inputs]
    seconds = np.full(len(module.exits), np.inf)
    try:
        for _ in range(3):  # in turns: a drift of the machine meets all alike
            for k in range(len(module.exits)):
                names = list(before)
                go = [always(str(e.test)) for e in module.exits[:-1]]
                module.thresholds = {n: math.nan if i < k else go[i] for i, n in enumerate(names)}
                for _ in range(TIMED_CALLS):
                    start = time.perf_counter()
                    module(*one)
                    seconds[k] = min(seconds[k], time.perf_counter() - start)
    finally:
        module.thresholds = before
    return seconds


def always(test: str) -> float:
    """A threshold that every score passes."""
    return math.inf if test[0] == "<" else -math.inf


def setting(evidence: Evidence, thresholds: np.ndarray) -> Setting:
    """What `thresholds` do to the samples of `evidence`."""
    exits = evidence.taken(thresholds)
    rows = np.arange(len(exits))
    right = evidence.right[rows, exits]
    shares = np.bincount(exits, minlength=evidence.right.shape[1]) / len(exits)
    return Setting(thresholds, 100 * float(right.mean()), float(evidence.cost[exits].mean()), shares,
                   float((~right & evidence.right[:, -1]).mean()))


def curve(evidence: Evidence, shared: bool = False) -> list[Setting]:
    """Settings from the most accurate to the cheapest, each cheaper and less accurate than the one before. `shared`:
    those with the same threshold at all exits, from the dearest to the cheapest, whatever these samples say about
    their accuracy; ExitError if the exits compare in different ways."""
    k = len(evidence.tests)
    if shared:
        if len(set(evidence.tests)) > 1:
            raise ExitError("the exits compare their scores in different ways (" + ", ".join(evidence.tests)
                            + "): they cannot share a threshold")
        every = [*_spaced(evidence.scores, SHARED_CANDIDATES), always(evidence.tests[0])]
        by_cost = {s.cost: s for s in (setting(evidence, np.full(k, t, np.float32)) for t in every)}
        return [by_cost[c] for c in sorted(by_cost, reverse=True)]
    candidates = []
    for i, test in enumerate(evidence.tests):
        steps = _spaced(evidence.scores[:, i], CANDIDATES)
        candidates.append(np.concatenate([steps, [always(test), -always(test)]]).astype(np.float32))
    passes = [np.stack([evidence.leaves(i, t) for t in c]) for i, c in enumerate(candidates)]
    chosen = [len(c) - 1 for c in candidates]  # nobody leaves
    settings = [setting(evidence, np.asarray([c[j] for c, j in zip(candidates, chosen, strict=True)]))]
    for price in np.concatenate([[1e-6], np.geomspace(0.01, 10, PRICES)]):
        loss = ~evidence.right + price * evidence.cost
        for _ in range(SWEEPS):
            before = list(chosen)
            onward = loss[:, -1]
            for i in reversed(range(k)):  # what going on costs is known when exit i is decided
                here = np.ones(len(loss), bool)
                for j in range(i):
                    here &= ~passes[j][chosen[j]]
                totals = np.where(passes[i][:, here], loss[here, i], onward[here]).sum(1)
                best = int(np.argmin(totals))
                if totals[best] < totals[chosen[i]] - 1e-9:
                    chosen[i] = best
                onward = np.where(passes[i][chosen[i]], loss[:, i], onward)
            if chosen == before:
                break
        settings.append(setting(evidence, np.asarray([c[j] for c, j in zip(candidates, chosen, strict=True)])))
    settings += _between(evidence, settings)
    front: list[Setting] = []
    for s in sorted(settings, key=lambda s: (s.cost, -s.accuracy)):
        if not front or s.accuracy > front[-1].accuracy:
            front.append(s)
    return front[::-1]


def _spaced(scores: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the distinct `scores`, evenly spaced by rank."""
    distinct = np.unique(scores)
    return distinct[np.unique(np.linspace(0, len(distinct) - 1, min(most, len(distinct))).astype(int))]


def _between(evidence: Evidence, settings: Sequence[Setting]) -> list[Setting]:
    """Settings between neighbours on the curve: prices find only those on its convex hull."""
    ranked = [np.concatenate([[-np.inf], np.sort(s), [np.inf]]).astype(np.float32) for s in evidence.scores.T]
    found = []
    ordered = sorted(settings, key=lambda s: s.cost)
    for a, b in itertools.pairwise(ordered):
        if np.array_equal(a.thresholds, b.thresholds):
            continue
        ranks = [np.asarray([np.searchsorted(r, t) for r, t in zip(ranked, s.thresholds, strict=True)]) for s in (a, b)]
        for part in np.linspace(0, 1, BETWEEN + 2)[1:-1]:
            middle = np.rint(ranks[0] + part * (ranks[1] - ranks[0])).astype(int)
            found.append(setting(evidence, np.asarray([r[m] for r, m in zip(ranked, middle, strict=True)])))
    return found


def binomial_bound(failures: int, n: int, confidence: float) -> float:
    """The largest rate that `failures` of `n` do not contradict: upper limit of Clopper and Pearson (1934)."""
    if failures >= n:
        return 1.0

    def at_most(rate: float) -> float:  # P(X <= failures)
        logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                + i * math.log(rate) + (n - i) * math.log1p(-rate) for i in range(failures + 1)]
        return math.fsum(math.exp(v) for v in logs)

    low, high = failures / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > 1 - confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Calibrated:
    """The chosen `setting` on all samples, `held_out`: what thresholds chosen in the same way on one half do to the
    other, `whole` the network without exits, the `curve`, and for a risk the `bound` that holds with the confidence."""

    setting: Setting
    held_out: Setting
    whole: Setting
    curve: list[Setting]
    bound: float | None = None


def calibrate(evidence: Evidence, goal: Goal, shared: bool = False) -> Calibrated:
    """The cheapest (most accurate) setting that keeps `goal`. With a risk, thresholds come from one half of the samples
    and are tested on the other, from the safest on until the bound breaks (fixed-sequence testing: Angelopoulos et
    al., Learn then Test, 2021). ExitError if not even the safest setting keeps it.

    `shared`: one threshold for all exits, for few samples, to which thresholds of their own fit too closely; a goal of
    cost is then spent, as what leaves later is right more often."""
    every = curve(evidence, shared)
    whole = setting(evidence, np.asarray([-always(t) for t in evidence.tests], np.float32))
    first, second = evidence.part(slice(0, None, 2)), evidence.part(slice(1, None, 2))
    if goal.kind == "risk":
        n, found, bound = len(second.scores), None, 1.0
        for s in [setting(first, whole.thresholds), *curve(first, shared)]:
            tested = setting(second, s.thresholds)
            limit = binomial_bound(round(tested.risk * n), n, goal.confidence)
            if limit > goal.value:
                break
            found, bound = s.thresholds, limit
        if found is None:
            least = binomial_bound(0, n, goal.confidence)
            raise ExitError(f"{len(evidence.scores)} samples cannot show a risk of {goal.value:g} with confidence "
                            f"{goal.confidence:g}, even if none fails, but {least:.3g} at best; give more data")
        return Calibrated(setting(evidence, found), setting(second, found), whole, every, bound)
    half = _chosen(curve(first, shared), setting(first, whole.thresholds), goal, shared)
    return Calibrated(_chosen(every, whole, goal, shared), setting(second, half.thresholds), whole, every)


def _chosen(settings: Sequence[Setting], whole: Setting, goal: Goal, shared: bool) -> Setting:
    """The best of `settings` for a goal that is not a risk."""
    if goal.kind.startswith("accuracy"):
        least = goal.value if goal.kind == "accuracy" else whole.accuracy - goal.value
        good = [s for s in (*settings, whole) if s.accuracy >= least - 1e-9]
        if not good:
            best = max(s.accuracy for s in (*settings, whole))
            raise ExitError(f"accuracy={goal.value:g} cannot be reached: the most accurate setting has {best:.2f} %")
        return min(good, key=lambda s: s.cost)
    good = [s for s in settings if s.cost <= goal.value + 1e-9]
    if not good:
        cheapest = min(settings, key=lambda s: s.cost)
        raise ExitError(f"{goal.kind}={goal.value:g} cannot be reached: the cheapest setting takes {cheapest.cost:.3f} "
                        "of the whole network; put an exit further to the front")
    return max(good, key=lambda s: s.cost if shared else s.accuracy)


def to_json(result: Calibrated, names: Sequence[str]) -> dict[str, Any]:
    """`result` as JSON-compatible data."""

    def row(s: Setting) -> dict[str, Any]:
        thresholds = {n: float(t) if math.isfinite(t) else str(t) for n, t in zip(names, s.thresholds, strict=False)}
        return {"thresholds": thresholds, "accuracy": s.accuracy, "cost": s.cost, "risk": s.risk,
                "shares": dict(zip(names, s.shares.tolist(), strict=True))}

    return {"chosen": row(result.setting), "held_out": row(result.held_out), "whole": row(result.whole),
            "bound": result.bound, "curve": [row(s) for s in result.curve]}


def plot(result: Calibrated, names: Sequence[str], title: str) -> str:
    """The curve as an SVG picture: mean cost against accuracy, with the chosen setting."""
    width, height, left, top = 640, 400, 70, 40
    points = [*result.curve, result.whole]
    costs, tops = [s.cost for s in points] + [1.0], [s.accuracy for s in points]
    x0, x1 = max(0.0, min(costs) - 0.05), 1.02
    y0, y1 = min(tops) - 0.5, max(tops) + 0.5

    def place(s: Setting) -> tuple[float, float]:
        return (left + (s.cost - x0) / (x1 - x0) * (width - left - 20),
                height - 50 - (s.accuracy - y0) / (y1 - y0) * (height - 50 - top))

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(words)}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
             f'<path d="M{left} {top}V{height - 50}H{width - 20}" fill="none" stroke="#888"/>',
             text(width / 2, 20, title), text(width / 2, height - 12, "mean cost, fraction of the whole network"),
             text(16, top - 8, "top-1 %", "start")]
    for i in range(5):
        cost, accuracy = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        x, y = place(Setting(result.whole.thresholds, accuracy, cost, result.whole.shares, 0))
        parts += [text(x, height - 34, f"{cost:.2f}"), text(left - 8, y + 4, f"{accuracy:.1f}", "end")]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, result.curve))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2266aa" stroke-width="2"/>')
    for s, colour, radius in ((result.whole, "#888", 4), (result.setting, "#cc3311", 6)):
        x, y = place(s)
        words = f"{s.accuracy:.2f} % at {s.cost:.2f}: " + ", ".join(
            f"{n} {100 * v:.0f} %" for n, v in zip(names, s.shares, strict=True))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
                     f"<title>{_escaped(words)}</title></circle>")
    return "\n".join([*parts, "</svg>", ""])


def _escaped(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


