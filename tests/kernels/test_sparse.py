"""Convolution with blocks of zero weights against sums over the taps, on every instruction set."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer
from numpy.typing import NDArray
from test_conv import CASES, Case, Transposed, reference
from test_conv_integer import CTYPE, placed, strided

from skive import pack, sparse_weights

LANES = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "generic": 4}
INPUTS = {"uint8": (np.uint8, np.int8, np.int32), "int16": (np.int16, np.int16, np.int32),
          "float32": (np.float32, np.float32, np.float32)}


@dataclass(frozen=True)
class Job:
    """A convolution of one element type, the blocks of its weights, and the share of them that are zero."""

    case: Case
    element: str
    outputs: int  # of a block
    inputs: int
    zeros: float
    narrow: bool = False  # stores bytes
    group: int = 1  # blocks stored together, of whole registers

    @property
    def zero(self) -> int:
        return {"uint8": 131, "int16": -3, "float32": 0}[self.element]

    @property
    def window(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.case.stride, "pad": self.case.pad, "dilation": self.case.dilation}

    @property
    def size(self) -> int:
        return np.dtype(INPUTS[self.element][0]).itemsize

    @property
    def pitch(self) -> int:
        return sparse_weights.copied_pitch(self.case.image, self.window, self.case.image[3] + self.case.xs, self.size)

    def operands(self, seed: int) -> tuple[NDArray, NDArray, NDArray]:
        """Input, weights and bias; integers over their whole range."""
        rng = np.random.default_rng(seed)
        x_type, w_type, sum_type = INPUTS[self.element]
        oc, kh, kw = self.case.kernel
        shape = (oc, kh, kw, self.case.image[3])

        def drawn(size: tuple[int, ...], kind: type) -> NDArray:
            if kind is np.float32:
                return rng.standard_normal(size).astype(kind)
            return rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, size, kind, endpoint=True)

        w = drawn(shape, w_type)
        blocks = (-(-oc // self.outputs), kh, kw, -(-shape[3] // self.inputs))
        kept = rng.random(blocks) >= self.zeros
        kept[rng.integers(blocks[0])] &= self.zeros == 0  # a block of outputs that reads nothing
        kept = np.repeat(np.repeat(kept, self.outputs, 0)[:oc], self.inputs, 3)[..., : shape[3]]
        bias = rng.standard_normal(oc).astype(np.float32) if w_type is np.float32 else (
            rng.integers(-(2**20), 2**20, oc, np.int32))
        return drawn(self.case.image, x_type), w * kept, bias.astype(sum_type)


def jobs() -> list[Job]:
    rng = np.random.default_rng(0)
    found = []
    extra = [
        Case((1, 1, 1, 64), (40, 1, 1)),  # chains
        Case((1, 1, 2, 24), (16, 1, 1)),
        Case((1, 3, 1, 12), (16, 1, 1)),
        Case((1, 1, 128, 96), (48, 1, 1), ys=5),
        Case((1, 1, 40, 4096), (16, 1, 1)),
        Case((1, 9, 9, 64), (64, 3, 3), pad=(1, 1, 1, 1)),
        Case((2, 6, 8, 512), (32, 3, 3), pad=(0, 1, 0, 1)),
        Case((1, 3, 13, 16), (16, 1, 1)),
        Case((1, 1, 9, 7), (12, 1, 5), pad=(0, 2, 0, 2)),
    ]
    plain = [c for c in CASES if not isinstance(c, Transposed) and c.groups == 1]
    for i, case in enumerate([*extra, *plain[::2]]):
        for k, (element, step) in enumerate((("uint8", 4), ("float32", 1), ("int16", 2))):
            # Compiling takes the time: each case in one element type, some in two.
            if case.image[3] < step or (i >= len(extra) and i % 3 != k) or (i < len(extra) and k == 2):
                continue
            inputs = int(rng.choice([n for n in (step, 4, 8) if n % step == 0 and n <= case.image[3]]))
            outputs = int(rng.choice([4, 8, 16, 20, 32, 48, 64]))
            job = Job(case, element, outputs, inputs, float(rng.choice([0, 0.3, 0.8, 1])), group=1 + i % 4)
            found.append(job)
            if element == "uint8" and i % 3 == 0:
                found.append(replace(job, narrow=True, outputs=int(rng.choice([16, 32, 64]))))
    return found


JOBS = jobs()

_SOURCE = """
#include "skive/sparse.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""
_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const %(x)s* x, const %(w)s* w, const int32_t* index, const %(sum)s* bias,
                          %(y)s* y, void* scratch, int part, int parts, const %(sum)s* offset,
                          const %(sum)s* shift) {
  Case%(i)d::run(x, w, index, bias, y, scratch, Part{part, parts},
                 [=](auto acc, ptrdiff_t pixel, int channel) {
                   constexpr int L = decltype(acc)::lanes;
                   return %(epilogue)s;
                 });
}
"""
_SUM = "acc + load<L>(offset + channel) + splat<L>(shift[pixel])"


def source(i: int, job: Job, share: int, isa: str) -> str:
    x, w, total = (CTYPE[t] for t in INPUTS[job.element])
    tags = ", ".join(job.case.tags())
    element = "" if job.element == "float32" else f", {x}, {job.zero}"
    group = job.group if job.outputs % LANES[isa] == 0 else 1
    blocks = f"{job.outputs}, {group}, {job.inputs}"
    kind = f"sparse_conv2d<{tags}, {blocks}, {job.case.pitches()}, {job.pitch}, {share}{element}>"
    epilogue = f"rounded<uint8_t, false>(to_float({_SUM}) * splat<L>(0x1p-14f), 9)" if job.narrow else _SUM
    return _CASE % {"i": i, "type": kind, "x": x, "w": w, "sum": total, "epilogue": epilogue,
                    "y": "uint8_t" if job.narrow else total}  # fmt: skip


def build(jobs: list[Job], isa: str, folder: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """A library that runs each of `jobs`; skips where the CPU lacks `isa`."""
    if isa not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    body = ""
    for i, job in enumerate(jobs):
        body += source(i, job, i % 17, isa)  # decides nothing but how far ahead weights are fetched
    return compile_library(_SOURCE % body, isa, folder, flags=(*flags, "-ffp-contract=off"))


def check(lib: ctypes.CDLL, index: int, job: Job) -> None:
    case = job.case
    x, w, bias = job.operands(index)
    n, oh, ow, oc = case.output
    rng = np.random.default_rng(index)
    kind = INPUTS[job.element][2]
    offset, shift = (placed(rng.integers(-100, 100, k).astype(kind), 0) for k in (oc, n * oh * ow))
    pixel = case.image[3] + case.xs
    words, places = sparse_weights.pack_sparse(w, job.outputs, job.inputs, case.image, job.window, pixel, job.pitch)
    if kind is np.float32:
        biases = pack.pack_bias(bias, job.outputs)
    else:
        biases = pack.pack_bias_i32(bias, w, job.zero, job.outputs)
    given = [placed(a, 0) for a in (words, places, biases)]
    values = strided(x, case.xs)
    if kind is np.float32:
        values[:, case.image[3] :] = np.nan  # what lies between the pixels is never read
    sums = reference(case, x.astype(np.float64) - job.zero, w.astype(np.float64), bias.astype(np.float64))
    sums = sums.reshape(-1, oc)
    if kind is np.float32:
        expected = sums + offset + shift[:, None]
    else:  # wraps
        expected = (sums.astype(np.int64) + offset + shift[:, None]).astype(np.uint32).view(np.int32)
    if job.narrow:
        scaled = np.rint(expected.astype(np.float32) * np.float32(2**-14)).astype(np.int64)
        expected = np.clip(scaled + 9, 0, 255).astype(np.uint8)
    need = getattr(lib, f"scratch_{index}")
    need.restype = ctypes.c_long
    results = []
    for parts in (1, 3):
        room = sparse_weights.scratch_bytes(case.image, job.window, case.kernel[1:], job.pitch, job.size, parts)
        assert need(parts) <= room
        scratch = placed(np.full(need(parts), 0xA5, np.uint8), 0)
        y = strided(np.full(case.output, 5, expected.dtype if kind is not np.float32 else np.float32), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(
                pointer(values), *map(pointer, given), pointer(y), pointer(scratch), part, parts, pointer(offset),
                pointer(shift),
            )  # fmt: skip
        assert (y[:, oc:] == 77).all(), "wrote between the pixels"
        results.append(y[:, :oc].copy())
    np.testing.assert_array_equal(results[0], results[1])
    if kind is np.float32:
        bound = 2e-6 * (1 + np.abs(expected).max()) * math.sqrt(w[0].size)
        assert np.abs(results[0] - expected).max() <= bound
    else:
        np.testing.assert_array_equal(results[0], expected)


@pytest.fixture(scope="module", params=list(INTEGER_ISA_FLAGS))
def library(request: pytest.FixtureRequest, libraries: Path) -> ctypes.CDLL:
    return build(JOBS, request.param, libraries, ("-O0",))


@pytest.mark.parametrize("index", range(len(JOBS)))
def test_equals_sums_over_the_taps(library: ctypes.CDLL, index: int) -> None:
    check(library, index, JOBS[index])


def test_places_of_a_short_last_group_are_read_once() -> None:
    """7 channels in places of 4: the last place starts at 3 and has zeros for what the first one holds."""
    w = np.ones((4, 1, 1, 7), np.int8)
    words, index = sparse_weights.pack_sparse(
        w, 4, 4, (1, 5, 5, 7), {"stride": (1, 1), "pad": (0,) * 4, "dilation": (1, 1)}, 7, 0)
    assert index.tolist() == [0, 2, 0, 3]
    assert words[:32].reshape(2, 4, 4)[:, 0].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def random_job(rng: np.random.Generator) -> Job:
    """Any convolution of at most 3 million multiply-adds, with blocks of any size."""
    while True:
        element, step = [("uint8", 4), ("int16", 2), ("float32", 1)][rng.integers(3)]
        channels = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 130, 1024]))
        two = {name: tuple(int(v) for v in rng.choice(values, 2))
               for name, values in (("size", range(1, 24)), ("window", [1, 1, 2, 3, 3, 5]),
                                    ("stride", [1, 1, 1, 2, 3]), ("dilation", [1, 1, 1, 2, 3]))}  # fmt: skip
        pad = tuple(int(v) for v in rng.choice([0, 0, 1, 2, 3], 4)) if rng.random() < 0.6 else (0, 0, 0, 0)
        case = Case((int(rng.integers(1, 4)), *two["size"], channels),
                    (int(rng.choice([1, 4, 7, 8, 15, 16, 17, 33, 48, 70])), *two["window"]), two["stride"], pad,
                    two["dilation"], 1, int(rng.choice([0, 0, 1, 5])), int(rng.choice([0, 0, 1, 9])))  # fmt: skip
        work = math.prod(case.image) * case.kernel[0] * math.prod(two["window"])
        depths = [d for d in (step, 2 * step, 4, 8, 12) if d % step == 0 and d <= channels]
        if min(case.output) > 0 and 0 < work < 3_000_000 and depths:
            narrow = element == "uint8" and rng.random() < 0.5
            return Job(case, element, int(rng.choice([4, 8, 12, 16, 24, 32, 48, 64, 96])), int(rng.choice(depths)),
                       float(rng.choice([0, 0.5, 0.9, 1])), narrow, int(rng.choice([1, 1, 2, 3, 4])))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(6))
@pytest.mark.parametrize("isa", INTEGER_ISA_FLAGS)
def test_random_shapes(isa: str, chunk: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(chunk)
    found = [random_job(rng) for _ in range(50)]
    lib = build(found, isa, tmp_path, (f"-O{chunk % 4}",))
    for index, job in enumerate(found):
        check(lib, index, job)


# Rows, input channels, output channels, channels that share their inputs, gaps of x and y.
ROWS = [(1, 9, 5, 1, 0, 0), (49, 17, 33, 1, 0, 3), (64, 64, 16, 2, 0, 0), (70, 24, 40, 4, 5, 0), (131, 8, 16, 4, 0, 0),
        (16, 40, 7, 1, 1, 2)]
_ROWS_SOURCE = """
#include "skive/spmm.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""
_ROWS_CASE = """
using Rows%(i)d = sparse_rows<%(type)s>;
extern "C" long rows_scratch_%(i)d(int parts) { return static_cast<long>(Rows%(i)d::scratch_bytes(parts)); }
extern "C" void rows_%(i)d(const float* x, const float* w, const int32_t* index, const float* bias, float* y,
                           void* scratch, int part, int parts, const float* offset, const float* shift) {
  Rows%(i)d::run(x, w, index, bias, y, scratch, Part{part, parts}, [=](auto acc, ptrdiff_t pixel, int channel) {
    constexpr int L = decltype(acc)::lanes;
    return acc + load<L>(offset + channel) + splat<L>(shift[pixel]);
  });
}
"""


@pytest.mark.parametrize("isa", [i for i in INTEGER_ISA_FLAGS if i != "avx512vnni"])
def test_single_weights(isa: str, tmp_path: Path) -> None:
    if isa not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    body = ""
    for i, (rows, ic, oc, together, xs, ys) in enumerate(ROWS):
        body += _ROWS_CASE % {"i": i, "type": f"{rows}, {ic}, {oc}, {together}, {ic + xs}, {oc + ys}"}
    lib = compile_library(_ROWS_SOURCE % body, isa, tmp_path, flags=("-O1",))
    for i, (rows, ic, oc, together, xs, ys) in enumerate(ROWS):
        rng = np.random.default_rng(i)
        x, bias, offset = (rng.standard_normal(n).astype(np.float32) for n in ((rows, ic), oc, oc))
        shift = rng.standard_normal(rows).astype(np.float32)
        w = (rng.standard_normal((oc, ic)) * (rng.random((oc, ic)) < 0.3)).astype(np.float32)
        w[0] = 0
        words, index = sparse_weights.pack_rows(w, together, LANES[isa])
        source = strided(x, xs)
        source[:, ic:] = np.nan
        given = [placed(a, 0) for a in (words, index, pack.pack_bias(bias, 4))]
        need = getattr(lib, f"rows_scratch_{i}")
        need.restype = ctypes.c_long
        expected = x.astype(np.float64) @ w.T + bias + offset + shift[:, None]
        for parts in (1, 3):
            assert need(parts) == sparse_weights.rows_scratch_bytes(ic, LANES[isa], parts)
            scratch = placed(np.full(need(parts), 0xFF, np.uint8), 0)  # NaN
            y = strided(np.full((rows, oc), 5, np.float32), ys)
            for part in range(parts):
                getattr(lib, f"rows_{i}")(pointer(source), *map(pointer, given), pointer(y), pointer(scratch), part,
                                          parts, pointer(placed(offset, 0)), pointer(placed(shift, 0)))
            assert (y[:, oc:] == 77).all(), "wrote between the pixels"
            np.testing.assert_allclose(y[:, :oc], expected, atol=2e-6 * ic)
