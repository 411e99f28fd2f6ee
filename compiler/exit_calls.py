"""Calls of a network with early exits: which result belongs to which sample."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skive.errors import ExitError

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le
}


LARGEST = 2**24  # of an integer score: float32 holds it


def code(test: str, threshold: float, scale: float) -> int:
    """The int32 with which integer scores of at most LARGEST compare as `test` says exactly where they, times `scale`
    and in float32, compare so with `threshold`. Never with NaN."""
    real, holds = np.float32(threshold), COMPARE[test]
    sign = 1 if test[0] == ">" else -1
    low, high = -LARGEST, LARGEST + 1  # the least of sign * score that leaves lies there; `high`: none does
    while low < high:
        middle = (low + high) // 2
        if holds(np.float32(sign * middle) * np.float32(scale), real):
            high = middle
        else:
            low = middle + 1
    return sign * (low if test.endswith("=") else low - 1)


@dataclass(frozen=True)
class Way:
    """One exit of an artefact. `outputs`: numbers of its results among `Module.outputs`; `score`: the number of what is
    compared with the threshold, None of the last exit; `macs`: from the start to this exit; `scale`: of scores that are
    integers, the real number that a 1 stands for."""

    name: str
    outputs: tuple[int, ...]
    criterion: str | None
    score: int | None
    test: str | None
    macs: int
    scale: float | None = None

    def real(self, scores: np.ndarray) -> np.ndarray:
        """[n] float32: the scores of n samples."""
        factor = np.float32(1 if self.scale is None else self.scale)
        return scores.reshape(-1).astype(np.float32) * factor


@dataclass(frozen=True)
class Result:
    """What `Module.run` returns: `outputs` as a call gives them; for every sample the index of the exit taken, the
    multiply-accumulates spent, and the score at each exit that was reached (NaN at the others)."""

    outputs: Any
    exit: np.ndarray
    macs: np.ndarray
    scores: np.ndarray


def read(manifest: Mapping[str, Any], output_names: Sequence[str]) -> tuple[tuple[Way, ...], np.ndarray]:
    """(the exits of a manifest, their thresholds); none for a network without. KeyError, ValueError if damaged."""
    ways, thresholds = [], []
    for e in manifest.get("exits") or ():
        score = output_names.index(e["score"]) if e["score"] is not None else None
        outputs = tuple(output_names.index(n) for n in e["outputs"])
        ways.append(Way(e["name"], outputs, e["criterion"], score, e["test"], e["macs"], e.get("scale")))
        if score is not None:
            thresholds.append(float(e["threshold"]))
    return tuple(ways), np.asarray(thresholds, np.float32)


def given(ways: Sequence[Way], thresholds: np.ndarray) -> np.ndarray:
    """The thresholds as the artefact takes them: int32 where scores are integers."""
    if all(w.scale is None for w in ways):
        return thresholds
    return np.asarray([code(str(w.test), t, w.scale) for w, t in zip(ways, thresholds, strict=False)
                       if w.scale is not None], np.int32)


def changed(ways: Sequence[Way], thresholds: np.ndarray, new: Mapping[str, float]) -> np.ndarray:
    """`thresholds` with those of `new` by the name of the exit; ExitError for an unknown name."""
    names = [w.name for w in ways if w.score is not None]
    result = thresholds.copy()
    for name, value in new.items():
        if name not in names:
            raise ExitError(f"there is no exit {name!r} with a threshold; there are {', '.join(names) or 'none'}")
        result[names.index(name)] = value
    return result


def taken(ways: Sequence[Way], values: Sequence[np.ndarray], exits: np.ndarray) -> Any:
    """The outputs of the exit that each sample took, in the order of the samples: an array, or a tuple of several."""
    if len(exits) == 1:
        chosen = [values[i] for i in ways[int(exits[0])].outputs]
    else:
        last = ways[-1].outputs
        chosen = [values[i] for i in last]
        for k, way in enumerate(ways[:-1]):
            rows = exits == k
            if rows.any():
                for c, i in zip(chosen, way.outputs, strict=True):
                    c[rows] = values[i][rows]
    return chosen[0] if len(chosen) == 1 else tuple(chosen)


def result(ways: Sequence[Way], values: Sequence[np.ndarray], exits: np.ndarray, outputs: Any) -> Result:
    """`outputs` with what each sample cost."""
    scores = np.full((len(exits), len(ways) - 1), np.nan, np.float32)
    for k, way in enumerate(ways):
        if way.score is not None:
            scores[:, k] = np.where(exits >= k, way.real(values[way.score]), np.nan)
    return Result(outputs, exits, np.asarray([w.macs for w in ways], np.int64)[exits], scores)
