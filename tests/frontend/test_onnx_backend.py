"""ONNX's own backend tests, in the numpy reference and compiled: nothing may be wrong.

As a program it counts JUnit reports of `test_compiled`, a later one replacing cases of an earlier one:

    python tests/frontend/test_onnx_backend.py build/onnx.xml ... docs/onnx_cases.json
"""

from __future__ import annotations

import json
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from skive.backend import SkiveRep, compiled_engine, reference_engine
from skive.errors import UnsupportedOpError
from skive.ir import Graph

# The element types that count: every graph input and output of a case in scope is such a tensor.
IN_SCOPE = {TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16,
            TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
# What has no equivalent: the operator, and which names of its cases are meant.
UNSUPPORTED = {
    "Bernoulli": "", "RandomUniformLike": "",  # random numbers
    "Dropout": "test_training_dropout(?!_zero)",  # with a ratio above 0: random numbers
    "Compress": "", "NonMaxSuppression": "", "NonZero": "", "Unique": "",  # data decides the shape
    "ImageDecoder": "",  # JPEG and PNG files
    "StringNormalizer": "",
    "Gradient": "",
}
# The expected values of these cases are themselves off by 2e-7 where the exact result is 0.
ABSOLUTE = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}
# By version of onnx: (cases, of which demanded) of the node cases in scope and of the other kinds.
COUNTS = {"1.23.2": ((1493, 1457), (140, 132))}
OTHER_KINDS = ("simple", "pytorch-operator", "pytorch-converted")


@cache
def cases() -> dict[str, TestCase]:
    """Every case by kind and name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {f"{kind}:{c.name}": c for kind in ("node", *OTHER_KINDS) for c in load_model_tests(kind=kind)}


def parsed(path: Path, type_: TypeProto) -> Any:
    """The tensor, sequence or optional stored in a test data file."""
    if type_.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if type_.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return numpy_helper.to_array(TensorProto.FromString(path.read_bytes()))


def load(case: TestCase) -> tuple[ModelProto, list[tuple[list[Any], list[Any]]]]:
    """The model and the (inputs, outputs) it is tested with."""
    if case.model is not None:
        plain = [tuple([numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in side] for side in data)
                 for data in case.data_sets]
        return case.model, plain
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    data = []
    for d in sorted(folder.glob("test_data_set_*")):
        sides = [[parsed(d / f"{side}_{i}.pb", info.type) for i, info in enumerate(infos)
                  if (d / f"{side}_{i}.pb").exists()]
                 for side, infos in (("input", model.graph.input), ("output", model.graph.output))]
        data.append((sides[0], sides[1]))
    return model, data


def in_scope(model: ModelProto) -> bool:
    return all(v.type.HasField("tensor_type") and v.type.tensor_type.elem_type in IN_SCOPE
               for v in (*model.graph.input, *model.graph.output))


def excused(case: TestCase, model: ModelProto) -> set[str]:
    """The operators of the case that are known to have no equivalent."""
    return {n.op_type for n in model.graph.node
            if n.op_type in UNSUPPORTED and re.match(UNSUPPORTED[n.op_type], case.name)}


def leaves(value: Any) -> Iterator[np.ndarray | None]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
    else:
        yield None if value is None else np.asarray(value)


def assert_same(got: Any, want: Any, rtol: float, atol: float) -> None:
    """Equal structure, shapes and element types; values within ONNX's tolerance."""
    got, want = list(leaves(got)), list(leaves(want))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        if b is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def run(case: TestCase, model: ModelProto, data: list[tuple[list[Any], list[Any]]], engine: Any) -> None:
    rep = SkiveRep(model, engine)
    for inputs, outputs in data:
        assert_same(list(rep.run(inputs)), outputs, case.rtol, ABSOLUTE.get(case.name, case.atol))


def check(name: str, engine: Any) -> None:
    """Runs a case: right, or unsupported as the list says; outside the scope it may be unsupported, never wrong."""
    case = cases()[name]
    model, data = load(case)
    known = excused(case, model)
    counts = in_scope(model) or not name.startswith("node:")
    try:
        run(case, model, data, engine)
    except UnsupportedOpError as e:
        assert known or not counts, e
        if known and counts:
            assert any(op in str(e) for op in known)
        pytest.skip(str(e).splitlines()[0])
    assert not known, f"{name} works now: take it off the list"


@pytest.mark.parametrize("name", cases())
def test_reference(name: str) -> None:
    check(name, reference_engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_compiled(name: str) -> None:
    check(name, compiled_engine)


@cache
def sample() -> list[str]:
    """The first case of every third operator, and of each of those that most networks consist of."""
    first: dict[str, str] = {}
    for name, case in sorted(cases().items()):
        model = case.model
        if name.startswith("node:") and "_expanded" not in name and in_scope(model) and not excused(case, model):
            first.setdefault(model.graph.node[0].op_type, name)
    always = ["Attention", "AveragePool", "Conv", "ConvTranspose", "Gemm", "LSTM", "MatMul", "MaxPool", "Resize",
              "Softmax"]
    return [first[op] for op in sorted({*sorted(first)[::3], *always})]


@pytest.mark.parametrize("name", sample())
def test_compiled_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIVE_CXXFLAGS", "-O1")
    check(name, compiled_engine)


def test_coverage() -> None:
    """How many cases there are, and how many of those the tests above demand to pass."""
    node = [(c, c.model) for n, c in cases().items() if n.startswith("node:") and in_scope(c.model)]
    other = [(c, load(c)[0]) for n, c in cases().items() if not n.startswith("node:")]
    counts = [(len(found), sum(not excused(c, m) for c, m in found)) for found in (node, other)]
    for (total, demanded), share in zip(counts, (0.97, 0.94)):
        assert demanded >= share * total
    if onnx.__version__ in COUNTS:
        assert tuple(counts) == COUNTS[onnx.__version__]


def test_an_input_is_not_fixed_for_its_data() -> None:
    """A shape may be specialised to its value; what the model computes with may not."""
    info = helper.make_tensor_value_info
    x, y = info("x", TensorProto.FLOAT, [2, 3]), info("y", TensorProto.FLOAT, None)
    shape, places = info("shape", TensorProto.INT64, [1]), info("y", TensorProto.INT64, None)

    def rep(node: NodeProto, inputs: list[Any], output: Any) -> SkiveRep:
        graph = helper.make_graph([node], "g", inputs, [output])
        return SkiveRep(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), reference_engine)

    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    reshaped = rep(helper.make_node("Reshape", ["x", "shape"], ["y"]), [x, shape], y)
    assert reshaped.run([value, np.array([6])])[0].shape == (6,)
    assert reshaped.fixed == {"shape"}
    found = rep(helper.make_node("NonZero", ["x"], ["y"]), [x], places)
    with pytest.raises(UnsupportedOpError, match="NonZero"):
        found.run([value])
    assert not found.fixed


def test_the_tensors_of_a_sequence_are_run_time_data() -> None:
    compiled = []

    def engine(graph: Graph) -> Any:
        compiled.append(graph)
        return reference_engine(graph)

    rep = SkiveRep(cases()["node:test_sequence_map_add_2_sequences"].model, engine)
    for scale in (1, 2):
        parts = [[scale * np.full(10, i, np.float32) for i in range(3)] for _ in range(2)]
        (result,) = rep.run(parts)
        for got, a, b in zip(result, *parts, strict=True):
            np.testing.assert_array_equal(got, a + b)
    assert [len(g.inputs) for g in compiled] == [6]


def operators(name: str) -> set[str]:
    """The operators that a node case tests; an expanded function body counts as its operator."""
    case = cases().get(re.sub("_expanded.*", "", name), cases()[name])
    return {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in case.model.graph.node}


def counted(reports: list[Path]) -> dict[str, Any]:
    """[cases, passed] by operator and in all, from JUnit reports of `test_compiled`."""
    passed = {}
    for test in (t for report in reports for t in ElementTree.parse(report).iter("testcase")):
        found = re.fullmatch(r"test_compiled\[(.*)\]", test.get("name", ""))
        if found:
            passed[found[1]] = all(test.find(tag) is None for tag in ("skipped", "failure", "error"))
    if set(passed) != set(cases()):
        raise SystemExit(f"error: {len(passed)} of {len(cases())} cases were run")
    node = [n for n in passed if n.startswith("node:")]
    groups = {
        "node cases of float32, bool, int8, int16, int32, int64, uint8, uint16": [
            n for n in node if in_scope(cases()[n].model)],
        "all node cases": node,
        "cases of the kinds " + ", ".join(OTHER_KINDS): [n for n in passed if not n.startswith("node:")],
    }
    by_operator: dict[str, list[str]] = {}
    for n in node:
        for op in operators(n):
            by_operator.setdefault(op, []).append(n)

    def count(names: list[str]) -> list[int]:
        return [len(names), sum(passed[n] for n in names)]

    return {"onnx": onnx.__version__, "totals": {k: count(v) for k, v in groups.items()},
            "operators": {k: count(v) for k, v in sorted(by_operator.items())}}


if __name__ == "__main__":
    *reports, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(counted(reports), indent=1) + "\n", encoding="utf-8")
