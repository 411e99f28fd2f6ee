"""What a compiled model costs besides its run time: compile time, load time, memory, size, the call.

    python benchmarks/footprint.py MODEL.onnx ... [--threads 1] [--input NAME=1x3x32x32 ...] [--json FILE]

Per model, each in a fresh process with an empty cache where that matters:

    cold s      compile with an empty cache, verification included
    cached s    compile again, unchanged
    load ms     from `skive.load` to the first result, in a process that has imported skive
    resident MB memory beyond the interpreter with numpy and skive, and beyond the weights
    C ms, C MB  the same of a C program that opens the library (needs a C compiler)
    library KB  the shared library with its weights, and what it is linked to
    call us     a call of the module from Python beyond the C function alone
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
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
    np.random.default_rng(0).standard_normal(1)  # numpy.random is loaded on first use: no part of the artefact's memory
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


_C_PROGRAM = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "{name}.h"

static double now_ms(void) {{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}}

static double resident_mb(void) {{
  long size = 0, resident = 0;
  FILE* f = fopen("/proc/self/statm", "r");
  if (!f || fscanf(f, "%ld %ld", &size, &resident) != 2) exit(2);
  fclose(f);
  return (double)resident * (double)sysconf(_SC_PAGESIZE) / 1048576.0;
}}

static void* buffer(size_t bytes) {{
  void* p = NULL;
  if (posix_memalign(&p, 64, bytes + 64)) exit(2);
  return memset(p, 0, bytes);
}}

int main(void) {{
  const size_t in_bytes[] = {{{in_bytes}}}, out_bytes[] = {{{out_bytes}}};
  const void* in[{upper}_INPUT_COUNT + 1];
  void* out[{upper}_OUTPUT_COUNT + 1];
  const double before = resident_mb(), start = now_ms();
  void* library = dlopen("./lib{name}.so", RTLD_NOW);
  if (!library) exit(2);
  int (*run)(const void* const*, void* const*, void*);
  *(void**)&run = dlsym(library, "{name}_run");
  const double loaded = now_ms();
  for (int i = 0; i < {upper}_INPUT_COUNT; ++i) in[i] = buffer(in_bytes[i]);
  const double ready = now_ms();
  for (int i = 0; i < {upper}_OUTPUT_COUNT; ++i) out[i] = buffer(out_bytes[i]);
  if (run(in, out, buffer({upper}_ARENA_BYTES))) exit(3);
  const double end = now_ms();
  printf("{{\"load_ms\": %.6f, \"resident_mb\": %.6f}}\n", end - ready + loaded - start, resident_mb() - before);
  return 0;
}}
"""


def first_result_in_c(folder: Path, scratch: Path) -> dict[str, float] | None:
    """What `first_result` gives, of a C program; medians of five runs. None if it cannot be built."""
    manifest = json.loads((folder / "manifest.json").read_text())
    name, compiler = manifest["name"], shutil.which("cc")
    if compiler is None:
        return None

    def macros(kind: str, ports: str) -> str:
        return ", ".join([*(f"{name.upper()}_{kind}{i}_BYTES" for i in range(len(manifest[ports]))), "0"])

    (scratch / "first.c").write_text(_C_PROGRAM.format(
        name=name, upper=name.upper(), in_bytes=macros("INPUT", "inputs"), out_bytes=macros("OUTPUT", "outputs")))
    subprocess.run([compiler, "-O1", "-D_GNU_SOURCE", f"-I{folder}", str(scratch / "first.c"), "-ldl", "-o",
                    str(scratch / "first")], check=True)
    weights = (folder / f"{name}_weights.bin").stat().st_size / 2**20
    runs = [json.loads(subprocess.run([str(scratch / "first")], cwd=folder, check=True, capture_output=True).stdout)
            for _ in range(5)]
    return {"load_ms": float(np.median([r["load_ms"] for r in runs])),
            "resident_mb": float(np.median([r["resident_mb"] for r in runs])) - weights}


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
        c = first_result_in_c(Path(artefact), Path(folder))
        linked = subprocess.run(["ldd", str(library)], text=True, capture_output=True).stdout
        return {"model": path.stem, "cold_s": cold, "cached_s": cached,
                "load_ms": float(np.median([x["load_ms"] for x in loads])),
                "resident_mb": float(np.median([x["resident_mb"] for x in loads])),
                "c": c, "library_bytes": library.stat().st_size,
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
    print(f"{'model':<24}{'cold s':>9}{'cached s':>10}{'load ms':>9}{'resident MB':>13}{'C ms':>8}{'C MB':>7}"
          f"{'library KB':>12}{'call us':>9}")
    for path in models_in(a.models):
        try:
            r = footprint(path, a.threads, open_batches(path) | dict(a.input))
        except RuntimeError as e:
            failed += 1
            print(f"{path.stem:<24} failed: {e}")
            continue
        rows.append(r)
        c = f"{r['c']['load_ms']:>8.2f}{r['c']['resident_mb']:>7.1f}" if r["c"] else f"{'-':>8}{'-':>7}"
        print(f"{r['model']:<24}{r['cold_s']:>9.1f}{r['cached_s']:>10.2f}{r['load_ms']:>9.2f}{r['resident_mb']:>13.1f}"
              f"{c}{r['library_bytes'] / 1024:>12.0f}{r['call_overhead_us']:>9.2f}  {' '.join(r['linked'])}",
              flush=True)
    if a.json:
        Path(a.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
