"""Rules: recurrent layers."""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.passes.channel_groups.labels import Analysis, Axes, rule


@rule("lstm", "gru", "rnn")
def _recurrent(at: Analysis, node: Node) -> Axes:
    x, w, r, b = (at(i) for i in node.inputs[:4])
    at.joins.join(w[1], x[2])
    hidden = r[1]
    gates = len(r[0]) // len(hidden)
    every = np.tile(hidden, gates)
    for a in (w[0], r[0], b[1]):
        at.joins.join(a, every)
    at.joins.keep(b[0], f"the two biases of a gate ({node.label()})")
    for state in node.inputs[4:6]:
        h = at(state)
        at.joins.join(h[1], hidden)
        at.joins.join(h[0], x[1])
    for peep in node.inputs[6:7]:
        at.joins.join(at(peep)[0], np.tile(hidden, len(at(peep)[0]) // len(hidden)))
    at.joins.keep(x[0], f"time ({node.label()})")
    middle = (at.joins.kept(node.shape[1], f"h and c ({node.label()})"),) if node.type.rank == 4 else ()
    return (x[0], *middle, x[1], hidden)
