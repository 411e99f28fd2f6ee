"""Recurrent networks in float32 and INT8 beside ONNX Runtime in float32 and with its dynamic INT8, one thread.

    taskset -c 1 python benchmarks/recurrent.py [--cells LSTM,GRU] [--hidden 64,256] [--layers 3] [--steps 100]
        [--features 80] [--rounds 15] [--json FILE]

Layers in both directions over a sequence, batch 1, random weights. All engines have turns in one process; a time is
the median over rounds (`min` the fastest call), `ratio` the median of an engine's time over skive's in INT8, `sqnr` the
dB of the output beside ONNX Runtime's float32. ONNX Runtime's dynamic quantization rounds weights ahead and activations
as they come; skive calibrates the products of the inputs on eight other random sequences.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import results
from onnx import TensorProto, helper, numpy_helper, save
from onnxruntime.quantization import QuantType, quantize_dynamic

import skive


def network(path: Path, cell: str, hidden: int, layers: int, steps: int, features: int) -> None:
    """[steps, 1, features] through bidirectional layers and a product, weights uniform as PyTorch makes them."""
    rng = np.random.default_rng(0)
    gates, width, x = (4 if cell == "LSTM" else 3) * hidden, features, "x"
    nodes, constants = [], []

    def constant(name: str, *shape: int) -> str:
        value = rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(hidden**0.5)
        constants.append(numpy_helper.from_array(value, name))
        return name

    constants.append(numpy_helper.from_array(np.array([steps, 1, 2 * hidden]), "flat"))
    for i in range(layers):
        shapes = {"w": (2, gates, width), "r": (2, gates, hidden), "b": (2, 2 * gates)}
        weights = [constant(f"{k}{i}", *shape) for k, shape in shapes.items()]
        attrs = {"linear_before_reset": 1} if cell == "GRU" else {}
        nodes += [
            helper.make_node(cell, [x, *weights], [f"y{i}"], direction="bidirectional", hidden_size=hidden, **attrs),
            helper.make_node("Transpose", [f"y{i}"], [f"t{i}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t{i}", "flat"], [f"x{i}"]),
        ]
        x, width = f"x{i}", 2 * hidden
    nodes.append(helper.make_node("MatMul", [x, constant("o", width, 48)], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [steps, 1, c])
             for n, c in (("x", features), ("y", 48))]  # fmt: skip
    graph = helper.make_graph(nodes, cell.lower(), ports[:1], ports[1:], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def engines(path: Path, shape: tuple[int, ...]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    dynamic = path.with_suffix(".dynamic.onnx")
    quantize_dynamic(path, dynamic, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(p), options, providers=["CPUExecutionProvider"])
                for p in (path, dynamic)]  # fmt: skip
    calibration = np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32)
    int8 = skive.Quantize("int8", calibration=[{"x": x} for x in calibration])
    return {
        "onnxruntime": lambda x: sessions[0].run(None, {"x": x})[0],
        "onnxruntime-dynamic": lambda x: sessions[1].run(None, {"x": x})[0],
        "skive": skive.compile(path),
        "skive-int8": skive.compile(path, quantize=int8),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cells", default="LSTM,GRU")
    p.add_argument("--hidden", default="64,256")
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--features", type=int, default=80)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--json")
    a = p.parse_args()
    rows: list[dict[str, Any]] = []
    for cell in a.cells.split(","):
        for hidden in map(int, a.hidden.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "network.onnx"
                network(path, cell, hidden, a.layers, a.steps, a.features)
                called = engines(path, (a.steps, 1, a.features))
                x = np.random.default_rng(2).standard_normal((a.steps, 1, a.features)).astype(np.float32)
                outputs = {name: np.asarray(call(x)) for name, call in called.items()}
                times: dict[str, list[float]] = {name: [] for name in called}
                for _ in range(a.rounds):
                    for name, call in called.items():
                        call(x)
                        begin = time.perf_counter()
                        for _ in range(5):
                            call(x)
                        times[name].append((time.perf_counter() - begin) / 5 * 1e3)
            want = outputs["onnxruntime"]
            for name, ms in times.items():
                noise = float(np.mean((outputs[name] - want) ** 2))
                rows.append({
                    "network": f"{cell} {hidden}", "engine": name, "threads": 1,
                    "version": (skive if "skive" in name else onnxruntime).__version__,
                    "ms": round(float(np.median(ms)), 3),
                    "min": round(min(ms), 3), "spread": round(float(np.ptp(ms) / np.median(ms)), 2),
                    "ratio": round(float(np.median(np.divide(ms, times["skive-int8"]))), 2),
                    "sqnr": round(10 * np.log10(float(np.mean(want**2)) / noise), 1) if noise else None,
                })  # fmt: skip
                r = rows[-1]
                print(f"{r['network']:10s} {name:20s} {r['ms']:9.3f} ms  min {r['min']:9.3f}  spread {r['spread']:4.2f}"
                      f"  ratio {r['ratio']:5.2f}  sqnr {r['sqnr']}", flush=True)  # fmt: skip
    if a.json:
        results.write(a.json, rows)


if __name__ == "__main__":
    main()
