"""Both back ends on networks with exits: the time of a call that ends at each exit, and how far outputs differ.

    taskset -c 1 python benchmarks/backends.py DATA WORK [--models resnet20,dscnn] [--epochs 12] [--joint] [--json FILE]

DATA and WORK as for `exits.py`: heads are those that it trained, or new ones with random weights (as fast).
Needs the extra `tvm`. Every time is the smallest of many calls with one sample on one thread; TVM's default schedules,
untuned.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import exits
import numpy as np
import results
import torch

import skive
from skive.exit_calibration import exit_seconds
from skive.torch import add_exits

SAMPLES = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="resnet20,dscnn")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        plan = exits.MODELS[name]
        network, _, (x, _) = plan.load(a.data)
        example = (torch.from_numpy(x[:1]),)
        torch.manual_seed(0)
        model = add_exits(network.eval(), example, plan.at, channels=plan.channels, grid=plan.grid,
                          hidden=plan.hidden).eval()
        file = a.work / f"{name}-0-{a.epochs}{'-joint' if a.joint else ''}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        ways = [skive.Exit(f"exit{i}", "max-prob", 0.6) for i in range(len(plan.at))]
        ours, theirs = (skive.compile(model, example_inputs=example, exits=ways, backend=b) for b in ("skive", "tvm"))
        far, same = 0.0, 0
        for v in x[:SAMPLES]:
            pairs = list(zip(ours.all_outputs(v[None]), theirs.all_outputs(v[None]), strict=True))
            far = max([far, *(float(np.abs(p - q).max() / (np.abs(p).max() + 1e-9)) for p, q in pairs)])
            same += int(ours.run(v[None]).exit[0] == theirs.run(v[None]).exit[0])
        us = [1e6 * exit_seconds(m, (x[:1],)) for m in (ours, theirs)]
        rows.append({"model": name, "samples": min(SAMPLES, len(x)), "same_exit": same, "difference": far,
                     "skive_us": us[0].tolist(), "tvm_us": us[1].tolist()})
        print(f"{name}: exits equal on {same} of {min(SAMPLES, len(x))} samples, outputs to {far:.1e} of their range")
        for e, p, q in zip(ours.exits, *us, strict=True):
            print(f"  until {e.name:<8} skive {p:8.1f} us, tvm {q:8.1f} us: {q / p:.1f} times")
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
