"""Operations on windows of images [N, H, W, C]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict, Node
from skive.ops.contractions import exact, product_dtype
from skive.ops.table import F32, QUANTIZED, REQUIRED, Array, Op, Rule
from skive.types import DType, TensorType

ROWS: list[Op] = []


def window_out(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    """Positions of a window of `kernel` taps, `dilation` apart, moved by `stride` over a padded axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _positions(shape: tuple[int, ...], kernel: tuple[int, ...], a: FrozenDict) -> tuple[int, int]:
    """(rows, columns) of window positions over an image of this shape."""
    (t, left, b, r), (sh, sw), (dh, dw) = a["pad"], a["stride"], a["dilation"]
    return window_out(shape[1], t, b, kernel[0], sh, dh), window_out(shape[2], left, r, kernel[1], sw, dw)


def _check_window(name: str, a: FrozenDict, kernel: tuple[int, ...]) -> None:
    if (len(a["stride"]) != 2 or min(a["stride"]) < 1 or len(kernel) != 2 or min(kernel) < 1
            or len(a["pad"]) != 4 or min(a["pad"]) < 0 or min(a.get("dilation", (1, 1))) < 1):
        raise ShapeError(f"{name}: kernel {list(kernel)}, stride {list(a['stride'])}, pad {list(a['pad'])}, "
                         f"dilation {list(a.get('dilation', (1, 1)))} are not a window")


def _window_shape(name: str, x: TensorType, a: FrozenDict, kernel: tuple[int, ...]) -> tuple[int, int]:
    if x.rank != 4:
        raise ShapeError(f"{name} needs an operand [N, H, W, C], not {x}")
    _check_window(name, a, kernel)
    out = _positions(x.shape, kernel, a)
    if min(out) < 1:
        raise ShapeError(f"{name}: window {list(kernel)} does not fit {x}")
    return out


def _check_operands(name: str, types: Sequence[TensorType], g: int) -> None:
    """ShapeError unless image, weights and bias are those of a convolution in `g` groups."""
    x, w = types[:2]
    if w.rank != 4 or x.rank != 4:
        raise ShapeError(f"{name} of {x} and {w}")
    oc, _, _, ic = w.shape
    if g < 1 or x.shape[3] != ic * g or oc % g or (len(types) > 2 and types[2].shape != (oc,)):
        raise ShapeError(f"{name}: {', '.join(map(str, types))} with {g} groups")


def _infer_conv(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    _check_operands("conv2d", types, a["groups"])
    x, w = types[:2]
    oc, kh, kw, _ = w.shape
    if a["chain"] and a["groups"] == x.shape[3] > 1:
        raise ShapeError("conv2d: a depthwise convolution has no chain that could be too long")
    return TensorType((x.shape[0], *_window_shape("conv2d", x, a, (kh, kw)), oc),
                      product_dtype("conv2d", types, a["zero"], a["chain"]))


def _padded(x: Array, pad: tuple[int, int, int, int], value: float = 0.0) -> Array:
    t, left, b, r = pad
    return np.pad(x, [(0, 0), (t, b), (left, r), (0, 0)], constant_values=value) if any(pad) else x


def _taps(x: Array, kernel: tuple[int, ...], out: tuple[int, ...], a: FrozenDict) -> Any:
    """(kh, kw, view [N, OH, OW, C]) of every tap of a window over the padded image x."""
    (sh, sw), (dh, dw) = a["stride"], a.get("dilation", (1, 1))
    for kh in range(kernel[0]):
        for kw in range(kernel[1]):
            yield kh, kw, x[:, kh * dh:kh * dh + (out[0] - 1) * sh + 1:sh, kw * dw:kw * dw + (out[1] - 1) * sw + 1:sw]


def _ref_conv(x: Sequence[Array], a: FrozenDict) -> Array:
    img, w = x[:2]
    oc, kh, kw, ic = w.shape
    g = a["groups"]
    out = _positions(img.shape, (kh, kw), a)
    n = img.shape[0]
    y = np.zeros((n, *out, g, oc // g), img.dtype)
    for i, j, tap in _taps(_padded(img, a["pad"]), (kh, kw), out, a):
        tap = tap.reshape(n, *out, g, ic)
        wt = w[:, i, j].reshape(g, oc // g, ic)
        if ic == 1:
            y += tap * wt[:, :, 0]
        elif g == 1:
            y[..., 0, :] += tap[..., 0, :] @ wt[0].T
        else:
            y += np.matmul(tap[..., None, :], np.swapaxes(wt, 1, 2))[..., 0, :]
    y = y.reshape(n, *out, oc)
    return y + x[2] if len(x) > 2 else y


_WINDOW = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
ROWS.append(Op("conv2d", (2, 3), _infer_conv, exact(_ref_conv, "zero"),
        {**_WINDOW, "groups": 1, "zero": 0, "chain": 0}, "window", 1e-5, epilogue=3,
        doc="convolution of [N, H, W, C] with [OC, KH, KW, C/groups] and bias [OC]; groups = C is depthwise; "
            "with chain, float32 of the exact sum of 16-bit products, of which so many in a row fit 32 bits"))


def _infer_conv_transpose(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    _check_operands("conv_transpose2d", types, a["groups"])
    x, w = types[:2]
    oc, kh, kw, _ = w.shape
    _check_window("conv_transpose2d", a, (kh, kw))
    out = []
    for i in range(2):
        full = (x.shape[1 + i] - 1) * a["stride"][i] + a["dilation"][i] * ((kh, kw)[i] - 1) + 1 + a["out_pad"][i]
        out.append(full - a["pad"][i] - a["pad"][2 + i])
    if min(out) < 1 or min(a["out_pad"]) < 0:
        raise ShapeError(f"conv_transpose2d of {x} and {w} has an empty result")
    return TensorType((x.shape[0], *out, oc), product_dtype("conv_transpose2d", types, a["zero"]))


def _ref_conv_transpose(x: Sequence[Array], a: FrozenDict) -> Array:
    img, w = x[:2]
    oc, kh, kw, ic = w.shape
    g, (sh, sw), (dh, dw) = a["groups"], a["stride"], a["dilation"]
    n, h, wd, _ = img.shape
    full = np.zeros((n, (h - 1) * sh + dh * (kh - 1) + 1 + a["out_pad"][0],
                     (wd - 1) * sw + dw * (kw - 1) + 1 + a["out_pad"][1], oc), img.dtype)
    grouped = img.reshape(n, h, wd, g, ic)
    for i in range(kh):
        for j in range(kw):
            wt = w[:, i, j].reshape(g, oc // g, ic)
            part = np.matmul(grouped[..., None, :], np.swapaxes(wt, 1, 2))[..., 0, :].reshape(n, h, wd, oc)
            full[:, i * dh:i * dh + (h - 1) * sh + 1:sh, j * dw:j * dw + (wd - 1) * sw + 1:sw] += part
    t, left, b, r = a["pad"]
    y = full[:, t:full.shape[1] - b, left:full.shape[2] - r]
    return y + x[2] if len(x) > 2 else y


ROWS.append(Op("conv_transpose2d", (2, 3), _infer_conv_transpose, exact(_ref_conv_transpose, "zero"),
        {**_WINDOW, "groups": 1, "out_pad": (0, 0), "zero": 0}, "window", 1e-5, epilogue=3,
        doc="the transpose of conv2d: weights [OC, KH, KW, IC/groups], pads cut from the full result"))


def _pool_rule(name: str) -> Rule:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        x = types[0]
        shape = (x.shape[0], *_window_shape(name, x, a, a["kernel"]), x.shape[3])
        for i in range(2):
            if max(a["pad"][i], a["pad"][2 + i]) > a["dilation"][i] * (a["kernel"][i] - 1):
                raise ShapeError(f"{name}: a window lies wholly in the padding")
        return TensorType(shape, x.dtype)

    return rule


def _ref_max_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    low = -np.inf if x[0].dtype.kind == "f" else np.iinfo(x[0].dtype).min
    out = _positions(x[0].shape, a["kernel"], a)
    y = None
    for _, _, tap in _taps(_padded(x[0], a["pad"], low), a["kernel"], out, a):
        y = tap if y is None else np.maximum(y, tap)
    return np.array(y)


def _ref_avg_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    out = _positions(x[0].shape, a["kernel"], a)
    ones = np.ones((1, *x[0].shape[1:3], 1), np.float64)
    total = count = 0.0
    for (_, _, tap), (_, _, one) in zip(_taps(_padded(x[0].astype(np.float64), a["pad"]), a["kernel"], out, a),
                                        _taps(_padded(ones, a["pad"]), a["kernel"], out, a), strict=True):
        total, count = total + tap, count + one
    if a["count_pad"]:
        count = math.prod(a["kernel"])
    return (total / np.maximum(count, 1)).astype(x[0].dtype)


ROWS.append(Op("max_pool2d", (1, 1), _pool_rule("max_pool2d"), _ref_max_pool, {"kernel": REQUIRED, **_WINDOW}, "window", 0.0,
        epilogue=1, doc="largest element of each window of [N, H, W, C]"))
ROWS.append(Op("avg_pool2d", (1, 1), _pool_rule("avg_pool2d"), _ref_avg_pool, {"kernel": REQUIRED, **_WINDOW, "count_pad": False},
        "window", 1e-6, epilogue=1, doc="mean of each window; `count_pad` counts the padding as zeros"))


def _infer_sum_pool(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    if types[0].dtype not in QUANTIZED:
        raise ShapeError(f"sum_pool2d of {types[0]}")
    return _pool_rule("sum_pool2d")(types, a).with_dtype(DType.i32)


def _ref_sum_pool(x: Sequence[Array], a: FrozenDict) -> Array:
    out = _positions(x[0].shape, a["kernel"], a)
    v = _padded(x[0].astype(np.int32) - a["zero"], a["pad"])
    return np.asarray(np.sum([tap for _, _, tap in _taps(v, a["kernel"], out, a)], axis=0, dtype=np.int32))


ROWS.append(Op("sum_pool2d", (1, 1), _infer_sum_pool, _ref_sum_pool, {"kernel": REQUIRED, **_WINDOW, "zero": 0}, "window", 0.0,
        epilogue=1, doc="32-bit sum of (x - zero) over the part of each window that lies inside [N, H, W, C] of 8- or 16-bit "
                        "integers: an average pool before its division"))


def _infer_resize(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
    x, *tables = types
    if x.rank != 4 or not (x.dtype is F32 or (x.dtype in QUANTIZED and all(t.shape[1:] == (1,) for t in tables))):
        raise ShapeError(f"resize2d of {x}")
    for i, (sources, weights) in enumerate((tables[:2], tables[2:])):
        if (sources.dtype, weights.dtype) != (DType.i32, F32) or sources.rank != 2 or sources.shape != weights.shape:
            raise ShapeError(f"resize2d: tables {sources} and {weights}")
        if sources.size == 0 or x.shape[1 + i] == 0:
            raise ShapeError(f"resize2d of {x} with tables {sources}: nothing to sample")
    return TensorType((x.shape[0], tables[0].shape[0], tables[2].shape[0], x.shape[3]), x.dtype)


def _ref_resize(x: Sequence[Array], a: FrozenDict) -> Array:
    image = x[0].astype(np.float64)
    for axis, sources, weights in ((1, x[1], x[2]), (2, x[3], x[4])):
        places = np.clip(sources, 0, image.shape[axis] - 1)
        taps = np.moveaxis(np.take(image, places, axis), axis + 1, -1)  # the sources of each result as the last axis
        spread = [1, 1, 1, 1, weights.shape[1]]
        spread[axis] = weights.shape[0]
        image = np.sum(taps * weights.astype(np.float64).reshape(spread), -1)
    return image.astype(x[0].dtype)


ROWS.append(Op("resize2d", (5, 5), _infer_resize, _ref_resize, {}, "window", 1e-5, epilogue=5,
        doc="image [N, H, W, C] resampled: row i of the result is the sum over t of row_weights[i, t] times row rows[i, t], "
            "columns likewise; operands x, rows, row_weights [OH, T], columns, column_weights [OW, S]; of 8- and 16-bit "
            "integers one neighbour of weight 1"))


def copies_neighbours(resize: Node) -> bool:
    """Whether every value of a `resize2d` is one of its image, by tables that are constant."""
    tables = resize.inputs[1:5]
    return all(t.is_const for t in tables) and all(w.shape[1] == 1 and bool((w.value == 1).all()) for w in tables[1::2])
