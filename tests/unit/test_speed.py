"""The table of measured kernel calls and the forecasts made from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from skive import _native, ops, speed
from skive.cli import cli
from skive.ir import Graph, constant
from skive.lower import lower
from skive.plan import Call
from skive.targets.base import resolve
from skive.types import DType

HOST = resolve("host", _native.cpu_features())
LIMITS = speed.Limits(float32=50.0, int8=200.0, int16=100.0, memory=50.0)


def network(channels: int = 8) -> Graph:
    rng = np.random.default_rng(0)
    x = ops.make("input", shape=(1, 12, 12, channels), dtype=DType.f32, label="x", origin="x")
    y = x
    for i in range(2):
        w = rng.standard_normal((16, 3, 3, y.shape[3])).astype(np.float32)
        y = ops.make("conv2d", y, constant(w), pad=(1, 1, 1, 1), origin=f"conv{i}", label=f"y{i}")
        y = ops.make("relu", y, origin=f"conv{i}")
    y = ops.make("softmax", y, axis=3, origin="softmax", label="p")
    return Graph("net", (x,), (y,), ("p",))


def table(tmp_path: Path) -> speed.SpeedTable:
    made = speed.SpeedTable(HOST, folder=tmp_path)
    made._limits = LIMITS
    return made


def convolution(pixels: int, channels: int = 16) -> Call:
    x = ops.make("input", shape=(1, pixels, pixels, channels), dtype=DType.f32, label="x")
    w = constant(np.ones((16, 5, 5, channels), np.float32))
    y = ops.make("conv2d", x, w)
    return lower(Graph("g", (x,), (y,), ("y",)), HOST).calls[0]


def test_calls_that_take_equally_long_have_one_signature() -> None:
    plan = speed.uniform_plans(network(), HOST)["int8"]
    call = next(c for c in plan.calls if c.origin == "conv1")
    assert call.fn is not None
    other_scale = tuple(replace(o, text="0.5f" if o.text else "") for o in call.fn.operands)
    other_bound = tuple(replace(s, tail=tuple("7" for _ in s.tail)) for s in call.fn.steps)
    moved = tuple(replace(a, offset=a.offset + 64) for a in call.args)
    same = replace(call, fn=replace(call.fn, operands=other_scale, steps=other_bound), args=moved,
                   template=(*call.template[:-1], "3"), origin="elsewhere")
    assert speed.signature(same) == speed.signature(call)
    assert speed.signature(convolution(8)) != speed.signature(convolution(9))
    floats = speed.uniform_plans(network(), HOST)["float32"]
    assert speed.signature(floats.calls[-1]) != speed.signature(call)


def test_a_measured_call_is_looked_up_and_others_are_interpolated(tmp_path: Path) -> None:
    known = table(tmp_path)
    for pixels in (10, 40):
        known.add(convolution(pixels), 3 * known.bound(convolution(pixels)))
    assert known.us(convolution(10)) == 3 * known.bound(convolution(10))
    assert known.us(convolution(20)) == pytest.approx(3 * known.bound(convolution(20)))
    known.add(convolution(19), 5 * known.bound(convolution(19)))
    near, far = (known.us(convolution(p)) / known.bound(convolution(p)) for p in (20, 41))
    assert 3 < far < near < 5


def test_the_table_is_kept_and_a_damaged_one_is_ignored(tmp_path: Path) -> None:
    first = table(tmp_path)
    first.add(convolution(10), 12.5)
    first.save()
    second = speed.SpeedTable(HOST, folder=tmp_path)
    assert second.us(convolution(10)) == 12.5 and second.limits == LIMITS
    second.add(convolution(11), 13.5)
    first.add(convolution(12), 14.5)
    second.save()
    first.save()
    assert len(speed.SpeedTable(HOST, folder=tmp_path).rows) == 3
    for damage in ("{", "[]", '{"calls": {"a": [1]}, "limits": null}'):
        first.path.write_text(damage)
        assert not speed.SpeedTable(HOST, folder=tmp_path).rows


def test_a_forecast_has_every_layer_and_the_second_is_the_first(tmp_path: Path) -> None:
    known = table(tmp_path)
    graph = network()
    result = speed.predict(graph, target=HOST, table=known)
    assert [layer.name for layer in result.layers if layer.macs] == ["conv0", "conv1"]
    assert dict(result.measured) == {"float32": 1, "int8": 1, "int16": 1}
    assert all(layer.us[d] > 0 for layer in result.layers if layer.macs for d in speed.DTYPES)
    assert set(result.to_json()["total_us"]) == set(speed.DTYPES)
    known.rows.clear()
    again = speed.predict(graph, target=HOST, table=known)
    assert again.total_us == pytest.approx(result.total_us, abs=0.01) and not known.rows


def test_without_time_everything_is_interpolated(tmp_path: Path) -> None:
    result = speed.predict(network(), target=HOST, table=table(tmp_path), seconds=0)
    assert max(result.measured.values()) == 0 and min(result.total_us.values()) > 0


def test_a_layer_that_waits_for_its_weights(tmp_path: Path) -> None:
    """One row against many weights; with many rows the multiplications take longer than reading."""
    for rows, waits in ((1, True), (256, False)):
        x = ops.make("input", shape=(rows, 512), dtype=DType.f32, label="x", origin="x")
        w = constant(np.ones((512, 512), np.float32))
        graph = Graph("fc", (x,), (ops.make("linear", x, w, origin="fc", label="y"),), ("y",))
        known = table(tmp_path / str(rows))
        plans = speed.uniform_plans(graph, HOST)
        for dtype, plan in plans.items():
            for c in plan.calls:
                known.add(c, 10.0 if dtype == speed.WEIGHTS else 30.0)
        result = speed.forecast(graph, plans, known)
        assert [(layer.name, gain) for layer, gain in result.weight_only()] == [("fc", 3.0)] * waits
        assert speed.Forecast.from_json(result.to_json()) == result


def test_a_layer_that_loses_is_told_why(tmp_path: Path) -> None:
    known = table(tmp_path)
    plans = speed.uniform_plans(network(3), HOST)
    for dtype, plan in plans.items():
        for c in plan.calls:
            known.add(c, 90.0 if dtype == "int8" and c.macs else 30.0)
    layers = {layer.name: layer for layer in speed.forecast(network(3), plans, known).layers}
    assert layers["conv0"].loses and "3 of input" in layers["conv0"].loses
    assert layers["x"].loses and "quantizes" in layers["x"].loses
    assert layers["softmax"].loses is None


def test_the_command_prints_a_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skive import text

    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path / "cache"))
    known = speed.SpeedTable(HOST)
    known._limits = LIMITS
    known.save()
    text.save_text(network(), tmp_path / "net.txt")
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "net.txt"), "--predict"])
    assert shown.exit_code == 0 and "int16 us" in shown.output and "conv1" in shown.output
    document = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "net.txt"), "--predict", "--json"]).stdout)
    assert {"total_us", "layers", "measured", "limits"} <= set(document["prediction"])
    refused = CliRunner().invoke(cli, ["inspect", str(tmp_path), "--predict"])
    assert refused.exit_code == 2
