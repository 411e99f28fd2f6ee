"""Weights rounded up or down such that a layer's sums stay what they were on calibration data.

Nearest is not best: what counts is the error of the sums, e H e' for the rounding errors e of one
output channel and H the second moments of the layer's inputs. The objective is that of Nagel et al.,
Up or Down? Adaptive Rounding for Post-Training Quantization, 2020; it is lowered by coordinate
descent over the integers, all output channels at once, instead of gradient steps on a relaxation, so
the result is deterministic and never worse than nearest rounding on the data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from skive.calibration import Run
from skive.ir import Node
from skive.passes.quantize import Format, Layer, Quantizer

log = logging.getLogger("skive.rounding")

MOST_INPUTS = 1536  # weights of an output channel: the second moments take the square of it
# Positions of one sample that enter the second moments: fewer for wide layers, whose moments cost the
# square of their width.
ROWS, FEWEST_ROWS, ROW_INPUTS = 512, 96, 100_000
SWEEPS = 4
# Multiply-adds at most of one sweep over all layers, about a minute of one core: the layers behind it keep
# nearest rounding. A limit in seconds would make the weights depend on what else the machine does.
MOST_WORK = 100_000_000_000
DAMPING = 0.01  # of the mean diagonal: directions the data does not show


@dataclass
class Moments:
    """Second moments of a layer's rounded inputs, per group, and the means of its inputs."""

    products: np.ndarray  # [G, K, K] float32
    mean: np.ndarray  # [G, K] float64, of the float inputs
    rounded_mean: np.ndarray  # [G, K] float64, of the inputs as they are stored
    rows: int = 0


def patches(node: Node, x: np.ndarray, rows: int, seed: int) -> np.ndarray | None:
    """[R, G, K] inputs of R positions of the contraction `node`; None where it has no such form."""
    if node.op == "linear":
        flat = x.reshape(-1, x.shape[-1])
        return flat[_places(len(flat), rows, seed)][:, None, :]
    if node.op != "conv2d":
        return None
    n, oh, ow, _ = node.shape
    _, kh, kw, ic = node.inputs[1].shape
    top, left, bottom, right = node.attrs["pad"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    at = _places(n * oh * ow, rows, seed)
    image, row, column = np.unravel_index(at, (n, oh, ow))
    down = row[:, None] * node.attrs["stride"][0] + np.arange(kh) * node.attrs["dilation"][0]  # [R, KH]
    across = column[:, None] * node.attrs["stride"][1] + np.arange(kw) * node.attrs["dilation"][1]
    taken = padded[image[:, None, None], down[:, :, None], across[:, None, :]]  # [R, KH, KW, C]
    groups = node.attrs["groups"]
    return np.moveaxis(taken.reshape(len(at), kh * kw, groups, ic), 2, 1).reshape(len(at), groups, kh * kw * ic)


def _places(count: int, rows: int, seed: int) -> np.ndarray:
    """At most `rows` of `count` positions, each at most once."""
    if count <= rows:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))


def moments(
    layers: Sequence[Layer],
    forms: Sequence[Format],
    offsets: Sequence[np.ndarray | None],
    run: Run,
    samples: Iterable[Sequence[np.ndarray]],
) -> dict[Node, Moments]:
    """Moments of the `layers` whose inputs, in this order, `run` gives for each sample; `offsets`: by channel, with
    which they are stored."""
    found: dict[Node, Moments] = {}
    for turn, sample in enumerate(samples):
        for layer, form, offset, x in zip(layers, forms, offsets, run(sample), strict=True):
            groups = layer.node.attrs.get("groups", 1)
            size = layer.weights[0].size
            if size > MOST_INPUTS:
                continue
            rows = patches(layer.node, x, min(ROWS, max(FEWEST_ROWS, ROW_INPUTS // size)), turn)
            if rows is None:
                continue
            if offset is None:
                stored = form.real(rows)
            else:
                more = np.tile(offset.reshape(groups, -1), size * groups // len(offset))  # [G, K]
                stored = form.real(rows + more) - more
            m = found.get(layer.node)
            if m is None:
                m = found[layer.node] = Moments(
                    np.zeros((groups, size, size), np.float32), np.zeros((groups, size)), np.zeros((groups, size))
                )
            if groups == 1:
                m.products[0] += stored[:, 0].T @ stored[:, 0]  # BLAS computes half of a symmetric product
            else:
                m.products += np.moveaxis(stored, 0, 2) @ np.moveaxis(stored, 0, 1)
            m.mean += rows.sum(0, dtype=np.float64)
            m.rounded_mean += stored.sum(0, dtype=np.float64)
            m.rows += len(rows)
    return found


def rounded(layer: Layer, m: Moments, limit: int) -> np.ndarray:
    """Integers of the weights of `layer`, each the one below or above the real weight."""
    w = layer.node.inputs[1].value
    real = (w / layer.shaped(layer.scales)).reshape(m.products.shape[0], -1, m.products.shape[1]).astype(np.float32)
    result = np.clip(np.rint(real), -limit, limit)
    for g, (target, q) in enumerate(zip(real, result, strict=True)):  # [OC/G, K]
        h = m.products[g] / max(1, m.rows)
        diagonal = np.diagonal(h).copy()
        damped = DAMPING * float(diagonal.mean()) + 1e-12
        h = h + damped * np.eye(len(h), dtype=np.float32)
        diagonal += damped
        error = q - target
        slope = error @ h  # [OC/G, K] half the gradient
        order = np.argsort(-diagonal, kind="stable")
        for _ in range(SWEEPS):
            moved = 0
            for k in order:
                e = error[:, k]
                # The other neighbour of the real weight; an exact integer stays.
                step = np.where(e > 0, -1.0, np.where(e < 0, 1.0, 0.0)).astype(np.float32)
                gain = 2 * step * slope[:, k] + step * step * diagonal[k]
                step[(gain >= -1e-12) | (np.abs(q[:, k] + step) > limit)] = 0
                changed = np.flatnonzero(step)
                if len(changed):
                    moved += len(changed)
                    q[changed, k] += step[changed]
                    error[changed, k] += step[changed]
                    slope[changed] += step[changed, None] * h[k]
            if not moved:
                break
    return result.reshape(w.shape).astype(np.int32)


def adapt(
    quantizer: Quantizer, run: Run, samples: Iterable[Sequence[np.ndarray]]
) -> tuple[dict[Node, np.ndarray], dict[Node, np.ndarray]]:
    """(integers of the weights, corrected float biases) of the layers for which they can be found.

    Layers of more than MOST_INPUTS weights per channel, and those behind MOST_WORK, keep nearest rounding.
    `run` gives the inputs of `quantizer.layers`, in order. A bias takes over what rounding weights and inputs
    adds to the mean of the sums.
    """
    work = 0
    layers = list(quantizer.layers.values())
    forms = [quantizer.format_of(layer.node.inputs[0]) for layer in layers]
    offsets = [quantizer.offset_of(layer.node.inputs[0]) for layer in layers]
    found = moments(layers, forms, offsets, run, samples)
    weights: dict[Node, np.ndarray] = {}
    biases: dict[Node, np.ndarray] = {}
    for layer, form in zip(layers, forms, strict=True):
        m = found.get(layer.node)
        if m is None:
            continue
        work += layer.weights.size * m.products.shape[1]
        if form.dtype.bytes == 1 and work <= MOST_WORK:
            weights[layer.node] = layer.weights = rounded(layer, m, 127)
        node = layer.node
        groups, size = m.mean.shape
        shape = (groups, -1, size)
        got = np.einsum("gok,gk->go", layer.real_weights.reshape(shape).astype(np.float64), m.rounded_mean / m.rows)
        want = np.einsum("gok,gk->go", node.inputs[1].value.reshape(shape).astype(np.float64), m.mean / m.rows)
        bias = node.inputs[2].value if len(node.inputs) > 2 else np.zeros(node.shape[-1])
        biases[node] = (bias - (got - want).reshape(-1)).astype(np.float32)
    log.info("roundings of %d of %d layers adapted to the data", len(weights), len(layers))
    return weights, biases
