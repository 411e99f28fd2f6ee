"""Networks compiled with channels removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from keywords import MODEL, accuracy, compiled, features

import skive
from skive.cli import cli
from skive.errors import PruningError


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_fitted_weights_keep_the_accuracy(quantize: str | None) -> None:
    """At 40 % of the work removed, without training, magnitudes alone leave little more than guessing (1 in 12)."""
    data = features()[0][:100]
    kind = skive.Quantize(quantize, calibration=data) if quantize else None
    fitted = compiled(prune=skive.Prune(macs=0.4, calibration=data), quantize=kind)
    assert accuracy(fitted) > 0.78
    report = fitted.report
    assert report["verification"]["passed"] and report["sparsity"]["macs_removed"] >= 0.4
    assert report["compiled"]["macs"] <= 0.6 * report["model"]["macs"]
    if quantize is None:
        plain = compiled(prune=skive.Prune(macs=0.4, criterion="l1", refit=False))
        assert accuracy(plain) < 0.5
        whole = compiled()
        assert fitted.report["compiled"]["weight_bytes"] < 0.8 * whole.report["compiled"]["weight_bytes"]
        assert fitted.report["compiled"]["arena_bytes"] < whole.report["compiled"]["arena_bytes"]


def test_nothing_pruned_is_the_same_code(tmp_path: Path) -> None:
    compiled(output=tmp_path / "whole", emit_only=True)
    compiled(output=tmp_path / "same", emit_only=True, prune=0.0)
    for file in sorted(tmp_path.glob("whole/*")):
        if file.suffix in (".cpp", ".c", ".h", ".bin", ".S"):
            assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name


def test_the_command_prunes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=features()[0][:30])
    run = CliRunner().invoke(cli, ["compile", str(MODEL), "-o", str(tmp_path / "kws"), "--prune", "0.3", "--json",
                                       "--calibrate", f"{tmp_path}/data.npz:x", "--input", "input=1x1x49x10"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["sparsity"]["macs_removed"] >= 0.3 and report["sparsity"]["criterion"] == "activation"
    assert all(set(g) == {"layers", "channels", "kept"} for g in report["sparsity"]["groups"])


def test_too_much_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="at most"):
        compiled(output=tmp_path / "kws", prune=0.999)
    assert not (tmp_path / "kws").exists()


def test_a_quantized_model_is_cut_with_its_scales(tmp_path: Path) -> None:
    data = features()[0][:100]
    compiled(quantize=skive.Quantize("int8", calibration=data, rounding="nearest"), export_onnx=tmp_path / "kws.onnx",
             emit_only=True, output=tmp_path / "first")
    cut = skive.compile(tmp_path / "kws.onnx", example_inputs=(data[:1],), prune=skive.Prune(macs=0.1, criterion="l1"))
    report = cut.report
    assert report["verification"]["passed"] and report["sparsity"]["macs_removed"] >= 0.1
    assert all("not float32" in n["reason"] for n in report["sparsity"]["fit"]["not_fitted"])
    assert report["compiled"]["macs"] < 0.95 * report["model"]["macs"] and accuracy(cut) > 0.4


@pytest.mark.slow
def test_the_target_can_be_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke(cli, ["compile", str(MODEL), "-o", str(tmp_path / "kws"), "--prune", "latency=0.25",
                                       "--prune-criterion", "l1", "--json", "--input", "input=1x1x49x10"])
    assert run.exit_code == 0, run.output
    cut = json.loads(run.stdout)["sparsity"]
    assert cut["latency_removed"] >= 0.25 and cut["fit"]["data"] == "noise"
    assert cut["forecast_us"]["pruned"] <= 0.75 * cut["forecast_us"]["whole"]
    assert cut["forecast_us"]["dtype"] == "float32"
    fixed = compiled(prune=skive.Prune(latency=0.25, criterion="l1", refit=False),
                     quantize=skive.Quantize("int8", calibration=features()[0][:32])).report["sparsity"]
    assert fixed["latency_removed"] >= 0.25 and fixed["forecast_us"]["dtype"] == "int8"
    assert fixed["forecast_us"]["whole"] < 0.7 * cut["forecast_us"]["whole"]
