"""The shipped example from model to Python call and to a C program that links the artefact."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import skive

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "keyword_spotting"
SILENT_FRAMES = np.zeros((1, 1, 49, 10), np.float32)  # what the C program of docs/artefact.md puts in


def compile_example(folder: Path, **options: object) -> skive.Module:
    return skive.compile(EXAMPLE / "kws_dscnn.onnx", example_inputs=(SILENT_FRAMES,), output=folder,
                         name="kws", **options)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "kws"
    compile_example(folder)
    return folder


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_demo_reaches_the_accuracy_of_the_model(tmp_path: Path) -> None:
    out = run(sys.executable, EXAMPLE / "run.py", "--output", tmp_path / "kws", cwd=tmp_path)
    accuracy = re.search(r"accuracy\W+([\d.]+) %", out)
    assert accuracy is not None and float(accuracy[1]) == 90.50, out
    assert re.search(r"verified\W+passed", out), out
    assert (tmp_path / "kws" / "report.html").stat().st_size > 0
    rates = re.search(r"not in calibration\W+([\d.]+) %\W+([\d.]+) %", out)
    assert rates is not None and float(rates[1]) == 89.80 and float(rates[2]) >= 89.30, out
    libraries = [(tmp_path / folder / "libkws.so").stat().st_size for folder in ("kws", "kws_int8")]
    assert libraries[1] < 0.7 * libraries[0]


def test_the_library_is_small_and_links_only_the_c_library(artefact: Path) -> None:
    library = artefact / "libkws.so"
    assert library.stat().st_size <= 200 * 1024
    names = {line.split()[0].split("/")[-1] for line in run("ldd", library, cwd=artefact).splitlines()}
    assert all(name.startswith(("linux-vdso", "libc.", "libm.", "ld-linux", "statically"))
               for name in names), names


def test_running_it_loads_neither_onnx_nor_torch(artefact: Path) -> None:
    code = ("import json, sys, numpy as np, skive\n"
            f"y = skive.load({str(artefact)!r})(np.zeros((1, 1, 49, 10), np.float32))\n"
            "heavy = {'onnx', 'torch', 'onnxruntime', 'openvino', 'google.protobuf', 'rich', 'jinja2'}\n"
            "print(json.dumps([list(y.shape), sorted(heavy & set(sys.modules))]))")
    # Not from inside the artefact: its folder of headers is called skive too.
    assert json.loads(run(sys.executable, "-c", code, cwd=artefact.parent)) == [[1, 12], []]


def c_program() -> str:
    """The C program that docs/artefact.md shows."""
    (program,) = re.findall(r"```c\n(#include <stdio.h>.*?)```", (ROOT / "docs" / "artefact.md").read_text(),
                            re.DOTALL)
    return program


@pytest.mark.parametrize("kind", ["shipped", "built static"])
def test_a_c_program_links_the_artefact(artefact: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "main.c").write_text(c_program())
    folder = artefact
    if kind == "built static":
        folder = tmp_path / "build"
        run("cmake", "-S", artefact, "-B", folder, "-DBUILD_SHARED_LIBS=OFF", cwd=tmp_path)
        run("cmake", "--build", folder, cwd=tmp_path)
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "main.c", f"-I{artefact}", f"-L{folder}", "-lkws", "-lm",
        f"-Wl,-rpath,{folder}", "-o", "main", cwd=tmp_path)
    printed = [float(line) for line in run(tmp_path / "main", cwd=tmp_path).split()]
    expected = skive.load(artefact)(SILENT_FRAMES)[0]
    np.testing.assert_allclose(printed, expected, rtol=1e-5)  # %g prints six digits


def test_threads_change_nothing(artefact: Path, tmp_path: Path) -> None:
    one, three = skive.load(artefact), compile_example(tmp_path / "three", threads=3)
    x = np.random.default_rng(0).normal(size=(20, 1, 1, 49, 10)).astype(np.float32) * 50
    expected = [one(sample) for sample in x]
    results: dict[int, list[np.ndarray]] = {}

    def call(i: int) -> None:
        results[i] = [three(sample) for sample in x]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in results.values():
        np.testing.assert_array_equal(result, expected)
    assert len(results) == 3
