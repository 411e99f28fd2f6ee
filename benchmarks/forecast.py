"""Forecasts beside profiles: how far `skive inspect --predict` is off on whole networks.

    python benchmarks/forecast.py ../shared/bench/build/resnet18.onnx ... [--json FILE] [--seconds 45]

The forecast comes from the table of kernel calls alone. Then the network is compiled in each element type,
calibrated with random inputs, and profiled; both totals are sums over layers of the same low quantile of
many rounds. A forecast from an empty cache measures first: give SKIVE_CACHE a new folder for that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import skive
from skive import frontend, passes, profiling, speed
from skive.check import sample_inputs

SECONDS = 2.0  # of profiling


def profiled_us(module: skive.Module) -> float:
    """The sum over the layers of `module`, each timed as the table of calls is."""
    name, count = module.manifest["name"], len(module.report["layers"])
    library = (module.folder / f"lib{name}.so").resolve()
    _, single, overhead = profiling.time_layers(
        library, name, module.inputs, module.outputs, module.manifest["arena_bytes"], count, seconds=SECONDS
    )
    return float((np.quantile(single, speed.QUANTILE, axis=0) - overhead).sum()) / 1e3


def compare(path: Path, seconds: float) -> dict[str, object]:
    """Predicted and profiled microseconds of one network by element type, and how long the forecast took."""
    graph = frontend.open_model(str(path)).graph()
    canonical, _ = passes.canonical(graph, check="never")
    started = time.perf_counter()
    forecast = speed.predict(canonical, seconds=seconds)
    took = time.perf_counter() - started
    predicted = forecast.total_us
    samples = [tuple(sample_inputs(graph, seed)) for seed in range(4)]
    profiled = {}
    for dtype in predicted:
        wanted = None if dtype == "float32" else skive.Quantize(dtype, calibration=samples, rounding="nearest")
        module = skive.compile(str(path), quantize=wanted, verify=False)
        profiled[dtype] = profiled_us(module)
    return {
        "network": path.stem,
        "forecast_seconds": round(took, 1),
        "interpolated": {d: round(1 - m, 3) for d, m in forecast.measured.items()},
        "predicted_us": {d: round(v, 1) for d, v in predicted.items()},
        "profiled_us": {d: round(v, 1) for d, v in profiled.items()},
        "error": {d: round(predicted[d] / profiled[d] - 1, 3) for d in predicted},
        "loses_by_int8": sum(layer.loses is not None for layer in forecast.layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=45.0, help="what a forecast may measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for path in options.models:
        rows.append(compare(path, options.seconds))
        print(json.dumps(rows[-1]), flush=True)
    errors = np.abs([e for r in rows for e in r["error"].values()])  # type: ignore[attr-defined]
    print(f"absolute error: mean {100 * errors.mean():.1f} %, largest {100 * errors.max():.1f} %")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
