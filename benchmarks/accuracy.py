"""What quantization costs real models on real data: skive beside onnxruntime and NNCF with OpenVINO.

    python benchmarks/accuracy.py DATA [--models kws_dscnn,sr_espcn_x2] [--engines skive-int8,nncf]
                                  [--quantize method=percentile ...] [--limit 1000] [--json FILE] [--markdown FILE]

DATA holds the data sets and `models/` (see `real_models.py`). All engines calibrate on the same
samples, which the evaluation does not use. Top-1 stands with its 95 % interval (Wilson, 1927) and
the difference to float32 with that of paired samples; PSNR is that of the brightness, the mean of
the photos; SQNR is that of the output against onnxruntime's float32, over all samples. An engine
that is not installed or cannot run a model stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
from real_models import REAL_MODELS, Fold, RealModel, psnr

import skive
from skive import bench

# name -> (peer that must be installed or None, how a runnable network is made)
Maker = Callable[[Path, Fold, Path, dict[str, Any]], peers.Run]


def _skive(dtype: str | None) -> Maker:
    def make(model: Path, fold: Fold, folder: Path, options: dict[str, Any]) -> peers.Run:
        first = fold.calibration[:1]
        quantize = skive.Quantize(dtype, calibration=fold.calibration, **options) if dtype else None
        return skive.compile(model, example_inputs=(first,), quantize=quantize, output=folder / "artefact",
                             verify=False)

    return make


def _onnxruntime(operators: bool | None) -> Maker:
    def make(model: Path, fold: Fold, folder: Path, options: dict[str, Any]) -> peers.Run:
        if operators is None:
            return peers.run_onnxruntime(model)
        file = folder / "quantized.onnx"
        peers.quantize_onnxruntime(model, fold.calibration, file, operators=operators)
        return peers.run_onnxruntime(file)

    return make


def _nncf(model: Path, fold: Fold, folder: Path, options: dict[str, Any]) -> peers.Run:
    file = folder / "quantized.xml"
    peers.quantize_nncf(model, fold.calibration, file)
    return peers.run_openvino(file, fold.inputs[:1].shape)


REFERENCE = "float32"  # onnxruntime's
ENGINES: dict[str, tuple[str | None, Maker]] = {
    "skive-float32": (None, _skive(None)),
    "skive-int8": (None, _skive("int8")),
    "skive-int16": (None, _skive("int16")),
    "onnxruntime": ("onnxruntime", _onnxruntime(False)),
    "nncf": ("nncf", _nncf),
    "skive-auto": (None, _skive("auto")),
}
DEFAULT = ("skive-float32", "skive-int8", "skive-int16", "onnxruntime", "nncf")
PEERS = ("onnxruntime", "nncf")
# kind -> (the figure that counts, unit, what int8 and int16 may lose of it)
COUNTS = {"top1": ("top1", "%", 0.5, 0.05), "psnr": ("psnr_db", "dB", 0.2, 0.01)}
SQNR_DB = {"skive-int8": 20.0, "skive-int16": 60.0}


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` of `n`, in per cent (Wilson, Probable Inference, 1927)."""
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)


def paired(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares that `gained` and `lost` of `n` samples, in per cent."""
    d = (gained - lost) / n
    half = 1.96 * math.sqrt(max(0.0, (gained + lost) / n - d * d) / n)
    return 100 * (d - half), 100 * (d + half)


@dataclass
class Tally:
    """What one engine gave on one model, over all folds."""

    signal: float = 0.0
    noise: float = 0.0
    n: int = 0
    gained: int = 0
    lost: int = 0
    agreed: int = 0
    hits: list[bool] = field(default_factory=list)  # top-1 right or wrong, of every sample
    decisions: list[bool] = field(default_factory=list)
    psnr: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, model: RealModel, fold: Fold, got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
        """Counts the outputs `got` of a fold beside those of the float32 network."""
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            self.n += 1
            self.signal += float(np.sum(np.square(w, dtype=np.float64)))
            self.noise += float(np.sum(np.square(w.astype(np.float64) - g.reshape(w.shape))))
            same = model.same(g.reshape(w.shape), w)
            self.agreed += same
            if i < fold.decisions:
                self.decisions.append(same)
            if model.kind == "top1" and fold.expected is not None:
                right, before = int(np.argmax(g)) == fold.expected[i], int(np.argmax(w)) == fold.expected[i]
                self.hits.append(bool(right))
                self.gained += bool(right and not before)
                self.lost += bool(before and not right)
            if model.kind == "psnr" and fold.expected is not None:
                self.psnr[fold.name] = psnr(g, fold.expected[i])

    def row(self, model: RealModel) -> dict[str, Any]:
        """The figures that mean something for this kind of model."""
        noise = max(self.noise, 1e-30 * self.signal)
        row: dict[str, Any] = {"samples": self.n, "sqnr_db": 10 * math.log10(self.signal / noise),
                               "prepare_s": self.seconds, "agreement": 100 * self.agreed / self.n}
        if model.kind == "top1":
            row |= {"top1": 100 * sum(self.hits) / self.n, "interval": wilson(sum(self.hits), self.n),
                    "difference": 100 * (self.gained - self.lost) / self.n,
                    "difference_interval": paired(self.gained, self.lost, self.n),
                    "gained": self.gained, "lost": self.lost, "hits": self.hits}
        if model.kind == "psnr":
            row |= {"psnr_db": float(np.mean(list(self.psnr.values()))), "photos": self.psnr}
        if model.kind == "sqnr" and self.decisions:
            row |= {"same_decision": f"{sum(self.decisions)}/{len(self.decisions)}"}
        return row


def evaluate(model: RealModel, data: Path, engines: Sequence[str], options: dict[str, Any],
             limit: int | None) -> list[dict[str, Any]]:
    """One row per engine, float32 of onnxruntime first."""
    tallies = {e: Tally() for e in (REFERENCE, *engines)}
    failed: dict[str, str] = {}
    for fold in model.folds(data):
        inputs = fold.inputs[:limit]
        want: list[np.ndarray] = []
        for engine, tally in tallies.items():
            needed, make = (None, _onnxruntime(None)) if engine == REFERENCE else ENGINES[engine]
            lacking = peers.missing(needed) if needed else None
            if lacking:
                failed[engine] = f"{lacking} is not installed"
            if engine in failed:
                continue
            with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
                start = time.perf_counter()
                try:
                    run = make(model.path(data), fold, Path(folder), options if engine.startswith("skive") else {})
                    tally.seconds += time.perf_counter() - start
                    got = [np.array(run(x)) for x in (inputs[i:i + 1] for i in range(len(inputs)))]
                except Exception as e:  # noqa: BLE001 - whatever an engine raises stands in the table
                    if engine == REFERENCE:
                        raise
                    failed[engine] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
                    continue
            if engine == REFERENCE:
                want = got
            tally.add(model, fold, got, want)
    return [{"model": model.name, "kind": model.kind, "engine": e}
            | ({"error": failed[e]} if e in failed else t.row(model)) for e, t in tallies.items()]


def verdict(rows: Sequence[dict[str, Any]], engine: str, eight: bool) -> list[str]:
    """What `engine` misses on one model: the loss it may have, its SQNR, the photos; with `eight` also every peer
    that is better, in top-1 by more than chance."""
    by_engine = {r["engine"]: r for r in rows}
    row, reference = by_engine.get(engine), by_engine[REFERENCE]
    if row is None or "error" in row:
        return [] if row is None else [f"{row['model']} {engine}: {row['error']}"]
    name, found = f"{row['model']} {engine}", []
    if row["kind"] in COUNTS:
        key, unit, *may_lose = COUNTS[row["kind"]]
        loss, allowed = reference[key] - row[key], may_lose[0 if eight else 1]
        if loss > allowed:
            found.append(f"{name}: loses {loss:.3f} {unit}, {allowed} allowed")
    else:
        key, unit = "sqnr_db", "dB"
        right, _, photos = row.get("same_decision", "0/0").partition("/")
        if right != photos:
            found.append(f"{name}: decides alike on {right} of {photos} photos")
    if (not eight or row["kind"] == "sqnr") and row["sqnr_db"] < SQNR_DB["skive-int8" if eight else "skive-int16"]:
        found.append(f"{name}: SQNR {row['sqnr_db']:.1f} dB")
    for p in PEERS if eight else ():
        peer = by_engine.get(p, {})
        if peer.get(key, -math.inf) > row[key] and not (row["kind"] == "top1" and _by_chance(peer, row)):
            found.append(f"{name}: {p} has {peer[key]:.2f} {unit}, skive {row[key]:.2f}")
    return found


def _by_chance(better: dict[str, Any], row: dict[str, Any]) -> bool:
    """True if the 95 % interval of the difference in top-1 of two engines, on the same samples, reaches zero."""
    pairs = list(zip(better["hits"], row["hits"], strict=True))
    return paired(pairs.count((True, False)), pairs.count((False, True)), len(pairs))[0] <= 0


def cell(row: dict[str, Any]) -> str:
    """One engine on one model, for the table."""
    if "error" in row:
        return "missing" if "not installed" in row["error"] else "failed"
    sqnr = "exact" if row["sqnr_db"] > 250 else f"{row['sqnr_db']:.1f} dB"
    if row["kind"] == "top1":
        low, high = row["interval"]
        if row["engine"] == REFERENCE:
            return f"{row['top1']:.2f} % [{low:.2f}, {high:.2f}]"
        a, b = row["difference_interval"]
        return f"{row['top1']:.2f} % ({row['difference']:+.2f} [{a:+.2f}, {b:+.2f}]), {sqnr}"
    if row["kind"] == "psnr":
        return f"{row['psnr_db']:.3f} dB" + ("" if row["engine"] == REFERENCE else f", {sqnr}")
    return sqnr + (f", {row['same_decision']} photos" if "same_decision" in row else "")


def markdown(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    """The table: a line per model, a column per engine."""
    columns = (REFERENCE, *engines)
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(r["model"] for r in rows):
        cells = {r["engine"]: cell(r) for r in rows if r["model"] == name}
        lines.append(f"| {name} | " + " | ".join(cells[e] for e in columns) + " |")
    return "\n".join(lines) + "\n"


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE of `skive.Quantize`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", help="of: " + ",".join(m.name for m in REAL_MODELS))
    parser.add_argument("--engines", default=",".join(DEFAULT), help="of: " + ",".join(ENGINES))
    parser.add_argument("--quantize", type=option, action="append", default=[], metavar="NAME=VALUE",
                        help="options of skive.Quantize")
    parser.add_argument("--limit", type=int, help="evaluate this many samples of a fold")
    parser.add_argument("--json", metavar="FILE", help="written after every model")
    parser.add_argument("--markdown", metavar="FILE")
    a = parser.parse_args()
    engines = a.engines.split(",")
    chosen = a.models.split(",") if a.models else [m.name for m in REAL_MODELS]
    unknown = ({*engines} - {*ENGINES}) | ({*chosen} - {m.name for m in REAL_MODELS})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(),
        "versions": {"skive": skive.__version__} | {p: peers.version(p) for p in ("onnxruntime", "nncf", "openvino")},
        "rows": rows}
    print(", ".join(f"{k} {v}" for k, v in document["versions"].items()), flush=True)
    misses: list[str] = []
    for model in REAL_MODELS:
        if model.name not in chosen:
            continue
        new = evaluate(model, a.data, engines, dict(a.quantize), a.limit)
        rows += new
        for r in new:
            print(f"{model.name:<20} {r['engine']:<14} {r.get('error') or cell(r)}", flush=True)
        for e in engines:
            if e.startswith("skive"):
                misses += verdict(new, e, eight=e in ("skive-int8", "skive-auto"))
        for r in new:
            r.pop("hits", None)
        document["misses"] = misses
        if a.json:
            Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    if a.markdown:
        Path(a.markdown).write_text(markdown(rows, engines))
    print("\n" + markdown(rows, engines) + "".join(f"\nmissed: {m}" for m in misses))
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
