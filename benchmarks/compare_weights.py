"""Fully connected layers on weights of 8 and 4 bits beside float32 and the weight-only forms of other engines.

    taskset -c 1 python benchmarks/compare_weights.py [768x3072 2048x8192 4096x4096 MODEL.onnx ...] [--rows 1]
        [--depth 1] [--block 64] [--engines skive-weights8,onnxruntime-4] [--seconds 1.5] [--json FILE]

KxN is a network of --depth layers, K to N and back, with Relu between; with depth 1 weights that fit the
third-level cache stay in it between calls, as they do not in a large network. Every engine has the same float32
weights, takes and gives float32, and runs in turns with the others (`skive.bench`):

    skive-weights8, -weights4    activations rounded to 16 bits a row; 4 bits in blocks
    skive-weights8-f32, -weights4-f32    float32 arithmetic
    skive-weights8-i8, -weights4-i8      activations of 8 bits
    onnxruntime-8, -4            MatMulNBits on the integers of skive's blocks, float32 activations
    onnxruntime-8-i8, -4-i8      the same with accuracy_level 4: activations of 8 bits (layers only)
    openvino-8, -4               NNCF compress_weights, INT8_SYM and INT4_SYM in blocks

`MB` is what an engine reads of weights (the file's size for peers), `x` the time of skive-float32 by that of the
engine, `dB` the signal-to-noise ratio of the output against onnxruntime's float32.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers
from onnx import TensorProto, helper, numpy_helper

import skive
from skive import bench
from skive.bench import Job, Worker
from skive.errors import SkiveError
from skive.passes.compress_weights import compressed, group_of

ENGINES = (
    "skive-float32", "skive-weights8", "skive-weights4", "skive-weights8-f32", "skive-weights4-f32",
    "skive-weights8-i8", "skive-weights4-i8",
    "onnxruntime-float32", "onnxruntime-8", "onnxruntime-8-i8", "onnxruntime-4", "onnxruntime-4-i8",
    "openvino-float32", "openvino-8", "openvino-4",
)  # fmt: skip
LAYERS_ONLY = {"onnxruntime-8", "onnxruntime-8-i8", "onnxruntime-4", "onnxruntime-4-i8"}


def weights_of(k: int, n: int, depth: int) -> list[np.ndarray]:
    """`depth` float32 matrices [K, N], [N, K], ... of a normal distribution."""
    rng = np.random.default_rng(0)
    sizes = [(k, n) if i % 2 == 0 else (n, k) for i in range(depth)]
    return [(rng.standard_normal(s, np.float32) / np.float32(math.sqrt(s[0]))) for s in sizes]


def layers(weights: list[np.ndarray], rows: int, bits: int, block: int, level: int) -> onnx.ModelProto:
    """The layers as MatMul, or with `bits` as MatMulNBits."""
    nodes, values = [], []
    for i, w in enumerate(weights):
        name, last = f"w{i}", i == len(weights) - 1
        source, sums = "x" if i == 0 else f"h{i}", "y" if last else f"s{i}"
        if bits:
            c = compressed(np.ascontiguousarray(w.T), bits, block)
            q = c.q if bits == 8 else c.q[:, 0::2] | c.q[:, 1::2] << 4
            blocks = (c.q.shape[0], c.scale.shape[1], block * bits // 8)
            values += [numpy_helper.from_array(q.reshape(blocks), name), numpy_helper.from_array(c.scale, name + "s")]
            attrs = {"K": w.shape[0], "N": w.shape[1], "bits": bits, "block_size": block, "accuracy_level": level}
            inputs = [source, name, name + "s"]
            nodes.append(helper.make_node("MatMulNBits", inputs, [sums], domain="com.microsoft", **attrs))
        else:
            values.append(numpy_helper.from_array(w, name))
            nodes.append(helper.make_node("MatMul", [source, name], [sums]))
        if not last:  # without it the matrices would be multiplied with each other
            nodes.append(helper.make_node("Relu", [sums], [f"h{i + 1}"]))
    ports = [helper.make_tensor_value_info(t, TensorProto.FLOAT, (rows, d))
             for t, d in (("x", weights[0].shape[0]), ("y", weights[-1].shape[1]))]  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "layers", ports[:1], ports[1:], values), opset_imports=opsets,
                             ir_version=10)  # fmt: skip


def built(
    engine: str, model: Path, weights: list[np.ndarray] | None, a: argparse.Namespace, to: Path
) -> tuple[Path, float]:
    """(what `engine` runs, MB of it)."""
    kind, _, what = engine.partition("-")
    if kind == "skive":
        dtype, _, rows = what.partition("-")
        wanted = None
        if dtype != "float32":
            activations = {"": 16, "f32": 32, "i8": 8}[rows]
            block = a.block if dtype == "weights4" else None
            wanted = skive.Quantize(dtype, block=block, activations=activations)
        module = skive.compile(str(model), output=to / engine, quantize=wanted, threads=a.threads)
        return to / engine, module.report["compiled"]["weight_bytes"] / 1e6
    if what == "float32":
        return model, model.stat().st_size / 1e6
    bits = int(what[0])
    if kind == "onnxruntime":
        if weights is None:
            raise SkiveError("writes layers only")
        file = to / f"{engine}.onnx"
        level = 4 if what.endswith("i8") else 1
        block = max(group_of(max(w.shape), 4, a.block) for w in weights)
        onnx.save(layers(weights, a.rows, bits, block, level), file)
    else:
        if (lacking := peers.missing("nncf")) is not None:
            raise SkiveError(f"{lacking} is not installed")
        import openvino as ov

        nncf = peers._silent_nncf()
        network = ov.Core().read_model(model)
        if bits == 8:
            network = nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM)
        else:
            network = nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=a.block,
                                            ratio=1.0, all_layers=True)  # fmt: skip
        file = to / f"{engine}.xml"
        ov.save_model(network, file, compress_to_fp16=False)
    size = sum(f.stat().st_size for f in (file, file.with_suffix(".bin")) if f.exists())
    return file, size / 1e6


def measure(name: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per engine; {"error": ...} for one that cannot run the network."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as text:
        folder, live = Path(text), []
        shape = re.fullmatch(r"(\d+)x(\d+)", name)
        weights, model = None, Path(name)
        if shape:
            weights, model = weights_of(int(shape[1]), int(shape[2]), a.depth), folder / "layers.onnx"
            onnx.save(layers(weights, a.rows, 0, 0, 0), model)
        inputs = inputs_of(model)
        np.savez(folder / "inputs.npz", *inputs)
        data = str(folder / "inputs.npz")
        exact = Worker.start(Job("onnxruntime", str(model), data, str(folder / "exact.npz"), a.threads))
        exact.stop()
        try:
            for engine in a.engines.split(","):
                if engine in LAYERS_ONLY and weights is None:
                    continue
                row: dict[str, Any] = {"model": name, "engine": engine, "rows": a.rows, "depth": a.depth}
                rows.append(row)
                try:
                    source, row["mb"] = built(engine, model, weights, a, folder)
                    outputs = str(folder / f"{engine}.npz")
                    job = Job(engine.partition("-")[0], str(source), data, outputs, a.threads)
                    worker = Worker.start(job)
                except Exception as e:  # noqa: BLE001 - whatever an engine raises stands in the table
                    row["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
                    continue
                live.append((row, worker))
                got, want = (np.concatenate([np.ravel(v).astype(float) for v in w.outputs()]) for w in (worker, exact))
                noise = float(((got - want) ** 2).sum())
                row["db"] = 10 * math.log10(float((want**2).sum()) / noise) if noise else math.inf
            kept, disturbed = bench.undisturbed(bench.take_turns([w for _, w in live], a.seconds), a.threads)
        finally:
            for _, worker in live:
                worker.stop()
    first = next((i for i, (r, _) in enumerate(live) if r["engine"] == "skive-float32"), 0)
    for i, ((row, _), turns) in enumerate(zip(live, zip(*kept, strict=True), strict=True)):
        row |= bench.timing(turns) | {"disturbed": disturbed}
        row["gain"] = float(np.median([r[first].median / r[i].median for r in kept]))
    return rows


def inputs_of(model: Path) -> list[np.ndarray]:
    """Normal floats; of NAME.npy beside the model, that."""
    given = model.with_suffix(".npy")
    if given.exists():
        return [np.load(given)]
    from skive import check, frontend

    return check.sample_inputs(frontend.open_model(str(model)).graph())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["768x3072", "2048x8192", "4096x4096"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--block", type=int, default=64, help="4-bit weights that share a scale")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per engine and model")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    versions = {p: peers.version(p) for p in ("onnxruntime", "openvino", "nncf")}
    document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(),
                                "versions": {"skive": skive.__version__} | versions, "results": []}  # fmt: skip
    print(f"{document['machine']['cpu']}, {document['machine']['isa']}, {a.threads} thread(s); "
          + ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)  # fmt: skip
    for name in a.models:
        rows = measure(name, a)
        document["results"] += rows
        print(f"\n{name}, {a.rows} row(s), {a.depth} layer(s)")
        print("| engine | median us | least us | spread | x | MB | dB |\n|---|---|---|---|---|---|---|")
        for r in rows:
            if "error" in r:
                print(f"| {r['engine']} | {r['error']} |")
            else:
                mark = "~" if r["disturbed"] else ""
                times = f"{1e3 * r['median_ms']:.1f} | {1e3 * r['min_ms']:.1f} | {100 * r['spread']:.0f} %{mark}"
                print(f"| {r['engine']} | {times} | {r['gain']:.2f} | {r['mb']:.1f} | {r['db']:.1f} |", flush=True)
        if a.json:
            Path(a.json).write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
