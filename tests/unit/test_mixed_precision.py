"""quantize="auto": the knapsack, element types per layer, and the promise about uniform choices."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native, ops, quantization
from skive.errors import QuantizationError
from skive.ir import Graph, Node, constant
from skive.mixed_precision import BINS, Search, knapsack
from skive.passes.quantize import Quantizer, Scheme, Storage
from skive.targets.base import resolve
from skive.types import DType


def network(seed: int = 0) -> Graph:
    """Three convolutions with a skip connection, pooling and a classifier; the second has weights of very
    different sizes, which int8 does not take well per tensor."""
    rng = np.random.default_rng(seed)
    x = ops.make("input", shape=(1, 16, 16, 4), dtype=DType.f32, label="x", origin="x")

    def conv(v: Node, channels: int, name: str) -> Node:
        w = rng.standard_normal((channels, 3, 3, v.shape[3])).astype(np.float32) / 8
        b = rng.standard_normal(channels).astype(np.float32)
        y = ops.make("conv2d", v, constant(w), constant(b), pad=(1, 1, 1, 1), origin=name, label=name)
        return ops.make("relu", y, origin=name, label=f"{name}_relu")

    a = conv(x, 16, "a")
    b = conv(a, 16, "b")
    y = ops.make("add", conv(b, 16, "c"), a, origin="skip", label="skip")
    y = ops.make("reduce_mean", y, axes=(1, 2), origin="mean", label="mean")
    y = ops.make("reshape", y, shape=(1, 16), origin="mean")
    w = constant(rng.standard_normal((5, 16)).astype(np.float32))
    y = ops.make("linear", y, w, origin="head", label="head")
    return Graph("net", (x,), (y,), ("y",))


def data(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 1, 16, 16, 4)).astype(np.float32)


def test_the_knapsack_is_exact() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        rows = int(rng.integers(1, 6))
        costs, weights = rng.uniform(0, 9, (rows, 3)), rng.uniform(0, 1, (rows, 3))
        weights[:, 0] = 0  # one choice that always fits, as float32 does
        limit = float(rng.uniform(0.1, rows))
        chosen = knapsack(costs, weights, limit)
        assert chosen is not None
        at = np.arange(rows)
        assert weights[at, chosen].sum() <= limit * (1 + 1e-9)
        within = limit * (1 - rows / BINS)  # what rounding up leaves for certain
        best = min(costs[at, list(c)].sum() for c in itertools.product(range(3), repeat=rows)
                   if weights[at, list(c)].sum() <= within)
        assert costs[at, chosen].sum() <= best + 1e-9


def test_a_knapsack_without_an_answer() -> None:
    assert knapsack(np.ones((2, 2)), np.full((2, 2), 3.0), 5.0) is None
    assert knapsack(np.ones((1, 2)), np.array([[np.inf, 1.0]]), 2.0) == [1]


def test_layers_that_read_the_same_value_follow_the_widest() -> None:
    graph = network()
    node = {n.name: n for n in graph.nodes}
    storage = Storage(graph)
    ranges = {n: (-4.0, 4.0) for n in storage.sources}
    quantizer = Quantizer(graph, Scheme(ranges, "int8", dtypes={node["b"]: "int16"}), storage)
    assert quantizer.format_of(node["b"].inputs[0]).dtype is DType.i16
    assert quantizer.layers[node["b"]].weight_bits > 8
    assert quantizer.format_of(node["c"].inputs[0]).dtype is DType.u8
    assert quantizer.layers[node["c"]].weight_bits <= 8
    groups = quantizer.groups()
    products = [p for _, ps in groups for p in ps]
    assert sorted(p.name for p in products) == ["a", "b", "c", "head"] and len(set(products)) == 4
    sources = [s for ss, _ in groups for s in ss]
    assert len(sources) == len(set(sources)) == len(storage.sources)


@pytest.mark.parametrize(("dtype", "limits"), [("int8", {"budget_us": 5.0}), ("auto", {"budget_sqnr_db": -1.0}),
                                               ("auto", {"budget_sqnr_db": 30.0, "budget_us": 9.0})])
def test_budgets_that_mean_nothing_are_refused(dtype: str, limits: dict[str, float]) -> None:
    with pytest.raises(QuantizationError, match="budget"):
        skive.Quantize(dtype, **limits)  # type: ignore[arg-type]


def test_the_budget_is_kept_and_nothing_uniform_within_it_is_faster(tmp_path: Path) -> None:
    for budget in (20.0, 55.0, 299.0):
        asked = skive.Quantize("auto", calibration=data(), budget_sqnr_db=budget)
        module = skive.compile(network(), quantize=asked, output=tmp_path / str(budget))
        report = module.report["quantization"]
        auto = report["auto"]
        assert report["dtype"] == "auto" and report["sqnr_db"] >= budget
        allowed = [c for c in auto["candidates"] if c["us"] is not None]
        assert all(c["sqnr_db"] >= budget for c in allowed)
        taken = [c for c in allowed if c["choice"] == auto["chosen"] and c["sqnr_db"] == report["sqnr_db"]]
        assert taken and min(c["us"] for c in taken) <= min(c["us"] for c in allowed if c["choice"] != "mixed")
        got = {layer["name"]: layer["dtype"] for layer in report["layers"] if "choices" in layer}
        assert len(got) == 4
        if auto["chosen"] == "float32":
            assert set(got.values()) == {"float32"}
    assert auto["chosen"] == "float32"  # nothing else has 299 dB


def test_a_time_budget_takes_the_most_accurate_choice(tmp_path: Path) -> None:
    asked = skive.Quantize("auto", calibration=data(), budget_us=1e6)
    report = skive.compile(network(), quantize=asked, output=tmp_path / "m").report["quantization"]
    assert report["auto"]["chosen"] == "float32" and report["auto"]["budget"] == {"us": 1e6}


def test_attention_whose_operands_have_no_form_of_16_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x = ops.make("input", shape=(1, 6, 16), dtype=DType.f32, label="x", origin="x")

    def dense(v: Node, name: str) -> Node:
        w, b = rng.standard_normal((16, 16)).astype(np.float32) / 4, rng.standard_normal(16).astype(np.float32)
        return ops.make("linear", v, constant(w), constant(b), origin=name, label=name)

    heads = [ops.make("reshape", dense(x, name), shape=(1, 6, 2, 8)) for name in "qkv"]
    a = ops.make("attention", *heads, scale=8**-0.5, token_major=True)
    graph = Graph("net", (x,), (dense(ops.make("reshape", a, shape=(1, 6, 16)), "out"),), ("y",))
    samples = rng.standard_normal((4, 1, 6, 16)).astype(np.float32)
    asked = skive.Quantize("auto", calibration=samples, budget_sqnr_db=50.0)
    report = skive.compile(graph, quantize=asked, output=tmp_path / "m").report["quantization"]
    assert report["sqnr_db"] >= 50.0


def test_a_target_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from skive import _native, mixed_precision
    from skive.targets.base import TARGETS

    monkeypatch.setattr(_native, "cpu_features", lambda: [])
    with pytest.raises(QuantizationError, match="cannot run target avx2"):
        mixed_precision.apply(network(), skive.Quantize("auto", calibration=data()), target=TARGETS["avx2"])


def test_roundings_may_go_either_way_only_behind_float_contractions() -> None:
    """A float layer before a quantizer: the artefact may differ by what a rounding error does, not by more."""
    from skive import check
    from skive.reference import evaluate_graph

    rng = np.random.default_rng(2)
    x = ops.make("input", shape=(1, 8, 8, 4), dtype=DType.f32, label="x", origin="x")
    w = constant(rng.standard_normal((8, 3, 3, 4)).astype(np.float32))
    zero, scale = constant(np.uint8(128)), constant(np.float32(0.05))
    y = ops.make("quantize", ops.make("conv2d", x, w), scale, zero, to=DType.u8)
    graph = Graph("g", (x,), (ops.make("dequantize", y, scale, zero),), ("y",))
    inputs = [rng.standard_normal(x.shape).astype(np.float32)]
    (want,) = evaluate_graph(graph, inputs)
    assert check.flips_alike(graph, inputs, [(want, want)])
    assert not check.flips_alike(graph, inputs, [(want + 1, want)])
    moved = Graph("g", (x,), (ops.make("dequantize", ops.make("quantize", x, scale, zero, to=DType.u8), scale, zero),),
                  ("y",))
    (want,) = evaluate_graph(moved, inputs)
    got = want.copy()
    got.flat[3] += 0.05  # one integer off, and no contraction to blame
    assert not check.flips_alike(moved, inputs, [(got, want)])


def sines(count: int) -> Graph:
    """`count` times tanh(sin(20 x)) rounded to 16 bits: one integer rounded the other way becomes 20 of them."""
    x = h = ops.make("input", shape=(64, 64), dtype=DType.f32, label="x", origin="x")
    scale, zero = constant(np.float32(2**-14)), constant(np.int16(0))
    for _ in range(count):
        h = ops.make("dequantize", ops.make("quantize", h, scale, zero, to=DType.i16), scale, zero)
        h = ops.make("tanh", ops.make("sin", ops.make("mul", h, constant(np.float32(20)))))
    return Graph("sines", (x,), (ops.make("quantize", h, scale, zero, to=DType.i16),), ("y",))


def test_smooth_functions_may_round_either_way_too(tmp_path: Path) -> None:
    from skive import check
    from skive.reference import evaluate_graph

    assert skive.compile(sines(6), output=tmp_path / "out").report["verification"]["passed"]
    inputs = [np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)]
    (want,) = evaluate_graph(sines(2), inputs)
    assert check.flips_alike(sines(2), inputs, [(want, want)])
    assert not check.flips_alike(sines(2), inputs, [(want + np.int16(50), want)])


def test_uniform_parts_make_no_noise_where_they_are_stored_exactly(tmp_path: Path) -> None:
    """Most of the image is a border of one colour, which offsets of the channels make exact."""
    rng = np.random.default_rng(0)
    x = ops.make("input", shape=(1, 32, 32, 4), dtype=DType.f32, label="x", origin="x")
    w = constant(rng.standard_normal((16, 1, 1, 4)).astype(np.float32) / 2)
    a = ops.make("silu", ops.make("conv2d", x, w, origin="a", label="a"), origin="a", label="a_silu")
    exact = rng.integers(-127, 128, (8, 1, 1, 16)).astype(np.float32)
    exact[..., 0] = 127  # weights that rounding leaves as they are
    b = ops.make("conv2d", a, constant(exact / 512), origin="b", label="b")
    graph = Graph("net", (x,), (b,), ("y",))
    samples = np.full((6, 1, 32, 32, 4), 0.37, np.float32)
    samples[:, :, 12:14] = rng.standard_normal((6, 1, 2, 32, 4)) * 3
    options = skive.Quantize("auto", calibration=samples, equalise=False)
    known = quantization.calibrated(graph, options, lambda step, fraction: None, "host")
    assert known.flat
    search = Search(graph, known, options, resolve("host", _native.cpu_features()), 1, tmp_path)
    search.uniform("float32")
    [group] = [i for i, g in enumerate(search.groups) if g.products[0].name == "b"]
    with_offset = search.sensitivities()[group, 1]
    search.formats["int8"]._offsets.clear()
    shutil.rmtree(tmp_path / "disturbed")
    assert search.sensitivities()[group, 1] > 2 * with_offset > 0
