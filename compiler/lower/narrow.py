"""Convolutions of bytes with few output channels: whether the kernel with pixels in its lanes takes one, and pays.

`conv_narrow.h` fills its registers whatever the number of channels, for which it moves input and output between the
layouts. What both kernels take is counted in cycles for one output pixel, of a core with one multiply-add of 512
bits per cycle.
"""

from __future__ import annotations

from skive import pack
from skive.ir import Node
from skive.plan import Fn
from skive.targets.base import Target
from skive.types import DType

_LANES = 16
_MOST_CHANNELS = 14  # the sums of two vectors of pixels fit the registers
_MOST_VECTORS = 8
_RESULTS = frozenset((DType.u8, DType.i8, DType.i16, DType.i32, DType.f32))
_OPERANDS = frozenset(("value", "literal", "scalar", "channel", "pixel"))


def narrow_pays(node: Node, target: Target, fn: Fn) -> bool:
    """Whether `conv2d` `node` with epilogue `fn` is computed faster, and at all, with pixels in the lanes."""
    return _fits(node, target, fn) and _narrow_cycles(node, fn) < _dense_cycles(node, fn)


def _fits(node: Node, target: Target, fn: Fn) -> bool:
    x, w = node.inputs[:2]
    oc, kh, kw, ic = w.shape
    top, left, bottom, right = node.attrs["pad"]
    return (
        target.name == "avx512vnni"
        and node.op == "conv2d"
        and x.dtype is DType.u8
        and node.dtype in _RESULTS
        and node.attrs["groups"] == 1
        and tuple(node.attrs["stride"]) == tuple(node.attrs["dilation"]) == (1, 1)
        and ic > 0
        and ic % 4 == 0
        and 0 < oc <= _MOST_CHANNELS
        and max(top, bottom) < kh
        and max(left, right) < kw
        and all(a.mode in _OPERANDS or _is_whole(node, fn, i) for i, a in enumerate(fn.operands))
    )


def _is_whole(node: Node, fn: Fn, operand: int) -> bool:
    """Whether the operand is bytes of the shape of the result, its pixels whole dwords without a gap."""
    access, oc = fn.operands[operand], node.shape[3]
    if access.mode != "full" or access.stride != oc or oc % 4:
        return False
    extra = next((n for i, n in enumerate(node.inputs) if f"e{i - 2}" == access.arg), None)
    return extra is not None and extra.dtype is DType.u8


def _steps(node: Node) -> int:
    """Multiply-adds of four bytes for one result."""
    _, kh, kw, ic = node.inputs[1].shape
    return int(kh * kw * (ic // 4))


def _added(fn: Fn) -> int:
    return sum(a.mode == "full" for a in fn.operands)


def _dense_cycles(node: Node, fn: Fn) -> float:
    """Cycles of conv.h: a step takes half a cycle where the channels fit half a register, and a load of its
    own; the epilogue meets a pixel at a time."""
    step = 0.6 if node.shape[3] <= _LANES // 2 else 1.02
    return _steps(node) * step + 3.8 + 2.4 * _added(fn)


def _narrow_cycles(node: Node, fn: Fn) -> float:
    """Cycles of conv_narrow.h: all lanes are busy except at the end of a row; the copy reorders the input."""
    x, w = node.inputs[:2]
    oc, kh, kw, ic = w.shape
    _, left, _, right = node.attrs["pad"]
    rows, columns = pack.narrow_rows(x.shape, (kh, kw))
    pixels = columns + left + right - kw + 1  # of an output row
    vectors = -(-pixels // _LANES)
    used = pixels / (vectors * _LANES)
    together = min(31 // (oc + 1), _MOST_VECTORS, vectors * rows)
    step = max(oc * together, oc + 1.5 * together, 5) / together / _LANES  # products, loads, latency
    groups = ic // 4
    copy = 0.06 * groups * groups if groups <= 4 else 1.2 * -(-groups // 4)
    if node.dtype.bytes == 1:
        apart = 0.35 * oc if oc > 4 and oc % 4 else 0.0  # pixels are stored one by one
    else:
        apart = 1.2 * oc if oc > 1 else 0.0  # results are
    return (_steps(node) * step + 0.16 * oc * (1 + _added(fn)) + 0.3) / used + copy + apart
