"""Skive against ONNX Runtime and OpenVINO over a folder of ONNX models.

    python benchmarks/compare.py FOLDER|MODEL.onnx ... [--engines onnxruntime,openvino] [--threads 1]
                                 [--seconds 3] [--input NAME=1x3x32x32 ...] [--json FILE]

Every model is compiled (float32, this machine) and measured in turns with the engines by
`skive.bench`. The ratio of a model is the time of its fastest peer by that of skive, the median
over rounds in which both ran side by side: above 1, skive is faster. Symbolic batch dimensions
are 1. Pin the process to one core (`taskset -c 1`) for single-threaded figures on a shared
machine; rows in which too few rounds were undisturbed are marked `~`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from skive.bench import bench
from skive.errors import SkiveError


def models_in(paths: Sequence[str]) -> list[Path]:
    """The ONNX files that `paths` name or hold, each once, in alphabetical order per folder."""
    found: list[Path] = []
    for p in map(Path, paths):
        found += sorted(p.glob("*.onnx")) if p.is_dir() else [p]
    return list(dict.fromkeys(found))


def open_batches(path: Path) -> dict[str, tuple[int, ...]]:
    """Symbolic first dimension -> (1,), for the inputs of a model."""
    graph = onnx.load(path, load_external_data=False).graph
    dims = [i.type.tensor_type.shape.dim for i in graph.input]
    return {d[0].dim_param: (1,) for d in dims if d and d[0].dim_param}


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=1x3x32x32, or DIMENSION=32 for a symbolic dimension."""
    name, equals, dims = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=1x3x32x32")
    return name, tuple(map(int, dims.split("x")))


def measure(path: Path, engines: Sequence[str], threads: int, seconds: float,
            shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The result of `bench` on one model, with `best_ratio`; {"error": ...} if that is not possible."""
    try:
        result = bench([str(path)], engines=engines, threads=threads, seconds=seconds,
                       input_shapes=open_batches(path) | shapes)
    except SkiveError as e:
        return {"model": path.stem, "error": " ".join(str(e).split())}
    ratios = list(result["ratio"].values())
    known = [r for r in ratios if r is not None]
    return {"model": path.stem, "best_ratio": min(known) if known and len(known) == len(ratios) else None, **result}


def line(row: dict[str, Any], engines: Sequence[str]) -> str:
    """One model as a line of the table."""
    if "error" in row:
        return f"{row['model']:<24} failed: {row['error'][:200]}"
    by_engine = {r["engine"]: r for r in row["results"]}
    cells = []
    for e in ("skive", *engines):
        r = by_engine[e]
        mark = "!" if r["agrees"] is False else "~" if r["disturbed"] else " "
        cells.append(f"{r['median_ms']:>11.4f} ±{100 * r['spread']:>4.1f}%{mark}")
    ratio = f"{row['best_ratio']:.2f}" if row["best_ratio"] is not None else "wrong"
    return f"{row['model']:<24}" + "".join(cells) + f"{ratio:>9}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--engines", default="onnxruntime,openvino")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per engine and model")
    parser.add_argument("--input", type=shape, action="append", default=[])
    parser.add_argument("--json", metavar="FILE", help="written after every model")
    a = parser.parse_args()
    engines = a.engines.split(",")
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "threads": a.threads,
                                "seconds": a.seconds, "models": rows}
    for path in models_in(a.models):
        rows.append(measure(path, engines, a.threads, a.seconds, dict(a.input)))
        if "machine" not in document and "machine" in rows[-1]:
            document["machine"] = rows[-1]["machine"]
            versions = ", ".join(f"{r['engine']} {r['version']}" for r in rows[-1]["results"])
            print(f"{document['machine']['cpu']}, {document['machine']['isa']}, {a.threads} thread(s); {versions}")
            print(f"{'model':<24}" + "".join(f"{e + ' ms':>18} " for e in ("skive", *engines)) + f"{'ratio':>9}")
        print(line(rows[-1], engines), flush=True)
        ratios = [r["best_ratio"] for r in rows if r.get("best_ratio") is not None]
        document["geometric_mean"] = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        document["failed"] = [r["model"] for r in rows if r.get("best_ratio") is None]
        if a.json:
            Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    if document.get("geometric_mean") is not None:
        print(f"geometric mean of best peer / skive over {len(rows) - len(document['failed'])} models: "
              f"{document['geometric_mean']:.3f}")
    return 1 if document.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
