"""How long `skive compile --quantize` takes, from nothing: an empty cache and a process of its own.

    python benchmarks/compile_int8.py MODEL.onnx ... [--samples 200] [--dtype int8] [--json FILE] [-- OPTION ...]

The calibration samples are those of `compare_int8.py`: NAME.npy beside the model, rolled. OPTIONs go to
`skive compile`, for example `-- --tune 30`. Verification is included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare import open_batches
from compare_int8 import network

from skive import bench


def compile_once(model: Path, count: int, dtype: str, threads: int, extra: Sequence[str]) -> dict[str, Any]:
    """{seconds, cpu_seconds, peak_mb of the largest process, quantization of the report}; RuntimeError if it
    fails."""
    n = network(model, threads, None, count)
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
        data = Path(folder) / "calibration.npz"
        np.savez(data, x=n.samples)
        shapes = [f"--input={k}={'x'.join(map(str, v))}" for k, v in open_batches(model).items()]
        command = [sys.executable, "-m", "skive.cli", "compile", str(model), "-o", f"{folder}/artefact", "--quantize",
                   dtype, "--calibrate", f"{data}:x", "--threads", str(threads), *shapes, *extra]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "SKIVE_CACHE": f"{folder}/cache"}, text=True,
                              capture_output=True)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{model}: {done.stderr[-1000:]}")
        report = json.loads((Path(folder) / "artefact" / "report.json").read_text())
    quantization = report.get("quantization") or {}
    return {"model": model.stem, "dtype": dtype, "samples": quantization.get("samples"), "seconds": seconds,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_mb": after.ru_maxrss / 1024, "sqnr_db": quantization.get("sqnr_db"), "options": list(extra)}


def main() -> int:
    if "--" in sys.argv:
        at = sys.argv.index("--")
        own, extra = sys.argv[1:at], sys.argv[at + 1:]
    else:
        own, extra = sys.argv[1:], []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=1, help="of the compiled network")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args(own)
    rows: list[dict[str, Any]] = []
    machine = bench.machine()
    print(f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores")
    for model in a.models:
        rows.append(compile_once(model, a.samples, a.dtype, a.threads, extra))
        r = rows[-1]
        print(f"{r['model']:<16} {r['dtype']} {r['samples']} samples {r['seconds']:7.1f} s "
              f"({r['cpu_seconds']:.1f} s of CPU), peak {r['peak_mb']:.0f} MB {' '.join(extra)}", flush=True)
    if a.json:
        document = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": machine, "rows": rows}
        Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
