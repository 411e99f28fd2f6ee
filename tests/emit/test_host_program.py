"""The emitted host program: exits taken one after the other, branches inside the stages, under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emitted import gcc, needs_target, run, units
from small_networks import Net
from test_clean_code import HOST, SANITIZED, SANITIZERS, WARNINGS

from skive import build, ops
from skive.emit import cxx
from skive.exits import Exit, arrange, attach
from skive.ir import Graph, constant
from skive.lower import lower
from skive.passes import optimize
from skive.plan import Plan
from skive.targets.base import TARGETS

SAMPLES = 3

# Every exit in turn: run_exits and resume with thresholds that nothing passes up to it, then the batch.
DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "host.h"

static void* buffer(size_t bytes) {
  void* p = NULL;
  if (posix_memalign(&p, 64, bytes)) abort();
  memset(p, 0xFF, bytes);
  return p;
}

static void need(int holds, const char* what) {
  if (!holds) {
    printf("%s\\n", what);
    exit(1);
  }
}

int main(void) {
  const size_t bytes[] = {OUT_BYTES};
  const float never[] = {2, 2}, always[] = {-1, -1};
  float* x = buffer(HOST_INPUT0_BYTES * SAMPLES);
  for (int i = 0; i < (int)(HOST_INPUT0_BYTES * SAMPLES / 4); ++i) x[i] = (float)((i * 7919) % 201 - 100) / 60;
  void *whole[HOST_OUTPUT_COUNT], *out[HOST_OUTPUT_COUNT], *many[HOST_OUTPUT_COUNT];
  for (int i = 0; i < HOST_OUTPUT_COUNT; ++i) {
    whole[i] = buffer(bytes[i]), out[i] = buffer(bytes[i]), many[i] = buffer(bytes[i] * SAMPLES);
  }
  void* arena = buffer(HOST_ARENA_BYTES);
  int32_t taken[SAMPLES];
  for (int s = 0; s < SAMPLES; ++s) {
    const void* in[] = {(char*)x + s * HOST_INPUT0_BYTES};
    memset(arena, 0xFF, HOST_ARENA_BYTES);
    need(host_run(in, whole, arena) == 0, "run");
    memset(arena, 0xFF, HOST_ARENA_BYTES);
    need(host_run_exits(in, out, arena, always, taken) == 0 && taken[0] == 0, "first exit");
    need(memcmp(out[0], whole[0], bytes[0]) == 0, "result of the first exit");
    need(host_resume(in, out, arena, always, taken) == 0 && taken[0] == 1, "second exit");
    need(memcmp(out[2], whole[2], bytes[2]) == 0, "result of the second exit");
    need(host_resume(in, out, arena, never, taken) == 0 && taken[0] == 2, "the whole network");
    for (int i = 0; i < HOST_OUTPUT_COUNT; ++i) need(memcmp(out[i], whole[i], bytes[i]) == 0, "resumed");
    need(host_run_exits(in, out, arena, never, taken) == 0 && taken[0] == 2, "no exit");
    for (int i = 0; i < HOST_OUTPUT_COUNT; ++i) need(memcmp(out[i], whole[i], bytes[i]) == 0, "without exits");
  }
  const void* in[] = {x};
  need(host_run_exits_batch(in, many, arena, SAMPLES, never, taken) == 0, "batch");
  for (int i = 0; i < HOST_OUTPUT_COUNT; ++i)
    need(memcmp((char*)many[i] + (SAMPLES - 1) * bytes[i], whole[i], bytes[i]) == 0, "last of the batch");
  need(host_run_exits_batch(in, many, arena, SAMPLES, NULL, taken) == 0 && taken[SAMPLES - 1] == 0, "own thresholds");
  need(host_run_exits_batch(in, many, arena, SAMPLES + 1, NULL, taken) == HOST_ERROR_BATCH, "too many");
  for (int i = 0; i < HOST_OUTPUT_COUNT; ++i) free(whole[i]), free(out[i]), free(many[i]);
  free(x), free(arena);
  return 0;
}
"""


def network() -> Graph:
    """Two exits; between them a branch whose sides write what the last stage reads."""
    net = Net("host")
    x = net.input(1, 12)
    h = ops.make("tanh", ops.make("linear", x, net.weights(12, 12), net.weights(12)))
    first = ops.make("linear", h, net.weights(4, 12), net.weights(4))
    above = ops.make("greater", ops.make("reduce_mean", h, axes=(0, 1), keep=False), constant(np.float32(0)))
    g = ops.make("choose", above, ops.make("exp", ops.make("linear", h, net.weights(12, 12))), ops.make("sigmoid", h))
    second = ops.make("linear", ops.make("add", g, h), net.weights(4, 12), net.weights(4))
    last = ops.make("add", ops.make("linear", g, net.weights(4, 12)), first)
    return Graph("host", (x,), (first, second, last), ("a", "b", "y"), SAMPLES)


def emitted(folder: Path, target: str, threads: int = 1) -> Plan:
    graph, exits = arrange(network(), [Exit("a", "max-prob", 0.0), Exit("b", "max-prob", 0.9)])
    program = attach(graph, exits)
    optimised, _ = optimize(program.graph, check="never")
    plan = lower(optimised, TARGETS[target], threads, exits=program.exits)
    build.write_sources(folder, cxx.emit(plan, TARGETS[target]), plan.weights, plan.name)
    return plan


@pytest.mark.parametrize(("target", "threads"), [
    ("generic", 1), (HOST, 2), *(pytest.param(t, 1, marks=pytest.mark.slow) for t in TARGETS if t != "generic")])
def test_exits_in_c(target: str, threads: int, tmp_path: Path) -> None:
    needs_target(target)
    command = gcc()
    plan = emitted(tmp_path, target, threads)
    assert [len(plan.exits), len(plan.stages)] == [3, 3] and any(c.guards for c in plan.calls)
    driver = DRIVER.replace("OUT_BYTES", ", ".join(str(p.bytes) for p in plan.outputs)).replace("SAMPLES", str(SAMPLES))
    (tmp_path / "main.c").write_text(driver)
    for unit in units(tmp_path):
        run(*command, *cxx.FLAGS, *TARGETS[target].flags, *WARNINGS, *SANITIZERS, "-I.", "-c", unit, cwd=tmp_path)
    run("gcc", "-std=c99", "-D_POSIX_C_SOURCE=200809L", *WARNINGS, "-Wno-cast-qual", *SANITIZERS, "-c", "main.c",
        cwd=tmp_path)
    run("gcc", "-c", "host_weights.S", cwd=tmp_path)
    run(*command, *SANITIZERS, *(p.name for p in sorted(tmp_path.glob("*.o"))), "-pthread", "-lm", "-o", "main",
        cwd=tmp_path)
    run("./main", cwd=tmp_path, env=SANITIZED)
