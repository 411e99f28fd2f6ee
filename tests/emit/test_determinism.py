"""The same model and options give the same bytes: for any hash seed, output folder and version of Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emitted import run
from small_networks import KEYWORDS

import skive

ROOT = Path(__file__).resolve().parents[2]
MODULES = "import jinja2, numpy, onnx; print(numpy.__version__)"

# The loader is built for one version of Python; here it would only load what was written.
_NATIVE = """
def cpu_features():
    return ["avx2", "fma"]

class Artifact:
    def __init__(self, *arguments, **named):
        pass
"""
_COMPILE = f"""
import sys, skive
skive.compile({str(KEYWORDS)!r}, input_shapes={{"input": (1, 1, 49, 10)}}, output=sys.argv[1], name="kws",
              target="avx2", threads=2, verify=False)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on whose path any interpreter finds this tree's skive, with a stand-in for the loader."""
    folder = tmp_path_factory.mktemp("package")
    skive_folder = folder / "skive"
    skive_folder.mkdir()
    for path in (ROOT / "compiler").iterdir():
        if not path.name.startswith(("_native", "__pycache__")):
            (skive_folder / path.name).symlink_to(path)
    for name in ("passes", "kernels"):
        (skive_folder / name).symlink_to(ROOT / name)
    (skive_folder / "_native.py").write_text(_NATIVE)
    return folder


def artefact(python: str, package: Path, output: Path, seed: int) -> dict[str, bytes]:
    """The files that a compile in a fresh process writes; it finds nothing in a cache."""
    environment = {"PYTHONPATH": str(package), "PYTHONHASHSEED": str(seed), "SKIVE_CXXFLAGS": "-O1",
                   "SKIVE_CACHE": str(output.parent / f"cache-{output.name}"), "PYTHONDONTWRITEBYTECODE": "1"}
    run(python, "-c", _COMPILE, output, cwd=output.parent, env=environment)
    files = {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}
    assert {"libkws.so", "kws.cpp", "kws_weights.bin", "manifest.json", "report.html"} <= set(files)
    del files["report.json"]  # it holds times
    return files


def different(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.fixture(scope="module")
def first(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return artefact(sys.executable, package, tmp_path_factory.mktemp("first") / "artefact", 0)


@pytest.mark.parametrize("seed", [1, pytest.param(42, marks=pytest.mark.slow), 99])
def test_any_hash_seed_and_folder(seed: int, first: dict[str, bytes], package: Path, tmp_path: Path) -> None:
    place = tmp_path / "another place" / "deeper"
    place.mkdir(parents=True)
    assert different(first, artefact(sys.executable, package, place / "named otherwise", seed)) == []


def other_pythons() -> list[str]:
    """Commands of other versions of Python that have what the compiler imports, with the same numpy."""
    import numpy as np

    named = shlex.split(os.environ.get("SKIVE_OTHER_PYTHON", ""))
    found = named or [p for v in ("3.12", "3.13", "3.14") if (p := shutil.which(f"python{v}"))]
    usable = []
    for python in found:
        done = subprocess.run([python, "-c", MODULES], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == np.__version__:
            usable.append(python)
    return usable


def test_any_version_of_python(first: dict[str, bytes], package: Path, tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python with this numpy, onnx and jinja2: neither python3.12 to 3.14 on PATH nor named "
                    "by SKIVE_OTHER_PYTHON")
    for i, python in enumerate(pythons):
        assert different(first, artefact(python, package, tmp_path / f"other{i}", i)) == [], python


def test_the_verified_artefact_is_the_same(tmp_path: Path) -> None:
    """Verification looks, and changes nothing; nor does a cache that knows the model."""
    graph_inputs = {"input": (1, 1, 49, 10)}

    def files(name: str, **options: object) -> dict[str, bytes]:
        module = skive.compile(str(KEYWORDS), input_shapes=graph_inputs, output=tmp_path / name, **options)
        return {str(p.relative_to(module.folder)): p.read_bytes() for p in module.folder.rglob("*") if p.is_file()}

    checked, unchecked, again = files("a"), files("b", verify=False), files("c")
    assert different(checked, again) == []
    assert set(different(checked, unchecked)) <= {"report.json", "report.html", "manifest.json"}  # options_sha256


def test_the_manifest_tells_options_apart(tmp_path: Path) -> None:
    asked = [{}, {"quantize": skive.Quantize("weights8")}, {"quantize": skive.Quantize("weights8", block=64)},
             {"prune": skive.Prune(macs=0.1, criterion="l1", refit=False)}]
    seen = [skive.compile(str(KEYWORDS), input_shapes={"input": (1, 1, 49, 10)}, output=tmp_path / str(i),
                          emit_only=True, verify=False, **options).folder for i, options in enumerate(asked)]
    hashes = {json.loads((f / "manifest.json").read_text())["options_sha256"] for f in seen}
    assert len(hashes) == len(asked)
