"""Weights in the order in which the kernels read them.

Every function takes plain arrays in the layout of the IR and returns a C-contiguous float32 array;
the layout that each one produces is described beside the kernel that reads it (kernels/include).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "conv2d_block",
    "conv2d_scratch_bytes",
    "conv_transpose2d_scratch_bytes",
    "narrow_rows",
    "narrow_scratch_bytes",
    "pack_bias",
    "pack_bias_i32",
    "pack_conv2d",
    "pack_conv2d_i16",
    "pack_conv2d_u8",
    "pack_conv_transpose2d_bias_i32",
    "pack_conv_transpose2d_i16",
    "pack_conv_transpose2d_u8",
    "pack_depthwise",
    "pack_winograd",
    "winograd_block",
    "winograd_scratch_bytes",
]

Floats = NDArray[np.float32]

_DEPTHWISE_BLOCK = 16  # channels per block of depthwise.h
_ALIGNMENT = 16  # floats: packed arrays that follow one another stay 64-byte aligned
_CHANNEL_QUANTUM = 4  # kChannelQuantum of tile.h
_CHUNK_BYTES = 192 * 1024  # input rows that conv.h keeps in L2
_WIDE_GAP = 2  # output pixels between neighbouring taps: `kWideGap` of conv.h
_CLASH = 4096  # bytes: pixels that are a multiple of it apart share one set of the L1 cache
_TILE_ROWS = 14  # most output rows of a register tile
_NARROW_CHUNK_BYTES = 24 * 1024  # input rows that conv_narrow.h keeps in L1
_NARROW_TILE_ROWS = 8  # most output rows of its register tile
_FEW_PIXELS_BLOCK = {"avx512vnni": 64, "avx512": 64, "avx2": 64, "generic": 16}
_BLOCK_VECTORS = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "generic": 4}  # float lanes of a register


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


def conv2d_block(
    out_channels: int, isa: str, pixels: int | None = None, *, element_size: int = 4, depth: int | None = None
) -> int:
    """Output channels per packed block (NB of `conv2d`): a multiple of 4 that suits the registers.

    Two registers of channels make the squarest tile that fits the register file; three where that
    leaves no narrow block over. With one or two output `pixels` only more channels can keep the
    multiply-adds busy. Results of 8 bits are stored best from one, two or four full registers;
    with few multiply-adds per output (`depth`) that counts more than the tile.
    """
    lanes = _BLOCK_VECTORS[isa]
    if pixels is not None and pixels <= 2:
        return min(_round_up(out_channels, _CHANNEL_QUANTUM), _FEW_PIXELS_BLOCK[isa])
    if element_size == 1 and isa == "avx512vnni" and depth is not None and depth <= 256 and out_channels >= 4 * lanes:
        return 4 * lanes
    for vectors in (2, 3):
        if out_channels <= vectors * lanes:
            return _round_up(out_channels, _CHANNEL_QUANTUM)
    if out_channels % (2 * lanes) and out_channels % (3 * lanes) == 0:
        return 3 * lanes
    return 2 * lanes


def conv2d_scratch_bytes(
    image: Sequence[int],
    attrs: Mapping[str, Any],
    kernel: Sequence[int],
    parts: int = 1,
    pixel_stride: int | None = None,
    element_size: int = 4,
    border: int | None = 0,
) -> int:
    """Upper bound of `conv2d::scratch_bytes(parts)`; mostly 0 without padding.

    `image` is [N, H, W, C]; `attrs` has "stride", "pad" (top, left, bottom, right), "dilation" and
    optionally "groups"; `kernel` is (KH, KW); `pixel_stride` is XS, C by default; `element_size` is
    the bytes of an input element: 4 (float32), 1 (uint8) or 2 (int16); `border` is what padding holds,
    None for sums in parts.
    """
    n, h, w, channels = image
    pad = attrs["pad"]
    (sh, sw), (dh, dw) = attrs["stride"], attrs["dilation"]
    kh, kw = kernel
    reach_h, reach_w = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    oh = (h + pad[0] + pad[2] - reach_h) // sh + 1
    ow = (w + pad[1] + pad[3] - reach_w) // sw + 1
    run = channels // attrs.get("groups", 1)  # elements read at one tap
    stride = pixel_stride or channels
    joined = _joins(run, kw, dw, 4 // element_size)
    # Filter rows whose taps must lie side by side, or that are shorter than four bytes, are copied.
    copied = any(pad) or (joined and stride != run) or run * (kw if joined else 1) * element_size < 4
    wide, tall = kw > 1 and dw >= _WIDE_GAP * sw, kh > 1 and dh >= _WIDE_GAP * sh
    tall &= (kw == 1 or dw > 1) and pad[1] == 0 and (ow - 1) * sw + reach_w <= w
    if border == 0 and any(pad) and (wide or tall) and run * element_size >= 4:
        return 0
    if copied:
        whole = ((ow - 1) * sw + reach_w) * (run * element_size + 64)
        most = _copied_bytes(oh, sh, reach_h, whole)
    if (kh, kw, sh, sw) == (1, 1, 1, 1) and not any(pad):  # a matrix product
        h, w, oh, ow, n = n * h * w, 1, n * oh * ow, 1, 1
    elif oh == ow == 1 and not any(pad):  # the window covers the image, perhaps
        stride *= h * w
        run *= kh * kw
        oh, reach_h, reach_w = n, 1, 1
    elif h == 1 and kh == 1 and oh == 1 and pad[0] == 0 and not joined:
        # One dimension: its only axis becomes the rows.
        sh, sw, reach_h, reach_w, oh, ow = sw, sh, reach_w, reach_h, ow, oh
    step = sh if ow == 1 else sw
    clash = any(s * step * element_size % _CLASH == 0 for s in (stride, run))
    if not copied and not clash:
        return 0
    row = ((ow - 1) * sw + reach_w) * (run * element_size + 64 * clash)
    bytes_ = _copied_bytes(oh, sh, reach_h, row + 4)
    return max(bytes_, most if copied else 0) * parts


def narrow_rows(image: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
    """Height and width of the input that `narrow_conv2d` sees: a window of one pixel may cut it anew."""
    n, h, w = image[:3]
    if tuple(kernel) != (1, 1):
        return h, w
    pixels = n * h * w
    width = next((cut for cut in (64, 32, 16) if pixels % cut == 0), w)
    return pixels // width, width


def narrow_scratch_bytes(
    image: Sequence[int], attrs: Mapping[str, Any], kernel: Sequence[int], parts: int = 1
) -> int:
    """Upper bound of `narrow_conv2d::scratch_bytes(parts)`: the input rows of a chunk, or of one tile, as planes."""
    channels = image[3]
    top, left, bottom, right = attrs["pad"]
    kh, kw = kernel
    h, w = narrow_rows(image, kernel)
    out = w + left + right - kw + 1
    row = _round_up(max(_round_up(out, 16) + kw - 1, left + _round_up(w, 16)), 16) * channels
    rows = h + top + bottom  # all of them
    return min(rows * row, max(_NARROW_CHUNK_BYTES, (_NARROW_TILE_ROWS + kh - 1) * row)) * parts


def _copied_bytes(output_rows: int, stride: int, reach: int, row: int) -> int:
    """Bytes of the scratch copy of `row`-byte rows: all of them, or a chunk."""
    strip = (min(output_rows, _TILE_ROWS) - 1) * stride + reach
    everything = (output_rows - 1) * stride + reach
    return _round_up(min(everything * row, max(_CHUNK_BYTES, strip * row)), 64)


def pack_bias(bias: Floats, block: int) -> Floats:
    """`bias` [OC], zero-filled to a multiple of `block` and then of 16 channels."""
    channels = bias.shape[0]
    packed = np.zeros(_round_up(_round_up(channels, block), _ALIGNMENT), np.float32)
    packed[:channels] = bias
    return packed


def pack_conv2d(weights_ohwi: np.ndarray, block: int) -> Floats:
    """Packed weights of `conv2d`, flat: [OC / block][KH][KW][IC][block].

    `weights_ohwi` is [OC, KH, KW, IC]. The last block holds the channels that are left over, rounded
    up to 4; the end is zero-filled to a multiple of 16 floats, so that the packed groups of a grouped
    convolution may follow one another.
    """
    return _pack_blocks(np.asarray(weights_ohwi, np.float32).reshape(weights_ohwi.shape[0], -1), block)


def _pack_blocks(taps: np.ndarray, block: int) -> np.ndarray:
    """`taps` [OC, K], of any type of 4 bytes, as [OC / block][K][block]: see pack_conv2d."""
    channels = taps.shape[0]
    full = channels // block * block
    blocks = taps[:full].reshape(-1, block, taps.shape[1]).transpose(0, 2, 1)
    rest = np.zeros((taps.shape[1], _round_up(channels - full, _CHANNEL_QUANTUM)), taps.dtype)
    rest[:, : channels - full] = taps[full:].T
    size = blocks.size + rest.size
    packed = np.zeros(_round_up(size, _ALIGNMENT), taps.dtype)
    packed[: blocks.size] = blocks.ravel()
    packed[blocks.size : size] = rest.ravel()
    return packed


# Finite points of winograd.h by stride, in its order; with stride 2 those of the filter's first and last value.
_WINOGRAD_POINTS = {1: (0.625, -0.625, 1.5, -1.5, 0.0), 2: (1.0, -1.0, 0.0, 2.0)}
_WINOGRAD_CHUNK_BYTES = 288 * 1024  # transformed input that winograd.h keeps in L2
_WINOGRAD_LEAST_TILES = 12


def _winograd_filter_transform(stride: int) -> NDArray[np.float64]:
    """G [6, 3]: the filter as a polynomial at the finite points, over their Lagrange norms, and at infinity; with
    stride 2 that of its first and last value, and then the one between them."""
    points = _WINOGRAD_POINTS[stride]
    last = 3 - stride  # power of the polynomial
    rows = []
    for i, p in enumerate(points):
        norm = np.prod([p - q for j, q in enumerate(points) if j != i])
        rows.append([p**k / norm for k in range(last + 1)])
    g = np.array([*rows, [0.0] * last + [1.0]])
    if stride == 1:
        return g
    return np.block([[g[:, :1], np.zeros((5, 1)), g[:, 1:]], [np.eye(3)[1]]])


def winograd_products(stride: int) -> int:
    """Multiplications of `winograd2d` for a tile of 4x4 outputs and a pair of channels; the direct method has 144."""
    return {1: 36, 2: 81}[stride]


def winograd_block(out_channels: int, isa: str) -> int:
    """Output channels per packed block (NB of `winograd2d`): a multiple of 4, four registers at most.

    Few tiles share one pass over the weights, so the register tile is wide rather than high.
    """
    lanes = _BLOCK_VECTORS[isa]
    most = 4 if isa in ("avx512", "avx512vnni") else 2
    return min(most * lanes, _round_up(out_channels, _CHANNEL_QUANTUM))


def pack_winograd(weights_ohwi: np.ndarray, block: int, stride: int = 1) -> Floats:
    """Packed weights of `winograd2d`, flat: [OC / block][36][IC][block], transformed in float64.

    `weights_ohwi` is [OC, 3, 3, IC]; the result is four times its size. Where it pays: `Target.winograd_pays`.
    """
    channels, kh, kw, in_channels = weights_ohwi.shape
    if (kh, kw) != (3, 3):
        raise ValueError(f"winograd packs 3x3 filters, not {kh}x{kw}")
    g = _winograd_filter_transform(stride)
    taps = weights_ohwi.astype(np.float64).transpose(1, 2, 0, 3).reshape(9, -1)  # one matrix product for all
    transformed = (np.kron(g, g) @ taps).astype(np.float32).reshape(36, channels, in_channels)
    return pack_conv2d(transformed.transpose(1, 0, 2).reshape(channels, 36, 1, in_channels), block)


def winograd_scratch_bytes(
    image: Sequence[int], pad: Sequence[int], stride: int, out_channels: int, block: int, parts: int = 1
) -> int:
    """Upper bound of `winograd2d::scratch_bytes(parts)`; `image` is [N, H, W, C]."""
    n, h, w, channels = image
    tiles_h = -(-((h + pad[0] + pad[2] - 3) // stride + 1) // 4)
    tiles_w = -(-((w + pad[1] + pad[3] - 3) // stride + 1) // 4)
    products = winograd_products(stride)
    in_row = _round_up(channels, 16) + 16
    out_row = _round_up(min(out_channels, block), 16)
    chunk = max(_WINOGRAD_LEAST_TILES, _WINOGRAD_CHUNK_BYTES // (products * 4 * in_row))
    tiles = min(n * tiles_h * tiles_w, chunk) + _TILE_ROWS
    return products * 4 * (tiles * (in_row + out_row) + 32) * parts


def _panel_block(columns: int, isa: str) -> int:
    """panel_block of matmul.h."""
    lanes = _BLOCK_VECTORS[isa]
    return _round_up(columns, _CHANNEL_QUANTUM) if columns <= 3 * lanes else 2 * lanes


def _panel_floats(k: int, n: int, block: int) -> int:
    """pack_panel::floats of matmul.h."""
    last = n - ((n + block - 1) // block - 1) * block
    return _round_up(k * (n - last + _round_up(last, _CHANNEL_QUANTUM)), 16)


def _product_copy(m: int, k: int, row: int) -> int:
    """product_copy of matmul.h: floats for rows that lie whole pages apart."""
    if k == 0 or row % 1024:
        return 0
    return _round_up(min(m, max(14, 48 * 1024 // (k + 16))) * (k + 16), 16)


def matmul_scratch_bytes(batch: int, m: int, k: int, n: int, trans_a: bool, isa: str) -> int:
    """matmul::scratch_bytes() of matmul.h for one part."""
    if m <= 4:
        return 0
    block = _panel_block(n, isa)
    columns = 256 * 1024 // 4 // max(k, 1) // block * block
    if batch < 4:
        columns = min(columns, _round_up(-(-n // 4), block))
    columns = min(max(columns, block), n)
    return 4 * (
        _panel_floats(k, columns, block)
        + _round_up(columns + block, 16)
        + (_round_up(m * k, 16) if trans_a else 0)
        + _product_copy(m, k, k)
    )


def attention_scratch_bytes(
    queries: int, keys: int, width: int, value_width: int, query_row: int, isa: str
) -> int:
    """attention::scratch_bytes() of attention.h for one part; `query_row`: floats between queries."""
    rows = min(max(128 * 1024 // 4 // keys // 8 * 8, 8), 64, queries)
    lanes = _BLOCK_VECTORS[isa]
    return 4 * (
        _panel_floats(width, keys, _panel_block(keys, isa))
        + _panel_floats(keys, value_width, _panel_block(value_width, isa))
        + _round_up(rows * (keys if keys % 1024 else keys + 16), 16)
        + _round_up(max(keys, value_width) + 3 * lanes, 16)
        + _round_up(rows, 16)
        + _product_copy(rows, width, query_row)
    )


def quantized_attention_scratch_bytes(
    queries: int, keys: int, width: int, value_width: int, query_row: int, isa: str
) -> int:
    """quantized_attention::scratch_bytes() of attention_integer.h for one part; `query_row`: bytes between queries."""

    def blocks(k: int, n: int) -> int:
        return 4 * _panel_floats(k // 4, n, _panel_block(n, isa))

    most = min(max(24 * 1024 // 4 // keys, 8), 64)
    rows = -(-queries // -(-queries // most))
    lanes = _BLOCK_VECTORS[isa]
    weight_row = _round_up(keys, 64)
    weight_row += 64 if weight_row % 4096 == 0 else 0
    return (
        blocks(width, keys)
        + blocks(_round_up(keys, 4), value_width)
        + 4 * _round_up(keys + 3 * lanes, 16)
        + 4 * _round_up(value_width + 3 * lanes, 16)
        + 4 * rows * _round_up(keys, 64)
        + rows * weight_row
        + 3 * 4 * _round_up(rows, 16)
        + (rows * _round_up(width + 64, 64) if query_row % 4096 == 0 else 0)
    )


def _gate_block(gates: int, rows: int, isa: str) -> int:
    """rnn_block of rnn.h."""
    wide = (8 if rows == 1 else 2) * _BLOCK_VECTORS[isa]
    return min(_round_up(gates, _CHANNEL_QUANTUM), wide) if gates < wide else wide


def pack_gates(weights: np.ndarray, rows: int, isa: str) -> Floats:
    """Weights [gates, K] of a recurrent layer whose product has `rows` rows, as rnn.h reads them."""
    return pack_conv2d(weights[:, None, None, :], _gate_block(weights.shape[0], rows, isa))


def _gate_bias(outputs: int, rows: int, isa: str) -> int:
    """gate_product::bias_floats of rnn.h."""
    return _round_up(_round_up(outputs, _gate_block(outputs, rows, isa)), 16)


def steps_scratch_bytes(gates: int, batch: int, hidden: int, isa: str) -> int:
    """`scratch_bytes` of lstm_steps (4 gates) and gru_steps (3) of rnn.h; with 1 what the steps of rnn take."""
    n = gates * hidden
    total = _round_up(batch * n, 16) + _gate_bias(n, batch, isa) + _product_copy(batch, hidden, hidden)
    if gates == 3:
        total += 2 * _round_up(batch * hidden, 16) + _gate_bias(hidden, batch, isa)
    return 4 * total


def recurrent_scratch_bytes(
    gates: int, steps: int, batch: int, inputs: int, hidden: int, packed: bool, isa: str
) -> int:
    """`scratch_bytes` of lstm (4 gates), gru (3) and rnn (1) of rnn.h; `packed`: weights by pack_gates."""

    def weights(outputs: int, width: int, rows: int) -> int:
        return _panel_floats(width, outputs, _gate_block(outputs, rows, isa))

    n = gates * hidden
    total = _round_up(steps * batch * n, 16) + _gate_bias(n, steps * batch, isa)
    total += _product_copy(steps * batch, inputs, inputs)
    if not packed:
        total += weights(n, inputs, steps * batch) + weights(n, hidden, batch)
        if gates == 3:
            total += weights(2 * hidden, hidden, batch) + weights(hidden, hidden, batch)
    return 4 * total + steps_scratch_bytes(gates, batch, hidden, isa)


def quantized_steps_scratch_bytes(gates: int, batch: int, hidden: int) -> int:
    """`scratch_bytes` of quantized_lstm (4 gates) and quantized_gru (3) of rnn_integer.h."""
    row = _round_up(hidden, 64)
    row += 64 if row % 4096 == 0 else 0
    return batch * row + 4 * _round_up(batch, 16) + _round_up(4 * batch * gates * hidden, 64)


@dataclass(frozen=True)
class _Phase:
    """`Phase` of conv.h: the taps of one axis that reach every stride-th output position."""

    taps: range
    dilation: int
    pad: int
    outputs: int


def _phase(offset: int, pad: int, kernel: int, stride: int, dilation: int, out: int) -> _Phase:
    g = math.gcd(dilation, stride)
    step = stride // g
    starts = [k for k in range(step) if (offset + pad - k * dilation) % stride == 0]
    taps = range(starts[0], kernel, step) if starts else range(0)
    reach = (offset + pad - taps.start * dilation) // stride if taps else 0
    return _Phase(taps, dilation // g, (len(taps) - 1) * (dilation // g) - reach if taps else 0,
                  max(0, -(-(out - offset) // stride)))  # fmt: skip


def _phases(
    attrs: Mapping[str, Any], kernel: Sequence[int], output: Sequence[int]
) -> Iterator[tuple[_Phase, _Phase]]:
    (sh, sw), (dh, dw), (top, left, _, _) = attrs["stride"], attrs["dilation"], attrs["pad"]
    for y in range(sh):
        rows = _phase(y, top, kernel[0], sh, dh, output[1])
        for x in range(sw):
            yield rows, _phase(x, left, kernel[1], sw, dw, output[2])


def conv_transpose2d_scratch_bytes(
    image: Sequence[int],
    attrs: Mapping[str, Any],
    kernel: Sequence[int],
    output: Sequence[int],
    parts: int = 1,
    element_size: int = 4,
) -> int:
    """Upper bound of `conv_transpose2d::scratch_bytes(parts)`.

    `image` and `output` are [N, H, W, C], `kernel` is (KH, KW); `attrs` and `element_size` as for
    `conv2d`.
    """
    channels = image[3] // attrs.get("groups", 1)
    most = 0
    for rows, columns in _phases(attrs, kernel, output):
        if rows.outputs and columns.outputs and rows.taps and columns.taps:
            reach_h = rows.dilation * (len(rows.taps) - 1) + 1
            reach_w = columns.dilation * (len(columns.taps) - 1) + 1
            oh, ow = rows.outputs, columns.outputs
            joined = _joins(channels, len(columns.taps), columns.dilation, 4 // element_size)
            if image[1] == 1 and reach_h == 1 and oh == 1 and not joined:
                oh, ow, reach_h, reach_w = ow, oh, reach_w, reach_h
            row = (ow - 1 + reach_w) * (channels * element_size + 64) + 4
            most = max(most, _copied_bytes(oh, 1, reach_h, row))
    return most * parts


def pack_conv_transpose2d(
    weights_ohwi: np.ndarray, attrs: Mapping[str, Any], output: Sequence[int], block: int
) -> Floats:
    """Packed weights of `conv_transpose2d`, flat: one `pack_conv2d` per phase and group.

    `weights_ohwi` is [OC, KH, KW, IC / groups]: output[oh] += x[ih] * w[oh + pad - ih * stride].
    A phase holds its taps in reverse order.
    """
    groups = attrs.get("groups", 1)
    packed = [np.zeros(0, np.float32)]
    for rows, columns in _phases(attrs, weights_ohwi.shape[1:3], output):
        taps = weights_ohwi[:, rows.taps[::-1]][:, :, columns.taps[::-1]]
        if taps.size:
            packed += [pack_conv2d(g, block) for g in np.split(taps, groups)]
    return np.concatenate(packed)


# Integers: uint8 x int8 and int16 x int16. Weights travel in groups of four bytes that tile.h multiplies
# by four bytes of one input pixel.


def _joins(run: int, kw: int, dilation: int, step: int) -> bool:
    """Whether conv.h packs all taps of a filter row as one run (kJoined)."""
    return run % step != 0 and kw > 1 and dilation == 1


def _pack_steps(weights_ohwi: np.ndarray, block: int, dilation: int, dtype: type) -> np.ndarray:
    """Packed weights of an integer `conv2d`: [OC / block][KH][steps of a run][block][step].

    What is left of a run after whole steps is the end of its last `step` elements, whose first ones
    get zero weights; a run shorter than a step is filled at its end.
    """
    oc, kh, kw, ic = weights_ohwi.shape
    step = 4 // np.dtype(dtype).itemsize
    length = kw * ic if _joins(ic, kw, dilation, step) else ic
    runs = np.ascontiguousarray(weights_ohwi, dtype).reshape(oc, -1, length) if weights_ohwi.size else (
        np.zeros((oc, 0, length), dtype)
    )
    rest = length % step
    steps = np.zeros((oc, runs.shape[1], _round_up(length, step)), dtype)
    steps[:, :, : length - rest] = runs[:, :, : length - rest]
    if rest:
        start = 0 if length < step else step - rest
        steps[:, :, length - rest :][:, :, start : start + rest] = runs[:, :, length - rest :]
    words = steps.reshape(oc, -1).view(np.uint32)  # a step is 4 bytes
    return _pack_blocks(words, block).view(dtype)


def pack_conv2d_u8(weights_ohwi: np.ndarray, block: int, dilation: Sequence[int] = (1, 1)) -> NDArray[np.int8]:
    """Packed int8 weights of `conv2d` on uint8, flat; `weights_ohwi` is [OC, KH, KW, IC]."""
    return _pack_steps(weights_ohwi, block, dilation[1], np.int8)


def pack_conv2d_i16(weights_ohwi: np.ndarray, block: int, dilation: Sequence[int] = (1, 1)) -> NDArray[np.int16]:
    """Packed int16 weights of `conv2d` on int16, flat; `weights_ohwi` is [OC, KH, KW, IC]."""
    return _pack_steps(weights_ohwi, block, dilation[1], np.int16)


def pack_bias_i32(
    bias: np.ndarray | None, weights: np.ndarray, zero: int, block: int
) -> NDArray[np.int32]:
    """Packed bias of an integer `conv2d`: bias - zero * (sum of a channel's weights), modulo 2^32.

    `weights` is [OC, ...]; `bias` [OC] or None (zeros); `zero` the zero point of the input. Zero-filled
    as by `pack_bias`.
    """
    channels = weights.shape[0]
    sums = weights.reshape(channels, -1).astype(np.int64).sum(axis=1)
    total = (0 if bias is None else np.asarray(bias, np.int64)) - zero * sums
    packed = np.zeros(_round_up(_round_up(channels, block), _ALIGNMENT), np.int32)
    packed[:channels] = (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    return packed


def _transpose_phases(
    weights_ohwi: np.ndarray, attrs: Mapping[str, Any], output: Sequence[int]
) -> Iterator[tuple[NDArray[Any], int]]:
    """The taps of each phase [OC, KH', KW', IC] in the order conv.h reads them, and their dilation."""
    for rows, columns in _phases(attrs, weights_ohwi.shape[1:3], output):
        yield weights_ohwi[:, rows.taps[::-1]][:, :, columns.taps[::-1]], columns.dilation


def _pack_transpose_steps(
    weights_ohwi: np.ndarray, attrs: Mapping[str, Any], output: Sequence[int], block: int, dtype: type
) -> np.ndarray:
    packed: list[np.ndarray] = [np.zeros(0, dtype)]
    for taps, dilation in _transpose_phases(weights_ohwi, attrs, output):
        if taps.size:
            groups = np.split(taps, attrs.get("groups", 1))
            packed += [_pack_steps(g, block, dilation, dtype) for g in groups]
    return np.concatenate(packed)


def pack_conv_transpose2d_u8(
    weights_ohwi: np.ndarray, attrs: Mapping[str, Any], output: Sequence[int], block: int
) -> NDArray[np.int8]:
    """Packed int8 weights of `conv_transpose2d` on uint8; arguments as for `pack_conv_transpose2d`."""
    return _pack_transpose_steps(weights_ohwi, attrs, output, block, np.int8)


def pack_conv_transpose2d_i16(
    weights_ohwi: np.ndarray, attrs: Mapping[str, Any], output: Sequence[int], block: int
) -> NDArray[np.int16]:
    """Packed int16 weights of `conv_transpose2d` on int16; arguments as for `pack_conv_transpose2d`."""
    return _pack_transpose_steps(weights_ohwi, attrs, output, block, np.int16)


def pack_conv_transpose2d_bias_i32(
    bias: np.ndarray | None,
    weights_ohwi: np.ndarray,
    zero: int,
    attrs: Mapping[str, Any],
    output: Sequence[int],
    block: int,
) -> NDArray[np.int32]:
    """Packed bias of an integer `conv_transpose2d`: one `pack_bias_i32` per phase and group.

    The zero point's share is that of the phase's own taps.
    """
    groups = attrs.get("groups", 1)
    biases = [None] * groups if bias is None else np.split(np.asarray(bias), groups)
    return np.concatenate(
        [
            pack_bias_i32(b, taps, zero, block)
            for phase, _ in _transpose_phases(weights_ohwi, attrs, output)
            for b, taps in zip(biases, np.split(phase, groups), strict=True)
        ]
    )


# ------------------------------------------------------------------ integer depthwise convolution

# Rows that one multiply-accumulate of isa/depthwise_*.h takes, by target: of uint8 and of int16.
_DEPTHWISE_ROWS = {"avx512vnni": (4, 2), "avx512": (2, 2), "avx2": (2, 2), "generic": (1, 1)}
_DEPTHWISE_LANES = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "generic": 4}


def _pack_depthwise_integer(
    weights: np.ndarray,
    bias: NDArray[np.int32] | None,
    zero: int,
    attrs: Mapping[str, Any],
    isa: str,
    rows: int,
    dtype: type[np.signedinteger[Any]],
) -> tuple[np.ndarray, NDArray[np.int32]]:
    """Packed weights and bias as depthwise_integer.h describes them; `rows` is its G."""
    channels, kh, kw = weights.shape
    folded = np.zeros(_round_up(channels, _DEPTHWISE_BLOCK), np.int64)
    folded[:channels] = -zero * weights.astype(np.int64).sum((1, 2))
    if bias is not None:
        folded[:channels] += bias
    offset = folded.astype(np.int32)  # the sum wraps as the kernel's does
    (sh, sw), (dh, dw), (top, _, bottom, _) = attrs["stride"], attrs["dilation"], attrs["pad"]
    if kh == 1 and sh == 1 and top == bottom == 0:  # rows are images: the width becomes the height
        kh, kw, sh, dh = kw, 1, sw, dw
    taps = weights.reshape(channels, kh, kw)
    spread = sh // dh if sh % dh == 0 else 0
    groups = -(-kh // rows)
    strip = min(4, 1 + (groups * rows - kh) // spread) if spread else 1
    lanes = _DEPTHWISE_LANES[isa]
    slots = np.zeros((_round_up(channels, lanes), kw, groups * rows, strip), dtype)
    for r in range(strip):
        slots[:channels, :, r * spread : r * spread + kh, r] = taps.transpose(0, 2, 1)
    # [C / L, L, KW, groups, G, R] -> [C / L, KW, groups, R, L, G]
    split = slots.reshape(-1, lanes, kw, groups, rows, strip)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 5, 1, 4)), offset


def _pack_multiplied(
    weights: np.ndarray, bias: NDArray[np.int32] | None, zero: int, dtype: type[np.signedinteger[Any]]
) -> tuple[np.ndarray, NDArray[np.int32]]:
    """[KH * KW, OC] and bias [OC], for a channel multiplier."""
    folded = -zero * weights.astype(np.int64).sum((1, 2))
    if bias is not None:
        folded += bias
    flat = weights.reshape(weights.shape[0], -1).T
    return np.ascontiguousarray(flat, dtype), folded.astype(np.int32)


def pack_depthwise_u8(
    weights: NDArray[np.int8],
    bias: NDArray[np.int32] | None,
    zero: int,
    attrs: Mapping[str, Any],
    isa: str,
    multiplier: int = 1,
) -> tuple[np.ndarray, NDArray[np.int32]]:
    """Packed weights and bias of `depthwise2d<..., uint8_t, zero>`.

    `weights` is [C * multiplier, KH, KW], `attrs` has "stride", "dilation" and "pad"; `isa` is the
    target's name. The weights stay int8 where the target multiplies bytes (avx512vnni, generic) and
    are widened to int16 elsewhere. The bias includes -zero * (sum of the weights), modulo 2^32.
    """
    if weights.shape[0] % multiplier:
        raise ValueError(f"{weights.shape[0]} output channels are no multiple of {multiplier}")
    if multiplier != 1:
        return _pack_multiplied(weights, bias, zero, np.int8)
    rows = _DEPTHWISE_ROWS[isa][0]
    dtype = np.int16 if rows == 2 else np.int8
    return _pack_depthwise_integer(weights, bias, zero, attrs, isa, rows, dtype)


def pack_depthwise_i16(
    weights: NDArray[np.int16],
    bias: NDArray[np.int32] | None,
    zero: int,
    attrs: Mapping[str, Any],
    isa: str,
    multiplier: int = 1,
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Packed weights (int16) and bias of `depthwise2d<..., int16_t, zero>`, as `pack_depthwise_u8`."""
    if weights.shape[0] % multiplier:
        raise ValueError(f"{weights.shape[0]} output channels are no multiple of {multiplier}")
    if multiplier != 1:
        return _pack_multiplied(weights, bias, zero, np.int16)
    return _pack_depthwise_integer(weights, bias, zero, attrs, isa, _DEPTHWISE_ROWS[isa][1], np.int16)


# ------------------------------------------------------------------------------ compressed weights


def pack_compressed(
    weights: np.ndarray, scale: Floats, zero: np.ndarray | None, bias: Floats, bits: int, isa: str, activation: int
) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8], Floats]:
    """(words, scales, zero points, bias) of `compressed_linear`, as compressed.h describes them.

    `weights` [OC, K] holds 0 .. 2^bits - 1; `scale` and `zero` (None: 2^(bits - 1) everywhere, and no zero
    points are packed) are [OC, groups]; `bias` is [OC]. `isa` and the bits of an activation decide the block and
    whether the integers are signed.
    """
    channels, depth = weights.shape
    lanes, step = _BLOCK_VECTORS[isa], 32 // bits
    padded, words = _round_up(channels, lanes), -(-depth // step)
    whole = np.full((padded, words * step), 1 << (bits - 1), np.uint8)
    whole[:channels, :depth] = weights
    if isa != "avx512vnni" or activation == 32:
        whole = (whole - (1 << (bits - 1))).astype(np.uint8) & ((1 << bits) - 1)
    bytes_ = whole.reshape(padded, words, step)
    if bits == 4:
        bytes_ = bytes_[:, :, :4] | bytes_[:, :, 4:] << 4
    packed = np.ascontiguousarray(bytes_.astype(np.uint8)).view(np.uint32).reshape(padded, words)

    def blocks(rows: np.ndarray) -> np.ndarray:
        """[OC, ...] as [OC / block][...][block], flat."""
        block = 4 * lanes
        return np.concatenate([rows[i : i + block].T.ravel() for i in range(0, padded, block)])

    def side(values: np.ndarray) -> np.ndarray:
        full = np.zeros((padded, values.shape[1]), values.dtype)
        full[:channels] = values
        return blocks(full)

    zeros = np.zeros(0, np.uint8) if zero is None else side(np.asarray(zero, np.uint8))
    full_bias = np.zeros(padded, np.float32)
    full_bias[:channels] = bias
    return blocks(packed).view(np.uint8), side(np.asarray(scale, np.float32)), zeros, full_bias


def compressed_scratch_bytes(rows: int, depth: int, bits: int, activation: int, group: int, isa: str) -> int:
    """`compressed_linear::scratch_bytes()` for one part."""
    bytes_ = isa == "avx512vnni" and activation < 32
    halves = activation // 8 if bytes_ else 1
    half = _round_up(_round_up(depth, 32 // bits) * (1 if bytes_ else 4), 64) + 64
    sums = -(-depth // group) * halves if bytes_ else 0
    row = _round_up(half * halves + 4 * sums, 64) + 64
    most = 256 * 1024 // row // 4 * 4
    return (min(rows, 4) if most < 4 else min(most, rows)) * row
