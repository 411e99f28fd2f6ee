"""INT8 and INT16 networks beside the INT8 of onnxruntime, OpenVINO and ExecuTorch, over a folder of ONNX models.

    python benchmarks/compare_int8.py FOLDER|MODEL.onnx ... --work FOLDER [--engines skive-int8,openvino-nncf]
        [--threads 1] [--seconds 1.5] [--modules PACKAGE.MODULE] [--build-only] [--json FILE] [--markdown FILE]

Every engine has the float32 model and the same calibration samples: NAME.npy beside NAME.onnx, a typical
input, rolled along its axes by seeded distances (without that file random numbers). All run in turns in
one round (`skive.bench`), outputs bound once, float32 in and out. A peer's configuration:

    onnxruntime-qdq, -qop    its static quantizer, U8S8, int8 weights per channel; QDQ or QOperator
    onnxruntime-dynamic      its dynamic quantizer, for transformers only
    openvino-nncf            NNCF's post-training quantization
    openvino-qdq             onnxruntime's QDQ file
    executorch               XNNPACK's quantizer and delegate; needs --modules, whose build(NAME) gives the
                             torch module that NAME.onnx was exported from

`err` is the relative L2 distance of the output from onnxruntime's float32. An INT8 row whose error is more
than 0.1 and 2.5 times the median of its network is marked `!` and wins nothing. `skive-block4x16` and
`-block4x32` have three quarters of their weights zero, without training: for times only. `ratio` is the time of the
fastest peer by that of skive-int8, the median over rounds; `limit` the share of what the machine can do:
the time that all multiply-adds take at the measured peak, or reading the packed weights, the input and the
output once from where they fit, whichever is longer, by the fastest call.
Files made for the engines stay in --work and are made again when the model is newer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import numpy as np
import peers
from compare import models_in, open_batches

import skive
from skive import bench, check, frontend
from skive.bench import Job, Worker
from skive.errors import SkiveError

SAMPLES = 8
_SCRIPT = str(Path(peers.__file__).resolve())


@dataclass(frozen=True)
class Network:
    """A model, its timed inputs and its calibration samples (batches one after another along dimension 0)."""

    path: Path
    inputs: tuple[np.ndarray, ...]
    samples: np.ndarray
    threads: int
    modules: str | None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def batch(self) -> int:
        return int(self.inputs[0].shape[0])


def network(path: Path, threads: int, modules: str | None, count: int = SAMPLES) -> Network:
    """The model at `path` with NAME.npy or random numbers as its inputs, and `count` batches like them to calibrate
    with; it has one input."""
    graph = frontend.open_model(str(path), input_shapes=open_batches(path)).graph()
    typical = path.with_suffix(".npy")
    if typical.exists():
        x = np.ascontiguousarray(np.load(typical))
        rng = np.random.default_rng(0)
        rolled = [np.roll(x, [int(rng.integers(0, d)) for d in x.shape[1:]], range(1, x.ndim)) for _ in range(count)]
        return Network(path, (x,), np.concatenate(rolled), threads, modules)
    inputs = tuple(check.sample_inputs(graph))
    rng = np.random.default_rng(0)
    shape = (count * inputs[0].shape[0], *inputs[0].shape[1:])
    return Network(path, inputs, rng.standard_normal(shape).astype(inputs[0].dtype), threads, modules)


# ---------------------------------------------------------------------------------------- engines


def _skive(dtype: str, sparsify: str | None = None) -> Callable[[Network, Path], None]:
    def build(n: Network, destination: Path) -> None:
        quantize = None if dtype == "float32" else skive.Quantize(dtype, calibration=n.samples)
        skive.compile(n.path, output=destination, threads=n.threads, quantize=quantize, sparsify=sparsify,
                      verify=False, input_shapes=open_batches(n.path))

    return build


def _onnxruntime(**how: bool) -> Callable[[Network, Path], None]:
    return lambda n, destination: peers.quantize_onnxruntime(n.path, n.samples, destination, batch=n.batch, **how)


def _nncf(n: Network, destination: Path) -> None:
    peers.quantize_nncf(n.path, n.samples, destination, batch=n.batch)


def _executorch(n: Network, destination: Path) -> None:
    if n.modules is None:
        raise SkiveError("needs --modules")
    module = importlib.import_module(n.modules).build(n.name)
    peers.quantize_executorch(module, n.samples, destination, batch=n.batch)


@dataclass(frozen=True)
class Engine:
    """`runs`: the engine of skive.bench; `suffix` of its file (none: a folder); `needs`: packages of
    `peers.PACKAGES`; `build` writes the file; `takes` says which models are its business."""

    runs: str
    suffix: str
    needs: tuple[str, ...]
    build: Callable[[Network, Path], None]
    takes: Callable[[Path], bool] = lambda model: True


ENGINES = {
    "skive-int8": Engine("skive", "", (), _skive("int8")),
    "skive-int16": Engine("skive", "", (), _skive("int16")),
    "skive-float32": Engine("skive", "", (), _skive("float32")),
    "skive-auto": Engine("skive", "", (), _skive("auto")),
    **{f"skive-block4x{n}": Engine("skive", "", (), _skive("int8", f"block4x{n}@0.75")) for n in (16, 32)},
    "onnxruntime-qdq": Engine("onnxruntime", ".onnx", ("onnxruntime",), _onnxruntime()),
    "onnxruntime-qop": Engine("onnxruntime", ".onnx", ("onnxruntime",), _onnxruntime(operators=True)),
    "onnxruntime-dynamic": Engine(
        "onnxruntime", ".onnx", ("onnxruntime",),
        lambda n, destination: peers.quantize_onnxruntime_dynamic(n.path, destination), peers.is_transformer),
    "openvino-nncf": Engine("openvino", ".xml", ("nncf",), _nncf),
    "openvino-qdq": Engine("openvino", ".onnx", ("onnxruntime", "openvino"), _onnxruntime()),
    "executorch": Engine("executorch", ".pte", ("executorch",), _executorch),
}
SPARSE = tuple(e for e in ENGINES if e.startswith("skive-block"))
DEFAULT = [e for e in ENGINES if e not in ("skive-auto", *SPARSE)]
PEERS = [e for e in ENGINES if not e.startswith("skive")]


def built(n: Network, name: str, work: Path) -> Path:
    """The file of engine `name` for `n`, made if it is not there or older than the model. What skive made before
    is in its own cache if nothing changed, so that artefacts are never stale."""
    engine = ENGINES[name]
    lacking = [m for m in map(peers.missing, engine.needs) if m]
    if lacking:
        raise SkiveError(f"{lacking[0]} is not installed")
    folder = work / n.name
    folder.mkdir(parents=True, exist_ok=True)
    # OpenVINO reads the very file of onnxruntime.
    stem = "onnxruntime-qdq" if name == "openvino-qdq" else name
    file = folder / (f"{stem}-t{n.threads}" if engine.runs == "skive" else stem + engine.suffix)
    if engine.runs == "skive" or not file.exists() or file.stat().st_mtime < n.path.stat().st_mtime:
        engine.build(n, file)
    return file


# ---------------------------------------------------------------------------------------- measuring


def relative_l2(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The distance of the outputs by the norm of `want`."""
    g, w = (np.concatenate([np.ravel(a).astype(np.float64) for a in v]) for v in (got, want))
    return float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30)) if g.size == w.size else math.inf


def reference(n: Network, folder: Path) -> list[np.ndarray]:
    """What onnxruntime gives in float32."""
    np.savez(folder / "inputs.npz", *n.inputs)
    job = Job("onnxruntime", str(n.path), str(folder / "inputs.npz"), str(folder / "float32.npz"), n.threads)
    worker = Worker.start(job)
    worker.stop()
    return worker.outputs()


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Sets `wrong` of every row: a fast wrong answer must not win. See the text above."""
    lossy = sorted(r["err"] for r in rows if "err" in r and r["engine"] in ("skive-int8", *PEERS))
    for r in rows:
        if r["engine"] in SPARSE:  # weights were taken away: another network
            r["wrong"] = False
        elif "err" in r:
            eight = r["engine"] in ("skive-int8", "skive-auto", *PEERS)
            allowed = max(0.1, 2.5 * lossy[(len(lossy) - 1) // 2]) if eight and lossy else 2e-2
            r["wrong"] = not r["err"] <= allowed


def limit_ms(report: dict[str, Any], n: Network, dtype: str, output_bytes: int) -> dict[str, Any]:
    """What the network takes at the limits of the machine: {"compute", "memory"} in ms."""
    macs = sum(layer["macs"] for layer in report["layers"])
    size = report["compiled"]["weight_bytes"] + sum(x.nbytes for x in n.inputs) + output_bytes
    return {"compute": macs / limits.peak_gmacs(dtype) / 1e6 / n.threads,
            "memory": size / limits.read_gbs(size) / 1e6 / n.threads, "macs": macs, "bytes": size}


def measure(n: Network, engines: Sequence[str], seconds: float, work: Path, build_only: bool) -> list[dict[str, Any]]:
    """One row per engine; {"error": ...} for one that cannot run the network."""
    rows: list[dict[str, Any]] = [{"model": n.name, "engine": e, "threads": n.threads} for e in engines
                                  if ENGINES[e].takes(n.path)]
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as text:
        folder = Path(text)
        live: list[tuple[dict[str, Any], Worker]] = []
        try:
            files: dict[str, Path] = {}
            for row in rows:
                start = time.perf_counter()
                try:
                    files[row["engine"]] = built(n, row["engine"], work)
                except Exception as e:  # noqa: BLE001 - whatever an engine raises stands in the table
                    row["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
                row["build_s"] = time.perf_counter() - start
            if build_only:
                return rows
            want = reference(n, folder)
            for row in rows:
                e = row["engine"]
                if e not in files:
                    continue
                job = Job(ENGINES[e].runs, str(files[e]), str(folder / "inputs.npz"), str(folder / f"{e}.npz"),
                          n.threads)
                try:
                    worker = Worker.start(job, (_SCRIPT,))
                except SkiveError as error:
                    row["error"] = str(error)
                    continue
                live.append((row, worker))
                row |= {"version": worker.version, "err": relative_l2(worker.outputs(), want)}
            if not live:
                return rows
            kept, disturbed = bench.undisturbed(bench.take_turns([w for _, w in live], seconds), n.threads)
        finally:
            for _, worker in live:
                worker.stop()
        for (row, _), turns in zip(live, zip(*kept, strict=True), strict=True):
            row |= bench.timing(turns) | {"disturbed": disturbed}
        judge(rows)
        ours = next((i for i, (r, _) in enumerate(live) if r["engine"] == "skive-int8"), None)
        for i, (row, _) in enumerate(live):
            if ours is not None:
                row["ratio"] = float(np.median([r[i].median / r[ours].median for r in kept]))
            dtype = row["engine"].removeprefix("skive-")
            if dtype in ("int8", "int16", "float32"):
                report = json.loads((files[row["engine"]] / "report.json").read_text())
                row["limit"] = limit_ms(report, n, dtype, sum(o.nbytes for o in want))
                row["share"] = max(row["limit"]["compute"], row["limit"]["memory"]) / row["min_ms"]
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one network: the best peer and its ratio to skive-int8, and what int8 and int16 gain over float32."""
    by_engine = {r["engine"]: r for r in rows}
    valid = {e: r for e, r in by_engine.items() if "ratio" in r and not r["wrong"]}
    result: dict[str, Any] = {"model": rows[0]["model"], "best_peer": None, "ratio": None}
    competitors = {e: r["ratio"] for e, r in valid.items() if e in PEERS}
    if competitors and "skive-int8" in valid:
        result["best_peer"], result["ratio"] = min(competitors.items(), key=lambda item: item[1])
    single = valid.get("skive-float32")
    if single is not None:
        result["int8_gain"] = single["ratio"]
        if "skive-int16" in valid:
            result["int16_gain"] = single["ratio"] / valid["skive-int16"]["ratio"]
    return result


# ------------------------------------------------------------------------------------------ output


def cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "missing" if "not installed" in row["error"] else "failed"
    if "median_ms" not in row:
        return "built"
    mark = "!" if row["wrong"] else "~" if row["disturbed"] else ""
    return f"{row['median_ms']:.4g} ±{100 * row['spread']:.0f}%{mark} e{row['err']:.0e}"


def table(rows: Sequence[dict[str, Any]], summaries: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    """Markdown: median ms, spread and error of each engine, best peer by skive-int8, shares of the limit."""
    heads = ["model", *engines, "best peer", "ratio", "int8 limit", "int16 limit", "int8/f32", "int16/f32"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for s in summaries:
        mine = {r["engine"]: r for r in rows if r["model"] == s["model"]}

        def share(e: str, mine: dict[str, dict[str, Any]] = mine) -> str:
            return f"{100 * mine[e]['share']:.0f} %" if "share" in mine.get(e, {}) else ""

        def number(key: str, s: dict[str, Any] = s) -> str:
            return f"{s[key]:.2f}" if s.get(key) is not None else ""

        cells = [cell(mine[e]) if e in mine else "" for e in engines]
        lines.append("| " + " | ".join([s["model"], *cells, s["best_peer"] or "", number("ratio"),
                                        share("skive-int8"), share("skive-int16"),
                                        number("int8_gain"), number("int16_gain")]) + " |")
    return "\n".join(lines) + "\n"


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is made for the engines")
    parser.add_argument("--engines", default=",".join(DEFAULT), help="of: " + ",".join(ENGINES))
    parser.add_argument("--skip", default="", help="model names, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="per engine and model")
    parser.add_argument("--modules", help="module whose build(NAME) gives a torch module")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="written after every model")
    parser.add_argument("--markdown", metavar="FILE")
    a = parser.parse_args()
    engines = a.engines.split(",")
    unknown = {*engines} - {*ENGINES}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    peaks = {d: limits.peak_gmacs(d) for d in ("int8", "int16", "float32")}
    versions = {p: peers.version(p) for p in ("onnxruntime", "openvino", "nncf", "executorch")}
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(), "threads": a.threads,
        "seconds": a.seconds, "peak_gmacs": peaks, "versions": {"skive": skive.__version__} | versions,
        "models": summaries, "results": rows}
    print(f"{document['machine']['cpu']}, {document['machine']['isa']}, {a.threads} thread(s); "
          + ", ".join(f"{d} {v:.0f} GMAC/s" for d, v in peaks.items()) + "; "
          + ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
    for path in models_in(a.models):
        if path.stem in a.skip.split(","):
            continue
        start = time.perf_counter()
        new = measure(network(path, a.threads, a.modules), engines, a.seconds, a.work, a.build_only)
        rows += new
        summaries.append(summary(new))
        for r in new:
            print(f"{path.stem:<16} {r['engine']:<16} {r.get('error') or cell(r)}", flush=True)
        best = summaries[-1]
        if best["ratio"] is not None:
            print(f"{path.stem:<16} {best['best_peer']} / skive-int8 = {best['ratio']:.2f}; "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
        ratios = {s["model"]: s["ratio"] for s in summaries if s["ratio"] is not None}
        document["geometric_mean"] = geometric_mean(list(ratios.values()))
        document["geometric_mean_tiny"] = geometric_mean([v for k, v in ratios.items() if k.startswith("tiny_")])
        if a.json:
            Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    text = table(rows, summaries, engines)
    if a.markdown:
        Path(a.markdown).write_text(text)
    print("\n" + text)
    if document.get("geometric_mean"):
        print(f"geometric mean of best peer / skive-int8 over {len(ratios)} networks: "
              f"{document['geometric_mean']:.3f}")
    return 1 if any("error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
