"""`make exhaustive` sees one wrong result, a crash and a stray write, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import exhaustive
import numpy as np
import pytest
from exhaustive_kernels import KERNELS, Kernel, Sample, Subject


@pytest.fixture
def one_piece(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Arguments of `run` for two instantiations of `lookup` as shipped."""
    if "g++" not in exhaustive.compilers():
        pytest.skip("no g++ on PATH")
    exhaustive.sources.cache_clear()
    monkeypatch.setattr(exhaustive, "PIECE", 2)
    monkeypatch.setattr(exhaustive, "OUTPUTS", 1000)
    return {"kernels": ["lookup"], "targets": ["generic"], "shapes": 2, "matrix": 0}


def planted(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """Makes `change` of each subject of `lookup`."""
    exhaustive.sources.cache_clear()
    kernel = KERNELS["lookup"]
    monkeypatch.setitem(KERNELS, "lookup", Kernel(lambda rng: change(kernel.make(rng)), kernel.headers))


def test_what_agrees_is_compared_once(one_piece: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = exhaustive.State(tmp_path / "state.json")
    assert exhaustive.run(**one_piece, state=state) == 0
    [finding] = state.findings.values()
    assert finding.shapes == 2 and finding.outputs >= 2000 and not finding.differences
    assert "| lookup | generic | 2 |" in exhaustive.table(state)

    again = exhaustive.State(tmp_path / "state.json")
    monkeypatch.setattr(exhaustive.subprocess, "run", None)  # nothing is compiled any more
    assert exhaustive.run(**one_piece, state=again) == 0
    assert again.findings == state.findings


def test_a_wrong_result_is_found(one_piece: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(subject: Subject) -> Subject:
        def draw(rng: np.random.Generator, calls: int, worst: bool) -> Sample:
            sample = subject.draw(rng, calls, worst)
            sample.want[-1].flat[-1] += 1
            return sample

        return replace(subject, draw=draw)

    planted(monkeypatch, off_by_one)
    state = exhaustive.State(tmp_path / "state.json")
    assert exhaustive.run(**one_piece, state=state) == 1
    [finding] = state.findings.values()
    assert finding.differences >= 4 and "1 of" in finding.problems[0]


@pytest.mark.parametrize(("addition", "message"), [
    ("; __builtin_trap()", "process ended with -4"),
    ("; x0 == nullptr ? void() : void(y0[-1] = 0)", "wrote outside the result"),
])  # fmt: skip
def test_crashes_and_stray_writes_are_findings(
    one_piece: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addition: str, message: str
) -> None:
    planted(monkeypatch, lambda s: replace(s, text=lambda isa: s.text(isa) + addition))
    state = exhaustive.State(tmp_path / "state.json")
    assert exhaustive.run(**one_piece, state=state) == 1
    [finding] = state.findings.values()
    assert finding.differences and message in finding.problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_ten_shapes_of_each_kernel(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped and by every compiler at every level, on every target."""
    monkeypatch.setattr(exhaustive, "PIECE", 10)
    exhaustive.sources.cache_clear()
    state = exhaustive.State(tmp_path / "state.json")
    targets = exhaustive.runnable()
    bad = exhaustive.run(kernels=[kernel], targets=targets, shapes=10, matrix=10, state=state)
    assert not bad, [p for f in state.findings.values() for p in f.problems][:3]
    assert {name.split("/")[1] for name in state.findings} == set(targets)
