"""The headers may stand in any number of translation units of one library, as they do in artefacts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import exhaustive
import pytest
from driver import INCLUDE


@pytest.mark.parametrize("compiler", ["g++", "clang"])
def test_two_units_link(compiler: str, tmp_path: Path) -> None:
    if compiler not in exhaustive.compilers():
        pytest.skip(f"no {compiler}")
    headers = sorted(p.name for p in (INCLUDE / "skive").glob("*.h"))
    text = "".join(f'#include "skive/{h}"\n' for h in headers)
    units = [tmp_path / "a.cpp", tmp_path / "b.cpp"]
    for unit in units:
        unit.write_text(f'{text}extern "C" int {unit.stem}() {{ return skive::is_number<float>; }}\n')
    done = subprocess.run([*exhaustive.compilers()[compiler], "-std=c++17", "-O1", "-fPIC", "-shared", "-nodefaultlibs",
                           f"-I{INCLUDE}", *map(str, units), "-o", str(tmp_path / "both.so")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[:2000]
