"""The place to write, the compiler and the user's Ctrl-C fail: one line, exit status 1, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

COMMAND = [sys.executable, "-c", "from skive.cli import main; main()"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `net.onnx`, whose weights take 256 KiB, and a folder for temporary files."""
    weight = numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])], [weight])  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "net.onnx")
    (tmp_path / "temporary").mkdir()
    return tmp_path


def environment(place: Path, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "CXX"}
    return {**kept, "SKIVE_CACHE": str(place / "cache"), "TMPDIR": str(place / "temporary"), **changes}


def run(
    place: Path, output: object = "out", prepare: Callable[[], None] | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "compile", "net.onnx", "-o", str(output)], cwd=place, capture_output=True, text=True, timeout=120,
        env=environment(place, **changes), preexec_fn=prepare)  # fmt: skip


def check_refused(r: subprocess.CompletedProcess[str], says: str, place: Path) -> None:
    """One line that says it, status 1, and in `place` nothing but what was there and the cache."""
    assert (r.returncode, r.stdout) == (1, ""), r.stderr
    (line,) = r.stderr.splitlines()
    assert line.startswith("error: ") and says in line and "internal" not in line, line
    left_over(place)


def left_over(place: Path) -> None:
    known = {"net.onnx", "temporary", "cache", "bin", "file", "full", "taken"}
    assert {p.name for p in place.iterdir()} <= known
    assert not list((place / "temporary").iterdir())


def test_output_below_a_file(place: Path) -> None:
    (place / "file").write_text("")
    check_refused(run(place, "file/out"), "cannot write file/out", place)


def test_output_is_a_file(place: Path) -> None:
    (place / "file").write_text("kept")
    check_refused(run(place, "file"), "file exists and is not a folder", place)
    assert (place / "file").read_text() == "kept"


def test_output_folder_holds_something_else(place: Path) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").write_text("kept")
    check_refused(run(place, "taken"), "not an artefact", place)
    assert (place / "taken" / "thesis.tex").read_text() == "kept"


def test_read_only_place(place: Path) -> None:
    """/proc takes no folder from anyone, not even from root, whom permissions do not stop."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    check_refused(run(place, "/proc/skive-out"), "cannot write /proc/skive-out", place)


def test_read_only_folder(place: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not stop root")
    (place / "taken").mkdir(mode=0o500)
    check_refused(run(place, "taken/out"), "cannot write taken/out", place)


def test_files_may_not_grow(place: Path) -> None:
    """The weights do not fit under the file size limit: the same error as of a full disk, mid-write."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    check_refused(run(place, prepare=limit), "cannot write out", place)


@pytest.fixture
def full(place: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = place / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(place: Path, full: Path) -> None:
    check_refused(run(place, full / "out"), "No space left", place)
    assert not list(full.iterdir())


# ----------------------------------------------------------------------------------------- compilers


def script(place: Path, text: str) -> str:
    """The path of an executable shell script."""
    (place / "bin").mkdir(exist_ok=True)
    path = place / "bin" / "fake-c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_on_path(place: Path) -> None:
    try:
        import ziglang  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        (place / "bin").mkdir()
        check_refused(run(place, PATH=str(place / "bin")), "no C++ compiler on PATH", place)
    else:
        pytest.skip("ziglang is installed, and is a C++ compiler that needs no PATH")


def test_named_compiler_is_missing(place: Path) -> None:
    check_refused(run(place, CXX="no-such-compiler -m64"), "CXX names 'no-such-compiler'", place)


def test_compiler_does_not_run(place: Path) -> None:
    check_refused(run(place, CXX=script(place, "exit 3")), "--version failed", place)


def test_compiler_rejects_the_source(place: Path) -> None:
    fake = script(place, 'case "$*" in *--version*) echo fake 1.0;; *) echo "x.cpp:1: error: no" >&2; exit 1;; esac')
    check_refused(run(place, CXX=fake), "x.cpp:1: error: no", place)


def test_compiler_dies(place: Path) -> None:
    fake = script(place, 'case "$*" in *--version*) echo fake 1.0;; *) kill -9 $$;; esac')
    check_refused(run(place, CXX=fake), "failed", place)


def test_compiler_writes_nothing(place: Path) -> None:
    check_refused(run(place, CXX=script(place, "echo fake 1.0")), "error: ", place)


# ----------------------------------------------------------------------------------------- interrupts


def group(pgid: int) -> list[int]:
    """The processes of a process group, but for zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(pgrp) == pgid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(("sign", "to_all"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)],
                         ids=["ctrl-c", "interrupt", "terminate"])  # fmt: skip
def test_interrupted_build(place: Path, sign: signal.Signals, to_all: bool) -> None:
    """A signal while the compiler runs, to the command alone or (as a terminal does) to its process group."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc")
    started = place / "bin" / "started"
    fake = script(place, f'case "$*" in *--version*) echo fake 1.0;; *) touch {started}; sleep 300;; esac')
    process = subprocess.Popen(
        [*COMMAND, "compile", "net.onnx", "-o", "out"], cwd=place, env=environment(place, CXX=fake), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        assert wait_for(started.exists, 60)
        assert wait_for(lambda: len(group(process.pid)) >= 3, 10)  # the command, the compiler, its sleep
        if to_all:
            os.killpg(process.pid, sign)
        else:
            os.kill(process.pid, sign)
        out, err = process.communicate(timeout=120)
        assert wait_for(lambda: not group(process.pid), 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err) == (1, "", "error: interrupted\n")
    left_over(place)
