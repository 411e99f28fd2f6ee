"""ONNX's own backend tests through the importer and the numpy reference: nothing may be wrong."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, TypeProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from skive.backend import SkiveRep, compiled_engine, reference_engine
from skive.errors import UnsupportedOpError

# The element types that count: every graph input and output of a case in scope is such a tensor.
IN_SCOPE = {TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16,
            TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
# What has no equivalent: the operator, and which names of its cases are meant.
UNSUPPORTED = {
    "Bernoulli": "", "RandomUniformLike": "",  # random numbers
    "Dropout": "test_training_dropout(?!_zero)",  # with a ratio above 0: random numbers
    "BitCast": "",
    "ImageDecoder": "",  # JPEG and PNG files
    "TreeEnsemble": "",
    "StringNormalizer": "",
    "Gradient": "",
}
# The expected values of these cases are themselves off by 2e-7 where the exact result is 0.
ABSOLUTE = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}
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


@pytest.mark.parametrize("name", cases())
def test_reference(name: str) -> None:
    case = cases()[name]
    model, data = load(case)
    known = excused(case, model)
    try:
        run(case, model, data, reference_engine)
    except UnsupportedOpError as e:
        assert known or not (in_scope(model) or not name.startswith("node:")), e
        if known:
            assert any(op in str(e) for op in known)
        pytest.skip(str(e).splitlines()[0])
    assert not known, f"{name} works now: take it off the list"


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_compiled(name: str) -> None:
    case = cases()[name]
    model, data = load(case)
    try:
        run(case, model, data, compiled_engine)
    except UnsupportedOpError as e:
        pytest.skip(str(e).splitlines()[0])


def test_coverage() -> None:
    """How many cases are in scope, and how many of those `test_reference` demands to pass."""
    node = [(c, c.model) for n, c in cases().items() if n.startswith("node:") and in_scope(c.model)]
    other = [(c, load(c)[0]) for n, c in cases().items() if not n.startswith("node:")]
    for found, least, share in ((node, 1100, 0.98), (other, 120, 0.94)):
        demanded = sum(not excused(c, m) for c, m in found)
        assert demanded >= least
        assert demanded >= share * len(found)
