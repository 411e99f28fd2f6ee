"""What a compiled model costs besides its run time: compile time, load time, memory, size, the call.

    python benchmarks/footprint.py MODEL.onnx ... [--threads 1] [--input NAME=1x3x32x32 ...] [--json FILE]

Per model, each in a fresh process with an empty cache where that matters:

    cold s      compile with an empty cache, verification included
    cached s    compile again, unchanged
    load ms     from `skive.load` to the first result, in a process that has imported skive
    resident MB memory beyond the interpreter with numpy and skive, and beyond the weights
    library KB  the shared library with its weights, and what it is linked to
    call us     a call of the module from Python beyond the C function alone
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare import models_in, open_batches, shape

_CALLS = 2000  # of the smallest model; a large one is called for about a second


def resident_mb() -> float:
    """Memory of this process that is in RAM and its own or read from files, in 2^20 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def first_result(folder: str) -> dict[str, float]:
    """Load time and memory of an artefact; to be called once, in a process of its own."""
    from skive.profiling import sample_arrays
    from skive.runtime import load

    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    weights = (Path(folder) / f"{manifest['name']}_weights.bin").stat().st_size / 2**20
    before = resident_mb()
    start = time.perf_counter()
    module = load(folder)
    loaded = time.perf_counter()
    inputs = sample_arrays(module.inputs)
    ready = time.perf_counter()
    module(*inputs)
    end = time.perf_counter()
    # Making up inputs is no part of loading.
    return {"load_ms": (end - ready + loaded - start) * 1e3, "resident_mb": resident_mb() - before - weights}


def call_overhead_us(folder: str) -> float:
    """Median of a call from Python minus the median of the C function, taken in turns.

    The C function is called through ctypes, whose own cost (that of a call that is refused) is
    subtracted. Below the noise of the machine for models of many milliseconds.
    """
    from skive.profiling import aligned_bytes, sample_arrays
    from skive.runtime import load

    module = load(folder)
    name = module.manifest["name"]
    inputs = sample_arrays(module.inputs)
    first = module(*inputs)
    outputs = list(first) if isinstance(first, tuple) else [first]
    run = ctypes.CDLL(str((Path(folder) / f"lib{name}.so").resolve()))[f"{name}_run"]
    pointers = [(ctypes.c_void_p * max(1, len(a)))(*(x.ctypes.data for x in a)) for a in (inputs, outputs)]
    memory = aligned_bytes(module.manifest["arena_bytes"])
    arena = ctypes.c_void_p(memory.ctypes.data)
    clock = time.perf_counter_ns
    start = clock()
    module(*inputs)
    calls = int(np.clip(1e9 / max(1, clock() - start), 20, _CALLS))
    times = np.empty((calls, 3))
    for i in range(calls):
        start = clock()
        module(*inputs)
        middle = clock()
        run(*pointers, arena)
        end = clock()
        run(None, None, None)
        times[i] = middle - start, end - middle, clock() - end
    python, native, refused = np.median(times, axis=0)
    return float(python - (native - refused)) / 1e3


def in_process(*arguments: str, cache: str) -> dict[str, Any]:
    """The JSON that this script prints for `arguments` in a fresh process."""
    result = subprocess.run([sys.executable, __file__, *arguments], text=True, capture_output=True,
                            env={**os.environ, "SKIVE_CACHE": cache})
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no message")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def compile_seconds(path: str, folder: str, threads: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """How long `skive.compile` takes, imports of the compiler included."""
    start = time.perf_counter()
    import skive

    skive.compile(path, output=folder, threads=threads, input_shapes=shapes)
    return {"seconds": time.perf_counter() - start}


def footprint(path: Path, threads: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        artefact, cache = str(Path(folder) / "artefact"), str(Path(folder) / "cache")
        request = json.dumps([str(path), artefact, threads, {k: list(v) for k, v in shapes.items()}])
        cold = in_process("--compile", request, cache=cache)["seconds"]
        cached = in_process("--compile", request, cache=cache)["seconds"]
        loads = [in_process("--load", artefact, cache=cache) for _ in range(5)]
        (library,) = Path(artefact).glob("*.so")
        linked = subprocess.run(["ldd", str(library)], text=True, capture_output=True).stdout
        return {"model": path.stem, "cold_s": cold, "cached_s": cached,
                "load_ms": float(np.median([x["load_ms"] for x in loads])),
                "resident_mb": float(np.median([x["resident_mb"] for x in loads])),
                "library_bytes": library.stat().st_size,
                "linked": [row.split()[0] for row in linked.splitlines() if ".so" in row and "ld-linux" not in row
                           and "vdso" not in row],
                "call_overhead_us": in_process("--call", artefact, cache=cache)["us"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--input", type=shape, action="append", default=[])
    parser.add_argument("--json", metavar="FILE")
    for role in ("--compile", "--load", "--call"):
        parser.add_argument(role, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.compile:
        print(json.dumps(compile_seconds(*json.loads(a.compile))))
        return 0
    if a.load:
        print(json.dumps(first_result(a.load)))
        return 0
    if a.call:
        print(json.dumps({"us": call_overhead_us(a.call)}))
        return 0
    rows, failed = [], 0
    print(f"{'model':<24}{'cold s':>9}{'cached s':>10}{'load ms':>9}{'resident MB':>13}{'library KB':>12}"
          f"{'call us':>9}")
    for path in models_in(a.models):
        try:
            r = footprint(path, a.threads, open_batches(path) | dict(a.input))
        except RuntimeError as e:
            failed += 1
            print(f"{path.stem:<24} failed: {e}")
            continue
        rows.append(r)
        print(f"{r['model']:<24}{r['cold_s']:>9.1f}{r['cached_s']:>10.2f}{r['load_ms']:>9.2f}{r['resident_mb']:>13.1f}"
              f"{r['library_bytes'] / 1024:>12.0f}{r['call_overhead_us']:>9.2f}  {' '.join(r['linked'])}", flush=True)
    if a.json:
        Path(a.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
