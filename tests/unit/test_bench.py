"""The bench: what is paired, what counts as quiet, and that a wrong fast answer wins nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from skive import bench, cli
from skive.bench import Job, Subject, Turn, Worker
from skive.errors import SkiveError

SUBJECT = Subject("net", "net/", "net.onnx", 1, (), None)


def worker(engine: str, *outputs: np.ndarray) -> Any:
    return SimpleNamespace(job=SimpleNamespace(engine=engine), version="1", outputs=lambda: list(outputs))


def turn(ms: float, quiet: float = 1.0) -> Turn:
    return Turn(10, ms / 1e3 * 0.9, ms / 1e3, quiet)


def test_the_ratio_is_the_median_over_pairs() -> None:
    y = np.array([1.0, 2.0], np.float32)
    # The machine halves its speed in the third round: both slow down, the pair stays a pair.
    rounds = [[turn(1.0), turn(2.0)], [turn(1.1), turn(2.2)], [turn(2.0), turn(4.0)], [turn(1.0), turn(2.0)],
              [turn(1.0), turn(9.0)]]
    rows, ratio = bench._results(SUBJECT, [worker("skive", y), worker("onnxruntime", y)], rounds)
    assert ratio == {"onnxruntime": pytest.approx(2.0)}
    assert [r["engine"] for r in rows] == ["skive", "onnxruntime"]
    assert rows[0]["median_ms"] == pytest.approx(1.0) and rows[0]["min_ms"] == pytest.approx(0.9)
    assert rows[0]["spread"] == pytest.approx(1.0) and rows[0]["runs"] == 50
    assert not rows[0]["disturbed"]


def test_disturbed_rounds_do_not_count() -> None:
    y = np.zeros(1, np.float32)
    quiet = [[turn(1.0), turn(3.0)]] * 5
    noisy = [[turn(1.0), turn(30.0, quiet=0.5)]] * 9
    rows, ratio = bench._results(SUBJECT, [worker("skive", y), worker("onnxruntime", y)], [*noisy, *quiet])
    assert ratio["onnxruntime"] == pytest.approx(3.0) and not rows[0]["disturbed"]


def test_without_quiet_rounds_the_least_disturbed_count_and_are_marked() -> None:
    y = np.zeros(1, np.float32)
    rounds = [[turn(1.0, 0.8), turn(2.0, 0.9)]] * 5 + [[turn(1.0, 0.3), turn(20.0, 0.3)]] * 10
    rows, ratio = bench._results(SUBJECT, [worker("skive", y), worker("onnxruntime", y)], rounds)
    assert ratio["onnxruntime"] == pytest.approx(2.0) and all(r["disturbed"] for r in rows)


@pytest.mark.parametrize("wrong", [np.array([1.0, 2.01], np.float32), np.array([1.0, np.nan], np.float32),
                                   np.array([1.0], np.float32), np.array([1, 2], np.int32)])
def test_a_wrong_answer_has_no_ratio(wrong: np.ndarray) -> None:
    right = np.array([1.0, 2.0], np.float32)
    rows, ratio = bench._results(SUBJECT, [worker("skive", wrong), worker("onnxruntime", right)],
                                 [[turn(1.0), turn(2.0)]] * 5)
    assert ratio == {"onnxruntime": None}
    assert rows[0]["agrees"] is False and rows[1]["agrees"] is True


def test_a_wrong_answer_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ratio = bench._results(SUBJECT, [worker("skive", np.ones(1, np.float32)),
                                           worker("onnxruntime", np.zeros(1, np.float32))],
                                 [[turn(1.0), turn(2.0)]] * 5)
    result = {"machine": {"cpu": "c", "isa": "i", "cores": 1}, "results": rows, "ratio": ratio, "models": []}
    monkeypatch.setattr(bench, "bench", lambda *a, **k: result)
    shown = CliRunner().invoke(cli.cli, ["bench", "net.onnx", "--against", "onnxruntime"])
    assert shown.exit_code == 0 and "WRONG" in shown.stdout and "no ratio" in shown.stdout
    printed = CliRunner().invoke(cli.cli, ["bench", "net.onnx", "--against", "onnxruntime", "--json"])
    assert '"onnxruntime": null' in printed.stdout


def test_the_geometric_mean_is_of_all_or_of_none() -> None:
    assert bench._geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert bench._geometric_mean([1.0, None]) is None
    assert bench._geometric_mean([]) is None


def test_a_worker_that_cannot_load_its_model_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz")
    job = Job("skive", str(tmp_path / "nothing"), str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), 1)
    with pytest.raises(SkiveError, match="skive cannot run .*nothing.*manifest"):
        Worker.start(job)


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    started = SimpleNamespace(stdin=SimpleNamespace(write=lambda t: None, flush=lambda: None),
                              stdout=SimpleNamespace(readline=lambda: ""), wait=lambda: -11)
    dead = Worker(Job("openvino", "m.onnx", "", "", 1), started)  # type: ignore[arg-type]
    with pytest.raises(SkiveError, match="openvino on m.onnx: the process ended with -11"):
        dead.turn(0.1)
