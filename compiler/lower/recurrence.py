"""LSTM, GRU and plain recurrent networks."""

from __future__ import annotations

import numpy as np

from skive import pack
from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.strides import boolean


@lowers("lstm", "gru", "rnn")
def _recurrent(ctx: Lowering, node: Node) -> None:
    x, w, r = node.inputs[:3]
    t, b, i = x.shape
    h = r.shape[1]
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[node.op]
    packed, isa = w.is_const and r.is_const, ctx.target.name
    template: list[object] = [t, b, i, h, *(f"{a.capitalize()}Fn" for a in node.attrs["activations"])]
    if node.op == "gru":
        template.append(boolean(node.attrs["reset_after"]))
    template.append(boolean(packed))
    if packed:
        # The reset gate of a GRU stands between its first two gates and the third: two panels.
        panels = np.split(r.value, [2 * h]) if node.op == "gru" else [r.value]
        weights = [
            ctx.packed("w", pack.pack_gates(w.value, t * b, isa)),
            ctx.packed("r", np.concatenate([pack.pack_gates(p, b, isa) for p in panels])),
        ]
    else:
        weights = [ctx.read("w", w), ctx.read("r", r)]
    args = [ctx.read("x", x), *weights, ctx.read("bias", node.inputs[3]), ctx.read("h0", node.inputs[4])]
    order = ["x", "w", "r", "bias", "h0"]
    if node.op == "lstm":
        args.append(ctx.read("c0", node.inputs[5]))
        order.append("c0")
        if len(node.inputs) > 6:
            args.append(ctx.read("peep", node.inputs[6]))
        order.append("peep" if len(node.inputs) > 6 else "nullptr")
    args.append(ctx.write("y", node))
    order.append("y")
    ctx.call(
        node,
        node.op,
        "rnn.h",
        template,
        [*order, "scratch", "part"],
        args,
        scratch=pack.recurrent_scratch_bytes(gates, t, b, i, h, packed, isa),
    )
