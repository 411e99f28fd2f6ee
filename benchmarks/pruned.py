"""What removing channels costs real models on real data, without training.

    python benchmarks/pruned.py DATA [--models kws_dscnn,resnet20_cifar10] [--fractions 0.2,0.4,0.5]
                                [--ways activation,obspa,l1,random] [--limit 1000] [--json FILE]

DATA as for `accuracy.py`. A way is a criterion of `skive.Prune`; `-noise` behind it fits to noise instead of
the calibration samples, `-plain` does not fit at all, `-layer`, `-global` and `-measured` are scopes. Top-1 stands
with its 95 % interval (Wilson, 1927); `us` is the smallest time of one call of the float32 network.
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
from skive.pruning import SCOPES


def measured(module: skive.Module, fold: Fold, limit: int | None) -> dict[str, Any]:
    """{top1, interval, us} of a compiled network."""
    assert fold.expected is not None
    inputs, seconds, right = fold.inputs[:limit], [], 0
    for i in range(len(inputs)):
        start = time.perf_counter()
        result = module(inputs[i : i + 1])
        seconds.append(time.perf_counter() - start)
        right += int(np.argmax(result)) == int(fold.expected[i])
    return {"top1": 100 * right / len(inputs), "interval": wilson(right, len(inputs)), "us": 1e6 * min(seconds)}


def pruned(model: RealModel, data: Path, fold: Fold, way: str, fraction: float) -> skive.Module:
    """The float32 network of `model` with `fraction` of its multiply-accumulates removed."""
    criterion, *how = way.split("-")
    prune = skive.Prune(macs=fraction, criterion=criterion, refit="plain" not in how,
                        scope=next((s for s in SCOPES if s in how), SCOPES[0]),
                        calibration=None if "noise" in how else fold.calibration)
    return skive.compile(model.path(data), example_inputs=(fold.calibration[:1],), prune=prune, verify=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="kws_dscnn,ic_resnet8,resnet20_cifar10,mnist_cnn")
    parser.add_argument("--fractions", default="0.2,0.4,0.5")
    parser.add_argument("--ways", default="activation-measured,activation,obspa,l1,l1-plain,random-plain")
    parser.add_argument("--limit", type=int, help="samples of a data set at most")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    known = {m.name: m for m in REAL_MODELS if m.kind == "top1"}
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        model = known[name]
        (fold,) = model.folds(a.data)
        fractions = [float(f) for f in a.fractions.split(",")]
        for way, fraction in [("whole", 0.0), *((w, f) for w in a.ways.split(",") for f in fractions)]:
            start = time.perf_counter()
            module = pruned(model, a.data, fold, "l1-plain" if way == "whole" else way, fraction)
            row = {"model": name, "way": way, "seconds": time.perf_counter() - start,
                   "macs_removed": module.report["sparsity"]["macs_removed"], **measured(module, fold, a.limit)}
            rows.append(row)
            low, high = row["interval"]
            print(f"{name:<18} {way:<16} {row['macs_removed']:6.1%} of the MACs gone  top-1 {row['top1']:6.2f} % "
                  f"[{low:.2f}, {high:.2f}]  {row['us']:8.1f} us", flush=True)
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
