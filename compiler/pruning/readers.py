"""The layers that read channels, and what their weights multiply."""

from __future__ import annotations

import numpy as np

from skive.ir import Node
from skive.passes.channel_groups import Groups

DAMPING = 0.01  # of the mean second moment: directions that the data does not show
ROWS = 256  # positions of a sample that enter the moments
MOST_INPUTS = 2304  # weights of an output channel: beyond, a matrix of all their moments is too large


def readers_of(found: Groups) -> list[Node]:
    """Dense contractions with constant weights some of whose input channels can be removed."""
    free = np.array([g.reason is None for g in found.groups])
    return [
        n for n in found.graph.nodes
        if n.op in ("conv2d", "linear") and n.attrs.get("groups", 1) == 1
        and all(i.is_const and i.dtype.is_float for i in n.inputs[1:3]) and free[found.axes[n.inputs[1]][-1]].any()
    ]


def width(reader: Node) -> int:
    return reader.inputs[1].value[0].size


def input_channels(reader: Node) -> np.ndarray:
    """[K] the input channel of each weight of an output channel."""
    w = reader.inputs[1]
    return np.tile(np.arange(w.shape[-1]), width(reader) // w.shape[-1])


def rows_of(reader: Node, value: np.ndarray, turn: int) -> np.ndarray:
    """[R, K + 1] what the weights of an output channel multiply at some positions of `value`, and ones."""
    from skive.rounding import patches

    rows = patches(reader, value, ROWS, turn)
    assert rows is not None
    return np.concatenate([rows[:, 0], np.ones((len(rows), 1), rows.dtype)], 1)
