"""The header-only kernel library that emitted models include."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def include_dir() -> Path:
    """The folder to pass as `-I`; it holds `skive/*.h`."""
    return Path(__file__).resolve().parent / "include"


@lru_cache(maxsize=1)
def headers_hash() -> str:
    """SHA-256 of every kernel header."""
    h = hashlib.sha256()
    root = include_dir()
    for p in sorted(root.rglob("*")):
        if p.is_file():
            h.update(p.relative_to(root).as_posix().encode() + b"\0" + p.read_bytes() + b"\0")
    return h.hexdigest()
