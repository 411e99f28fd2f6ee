"""The quality of an enhanced image without its original, from the moments of patches across the borders of a coder's
blocks (Xing et al., Early Exit or Not: Resource-Efficient Blind Quality Enhancement for Compressed Images, 2020; after
Li et al., No-Reference Quality Assessment of Deblocked Images, 2014).

Patches as large as a block, shifted by half of one, of the first channel, each divided by the root of its energy and
without its mean. Orthonormal Tchebichef moments M tell smooth patches (energy of M up to 0.004) from textured ones. A
smooth patch scores log(1 - (v + h) / 2) / log(1 - 0.05), where v and h are the shares of the last row and column in
sum |M|, at most 0.05; a textured one 1 - mean(2 M B + C) / (M^2 + B^2 + C), B the moments of the patch after a
3x3 blur. The quality is mean(smooth)^0.9 mean(textured)^0.1; a mean of no patches is 1. A patch
without any contrast, for which the shares are not defined, scores 1.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from skive import ops
from skive.errors import ExitError
from skive.ir import Node, constant

SMOOTH = 0.004  # energy of the moments but the mean, as a share of the patch's
VISIBLE = 0.05  # shares above are as good as this one
SMALL = 1e-5  # C, and what is added to v and h
FLAT = 1e-4  # sum |M| of a patch without contrast; float32 leaves some 1e-7 of a constant
WEIGHT = 0.9
BLUR_SIGMA = 5.0


@cache
def tchebichef(size: int) -> np.ndarray:
    """The orthonormal Tchebichef polynomials [degree, position] of `size` points."""
    powers = np.vander(np.arange(size, dtype=np.float64) - (size - 1) / 2, increasing=True)
    q, r = np.linalg.qr(powers)
    return (q * np.sign(np.diag(r))).T


@cache
def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(moments of a patch without its mean, the blurred patch) as matrices on the pixels of a patch."""
    pixels = size * size
    kernel = np.exp(-np.arange(-1, 2) ** 2 / (2 * BLUR_SIGMA**2))
    kernel /= kernel.sum()
    line = sum(k * np.eye(size, k=d) for k, d in zip(kernel, (-1, 0, 1), strict=True))
    moments = np.kron(tchebichef(size), tchebichef(size)) @ (np.eye(pixels) - 1 / pixels)
    return moments, np.kron(line, line)


def patches(name: str, height: int, width: int, size: int) -> tuple[int, int, int]:
    """(first row and column, patches down, patches across); ExitError if there are none."""
    start = size // 2 - 1
    down, across = ((n // size * size - start) // size for n in (height, width))
    if down < 1 or across < 1:
        raise ExitError(f"exit {name}: quality needs an image of at least {2 * size}x{2 * size} pixels, "
                        f"not {height}x{width}")
    return start, down, across


def nodes(name: str, images: Node, size: int) -> Node:
    """The quality [N] of `images` [N, H, W, C] as nodes."""
    if images.type.rank != 4:
        raise ExitError(f"exit {name} is {images.type}; quality judges images, a tensor of 4 dimensions")
    batch, height, width, _ = images.shape
    start, down, across = patches(name, height, width, size)
    pixels = size * size

    def value(x: float) -> Node:
        return constant(np.asarray(x, np.float32))

    def total(x: Node, axis: int = 1) -> Node:
        return ops.make("reduce_sum", x, axes=(axis,))

    def product(x: Node, matrix: np.ndarray) -> Node:
        return ops.make("linear", x, constant(matrix.astype(np.float32)))

    def square(x: Node) -> Node:
        return ops.make("mul", x, x)

    cut = ops.make("slice", images, start=(0, start, start, 0), size=(batch, down * size, across * size, 1),
                   step=(1, 1, 1, 1))
    x = ops.make("reshape", cut, shape=(batch, down, size, across, size))
    x = ops.make("transpose", x, perm=(0, 1, 3, 2, 4))
    x = ops.make("reshape", x, shape=(batch * down * across, pixels))
    to_moments, blur = _matrices(size)

    def moments(patch: Node) -> Node:
        energy = ops.make("max", total(square(patch)), value(1e-30))
        return ops.make("mul", product(patch, to_moments), ops.make("rsqrt", energy))

    m, b = moments(x), moments(product(x, blur))
    contrast = total(square(m))
    magnitude = ops.make("abs", m)
    whole = total(magnitude)
    ends = np.zeros((2, size, size))
    ends[0, -1, :] = ends[1, :, -1] = 1
    shares = ops.make("div", product(magnitude, ends.reshape(2, pixels)), ops.make("max", whole, value(FLAT)))
    shares = ops.make("min", ops.make("add", shares, value(SMALL)), value(VISIBLE))
    mean_share = ops.make("mul", total(shares), value(0.5))
    smooth = ops.make("mul", ops.make("log", ops.make("sub", value(1.0), mean_share)), value(1 / np.log(1 - VISIBLE)))
    smooth = ops.make("where", ops.make("greater", whole, value(FLAT)), smooth, value(1.0))
    upper = ops.make("add", ops.make("mul", ops.make("mul", m, b), value(2.0)), value(SMALL))
    lower = ops.make("add", ops.make("add", square(m), square(b)), value(SMALL))
    likeness = ops.make("reduce_mean", ops.make("div", upper, lower), axes=(1,))
    blurred = ops.make("sub", value(1.0), likeness)

    is_textured = ops.make("cast", ops.make("greater", contrast, value(SMOOTH)), to=images.dtype)
    is_smooth = ops.make("sub", value(1.0), is_textured)
    result = None
    for kind, scores, weight in ((is_smooth, smooth, WEIGHT), (is_textured, blurred, 1 - WEIGHT)):
        by_image = [ops.make("reshape", v, shape=(batch, down * across)) for v in (kind, ops.make("mul", kind, scores))]
        count, sums = (ops.make("reduce_sum", v, axes=(1,), keep=False) for v in by_image)
        mean = ops.make("div", sums, ops.make("max", count, value(1.0)))
        mean = ops.make("where", ops.make("greater", count, value(0.5)), mean, value(1.0))
        part = ops.make("pow", ops.make("max", mean, value(0.0)), value(weight))
        result = part if result is None else ops.make("mul", result, part)
    assert result is not None
    return result
