"""Variants of layers, the choice between them, and what a tuned compile leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native, ops, speed, tuning
from skive.errors import SkiveError, TargetError
from skive.ir import Graph, Node, constant
from skive.lower import lower
from skive.targets.base import TARGETS, resolve
from skive.tuning import Tuning, Variant, contraction_variants, layer_key
from skive.types import DType

HOST = resolve("host", _native.cpu_features())


def network() -> Graph:
    """A 3x3 convolution that Winograd suits, one with stride, a transposed one, and a product."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Node:
        return constant(rng.standard_normal(shape).astype(np.float32) / 8)

    x = ops.make("input", shape=(1, 12, 12, 16), dtype=DType.f32, label="x", origin="x")
    y = ops.make("conv2d", x, weights(48, 3, 3, 16), pad=(1, 1, 1, 1), origin="winograd")
    y = ops.make("conv2d", ops.make("relu", y), weights(40, 3, 3, 48), stride=(2, 2), origin="strided")
    y = ops.make("conv_transpose2d", y, weights(20, 2, 2, 40), stride=(2, 2), origin="transposed")
    y = ops.make("linear", y, weights(36, 20), origin="linear")
    return Graph("net", (x,), (y,), ("y",))


def asked(graph: Graph) -> dict[str, list[Variant]]:
    """The variants that lowering asks for, by the origin of the layer."""
    found = {}

    class Listener(Tuning):
        def choose(self, node: Node, variants: list[Variant]) -> Variant:  # type: ignore[override]
            found[node.origin] = list(variants)
            return variants[0]

    lower(graph, HOST, 1, Listener())
    return found


def test_variants_start_with_what_is_taken_without_measuring() -> None:
    graph = network()
    plan = lower(graph, HOST)
    variants = asked(graph)
    assert set(variants) == {"winograd", "strided", "transposed", "linear"}
    for call in (c for c in plan.calls if c.macs):
        assert call.kernel == variants[call.origin][0].kernel
        assert str(variants[call.origin][0].block) in call.template
    assert {v.kernel for v in variants["winograd"]} >= {"conv2d"}
    for name, found in variants.items():
        assert len(set(found)) == len(found) <= 9, name
        assert all(v.block % 4 == 0 for v in found)


@pytest.mark.parametrize("target", sorted({HOST.name, "generic"}))
def test_every_variant_computes_the_same(target: str) -> None:
    from skive.reference import evaluate_graph

    graph = network()
    x = np.random.default_rng(1).standard_normal(graph.inputs[0].shape).astype(np.float32)
    (want,) = evaluate_graph(graph, [x])
    conv = [n for n in graph.nodes if n.op in ("conv2d", "linear", "conv_transpose2d")]
    variants = {n: contraction_variants(n, TARGETS[target]) for n in conv}
    for turn in range(max(map(len, variants.values()))):
        choices = {layer_key(n): v[turn % len(v)] for n, v in variants.items()}
        (got,) = _run(graph, target, Tuning(choices), x)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def _run(graph: Graph, target: str, choices: Tuning, x: np.ndarray) -> tuple[np.ndarray, ...]:
    import tempfile

    from skive import build
    from skive.emit import cxx

    with tempfile.TemporaryDirectory() as t:
        plan = lower(graph, TARGETS[target], 1, choices)
        sources = cxx.emit(plan, TARGETS[target])
        build.write_sources(Path(t), sources, plan.weights, plan.name)
        library = build.build_shared(Path(t), sources, plan.name, TARGETS[target])
        ports = [[(p.name, list(p.shape), p.dtype) for p in side] for side in (plan.inputs, plan.outputs)]
        return (_native.Artifact(str(library), plan.name, ports[0], ports[1], plan.arena_bytes, 0, 1)(x),)


def test_the_faster_variant_is_taken_and_a_tie_keeps_the_default(tmp_path: Path) -> None:
    graph = network()
    table = speed.SpeedTable(HOST, folder=tmp_path)
    layers = tuning._layers(graph, HOST, 1)
    for key, layer in layers.items():
        for i, call in enumerate(layer.calls.values()):
            gain = 0.5 if "stride=[2, 2]" in key else 0.99
            table.add(call, 100 * gain if i == 2 else 100.0)
    chosen = tuning.tune(graph, HOST, 1, seconds=0.001, table=table).choices
    assert chosen and set(chosen) == {k for k, v in layers.items() if "stride=[2, 2]" in k and len(v.calls) > 2}
    assert all(v == list(layers[k].calls)[2] for k, v in chosen.items())
    assert Tuning.from_json(Tuning(chosen).to_json()).choices == chosen


def test_a_choice_that_is_no_variant_is_ignored() -> None:
    node = next(n for n in network().nodes if n.op == "linear")
    variants = contraction_variants(node, HOST)
    assert Tuning({layer_key(node): Variant("conv2d", 4096)}).choose(node, variants) == variants[0]
    assert Tuning({layer_key(node): variants[-1]}).choose(node, variants) == variants[-1]


def test_a_tuned_compile_measures_once_and_says_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skive import text

    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path / "cache"))
    text.save_text(network(), tmp_path / "net.txt")
    first = skive.compile(tmp_path / "net.txt", tune=60, output=tmp_path / "a")
    assert isinstance(first.manifest["tuning"], dict)
    assert first.report["verification"]["passed"]

    def measured_again(*args: object, **named: object) -> None:
        raise AssertionError("the table knows these calls")

    monkeypatch.setattr(speed, "measure", measured_again)
    second = skive.compile(tmp_path / "net.txt", tune=60, output=tmp_path / "b")
    assert second.manifest == first.manifest
    assert (tmp_path / "a" / "net.cpp").read_bytes() == (tmp_path / "b" / "net.cpp").read_bytes()
    third = skive.compile(network(), tune=60)  # from the table, not from the cache of artefacts
    assert third.manifest["tuning"] == first.manifest["tuning"]
    assert skive.compile(network()).manifest["tuning"] is None


def test_tuning_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (0, -1.0, "fast"):
        with pytest.raises(SkiveError, match="tune is"):
            skive.compile(network(), tune=value)  # type: ignore[arg-type]
    monkeypatch.setattr(_native, "cpu_features", lambda: [])
    with pytest.raises(TargetError, match="cannot run target avx2"):
        skive.compile(network(), tune=1, target="avx2", emit_only=True)
