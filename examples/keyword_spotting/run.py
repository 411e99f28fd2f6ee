"""Compiles the keyword-spotting network in float32 and INT8, runs both on real recordings and prints what came out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import skive
from skive.agreement import wilson

HERE = Path(__file__).resolve().parent
MODEL = HERE / "kws_dscnn.onnx"
# One step of the 8-bit features and the integer that stands for zero; see README.md.
FEATURE_SCALE, FEATURE_ZERO = 0.5847029089927673, 83
ONNXRUNTIME_ACCURACY = 0.9050
# The ranges of the INT8 network come from the first recordings; its accuracy is that on the others.
CALIBRATION = 100
# INT8 may lose half a point; 500 recordings tell rates apart that differ by more than two.
ALLOWED_LOSS = 0.005


def load_samples() -> tuple[np.ndarray, np.ndarray]:
    """Features, float32 [600, 1, 49, 10], and the class of each, [600]."""
    with np.load(HERE / "kws_mfcc_a.npz") as data:
        features = (data["x"].astype(np.float32) - FEATURE_ZERO) * np.float32(FEATURE_SCALE)
        return features[:, np.newaxis], data["y"]


def median_latency(module: skive.Module, sample: np.ndarray, seconds: float = 1.0) -> float:
    """Median time of one call with one sample, in seconds, over `seconds` of calls."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        module(sample)
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "build", help="artefact folder")
    parser.add_argument("--target", default="host")
    arguments = parser.parse_args()

    x, y = load_samples()
    console = Console()
    folders = {"float32": arguments.output, "INT8": arguments.output.with_name(arguments.output.name + "_int8")}
    modules, compile_seconds = {}, {}
    for name, folder in folders.items():
        with console.status(f"compiling {name}"):
            begin = time.perf_counter()
            quantize = skive.Quantize("int8", calibration=x[:CALIBRATION]) if name == "INT8" else None
            modules[name] = skive.compile(MODEL, example_inputs=(x[:1],), output=folder, name="kws",
                                          target=arguments.target, quantize=quantize)
            compile_seconds[name] = time.perf_counter() - begin

    right = {name: np.array([int(np.argmax(module(x[i:i + 1]))) for i in range(len(x))]) == y
             for name, module in modules.items()}
    rest = {name: r[CALIBRATION:] for name, r in right.items()}
    low, high = wilson(int(rest["INT8"].sum()), len(rest["INT8"]))
    accuracy = float(right["float32"].mean())
    latency = {name: median_latency(module, x[:1]) for name, module in modules.items()}
    reports = {name: module.report for name, module in modules.items()}
    verified = {name: report["verification"] for name, report in reports.items()}

    table = Table("", *modules, title="Keyword spotting, compiled by skive", title_justify="left")

    def row(label: str, cell: Callable[[str], str]) -> None:
        table.add_row(label, *map(cell, modules))

    row("accuracy", lambda n: f"{100 * accuracy:.2f} % of {len(x)}" if n == "float32" else "")
    row(f"  on {len(x) - CALIBRATION} not in calibration", lambda n: f"{100 * rest[n].mean():.2f} %")
    row("latency, 1 thread", lambda n: f"{1e6 * latency[n]:.0f} µs")
    row("library with weights", lambda n: f"{(folders[n] / 'libkws.so').stat().st_size / 1024:.0f} KiB")
    row("weights", lambda n: f"{reports[n]['compiled']['weight_bytes'] / 1024:.0f} KiB")
    row("memory of a call", lambda n: f"{reports[n]['compiled']['arena_bytes'] / 1024:.1f} KiB")
    row("verified", lambda n: f"{'passed' if verified[n]['passed'] else 'FAILED'}: {verified[n]['max_abs_error']:.0e}")
    row("  against", lambda n: verified[n]["reference"])
    row("compiled in", lambda n: f"{compile_seconds[n]:.1f} s")
    row("artefact", lambda n: os.path.relpath(folders[n]))
    console.print(table)
    console.print(f"Target {reports['float32']['target']['name']}; onnxruntime's float32 accuracy is "
                  f"{100 * ONNXRUNTIME_ACCURACY:.2f} %.")
    console.print(f"The INT8 rate lies within {100 * low:.1f} to {100 * high:.1f} % (95 % interval).")
    console.print("report.html in each folder shows the layers, what INT8 cost and where.")
    passed = all(v["passed"] for v in verified.values()) and round(accuracy, 4) >= ONNXRUNTIME_ACCURACY
    return 0 if passed and rest["INT8"].mean() >= rest["float32"].mean() - ALLOWED_LOSS else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except skive.SkiveError as error:
        sys.exit(f"error: {error}")
