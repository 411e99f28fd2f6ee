"""Resize and Upsample: tables of what each result is made of, for every coordinate mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, checked_axis, onnx_op
from skive.ir import Node
from skive.types import DType

MAX_TAPS = 64  # elements of a window that one resize2d sums


def source_positions(mode: str, size: int, out: int, scale: float, roi: tuple[float, float], *,
                     whole: bool = False, real: type[np.floating[Any]] = np.float64) -> np.ndarray:
    """Where each of `out` results lies on an axis of `size` elements, by coordinate mode.

    `whole`: the length that align_corners divides by is `out`, not what `scale` makes of `size`. `real`: the
    arithmetic, float32 where a rounding decides which element is taken, as in onnxruntime and PyTorch.
    The modes torch_... are those of PyTorch's own kernels, which multiply by a rounded 1 / scale.
    """
    x = np.arange(out, dtype=real)
    scaled, factor = scale * size, real(scale)
    if mode == "torch_asymmetric":
        return x * real(1 / scale)
    if mode == "torch_half_pixel":
        return (x + real(0.5)) * real(1 / scale) - real(0.5)
    if mode in ("align_corners", "torch_align_corners"):
        length = out if whole or mode == "torch_align_corners" else scaled
        return np.zeros(out) if length == 1 else x * real(size - 1) / real(length - 1)
    if mode == "asymmetric":
        return x / factor
    if mode == "tf_crop_and_resize":
        span = (roi[1] - roi[0]) * (size - 1)
        return (np.full(out, span / 2) if scaled == 1 else x * span / (scaled - 1)) + roi[0] * (size - 1)
    if mode == "tf_half_pixel_for_nn":
        return (x + real(0.5)) / factor
    if mode == "pytorch_half_pixel":
        return np.zeros(1) if out == 1 else (x + real(0.5)) / factor - real(0.5)
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - out / scaled) + (x + 0.5) / scale - 0.5
    if mode == "half_pixel":
        return (x + real(0.5)) / factor - real(0.5)
    raise InvalidModelError(f"coordinate_transformation_mode {mode!r}")


def as_written(scale: float) -> float:
    """The number that someone wrote for the float32 `scale`: 0.7 or 1 / 7, not what float32 makes of them."""
    simple = float(Fraction(scale).limit_denominator(1000))
    return simple if np.float32(simple) == np.float32(scale) else float(str(np.float32(scale)))


def nearest(mode: str, x: np.ndarray, size: int) -> np.ndarray:
    """The index next to each position."""
    rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "round_prefer_floor": lambda v: np.floor(v) + (v - np.floor(v) > 0.5),  # v + 0.5 could round up to the next
        "round_prefer_ceil": lambda v: np.floor(v) + (v - np.floor(v) >= 0.5), "floor": np.floor, "ceil": np.ceil}
    if mode not in rounding:
        raise InvalidModelError(f"nearest_mode {mode!r}")
    return np.clip(rounding[mode](x), 0, size - 1).astype(np.int64)


def triangle(d: np.ndarray, a: float) -> np.ndarray:
    return np.clip(1 - np.abs(d), 0, 1)


def cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (Keys: Cubic convolution interpolation for digital image processing, 1981)."""
    d = np.abs(d)
    return np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1,
                    np.where(d < 2, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a, 0.0))


def interpolation_matrix(c: Call, mode: str, x: np.ndarray, size: int, scale: float) -> np.ndarray:
    """[out, size]: the weight of every element in every result; rows sum to 1."""
    kernel = triangle if mode == "linear" else cubic
    reach = 1 if mode == "linear" else 2
    shrink = min(scale, 1.0) if c.attr("antialias", 0) else 1.0
    a = float(c.attr("cubic_coeff_a", -0.75))
    support = math.ceil(reach / shrink)
    c.room(len(x) * max(size, 2 * support + 2), "an interpolation matrix")
    taps = np.floor(x).astype(np.int64)[:, None] + np.arange(-support, support + 2)
    weights = kernel((taps - x[:, None]) * shrink, a)
    if c.attr("exclude_outside", 0):
        weights = np.where((taps >= 0) & (taps < size), weights, 0.0)
    weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((len(x), size))
    np.add.at(matrix, (np.arange(len(x))[:, None], np.clip(taps, 0, size - 1)), weights)
    return matrix


def along_matrix(c: Call, x: Node, axis: int, matrix: np.ndarray) -> Node:
    """`x` with an axis multiplied by [out, size]."""
    weights = c.lit(matrix, x.dtype)
    if axis == x.type.rank - 1:
        return c.make("linear", x, weights)
    if axis == x.type.rank - 2:
        return c.make("matmul", weights, x)
    perm = [i for i in range(x.type.rank) if i != axis] + [axis]
    return c.back(c.make("linear", c.transpose(x, perm), weights), perm)


def taps_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sources, weights) [out, taps] of a matrix [out, size]: its elements that are not zero, row by row.

    A row with fewer than the longest repeats its first source with weight 0.
    """
    used = matrix != 0
    order = np.argsort(~used, axis=1, kind="stable")[:, :max(int(used.sum(1).max()), 1)]
    weights = np.take_along_axis(matrix, order, 1)
    sources = np.where(weights != 0, order, order[:, :1])
    return sources.astype(np.int32), weights.astype(np.float32)


def resampled(c: Call, x: Node, tables: dict[int, np.ndarray]) -> Node:
    """`x` with each axis in `tables` sampled at indices [out] or multiplied by a matrix [out, size].

    The two axes of an image become one `resize2d`; a window of more than MAX_TAPS elements is
    cheaper axis by axis, and so is everything that is no image.
    """
    spatial = next((s for s in ((2, 3), (1, 2)) if x.type.rank == 4 and set(tables) <= set(s)), None)
    if tables and spatial and x.dtype is DType.f32 and x.type.size:
        operands, taps = [], 1
        for a in spatial:
            table = tables.get(a, np.arange(x.shape[a]))
            if table.ndim == 1:
                sources, weights = table.astype(np.int32)[:, None], np.ones((len(table), 1), np.float32)
            else:
                sources, weights = taps_of(table)
            operands += [c.lit(sources), c.lit(weights)]
            taps *= sources.shape[1]
        if taps <= MAX_TAPS:
            perm = (0, *spatial, 6 - sum(spatial))  # channels last
            return c.back(c.make("resize2d", c.transpose(x, perm), *operands), perm)
    for a, table in tables.items():
        x = c.make("gather", x, c.lit(table), axis=a) if table.ndim == 1 else along_matrix(c, x, a, table)
    return x


@onnx_op("Resize", "Upsample")
def resize(c: Call) -> Node:
    x = c[0]
    rank = x.type.rank
    old = c.op_type == "Upsample" or c.opset < 11
    roi_in, scales_in, sizes_in = (None, 1, None) if old else (1, 2, 3)
    axes = [checked_axis(int(a), rank) for a in c.attr("axes", range(rank))]
    scales: list[float] | None = None
    if c.op_type == "Upsample" and "scales" in c.attrs:
        scales = [float(s) for s in c.attr("scales")]
    elif c.has(scales_in) and c[scales_in].type.size:
        scales = [float(s) for s in c.const(scales_in, "scales").reshape(-1)]
    shape = list(x.shape)
    factor = [1.0] * rank
    if scales is not None:
        if len(scales) != len(axes) or min(scales, default=1) <= 0:
            raise InvalidModelError(f"scales {scales} for {len(axes)} axes")
        for a, s in zip(axes, scales):
            # In float32, as everyone else: 10 * 0.7 is 7 there, and 6.9999999 in exact arithmetic on the same factor.
            shape[a], factor[a] = math.floor(np.float32(x.shape[a]) * np.float32(s)), s
    elif sizes_in is not None and c.has(sizes_in):
        sizes = c.ints(sizes_in, "sizes")
        if len(sizes) != len(axes) or min(sizes, default=1) < 1:
            raise InvalidModelError(f"sizes {list(sizes)} for {len(axes)} axes")
        ratio = [n / x.shape[a] for a, n in zip(axes, sizes)]
        policy = c.choice("keep_aspect_ratio_policy", "stretch", "not_larger", "not_smaller")
        if policy != "stretch":
            common = min(ratio) if policy == "not_larger" else max(ratio)
            sizes = tuple(math.floor(common * x.shape[a] + 0.5) for a in axes)
            ratio = [common] * len(axes)
        for a, n, f in zip(axes, sizes, ratio):
            shape[a], factor[a] = n, f
    else:
        raise InvalidModelError("neither scales nor sizes")
    mode = c.attr("mode", "nearest")
    transform = "asymmetric" if old else c.attr("coordinate_transformation_mode", "half_pixel")
    roi = {a: (0.0, 1.0) for a in range(rank)}
    if transform == "tf_crop_and_resize" and roi_in is not None and c.has(roi_in):
        given = [float(v) for v in c.const(roi_in, "roi").reshape(-1)]
        roi |= {a: (given[i], given[len(axes) + i]) for i, a in enumerate(axes)}
    rounding = "floor" if old else c.attr("nearest_mode", "round_prefer_floor")
    torch = transform.startswith("torch_")
    if torch and scales is not None:
        factor = [as_written(f) for f in factor]
    whole = c.importer.model.producer_name == "pytorch"  # whose own lengths are integers
    outside = []
    tables: dict[int, np.ndarray] = {}
    for a in range(rank):
        if x.shape[a] == shape[a] and factor[a] == 1.0 and transform != "tf_crop_and_resize" or a not in axes:
            continue
        if torch and x.shape[a] == shape[a] and (mode == "linear" or (mode == "nearest" and rank > 3)):
            continue  # PyTorch leaves an axis alone that keeps its length, whatever the scale
        if x.shape[a] == 0:
            raise InvalidModelError(f"resize of {x.type}")
        c.room(shape[a], "an axis")
        stretch, rule = factor[a], transform
        if rule == "torch_align_corners" and c.attr("antialias", 0):  # half pixels, as far apart as corners say
            stretch = (shape[a] - 1) / (x.shape[a] - 1) if min(shape[a], x.shape[a]) > 1 else 1.0
            rule = "torch_half_pixel"
        position = source_positions(rule, x.shape[a], shape[a], stretch, roi[a], whole=whole,
                                    real=np.float32 if mode == "nearest" else np.float64)
        if transform == "tf_crop_and_resize":
            outside.append(((position < 0) | (position > x.shape[a] - 1)).reshape(
                [-1 if i == a else 1 for i in range(rank)]))
        if mode == "nearest":
            tables[a] = nearest(rounding, position, x.shape[a])
        elif mode in ("linear", "bilinear", "cubic"):
            matrix = interpolation_matrix(c, "cubic" if mode == "cubic" else "linear", position, x.shape[a], stretch)
            if x.shape[a] != shape[a] or not np.array_equal(matrix, np.eye(x.shape[a])):
                tables[a] = matrix
        else:
            raise InvalidModelError(f"mode {mode!r}")
    y = resampled(c, x, tables)
    if outside and any(o.any() for o in outside):
        mask = np.zeros((1,) * rank, np.bool_)
        for o in outside:
            mask = mask | o
        y = c.make("where", c.lit(mask), c.lit(float(c.attr("extrapolation_value", 0.0)), y.dtype), y)
    return y
