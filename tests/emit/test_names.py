"""Names of a model, its inputs, outputs and nodes are data: none becomes code, whatever it contains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from emitted import cmake_or_skip, run
from onnx import TensorProto, helper

import skive
from skive.emit.names import identifier

HOSTILE = {
    "quotes": "a\"b'c`d",
    "end of comment": "x */ int injected; /* y",
    "line": "x\nint injected;\n#error injected",
    "carriage return": "x\rint injected;\r\n#error injected",
    "splice": "x \\\nint injected; \\",
    "trigraph": "x ??/\nint injected;",
    "unicode lines": "x\u2028int injected;\u2029#error injected\u0085#error injected\v#error injected\f#error injected",
    "bidi": "x\u202e;detcejni tni\u2066",
    "empty": "",
    "keyword": "while",
    "reserved": "__attribute__",
    "digits": "123",
    "long": "n" * 70000,
    "path": "../../../tmp/injected",
    "format": "%s%n{}{0}${PATH}$(injected)`injected`",
    "cmake": "x) message(FATAL_ERROR injected) # ${injected} $<1:injected>",
    "html": "</script><script>injected()</script><img src=x onerror=injected()>",
    "symbols": "+-*/",
    "null": "x\0injected",
    "letters": "größe 模型",
}


def model(text: str) -> onnx.ModelProto:
    """Two layers, two inputs and two outputs, every name derived from `text`; two differ only in a symbol."""
    a, b, c, y, z = (f"{text}{s}" for s in ("/", "-", "+", "*", "?"))
    nodes = [helper.make_node("Add", [a, b], [c], name=text), helper.make_node("Exp", [c], [y], name=text),
             helper.make_node("CumSum", [c, "axis"], [z], name=text)]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in (a, b, y, z)]
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [1])
    graph = helper.make_graph(nodes, text or "g", info[:2], info[2:], [axis])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def without_strings(text: str) -> list[str]:
    """The lines of a C++ text outside comments and string literals."""
    lines = []
    for line in text.splitlines():  # splits at every character that any reader takes for a line's end
        code = re.sub(r'"(\\.|[^"\\])*"', '""', line)
        code = re.sub(r"//.*|/\*.*?\*/", "", code)
        lines.append(re.sub(r"\blayer(\d+)_\w+", r"layer\1", code))  # identifiers carry the layer's name
    return lines


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names(text: str, tmp_path: Path) -> None:
    module = skive.compile(model(text), output=tmp_path / "out", target="generic")
    x = np.arange(6, dtype=np.float32).reshape(2, 3) / 8
    total, running = module(x, x)
    np.testing.assert_allclose(total, np.exp(2 * x), rtol=1e-5)
    np.testing.assert_allclose(running, np.cumsum(2 * x, 1), rtol=1e-5)
    assert [p.name for p in module.inputs] == [f"{text}/", f"{text}-"]  # as the model says
    by_name = module(**{f"{text}-": x, f"{text}/": 3 * x})
    np.testing.assert_allclose(by_name[0], np.exp(4 * x), rtol=1e-5)
    json.loads((module.folder / "manifest.json").read_text())
    # The emitted text outside comments is that of the same model with a harmless name.
    harmless = skive.compile(model("plain"), output=tmp_path / "plain", target="generic", verify=False,
                             name=module.manifest["name"])
    names = {str(p.relative_to(module.folder)) for p in module.folder.rglob("*")}
    assert names == {str(p.relative_to(harmless.folder)) for p in harmless.folder.rglob("*")}
    for file in sorted(p for p in module.folder.iterdir() if p.suffix in (".c", ".cpp", ".h", ".S")):
        assert without_strings(file.read_text()) == without_strings((harmless.folder / file.name).read_text()), file
        assert file.read_bytes().isascii()
    assert (module.folder / "CMakeLists.txt").read_bytes() == (harmless.folder / "CMakeLists.txt").read_bytes()
    page = (module.folder / "report.html").read_text()
    assert "<script>injected" not in page and "<img src=x" not in page
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("out", "plain")] == []


ELSEWHERE = ["skive", "skive_isa", "skive_map", "std", "m", "c", "gcc", "int8_t", "main", "NULL", "errno", "sys",
             "test", "install", "clean", "linux", "EOF", "run", "Part"]


def test_names_that_mean_something_elsewhere(tmp_path: Path) -> None:
    """To the C library, the compiler, the linker, CMake or the kernels: the artefacts build and run."""
    x = np.ones((2, 3), np.float32)
    built = []
    for name in ELSEWHERE:
        module = skive.compile(model("x"), output=tmp_path / name, name=name, target="generic", threads=2, verify=False)
        np.testing.assert_allclose(module(x, x)[0], np.exp(2 * x), rtol=1e-5)
        built.append(module.manifest["name"])
    assert len(set(built)) == len(ELSEWHERE)
    cmake_or_skip()
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.13)\nproject(together)\n" + "".join(
        f"add_subdirectory({folder})\n" for folder in ELSEWHERE))
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", cwd=tmp_path)
    run("cmake", "--build", tmp_path / "build", "--target", "skive_isa", "m_errno", "m_m", "m_clean", cwd=tmp_path)
    assert (tmp_path / "build" / "errno" / "libm_errno.so").exists()


def test_names_that_become_one_identifier(tmp_path: Path) -> None:
    """Two artefacts may share a name; ports that differ only in symbols stay apart."""
    assert identifier("a-b") == identifier("a b") == "a_b"
    assert len(identifier("x" * 100_000)) <= 64
    x = np.ones((2, 3), np.float32)
    first, second = (skive.compile(model(t), output=tmp_path / t, target="generic") for t in ("a-b", "a b"))
    assert first.manifest["name"] == second.manifest["name"] == "a_b"
    np.testing.assert_array_equal(first(x, 2 * x)[0], second(x, 2 * x)[0])
