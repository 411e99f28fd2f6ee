"""Misuse of the command: one line, the right exit status, nothing half-written, never a traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

import skive as package
from skive import build, cli


def save(path: Path, op: str = "Relu", name: str = "act") -> None:
    """A model of one operation on x [2, 4]."""
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], name=name)], "tiny",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def skive(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good and bad models, artefacts and data; the working folder of these tests."""
    folder = tmp_path_factory.mktemp("errors")
    save(folder / "good.onnx")
    whole = (folder / "good.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[:len(whole) // 2])
    (folder / "noise.onnx").write_bytes(np.random.default_rng(0).bytes(500))
    (folder / "empty.onnx").write_bytes(b"")
    save(folder / "unknown.onnx", op="NonZero")
    save(folder / "hostile.onnx", op="NonZero", name="a\nerror: b\x1b[2J\u202e")
    (folder / "pickled.pt2").write_bytes(pickle.dumps({"weights": 1}))
    (folder / "text.skive").write_text("graph @x(")
    (folder / "binary.skive").write_bytes(bytes(range(256)))
    np.savez(folder / "good.npz", x=np.zeros((2, 4), np.float32))
    np.savez(folder / "shape.npz", x=np.zeros((2, 5), np.float32))
    np.savez(folder / "type.npz", x=np.zeros((2, 4), np.complex64))
    np.savez(folder / "object.npz", x=np.array([{}], object))
    np.savez(folder / "two.npz", a=np.zeros((2, 4), np.float32), b=np.zeros((2, 4), np.float32))
    np.save(folder / "single.npy", np.zeros((2, 4), np.float32))
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:80])
    (folder / "bad.toml").write_text("output = [")
    (folder / "unknown.toml").write_text('outptu = "x"')
    (folder / "kind.toml").write_text('threads = ["1"]')
    (folder / "range.toml").write_text("threads = 0")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep me")
    for name, manifest in [("no-json", "{"), ("no-keys", "{}"), ("list", "[]"),
                           ("far", json.dumps({"name": "../../x", "threads": 1, "inputs": [], "outputs": [],
                                               "arena_bytes": 0, "batch_max": None, "isa": []}))]:
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)
        (folder / name / "report.json").write_text("{}")
    before, cache = os.getcwd(), os.environ.get("SKIVE_CACHE")
    os.chdir(folder)
    os.environ["SKIVE_CACHE"] = str(folder / "cache")
    assert skive("compile", "good.onnx", "-o", "art").exit_code == 0
    yield folder
    os.chdir(before)
    os.environ.pop("SKIVE_CACHE")
    if cache is not None:
        os.environ["SKIVE_CACHE"] = cache


HINT = "please report it (SKIVE_DEBUG=1 shows where it happened)"
# Arguments, and what the line must say.
FAULTS = [
    ("compile nothing.onnx -o out", "nothing.onnx"),
    ("compile cut.onnx -o out", "cut.onnx"),
    ("compile noise.onnx -o out", "noise.onnx"),
    ("compile empty.onnx -o out", "empty.onnx"),
    ("compile full -o out", "full"),
    ("compile unknown.onnx -o out", "act"),
    ("compile hostile.onnx -o out", "\\n"),
    ("compile pickled.pt2 -o out", "pickled.pt2"),
    ("compile text.skive -o out", ""),
    ("compile binary.skive -o out", ""),
    ("compile no.such.module:build -o out", ""),
    ("compile good.onnx -o out --emit-only --export-onnx nowhere/x.onnx", "cannot write nowhere/x.onnx"),
    ("compile good.onnx -o out --input imagee=2x4", "'imagee', which is no input and no dimension"),
    ("compile good.onnx -o out --prune half", "0.4 removes 40 %"),
    ("compile good.onnx -o full", "full"),
    ("compile good.onnx -o good.npz", "good.npz"),
    ("compile good.onnx -o good.npz/out", ""),
    ("compile good.onnx -o /proc/out", "/proc/out"),
    ("compile good.onnx -o out --target riscv", "riscv"),
    ("compile good.onnx -o out --input x=3x4", "x"),
    ("compile good.onnx -o out --input x=99999999999x99999999999", ""),
    ("compile good.onnx -o out --calibrate shape.npz", "[2, 5]"),
    ("compile good.onnx -o out --calibrate nothing.npz", "nothing.npz"),
    ("compile good.onnx -o out --example cut.npz", "cut.npz"),
    ("compile good.onnx -o out --max-flash 1", "--max-flash"),
    ("compile good.onnx -o out --config nothing.toml", "nothing.toml"),
    ("compile good.onnx -o out --config bad.toml", "bad.toml"),
    ("compile good.onnx -o out --config unknown.toml", "outptu"),
    ("compile good.onnx -o out --config kind.toml", "threads"),
    ("compile good.onnx -o out --dump-ir good.npz", "good.npz"),
    ("run nothing --input good.npz", "nothing"),
    ("run full --input good.npz", "full"),
    ("run no-json --input good.npz", "no-json"),
    ("run no-keys --input good.npz", "no-keys"),
    ("run list --input good.npz", "list"),
    ("run far --input good.npz", ""),
    ("run good.onnx --input good.npz", "good.onnx"),
    ("run art --input nothing.npz", "nothing.npz"),
    ("run art --input cut.npz", "cut.npz"),
    ("run art --input single.npy", "single.npy"),
    ("run art --input object.npz", "object.npz is not a readable .npz file: it holds no arrays of numbers"),
    ("run art --input good.onnx", "it holds no arrays of numbers"),
    ("run art --input shape.npz", "[2, 5]"),
    ("run art --input type.npz", "complex64"),
    ("run art --input two.npz", "FILE.npz:KEY"),
    ("run art --input good.npz:y", "'y'"),
    ("run art --input good.npz -o nowhere/out.npz", "nowhere/out.npz"),
    ("run art --input good.npz -o full", "full"),
    ("verify art --against nothing.onnx", "nothing.onnx"),
    ("verify art --against good.onnx --data shape.npz", "[2, 5]"),
    ("inspect nothing.onnx", "nothing.onnx"),
    ("inspect cut.onnx", "cut.onnx"),
    ("inspect no-json", "no-json"),
    ("inspect no-keys", "no-keys"),
    ("inspect list", "list"),
    ("inspect good.onnx --html nowhere/page.html", "nowhere/page.html"),
    ("opt good.onnx -p no-such-pass", "no-such-pass"),
    ("opt good.onnx -p fold-constants{", "fold-constants{"),
    ("opt good.onnx -p fold-constants{max_bytes=x}", "max_bytes"),
    ("opt good.onnx -p eliminate-dead -o nowhere/x.skive", "nowhere"),
    ("profile full", "full"),
    ("profile art --html nowhere/page.html", "nowhere/page.html"),
    ("bench nothing", "nothing"),
    ("bench art --threads 7", "7"),
]
MISUSE = ["nonsense", "compile", "compile good.onnx", "compile good.onnx -o out --no-such-flag",
          "compile good.onnx -o out --threads 0", "compile good.onnx -o out --threads many",
          "compile good.onnx -o out --input x", "compile good.onnx -o out --input x=Nx4",
          "compile good.onnx -o out --max-ram lots", "compile good.onnx -o out --integer-only",
          "compile good.onnx -o out --sparsify-criterion random", "compile good.onnx -o out --prune-criterion l1",
          "compile good.onnx -o out --config range.toml", "compile good.onnx -o out --quantize int8",
          "run art", "verify art", "opt good.onnx", "bench", "bench art --against tvm", "bench art --against skive",
          "inspect", "profile art --rounds 0", "targets extra"]


def check_fault(result: Result, says: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "internal" not in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert all(c.isprintable() for c in result.stderr[:-1])
    assert says in result.stderr


@pytest.mark.parametrize(("line", "says"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_is_one_line(place: Path, line: str, says: str) -> None:
    before = sorted(p.name for p in place.iterdir())
    check_fault(skive(*line.split()), says)
    assert sorted(p.name for p in place.iterdir()) == before  # nothing written, nothing left
    assert (place / "full" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("line", [f[0] for f in FAULTS if f[0].startswith(("run", "inspect"))])
def test_json_prints_no_document_on_a_fault(place: Path, line: str) -> None:
    result = skive(*line.split(), "--json")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize("line", MISUSE)
def test_misuse_shows_the_usage(place: Path, line: str) -> None:
    result = skive(*line.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Usage: skive" in result.stderr
    assert not (place / "out").exists()


def test_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    save(place / "fresh.onnx", op="Sigmoid")
    try:
        check_fault(skive("compile", "fresh.onnx", "-o", "out"), "no-such-compiler")
        assert not (place / "out").exists()
        targets = skive("targets")
        assert targets.exit_code == 0 and "no-such-compiler" in targets.stdout
    finally:
        build.compiler.cache_clear()


def test_a_compiler_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = place / "broken-compiler"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit 0\n'
                      'echo "x.cpp:1: error: no luck" >&2\nexit 4\n')
    broken.chmod(0o755)
    build.compiler.cache_clear()
    monkeypatch.setenv("CXX", str(broken))
    try:
        check_fault(skive("compile", "good.onnx", "-o", "out"), "no luck")
        assert not (place / "out").exists()
        assert not [p for p in place.iterdir() if p.name.startswith(".out")]
    finally:
        build.compiler.cache_clear()


def test_a_missing_engine_names_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    check_fault(skive("bench", "good.onnx", "--against", "onnxruntime"), "pip install skive-compiler[onnxruntime]")


def raises(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **named: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(("error", "line"), [
    (RuntimeError("a\nb"), f"error: internal: RuntimeError: a\\nb; {HINT}"),
    (RecursionError("deep"), f"error: internal: RecursionError: deep; {HINT}"),
    (MemoryError(), "error: out of memory"),
    (OSError(28, "No space left on device", "/tmp/x"), "error: /tmp/x: No space left on device"),
    (KeyboardInterrupt(), "error: interrupted"),
    (click.ClickException("odd"), "error: odd")])
def test_what_nobody_expected_is_one_line_too(place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
                                              line: str) -> None:
    monkeypatch.setattr(package, "compile", raises(error), raising=False)
    monkeypatch.delenv("SKIVE_DEBUG", raising=False)
    result = skive("compile", "good.onnx", "-o", "out")
    assert result.exit_code == 1
    assert result.stderr.strip("\n") == line


def test_the_traceback_is_there_for_those_who_ask(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "compile", raises(RuntimeError("here")), raising=False)
    monkeypatch.setenv("SKIVE_DEBUG", "1")
    result = skive("compile", "good.onnx", "-o", "out")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and result.stderr.endswith("error: internal: RuntimeError: here\n")
