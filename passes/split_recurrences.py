"""`split-recurrences`: the input's share of the gates of recurrent layers is a product of its own.

An LSTM or GRU over a sequence multiplies its inputs by weights at all steps at once and its states step by step. Apart,
the product of the inputs is a `linear` like any other, which is quantized, calibrated and reported as such, and the
steps are `lstm_steps` or `gru_steps`, whose recurrent weights the quantizer makes 8-bit integers. The weights must be
constant, the activations the usual ones; no peepholes; of a GRU the reset gate is applied to the recurrent product
(linear_before_reset, as PyTorch and cuDNN have it).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import NoOptions, pass_
from skive.rewrite import Match, Rule, op, rewrite
from skive.types import DType


def can_split(node: Node) -> bool:
    """True for an LSTM or GRU that this pass splits."""
    usual = (
        node.op == "lstm" and len(node.inputs) == 6 and node.attrs["activations"] == ("sigmoid", "tanh", "tanh")
    ) or (node.op == "gru" and node.attrs["activations"] == ("sigmoid", "tanh") and node.attrs["reset_after"])
    return usual and node.dtype is DType.f32 and node.type.size > 0 and all(i.is_const for i in node.inputs[1:4])


def split(node: Node) -> Node:
    """`node`, for which `can_split` is true, in two."""
    x, w, r, bias, *states = node.inputs
    whole = bias.value[0].astype(np.float32)
    recurrent = bias.value[1].astype(np.float32)
    hidden = r.shape[1]
    candidate = []
    if node.op == "gru":  # the reset gate scales the candidate's recurrent bias
        candidate = [constant(recurrent[2 * hidden :].copy(), origin=node.origin)]
        recurrent = np.concatenate([recurrent[: 2 * hidden], np.zeros(hidden, np.float32)])
    total = constant(whole + recurrent, name=bias.name, origin=node.origin)
    pre = ops.make("linear", x, w, total, origin=node.origin, label=f"{node.name}/inputs")
    return ops.make(f"{node.op}_steps", pre, r, *candidate, *states, origin=node.origin, label=node.name)


def recurrences_split(graph: Graph, keep: Callable[[Node], bool] = lambda node: False) -> Graph:
    """`graph` with all recurrent layers split that can be, but those that `keep` names."""

    def apart(m: Match) -> Node | None:
        return split(m.root) if can_split(m.root) and not keep(m.root) else None

    return rewrite(graph, [Rule("split-recurrence", op("lstm|gru"), apart)])


@pass_("split-recurrences", exact=True)
def split_recurrences(graph: Graph, options: NoOptions) -> Graph:
    """LSTMs and GRUs with constant weights read their inputs' share of the gates."""
    return recurrences_split(graph)
