"""Early exits in artefacts without a float instruction: scores near those of the published definitions on the same
bytes, decisions the same on every instruction set, thresholds in real numbers for the caller."""

from __future__ import annotations

import ctypes
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_exits import GATES, entropy, numpy_path, softmax
from test_integer_only import RUNNABLE, require_no_float

import skive
from skive import exit_calibration, exit_calls, ops
from skive.cli import cli
from skive.errors import ExitError
from skive.exits import attach
from skive.ir import Graph, Node, constant
from skive.reference import evaluate_graph
from skive.types import DType

CLASSES, SAMPLES = 5, 64
EXITS = [
    skive.Exit("a", "max-prob", 0.9),
    skive.Exit("b", "margin", 0.7),
    skive.Exit("c", "entropy", 0.35),
    skive.Exit("d", "energy", 2.4),
    skive.Exit("e", "gate", 0.9, of=GATES[0]),
    skive.Exit("f", "gate", 0.95, of=GATES[1]),
    skive.Exit("g", "patience", 1),
    skive.Exit("h", "patience", 1),
    skive.Exit("i", "patience", 2),
    skive.Exit("j", "q-exit", 0.6, of="lambda_j"),
    skive.Exit("k", "q-exit", 0.7, of="lambda_k"),
    skive.Exit("l", "score", 0.6, of="lambda_j"),
    skive.Exit("m", "score", 0.6, of="lambda_k"),
    skive.Exit("n", "window", 0.45, of=(0.5,)),
    skive.Exit("o", "max-prob", 0.6),
]
UNIT = 2.0**-24
# How far a score may be from its definition in float64 on the bytes that the artefact gave.
NEAR = {"max-prob": UNIT, "margin": 2 * UNIT, "window": 2 * UNIT, "entropy": 6e-6, "energy": 2e-6, "gate": 1e-5,
        "patience": 0, "q-exit": 2 * UNIT, "score": 1e-6}


def network() -> Graph:
    """Blocks of a perceptron, all of one shape, with a head behind each; the last head ends in a softmax."""
    rng = np.random.default_rng(3)

    def dense(x: Node, n: int, gain: float) -> Node:
        w = constant((gain * rng.standard_normal((n, x.shape[-1])) / np.sqrt(x.shape[-1])).astype(np.float32))
        return ops.make("linear", x, w, constant((0.3 * rng.standard_normal(n)).astype(np.float32)))

    h = x = ops.make("input", shape=(1, 16), dtype=DType.f32, label="x")
    found: dict[str, Node] = {}
    for e in EXITS:
        h = ops.make("relu", dense(h, 16, 1.4))
        found[e.output] = dense(h, CLASSES, 1.5)
        if e.criterion == "q-exit":
            found[str(e.of)] = ops.make("sigmoid", dense(h, 1, 1.0))
    found["o"] = ops.make("softmax", found["o"], axis=-1)
    found["y"] = dense(h, CLASSES, 1.0)
    return Graph("net", (x,), tuple(found.values()), tuple(found), SAMPLES)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], skive.Module]:
    """The network compiled for a target."""
    folder = tmp_path_factory.mktemp("exits")

    @cache
    def on(target: str) -> skive.Module:
        quantize = skive.Quantize("int8", calibration=inputs(), integer_only=True, rounding="nearest", equalise=False)
        return skive.compile(network(), exits=EXITS, batch_max=SAMPLES, target=target, output=folder / target,
                             quantize=quantize)

    return on


def inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((SAMPLES, 16)).astype(np.float32)


def integer_outputs(module: skive.Module) -> dict[str, np.ndarray]:
    values = module.all_outputs(module.inputs[0].quantize(inputs()))
    return dict(zip((p.name for p in module.outputs), values, strict=True))


def definitions(real: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The score of every sample at every exit but o by the published definitions, in float64."""
    p = {k: softmax(v) for k, v in real.items()}
    top = {k: -np.sort(-v, -1) for k, v in p.items()}

    def opened(k: str, gate: tuple[float, ...]) -> np.ndarray:
        squared = softmax(2 * real[k])
        features = np.stack([top[k][:, 0], entropy(p[k]), top[k][:, 0] - top[k][:, 1], entropy(squared)], -1)
        return 1 / (1 + np.exp(-(features @ np.array(gate[:4]) + gate[4])))

    gates = [opened(k, g) for k, g in zip("ef", GATES, strict=True)]
    second = np.maximum(np.minimum(gates[1], 1 - gates[0]), 0) / (1 - gates[0])
    agree = [(real[a].argmax(-1) == real[b].argmax(-1)) * 1.0 for a, b in ("gh", "hi")]
    read = [real["l.score"], real["m.score"]]
    stop = [np.clip(v, 0, 1) for v in read]
    return [top["a"][:, 0], top["b"][:, 0] - top["b"][:, 1], entropy(p["c"]), np.log(np.exp(real["d"]).sum(-1)),
            gates[0], second, np.zeros(SAMPLES), agree[0], agree[1] * (agree[0] + 1),
            stop[0], stop[0] + (1 - stop[0]) * stop[1], *read, np.abs(top["n"][:, 0] - 0.5)]


def test_scores_decisions_and_thresholds(compiled: Callable[[str], skive.Module]) -> None:
    module = compiled("generic")
    assert module.report["verification"]["passed"] and module.report["verification"]["max_abs_error"] == 0
    assert all(layer["dtype"] != "float32" for layer in module.report["layers"])
    values = integer_outputs(module)
    assert {v.dtype.name for v in values.values()} == {"uint8", "int32"}
    real = {p.name: p.dequantize(values[p.name]).astype(np.float64) for p in module.outputs}
    ways = module.exits[:-1]
    scores = [real[module.outputs[w.score].name] for w in ways if w.score is not None]
    for way, got, want in zip(ways[:-1], scores[:-1], definitions(real), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=NEAR[str(way.criterion)], err_msg=way.name)
    # Of an exit that ends in a softmax the bytes before it decide: more than its own bytes tell apart.
    step = module.outputs[ways[-1].outputs[0]].scale
    assert step is not None and np.abs(scores[-1] - real["o"].max(-1)).max() <= step
    assert np.abs(scores[-1] / step - np.rint(scores[-1] / step)).max() > 0.2

    given = module.inputs[0].quantize(inputs())
    result = module.run(given)
    taken = numpy_path(scores, [str(w.test) for w in ways], [float(np.float32(e.threshold)) for e in EXITS])
    np.testing.assert_array_equal(result.exit, taken)
    assert len(set(taken)) > 5
    np.testing.assert_array_equal(result.scores[:, 0], scores[0].astype(np.float32))
    assert module.thresholds["a"] == np.float32(0.9)
    exact = float(result.scores[0, 0])
    for threshold, leaves in ((exact, False), (exact - UNIT, True), (-np.inf, True), (np.inf, False), (np.nan, False)):
        module.thresholds = {"a": threshold}
        assert (module.run(given).exit[0] == 0) == leaves, threshold
    module.thresholds = {"a": 0.9}
    np.testing.assert_array_equal(module.run(given).exit, taken)
    evidence = exit_calibration.collect(module, [(given,)], None)
    np.testing.assert_array_equal(evidence.taken(np.float32([e.threshold for e in EXITS])), taken)
    require_no_float(module.folder)


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in RUNNABLE if t != "generic"])
def test_the_same_decisions_everywhere(target: str, compiled: Callable[[str], skive.Module]) -> None:
    one, other = compiled("generic"), compiled(target)
    theirs = integer_outputs(other)
    for name, value in integer_outputs(one).items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    results = [m.run(m.inputs[0].quantize(inputs())) for m in (one, other)]
    np.testing.assert_array_equal(results[0].exit, results[1].exit)
    np.testing.assert_array_equal(results[0].outputs, results[1].outputs)


def test_thresholds_in_c(compiled: Callable[[str], skive.Module]) -> None:
    module = compiled("generic")
    header = (module.folder / "net.h").read_text()
    rows = module.manifest["exits"]
    assert rows[0]["threshold"] == 0.9 and rows[0]["scale"] == UNIT and rows[0]["code"] == int(np.float32(0.9) * 2**24)
    assert f"#define NET_EXIT0_THRESHOLD {rows[0]['code']}\n#define NET_EXIT0_SCALE {UNIT!r}" in header
    library = ctypes.CDLL(str(module.folder / "libnet.so"))
    x = module.inputs[0].quantize(inputs()[:1])
    want = module.all_outputs(x)
    outputs = [np.full(v.shape, 7, v.dtype) for v in want]
    raw = np.zeros(module.manifest["arena_bytes"] + 64, np.uint8)
    arena = raw[-raw.ctypes.data % 64:]
    pointers = ((ctypes.c_void_p * 1)(x.ctypes.data), (ctypes.c_void_p * len(want))(*(o.ctypes.data for o in outputs)),
                ctypes.c_void_p(arena.ctypes.data))
    taken = ctypes.c_int32(-9)
    score = int(want[1][0])
    for first, leaves in ((score, False), (score - 1, True)):
        limits = (ctypes.c_int32 * len(EXITS))(first, *[exit_calls.code(str(w.test), np.nan, 1.0)
                                                        for w in module.exits[1:-1]])
        assert library.net_run_exits(*pointers, limits, ctypes.byref(taken)) == 0
        assert taken.value == (0 if leaves else len(EXITS))
    assert library.net_run_exits(*pointers, None, ctypes.byref(taken)) == 0
    assert taken.value == module.run(x).exit[0]


def test_the_command_line_takes_real_numbers(compiled: Callable[[str], skive.Module], tmp_path: Path) -> None:
    module = compiled("generic")
    np.savez(tmp_path / "x.npz", x=inputs())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", str(module.folder), "--input", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz")])
    written, result = np.load(tmp_path / "y.npz"), module.run(module.inputs[0].quantize(inputs()))
    np.testing.assert_array_equal(written["exit"], result.exit)
    np.testing.assert_array_equal(written["y"], result.outputs)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["calibrate-exits", str(module.folder), "--data", str(tmp_path / "x.npz"), "--goal", "macs=0.6", "-o",
                  str(tmp_path / "exits.toml")])
    found = [skive.Exit.parse(t) for t in tomllib.loads((tmp_path / "exits.toml").read_text())["exit"]]
    own = module.thresholds
    module.thresholds = {e.output: e.threshold for e in found}
    spent = module.run(module.inputs[0].quantize(inputs())).macs
    module.thresholds = own
    assert 0 < spent.mean() <= 0.6 * module.exits[-1].macs


@pytest.mark.parametrize("test", [">", ">=", "<", "<="])
def test_an_integer_threshold_decides_as_the_real_one(test: str) -> None:
    rng = np.random.default_rng(0)
    compare = exit_calls.COMPARE[test]
    for scale in (UNIT, 2.0**-20, 1.0, 0.0031638548, 1 / 255):
        near = rng.integers(-(2**24), 2**24, 12)
        reals = np.float32([*(near * scale), *rng.uniform(-2, 2, 8), 0.0, np.inf, -np.inf, np.nan])
        for real in reals:
            code = exit_calls.code(test, real, scale)
            around = np.clip(code + np.arange(-3, 4), -(2**24), 2**24)
            scores = np.concatenate([around, near, [-(2**24), 0, 2**24]])
            want = compare(scores.astype(np.float32) * np.float32(scale), real)
            np.testing.assert_array_equal(compare(scores, code), want, err_msg=f"{scale} {real}")


def pixel_scores(graph: Graph, x: np.ndarray, exits: list[skive.Exit], ports: list[Any] | None) -> list[np.ndarray]:
    """The scores of exits whose network is `graph`, by their meaning in numpy."""
    program = attach(graph, exits, ports)
    values = dict(zip(program.graph.output_names, evaluate_graph(program.graph, [x]), strict=True))
    return [values[e.score] * (1 if e.scale is None else e.scale) for e in program.exits if e.score is not None]


def test_the_least_sure_pixel_decides() -> None:
    x = ops.make("input", shape=(1, 3, 4, 4), dtype=DType.u8, label="x")
    late = ops.make("reshape", x, shape=(48,))
    bytes_ = np.random.default_rng(4).integers(0, 256, x.shape).astype(np.uint8)
    port = {"scale": 0.02, "zero": 100}
    (got,) = pixel_scores(Graph("net", (x,), (x, late), ("pixels", "late")), bytes_, [skive.Exit("pixels", "entropy")],
                          [port, port])
    assert got.shape == (1,) and got[0] == pytest.approx(entropy(softmax(np.moveaxis(bytes_ * 0.02, 1, -1))).max(),
                                                         abs=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("classes_first", [False, True])
def test_probabilities_behind_a_transposition_are_no_logits(classes_first: bool, fixed: bool) -> None:
    x = real = ops.make("input", shape=(1, 4, 4, 3), dtype=DType.u8 if fixed else DType.f32, label="x")
    if fixed:
        real = ops.make("dequantize", x, constant(np.float32(0.02)), constant(np.uint8(100)))
    output = ops.make("softmax", real, axis=-1)
    port = {"scale": 1 / 255, "zero": 0}
    if fixed:
        output = ops.make("quantize", output, constant(np.float32(1 / 255)), constant(np.uint8(0)), to=DType.u8)
    if classes_first:
        output = ops.make("transpose", output, perm=(0, 3, 1, 2))
    given = np.random.default_rng(4).integers(0, 256, x.shape).astype(x.dtype.numpy)
    graph = Graph("net", (x,), (output, ops.make("reshape", output, shape=(48,))), ("pixels", "late"))
    exits = [skive.Exit("pixels", "max-prob", axis=1 if classes_first else -1)]
    (got,) = pixel_scores(graph, given, exits, [port, port] if fixed else None)
    assert got[0] == pytest.approx(softmax(given * (0.02 if fixed else 1.0)).max(-1).min(), abs=1e-6)


def test_what_needs_floats_is_refused() -> None:
    quantize = skive.Quantize("int8", calibration=inputs(), integer_only=True)
    for e in (skive.Exit("a", "quality", 1), skive.Exit("a", lambda at: at.logits, 1)):
        with pytest.raises(ExitError, match=r"exit a: .*integer_only excludes float32; choose one of max-prob, margin"):
            skive.compile(network(), exits=[e], quantize=quantize)


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("integer_only", [False, True])
def test_heads_of_images_behind_uneven_channels(hidden: int, integer_only: bool) -> None:
    """Averages and maxima beside a convolution read what is balanced; with a hidden layer they are normalised first."""
    torch = pytest.importorskip("torch")
    from skive.torch import add_exits

    torch.manual_seed(0)
    conv, *rest = (torch.nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8))
    with torch.no_grad():
        conv.weight *= torch.logspace(-1.5, 0.5, 8)[:, None, None, None]
    backbone = torch.nn.Sequential(conv, torch.nn.ReLU(), *rest, torch.nn.ReLU(), torch.nn.Flatten(),
                                   torch.nn.Linear(8 * 256, CLASSES))  # fmt: skip
    x = np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32)
    model = add_exits(backbone.eval(), (torch.from_numpy(x[:1]),), at=("1",), hidden=hidden).eval()
    quantize = skive.Quantize("int8", calibration=x, integer_only=integer_only)
    module = skive.compile(model, example_inputs=(torch.from_numpy(x[:1]),), quantize=quantize,
                           exits=[skive.Exit("exit0", "max-prob", 0.9)])  # fmt: skip
    assert module.report["quantization"]["sqnr_db"] > 35
