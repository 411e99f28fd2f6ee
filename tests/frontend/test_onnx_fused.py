"""What onnxruntime's optimiser writes into float models, beside onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from skive import reference
from skive.errors import UnsupportedOpError
from skive.frontend.onnx import import_onnx

ort = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(11)
IMAGE, TOKENS, ROWS = (1, 3, 6, 6), (2, 4, 8), (4, 3)


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONV = {"w": w(4, 3, 3, 3), "b": w(4)}
NORM = {"s": w(2, 4, 8), "g": w(8), "e": w(8), "b": w(8)}
# operator -> shape of x, names of the inputs, attributes, constants, results.
CASES: dict[str, tuple[tuple[int, ...], list[str], dict[str, Any], dict[str, np.ndarray], list[str]]] = {
    "FusedConv": (IMAGE, ["x", "w", "b"], {"activation": "Relu", "pads": [1, 1, 1, 1]}, CONV, ["y"]),
    "FusedConv/sum": (IMAGE, ["x", "w", "b", "z"], {"activation": "LeakyRelu", "activation_params": [0.2]},
                      {**CONV, "z": w(1, 4, 4, 4)}, ["y"]),
    "FusedConv/clip": (IMAGE, ["x", "w"], {"activation": "Clip", "activation_params": [-0.5, 1.5]}, CONV, ["y"]),
    "FusedGemm": (ROWS, ["x", "m", "c"], {"activation": "Tanh", "transA": 1, "alpha": 0.5},
                  {"m": w(4, 5), "c": w(5)}, ["y"]),
    "FusedGemm/leaky": (ROWS, ["x", "m"], {"activation": "LeakyRelu", "activation_alpha": 0.3}, {"m": w(3, 5)}, ["y"]),
    "FusedMatMul": (TOKENS, ["x", "m"], {"transB": 1, "alpha": 0.25}, {"m": w(6, 8)}, ["y"]),
    "FusedMatMul/both": (TOKENS, ["x", "x"], {"transA": 1, "alpha": 2.0}, {}, ["y"]),
    "Gelu": (TOKENS, ["x"], {}, {}, ["y"]),
    "BiasGelu": (TOKENS, ["x", "b"], {}, NORM, ["y"]),
    "FastGelu": (TOKENS, ["x", "b"], {}, NORM, ["y"]),
    "FastGelu/plain": (TOKENS, ["x"], {}, {}, ["y"]),
    "QuickGelu": (TOKENS, ["x"], {"alpha": 1.5}, {}, ["y"]),
    "SkipLayerNormalization": (TOKENS, ["x", "s", "g", "e", "b"], {"epsilon": 1e-2}, NORM, ["y", "", "", "t"]),
    "SkipLayerNormalization/plain": (TOKENS, ["x", "x", "g"], {}, NORM, ["y"]),
    "SkipSimplifiedLayerNormalization": (TOKENS, ["x", "s", "g", "b"], {"epsilon": 1e-2}, NORM, ["y"]),
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_onnxruntime(name: str) -> None:
    shape, inputs, attrs, constants, results = CASES[name]
    node = helper.make_node(name.partition("/")[0], inputs, results, domain="com.microsoft", **attrs)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                              [helper.make_empty_tensor_value_info(r) for r in results if r],
                              [numpy_helper.from_array(v, k) for k, v in constants.items() if k in inputs])
    model = helper.make_model(graph, ir_version=8, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    x = w(*shape)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    want = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    for a, b in zip(reference.evaluate_graph(import_onnx(model), [x]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_others_say_where_they_come_from() -> None:
    node = helper.make_node("EmbedLayerNormalization", ["x"], ["y"], domain="com.microsoft", name="embed")
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]), ir_version=8, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    with pytest.raises(UnsupportedOpError, match="embed: .* is not supported; give the model as it was before onnxr"):
        import_onnx(model)
