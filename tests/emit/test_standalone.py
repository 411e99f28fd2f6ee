"""What leaves the machine: the artefact builds alone, links nothing but libc and libm, asks the processor first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emitted import agrees, cmake_or_skip, driver, emit, needs_target, run
from small_networks import NETWORKS

import skive
from skive import check, kernels
from skive.emit import cxx
from skive.errors import TargetError
from skive.targets.base import TARGETS

BARE = {"PYTHONPATH": "", "SKIVE_CACHE": "/nonexistent"}


def linked(library: Path) -> set[str]:
    """The libraries that a shared object or program names as needed."""
    return set(re.findall(r"\(NEEDED\).*\[(.*?)\]", run("readelf", "-d", library.name, cwd=library.parent)))


def cmake_build(source: Path, build: Path, *options: str) -> None:
    cmake_or_skip()
    run("cmake", "-S", source, "-B", build, *options, cwd=source.parent, env=BARE)
    run("cmake", "--build", build, cwd=source.parent, env=BARE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["shared", "static"])
def test_cmake_builds_the_folder_alone(kind: str, threads: int, tmp_path: Path) -> None:
    """A C99 program links what it built and computes what the reference does."""
    graph = replace(NETWORKS["pools"](), name="alone")
    source, build = tmp_path / "a place" / "alone", tmp_path / "build"
    plan = emit(graph, source, "generic", threads)
    cmake_build(source, build, "-DCMAKE_BUILD_TYPE=Release", f"-DBUILD_SHARED_LIBS={kind == 'shared'}")
    library = build / ("libalone.so" if kind == "shared" else "libalone.a")
    assert library.exists()
    inputs = check.sample_inputs(graph)
    (build / "main.c").write_text(driver(plan))
    for i, a in enumerate(inputs):
        (build / f"in{i}").write_bytes(a.tobytes())
    run("cc", "-std=c99", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-cast-qual",
        "main.c", f"-I{source}", "-L.", "-lalone", "-lm", *(["-pthread"] if threads > 1 else []), "-Wl,-rpath,.",
        "-o", "main", cwd=build)
    run("./main", cwd=build, env=BARE)
    agrees(graph, inputs, [np.frombuffer((build / f"out{i}").read_bytes(), p.dtype).reshape(p.shape)
                           for i, p in enumerate(plan.outputs)])
    allowed = {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert linked(build / "main") <= allowed | {"libalone.so"}
    if kind == "shared":
        assert linked(library) <= allowed


@pytest.mark.parametrize("threads", [1, 2])
def test_the_library_needs_only_libc_and_libm(threads: int, tmp_path: Path) -> None:
    module = skive.compile(NETWORKS["pools"](), output=tmp_path / "a", threads=threads, verify=False)
    library = module.folder / "libpools.so"
    assert linked(library) <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    undefined = run("nm", "-D", "--undefined-only", library.name, cwd=library.parent).split()
    assert not any(s.startswith(("_Z", "__cxa_throw", "__gxx")) for s in undefined)  # nothing of the C++ runtime
    segments = run("readelf", "-lW", library.name, cwd=library.parent)
    assert re.search(r"GNU_STACK.* RW +0x", segments)  # no executable stack


def functions(text: str) -> dict[str, list[str]]:
    """Function name -> instructions, of the output of `objdump -d`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if (head := re.match(r"[0-9a-f]+ <(.*)>:$", line)) is not None:
            found[head[1]] = current = []
        elif "\t" in line:
            current.append(line.split("\t")[-1])
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", ["avx512", "avx2"])
def test_the_entry_runs_on_any_processor(target: str, threads: int, tmp_path: Path) -> None:
    """What runs before the processor was asked has no instruction that it may lack."""
    graph = replace(NETWORKS["pools"](), batch_max=4)
    plan = emit(graph, tmp_path, target, threads)
    for unit in sorted(p.name for p in tmp_path.glob("*.cpp")):
        run("c++", *cxx.FLAGS, *TARGETS[target].flags, "-I.", "-c", unit, "-o", f"{unit}.o", cwd=tmp_path)
    code = functions(run("objdump", "-d", "--no-show-raw-insn", f"{plan.name}.cpp.o", cwd=tmp_path))
    entries = {n: body for n, body in code.items() if n.startswith(f"{plan.name}_") or re.search("check|[cC]pu", n)}
    assert {f"{plan.name}_{f}" for f in ("run", "run_batch", "run_layer", "cpu_supported", "error")} <= set(entries)
    for name, body in entries.items():
        wide = [i for i in body if re.search(r"%[yz]mm|%k[0-7]\b|^v", i) and not i.startswith("verr")]
        assert wide == [], name
    assert any("%zmm" in i or "%ymm" in i for body in code.values() for i in body)  # the kernels do


def test_a_processor_without_the_features_is_refused(tmp_path: Path) -> None:
    module = skive.compile(NETWORKS["pools"](), output=tmp_path / "a", verify=False)
    manifest = json.loads((module.folder / "manifest.json").read_text())
    manifest["isa"] = [*manifest["isa"], "avx4096f"]
    (module.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match="avx4096f"):
        skive.load(module.folder)


def test_the_header_is_plain_c_and_says_all(tmp_path: Path) -> None:
    """Self-contained for C90 and C++, without a warning; what a caller fills in needs no other file."""
    plan = emit(replace(NETWORKS["integer_pools_int8"](), name="net"), tmp_path, "generic")
    ports = (replace(plan.inputs[0], name="x */ y /*", dtype="uint8", scale=0.25, zero=3), *plan.inputs[1:])
    header = cxx.emit(replace(plan, inputs=ports), TARGETS["generic"]).files["net.h"]
    shape = ",".join(map(str, ports[0].shape))
    assert f"/* input 0: x ?/ y /? uint8[{shape}], real = 0.25 * (integer - 3) */" in header
    assert "#define NET_INPUT0_SCALE 0.25f\n#define NET_INPUT0_ZERO 3\n" in header
    assert f"Memory: {(tmp_path / 'net_weights.bin').stat().st_size} bytes of constant weights" in header
    (tmp_path / "net.h").write_text(header)
    warnings = ("-Wall", "-Wextra", "-pedantic", "-Wundef", "-Wstrict-prototypes", "-Werror", "-fsyntax-only")
    for command in (("cc", "-std=c90", *warnings), ("cc", "-std=c11", *warnings)):
        (tmp_path / "use.c").write_text('#include "net.h"\n#include "net.h"\nfloat scale = NET_INPUT0_SCALE;\n')
        run(*command, "use.c", cwd=tmp_path)
    run("c++", "-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", "-x", "c++", "use.c",
        cwd=tmp_path)


def symbols(objects: Sequence[Path]) -> set[str]:
    """The symbols that these objects define for others to see."""
    text = run("nm", "--defined-only", "--extern-only", *(o.name for o in objects), cwd=objects[0].parent)
    return {line.split()[2] for line in text.splitlines() if len(line.split()) == 3}


def test_two_targets_in_one_library_share_no_kernel(tmp_path: Path) -> None:
    """Templates of one name compiled for two instruction sets would be merged by the linker into either."""
    needs_target("avx2")
    graph = NETWORKS["transformer"]()
    built: dict[str, list[Path]] = {}
    for target in ("avx2", "generic"):
        folder = tmp_path / target
        plan = emit(replace(graph, name=f"net_{target}"), folder, target)
        for unit in sorted(p.name for p in folder.glob("*.cpp")):
            run("c++", *cxx.FLAGS, "-O1", *TARGETS[target].flags, "-I.", "-c", unit, "-o", f"{unit}.o", cwd=folder)
        run("c++", "-c", f"{plan.name}_weights.S", "-o", "weights.o", cwd=folder)
        built[target] = sorted(folder.glob("*.o"))
    kernels = {t: {s for s in symbols(objects) if "skive" in s} for t, objects in built.items()}
    assert len(kernels["avx2"]) > 10 and len(kernels["generic"]) > 10
    assert symbols(built["avx2"]) & symbols(built["generic"]) == set()


def test_two_versions_of_the_headers_share_no_kernel(tmp_path: Path) -> None:
    """Networks that were compiled a year apart may meet in one program: their kernels have names of their own."""
    emit(NETWORKS["transformer"](), tmp_path, "generic")
    units = [f.read_text() for f in sorted(tmp_path.glob("*.cpp"))]
    assert len(units) > 2
    for text in units:
        before, _ = text.split('#include "skive/', 1)
        assert f"#define SKIVE_HEADERS v{kernels.headers_hash()[:12]}\n" in before
    found = []
    for version in ("v1", "v2"):
        (tmp_path / "unit.cpp").write_text(
            f'#define SKIVE_TARGET_GENERIC\n#define SKIVE_HEADERS {version}\n#include "skive/isa.h"\n'
            "namespace skive { inline namespace SKIVE_ISA { int kernel() { return 1; } } }\n")
        run("c++", "-std=c++17", "-I.", "-c", "unit.cpp", "-o", f"{version}.o", cwd=tmp_path)
        found.append(symbols([tmp_path / f"{version}.o"]))
    assert len(found[0]) == len(found[1]) == 1 and found[0] != found[1]
