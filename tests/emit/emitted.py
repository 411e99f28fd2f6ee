"""Emitted sources in a folder, compiled by a command of the test's own."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from skive import build, check
from skive.emit import cxx
from skive.ir import Graph
from skive.lower import lower
from skive.passes import optimize
from skive.pipeline import difference
from skive.plan import Plan
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What `command` prints; AssertionError with its messages if it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, errors="replace",
                          env=None if env is None else {**os.environ, **env})
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[:6000]}"
    return done.stdout


def emit(graph: Graph, folder: Path, target: str, threads: int = 1) -> Plan:
    """Optimises `graph` and writes its complete source folder."""
    optimised, _ = optimize(graph, check="never")
    plan = lower(optimised, TARGETS[target], threads)
    folder.mkdir(parents=True, exist_ok=True)
    build.write_sources(folder, cxx.emit(plan, TARGETS[target]), plan.weights, plan.name)
    return plan


def units(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.cpp"))


def gcc() -> list[str]:
    """The g++ command; skips the test where there is none."""
    if not shutil.which("g++"):
        pytest.skip("no g++ on PATH")
    return ["g++"]


def clang() -> list[str]:
    """A clang++ command, from PATH or from the ziglang package; skips the test where there is none."""
    if shutil.which("clang++"):
        return ["clang++"]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    if os.environ.get("SKIVE_CLANG"):
        return shlex.split(os.environ["SKIVE_CLANG"])
    pytest.skip("no clang: neither clang++ on PATH nor ziglang installed, and SKIVE_CLANG names none")


def cmake_or_skip() -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake on PATH")


def needs_target(target: str) -> None:
    """Skips the test where this processor cannot run code for `target`."""
    from skive import _native

    missing = set(TARGETS[target].features) - set(_native.cpu_features())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")


# Reads the inputs from files, calls the network in buffers of exactly the needed size and writes the
# outputs to files. Outputs and arena start as NaN: what is read before it is written shows.
_DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "{name}.h"

static void* buffer(size_t bytes) {{
  void* p = NULL;
  if (posix_memalign(&p, 64, bytes ? bytes : 1)) abort();
  memset(p, 0xFF, bytes);
  return p;
}}

static void transfer(const char* path, const char* mode, void* data, size_t bytes) {{
  FILE* f = fopen(path, mode);
  if (!f) abort();
  if ((*mode == 'r' ? fread(data, 1, bytes, f) : fwrite(data, 1, bytes, f)) != bytes) abort();
  fclose(f);
}}

int main(void) {{
  const size_t in_bytes[] = {{{in_bytes}}}, out_bytes[] = {{{out_bytes}}};
  const void* in[{upper}_INPUT_COUNT + 1];
  void* out[{upper}_OUTPUT_COUNT + 1];
  char path[32];
  for (int i = 0; i < {upper}_INPUT_COUNT; ++i) {{
    void* p = buffer(in_bytes[i] * {batch});
    sprintf(path, "in%d", i);
    transfer(path, "rb", p, in_bytes[i] * {batch});
    in[i] = p;
  }}
  for (int i = 0; i < {upper}_OUTPUT_COUNT; ++i) out[i] = buffer(out_bytes[i] * {batch});
  void* arena = buffer({upper}_ARENA_BYTES);
  {before}
  int error = {call};
  {after}
  if (error) {{
    printf("%s\\n", {name}_error(error));
    return 1;
  }}
  for (int i = 0; i < {upper}_OUTPUT_COUNT; ++i) {{
    sprintf(path, "out%d", i);
    transfer(path, "wb", out[i], out_bytes[i] * {batch});
    free(out[i]);
  }}
  for (int i = 0; i < {upper}_INPUT_COUNT; ++i) free((void*)in[i]);
  free(arena);
  return 0;
}}
"""


def driver(plan: Plan, batch: int = 0) -> str:
    """A C program that runs `plan`'s network on the files in0, in1, ... and writes out0, out1, ..."""
    n, upper = plan.name, plan.name.upper()
    pool = plan.threads > 1
    return _DRIVER.format(
        name=n, upper=upper, batch=batch or 1, in_bytes=", ".join([*(str(p.bytes) for p in plan.inputs), "0"]),
        out_bytes=", ".join([*(str(p.bytes) for p in plan.outputs), "0"]),
        before=f"{n}_pool_start({upper}_THREADS);" if pool else "", after=f"{n}_pool_stop();" if pool else "",
        call=f"{n}_run_batch(in, out, arena, {batch})" if batch else f"{n}_run(in, out, arena)")


def run_driver(plan: Plan, folder: Path, command: Sequence[str], inputs: Sequence[np.ndarray], *, batch: int = 0,
               env: dict[str, str] | None = None, weights_in_c: bool = True) -> list[np.ndarray]:
    """The outputs of `plan`'s network, built with the driver by `command` (compiler and flags).

    `weights_in_c`: as an array of exactly their size, around which AddressSanitizer sees.
    """
    (folder / "driver.c").write_text(driver(plan, batch))
    weights = f"{plan.name}_weights.S"
    if weights_in_c:
        weights = "packed.c"
        numbers = ",".join(map(str, plan.weights)) or "0"
        declared = f"const unsigned char {plan.name}_weights[] __attribute__((aligned(64)))"
        (folder / weights).write_text(f"{declared} = {{{numbers}}};\n")
    for i, a in enumerate(inputs):
        (folder / f"in{i}").write_bytes(np.ascontiguousarray(a).tobytes())
    target = TARGETS[plan.isa]
    objects = []
    for unit in [*units(folder), "driver.c", weights]:
        objects.append(f"{unit}.o")
        c = unit.endswith(".c")
        flags = ["-x", "c", "-std=c99", "-D_POSIX_C_SOURCE=200809L"] if c else [
            f for f in (*cxx.FLAGS, *target.flags) if f != "-O2"] if unit.endswith(".cpp") else []
        run(*command, *flags, "-I.", "-c", unit, "-o", objects[-1], cwd=folder)
    run(*command, *objects, *(["-pthread"] if plan.threads > 1 else []), "-lm", "-o", "driver", cwd=folder)
    run("./driver", cwd=folder, env=env)
    results = []
    for i, p in enumerate(plan.outputs):
        shape = (p.shape[0] * batch, *p.shape[1:]) if batch else p.shape
        results.append(np.frombuffer((folder / f"out{i}").read_bytes(), p.dtype).reshape(shape))
    return results


def agrees(graph: Graph, inputs: Sequence[np.ndarray], got: Sequence[np.ndarray], tolerance: float = 1e-4) -> None:
    """Asserts that `got` are the outputs of the reference, to a fraction of their range.

    Where a float32 function stands before a quantizer, single values may be rounded the other way.
    """
    want = evaluate_graph(graph, inputs)
    if check.exactness(graph).flips and check.rounds_alike(list(zip(got, want, strict=True))):
        return
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert difference(g, w) <= tolerance, f"{graph.name}: output {graph.output_names[i]}"
