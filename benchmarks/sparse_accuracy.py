"""What blocks of zero weights cost real models on real data, without training.

    python benchmarks/sparse_accuracy.py DATA [--models kws_dscnn,resnet20_cifar10] [--pattern block4x16]
        [--fractions 0.25,0.5] [--ways reconstruction,activation,magnitude,random] [--scope layer]
        [--quantize none|int8] [--limit 1000] [--json FILE]

DATA as for `accuracy.py`. A way is a criterion of `skive.Sparsify`; all have the calibration samples. Top-1 stands
with its 95 % interval (Wilson, 1927).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import results
from accuracy import wilson
from real_models import REAL_MODELS, Fold, RealModel

import skive


def sparse(model: RealModel, fold: Fold, a: argparse.Namespace, way: str, fraction: float) -> skive.Module:
    """The network of `model` with `fraction` of its blocks zero, chosen by `way`; 0: as it is."""
    asked = None
    if fraction:
        asked = skive.Sparsify(a.pattern, fraction, criterion=way, scope=a.scope, calibration=fold.calibration)
    quantize = None if a.quantize == "none" else skive.Quantize(a.quantize, calibration=fold.calibration)
    return skive.compile(model.path(a.data), example_inputs=(fold.calibration[:1],), sparsify=asked, quantize=quantize,
                         verify=False)


def top1(module: skive.Module, fold: Fold, limit: int | None) -> tuple[float, tuple[float, float]]:
    """(percent of the samples that get the right class, its 95 % interval)."""
    assert fold.expected is not None
    inputs = fold.inputs[:limit]
    right = sum(int(np.argmax(module(inputs[i : i + 1]))) == int(fold.expected[i]) for i in range(len(inputs)))
    return 100 * right / len(inputs), wilson(right, len(inputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="kws_dscnn,resnet20_cifar10")
    parser.add_argument("--pattern", default="block4x16")
    parser.add_argument("--fractions", default="0.25,0.5")
    parser.add_argument("--ways", default="reconstruction,activation,magnitude,random")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--limit", type=int, help="samples of a data set at most")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    known = {m.name: m for m in REAL_MODELS if m.kind == "top1"}
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        model = known[name]
        (fold,) = model.folds(a.data)
        wanted = [(w, float(f)) for w in a.ways.split(",") for f in a.fractions.split(",")]
        for way, fraction in [("whole", 0.0), *wanted]:
            start = time.perf_counter()
            module = sparse(model, fold, a, way, fraction)
            seconds = time.perf_counter() - start
            share, (low, high) = top1(module, fold, a.limit)
            zero = module.report.get("sparsity", {}).get("macs_removed", 0.0)
            rows.append({"model": name, "pattern": a.pattern, "way": way, "fraction": fraction, "macs_zero": zero,
                         "quantize": a.quantize, "top1": share, "interval": (low, high), "seconds": seconds})
            print(f"{name:<18} {a.pattern} {way:<16} {zero:6.1%} of the MACs zero  top-1 {share:6.2f} % "
                  f"[{low:.2f}, {high:.2f}]", flush=True)
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
