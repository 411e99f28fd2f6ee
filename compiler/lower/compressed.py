"""Fully connected layers whose weights stay integers of 4 or 8 bits."""

from __future__ import annotations

from skive import pack
from skive.ir import Node
from skive.lower.calls import Lowering, lowers
from skive.lower.strides import boolean


@lowers("compressed_linear")
def _compressed_linear(ctx: Lowering, node: Node) -> None:
    x, q, scale, zero, bias = node.inputs[:5]
    bits, group, activation = (node.attrs[k] for k in ("bits", "group", "activation"))
    if not all(i.is_const for i in node.inputs[1:5]):
        ctx.problems.append((node.label(), "compressed_linear with weights that are not constant", "use linear"))
        return
    oc, k = q.shape
    rows, isa = x.type.size // k, ctx.target.name
    zeros = bool((zero.value != 1 << (bits - 1)).any())
    words, scales, points, biases = pack.pack_compressed(
        q.value, scale.value, zero.value if zeros else None, bias.value, bits, isa, activation
    )
    fn, extra = ctx.epilogue(node)
    args = [ctx.read("x", x), ctx.packed("w", words), ctx.packed("scale", scales), ctx.packed("bias", biases)]
    if zeros:
        args.append(ctx.packed("zero", points))
    ctx.call(
        node,
        "compressed_linear",
        "compressed.h",
        [bits, activation, rows, k, oc, group, boolean(zeros)],
        ["x", "w", "scale", "zero" if zeros else "nullptr", "bias", "y", "scratch", "part", "fn"],
        [*args, ctx.write("y", node), *extra],
        fn,
        scratch=pack.compressed_scratch_bytes(rows, k, bits, activation, group, isa) * ctx.threads,
    )
