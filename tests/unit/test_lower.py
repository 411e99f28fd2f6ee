"""Values that share memory: what lowering decides, and that the compiled result is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from skive import _native, lower, ops
from skive.check import sample_inputs
from skive.execute import run_graph
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


def agrees(g: Graph, target: str = "generic") -> None:
    """The compiled graph computes what the reference does."""
    inputs = sample_inputs(g)
    for got, want in zip(run_graph(g, TARGETS[target], 1)(inputs), evaluate_graph(g, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def needs_target(target: str) -> None:
    """Skips the test where this processor cannot run code for `target`."""
    missing = set(TARGETS[target].features) - set(_native.cpu_features())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")


def copies(g: Graph, target: str = "generic") -> int:
    return sum(c.kernel == "copy_strided" for c in lower.lower(g, TARGETS[target]).calls)


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


def part(x: Node, start: int, size: int) -> Node:
    """Channels [start, start + size) of `x`."""
    return ops.make("slice", x, start=(0,) * (len(x.shape) - 1) + (start,), size=(*x.shape[:-1], size),
                    step=(1,) * len(x.shape))


READERS: dict[str, Callable[[Node], Node]] = {
    "conv2d": lambda x: ops.make("conv2d", x, weights(6, 3, 3, x.shape[3]), weights(6), pad=(1, 1, 1, 1)),
    "pixels": lambda x: conv(x, 5, 3),
    "grouped": lambda x: ops.make("conv2d", x, weights(8, 3, 3, x.shape[3] // 2), groups=2),
    "depthwise": lambda x: ops.make("conv2d", x, weights(x.shape[3], 3, 3, 1), groups=x.shape[3]),
    "multiplied": lambda x: ops.make("conv2d", x, weights(2 * x.shape[3], 3, 3, 1), groups=x.shape[3]),
    "transposed": lambda x: ops.make("conv_transpose2d", x, weights(3, 3, 3, x.shape[3]), stride=(2, 2)),
    "max_pool": lambda x: ops.make("max_pool2d", x, kernel=(3, 3), pad=(1, 1, 1, 1)),
    "avg_pool": lambda x: ops.make("avg_pool2d", x, kernel=(2, 2), epilogue="t0=relu(x0)"),
    "resize": lambda x: ops.make(
        "resize2d", x, *(constant(a) for _ in range(2) for a in (np.array([[3], [0], [4]], np.int32),
                                                                   np.ones((3, 1), np.float32)))),
    "linear": lambda x: ops.make("linear", x, weights(7, x.shape[3]), weights(7)),
    "mean": lambda x: ops.make("reduce_mean", x, axes=(1, 2)),
    "mean_of_rows": lambda x: ops.make("reduce_mean", x, axes=(1,)),
    "sum_of_channels": lambda x: ops.make("reduce_sum", x, axes=(3,), keep=False),
    "map": lambda x: ops.make("tanh", x),
    "map_to_scalars": lambda x: ops.make("greater", x, constant(np.float32(0.5))),
    "reshaped": lambda x: ops.make("exp", ops.make("reshape", x, shape=(25, x.shape[3]))),
    "residual": lambda x: ops.make("conv2d", image_of(x), weights(x.shape[3], 1, 1, x.shape[3]),
                                   weights(x.shape[3]), x, epilogue="t0=add(x0,x1)"),
}


def weights(*shape: int) -> Node:
    return constant(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def image_of(x: Node) -> Node:
    """Another dense value of the same shape."""
    return ops.make("max_pool2d", ops.make("max_pool2d", x, kernel=(1, 1)), kernel=(1, 1))


@pytest.mark.parametrize("reader", READERS)
def test_slices_of_channels_are_read_in_place(reader: str) -> None:
    """By every kernel that can, from a dense value, at odd offsets and at the end of the memory."""
    x = image("x", 1, 5, 5, 23)
    y = ops.make("sin", x)
    parts = [part(y, 0, 6), part(y, 5, 6), part(y, 17, 6), part(x, 17, 6)]
    g = graph([x], *(READERS[reader](p) for p in parts))
    assert copies(g) == 0
    agrees(g)


@pytest.mark.parametrize("target", ["avx2", "avx512"])
@pytest.mark.parametrize("reader", READERS)
def test_slices_of_channels_are_read_in_place_by_vectors(reader: str, target: str) -> None:
    needs_target(target)
    x = image("x", 1, 5, 5, 61)
    g = graph([x], *(READERS[reader](part(x, start, 18)) for start in (1, 43)))
    assert copies(g, target) == 0
    agrees(g, target)


@pytest.mark.parametrize("stride", [1, 2])
def test_winograd_reads_a_slice_in_place(stride: int) -> None:
    needs_target("avx2")
    x = image("x", 1, 16, 15, 37)
    y = ops.make("conv2d", part(x, 19, 18), weights(17, 3, 3, 18), weights(17), pad=(1, 1, 1, 1),
                 stride=(stride, stride))
    g = graph([x], y)
    assert [c.kernel for c in lower.lower(g, TARGETS["avx2"]).calls] == ["winograd2d"]
    agrees(g, "avx2")


def test_a_slice_of_a_slice_and_of_its_rows() -> None:
    x = image("x", 1, 6, 5, 24)
    inner = part(part(ops.make("sin", x), 3, 20), 4, 11)
    rows = ops.make("slice", inner, start=(0, 2, 0, 1), size=(1, 3, 5, 9), step=(1, 1, 1, 1))
    g = graph([x], conv(inner, 3, 0), conv(rows, 4, 1), ops.make("exp", rows))
    assert copies(g) == 0
    agrees(g)


def test_pixels_that_are_no_neighbours_are_copied() -> None:
    """Columns and channels at once: no kernel takes two strides."""
    x = image("x", 1, 6, 5, 24)
    g = graph([x], conv(ops.make("slice", x, start=(0, 0, 1, 3), size=(1, 6, 3, 8), step=(1, 1, 1, 1)), 4, 0))
    assert copies(g) == 1
    agrees(g)


def test_a_slice_that_one_reader_cannot_take_is_copied_once() -> None:
    x = image("x", 1, 4, 4, 16)
    s = part(ops.make("sin", x), 3, 8)
    g = graph([x], conv(s, 4, 0), ops.make("transpose", s, perm=(0, 3, 1, 2)), ops.make("softmax", s))
    assert copies(g) == 1
    agrees(g)


def test_a_slice_that_is_an_output_is_copied() -> None:
    x = image("x", 1, 4, 4, 16)
    s = part(ops.make("sin", x), 5, 8)
    g = graph([x], conv(s, 4, 0), s)
    assert copies(g) == 1
    agrees(g)


def test_the_owner_of_a_slice_may_be_an_output() -> None:
    x = image("x", 1, 4, 4, 16)
    y = ops.make("sin", x)
    g = graph([x], y, conv(part(y, 5, 8), 4, 0), ops.make("tanh", part(y, 1, 7)))
    assert copies(g) == 0
    agrees(g)


def test_nothing_runs_in_place_on_what_a_slice_still_reads() -> None:
    x = image("x", 1, 4, 4, 16)
    y = ops.make("sin", x)
    left, right = part(y, 0, 8), part(y, 8, 8)
    squashed = ops.make("tanh", left)
    whole = ops.make("exp", y)
    g = graph([x], ops.make("add", squashed, ops.make("add", conv(left, 8, 0), conv(right, 8, 1))), whole,
              ops.make("mul", squashed, right))
    agrees(g)


def test_half_of_the_channels_passes_by_a_branch() -> None:
    """A block of ShuffleNet: one half of the channels is copied beside what the other half becomes."""
    x = image("x", 1, 6, 6, 10)
    y = conv(x, 14, 0)
    branch = READERS["depthwise"](conv(part(y, 7, 7), 7, 1))
    skip = ops.make("max_pool2d", part(y, 0, 7), kernel=(3, 3))
    g = graph([x], ops.make("concat", skip, branch, axis=3))
    assert copies(g) == 0
    agrees(g)
    y = ops.make("conv2d", y, weights(14, 3, 3, 14), pad=(1, 1, 1, 1))
    g = graph([x], ops.make("concat", part(y, 0, 7), conv(part(y, 7, 7), 9, 2), axis=3))
    assert copies(g) == 1
    agrees(g)


def test_halves_are_concatenated_where_their_owner_was_written() -> None:
    """A block of YOLOv8: both halves and what becomes of one, joined and read on."""
    x = image("x", 1, 6, 6, 8)
    y = conv(x, 14, 0)
    left, right = part(y, 0, 7), part(y, 7, 7)
    a = ops.make("conv2d", conv(right, 7, 1), weights(7, 1, 1, 7), weights(7), right, epilogue="t0=add(x0,x1)")
    b = ops.make("sigmoid", conv(a, 7, 2))
    g = graph([x], conv(ops.make("concat", left, right, a, b, axis=3), 5, 3))
    assert copies(g) == 0
    agrees(g)


def test_halves_in_another_order_are_copied() -> None:
    x = image("x", 1, 6, 6, 8)
    y = conv(x, 14, 0)
    g = graph([x], conv(ops.make("concat", part(y, 7, 7), part(y, 0, 7), conv(y, 3, 1), axis=3), 5, 3))
    assert copies(g) == 2
    agrees(g)


def test_concatenations_grow_in_one_place() -> None:
    """A block of DenseNet: every layer reads all channels before it."""
    x = image("x", 1, 6, 6, 8)
    features = conv(x, 9, 0)
    for i in range(3):
        new = conv(ops.make("relu", features), 5, i + 1)
        features = ops.make("concat", features, new, axis=3)
    g = graph([x], conv(features, 4, 9))
    assert copies(g) == 0
    agrees(g)


def test_an_operand_read_after_the_concatenation_is_overwritten() -> None:
    x = image("x", 1, 4, 4, 8)
    a, b = conv(x, 5, 0), conv(x, 6, 1)
    squashed = ops.make("tanh", ops.make("concat", a, b, axis=3))
    g = graph([x], conv(squashed, 6, 2), conv(ops.make("add", b, conv(squashed, 6, 3)), 2, 4))
    agrees(g)


@pytest.mark.parametrize("axis", [0, 3])
def test_a_value_beside_itself_reversed(axis: int) -> None:
    """Both are computed inside the result, and the second from the first."""
    x = image("x", 1, 4, 4, 8)
    y = ops.make("sin", x)
    backwards = ops.make("slice", y, start=(0, 0, 0, 7), size=y.shape, step=(1, 1, 1, -1))
    g = graph([x], conv(ops.make("concat", y, backwards, axis=axis), 3, 0))
    assert copies(g) == 1
    agrees(g)


def test_every_second_pixel_goes_straight_into_the_concatenation() -> None:
    """The first layer of YOLOv5: four interleaved images become one of four times the channels."""
    x = image("x", 1, 6, 8, 3)
    parts = [ops.make("slice", x, start=(0, i, j, 0), size=(1, 3, 4, 3), step=(1, 2, 2, 1))
             for i in range(2) for j in range(2)]
    g = graph([x], conv(ops.make("concat", *parts, axis=3), 5, 0))
    assert copies(g) == 4
    agrees(g)


def test_rows_that_clash_in_the_cache_are_copied_from_a_slice() -> None:
    """1024 floats from pixel to pixel, and scratch rows just as far apart as the operand's."""
    x = image("x", 1, 1, 30, 1024)
    g = graph([x], *(READERS["pixels"](part(x, start, 1008)) for start in (0, 16)))
    assert copies(g) == 0 and all(c.scratch_bytes for c in lower.lower(g, GENERIC).calls)
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
