"""`transpose-free-attention`: attention reads and writes [B, N, heads, D], the layout of its neighbours."""

from __future__ import annotations

from skive import ops
from skive.ir import Graph, Node
from skive.pipeline import pass_
from skive.rewrite import Declined, Match, op, rewrite, rule

_SWAP = (0, 2, 1, 3)  # [B, heads, N, D] <-> [B, N, heads, D]


@rule(op("attention", where=lambda n: not n.attrs["token_major"]))
def token_major(m: Match) -> Node | Declined:
    """attention(swap(q), swap(k), swap(v)) = swap(attention{token_major}(q, k, v))."""
    operands = m.root.inputs[:3]
    if not all(x.op == "transpose" and x.attrs["perm"] == _SWAP for x in operands):
        return Declined("an operand is not a transposition of [B, N, heads, D]")
    attrs = {**m.root.attrs, "token_major": True}
    moved = ops.make("attention", *(x.inputs[0] for x in operands), *m.root.inputs[3:], origin=m.root.origin, **attrs)
    return ops.make("transpose", moved, origin=m.root.origin, label=m.root.name, perm=_SWAP)


@pass_("transpose-free-attention", exact=True)
def transpose_free_attention(graph: Graph, options: object) -> Graph:
    """No attention whose three operands are transposed just for it; its result is transposed instead,
    which the transposition that follows in a transformer undoes. Needs `eliminate-identity` afterwards."""
    return rewrite(graph, [token_major])
