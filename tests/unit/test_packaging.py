"""What a user installs: nothing stray, nothing missing, quick to import."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("onnx", "torch", "onnxruntime", "openvino", "tvm", "google.protobuf")


def python(code: str, *, cwd: Path, executable: str | Path = sys.executable) -> str:
    """What `code` prints in a fresh interpreter outside the repository."""
    result = subprocess.run([str(executable), "-c", code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def sources(*folders: str) -> set[str]:
    """The files of the package in this tree, by their installed name."""
    installed_as = {"compiler": "skive/", "passes": "skive/passes/", "kernels": "skive/kernels/"}
    names = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".pyi", ".h", ".cuh", ".inc", ".html"} or path.name == "py.typed":
                names.add(installed_as[folder] + path.relative_to(ROOT / folder).as_posix())
    return names


def test_no_folder_shadows_the_mapping_of_passes_and_kernels() -> None:
    # The path finder of an editable install would take compiler/passes for skive.passes.
    assert not (ROOT / "compiler" / "passes").exists()
    assert not (ROOT / "compiler" / "kernels").exists()


def test_import_takes_less_than_150_ms(tmp_path: Path) -> None:
    code = "import time; t = time.perf_counter(); import skive; print(time.perf_counter() - t)"
    assert min(float(python(code, cwd=tmp_path)) for _ in range(5)) < 0.150


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    for modules in ["skive", "skive.runtime"]:
        code = f"import sys, {modules}; print([m for m in {HEAVY} if m in sys.modules])"
        assert python(code, cwd=tmp_path) == "[]", modules


def test_version_is_stated_once(tmp_path: Path) -> None:
    from importlib.metadata import version

    import skive

    assert version("skive-compiler") == skive.__version__


@pytest.mark.slow
def test_source_distribution_wheel_and_fresh_environment(tmp_path: Path) -> None:
    """sdist -> wheel -> `pip install` in a new environment, then `pip install .` twice in one tree."""
    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        result = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)  # the wheel is built from the sdist
    (sdist,) = (tmp_path / "dist").glob("skive_compiler-*.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("skive_compiler-*.whl")

    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "bindings/module.cpp", "LICENSE", "Makefile"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]

    installed = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in installed}
    assert top == {"skive", f"{sdist.name.removesuffix('.tar.gz')}.dist-info"}
    assert sources("compiler", "passes", "kernels") - set(installed) == set()
    assert len([name for name in installed if name.endswith(".so")]) == 1

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    fresh = tmp_path / "venv" / "bin" / "python"
    run(fresh, "-m", "pip", "install", wheel)
    code = ("import skive, skive._native, skive.passes, skive.kernels, pathlib; "
            "print(pathlib.Path(skive.__file__).parent, (skive.kernels.include_dir() / 'skive/isa.h').exists())")
    folder, header = python(code, cwd=tmp_path, executable=fresh).split()
    assert Path(folder).is_relative_to(tmp_path / "venv") and header == "True"
    assert run(tmp_path / "venv" / "bin" / "skive", "--help").stdout

    # pip builds in the source tree: what the first build leaves there must not break the second.
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (tree,) = (tmp_path / "tree").iterdir()
    for _ in range(2):
        run(fresh, "-m", "pip", "install", "--no-deps", "--force-reinstall", tree)
    assert os.listdir(tree / "build")
    python("import skive._native", cwd=tmp_path, executable=fresh)
