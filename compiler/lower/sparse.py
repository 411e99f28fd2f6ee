"""Convolutions and fully connected layers whose weights are zero in whole blocks.

Nothing marks such weights: the zeros are found when the layer is lowered, whoever put them there, and the
sparse kernel is taken where it is forecast to be faster than the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skive import pack, sparse_weights
from skive.ir import Graph, Node
from skive.lower.abilities import has_fast_kernel, is_depthwise
from skive.lower.calls import Lowering
from skive.targets.base import Target
from skive.types import DType

ONE = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}  # the window of a fully connected layer
LEAST_ZEROS = 0.25  # share of a layer's weights below which no pattern pays
LEAST_SPEEDUP = 1.1


@dataclass(frozen=True)
class Costs:
    """What the kernels cost in multiply-adds of the dense one: a multiply-add of the sparse kernel, and an output of
    each besides its multiply-adds. `winograd`: the dense multiply-adds by those that Winograd takes as long for.

    Measured on Zen 4: benchmarks/kernels/bench_sparse.py --fit.
    """

    kept: float
    output: float
    dense_output: float
    winograd: float = 1.0


# By target, whether operands are integers, and registers of output channels of a block. Few of them leave
# more zeros out; many make better use of what is loaded.
COSTS: dict[tuple[str, bool], dict[int, Costs]] = {
    ("avx512vnni", True): {1: Costs(1.0, 13, 8), 2: Costs(1.0, 12, 8)},
    ("avx512", True): {1: Costs(1.0, 5, 4), 2: Costs(1.0, 5, 4)},
    ("avx2", True): {1: Costs(1.0, 5, 4), 2: Costs(1.0, 5, 4)},
    ("generic", True): {1: Costs(1.0, 5, 4), 2: Costs(1.0, 5, 4), 4: Costs(1.0, 5, 4)},
    ("avx512", False): {1: Costs(1.0, 5, 4, 2.5), 2: Costs(1.0, 5, 4, 2.5)},
    ("avx2", False): {1: Costs(1.0, 5, 4, 2.5), 2: Costs(1.0, 5, 4, 2.5)},
    ("generic", False): {1: Costs(1.0, 5, 4), 2: Costs(1.0, 5, 4), 4: Costs(1.0, 5, 4)},
}
COSTS["avx512vnni", False] = COSTS["avx512", False]


# Registers of output channels whose blocks share a tile, of integers.
TOGETHER = {"avx512vnni": 4, "avx512": 4}


@dataclass(frozen=True)
class Choice:
    """How the zeros of a layer are used: blocks of `depth` input by `block` output channels, `kept` of them (a share)
    not zero; or, where `refused` says why, not at all. `speedup`: forecast, against the dense kernel."""

    block: int
    depth: int
    kept: float
    speedup: float
    refused: str | None = None

    @property
    def pattern(self) -> str:
        return f"block{self.depth}x{self.block}"


def _window(node: Node) -> tuple[np.ndarray, tuple[int, ...], dict[str, Any]]:
    """(weights [OC, KH, KW, IC], image [N, H, W, C], stride, pad and dilation) of a contraction."""
    x, w = node.inputs[:2]
    if node.op == "conv2d":
        return w.value, x.shape, dict(node.attrs)
    return w.value.reshape(w.shape[0], 1, 1, -1), (1, 1, x.type.size // w.shape[1], w.shape[1]), ONE


def zeros_of(node: Node) -> float:
    """The share of the weights of a contraction that are zero; 0 of anything else."""
    if node.op not in ("conv2d", "linear") or not node.inputs[1].is_const or not node.inputs[1].type.size:
        return 0.0
    return 1 - np.count_nonzero(node.inputs[1].value) / node.inputs[1].type.size


def sparse_choice(node: Node, target: Target) -> Choice | None:
    """How the zero weights of `node` are used on `target`, and why not where they are not; None where there are few.

    A forecast from measured costs: see `Costs`.
    """
    zeros = zeros_of(node)
    if zeros < LEAST_ZEROS:
        return None
    found = Choice(1, 1, 1 - zeros, 1.0)

    def refused(reason: str) -> Choice:
        return Choice(found.block, found.depth, found.kept, found.speedup, reason)

    if not has_fast_kernel(node):
        return refused("the layer runs the plain kernel")
    if node.op == "conv2d" and is_depthwise(node):
        return refused("a depthwise convolution has no blocks of input channels")
    if node.op == "conv2d" and node.attrs["groups"] > 1:
        return refused("a grouped convolution has no sparse kernel")
    if node.attrs.get("chain"):
        return refused("its sums are beyond 32 bits")
    weights, image, _ = _window(node)
    step = 4 // node.inputs[0].dtype.bytes
    if weights.shape[3] < step:
        return refused(f"{weights.shape[3]} input channels do not fill the {step} of a block")
    integer = node.inputs[0].dtype is not DType.f32
    winograd = node.op == "conv2d" and not integer and target.winograd_pays(node)
    oc, length = weights.shape[0], weights[0].size
    best = None
    for vectors, costs in COSTS[target.name, integer].items():
        block = min(vectors * target.lanes, -(-oc // 4) * 4)
        for depth in dict.fromkeys((step, 4)) if weights.shape[3] >= 4 else (step,):
            kept = sparse_weights.kept_places(weights, block, depth)
            channels = np.minimum(block, oc - np.arange(len(kept)) * block)
            left = float((kept.sum(1) * channels).sum()) * depth / oc  # multiply-adds of an output
            dense = length / (costs.winograd if winograd else 1.0) + costs.dense_output
            speedup = dense / (left * costs.kept + costs.output)
            # Deeper places make a shorter list: at equal cost they win.
            if best is None or speedup > best.speedup or (speedup == best.speedup and depth > best.depth):
                best = Choice(block, depth, left / length, speedup)
    assert best is not None
    found = best
    if found.speedup < LEAST_SPEEDUP:
        winner = "Winograd" if winograd else "the dense kernel"
        return refused(f"{zeros:.0%} of the weights are zero, {1 - found.kept:.0%} in blocks: {winner} is as fast")
    return found


def lower_sparse(ctx: Lowering, node: Node, choice: Choice, tags: list[str], bias: np.ndarray) -> None:
    """Appends the call of the sparse kernel; `tags` are image, kernel and window as template arguments."""
    x = node.inputs[0]
    weights, image, window = _window(node)
    pixel, size = ctx.pixel(x), x.dtype.bytes
    pitch = sparse_weights.copied_pitch(image, window, pixel, size)
    words, index = sparse_weights.pack_sparse(weights, choice.block, choice.depth, image, window, pixel, pitch)
    places = int(index[-(-weights.shape[0] // choice.block)])
    if x.dtype is DType.f32:
        biases: np.ndarray = pack.pack_bias(bias, choice.block)
        element: list[object] = []
    else:
        biases = pack.pack_bias_i32(bias, weights, node.attrs["zero"], choice.block)
        element = [x.dtype.ctype, node.attrs["zero"]]
    # Results of four registers are stored at once; with few pixels a group would leave its multiply-adds waiting.
    together = TOGETHER.get(ctx.target.name, 1) * ctx.target.lanes // choice.block
    pixels = node.type.size // node.shape[-1]
    group = max(1, together) if element and choice.block % ctx.target.lanes == 0 and pixels >= 7 else 1
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "sparse_conv2d",
        "sparse.h",
        [*tags, choice.block, group, choice.depth, pixel, ctx.pixel(node), pitch, places, *element],
        ["x", "w", "index", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", words),
            ctx.packed("index", index),
            ctx.packed("bias", biases),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=sparse_weights.scratch_bytes(image, window, weights.shape[1:3], pitch, size, ctx.threads),
    )


def sparse_layers(graph: Graph, target: Target) -> list[dict[str, Any]]:
    """What report.json says of each layer of the fused `graph` whose weights have many zeros."""
    layers = []
    for node in graph.nodes:
        choice = sparse_choice(node, target)
        if choice is not None:
            layers.append({
                "name": node.label(),
                "pattern": None if choice.refused else choice.pattern,
                "zeros": round(zeros_of(node), 4),
                "kept": round(choice.kept, 4),
                "speedup": round(choice.speedup, 2),
                "refused": choice.refused,
            })
    return layers
