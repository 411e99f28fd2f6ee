"""Criteria beyond the classes of one network: two artefacts in a cascade, the quality of images."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest

import skive
from skive import _native, image_quality, ops
from skive.cascade import Cascade
from skive.errors import ExitError
from skive.ir import Graph, Node, constant
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

ISAS = [t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())]


# ------------------------------------------------------------------------------------ two artefacts


def classifier(seed: int, width: int, name: str, classes: int = 4, batch: int | None = 16) -> Graph:
    rng = np.random.default_rng(seed)

    def w(*shape: int) -> Node:
        return constant((1.6 * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    x = ops.make("input", shape=(1, 10), dtype=DType.f32, label="x")
    hidden = ops.make("tanh", ops.make("linear", x, w(width, 10), w(width)))
    y = ops.make("linear", hidden, w(classes, width), w(classes))
    return Graph(name, (x,), (y,), ("y",), batch)


SMALL, LARGE = classifier(1, 8, "small"), classifier(2, 40, "large")


@pytest.fixture(scope="module")
def members() -> Iterator[tuple[skive.Module, skive.Module]]:
    yield skive.compile(SMALL, batch_max=16), skive.compile(LARGE, batch_max=16)


def logits_of(graph: Graph, x: np.ndarray) -> np.ndarray:
    return np.concatenate([evaluate_graph(graph, [row[None]])[0] for row in x]).astype(np.float64)


def numpy_scores(logits: np.ndarray) -> dict[str, np.ndarray]:
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ranked = np.sort(p, -1)
    return {"max-prob": ranked[:, -1], "margin": ranked[:, -1] - ranked[:, -2], "entropy": -(p * np.log(p)).sum(-1),
            "energy": np.log(np.exp(logits).sum(-1))}


@pytest.mark.parametrize("score", ["max-prob", "margin", "entropy", "energy"])
def test_a_cascade_equals_numpy(members: tuple[skive.Module, skive.Module], score: str) -> None:
    x = np.random.default_rng(0).standard_normal((300, 10)).astype(np.float32)
    one, two = logits_of(SMALL, x), logits_of(LARGE, x)
    scores = numpy_scores(one)[score]
    window = Cascade.window_around(scores, float(np.quantile(scores, 0.4)))
    cascade = skive.Cascade(*members, window=window, score=score)
    got = cascade.run(x)
    inside = (scores > window[0] - 1e-6) & (scores < window[1] + 1e-6)
    edge = (np.abs(scores[:, None] - window) < 1e-6).any(-1)  # a quantile may be a sample's own score
    assert edge.sum() <= 2 and 0.18 < inside.mean() < 0.22
    np.testing.assert_array_equal(got.second[~edge], inside[~edge])
    np.testing.assert_allclose(got.scores, scores, rtol=1e-4, atol=1e-5)
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (one, two))
    np.testing.assert_allclose(got.outputs, np.where(got.second[:, None], (p + q) / 2, p), atol=1e-5)
    spent = [m.report["compiled"]["macs"] for m in members]
    np.testing.assert_array_equal(got.macs, spent[0] + got.second * spent[1])
    np.testing.assert_array_equal(cascade(x), got.outputs)
    halves = np.concatenate([cascade(x[:7]), cascade(x[7:])])  # whom a sample comes with changes nothing
    np.testing.assert_array_equal(halves, got.outputs)


def test_a_cascade_of_networks_with_exits_counts_what_was_spent(members: tuple[skive.Module, skive.Module]) -> None:
    hidden = SMALL.outputs[0].inputs[0]
    early = ops.make("linear", hidden, constant(np.eye(4, 8, dtype=np.float32)))
    later = ops.make("linear", ops.make("tanh", ops.make("linear", hidden, constant(np.eye(8, dtype=np.float32)))),
                     constant(np.ones((4, 8), np.float32)))
    first = skive.compile(Graph("exits", SMALL.inputs, (early, later), ("early", "later"), 16), batch_max=16,
                          exits=["early:max-prob=0.5"])
    x = np.random.default_rng(0).standard_normal((40, 10)).astype(np.float32)
    spent = np.concatenate([first.run(x[i:i + 16]).macs for i in range(0, 40, 16)])
    first.thresholds = {"early": 0.55}
    assert copy.deepcopy(first).thresholds == first.thresholds
    first.thresholds = {"early": 0.5}
    got = skive.Cascade(first, members[1], window=(0, 0.4)).run(x)
    assert len(set(spent.tolist())) == 2 and 0 < got.second.sum() < 40
    np.testing.assert_array_equal(got.macs, spent + got.second * members[1].report["compiled"]["macs"])


def test_a_cascade_of_integers_reads_their_scales(members: tuple[skive.Module, skive.Module]) -> None:
    x = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
    quantize = skive.Quantize("int8", calibration=x, integer_only=True)
    integers = [skive.compile(g, batch_max=16, quantize=quantize) for g in (SMALL, LARGE)]
    got = skive.Cascade(*integers, window=(0, 0.6))(integers[0].inputs[0].quantize(x))
    want = skive.Cascade(*members, window=(0, 0.6))(x)
    assert np.abs(got - want).mean() < 0.03


def test_a_cascade_reads_the_scale_of_the_exit_taken() -> None:
    x = np.random.default_rng(0).standard_normal((16, 10)).astype(np.float32)
    early, later = SMALL.outputs[0], ops.make("mul", SMALL.outputs[0], constant(np.array(3, np.float32)))
    graph = Graph("exits", SMALL.inputs, (early, later), ("early", "later"), 16)
    quantize = skive.Quantize("int8", calibration=x, integer_only=True)
    first = skive.compile(graph, batch_max=16, exits=["early:max-prob=0.6"], quantize=quantize)
    ports = [first.outputs[e.outputs[0]] for e in first.exits]
    assert ports[0].scale != ports[1].scale
    codes = first.inputs[0].quantize(x)
    ways = first.run(codes).exit
    assert set(ways.tolist()) == {0, 1}
    values = first.all_outputs(codes)
    one, two = (p.dequantize(values[e.outputs[0]]) for p, e in zip(ports, first.exits, strict=True))
    logits = np.where(ways[:, None] == 0, one, two)
    want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = skive.Cascade(first, skive.compile(SMALL, batch_max=16, quantize=quantize), window=(2, 2))(codes)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_makes_no_cascade(members: tuple[skive.Module, skive.Module]) -> None:
    with pytest.raises(ExitError, match="no score 'luck'"):
        Cascade(*members, window=(0, 1), score="luck")
    with pytest.raises(ExitError, match="lower end comes first"):
        Cascade(*members, window=(1, 0))
    byte = skive.Quantize("int8", calibration=np.full((8, 10), 3, np.float32), integer_only=True)
    with pytest.raises(ExitError, match="scale and zero point"):
        Cascade(members[0], skive.compile(LARGE, batch_max=16, quantize=byte), window=(0, 1))
    with pytest.raises(ExitError, match="4 and 3 classes"):
        Cascade(members[0], skive.compile(classifier(3, 4, "three", classes=3), batch_max=16), window=(0, 1))
    with pytest.raises(ExitError, match="energy is a score of logits"):
        Cascade(*members, window=(0, 1), score="energy", probabilities=True)


# ---------------------------------------------------------------------------------------- quality


def numpy_quality(image: np.ndarray, size: int) -> float:
    """The published measure of `image` [H, W], patch by patch in float64."""
    t = np.zeros((size, size))  # by the recurrence of Mukundan et al., Image Analysis by Tchebichef Moments, 2001
    x = np.arange(size)
    t[0], t[1] = 1 / np.sqrt(size), (2 * x + 1 - size) * np.sqrt(3 / (size * (size**2 - 1)))
    for n in range(2, size):
        a1 = 2 / n * np.sqrt((4 * n**2 - 1) / (size**2 - n**2))
        a2 = (1 - size) / n * np.sqrt((4 * n**2 - 1) / (size**2 - n**2))
        a3 = (1 - n) / n * np.sqrt((2 * n + 1) / (2 * n - 3)) * np.sqrt((size**2 - (n - 1)**2) / (size**2 - n**2))
        t[n] = (a1 * x + a2) * t[n - 1] + a3 * t[n - 2]
    g = np.exp(-np.array([-1, 0, 1])**2 / 50.0)
    kernel = np.outer(g, g) / g.sum()**2

    def moments(patch: np.ndarray) -> np.ndarray:
        patch = patch / np.sqrt((patch**2).sum())
        return t @ (patch - patch.mean()) @ t.T

    smooth, textured = [], []
    height, width = (n // size * size for n in image.shape)
    for i in range(size // 2 - 1, height - size + 1, size):
        for j in range(size // 2 - 1, width - size + 1, size):
            patch = image[i:i + size, j:j + size].astype(np.float64)
            if patch.std() < 1e-6 * np.abs(patch).max() or not patch.any():
                smooth.append(1.0)
                continue
            m = moments(patch)
            if (m**2).sum() - m[0, 0]**2 > 0.004:
                wide = np.pad(patch, 1)
                soft = sum(kernel[a, b] * wide[a:a + size, b:b + size] for a in range(3) for b in range(3))
                b_ = moments(np.asarray(soft))
                textured.append(1 - np.mean((2 * m * b_ + 1e-5) / (m**2 + b_**2 + 1e-5)))
            else:
                shares = [np.abs(v).sum() / np.abs(m).sum() - abs(m[0, 0]) + 1e-5 for v in (m[-1], m[:, -1])]
                smooth.append(np.log(1 - sum(min(s, 0.05) for s in shares) / 2) / np.log(0.95))
    means = [np.mean(v) if v else 1.0 for v in (smooth, textured)]
    return float(means[0]**0.9 * means[1]**0.1)


def enhancement(height: int, width: int) -> Graph:
    """An image, one convolution further a first enhanced one, and the last one."""
    rng = np.random.default_rng(4)
    x = ops.make("input", shape=(1, height, width, 2), dtype=DType.f32, label="x")
    found = [x]
    for _ in range(2):
        w = constant((0.04 * rng.standard_normal((2, 3, 3, 2))).astype(np.float32))
        found.append(ops.make("add", found[-1], ops.make("conv2d", found[-1], w, pad=(1, 1, 1, 1))))
    outputs = tuple(ops.make("transpose", v, perm=(0, 3, 1, 2)) for v in found[1:])
    return Graph("enhance", (x,), outputs, ("first", "last"), None)


def images(count: int, height: int, width: int) -> np.ndarray:
    """Gradients with edges, in blocks of 8 that differ, and noise: more of it from image to image."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width] / 16
    result = []
    for i in range(count):
        picture = 2 + rng.normal() * y + rng.normal() * x + (x + rng.normal() * y > 1.2) * rng.uniform(0, 1.5)
        blocks = rng.standard_normal((-(-height // 8), -(-width // 8)))
        picture += 0.1 * np.kron(blocks, np.ones((8, 8)))[:height, :width]
        noise = (0.3 * i / count * (x > rng.uniform(0, 2)))[:, :, None] * rng.standard_normal((height, width, 2))
        result.append(picture[:, :, None] + noise)
    result[0][:] = 0.7  # no contrast at all
    result[1][:] = 0
    return np.asarray(result, np.float32)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("target", [
    pytest.param(t, marks=[] if t in ("generic", ISAS[-1]) else pytest.mark.slow) for t in ISAS])
def test_quality_decides_as_numpy_does(size: int, target: str) -> None:
    graph = enhancement(35, 42)  # no whole number of blocks
    module = skive.compile(graph, exits=[f"first:quality@{size}=0.5"], target=target)
    assert module.exits[0].test == ">="
    pictures = images(100, 35, 42)
    want = np.asarray([numpy_quality(evaluate_graph(graph, [p[None]])[0][0, 0], size) for p in pictures])
    got = [module.run(p[None]) for p in pictures]
    np.testing.assert_allclose([r.scores[0, 0] for r in got], want, rtol=2e-4, atol=2e-5)
    assert want.std() > 0.02
    for threshold in (np.sort(want)[[20, 50, 80]] + np.sort(want)[[21, 51, 81]]) / 2:
        module.thresholds = {"first": threshold}
        taken = [int(module.run(p[None]).exit[0]) for p in pictures]
        np.testing.assert_array_equal(taken, np.where(want >= threshold, 0, 1))


def test_the_moments_are_the_published_ones() -> None:
    t = image_quality.tchebichef(8)
    np.testing.assert_allclose(t @ t.T, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(t[7], [-.0171, .1195, -.3585, .5974, -.5974, .3585, -.1195, .0171], atol=5e-5)
    np.testing.assert_allclose(image_quality.tchebichef(4)[1], [-.6708, -.2236, .2236, .6708], atol=5e-5)


def test_quality_needs_images() -> None:
    with pytest.raises(ExitError, match="at least 16x16"):
        skive.compile(enhancement(14, 42), exits=["first:quality=0.9"])
    with pytest.raises(ExitError, match="blocks of 8"):
        skive.compile(enhancement(35, 42), exits=["first:quality@5=0.9"])
    with pytest.raises(ExitError, match="4 dimensions"):
        skive.compile(Graph("no", SMALL.inputs, (SMALL.outputs[0].inputs[0], SMALL.outputs[0]), ("a", "b"), None),
                      exits=["a:quality=0.9"])
