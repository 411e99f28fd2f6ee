"""`skive verify` on many samples: noise, decisions, accuracy with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import skive
from skive import ops, text
from skive.agreement import Agreement, wilson
from skive.cli import cli
from skive.errors import ShapeError
from skive.ir import Graph, constant
from skive.types import DType


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_gives_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_nothing_seen_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def scores(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(rows, np.float32)]


def test_decisions_and_accuracy_are_counted_in_pairs() -> None:
    a = Agreement(["y"])
    a.add(scores([0, 1], [1, 0]), scores([0, 1], [0, 1]), np.array([1, 0]))
    a.add(scores([0, 3]), scores([3, 0]), np.array([0]))
    facts = a.to_json()
    assert facts["top1_agreement"]["count"] == 1 and facts["top1_agreement"]["of"] == 3
    accuracy = facts["accuracy"]
    assert (accuracy["artefact"]["count"], accuracy["model"]["count"]) == (2, 2)
    assert (accuracy["only_artefact_right"], accuracy["only_model_right"]) == (1, 1)
    assert facts["outputs"][0]["max_abs_error"] == 3.0
    # noise 0 + 2 + 18, signal 1 + 1 + 9
    assert facts["outputs"][0]["sqnr_db"] == pytest.approx(10 * np.log10(11 / 20), abs=0.01)


@pytest.mark.parametrize(("shape", "classes"), [((1, 10), True), ((1, 1, 1, 10), True), ((1, 10, 1, 1), True),
                                                ((10,), True), ((1, 4, 4, 3), False), ((1, 1), False), ((), False)])
def test_only_scores_are_decisions(shape: tuple[int, ...], classes: bool) -> None:
    a = Agreement(["y"])
    a.add([np.ones(shape, np.float32)], [np.ones(shape, np.float32)])
    assert ("top1_agreement" in a.to_json()) == classes
    if not classes:
        with pytest.raises(ShapeError, match="one score per class"):
            a.add([np.ones(shape, np.float32)], [np.ones(shape, np.float32)], np.array([0]))


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear classifier in float32 and int8, its data with labels, and a model that is another."""
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(3)
    w = rng.standard_normal((4, 12)).astype(np.float32)

    def model(weights: np.ndarray) -> Graph:
        x = ops.make("input", shape=(1, 12), dtype=DType.f32, label="x")
        return Graph("tiny", (x,), (ops.make("linear", x, constant(weights), origin="layer"),), ("y",))

    text.save_text(model(w), folder / "tiny.skive")
    text.save_text(model(-w), folder / "other.skive")
    x = rng.standard_normal((80, 12)).astype(np.float32)
    y = np.argmax(x @ w.T + 0.5 * rng.standard_normal((80, 4)), 1)
    np.savez(folder / "test.npz", x=x[40:], y=y[40:])
    np.savez(folder / "labels.npz", right=y[40:].astype(np.uint8))
    skive.compile(folder / "tiny.skive", output=folder / "f32", target="generic")
    skive.compile(folder / "tiny.skive", output=folder / "int8", target="generic",
                  quantize=skive.Quantize("int8", calibration=x[:40]))
    return folder


def verify(place: Path, artefact: str, *more: str, against: str = "tiny.skive") -> tuple[int, Any, str]:
    """(exit status, the document, what was said on standard error)."""
    arguments = [str(place / artefact), "--against", str(place / against), "--data", f"{place}/test.npz:x", "--json"]
    result = CliRunner().invoke(cli, ["verify", *arguments, *more])
    return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr


@pytest.mark.parametrize("labels", ["y", "{}/labels.npz:right"])
def test_every_sample_is_compared(place: Path, labels: str) -> None:
    status, found, _ = verify(place, "int8", "--labels", labels.format(place))
    assert status == 0 and found["passed"] and found["samples"] == 40
    assert 25 < found["sqnr_db"] < 70 and found["outputs"][0]["name"] == "y"
    assert found["top1_agreement"]["of"] == 40 and found["top1_agreement"]["count"] >= 37
    accuracy = found["accuracy"]
    with np.load(place / "test.npz") as data:
        module = skive.load(place / "int8")
        right = sum(int(np.argmax(module(x[None])) == y) for x, y in zip(data["x"], data["y"], strict=True))
    assert accuracy["artefact"]["count"] == right
    low, high = accuracy["artefact"]["interval"]
    assert low < right / 40 < high


def test_a_float_artefact_must_agree_and_an_integer_one_reports(place: Path) -> None:
    assert verify(place, "f32")[0] == 0
    status, found, said = verify(place, "f32", against="other.skive")
    assert status == 1 and not found["passed"] and "differs from" in said
    status, found, _ = verify(place, "int8", against="other.skive")
    assert status == 0 and found["sqnr_db"] < 0 and found["top1_agreement"]["count"] < 10


def test_limits_make_an_integer_artefact_fail(place: Path) -> None:
    assert verify(place, "int8", "--min-sqnr", "20", "--min-agreement", "0.9")[0] == 0
    status, found, said = verify(place, "int8", "--min-sqnr", "90", "--min-agreement", "0.9")
    assert status == 1 and not found["passed"] and "--min-sqnr is 90" in said
    status, _, said = verify(place, "int8", "--min-agreement", "0.9", against="other.skive")
    assert status == 1 and "--min-agreement is 0.9" in said


def test_fewer_samples_and_wrong_labels(place: Path) -> None:
    status, found, _ = verify(place, "int8", "--labels", "y", "--samples", "7")
    assert status == 0 and found["samples"] == found["accuracy"]["model"]["of"] == 7
    assert "no array 'z'" in verify(place, "int8", "--labels", "z")[2]
    assert "not 40 integers" in verify(place, "int8", "--labels", "x")[2]
