"""Compiles the keyword-spotting network, runs it on 600 recordings and prints what came out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import skive

HERE = Path(__file__).resolve().parent
MODEL = HERE / "kws_dscnn.onnx"
# One step of the 8-bit features and the integer that stands for zero; see README.md.
FEATURE_SCALE, FEATURE_ZERO = 0.5847029089927673, 83
ONNXRUNTIME_ACCURACY = 0.9050


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
    with console.status("compiling"):
        begin = time.perf_counter()
        module = skive.compile(MODEL, example_inputs=(x[:1],), output=arguments.output, name="kws",
                               target=arguments.target)
        compile_seconds = time.perf_counter() - begin

    predicted = np.array([int(np.argmax(module(x[i:i + 1]))) for i in range(len(x))])
    accuracy = float(np.mean(predicted == y))
    latency = median_latency(module, x[:1])
    report = module.report
    verification = report["verification"]
    library = arguments.output / "libkws.so"

    table = Table(title="Keyword spotting, compiled by skive", show_header=False, title_justify="left")
    table.add_row("compiled in", f"{compile_seconds:.1f} s for target {report['target']['name']}")
    table.add_row("accuracy", f"{100 * accuracy:.2f} % of {len(x)} recordings "
                              f"(onnxruntime: {100 * ONNXRUNTIME_ACCURACY:.2f} %)")
    table.add_row("latency", f"{1e6 * latency:.0f} µs per recording from Python, 1 thread")
    table.add_row("library", f"{library.stat().st_size / 1024:.0f} KiB, weights included")
    table.add_row("memory", f"{report['compiled']['arena_bytes'] / 1024:.1f} KiB arena, nothing allocated in a call")
    table.add_row("verified", f"{'passed' if verification['passed'] else 'FAILED'} against "
                              f"{verification['reference']}: largest difference "
                              f"{verification['max_abs_error']:.1e}")
    shown = Path(os.path.relpath(arguments.output))
    table.add_row("artefact", str(shown))
    table.add_row("report", str(shown / "report.html"))
    console.print(table)
    return 0 if verification["passed"] and round(accuracy, 4) >= ONNXRUNTIME_ACCURACY else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except skive.SkiveError as error:
        sys.exit(f"error: {error}")
