"""Operators that move, select or repeat elements without computing."""

from __future__ import annotations

import math

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import (
    Call,
    Unsupported,
    checked_axis,
    is_known,
    is_quantized_constant,
    onnx_op,
)
from skive.ir import Node
from skive.ops import broadcast_shapes
from skive.types import DType


@onnx_op("Constant")
def constant_node(c: Call) -> Node:
    for name, dtype in {"value": None, "value_float": np.float32, "value_floats": np.float32,
                        "value_int": np.int64, "value_ints": np.int64}.items():
        if name in c.attrs:
            return c.lit(c.attrs[name], dtype)
    raise Unsupported(f"Constant with {', '.join(c.attrs) or 'no attribute'}")


@onnx_op("ConstantOfShape")
def constant_of_shape(c: Call) -> Node:
    shape = c.ints(0, "shape")
    value = np.asarray(c.attr("value", np.zeros(1, np.float32))).reshape(())
    return c.expand(c.lit(value), shape)


@onnx_op("Shape")
def shape(c: Call) -> Node:
    dims = c[0].shape
    start, end = int(c.attr("start", 0)), c.attr("end")
    return c.lit(dims[start:end if end is None else int(end)], np.int64)


@onnx_op("Size")
def size(c: Call) -> Node:
    return c.lit(c[0].type.size, np.int64)


@onnx_op("Reshape")
def reshape(c: Call) -> Node:
    x = c[0]
    wanted = list(c.ints_or_attr(1, "shape"))
    if not c.attr("allowzero", 0):
        if any(d == 0 and i >= x.type.rank for i, d in enumerate(wanted)):
            raise InvalidModelError(f"reshape of {x.type} to {wanted} copies a dimension that is not there")
        wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    if wanted.count(-1) > 1 or min(wanted, default=0) < -1:
        raise InvalidModelError(f"reshape to {wanted}")
    if -1 in wanted:
        rest = math.prod(d for d in wanted if d != -1)
        if rest == 0 or x.type.size % rest:
            raise InvalidModelError(f"reshape of {x.type} to {wanted}")
        wanted[wanted.index(-1)] = x.type.size // rest
    return c.reshape(x, wanted)


@onnx_op("Flatten")
def flatten(c: Call) -> Node:
    x = c[0]
    axis = int(c.attr("axis", 1))
    if not -x.type.rank <= axis <= x.type.rank:
        raise InvalidModelError(f"axis {axis} is outside rank {x.type.rank}")
    axis = axis + x.type.rank if axis < 0 else axis
    return c.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@onnx_op("Squeeze")
def squeeze(c: Call) -> Node:
    x = c[0]
    axes = c.ints_or_attr(1, "axes")
    drop = ({checked_axis(a, x.type.rank) for a in axes} if axes is not None
            else {i for i, d in enumerate(x.shape) if d == 1})
    if any(x.shape[a] != 1 for a in drop):
        raise InvalidModelError(f"squeeze of axes {sorted(drop)} of {x.type}")
    return c.reshape(x, [d for i, d in enumerate(x.shape) if i not in drop])


@onnx_op("Unsqueeze")
def unsqueeze(c: Call) -> Node:
    x = c[0]
    axes = c.ints_or_attr(1, "axes", ())
    rank = x.type.rank + len(axes)
    new = {checked_axis(a, rank) for a in axes}
    if len(new) != len(axes):
        raise InvalidModelError(f"unsqueeze: axes {list(axes)} repeat")
    dims = iter(x.shape)
    return c.reshape(x, [1 if i in new else next(dims) for i in range(rank)])


@onnx_op("Transpose")
def transpose(c: Call) -> Node:
    x = c[0]
    return c.transpose(x, c.attr("perm", range(x.type.rank)[::-1]))


@onnx_op("Concat")
def concat(c: Call) -> Node:
    parts = c.tensors
    axis = checked_axis(int(c.attr("axis", 1)), parts[0].type.rank)
    return c.concat(parts, axis)


@onnx_op("Split")
def split(c: Call) -> list[Node]:
    x = c[0]
    axis = checked_axis(int(c.attr("axis", 0)), x.type.rank)
    sizes = c.ints_or_attr(1, "split")
    if sizes is None:
        count = int(c.attr("num_outputs", len(c.outputs)))
        if count != len(c.outputs) or count < 1:
            raise InvalidModelError(f"num_outputs is {count} for {len(c.outputs)} outputs")
        chunk = -(-x.shape[axis] // count)
        sizes = [max(0, min(chunk, x.shape[axis] - i * chunk)) for i in range(count)]
    if min(sizes, default=0) < 0 or sum(sizes) != x.shape[axis]:
        raise InvalidModelError(f"split of {x.type} into {list(sizes)} along axis {axis}")
    starts = np.cumsum([0, *sizes])
    return [c.slice(x, axis, int(s), int(n)) for s, n in zip(starts, sizes)]


@onnx_op("Slice")
def slice_(c: Call) -> Node:
    x = c[0]
    starts, ends = c.ints_or_attr(1, "starts"), c.ints_or_attr(2, "ends")
    if starts is None or ends is None:
        raise InvalidModelError("starts or ends are missing")
    axes = c.ints_or_attr(3, "axes", range(len(starts)))
    steps = c.ints(4, "steps") if c.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise InvalidModelError("starts, ends, axes and steps differ in length")
    begin, count, stride = [0] * x.type.rank, list(x.shape), [1] * x.type.rank
    for s, e, a, k in zip(starts, ends, axes, steps):
        if k == 0:
            raise InvalidModelError("a step of 0")
        a = checked_axis(a, x.type.rank)
        if k < 0:  # backward, a start in front of the first element is the first; a slice of Python is empty there
            s = max(s, -x.shape[a])
        picked = range(*slice(s, e, k).indices(x.shape[a]))
        begin[a], count[a], stride[a] = (picked.start if len(picked) else 0), len(picked), k if len(picked) else 1
    if count == list(x.shape) and stride == [1] * x.type.rank:
        return x
    return c.make("slice", x, start=tuple(begin), size=tuple(count), step=tuple(stride))


@onnx_op("Expand")
def expand(c: Call) -> Node:
    x = c[0]
    return c.expand(x, broadcast_shapes(x.shape, c.ints(1, "shape")))


@onnx_op("Tile")
def tile(c: Call) -> Node:
    x = c[0]
    if c.opset < 6:
        counts = [1] * x.type.rank
        counts[c.ints(2, "axis")[0]] = c.ints(1, "tiles")[0]
    else:
        counts = list(c.ints(1, "repeats"))
    if len(counts) != x.type.rank or min(counts, default=1) < 0:
        raise InvalidModelError(f"tile of {x.type} by {counts}")
    inner = [d for pair in zip([1] * len(counts), x.shape) for d in pair]
    outer = [d for pair in zip(counts, x.shape) for d in pair]
    return c.reshape(c.expand(c.reshape(x, inner), outer), [n * d for n, d in zip(counts, x.shape)])


@onnx_op("Pad")
def pad(c: Call) -> Node:
    x = c[0]
    pads = c.ints_or_attr(1, "pads")
    if pads is None:
        pads = c.required("paddings")
    value = c.get(2)
    fixed = value is None or is_known(value)
    fill = float(c.attr("value", 0.0)) if value is None or not fixed else c.known(value, "value").reshape(-1)[0].item()
    rank = x.type.rank
    axes = [checked_axis(a, rank) for a in c.ints(3, "axes")] if c.has(3) else list(range(rank))
    if len(pads) != 2 * len(axes):
        raise InvalidModelError(f"{len(pads)} pads for {len(axes)} axes")
    before, after = [0] * rank, [0] * rank
    for i, a in enumerate(axes):
        before[a], after[a] = pads[i], pads[len(axes) + i]
    for a in range(rank):  # a negative pad removes elements
        cut_front, cut_back = max(0, -before[a]), max(0, -after[a])
        size = x.shape[a] - cut_front - cut_back
        if size < 0:
            raise InvalidModelError(f"pads {list(pads)} remove more than {x.type} has")
        x = c.slice(x, a, cut_front, size)
    before, after = [max(0, p) for p in before], [max(0, p) for p in after]
    if not any(before) and not any(after):
        return x
    mode = c.choice("mode", "constant", "reflect", "edge", "wrap")
    if mode == "constant" and value is not None and not fixed:
        mask = c.make("pad", c.lit(np.ones(x.shape, np.bool_)), before=tuple(before), after=tuple(after), value=0)
        padded = c.make("pad", x, before=tuple(before), after=tuple(after), value=0)
        return c.make("where", mask, padded, c.reshape(value, ()))
    if mode == "reflect":
        while any(b or a for b, a in zip(before, after)):  # a wide reflection is several narrow ones
            step_b = [min(b, max(d - 1, 0)) for b, d in zip(before, x.shape)]
            step_a = [min(a, max(d - 1, 0)) for a, d in zip(after, x.shape)]
            if not any(step_b) and not any(step_a):
                raise InvalidModelError(f"nothing to reflect in {x.type}")
            x = c.make("pad", x, before=tuple(step_b), after=tuple(step_a), mode="reflect")
            before = [b - s for b, s in zip(before, step_b)]
            after = [a - s for a, s in zip(after, step_a)]
        return x
    attrs = {"value": fill} if mode == "constant" else {}
    return c.make("pad", x, before=tuple(before), after=tuple(after), mode=mode, **attrs)


@onnx_op("DepthToSpace")
def depth_to_space(c: Call) -> Node:
    x, b = c[0], int(c.required("blocksize"))
    n, ch, h, w = x.shape
    if b < 1 or ch % (b * b):
        raise InvalidModelError(f"blocksize {b} does not divide {ch} channels")
    if c.choice("mode", "DCR", "CRD") == "DCR":
        y = c.transpose(c.reshape(x, (n, b, b, ch // (b * b), h, w)), (0, 3, 4, 1, 5, 2))
    else:
        y = c.transpose(c.reshape(x, (n, ch // (b * b), b, b, h, w)), (0, 1, 4, 2, 5, 3))
    return c.reshape(y, (n, ch // (b * b), h * b, w * b))


@onnx_op("SpaceToDepth")
def space_to_depth(c: Call) -> Node:
    x, b = c[0], int(c.required("blocksize"))
    n, ch, h, w = x.shape
    if b < 1 or h % b or w % b:
        raise InvalidModelError(f"blocksize {b} does not divide {h} x {w}")
    order = (0, 3, 5, 1, 2, 4) if c.choice("mode", "DCR", "CRD") == "DCR" else (0, 1, 3, 5, 2, 4)
    y = c.transpose(c.reshape(x, (n, ch, h // b, b, w // b, b)), order)
    return c.reshape(y, (n, ch * b * b, h // b, w // b))


@onnx_op("Gather")
def gather(c: Call) -> Node:
    x, indices = c[0], c[1]
    axis = checked_axis(int(c.attr("axis", 0)), x.type.rank)
    if indices.is_const and indices.type.size == 1:
        i = int(indices.value.reshape(-1)[0])
        if not -x.shape[axis] <= i < x.shape[axis]:
            raise InvalidModelError(f"index {i} is outside {x.type}")
        part = c.slice(x, axis, i % x.shape[axis], 1)
        return c.reshape(part, x.shape[:axis] + indices.shape + x.shape[axis + 1:])
    if is_quantized_constant(x) and x.inputs[1].type.size == 1:  # a table of integers is not widened to be read
        return c.make("dequantize", c.make("gather", x.inputs[0], indices, axis=axis),
                      *(c.reshape(v, ()) for v in x.inputs[1:]))
    return c.make("gather", x, indices, axis=axis)


@onnx_op("GatherElements")
def gather_elements(c: Call) -> Node:
    return c.make("gather_elements", c[0], c[1], axis=checked_axis(int(c.attr("axis", 0)), c[0].type.rank))


@onnx_op("GatherND")
def gather_nd(c: Call) -> Node:
    return c.make("gather_nd", c[0], c[1], batch_dims=int(c.attr("batch_dims", 0)))


@onnx_op("Scatter", "ScatterElements")
def scatter_elements(c: Call) -> Node:
    return c.make("scatter_elements", c[0], c[1], c[2], axis=checked_axis(int(c.attr("axis", 0)), c[0].type.rank),
                  reduction=c.choice("reduction", "none", "add", "mul", "max", "min"))


@onnx_op("ScatterND")
def scatter_nd(c: Call) -> Node:
    return c.make("scatter_nd", c[0], c[1], c[2], reduction=c.choice("reduction", "none", "add", "mul", "max", "min"))


@onnx_op("TensorScatter")
def tensor_scatter(c: Call) -> Node:
    """A cache [N, ..., S, ...] with an update written from a position of its own for every sample.

    Each place of the cache looks up the element of the update that belongs there, or keeps its own.
    """
    cache, update = c[0], c[1]
    axis = checked_axis(int(c.attr("axis", -2)), cache.type.rank)
    circular = c.choice("mode", "linear", "circular") == "circular"
    size, new = cache.shape[axis], update.shape[axis]
    if axis == 0 or not 1 <= new <= size:
        raise InvalidModelError(f"an update {update.type} of the cache {cache.type} along axis {axis}")
    start = c.reshape(c.cast(c[2], DType.i64), (cache.shape[0], 1)) if c.has(2) else c.lit(np.zeros((1, 1)), np.int64)
    source = c.make("sub", c.lit(np.arange(size)[None], np.int64), start)  # [N, S]: which element of the update
    if circular:
        source = c.make("mod", source, size)
    written = c.make("and", c.make("greater_equal", source, 0), c.make("less", source, new))
    shape = [1] * cache.type.rank
    shape[0], shape[axis] = source.shape[0], size
    wide = (*cache.shape[:axis], size, *cache.shape[axis + 1:])
    at = c.expand(c.reshape(c.make("clip", source, lo=0, hi=new - 1), shape), wide)
    return c.make("where", c.reshape(written, shape), c.make("gather_elements", update, at, axis=axis), cache)
