"""Builds `skive._native` with CMake and maps the repository's folders to the package `skive`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# `compiler` and `passes` as import names would litter site-packages; the folders keep their names.
FOLDERS = {"skive": "compiler", "skive.passes": "passes", "skive.kernels": "kernels"}


class CMakeBuild(build_ext):
    """Runs CMake for the one extension module."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else [shutil.which("cmake") or "cmake"]
        configure = [*cmake, "-S", str(ROOT), "-B", str(build), f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
                     "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        ninja = shutil.which("ninja")
        if ninja:
            # A cache left by an isolated build names a ninja in a folder that is gone.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if (build / "CMakeCache.txt").exists():
            configure.append("--fresh")
        subprocess.run(configure, check=True)
        subprocess.run([*cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


def _has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


setup(
    packages=[n for name, folder in FOLDERS.items()
              for n in [name, *(f"{name}.{p}" for p in find_packages(folder))]],
    package_dir=FOLDERS,
    include_package_data=False,
    package_data={"skive": ["py.typed", "*.pyi", "*.html"],
                  "skive.kernels": ["include/**/*.h", "include/**/*.cuh", "include/**/*.inc"]},
    ext_modules=[Extension("skive._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
