"""Resampling: GridSample, RoiAlign, unpooling, Col2Im."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.rows.windows import k_dilated, window_attr
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node
from skive.types import DType

# --------------------------------------------------------------------------------------- GridSample


@onnx_op("GridSample")
def grid_sample(c: Call) -> Node:
    """Samples [N, C, D...] at the positions of a grid [N, O..., d], whose last axis counts backwards."""
    x, grid = c[0], c[1]
    mode = c.choice("mode", "linear", "bilinear", "nearest", "cubic", "bicubic")
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    padding, align = c.choice("padding_mode", "zeros", "border", "reflection"), bool(c.attr("align_corners", 0))
    sizes = x.shape[2:]
    n = len(sizes)
    if not 1 <= n <= 3:
        raise Unsupported(f"GridSample over {n} axes")
    if grid.type.rank != x.type.rank or grid.shape[-1] != n or grid.shape[0] != x.shape[0]:
        raise InvalidModelError(f"grid {grid.type} for {x.type}")
    if grid.dtype is not x.dtype:
        raise Unsupported("a grid of another element type than the image")
    points = grid.shape[1:-1]
    count = math.prod(points)
    pixels = c.transpose(x, (0, *range(2, n + 2), 1))  # [N, D..., C]
    position = []
    for k, size in enumerate(sizes):
        g = c.reshape(c.index(grid, grid.type.rank - 1, n - 1 - k), (x.shape[0], count))
        if align:
            p = c.make("mul", c.make("add", g, 1.0), (size - 1) / 2)
        else:
            p = c.make("mul", c.make("sub", c.make("mul", c.make("add", g, 1.0), float(size)), 1.0), 0.5)
        if mode != "cubic":
            p = placed(c, p, size, padding, align)
        position.append(p)
    # Per axis: (index, weight or None) of every tap.
    taps: list[list[tuple[Node, Node | None]]] = []
    for p in position:
        if mode == "nearest":
            taps.append([(c.make("round_even", p), None)])
            continue
        low = c.make("floor", p)
        t = c.make("sub", p, low)
        if mode == "linear":
            taps.append([(low, c.make("sub", 1.0, t)), (c.make("add", low, 1.0), t)])
        else:
            taps.append([(c.make("add", low, float(o)), cubic_weight(c, c.make("sub", t, float(o)), o))
                         for o in range(-1, 3)])
    parts = []
    for corner in itertools.product(*taps):
        indices, weights, valid = [], [], []
        for (i, w), size in zip(corner, sizes):
            i = placed(c, i, size, padding, align) if mode == "cubic" else i
            if padding == "zeros":
                valid += [c.make("greater_equal", i, 0.0), c.make("less_equal", i, float(size - 1))]
            i = c.make("clip", i, lo=0.0, hi=float(size - 1))
            indices.append(c.cast(i, DType.i64))
            weights += [] if w is None else [w]
        value = c.make("gather_nd", pixels, c.stack(indices, 2), batch_dims=1)  # [N, points, C]
        if valid:
            inside = c.reshape(c.fold("and", valid), (x.shape[0], count, 1))
            value = c.make("where", inside, value, c.lit(0, value.dtype))
        if weights:
            value = c.make("mul", value, c.reshape(c.fold("mul", weights), (x.shape[0], count, 1)))
        parts.append(value)
    total = c.reshape(c.fold("add", parts), (x.shape[0], *points, x.shape[1]))
    return c.transpose(total, (0, n + 1, *range(1, n + 1)))


def placed(c: Call, p: Node, size: int, padding: str, align: bool) -> Node:
    """Positions moved into the image by the padding mode; `zeros` leaves them."""
    if padding == "border":
        return c.make("clip", p, lo=0.0, hi=float(size - 1))
    if padding != "reflection":
        return p
    low, high = (0.0, float(size - 1)) if align else (-0.5, size - 0.5)
    span = high - low
    if span == 0:
        return c.make("mul", p, 0.0)
    # A triangle wave of period 2 span: the distance from the nearest multiple of the period.
    d = c.make("mod", c.make("sub", p, low), 2 * span)
    d = c.make("min", d, c.make("sub", 2 * span, d))
    return c.make("add", d, low)


def cubic_weight(c: Call, d: Node, offset: int) -> Node:
    """Keys' kernel with a = -0.75 at distance d of the tap at `offset` from the sample's floor."""
    a = -0.75
    d = c.make("abs", d)

    def horner(*coefficients: float) -> Node:
        v = c.make("add", c.make("mul", d, coefficients[0]), coefficients[1])
        for k in coefficients[2:]:
            v = c.make("add", c.make("mul", v, d), k)
        return v

    if offset in (0, 1):
        return horner(a + 2, -(a + 3), 0.0, 1.0)
    return horner(a, -5 * a, 8 * a, -4 * a)


# ------------------------------------------------------------------------------- scattered windows


def spread(c: Call, x: Node, first: int, stride: Sequence[int]) -> Node:
    """`x` with stride - 1 zeros between the elements of the axes from `first`."""
    for i, s in enumerate(stride):
        axis = first + i
        if s == 1 or x.shape[axis] == 1:
            continue
        shape = x.shape
        y = c.reshape(x, (*shape[:axis + 1], 1, *shape[axis + 1:]))
        after = [0] * y.type.rank
        after[axis + 1] = s - 1
        y = c.make("pad", y, before=(0,) * y.type.rank, after=tuple(after))
        y = c.reshape(y, (*shape[:axis], shape[axis] * s, *shape[axis + 1:]))
        x = c.slice(y, axis, 0, (shape[axis] - 1) * s + 1)
    return x


@onnx_op("Col2Im")
def col2im(c: Call) -> Node:
    x = c[0]
    image, block = c.ints(1, "image_shape"), c.ints(2, "block_shape")
    n = len(image)
    dilation, stride = window_attr(c, "dilations", n, 1), window_attr(c, "strides", n, 1)
    pads = [int(p) for p in c.attr("pads", [0] * 2 * n)]
    taps = math.prod(block)
    steps = [(image[i] + pads[i] + pads[n + i] - k_dilated(block[i], dilation[i])) // stride[i] + 1 for i in range(n)]
    if len(block) != n or x.type.rank != 3 or x.shape[1] % taps or math.prod(steps) != x.shape[2]:
        raise InvalidModelError(f"blocks {list(block)} of {x.type} do not make an image {list(image)}")
    x = c.reshape(x, (x.shape[0], x.shape[1] // taps, taps, *steps))
    full = [image[i] + pads[i] + pads[n + i] for i in range(n)]
    parts = []
    for t, offset in enumerate(itertools.product(*(range(b) for b in block))):
        part = spread(c, c.index(x, 2, t), 2, stride)
        before = [o * d for o, d in zip(offset, dilation)]
        after = [f - b - s for f, b, s in zip(full, before, part.shape[2:])]
        parts.append(c.make("pad", part, before=(0, 0, *before), after=(0, 0, *after)))
    total = c.fold("add", parts)
    for i in range(n):
        total = c.slice(total, 2 + i, pads[i], image[i])
    return total


@onnx_op("MaxUnpool")
def max_unpool(c: Call) -> Node:
    x, indices = c[0], c[1]
    n = x.type.rank - 2
    kernel, stride = window_attr(c, "kernel_shape", n, 0), window_attr(c, "strides", n, 1)
    pads = [int(p) for p in c.attr("pads", [0] * 2 * n)]
    inner = [(d - 1) * s + k - pads[i] - pads[n + i]
             for i, (d, s, k) in enumerate(zip(x.shape[2:], stride, kernel))]
    out = list(c.ints(2, "output_shape")) if c.has(2) else [*x.shape[:2], *inner]
    # The indices count in the tensor that was pooled; a larger output_shape has it in its corner.
    flat = c.full([math.prod([*x.shape[:2], *inner])], 0, x.dtype)
    places = c.reshape(c.cast(indices, DType.i64), (x.type.size,))
    y = c.make("scatter_elements", flat, places, c.reshape(x, (x.type.size,)), axis=0)
    y = c.reshape(y, (*x.shape[:2], *inner))
    grow = [o - d for o, d in zip(out, y.shape)]
    if min(grow) < 0:
        raise InvalidModelError(f"output_shape {out} is smaller than {y.type}")
    return c.make("pad", y, before=(0,) * len(grow), after=tuple(grow)) if any(grow) else y


@onnx_op("RoiAlign", constant="rois, unless sampling_ratio is given")
def roi_align(c: Call) -> Node:
    """Bilinear samples of each box, averaged (or their maximum) per bin; one sample grid per bin.

    The sample count must not depend on the boxes: `sampling_ratio` is given, or the boxes are constant.
    """
    x, rois, batch = c[0], c[1], c[2]
    _, ch, h, w = x.shape
    oh, ow = int(c.attr("output_height", 1)), int(c.attr("output_width", 1))
    scale = float(c.attr("spatial_scale", 1.0))
    half = c.opset >= 16 and c.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    ratio = int(c.attr("sampling_ratio", 0))
    if ratio > 0:
        return roi_bins(c, x, rois, batch, oh, ow, ratio, ratio, scale, half)
    boxes = c.known(rois, "the boxes, without a sampling_ratio,", data=True)
    parts = []
    for i, (x1, y1, x2, y2) in enumerate(boxes * np.float32(scale)):
        width, height = (x2 - x1, y2 - y1) if half else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        parts.append(roi_bins(c, x, c.slice(rois, 0, i, 1), c.slice(batch, 0, i, 1), oh, ow,
                              max(1, math.ceil(height / oh)), max(1, math.ceil(width / ow)), scale, half))
    return c.concat(parts, 0) if parts else c.lit(np.zeros((0, ch, oh, ow)), x.dtype)


def roi_bins(c: Call, x: Node, rois: Node, batch: Node, oh: int, ow: int, sy: int, sx: int, scale: float,
             half: bool) -> Node:
    """[R, C, oh, ow] for boxes [R, 4] with sy x sx samples a bin."""
    _, ch, h, w = x.shape
    count = rois.shape[0]
    c.room(oh * sy + ow * sx, "a row of samples")
    shift = 0.5 if half else 0.0
    edge = [c.make("sub", c.make("mul", c.index(rois, 1, k), scale), shift) for k in range(4)]

    def samples(low: Node, high: Node, bins: int, per: int) -> Node:
        length = c.make("sub", high, low)
        length = length if half else c.make("max", length, 1.0)
        at = c.lit((np.arange(bins * per) + 0.5) / (per * bins), x.dtype)
        return c.make("add", c.reshape(low, (count, 1)), c.make("mul", c.reshape(length, (count, 1)), at))

    ys, xs = samples(edge[1], edge[3], oh, sy), samples(edge[0], edge[2], ow, sx)

    def taps(p: Node, size: int) -> tuple[list[tuple[Node, Node]], Node]:
        valid = c.make("and", c.make("greater_equal", p, -1.0), c.make("less_equal", p, float(size)))
        p = c.make("clip", p, lo=0.0, hi=float(size - 1))
        low = c.make("floor", p)
        t = c.make("sub", p, low)
        high = c.make("min", c.make("add", low, 1.0), float(size - 1))
        return [(low, c.make("sub", 1.0, t)), (high, t)], valid

    (ty, vy), (tx, vx) = taps(ys, h), taps(xs, w)
    ny, nx = oh * sy, ow * sx
    pixels = c.transpose(x, (0, 2, 3, 1))
    image = c.expand(c.reshape(c.cast(batch, DType.i64), (count, 1, 1)), (count, ny, nx))
    values = []
    for (iy, wy), (ix, wx) in itertools.product(ty, tx):
        index = [image, c.expand(c.reshape(c.cast(iy, DType.i64), (count, ny, 1)), (count, ny, nx)),
                 c.expand(c.reshape(c.cast(ix, DType.i64), (count, 1, nx)), (count, ny, nx))]
        value = c.make("gather_nd", pixels, c.stack(index, 3))  # [R, ny, nx, C]
        weight = c.make("mul", c.reshape(wy, (count, ny, 1, 1)), c.reshape(wx, (count, 1, nx, 1)))
        values.append(c.make("mul", value, weight))
    largest = c.choice("mode", "avg", "max") == "max"
    total = c.fold("max" if largest else "add", values)
    valid = c.make("and", c.reshape(vy, (count, ny, 1, 1)), c.reshape(vx, (count, 1, nx, 1)))
    total = c.reshape(c.make("where", valid, total, c.lit(0, x.dtype)), (count, oh, sy, ow, sx, ch))
    y = c.make("reduce_max" if largest else "reduce_mean", total, axes=(2, 4), keep=False)
    return c.transpose(y, (0, 3, 1, 2))


@onnx_op("ReverseSequence")
def reverse_sequence(c: Call) -> Node:
    x = c[0]
    batch_axis, time_axis = int(c.attr("batch_axis", 1)), int(c.attr("time_axis", 0))
    if {batch_axis, time_axis} != {0, 1} or x.type.rank < 2:
        raise InvalidModelError(f"batch axis {batch_axis} and time axis {time_axis} of {x.type}")
    steps = x.shape[time_axis]
    lengths = c.reshape(c.cast(c[1], DType.i64), (x.shape[batch_axis], 1))
    t = c.lit(np.arange(steps)[None], np.int64)
    index = c.make("where", c.make("less", t, lengths), c.make("sub", c.make("sub", lengths, t), 1), t)  # [N, T]
    moved = x if batch_axis == 0 else c.transpose(x, (1, 0, *range(2, x.type.rank)))
    y = c.make("gather_nd", moved, c.reshape(index, (*index.shape, 1)), batch_dims=1)
    return y if batch_axis == 0 else c.transpose(y, (1, 0, *range(2, x.type.rank)))


@onnx_op("DeformConv")
def deform_conv(c: Call) -> Node:
    """A 2-D convolution whose taps are sampled at learnt offsets (Zhu et al.: Deformable ConvNets v2, 2019)."""
    x, w, offset, bias, mask = c[0], c[1], c[2], c.get(3), c.get(4)
    if x.type.rank != 4 or w.type.rank != 4:
        raise Unsupported(f"DeformConv of {x.type}")
    n, ch, h, wd = x.shape
    oc, _, kh, kw = w.shape
    stride, dilation = window_attr(c, "strides", 2, 1), window_attr(c, "dilations", 2, 1)
    pads = [int(p) for p in c.attr("pads", [0] * 4)]
    groups, parts = int(c.attr("group", 1)), int(c.attr("offset_group", 1))
    oh, ow = ((d + pads[i] + pads[2 + i] - k_dilated(k, dilation[i])) // stride[i] + 1
              for i, (d, k) in enumerate(((h, kh), (wd, kw))))
    if groups < 1 or parts < 1 or ch % parts or offset.shape != (n, parts * kh * kw * 2, oh, ow):
        raise InvalidModelError(f"offsets {offset.type} for {x.type} and {w.type}")
    count, taps = oh * ow, kh * kw
    c.room(taps * count, "a table of taps")
    offset = c.reshape(offset, (n, parts, taps, 2, count))
    base = [np.arange(o)[None] * s - p + np.arange(k)[:, None] * d  # [k, o]
            for o, s, p, k, d in zip((oh, ow), stride, pads, (kh, kw), dilation)]
    ys = np.broadcast_to(base[0][:, None, :, None], (kh, kw, oh, ow)).reshape(taps, count)
    xs = np.broadcast_to(base[1][None, :, None, :], (kh, kw, oh, ow)).reshape(taps, count)
    flat = (n * parts, taps * count)
    position = [c.reshape(c.make("add", c.index(offset, 3, i), c.lit(at, x.dtype)), flat)
                for i, at in enumerate((ys, xs))]
    image = c.reshape(x, (n * parts, ch // parts, h, wd))
    image = c.transpose(image, (0, 2, 3, 1))
    corners = []
    for dy, dx in itertools.product((0.0, 1.0), repeat=2):
        share, valid, index = [], [], []
        for p, d, size in zip(position, (dy, dx), (h, wd)):
            low = c.make("floor", p)
            t = c.make("sub", p, low)
            share.append(t if d else c.make("sub", 1.0, t))
            at = c.make("add", low, d) if d else low
            valid += [c.make("greater_equal", at, 0.0), c.make("less_equal", at, float(size - 1))]
            index.append(c.cast(c.make("clip", at, lo=0.0, hi=float(size - 1)), DType.i64))
        weight = c.make("where", c.fold("and", valid), c.fold("mul", share), c.lit(0, x.dtype))
        value = c.make("gather_nd", image, c.stack(index, 2), batch_dims=1)
        corners.append(c.make("mul", value, c.reshape(weight, (*flat, 1))))
    samples = c.reshape(c.fold("add", corners), (n, parts, taps, count, ch // parts))
    if mask is not None:
        samples = c.make("mul", samples, c.reshape(mask, (n, parts, taps, count, 1)))
    samples = c.transpose(samples, (0, 1, 4, 2, 3))  # [N, parts, C/parts, taps, places]
    columns = c.reshape(samples, (n, groups, ch // groups * taps, count))
    y = c.make("matmul", c.reshape(w, (groups, oc // groups, ch // groups * taps)), columns)
    y = c.reshape(y, (n, oc, oh, ow))
    return y if bias is None else c.make("add", y, c.reshape(bias, (oc, 1, 1)))
