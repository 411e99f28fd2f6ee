"""Thresholds from validation data: the curve, the goals, and what a risk promises."""

from __future__ import annotations

import numpy as np
import pytest

from skive.errors import ExitError
from skive.exit_calibration import Calibrated, Evidence, Goal, binomial_bound, calibrate, curve, plot, setting


def evidence(n: int, seed: int = 0, test: str = ">") -> Evidence:
    """Two exits that know how often they are right, and a network that is right on 90 %."""
    rng = np.random.default_rng(seed)
    ease = rng.random(n)
    sure = np.clip(np.stack([ease * 1.0, ease * 1.1], 1) + 0.05 * rng.standard_normal((n, 2)), 0, 1)
    right = np.stack([rng.random(n) < sure[:, 0] * 0.9, rng.random(n) < sure[:, 1] * 0.9, rng.random(n) < 0.9], 1)
    scores = sure if test == ">" else -sure
    return Evidence(scores.astype(np.float32), right, np.array([0.2, 0.5, 1.0]), (test, test))


@pytest.mark.parametrize("test", [">", "<", ">=", "<="])
def test_the_curve_goes_from_safe_to_cheap(test: str) -> None:
    e = evidence(800, test=test[0]) if len(test) == 1 else evidence(800, test=">" if test[0] == ">" else "<")
    e = Evidence(e.scores, e.right, e.cost, (test, test))
    settings = curve(e)
    costs, accuracies = [s.cost for s in settings], [s.accuracy for s in settings]
    assert costs == sorted(costs, reverse=True) and accuracies == sorted(accuracies, reverse=True)
    assert costs[0] > 0.8 and costs[-1] < 0.3 and len(settings) > 8
    for s in settings:
        again = setting(e, s.thresholds)
        assert (again.cost, again.accuracy) == (s.cost, s.accuracy)
        assert s.shares.sum() == pytest.approx(1) and s.cost == pytest.approx(float(s.shares @ e.cost))


def test_goals_are_kept() -> None:
    e = evidence(1000)
    drop = calibrate(e, Goal("accuracy-drop", 2.0))
    assert calibrate(e, Goal("accuracy", drop.whole.accuracy - 2.0)).setting.cost == drop.setting.cost
    assert drop.setting.accuracy >= drop.whole.accuracy - 2.0 and drop.setting.cost < 0.95
    cheap = calibrate(e, Goal("macs", 0.5))
    assert cheap.setting.cost <= 0.5
    assert cheap.setting.accuracy > calibrate(e, Goal("macs", 0.3)).setting.accuracy
    # Better than leaving at random with the same cost: half at the first exit, half at the end.
    assert cheap.setting.accuracy > 100 * (0.625 * e.right[:, 0].mean() + 0.375 * e.right[:, 2].mean()) + 3


def test_a_shared_threshold_spends_what_it_may_and_suits_few_samples() -> None:
    """On new data right more often than thresholds of their own, which are the most accurate on 60 samples by luck.
    With "<" the same samples leave."""
    fresh, goal = evidence(20_000, seed=999), Goal("macs", 0.6)
    gained = []
    for trial in range(40):
        few = evidence(60, seed=trial)
        own, shared = (setting(fresh, calibrate(few, goal, s).setting.thresholds) for s in (False, True))
        chosen = calibrate(few, goal, shared=True).setting
        assert 0.55 < chosen.cost <= 0.6 and len(set(chosen.thresholds)) == 1
        gained.append(shared.accuracy - own.accuracy)
    assert np.mean(gained) > 0.5
    few, turned = evidence(60), evidence(60, test="<")
    assert np.array_equal(few.taken(calibrate(few, goal, True).setting.thresholds),
                          turned.taken(calibrate(turned, goal, True).setting.thresholds))
    costs = [s.cost for s in curve(few, shared=True)]
    assert costs == sorted(costs, reverse=True) and costs[-1] == pytest.approx(few.cost[0])


def test_a_shared_threshold_keeps_the_other_goals() -> None:
    e = evidence(1000)
    drop = calibrate(e, Goal("accuracy-drop", 2.0), shared=True)
    assert drop.setting.accuracy >= drop.whole.accuracy - 2.0 and drop.setting.cost < 0.95
    risk = calibrate(e, Goal("risk", 0.08), shared=True)
    assert risk.bound is not None and risk.bound <= 0.08 and len(set(risk.setting.thresholds)) == 1
    with pytest.raises(ExitError, match="different ways"):
        calibrate(Evidence(e.scores, e.right, e.cost, (">", "<")), Goal("macs", 0.6), shared=True)


def test_a_risk_holds_with_its_confidence() -> None:
    """On new data the risk is above the bound in at most 5 % of trials, but for luck (7 of 50: below 1 %)."""
    fresh = evidence(40_000, seed=999)
    broken = 0
    for trial in range(50):
        try:
            found = calibrate(evidence(300, seed=trial), Goal("risk", 0.08, 0.95))
        except ExitError:
            continue
        assert found.bound is not None and found.bound <= 0.08
        broken += setting(fresh, found.setting.thresholds).risk > 0.08
    assert broken <= 6


def test_a_risk_that_so_few_samples_cannot_show_is_refused() -> None:
    with pytest.raises(ExitError, match="give more data"):
        calibrate(evidence(60), Goal("risk", 0.01, 0.95))
    with pytest.raises(ExitError, match="cannot be reached"):
        calibrate(evidence(60), Goal("macs", 0.1))
    with pytest.raises(ExitError, match="the most accurate setting has"):
        calibrate(evidence(60), Goal("accuracy", 99.9))


@pytest.mark.parametrize("failures, n, confidence, bound", [
    (0, 59, 0.95, 1 - 0.05 ** (1 / 59)), (0, 10, 0.9, 1 - 0.1 ** 0.1), (10, 10, 0.95, 1.0),
    (1, 1, 0.5, 1.0), (5, 100, 0.95, 0.102251), (2, 20, 0.975, 0.316981)])  # the last two: tables of the method
def test_binomial_bound(failures: int, n: int, confidence: float, bound: float) -> None:
    assert binomial_bound(failures, n, confidence) == pytest.approx(bound, abs=2e-5)


@pytest.mark.parametrize("text", ["macs=2", "luck=1", "risk=0.1@1.5", "macs", "accuracy-drop=x"])
def test_a_goal_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ExitError, match="the goal is"):
        Goal.parse(text)


def test_the_picture_holds_the_chosen_setting() -> None:
    found: Calibrated = calibrate(evidence(400), Goal.parse("macs=0.6"))
    picture = plot(found, ["a", "b & c", "whole"], "title <1>")
    assert picture.startswith("<svg") and "b &amp; c" in picture and "title &lt;1&gt;" in picture
    assert f"{found.setting.accuracy:.2f} % at {found.setting.cost:.2f}" in picture
