"""Text in, text out: every `*.txt` file holds the cases of the pass it is named after.

A case is a title line starting with `#`, the graph before, a line `becomes`, and the graph after
(or `unchanged`). With SKIVE_UPDATE_GOLDEN=1 the results are written instead of compared; read the
difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from skive.passes import EXACT
from skive.pipeline import PassManager, parse_pipeline
from skive.text import parse_graph, print_graph

FILES = sorted(Path(__file__).parent.glob("*.txt"))
UPDATE = os.environ.get("SKIVE_UPDATE_GOLDEN") == "1"


def cases(path: Path) -> list[tuple[str, str, str]]:
    """(title, text before, text after) of each case of a file."""
    found = []
    for block in re.split(r"^# ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = block.partition("\n")
        before, _, after = body.partition("\nbecomes\n")
        found.append((title.strip(), before.strip() + "\n", after.strip()))
    return found


CASES = [pytest.param(path, *case, id=f"{path.stem}: {case[0]}") for path in FILES for case in cases(path)]


def transformed(path: Path, before: str) -> str:
    """The text after the pass, `unchanged` if it is the same; the manager compares the values."""
    graph = parse_graph(before)
    after, _ = PassManager().run(graph, path.stem, check="always")
    return "unchanged" if print_graph(after) == print_graph(graph) else print_graph(after).strip()


@pytest.mark.skipif(UPDATE, reason="the files are being written")
@pytest.mark.parametrize(("path", "title", "before", "after"), CASES)
def test_case(path: Path, title: str, before: str, after: str) -> None:
    assert transformed(path, before) == after


@pytest.mark.skipif(not UPDATE, reason="set SKIVE_UPDATE_GOLDEN=1 to write the files")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_write(path: Path) -> None:
    blocks = [f"# {title}\n{before}becomes\n{transformed(path, before)}\n" for title, before, _ in cases(path)]
    path.write_text("\n".join(blocks), encoding="utf-8")


def test_every_pass_has_cases() -> None:
    assert {p.stem for p in FILES} >= {step.pass_.name for step in parse_pipeline(",".join(EXACT))}
