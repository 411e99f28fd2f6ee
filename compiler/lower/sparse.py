"""Convolutions and fully connected layers whose weights are zero in whole blocks, or n of each m of them.

Nothing marks such weights: the zeros are found when the layer is lowered, whoever put them there, and the
sparse kernel is taken where it is forecast to be faster than the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from skive import _native, gathered_weights, pack, sparse_weights
from skive.ir import Graph, Node
from skive.lower.abilities import has_fast_kernel, is_depthwise
from skive.lower.calls import Lowering
from skive.targets.base import Target
from skive.types import DType

ONE = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}  # the window of a fully connected layer
LEAST_ZEROS = 0.25  # share of a layer's weights below which no pattern pays
LEAST_SPEEDUP = 1.1


class Costs(NamedTuple):
    """What a sparse kernel costs in multiply-adds of the dense one: a multiply-add, and an output besides its own."""

    kept: float
    output: float


# Measured on Zen 4 (benchmarks/kernels/bench_sparse.py --only 1x14x14 --fit): by target and whether operands are
# integers, what an output of the dense kernel costs, and the sparse one by registers of output channels of a block.
# Fewer channels leave more zeros out; more of them make better use of what is loaded.
BLOCKS: dict[tuple[str, bool], tuple[float, dict[int, Costs]]] = {
    ("avx512vnni", True): (7.7, {1: Costs(1.02, 9.8), 2: Costs(1.01, 8.9)}),
    ("avx512", True): (2.7, {1: Costs(1.18, 5.8), 2: Costs(1.01, 3.9)}),
    ("avx2", True): (7.0, {1: Costs(1.22, 8.8), 2: Costs(1.05, 8.8)}),
    ("generic", True): (17.0, {1: Costs(0.8, 17), 2: Costs(1.0, 17), 4: Costs(1.55, 18)}),
    ("avx512", False): (1.0, {1: Costs(1.02, 2.9), 2: Costs(1.03, 2.0), 3: Costs(1.02, 2.4)}),
    ("avx2", False): (1.0, {1: Costs(1.34, 7), 2: Costs(1.02, 3)}),
    ("generic", False): (19.0, {1: Costs(1.24, 29), 2: Costs(1.1, 26)}),
}
BLOCKS["avx512vnni", False] = BLOCKS["avx512", False]
# The same where `_wide`, measured on Zen 5: a block of one register waits for its loads.
BLOCKS_WIDE: dict[tuple[str, bool], tuple[float, dict[int, Costs]]] = {
    ("avx512vnni", True): (10.8, {1: Costs(1.33, 14.7), 2: Costs(1.02, 11.1)}),
    ("avx512", True): (3.2, {1: Costs(1.17, 8.1), 2: Costs(1.01, 4.9)}),
    ("avx512", False): (1.5, {1: Costs(1.37, 6.6), 2: Costs(1.03, 2.7), 3: Costs(1.05, 4.0)}),
}
BLOCKS_WIDE["avx512vnni", False] = BLOCKS_WIDE["avx512", False]


class RowsCosts(NamedTuple):
    """What spmm.h costs in the same unit (`--rows`): an output `output`, and `turn` for each input channel that is
    turned for it; a multiply-add, by the output channels that read the same inputs, `kept` as long as the turned inputs
    fit the first cache, and where they do not."""

    output: float
    turn: float
    kept: dict[int, tuple[float, float]]


ROWS = {
    "avx512": RowsCosts(10, 5, {1: (1.45, 2.1), 2: (1.1, 1.22), 4: (1.03, 1.06)}),
    "avx2": RowsCosts(10, 5, {1: (1.6, 2.4), 2: (1.2, 1.35)}),
    "generic": RowsCosts(10, 5, {1: (0.7, 0.95), 4: (0.65, 0.85)}),
}
ROWS_WIDE = {"avx512": RowsCosts(16, 11, {1: (1.8, 2.8), 2: (1.25, 1.75), 4: (1.1, 1.25)})}
ROWS_CACHE = 32 * 1024
WINOGRAD = {1: 3.0, 2: 1.5}  # times as fast as the direct kernel, by stride, from 64 channels on


class GatherCosts(NamedTuple):
    """The same where bytes are gathered first; `place`, `lane`: of gathering, by the places of an output channel and by
    their lanes of 16 bytes."""

    kept: float
    place: float
    lane: float
    output: float


# Measured with `--only 1x14x14 --n-of-m 2:4,1:4 --depths 64,32,16 --fit`, by registers of output channels of a block;
# what an output costs avx512vnni with layers of 16 to 32 input channels, where it decides.
GATHERED: dict[str, dict[int, GatherCosts]] = {
    "avx512vnni": {1: GatherCosts(0.95, 3.0, 0.5, 11.5), 2: GatherCosts(0.92, 0.7, 0.2, 13)},
    "avx512": {1: GatherCosts(0.9, 0.6, 0.4, 6.9), 2: GatherCosts(0.86, 0.4, 0.1, 4.3)},
    "avx2": {1: GatherCosts(0.96, 3.1, 0.7, 5.3), 2: GatherCosts(0.94, 1.0, 0.35, 5.9)},
    "generic": {1: GatherCosts(0.85, 0, 0.2, 13), 2: GatherCosts(1.07, 0, 0, 13)},
}
GATHERED_WIDE = {"avx512vnni": {1: GatherCosts(1.27, 6.5, 1.2, 18.5), 2: GatherCosts(0.88, 2.1, 0.3, 13.2)}}
GATHER_DEPTHS = {"avx512": (64, 32, 16), "avx2": (32, 16), "generic": (16,)}  # bytes of a place, by Target.vectors
GATHER_KEEPS = (8, 4)  # of 16 bytes

# Registers of output channels whose blocks share a tile, of integers.
TOGETHER = {"avx512vnni": 4}
GATHERED_TOGETHER = {"avx512vnni": 2}


@dataclass(frozen=True)
class Choice:
    """How the zeros of a layer are used: blocks of `depth` input by `block` output channels, `kept` of them (a share)
    not zero; or `keep` of each 16 bytes of `depth` for `block` output channels, `kept` the share of weights
    multiplied; or, where `refused` says why, not at all. `speedup`: forecast, against the dense kernel."""

    kernel: str
    block: int
    depth: int
    kept: float
    speedup: float
    refused: str | None = None
    keep: int = 0

    @property
    def pattern(self) -> str:
        depth = 1 if self.keep else self.depth
        return "1x1" if self.block == depth == 1 else f"block{depth}x{self.block}"


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
    reason = _obstacle(node)
    if reason:
        return Choice("", 1, 1, 1 - zeros, 1.0, reason)
    winograd = node.op == "conv2d" and node.inputs[0].dtype is DType.f32 and target.winograd_pays(node)
    # At equal speed deeper places win: they make a shorter list.
    best = max(_candidates(node, target, winograd), key=lambda c: (c.speedup, c.depth))
    if best.speedup < LEAST_SPEEDUP:
        winner = "Winograd" if winograd else "the dense kernel"
        blocks = f"{1 - best.kept:.0%} in {best.pattern}"
        reason = f"{zeros:.0%} of the weights are zero, {blocks}: {winner} is as fast ({best.speedup:.2f})"
        return replace(best, refused=reason)
    return best


def _obstacle(node: Node) -> str | None:
    """Why no sparse kernel can compute `node`."""
    if not has_fast_kernel(node):
        return "the layer runs the plain kernel"
    if node.op == "conv2d" and is_depthwise(node):
        return "a depthwise convolution has no blocks of input channels"
    if node.op == "conv2d" and node.attrs["groups"] > 1:
        return "a grouped convolution has no sparse kernel"
    if node.attrs.get("chain"):
        return "its sums are beyond 32 bits"
    channels, step = node.inputs[1].shape[-1], 4 // node.inputs[0].dtype.bytes
    return f"{channels} input channels do not fill the {step} of a block" if channels < step else None


def _wide() -> bool:
    """True if this processor multiplies two registers of 512 bits at once, which no instruction tells: assumed of all
    that have AVX-VNNI beside 512-bit registers. It decides what is fast, never what is right."""
    return "avxvnni" in _native.cpu_features()


def _candidates(node: Node, target: Target, winograd: bool) -> Iterator[Choice]:
    """Every sparse kernel for `node`, with its forecast."""
    weights, image, window = _window(node)
    oc, length, channels = weights.shape[0], weights[0].size, weights.shape[3]
    integer = node.inputs[0].dtype is not DType.f32
    dense_output, blocks = (BLOCKS | BLOCKS_WIDE if _wide() else BLOCKS)[target.name, integer]
    dense = length / (WINOGRAD[node.attrs["stride"][0]] if winograd else 1.0) + dense_output
    step = 4 // node.inputs[0].dtype.bytes
    for vectors, costs in blocks.items():
        block = min(vectors * target.lanes, -(-oc // 4) * 4)
        for depth in dict.fromkeys((step, 4)) if channels >= 4 else (step,):
            kept = sparse_weights.kept_places(weights, block, depth)
            own = np.minimum(block, oc - np.arange(len(kept)) * block)
            left = float((kept.sum(1) * own).sum()) * depth / oc  # multiply-adds of an output
            yield Choice("sparse_conv2d", block, depth, left / length, dense / (left * costs.kept + costs.output))
    if node.inputs[0].dtype is DType.u8:
        yield from _gathered(weights, image, window, target, dense)
    if not integer and length == channels and not any(window["pad"]) and window["stride"] == (1, 1):
        if math.prod(image[:3]) < target.lanes:
            return
        far = channels * 4 * sparse_weights.rows_chunk(target.lanes) > ROWS_CACHE
        rows = (ROWS | ROWS_WIDE if _wide() else ROWS)[target.vectors]
        output = rows.output + rows.turn * channels / oc
        for together, cost in rows.kept.items():
            left = float(sparse_weights.kept_places(weights, together, 1).mean()) * length
            yield Choice("sparse_rows", together, 1, left / length, dense / (left * cost[far] + output))


def _gathered(
    weights: np.ndarray, image: tuple[int, ...], window: dict[str, Any], target: Target, dense: float
) -> Iterator[Choice]:
    """The kernels that gather the bytes which a block of output channels reads; `dense`: cost of an output there."""
    oc, length = weights.shape[0], weights[0].size
    if oc < target.lanes:  # gathering is for a whole register of them
        return
    run = gathered_weights.run_length(
        weights.shape, window, sparse_weights.copied_pitch(image, window, weights.shape[3], 1)
    )
    for vectors, costs in (GATHERED | GATHERED_WIDE if _wide() else GATHERED)[target.name].items():
        block = min(vectors * target.lanes, -(-oc // 4) * 4)
        read = gathered_weights.channels_read(weights, block)
        if read.mean() > 1 - LEAST_ZEROS:
            continue
        share = np.minimum(block, oc - np.arange(len(read)) * block) / oc
        for depth in GATHER_DEPTHS[target.vectors]:
            if depth > run:
                continue
            most = gathered_weights.most_of_a_lane(read, depth, run)
            for keep in GATHER_KEEPS:
                places = float((-(-most // keep)).sum(1) @ share)
                left = places * depth * keep / gathered_weights.LANE  # multiply-adds of an output
                gathering = places * (costs.place + costs.lane * depth / gathered_weights.LANE)
                cost = left * costs.kept + gathering + costs.output
                yield Choice("sparse_conv2d", block, depth, left / length, dense / cost, keep=keep)


def lower_sparse(ctx: Lowering, node: Node, choice: Choice, tags: list[str], bias: np.ndarray) -> None:
    """Appends the call of the sparse kernel; `tags` are image, kernel and window as template arguments."""
    x = node.inputs[0]
    weights, image, window = _window(node)
    if choice.kernel == "sparse_rows":
        _lower_rows(ctx, node, choice, weights.reshape(len(weights), -1), bias)
        return
    pixel, size = ctx.pixel(x), x.dtype.bytes
    pitch = sparse_weights.copied_pitch(image, window, pixel, size)
    if choice.keep:
        words, index = gathered_weights.pack_gathered(
            weights, choice.block, choice.depth, choice.keep, image, window, pixel, pitch, ctx.target.name
        )
    else:
        words, index = sparse_weights.pack_sparse(weights, choice.block, choice.depth, image, window, pixel, pitch)
    share = round(16 * choice.kept)
    if x.dtype is DType.f32:
        biases: np.ndarray = pack.pack_bias(bias, choice.block)
        element: list[object] = []
    else:
        biases = pack.pack_bias_i32(bias, weights, node.attrs["zero"], choice.block)
        element = [x.dtype.ctype, node.attrs["zero"], *([choice.keep] if choice.keep else [])]
    # Results of four registers are stored at once; with few pixels a group would leave its multiply-adds waiting.
    tiles = GATHERED_TOGETHER if choice.keep else TOGETHER
    together = tiles.get(ctx.target.name, 1) * ctx.target.lanes // choice.block
    pixels = node.type.size // node.shape[-1]
    group = max(1, together) if element and choice.block % ctx.target.lanes == 0 and pixels >= 7 else 1
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "sparse_conv2d",
        "sparse.h",
        [*tags, choice.block, group, choice.depth, pixel, ctx.pixel(node), pitch, share, *element],
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


def _lower_rows(ctx: Lowering, node: Node, choice: Choice, weights: np.ndarray, bias: np.ndarray) -> None:
    x, (oc, channels), lanes = node.inputs[0], weights.shape, ctx.target.lanes
    words, index = sparse_weights.pack_rows(weights, choice.block, lanes)
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "sparse_rows",
        "spmm.h",
        [x.type.size // channels, channels, oc, choice.block, ctx.pixel(x), ctx.pixel(node)],
        ["x", "w", "index", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", words),
            ctx.packed("index", index),
            ctx.packed("bias", pack.pack_bias(bias, 4)),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=sparse_weights.rows_scratch_bytes(channels, lanes, ctx.threads),
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
