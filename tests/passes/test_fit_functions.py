"""Polynomials in front of quantizers: within their part of a step, and the same bits from every instruction set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native, ops
from skive.ir import Graph, constant
from skive.passes import FUSED, fit_functions
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.text import parse_graph
from skive.types import DType

FUNCTIONS = ["sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "mish", "erf", "exp", "softplus", "elu"]
COMPILED = ["sigmoid", "silu", "gelu", "exp"]  # of 16 and 32 intervals, degree 2 to 4
TOLERANCE = 1 / 16  # of a step: what the pass promises
SCALE = 1 / 4096  # of the sums: arguments in -12..12
STEPS = {"u8": ("0.03125", 20), "i16": ("0.0009765625", 0)}


def network(names: list[str], dtype: str, step: str, zero: int, after: str = "") -> Graph:
    """Every function on its own slice of 64 channels of 32-bit sums; what the quantizer made, `after` each."""
    shape, whole = "[1,40,41,64]", f"[1,40,41,{64 * len(names)}]"
    lines = [f"graph @fits(%q: i32{whole}) {{", f"  %f = const {SCALE} : f32[]", "  %n = const 0 : i32[]",
             f"  %z = const {zero} : {dtype}[]",
             f"  %t = const {step} : f32[]" if step[0] != "[" else f"  %t = const {step} : f32[64]"]
    for i, name in enumerate(names):
        lines += [f"  %q{i} = slice %q {{start=[0,0,0,{64 * i}], size=[1,40,41,64], step=[1,1,1,1]}} : i32{shape}",
                  f"  %x{i} = dequantize %q{i}, %f, %n : f32{shape}",
                  f"  %f{i} = {name} %x{i} : f32{shape}",
                  f"  %y{i} = quantize %f{i}, %t, %z {{to={dtype}}} : {dtype}{shape}"]
        if after:
            lines.append(f"  %w{i} = cast %y{i} {{to={after}}} : {after}{shape}")
    parts = ", ".join(f"%{'w' if after else 'y'}{i}" for i in range(len(names)))
    lines += [f"  %y = concat {parts} {{axis=3}} : {after or dtype}{whole}", '  return %y as "y"', "}"]
    return parse_graph("\n".join(lines))


def sums(graph: Graph) -> np.ndarray:
    """Dense around 0 in every channel, and the ends of what 32 bits hold."""
    shape = graph.inputs[0].shape
    line = np.linspace(-12 / SCALE, 12 / SCALE, shape[1] * shape[2]).astype(np.int32)
    line[:4] = [-(2**31), 2**31 - 1, -(2**31) + 1, 0]
    return np.broadcast_to(line.reshape(1, shape[1], shape[2], 1), shape).copy()


def fits(graph: Graph) -> int:
    """How many functions of `graph` became polynomials."""
    fused, _ = PassManager().run(graph, FUSED)
    return sum(str(n.attrs.get("fn", "")).count("piecewise") for n in fused.nodes)


@pytest.mark.parametrize("target", [t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())])
@pytest.mark.parametrize("dtype", STEPS)
def test_every_target_gives_the_bits_of_the_reference(dtype: str, target: str, tmp_path: Path) -> None:
    graph = network(COMPILED, dtype, *STEPS[dtype])
    assert fits(graph) == len(COMPILED)
    module = skive.compile(graph, output=tmp_path / "a", target=target)
    x = sums(graph)
    fused, _ = PassManager().run(graph, FUSED)
    np.testing.assert_array_equal(module(x), evaluate_graph(fused, [x])[0])


def test_scalars_give_the_same_bits(tmp_path: Path) -> None:
    """64-bit results are computed one by one."""
    graph = network(["silu", "gelu"], "u8", *STEPS["u8"], after="i64")
    assert fits(graph) == 2
    x = sums(graph)
    fused, _ = PassManager().run(graph, FUSED)
    np.testing.assert_array_equal(skive.compile(graph, output=tmp_path / "a")(x), evaluate_graph(fused, [x])[0])


CHANNELS = "[" + ",".join(str(0.2 * 0.93**i) for i in range(64)) + "]"  # a hundred times as coarse as the finest


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "step", "zero"), [("u8", "0.03125", 20), ("i8", "0.01", -100), ("u8", "1.5", 0),
                                                     ("u8", CHANNELS, 9), ("i16", "0.0009765625", 0)])
def test_no_further_than_a_part_of_a_step(name: str, dtype: str, step: str, zero: int) -> None:
    """Further than TOLERANCE from the middle between two integers nothing changes, closer at most by 1."""
    graph = network([name], dtype, step, zero)
    fused = fit_functions(graph)
    if (name, dtype) == ("elu", "i16"):
        assert fused is graph  # its corner is no polynomial
        return
    assert fused is not graph
    x = sums(graph)
    want, got = (evaluate_graph(g, [x])[0].astype(np.int64) for g in (graph, fused))
    assert np.abs(want - got).max() <= 1
    scale = np.array(json.loads(step))
    node = next(n for n in graph.nodes if n.op == name)
    exact = ops.evaluate(node, [(x[..., :64] * np.float32(SCALE)).astype(np.float32)]).astype(np.float64) / scale
    exact = np.minimum(exact, 1e6)
    far = np.abs(exact - np.floor(exact) - 0.5) > TOLERANCE + 1e-3  # and the rounding of float32
    assert 0.5 < far.mean() < 1
    np.testing.assert_array_equal(got[far], want[far])


def test_an_offset_and_a_factor_of_channels_join() -> None:
    """quantize(f(x) * a + b) is one polynomial, one addition and one rounding."""
    graph = network(["silu"], "u8", "0.05", 30)
    (q,) = (n for n in graph.nodes if n.op == "quantize")
    factors, offsets = np.linspace(0.5, 2, 64, dtype=np.float32), np.linspace(-0.024, 0.024, 64, dtype=np.float32)
    shifted = ops.make("add", ops.make("mul", q.inputs[0], constant(factors)), constant(offsets))
    whole = ops.make("quantize", shifted, *q.inputs[1:], to=DType.u8)
    graph = Graph("fits", graph.inputs, (whole,), ("y",))
    assert fits(graph) == 1
    fused, _ = PassManager().run(graph, FUSED)
    x = sums(graph)
    ((got,), (exact,)) = (evaluate_graph(fused, [x]), evaluate_graph(Graph("x", graph.inputs, (shifted,), ("y",)), [x]))
    inside = (exact / 0.05 + 30 > 0) & (exact / 0.05 + 30 < 255)
    error = np.abs((got.astype(np.float64) - 30) - exact / np.float64(np.float32(0.05)))
    assert inside.any() and error[inside].max() <= 0.5 + TOLERANCE + 1e-4
