"""Integer convolution, uint8 x int8 and int16 x int16, against exact sums over the taps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer
from numpy.typing import NDArray
from test_conv import CASES, Case, Transposed, reference

from skive import pack


@dataclass(frozen=True)
class Kind:
    """Element types of an integer convolution."""

    element: type
    weight: type
    out: type  # of y; the epilogue keeps the low bits
    zero: int

    @property
    def size(self) -> int:
        return np.dtype(self.element).itemsize


U8 = Kind(np.uint8, np.int8, np.int32, 131)
U8_TO_U8 = Kind(np.uint8, np.int8, np.uint8, 0)
I16 = Kind(np.int16, np.int16, np.int32, 0)
I16_TO_I16 = Kind(np.int16, np.int16, np.int16, -3)
CTYPE = {np.uint8: "uint8_t", np.int16: "int16_t", np.int32: "int32_t", np.int8: "int8_t"}

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
JOBS = [(case, kind) for case in CASES + _SMALL for kind in (U8, I16)]
JOBS += [(case, kind) for case in (CASES + _SMALL)[::2] for kind in (U8_TO_U8, I16_TO_I16)]

_SOURCE = """
#include "skive/conv.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""

# The epilogue adds a value per channel and one per pixel: it sees both coordinates.
_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const %(element)s* x, const %(weight)s* w, const int32_t* bias, %(out)s* y,
                          void* scratch, int part, int parts, const int32_t* offset, const int32_t* shift) {
  Case%(i)d::run(x, w, bias, y, scratch, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   return acc + load<decltype(acc)::lanes>(offset + channel) +
                          splat<decltype(acc)::lanes>(shift[pixel]);
                 });
}
"""


def text(case: Case, kind: Kind, isa: str) -> str:
    return f"{case.cpp(isa)[:-1]}, {CTYPE[kind.element]}, {kind.zero}>"


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
    """Input, weights and bias: random over the whole range, or the extremes of it."""
    rng = np.random.default_rng(seed)
    oc, kh, kw = case.kernel
    x_range, w_range = np.iinfo(kind.element), np.iinfo(kind.weight)
    w_shape = (oc, kh, kw, case.image[3] // case.groups)
    if worst:
        x = np.full(case.image, x_range.max if kind.size == 1 else x_range.min, kind.element)
        w = np.full(w_shape, w_range.min, kind.weight)
    else:
        x = rng.integers(x_range.min, x_range.max, case.image, kind.element, endpoint=True)
        w = rng.integers(w_range.min, w_range.max, w_shape, kind.weight, endpoint=True)
    return x, w, rng.integers(-(2**20), 2**20, oc, np.int32)


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
    expected = sums.astype(np.int64) + offset + shift.reshape(n, oh, ow, 1)
    expected = wrapped(expected, kind.out).reshape(-1, oc)

    for parts in (1, 3):
        window = case.kernel[1:]
        if isinstance(case, Transposed):
            bound = pack.conv_transpose2d_scratch_bytes(
                case.image, attrs, window, case.output, parts, kind.size
            )
        else:
            bound = pack.conv2d_scratch_bytes(
                case.image, attrs, window, parts, case.image[3] + case.xs, kind.size
            )
        assert need(parts) <= bound
        scratch = placed(np.full(need(parts), 0xA5, np.uint8), 0)
        y = strided(np.full(case.output, 5, kind.out), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(
                pointer(source), pointer(weights), pointer(biases), pointer(y), pointer(scratch),
                part, parts, pointer(offset), pointer(shift),
            )  # fmt: skip
        assert (y[:, oc:] == 77).all(), "wrote between the pixels"
        np.testing.assert_array_equal(y[:, :oc], expected)


@pytest.fixture(scope="module", params=list(INTEGER_ISA_FLAGS))
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    isa = request.param
    if isa not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(
        _CASE
        % {"i": i, "type": text(case, kind, isa), "element": CTYPE[kind.element],
           "weight": CTYPE[kind.weight], "out": CTYPE[kind.out]}  # fmt: skip
        for i, (case, kind) in enumerate(JOBS)
    )
    folder: Path = tmp_path_factory.mktemp(isa)
    return isa, compile_library(_SOURCE % body, isa, folder, flags=("-O1",))


@pytest.mark.parametrize("index", range(len(JOBS)))
def test_equals_exact_sums(library: tuple[str, ctypes.CDLL], index: int) -> None:
    isa, lib = library
    case, kind = JOBS[index]
    for worst in (False, True):
        check_case(lib, index, case, kind, isa, worst)
