"""The thread pool of an artefact: exact under plain, sanitized and one-processor execution."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent.parent / "kernels" / "include"
FLAGS = ["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread", f"-I{INCLUDE}"]


def build(folder: Path, *flags: str) -> Path:
    """The test program, compiled with the user's `c++`; skips if a sanitizer is not installed."""
    program = folder / "threads"
    command = ["c++", *FLAGS, *flags, str(HERE / "threads.cpp"), "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 and "cannot find" in result.stderr:
        pytest.skip(f"the compiler has no library for {' '.join(flags)}")
    assert result.returncode == 0, result.stderr
    return program


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", ["", "thread", "address,undefined"])
def test_each_part_runs_once_and_results_do_not_depend_on_threads(tmp_path: Path, sanitizer: str) -> None:
    program = build(tmp_path, *([f"-fsanitize={sanitizer}"] if sanitizer else []))
    for _ in range(3):
        run([str(program), "check"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_more_threads_than_processors(tmp_path: Path) -> None:
    program = build(tmp_path)
    run(["taskset", "-c", str(min(os.sched_getaffinity(0))), str(program), "check"])


def test_links_nothing_beyond_the_c_library(tmp_path: Path) -> None:
    program = build(tmp_path)
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[0].split("/")[-1] for line in listing.splitlines()}
    allowed = ("linux-vdso", "libc.", "libm.", "libpthread.", "ld-linux")
    assert all(name.startswith(allowed) for name in libraries), listing
