"""C++ text compiled for one instruction set and called from a test through ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skive.emit.cxx import FLAGS

INCLUDE = Path(__file__).resolve().parents[2] / "kernels" / "include"

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2"]
ISA_FLAGS: dict[str, list[str]] = {
    "avx512": ["-DSKIVE_TARGET_AVX512", *_AVX512],
    "avx2": ["-DSKIVE_TARGET_AVX2", "-mavx2", "-mfma"],
    "generic": ["-DSKIVE_TARGET_GENERIC"],
}  # fmt: skip
# Targets that differ from one above in their integer kernels only.
INTEGER_ISA_FLAGS: dict[str, list[str]] = {
    "avx512vnni": ["-DSKIVE_TARGET_AVX512VNNI", "-mavx512vnni", *_AVX512],
    **ISA_FLAGS,
}
_CPU_NEEDS = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma"},
    "generic": set(),
}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# `make shipped`: behind the flags of a test those of artefacts, whose -O2 g++ 12 has translated wrongly where -O1
# was right, and no warnings, of which some levels have false ones.
AS_SHIPPED = bool(os.environ.get("SKIVE_KERNELS_AS_SHIPPED"))


def cpu_features() -> set[str]:
    """What this CPU has, in the spelling of /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def cpu_isas(known: dict[str, list[str]] = ISA_FLAGS) -> list[str]:
    """The instruction sets of `known` that this CPU runs, widest first."""
    features = cpu_features()
    return [isa for isa in known if _CPU_NEEDS[isa] <= features]


def compile_library(
    source: str, isa: str, folder: Path, *, flags: tuple[str, ...] = ("-O2",)
) -> ctypes.CDLL:
    """A shared library built from `source` with `isa`'s flags and warnings as errors; one that
    `folder` has already, perhaps from another process, is taken as it is.

    Raises AssertionError with the compiler's messages if it does not compile.
    """
    flags = (*flags, *FLAGS, "-fvisibility=default") if AS_SHIPPED else (*flags, *WARNINGS)
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-shared", "-fPIC", *flags,
               *INTEGER_ISA_FLAGS[isa], f"-I{INCLUDE}"]  # fmt: skip
    name = hashlib.sha256("\0".join([source, *command]).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    text = folder / f"{name}.cpp"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            text.write_text(source)
            new = folder / f"{name}.new"
            done = subprocess.run([*command, str(text), "-o", str(new)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            new.rename(library)
    return ctypes.CDLL(str(library))


def aligned(values: NDArray[np.float32], offset: int = 0) -> NDArray[np.float32]:
    """A copy of `values` whose data starts `offset` floats after a 64-byte boundary."""
    buffer = np.empty(values.size + 32, np.float32)
    start = (-buffer.ctypes.data % 64) // 4 + offset
    view = buffer[start : start + values.size].reshape(values.shape)
    view[...] = values
    return view


def pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    """The address of the array's data, for a call through ctypes."""
    return ctypes.c_void_p(array.ctypes.data)
