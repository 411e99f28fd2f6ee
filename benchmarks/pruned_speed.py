"""Time, file and arena of networks with channels removed beside the same networks whole.

    taskset -c 1 python benchmarks/pruned_speed.py MODEL.onnx ... [--prune macs=0.5] [--quantize int8|none]
        [--criterion activation] [--scope global] [--multiple N] [--layers] [--json FILE]

`--prune` as for `skive compile`; several, with spaces between, stand beside each other. What remains is fitted to the
calibration data, as by default.
NAME.npy beside NAME.onnx is a typical input and, rolled along its axes, the calibration data. All networks of a
model have turns in one process; a ratio is the median over rounds of whole by pruned, `min` the fastest call.
`--layers` adds the time of each layer that multiplies.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results
from sparse import ROUNDS, inputs_of, layers_of, turn

import skive
from skive import frontend, pruning


def built(path: Path, x: np.ndarray, data: np.ndarray, a: argparse.Namespace, asked: str) -> skive.Module:
    """The network with channels removed as `asked` says; all of it for ""."""
    name = frontend.open_model(path).graph().inputs[0].name
    quantize = None
    if a.quantize != "none":
        quantize = skive.Quantize(a.quantize, calibration={name: data}, rounding="nearest")
    prune = None
    if asked:
        prune = replace(pruning.requested(asked), criterion=a.criterion, scope=a.scope, multiple=a.multiple,
                        calibration=data)
    return skive.compile(path, example_inputs={name: x}, quantize=quantize, threads=1, verify=False, prune=prune)


def measure(path: Path, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per request, that of the whole network first."""
    x, data = inputs_of(path)
    asked = ["", *a.prune.split()]
    modules = [built(path, x, data, a, text) for text in asked]
    medians, fastest = np.zeros((ROUNDS, len(modules))), np.full(len(modules), np.inf)
    for r in range(ROUNDS):
        for k in np.roll(np.arange(len(modules)), r):
            seconds = turn(modules[k], x)
            medians[r, k], fastest[k] = np.median(seconds), min(fastest[k], *seconds)
    rows: list[dict[str, Any]] = []
    whole: dict[str, tuple[float, str]] = {}
    for k, (text, module) in enumerate(zip(asked, modules, strict=True)):
        compiled = module.report["compiled"]
        row = {"model": path.stem, "prune": text, "criterion": a.criterion, "scope": a.scope, "dtype": a.quantize,
               "macs": compiled["macs"], "min_ms": 1e3 * fastest[k],
               "median_ms": 1e3 * float(np.median(medians[:, k])),
               "ratio": float(np.median(medians[:, 0] / medians[:, k])), "min_ratio": fastest[0] / fastest[k],
               "file_bytes": sum(f.stat().st_size for f in module.folder.iterdir() if f.suffix in (".so", ".bin")),
               "weight_bytes": compiled["weight_bytes"], "arena_bytes": compiled["arena_bytes"]}
        rows.append(row)
        of = {key: row[key] / rows[0][key] for key in ("macs", "file_bytes", "weight_bytes", "arena_bytes")}
        print(f"{path.stem:<14} {text or 'whole':<16} {1 - of['macs']:6.1%} of the MACs gone  "
              f"min {row['min_ms']:8.3f} ms ({row['min_ratio']:.2f} x)  "
              f"median ratio {row['ratio']:.2f}  file {of['file_bytes']:.2f}  "
              f"weights {of['weight_bytes']:.2f}  arena {of['arena_bytes']:.2f}",
              flush=True)
        if a.layers and k:
            whole = whole or layers_of(modules[0])
            counts = {name: g for g in module.report["sparsity"]["groups"] for name in g["layers"]}
            row["layers"] = []
            for name, (us, kernel) in layers_of(module).items():
                had = whole.get(name, (float("nan"), ""))[0]
                group = counts.get(name)
                row["layers"].append({"name": name, "kernel": kernel, "us": us, "whole_us": had})
                print(f"    {name[-44:]:<44} {kernel:<16} {had:8.1f} -> {us:8.1f} us  {had / max(us, 1e-3):5.2f} x  "
                      + (f"{group['channels']} -> {group['kept']}" if group else ""), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prune", default="macs=0.5")
    parser.add_argument("--quantize", choices=("int8", "int16", "none"), default="int8")
    parser.add_argument("--criterion", default="activation")
    parser.add_argument("--scope", choices=pruning.SCOPES, default="global")
    parser.add_argument("--multiple", type=int)
    parser.add_argument("--layers", action="store_true", help="time of every layer, too")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    rows = [row for path in a.models for row in measure(path, a)]
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
