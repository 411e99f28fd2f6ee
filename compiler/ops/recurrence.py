"""Recurrent layers over sequences [T, N, I]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.elementwise import sigmoid
from skive.ops.table import Array, Op, Rule
from skive.types import TensorType

ROWS: list[Op] = []


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"sigmoid": sigmoid, "tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x}


def _infer_rnn(gates: int, states: int) -> Rule:
    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        x, w, r, b = types[:4]
        if x.rank != 3 or w.rank != 2 or r.rank != 2:
            raise ShapeError(f"recurrence of {', '.join(map(str, types))}")
        t, n, _ = x.shape
        h = r.shape[1]
        if w.shape != (gates * h, x.shape[2]) or r.shape != (gates * h, h) or b.shape != (2, gates * h) or any(
                s.shape != (n, h) for s in types[4:4 + states]):
            raise ShapeError(f"recurrence of {', '.join(map(str, types))}")
        return TensorType((t, states, n, h) if states > 1 else (t, n, h), x.dtype)

    return rule


def _ref_lstm(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h, c = (v.astype(np.float64) for v in x[:6])
    peep = x[6].astype(np.float64).reshape(3, -1) if len(x) > 6 else np.zeros((3, r.shape[1]))
    f, g, hh = (ACTIVATIONS[n] for n in a["activations"])
    out = []
    for xt in seq:
        i, o, fo, ce = np.split(xt @ w.T + h @ r.T + b[0] + b[1], 4, -1)
        i, fo = f(i + peep[0] * c), f(fo + peep[2] * c)
        c = fo * c + i * g(ce)
        h = f(o + peep[1] * c) * hh(c)
        out.append(np.stack([h, c]))
    return np.stack(out).astype(x[0].dtype)


def _ref_gru(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h = (v.astype(np.float64) for v in x[:5])
    f, g = (ACTIVATIONS[n] for n in a["activations"])
    (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
    (bz, br, bh), (cz, cr, ch) = np.split(b[0], 3), np.split(b[1], 3)
    out = []
    for xt in seq:
        z, rt = f(xt @ wz.T + h @ rz.T + bz + cz), f(xt @ wr.T + h @ rr.T + br + cr)
        n = g(xt @ wh.T + rt * (h @ rh.T + ch) + bh) if a["reset_after"] else g(xt @ wh.T + (rt * h) @ rh.T + ch + bh)
        h = (1 - z) * n + z * h
        out.append(h)
    return np.stack(out).astype(x[0].dtype)


def _ref_rnn(x: Sequence[Array], a: FrozenDict) -> Array:
    seq, w, r, b, h = (v.astype(np.float64) for v in x[:5])
    f = ACTIVATIONS[a["activations"][0]]
    out = []
    for xt in seq:
        h = f(xt @ w.T + h @ r.T + b[0] + b[1])
        out.append(h)
    return np.stack(out).astype(x[0].dtype)


ROWS.append(Op("lstm", (6, 7), _infer_rnn(4, 2), _ref_lstm, {"activations": ("sigmoid", "tanh", "tanh")}, "contract", 1e-5,
        doc="x [T,N,I], w [4H,I], r [4H,H], b [2,4H], h0 and c0 [N,H], peepholes [3H]; gates i o f c; "
            "result [T, 2, N, H] holds h and c of each step (Hochreiter, Schmidhuber: Long Short-Term Memory, 1997)"))
ROWS.append(Op("gru", (5, 5), _infer_rnn(3, 1), _ref_gru, {"activations": ("sigmoid", "tanh"), "reset_after": False}, "contract", 1e-5,
        doc="x [T,N,I], w [3H,I], r [3H,H], b [2,3H], h0 [N,H]; gates z r h; result [T, N, H] (Cho et al., 2014)"))
ROWS.append(Op("rnn", (5, 5), _infer_rnn(1, 1), _ref_rnn, {"activations": ("tanh",)}, "contract", 1e-5,
        doc="x [T,N,I], w [H,I], r [H,H], b [2,H], h0 [N,H]; result [T, N, H]"))
