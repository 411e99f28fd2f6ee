"""Tables of bytes: the same bits as the chain they replace, from every instruction set, wherever the bytes lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import _native
from skive.ir import Graph
from skive.passes import FUSED
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.text import parse_graph

CHAINS = ["sigmoid", "silu", "gelu", "gelu_tanh", "hard_swish", "tanh", "mish", "erf", "exp", "softplus", "reciprocal"]


def network() -> Graph:
    """Every chain on its own slice of channels of one input, and their results as channels of one output."""
    lines = [f"graph @tables(%q: u8[1,16,16,{64 * len(CHAINS)}]) {{", "  %s = const 0.0625 : f32[]",
             "  %z = const 128 : u8[]", "  %t = const 0.03125 : f32[]"]
    for i, name in enumerate(CHAINS):
        lines += [f"  %q{i} = slice %q {{start=[0,0,0,{64 * i}], size=[1,16,16,64], step=[1,1,1,1]}} : u8[1,16,16,64]",
                  f"  %x{i} = dequantize %q{i}, %s, %z : f32[1,16,16,64]",
                  f"  %f{i} = {name} %x{i} : f32[1,16,16,64]",
                  f"  %y{i} = quantize %f{i}, %t, %z {{to=u8}} : u8[1,16,16,64]"]
    parts = ", ".join(f"%y{i}" for i in range(len(CHAINS)))
    lines += [f"  %y = concat {parts} {{axis=3}} : u8[1,16,16,{64 * len(CHAINS)}]", '  return %y as "y"', "}"]
    return parse_graph("\n".join(lines))


@pytest.mark.parametrize("target", [t for t in TARGETS if set(TARGETS[t].features) <= set(_native.cpu_features())])
def test_all_values_of_all_chains(target: str, tmp_path: Path) -> None:
    graph = network()
    fused, _ = PassManager().run(graph, FUSED)
    assert sum(n.op == "lookup" for n in fused.nodes) == len(CHAINS)
    module = skive.compile(graph, output=tmp_path / "a", target=target)
    assert {layer["kernel"] for layer in module.report["layers"]} <= {"lookup", "lookup_to"}  # in place, in one go
    x = np.random.default_rng(1).permuted(np.arange(graph.inputs[0].type.size) % 256).astype(np.uint8)
    x = x.reshape(graph.inputs[0].shape)
    for i in range(len(CHAINS)):
        assert len(np.unique(x[..., 64 * i:64 * i + 64])) == 256
    np.testing.assert_array_equal(module(x), evaluate_graph(graph, [x])[0])
