"""Integer depthwise convolution equals NumPy's 64-bit sums bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from batch import CTYPE, Case, angle, check
from driver import INTEGER_ISA_FLAGS, cpu_isas
from numpy.typing import NDArray

from skive import pack

FILL = 77  # what batch.py writes into results beforehand


@dataclass(frozen=True)
class Layer:
    """One depthwise convolution of `dtype`; `xs` and `ys` are extra elements between pixels."""

    dtype: type
    image: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    zero: int = 0
    xs: int = 0
    ys: int = 0

    @property
    def weight_dtype(self) -> type:
        return np.int8 if self.dtype is np.uint8 else np.int16

    @property
    def channels(self) -> int:
        return self.image[3] * self.multiplier

    @property
    def attrs(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.stride, "pad": self.pad, "dilation": self.dilation}

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, h, w, _ = self.image
        t, left, b, r = self.pad
        oh = (h + t + b - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        ow = (w + left + r - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return n, oh, ow, self.channels

    def cpp(self) -> str:
        return angle(
            "depthwise2d",
            angle("Image", *self.image),
            angle("Kernel", self.channels, *self.kernel),
            angle("Stride", *self.stride),
            angle("Pad", *self.pad),
            angle("Dilation", *self.dilation),
            self.image[3] + self.xs,
            self.channels + self.ys,
            CTYPE[np.dtype(self.dtype)],
            self.zero,
        )


def random_layers(count: int, seed: int = 1) -> list[Layer]:
    """Random shapes with a non-empty output; the same ones on every run."""
    choose = random.Random(seed)
    layers: list[Layer] = []
    while len(layers) < count:
        dtype = choose.choice([np.uint8, np.uint8, np.int16])
        layer = Layer(
            dtype=dtype,
            image=(choose.choice([1, 2]), choose.randint(1, 14), choose.randint(1, 24),
                   choose.choice([1, 3, 8, 16, 17, 24, 32, 33, 40, 56, 71, 100])),
            kernel=(choose.choice([1, 2, 3, 3, 4, 5]), choose.choice([1, 2, 3, 3, 5, 7])),
            stride=(choose.choice([1, 1, 2, 3]), choose.choice([1, 1, 2, 3])),
            pad=(choose.randint(0, 3), choose.randint(0, 3), choose.randint(0, 3), choose.randint(0, 3)),
            dilation=(choose.choice([1, 1, 1, 2, 3]), choose.choice([1, 1, 1, 2, 5])),
            multiplier=choose.choice([1, 1, 1, 1, 1, 2, 19]),
            zero=choose.choice([0, choose.randint(0, 255)]),
            xs=choose.choice([0, 5]),
            ys=choose.choice([0, 3]),
        )  # fmt: skip
        if min(layer.output) > 0 and layer.channels < 400:
            layers.append(layer)
    return layers


LAYERS = [
    Layer(np.uint8, (1, 14, 14, 80), (3, 3), pad=(1, 1, 1, 1), zero=128),
    Layer(np.uint8, (2, 15, 15, 64), (3, 3), (2, 2), pad=(0, 0, 1, 1), zero=3),
    Layer(np.uint8, (1, 25, 5, 64), (3, 3), pad=(1, 1, 1, 1)),
    Layer(np.uint8, (1, 7, 7, 72), (5, 5), pad=(2, 2, 2, 2), zero=255),
    Layer(np.uint8, (1, 13, 14, 40), (5, 5), (2, 2), pad=(1, 1, 2, 2), zero=17),
    Layer(np.uint8, (1, 12, 11, 9), (7, 7), pad=(3, 3, 3, 3), zero=1),
    Layer(np.uint8, (1, 1, 60, 17), (1, 3), pad=(0, 16, 0, 0), dilation=(1, 8), zero=9),  # causal
    Layer(np.uint8, (1, 60, 1, 17), (3, 1), pad=(16, 0, 0, 0), dilation=(8, 1), zero=9),
    Layer(np.uint8, (1, 1, 12, 5), (1, 3), pad=(0, 20, 0, 20), dilation=(1, 20), zero=4),  # border only
    Layer(np.uint8, (1, 1, 40, 36), (1, 31), pad=(0, 15, 0, 15), zero=50),
    Layer(np.uint8, (1, 40, 37, 5), (31, 31), pad=(15, 15, 15, 15), zero=50),
    Layer(np.uint8, (2, 3, 20, 33), (1, 5), (1, 2), pad=(0, 2, 0, 2), zero=77),  # independent rows
    Layer(np.uint8, (1, 9, 9, 6), (1, 1), (2, 2)),
    Layer(np.uint8, (1, 5, 150, 44), (3, 3), pad=(1, 1, 1, 1), zero=6),  # wider than one stage
    Layer(np.uint8, (1, 11, 9, 35), (3, 3), (1, 2), pad=(2, 0, 2, 1), dilation=(2, 1), zero=99),
    Layer(np.uint8, (1, 2, 700, 24), (1, 9), pad=(0, 4, 0, 4), zero=31),  # the same
    Layer(np.uint8, (1, 17, 6, 20), (9, 1), pad=(4, 0, 4, 0), zero=31),
    Layer(np.uint8, (1, 1, 40, 5), (1, 15), pad=(0, 2100, 0, 2100), dilation=(1, 300), zero=8),  # too wide to stage
    Layer(np.int16, (1, 14, 14, 33), (3, 3), pad=(1, 1, 1, 1)),
    Layer(np.int16, (1, 9, 14, 40), (5, 5), (2, 2), pad=(2, 2, 2, 2), zero=-300),
    Layer(np.int16, (1, 25, 5, 64), (3, 3), pad=(1, 1, 1, 1)),
]


def reference(x: NDArray[np.generic], w: NDArray[np.generic], layer: Layer) -> NDArray[np.int64]:
    """Sums of (x - zero) * w in 64 bits: x [N, H, W, C], w [OC, KH, KW] -> [N, OH, OW, OC]."""
    t, left, b, r = layer.pad
    centred = np.pad(x.astype(np.int64) - layer.zero, ((0, 0), (t, b), (left, r), (0, 0)))
    centred = centred.repeat(layer.multiplier, axis=-1)
    _, oh, ow, _ = layer.output
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    y = np.zeros(layer.output, np.int64)
    for kh in range(layer.kernel[0]):
        for kw in range(layer.kernel[1]):
            rows = slice(kh * dh, kh * dh + (oh - 1) * sh + 1, sh)
            columns = slice(kw * dw, kw * dw + (ow - 1) * sw + 1, sw)
            y += centred[:, rows, columns] * w[:, kh, kw].astype(np.int64)
    return y


def spread(values: NDArray[np.generic], extra: int, fill: int) -> NDArray[np.generic]:
    """Pixels of `values` [N, H, W, C] with `extra` elements between them: [N * H * W, C + extra]."""
    flat = values.reshape(-1, values.shape[-1])
    return np.pad(flat, ((0, 0), (0, extra)), constant_values=fill)


def operands(layer: Layer, rng: np.random.Generator, extremes: bool) -> tuple[NDArray[np.generic], ...]:
    """x, w and bias; 16-bit weights keep the sums within 32 bits, `extremes` are the ends of the ranges."""
    info, winfo = np.iinfo(layer.dtype), np.iinfo(layer.weight_dtype)
    most = winfo.max if layer.dtype is np.uint8 else (2**14) // int(np.prod(layer.kernel))
    least = winfo.min if layer.dtype is np.uint8 else -most
    taps = (layer.channels, *layer.kernel)
    if extremes:
        x = rng.choice([info.min, info.max, info.max], layer.image)
        w = rng.choice([least, least, most], taps)
    else:
        x = rng.integers(info.min, info.max, layer.image, endpoint=True)
        w = rng.integers(least, most, taps, endpoint=True)
    bias = rng.integers(-(2**20), 2**20, layer.channels)
    return x.astype(layer.dtype), w.astype(layer.weight_dtype), bias.astype(np.int32)


def packed(
    layer: Layer, w: NDArray[np.generic], bias: NDArray[np.generic] | None, isa: str
) -> tuple[NDArray[np.generic], ...]:
    call = pack.pack_depthwise_u8 if layer.dtype is np.uint8 else pack.pack_depthwise_i16
    return call(w, bias, layer.zero, layer.attrs, isa, layer.multiplier)


IDENTITY = "[](auto sum, ptrdiff_t, int) { return sum; }"
# Sees the coordinates of each value: a factor per channel and a shift per pixel.
SCALE = "[=](auto sum, [[maybe_unused]] ptrdiff_t pixel, [[maybe_unused]] int c) {{ return {expression}; }}"


def case(layer: Layer, isa: str, seed: int, result: type, extremes: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    x, w, bias = operands(layer, rng, extremes)
    sums = reference(x, w, layer) + bias
    assert np.abs(sums).max() < 2**31, "the reference overflows"
    n, oh, ow, oc = layer.output
    factor = np.exp2(rng.integers(-13, -8, oc)).astype(np.float32)
    shift = rng.integers(-9, 9, n * oh * ow).astype(np.int32)
    lanes = "decltype(sum)::lanes"
    moved = f"sum + splat<{lanes}>(x4[pixel])"
    offset = sums + shift.reshape(n, oh, ow, 1)
    if result is np.int32:
        text, want = moved, offset.astype(np.int32)
    else:
        scaled = offset.astype(np.float32) * factor
        if result is np.float32:
            text, want = f"to_float({moved}) * load<{lanes}>(x3 + c)", scaled
        else:
            t, info = CTYPE[np.dtype(result)], np.iinfo(result)
            text = f"requantize<{t}>({moved}, load<{lanes}>(x3 + c), 5)"
            if seed % 2:  # what is left to the store
                text = f"rounded<{t}>(to_float({moved}) * load<{lanes}>(x3 + c), 5)"
            want = np.clip(np.rint(scaled) + 5, info.min, info.max).astype(result)
    epilogue = SCALE.format(expression=text)
    weights, offsets = packed(layer, w, bias, isa)
    source = spread(x, layer.xs, int(np.iinfo(layer.dtype).max))
    return Case(
        f"{layer.cpp()}::run(x0, x1, x2, y0, nullptr, part, {epilogue})",
        [source, weights, offsets, factor, shift],
        [spread(want, layer.ys, FILL)],
    )


HEADERS = ["depthwise_integer.h", "math.h"]
RESULTS = [np.int32, np.uint8, np.float32, np.int8, np.int16]
# Target avx512vnni has a shorter way to interleave rows where the processor permutes bytes (VBMI).
VBMI = "avx512vnni vbmi"


def variants() -> list[str]:
    """The targets that this CPU runs, and avx512vnni with VBMI if it has that."""
    with_vbmi = " avx512vbmi " in Path("/proc/cpuinfo").read_text()
    return [*cpu_isas(INTEGER_ISA_FLAGS), *([VBMI] if with_vbmi else [])]


def check_variant(cases: list[Case], variant: str, folder: Path) -> None:
    extra = ("-mavx512vbmi",) if variant == VBMI else ()
    check(cases, HEADERS, variant.split()[0], folder, flags=("-O2", "-ffp-contract=off", *extra))


@pytest.mark.parametrize("variant", variants())
def test_equals_the_sums_in_64_bits(variant: str, tmp_path: Path) -> None:
    layers = [*LAYERS, *random_layers(24)]
    isa = variant.split()[0]
    cases = [case(layer, isa, i, RESULTS[i % len(RESULTS)]) for i, layer in enumerate(layers)]
    check_variant(cases, variant, tmp_path)


@pytest.mark.parametrize("variant", variants())
def test_extreme_operands_do_not_saturate(variant: str, tmp_path: Path) -> None:
    isa = variant.split()[0]
    chosen = [LAYERS[0], LAYERS[3], LAYERS[13], replace(LAYERS[0], zero=0), replace(LAYERS[1], multiplier=3)]
    cases = [case(layer, isa, i, np.int32, extremes=True) for i, layer in enumerate(chosen)]
    # 255 * -128 in every tap: 16-bit intermediate sums would saturate.
    layer = Layer(np.uint8, (1, 8, 8, 48), (3, 3))
    weights, offsets = packed(layer, np.full((48, 3, 3), -128, np.int8), None, isa)
    x, want = np.full(layer.image, 255, np.uint8), np.full((36, 48), 9 * 255 * -128, np.int32)
    call = f"{layer.cpp()}::run(x0, x1, x2, y0, nullptr, part, {IDENTITY})"
    check_variant([*cases, Case(call, [x, weights, offsets], [want])], variant, tmp_path)


def test_packing_refuses_a_multiplier_that_does_not_divide() -> None:
    attrs = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
    with pytest.raises(ValueError, match="multiple"):
        pack.pack_depthwise_u8(np.zeros((7, 3, 3), np.int8), None, 0, attrs, "avx2", multiplier=2)
    with pytest.raises(ValueError, match="multiple"):
        pack.pack_depthwise_i16(np.zeros((7, 3, 3), np.int16), None, 0, attrs, "avx2", multiplier=2)
