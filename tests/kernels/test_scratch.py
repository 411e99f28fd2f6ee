"""The scratch that compiler/pack.py reserves is what the kernels say they use."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch import angle
from driver import compile_library, cpu_isas

from skive import pack


@pytest.mark.parametrize("isa", cpu_isas())
def test_sizes_agree(isa: str, tmp_path: Path) -> None:
    lines = ['#include "skive/attention_integer.h"', '#include "skive/rnn.h"',
             '#include "skive/rnn_integer.h"', "using namespace skive;"]

    def claim(kernel: str, size: int) -> None:
        lines.append(f'static_assert({kernel}::scratch_bytes() == {size}, "{kernel}");')

    layers = [(1, 1, 1, 1), (4, 1, 3, 17), (3, 5, 7, 33), (50, 1, 40, 128), (2, 2, 100, 65), (2, 9, 1024, 17),
              (2, 9, 16, 1024)]
    for t, n, i, h in layers:
        for packed in (False, True):
            text = str(packed).lower()
            claim(
                angle("lstm", t, n, i, h, "SigmoidFn, TanhFn, TanhFn", text),
                pack.recurrent_scratch_bytes(4, t, n, i, h, packed, isa),
            )
            claim(
                angle("gru", t, n, i, h, "SigmoidFn, TanhFn, false", text),
                pack.recurrent_scratch_bytes(3, t, n, i, h, packed, isa),
            )
            claim(angle("rnn", t, n, i, h, "TanhFn", text), pack.recurrent_scratch_bytes(1, t, n, i, h, packed, isa))
        for name, gates in (("lstm", 4), ("gru", 3)):
            claim(angle(f"{name}_steps", t, n, h), pack.steps_scratch_bytes(gates, n, h, isa))
            claim(angle(f"quantized_{name}", t, n, h, 32), pack.quantized_steps_scratch_bytes(gates, n, h))
    shapes = [(1, 9, 9), (5, 7, 3), (40, 33, 200), (197, 64, 197), (384, 384, 1000), (9, 1024, 40), (90, 2048, 9)]
    for m, k, n in shapes:
        for trans in (False, True):
            kernel = angle("matmul", "Shape<>", m, k, n, "Strides<>", "Strides<>", str(trans).lower())
            claim(kernel, pack.matmul_scratch_bytes(1, m, k, n, trans, isa))
    for nq, nk, d, dv, row in [(1, 1, 1, 1, 1), (7, 7, 8, 8, 8), (197, 197, 64, 64, 1024), (17, 4000, 33, 17, 66),
                               (9, 2048, 32, 32, 2048)]:
        q, t = f"HeadStrides<1, 1, {row}>", "HeadStrides<1, 1, 1>"
        kernel = angle("attention", 1, 1, nq, nk, d, dv, q, t, t, t, "NoMask", "false")
        claim(kernel, pack.attention_scratch_bytes(nq, nk, d, dv, row, isa))
    for nq, nk, d, dv, row in [(1, 1, 4, 1, 4), (7, 7, 8, 8, 8), (197, 197, 64, 64, 192), (17, 4000, 32, 17, 4096),
                               (128, 128, 32, 32, 4096)]:
        q, t = f"HeadStrides<1, 1, {row}>", "HeadStrides<1, 1, 1>"
        sizes = (1, 1, nq, nk, d, dv)
        kernel = angle("quantized_attention", "float", *sizes, q, t, t, t, "NoMask", "false", 3, 4, 5)
        claim(kernel, pack.quantized_attention_scratch_bytes(nq, nk, d, dv, row, isa))
    compile_library("\n".join(lines), isa, tmp_path, flags=("-O0",))
