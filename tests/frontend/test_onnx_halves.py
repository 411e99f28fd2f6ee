"""Models of float16 and bfloat16: read as float32, every constant exactly."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import skive
from skive.errors import InvalidModelError, UnsupportedOpError
from skive.frontend import open_model
from skive.reference import evaluate_graph

RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 6)).astype(np.float32)
W = RNG.standard_normal((6, 4)).astype(np.float16)


def tensor(name: str, elem: int, stored: str = "raw") -> onnx.TensorProto:
    """W in float16, or cut to the bits of bfloat16."""
    bits = W.view(np.uint16) if elem == TensorProto.FLOAT16 else (W.astype(np.float32).view(np.uint32) >> 16)
    t = TensorProto(name=name, data_type=elem, dims=W.shape)
    if stored == "raw":
        t.raw_data = bits.astype("<u2").tobytes()
    else:
        t.int32_data.extend(int(b) for b in bits.reshape(-1))
    return t


def exact(elem: int) -> np.ndarray:
    wide = W.astype(np.float32)
    return wide if elem == TensorProto.FLOAT16 else (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def product(elem: int, stored: str = "raw", *, inside: bool = False) -> onnx.ModelProto:
    """y = x W, in 16-bit floats from end to end, or `inside` of two casts."""
    nodes = [helper.make_node("MatMul", ["h", "w"], ["p"], name="fc")]
    if inside:
        nodes = [helper.make_node("Cast", ["x"], ["h"], to=elem), *nodes, helper.make_node("Cast", ["p"], ["y"], to=1)]
    else:
        nodes[0].input[0], nodes[0].output[0] = "x", "y"
    port = TensorProto.FLOAT if inside else elem
    ports = [helper.make_tensor_value_info(n, port, s) for n, s in (("x", [2, 6]), ("y", [2, 4]))]
    graph = helper.make_graph(nodes, "halves", ports[:1], ports[1:], [tensor("w", elem, stored)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("stored", ["raw", "int32"])
@pytest.mark.parametrize("elem", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_computed_in_float32(elem: int, stored: str, inside: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = product(elem, stored, inside=inside)
    before = model.SerializeToString()
    with caplog.at_level(logging.WARNING):
        graph = open_model(model).graph()
    assert [v.dtype.value for v in (*graph.inputs, *graph.outputs)] == ["f32", "f32"]
    np.testing.assert_allclose(evaluate_graph(graph, [X])[0], X @ exact(elem), rtol=1e-6, atol=1e-6)
    assert ("inputs and outputs are float32: x, y" in caplog.text) is not inside
    assert model.SerializeToString() == before


def test_compiled_beside_onnxruntime() -> None:
    module = skive.compile(product(TensorProto.FLOAT16))
    np.testing.assert_allclose(module(X), X @ exact(TensorProto.FLOAT16), rtol=1e-5, atol=1e-5)
    assert module.report["verification"]["passed"]


def test_everywhere_in_a_model() -> None:
    """Branches, functions, tensor attributes, attributes that name a type, optional types."""
    half = TensorProto.FLOAT16
    value = helper.make_tensor("v", half, [4], [1, 2, 3, 4])
    branches = {f"{name}_branch": helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value), helper.make_node(op, ["x", "c"], ["o"])], name, [],
        [helper.make_tensor_value_info("o", half, [2, 4])]) for name, op in (("then", "Add"), ("else", "Mul"))}
    function = helper.make_function("own", "F", ["a"], ["b"], [
        helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", half, [], [2])),
        helper.make_node("Mul", ["a", "two"], ["b"])], [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("If", ["yes"], ["i"], **branches), helper.make_node("F", ["i"], ["f"], domain="own"),
             helper.make_node("Cast", ["n"], ["nh"], to=half), helper.make_node("Add", ["f", "nh"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", half, [2, 4]),
                     helper.make_tensor_value_info("n", TensorProto.INT64, [4])],
        [helper.make_tensor_value_info("y", half, [2, 4])], [numpy_helper.from_array(np.array(True), "yes")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
                              functions=[function], ir_version=8)
    x, n = X[:, :4], np.arange(4)
    y = evaluate_graph(open_model(model).graph(), [x, n])[0]
    np.testing.assert_allclose(y, (x + [1, 2, 3, 4]) * 2 + n, rtol=1e-6)


def test_external_data_is_part_of_the_hash(tmp_path: Path) -> None:
    model = product(TensorProto.BFLOAT16)
    bits = bytearray(model.graph.initializer[0].raw_data)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "w.bin")
    model.graph.initializer[0].ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "w.bin").write_bytes(bits)
    source = open_model(tmp_path / "m.onnx")
    np.testing.assert_allclose(evaluate_graph(source.graph(), [X])[0], X @ exact(TensorProto.BFLOAT16), rtol=1e-6,
                               atol=1e-6)
    bits[0] ^= 1
    (tmp_path / "w.bin").write_bytes(bits)
    assert open_model(tmp_path / "m.onnx").sha256 != source.sha256


def test_damaged_and_bits_are_refused() -> None:
    model = product(TensorProto.BFLOAT16)
    model.graph.initializer[0].raw_data = b"\0\0\0"
    with pytest.raises(InvalidModelError, match=r"w: shape \[6, 4\] of bfloat16 needs 24 elements"):
        open_model(model)
    bits = helper.make_graph([helper.make_node("BitCast", ["x"], ["y"], to=TensorProto.UINT16, name="bits")], "g",
                             [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2])],
                             [helper.make_tensor_value_info("y", TensorProto.UINT16, [2])])
    with pytest.raises(UnsupportedOpError, match="bits: BitCast of f32 to u16"):
        open_model(helper.make_model(bits, opset_imports=[helper.make_opsetid("", 26)], ir_version=13)).graph()
