"""Builds `skive._native` with CMake and maps the repository's folders to the package `skive`."""

from __future__ import annotations

import importlib.util
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
        has_wheel = importlib.util.find_spec("cmake") is not None
        cmake = [sys.executable, "-m", "cmake"] if has_wheel else ["cmake"]
        configure = [*cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
                     f"-DPython_EXECUTABLE={sys.executable}"]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # pip builds in this tree, with tools in a temporary folder that the cache of the build
        # before still names.
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run([*cmake, "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[name for package, folder in FOLDERS.items()
              for name in [package, *(f"{package}.{inner}" for inner in find_packages(folder))]],
    package_dir=FOLDERS,
    include_package_data=False,  # otherwise setuptools takes every folder of headers for a package
    package_data={"skive": ["py.typed", "*.pyi", "*.html"],
                  "skive.kernels": ["include/**/*.h", "include/**/*.cuh", "include/**/*.inc"]},
    ext_modules=[Extension("skive._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
