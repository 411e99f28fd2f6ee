"""Attention of 8-bit operands: the kernels equal the op table bit for bit, on every instruction set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

from skive import ops
from skive.ir import constant
from skive.ops.attention import _byte_exponentials
from skive.types import DType

# B, heads, Nq, Nk, D, Dv
SHAPES = [
    (1, 1, 1, 1, 4, 1),
    (2, 2, 7, 7, 8, 8),
    (2, 3, 17, 33, 16, 9),
    (1, 2, 70, 197, 64, 64),
    (1, 1, 9, 1000, 32, 70),
    (1, 64, 20, 9, 64, 8),  # queries that lie a page apart
]
MASKS = ("none", "full", "keys", "queries")


def f32(v: float) -> str:
    return f"{np.float32(v)!r}".removeprefix("np.float32(").removesuffix(")") + "f"


@pytest.mark.parametrize("isa", cpu_isas())
def test_equals_the_op_table(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    cases = []
    for n_shape, (b, h, nq, nk, d, dv) in enumerate(SHAPES):
        for n_mask, mask_kind in enumerate(MASKS):
            for causal in (False, True):
                for tokens in (False, True):
                    everything = n_shape == 1
                    chosen = n_mask == n_shape % 4 and causal == (n_shape == 2) and tokens == (n_shape in (3, 5))
                    if not everything and not chosen:
                        continue
                    to = DType.u8 if (n_mask + causal + tokens) % 2 else DType.f32
                    zeros = {
                        "q_zero": int(rng.integers(0, 256)),
                        "k_zero": 128 if n_mask == 3 else int(rng.integers(0, 256)),
                        "v_zero": int(rng.integers(0, 256)),
                        "y_zero": 77 if to is DType.u8 else 0,
                    }
                    sizes = ((nq, d), (nk, d), (nk, dv))
                    q, k, v = (
                        rng.integers(0, 256, (b, n, h, w) if tokens else (b, h, n, w)).astype(np.uint8)
                        for n, w in sizes
                    )
                    # Scores of a softmax that is neither flat nor one single key.
                    scale, factor = np.float32(3 / (74**2 * d**0.5)), np.float32(0.37)
                    shape = {"none": (), "full": (b, h, nq, nk), "keys": (b, 1, 1, nk), "queries": (1, 1, nq, 1)}[
                        mask_kind
                    ]
                    mask = rng.standard_normal(shape).astype(np.float32)
                    if mask_kind == "keys" and nk > 2:
                        mask[..., 1::3] = np.finfo(np.float32).min
                    inputs = [q, k, v] + ([mask] if shape else [])
                    attrs = {**zeros, "scale": float(scale), "factor": float(factor), "to": to, "causal": causal}
                    node = ops.make("quantized_attention", *map(constant, inputs), token_major=tokens, **attrs)
                    want = ops.evaluate(node, inputs)

                    def tag(n: int, w: int, mixed: bool = tokens, heads: int = h) -> str:
                        return angle("HeadStrides", heads * n * w, *((w, heads * w) if mixed else (n * w, w)))

                    steps = [0 if extent == 1 else int(np.prod(shape[i + 1 :])) for i, extent in enumerate(shape)]
                    kernel = angle(
                        "quantized_attention",
                        to.ctype,
                        *(b, h, nq, nk, d, dv),
                        tag(nq, d),
                        tag(nk, d),
                        tag(nk, dv),
                        tag(nq, dv),
                        angle("MaskStrides", *steps) if shape else "NoMask",
                        str(causal).lower(),
                        *(zeros[z] for z in ("q_zero", "k_zero", "v_zero")),
                    )
                    exponent = np.float32(np.float64(scale) * np.log2(np.e))
                    text = (
                        f"{kernel}::run(x0, x1, x2, {'x3' if shape else 'nullptr'}, y0, scratch, part, "
                        f"{f32(scale)}, {f32(exponent)}, {f32(factor)}, {zeros['y_zero']})"
                    )
                    cases.append(Case(text, inputs, [want], kernel))
    check(cases, ["attention_integer.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_exponentials(isa: str, tmp_path: Path) -> None:
    """Every step there is, what lies below them, infinity and NaN; rows of all remainders of a register."""
    steps = np.arange(0, -33000, -1, dtype=np.float32)
    want = _byte_exponentials(steps / np.float32(2048)).astype(np.uint8)
    far = np.abs(want - 255 * np.exp2(steps.astype(np.float64) / 2048))
    assert want[0] == 255 and far.max() < 0.53  # and what rounding to a step adds: less than 0.05
    between = np.float32(-np.linspace(0, 16, 100_001))
    assert np.abs(_byte_exponentials(between) - 255 * np.exp2(between.astype(np.float64))).max() < 0.57
    odd = np.array([-1e30, -np.inf, np.nan, 0, -2047.4, -3e9], np.float32)
    assert not _byte_exponentials(odd[[0, 1, 2, 5]] / 2048).any()
    cases = []
    for row in (steps, odd, *(steps[-1000 : -1000 - n : -1] * 3 for n in (1, 17, 64, 129))):
        n, wide = len(row), -(-len(row) // 64) * 64
        scores = np.full(wide, -np.inf, np.float32)
        scores[:n] = row + np.float32(5)
        exact = _byte_exponentials((scores[:n] - np.float32(5)) * np.float32(0.5) / np.float32(2048)).astype(np.uint8)
        got = np.array([exact.sum(dtype=np.int64)], np.int32)
        call = f"{{ alignas(64) static uint8_t p[{wide}]; y1[0] = byte_exponentials<{n}>(x0, p, 5.0f, 0.5f); "
        call += f"__builtin_memcpy(y0, p, {n}); }}"
        cases.append(Case(call, [scores], [exact, got], parts=(1,)))
    check(cases, ["exponentials.h"], isa, tmp_path)


def test_close_to_float_attention() -> None:
    rng = np.random.default_rng(16)
    x = [rng.standard_normal((2, 3, 197, 64)).astype(np.float32) for _ in range(3)]
    levels = [np.clip(np.rint(v * 28) + 128, 0, 255).astype(np.uint8) for v in x]
    real = [(v.astype(np.float32) - 128) / 28 for v in levels]
    want = ops.evaluate(ops.make("attention", *map(constant, real), scale=0.125), real)
    zeros = {"q_zero": 128, "k_zero": 128, "v_zero": 128}
    node = ops.make("quantized_attention", *map(constant, levels), scale=0.125 / 28**2, factor=1 / 28, **zeros)
    got = ops.evaluate(node, levels)
    noise = 10 * np.log10(np.square(want).sum() / np.square(got - want).sum())
    assert noise > 35, noise  # of 8-bit weights alone
