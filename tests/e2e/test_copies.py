"""Copies from one part of the arena to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import skive


def slices(path: Path, parts: int, width: int) -> Path:
    """`parts` times: softmax of k x, every second row of it, softmax down its columns; then their sum."""
    rows, step = 10, 2
    values = {"from": [0], "to": [1], "axis": [1], "flat": [rows, width]}
    constants = [numpy_helper.from_array(np.array(v), k) for k, v in values.items()]
    nodes = []
    for i in range(parts):
        constants.append(numpy_helper.from_array(np.float32(i + 1), f"k{i}"))
        nodes += [
            helper.make_node("Mul", ["x", f"k{i}"], [f"scaled{i}"]),
            helper.make_node("Softmax", [f"scaled{i}"], [f"all{i}"], axis=-1),
            helper.make_node("Slice", [f"all{i}", "from", "to", "axis"], [f"some{i}"]),
            helper.make_node("Reshape", [f"some{i}", "flat"], [f"rows{i}"]),
            helper.make_node("Softmax", [f"rows{i}"], [f"part{i}"], axis=0),
        ]
    nodes.append(helper.make_node("Sum", [f"part{i}" for i in range(parts)], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
             for n, s in (("x", [rows, step, width]), ("y", [rows, width]))]  # fmt: skip
    graph = helper.make_graph(nodes, "slices", ports[:1], ports[1:], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("width", [3, 8, 16])
def test_every_second_row(parts: int, width: int, tmp_path: Path) -> None:
    """g++ 12 dropped the second of two such copies (see `keep_writes` in the emitted source)."""
    module = skive.compile(slices(tmp_path / "net.onnx", parts, width))
    kernels = [la["kernel"] for la in module.report["layers"]]
    assert kernels.count("copy_strided") == parts and module.report["verification"]["max_abs_error"] < 1e-6
