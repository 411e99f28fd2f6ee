"""Options, calibration samples of every kind, and what is observed of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from skive import calibration, ops
from skive.calibration import Observation, Statistics, flat_parts, value_range
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant
from skive.quantization import Quantize, apply, requested
from skive.reference import evaluate_graph
from skive.samples import Samples
from skive.types import DType

RNG = np.random.default_rng(0)


def network() -> Graph:
    """Two convolutions with a residual addition, a mean and a linear layer, on [1, 6, 6, 3]."""
    rng = np.random.default_rng(1)

    def weights(*shape: int) -> Node:
        return constant((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    x = ops.make("input", shape=(1, 6, 6, 3), dtype=DType.f32, label="x")
    a = ops.make("conv2d", x, weights(8, 3, 3, 3), weights(8), pad=(1, 1, 1, 1), origin="first", label="a")
    a = ops.make("relu", a, origin="first", label="a_relu")
    b = ops.make("conv2d", a, weights(8, 3, 3, 8), weights(8), pad=(1, 1, 1, 1), origin="second", label="b")
    s = ops.make("relu", ops.make("add", b, a), origin="sum", label="s")
    m = ops.make("reshape", ops.make("reduce_mean", s, axes=(1, 2), origin="mean"), shape=(1, 8))
    return Graph("net", (x,), (ops.make("linear", m, weights(4, 8), weights(4), origin="fc"),), ("y",))


def data(count: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 6, 6, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int4"},
        {"method": "guess"},
        {"rounding": "up"},
        {"percentile": 10.0},
        {"smooth": 2.0},
        {"samples": 0},
    ],
)
def test_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(QuantizationError, match=next(iter(wrong))):
        Quantize(**wrong)  # type: ignore[arg-type]


def test_a_name_stands_for_its_defaults() -> None:
    assert requested("int16") == Quantize("int16")
    with pytest.raises(QuantizationError):
        requested(8)  # type: ignore[arg-type]


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path) -> None:
    graph, x = network(), data(5)
    np.savez(tmp_path / "d.npz", images=x, labels=np.arange(5))
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "d.npy", x)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, one in enumerate(x):
        np.save(folder / f"{i}.npy", one)

    def once() -> Iterator[np.ndarray]:
        yield from x

    sources = [x, {"x": x}, list(x), [{"x": v[None]} for v in x], f"{tmp_path}/d.npz:images", tmp_path / "x.npz",
               tmp_path / "d.npy", folder, once(), iter([x[:2], x[2:]])]
    for source in sources:
        samples = Samples(graph, source)
        for _ in range(2):  # also what can be read only once
            got = list(samples)
            assert [len(s) for s in got] == [1] * 5
            np.testing.assert_array_equal(np.concatenate([s[0] for s in got]), x)
        assert len(samples) == 5


def test_a_spooled_iterator_survives_being_left_early() -> None:
    samples = Samples(network(), iter([data(4)]), 3)
    np.testing.assert_array_equal(next(iter(samples))[0], data(4)[:1])
    assert len(list(samples)) == 3


def test_samples_are_spread_over_what_has_a_length() -> None:
    x = data(10)
    got = np.concatenate([s[0] for s in Samples(network(), x, 5)])
    np.testing.assert_array_equal(got, x[::2])


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (None, "needs calibration data"),
        ("missing.npz", "does not exist"),
        (np.zeros((3, 5, 5, 3), np.float32), "each sample must be"),
        (np.full((1, 6, 6, 3), np.nan, np.float32), "NaN"),
        ({"z": np.zeros((1, 6, 6, 3), np.float32), "y": np.zeros(1)}, "lacks input 'x'"),
        (np.zeros((0, 6, 6, 3), np.float32), "no sample"),
        (iter([]), "no sample"),
        (np.zeros((1, 6, 6, 3), np.complex64), "complex64"),
    ],
)
def test_bad_data_is_named(source: object, match: str) -> None:
    with pytest.raises(QuantizationError, match=match):
        list(Samples(network(), source))


def test_fingerprints_follow_the_data() -> None:
    x = data(3)
    assert Quantize(calibration=x).fingerprint() == Quantize(calibration=x.copy()).fingerprint()
    assert Quantize(calibration=x).fingerprint() != Quantize(calibration=x + 1).fingerprint()
    assert Quantize(calibration=x).fingerprint() != Quantize("int16", calibration=x).fingerprint()
    assert Quantize(calibration=iter(x)).fingerprint() is None


def test_an_observation_holds_bounds_and_moments() -> None:
    o = Observation.empty(4)
    values = RNG.standard_normal((6, 5, 5, 4)).astype(np.float32) * np.float32([1, 10, 0.1, 3])
    for turn, v in enumerate(values):
        o.add(v, turn)
    rows = values.reshape(-1, 4)
    assert (o.low, o.high) == (rows.min(), rows.max())
    np.testing.assert_array_equal(o.channel_high, rows.max(0))
    assert o.histogram.sum() == values.size and o.limit >= o.magnitude > o.limit / 4
    np.testing.assert_allclose(o.channel_mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(o.mean_square, np.square(rows).mean(), rtol=1e-5)


def test_histograms_do_not_depend_on_when_the_range_grew() -> None:
    values = [np.float32([[0.3, -0.2]]), np.float32([[100, 4]]), np.float32([[0.001, -7]])]
    histograms = []
    for order in (values, values[::-1]):
        o = Observation.empty(2)
        for v in order:
            o.add(v, 0)
        histograms.append(o.histogram)
    np.testing.assert_array_equal(*histograms)


def test_ranges_by_method() -> None:
    o = Observation.empty(1)
    values = np.abs(RNG.standard_normal((20000, 1))).astype(np.float32)
    values[7] = 100
    o.add(values, 0)
    high = {m: value_range(o, m)[1] for m in ("minmax", "percentile", "mse", "entropy")}
    assert high["minmax"] == 100
    assert 3 < high["percentile"] < 6
    assert all(value_range(o, m)[0] == 0 for m in high)

    def loss(top: float) -> float:
        step = top / 255
        return float(np.square(np.clip(np.rint(values / step), 0, 255) * step - values).sum())

    assert loss(high["mse"]) < 1.2 * min(loss(t) for t in np.linspace(2, 100, 99))


def test_calibration_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    graph, state = network(), tmp_path / "state.npz"
    values = [n for n in graph.nodes if n.name in ("x", "a_relu", "s")]
    samples = [(v[None],) for v in data(20)]
    whole = calibration.observe(graph, values, samples)
    calibration.observe(graph, values, samples[:9], state=state)
    seen = []
    resumed = calibration.observe(graph, values, samples, state=state, progress=seen.append)
    assert seen[0] == 10 and resumed.samples == whole.samples == 20
    for v in values:
        for key, want in vars(whole[v]).items():
            np.testing.assert_array_equal(getattr(resumed[v], key), want, err_msg=key)
    other = Statistics(graph, values[:1])
    assert not other.load(state)  # of other values
    state.write_bytes(b"damaged")
    assert not Statistics(graph, values).load(state)


def test_observed_values_are_those_of_the_reference() -> None:
    graph, x = network(), data(3)
    values = [n for n in graph.nodes if n.name in ("a_relu", "s")]
    found = calibration.observe(graph, values, [(v[None],) for v in x])
    highest = dict.fromkeys(graph.nodes, -np.inf)
    for v in x:
        evaluate_graph(graph, [v[None]], observe=lambda n, a: highest.update({n: max(highest[n], a.max())}))
    for node in values:
        np.testing.assert_allclose(found[node].high, highest[node], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "least"), [("int8", 25.0), ("int16", 60.0)])
def test_a_quantized_network_stays_close(dtype: str, least: float) -> None:
    graph, x = network(), data(24)
    quantized, details = apply(graph, Quantize(dtype, calibration=x[:16]), measure=False)
    want = np.concatenate([evaluate_graph(graph, [v[None]])[0] for v in x[16:]]).astype(np.float64)
    got = np.concatenate([evaluate_graph(quantized, [v[None]])[0] for v in x[16:]])
    assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) > least
    assert details["dtype"] == dtype and details["samples"] == 16
    again, _ = apply(graph, Quantize(dtype, calibration=x[:16]), measure=False)
    np.testing.assert_array_equal(evaluate_graph(again, [x[:1]])[0], evaluate_graph(quantized, [x[:1]])[0])


@pytest.mark.parametrize("dtype", ["int8", "auto", "weights8"])
def test_keep_that_names_nothing_is_an_error(dtype: str) -> None:
    with pytest.raises(QuantizationError, match="keep names 'oen', which no layer matches; there are "):
        apply(network(), Quantize(dtype, calibration=data(2), keep=("oen",)))


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no layer .* keep names every one"):
        apply(network(), Quantize(calibration=data(2), keep=("*",)))
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    softmax = Graph("g", (x,), (ops.make("softmax", x, axis=-1),), ("y",))
    with pytest.raises(QuantizationError, match="convolutions, fully connected layers"):
        apply(softmax, Quantize(calibration=np.ones((2, 1, 4), np.float32)))
    quantized, _ = apply(network(), Quantize(calibration=data(2)), measure=False)
    with pytest.raises(QuantizationError, match="comes quantized; leave quantize out"):
        apply(quantized, Quantize(calibration=data(2)))


def test_uniform_parts_are_found_by_their_pixel() -> None:
    """A border of one colour makes uniform parts in every layer; photos without one have none."""
    x = ops.make("input", shape=(1, 32, 32, 3), dtype=DType.f32, label="x")
    w = constant(RNG.standard_normal((4, 3, 3, 3)).astype(np.float32))
    y = ops.make("silu", ops.make("conv2d", x, w, pad=(1, 1, 1, 1)), label="y")
    bordered = [RNG.standard_normal((1, 32, 32, 3)).astype(np.float32) for _ in range(4)]
    for sample in bordered[1:]:
        sample[:, 20:] = np.float32([0.1, -0.2, 0.3])
    graph = Graph("g", (x,), (y,), ("y",))

    def parts(samples: list[np.ndarray]) -> dict[Node, np.ndarray]:
        values = [evaluate_graph(graph, [s])[0] for s in samples]
        o = Observation.empty(4)
        for turn, v in enumerate(values):
            o.add(v, turn)
        return flat_parts(lambda sample: evaluate_graph(graph, sample), {y: o}, [[s] for s in samples])

    found = parts(bordered)
    np.testing.assert_allclose(found[y], evaluate_graph(graph, [bordered[1]])[0][0, 25, 15], atol=1e-5)
    assert parts(bordered[:1]) == {}
