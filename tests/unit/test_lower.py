"""Values that share memory: what lowering decides, and that the compiled result is right."""

from __future__ import annotations

import numpy as np
import pytest

from skive import api, lower, ops
from skive.check import sample_inputs
from skive.ir import Graph, Node, constant
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS

GENERIC = TARGETS["generic"]


def image(name: str, *shape: int) -> Node:
    return ops.make("input", shape=shape, dtype=ops.F32, label=name, origin=name)


def conv(x: Node, channels: int, seed: int) -> Node:
    w = np.random.default_rng(seed).standard_normal((channels, 1, 1, x.shape[-1])).astype(np.float32)
    return ops.make("conv2d", x, constant(w), constant(np.zeros(channels, np.float32)), origin=f"conv{seed}")


def graph(inputs: list[Node], *outputs: Node) -> Graph:
    return Graph("g", tuple(inputs), outputs, tuple(f"y{i}" for i in range(len(outputs))))


def agrees(g: Graph) -> None:
    """The compiled graph computes what the reference does."""
    inputs = sample_inputs(g)
    for got, want in zip(api._run_graph(g, GENERIC, 1)(inputs), evaluate_graph(g, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def copies(g: Graph) -> int:
    return sum(c.kernel == "copy_strided" for c in lower.lower(g, GENERIC).calls)


def test_channels_are_concatenated_without_a_copy() -> None:
    x = image("x", 1, 4, 4, 8)
    g = graph([x], ops.make("concat", conv(x, 4, 0), conv(x, 1, 1), conv(x, 7, 2), axis=3))
    assert copies(g) == 0
    agrees(g)


def test_slices_of_channels_inside_a_concatenation_of_rows() -> None:
    """Heads of a detector: channels are joined, flattened, and the levels joined again."""
    levels = []
    inputs = [image("a", 1, 4, 4, 8), image("b", 1, 2, 2, 8)]
    for i, x in enumerate(inputs):
        joined = ops.make("concat", conv(x, 4, 3 * i), conv(x, 1, 3 * i + 1), conv(x, 5, 3 * i + 2), axis=3)
        levels.append(ops.make("reshape", joined, shape=(1, x.shape[1] * x.shape[2], 10)))
    g = graph(inputs, ops.make("concat", *levels, axis=1))
    assert copies(g) == 0
    agrees(g)


def test_an_operand_that_is_read_after_an_in_place_operation_survives() -> None:
    x = image("x", 1, 4, 4, 8)
    a, b = conv(x, 4, 0), conv(x, 4, 1)
    joined = ops.make("concat", ops.make("reshape", a, shape=(64,)), ops.make("reshape", b, shape=(64,)), axis=0)
    squashed = ops.make("tanh", joined)  # may overwrite `joined`, of which `a` could be a part
    g = graph([x], squashed, ops.make("add", a, b))
    agrees(g)


def test_a_value_used_twice_is_not_overwritten() -> None:
    x = image("x", 2, 3)
    a = ops.make("exp", x)
    g = graph([x], ops.make("add", ops.make("sin", a), ops.make("cos", a)), a)
    agrees(g)


def test_chains_of_elementwise_operations_share_one_block() -> None:
    x = image("x", 64, 64)
    y = x
    for name in ("exp", "tanh", "sigmoid", "abs"):
        y = ops.make(name, y)
    plan = lower.lower(graph([x], ops.make("reduce_sum", y, axes=(0,))), GENERIC)
    assert plan.arena_bytes == x.type.bytes == plan.arena_lower_bound


def test_contiguous_slices_and_reshapes_are_views() -> None:
    x = image("x", 6, 8)
    part = ops.make("slice", ops.make("neg", x), start=(2, 0), size=(3, 8), step=(1, 1))
    g = graph([x], ops.make("exp", ops.make("reshape", part, shape=(24,))))
    assert copies(g) == 0
    agrees(g)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: ops.make("reshape", x, shape=(6,))], ids=["same", "reshaped"])
def test_an_input_that_is_an_output_is_copied(make) -> None:  # noqa: ANN001
    x = image("x", 2, 3)
    g = graph([x], make(x))
    assert copies(g) == 1
    agrees(g)


def test_the_same_value_twice_as_output() -> None:
    x = image("x", 2, 3)
    y = ops.make("exp", x)
    agrees(graph([x], y, y))
