"""Weights that are zero in whole blocks: which places of the window are left, and their packed form.

A place is `depth` consecutive input channels of one tap; a block of output channels reads it if any of
its weights there is not zero. kernels/include/skive/sparse.h describes the packed arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skive.pack import _copied_bytes, _round_up

_CLASH = 4096  # bytes: pixels that are a multiple of it apart share one set of the L1 cache
_LINE = 64
_QUANTUM = 4  # kChannelQuantum of tile.h


def _places(weights_ohwi: np.ndarray, block: int, depth: int) -> np.ndarray:
    """`weights_ohwi` [OC, KH, KW, IC] as [blocks, block, places, depth], zero-filled.

    Of input channels that are no multiple of `depth` the last place is the last `depth` channels, with zeros for
    those that the place before holds.
    """
    oc, kh, kw, ic = weights_ohwi.shape
    whole = ic // depth * depth
    groups = np.zeros((_round_up(oc, block), kh * kw, -(-ic // depth), depth), weights_ohwi.dtype)
    taps = weights_ohwi.reshape(oc, kh * kw, ic)
    groups[:oc, :, : ic // depth] = taps[:, :, :whole].reshape(oc, kh * kw, -1, depth)
    if ic > whole:
        groups[:oc, :, -1, depth - (ic - whole) :] = taps[:, :, whole:]
    return groups.reshape(-1, block, kh * kw * groups.shape[2], depth)


def kept_places(weights_ohwi: np.ndarray, block: int, depth: int) -> NDArray[np.bool_]:
    """[blocks, KH * KW * ceil(IC / depth)] which places hold a weight that is not zero."""
    return (_places(weights_ohwi, block, depth) != 0).any((1, 3))


def copied_pitch(image: Sequence[int], window: Mapping[str, Any], pixel_stride: int, element_size: int) -> int:
    """Elements between the pixels of the copy that sparse_conv2d reads, 0 where it reads its input in place.

    `image` is [N, H, W, C]; `window` has "stride" and "pad". Copied is what needs a border, and pixels that would
    fight over one set of the L1 cache.
    """
    channels = image[3]

    def clashes(pitch: int) -> bool:
        return pitch * window["stride"][1] * element_size % _CLASH == 0 and math.prod(image[:3]) > 7

    if any(window["pad"]):
        return channels + _LINE // element_size * clashes(channels)
    return channels + _LINE // element_size if clashes(pixel_stride) else 0


def _copied_columns(image: Sequence[int], window: Mapping[str, Any], kw: int) -> int:
    """Columns of the copy: what the windows of a row reach."""
    (_, sw), (_, dw), (_, left, _, right) = window["stride"], window["dilation"], window["pad"]
    reach = dw * (kw - 1) + 1
    return (image[2] + left + right - reach) // sw * sw + reach


def pitches(
    image: Sequence[int], window: Mapping[str, Any], kw: int, pixel_stride: int, pitch: int
) -> tuple[int, int]:
    """Elements between neighbouring rows and pixels of what `sparse_conv2d` reads."""
    pixel = pitch or pixel_stride
    return pixel * (_copied_columns(image, window, kw) if pitch else image[2]), pixel


def rounded_channels(channels: int) -> int:
    """Output channels that a block of `channels` has in the packed weights."""
    return _round_up(channels, _QUANTUM)


def filled(packed: np.ndarray) -> np.ndarray:
    """`packed`, flat, with zeros up to whole cache lines, at least one."""
    result = np.zeros(_round_up(max(packed.nbytes, 1), _LINE) // packed.itemsize, packed.dtype)
    result[: packed.size] = packed
    return result


def scratch_bytes(
    image: Sequence[int], window: Mapping[str, Any], kernel: Sequence[int], pitch: int, element_size: int, parts: int
) -> int:
    """Upper bound of `sparse_conv2d::scratch_bytes(parts)`."""
    if pitch == 0:
        return 0
    (sh, sw), (dh, dw), (top, left, bottom, right) = window["stride"], window["dilation"], window["pad"]
    reach_h, reach_w = dh * (kernel[0] - 1) + 1, dw * (kernel[1] - 1) + 1
    oh = (image[1] + top + bottom - reach_h) // sh + 1
    ow = (image[2] + left + right - reach_w) // sw + 1
    most = _copied_bytes(oh, sh, reach_h, _copied_columns(image, window, kernel[1]) * pitch * element_size)
    if image[1] == 1 and kernel[0] == 1 and oh == 1:  # one dimension: its only axis becomes the rows
        most = max(most, _copied_bytes(ow, sw, reach_w, pitch * element_size))
    return most * parts


def pack_sparse(
    weights_ohwi: np.ndarray,
    block: int,
    depth: int,
    image: Sequence[int],
    window: Mapping[str, Any],
    pixel_stride: int,
    pitch: int,
) -> tuple[np.ndarray, NDArray[np.int32]]:
    """(weights, index) of `sparse_conv2d`, flat; of the type of `weights_ohwi` [OC, KH, KW, IC].

    `pitch` as `copied_pitch` gives it; `pixel_stride` is XS. Integers travel in steps of four bytes.
    """
    oc, kh, kw, ic = weights_ohwi.shape
    step = 1 if weights_ohwi.dtype.kind == "f" else 4 // weights_ohwi.dtype.itemsize
    (dh, dw) = window["dilation"]
    row, pixel = pitches(image, window, kw, pixel_stride, pitch)
    channel = np.minimum(np.arange(-(-ic // depth)) * depth, ic - depth)
    distance = (
        (np.arange(kh) * dh * row)[:, None, None] + (np.arange(kw) * dw * pixel)[:, None] + channel
    ).ravel()
    places = _places(weights_ohwi, block, depth)
    kept = (places != 0).any((1, 3))
    rows = []
    for b, (w, left) in enumerate(zip(places, kept, strict=True)):
        channels = min(block, rounded_channels(oc - b * block))
        w = w[:channels, left].reshape(channels, -1, depth // step, step)  # [NB, places, rows, step]
        rows.append(w.transpose(1, 2, 0, 3).ravel())
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))])
    index = np.concatenate([starts, *(distance[left] for left in kept)]).astype(np.int32)
    return filled(np.concatenate(rows)), index


def rows_chunk(lanes: int) -> int:
    """kChunk of spmm.h: pixels that are turned together."""
    return 4 * lanes


def rows_scratch_bytes(channels: int, lanes: int, parts: int) -> int:
    """`sparse_rows::scratch_bytes(parts)`."""
    return 4 * (channels + 2 * lanes) * rows_chunk(lanes) * parts


def pack_rows(weights: np.ndarray, together: int, lanes: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(weights, index) of `sparse_rows`, flat; `weights` is [OC, IC]."""
    oc, ic = weights.shape
    padded = np.zeros((_round_up(oc, together), ic), np.float32)
    padded[:oc] = weights
    groups = padded.reshape(-1, together, ic).transpose(0, 2, 1)  # [groups, IC, together]
    kept = (groups != 0).any(2)
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))])
    index = np.concatenate([starts, np.nonzero(kept)[1] * rows_chunk(lanes)]).astype(np.int32)
    return filled(groups[kept].ravel()), index
