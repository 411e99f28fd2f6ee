"""The verifier refuses every kind of malformed graph and names the node and the pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from skive import ops
from skive.errors import InvalidModelError
from skive.ir import FrozenDict, Graph, Node, constant
from skive.types import DType, TensorType
from skive.verify import verify


def parameter(name: str, *shape: int) -> Node:
    return ops.make("input", shape=shape, dtype=DType.f32, label=name)


X, Z = parameter("x", 2, 3), parameter("z", 2, 3)
Y = ops.make("softmax", X, origin="layer/softmax")
GOOD = Graph("g", (X,), (Y,), ("y",))


def broken(**fields: object) -> Graph:
    return replace(GOOD, **fields)  # type: ignore[arg-type]


def with_output(node: Node) -> Graph:
    return broken(outputs=(node,))


CASES: dict[str, tuple[Callable[[], Graph], str]] = {
    "wrong type": (lambda: with_output(replace(Y, type=TensorType((3, 2), DType.f32))), r"f32\[3,2\].*f32\[2,3\]"),
    "wrong element type": (lambda: with_output(replace(Y, type=TensorType((2, 3), DType.i8))), r"i8\[2,3\]"),
    "missing attribute": (lambda: with_output(replace(Y, attrs=FrozenDict({}))), "lacks|axis"),
    "unknown attribute": (lambda: with_output(replace(Y, attrs=FrozenDict({"axis": 1, "colour": 2}))), "colour"),
    "unknown operation": (lambda: with_output(replace(Y, op="softmin")), "softmin"),
    "too many operands": (lambda: with_output(replace(Y, inputs=(X, X))), "operands"),
    "foreign input": (lambda: with_output(ops.make("add", X, Z)), "z: reads an input"),
    "input that is not one": (lambda: broken(inputs=(X, Y)), "softmax"),
    "input twice": (lambda: broken(inputs=(X, X)), "twice"),
    "equal input names": (lambda: broken(inputs=(X, parameter("x", 1))), "same name"),
    "no outputs": (lambda: broken(outputs=(), output_names=()), "no outputs"),
    "unnamed output": (lambda: broken(outputs=(Y, Y)), "names"),
    "equal output names": (lambda: broken(outputs=(Y, X), output_names=("y", "y")), "same name"),
    "constant of another type": (
        lambda: with_output(replace(constant(np.zeros(2, np.float32)), type=TensorType((2,), DType.f64))), "f64"),
    "state of another type": (lambda: broken(states=((X, ops.make("reduce_max", X, axes=(0,))),)), "state"),
}


def test_a_sound_graph_passes() -> None:
    verify(GOOD)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    make, message = CASES[name]
    with pytest.raises(InvalidModelError, match=message) as e:
        verify(make(), after="some-pass")
    assert "some-pass" in str(e.value)
    assert "\n" not in str(e.value)


def test_cycle() -> None:
    a = ops.make("neg", X)
    b = ops.make("exp", a)
    object.__setattr__(a, "inputs", (b,))
    with pytest.raises(InvalidModelError, match="cycle"):
        verify(with_output(b))


def test_phase_rules() -> None:
    fused = with_output(ops.make("map", X, fn="t0=relu(x0)", origin="act"))
    verify(fused, phase="fused")
    with pytest.raises(InvalidModelError, match="act: holds a fused expression"):
        verify(fused, phase="imported")
