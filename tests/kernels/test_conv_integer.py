"""Integer convolution, uint8 x int8 and int16 x int16, against exact sums over the taps."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer
from numpy.typing import NDArray
from test_conv import CASES, Case, Transposed, reference

from skive import pack

# What the epilogue returns. `offset` and `factor` are per channel, `shift` per pixel: it sees both
# coordinates.
_PLAIN = "acc + load<L>(offset + channel) + splat<L>(shift[pixel])"
_CLIPPED = "vmax(splat<L>({low}), vmin(splat<L>({high}), {plain}))"
_SCALED = (
    "(acc + to_float(load<L>(offset + channel))) * load<L>(factor + channel) + to_float(splat<L>(shift[pixel]))"
)
_ROUNDED = "rounded<{out}, {bounded}>(to_float({plain}) * load<L>(factor + channel), {out_zero})"


@dataclass(frozen=True)
class Kind:
    """Element types of an integer convolution, and its epilogue."""

    element: type
    weight: type
    out: type  # of y
    zero: int
    epilogue: str = _PLAIN
    bounded: bool = False
    out_zero: int = 0
    spill: int = 0  # rows of weights whose products fit 32 bits; the epilogue gets float32

    @property
    def size(self) -> int:
        return np.dtype(self.element).itemsize


U8 = Kind(np.uint8, np.int8, np.int32, 131)
I16 = Kind(np.int16, np.int16, np.int32, -3)
NARROW = [
    Kind(np.uint8, np.int8, np.uint8, 3, _CLIPPED),
    Kind(np.uint8, np.int8, np.uint8, 0, _ROUNDED, bounded=True, out_zero=7),
    Kind(np.uint8, np.int8, np.int8, 255, _ROUNDED, out_zero=-128),
    Kind(np.uint8, np.int8, np.uint8, 128, _ROUNDED),
    Kind(np.int16, np.int16, np.int16, 0, _ROUNDED, bounded=True),
    Kind(np.int16, np.int16, np.int16, 0, _ROUNDED, out_zero=5),
    Kind(np.int16, np.int16, np.uint8, 0, _ROUNDED, out_zero=255),
]
# Sums beyond 32 bits, in parts of one pair of products to more than a whole run.
WIDE = [Kind(np.int16, np.int16, np.float32, 0, _SCALED, spill=n) for n in (1, 2, 5, 32)]
CTYPE = {np.float32: "float", np.uint8: "uint8_t", np.int16: "int16_t", np.int32: "int32_t", np.int8: "int8_t"}

# Runs shorter than four bytes and runs that end within them; joined taps of a wider pixel; blocks
# stored by one to four registers.
_SMALL = [
    Case((1, 5, 5, 1), (8, 1, 1)),
    Case((1, 6, 5, 2), (20, 1, 1), stride=(1, 2)),
    Case((2, 5, 7, 1), (6, 3, 3)),
    Case((1, 5, 9, 1), (6, 1, 2), pad=(0, 1, 0, 0)),
    Case((1, 6, 9, 3), (12, 3, 3), xs=2),
    Case((1, 6, 9, 3), (12, 1, 3), dilation=(1, 2)),
    Case((1, 1, 9, 3), (12, 1, 5), xs=1),
    Case((1, 3, 5, 3), (12, 3, 5)),
    Case((2, 3, 4, 3), (12, 3, 4)),
    Case((1, 1, 17, 6), (11, 1, 3)),
    Case((1, 7, 9, 5), (64, 1, 1)),
    Case((1, 3, 15, 9), (16, 1, 1)),
    Case((1, 3, 15, 9), (130, 1, 1), block=64),
    Case((1, 3, 15, 9), (96, 3, 1), block=48, ys=3),
    Case((1, 3, 15, 9), (7, 3, 3), block=4),
    Case((1, 4, 30, 2048), (20, 1, 1)),
    Case((1, 9, 9, 6), (9, 3, 3), pad=(1, 1, 1, 1), groups=3),
    Case((1, 9, 9, 8), (8, 3, 3), pad=(1, 1, 1, 1), stride=(2, 2), groups=8),
    Transposed((1, 4, 5, 3), (5, 3, 3), stride=(2, 2), pad=(1, 1, 1, 1), extra=(1, 1)),
    Transposed((1, 1, 9, 1), (10, 1, 4), stride=(1, 2), pad=(0, 1, 0, 1)),
]
ALL = CASES + _SMALL
JOBS = [(case, U8) for case in ALL] + [(case, I16) for case in ALL[::2]]
JOBS += [(case, NARROW[i % len(NARROW)]) for i, case in enumerate(ALL[1::2] + _SMALL)]
# Every way to store full registers side by side, with pixels left over.
_FULL = [Case((1, 3, 13, 9), (lanes * n, 1, 1), block=lanes * n) for lanes in (4, 8, 16) for n in (1, 2, 4)]
JOBS += [(case, kind) for i, case in enumerate(_FULL) for kind in NARROW[i % 2 : 4 : 2]]

# Tiles of few registers, whose long sums are those of several chains: ends of steps and of turns, rows of taps.
_CHAINED = [
    Case((1, 1, 1, 640), (32, 1, 1)),
    Case((1, 1, 1, 151), (16, 1, 1)),
    Case((1, 1, 3, 257), (20, 1, 1)),
    Case((1, 4, 1, 134), (12, 3, 1), xs=2),
]
JOBS += [(case, kind) for case in _CHAINED for kind in (U8, I16, NARROW[1])]

JOBS += [(case, WIDE[i % len(WIDE)]) for i, case in enumerate(c for c in ALL if not isinstance(c, Transposed))]
JOBS += [(Case((1, 4, 30, 2048), (20, 1, 1)), kind) for kind in WIDE]
# Without a border, which only zeros allow.
JOBS += [(case, kind) for case in ALL if max(case.dilation) > 1 and any(case.pad) for kind in (NARROW[1], NARROW[5])]

_SOURCE = """
#include "skive/conv.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""

_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const %(element)s* x, const %(weight)s* w, const int32_t* bias, %(out)s* y,
                          void* scratch, int part, int parts, const int32_t* offset,
                          const int32_t* shift, [[maybe_unused]] const float* factor) {
  Case%(i)d::run(x, w, bias, y, scratch, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   constexpr int L = decltype(acc)::lanes;
                   return %(epilogue)s;
                 });
}
"""


def source(i: int, case: Case, kind: Kind, isa: str) -> str:
    """The C++ text of job `i`."""
    limits = np.iinfo(np.int32 if kind.spill else kind.out)
    epilogue = kind.epilogue.format(
        plain=_PLAIN, low=limits.min, high=limits.max, out=CTYPE[kind.out], out_zero=kind.out_zero,
        bounded=str(kind.bounded).lower(),
    )  # fmt: skip
    types = {name: CTYPE[getattr(kind, name)] for name in ("element", "weight", "out")}
    return _CASE % {"i": i, "type": text(case, kind, isa), "epilogue": epilogue, **types}


def epilogue_result(
    kind: Kind, sums: NDArray[np.int64], offset: NDArray, shift: NDArray, factor: NDArray
) -> NDArray[np.generic]:
    """What is stored for exact `sums` [pixels, channels]; int32 arithmetic wraps."""
    if kind.spill:
        return (sums.astype(np.float32) + offset.astype(np.float32)) * factor + shift[:, None].astype(np.float32)
    plain = wrapped(sums + offset + shift[:, None], np.int32)
    if kind.epilogue == _PLAIN:
        return plain
    limits = np.iinfo(kind.out)
    if kind.epilogue == _ROUNDED:
        scaled = np.clip(plain.astype(np.float32) * factor, -1e9, 1e9)
        plain = np.rint(scaled).astype(np.int64) + kind.out_zero
    return np.clip(plain, limits.min, limits.max).astype(kind.out)


def text(case: Case, kind: Kind, isa: str) -> str:
    spill = f", {kind.spill}" if kind.spill else ""
    return f"{case.cpp(isa)[:-1]}, {CTYPE[kind.element]}, {kind.zero}{spill}>"


def placed(values: NDArray[np.generic], offset: int) -> NDArray[np.generic]:
    """A copy of `values` that starts `offset` elements after a 64-byte boundary."""
    raw = np.empty(values.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 64 + offset * values.itemsize
    view = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


def strided(values: NDArray[np.generic], extra: int) -> NDArray[np.generic]:
    """Pixels of `values` with `extra` elements of 77 between them, aligned to an element only."""
    flat = values.reshape(-1, values.shape[-1])
    wide = np.full((flat.shape[0], flat.shape[1] + extra), 77, values.dtype)
    wide[:, : flat.shape[1]] = flat
    return placed(wide, 1)


def operands(case: Case, kind: Kind, seed: int, worst: bool) -> tuple[NDArray, NDArray, NDArray]:
    """Input, weights and bias: random over the whole range, or the extremes of it.

    With `spill`, the range of the weights for which its products and 65535 just fit 32 bits, and the whole sum
    40 bits, beyond which it is not rounded once.
    """
    rng = np.random.default_rng(seed)
    oc, kh, kw = case.kernel
    x_range, w_range = np.iinfo(kind.element), np.iinfo(kind.weight)
    w_shape = (oc, kh, kw, case.image[3] // case.groups)
    most = (2**40 - 2**31) // (2**15 * int(np.prod(w_shape[1:])))
    lowest = -min(32767 // kind.spill, most) if kind.spill else w_range.min
    if worst:
        x = np.full(case.image, x_range.max if kind.size == 1 else x_range.min, kind.element)
        w = np.full(w_shape, lowest, kind.weight)
    else:
        x = rng.integers(x_range.min, x_range.max, case.image, kind.element, endpoint=True)
        highest = -lowest if kind.spill else w_range.max
        w = rng.integers(lowest, highest, w_shape, kind.weight, endpoint=True)
    bias = 2**31 - 1 if kind.spill else 2**20
    return x, w, rng.integers(-bias, bias, oc, np.int32, endpoint=True)


def wrapped(values: NDArray[np.int64], to: type) -> NDArray[np.generic]:
    """`values` modulo the range of `to`."""
    return values.astype(f"u{np.dtype(to).itemsize}").view(to)


def packed_operands(
    case: Case, kind: Kind, w: NDArray, bias: NDArray, block: int
) -> tuple[NDArray, NDArray]:
    attrs = {"stride": case.stride, "pad": case.pad, "dilation": case.dilation, "groups": case.groups}
    name = "u8" if kind.size == 1 else "i16"
    if isinstance(case, Transposed):
        weights = getattr(pack, f"pack_conv_transpose2d_{name}")(w, attrs, case.output, block)
        biases = pack.pack_conv_transpose2d_bias_i32(bias, w, kind.zero, attrs, case.output, block)
        return weights, biases
    groups = np.split(w, case.groups)
    packing = getattr(pack, f"pack_conv2d_{name}")
    weights = np.concatenate([packing(g, block, case.dilation) for g in groups])
    shares = zip(np.split(bias, case.groups), groups, strict=True)
    return weights, np.concatenate([pack.pack_bias_i32(b, g, kind.zero, block) for b, g in shares])


def check_case(lib: ctypes.CDLL, index: int, case: Case, kind: Kind, isa: str, worst: bool) -> None:
    x, w, bias = operands(case, kind, index, worst)
    n, oh, ow, oc = case.output
    rng = np.random.default_rng(index)
    offset = placed(rng.integers(-100, 100, oc, np.int32), 0)
    shift = placed(rng.integers(-100, 100, n * oh * ow, np.int32), 0)
    weights, biases = (placed(a, 0) for a in packed_operands(case, kind, w, bias, case.nb(isa)))
    source = strided(x, case.xs)
    attrs = {"stride": case.stride, "pad": case.pad, "dilation": case.dilation, "groups": case.groups}
    need = getattr(lib, f"scratch_{index}")
    need.restype = ctypes.c_long

    # float64 holds these sums exactly: their magnitude is below 2^53.
    centred = x.astype(np.float64) - kind.zero
    sums = reference(case, centred, w.astype(np.float64), bias.astype(np.float64))
    sums = sums.astype(np.int64).reshape(-1, oc)
    # Most results inside the range, some at ties, some far outside unless Bounded forbids it.
    limits = np.iinfo(np.int32 if kind.spill else kind.out)
    spread = (limits.max - limits.min) / max(1.0, 2 * float(np.abs(sums).max()))
    factor = placed(np.exp2(np.round(np.log2(spread) + rng.uniform(-3, 3, oc))).astype(np.float32), 0)
    factor[::3] *= np.float32(1.1)
    if not kind.bounded and not kind.spill:
        factor[-1] = 1e25
    expected = epilogue_result(kind, sums, offset, shift, factor)

    for parts in (1, 3):
        window = case.kernel[1:]
        if isinstance(case, Transposed):
            bound = pack.conv_transpose2d_scratch_bytes(
                case.image, attrs, window, case.output, parts, kind.size
            )
        else:
            bound = pack.conv2d_scratch_bytes(
                case.image, attrs, window, parts, case.image[3] + case.xs, kind.size, None if kind.spill else kind.zero
            )
        assert need(parts) <= bound
        scratch = placed(np.full(need(parts), 0xA5, np.uint8), 0)
        y = strided(np.full(case.output, 5, kind.out), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(
                pointer(source), pointer(weights), pointer(biases), pointer(y), pointer(scratch),
                part, parts, pointer(offset), pointer(shift), pointer(factor),
            )  # fmt: skip
        assert (y[:, oc:] == 77).all(), "wrote between the pixels"
        np.testing.assert_array_equal(y[:, :oc], expected)


def build(
    jobs: Mapping[int, tuple[Case, Kind]], isa: str, folder: Path, flags: tuple[str, ...]
) -> ctypes.CDLL:
    """A library that runs each of `jobs` by its number; skips where the CPU lacks `isa`."""
    if isa not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(source(i, case, kind, isa) for i, (case, kind) in jobs.items())
    return compile_library(_SOURCE % body, isa, folder, flags=(*flags, "-ffp-contract=off"))


# Libraries of a third of the jobs each: all three on the first target, one on each of the others.
THIRDS = [
    (isa, third) for n, isa in enumerate(INTEGER_ISA_FLAGS) for third in (range(3) if n == 0 else [n - 1])
]


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest, libraries: Path) -> tuple[str, ctypes.CDLL]:
    isa, third = request.param
    jobs = {i: JOBS[i] for i in range(third, len(JOBS), 3)}
    return isa, build(jobs, isa, libraries, ("-O0" if isa == "generic" else "-O1",))  # the quicker compile


@pytest.mark.parametrize(
    ("library", "index"), [(each, i) for each in THIRDS for i in range(each[1], len(JOBS), 3)],
    indirect=["library"], ids=lambda v: v[0] if isinstance(v, tuple) else str(v),
)  # fmt: skip
def test_equals_exact_sums(library: tuple[str, ctypes.CDLL], index: int) -> None:
    isa, lib = library
    case, kind = JOBS[index]
    for worst in (False, True):
        check_case(lib, index, case, kind, isa, worst)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INTEGER_ISA_FLAGS)
def test_every_job_equals_exact_sums(isa: str, tmp_path: Path) -> None:
    lib = build(dict(enumerate(JOBS)), isa, tmp_path, ("-O2",))
    for index, (case, kind) in enumerate(JOBS):
        for worst in (False, True):
            check_case(lib, index, case, kind, isa, worst)


def random_job(rng: np.random.Generator) -> tuple[Case, Kind]:
    """Any convolution, grouped or transposed ones among them, of at most 3 million multiply-adds."""
    kinds = [U8, U8, I16, *NARROW, WIDE[0], WIDE[2]]
    while True:
        groups = int(rng.choice([1, 1, 1, 2, 3, 5]))
        channels = groups * int(rng.choice([1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 130]))
        outputs = groups * int(rng.choice([1, 2, 4, 7, 8, 15, 16, 17, 32, 33, 48, 64, 70, 130]))
        two = {
            name: tuple(int(v) for v in rng.choice(values, 2))
            for name, values in (("size", range(1, 24)), ("window", [1, 1, 2, 3, 3, 5]),
                                 ("stride", [1, 1, 1, 2, 3]), ("dilation", [1, 1, 1, 2, 3]))
        }  # fmt: skip
        pad = tuple(int(v) for v in rng.choice([0, 0, 1, 2, 3], 4)) if rng.random() < 0.6 else (0, 0, 0, 0)
        block = int(rng.choice([4, 8, 12, 16, 24, 32, 36, 48, 64])) if rng.random() < 0.5 else None
        kind = Transposed if rng.random() < 0.2 else Case
        case = kind(
            (int(rng.integers(1, 3)), *two["size"], channels), (outputs, *two["window"]), two["stride"],
            pad, two["dilation"], groups, int(rng.choice([0, 0, 1, 5])), int(rng.choice([0, 0, 1, 9])), block,
        )  # fmt: skip
        work = math.prod(case.image) * outputs // groups * math.prod(two["window"])
        if min(case.output) > 0 and 0 < work < 3_000_000:
            chosen = kinds[rng.integers(len(kinds))]
            if not (chosen.spill and isinstance(case, Transposed)):
                return case, chosen


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
@pytest.mark.parametrize("isa", INTEGER_ISA_FLAGS)
def test_random_shapes(isa: str, chunk: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(chunk)
    jobs = [random_job(rng) for _ in range(52)]
    lib = build(dict(enumerate(jobs)), isa, tmp_path, (f"-O{chunk % 4}",))
    for index, (case, kind) in enumerate(jobs):
        for worst in (False, True):
            check_case(lib, index, case, kind, isa, worst)
