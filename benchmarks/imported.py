"""Quantized models of onnxruntime and NNCF, imported by skive beside the runtime they were written for.

    python benchmarks/imported.py DATA [--models kws_dscnn,...] [--limit 1000] [--json FILE]

Five networks, quantized by onnxruntime (QDQ and QOperator, U8S8 and int8 weights per channel) and by NNCF
(ONNX with QDQ). Each file is compiled as it is and run on every sample beside the runtime it was written
for: onnxruntime, for NNCF also OpenVINO. A row says on how many samples the first class is the same, how
many output values differ and by how much at most.

Where they differ, the last column decides who does what the format defines: the largest distance, over a
few samples that differ, from the graph of the file evaluated by numpy (`skive.reference`), of skive, of the
runtime, and of onnxruntime without its fusions, which computes every node by itself. `same unfused` counts
the samples with another first class on which onnxruntime without fusions sides with skive.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from real_models import REAL_MODELS, Fold, RealModel

import skive
from skive import bench

NETWORKS = ("kws_dscnn", "ic_resnet8", "resnet20_cifar10", "mnist_cnn", "squeezenet1_1")
Writer = Callable[[Path, np.ndarray, Path], None]
# Who wrote the file -> (the package, how, the runtimes it is meant for)
WRITERS: dict[str, tuple[str, Writer, tuple[str, ...]]] = {
    "onnxruntime QDQ": ("onnxruntime", peers.quantize_onnxruntime, ("onnxruntime",)),
    "onnxruntime QOperator": (
        "onnxruntime", lambda m, x, d: peers.quantize_onnxruntime(m, x, d, operators=True), ("onnxruntime",)),
    "NNCF QDQ": ("nncf", peers.quantize_nncf, ("onnxruntime", "openvino")),
}
_REFERENCE_SAMPLES = 3


def exact(file: Path, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the format defines for `inputs`: the graph as it was imported, each operation by numpy."""
    from skive import frontend, reference

    graph = frontend.open_model(str(file), input_shapes=_batch(file, inputs[0])).graph()
    return [reference.evaluate_graph(graph, [x])[0] for x in inputs]


def _batch(file: Path, x: np.ndarray) -> dict[str, tuple[int, ...]]:
    import onnx

    graph = onnx.load(file).graph
    constants = {t.name for t in graph.initializer}
    return {i.name: x.shape for i in graph.input if i.name not in constants}


def unoptimised(file: Path) -> peers.Run:
    """onnxruntime without its fusions: every node by itself, as the file has it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def runtime(name: str, file: Path, shape: tuple[int, ...]) -> peers.Run:
    return peers.run_onnxruntime(file) if name == "onnxruntime" else peers.run_openvino(file, shape)


def compare(model: RealModel, fold: Fold, writer: str, data: Path, limit: int | None) -> list[dict[str, Any]]:
    """One row per runtime: counts over the samples of the fold, and who is nearer to what the format defines."""
    package, write, runtimes = WRITERS[writer]
    rows: list[dict[str, Any]] = [{"model": model.name, "written_by": writer, "runtime": r} for r in runtimes]
    lacking = peers.missing(package)
    if lacking:
        return [r | {"error": f"{lacking} is not installed"} for r in rows]
    inputs = [fold.inputs[i:i + 1] for i in range(len(fold.inputs[:limit]))]
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
        file = Path(folder) / "quantized.onnx"
        try:
            write(model.path(data), fold.calibration, file)
        except Exception as e:  # noqa: BLE001 - whatever the writer raises stands in the table
            return [r | {"error": f"{package}: {type(e).__name__}: {' '.join(str(e).split())[:300]}"} for r in rows]
        ours = skive.compile(file, example_inputs=(fold.inputs[:1],), output=Path(folder) / "artefact", verify=False)
        got = [np.array(ours(x)) for x in inputs]
        plain = unoptimised(file)
        for row in rows:
            try:
                theirs = runtime(row["runtime"], file, inputs[0].shape)
                row |= difference(got, [theirs(x) for x in inputs], inputs, plain, file)
            except Exception as e:  # noqa: BLE001 - whatever a runtime raises stands in the table
                row["error"] = f"{row['runtime']}: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return rows


def difference(got: Sequence[np.ndarray], want: Sequence[np.ndarray], inputs: Sequence[np.ndarray],
               plain: peers.Run, file: Path) -> dict[str, Any]:
    """The figures of a row: `got` of skive, `want` of the runtime."""
    spread = max(float(np.ptp(w)) for w in want)
    largest = max(float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True))
    other = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if np.argmax(g) != np.argmax(w)]
    row: dict[str, Any] = {
        "samples": len(got), "same_top1": len(got) - len(other),
        "same_unfused": sum(int(np.argmax(got[i]) == np.argmax(plain(inputs[i]))) for i in other),
        "values": sum(g.size for g in got),
        "different": sum(int(np.count_nonzero(g != w)) for g, w in zip(got, want, strict=True)),
        "largest": largest, "largest_of_range": largest / spread}
    # Those with another class first, then any that differ.
    differing = other + [i for i in range(len(got)) if not np.array_equal(got[i], want[i]) and i not in other]
    chosen = differing[:_REFERENCE_SAMPLES]
    if chosen:
        defined = exact(file, [inputs[i] for i in chosen])

        def distance(outputs: Iterable[np.ndarray]) -> float:
            return max(float(np.abs(o - d).max()) for o, d in zip(outputs, defined, strict=True))

        row["from_definition"] = {
            "skive": distance(got[i] for i in chosen), "runtime": distance(want[i] for i in chosen),
            "unfused": distance(plain(inputs[i]) for i in chosen)}
    return row


def line(row: dict[str, Any]) -> str:
    start = f"| {row['model']} | {row['written_by']} | {row['runtime']} | "
    if "error" in row:
        return start + f"{row['error']} | | | | |"
    other = row["samples"] - row["same_top1"]
    definition = row.get("from_definition", {})
    return start + (f"{row['same_top1']} of {row['samples']} | "
                    + (f"{row['same_unfused']} of {other}" if other else "") + " | "
                    f"{row['different']} of {row['values']} | "
                    f"{row['largest']:.2g} ({100 * row['largest_of_range']:.2g} % of the range) | "
                    + ", ".join(f"{k} {v:.1g}" for k, v in definition.items()) + " |")


def rows_of(data: Path, names: Sequence[str], limit: int | None) -> Iterator[dict[str, Any]]:
    for model in REAL_MODELS:
        if model.name in names:
            fold = next(model.folds(data))
            for writer in WRITERS:
                yield from compare(model, fold, writer, data, limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--limit", type=int, help="samples of each network")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    versions = {p: peers.version(p) for p in ("onnxruntime", "openvino", "nncf")}
    print(", ".join(f"{k} {v}" for k, v in ({"skive": skive.__version__} | versions).items()))
    print("| network | written by | runtime | same first class | same unfused | values that differ | by at most "
          "| from the definition |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows_of(a.data, a.models.split(","), a.limit):
        rows.append(row)
        print(line(row), flush=True)
    if a.json:
        document = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(),
                    "versions": {"skive": skive.__version__} | versions, "rows": rows}
        Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(r.get("same_top1") != r.get("samples") or "error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
