"""Sources -> shared library, with the user's C++ compiler, through a content-addressed cache.

Every object file is keyed by its own text, the kernel headers, the flags and the compiler's
version; nothing else decides its bytes, so a cached object is the object.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from skive import kernels
from skive.emit.cxx import FLAGS, Sources
from skive.errors import ToolchainError
from skive.targets.base import Target

# The cache keeps at most this many bytes; the oldest entries go first.
CACHE_LIMIT = 2 << 30


@lru_cache(maxsize=1)
def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: $CXX, `c++`, `g++`, `clang++`, or `python -m ziglang c++`."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise ToolchainError(f"CXX names {command[0]!r}, which is not on PATH; correct or unset CXX")
        return tuple(command)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise ToolchainError(
            "no C++ compiler on PATH (tried c++, g++, clang++); install one, set CXX, "
            "or `pip install skive-compiler[zig]`"
        ) from None
    return (sys.executable, "-m", "ziglang", "c++")


@lru_cache(maxsize=8)
def compiler_version(command: tuple[str, ...]) -> str:
    """The first line that the compiler prints of itself."""
    r = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if r.returncode:
        raise ToolchainError(f"{shlex.join(command)} --version failed: {r.stderr.strip()[:200]}")
    return r.stdout.splitlines()[0] if r.stdout else "unknown"


def user_flags() -> list[str]:
    """What $SKIVE_CXXFLAGS adds behind skive's own flags, for example `-O1` where compile time matters."""
    return shlex.split(os.environ.get("SKIVE_CXXFLAGS", ""))


def cache_dir() -> Path:
    """$SKIVE_CACHE, else `skive` in the user's cache folder."""
    named = os.environ.get("SKIVE_CACHE")
    return (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skive"
    )


@lru_cache(maxsize=1)
def sources_hash() -> str:
    """SHA-256 of skive's Python sources: an edited compiler never answers from its past."""
    h = hashlib.sha256()
    folders = [Path(__file__).resolve().parent, *(Path(p) for p in __import__("skive.passes").passes.__path__)]
    for folder in folders:
        for p in sorted(folder.rglob("*.py")):
            h.update(p.read_bytes())
    return h.hexdigest()


def header_closure(names: Sequence[str]) -> list[str]:
    """`names` and every kernel header they include, as paths below `skive/`."""
    root = kernels.include_dir() / "skive"
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in (root / name).read_text().splitlines():
            if line.startswith('#include "skive/'):
                todo.append(line.split('"')[1][len("skive/") :])
    return sorted(seen)


def write_sources(folder: Path, sources: Sources, weights: bytes, name: str) -> None:
    """The complete source folder: it builds with nothing of skive installed."""
    for file, text in sources.files.items():
        (folder / file).write_text(text)
    (folder / f"{name}_weights.bin").write_bytes(weights)
    root = kernels.include_dir() / "skive"
    for h in header_closure([*sources.headers, "isa.h"]):
        target = folder / "skive" / h
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / h, target)


def build_shared(
    folder: Path,
    sources: Sources,
    name: str,
    target: Target,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Path:
    """Builds `libNAME.so` in `folder` and returns its path; ToolchainError with the compiler's message."""
    command = compiler()
    version = compiler_version(command)
    flags = [*FLAGS, *target.flags, *user_flags()]
    done = 0

    def includes(unit: str, file: str) -> bool:
        return f'#include "{file}"' in sources.files[unit]

    def compile_unit(unit: str) -> Path:
        nonlocal done
        obj = folder / (unit.rsplit(".", 1)[0] + ".o")
        if unit.endswith(".S"):
            _run([*command, "-c", unit, "-o", obj.name], folder)
        else:
            key = hashlib.sha256(
                "\0".join(
                    [
                        kernels.headers_hash(),
                        version,
                        *command,
                        *flags,
                        *(sources.files[f] for f in [unit, *(f for f in sorted(sources.files) if includes(unit, f))]),
                    ]
                ).encode()
            ).hexdigest()
            cached = cache_dir() / "objects" / key[:2] / f"{key}.o"
            if cached.exists():
                shutil.copyfile(cached, obj)
            else:
                _run([*command, *flags, "-iquote.", "-c", unit, "-o", obj.name], folder)
                store(obj, cached)
        done += 1
        progress(done, len(sources.units))
        return obj

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_unit, sources.units))
    library = folder / f"lib{name}.so"
    pthread = ["-pthread"] if threads > 1 else []
    # No libstdc++: the code uses none of it, and a device may not have it.
    _run(
        [
            *command,
            "-shared",
            "-nodefaultlibs",
            "-Wl,-s",
            "-Wl,--gc-sections",
            "-Wl,-z,noexecstack",
            "-Wl,--build-id=none",
            *pthread,
            *(o.name for o in objects),
            "-lm",
            "-lc",
            "-lgcc",
            "-o",
            library.name,
        ],
        folder,
    )
    for o in objects:
        o.unlink()
    return library


def store_text(text: str, path: Path) -> None:
    """Writes `path` whole or not at all; a read-only cache is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
            f.write(text)
        os.replace(f.name, path)
    except OSError:
        pass


def store(source: Path, cached: Path) -> None:
    """Copies a file into the cache; a full or read-only cache is no error."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as f:
            temporary = Path(f.name)
        shutil.copyfile(source, temporary)
        os.replace(temporary, cached)
    except OSError:
        pass


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        r = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as e:
        raise ToolchainError(f"cannot run {command[0]}: {e.strerror}") from None
    if r.returncode:
        errors = [line for line in r.stderr.splitlines() if "error" in line.lower()] or r.stderr.splitlines()
        raise ToolchainError(f"{command[0]} failed on {folder.name}: {' / '.join(errors[:3])[:800]}")


def trim_cache() -> None:
    """Removes the oldest cached artefacts and objects until the cache is below its limit."""
    root = cache_dir()
    entries = [
        p for p in [*root.glob("artefacts/*"), *root.glob("objects/*/*")] if not p.name.startswith(".")
    ]
    sized = [
        (
            p.stat().st_mtime,
            sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) if p.is_dir() else p.stat().st_size,
            p,
        )
        for p in entries
    ]
    total = sum(s for _, s, _ in sized)
    for _, size, p in sorted(sized):
        if total <= CACHE_LIMIT:
            break
        shutil.rmtree(p, ignore_errors=True) if p.is_dir() else p.unlink(missing_ok=True)
        total -= size
