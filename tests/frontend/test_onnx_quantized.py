"""Models that onnxruntime has quantized: the same integers as its own kernels, whatever the form."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from quantized_models import BODIES, quantized, samples

from skive import reference
from skive.frontend.onnx import import_onnx
from skive.ir import Graph
from skive.passes import canonical, integer_arithmetic

ort = pytest.importorskip("onnxruntime")

# Of these onnxruntime's own kernel differs from the operator's definition (docs/quantized-models.md), by one step.
INEXACT = {"softmax", "average_pool"}


def session(model: ModelProto) -> ort.InferenceSession:
    """onnxruntime with all its optimizations, so that it runs its integer kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(graph: Graph, x: np.ndarray) -> np.ndarray:
    return reference.evaluate_graph(graph, [x])[0]


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("signed", [False, True], ids=["u8", "i8"])
@pytest.mark.parametrize("operators", [False, True], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", BODIES)
def test_same_as_onnxruntime(name: str, operators: bool, signed: bool, per_channel: bool) -> None:
    model = quantized(name, operators=operators, signed=signed, per_channel=per_channel)
    assert {n.op_type for n in model.graph.node} & {"QuantizeLinear"}
    imported = import_onnx(model)
    simple, _ = canonical(imported, check="never")
    integers = integer_arithmetic(simple)
    expected = session(model)
    last = imported.outputs[0]
    step = 1.01 * float(last.inputs[1].value) if name in INEXACT else 0.0
    for x in samples(6, 5):
        want = expected.run(None, {"x": x})[0]
        for graph in (imported, simple, integers):
            got = run(graph, x)
            assert got.shape == want.shape and np.abs(got - want).max() <= step


def test_weights_stay_integers() -> None:
    """Transposed and reshaped while the model is imported, folded by no pass."""
    for name in ("conv", "depthwise", "gemm", "matmul", "flattened"):
        model = quantized(name, operators=False, signed=False, per_channel=True)
        graph, _ = canonical(import_onnx(model), check="never")
        for node in graph.nodes:
            if node.op in ("conv2d", "linear"):
                q, scale, _ = node.inputs[1].inputs
                assert node.inputs[1].op == "dequantize" and q.is_const and q.value.dtype == np.int8
                assert scale.shape in ((q.shape[0], *[1] * (q.type.rank - 1)), ())
                assert all(b.op == "dequantize" and b.inputs[0].value.dtype == np.int32 for b in node.inputs[2:])


def linear_model(nodes: list[NodeProto], constants: dict[str, np.ndarray], to: int = TensorProto.FLOAT) -> ModelProto:
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 6])],
                              [helper.make_tensor_value_info("y", to, [4, 3])],
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_dynamic_quantization() -> None:
    """The zero point of x is known at run time only: the product stays one of 8-bit integers."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.integers(-128, 128, (6, 3)).astype(np.int8), "wz": np.int8(0), "ws": np.float32(0.02)}
    model = linear_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                          helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
                          helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                          helper.make_node("Mul", ["s", "ws"], ["sw"]),
                          helper.make_node("Mul", ["f", "sw"], ["y"])], constants)
    graph = import_onnx(model)
    assert [n.inputs[0].dtype.value for n in graph.nodes if n.op == "linear"] == ["u8"]
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
        np.testing.assert_array_equal(run(graph, x), session(model).run(None, {"x": x})[0])


@pytest.mark.parametrize("zero", [0, 128, 100])
def test_unsigned_weights(zero: int) -> None:
    """u8 weights become i8 where their zero point allows it, and are exact in 32 bits where not."""
    rng = np.random.default_rng(0)
    constants = {"xs": np.float32(0.05), "xz": np.uint8(120), "w": rng.integers(0, 256, (6, 3)).astype(np.uint8),
                 "ws": np.float32(0.01), "wz": np.uint8(zero), "ys": np.float32(0.1), "yz": np.uint8(130)}
    model = linear_model([helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
                          helper.make_node("QLinearMatMul", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])],
                         constants, TensorProto.UINT8)
    graph = import_onnx(model)
    narrow = [n for n in graph.nodes if n.op == "linear" and n.inputs[1].dtype.value == "i8"]
    assert bool(narrow) == (zero == 128)
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
        np.testing.assert_array_equal(run(graph, x), session(model).run(None, {"x": x})[0])


# Scales whose ratios are no simple fractions: what lies exactly between two integers is rounded either way.
A = {"as": np.float32(0.0503), "az": np.uint8(120)}
B = {"bs": np.float32(0.0197), "bz": np.uint8(131)}
Y = {"ys": np.float32(0.0711), "yz": np.uint8(110)}
K = np.arange(-24, 24, dtype=np.int8).reshape(8, 6)


# operator of onnxruntime -> (inputs by name, attributes, shape of the 8-bit operands a and b, constants)
OWN = {
    "QLinearAdd": (["a", "as", "az", "b", "bs", "bz", "ys", "yz"], {}, (2, 5, 7), {}),
    "QLinearMul": (["a", "as", "az", "b", "bs", "bz", "ys", "yz"], {}, (2, 5, 7), {}),
    "QLinearSigmoid": (["a", "as", "az", "ys", "yz"], {}, (2, 5, 7), {}),
    "QLinearLeakyRelu": (["a", "as", "az", "ys", "yz"], {"alpha": 0.2}, (2, 5, 7), {}),
    "QLinearSoftmax": (["a", "as", "az", "h", "o"], {"axis": 1, "opset": 12}, (2, 5, 7),
                       {"h": np.float32(1 / 256), "o": np.uint8(0)}),
    "QLinearConcat": (["ys", "yz", "a", "as", "az", "b", "ys", "yz"], {"axis": 1}, (2, 5, 7), {}),
    "QLinearWhere": (["c", "a", "as", "az", "b", "bs", "bz", "ys", "yz"], {}, (2, 5, 7),
                     {"c": np.arange(70).reshape(2, 5, 7) % 3 == 0}),
    "QLinearAveragePool": (["a", "as", "az", "ys", "yz"], {"kernel_shape": [2, 2], "channels_last": 1},
                           (1, 4, 6, 3), {}),
    "QLinearGlobalAveragePool": (["a", "as", "az", "ys", "yz"], {"channels_last": 1}, (1, 4, 6, 3), {}),
    "QGemm": (["a", "as", "az", "k", "ks", "kz", "i", "ys", "yz"], {"alpha": 0.5, "transB": 1}, (3, 6),
              {"k": K, "ks": np.float32([.01, .02, .03, .04, .05, .06, .07, .08]), "kz": np.zeros(8, np.int8),
               "i": np.arange(8, dtype=np.int32) * 100}),
    "QGemm/float": (["a", "as", "az", "k", "ks", "kz", "i"], {"transA": 1, "transB": 1}, (6, 3),
                    {"k": K, "ks": np.float32(0.01), "kz": np.int8(0), "i": np.arange(8, dtype=np.int32) * 100}),
    "MatMulIntegerToFloat": (["a", "k", "as", "ks", "az", "kz", "f"], {}, (2, 3, 8),
                             {"k": K, "ks": np.float32(0.01), "kz": np.int8(0), "f": np.float32([1, 2, 3, 4, 5, 6])}),
    "DequantizeLinear": (["a", "as", "az"], {}, (2, 5, 7), {}),
}


@pytest.mark.parametrize("name", OWN)
def test_operators_of_onnxruntime(name: str) -> None:
    inputs, attrs, shape, own = OWN[name]
    constants = {k: v for k, v in {**A, **B, **Y, **own}.items() if k in inputs}
    free = [i for i in ("a", "b") if i in inputs]
    node = helper.make_node(name.partition("/")[0], inputs, ["y"], domain="com.microsoft", **attrs)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(i, TensorProto.UINT8, shape) for i in free],
                              [helper.make_empty_tensor_value_info("y")],
                              [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    model = helper.make_model(graph, ir_version=8, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    imported = import_onnx(model)
    engine = session(model)
    rng = np.random.default_rng(0)
    for _ in range(4):
        values = [rng.integers(0, 256, shape).astype(np.uint8) for _ in free]
        got = reference.evaluate_graph(imported, values)[0]
        want = engine.run(None, dict(zip(free, values, strict=True)))[0]
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if got.dtype == np.float32:
            np.testing.assert_allclose(got, want, rtol=1e-6)
        else:
            np.testing.assert_array_equal(got, want)
