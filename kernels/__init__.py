"""The header-only kernel library that emitted models include."""

from __future__ import annotations

from pathlib import Path


def include_dir() -> Path:
    """The folder to pass as `-I`; it holds `skive/*.h`."""
    return Path(__file__).resolve().parent / "include"
