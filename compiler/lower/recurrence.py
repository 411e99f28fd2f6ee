"""LSTM, GRU and plain recurrent networks."""

from __future__ import annotations

import numpy as np

from skive import pack
from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.strides import boolean
from skive.types import DType


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


@lowers("lstm_steps", "gru_steps", "quantized_lstm", "quantized_gru")
def _steps(ctx: Lowering, node: Node) -> None:
    pre, r, *rest = node.inputs
    if not r.is_const:
        ctx.problems.append((node.label(), f"{node.op} with weights that are not constant", "use lstm or gru"))
        return
    (t, b, _), (n, h), isa = pre.shape, r.shape, ctx.target.name
    gates = n // h
    template = [t, b, h]
    names = ["candidate", "h0"] if gates == 3 else ["h0", "c0"]
    order = ["pre", "r", *names]
    if r.dtype is DType.f32:
        panels = np.split(r.value, [2 * h]) if gates == 3 else [r.value]
        packed = {"r": np.concatenate([pack.pack_gates(p, b, isa) for p in panels])}
        header, scratch = "rnn.h", pack.steps_scratch_bytes(gates, b, h, isa)
        order += [] if gates == 3 else ["nullptr"]  # peepholes
    else:
        block = pack.conv2d_block(n, isa, b, element_size=1, depth=h)
        whole = np.pad(r.value, ((0, 0), (0, -h % 4)))
        packed = {"r": pack.pack_conv2d_u8(whole[:, None, None, :], block),
                  "bias": pack.pack_bias_i32(None, whole, 128, block)}  # fmt: skip
        header, scratch = "rnn_integer.h", pack.quantized_steps_scratch_bytes(gates, b, h)
        template.append(block)
        names = ["scale", *names]
        order = ["pre", "r", "bias", *names]
    args = [
        ctx.read("pre", pre),
        *(ctx.packed(name, w) for name, w in packed.items()),
        *(ctx.read(name, i) for name, i in zip(names, rest, strict=True)),
        ctx.write("y", node),
    ]
    ctx.call(node, node.op, header, template, [*order, "y", "scratch", "part"], args, scratch=scratch)
