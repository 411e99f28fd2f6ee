"""Recurrent networks in INT8: close to float32, the same bytes from every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native
from skive.targets.base import TARGETS

T, WIDTH, HIDDEN = 19, 10, 22


def model(path: Path, op: str, **attrs: object) -> Path:
    """Both directions of one layer over [T, 1, WIDTH], states from outside, then a product."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(8)
    gates, states = (4, ["h", "c"]) if op == "LSTM" else (3, ["h"])
    shapes = {"w": (2, gates * HIDDEN, WIDTH), "r": (2, gates * HIDDEN, HIDDEN), "b": (2, 2 * gates * HIDDEN)}
    constants = {k: rng.uniform(-1, 1, s).astype(np.float32) / np.float32(HIDDEN**0.5) for k, s in shapes.items()}
    constants["o"] = rng.standard_normal((HIDDEN, 7)).astype(np.float32)
    nodes = [
        helper.make_node(op, ["x", "w", "r", "b", "", *states], ["s"], name="layer", hidden_size=HIDDEN,
                         direction="bidirectional", **attrs),
        helper.make_node("MatMul", ["s", "o"], ["y"], name="head"),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, 1, WIDTH])]
    inputs += [helper.make_tensor_value_info(s, TensorProto.FLOAT, [2, 1, HIDDEN]) for s in states]
    graph = helper.make_graph(
        nodes, op.lower(), inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, 2, 1, 7])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def samples(names: list[str], count: int) -> list[dict[str, np.ndarray]]:
    """Smooth sequences; states as a call before might have left them."""
    rng = np.random.default_rng(9)
    found = []
    for _ in range(count):
        x = np.cumsum(rng.standard_normal((T, 1, WIDTH)), 0).astype(np.float32) / 2
        found.append({n: x if n == "x" else rng.uniform(-1, 1, (2, 1, HIDDEN)).astype(np.float32) for n in names})
    return found


@pytest.mark.parametrize(("op", "attrs"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1})])
def test_close_to_float32_and_the_same_everywhere(op: str, attrs: dict, tmp_path: Path) -> None:
    path = model(tmp_path / "net.onnx", op, **attrs)
    exact = skive.compile(path)
    data = samples([i.name for i in exact.inputs], 12)
    quantize = skive.Quantize("int8", calibration=data[:8])
    want = np.stack([exact(**s) for s in data])
    outputs: dict[str, np.ndarray] = {}
    for target in (t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())):
        module = skive.compile(path, output=tmp_path / target, target=target, quantize=quantize,
                               threads=1 + len(outputs) % 2)  # fmt: skip
        assert module.report["verification"]["max_abs_error"] == 0
        kernels = [la["kernel"] for la in module.report["layers"]]
        assert kernels.count(f"quantized_{op.lower()}") == 2 and op.lower() not in kernels
        outputs[target] = np.stack([module(**s) for s in data])
    for target, got in outputs.items():
        np.testing.assert_array_equal(got, outputs["generic"], err_msg=target)
    noise = outputs["generic"] - want
    assert 10 * np.log10(np.mean(want**2) / np.mean(noise**2)) > 33
    layers = module.report["quantization"]["layers"]
    assert {la["dtype"] for la in layers if la["op"] in ("linear", f"{op.lower()}_steps")} == {"int8"}
    assert not module.report["quantization"]["islands"]


def test_sixteen_bits_for_the_inputs_alone(tmp_path: Path) -> None:
    path = model(tmp_path / "net.onnx", "LSTM")
    exact, data = skive.compile(path), samples(["x", "h", "c"], 4)
    module = skive.compile(path, quantize=skive.Quantize("int16", calibration=data))
    assert [la["kernel"] for la in module.report["layers"]].count("lstm_steps") == 2
    assert any("no layer has 16 bits" in island["reason"] for island in module.report["quantization"]["islands"])
    for s in data:
        want = exact(**s)
        assert np.mean((module(**s) - want) ** 2) < 1e-6 * np.mean(want**2)


@pytest.mark.parametrize(("attrs", "keep"), [({}, ()), ({"linear_before_reset": 1}, ("layer*",))])
def test_stays_float32(attrs: dict, keep: tuple[str, ...], tmp_path: Path) -> None:
    """A reset gate before the product has no integer kernel; `keep` names whole layers."""
    path = model(tmp_path / "net.onnx", "GRU", **attrs)
    data = samples(["x", "h"], 4)
    module = skive.compile(path, quantize=skive.Quantize("int8", calibration=data, keep=keep))
    kernels = [la["kernel"] for la in module.report["layers"]]
    assert kernels.count("gru") == 2 and not any("quantized" in k for k in kernels)
