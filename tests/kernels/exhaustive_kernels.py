"""Every integer kernel as a source of random instantiations, with operands and what NumPy makes of them.

A kernel here is a function from a random generator to a `Subject`; `KERNELS` names them all. References are those of
the kernels' own tests, applied to many images at once: sums in float64 (exact, all are integers below 2^53) or int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import test_conv_integer as dense
import test_conv_narrow as narrow
import test_depthwise_integer as depthwise
import test_pool as pool
from batch import CTYPE, angle
from numpy.typing import NDArray
from test_conv import Case, Transposed, reference
from test_integer_norm import exponentials
from test_map import broadcast_strides
from test_pool_integer import _NUMBERED as NUMBERED
from test_pool_integer import number
from test_quantize import floats, saturate
from test_resize import Case as Resize
from test_resize import axis_table
from test_resize_integer import literal

GAP = 77  # what results hold beforehand, and between their pixels afterwards
Array = NDArray[np.generic]
Random = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """Operands of several calls: the first one of each call, those that all calls share, and the results."""

    x: Array  # [calls, ...]
    rest: Callable[[str], list[Array]]  # by target: weights are packed for it
    want: Array  # [calls, ...]


@dataclass(frozen=True)
class Subject:
    """One instantiation. In the C++ text, x0, x1 ... are the operands, y0 the result."""

    text: Callable[[str], str]
    draw: Callable[[Random, int, bool], Sample]  # generator, calls, whether the operands are the worst possible
    outputs: int  # of one call
    work: int  # of one call, multiply-adds or the like
    scratch: Callable[[str], str] | None = None  # the type that has scratch_bytes


@dataclass(frozen=True)
class Kernel:
    """What `make` draws needs these headers and this text before it."""

    make: Callable[[Random], Subject]
    headers: tuple[str, ...]
    prelude: str = ""


def apart(values: Array, extra: int) -> Array:
    """Each pixel of [calls, ..., C] with `extra` elements of GAP behind it: [calls, pixels, C + extra]."""
    flat = values.reshape(values.shape[0], -1, values.shape[-1])
    return np.pad(flat, ((0, 0), (0, 0), (0, extra)), constant_values=GAP)


def any_of(dtype: type, rng: Random, shape: tuple[int, ...]) -> Array:
    """Values of the whole range."""
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def choice(rng: Random, *options: int) -> int:
    return int(rng.choice(options))


# Convolutions and products with constants

_FIXED = "requantize_fixed<{out}>({plain}, load<L>(multiplier + channel), load<L>(places + channel), {out_zero})"


def _fixed(sums: NDArray[np.int64], multiplier: Array, shift: Array, zero: int, to: type) -> Array:
    """The row `requantize_fixed` of the operation table, in 64 bits."""
    m, s = multiplier.astype(np.int64), shift.astype(np.int64)
    wide = ((sums * m + (np.int64(1) << (s - 1))) >> s) + zero
    return np.clip(wide, np.iinfo(to).min, np.iinfo(to).max).astype(to)


def _convolution(case: Case, kind: dense.Kind, fixed: bool) -> Subject:
    n, oh, ow, oc = case.output
    pixels = n * oh * ow
    limits = np.iinfo(np.int32 if kind.spill else kind.out)

    def text(isa: str) -> str:
        epilogue = (_FIXED if fixed else kind.epilogue).format(
            plain=dense._PLAIN, low=limits.min, high=limits.max, out=CTYPE[np.dtype(kind.out)], out_zero=kind.out_zero,
            bounded=str(kind.bounded).lower())  # fmt: skip
        return (
            "[[maybe_unused]] auto *offset = x3, *shift = x4, *multiplier = x6, *places = x7; "
            "[[maybe_unused]] auto* factor = x5; "
            f"{dense.text(case, kind, isa)}::run(x0, x1, x2, y0, scratch, part, "
            "[=](auto acc, [[maybe_unused]] ptrdiff_t pixel, [[maybe_unused]] int channel) "
            "__attribute__((always_inline)) { [[maybe_unused]] constexpr int L = decltype(acc)::lanes; "
            f"return {epilogue}; }})"
        )

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        many = replace(case, image=(calls * n, *case.image[1:]))
        x, w, bias = dense.operands(many, kind, int(rng.integers(2**31)), worst)
        sums = reference(many, x.astype(np.float64) - kind.zero, w.astype(np.float64), bias.astype(np.float64))
        sums = sums.astype(np.int64).reshape(-1, oc)
        largest = max(1.0, float(np.abs(sums).max()))
        offset, shift = rng.integers(-100, 100, oc, np.int32), rng.integers(-100, 100, pixels, np.int32)
        # Most results inside the range, some at ties, some far outside unless the kernel may rely on bounds.
        spread = (limits.max - limits.min) / (2 * largest)
        factor = np.exp2(np.round(np.log2(spread) + rng.uniform(-3, 3, oc))).astype(np.float32)
        factor[::3] *= np.float32(1.1)
        if not kind.bounded and not kind.spill:
            factor[-1] = 1e25
        multiplier = rng.integers(2**30, 2**31, oc).astype(np.int32)
        places = np.clip(31 - np.round(np.log2(spread) + rng.uniform(-3, 3, oc)), 1, 62).astype(np.int32)
        shifts = np.tile(shift, calls)
        if fixed:
            plain = dense.wrapped(sums + offset + shifts[:, None], np.int32).astype(np.int64)
            want = _fixed(plain, multiplier, places, kind.out_zero, kind.out)
        else:
            want = dense.epilogue_result(kind, sums, offset, shifts, factor)
        return Sample(
            apart(x.reshape(calls, -1, case.image[3]), case.xs),
            lambda isa: [*dense.packed_operands(case, kind, w, bias, case.nb(isa)), offset, shift, factor,
                         multiplier, places],
            apart(want.reshape(calls, pixels, oc), case.ys),
        )  # fmt: skip

    taps = case.kernel[1] * case.kernel[2] * case.image[3] // case.groups
    return Subject(text, draw, pixels * oc, pixels * oc * taps, lambda isa: dense.text(case, kind, isa))


def _kind(rng: Random, size: int, spill: bool) -> tuple[dense.Kind, bool]:
    """An epilogue for operands of `size` bytes, and whether requantize_fixed takes its place."""
    plain = dense.U8 if size == 1 else dense.I16
    kinds = [plain, *(k for k in dense.NARROW if k.size == size), *(dense.WIDE if spill and size == 2 else [])]
    if rng.random() < 0.2:
        out = [np.uint8, np.int8, np.int16][int(rng.integers(3))]
        return replace(plain, out=out, out_zero=choice(rng, 0, 3, -7)), True
    return kinds[int(rng.integers(len(kinds)))], False


def convolution(size: int, transposed: bool = False) -> Callable[[Random], Subject]:
    """Dense and grouped convolutions, or transposed ones, over elements of `size` bytes."""

    def make(rng: Random) -> Subject:
        while True:
            groups = choice(rng, 1, 1, 1, 2, 3, 5)
            channels = groups * choice(rng, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 130)
            outputs = groups * choice(rng, 1, 2, 4, 7, 8, 15, 16, 17, 32, 33, 48, 64, 70, 130)
            window = choice(rng, 1, 1, 2, 3, 3, 5), choice(rng, 1, 1, 2, 3, 3, 5)
            strides = (1, 1, 2) if transposed else (1, 1, 1, 2, 3)
            stride = choice(rng, *strides), choice(rng, *strides)
            dilation = choice(rng, 1, 1, 1, 2, 3), choice(rng, 1, 1, 1, 2, 3)
            most = 12 if transposed else 23
            image = (choice(rng, 1, 1, 2), int(rng.integers(1, most)), int(rng.integers(1, most)), channels)
            pad = tuple(choice(rng, 0, 0, 1, 2, 3) for _ in range(4)) if rng.random() < 0.6 else (0, 0, 0, 0)
            block = choice(rng, 4, 8, 12, 16, 24, 32, 36, 48, 64) if rng.random() < 0.5 else None
            case = (Transposed if transposed else Case)(
                image, (outputs, *window), stride, pad, dilation, groups, choice(rng, 0, 0, 1, 5),
                choice(rng, 0, 0, 1, 9), block)  # fmt: skip
            work = math.prod(image) * outputs // groups * math.prod(window)
            if min(case.output) > 0 and 0 < work < 2_000_000:
                return _convolution(case, *_kind(rng, size, spill=not transposed))

    return make


def narrow_convolution(rng: Random) -> Subject:
    """Convolutions of few output channels with pixels in the lanes; the dense kernel where there is no such one."""
    while True:
        channels, outputs = 4 * choice(rng, 1, 2, 3, 4, 5, 6, 8, 14), int(rng.integers(1, 15))
        window = choice(rng, 1, 1, 2, 3, 3, 3, 5), choice(rng, 1, 1, 2, 3, 3, 3, 5)
        image = choice(rng, 1, 1, 2), int(rng.integers(1, 23)), int(rng.integers(1, 70)), channels
        pad = [int(rng.integers(0, window[i % 2])) for i in range(4)]
        case = Case(image, (outputs, *window), pad=(pad[0], pad[1], pad[2], pad[3]), xs=choice(rng, 0, 0, 1, 8),
                    ys=choice(rng, 0, 0, 1, 9))  # fmt: skip
        if min(case.output) > 0 and math.prod(image) * outputs * math.prod(window) < 2_000_000:
            break
    kind = narrow.KINDS[int(rng.integers(len(narrow.KINDS)))]
    subject = _convolution(case, kind, fixed=False)

    def text(isa: str) -> str:
        if isa != narrow.ISA:
            return subject.text(isa)
        return (
            "[[maybe_unused]] auto *offset = x3, *shift = x4; [[maybe_unused]] auto* factor = x5; "
            f"{narrow.narrow_text(case, kind)}::run(x0, x1, x2, y0, scratch, part, "
            "[=](auto acc, ptrdiff_t pixel, auto channel) __attribute__((always_inline)) "
            f"{{ constexpr int L = decltype(acc)::lanes; return {narrow.narrow_epilogue(kind, case, False)}; }})"
        )

    return replace(
        subject,
        text=text,
        scratch=lambda isa: narrow.narrow_text(case, kind) if isa == narrow.ISA else dense.text(case, kind, isa),
    )


def linear(size: int) -> Callable[[Random], Subject]:
    """Products with a constant matrix, as they are lowered: convolutions of 1x1 pixels."""

    def make(rng: Random) -> Subject:
        rows = choice(rng, 1, 1, 2, 3, 5, 8, 13, 14, 16, 31, 50, 197)
        inner = choice(rng, 1, 2, 3, 5, 7, 8, 13, 31, 64, 100, 192, 333, 640)
        columns = choice(rng, 1, 2, 5, 8, 10, 16, 17, 33, 64, 100, 128, 200)
        image = [(rows, 1, 1, inner), (1, rows, 1, inner), (1, 1, rows, inner)][int(rng.integers(3))]
        block = choice(rng, 4, 8, 16, 32, 48, 64) if rng.random() < 0.4 else None
        case = Case(image, (columns, 1, 1), xs=choice(rng, 0, 0, 3), ys=choice(rng, 0, 0, 5), block=block)
        return _convolution(case, *_kind(rng, size, spill=True))

    return make


def depthwise_convolution(dtype: type) -> Callable[[Random], Subject]:
    """Depthwise convolutions with and without a channel multiplier."""

    def make(rng: Random) -> Subject:
        while True:
            [layer] = depthwise.random_layers(1, int(rng.integers(2**31)))
            if layer.dtype is dtype:
                return _depthwise(layer, rng)

    return make


def _depthwise(layer: depthwise.Layer, rng: Random) -> Subject:
    n, oh, ow, oc = layer.output
    pixels = n * oh * ow
    to = [np.int32, np.float32, np.uint8, np.int8, np.int16][int(rng.integers(5))]
    fixed = bool(rng.random() < 0.3) and to not in (np.int32, np.float32)
    zero = int(rng.integers(-100, 100))
    lanes = "decltype(sum)::lanes"
    moved = f"sum + splat<{lanes}>(x4[pixel])"
    t = CTYPE[np.dtype(to)]
    if to is np.int32:
        result = moved
    elif to is np.float32:
        result = f"to_float({moved}) * load<{lanes}>(x3 + c)"
    elif fixed:
        result = f"requantize_fixed<{t}>({moved}, load<{lanes}>(x5 + c), load<{lanes}>(x6 + c), {zero})"
    else:
        result = f"requantize<{t}>({moved}, load<{lanes}>(x3 + c), {zero})"
    epilogue = (f"[=](auto sum, [[maybe_unused]] ptrdiff_t pixel, [[maybe_unused]] int c) "
                f"__attribute__((always_inline)) {{ return {result}; }}")  # fmt: skip

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        many = replace(layer, image=(calls * n, *layer.image[1:]))
        x, w, bias = depthwise.operands(many, rng, extremes=worst)
        shift = rng.integers(-9, 9, pixels).astype(np.int32)
        sums = depthwise.reference(x, w, many).reshape(-1, oc) + bias + np.tile(shift, calls)[:, None]
        assert np.abs(sums).max() < 2**31, "the reference overflows"
        factor = np.exp2(rng.integers(-13, -3, oc)).astype(np.float32)
        factor[::3] *= np.float32(1.1)
        multiplier = rng.integers(-(2**31), 2**31, oc).astype(np.int32)
        places = rng.integers(32, 48, oc).astype(np.int32)
        if to is np.int32:
            want: Array = sums.astype(np.int32)
        elif to is np.float32:
            want = sums.astype(np.float32) * factor
        elif fixed:
            want = _fixed(sums, multiplier, places, zero, to)
        else:
            want = saturate(sums.astype(np.float32) * factor, np.array(zero), to)
        return Sample(
            apart(x.reshape(calls, -1, layer.image[3]), layer.xs),
            lambda isa: [*depthwise.packed(layer, w, bias, isa), factor, shift, multiplier, places],
            apart(want.reshape(calls, pixels, oc), layer.ys),
        )

    call = f"{layer.cpp()}::run(x0, x1, x2, y0, nullptr, part, {epilogue})"
    return Subject(lambda isa: call, draw, pixels * oc, pixels * oc * math.prod(layer.kernel))


def matmul(rng: Random) -> Subject:
    """Products of two activations of one integer type, in the type of the result."""
    dtype, to = [(np.uint8, np.int32), (np.int8, np.int32), (np.int16, np.int32), (np.int32, np.int32),
                 (np.int64, np.int64)][int(rng.integers(5))]  # fmt: skip
    batch, m, n = choice(rng, 1, 1, 2, 3), int(rng.integers(1, 30)), int(rng.integers(1, 40))
    k = choice(rng, 1, 2, 3, 7, 8, 16, 33, 64)
    left, right = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    shared = bool(rng.random() < 0.3)
    kernel = angle("plain_matmul", CTYPE[np.dtype(dtype)], CTYPE[np.dtype(to)], angle("Shape", batch), m, k, n,
                   angle("Strides", m * k), angle("Strides", 0 if shared else k * n), str(left).lower(),
                   str(right).lower())  # fmt: skip

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        a = any_of(dtype, rng, (calls, batch, k, m) if left else (calls, batch, m, k))
        b = any_of(dtype, rng, (1 if shared else batch, *((n, k) if right else (k, n))))
        if worst:
            a[...], b[...] = np.iinfo(dtype).min, np.iinfo(dtype).min
            a[..., ::2] = np.iinfo(dtype).max
        p, q = a.swapaxes(-1, -2) if left else a, b.swapaxes(-1, -2) if right else b
        with np.errstate(over="ignore"):
            want = np.matmul(p.astype(to), q.astype(to))
        return Sample(a, lambda isa: [b], want)

    return Subject(lambda isa: f"{kernel}::run(x0, x1, y0, part)", draw, batch * m * n, batch * m * n * k)


# Pooling and resampling

INTEGERS = [np.uint8, np.int8, np.int16, np.uint16]
_NUMBER = "[](auto v, ptrdiff_t pixel, int channel) { return numbered(v, pixel, channel); }"


def _window(rng: Random) -> pool.Case:
    while True:
        pad = tuple(int(v) for v in rng.integers(0, 3, 4))
        if rng.random() < 0.15:  # the whole image
            size = int(rng.integers(1, 20)), int(rng.integers(1, 20))
            case = pool.Case((choice(rng, 1, 2), *size, choice(rng, 1, 3, 16, 33, 64, 100, 130, 256)), size,
                             xs=choice(rng, 0, 5))  # fmt: skip
        else:
            case = pool.Case(
                (choice(rng, 1, 2), int(rng.integers(1, 14)), int(rng.integers(1, 24)),
                 choice(rng, 1, 3, 7, 16, 17, 33, 40, 64, 65, 96, 130)),
                (choice(rng, 1, 2, 3, 5), choice(rng, 1, 2, 3, 7)), (choice(rng, 1, 2), choice(rng, 1, 2, 3)),
                pad if rng.random() < 0.6 else (0, 0, 0, 0), dilation=(choice(rng, 1, 1, 2), choice(rng, 1, 1, 2)),
                xs=choice(rng, 0, 5), ys=choice(rng, 0, 3))  # fmt: skip
        if min(case.output) > 0:
            return case


def _pooled(x: NDArray[np.int32], window: pool.Case, border: int, add: np.ufunc) -> NDArray[np.int32]:
    """Every window's elements joined by `add`; `border` lies around the image."""
    t, left, b, r = window.pad
    padded = np.pad(x, ((0, 0), (t, b), (left, r), (0, 0)), constant_values=border)
    _, oh, ow, _ = window.output
    if (oh, ow) == (1, 1) and window.dilation == (1, 1):
        inside = padded[:, : window.kernel[0], : window.kernel[1]]
        return add.reduce(inside.reshape(x.shape[0], -1, x.shape[3]), axis=1, dtype=np.int32)[:, None, None]
    (sh, sw), (dh, dw) = window.stride, window.dilation
    total = None
    for kh in range(window.kernel[0]):
        for kw in range(window.kernel[1]):
            tap = padded[:, kh * dh : kh * dh + (oh - 1) * sh + 1 : sh, kw * dw : kw * dw + (ow - 1) * sw + 1 : sw]
            total = tap.copy() if total is None else add(total, tap, out=total)
    assert total is not None
    return total


def pooling(name: str) -> Callable[[Random], Subject]:
    """max_pool2d, or sum_pool2d with and without what makes a mean of it."""

    def make(rng: Random) -> Subject:
        window, dtype = _window(rng), INTEGERS[int(rng.integers(4))]
        info, t = np.iinfo(dtype), CTYPE[np.dtype(dtype)]
        shape, c = window.output, window.image[3]
        taps = math.prod(window.kernel)
        zero = choice(rng, 0, info.max, info.min, 3)
        kernel = window.cpp()["max"]
        mean = name == "sum" and bool(rng.random() < 0.5)
        numbered = not mean and bool(rng.random() < 0.7 or name == "sum")
        epilogue = f", {_NUMBER}" if numbered else ""
        factor = np.float32(1 / taps) * np.float32(rng.uniform(0.5, 2))
        if name == "sum":
            kernel = kernel.replace("max_pool2d", "sum_pool2d")[:-1] + f", {t}, {zero}>"
            if mean:
                epilogue = (f", [](auto v, ptrdiff_t, int) {{ return requantize<{t}>(v, {float(factor)!r}f, "
                            f"{t}({zero})); }}")  # fmt: skip

        def draw(rng: Random, calls: int, worst: bool) -> Sample:
            many = replace(window, image=(calls * window.image[0], *window.image[1:]))
            x = any_of(dtype, rng, many.image)
            if worst:
                x[...] = info.max if zero < info.max else info.min
            wide = x.astype(np.int32)
            total = (_pooled(wide, many, info.min, np.maximum) if name == "max" else
                     _pooled(wide - zero, many, 0, np.add))  # fmt: skip
            total = total.reshape(calls, *shape).astype(np.int64)
            if mean:
                want = saturate(total.astype(np.float32) * factor, np.array(zero), dtype)
            elif numbered:
                want = (total + number(shape)).astype(np.int32)
            else:
                want = total.astype(dtype)
            return Sample(apart(x.reshape(calls, -1, c), window.xs), lambda isa: [], apart(want, window.ys))

        call = f"{kernel}::run(x0, y0, nullptr, part{epilogue})"
        return Subject(lambda isa: call, draw, math.prod(shape), math.prod(shape) * taps)

    return make


def resize(rng: Random) -> Subject:
    """Nearest neighbours copied, and float32 sums over one to four neighbours per axis."""
    dtype = INTEGERS[int(rng.integers(4))]
    copy = bool(rng.random() < 0.3)
    taps = (1, 1) if copy else (choice(rng, 1, 2, 4), choice(rng, 1, 2, 4))
    size = Resize((choice(rng, 1, 2), int(rng.integers(1, 9)), int(rng.integers(1, 9)),
                   choice(rng, 1, 3, 5, 16, 17, 33, 64, 70)), (int(rng.integers(1, 18)), int(rng.integers(1, 18))),
                  taps, xs=choice(rng, 0, 2), ys=choice(rng, 0, 3))  # fmt: skip
    n, h, w, c = size.image
    axes = [axis_table(length, out, k) for length, out, k in zip((h, w), size.size, taps, strict=True)]
    text, spelled = "", []
    for name, (sources, weights) in zip(("rows", "columns"), axes, strict=True):
        text += literal(sources).format(name=name)
        if weights is not None:
            text += literal(weights).format(name=name + "_weights")
        spelled.append(f"{{{name}, {'nullptr' if weights is None else name + '_weights'}}}")
    (rows, row_weights), (columns, column_weights) = axes
    plain = row_weights is None and column_weights is None

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        x = any_of(dtype, rng, (calls * n, h, w, c))
        if worst:
            x[...] = np.iinfo(dtype).max
        if plain:
            want: Array = x[:, rows[:, 0]][:, :, columns[:, 0]].astype(dtype if copy else np.int32)
        else:
            rw = np.ones(rows.shape, np.float32) if row_weights is None else row_weights
            cw = np.ones(columns.shape, np.float32) if column_weights is None else column_weights
            total = None
            for r in range(rows.shape[1]):
                for k in range(columns.shape[1]):
                    tap = x[:, rows[:, r]][:, :, columns[:, k]].astype(np.float32)
                    term = tap * (rw[:, r][:, None] * cw[:, k][None, :])[None, :, :, None]
                    total = term if total is None else total + term
            assert total is not None
            want = total
        return Sample(apart(x.reshape(calls, -1, c), size.xs), lambda isa: [],
                      apart(want.reshape(calls, -1, c), size.ys))  # fmt: skip

    fn = "NoEpilogue{}" if copy else "[](auto v, ptrdiff_t, int) { return v; }"
    outputs = n * size.size[0] * size.size[1] * c
    call = f"{text}{size.cpp()}::run(x0, {', '.join(spelled)}, y0, nullptr, part, {fn})"
    return Subject(lambda isa: call, draw, outputs, outputs * taps[0] * taps[1])


# Elementwise

def _broadcast(rng: Random) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """A shape, that of an operand broadcast to it, and the tags of both."""
    rank = choice(rng, 1, 2, 2, 3, 4)
    full = tuple(int(v) for v in (*rng.integers(1, 9, rank - 1), choice(rng, 1, 3, 7, 16, 33, 64, 100, 400)))
    other = tuple(d if rng.random() < 0.6 else 1 for d in full)[int(rng.integers(rank)) :]
    tags = [angle("Shape", *full), angle("Strides", *broadcast_strides(full, full))]
    return full, other, [*tags, angle("Strides", *broadcast_strides(other, full))]


def elementwise(name: str) -> Callable[[Random], Subject]:
    """Maps of quantize, dequantize, requantize or requantize_fixed with parameters per tensor or broadcast."""

    def make(rng: Random) -> Subject:
        full, other, (shape, dense_strides, other_strides) = _broadcast(rng)
        narrow = INTEGERS[int(rng.integers(4))]
        special = floats(rng)
        t, size = CTYPE[np.dtype(narrow)], math.prod(full)
        source = {
            "quantize": np.float32,
            "dequantize": [*INTEGERS, np.int32][int(rng.integers(5))],
            "requantize": [np.int32, np.float32][int(rng.integers(2))],
            "requantize_fixed": np.int32,
        }[name]
        operands = "a, s, p, z" if name == "requantize_fixed" else "a, s, z"
        extra = 3 if name == "requantize_fixed" else 2
        to = "" if name == "dequantize" else f"<{t}>"
        names = ", ".join(f"auto {v}" for v in operands.split(", "))
        fn = f"[]({names}) __attribute__((always_inline)) {{ return {name}{to}({operands}); }}"
        tags = [shape, dense_strides, *[other_strides] * extra]
        pointers = ", ".join(f"x{i}" for i in range(extra + 1))
        call = f"{angle('vmap', *tags)}::run(y0, part, {fn}, {pointers})"

        def draw(rng: Random, calls: int, worst: bool) -> Sample:
            zero_type = source if name == "dequantize" else narrow
            zeros = any_of(zero_type, rng, other)
            factors = np.exp(rng.uniform(-20, 20, other)).astype(np.float32)
            if rng.random() < 0.3:
                factors[...] = np.float32(choice(rng, 1, 2) / 4)  # ties
            if source is np.float32:
                # Half of them near the range, a quarter any bits, a quarter ties and special values.
                step = factors if name == "quantize" else np.float32(1) / factors
                x: Array = (rng.random((calls, *full), np.float32) * np.float32(800) - np.float32(400)) * step
                flat = x.reshape(-1)
                flat[::4] = any_of(np.uint32, rng, (len(flat[::4]),)).view(np.float32)
                flat[2::4] = np.resize(rng.permutation(special), len(flat[2::4]))
            else:
                x = any_of(source, rng, (calls, *full))
                if source is np.int32:
                    x = x >> rng.integers(0, 31, (calls, *full))
                    x = x.astype(np.int32)
            if worst:
                x[...] = np.inf if source is np.float32 else np.iinfo(source).min
            with np.errstate(all="ignore"):
                if name == "quantize":
                    want = saturate(x / factors, zeros, narrow)
                elif name == "dequantize":
                    want = (x.astype(np.int32) - zeros.astype(np.int32)).astype(np.float32) * factors
                elif name == "requantize":
                    want = saturate(x.astype(np.float32) * factors, zeros, narrow)
                else:
                    multiplier = rng.integers(-(2**31), 2**31, other).astype(np.int32)
                    places = rng.integers(1, 63, other).astype(np.int32)
                    want = _fixed(x.astype(np.int64), multiplier, places, 0, np.int64)
                    limits = np.iinfo(narrow)
                    want = np.clip(want + zeros.astype(np.int64), limits.min, limits.max).astype(narrow)
                    return Sample(x, lambda isa: [multiplier, places, zeros], want)
            return Sample(x, lambda isa: [factors, zeros], want)

        return Subject(lambda isa: call, draw, size, size)

    return make


def lookup(rng: Random) -> Subject:
    """Any function of a byte, dense and strided."""
    rank = choice(rng, 1, 2, 3)
    full = tuple(int(v) for v in (*rng.integers(1, 12, rank - 1), choice(rng, 1, 5, 31, 32, 63, 64, 65, 130, 700)))
    step = choice(rng, 1, 1, 1, 2)
    to = [np.uint8, np.int8, np.uint8, np.int16, np.float32][int(rng.integers(5))]
    source = [np.uint8, np.int8][int(rng.integers(2))]
    strides = [s * step for s in broadcast_strides(full, full)] if full[-1] > 1 else broadcast_strides(full, full)
    last = step if full[-1] > 1 else 1
    call = f"{angle('lookup', angle('Shape', *full), angle('Strides', *strides))}::run(y0, part, x1, x0)"

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        x = any_of(source, rng, (calls, *full[:-1], full[-1] * last))
        if worst:
            x[...] = np.iinfo(source).min
        table = any_of(to, rng, (256,)) if to is not np.float32 else rng.standard_normal(256).astype(np.float32)
        return Sample(x, lambda isa: [table], table[np.ascontiguousarray(x[..., ::last]).view(np.uint8)])

    return Subject(lambda isa: call, draw, math.prod(full), math.prod(full))


# Softmax and layer normalisation

def softmax(rng: Random) -> Subject:
    """integer_softmax over any axis."""
    outer, n, inner = int(rng.integers(1, 6)), choice(rng, 1, 2, 7, 10, 40, 100, 197, 1100), choice(rng, 1, 1, 1, 3, 8)
    dtype = [np.uint8, np.int8, np.int16][int(rng.integers(3))]
    to = [np.uint8, np.int8, np.int16, np.int32][int(rng.integers(4))]
    wide = dtype is np.int16
    entries = choice(rng, 512, 4096) if wide else 256
    scale = float(rng.uniform(0.002, 0.01) if wide else rng.uniform(0.01, 0.4))
    levels, zero = {np.uint8: (256, 0), np.int8: (256, -128), np.int16: (32768, 0), np.int32: (2**24, 0)}[to]
    table = exponentials(scale, entries, 24 if wide else 16)
    if wide:
        table[-1] = 0
    call = (angle("integer_softmax", CTYPE[np.dtype(dtype)], CTYPE[np.dtype(to)], outer, n, inner, entries)
            + f"::run(x0, x1, y0, part, {levels}, {zero})")  # fmt: skip

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        info = np.iinfo(dtype)
        x = np.clip(rng.normal(0, info.max / 3, (calls, outer, n, inner)), info.min, info.max).astype(dtype)
        if worst:
            x[...] = info.max
        q = x.astype(np.int64)
        e = table[np.minimum(q.max(2, keepdims=True) - q, entries - 1)].astype(np.int64)
        r = (levels << 32) // e.sum(2, keepdims=True)
        want = np.clip(((e * r + (1 << 31)) >> 32) + zero, np.iinfo(to).min, np.iinfo(to).max).astype(to)
        return Sample(x, lambda isa: [table], want)

    return Subject(lambda isa: call, draw, outer * n * inner, 4 * outer * n * inner)


def _square_root(v: NDArray[np.uint64]) -> NDArray[np.int64]:
    """floor(sqrt(v)) of integers below 2^62."""
    root = np.sqrt(v.astype(np.float64)).astype(np.int64)
    root -= root * root > v.astype(np.int64)
    return root + ((root + 1) ** 2 <= v.astype(np.int64))


def layer_norm(rng: Random) -> Subject:
    """integer_layer_norm."""
    rows, n = int(rng.integers(1, 9)), choice(rng, 1, 2, 3, 9, 33, 64, 100, 192, 384)
    dtype = [np.uint8, np.int8, np.int16, np.uint16][int(rng.integers(4))]
    to = [np.uint8, np.int8, np.int16][int(rng.integers(3))]
    limits = np.iinfo(to)
    step, zero, shift = (0.04, (limits.min + limits.max + 1) // 2, 36) if limits.bits == 8 else (1e-3, 0, 32)
    eps = choice(rng, 1, 7, 1000)
    centred, uniform = (bool(b) for b in rng.integers(0, 2, 2))
    x_zero = 0 if centred else choice(rng, 0, np.iinfo(dtype).min, np.iinfo(dtype).max // 2)
    call = (angle("integer_layer_norm", CTYPE[np.dtype(dtype)], CTYPE[np.dtype(to)], rows, n,
                  str(centred).lower(), str(uniform).lower())
            + f"::run(x0, x1, x2, y0, part, {eps}, {shift}, {x_zero}, {zero})")  # fmt: skip

    def draw(rng: Random, calls: int, worst: bool) -> Sample:
        x = any_of(dtype, rng, (calls, rows, n))
        if worst:
            x[...] = np.iinfo(dtype).max  # no variance
            x[..., -1] -= 1
        each = 1 if uniform else n
        scale = np.rint(rng.uniform(-2, 2, each) / step * 2.0 ** (shift - 15)).astype(np.int32)
        bias = np.rint(rng.uniform(-1, 1, each) / step * 2.0**15).astype(np.int32)
        q = x.astype(np.int64) - x_zero
        s = q.sum(2, keepdims=True) * centred
        v = (n * (q * q).sum(2, keepdims=True) - s * s + eps).astype(np.uint64)
        t = np.zeros(v.shape, np.int64)
        for _ in range(31):
            small = v < np.uint64(1 << 60)
            v = np.where(small, v << np.uint64(2), v)
            t += small
        z = ((n * q - s) * ((1 << 61) // _square_root(v)) + (np.int64(1) << (45 - t))) >> (46 - t)
        y = ((z * scale + (bias.astype(np.int64) << (shift - 15)) + (1 << (shift - 1))) >> shift) + zero
        return Sample(x, lambda isa: [scale, bias], np.clip(y, limits.min, limits.max).astype(to))

    return Subject(lambda isa: call, draw, rows * n, 4 * rows * n)


_CONV = ("conv.h", "math.h")
_DEPTHWISE = ("depthwise_integer.h", "math.h")
KERNELS: dict[str, Kernel] = {
    "conv2d u8": Kernel(convolution(1), _CONV),
    "conv2d i16": Kernel(convolution(2), _CONV),
    "narrow_conv2d": Kernel(narrow_convolution, ("conv_narrow.h", "math.h")),
    "depthwise2d u8": Kernel(depthwise_convolution(np.uint8), _DEPTHWISE),
    "depthwise2d i16": Kernel(depthwise_convolution(np.int16), _DEPTHWISE),
    "conv_transpose2d u8": Kernel(convolution(1, transposed=True), _CONV),
    "conv_transpose2d i16": Kernel(convolution(2, transposed=True), _CONV),
    "linear u8": Kernel(linear(1), _CONV),
    "linear i16": Kernel(linear(2), _CONV),
    "matmul": Kernel(matmul, ("matmul.h",)),
    "max_pool2d": Kernel(pooling("max"), ("pool.h", "math.h"), NUMBERED),
    "sum_pool2d": Kernel(pooling("sum"), ("pool.h", "math.h"), NUMBERED),
    "resize2d": Kernel(resize, ("resize.h",)),
    "quantize": Kernel(elementwise("quantize"), ("map.h", "row.h")),
    "dequantize": Kernel(elementwise("dequantize"), ("map.h", "row.h")),
    "requantize": Kernel(elementwise("requantize"), ("map.h", "row.h")),
    "requantize_fixed": Kernel(elementwise("requantize_fixed"), ("map.h", "row.h")),
    "lookup": Kernel(lookup, ("map.h",)),
    "softmax": Kernel(softmax, ("softmax.h",)),
    "layer_norm": Kernel(layer_norm, ("norm.h",)),
}
