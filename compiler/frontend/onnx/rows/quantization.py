"""Quantized operators.

Where ONNX or onnxruntime define an operator by integer sums, so does its row: integer contractions and
`requantize` by the one factor x_scale * w_scale / y_scale in float32. The others are `dequantize`, the
float operation and `quantize`. Scales and zero points that only the run decides, float16, and blocks of
what is no constant are spelled out in float and 32-bit operations (docs/quantized-models.md).
"""

from __future__ import annotations

import math

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.load import DTYPES
from skive.frontend.onnx.rows.windows import average, convolve
from skive.frontend.onnx.table import Call, Unsupported, checked_axis, onnx_op
from skive.ir import Node, constant
from skive.ops import QUANTIZED
from skive.types import DType

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators


# ------------------------------------------------------------------------------- scales, zero points


def along(c: Call, v: Node, x: Node, axis: int, block: int) -> Node:
    """A scale or zero point of `x` shaped to broadcast: per tensor, per index of an axis, or per block."""
    if v.type.size == 1 and v.type.rank <= 1:
        return c.reshape(v, ())
    axis = checked_axis(axis, x.type.rank)
    if v.type.rank == 1 and not block:
        if v.shape[0] != x.shape[axis]:
            raise InvalidModelError(f"{v.type} along axis {axis} of {x.type}")
        return c.reshape(v, [v.shape[0] if i == axis else 1 for i in range(x.type.rank)])
    if v.type.rank != x.type.rank:
        raise InvalidModelError(f"{v.type} for blocks of {x.type}")
    block = block or -(-x.shape[axis] // v.shape[axis])
    shape = v.shape
    v = c.reshape(v, (*shape[:axis + 1], 1, *shape[axis + 1:]))
    v = c.expand(v, (*shape[:axis + 1], block, *shape[axis + 1:]))
    v = c.reshape(v, (*shape[:axis], shape[axis] * block, *shape[axis + 1:]))
    if v.shape[axis] < x.shape[axis]:
        raise InvalidModelError(f"blocks of {block} do not cover axis {axis} of {x.type}")
    return c.slice(v, axis, 0, x.shape[axis])


def each_element(v: Node, x: Node, axis: int, block: int) -> np.ndarray:
    """A constant scale or zero point per block of `axis`, repeated for each element of `x`."""
    if v.type.rank != x.type.rank or any(s != d for i, (s, d) in enumerate(zip(v.shape, x.shape)) if i != axis):
        raise InvalidModelError(f"{v.type} for blocks of {x.type}")
    block = block or -(-x.shape[axis] // max(1, v.shape[axis]))
    if block < 1 or v.shape[axis] != -(-x.shape[axis] // block):
        raise InvalidModelError(f"blocks of {block} do not cover axis {axis} of {x.type}")
    return v.value.take(np.arange(x.shape[axis]) // block, axis)


def scalar(c: Call, v: Node) -> Node:
    """A scale or zero point of one element as a scalar."""
    if v.type.size != 1:
        raise InvalidModelError(f"{c.op_type} needs one scale and one zero point for a tensor, not {v.type}")
    return c.reshape(v, ())


def known_zero(zero: Node | None) -> int | None:
    """The zero point as a number: 0 if it is absent, None if there are several or the run decides."""
    if zero is None:
        return 0
    if not zero.is_const or zero.type.size == 0:
        return None
    first = zero.value.flat[0]
    return int(first) if (zero.value == first).all() else None


def zero_like(c: Call, zero: Node | None, scale: Node, dtype: DType) -> Node:
    """A zero point of the shape of its scale."""
    if zero is None:
        return c.lit(np.zeros(scale.shape), dtype)
    return c.expand(zero, scale.shape) if zero.type.size == 1 else zero


def saturated(c: Call, v: Node, zero: Node | None, to: DType) -> Node:
    """round(v) + zero, clipped to the range of `to`; v is a float, zero has the type `to`."""
    v = c.make("round_even", v)
    if zero is not None:
        v = c.make("add", v, c.cast(zero, v.dtype))
    limits = np.iinfo(to.numpy)
    return c.cast(c.make("clip", v, lo=float(limits.min), hi=float(limits.max)), to)


def quantized(c: Call, x: Node, scale: Node, zero: Node | None, to: DType) -> Node:
    """`x` in the integers of `to`; scale and zero broadcast to x."""
    if x.dtype is DType.f32 and scale.dtype is DType.f32 and scale.is_const and (zero is None or zero.is_const):
        return c.make("quantize", x, scale, zero_like(c, zero, scale, to), to=to)
    if x.dtype is not scale.dtype:
        x, scale = c.cast(x, DType.f32), c.cast(scale, DType.f32)
    return saturated(c, c.make("div", x, scale), zero, to)


def dequantized(c: Call, x: Node, scale: Node, zero: Node | None, *, blocks: bool = False) -> Node:
    """The real numbers that the integers `x` stand for; scale and zero broadcast to x."""
    known = scale.dtype is DType.f32 and scale.is_const and (zero is None or zero.is_const)
    if known and x.dtype in QUANTIZED | {DType.i32} and not blocks:
        return c.make("dequantize", x, scale, zero_like(c, zero, scale, x.dtype))
    v = c.cast(x, DType.i32)
    if known_zero(zero) != 0 and zero is not None:
        v = c.make("sub", v, c.cast(zero, DType.i32))
    return c.make("mul", c.cast(v, scale.dtype), scale)


# ------------------------------------------------------------------- QuantizeLinear, DequantizeLinear


@onnx_op("QuantizeLinear")
@onnx_op("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(c: Call) -> Node:
    x, scale, zero = c[0], c[1], c.get(2)
    axis, block = int(c.attr("axis", 1)), int(c.attr("block_size", 0))
    wanted = int(c.attr("output_dtype", 0))
    if wanted and wanted not in DTYPES:
        raise Unsupported("the element type that QuantizeLinear produces is not supported")
    to = zero.dtype if zero is not None else DTYPES[wanted] if wanted else DType.u8
    if to not in QUANTIZED:
        raise Unsupported(f"quantization to {to.value}")
    scale = along(c, scale, x, axis, block)
    return quantized(c, x, scale, None if zero is None else along(c, zero, x, axis, block), to)


@onnx_op("DequantizeLinear")
@onnx_op("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(c: Call) -> Node:
    x, scale, zero = c[0], c[1], c.get(2)
    axis, block = int(c.attr("axis", 1)), int(c.attr("block_size", 0))
    blocks = scale.type.rank > 1 and scale.type.size > 1
    if blocks and x.is_const and scale.is_const and (zero is None or zero.is_const) and scale.dtype is DType.f32:
        full = [None if v is None else c.lit(each_element(v, x, checked_axis(axis, x.type.rank), block))
                for v in (scale, zero)]
        return dequantized(c, x, full[0] or scale, full[1])
    scale = along(c, scale, x, axis, block)
    return dequantized(c, x, scale, None if zero is None else along(c, zero, x, axis, block), blocks=blocks)


@onnx_op("DynamicQuantizeLinear")
def dynamic_quantize_linear(c: Call) -> list[Node]:
    return list(dynamically_quantized(c, c[0]))


def dynamically_quantized(c: Call, x: Node) -> tuple[Node, Node, Node]:
    """`x` in u8 with the scale and zero point of its own range, and these."""
    axes = tuple(range(x.type.rank))
    low = c.make("min", c.make("reduce_min", x, axes=axes, keep=False), 0.0)
    high = c.make("max", c.make("reduce_max", x, axes=axes, keep=False), 0.0)
    scale = c.make("div", c.make("sub", high, low), 255.0)
    zero = saturated(c, c.make("neg", c.make("div", low, scale)), None, DType.u8)
    return saturated(c, c.make("div", x, scale), zero, DType.u8), scale, zero


# --------------------------------------------------------------------------- integer contractions


def centred(c: Call, x: Node, zero: Node | None, axis: int | None) -> Node:
    """x - zero in 32 bits; a zero point of several elements lies along `axis`."""
    v = c.cast(x, DType.i32)
    if zero is None or known_zero(zero) == 0:
        return v
    zero = c.cast(zero, DType.i32)
    if zero.type.size == 1:
        zero = c.reshape(zero, ())
    elif zero.type.rank == 1 and axis is not None:
        zero = c.reshape(zero, [zero.shape[0] if i == axis % x.type.rank else 1 for i in range(x.type.rank)])
    return c.make("sub", v, zero)


def narrow_weights(c: Call, w: Node, zero: Node | None, axis: int) -> Node | None:
    """Constant weights minus their zero point as 8-bit integers, None if they do not fit or are not known.

    uint8 weights with the zero point 128 are the usual case that fits.
    """
    if not w.is_const or w.dtype not in (DType.i8, DType.u8) or not (zero is None or zero.is_const):
        return None
    value = w.value.astype(np.int32)
    if zero is not None:
        spread = [-1 if i == axis % w.type.rank else 1 for i in range(w.type.rank)]
        value -= zero.value.astype(np.int32).reshape(spread if zero.type.size > 1 else ())
    if value.size == 0 or value.min() < -128 or value.max() > 127:
        return None
    return constant(value.astype(np.int8), name=w.name, origin=w.origin)


def integer_product(c: Call, a: Node, a_zero: Node | None, b: Node, b_zero: Node | None) -> Node:
    """(a - a_zero) (b - b_zero) in 32 bits."""
    if a.type.rank < 2 or b.type.rank < 2:
        raise Unsupported("an integer product with a vector")
    bytes_ = {DType.i8, DType.u8}
    shared = a_zero is None or a_zero.type.size == 1
    w = narrow_weights(c, b, b_zero, -1) if b.type.rank == 2 and a.dtype in bytes_ and shared else None
    if w is not None:
        rows = c.transpose(w, (1, 0))
        known = known_zero(a_zero)
        total = c.make("linear", a, rows, zero=known or 0)
        if known is None and a_zero is not None:  # (a - z) w = a w - z (sum of w)
            sums = c.lit(rows.value.sum(1, dtype=np.int32))
            total = c.make("sub", total, c.make("mul", c.cast(c.reshape(a_zero, ()), DType.i32), sums))
        return total
    known_a, known_b = known_zero(a_zero), known_zero(b_zero)
    if known_a is not None and known_b is not None and {a.dtype, b.dtype} <= bytes_:
        return c.make("matmul", a, b, a_zero=known_a, b_zero=known_b)
    return c.make("matmul", centred(c, a, a_zero, -2), centred(c, b, b_zero, -1))


def integer_convolution(c: Call, x: Node, x_zero: Node | None, w: Node, w_zero: Node | None, bias: Node | None) -> Node:
    """The 32-bit sums of a convolution of x - x_zero with w - w_zero, plus a 32-bit bias."""
    narrow, known = narrow_weights(c, w, w_zero, 0), known_zero(x_zero)
    if narrow is not None and known is not None and x.dtype in (DType.i8, DType.u8) and x.type.rank <= 4:
        return convolve(c, x, narrow, bias, zero=known)
    total = convolve(c, centred(c, x, x_zero, None), centred(c, w, w_zero, 0), None)
    if bias is not None:
        total = c.make("add", total, c.reshape(bias, (bias.shape[0], *[1] * (total.type.rank - 2))))
    return total


def requantized(c: Call, total: Node, factor: Node, zero: Node) -> Node:
    """A 32-bit sum times a real factor, in the 8-bit type of `zero`."""
    if factor.is_const and zero.is_const and factor.dtype is DType.f32:
        return c.make("requantize", total, factor, zero_like(c, zero, factor, zero.dtype), to=zero.dtype)
    return saturated(c, c.make("mul", c.cast(total, DType.f32), c.cast(factor, DType.f32)), zero, zero.dtype)


@onnx_op("MatMulInteger")
def matmul_integer(c: Call) -> Node:
    return integer_product(c, c[0], c.get(2), c[1], c.get(3))


@onnx_op("ConvInteger")
def conv_integer(c: Call) -> Node:
    return integer_convolution(c, c[0], c.get(2), c[1], c.get(3), None)


def over_rows_or_columns(c: Call, v: Node, axis: int) -> Node:
    """A scale or zero point of a matrix: one, or one for each index of axis -2 or -1."""
    if v.type.size == 1:
        return c.reshape(v, ())
    return v if v.type.rank != 1 else c.reshape(v, (v.shape[0], 1) if axis == -2 else (1, v.shape[0]))


@onnx_op("QLinearMatMul")
def qlinear_matmul(c: Call) -> Node:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (c[i] for i in range(8))
    total = integer_product(c, a, a_zero, b, b_zero)
    product = c.make("mul", over_rows_or_columns(c, a_scale, -2), over_rows_or_columns(c, b_scale, -1))
    factor = c.make("div", product, over_rows_or_columns(c, y_scale, -2))
    return requantized(c, total, factor, over_rows_or_columns(c, y_zero, -2))


@onnx_op("QLinearConv")
@onnx_op("QLinearConv", domain=MICROSOFT)
def qlinear_conv(c: Call) -> Node:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (c[i] for i in range(8))
    last = bool(c.attr("channels_last", 0))
    x = channels_first(c, x) if last else x
    total = integer_convolution(c, x, x_zero, w, w_zero, c.get(8))
    spread = (w.shape[0], *[1] * (total.type.rank - 2))
    w_scale = c.reshape(w_scale, spread if w_scale.type.size > 1 else ())
    factor = c.make("div", c.make("mul", scalar(c, x_scale), w_scale), scalar(c, y_scale))
    y = requantized(c, total, factor, scalar(c, y_zero))
    return channels_last(c, y) if last else y


@onnx_op("QGemm", domain=MICROSOFT)
def qgemm(c: Call) -> Node:
    """alpha (a - a_zero) (b - b_zero) scales + bias, the bias in units of the sums; float without a scale of y."""
    a, a_scale, a_zero, b, b_scale, b_zero = (c[i] for i in range(6))
    bias, y_scale, y_zero = c.get(6), c.get(7), c.get(8)
    if a.type.rank != 2 or b.type.rank != 2:
        raise InvalidModelError(f"QGemm of {a.type} and {b.type}")
    a = c.transpose(a, (1, 0)) if c.attr("transA", 0) else a
    b = c.transpose(b, (1, 0)) if c.attr("transB", 0) else b
    total = integer_product(c, a, a_zero, b, b_zero)
    if bias is not None:
        total = with_bias(c, total, bias)
    factor = c.make("mul", c.make("mul", scalar(c, a_scale), float(c.attr("alpha", 1.0))),
                    over_rows_or_columns(c, b_scale, -1))
    if y_scale is None or y_zero is None:
        return c.make("mul", c.cast(total, DType.f32), factor)
    return requantized(c, total, c.make("div", factor, scalar(c, y_scale)), scalar(c, y_zero))


def with_bias(c: Call, total: Node, bias: Node) -> Node:
    """`total` plus a bias, as the third operand of the product where it has one per column."""
    if total.op == "linear" and len(total.inputs) == 2 and bias.is_const and bias.dtype is DType.i32:
        columns = total.shape[-1]
        if bias.type.size == 1 or bias.shape in ((columns,), (1, columns)):
            flat = c.lit(np.broadcast_to(bias.value.reshape(-1), (columns,)))
            return c.make("linear", *total.inputs, flat, zero=total.attrs["zero"])
    return c.make("add", total, bias)


@onnx_op("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(c: Call) -> Node:
    """x w^T + bias with constant weights [N, K] of 4 or 8 bits, packed [N, blocks, bytes], a scale for each block.

    Without zero points they are 2^(bits - 1). `accuracy_level`, which permits rounding x, is not used.
    """
    x, packed, scales, zero, order, bias = c[0], c[1], c[2], c.get(3), c.get(4), c.get(5)
    n, k, block = (int(c.required(name)) for name in ("N", "K", "block_size"))
    bits = int(c.attr("bits", 4))
    if bits not in (4, 8) or order is not None:
        raise Unsupported(f"MatMulNBits with {bits} bits" if order is None else "MatMulNBits with g_idx",
                          "4 and 8 bits, in order, are supported")
    if block < 16 or n < 1 or k < 1:
        raise InvalidModelError(f"MatMulNBits with N={n}, K={k}, block_size={block}")
    groups = -(-k // block)

    def unpacked(v: Node, per_row: int, what: str) -> np.ndarray:
        """[N, per_row] integers; each row starts with a byte of its own."""
        stored = c.known(v, what, data=True)
        row = -(-per_row * bits // 8)
        if stored.dtype != np.uint8 or stored.size != n * row:
            raise InvalidModelError(f"{what} {v.type}: {n * row} bytes are needed")
        flat = stored.reshape(n, row)
        if bits == 4:
            flat = np.stack([flat & 15, flat >> 4], -1).reshape(n, -1)
        return flat[:, :per_row]

    q = unpacked(packed, groups * block, "the weights")[:, :k]
    scale = c.known(scales, "the scales", data=True)
    if scale.size != n * groups or scale.dtype != np.float32:
        raise Unsupported(f"MatMulNBits with scales {scales.type}", "float32 scales, one for each block, are supported")
    if zero is None:
        points = np.full((n, groups), 1 << (bits - 1), np.uint8)
    elif zero.dtype is DType.u8:
        points = unpacked(zero, groups, "the zero points")
    else:
        raise Unsupported(f"MatMulNBits with zero points of {zero.dtype.value}")
    each = np.arange(k) // block
    w = c.make("dequantize", c.lit(q), c.lit(scale.reshape(n, groups)[:, each]), c.lit(points[:, each]))
    if x.type.rank < 1 or x.shape[-1] != k or x.dtype is not DType.f32:
        raise InvalidModelError(f"MatMulNBits of {x.type} with K={k}")
    y = c.make("linear", x, w)
    return y if bias is None else c.make("add", y, bias)


@onnx_op("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(c: Call) -> Node:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = (c[0], c[1], c[2], c[3], c.get(4), c.get(5), c.get(6))
    return scaled_product(c, a, a_scale, a_zero, b, b_scale, b_zero, bias)


@onnx_op("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(c: Call) -> Node:
    a, a_scale, a_zero = dynamically_quantized(c, c[0])
    return scaled_product(c, a, a_scale, a_zero, c[1], c[2], c.get(3), c.get(4))


def scaled_product(c: Call, a: Node, a_scale: Node, a_zero: Node | None, b: Node, b_scale: Node, b_zero: Node | None,
                   bias: Node | None) -> Node:
    """An integer product as the float numbers that it stands for, plus a float bias."""
    total = integer_product(c, a, a_zero, b, b_zero)
    factor = c.make("mul", over_rows_or_columns(c, a_scale, -2), over_rows_or_columns(c, b_scale, -1))
    y = c.make("mul", c.cast(total, DType.f32), factor)
    return y if bias is None else c.make("add", y, bias)


# --------------------------------------------- operators of onnxruntime: dequantize, compute, quantize


def real(c: Call, i: int) -> Node:
    """Operands i, i + 1 and i + 2, a tensor with its scale and zero point, as real numbers."""
    zero = c.get(i + 2)
    return dequantized(c, c[i], scalar(c, c[i + 1]), None if zero is None else scalar(c, zero))


def whole(c: Call, y: Node, i: int, to: DType) -> Node:
    """Real numbers quantized by the scale and zero point that are operands i and i + 1."""
    zero = c.get(i + 1)
    return quantized(c, y, scalar(c, c[i]), None if zero is None else scalar(c, zero), to)


@onnx_op("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(c: Call) -> Node:
    return whole(c, c.make("add" if c.op_type == "QLinearAdd" else "mul", real(c, 0), real(c, 3)), 6, c[0].dtype)


@onnx_op("QLinearSigmoid", domain=MICROSOFT)
def qlinear_sigmoid(c: Call) -> Node:
    return whole(c, c.make("sigmoid", real(c, 0)), 3, c[0].dtype)


@onnx_op("QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_leaky_relu(c: Call) -> Node:
    return whole(c, c.make("leaky_relu", real(c, 0), alpha=float(c.attr("alpha", 0.01))), 3, c[0].dtype)


@onnx_op("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(c: Call) -> Node:
    """The attribute `opset` says whether one axis is meant, or everything from that axis on (before 13)."""
    x, rank = real(c, 0), c[0].type.rank
    modern = int(c.attr("opset", 13)) >= 13
    axis = checked_axis(int(c.attr("axis", -1 if modern else 1)), rank)
    if not modern:
        flat = c.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
        return whole(c, c.reshape(c.make("softmax", flat, axis=1), x.shape), 3, c[0].dtype)
    return whole(c, c.make("softmax", x, axis=axis), 3, c[0].dtype)


def channels_first(c: Call, x: Node) -> Node:
    """[N, D..., C] as [N, C, D...]."""
    return c.transpose(x, (0, x.type.rank - 1, *range(1, x.type.rank - 1)))


def channels_last(c: Call, x: Node) -> Node:
    """[N, C, D...] as [N, D..., C]."""
    return c.transpose(x, (0, *range(2, x.type.rank), 1))


@onnx_op("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(c: Call) -> Node:
    x = real(c, 0)
    if c.attr("channels_last", 0):
        return whole(c, channels_last(c, average(c, channels_first(c, x))), 3, c[0].dtype)
    return whole(c, average(c, x), 3, c[0].dtype)


@onnx_op("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(c: Call) -> Node:
    """An integer sum over the image times x_scale / (y_scale n), which is how onnxruntime computes it."""
    x, last = c[0], bool(c.attr("channels_last", 0))
    if x.type.rank < 3:
        raise InvalidModelError(f"{c.op_type} needs an operand [N, C, ...], not {x.type}")
    axes = tuple(range(1, x.type.rank - 1)) if last else tuple(range(2, x.type.rank))
    x_zero, y_zero = known_zero(c.get(2)), c.get(4)
    x_scale, y_scale = scalar(c, c[1]), scalar(c, c[3])
    known = x_zero is not None and all(v is None or v.is_const for v in (x_scale, y_scale, y_zero))
    if x.type.rank != 4 or not known or x.dtype not in QUANTIZED:
        return whole(c, c.make("reduce_mean", real(c, 0), axes=axes, keep=True), 3, x.dtype)
    image = x if last else channels_last(c, x)
    total = c.make("sum_pool2d", image, kernel=image.shape[1:3], zero=x_zero)
    count = np.float32(math.prod(image.shape[1:3]))
    factor = c.lit(x_scale.value / (y_scale.value * count), DType.f32)
    y = requantized(c, total, factor, c.lit(0, x.dtype) if y_zero is None else scalar(c, y_zero))
    return y if last else channels_first(c, y)


@onnx_op("QLinearReduceMean", domain=MICROSOFT)
def qlinear_reduce_mean(c: Call) -> Node:
    x = real(c, 0)
    axes = [checked_axis(int(a), x.type.rank) for a in c.attr("axes", range(x.type.rank))]
    return whole(c, c.make("reduce_mean", x, axes=tuple(sorted(axes)), keep=bool(c.attr("keepdims", 1))), 3, c[0].dtype)


def restated(c: Call, x: Node, scale: Node, zero: Node | None, y: int) -> Node:
    """`x` in the scale and zero point that are operands y and y + 1; `x` itself if they are its own."""
    own = [scale, c.lit(0, x.dtype) if zero is None else zero]
    wanted = [c[y], c[y + 1]]
    if all(a.is_const and b.is_const and np.array_equal(a.value.reshape(-1), b.value.reshape(-1))
           for a, b in zip(own, wanted, strict=True)):
        return x
    return whole(c, dequantized(c, x, scalar(c, own[0]), scalar(c, own[1])), y, wanted[1].dtype)


@onnx_op("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(c: Call) -> Node:
    parts = [restated(c, c[i], c[i + 1], c.get(i + 2), 0) for i in range(2, len(c.inputs), 3)]
    if not parts:
        raise InvalidModelError("concat of nothing")
    return c.concat(parts, checked_axis(int(c.required("axis")), parts[0].type.rank))


@onnx_op("QLinearWhere", domain=MICROSOFT)
def qlinear_where(c: Call) -> Node:
    return c.make("where", c[0], *(restated(c, c[i], c[i + 1], c.get(i + 2), 7) for i in (1, 4)))
