"""Bytes of which a block of output channels reads n of each m, against sums over the taps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import INTEGER_ISA_FLAGS, compile_library, cpu_isas, pointer
from numpy.typing import NDArray
from test_conv import Case, reference
from test_conv_integer import placed, strided

from skive import gathered_weights, pack, sparse_weights

ZERO = 131
DEEPEST = {"avx512vnni": 64, "avx512": 64, "avx2": 32, "generic": 32}  # bytes of a shuffle


@dataclass(frozen=True)
class Job:
    """A convolution, its blocks of output channels, the bytes of a place and how many of each 16 it keeps.

    Blocks keep `share` of the input channels of a tap: the same number of each four, or, if `scattered`, any.
    """

    case: Case
    block: int
    depth: int
    keep: int
    share: float = 0.5
    scattered: bool = False
    group: int = 1
    narrow: bool = False  # stores bytes

    @property
    def window(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.case.stride, "pad": self.case.pad, "dilation": self.case.dilation}

    @property
    def pitch(self) -> int:
        return sparse_weights.copied_pitch(self.case.image, self.window, self.case.image[3] + self.case.xs, 1)

    def weights(self, rng: np.random.Generator) -> NDArray[np.int8]:
        oc, kh, kw = self.case.kernel
        ic = self.case.image[3]
        score = rng.random((-(-oc // self.block), kh, kw, -(-ic // 4), 4))
        if self.scattered:
            stays = score < self.share
        else:
            stays = score.argsort(-1).argsort(-1) < round(4 * self.share)
        if len(score) > 2:
            stays[1] = False  # a block that reads nothing
        stays = stays.reshape(*score.shape[:3], -1)[..., :ic]
        w = rng.integers(-128, 127, (oc, kh, kw, ic), np.int8, endpoint=True)
        return w * np.repeat(stays, self.block, 0)[:oc]


JOBS = [
    Job(Case((1, 5, 7, 64), (64, 1, 1)), 16, 64, 8, group=2),
    Job(Case((1, 5, 7, 96), (40, 1, 1), xs=3, ys=5), 16, 64, 8, group=2),  # the last stretch overlaps
    Job(Case((1, 6, 9, 48), (48, 3, 3), pad=(1, 1, 1, 1)), 16, 64, 8),  # stretches over taps
    Job(Case((2, 7, 5, 21), (21, 3, 3), (2, 2), (0, 1, 0, 1)), 16, 16, 4, share=0.25),
    Job(Case((1, 9, 8, 37), (20, 3, 2), (1, 2), (2, 1, 1, 2), (2, 3), xs=1), 8, 32, 8),
    Job(Case((1, 1, 1, 256), (36, 1, 1)), 16, 64, 8),  # chains of sums
    Job(Case((1, 1, 3, 130), (32, 1, 1)), 32, 32, 8, scattered=True),
    Job(Case((1, 1, 19, 80), (33, 1, 1)), 16, 32, 4, share=0.4, scattered=True),
    Job(Case((1, 1, 11, 16), (16, 1, 5), pad=(0, 2, 0, 2)), 4, 64, 4, share=0.25),
    Job(Case((1, 1, 16, 4096), (32, 1, 1)), 32, 64, 8, narrow=True),  # a copy with gaps
    Job(Case((1, 9, 9, 32), (64, 3, 3), pad=(1, 1, 1, 1)), 16, 32, 8, group=4, narrow=True),
    Job(Case((1, 6, 6, 33), (24, 2, 2), (2, 2)), 24, 16, 8, scattered=True, narrow=True),
]  # fmt: skip

_SOURCE = """
#include "skive/sparse.h"
namespace skive { inline namespace SKIVE_ISA {
%s
} }
"""
_CASE = """
using Case%(i)d = %(type)s;
extern "C" long scratch_%(i)d(int parts) { return static_cast<long>(Case%(i)d::scratch_bytes(parts)); }
extern "C" void run_%(i)d(const uint8_t* x, const int8_t* w, const int32_t* index, const int32_t* bias, %(y)s* y,
                          void* scratch, int part, int parts) {
  Case%(i)d::run(x, w, index, bias, y, scratch, Part{part, parts}, [=](auto acc, ptrdiff_t, int) {
    return %(epilogue)s;
  });
}
"""


def source(i: int, job: Job, isa: str) -> str:
    case = job.case
    blocks = f"{job.block}, {job.group}, {min(job.depth, DEEPEST[isa])}"
    kind = (f"sparse_conv2d<{', '.join(case.tags())}, {blocks}, {case.pitches()}, {job.pitch}, 8, uint8_t, {ZERO}, "
            f"{job.keep}>")
    epilogue = "rounded<uint8_t, false>(to_float(acc) * splat<decltype(acc)::lanes>(0x1p-12f), 9)"
    return _CASE % {"i": i, "type": kind, "y": "uint8_t" if job.narrow else "int32_t",
                    "epilogue": epilogue if job.narrow else "acc"}  # fmt: skip


def build(indices: list[int], isa: str, folder: Path) -> ctypes.CDLL:
    if isa not in cpu_isas(INTEGER_ISA_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    body = "".join(source(i, JOBS[i], isa) for i in indices)
    return compile_library(_SOURCE % body, isa, folder, flags=("-O0",))


ISAS = list(INTEGER_ISA_FLAGS)
SOME = [(isa, i) for k, isa in enumerate(ISAS) for i in range(len(JOBS)) if i % len(ISAS) == k]  # each once


@pytest.mark.parametrize(("isa", "index"), SOME)
def test_equals_sums_over_the_taps(isa: str, index: int, libraries: Path) -> None:
    lib = build([i for other, i in SOME if other == isa], isa, libraries)
    check(lib, isa, index)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_case_on_every_instruction_set(isa: str, libraries: Path) -> None:
    lib = build(list(range(len(JOBS))), isa, libraries)
    for index in range(len(JOBS)):
        check(lib, isa, index)


def check(lib: ctypes.CDLL, isa: str, index: int) -> None:
    job, rng = JOBS[index], np.random.default_rng(index)
    case, oc = job.case, job.case.kernel[0]
    w, x = job.weights(rng), rng.integers(0, 256, case.image, np.uint8)
    bias = rng.integers(-(2**20), 2**20, oc, np.int32)
    words, places = gathered_weights.pack_gathered(
        w, job.block, min(job.depth, DEEPEST[isa]), job.keep, case.image, job.window, case.image[3] + case.xs,
        job.pitch, isa)  # fmt: skip
    values = strided(x, case.xs)
    given = [placed(a, 0) for a in (words, places, pack.pack_bias_i32(bias, w, ZERO, job.block))]
    sums = reference(case, x.astype(np.float64) - ZERO, w.astype(np.float64), bias.astype(np.float64)).reshape(-1, oc)
    want = sums.astype(np.int32)
    if job.narrow:
        want = np.clip(np.rint(want.astype(np.float32) * np.float32(2**-12)) + 9, 0, 255).astype(np.uint8)
        assert len(np.unique(want)) > 30
    need = getattr(lib, f"scratch_{index}")
    need.restype = ctypes.c_long
    for parts in (1, 3):
        room = sparse_weights.scratch_bytes(case.image, job.window, case.kernel[1:], job.pitch, 1, parts)
        assert need(parts) <= room
        scratch = placed(np.full(need(parts), 0xA5, np.uint8), 0)
        y = strided(np.full(case.output, 5, want.dtype), case.ys)
        for part in range(parts):
            getattr(lib, f"run_{index}")(pointer(values), *map(pointer, given), pointer(y),
                                         pointer(scratch), part, parts)  # fmt: skip
        assert (y[:, oc:] == 77).all(), "wrote between the pixels"
        np.testing.assert_array_equal(y[:, :oc], want)


def test_a_fuller_lane_is_read_twice() -> None:
    """Three of the first four channels and all of the last four, four of each 16 at a time."""
    w = np.zeros((4, 1, 1, 40), np.int8)
    w[:, ..., [0, 1, 3, 36, 37, 38, 39]] = [1, 2, 3, 4, 5, 6, 7]
    window = {"stride": (1, 1), "pad": (0,) * 4, "dilation": (1, 1)}
    words, index = gathered_weights.pack_gathered(w, 4, 32, 4, (1, 2, 2, 40), window, 40, 0, "generic")
    assert index.tolist() == [0, 2, 0, 8]  # channels 8 to 39 again, for the 8 that the first stretch leaves out
    first, second = words[: 2 * (32 + 32)].reshape(2, -1)
    assert first[:4].tolist() == [0, 1, 3, 0] and first[32:36].tolist() == [1, 2, 3, 0]
    assert second[16:20].tolist() == [12, 13, 14, 15] and second[48:52].tolist() == [4, 5, 6, 7]
    assert not second[32:48].any()


def test_pairs_have_zeros_between_them() -> None:
    w = np.zeros((4, 1, 1, 16), np.int8)
    w[..., [2, 5]] = [3, -4]
    window = {"stride": (1, 1), "pad": (0,) * 4, "dilation": (1, 1)}
    words, _ = gathered_weights.pack_gathered(w, 4, 16, 4, (1, 2, 2, 16), window, 16, 0, "avx2")
    assert words[:5].tolist() == [2, -128, 5, -128, -128]
    assert words[16:18].tolist() == [3, -4]
