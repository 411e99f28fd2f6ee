"""How far an artefact is from its model on many samples: noise, decisions, and with labels accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive.errors import ShapeError

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The interval that holds the rate behind `successes` of `trials`, at 95 % unless `z` says otherwise.

    Unlike the normal approximation it stays inside 0..1 and is sensible at 0 and at all successes.
    Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if trials <= 0:
        return 0.0, 1.0
    rate, share = successes / trials, z * z / trials
    centre = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    # Exact at the ends, where rounding would leave a digit.
    return 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == trials else min(1.0, centre + half)


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A rate as JSON data: its count, total, fraction and 95 % interval."""
    return {"count": successes, "of": trials, "fraction": successes / trials if trials else None,
            "interval": list(wilson(successes, trials))}


@dataclass
class _Output:
    """Sums over all samples of one output."""

    name: str
    signal: float = 0.0
    noise: float = 0.0
    worst: float = 0.0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        finite = np.isfinite(want) & np.isfinite(got)
        w = want[finite].astype(np.float64)
        error = got[finite].astype(np.float64) - w
        self.signal += float(np.vdot(w, w))
        self.noise += float(np.vdot(error, error))
        self.worst = max(self.worst, float(np.abs(error).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0 or self.signal == 0:
            return 300.0
        return min(300.0, 10 * math.log10(self.signal / self.noise))


@dataclass
class Agreement:
    """Collects the outputs of artefact and model sample by sample; `to_json` says what they have in common.

    Decisions are the largest element of the first float output that has one score per class: all axes
    but the first and one have length 1.
    """

    names: Sequence[str]
    outputs: list[_Output] = field(init=False)
    samples: int = 0
    decided: int = 0  # samples with a decision
    same: int = 0
    labelled: int = 0
    right: dict[str, int] = field(default_factory=lambda: {"artefact": 0, "model": 0, "both": 0})

    def __post_init__(self) -> None:
        self.outputs = [_Output(n) for n in self.names]

    def add(self, got: Sequence[np.ndarray], want: Sequence[np.ndarray], labels: np.ndarray | None = None) -> None:
        """Takes in the outputs of one call; `labels`: the right class of each of its samples.

        ShapeError if there are labels but no output with scores.
        """
        scores = None
        for output, g, w in zip(self.outputs, got, want, strict=True):
            if w.dtype.kind == "f":
                output.add(g, w)
                scores = scores or _scores(g, w)
        count = len(labels) if labels is not None else scores[0].shape[0] if scores else 1
        self.samples += count
        if scores is None:
            if labels is not None:
                raise ShapeError("labels need an output with one score per class; the outputs have "
                                 + ", ".join(str(list(w.shape)) for w in want))
            return
        mine, theirs = (np.argmax(s, axis=1) for s in scores)
        self.decided += len(mine)
        self.same += int((mine == theirs).sum())
        if labels is not None:
            if len(labels) != len(mine):
                raise ShapeError(f"{len(labels)} labels for {len(mine)} samples")
            a, m = mine == labels, theirs == labels
            self.labelled += len(labels)
            for key, value in (("artefact", a), ("model", m), ("both", a & m)):
                self.right[key] += int(value.sum())

    def to_json(self) -> dict[str, Any]:
        """`outputs`, and where there are decisions `top1_agreement`, and where there are labels `accuracy`."""
        facts: dict[str, Any] = {"outputs": [
            {"name": o.name, "sqnr_db": round(o.sqnr_db, 2), "max_abs_error": o.worst} for o in self.outputs]}
        if self.decided:
            facts["top1_agreement"] = proportion(self.same, self.decided)
        if self.labelled:
            facts["accuracy"] = {
                "artefact": proportion(self.right["artefact"], self.labelled),
                "model": proportion(self.right["model"], self.labelled),
                "only_artefact_right": self.right["artefact"] - self.right["both"],
                "only_model_right": self.right["model"] - self.right["both"]}
        return facts


def _scores(got: np.ndarray, want: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Both as [samples, classes]; None if they are no scores."""
    if want.ndim == 0 or want.ndim > 1 and sum(d > 1 for d in want.shape[1:]) != 1 or want.shape[-1:] == (0,):
        return None
    if want.ndim == 1:
        return (got[None], want[None]) if len(want) > 1 else None
    return got.reshape(len(got), -1), want.reshape(len(want), -1)
