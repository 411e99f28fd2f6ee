"""A transformer block in INT8: attention on integers, the same bytes from every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native
from skive.targets.base import TARGETS

N, HEADS, WIDTH = 21, 2, 16


def runnable(target: str) -> bool:
    return set(TARGETS[target].features) <= set(_native.cpu_features())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-attention with its four projections and a residual sum; `mask` is added to the scores."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(5)
    c = HEADS * WIDTH
    constants = {f"w{i}": (rng.standard_normal((c, c)) * 2 / c**0.5).astype(np.float32) for i in range(4)}
    constants |= {"heads": np.array([1, N, HEADS, WIDTH]), "flat": np.array([1, N, c]), "root": np.float32(WIDTH**-0.5)}
    nodes = []

    def add(op: str, name: str, *inputs: str, **attrs: object) -> str:
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))
        return name

    for i, n in enumerate("qkv"):
        add("MatMul", f"{n}m", "x", f"w{i}")
        add("Reshape", f"{n}r", f"{n}m", "heads")
        add("Transpose", n, f"{n}r", perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3])
    add("Mul", "scaled", add("MatMul", "scores", "q", "k"), "root")
    add("Softmax", "p", add("Add", "masked", "scaled", "mask"), axis=-1)
    add("Transpose", "t", add("MatMul", "pv", "p", "v"), perm=[0, 2, 1, 3])
    add("MatMul", "o", add("Reshape", "joined", "t", "flat"), "w3")
    add("Add", "y", "x", "o")
    constants["mask"] = np.where(np.arange(N) < N - 3, 0, np.finfo(np.float32).min).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, N, c])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, N, c])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    path = tmp_path_factory.mktemp("model") / "block.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_bytes_are_the_same_everywhere(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((12, N, HEADS * WIDTH)).astype(np.float32)
    exact = skive.compile(model)
    outputs: dict[str, np.ndarray] = {}
    for target in filter(runnable, TARGETS):
        module = skive.compile(
            model,
            output=tmp_path / target,
            target=target,
            threads=1 + len(outputs) % 2,
            quantize=skive.Quantize("int8", calibration=x[:8]),
        )
        assert module.report["verification"]["max_abs_error"] == 0
        assert [la["kernel"] for la in module.report["layers"]].count("quantized_attention") == 1
        outputs[target] = np.concatenate([module(s[None]) for s in x])
    for target, got in outputs.items():
        np.testing.assert_array_equal(got, outputs["generic"], err_msg=target)
    want = np.concatenate([exact(s[None]) for s in x])
    kept = skive.compile(model, quantize=skive.Quantize("int8", calibration=x[:8], keep=("pv",)))

    def sqnr_db(got: np.ndarray) -> float:
        return float(10 * np.log10(np.square(want).sum() / np.square(got - want).sum()))

    # Rounding queries, keys, values and weights to 8 bits costs no more than the rest of the block does.
    assert sqnr_db(outputs["generic"]) > sqnr_db(np.concatenate([kept(s[None]) for s in x])) - 3


def test_kept_layers_and_16_bits_leave_attention_in_float32(model: Path) -> None:
    x = np.random.default_rng(7).standard_normal((4, N, HEADS * WIDTH)).astype(np.float32)
    for wanted in (skive.Quantize("int8", calibration=x, keep=("pv",)), skive.Quantize("int16", calibration=x)):
        kernels = [la["kernel"] for la in skive.compile(model, quantize=wanted).report["layers"]]
        assert kernels.count("attention") == 1 and "quantized_attention" not in kernels
