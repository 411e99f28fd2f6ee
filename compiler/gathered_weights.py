"""Weights that are zero for most input channels of a block of output channels: n:m sparsity of bytes, packed.

A window's bytes lie in runs: the input channels of a tap, or those of a whole filter row where its taps are
neighbours. A run is covered by stretches of `depth` bytes, in lanes of 16; a place is a stretch and up to `keep`
bytes of each of its lanes. kernels/include/skive/sparse.h describes the packed arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skive.sparse_weights import filled, pitches, rounded_channels

LANE = 16  # bytes that a shuffle takes from: kGatherLane
NOTHING = -128  # in an order: a zero
PAIRS = ("avx512", "avx2")  # targets whose products are of two 16-bit numbers, not of four bytes


def run_length(shape: Sequence[int], window: Mapping[str, Any], pitch: int) -> int:
    """Consecutive input bytes of a window; `shape` of the weights, `pitch` as `copied_pitch` gives it.

    The copy alone says so whatever lies between the pixels of the input.
    """
    _, _, kw, ic = shape
    return kw * ic if window["dilation"][1] == 1 and pitch == ic else ic


def _starts(run: int, depth: int) -> NDArray[np.int_]:
    """Where the stretches of a run begin; the last one ends where the run does."""
    return np.minimum(np.arange(-(-run // depth)) * depth, run - depth)


def channels_read(weights_ohwi: np.ndarray, block: int) -> NDArray[np.bool_]:
    """[blocks, KH * KW * IC] which weights are not zero for all output channels of a block."""
    oc = weights_ohwi.shape[0]
    return np.logical_or.reduceat(weights_ohwi.reshape(oc, -1) != 0, np.arange(0, oc, block))


def _in_lanes(read: NDArray[np.bool_], depth: int, run: int) -> NDArray[np.bool_]:
    """[blocks, runs, stretches, lanes, LANE] what `channels_read` gave, each byte in one stretch."""
    starts = _starts(run, depth)
    lanes = read.reshape(len(read), -1, run)[:, :, starts[:, None] + np.arange(depth)]
    if len(starts) > 1:
        lanes[:, :, -1, : starts[-2] + depth - starts[-1]] = False
    return lanes.reshape(*lanes.shape[:3], -1, LANE)


def most_of_a_lane(read: NDArray[np.bool_], depth: int, run: int) -> NDArray[np.int_]:
    """[blocks, stretches] bytes read of the fullest lane; a stretch is as many places as these fill `keep`."""
    return _in_lanes(read, depth, run).sum(-1).max(-1).reshape(len(read), -1)


def pack_gathered(
    weights_ohwi: NDArray[np.int8],
    block: int,
    depth: int,
    keep: int,
    image: Sequence[int],
    window: Mapping[str, Any],
    pixel_stride: int,
    pitch: int,
    target: str,
) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """(weights, index) of `sparse_conv2d` with Keep = `keep` and Depth = `depth`, flat, for `target`.

    `weights_ohwi` is [OC, KH, KW, IC]; `pitch` and `pixel_stride` as for `pack_sparse`.
    """
    oc, kh, kw, _ = weights_ohwi.shape
    row, pixel = pitches(image, window, kw, pixel_stride, pitch)
    run = run_length(weights_ohwi.shape, window, pitch)
    read, starts = _in_lanes(channels_read(weights_ohwi, block), depth, run), _starts(run, depth)
    blocks, runs, _, lanes, _ = read.shape

    # Of each byte: its place, and where in its lane it goes.
    rank = read.cumsum(-1) - 1
    passes = -(-read.sum(-1).max(-1) // keep)  # [blocks, runs, stretches] places
    first = (passes.cumsum() - passes.ravel()).reshape(passes.shape)
    b, r, s, lane, byte = at = np.nonzero(read)
    place, slot = first[b, r, s] + rank[at] // keep, rank[at] % keep

    total, pairs = int(passes.sum()), target in PAIRS
    order = np.full((total, lanes, LANE), NOTHING if pairs else 0, np.int8)
    order[place, lane, slot * 2 if pairs else slot] = byte
    padded = np.zeros((blocks * block, weights_ohwi[0].size), np.int8)
    padded[:oc] = weights_ohwi.reshape(oc, -1)
    kept = np.zeros((total, lanes, keep, block), np.int8)
    kept[place, lane, slot] = padded.reshape(blocks, block, -1)[b, :, r * run + starts[s] + lane * LANE + byte]
    step = 2 if pairs else 4
    rows = kept.reshape(total, lanes * keep // step, step, block).transpose(0, 1, 3, 2)  # [places, rows, NB, step]

    ends = passes.sum((1, 2)).cumsum()
    last = int(ends[-2]) if blocks > 1 else 0
    narrow = rows[last:, :, : rounded_channels(oc - (blocks - 1) * block)]
    packed = [np.concatenate([o.reshape(-1, depth), w.reshape(len(w), math.prod(w.shape[1:]))], 1).ravel()
              for o, w in ((order[:last], rows[:last]), (order[last:], narrow))]

    dh, dw = window["dilation"]
    of_row = runs // kh
    begin = np.arange(runs) // of_row * dh * row + np.arange(runs) % of_row * dw * pixel
    distance = np.broadcast_to(begin[:, None] + starts, passes.shape)
    index = np.concatenate([[0], ends, np.repeat(distance, passes.ravel())]).astype(np.int32)
    return filled(np.concatenate(packed)), index
