"""Recurrent layers over sequences [T, N, I].

`lstm_steps` and `gru_steps` are the layers without the product of their inputs, which is a `linear` of its own
(passes/split_recurrences.py); `quantized_lstm` and `quantized_gru` the same on 8-bit recurrent weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skive.errors import ShapeError
from skive.ir import FrozenDict
from skive.ops.elementwise import sigmoid
from skive.ops.table import F32, Array, Op, Rule
from skive.types import DType, TensorType

ROWS: list[Op] = []


# The steps of a layer, and the same on 8-bit recurrent weights.
QUANTIZED_STEPS = {"lstm_steps": "quantized_lstm", "gru_steps": "quantized_gru"}
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


def _infer_steps(gates: int, states: int, weights: DType) -> Rule:
    """`states` are the last operands; before them the recurrent weights with what belongs to each gate."""

    def rule(types: Sequence[TensorType], a: FrozenDict) -> TensorType:
        pre, r = types[:2]
        wrong = pre.rank != 3 or r.rank != 2 or r.dtype is not weights or any(
            t.dtype is not F32 for t in (pre, *types[2:]))
        h = 0 if wrong else r.shape[1]
        vectors = [(gates * h,)] * (weights is DType.i8) + [(h,)] * (gates == 3)  # scales, bias of the candidate
        if wrong or pre.shape[2] != gates * h or r.shape != (gates * h, h) or [t.shape for t in types[2:]] != [
                *vectors, *[(pre.shape[1], h)] * states]:
            raise ShapeError(f"recurrence of {', '.join(map(str, types))}")
        t, n, _ = pre.shape
        return TensorType((t, states, n, h) if states > 1 else (t, n, h), F32)

    return rule


def _exponential(x: Array) -> Array:
    """2^x of rnn_integer.h in its order of float32 operations, each correctly rounded."""
    f32 = np.float32
    x = np.where(x > f32(-125), x, f32(-125))
    x = np.where(x < f32(125), x, f32(125))
    n = np.rint(x)
    f = x - n
    p = f32(0.0013276472454890609)
    for c in (0.009675540961325169, 0.05550713092088699, 0.24022120237350464, 0.6931469440460205, 1.0000001192092896):
        p = p * f + f32(c)
    return np.ldexp(p, n.astype(np.int32))


def _exact_sigmoid(x: Array) -> Array:
    return np.float32(1) / (np.float32(1) + _exponential(x * np.float32(-1.442695041)))


def _exact_tanh(x: Array) -> Array:
    return np.float32(1) - np.float32(2) / (np.float32(1) + _exponential(x * np.float32(2.885390082)))


def _quantized_product(h: Array, r: Array, scale: Array) -> Array:
    """h [N, H] times the transpose of r [G H, H], each row of h rounded to 8 bits by its own largest value."""
    top = np.abs(h).max(-1, keepdims=True, initial=0)
    q = np.rint(h * np.where(top > np.float32(1e-30), np.float32(127) / top, np.float32(0)))
    sums = (q.astype(np.float64) @ r.T.astype(np.float64)).astype(np.float32)
    return sums * (scale * (top / np.float32(127)))


def _lstm_steps(product: Callable[[Array], Array], pre: Array, h: Array, c: Array, sig: Callable[[Array], Array],
                tanh: Callable[[Array], Array]) -> Array:
    out = []
    for xt in pre:
        i, o, f, g = np.split(xt + product(h), 4, -1)
        c = sig(f) * c + sig(i) * tanh(g)
        h = sig(o) * tanh(c)
        out.append(np.stack([h, c]))
    return np.stack(out) if out else np.zeros((0, 2, *h.shape), h.dtype)


def _gru_steps(product: Callable[[Array], Array], pre: Array, bias: Array, h: Array, sig: Callable[[Array], Array],
               tanh: Callable[[Array], Array]) -> Array:
    out = []
    for xt in pre:
        (xz, xr, xh), (z, r, rec) = np.split(xt, 3, -1), np.split(product(h), 3, -1)
        fresh = tanh(xh + sig(xr + r) * (rec + bias))
        h = fresh + sig(xz + z) * (h - fresh)
        out.append(h)
    return np.stack(out) if out else np.zeros((0, *h.shape), h.dtype)


def _ref_lstm_steps(x: Sequence[Array], a: FrozenDict) -> Array:
    pre, r, h, c = (v.astype(np.float64) for v in x)
    return _lstm_steps(lambda v: v @ r.T, pre, h, c, sigmoid, np.tanh).astype(np.float32)


def _ref_gru_steps(x: Sequence[Array], a: FrozenDict) -> Array:
    pre, r, bias, h = (v.astype(np.float64) for v in x)
    return _gru_steps(lambda v: v @ r.T, pre, bias, h, sigmoid, np.tanh).astype(np.float32)


def _ref_quantized_lstm(x: Sequence[Array], a: FrozenDict) -> Array:
    pre, r, scale, h, c = x
    return _lstm_steps(lambda v: _quantized_product(v, r, scale), pre, h, c, _exact_sigmoid, _exact_tanh)


def _ref_quantized_gru(x: Sequence[Array], a: FrozenDict) -> Array:
    pre, r, scale, bias, h = x
    return _gru_steps(lambda v: _quantized_product(v, r, scale), pre, bias, h, _exact_sigmoid, _exact_tanh)


_STEP = ("each row of h is rounded to 8 bits by its own largest value before it meets r; what follows is float32, each "
         "operation correctly rounded, so that all targets give the same bits")
ROWS.append(Op("lstm_steps", (4, 4), _infer_steps(4, 2, F32), _ref_lstm_steps, {}, "contract", 1e-5,
        doc="`lstm` whose inputs' share pre [T,N,4H] of the gates, biases included, is computed beforehand; "
            "r [4H,H], h0 and c0 [N,H]"))
ROWS.append(Op("gru_steps", (4, 4), _infer_steps(3, 1, F32), _ref_gru_steps, {}, "contract", 1e-5,
        doc="`gru` with reset_after whose inputs' share pre [T,N,3H] of the gates, biases included, is computed "
            "beforehand; r [3H,H], the recurrent bias of the candidate [H], h0 [N,H]"))
ROWS.append(Op("quantized_lstm", (5, 5), _infer_steps(4, 2, DType.i8), _ref_quantized_lstm, {}, "contract", 0.0,
        doc=f"`lstm_steps` with r of i8 and its scales [4H]: {_STEP}"))
ROWS.append(Op("quantized_gru", (5, 5), _infer_steps(3, 1, DType.i8), _ref_quantized_gru, {}, "contract", 0.0,
        doc=f"`gru_steps` with r of i8 and its scales [3H]: {_STEP}"))
