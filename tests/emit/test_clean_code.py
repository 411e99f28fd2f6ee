"""Emitted code: no warning from either compiler, no finding of the sanitizers, for every kernel there is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emitted import agrees, clang, emit, gcc, needs_target, run, run_driver, units
from small_networks import FIXED_POINT, NETWORKS, Net

from skive import _native, check, kernels, lower, ops, tuning
from skive.emit import cxx
from skive.explanation import conversions
from skive.ir import Graph
from skive.lower import abilities
from skive.targets.base import TARGETS, resolve

HOST = resolve("host", _native.cpu_features()).name
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
# A function pointer of the pool is cast on purpose; leaks are looked for too.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1")
# Use after return is not looked for: g++ before 13.3 then aligns vectors of 64 bytes to 32 only (GCC bug 110027).
SANITIZED = {"ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def test_the_networks_use_every_kernel() -> None:
    """Kernels are the class templates of the headers whose names stand in compiler/lower or tuning.py."""
    files = [*Path(lower.__file__).parent.glob("*.py"), Path(tuning.__file__)]
    text = "".join(f.read_text() for f in files)
    defined = {name for h in (kernels.include_dir() / "skive").glob("*.h")
               for name in re.findall(r"^struct ([a-z]\w+)", h.read_text(), re.MULTILINE)}
    named = {k for k in defined if f'"{k}"' in text} | {"map", "vmap", "map_to", "vmap_to"}
    calls = [c for make in NETWORKS.values() for c in lower.lower(make(), TARGETS["avx512vnni"]).calls]
    used = {c.kernel for c in calls}
    assert len(named) > 30 and used <= named
    assert sorted(named - used) == []
    # Contractions and pools once more for each integer type that has packed weights.
    integers = {(c.kernel, a.ctype) for c in calls for a in c.args if a.name == "x"}
    kernels_of = ("conv2d", "grouped_conv2d", "depthwise2d", "conv_transpose2d", "max_pool2d", "sum_pool2d",
                  "sparse_conv2d")
    wanted = {(k, t.ctype) for k in kernels_of for t in abilities.INTEGER_PACKING}
    assert len(wanted) >= 12 and sorted(wanted - integers) == []


@pytest.mark.parametrize("name", FIXED_POINT)
def test_the_networks_in_fixed_point_are(name: str) -> None:
    """What they are made for: arithmetic on integers, and float32 only where it is meant."""
    graph = FIXED_POINT[name]()
    products = [n for n in graph.nodes if ops.macs(n)]
    assert products and not any(n.dtype.is_float and n.inputs[0].dtype.is_float for n in products)
    assert bool(conversions(graph)["islands"]) == name.startswith("islands")
    sums = {n.inputs[0].dtype.value for n in products}
    assert sums == {"u8" if name.endswith("int8") else "i16"}


@pytest.mark.parametrize(("compiler", "target"), [
    *((gcc, t) for t in TARGETS), (clang, HOST),
    *(pytest.param(clang, t, marks=pytest.mark.slow) for t in TARGETS if t != HOST)])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_warnings(compiler: object, name: str, target: str, tmp_path: Path) -> None:
    command = compiler()  # type: ignore[operator]
    emit(NETWORKS[name](), tmp_path, target)
    for unit in units(tmp_path):
        run(*command, *cxx.FLAGS, "-O0", *TARGETS[target].flags, *WARNINGS, "-I.", "-c", unit, "-o", "unit.o",
            cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("compiler", [gcc, clang])
def test_no_warnings_of_the_optimiser(compiler: object, name: str, target: str, threads: int, tmp_path: Path) -> None:
    """Such as that a value may be used uninitialised: found while code is made."""
    command = compiler()  # type: ignore[operator]
    emit(NETWORKS[name](), tmp_path, target, threads)
    for unit in units(tmp_path):
        run(*command, *cxx.FLAGS, *TARGETS[target].flags, *WARNINGS, "-I.", "-c", unit, "-o", "unit.o", cwd=tmp_path)


def sanitized(graph: Graph, folder: Path, target: str, threads: int = 1, batch: int = 0,
              weights_in_c: bool = True) -> None:
    needs_target(target)
    command = gcc()
    plan = emit(graph, folder, target, threads)
    samples = [check.sample_inputs(graph, seed) for seed in range(max(1, batch))]
    inputs = [np.concatenate(parts) for parts in zip(*samples, strict=True)] if batch else samples[0]
    got = run_driver(plan, folder, [*command, *SANITIZERS], inputs, batch=batch, env=SANITIZED,
                     weights_in_c=weights_in_c)
    for i, sample in enumerate(samples):
        tolerance = check.TOLERANCE if weights_in_c else check.allowed_difference(graph, sample)
        agrees(graph, sample, [g[i:i + 1] for g in got] if batch else got, tolerance)


# `keywords` is next, as a batch; the loops of 16 bits are those of 8 bits, and take twice as long to compile.
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n.endswith("int16") else [])
                                  for n in NETWORKS if n != "keywords"])
def test_sanitizers_find_nothing(name: str, tmp_path: Path) -> None:
    sanitized(NETWORKS[name](), tmp_path, HOST)


@pytest.mark.parametrize("threads", [1, 2])
def test_sanitizers_find_nothing_in_a_batch(threads: int, tmp_path: Path) -> None:
    graph = NETWORKS["keywords"]()
    sanitized(replace(graph, batch_max=4), tmp_path, HOST, threads, batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_sanitizers_find_nothing_in_any_variant(name: str, target: str, threads: int, tmp_path: Path) -> None:
    sanitized(NETWORKS[name](), tmp_path, target, threads)


def test_the_sanitizers_would_see_a_short_buffer(tmp_path: Path) -> None:
    """The check itself: an arena that is 64 bytes too small must be reported."""
    net = Net("short")
    net.output(ops.make("softmax", ops.make("cumsum", net.input(4, 16), axis=1)))
    graph = net.graph()
    plan = emit(graph, tmp_path, "generic")
    assert plan.arena_bytes == 4 * 4 * 16
    header = tmp_path / f"{plan.name}.h"
    told = f"_ARENA_BYTES {plan.arena_bytes}\n"
    assert told in header.read_text()
    header.write_text(header.read_text().replace(told, f"_ARENA_BYTES {plan.arena_bytes - 64}\n"))
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        run_driver(plan, tmp_path, [*gcc(), *SANITIZERS], check.sample_inputs(graph), env=SANITIZED)
