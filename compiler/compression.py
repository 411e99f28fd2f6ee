"""Weight-only quantization: what `Quantize("weights8")` and `Quantize("weights4")` do to a network.

The pass `compress-weights` is the plain form. With calibration data weights of 4 bits are rounded up or
down such that each layer's sums stay what they were on the data, and the network's noise is measured.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import explanation, ops
from skive.errors import QuantizationError, UnsupportedOpError
from skive.ir import Graph, Node

if TYPE_CHECKING:
    from skive.calibration import Run
    from skive.passes.compress_weights import Compressed
    from skive.quantization import Progress, Quantize

log = logging.getLogger("skive.compression")

SAMPLES = 32  # whose activations decide roundings
MEASURED = 8  # samples on which the network is compared with the float one
ROWS = 256  # of one sample that enter a layer's second moments
WIDEST = 4096  # weights of a channel: the second moments take the square of it
SWEEPS = 4
DAMPING = 0.01  # of the mean diagonal: directions that the data does not show


def adapted(w: np.ndarray, c: Compressed, moments: np.ndarray) -> Compressed:
    """`c` with the integers among the neighbours of `w` [OC, K] that make the least e H e' for the rounding
    errors e of each channel and the second `moments` H [K, K] of the layer's inputs; never worse than `c` by H.

    Objective: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020; lowered by
    coordinate descent over the integers.
    """
    from skive.passes.compress_weights import Compressed

    h = moments.astype(np.float32)
    h = h + (DAMPING * float(np.diagonal(h).mean()) + 1e-12) * np.eye(len(h), dtype=np.float32)
    diagonal = np.diagonal(h).copy()
    each = np.arange(w.shape[1]) // c.group
    scale = c.scale[:, each]
    low, high = (0, 15) if c.bits == 4 else (1, 255)
    q = c.q.astype(np.float32)
    error = c.real - w
    slope = error @ h  # [OC, K] half the gradient
    order = np.argsort(-diagonal, kind="stable")
    for _ in range(SWEEPS):
        moved = 0
        for k in order:
            s, e = scale[:, k], error[:, k]
            # The other neighbour of the real weight; what is exact stays.
            step = -np.sign(e * s)
            gain = 2 * step * s * slope[:, k] + s * s * diagonal[k]
            step[(gain >= 0) | (q[:, k] + step < low) | (q[:, k] + step > high)] = 0
            changed = np.flatnonzero(step)
            if len(changed):
                moved += len(changed)
                q[changed, k] += step[changed]
                delta = step[changed] * s[changed]
                error[changed, k] += delta
                slope[changed] += delta[:, None] * h[k]
        if not moved:
            break
    return Compressed(q.astype(np.uint8), c.scale, c.zero, c.bits, c.group)


def second_moments(
    layers: Sequence[Node], run: Run, samples: Iterable[Sequence[np.ndarray]]
) -> dict[Node, np.ndarray]:
    """[K, K] mean products of the inputs of each of `layers`, which `run` gives for a sample."""
    found: dict[Node, np.ndarray] = {}
    rows: dict[Node, int] = {}
    for sample in samples:
        for node, x in zip(layers, run(sample), strict=True):
            flat = x.reshape(-1, x.shape[-1]).astype(np.float32)
            if len(flat) > ROWS:
                flat = flat[np.linspace(0, len(flat) - 1, ROWS).astype(int)]
            total = found.setdefault(node, np.zeros((flat.shape[1],) * 2, np.float32))
            total += flat.T @ flat
            rows[node] = rows.get(node, 0) + len(flat)
    return {n: m / rows[n] for n, m in found.items()}


def apply(graph: Graph, options: Quantize, progress: Progress, measure: bool = True) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` on compressed weights, the `quantization` of report.json).

    QuantizationError if there is no layer whose weights can be compressed.
    """
    from skive.passes.compress_weights import Scheme, compress

    bits = 4 if options.dtype == "weights4" else 8
    scheme = Scheme(bits, options.block, options.activations, options.keeps)
    result, found = compress(graph, scheme)
    if not found:
        raise QuantizationError(f"{graph.name}: no fully connected layer or table whose weights could be compressed")
    samples = options.data(graph) if options.calibration is not None else None
    if samples is not None and options.rounding == "adaround":
        scheme.weights = _adapted(graph, found, itertools.islice(iter(samples), SAMPLES))
        result, found = compress(graph, scheme)
    progress("quantized", 0.2)
    details: dict[str, Any] = {
        "dtype": options.dtype,
        "samples": len(samples) if samples is not None else 0,
        "options": {"block": options.block, "activations": options.activations, "rounding": options.rounding},
        "sqnr_db": None,
        "layers": _layers(graph, found, scheme.activation),
    }
    if samples is not None and measure:
        chosen = list(itertools.islice(iter(samples), MEASURED))
        details["measured_samples"] = len(chosen)
        try:
            details["sqnr_db"] = _noise(graph, result, chosen)
        except UnsupportedOpError as e:
            log.warning("%s: signal-to-noise ratios are not measured: %s", graph.name, e)
    return result, details


def _adapted(
    graph: Graph, found: Mapping[Node, Compressed], samples: Iterable[Sequence[np.ndarray]]
) -> dict[Node, Compressed]:
    """The weights of the layers of 4 bits, rounded to suit the data."""
    from skive import calibration
    from skive.passes.compress_weights import matrix_of

    layers = [n for n, c in found.items() if c.bits == 4 and c.q.shape[1] <= WIDEST and matrix_of(n) is not None]
    run = calibration.runner(graph, [n.inputs[0] for n in layers], target="host")
    result: dict[Node, Compressed] = {}
    for node, moments in second_moments(layers, run, samples).items():
        w = matrix_of(node)
        assert w is not None
        result[node] = adapted(w, found[node], moments)
    return result


def _layers(graph: Graph, found: Mapping[Node, Compressed], activation: int) -> list[dict[str, Any]]:
    """One entry for each contraction and table, in execution order."""
    entries: list[dict[str, Any]] = []
    for node in graph.nodes:
        if not ops.macs(node) and node not in found:
            continue
        entry: dict[str, Any] = {"name": node.label(), "op": node.op, "dtype": "float32", "sqnr_db": None}
        entry["bytes"] = node.type.bytes
        entry["weight_bytes"] = sum(i.type.bytes for i in node.inputs if i.is_const)
        c = found.get(node)
        if c is None:
            entry["reason"] = "not a product of rows with a constant matrix" if ops.macs(node) else ""
        else:
            entry["dtype"] = f"weights{c.bits}"
            entry["bits"] = {"activations": activation if ops.macs(node) else 32, "weights": c.bits}
            entry["block"] = c.group
            entry["weight_bytes"] = c.bytes
            w = node.inputs[1 if ops.macs(node) else 0]
            if w.is_const:  # else the model came with these integers
                error = (c.real - w.value.reshape(c.q.shape)).astype(np.float64)
                power = float((w.value.astype(np.float64) ** 2).sum())
                entry["weight_sqnr_db"] = explanation.decibels(power, float((error**2).sum()))
        entries.append(entry)
    return entries


def _noise(graph: Graph, result: Graph, samples: Sequence[Sequence[np.ndarray]]) -> float | None:
    """The smallest signal-to-noise ratio of the float outputs, in dB."""
    from skive import calibration

    pairs = [(o, q) for o, q in zip(graph.outputs, result.outputs, strict=True) if o.dtype.is_float and o.type.size]
    exact = calibration.runner(graph, [o for o, _ in pairs], target="host")
    rounded = calibration.runner(result, [q for _, q in pairs], target="host")
    power = np.zeros((2, len(pairs)))
    for sample in samples:
        for i, (w, g) in enumerate(zip(exact(sample), rounded(sample), strict=True)):
            power[0, i] += float(np.vdot(w, w))
            power[1, i] += float(np.vdot(g - w, g - w))
    return min((explanation.decibels(s, n) for s, n in power.T), default=None)
