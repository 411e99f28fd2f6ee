"""LSTM, GRU and simple recurrence over sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch import Case, angle, check
from driver import cpu_isas

# T, N, I, H; of the last one the rows of the input lie whole pages apart, and are copied by the product.
SHAPES = [(1, 1, 1, 1), (4, 1, 3, 17), (3, 5, 7, 33), (2, 9, 1024, 16)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _operands(rng: np.random.Generator, t: int, n: int, i: int, h: int, gates: int) -> list[np.ndarray]:
    shapes = [(t, n, i), (gates * h, i), (gates * h, h), (2, gates * h), (n, h), (n, h), (3 * h,)]
    scale = 0.5 / max(1.0, i**0.5 / 4)  # sums of a size at which the activations are not flat
    return [(rng.standard_normal(s) * scale).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("isa", cpu_isas())
def test_lstm(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    cases = []
    for t, n, i, h in SHAPES:
        arrays = _operands(rng, t, n, i, h, 4)
        for peephole in (False, True):
            x, w, r, b, h0, c0, p = (a.astype(np.float64) for a in arrays)
            p = p.reshape(3, h) if peephole else np.zeros((3, h))
            want = []
            for step in x:
                gi, go, gf, gc = np.split(step @ w.T + h0 @ r.T + b[0] + b[1], 4, 1)
                fresh = _sigmoid(gf + p[2] * c0) * c0 + _sigmoid(gi + p[0] * c0) * np.tanh(gc)
                h0, c0 = _sigmoid(go + p[1] * fresh) * np.tanh(fresh), fresh
                want.append(np.stack([h0, c0]))
            kernel = angle("lstm", t, n, i, h)
            text = f"{kernel}::run(x0, x1, x2, x3, x4, x5, {'x6' if peephole else 'nullptr'}, y0, scratch, part)"
            cases.append(Case(text, arrays, [np.stack(want).astype(np.float32)], kernel, atol=3e-6))
    check(cases, ["rnn.h"], isa, tmp_path)


@pytest.mark.parametrize("isa", cpu_isas())
def test_gru_and_rnn(isa: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(18)
    cases = []
    for t, n, i, h in SHAPES:
        for reset_after in (False, True):
            arrays = _operands(rng, t, n, i, h, 3)[:5]
            x, w, r, b, state = (a.astype(np.float64) for a in arrays)
            (wz, wr, wh), (rz, rr, rh), (bz, br, bh), (cz, cr, ch) = (np.split(a, 3) for a in (w, r, b[0], b[1]))
            want = []
            for step in x:
                z = _sigmoid(step @ wz.T + state @ rz.T + bz + cz)
                reset = _sigmoid(step @ wr.T + state @ rr.T + br + cr)
                rec = reset * (state @ rh.T + ch) if reset_after else (reset * state) @ rh.T + ch
                state = (1 - z) * np.tanh(step @ wh.T + bh + rec) + z * state
                want.append(state)
            kernel = angle("gru", t, n, i, h, "SigmoidFn", "TanhFn", str(reset_after).lower())
            cases.append(
                Case(
                    f"{kernel}::run(x0, x1, x2, x3, x4, y0, scratch, part)",
                    arrays,
                    [np.stack(want).astype(np.float32)],
                    kernel,
                    atol=3e-6,
                )
            )
        for name, fn in (("TanhFn", np.tanh),) if n > 1 else (("ReluFn", lambda v: np.maximum(v, 0)),):
            arrays = _operands(rng, t, n, i, h, 1)[:5]
            x, w, r, b, state = (a.astype(np.float64) for a in arrays)
            want = []
            for step in x:
                state = fn(step @ w.T + state @ r.T + b[0] + b[1])
                want.append(state)
            kernel = angle("rnn", t, n, i, h, name)
            cases.append(
                Case(
                    f"{kernel}::run(x0, x1, x2, x3, x4, y0, scratch, part)",
                    arrays,
                    [np.stack(want).astype(np.float32)],
                    kernel,
                    atol=3e-6,
                )
            )
    check(cases, ["rnn.h"], isa, tmp_path)
