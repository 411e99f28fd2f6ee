"""Weights in the order in which the kernels read them.

Every function takes plain arrays in the layout of the IR and returns a C-contiguous float32 array;
the layout that each one produces is described beside the kernel that reads it (kernels/include).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack_depthwise"]

Floats = NDArray[np.float32]

_DEPTHWISE_BLOCK = 16  # channels per block of depthwise.h


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack_depthwise(weights: Floats, bias: Floats | None, multiplier: int = 1) -> tuple[Floats, Floats]:
    """Packed weights and bias of `depthwise2d`.

    `weights` is [C * multiplier, KH, KW] (output channels first). With multiplier 1 the result is
    [ceil(C / 16), KH * KW, 16] and bias [ceil(C / 16) * 16], zero-filled; otherwise
    [KH * KW, C * multiplier] and bias [C * multiplier]. `bias` None means zeros.
    """
    channels, kh, kw = weights.shape
    if channels % multiplier:
        raise ValueError(f"{channels} output channels are no multiple of {multiplier}")
    flat = weights.reshape(channels, kh * kw).T.astype(np.float32)  # [KH * KW, OC]
    bias = np.zeros(channels, np.float32) if bias is None else np.asarray(bias, np.float32)
    if multiplier != 1:
        return np.ascontiguousarray(flat), np.ascontiguousarray(bias)
    padded = _round_up(channels, _DEPTHWISE_BLOCK)
    taps = np.zeros((kh * kw, padded), np.float32)
    taps[:, :channels] = flat
    blocks = taps.reshape(kh * kw, -1, _DEPTHWISE_BLOCK).transpose(1, 0, 2)
    full_bias = np.zeros(padded, np.float32)
    full_bias[:channels] = bias
    return np.ascontiguousarray(blocks), full_bias
