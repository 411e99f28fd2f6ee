"""Two artefacts as one classifier: the second runs on the samples about which the first is uncertain.

A sample whose confidence lies inside a window goes on to the second network, and its answer is the mean of both
networks' probabilities (Xia and Bouganis, Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023).
Needs numpy and the artefacts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skive.errors import ExitError
from skive.exit_calls import Result
from skive.runtime import Module

SCORES = ("max-prob", "margin", "entropy", "energy")


@dataclass(frozen=True)
class CascadeResult:
    """`outputs`: probabilities [n, classes]. Per sample: `second`, whether the second network ran; `scores`, what the
    window was compared with; `macs`."""

    outputs: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    macs: np.ndarray


class Cascade:
    """Calls `first`, and `second` on what lies in `window` (lowest and highest score, both included).

    `score`: max-prob, margin, entropy or energy of the first network's answer. `probabilities`: whether the networks
    give probabilities, not logits. Both take the same inputs and give one output [n, classes]; integers with a scale
    count as the real numbers they stand for. ExitError if they differ or the window is none.
    """

    def __init__(self, first: Module, second: Module, window: tuple[float, float], score: str = "max-prob",
                 probabilities: bool = False):
        if score not in SCORES:
            raise ExitError(f"there is no score {score!r}; there are {', '.join(SCORES)}")
        low, high = map(float, window)
        if not low <= high:
            raise ExitError(f"the window is {low:g} to {high:g}; the lower end comes first")
        if probabilities and score == "energy":
            raise ExitError("energy is a score of logits; the networks give probabilities")
        ports = [[(p.shape[1:], p.dtype, p.scale, p.zero) for p in m.inputs] for m in (first, second)]
        if ports[0] != ports[1]:
            raise ExitError("the networks take different inputs (shape of a sample, element type, scale and zero point "
                            f"of integers): {ports[0]} and {ports[1]}")
        classes = []
        for m in (first, second):
            found = {p.shape[1:] for i, p in enumerate(m.outputs) if not m.exits or i in m.exits[-1].outputs}
            if len(found) != 1 or len(next(iter(found))) != 1:
                raise ExitError(f"{m.folder} gives {sorted(found)}; a cascade needs one output [n, classes]")
            classes.append(next(iter(found))[0])
        if classes[0] != classes[1]:
            raise ExitError(f"the networks tell {classes[0]} and {classes[1]} classes apart")
        self.first, self.second = first, second
        self.window = (low, high)
        self.score, self._probabilities = score, probabilities

    @staticmethod
    def window_around(scores: np.ndarray, threshold: float, width: float = 0.2) -> tuple[float, float]:
        """The window around `threshold` that holds the fraction `width` of `scores`, half of it on either side: between
        the quantiles of the threshold minus and plus width / 2."""
        at = float((np.asarray(scores) <= threshold).mean())
        low, high = np.quantile(scores, [max(0.0, at - width / 2), min(1.0, at + width / 2)])
        return float(low), float(high)

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Class probabilities [n, classes]."""
        return self.run(*inputs).outputs

    def run(self, *inputs: np.ndarray) -> CascadeResult:
        """A call with what happened to each sample, which are in order whatever happened."""
        logits, macs = _all(self.first, inputs)
        outputs = logits if self._probabilities else softmax(logits)
        scores = confidence(logits, outputs, self.score)
        second = (scores >= self.window[0]) & (scores <= self.window[1])
        if second.any():
            more, spent = _all(self.second, [a[second] for a in inputs])
            outputs[second] = (outputs[second] + (more if self._probabilities else softmax(more))) / np.float32(2)
            macs[second] += spent
        return CascadeResult(outputs, second, scores, macs)


def _all(module: Module, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """(output [n, classes], multiply-accumulates [n]) of any number of samples, in calls of as many as fit."""
    count = len(inputs[0])
    size = module.manifest["batch_max"] or module.inputs[0].shape[0]
    if module.manifest["batch_max"] is None and (size > 1 and count % size):
        raise ExitError(f"{module.folder} takes {size} samples a call and {count} remain; compile it with batch_max")
    results = [module.run(*(a[i:i + size] for a in inputs)) for i in range(0, count, size)]
    macs = np.concatenate([r.macs if len(r.macs) == len(r.outputs) else
                           np.full(len(r.outputs), r.macs[0] // len(r.outputs)) for r in results])
    return np.concatenate([_real(module, r) for r in results]), macs


def _real(module: Module, result: Result) -> np.ndarray:
    """[n, classes] float32. Integers have the scale and the zero point of the exit that a sample took."""
    ports = [module.outputs[w.outputs[0]] for w in module.exits] or [module.outputs[0]]
    # Of a fixed batch nothing leaves.
    taken = result.exit if len(result.exit) == len(result.outputs) else np.full(len(result.outputs), len(ports) - 1)
    real = np.empty(result.outputs.shape, np.float32)
    for e, port in enumerate(ports):
        real[taken == e] = port.dequantize(result.outputs[taken == e])
    return real


def softmax(logits: np.ndarray) -> np.ndarray:
    """The class probabilities of `logits` [n, classes], float32."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def confidence(logits: np.ndarray, probabilities: np.ndarray, score: str) -> np.ndarray:
    """One number per sample, float32: of `SCORES` the one called `score`."""
    if score == "max-prob":
        return probabilities.max(-1)
    if score == "margin":
        two = np.partition(probabilities, -2, axis=-1)[:, -2:]
        return two[:, 1] - two[:, 0]
    if score == "entropy":
        return -(probabilities * np.log(np.maximum(probabilities, np.float32(1e-37)))).sum(-1)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1))
