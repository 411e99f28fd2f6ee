"""Convolution and pooling: operators that move a window over an image of one, two or three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node
from skive.types import DType


def to_channels_last(c: Call, x: Node) -> Node:
    """[N, C, D...] as [N, H, W, C]; a 1-D signal becomes an image of height 1."""
    rank = x.type.rank
    x = c.transpose(x, (0, *range(2, rank), 1))
    return c.reshape(x, (x.shape[0], 1, *x.shape[1:])) if rank == 3 else x


def to_channels_first(c: Call, x: Node, rank: int) -> Node:
    """The inverse of `to_channels_last` for a result of the given rank."""
    if rank == 3:
        x = c.reshape(x, (x.shape[0], *x.shape[2:]))
    return c.transpose(x, (0, rank - 1, *range(1, rank - 1)))


def spatial(c: Call, x: Node) -> tuple[int, ...]:
    """The sizes of the window's axes; InvalidModelError if there are none."""
    if x.type.rank < 3:
        raise InvalidModelError(f"{c.op_type} needs an operand [N, C, ...], not {x.type}")
    return x.shape[2:]


def window_attr(c: Call, name: str, n: int, default: int) -> tuple[int, ...]:
    """Attribute `name`: n positive integers."""
    values = tuple(int(v) for v in c.attr(name, [default] * n))
    if len(values) != n or min(values) < 1:
        raise InvalidModelError(f"{name} {list(values)} for {n} axes")
    return values


def window_pads(c: Call, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding (before, after) of every axis, from `pads` or `auto_pad`."""
    n = len(sizes)
    auto = c.choice("auto_pad", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-d // s) - 1) * s + k_dilated(k, dl) - d)
                 for d, k, s, dl in zip(sizes, kernel, stride, dilation)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if auto == "SAME_UPPER" else (large, small)
    if auto == "VALID":
        return [0] * n, [0] * n
    pads = [int(p) for p in c.attr("pads", [0] * 2 * n)]
    if len(pads) != 2 * n:
        raise InvalidModelError(f"{len(pads)} pads for {n} axes")
    return pads[:n], pads[n:]


def k_dilated(kernel: int, dilation: int) -> int:
    return (kernel - 1) * dilation + 1


def shrink_to_positive(c: Call, x: Node, before: list[int], after: list[int]) -> tuple[Node, list[int], list[int]]:
    """Negative pads of an image [N, C, D...] turned into slices."""
    for i, (b, a) in enumerate(zip(before, after)):
        if b < 0 or a < 0:
            size = x.shape[2 + i] + min(b, 0) + min(a, 0)
            if size < 1:
                raise InvalidModelError("negative pads remove the whole image")
            x = c.slice(x, 2 + i, max(0, -b), size)
    return x, [max(0, b) for b in before], [max(0, a) for a in after]


def two(values: Sequence[int], fill: int) -> tuple[int, int]:
    """Window parameters of one or two axes as (vertical, horizontal)."""
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


@onnx_op("Conv")
def conv(c: Call) -> Node:
    x, w, b = c[0], c[1], c.get(2)
    return convolve(c, x, w, b)


def convolve(c: Call, x: Node, w: Node, b: Node | None, *, zero: int = 0) -> Node:
    """The convolution that the attributes of `c` describe, of [N, C, D...] and [OC, C/groups, K...].

    `zero` is the zero point of an image of 8-bit integers.
    """
    sizes = spatial(c, x)
    n = len(sizes)
    if w.type.rank != x.type.rank:
        raise InvalidModelError(f"weights {w.type} for an image {x.type}")
    kernel = w.shape[2:]
    if tuple(c.attr("kernel_shape", kernel)) != kernel:
        raise InvalidModelError(f"kernel_shape {c.attr('kernel_shape')} for weights {w.type}")
    stride, dilation = window_attr(c, "strides", n, 1), window_attr(c, "dilations", n, 1)
    before, after = window_pads(c, sizes, kernel, stride, dilation)
    x, before, after = shrink_to_positive(c, x, before, after)
    groups = int(c.attr("group", 1))
    if n > 3:
        raise Unsupported(f"convolution over {n} axes")
    if n == 3:
        return conv3d(c, x, w, b, stride, dilation, before, after, groups)
    operands = [to_channels_last(c, x), to_channels_last(c, w)]
    if b is not None:
        operands.append(b)
    y = c.make("conv2d", *operands, stride=two(stride, 1), dilation=two(dilation, 1), groups=groups,
               pad=(*two(before, 0), *two(after, 0)), zero=zero)
    return to_channels_first(c, y, n + 2)


def conv3d(c: Call, x: Node, w: Node, b: Node | None, stride: Sequence[int], dilation: Sequence[int],
           before: Sequence[int], after: Sequence[int], groups: int) -> Node:
    """A 3-D convolution as the sum over its depth taps of 2-D ones, with depth folded into the batch."""
    n, ch, d, h, wd = x.shape
    oc = w.shape[0]
    out_d = (d + before[0] + after[0] - k_dilated(w.shape[2], dilation[0])) // stride[0] + 1
    if out_d < 1:
        raise InvalidModelError(f"window {list(w.shape[2:])} does not fit {x.type}")
    x = c.transpose(x, (0, 2, 3, 4, 1))  # [N, D, H, W, C]
    if before[0] or after[0]:
        x = c.make("pad", x, before=(0, before[0], 0, 0, 0), after=(0, after[0], 0, 0, 0))
    parts = []
    for tap in range(w.shape[2]):
        image = c.slice(x, 1, tap * dilation[0], out_d, stride[0])
        image = c.reshape(image, (n * out_d, h, wd, ch))
        kernel = c.transpose(c.index(w, 2, tap), (0, 2, 3, 1))
        bias = [b] if b is not None and tap == 0 else []
        parts.append(c.make("conv2d", image, kernel, *bias, stride=tuple(stride[1:]), dilation=tuple(dilation[1:]),
                            pad=(before[1], before[2], after[1], after[2]), groups=groups))
    total = c.fold("add", parts)
    total = c.reshape(total, (n, out_d, *total.shape[1:3], oc))
    return c.transpose(total, (0, 4, 1, 2, 3))


@onnx_op("ConvTranspose")
def conv_transpose(c: Call) -> Node:
    x, w, b = c[0], c[1], c.get(2)  # [N, C, D...], [C, OC/groups, K...]
    sizes = spatial(c, x)
    n = len(sizes)
    if w.type.rank != x.type.rank:
        raise InvalidModelError(f"weights {w.type} for an image {x.type}")
    kernel = w.shape[2:]
    groups = int(c.attr("group", 1))
    stride, dilation = window_attr(c, "strides", n, 1), window_attr(c, "dilations", n, 1)
    out_pad = [int(p) for p in c.attr("output_padding", [0] * n)]
    full = [(d - 1) * s + k_dilated(k, dl) for d, s, k, dl in zip(sizes, stride, kernel, dilation)]
    auto = c.choice("auto_pad", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    wanted = c.attr("output_shape")
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        target = [int(t) for t in (wanted or [d * s for d, s in zip(sizes, stride)])][-n:]
        total = [f + o - t for f, o, t in zip(full, out_pad, target)]
        # Negative where the stride is beyond the window: empty rows, all of them behind.
        before = [max(0, t // 2 if auto == "SAME_UPPER" else t - t // 2) for t in total]
        after = [t - b for t, b in zip(total, before)]
    else:
        before, after = window_pads(c, sizes, kernel, stride, dilation)
    if groups < 1 or w.shape[0] != x.shape[1] or x.shape[1] % groups:
        raise InvalidModelError(f"weights {w.type} for an image {x.type} with {groups} groups")
    # A negative pad adds empty rows: the full result grows at its end or is padded in front.
    grow = [max(0, -b) for b in before]
    out_pad = [o + max(0, -a) for o, a in zip(out_pad, after)]
    before, after = [max(0, p) for p in before], [max(0, p) for p in after]
    ic, oc = w.shape[0] // groups, w.shape[1]
    w = c.reshape(w, (groups, ic, oc, *kernel))
    w = c.transpose(w, (0, 2, *range(3, 3 + n), 1))  # [G, OC/G, K..., IC/G]
    w = c.reshape(w, (groups * oc, *kernel, ic))
    if n > 3:
        raise Unsupported(f"transposed convolution over {n} axes")
    if n == 3:
        y = conv_transpose3d(c, x, w, stride, dilation, before, after, out_pad, groups)
    else:
        if n == 1:
            w = c.reshape(w, (w.shape[0], 1, *w.shape[1:]))
        bias = [b] if b is not None and not any(grow) else []
        y = c.make("conv_transpose2d", to_channels_last(c, x), w, *bias, stride=two(stride, 1),
                   dilation=two(dilation, 1), pad=(*two(before, 0), *two(after, 0)), out_pad=two(out_pad, 0),
                   groups=groups)
        y = to_channels_first(c, y, n + 2)
        if bias:
            return y
    if any(grow):
        y = c.make("pad", y, before=(0, 0, *grow), after=(0,) * (n + 2))
    if b is not None:
        y = c.make("add", y, c.reshape(b, (b.shape[0], *[1] * n)))
    return y


def conv_transpose3d(c: Call, x: Node, w: Node, stride: Sequence[int], dilation: Sequence[int], before: Sequence[int],
                     after: Sequence[int], out_pad: Sequence[int], groups: int) -> Node:
    """A 3-D transposed convolution: every depth tap is a 2-D one, spread along depth and added."""
    n, ch, d, h, wd = x.shape
    images = c.reshape(c.transpose(x, (0, 2, 3, 4, 1)), (n * d, h, wd, ch))
    depth = (d - 1) * stride[0] + k_dilated(w.shape[1], dilation[0]) + out_pad[0]
    parts = []
    for tap in range(w.shape[1]):
        y = c.make("conv_transpose2d", images, c.index(w, 1, tap), stride=tuple(stride[1:]),
                   dilation=tuple(dilation[1:]), pad=(before[1], before[2], after[1], after[2]),
                   out_pad=tuple(out_pad[1:]), groups=groups)
        y = c.reshape(y, (n, d, 1, *y.shape[1:]))
        gap = stride[0] - 1
        y = c.make("pad", y, before=(0,) * 6, after=(0, 0, gap, 0, 0, 0)) if gap else y
        y = c.slice(c.reshape(y, (n, d * stride[0], *y.shape[3:])), 1, 0, (d - 1) * stride[0] + 1)
        front = tap * dilation[0]
        y = c.make("pad", y, before=(0, front, 0, 0, 0), after=(0, depth - front - y.shape[1], 0, 0, 0))
        parts.append(y)
    total = c.slice(c.fold("add", parts), 1, before[0], depth - before[0] - after[0])
    return c.transpose(total, (0, 4, 1, 2, 3))


# ------------------------------------------------------------------------------------------ pooling


def pool_window(c: Call, x: Node) -> tuple[tuple[int, ...], ...]:
    """Kernel, stride, dilation, pads before and after, and result sizes of a pooling operator.

    With ceil_mode the padding after an axis grows until the last, partial window fits.
    """
    sizes = spatial(c, x)
    n = len(sizes)
    kernel = window_attr(c, "kernel_shape", n, 0)
    stride, dilation = window_attr(c, "strides", n, 1), window_attr(c, "dilations", n, 1)
    before, after = window_pads(c, sizes, kernel, stride, dilation)
    if min(before) < 0 or min(after) < 0:
        raise InvalidModelError("negative pads")
    out = []
    for i in range(n):
        room = sizes[i] + before[i] + after[i] - k_dilated(kernel[i], dilation[i])
        count = (-(-room // stride[i]) if c.attr("ceil_mode", 0) else room // stride[i]) + 1
        if c.attr("ceil_mode", 0) and (count - 1) * stride[i] >= sizes[i] + before[i]:
            count -= 1  # a window must not start in the padding behind the image
        if count < 1:
            raise InvalidModelError(f"window {list(kernel)} does not fit {x.type}")
        out.append(count)
    return kernel, stride, dilation, tuple(before), tuple(after), tuple(out)


def pooled(c: Call, op: str, x: Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
           before: Sequence[int], after: Sequence[int], **attrs: object) -> Node:
    """A one- or two-axis pooling of [N, C, D...]."""
    y = c.make(op, to_channels_last(c, x), kernel=two(kernel, 1), stride=two(stride, 1), dilation=two(dilation, 1),
               pad=(*two(before, 0), *two(after, 0)), **attrs)
    return to_channels_first(c, y, x.type.rank)


def lowest(dtype: DType) -> float | int:
    return -math.inf if dtype.is_float else int(np.iinfo(dtype.numpy).min)


@onnx_op("MaxPool")
def max_pool(c: Call) -> Node | list[Node]:
    x = c[0]
    kernel, stride, dilation, before, after, out = pool_window(c, x)
    if c.wants(1):
        return max_pool_indices(c, x, kernel, stride, dilation, before, out)
    n = len(kernel)
    after = needed(x, kernel, stride, dilation, before, out)
    if any(max(b, a) > dl * (k - 1) for b, a, k, dl in zip(before, after, kernel, dilation)):
        x = c.make("pad", x, before=(0, 0, *before), after=(0, 0, *after), value=lowest(x.dtype))
        before = after = (0,) * n
    if n <= 2:
        return pooled(c, "max_pool2d", x, kernel, stride, dilation, before, after)
    for i in range(n):  # the maximum of a box is that of its axes, one after the other
        x = pooled_along(c, "max_pool2d", x, 2 + i, kernel[i], stride[i], dilation[i], before[i], after[i])
    return x


def max_pool_indices(c: Call, x: Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
                     before: Sequence[int], out: Sequence[int]) -> list[Node]:
    """The maxima and where they lie in the flattened tensor: every window is gathered, then searched."""
    n, ch, *sizes = x.shape
    c.room(math.prod(out) * math.prod(kernel), "a table of windows")
    index, inside = np.zeros((), np.int64), np.ones((), np.bool_)
    order = range(len(sizes))[::-1] if not c.attr("storage_order", 0) else range(len(sizes))
    place, step, steps = np.zeros((), np.int64), 1, {}
    for i in order:  # elements between neighbours of axis i as the Indices output counts them
        steps[i], step = step, step * sizes[i]
    for i, d in enumerate(sizes):  # [out..., kernel...]
        taps = (np.arange(out[i]) * stride[i] - before[i])[:, None] + np.arange(kernel[i]) * dilation[i]
        shape = [1] * 2 * len(sizes)
        shape[i], shape[len(sizes) + i] = out[i], kernel[i]
        taps = taps.reshape(shape)
        inside = inside & (taps >= 0) & (taps < d)
        taps = np.clip(taps, 0, d - 1)
        index, place = index * d + taps, place + taps * steps[i]
    table = (math.prod(out), math.prod(kernel))
    flat = c.reshape(x, (n, ch, math.prod(sizes)))
    windows = c.make("gather", flat, c.lit(index.reshape(table)), axis=2)  # [N, C, windows, taps]
    windows = c.make("where", c.lit(inside.reshape(table)), windows, c.lit(lowest(x.dtype), x.dtype))
    best = c.make("argmax", windows, axis=3, keep=True)
    values = c.make("reduce_max", windows, axes=(3,), keep=False)
    places = c.expand(c.lit(place.reshape(table)), windows.shape)
    where = c.make("gather_elements", places, best, axis=3)
    images = np.arange(n * ch).reshape(n, ch, 1, 1) * math.prod(sizes)
    where = c.make("add", where, c.lit(images, np.int64))
    return [c.reshape(values, (n, ch, *out)), c.reshape(where, (n, ch, *out))]


def needed(x: Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], before: Sequence[int],
           out: Sequence[int]) -> tuple[int, ...]:
    """The padding behind each axis that gives exactly `out` windows; some of the image may stay unread."""
    return tuple(max(0, (o - 1) * s + k_dilated(k, dl) - d - b)
                 for d, k, s, dl, b, o in zip(x.shape[2:], kernel, stride, dilation, before, out))


def pooled_along(c: Call, op: str, x: Node, axis: int, kernel: int, stride: int, dilation: int, before: int,
                 after: int, **attrs: object) -> Node:
    """A pooling of one axis of x."""
    perm = [i for i in range(x.type.rank) if i != axis] + [axis]
    moved = c.transpose(x, perm)
    rows = c.reshape(moved, (math.prod(moved.shape[:-1]), 1, moved.shape[-1]))
    y = pooled(c, op, rows, [kernel], [stride], [dilation], [before], [after], **attrs)
    return c.back(c.reshape(y, (*moved.shape[:-1], y.shape[-1])), perm)


@onnx_op("AveragePool")
def average_pool(c: Call) -> Node:
    return average(c, c[0])


def average(c: Call, x: Node) -> Node:
    """The average pooling that the attributes of `c` describe, of [N, C, D...]."""
    kernel, stride, dilation, before, after, out = pool_window(c, x)
    n = len(kernel)
    count_pad = bool(c.attr("count_include_pad", 0))
    exact = needed(x, kernel, stride, dilation, before, out)
    if n <= 2 and all(e <= a for e, a in zip(exact, after)) and all(
            max(b, e) <= dl * (k - 1) for b, e, k, dl in zip(before, exact, kernel, dilation)):
        return pooled(c, "avg_pool2d", x, kernel, stride, dilation, before, exact, count_pad=count_pad)
    total = window_sum(c, x, kernel, stride, dilation, before, exact)
    # How many elements each window averages: the image's own, or those of the declared padding too.
    c.room(math.prod(out) + max(o * k for o, k in zip(out, kernel)), "a table of counts")
    counts = np.ones((1,) * n)
    for i in range(n):
        low, high = (-before[i], x.shape[2 + i] + after[i]) if count_pad else (0, x.shape[2 + i])
        taps = (np.arange(out[i]) * stride[i] - before[i])[:, None] + np.arange(kernel[i]) * dilation[i]
        axis = ((taps >= low) & (taps < high)).sum(1)
        counts = counts * axis.reshape([-1 if j == i else 1 for j in range(n)])
    return c.make("mul", total, (1.0 / np.maximum(counts, 1)).astype(x.dtype.numpy))


def window_sum(c: Call, x: Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
               before: Sequence[int], after: Sequence[int]) -> Node:
    """The sum over each window, the padding counting as zero: one axis after the other."""
    if any(before) or any(after):
        x = c.make("pad", x, before=(0, 0, *before), after=(0, 0, *after))
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
        x = pooled_along(c, "avg_pool2d", x, 2 + i, k, s, d, 0, 0, count_pad=True)
    return c.make("mul", x, float(math.prod(kernel)))


@onnx_op("LpPool")
def lp_pool(c: Call) -> Node:
    x = c[0]
    p = float(c.attr("p", 2))
    kernel, stride, dilation, before, _, out = pool_window(c, x)
    exact = needed(x, kernel, stride, dilation, before, out)
    powers = c.make("mul", x, x) if p == 2 else c.make("pow", c.make("abs", x), p)
    total = window_sum(c, powers, kernel, stride, dilation, before, exact)
    return c.make("sqrt", total) if p == 2 else c.make("pow", total, 1.0 / p)


@onnx_op("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(c: Call) -> Node:
    x = c[0]
    axes = tuple(range(2, x.type.rank))
    spatial(c, x)
    if c.op_type == "GlobalAveragePool":
        return c.make("reduce_mean", x, axes=axes, keep=True)
    if c.op_type == "GlobalMaxPool":
        return c.make("reduce_max", x, axes=axes, keep=True)
    p = float(c.attr("p", 2))
    if p == 2:
        return c.make("sqrt", c.make("reduce_sum", c.make("mul", x, x), axes=axes, keep=True))
    return c.make("pow", c.make("reduce_sum", c.make("pow", c.make("abs", x), p), axes=axes, keep=True), 1.0 / p)
