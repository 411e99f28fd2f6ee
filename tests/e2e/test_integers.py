"""The keyword network in fixed point: accuracy on real recordings, and the same bytes from every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native
from skive.agreement import wilson
from skive.targets.base import TARGETS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keyword_spotting"
CALIBRATION = 100  # recordings that are not evaluated
# Right decisions of the remaining 500: measured, and the same on every processor.
FLOAT32_RIGHT = 449


def recordings() -> tuple[np.ndarray, np.ndarray]:
    """Features [600, 1, 49, 10] and classes [600]."""
    with np.load(EXAMPLE / "kws_mfcc_a.npz") as data:
        return (data["x"].astype(np.float32)[:, None] - 83) * np.float32(0.5847029089927673), data["y"]


def runnable(target: str) -> bool:
    return set(TARGETS[target].features) <= set(_native.cpu_features())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network without its softmax, which is float32: up to there all is integers."""
    import onnx

    network = onnx.load(EXAMPLE / "kws_dscnn.onnx")
    last = network.graph.node[-1]
    assert last.op_type == "Softmax"
    network.graph.node.remove(last)
    network.graph.output[0].name = last.input[0]
    path = tmp_path_factory.mktemp("model") / "kws_scores.onnx"
    onnx.save(network, path)
    return path


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
