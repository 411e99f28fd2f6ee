"""What the report says of a quantized network: types of kernels, float32 left over, and advice by figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import skive
from skive import explanation, ops, passes, quantization
from skive.ir import Graph, Node, constant
from skive.lower import lower
from skive.targets.base import TARGETS
from skive.types import DType

RNG = np.random.default_rng(5)


def weights(*shape: int) -> Node:
    return constant((RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))


def network() -> Graph:
    """conv + relu, softmax over channels, 1x1 conv, mean: a float32 operation between two integer ones."""
    x = ops.make("input", shape=(1, 8, 8, 4), dtype=DType.f32, label="x")
    y = ops.make("relu", ops.make("conv2d", x, weights(8, 3, 3, 4), weights(8), pad=(1, 1, 1, 1), origin="first"))
    y = ops.make("softmax", y, origin="middle")
    y = ops.make("conv2d", y, weights(6, 1, 1, 8), origin="second")
    y = ops.make("reduce_mean", y, axes=(1, 2), keep=False, origin="mean")
    return Graph("network", (x,), (y,), ("y",))


def quantized(dtype: str, **options: Any) -> tuple[Graph, dict[str, Any]]:
    """(the fused fixed-point network, its `quantization`)."""
    canonical, _ = passes.canonical(network(), check="never")
    data = RNG.standard_normal((16, 8, 8, 4)).astype(np.float32)
    wanted = skive.Quantize(dtype, calibration=data, **options)
    graph, details = quantization.apply(canonical, wanted, target="generic")
    fused, _ = passes.PassManager().run(graph, passes.FUSED, check="never")
    return fused, details | explanation.conversions(fused, wanted.keep)


@pytest.mark.parametrize(("dtype", "stored", "db"), [("int8", "u8", 20), ("int16", "i16", 55)])
def test_layers_tell_types_ranges_and_noise(dtype: str, stored: str, db: float) -> None:
    _, details = quantized(dtype)
    layers = {layer["name"]: layer for layer in details["layers"]}
    assert list(layers) == ["x", "first", "middle", "second", "mean"]
    for name in ("first", "second"):
        assert layers[name]["dtype"] == dtype and layers[name]["weight_sqnr_db"] > db
        assert set(layers[name]["bits"]) == {"activations", "weights"}
    size = 1 if dtype == "int8" else 2
    assert layers["x"]["stored"] == stored and layers["x"]["bytes"] == 8 * 8 * 4 * size
    assert layers["first"]["weight_bytes"] == 8 * 9 * 4 * size
    middle = layers["middle"]
    assert middle["dtype"] == "float32" and middle["reason"] == "softmax has no integer form"
    assert middle["sqnr_db"] > db and middle["range"][0] >= 0 and middle["range"][1] <= 1
    # What the step of the stored value costs bounds the measured ratio from above, but for chance.
    assert middle["sqnr_db"] < middle["rounding_sqnr_db"] + 3


def test_a_kept_layer_says_by_which_pattern() -> None:
    fused, details = quantized("int8", keep=("sec*",))
    second = next(layer for layer in details["layers"] if layer["name"] == "second")
    assert (second["dtype"], second["reason"]) == ("float32", "kept by the pattern 'sec*'")
    assert any("second" in island["names"] and "'sec*'" in island["reason"] for island in details["islands"])


def test_islands_and_boundaries_are_those_of_the_final_graph() -> None:
    _, details = quantized("int8")
    (island,) = details["islands"]
    assert island["names"] == ["middle"] and island["reason"] == "softmax has no integer form"
    told = {(b["name"], b["to"]): b["reason"] for b in details["boundaries"]}
    assert told["x", "u8"] == "the network's input is float32"
    assert told["first", "f32"] == "middle (softmax) reads float32"
    assert any(to == "u8" and reason == "middle (softmax) gives float32" for (_, to), reason in told.items())
    assert any(to == "f32" and reason == "the network's output is float32" for (_, to), reason in told.items())


def test_a_layer_stands_behind_what_the_rest_of_its_kernel_reads() -> None:
    """The cosine of two projections: one is divided in the kernel of its convolution by what comes after that."""
    inputs = [ops.make("input", shape=(1, 4, 4, 8), dtype=DType.f32, label=name) for name in "ab"]
    parts = []
    for x in inputs:
        p = ops.make("relu", ops.make("conv2d", x, weights(8, 1, 1, 8), weights(8), origin=f"project {x.name}"))
        square = ops.make("reduce_sum", ops.make("mul", p, p), axes=(3,), keep=True)
        parts.append(ops.make("div", p, ops.make("sqrt", square)))
    y = ops.make("reduce_sum", ops.make("mul", *parts), axes=(3,), keep=False, origin="cosine")
    canonical, _ = passes.canonical(Graph("cosine", tuple(inputs), (y,), ("y",)), check="never")
    data = {x.name: RNG.standard_normal((4, 4, 4, 8)).astype(np.float32) for x in inputs}
    wanted = skive.Quantize("int8", calibration=data, rounding="nearest")
    _, details = quantization.apply(canonical, wanted, target="generic", measure=False)
    names = [layer["name"] for layer in details["layers"]]
    for i, layer in enumerate(details["layers"]):
        assert all(name in names[i + 1:] for name in layer["read_by"])


def test_a_float_network_has_neither() -> None:
    fused, _ = passes.optimize(network(), check="never")
    assert explanation.conversions(fused) == {"islands": [], "boundaries": []}
    kinds = {explanation.kernel_types(c)["dtype"] for c in lower(fused, TARGETS["generic"]).calls}
    assert kinds == {"float32"}


@pytest.mark.parametrize(("dtype", "stored"), [("int8", "u8"), ("int16", "i16")])
def test_kernels_tell_what_they_compute_in(dtype: str, stored: str) -> None:
    fused, _ = quantized(dtype)
    by_op = {c.op: explanation.kernel_types(c) for c in lower(fused, TARGETS["generic"]).calls}
    assert by_op["softmax"] == {"dtype": "float32", "reads": ["f32"], "writes": "f32"}
    assert by_op["conv2d"]["dtype"] == dtype and by_op["conv2d"]["reads"] == [stored]
    assert by_op["sum_pool2d"]["dtype"] == dtype


def layer(name: str, sqnr: float | None, before: float | None = None, share: float = 0.0,
          **more: Any) -> dict[str, Any]:
    return {"name": name, "op": "conv2d", "dtype": "int8", "sqnr_db": sqnr, "input_sqnr_db": before,
            "noise_share": share, "rounding_sqnr_db": 30.0, **more}


def advised(*layers: dict[str, Any], sqnr: float = 15.0, **more: Any) -> list[dict[str, Any]]:
    return explanation.advice({"dtype": "int8", "method": "minmax", "samples": 100, "sqnr_db": sqnr,
                               "layers": list(layers), **more})


def test_a_good_network_needs_no_advice() -> None:
    assert advised(layer("a", 45.0, share=1.0), layer("b", 38.0, 45.0), sqnr=36.0) == []
    assert advised(layer("a", None), sqnr=12.0) == []


def test_noise_is_charged_to_the_layer_that_makes_it_not_to_the_one_that_shows_it() -> None:
    """`b` rounds next to nothing but lets the noise of `a` grow by 10 dB; `c` adds as much as it reads."""
    chain = [layer("a", 30.0, rounding_sqnr_db=30.0), layer("b", 20.0, 30.0, rounding_sqnr_db=60.0),
             layer("c", 17.0, 20.0, rounding_sqnr_db=20.0)]
    a, b, c = explanation.noise_shares(chain, [[], [0], [1]], {2})
    assert a == pytest.approx(0.5, abs=0.01) and c == pytest.approx(0.5, abs=0.01) and b < 0.01
    # Noise on a way that ends elsewhere is not charged; two ends share.
    branches = [layer("a", 30.0), layer("b", 27.0, 30.0), layer("c", 27.0, 30.0)]
    assert explanation.noise_shares(branches, [[], [0], [0]], {1})[2] == 0.0
    assert explanation.noise_shares(branches, [[], [0], [0]], {1, 2}) == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert explanation.noise_shares([layer("a", None)], [[]], {0}) == [0.0]


def test_shares_of_a_network_add_up_and_fall_on_its_layers() -> None:
    _, details = quantized("int8")
    shares = {entry["name"]: entry["noise_share"] for entry in details["layers"]}
    assert sum(shares.values()) == pytest.approx(1, abs=0.01) and min(shares.values()) >= 0
    assert shares["first"] > 0 and shares["second"] > 0
    assert {entry["name"]: entry["read_by"] for entry in details["layers"]} == {
        "x": ["first"], "first": ["middle"], "middle": ["second"], "second": ["mean"], "mean": []}


@pytest.mark.parametrize(("figures", "more", "action"), [
    ({"weight_sqnr_db": 18.0, "rounding_sqnr_db": 40.0}, {}, "--rounding adaround"),
    ({"weight_sqnr_db": 18.0, "rounding_sqnr_db": 40.0}, {"options": {"per_channel": False}}, "per_channel=True"),
    ({"weight_sqnr_db": 18.0, "rounding_sqnr_db": 40.0}, {"options": {"rounding": "adaround"}}, "--keep 'bad'"),
    ({"weight_sqnr_db": 40.0, "rounding_sqnr_db": 18.0, "crest": 90.0, "narrowing_gain_db": 6.0}, {}, "--ranges mse"),
    ({"weight_sqnr_db": 40.0, "rounding_sqnr_db": 18.0, "crest": 90.0, "read_by": ["next"]}, {}, "--keep 'next'"),
    ({"weight_sqnr_db": 40.0, "rounding_sqnr_db": 18.0, "crest": 90.0, "narrowing_gain_db": 6.0}, {"method": "mse"},
     "--keep 'bad'"),
    ({"weight_sqnr_db": 40.0, "rounding_sqnr_db": 18.0, "channel_spread": 50.0}, {"options": {"equalise": False}},
     "equalise=True"),
    ({"weight_sqnr_db": 40.0, "rounding_sqnr_db": 40.0, "range": [-9.0, 9.0], "kept": [-3.0, 3.0]},
     {"method": "percentile"}, "--ranges minmax")])
def test_the_advice_follows_the_largest_cause(figures: dict[str, Any], more: dict[str, Any], action: str) -> None:
    first = advised(layer("good", 35.0, share=0.05), layer("bad", 17.0, 35.0, share=0.95, **figures), **more)[0]
    assert first["layer"] == "bad" and first["share"] > 0.9
    assert action in first["action"], first


def test_noise_that_is_spread_calls_for_more_bits_and_concentrated_noise_for_floats() -> None:
    spread = advised(*(layer(f"l{i}", 20.0 - i / 10, share=0.05) for i in range(20)))
    assert any(a["layer"] is None and "int16" in a["action"] for a in spread)
    few = advised(layer("a", 35.0), layer("b", 15.0, 35.0, share=0.9, read_by=["c"]))
    whole = [a for a in few if a["layer"] is None]
    assert len(whole) == 1 and "--keep 'b' --keep 'c'" in whole[0]["action"]


def test_few_samples_are_pointed_out() -> None:
    assert any("8 samples" in a["finding"] for a in advised(layer("a", 15.0, share=1.0), samples=8))
    assert not any("samples" in a["finding"] for a in advised(layer("a", 15.0, share=1.0), samples=200))


def test_the_gain_of_a_narrower_range_is_that_of_the_histogram() -> None:
    from skive.calibration import Observation, narrowing_gain_db

    def seen(*values: np.ndarray) -> Observation:
        o = Observation.empty(1)
        for turn, v in enumerate(values):
            o.add(v.astype(np.float32).reshape(-1, 1), turn)
        return o

    even = RNG.uniform(0, 1, 30_000)
    assert narrowing_gain_db(seen(even)) < 0.1
    assert narrowing_gain_db(seen(*[even] * 100, np.array([3.0]))) > explanation.WORTH_DB
    # A single value that is very large weighs more than what its range costs the others.
    assert narrowing_gain_db(seen(even, np.array([60.0]))) < 1
