"""Networks in fixed point: accuracy on real recordings, and the same bytes from every instruction set and compiler."""

from __future__ import annotations

import shlex
from pathlib import Path

import exhaustive
import numpy as np
import pytest

import skive
from skive import _native, build, ops
from skive.agreement import wilson
from skive.check import exactness
from skive.ir import Graph, constant
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CALIBRATION = 100  # recordings that are not evaluated
# Right decisions of the remaining 500: measured, and the same on every processor.
FLOAT32_RIGHT = 449


def recordings() -> tuple[np.ndarray, np.ndarray]:
    """Features [600, 1, 49, 10] and classes [600]."""
    with np.load(EXAMPLE / "kws_mfcc_a.npz") as data:
        return (data["x"].astype(np.float32)[:, None] - 83) * np.float32(0.5847029089927673), data["y"]


def runnable(target: str) -> bool:
    return set(TARGETS[target].features) <= set(_native.cpu_features())


def without_softmax(source: Path, folder: Path) -> Path:
    """The network without its softmax, which is float32: up to there all is integers."""
    import onnx

    network = onnx.load(source)
    last = network.graph.node[-1]
    assert last.op_type == "Softmax"
    network.graph.node.remove(last)
    network.graph.output[0].name = last.input[0]
    path = folder / f"{source.stem}_scores.onnx"
    onnx.save(network, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_softmax(EXAMPLE / "kws_dscnn.onnx", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_accuracy_and_bytes_are_the_same_everywhere(dtype: str, model: Path, tmp_path: Path) -> None:
    x, y = recordings()
    outputs: dict[str, np.ndarray] = {}
    for target in filter(runnable, TARGETS):
        module = skive.compile(model, example_inputs=(x[:1],), output=tmp_path / target, name="kws",
                               target=target, threads=1 + len(outputs) % 2,
                               quantize=skive.Quantize(dtype, calibration=x[:CALIBRATION]))
        assert module.report["verification"]["passed"]
        assert module.report["quantization"]["islands"] == []
        outputs[target] = np.concatenate([module(s[None]) for s in x[CALIBRATION:]])
    assert "generic" in outputs
    for target, got in outputs.items():
        np.testing.assert_array_equal(got, outputs["generic"], err_msg=target)
    right = int((outputs["generic"].argmax(1) == y[CALIBRATION:]).sum())
    # Half a point of 500 for 8 bits, one decision for 16; and not beyond what 500 recordings can tell.
    assert right >= FLOAT32_RIGHT - (2 if dtype == "int8" else 1), right
    low, high = wilson(right, len(y) - CALIBRATION)
    assert low < FLOAT32_RIGHT / (len(y) - CALIBRATION) < high


def real_inputs(network: str) -> np.ndarray:
    """Sixty samples of the data that `network` was trained for."""
    if network == "kws_dscnn":
        return recordings()[0][:60]
    if network == "ic_resnet8":
        with np.load(DATA / "cifar10_test_a.npz") as data:
            return np.ascontiguousarray(data["x"][:60].transpose(0, 3, 1, 2).astype(np.float32))
    with np.load(DATA / "photos.npz") as data:
        photos = [data[name] for name in sorted(data.files)]
    rng = np.random.default_rng(0)
    corners = [(p, rng.integers(p.shape[0] - 192), rng.integers(p.shape[1] - 192)) for p in photos * 20]
    crops = np.stack([p[top:top + 192:2, left:left + 192:2] for p, top, left in corners])
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2)) / np.float32(255)


@pytest.mark.parametrize("target", [t for t in TARGETS if runnable(t)])
def test_functions_whose_steps_are_rounded_one_by_one(target: str, tmp_path: Path) -> None:
    """What MobileNetV3 and its kind have between integers is the same float32 everywhere; with a fused multiply-add in
    vectors some fell on the other side of the middle between two integers of 16 bits."""
    x = ops.make("input", shape=(300_001,), dtype=DType.f32, label="x")
    attrs = {"hard_sigmoid": {"alpha": 0.2, "beta": 0.5}, "leaky_relu": {"alpha": 0.1}}
    names = ("hard_swish", "hard_sigmoid", "leaky_relu", "softsign", "reciprocal")
    outputs = [ops.make(n, x, **attrs.get(n, {})) for n in names]
    outputs += [ops.make("div", x, constant(np.float32(7))), ops.make("prelu", x, constant(np.float32(0.3)))]
    graph = Graph("g", (x,), tuple(outputs), tuple(f"y{i}" for i in range(len(outputs))))
    assert exactness(graph).exact
    values = np.linspace(-7.7, 7.1, 300_001, dtype=np.float32)
    got = skive.compile(graph, output=tmp_path / "out", target=target)(values)
    for a, b in zip(got, evaluate_graph(graph, [values]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("network", ["kws_dscnn", "ic_resnet8", "vww_mobilenetv1_025"])
def test_every_target_and_compiler_gives_the_same_bytes(
    network: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(build.compiler.cache_clear)
    source = EXAMPLE / "kws_dscnn.onnx" if network == "kws_dscnn" else DATA / "models" / f"{network}.onnx"
    if not source.exists():
        pytest.skip(f"no {source}")
    x = real_inputs(network)
    # Quantized once: calibration itself runs compiled code.
    model = tmp_path / "quantized.onnx"
    quantized = skive.compile(without_softmax(source, tmp_path), example_inputs=(x[:1],), output=tmp_path / "first",
                              verify=False, export_onnx=model, quantize=skive.Quantize(dtype, calibration=x[:30]))
    outputs: dict[str, np.ndarray] = {}
    for compiler, command in exhaustive.compilers().items():
        monkeypatch.setenv("CXX", shlex.join(command))
        build.compiler.cache_clear()
        for target in filter(runnable, TARGETS):
            module = skive.compile(model, example_inputs=(x[:1],), output=tmp_path / compiler / target, target=target,
                                   threads=1 + len(outputs) % 2, verify=False)
            outputs[f"{target}, {compiler}"] = np.concatenate([module(s[None]) for s in x])
    first = next(iter(outputs.values()))
    assert len(outputs) >= 2 and np.ptp(first) > 0
    outputs["not exported"] = np.concatenate([quantized(s[None]) for s in x])
    for name, got in outputs.items():
        assert got.tobytes() == first.tobytes(), name
    if missing := {"g++", "clang"} - set(exhaustive.compilers()):
        pytest.skip(f"equal on every target; not compiled by {', '.join(missing)}, which is not there")


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("network", ["shufflenet", "squeeze_excite", "unet", "vgg"])
def test_an_exported_network_comes_back_as_the_same_integers(network: str, dtype: str, tmp_path: Path) -> None:
    """Also where ONNX has no such operation of 16-bit integers, and they go through float32 in the file."""
    torch = pytest.importorskip("torch")
    from topologies import TOPOLOGIES

    torch.manual_seed(0)
    make, examples, _ = TOPOLOGIES[network]
    x = np.random.default_rng(0).standard_normal((40, *examples[0].shape[1:])).astype(np.float32)
    one = skive.compile(make().eval(), example_inputs=(x[:1],), output=tmp_path / "one", verify=False,
                        export_onnx=tmp_path / "q.onnx", quantize=skive.Quantize(dtype, calibration=x))
    two = skive.compile(tmp_path / "q.onnx", example_inputs=(x[:1],), output=tmp_path / "two", verify=False)
    for sample in x[:20, None]:
        assert one(sample).tobytes() == two(sample).tobytes()
    assert [a["dtype"] for a in one.report["layers"]] == [b["dtype"] for b in two.report["layers"]]
