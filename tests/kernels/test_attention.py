"""Scaled dot-product attention with masks, causality and strided operands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

# B, heads, Nq, Nk, D, Dv; the last two have queries, and scores, that lie a page apart.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 7, 7, 8, 8),
    (2, 3, 17, 33, 16, 9),
    (1, 2, 70, 197, 32, 32),
    (1, 16, 20, 9, 64, 64),
    (1, 1, 20, 1024, 8, 8),
]


@pytest.mark.parametrize("isa", cpu_isas())
def test_attention(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    cases = []
    for n_shape, (b, h, nq, nk, d, dv) in enumerate(SHAPES):
        for n_mask, mask_kind in enumerate(("none", "full", "keys", "queries")):
            for causal in (False, True):
                for interleaved in (False, True):  # [B, N, heads, D], as a fused projection leaves it
                    # Every option with the second shape, one combination each with the others.
                    pick_one = n_shape == 1 and not interleaved
                    if not pick_one and (
                        n_mask != n_shape % 4 or causal != (n_shape == 2) or interleaved != (n_shape in (3, 4))
                    ):
                        continue
                    q, k, v = (
                        rng.standard_normal((b, h, n, w)).astype(np.float32) for n, w in ((nq, d), (nk, d), (nk, dv))
                    )
                    mask_shape = {
                        "none": (0, 0, 0, 0),
                        "full": (b, h, nq, nk),
                        "keys": (b, 1, 1, nk),
                        "queries": (1, 1, nq, 1),
                    }
                    mask = rng.standard_normal(mask_shape[mask_kind]).astype(np.float32)
                    s = q.astype(np.float64) @ np.swapaxes(k, 2, 3).astype(np.float64) * 0.25
                    if mask_kind != "none":
                        s = s + mask
                    if causal:
                        s = np.where(np.arange(nk) > np.arange(nq)[:, None], -np.inf, s)
                    e = np.exp(s - s.max(-1, keepdims=True))
                    want = (e / e.sum(-1, keepdims=True) @ v).astype(np.float32)

                    def tag(n: int, w: int, mixed: bool = interleaved, heads: int = h) -> str:
                        return angle("HeadStrides", heads * n * w, *((w, heads * w) if mixed else (n * w, w)))

                    shape = mask_shape[mask_kind]
                    steps = [0 if extent == 1 else int(np.prod(shape[i + 1 :])) for i, extent in enumerate(shape)]
                    mask_tag = "NoMask" if mask_kind == "none" else angle("MaskStrides", *steps)
                    kernel = angle(
                        "attention",
                        b,
                        h,
                        nq,
                        nk,
                        d,
                        dv,
                        tag(nq, d),
                        tag(nk, d),
                        tag(nk, dv),
                        tag(nq, dv),
                        mask_tag,
                        str(causal).lower(),
                    )
                    pick = (
                        (lambda t: np.ascontiguousarray(t.transpose(0, 2, 1, 3)))
                        if interleaved
                        else np.ascontiguousarray
                    )
                    inputs = [pick(q), pick(k), pick(v)]
                    pointer = "nullptr"
                    if mask_kind != "none":
                        inputs.append(mask)
                        pointer = "x3"
                    cases.append(
                        Case(
                            f"{kernel}::run(x0, x1, x2, {pointer}, y0, scratch, part, 0.25f)",
                            inputs,
                            [pick(want)],
                            kernel,
                            atol=3e-6,
                        )
                    )
    check(cases, ["attention.h"], isa, tmp_path)
