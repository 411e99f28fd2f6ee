"""Recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from skive.export.onnx.writer import Inexpressible, Writer, integers, row
from skive.ir import Graph, Node
from skive.types import DType

LSTMS = frozenset({"lstm", "lstm_steps", "quantized_lstm"})
ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}


def recurrent(w: Writer, n: Node, op: str, outputs: int, **attrs: Any) -> list[str]:
    """An ONNX recurrence of one direction; its bias is the two rows of the IR's, one after the other."""
    if any(a not in ACTIVATIONS for a in n.attrs["activations"]):
        raise Inexpressible(f"{n.op} with the activations {', '.join(n.attrs['activations'])}")
    x, weights, r, bias, *states = n.inputs

    def one(v: Node, *shape: int) -> str:
        if v.is_const:
            return w.initializer(v.value.reshape(shape))
        return w.emit("Reshape", w.get(v), integers(*shape))

    hidden = r.shape[1]
    operands = [w.get(x), one(weights, 1, *weights.shape), one(r, 1, *r.shape), one(bias, 1, bias.type.size), "",
                *(one(s, 1, *s.shape) if s.type.rank == 2 else one(s, 1, s.type.size) for s in states)]
    return w.emit_all(op, operands, outputs, hidden_size=hidden,
                      activations=[ACTIVATIONS[a] for a in n.attrs["activations"]], **attrs)


@row("gru", "rnn")
def gru(w: Writer, n: Node) -> None:
    attrs = {"linear_before_reset": int(n.attrs["reset_after"])} if n.op == "gru" else {}
    y = recurrent(w, n, n.op.upper(), 1, **attrs)[0]  # [T, 1, N, H]
    w.put(n, w.emit("Reshape", y, integers(n.shape[0], -1, n.shape[2])))


@row("lstm")
def lstm(w: Writer, n: Node) -> None:
    put_states(w, n, recurrent(w, n, "LSTM", 3))


def put_states(w: Writer, n: Node, results: list[str]) -> None:
    """ONNX gives h of every step but c of the last one only: the others must not be read."""
    steps, _, _, hidden = n.shape
    if not reads_last_cell(w.graph, n, steps):
        raise Inexpressible("an LSTM of which the cell state of an inner step is read")
    y, _, c = results
    states = w.emit("Reshape", c, integers(1, 1, -1, hidden))
    states = w.emit("Expand", states, integers(steps, 1, 1, 1)) if steps > 1 else states
    w.put(n, w.emit("Concat", y, states, axis=1))


@row("lstm_steps", "gru_steps", "quantized_lstm", "quantized_gru")
def steps(w: Writer, n: Node) -> None:
    """The inputs' share of the gates goes through an identity. ONNX has no recurrence that rounds its state: 8-bit
    weights are read as the numbers they stand for, states stay float32."""
    pre, r, *rest = n.inputs
    total, hidden = r.shape
    if r.dtype is DType.f32:
        weights = w.emit("Reshape", w.get(r), integers(1, total, hidden))
    else:
        zeros = np.zeros(total, np.int8)
        weights = w.emit("DequantizeLinear", r.value[None], w.get(rest.pop(0)), zeros, axis=1)
    bias = np.zeros((1, 2 * total), np.float32)
    if total == 3 * hidden:
        bias[0, -hidden:] = rest.pop(0).value
    states = [w.emit("Reshape", w.get(s), integers(1, *s.shape)) for s in rest]
    identity = w.initializer(np.eye(total, dtype=np.float32)[None])
    operands = [w.get(pre), identity, weights, w.initializer(bias), "", *states]
    if total == 3 * hidden:
        y = w.emit_all("GRU", operands, 1, hidden_size=hidden, linear_before_reset=1)[0]
        w.put(n, w.emit("Reshape", y, integers(n.shape[0], -1, hidden)))
    else:
        put_states(w, n, w.emit_all("LSTM", operands, 3, hidden_size=hidden))


def reads_last_cell(graph: Graph, x: Node, steps: int) -> bool:
    """Whether all that is read of `x` [T, ...] is the last step, or of an LSTM the hidden states too."""
    if steps == 1:
        return True
    if graph.is_output(x):
        return False
    for user in graph.users[x]:
        a = user.attrs
        hidden_only = x.op in LSTMS and user.op == "slice" and a["start"][1] + a["size"][1] == 1
        if hidden_only or (user.op == "slice" and a["start"][0] == steps - 1):
            continue
        keeps_steps = user.op in ("slice", "reshape") and user.shape[:1] == (steps,)
        if not keeps_steps or not reads_last_cell(graph, user, steps):
            return False
    return True
