"""Targets: what the compiler must know of an instruction set. One row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skive.errors import TargetError
from skive.ir import Node
from skive.pack import winograd_products

WINOGRAD_WEIGHT_BYTES = 12 << 20


@dataclass(frozen=True)
class Target:
    """`features` are needed at run time, in cpuid spelling; `flags` and `define` choose the code;
    `vectors` names the float32 registers (targets that differ in integer dot products alone share
    them) and `lanes` is the number of float32 in one."""

    name: str
    define: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    vectors: str
    lanes: int
    doc: str

    def winograd_pays(self, conv: Node) -> bool:
        """Whether Winograd beats the direct kernel on `conv` (measured: benchmarks/kernels/bench_winograd.py).

        It does from 8 channels and 4x4 outputs on, as long as the transformed weights, four times the original, come
        from the cache: beyond that their traffic costs what the arithmetic saves. With stride 2 from 16 channels, where
        the tiles of 4x4 outputs save a quarter of the multiplications (narrower vectors: 40 %).
        """
        oc, kh, kw, ic = conv.inputs[1].shape
        stride = conv.attrs["stride"]
        if (kh, kw) != (3, 3) or stride not in ((1, 1), (2, 2)) or conv.attrs["dilation"] != (1, 1):
            return False
        n, height, width, _ = conv.shape
        tiles = n * -(-height // 4) * -(-width // 4)
        if stride == (2, 2):
            most = (0.75 if self.lanes > 8 else 0.6) * 9 * n * height * width
            if tiles == 1 or min(ic, oc) < 16 or tiles * winograd_products(2) > most:
                return False
        return (
            self.lanes > 4
            and conv.attrs["groups"] == 1
            and min(ic, oc) >= 8
            and min(height, width) >= 4
            and 36 * 4 * ic * oc <= WINOGRAD_WEIGHT_BYTES
        )


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_FLAGS = ("-mavx2", "-mfma", *(f"-m{f}" for f in _AVX512))

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "avx512vnni",
            "SKIVE_TARGET_AVX512VNNI",
            (*_AVX512_FLAGS, "-mavx512vnni"),
            ("avx2", "fma", *_AVX512, "avx512vnni"),
            "avx512",
            16,
            "x86-64 with AVX-512 F, BW, VL, DQ and the integer dot products of VNNI",
        ),
        Target(
            "avx512",
            "SKIVE_TARGET_AVX512",
            _AVX512_FLAGS,
            ("avx2", "fma", *_AVX512),
            "avx512",
            16,
            "x86-64 with AVX-512 F, BW, VL, DQ",
        ),
        Target(
            "avx2",
            "SKIVE_TARGET_AVX2",
            ("-mavx2", "-mfma"),
            ("avx2", "fma"),
            "avx2",
            8,
            "x86-64 with AVX2 and FMA",
        ),
        Target("generic", "SKIVE_TARGET_GENERIC", (), (), "generic", 4, "any processor: plain C++17"),
    )
}


def resolve(name: str, cpu_features: Sequence[str]) -> Target:
    """The target called `name`; `host` is the best one that a CPU with `cpu_features` runs."""
    if name == "host":
        return next(t for t in TARGETS.values() if set(t.features) <= set(cpu_features))
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; there are host, {', '.join(TARGETS)}")
    return TARGETS[name]
