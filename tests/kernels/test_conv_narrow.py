"""Integer convolutions with pixels in the lanes, against exact sums over the taps."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer
from test_conv import Case, reference
from test_conv_integer import (
    CTYPE,
    NARROW,
    U8,
    Kind,
    epilogue_result,
    operands,
    packed_operands,
    placed,
    strided,
)
from test_conv_integer import text as dense_text

from skive import pack

ISA = "avx512vnni"
KINDS = [*(k for k in NARROW if k.element is np.uint8), U8]

# Whole and part vectors, one to four dwords of channels and the blocks of four beyond, results of whole dwords
# and others, pixels with gaps, several images, chunks of rows, and rows that a pointwise window cuts anew.
CASES = [
    Case((1, 5, 33, 12), (8, 3, 3), pad=(1, 1, 1, 1)),
    Case((2, 7, 16, 8), (12, 3, 3), pad=(1, 0, 0, 1), xs=4, ys=3),
    Case((1, 9, 20, 16), (4, 3, 3), pad=(1, 1, 1, 1)),
    Case((1, 4, 17, 20), (1, 2, 3)),
    Case((2, 5, 16, 56), (12, 1, 1)),
    Case((1, 3, 11, 4), (3, 1, 1)),
    Case((1, 2, 70, 4), (14, 1, 5), pad=(0, 2, 0, 4)),
    Case((1, 12, 34, 24), (9, 3, 3), pad=(1, 1, 1, 1), xs=4),
    Case((1, 20, 16, 8), (2, 5, 5), pad=(2, 2, 2, 2)),
    Case((1, 3, 5, 12), (5, 3, 3), pad=(2, 1, 0, 0), xs=1),
    Case((1, 31, 60, 32), (12, 3, 3), pad=(1, 1, 1, 1)),
    Case((1, 2, 19, 8), (4, 3, 3), pad=(1, 1, 1, 1)),
    Case((2, 6, 16, 16), (1, 3, 3), pad=(1, 1, 1, 1)),
]


def narrow_text(case: Case, kind: Kind) -> str:
    """The kernel's type."""
    assert case.groups == 1
    return "narrow_" + dense_text(case, kind, ISA)


def narrow_epilogue(kind: Kind, case: Case, added: bool) -> str:
    """The C++ expression of `kind`'s epilogue; `added`: with bytes of the shape of the result."""
    limits = np.iinfo(kind.out)
    plain = "acc + load_channel<L>(offset, channel) + load_pixel<L>(shift, pixel)"
    if added:
        plain += f" + load_full<L, {case.kernel[0]}>(residual, pixel, channel)"
    form = kind.epilogue.replace("load<L>(factor + channel)", "load_channel<L>(factor, channel)")
    if kind is U8:
        return plain
    return form.format(plain=plain, low=limits.min, high=limits.max, out=CTYPE[kind.out], out_zero=kind.out_zero,
                       bounded=str(kind.bounded).lower())  # fmt: skip


_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const uint8_t* x, const int8_t* w, const int32_t* bias, %(out)s* y, void* scratch, int part,
                          int parts, const int32_t* offset, const int32_t* shift,
                          [[maybe_unused]] const float* factor, [[maybe_unused]] const uint8_t* residual) {
  Case%(i)d::run(x, w, bias, y, scratch, Part{part, parts}, [=](auto acc, ptrdiff_t pixel, auto channel) {
    constexpr int L = decltype(acc)::lanes;
    return %(epilogue)s;
  });
}
"""


def jobs() -> list[tuple[Case, Kind, bool]]:
    """Each case with an epilogue, the last two with 32-bit results, and bytes added where their pixels are whole
    dwords."""
    kinds = [KINDS[i % (len(KINDS) - 1)] for i in range(len(CASES) - 2)] + [U8, U8]
    return [(case, kinds[i], case.kernel[0] % 4 == 0 and i != 2) for i, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def library(libraries: Path) -> ctypes.CDLL:
    if ISA not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {ISA}")
    body = "".join(
        _CASE % {"i": i, "type": narrow_text(case, kind), "out": CTYPE[kind.out],
                 "epilogue": narrow_epilogue(kind, case, added)}
        for i, (case, kind, added) in enumerate(jobs())
    )  # fmt: skip
    source = f'#include "skive/conv_narrow.h"\nnamespace skive {{ inline namespace SKIVE_ISA {{\n{body}\n}} }}\n'
    return compile_library(source, ISA, libraries, flags=("-O1", "-ffp-contract=off"))


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("worst", [False, True], ids=["random", "worst"])
def test_equals_exact_sums(library: ctypes.CDLL, index: int, worst: bool) -> None:
    case, kind, added = jobs()[index]
    x, w, bias = operands(case, kind, index, worst)
    n, oh, ow, oc = case.output
    rng = np.random.default_rng(index)
    offset = placed(rng.integers(-100, 100, oc, np.int32), 0)
    shift = placed(rng.integers(-100, 100, n * oh * ow, np.int32), 0)
    residual = placed(rng.integers(0, 256, (n * oh * ow, oc), np.uint8), 1)
    weights, biases = (placed(a, 0) for a in packed_operands(case, kind, w, bias, case.nb(ISA)))
    source = strided(x, case.xs)

    sums = reference(case, x.astype(np.float64) - kind.zero, w.astype(np.float64), bias.astype(np.float64))
    sums = sums.astype(np.int64).reshape(-1, oc) + (residual if added else 0)
    spread = 255 / max(1.0, 2 * float(np.abs(sums).max()))
    factor = placed(np.exp2(np.round(np.log2(spread) + rng.uniform(-3, 3, oc))).astype(np.float32), 0)
    factor[::3] *= np.float32(1.1)
    if not kind.bounded:
        factor[-1] = 1e25
    expected = epilogue_result(kind, sums, offset, shift, factor)

    need = getattr(library, f"scratch_{index}")
    need.restype = ctypes.c_long
    attrs = {"pad": case.pad}
    for parts in (1, 3):
        assert need(parts) <= pack.narrow_scratch_bytes(case.image, attrs, case.kernel[1:], parts)
        scratch = placed(np.full(need(parts), 0xA5, np.uint8), 0)
        # What lies behind the last pixel shows stray writes.
        y = strided(np.full((n * oh * ow + 64, oc), 5, kind.out), case.ys)
        for part in range(parts):
            getattr(library, f"run_{index}")(
                pointer(source), pointer(weights), pointer(biases), pointer(y), pointer(scratch), part, parts,
                pointer(offset), pointer(shift), pointer(factor), pointer(residual),
            )  # fmt: skip
        assert (y[:, oc:] == 77).all() and (y[n * oh * ow :, :oc] == 5).all(), "wrote outside the pixels"
        np.testing.assert_array_equal(y[: n * oh * ow, :oc], expected)


def test_reads_nothing_beyond_its_operands(library: ctypes.CDLL) -> None:
    """Input and residual end with a page that cannot be read."""
    for index in (0, 2, 3, 5, 9):
        case, kind, _ = jobs()[index]
        x, w, bias = operands(case, kind, index, False)
        n, oh, ow, oc = case.output
        weights, biases = (placed(a, 0) for a in packed_operands(case, kind, w, bias, case.nb(ISA)))
        wide = strided(x, case.xs)
        wide_bytes = wide.size - case.xs  # nothing follows the last pixel
        source = _before_a_hole(wide.reshape(-1)[:wide_bytes])
        residual = _before_a_hole(np.zeros(n * oh * ow * oc, np.uint8))
        offset, shift = np.zeros(oc, np.int32), np.zeros(n * oh * ow, np.int32)
        factor = np.ones(oc, np.float32)
        y = np.zeros((n * oh * ow, oc + case.ys), kind.out)
        scratch = placed(np.zeros(getattr(library, f"scratch_{index}")(1), np.uint8), 0)
        getattr(library, f"run_{index}")(
            ctypes.c_void_p(source), pointer(weights), pointer(biases), pointer(y), pointer(scratch), 0, 1,
            pointer(offset), pointer(shift), pointer(factor), ctypes.c_void_p(residual),
        )  # fmt: skip


_PAGE = 4096


def _before_a_hole(values: np.ndarray) -> int:
    """The address of a copy of `values` whose last byte is the last of a page; the next page faults."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = -(-values.nbytes // _PAGE) * _PAGE
    base = libc.mmap(None, size + _PAGE, 3, 0x22, -1, 0)  # private and anonymous, to read and write
    assert base not in (None, ctypes.c_void_p(-1).value)
    assert libc.mprotect(base + size, _PAGE, 0) == 0
    at = base + size - values.nbytes
    flat = np.ascontiguousarray(values)
    ctypes.memmove(at, flat.ctypes.data, flat.nbytes)
    return int(at)
