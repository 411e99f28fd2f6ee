"""Fourier transforms as products with constant matrices, windows and mel filters."""

from __future__ import annotations

import math

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.load import DTYPES
from skive.frontend.onnx.table import Call, Unsupported, checked_axis, onnx_op
from skive.ir import Node


def fourier(size: int, bins: int, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part [bins, size] of the DFT matrix; zeros are exact and positive, so that the first and the
    middle bin of a real signal have no imaginary part and a phase of 0 or pi, never -pi."""
    angle = (2 if inverse else -2) * np.pi / size * np.mod(np.outer(np.arange(bins), np.arange(size)), size)
    scale = size if inverse else 1
    real, imaginary = (np.where(abs(v) < 1e-12, 0.0, v / scale) for v in (np.cos(angle), np.sin(angle)))
    return real, imaginary


def transform(c: Call, x: Node, size: int, bins: int, inverse: bool) -> Node:
    """[..., size, 1 or 2] (real, or real and imaginary) to [..., bins, 2]."""
    c.room(size * bins, "a Fourier matrix")
    real, imaginary = fourier(size, bins, inverse)
    last = x.type.rank - 1
    re = c.index(x, last, 0)
    cos, sin = c.lit(real, x.dtype), c.lit(imaginary, x.dtype)
    if x.shape[last] == 1:
        return c.stack([c.make("linear", re, cos), c.make("linear", re, sin)], last)
    im = c.index(x, last, 1)
    return c.stack([c.make("sub", c.make("linear", re, cos), c.make("linear", im, sin)),
                    c.make("add", c.make("linear", re, sin), c.make("linear", im, cos))], last)


def fitted(c: Call, x: Node, axis: int, size: int) -> Node:
    """`x` cut or zero-padded at the end of an axis."""
    if size <= x.shape[axis]:
        return c.slice(x, axis, 0, size)
    after = [0] * x.type.rank
    after[axis] = size - x.shape[axis]
    return c.make("pad", x, before=(0,) * x.type.rank, after=tuple(after))


@onnx_op("DFT")
def dft(c: Call) -> Node:
    x = c[0]
    rank = x.type.rank
    if rank < 2 or x.shape[-1] not in (1, 2):
        raise InvalidModelError(f"DFT of {x.type}")
    if c.opset >= 20:
        axis = int(c.const(2, "axis").reshape(-1)[0]) if c.has(2) else -2
    else:
        axis = int(c.attr("axis", 1))
    axis = checked_axis(axis, rank)
    inverse, onesided = bool(c.attr("inverse", 0)), bool(c.attr("onesided", 0))
    size = int(c.const(1, "dft_length").reshape(-1)[0]) if c.has(1) else x.shape[axis]
    if size < 1 or axis == rank - 1:
        raise InvalidModelError(f"DFT of length {size} along axis {axis}")
    perm = [i for i in range(rank - 1) if i != axis] + [axis, rank - 1]
    if inverse and onesided:
        size = size if c.has(1) else 2 * (x.shape[axis] - 1)
        x = fitted(c, x, axis, size // 2 + 1)
        return c.back(real_inverse(c, c.transpose(x, perm), size), perm)
    x = fitted(c, x, axis, size)
    y = transform(c, c.transpose(x, perm), size, size // 2 + 1 if onesided else size, inverse)
    return c.back(y, perm)


def real_inverse(c: Call, x: Node, size: int) -> Node:
    """[..., size // 2 + 1, 2], half of a conjugate-symmetric spectrum, to the real signal [..., size, 1]."""
    if x.shape[-1] != 2 or size < 1:
        raise InvalidModelError(f"a spectrum {x.type} of {size} real samples")
    bins = size // 2 + 1
    c.room(size * bins, "a Fourier matrix")
    cosines, sines = fourier(size, size, True)
    # Every bin but the first (and the middle one of an even size) stands for its mirror image too.
    twice = np.where((np.arange(bins) == 0) | (2 * np.arange(bins) == size), 1.0, 2.0)
    last = x.type.rank - 1
    y = c.make("sub", c.make("linear", c.index(x, last, 0), c.lit(cosines[:, :bins] * twice, x.dtype)),
               c.make("linear", c.index(x, last, 1), c.lit(sines[:, :bins] * twice, x.dtype)))
    return c.reshape(y, (*y.shape, 1))


@onnx_op("STFT")
def stft(c: Call) -> Node:
    x = c[0]  # [N, L, 1 or 2]
    if x.type.rank == 2:
        x = c.reshape(x, (*x.shape, 1))
    step = int(c.const(1, "frame_step").reshape(-1)[0])
    window = c.get(2)
    size = int(c.const(3, "frame_length").reshape(-1)[0]) if c.has(3) else (window.shape[0] if window else 0)
    if step < 1 or not 1 <= size <= x.shape[1]:
        raise InvalidModelError(f"frames of {size}, {step} apart, of {x.type}")
    frames = (x.shape[1] - size) // step + 1
    c.room(frames * size, "a table of frames")
    index = np.arange(frames)[:, None] * step + np.arange(size)
    y = c.make("gather", x, c.lit(index, np.int64), axis=1)  # [N, frames, size, 1 or 2]
    if window is not None:
        y = c.make("mul", y, c.reshape(window, (size, 1)))
    return transform(c, y, size, size // 2 + 1 if c.attr("onesided", 1) else size, False)


@onnx_op("HannWindow", "HammingWindow", "BlackmanWindow")
def window(c: Call) -> Node:
    size = int(c.const(0, "size").reshape(-1)[0])
    to = int(c.attr("output_datatype", 1))
    if to not in DTYPES or size < 0:
        raise Unsupported("the element type that a window has is not supported")
    c.room(size, "a window")
    span = size if c.attr("periodic", 1) else size - 1
    angle = 2 * np.pi * np.arange(size) / max(span, 1)
    cosines = {"HannWindow": (0.5, 0.5, 0.0), "HammingWindow": (25 / 46, 21 / 46, 0.0),
               "BlackmanWindow": (0.42, 0.5, 0.08)}[c.op_type]
    return c.lit(cosines[0] - cosines[1] * np.cos(angle) + cosines[2] * np.cos(2 * angle), DTYPES[to])


@onnx_op("MelWeightMatrix")
def mel_weight_matrix(c: Call) -> Node:
    bands, size, rate = (int(c.const(i, w).reshape(-1)[0]) for i, w in
                         enumerate(("num_mel_bins", "dft_length", "sample_rate")))
    low, high = (float(c.const(i, "an edge frequency").reshape(-1)[0]) for i in (3, 4))
    to = int(c.attr("output_datatype", 1))
    if to not in DTYPES:
        raise Unsupported("the element type that MelWeightMatrix produces is not supported")
    if bands < 1 or size < 1 or rate < 1:
        raise InvalidModelError(f"{bands} mel bands of a DFT of {size} at {rate} Hz")

    c.room(bands * (size // 2 + 1), "a mel matrix")

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    steps = mel(low) + np.arange(bands + 2) * (mel(high) - mel(low)) / (bands + 2)
    edges = np.floor((size + 1) * (700 * (10 ** (steps / 2595) - 1)) / rate).astype(np.int64)
    matrix = np.zeros((size // 2 + 1, bands))
    for i in range(bands):
        left, centre, right = edges[i:i + 3]
        if centre == left:
            matrix[centre, i] = 1
        for k in range(left, centre + 1):
            if centre > left:
                matrix[k, i] = (k - left) / (centre - left)
        for k in range(centre, right):
            matrix[k, i] = (right - k) / (right - centre)
    return c.lit(matrix, DTYPES[to])
