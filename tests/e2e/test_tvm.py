"""The back end of Apache TVM: the same outputs and exits as ours, and clear words where it cannot be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skive
from skive import ops, text
from skive.cli import cli
from skive.errors import SkiveError, ToolchainError, UnsupportedOpError
from skive.ir import Graph, Node, constant
from skive.types import DType

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="the extra tvm is not installed")


def stages(batch: int | None = None) -> Graph:
    """Convolutions of every kind and an exit after some; the trunk uses what the exit computed."""
    rng = np.random.default_rng(5)

    def w(*shape: int) -> Node:
        return constant((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    x = ops.make("input", shape=(1, 9, 8, 3), dtype=DType.f32, label="x")
    h = ops.make("relu", ops.make("conv2d", x, w(8, 3, 3, 3), w(8), pad=(1, 1, 1, 1)))
    h = ops.make("group_norm", h, constant(np.ones(8, np.float32)), w(8), groups=4)
    h = ops.make("conv2d", h, w(8, 3, 3, 1), groups=8, stride=(2, 1), pad=(1, 0, 1, 1))
    h = ops.make("clip", ops.make("conv2d", h, w(12, 2, 2, 4), w(12), groups=2), lo=0.0, hi=6.0)
    pooled = ops.make("concat", ops.make("max_pool2d", h, kernel=(2, 2), stride=(2, 2), pad=(0, 0, 0, 1)),
                      ops.make("avg_pool2d", h, kernel=(2, 2), stride=(2, 2), pad=(0, 0, 0, 1)), axis=3)
    early = ops.make("linear", ops.make("reshape", pooled, shape=(1, pooled.type.size)), w(4, pooled.type.size), w(4))
    g = ops.make("transpose", pooled, perm=(0, 3, 1, 2))
    g = ops.make("slice", g, start=(0, 1, 0, 0), size=(1, 11, *g.shape[2:]), step=(1, 2, 1, 1))
    g = ops.make("pad", g, before=(0, 0, 1, 0), after=(0, 0, 0, 2), value=0.5)
    g = ops.make("gelu", ops.make("hard_swish", ops.make("sigmoid", g)))
    late = ops.make("linear", ops.make("reduce_mean", g, axes=(2, 3), keep=False), w(4, 11))
    late = ops.make("add", ops.make("softmax", late), ops.make("tanh", early))
    return Graph("stages", (x,), (early, late), ("early", "late"), batch)


EXITS = [skive.Exit("early", c, t, of=of) for c, t, of in (
    ("max-prob", 0.5, None), ("margin", 0.2, None), ("entropy", 1.1, None), ("energy", 1.2, None),
    ("gate", 0.5, (1.5, -0.7, 2.0, -0.3, -1.4)))]


@needs_tvm
@pytest.mark.parametrize("wanted", EXITS, ids=lambda e: e.criterion)
def test_tvm_takes_the_same_exits(wanted: skive.Exit) -> None:
    ours = skive.compile(stages(8), exits=[wanted], batch_max=8)
    theirs = skive.compile(stages(8), exits=[wanted], batch_max=8, backend="tvm")
    assert theirs.report["verification"]["passed"]
    x = np.random.default_rng(0).standard_normal((64, 9, 8, 3)).astype(np.float32)
    scores = np.sort(np.concatenate([ours.run(x[i:i + 8]).scores[:, 0] for i in range(0, 64, 8)]))
    ours.thresholds = theirs.thresholds = {"early": float(scores[31:33].mean())}
    taken = []
    for i in range(0, 64, 8):
        a, b = ours.run(x[i:i + 8]), theirs.run(x[i:i + 8])
        np.testing.assert_array_equal(a.exit, b.exit)
        np.testing.assert_array_equal(a.macs, b.macs)
        np.testing.assert_allclose(a.outputs, b.outputs, rtol=1e-4, atol=1e-5)
        taken += a.exit.tolist()
    assert taken.count(0) == 32
    for a, b in zip(ours.all_outputs(x[:8]), theirs.all_outputs(x[:8]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    theirs.thresholds = {"early": np.inf if wanted.leaves[0] == ">" else -np.inf}
    np.testing.assert_array_equal(theirs.run(x[:8]).exit, 1)


def branches() -> Graph:
    """A choice inside a side of a choice; the other side is a constant."""
    rng = np.random.default_rng(6)
    w = [constant(rng.standard_normal((6, 6)).astype(np.float32)) for _ in range(3)]
    x = ops.make("input", shape=(1, 6), dtype=DType.f32, label="x")

    def positive(v: Node) -> Node:
        return ops.make("greater", ops.make("reduce_sum", v, axes=(1,), keep=False), constant(np.zeros(1, np.float32)))

    a = ops.make("tanh", ops.make("linear", x, w[0]))
    picked = ops.make("gather", a, constant(np.int64([5, -2, 0, 3, 1, 2])), axis=1)
    a = ops.make("scatter_elements", picked, constant(np.int64([[1, 4]])), constant(np.float32([[0.5, -0.5]])), axis=1)
    inner = ops.make("choose", positive(a), ops.make("linear", a, w[1]), ops.make("exp", ops.make("linear", a, w[2])))
    y = ops.make("choose", positive(x), inner, constant(np.full((1, 6), 0.25, np.float32)))
    return Graph("branches", (x,), (ops.make("add", y, x),), ("y",), None)


@needs_tvm
def test_only_the_side_that_is_taken_runs() -> None:
    ours, theirs = skive.compile(branches()), skive.compile(branches(), backend="tvm")
    (stage,) = theirs._call._stages
    ran: list[int] = []

    def counted(k: int, run: Any) -> Any:
        return lambda *x: (ran.append(k), run(*x))[1]

    for k, s in enumerate(stage):
        object.__setattr__(s, "run", counted(k, s.run))
    lengths = set()
    for x in np.random.default_rng(1).standard_normal((40, 1, 6)).astype(np.float32):
        ran.clear()
        np.testing.assert_allclose(theirs(x), ours(x), rtol=1e-5, atol=1e-6)
        lengths.add(tuple(ran))
    assert len(lengths) == 3  # ways through the network
    assert max(map(len, lengths)) < len(stage)


@needs_tvm
def test_the_command_writes_an_artefact_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.save_text(stages(), tmp_path / "net.skive")
    np.savez(tmp_path / "x.npz", x=np.ones((3, 9, 8, 3), np.float32))

    def command(*words: object) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            cli.main([str(w) for w in words] + ["--json"])
        return json.loads(capsys.readouterr().out)

    made = command("compile", tmp_path / "net.skive", "-o", tmp_path / "net", "--backend", "tvm",
                   "--exit", "early:entropy=0.9")
    assert [e["macs"] for e in made["exits"]] == sorted(e["macs"] for e in made["exits"])
    command("run", tmp_path / "net", "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert command("verify", tmp_path / "net", "--against", tmp_path / "net.skive")["passed"]
    with pytest.raises(SystemExit, match="1"):
        cli.main(["profile", str(tmp_path / "net")])
    assert "compiled by TVM" in capsys.readouterr().err
    want = skive.compile(stages(), exits=["early:entropy=0.9"])(np.ones((1, 9, 8, 3), np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["late"][0], want[0], rtol=1e-4, atol=1e-5)


@needs_tvm
def test_an_operation_without_a_form_is_named() -> None:
    x = ops.make("input", shape=(1, 6), dtype=DType.f32, label="x")
    y = ops.make("cumsum", x, axis=1, label="sums")
    with pytest.raises(UnsupportedOpError, match="sums.*cumsum is not passed on to TVM"):
        skive.compile(Graph("sums", (x,), (y,), ("y",), None), backend="tvm")


def test_what_the_back_end_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkiveError, match="leave quantize"):
        skive.compile(stages(), backend="tvm", quantize=skive.Quantize("int8", calibration=[]))
    with pytest.raises(SkiveError, match="it can be skive or tvm"):
        skive.compile(stages(), backend="iree")
    import sys

    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(ToolchainError, match=r"pip install 'skive-compiler\[tvm\]'"):
        skive.compile(stages(), backend="tvm")
