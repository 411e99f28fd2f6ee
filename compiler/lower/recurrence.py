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


@lowers("lstm_steps", "gru_steps")
def _steps(ctx: Lowering, node: Node) -> None:
    pre, r, *rest = node.inputs
    if not r.is_const:
        ctx.problems.append((node.label(), f"{node.op} with weights that are not constant", "use lstm or gru"))
        return
    (t, b, _), h, isa = pre.shape, r.shape[1], ctx.target.name
    gates = r.shape[0] // h
    panels = np.split(r.value, [2 * h]) if gates == 3 else [r.value]
    weights = ctx.packed("r", np.concatenate([pack.pack_gates(p, b, isa) for p in panels]))
    names = ["bias", "h0"] if gates == 3 else ["h0", "c0"]
    args = [ctx.read("pre", pre), weights, *(ctx.read(n, i) for n, i in zip(names, rest, strict=True))]
    order = ["pre", "r", *names, *([] if gates == 3 else ["nullptr"]), "y", "scratch", "part"]
    ctx.call(node, node.op, "rnn.h", [t, b, h], order, [*args, ctx.write("y", node)],
             scratch=pack.steps_scratch_bytes(gates, b, h, isa))  # fmt: skip


@lowers("quantized_lstm", "quantized_gru")
def _quantized(ctx: Lowering, node: Node) -> None:
    pre, r, *rest = node.inputs
    if not r.is_const:
        ctx.problems.append((node.label(), f"{node.op} with weights that are not constant", "use lstm or gru"))
        return
    (t, b, _), (n, h) = pre.shape, r.shape
    gates = n // h
    block = pack.conv2d_block(n, ctx.target.name, b, element_size=1, depth=h)
    padded = np.pad(r.value, ((0, 0), (0, -h % 4)))
    names = ["scale", *(["candidate", "h0"] if gates == 3 else ["h0", "c0"])]
    args = [
        ctx.read("pre", pre),
        ctx.packed("r", pack.pack_conv2d_u8(padded[:, None, None, :], block)),
        ctx.packed("bias", pack.pack_bias_i32(None, padded, 128, block)),
        *(ctx.read(name, i) for name, i in zip(names, rest, strict=True)),
        ctx.write("y", node),
    ]
    ctx.call(node, node.op, "rnn_integer.h", [t, b, h, block],
             ["pre", "r", "bias", *names, "y", "scratch", "part"], args,
             scratch=pack.quantized_steps_scratch_bytes(gates, b, h))  # fmt: skip
