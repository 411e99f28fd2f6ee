"""The `skive` command: what each subcommand prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from skive import console
from skive.cli import cli
from skive.cli.arrays import fit_arrays
from skive.cli.options import Bytes, InputShape
from skive.errors import ShapeError, UnsupportedOpError
from skive.runtime import TensorInfo

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 10 - 0.5
REPORT_KEYS = {"skive", "model", "target", "passes", "compiled", "layers", "verification"}


def model(path: Path, *, scale: float = 1.0, op: str = "Relu", batch: int | str = 2) -> Path:
    """A file with y = op(x @ weights), x [batch, 4]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="layer/MatMul"),
         helper.make_node(op, ["h"], ["y"], name="layer/act")], "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(WEIGHTS * scale, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny.onnx and the artefact `tiny`, and a cache of its own."""
    folder = tmp_path_factory.mktemp("cli")
    before = os.environ.get("SKIVE_CACHE")
    os.environ["SKIVE_CACHE"] = str(folder / "cache")
    model(folder / "tiny.onnx")
    assert skive("compile", folder / "tiny.onnx", "-o", folder / "tiny").exit_code == 0
    yield folder
    if before is None:
        del os.environ["SKIVE_CACHE"]
    else:
        os.environ["SKIVE_CACHE"] = before


def skive(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def printed_json(result: Result) -> Any:
    """The one document on standard output of a command that went well."""
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_compile_writes_the_artefact_and_says_what_it_is(place: Path) -> None:
    result = skive("compile", place / "tiny.onnx", "-o", place / "again", "--name", "other")
    assert result.exit_code == 0
    assert result.stderr == ""
    for figure in ("MACs", "weights", "arena", "code", "verified     yes"):
        assert figure in result.stdout
    assert (place / "again" / "libother.so").exists()
    assert json.loads((place / "again" / "manifest.json").read_text())["name"] == "other"


def test_a_copy_of_a_model_is_compiled_under_its_own_name(place: Path) -> None:
    # The same bytes are in the cache already.
    (place / "renamed.onnx").write_bytes((place / "tiny.onnx").read_bytes())
    document = printed_json(skive("compile", place / "renamed.onnx", "-o", place / "renamed", "--json"))
    assert document["model"]["path"] == str(place / "renamed.onnx")
    assert (place / "renamed" / "librenamed.so").exists()


def test_compile_json_is_the_report(place: Path) -> None:
    document = printed_json(skive("compile", place / "tiny.onnx", "-o", place / "json", "--json"))
    assert set(document) >= REPORT_KEYS
    assert document["model"]["macs"] == 2 * 4 * 3
    assert document["verification"]["passed"] is True
    assert document["artefact"] == str(place / "json")


def test_emit_only_runs_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert skive("compile", place / "tiny.onnx", "-o", place / "emitted", "--emit-only").exit_code == 0
    assert (place / "emitted" / "tiny.cpp").exists()
    assert not list((place / "emitted").glob("*.so"))


def test_an_open_batch(place: Path) -> None:
    model(place / "open.onnx", batch="n")
    assert skive("compile", place / "open.onnx", "-o", place / "open", "--input", "x=Nx4",
                 "--batch-max", 3).exit_code == 0
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    np.savez(place / "seven.npz", x=x)
    summary = printed_json(skive("run", place / "open", "--input", place / "seven.npz",
                                 "-o", place / "seven-out.npz", "--json"))
    assert summary["calls"] == 3  # 3 + 3 + 1 samples
    np.testing.assert_allclose(np.load(place / "seven-out.npz")["y"], np.maximum(x @ WEIGHTS, 0), atol=1e-6)


@pytest.mark.parametrize(("option", "figure"), [("--max-ram", "arena_bytes"), ("--max-flash", "weight_bytes")])
def test_a_limit_is_kept_or_nothing_is_written(place: Path, option: str, figure: str) -> None:
    # Wide enough in the middle to need an arena.
    wide = helper.make_graph(
        [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
         helper.make_node("MatMul", ["r", "b"], ["y"])], "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 99), np.float32), "a"),
         numpy_helper.from_array(np.random.default_rng(1).standard_normal((99, 3)).astype(np.float32), "b")])
    path = place / "wide.onnx"
    onnx.save(helper.make_model(wide, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    output = place / f"wide{option}"
    compiled = printed_json(skive("compile", path, "-o", output, option, "1G", "--json"))["compiled"]
    need = compiled[figure] + (compiled["code_bytes"] if option == "--max-flash" else 0)
    assert need > 0
    assert (output / "manifest.json").exists()

    refused = place / f"refused{option}"
    result = skive("compile", path, "-o", refused, option, need - 1)
    assert result.exit_code == 1
    assert f"{need:,}" in result.stderr and option in result.stderr
    assert not refused.exists()
    assert skive("compile", path, "-o", refused, option, need).exit_code == 0


def test_a_configuration_file_sets_options_and_the_command_line_wins(place: Path) -> None:
    config = place / "build.toml"
    config.write_text(f'output = "{place}/configured"\nname = "from_file"\nno-verify = true\n'
                      'input = ["x=2x4"]\ntarget = "generic"\nmax-ram = "1M"\n')
    document = printed_json(skive("compile", place / "tiny.onnx", "--config", config, "--target", "host",
                                  "--json"))
    assert document["verification"] is None
    assert document["target"]["name"] != "generic" or "avx2" not in document["target"]["isa"]
    assert (place / "configured" / "libfrom_file.so").exists()


@pytest.mark.parametrize("names", [{"x": "x"}, {"arr_0": "x"}, {"whatever": "x"}])
def test_run_takes_inputs_by_name_or_position(place: Path, names: dict[str, str]) -> None:
    x = np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32)
    np.savez(place / "in.npz", **{k: x for k in names})
    result = skive("run", place / "tiny", "--input", place / "in.npz", "-o", place / "out.npz")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_allclose(np.load(place / "out.npz")["y"], np.maximum(x @ WEIGHTS, 0), atol=1e-6)
    assert "float32" in result.stdout and "1 call" in result.stdout


def test_run_json_has_the_values_of_small_outputs(place: Path) -> None:
    np.savez(place / "ones.npz", x=np.ones((2, 4), np.float32))
    (output,) = printed_json(skive("run", place / "tiny", "--input", place / "ones.npz", "--json"))["outputs"]
    np.testing.assert_allclose(output["values"], np.maximum(np.ones((2, 4)) @ WEIGHTS, 0), atol=1e-6)
    assert output["name"] == "y" and output["shape"] == [2, 3]


def test_run_takes_one_array_of_several_by_key_and_all_its_samples(place: Path) -> None:
    np.savez(place / "many.npz", features=np.ones((6, 4), np.float32), labels=np.zeros(6, np.int64))
    summary = printed_json(skive("run", place / "tiny", "--input", f"{place}/many.npz:features", "--json"))
    assert summary["calls"] == 3
    assert summary["outputs"][0]["shape"] == [6, 3]


def test_verify_agrees_with_the_model_and_not_with_another(place: Path) -> None:
    assert printed_json(skive("verify", place / "tiny", "--against", place / "tiny.onnx", "--json"))["passed"]
    model(place / "scaled.onnx", scale=1.01)
    result = skive("verify", place / "tiny", "--against", place / "scaled.onnx")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_inspect_a_model(place: Path) -> None:
    facts = printed_json(skive("inspect", place / "tiny.onnx", "--json"))
    assert facts["inputs"] == [{"name": "x", "shape": [2, 4], "dtype": "float32"}]
    assert facts["model"]["macs"] == 24
    assert facts["unsupported"] == []
    assert {o["op"] for o in facts["operations"]} >= {"relu"}
    assert "relu" in skive("inspect", place / "tiny.onnx").stdout


def test_inspect_lists_everything_that_is_not_supported(place: Path) -> None:
    model(place / "odd.onnx", op="NonZero")
    facts = printed_json(skive("inspect", place / "odd.onnx", "--json"))
    assert any("layer/act" in u["node"] or "NonZero" in u["reason"] for u in facts["unsupported"])
    assert "not supported" in skive("inspect", place / "odd.onnx").stdout


def test_inspect_writes_the_page_of_a_model(place: Path) -> None:
    assert skive("inspect", place / "tiny.onnx", "--html", place / "model.html").exit_code == 0
    assert "tiny.onnx" in (place / "model.html").read_text()


def test_inspect_an_artefact(place: Path) -> None:
    document = printed_json(skive("inspect", place / "tiny", "--json"))
    assert set(document["report"]) >= REPORT_KEYS
    assert document["files"]["libtiny.so"] > 0
    assert "libtiny.so" in skive("inspect", place / "tiny", "--html", place / "copy.html").stdout
    assert (place / "copy.html").read_bytes() == (place / "tiny" / "report.html").read_bytes()


def test_opt_prints_text_that_it_can_read_again(place: Path) -> None:
    first = skive("opt", place / "tiny.onnx", "-p", "fold-constants,eliminate-dead")
    assert first.exit_code == 0, first.stderr
    assert "relu" in first.stdout
    assert skive("opt", place / "tiny.onnx", "-p", "", "-o", place / "tiny.skive").exit_code == 0
    second = skive("opt", place / "tiny.skive", "-p", "fold-constants,eliminate-dead")
    assert second.stdout == first.stdout
    listed = skive("opt", place / "tiny.onnx", "-p", "help").stdout
    assert "fold-constants" in listed and "eliminate-dead" in listed


def test_targets(place: Path) -> None:
    document = printed_json(skive("targets", "--json"))
    hosts = [t for t in document["targets"] if t["host"]]
    assert len(hosts) == 1 and hosts[0]["runs_here"]
    assert next(t for t in document["targets"] if t["name"] == "generic")["runs_here"]
    assert document["compiler"]["version"]
    assert "generic" in skive("targets").stdout


def test_profile_times_every_layer(place: Path) -> None:
    result = printed_json(skive("profile", place / "tiny", "--rounds", 50, "--json"))
    report = json.loads((place / "tiny" / "report.json").read_text())
    assert [layer["name"] for layer in result["layers"]] == [layer["name"] for layer in report["layers"]]
    assert sum(layer["share"] for layer in result["layers"]) == pytest.approx(1)
    assert all(layer["us"] > 0 for layer in result["layers"])
    assert result["rounds"] == 50
    shown = skive("profile", place / "tiny", "--rounds", 5, "--html", place / "timed.html")
    assert shown.exit_code == 0 and "GMAC/s" in shown.stdout
    assert "Latency" in (place / "timed.html").read_text()
    assert "Latency" in (place / "tiny" / "report.html").read_text()  # measured once by the compile


def test_bench_alone(place: Path) -> None:
    document = printed_json(skive("bench", place / "tiny", "--seconds", 0.2, "--json"))
    assert set(document["machine"]) == {"cpu", "isa", "cores"}
    (row,) = document["results"]
    assert set(row) >= {"engine", "version", "threads", "median_ms", "min_ms", "spread", "runs"}
    assert 0 < row["min_ms"] <= row["median_ms"]
    assert document["ratio"] == {}


def test_bench_against_onnxruntime(place: Path) -> None:
    pytest.importorskip("onnxruntime")
    document = printed_json(skive("bench", place / "tiny.onnx", "--seconds", 0.2, "--against", "onnxruntime",
                                  "--json"))
    own, peer = document["results"]
    assert (own["engine"], peer["engine"]) == ("skive", "onnxruntime")
    assert own["agrees"] and peer["agrees"]
    # The ratio is of pairs, not of these two numbers; they are far from 10 times apart.
    assert document["ratio"]["onnxruntime"] == pytest.approx(peer["median_ms"] / own["median_ms"], rel=0.9)


def test_bench_marks_an_artefact_whose_model_has_changed(place: Path) -> None:
    pytest.importorskip("onnxruntime")
    model(place / "moving.onnx")
    assert skive("compile", place / "moving.onnx", "-o", place / "moving", "--no-verify").exit_code == 0
    model(place / "moving.onnx", scale=2.0)
    result = skive("bench", place / "moving", "--against", "onnxruntime")
    assert result.exit_code == 1 and "has changed" in result.stderr


def test_every_command_has_help_with_an_example() -> None:
    for name, command in cli.commands.items():
        result = skive(name, "--help")
        assert result.exit_code == 0
        if any(isinstance(p, click.Argument) for p in command.params):
            assert "Example" in result.stdout and f"skive {name} " in result.stdout


def test_every_option_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (.*)$", manual, flags=re.MULTILINE)[1:])] * 2, strict=True))
    shapes = {"--input", "--batch-max", "--example"}
    for name, command in cli.commands.items():
        for p in command.params:
            if isinstance(p, click.Option) and p.name != "config":
                for o in p.opts:
                    assert f"`{o}" in sections[name] or o in shapes and "shapes" in sections[name].lower(), (name, o)


# ------------------------------------------------------------------------------------- processes


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "skive.cli", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_command_as_a_process(place: Path) -> None:
    process = start("inspect", place / "tiny", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["manifest"]["name"] == "tiny"
    process = start("run", place / "nothing", "--input", "x.npz")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(place: Path, tmp_path: Path, number: int) -> None:
    marker = tmp_path / "started"
    slow = tmp_path / "slow-compiler"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo slow 1.0 && exit 0\necho $$ >> {marker}\nsleep 60\n')
    slow.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    process = start("compile", place / "tiny.onnx", "-o", home / "out",
                    env={**os.environ, "CXX": str(slow), "SKIVE_CACHE": str(tmp_path / "cache")})
    end = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (1, "", "error: interrupted\n")
    assert list(home.iterdir()) == []
    time.sleep(0.2)
    for pid in marker.read_text().split():
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_thread_starts_after_the_signal_ends_too(number: int) -> None:
    """As a pool does that compiles one file while another is interrupted: the command waits for all of its threads."""
    program = f"""
import concurrent.futures, os, signal, subprocess, time
from skive import console

def late():
    while signal.getsignal({int(number)}) is before:
        time.sleep(0.01)
    subprocess.run(["sleep", "60"])

def build():
    global before
    before = signal.getsignal({int(number)})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(late)
        os.kill(os.getpid(), {int(number)})

raise SystemExit(console._guarded(build))
"""
    process = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=30)
    assert (process.returncode, process.stdout, process.stderr) == (1, "", "error: interrupted\n")


def test_a_reader_that_leaves_is_no_traceback(place: Path) -> None:
    process = start("inspect", place / "tiny", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert err == ""


# ----------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(("text", "shape"), [
    ("x=1x3x224x224", ("x", (1, 3, 224, 224))), ("a=b=4", ("a=b", (4,))), ("x=Nx3", ("x", (-1, 3))), ("s=", ("s", ()))])
def test_an_input_shape_is_read(text: str, shape: tuple[str, tuple[int, ...]]) -> None:
    assert InputShape()(text) == shape


@pytest.mark.parametrize("text", ["x", "=1x2", "x=1x-2", "x=1xN", "x=1 x 2", "x=axb"])
def test_a_wrong_input_shape_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        InputShape()(text)


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("256K", 262144), ("2m", 2 << 20), ("1GB", 1 << 30)])
def test_a_number_of_bytes_is_read(text: str, count: int) -> None:
    assert Bytes()(text) == count


def test_arrays_are_fitted_to_the_inputs() -> None:
    ports = [TensorInfo("image", (1, 1, 2, 2), "float32"), TensorInfo("mask", (1, 3), "bool")]
    images, masks = np.zeros((5, 2, 2), np.uint8), np.zeros((5, 3), bool)
    image, mask = fit_arrays({"mask": masks, "image": images}, ports)
    assert image.shape == (5, 1, 2, 2) and image.dtype == np.float32 and mask.shape == (5, 3)
    (single,) = fit_arrays({"arr_0": np.zeros((1, 2, 2))}, ports[:1])
    assert single.shape == (1, 1, 2, 2)
    for wrong, message in [({"image": images}, "mask"), ({"image": np.zeros((5, 3, 2)), "mask": masks}, r"\[5, 3, 2\]"),
                           ({"image": images, "mask": np.zeros((5, 3))}, "float64")]:
        with pytest.raises(ShapeError, match=message):
            fit_arrays(wrong, ports)
    codes = [TensorInfo("codes", (1, 2), "int8", 0.5, 0)]
    (fitting,) = fit_arrays({"codes": np.array([[-128, 127]])}, codes)
    assert fitting.dtype == np.int8
    with pytest.raises(ShapeError, match="values from 3 to 200, which int8 does not hold; give real numbers"):
        fit_arrays({"codes": np.array([[3, 200]], np.uint8)}, codes)


def test_what_is_printed_stays_on_one_line() -> None:
    assert console.printable("a\nb\x1b[31m\u202ec") == "a\\nb\\x1b[31m\\u202ec"
    error = UnsupportedOpError([("n1", "no Foo", "use Bar"), ("n2\n", "no Baz", "")])
    assert console.describe(error) == "2 places are not supported: n1: no Foo; use Bar | n2\\n: no Baz"


@pytest.mark.parametrize(("n", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (3 << 20, "3 MB"), (5 << 30, "5 GB")])
def test_bytes_are_told_in_a_fitting_unit(n: int, text: str) -> None:
    assert console.bytes_text(n) == text
