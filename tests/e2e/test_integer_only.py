"""Artefacts without a float instruction: compiled so that any float would be an error, equal to their numpy meaning
on every instruction set, and about as accurate as ordinary INT8."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native, build
from skive.errors import QuantizationError, UnsupportedOpError
from skive.ir import Graph, Node, constant
from skive.ops import make
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType
from skive.verification import verdict_against

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting"
RUNNABLE = [t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())]
rng = np.random.default_rng(5)
START = rng.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same, whichever ran before."""
    rng.bit_generator.state = START


def value(*shape: int, dtype: DType = DType.f32) -> Node:
    return make("input", shape=shape, dtype=dtype, label="x")


def weights(*shape: int) -> Node:
    fan = max(1, int(np.prod(shape[1:])))
    return constant((rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32))


def number(v: float) -> Node:
    return constant(np.asarray(v, np.float32))


def graph(x: Node, *outputs: Node) -> Graph:
    return Graph("net", (x,), outputs, tuple(f"y{i}" for i in range(len(outputs))))


def image_network() -> Graph:
    """Convolutions, residual sums with two scales, gates, pools, resampling, concatenation, activations."""
    x = value(1, 12, 12, 8)
    a = make("relu", make("conv2d", x, weights(16, 3, 3, 8), weights(16), pad=(1, 1, 1, 1), origin="a"))
    b = make("conv2d", a, weights(16, 3, 3, 1), weights(16), pad=(1, 1, 1, 1), groups=16, origin="depthwise")
    c = make("relu", make("add", make("conv2d", b, weights(16, 1, 1, 16), origin="c"), a, origin="residual"))
    gate = make("reduce_mean", c, axes=(1, 2), keep=True)
    gate = make("hard_sigmoid", make("conv2d", gate, weights(16, 1, 1, 16), weights(16), origin="excite"))
    d = make("mul", c, gate, origin="gate")
    d = make("sub", d, make("mul", b, number(0.25)), origin="difference")
    e = make("silu", make("conv2d", d, weights(16, 1, 1, 16), origin="e"))
    low = make("max_pool2d", e, kernel=(2, 2), stride=(2, 2))
    low = make("leaky_relu", make("conv2d", low, weights(16, 1, 1, 16), origin="low"), alpha=0.1)
    mean = make("avg_pool2d", e, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1))
    near = constant(np.repeat(np.arange(6), 2)[:, None].astype(np.int32)), constant(np.ones((12, 1), np.float32))
    up = make("resize2d", low, *near, *near, origin="nearest")
    left = np.clip((np.arange(12) - 1) // 2, 0, 5)
    taps = constant(np.stack([left, np.minimum(left + 1, 5)], 1).astype(np.int32))
    split = constant(np.tile(np.float32([[0.75, 0.25], [0.25, 0.75]]), (6, 1)))
    smooth = make("resize2d", mean, taps, split, taps, split, origin="linear")
    f = make("concat", up, smooth, e, axis=3)
    y = make("conv2d", f, weights(8, 1, 1, 48), weights(8), origin="last")
    return graph(x, make("clip", y, lo=-1.0, hi=1.5), make("argmax", make("reduce_mean", y, axes=(1, 2), keep=False),
                                                           axis=-1, keep=False))


def transformer() -> Graph:
    """One block of a vision transformer and a classifier."""
    x = value(1, 10, 32)
    scale, bias = constant(rng.uniform(0.5, 1.5, 32).astype(np.float32)), weights(32)

    def dense(v: Node, n: int, origin: str) -> Node:
        return make("linear", v, weights(n, v.shape[-1]), weights(n), origin=origin)

    h = make("add", x, constant((rng.standard_normal((10, 32)) / 4).astype(np.float32)), origin="positions")
    n = make("layer_norm", h, scale, bias, origin="norm1")
    heads = [make("reshape", dense(n, 32, k), shape=(1, 10, 2, 16)) for k in "qkv"]
    mixed = make("attention", *heads, scale=0.25, token_major=True, origin="attention")
    h = make("add", h, dense(make("reshape", mixed, shape=(1, 10, 32)), 32, "project"), origin="add1")
    n = make("layer_norm", h, scale, bias, origin="norm2")
    h = make("add", h, dense(make("gelu", dense(n, 64, "up")), 32, "down"), origin="add2")
    pooled = make("reduce_mean", h, axes=(1,), keep=False)
    return graph(x, make("softmax", dense(pooled, 7, "classes"), axis=-1))


def sequence() -> Graph:
    """A function in front of a normalisation, and an average over time as PyTorch's pools of one axis write it."""
    x = value(1, 10, 16)
    h = make("gelu", make("linear", x, weights(16, 16), weights(16)), origin="gelu")
    h = make("layer_norm", h, constant(rng.uniform(0.5, 1.5, 16).astype(np.float32)), weights(16), origin="norm")
    image = make("reshape", make("transpose", h, perm=(0, 2, 1)), shape=(1, 16, 1, 10))
    mean = make("reshape", make("reduce_mean", image, axes=(2, 3), keep=True), shape=(16,))
    places = constant(np.arange(16, dtype=np.int64).reshape(1, 16, 1))
    pooled = make("reshape", make("gather", mean, places, axis=0), shape=(1, 16))
    return graph(x, make("linear", pooled, weights(5, 16), weights(5), origin="classes"))


def embedding() -> Graph:
    """Normalised by lengths without means, of values on both sides of zero and of positive ones, to a unit vector."""
    x = value(3, 4, 16)
    scale = constant(rng.uniform(0.5, 2, 24).astype(np.float32))
    h = make("rms_norm", make("linear", x, weights(24, 16), weights(24)), scale)
    h = make("l2_norm", make("relu", make("linear", h, weights(32, 24), weights(32))), least=1e-6)
    h = make("linear", h, weights(20, 32))
    return graph(x, make("l2_norm", h, axis=1), make("rms_norm", h, constant(np.ones((4, 20), np.float32)), axis=1))


def groups() -> Graph:
    """Normalisation of groups whose spreads differ by a factor of a hundred, of single channels and of 36,000 places;
    extrema and sums beside means, over axes that lie apart too."""
    x = value(2, 6, 5, 8)
    spread = np.exp(rng.uniform(-2.3, 2.3, (16, 1, 1, 1))).astype(np.float32)
    h = make("conv2d", x, constant(weights(16, 3, 3, 8).value * spread), weights(16), pad=(1, 1, 1, 1))
    scale = constant(rng.uniform(0.5, 1.5, 16).astype(np.float32))
    h = make("relu", make("group_norm", h, scale, weights(16), groups=16))
    ones = constant(np.ones(12, np.float32))
    h = make("group_norm", make("conv2d", h, weights(12, 1, 1, 16)), ones, groups=4)
    extremes = make("concat", *(make(f"reduce_{k}", h, axes=(3,), keep=True) for k in ("max", "min")), axis=3)
    h = make("add", h, make("conv2d", extremes, weights(12, 1, 1, 2)))
    apart = make("linear", make("reduce_mean", h, axes=(1, 3), keep=False), weights(7, 5))
    total = make("linear", make("reduce_sum", h, axes=(1, 2), keep=False), weights(7, 12))
    row = make("slice", h, start=(0, 0, 0, 0), size=(2, 1, 5, 12), step=(1, 1, 1, 1))
    large = make("group_norm", make("expand", row, shape=(2, 600, 5, 12)), ones, groups=1)
    return graph(x, make("add", apart, total), make("reduce_max", large, axes=(1,), keep=False))


def samples(network: Graph, count: int) -> list[np.ndarray]:
    return [rng.standard_normal(network.inputs[0].shape).astype(np.float32) for _ in range(count)]


def compiled(network: object, calibration: object, folder: Path, target: str, **options: object) -> skive.Module:
    quantize = skive.Quantize("int8", calibration=calibration, integer_only=True)
    return skive.compile(network, output=folder, name="net", target=target, quantize=quantize, **options)


def results(module: skive.Module, x: np.ndarray) -> list[np.ndarray]:
    got = module(module.inputs[0].quantize(x))
    return list(got) if isinstance(got, tuple) else [got]


def require_no_float(folder: Path) -> None:
    """Every source of the artefact compiles where the compiler may use no float register at all."""
    sources = sorted(folder.glob("net*.cpp"))
    assert sources
    for source in (*sources, *folder.glob("net*.h")):
        assert not re.search(r"\b(float|double|f32|Vec<)\b", source.read_text()), source
    command = [*build.compiler(), "-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-mgeneral-regs-only",
               f"-iquote{folder}", "-c"]
    probe = folder / "probe.cpp"
    probe.write_text("float twice(float x) { return 2 * x; }\n")
    if subprocess.run([*command, probe, "-o", folder / "probe.o"], capture_output=True).returncode == 0:
        pytest.skip("this compiler does not refuse floats")
    for source in sources:
        subprocess.run([*command, source, "-o", folder / "probe.o"], check=True)
        calls = subprocess.run(["nm", "-u", folder / "probe.o"], check=True, capture_output=True, text=True).stdout
        assert not re.search(r"__\w*(sf|df)\w*", calls), calls  # nor are they computed by a library


@pytest.mark.parametrize(
    ("network", "least"), [(image_network, 35), (transformer, 28), (sequence, 28), (embedding, 28), (groups, 28)])
def test_same_bytes_everywhere_and_near_the_float_network(
    network: Callable[[], Graph], least: float, tmp_path: Path
) -> None:
    net = network()
    data, test = samples(net, 24), samples(net, 6)
    outputs: dict[str, list[np.ndarray]] = {}
    for target in RUNNABLE:
        module = compiled(net, data, tmp_path / target, target)
        assert module.report["verification"]["passed"] and module.report["verification"]["max_abs_error"] == 0
        assert all(layer["dtype"] != "float32" for layer in module.report["layers"])
        assert {p.dtype for p in (*module.inputs, *module.outputs)} <= {"uint8", "int64"}
        outputs[target] = [r for x in test for r in results(module, x)]
    for target, got in outputs.items():
        for g, w in zip(got, outputs["generic"], strict=True):
            np.testing.assert_array_equal(g, w, err_msg=target)
    real = module.outputs[0]
    want = np.concatenate([evaluate_graph(net, [x])[0].ravel() for x in test])
    got = np.concatenate([real.dequantize(results(module, x)[0]).ravel() for x in test])
    noise = 10 * np.log10(np.sum(want.astype("f8") ** 2) / np.sum((got - want).astype("f8") ** 2))
    assert noise > least, noise  # ordinary INT8 is at 40 dB
    if network is transformer:  # residual sums have 16 bits, what is multiplied has 8
        stored = {layer["name"]: layer["stored"] for layer in module.report["quantization"]["layers"]}
        assert {stored[n] for n in ("positions", "project")} == {"i16"}
        assert {stored[n] for n in ("norm1", "q", "v", "gelu")} == {"u8"}
    require_no_float(tmp_path / "generic")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_keyword_network(tmp_path: Path) -> None:
    with np.load(EXAMPLE / "kws_mfcc_a.npz") as file:
        x, y = (file["x"].astype(np.float32)[:, None] - 83) * np.float32(0.5847029089927673), file["y"]
    model = EXAMPLE / "kws_dscnn.onnx"
    classes = {}
    for target in RUNNABLE:
        module = compiled(model, x[:100], tmp_path / target, target, example_inputs=(x[:1],))
        classes[target] = np.concatenate([results(module, v[None])[0] for v in x[100:]])
        np.testing.assert_array_equal(classes[target], classes[RUNNABLE[0]], err_msg=target)
    require_no_float(tmp_path / "generic")
    right = int((classes["generic"].argmax(1) == y[100:]).sum())
    assert right >= 449 - 2, right  # half a point below float32
    header = (tmp_path / "generic" / "net.h").read_text()
    assert f"#define NET_INPUT0_SCALE {module.inputs[0].scale!r}" in header
    assert f"#define NET_INPUT0_ZERO {module.inputs[0].zero}" in header
    agreement = verdict_against(module, model, [(v[None],) for v in x[100:140]], y[100:140])[1]
    assert agreement.outputs[0].sqnr_db is not None and agreement.outputs[0].sqnr_db > 15


def test_what_has_no_integer_form_is_named(tmp_path: Path) -> None:
    x = value(1, 6, 8)
    a = make("linear", x, weights(8, 8), origin="first")
    b = make("div", a, make("exp", a, origin="exp"), origin="ratio")
    scale = make("reduce_mean", x, axes=(0, 1), keep=False)
    y = make("rms_norm", make("log_softmax", b, axis=-1, origin="log"), scale, origin="rms")
    with pytest.raises(UnsupportedOpError) as e:
        compiled(graph(x, y), samples(graph(x, y), 2), tmp_path / "a", "generic")
    assert {p[0] for p in e.value.problems} == {"ratio", "log", "rms"}
    assert "div of 2 computed values" in str(e.value) and "integer_only" in str(e.value)


def test_options_that_contradict() -> None:
    for options in ({"dtype": "int16"}, {"dtype": "auto"}, {"keep": ("conv*",)}):
        with pytest.raises(QuantizationError, match="integer_only goes with int8"):
            skive.Quantize(integer_only=True, **options)  # type: ignore[arg-type]
