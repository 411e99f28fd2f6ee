"""Early exits: which exit a sample takes, what it gives there, and what a call costs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skive
from skive import _native, criteria, ops
from skive.cli import cli
from skive.errors import ExitError, InvalidModelError
from skive.ir import Graph, Node, constant
from skive.pipeline import total_macs
from skive.targets.base import TARGETS
from skive.types import DType
from skive.verification import verdict_against

CLASSES = 5
GATES = ((1.5, -0.7, 2.0, -0.3, -1.4), (0.8, -0.2, 1.0, -0.5, -0.2))
BATCH = 97


def leap(at: criteria.Point) -> Node:
    """A criterion of the user's: how far the largest logit is above 0, with the exit's second tensor on top."""
    return ops.make("reduce_max", ops.make("add", at.logits, at.needs_extra()), axes=(1,))


EXITS: list[skive.Exit] = [
    skive.Exit("a", "max-prob", 0.45),
    skive.Exit("b", "margin", 0.3),
    skive.Exit("c", "entropy", 1.2),
    skive.Exit("d", "energy", 2.4),
    skive.Exit("e", "gate", 0.5, of=GATES[0]),
    skive.Exit("f", "gate", 0.5, of=GATES[1]),
    skive.Exit("g", "patience", 1),
    skive.Exit("h", "patience", 1),
    skive.Exit("i", "patience", 2),
    skive.Exit("j", "q-exit", 0.6, of="lambda_j"),
    skive.Exit("k", "q-exit", 0.6, of="lambda_k"),
    skive.Exit("l", "score", 0.6, of="lambda_l"),
    skive.Exit("m", leap, 1.2, of="lambda_m"),
    skive.Exit("n", lambda at: ops.make("reduce_mean", at.logits, axes=(1,)), -0.3, test="<="),
    skive.Exit("o", "window", 0.2, of=(0.5,)),
]


def many_exits(batch: int | None = None) -> Graph:
    """Blocks of a perceptron with a head behind each; some heads also say how sure they are."""
    rng = np.random.default_rng(3)

    def dense(x: Node, n: int, gain: float = 1.0) -> Node:
        w = constant((gain * rng.standard_normal((n, x.shape[-1])) / np.sqrt(x.shape[-1])).astype(np.float32))
        return ops.make("linear", x, w, constant((0.1 * rng.standard_normal(n)).astype(np.float32)))

    h = x = ops.make("input", shape=(1, 16), dtype=DType.f32, label="x")
    found: dict[str, Node] = {}
    for e in EXITS:
        h = ops.make("tanh", dense(h, 16, 1.6))
        found[e.output] = dense(h, CLASSES, 1.5)
        if isinstance(e.of, str):
            found[e.of] = ops.make("sigmoid", dense(h, 1))
    found["y"] = dense(ops.make("tanh", dense(h, 16)), CLASSES)
    names = sorted(found, key=lambda n: n != "y")  # the whole network's first: the order does not matter
    return Graph("many", (x,), tuple(found[n] for n in names), tuple(names), batch)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


def numpy_scores(value: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The score of every sample at every exit, from the published definitions, in float64."""
    v = {k: a.astype(np.float64) for k, a in value.items()}
    p = {k: softmax(a) for k, a in v.items()}
    top = {k: -np.sort(-a, -1) for k, a in p.items()}

    def opened(k: str, gate: tuple[float, ...]) -> np.ndarray:
        squared = p[k] ** 2 / (p[k] ** 2).sum(-1, keepdims=True)
        features = np.stack([top[k][:, 0], entropy(p[k]), top[k][:, 0] - top[k][:, 1], entropy(squared)], -1)
        return 1 / (1 + np.exp(-(features @ np.array(gate[:4]) + gate[4])))

    gates = [opened(k, g) for k, g in zip("ef", GATES, strict=True)]
    first = np.minimum(gates[0], 1)
    second = np.maximum(np.minimum(gates[1], 1 - gates[0]), 0) / (1 - first)
    same_gh = (v["g"].argmax(-1) == v["h"].argmax(-1)) * 1.0
    same_hi = (v["h"].argmax(-1) == v["i"].argmax(-1)) * (same_gh + 1)
    stop = {k: value[f"lambda_{k}"].astype(np.float64)[:, 0] for k in "jklm"}
    return [top["a"][:, 0], top["b"][:, 0] - top["b"][:, 1], entropy(p["c"]), np.log(np.exp(v["d"]).sum(-1)),
            first, second, np.zeros(len(first)), same_gh, same_hi,
            stop["j"], stop["j"] + (1 - stop["j"]) * stop["k"], stop["l"], v["m"].max(-1) + stop["m"], v["n"].mean(-1),
            np.abs(top["o"][:, 0] - 0.5)]


def numpy_path(scores: list[np.ndarray], tests: list[str], thresholds: list[float]) -> np.ndarray:
    """The first exit whose test holds."""
    compare: dict[str, Callable[..., np.ndarray]] = {
        ">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}
    holds = [compare[t](s, v) for s, t, v in zip(scores, tests, thresholds, strict=True)]
    return np.argmax(np.stack([*holds, np.ones_like(holds[0])]), axis=0)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BATCH, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def batched() -> Iterator[skive.Module]:
    yield skive.compile(many_exits(BATCH), exits=EXITS, batch_max=BATCH)


def runnable(target: str) -> bool:
    return set(TARGETS[target].features) <= set(_native.cpu_features())


ISAS = [t for t in TARGETS if runnable(t)]


@pytest.mark.parametrize("target", [
    pytest.param(t, marks=[] if t in ("generic", ISAS[-1]) else pytest.mark.slow) for t in ISAS])
def test_every_criterion_decides_as_numpy_does(target: str, samples: np.ndarray) -> None:
    module = skive.compile(many_exits(BATCH), exits=EXITS, batch_max=BATCH, target=target)
    assert [e.name for e in module.exits] == [e.output for e in EXITS] + ["y"]
    # Scores from the reference of the model alone: no tensor that the artefact computed.
    from skive.reference import evaluate_graph

    graph = many_exits()
    value = {n: np.concatenate(rows) for n, rows in zip(
        graph.output_names, zip(*(evaluate_graph(graph, [x[None]]) for x in samples), strict=True), strict=True)}
    want = numpy_scores(value)
    got = module.all_outputs(samples)
    for way, score in zip(module.exits[:-1], want, strict=True):
        np.testing.assert_allclose(got[way.score], score, rtol=2e-4, atol=2e-5, err_msg=way.name)
    tests = [str(way.test) for way in module.exits[:-1]]
    met = set()
    for skipped in range(len(EXITS)):  # each criterion in turn is the first that may decide
        thresholds = [e.threshold if i >= skipped else float("nan") for i, e in enumerate(EXITS)]
        module.thresholds = {e.output: t for e, t in zip(EXITS, thresholds, strict=True)}
        result = module.run(samples)
        np.testing.assert_array_equal(result.exit, numpy_path(want, tests, thresholds))
        met |= {(int(e), skipped) for e in result.exit}
        for i, e in enumerate(result.exit):
            np.testing.assert_array_equal(result.outputs[i], got[module.exits[e].outputs[0]][i])
    # Each was taken where it was the first; an exit that none has agreed with before cannot be.
    assert [i for i in range(len(EXITS)) if (i, i) not in met] == [6]


def test_a_batch_equals_single_samples_bit_for_bit(batched: skive.Module, samples: np.ndarray) -> None:
    batched.thresholds = {e.output: e.threshold for e in EXITS}
    single = skive.compile(many_exits(), exits=EXITS)
    together = batched.run(samples)
    apart = [single.run(x[None]) for x in samples]
    np.testing.assert_array_equal(together.exit, np.concatenate([r.exit for r in apart]))
    assert len(set(together.exit.tolist())) > 3
    assert together.outputs.tobytes() == b"".join(r.outputs.tobytes() for r in apart)
    assert together.macs.tolist() == [m for r in apart for m in r.macs]
    assert together.outputs.tobytes() == batched(samples).tobytes()


def test_macs_and_arena_grow_from_exit_to_exit(batched: skive.Module) -> None:
    rows = batched.report["exits"]
    assert [r["macs"] for r in rows] == sorted({r["macs"] for r in rows})
    assert rows[-1]["macs"] == batched.report["compiled"]["macs"] == total_macs(many_exits())
    assert [r["arena_bytes"] for r in rows] == sorted(r["arena_bytes"] for r in rows)
    assert rows[-1]["arena_bytes"] <= batched.report["compiled"]["arena_bytes"]
    assert rows[0]["name"] == "a" and rows[0]["criterion"] == "max-prob" and rows[0]["threshold"] == 0.45


def image_net(batch: int | None = None) -> Graph:
    """Two convolutions, an exit after the first; the trunk adds the exit's features again."""
    rng = np.random.default_rng(5)

    def w(*shape: int) -> Node:
        return constant((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    x = ops.make("input", shape=(1, 8, 8, 3), dtype=DType.f32, label="x")
    h = ops.make("relu", ops.make("conv2d", x, w(16, 3, 3, 3), w(16), pad=(1, 1, 1, 1)))
    head = ops.make("linear", ops.make("reduce_mean", h, axes=(1, 2), keep=False), w(3, 16), w(3), label="inner")
    g = ops.make("add", h, ops.make("relu", ops.make("conv2d", h, w(16, 3, 3, 16), w(16), pad=(1, 1, 1, 1))))
    last = ops.make("linear", ops.make("reduce_mean", g, axes=(1, 2), keep=False), w(3, 16), w(3))
    return Graph("images", (x,), (head, last), ("early", "late"), batch)


def test_int8_with_pruning_and_exits(tmp_path: Path) -> None:
    data = np.random.default_rng(2).standard_normal((40, 8, 8, 3)).astype(np.float32)
    module = skive.compile(image_net(40), exits=["early:max-prob=0.5"], batch_max=40, prune=0.3,
                           quantize=skive.Quantize("int8", calibration=data))
    assert module.report["verification"]["passed"]
    assert {layer["dtype"] for layer in module.report["layers"] if layer["macs"]} == {"int8"}
    everything = module.all_outputs(data)
    scores = everything[module.exits[0].score]
    np.testing.assert_allclose(scores, softmax(everything[0]).max(-1), rtol=1e-5)
    module.thresholds = {"early": float(np.median(scores))}
    result = module.run(data)
    np.testing.assert_array_equal(result.exit, np.where(scores > np.float32(np.median(scores)), 0, 1))
    late = everything[module.exits[1].outputs[0]]
    np.testing.assert_array_equal(result.outputs, np.where(result.exit[:, None] == 0, everything[0], late))
    single = skive.compile(image_net(), exits=["early:max-prob=0.5"], prune=0.3,
                           quantize=skive.Quantize("int8", calibration=data))
    single.thresholds = module.thresholds
    assert result.outputs.tobytes() == b"".join(single(x[None]).tobytes() for x in data)


def test_thresholds_of_the_caller_and_resume_in_c() -> None:
    module = skive.compile(image_net(), exits=["early:max-prob=0.0"])
    library = ctypes.CDLL(str(module.folder / "libimages.so"))
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    want = module.all_outputs(x)
    outputs = [np.full(v.shape, 7, v.dtype) for v in want]
    raw = np.zeros(module.manifest["arena_bytes"] + 64, np.uint8)
    arena = raw[-raw.ctypes.data % 64:]
    pointers = ((ctypes.c_void_p * 1)(x.ctypes.data), (ctypes.c_void_p * 3)(*(o.ctypes.data for o in outputs)),
                ctypes.c_void_p(arena.ctypes.data))
    taken = ctypes.c_int32(-9)
    never = (ctypes.c_float * 1)(2.0)
    assert library.images_run_exits(*pointers, None, None) == 2  # no place for the exit
    assert library.images_run_exits(*pointers, None, ctypes.byref(taken)) == 0 and taken.value == 0
    np.testing.assert_array_equal(outputs[0], want[0])
    assert (outputs[2] == 7).all()  # a later exit's output is not touched
    assert library.images_resume(*pointers, None, ctypes.byref(taken)) == 0 and taken.value == 1
    np.testing.assert_array_equal(outputs[2], want[2])
    assert library.images_resume(*pointers, None, ctypes.byref(taken)) == 0 and taken.value == 1  # nothing is left
    taken.value = 5
    assert library.images_resume(*pointers, None, ctypes.byref(taken)) == 5
    outputs[2][:] = 7
    assert library.images_run_exits(*pointers, never, ctypes.byref(taken)) == 0 and taken.value == 1
    np.testing.assert_array_equal(outputs[2], want[2])


def test_inner_tensors_dense_outputs_and_threads() -> None:
    graph = image_net()
    pixels = ops.make("softmax", graph.outputs[1].inputs[0].inputs[0], axis=3)  # classes of every pixel
    graph = replace(graph, outputs=(ops.make("add", graph.outputs[1], graph.outputs[0]), pixels),
                    output_names=("late", "pixels"))
    exits = ["inner:margin=2", skive.Exit("pixels", "max-prob", 2, axis=-1)]
    module = skive.compile(graph, exits=exits, threads=2)
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    values = dict(zip((p.name for p in module.outputs), module.all_outputs(x), strict=True))
    assert values["pixels.max-prob"][0] == values["pixels"].max(-1).min()  # the least sure pixel decides
    assert [module.exits[i].name for i in module.run(x).exit] == ["late"]
    module.thresholds = {"inner": -1}
    np.testing.assert_array_equal(module(x), values["inner"])
    verdict, _ = verdict_against(module, graph)
    assert verdict.passed


@pytest.mark.parametrize("exits, words", [
    (["nowhere:max-prob=1"], "no tensor 'nowhere'"),
    (["early:max-prob=1", "late:max-prob=1"], "leave it unnamed"),
    (["early:luck=1"], "no criterion 'luck'"),
    (["early=1"], "not NAME:CRITERION=VALUE"),
    (["early:gate@1,2=0.5"], "four weights and a bias"),
    (["early:q-exit=0.5"], "name it behind @"),
    (["early:q-exit@nowhere=0.5"], "no tensor 'nowhere'"),
    (["early:max-prob=1", "early:margin=1"], "given twice"),
    ([skive.Exit("early", axis=2)], "no axis 2"),
    ([], "exits is empty"),
])
def test_what_cannot_be_is_refused(exits: list[Any], words: str) -> None:
    with pytest.raises(ExitError, match=words):
        skive.compile(image_net(), exits=exits)


def test_a_batch_needs_one_shape_and_a_criterion_its_integers() -> None:
    graph = image_net(4)
    wide = ops.make("concat", graph.outputs[1], graph.outputs[1], axis=1)
    with pytest.raises(ExitError, match="no one shape"):
        skive.compile(replace(graph, outputs=(graph.outputs[0], wide)), exits=["early:max-prob=1"], batch_max=4)
    with pytest.raises(ExitError, match="integer_only"):
        skive.compile(graph, exits=["early:quality=1"], quantize=skive.Quantize(integer_only=True, calibration=[]))


def test_a_fixed_batch_leaves_as_a_whole_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(2)
    x = ops.make("input", shape=(3, 16), dtype=DType.f32, label="x")
    early = ops.make("linear", x, constant(rng.standard_normal((5, 16)).astype(np.float32)))
    late = ops.make("linear", ops.make("tanh", early), constant(rng.standard_normal((5, 5)).astype(np.float32)))
    module = skive.compile(Graph("three", (x,), (early, late), ("early", "late")), exits=["early:max-prob=0.5"])
    assert "3 samples a call, which leave together" in caplog.text
    values = rng.standard_normal((3, 16)).astype(np.float32)
    least = softmax(module.all_outputs(values)[0]).max(-1).min()
    for threshold, taken in ((least - 1e-3, 0), (least + 1e-3, 1)):
        module.thresholds = {"early": threshold}
        result = module.run(values)
        assert result.exit.tolist() == [taken] and result.outputs.shape == (3, 5)


def test_changed_thresholds_are_saved(batched: skive.Module, tmp_path: Path) -> None:
    before, name = batched.thresholds, EXITS[0].output
    batched.thresholds = {name: 0.125}
    try:
        batched.save(tmp_path / "copy")
        again = skive.load(tmp_path / "copy")
        assert again.thresholds == {**before, name: 0.125} and again.manifest.keys() == batched.manifest.keys()
    finally:
        batched.thresholds = before


def test_exits_of_different_outputs_are_a_damaged_manifest(batched: skive.Module, tmp_path: Path) -> None:
    batched.save(tmp_path / "copy")
    file = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["exits"][0]["outputs"] = [manifest["exits"][0]["score"]]
    file.write_text(json.dumps(manifest))
    with pytest.raises(InvalidModelError, match="is damaged: the ways have different outputs"):
        skive.load(tmp_path / "copy")


def test_an_unknown_threshold_is_refused(batched: skive.Module) -> None:
    with pytest.raises(ExitError, match="no exit 'y' with a threshold"):
        batched.thresholds = {"y": 1.0}


def test_outputs_may_have_the_names_of_what_stands_beside_them(tmp_path: Path) -> None:
    from skive import text

    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    y = ops.make("linear", x, constant(np.eye(4, dtype=np.float32)))
    np.savez(tmp_path / "x.npz", x=np.eye(4, dtype=np.float32)[:3])

    def written(outputs: tuple[Node, ...], names: tuple[str, ...], *options: str) -> dict[str, np.ndarray]:
        text.save_text(Graph("names", (x,), outputs, names, 8), tmp_path / "names.skive")
        for words in (["compile", tmp_path / "names.skive", "-o", tmp_path / "net", *options],
                      ["run", tmp_path / "net", "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz"]):
            with pytest.raises(SystemExit, match="0"):
                cli.main([str(w) for w in words])
        return dict(np.load(tmp_path / "y.npz"))

    np.testing.assert_array_equal(written((y,), ("file",))["file"], np.eye(4)[:3])
    found = written((y, ops.make("tanh", y)), ("first", "exit"), "--exit", "first:max-prob=0.9")
    assert sorted(found) == ["exit", "exit_", "macs"]
    assert found["exit"].shape == (3, 4) and found["exit_"].tolist() == [1, 1, 1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from skive import text

    text.save_text(image_net(), tmp_path / "images.skive")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((6, 8, 8, 3)).astype(np.float32))

    def command(*words: object) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            cli.main([str(w) for w in words] + ["--json"])
        return json.loads(capsys.readouterr().out)

    made = command("compile", tmp_path / "images.skive", "-o", tmp_path / "net", "--exit", "early:entropy=0.9")
    assert [e["name"] for e in made["exits"]] == ["early", "late"]
    ran = command("run", tmp_path / "net", "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    written = np.load(tmp_path / "y.npz")
    assert [e["samples"] for e in ran["exits"]] == np.bincount(written["exit"], minlength=2).tolist()
    assert written["late"].shape == (6, 3) and ran["mean_macs"] == written["macs"].mean()
    assert command("verify", tmp_path / "net", "--against", tmp_path / "images.skive")["passed"]
