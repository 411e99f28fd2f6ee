"""Damaged and hostile models through the whole command: one line, exit status 1, nothing left behind.

What the loader and the importer say to each kind of damage is tested beside them; here the command
is run as a user runs it, in a process of its own.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import skive

COMMAND = [sys.executable, "-c", "from skive.cli import main; main()"]


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a cache of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        env={**os.environ, "SKIVE_CACHE": str(cwd / "cache"), "SKIVE_CXXFLAGS": "-O0", **environment},
    )


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def model(
    nodes: list[NodeProto], weights: Sequence[TensorProto] = (), shape: tuple[int, ...] = (2, 4), name: str = "net"
) -> ModelProto:
    """A model from `x` of the given shape to the last node's first output."""
    result = onnx.ValueInfoProto(name=nodes[-1].output[0])
    graph = helper.make_graph(nodes, name, [value("x", *shape)], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def good() -> ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    return model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], [weight])


def outside(location: str, **entries: str) -> ModelProto:
    """The good model with its weight in the file `location`."""
    proto = good()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=text)
    return proto


def nested(depth: int) -> ModelProto:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [value("y", 2, 4)])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=onnx.GraphProto())
        body = helper.make_graph([node], "g", [], [value("y", 2, 4)])
    return model(list(body.node), [numpy_helper.from_array(np.array(True), "c")])


def cyclic() -> ModelProto:
    return model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])])


def with_nan() -> ModelProto:
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = np.nan
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [numpy_helper.from_array(weight, "w")])


def with_dims(*dims: int) -> ModelProto:
    proto = good()
    proto.graph.initializer[0].dims[:] = dims
    return proto


def conv(**attributes: object) -> ModelProto:
    weight = numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "w")
    return model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)], [weight], (1, 1, 8, 8))


def checkpoint() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({"w": 1}))
    return buffer.getvalue()


def node(op: str, **attributes: object) -> ModelProto:
    return model([helper.make_node(op, ["x"], ["y"], name="odd", **attributes)])


WHOLE = good().SerializeToString()
# what is wrong: (the file, what the line must say)
BAD: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "truncated": (lambda: WHOLE[: len(WHOLE) // 2], "damaged"),
    "one byte short": (lambda: WHOLE[:-1], "damaged"),
    "noise": (lambda: np.random.default_rng(1).bytes(5000), "not an ONNX model"),
    "pickle": (lambda: pickle.dumps({"w": 1}), "pickle"),
    "checkpoint": (checkpoint, "zip archive"),
    "relative path": (lambda: outside("../secret.bin"), "w"),
    "hidden relative path": (lambda: outside("sub/../../secret.bin"), "w"),
    "absolute path": (lambda: outside("/etc/passwd"), "w"),
    "link out of the folder": (lambda: outside("link.bin"), "w"),
    "device": (lambda: outside("/dev/zero"), "w"),
    "pipe": (lambda: outside("fifo"), "w"),
    "location that is too long": (lambda: outside("x" * 5000), "not a file name"),
    "location that is no text": (
        lambda: outside("weights.bin").SerializeToString().replace(b"weights", b"weig\xffts"), "not a file name"),
    "offset behind the end": (lambda: outside("weights.bin", offset="1000000"), "w"),
    "negative offset": (lambda: outside("weights.bin", offset="-4"), "w"),
    "overflowing shape": (lambda: model([helper.make_node("Relu", ["x"], ["y"])], shape=(2**31,) * 3), "2^40"),
    "negative dimension": (lambda: model([helper.make_node("Relu", ["x"], ["y"])], shape=(2, -4)), "x"),
    "overflowing weight": (lambda: with_dims(2**33, 2**33), "w"),
    "negative weight dimension": (lambda: with_dims(-4, -3), "w"),
    "weight without its data": (lambda: with_dims(400, 300), "w"),
    "huge kernel": (lambda: conv(kernel_shape=[2**62, 3]), "conv"),
    "huge pads": (lambda: conv(pads=[2**40] * 4), "conv"),
    "negative pads": (lambda: conv(pads=[-9, 0, -9, 0]), "conv"),
    "zero stride": (lambda: conv(strides=[0, 1]), "conv"),
    "negative group": (lambda: conv(group=-1), "conv"),
    "zero group": (lambda: conv(group=0), "conv"),
    "deep nesting": (lambda: nested(30), "deep"),
    "cycle": (cyclic, "b"),
    "missing initialiser": (lambda: model([helper.make_node("Add", ["x", "gone"], ["y"])]), "gone"),
    "NaN weights": (with_nan, "w: 1 of 12 weights are NaN"),
    "unknown operator": (lambda: node("Frobnicate"), "Frobnicate"),
    "unknown domain": (lambda: node("Relu", domain="com.example"), "com.example"),
    "axis outside the rank": (lambda: node("Softmax", axis=9), "odd"),
    "attribute of the wrong kind": (lambda: node("Softmax", axis="nine"), "odd"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with weights, and beside it what the model must not reach."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(48))
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_model_is_one_line(name: str, place: Path) -> None:
    make, says = BAD[name]
    content = make()
    (place / "net.onnx").write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    before = sorted(p.name for p in place.iterdir())
    r = run("compile", "net.onnx", "-o", "out", cwd=place)
    assert (r.returncode, r.stdout) == (1, "")
    (line,) = r.stderr.splitlines()
    assert line.startswith("error: ") and says in line and "internal" not in line
    assert sorted(p.name for p in place.iterdir()) == before


def test_good_model_and_its_external_weights_compile(place: Path) -> None:
    (place / "net.onnx").write_bytes(outside("weights.bin").SerializeToString())
    r = run("compile", "net.onnx", "-o", "out", cwd=place)
    assert r.returncode == 0, r.stderr
    assert (place / "out" / "manifest.json").exists()


# ------------------------------------------------------------------------------------ hostile names

HOSTILE = (
    '"; int injected; //', "*/ int injected; /*", "\nint injected;\n", "\r\n#define injected", "??/\nint injected;",
    "\\\nint injected;", "int", "class", "__attribute__", "main", "\u202eint injected;\u2066", "名前", "\x00injected",
    "", "a" * 70000, "%s%n", "../../injected", "R\"(injected)\"", "'injected'", "skive", "_9", "9", "x" * 64,
)  # fmt: skip


def test_names_reach_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hostile name as graph, input, weight, node and output name of one model that still computes."""
    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SKIVE_CXXFLAGS", "-O0 -Wall -Wextra -Wpedantic -Werror")
    nodes, weights, last = [], [], HOSTILE[0] + "in"
    for i, name in enumerate(HOSTILE):
        weights.append(numpy_helper.from_array(np.full((4,), i + 1, np.float32), name + "w"))
        nodes.append(helper.make_node("Add" if i % 2 else "Mul", [last, name + "w"], [name + "out"], name=name))
        nodes.append(helper.make_node("Softmax" if i == 5 else "Tanh", [name + "out"], [name + "act"], name=name))
        last = name + "act"
    graph = helper.make_graph(nodes, HOSTILE[0], [value(HOSTILE[0] + "in", 2, 4)], [value(last, 2, 4)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    want = x
    for i in range(len(HOSTILE)):
        want = want + (i + 1) if i % 2 else want * (i + 1)
        want = np.exp(want) / np.exp(want).sum(-1, keepdims=True) if i == 5 else np.tanh(want)
    module = skive.compile(proto, output=tmp_path / "out")
    np.testing.assert_allclose(module(x), want, atol=1e-4)

    sources = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".cpp", ".h", ".S", ".txt")]
    assert sources
    for path in sources:
        text = path.read_bytes().decode("ascii")  # no bidirectional or other surprising characters
        assert not re.search(r"[^\n -~]", text) and "??/" not in text
        assert max(map(len, text.splitlines()), default=0) < 4000
        code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", "", text, flags=re.S)
        assert not re.search(r"\binjected\b", code), path.name
    assert {p.name for p in tmp_path.iterdir()} == {"out", "cache"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_artefact_name(name: str, tmp_path: Path) -> None:
    """`--name` decides file names and C names: always a C identifier, always inside the folder."""
    proto = good()
    onnx.save(proto, tmp_path / "net.onnx")
    module = skive.compile(proto, output=tmp_path / "out", name=name or None, emit_only=True)
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {"net.onnx", "out"}
    (header,) = (tmp_path / "out").glob("*.h")
    assert re.fullmatch(r"[A-Za-z]\w{0,80}", header.stem)
    assert module.report["skive"] == skive.__version__
