"""Weight-only quantization: the pass, its numbers, and artefacts on every target."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import skive
from skive import compression, ops
from skive.cli import cli
from skive.errors import InvalidModelError, QuantizationError, UnsupportedOpError
from skive.export.onnx import export_onnx
from skive.frontend.onnx import import_onnx
from skive.ir import Graph, Node, constant
from skive.passes import canonical, optimize
from skive.passes.compress_weights import Scheme, compress, compress_weights, compressed, group_of
from skive.pipeline import random_inputs
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Every test draws the same numbers, whichever ran before."""
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


def value(name: str, *shape: int, dtype: DType = DType.f32) -> Node:
    return ops.make("input", shape=shape, dtype=dtype, label=name)


def weights(*shape: int) -> Node:
    return constant((RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))


def perceptron(rows: int = 3) -> Graph:
    """Three layers with epilogues, the last without bias."""
    x = value("x", rows, 96)
    h = ops.make("relu", ops.make("linear", x, weights(130, 96), weights(130), label="first"))
    h = ops.make("add", ops.make("linear", h, weights(130, 130), weights(130), label="second"), h)
    y = ops.make("linear", h, weights(20, 130), label="last")
    return Graph("perceptron", (x,), (y,), ("y",))


def words() -> Graph:
    """A table, a 1x1 convolution and a layer that is too small."""
    i = value("i", 2, 7, dtype=DType.i64)
    rows = ops.make("gather", weights(400, 64), i, axis=0)
    image = ops.make("reshape", rows, shape=(2, 7, 1, 64))
    y = ops.make("silu", ops.make("conv2d", image, weights(48, 1, 1, 64), weights(48), label="conv"))
    z = ops.make("linear", ops.make("reshape", y, shape=(2, 336)), weights(2, 336), label="small")
    return Graph("words", (i,), (z,), ("z",))


def sqnr(got: np.ndarray, want: np.ndarray) -> float:
    return float(10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()))


@pytest.mark.parametrize("group", [8, 16, 40, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest(bits: int, group: int) -> None:
    w = RNG.standard_normal((33, 100)).astype(np.float32)
    w[5] = 0
    w[7, :8] = 1e-38  # no scale can be made of it
    c = compressed(w, bits, group)
    assert c.q.shape == w.shape and c.scale.shape == c.zero.shape == (33, -(-100 // group))
    assert c.q.max() < 1 << bits and not c.real[5].any() and np.isfinite(c.scale).all()
    # No weight is further from the real one than half a step, but for those that 4 bits saturate.
    step = np.abs(c.scale)[:, np.arange(100) // group]
    error = np.abs(c.real - w)
    inside = np.ones_like(error, bool) if bits == 8 else (c.q > 0) & (c.q < 15)
    assert (error <= step / 2 + 1e-6)[inside].all()
    assert sqnr(c.real, w) > {4: 18.0, 8: 42.0}[bits] - (3 if group > 16 and bits == 4 else 0)


def test_scale_of_4_bits_is_no_worse_than_the_largest_magnitude() -> None:
    w = RNG.standard_t(4, (64, 256)).astype(np.float32)
    c = compressed(w, 4, 64)
    parts = w.reshape(64, 4, 64)
    scale = np.abs(parts).max(-1, keepdims=True) / 7
    plain = (np.clip(np.rint(parts / scale), -7, 7) * scale).reshape(64, 256)
    assert sqnr(c.real, w) > sqnr(plain, w) + 0.5


def test_rounding_with_data_lowers_the_error_of_the_sums() -> None:
    x = (RNG.standard_normal((500, 24)) @ RNG.standard_normal((24, 64))).astype(np.float32)  # correlated
    w = RNG.standard_normal((40, 64)).astype(np.float32)
    c = compressed(w, 4, 32)
    better = compression.adapted(w, c, x.T @ x / len(x))
    assert (np.abs(better.q.astype(int) - c.q.astype(int)) <= 1).all()
    assert sqnr(x @ better.real.T, x @ w.T) > sqnr(x @ c.real.T, x @ w.T) + 3


def test_what_is_compressed() -> None:
    graph, found = compress(perceptron(), Scheme(4))
    nodes = [n for n in graph.nodes if n.op == "compressed_linear"]
    assert [n.attrs["bits"] for n in nodes] == [4, 4, 8]  # the layer that makes the output
    assert [n.attrs["group"] for n in nodes] == [64, 64, 130] and len(found) == 3
    x = value("x", 2, 64)
    single = compress(Graph("g", (x,), (ops.make("linear", x, weights(32, 64)),), ("y",)), Scheme(4))[0]
    assert single.outputs[0].attrs["bits"] == 4  # of one layer there is no other to save on
    graph, found = compress(words(), Scheme(4))
    assert [n.op for n in graph.nodes if n.op in ("conv2d", "linear", "compressed_linear", "gather")] == [
        "gather", "gather", "compressed_linear", "linear"]  # fmt: skip
    kept = compress(perceptron(), Scheme(8, keep=lambda n: n.name == "first"))[0]
    assert sum(n.op == "compressed_linear" for n in kept.nodes) == 2
    assert group_of(100, 4, None) == 64 and group_of(48, 4, None) == 48 and group_of(100, 8, None) == 100
    assert group_of(100, 8, 16) == 16


def test_the_pass_keeps_the_function() -> None:
    graph = perceptron()
    x = random_inputs(graph)
    (want,) = evaluate_graph(graph, x)
    for bits, least in ((8, 36.0), (4, 15.0)):
        (got,) = evaluate_graph(compress_weights(graph, bits=bits), x)
        assert sqnr(got, want) > least


@pytest.mark.parametrize("activation", [8, 16, 32])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_artefacts_equal_the_reference(target: str, activation: int) -> None:
    """On every target; the compile itself compares the artefact with the reference."""
    for graph, dtype in ((perceptron(), "weights4"), (perceptron(1), "weights8"), (words(), "weights8")):
        wanted = skive.Quantize(dtype, activations=activation)
        module = skive.compile(graph, quantize=wanted, target=target)
        verdict = module.report["verification"]
        assert verdict["passed"] and verdict["sqnr_db"] > (70 if activation > 8 else 45)
        assert any(c["kernel"] == "compressed_linear" for c in module.report["layers"])


def test_report_and_size() -> None:
    graph = perceptron()
    exact = skive.compile(graph)
    for dtype, share in (("weights8", 0.30), ("weights4", 0.20)):
        module = skive.compile(graph, quantize=dtype)
        told = module.report["quantization"]
        assert told["dtype"] == dtype and told["samples"] == 0 and told["sqnr_db"] is None
        assert [e["dtype"] for e in told["layers"]] == [dtype, dtype, "weights8"]
        assert module.report["compiled"]["weight_bytes"] < share * exact.report["compiled"]["weight_bytes"] + 2000
        assert (module.folder / "report.html").read_text().count("integers of")


def test_with_data_the_noise_is_measured_and_lower() -> None:
    graph = perceptron(16)
    base = RNG.standard_normal((30, 96)).astype(np.float32)
    data = (RNG.standard_normal((12, 16, 30)).astype(np.float32) @ base)
    found = {}
    for rounding in ("nearest", "adaround"):
        module = skive.compile(graph, quantize=skive.Quantize("weights4", calibration=data, rounding=rounding))
        found[rounding] = module.report["quantization"]["sqnr_db"]
        (want,) = evaluate_graph(graph, [data[0]])
        assert abs(sqnr(module(data[0]), want) - found[rounding]) < 3
    assert found["adaround"] > found["nearest"] + 1.5


def test_export() -> None:
    """onnxruntime computes the written model as the reference without rounded activations does."""
    ort = pytest.importorskip("onnxruntime")
    graph = perceptron()
    x = random_inputs(graph)
    for bits, group in ((8, 0), (8, 32), (4, 32)):
        small = compress_weights(graph, bits=bits, group=group, activation=32)
        model = export_onnx(small)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"x": x[0]})
        np.testing.assert_allclose(got, evaluate_graph(small, x)[0], rtol=1e-4, atol=1e-5)


def model_of(nodes: list[onnx.NodeProto], values: dict[str, np.ndarray | onnx.TensorProto], x: tuple[int, ...],
             y: tuple[int, ...], *domains: str) -> onnx.ModelProto:
    tensors = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, x)],
                              [helper.make_tensor_value_info("y", 1, y)], tensors)
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def nibbles(values: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit integers along the last axis, the first in the low half."""
    even = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, values.shape[-1] % 2)]).astype(np.uint8) & 15
    return even[..., 0::2] | even[..., 1::2] << 4


def packed(name: str, values: np.ndarray, elem: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=elem, dims=values.shape)
    tensor.raw_data = nibbles(values.reshape(1, -1)).tobytes()
    return tensor


def compared(model: onnx.ModelProto, rows: int, **attrs: int) -> None:
    """The model stays compressed, with `attrs`; the artefact computes what onnxruntime computes."""
    ort = pytest.importorskip("onnxruntime")
    x = RNG.standard_normal((rows, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)).astype(np.float32)
    module = skive.compile(model)
    calls = [c for c in optimize(import_onnx(model))[0].nodes if c.op == "compressed_linear"]
    assert len(calls) == 1 and {k: calls[0].attrs[k] for k in attrs} == attrs
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else 8 bits of activations
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    np.testing.assert_allclose(module(x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmulnbits(bits: int, points: bool) -> None:
    n, k, block = 40, 100, 32  # the last block is shorter
    q = RNG.integers(0, 1 << bits, (n, 4, block), np.uint8)
    values = {
        "w": nibbles(q) if bits == 4 else q,
        "s": RNG.uniform(0.5, 1, (n, 4)).astype(np.float32),
        "z": (lambda z: nibbles(z) if bits == 4 else z)(RNG.integers(0, 1 << bits, (n, 4), np.uint8)),
    }
    node = helper.make_node("MatMulNBits", ["x", "w", "s", *["z"] * points], ["y"], domain="com.microsoft", N=n, K=k,
                            bits=bits, block_size=block)
    compared(model_of([node], values, (7, k), (7, n), "com.microsoft"), 7, bits=bits, group=block, activation=32)


@pytest.mark.parametrize("elem", [onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8])
def test_weights_in_blocks(elem: int) -> None:
    """DequantizeLinear with block_size on [K, N] in front of a MatMul."""
    k, n, block = 96, 33, 16
    low, high = {onnx.TensorProto.INT4: (-8, 8), onnx.TensorProto.UINT4: (0, 16)}.get(elem, (-128, 128))
    q, z = (RNG.integers(low, high, s, np.int16) for s in ((k, n), (k // block, n)))
    whole = (lambda name, v: packed(name, v, elem)) if elem != onnx.TensorProto.INT8 else (
        lambda name, v: numpy_helper.from_array(v.astype(np.int8), name))
    values = {"q": whole("q", q), "z": whole("z", z), "s": RNG.uniform(0.5, 1, z.shape).astype(np.float32)}
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0, block_size=block),
             helper.make_node("MatMul", ["x", "w"], ["y"])]
    compared(model_of(nodes, values, (5, k), (5, n)), 5, bits=8 if elem == onnx.TensorProto.INT8 else 4, group=block)


def test_one_scale_a_channel_stays_where_few_rows_read_many_weights() -> None:
    values = {"q": RNG.integers(-128, 128, (512, 600), np.int8), "s": RNG.uniform(0.5, 1, 600).astype(np.float32),
              "z": np.zeros(600, np.int8)}
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
             helper.make_node("MatMul", ["x", "w"], ["y"])]
    compared(model_of(nodes, values, (2, 512), (2, 600)), 2, bits=8, group=512)
    many = optimize(import_onnx(model_of(nodes, values, (64, 512), (64, 600))))[0]
    assert [n.op for n in many.nodes if ops.macs(n)] == ["linear"]


def test_four_bits_outside_dequantizelinear_are_refused() -> None:
    q = packed("q", RNG.integers(0, 16, (4, 6)), onnx.TensorProto.UINT4)
    nodes = [helper.make_node("Cast", ["q"], ["w"], to=1), helper.make_node("MatMul", ["x", "w"], ["y"])]
    with pytest.raises(UnsupportedOpError, match="4-bit integers"):
        import_onnx(model_of(nodes, {"q": q}, (1, 4), (1, 6)))
    del q.dims[:]
    q.dims.extend([4, 8])
    with pytest.raises(InvalidModelError, match="16 bytes, but 12"):
        import_onnx(model_of(nodes, {"q": q}, (1, 4), (1, 6)))


@pytest.mark.parametrize("change", [{"bits": 2}, {"block_size": 8}, {"N": 41}, {"K": 120}])
def test_damaged_matmulnbits(change: dict[str, int]) -> None:
    values = {"w": np.zeros((40, 4, 16), np.uint8), "s": np.ones((40, 4), np.float32)}
    attrs = {"N": 40, "K": 100, "bits": 4, "block_size": 32, **change}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attrs)
    with pytest.raises((InvalidModelError, UnsupportedOpError)):
        import_onnx(model_of([node], values, (7, 100), (7, 40), "com.microsoft"))


def test_stored_weights_can_have_rounded_rows() -> None:
    """`weights4` on a model that has its weights in 4 bits already takes them as they are."""
    small = export_onnx(compress_weights(perceptron(), bits=4, activation=32))
    graph = optimize(import_onnx(small))[0]
    again = compress(canonical(import_onnx(small))[0], Scheme(4))[0]
    # The last layer has one scale a channel and is small: by itself it becomes float32.
    as_it_is, rounded = ([n for n in g.nodes if n.op == "compressed_linear"] for g in (graph, again))
    assert len(as_it_is) == 2 and len(rounded) == 3
    for a, b in zip(as_it_is, rounded):
        assert (a.attrs["activation"], b.attrs["activation"]) == (32, 16)
        assert all(np.array_equal(i.value, j.value) for i, j in zip(a.inputs[1:4], b.inputs[1:4], strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "weights4", "block": 12}, "multiple of 8"),
        ({"dtype": "int8", "block": 32}, "weights8 and weights4"),
        ({"dtype": "int8", "activations": 8}, "weights8 and weights4"),
        ({"dtype": "weights4", "activations": 4}, "8, 16 or 32"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        skive.Quantize(**options)  # type: ignore[arg-type]


def test_scalars_beside_a_layer() -> None:
    x, s = value("x", 3, 96), value("s")
    y = ops.make("mul", ops.make("linear", x, weights(130, 96), label="fc"), ops.make("sqrt", s))
    result, found = compress(Graph("g", (x, s), (y,), ("y",)), Scheme())
    assert len(found) == 1 and result.outputs[0].shape == (3, 130)


def test_nothing_to_compress() -> None:
    x = value("x", 4)
    graph = Graph("g", (x,), (ops.make("relu", x),), ("y",))
    with pytest.raises(QuantizationError, match="no fully connected layer"):
        skive.compile(graph, quantize="weights8")


def test_command_line_needs_no_data(tmp_path: Path) -> None:
    model = tmp_path / "p.onnx"
    export_onnx(perceptron(), model)
    folder = tmp_path / "out"
    result = CliRunner().invoke(
        cli, ["compile", str(model), "-o", str(folder), "--quantize", "weights4", "--block", "32", "--json"]
    )
    assert result.exit_code == 0, result.output
    layers = json.loads((folder / "report.json").read_text())["quantization"]["layers"]
    assert [e["block"] for e in layers] == [32, 32, 32]
