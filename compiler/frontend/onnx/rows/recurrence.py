"""LSTM, GRU and RNN: both directions, both layouts, sequence lengths."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node
from skive.ops import ACTIVATIONS
from skive.types import DType

DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@onnx_op("LSTM", "GRU", "RNN")
def recurrent(c: Call) -> list[Node]:
    x = c[0]
    layout = int(c.attr("layout", 0))
    x = c.transpose(x, (1, 0, 2)) if layout else x  # [T, N, I]
    direction = c.choice("direction", "forward", "reverse", "bidirectional")
    ways = 2 if direction == "bidirectional" else 1
    steps, batch = x.shape[:2]
    w, r = c[1], c[2]
    hidden = int(c.attr("hidden_size", r.shape[-1]))
    if w.type.rank != 3 or r.type.rank != 3 or w.shape[0] != ways or r.shape[0] != ways:
        raise InvalidModelError(f"weights {w.type} and {r.type} for {ways} directions")
    if "clip" in c.attrs or c.attr("input_forget", 0):
        what = f"clip={c.attrs['clip']:g}" if "clip" in c.attrs else "input_forget"
        raise Unsupported(f"{c.op_type} with {what}", "export the layer without it, or written out in its steps")
    if c.has(7) and c.op_type != "LSTM":
        raise InvalidModelError(f"{c.op_type} with a peephole")
    c.room(batch * steps * hidden, "the result")
    lengths = sequence_lengths(c, steps, batch)
    results = [one_way(c, x, way, direction == "reverse" or way == 1, lengths, layout, hidden) for way in range(ways)]
    y = c.stack([r[0] for r in results], 1)  # [T, D, N, H]
    last = [c.stack([r[i] for r in results], 0) for i in range(1, len(results[0]))]  # [D, N, H]
    if layout:
        y = c.transpose(y, (2, 0, 1, 3))
        last = [c.transpose(v, (1, 0, 2)) for v in last]
    return [y, *last]


def sequence_lengths(c: Call, steps: int, batch: int) -> Node | None:
    """[N] i64: how many steps each sample has; None if all have all."""
    if not c.has(4):
        return None
    lengths = c.cast(c[4], DType.i64)
    if lengths.shape != (batch,):
        raise InvalidModelError(f"sequence_lens {lengths.type} for {batch} samples")
    if not lengths.is_const:
        return c.make("clip", lengths, lo=0, hi=steps)
    if lengths.value.min(initial=0) < 0 or lengths.value.max(initial=0) > steps:
        raise InvalidModelError(f"sequence_lens {lengths.value.tolist()} for {steps} steps")
    return lengths if (lengths.value != steps).any() else None


def one_way(c: Call, x: Node, way: int, backward: bool, lengths: Node | None, layout: int, hidden: int) -> list[Node]:
    """All hidden states [T, N, H] and the last ones [N, H] of one direction."""
    steps, batch = x.shape[:2]
    gates = GATES[c.op_type]
    w, r = c.index(c[1], 0, way), c.index(c[2], 0, way)
    bias = (c.reshape(c.index(c[3], 0, way), (2, gates * hidden)) if c.has(3)
            else c.full((2, gates * hidden), 0, x.dtype))
    zeros = c.full((batch, hidden), 0, x.dtype)
    start = [initial(c, i, way, layout, zeros) for i in ((5, 6) if c.op_type == "LSTM" else (5,))]
    if backward:
        x = backwards(c, x, lengths)
    operands = [x, w, r, bias, *start]
    names = activations(c, way)
    if c.op_type == "LSTM":
        if c.has(7):
            operands.append(c.index(c[7], 0, way))
        both = c.make("lstm", *operands, activations=names)  # [T, 2, N, H]
        tracks = [c.index(both, 1, 0), c.index(both, 1, 1)]
    elif c.op_type == "GRU":
        tracks = [c.make("gru", *operands, activations=names, reset_after=bool(c.attr("linear_before_reset", 0)))]
    else:
        tracks = [c.make("rnn", *operands, activations=names)]
    y = tracks[0]
    if lengths is None:
        last = [c.index(t, 0, steps - 1) for t in tracks]
    else:  # the state after a sample's own last step
        at = c.expand(c.reshape(c.make("max", c.make("sub", lengths, 1), 0), (1, batch, 1)), (1, batch, hidden))
        alive = c.reshape(c.make("greater", lengths, 0), (batch, 1))
        last = [c.make("where", alive, c.index(c.make("gather_elements", t, at, axis=0), 0, 0), s)
                for t, s in zip(tracks, start)]
        inside = c.make("less", c.lit(np.arange(steps)[:, None, None], np.int64), c.reshape(lengths, (1, batch, 1)))
        y = c.make("where", inside, y, c.lit(0, y.dtype))
    return [backwards(c, y, lengths) if backward else y, *last]


def backwards(c: Call, x: Node, lengths: Node | None) -> Node:
    """[T, N, I] with the steps of every sample in reverse; what lies behind its end stays."""
    steps, batch, _ = x.shape
    if lengths is None:
        return c.slice(x, 0, steps - 1, steps, -1)
    t, own = c.lit(np.arange(steps)[:, None, None], np.int64), c.reshape(lengths, (1, batch, 1))
    index = c.make("where", c.make("less", t, own), c.make("sub", c.make("sub", own, t), 1), t)
    return c.make("gather_elements", x, c.expand(index, x.shape), axis=0)


def initial(c: Call, i: int, way: int, layout: int, zeros: Node) -> Node:
    """The initial state [N, H] of one direction, zero by default."""
    if not c.has(i):
        return zeros
    return c.index(c.transpose(c[i], (1, 0, 2)) if layout else c[i], 0, way)


def activations(c: Call, way: int) -> tuple[str, ...]:
    default = DEFAULTS[c.op_type]
    names = [str(n).lower() for n in c.attr("activations", ())] or list(default) * 2
    chosen = tuple(n
                   for n in names[way * len(default):(way + 1) * len(default)])
    for name in chosen:
        if name not in ACTIVATIONS:
            raise Unsupported(f"{c.op_type} with the activation {name}", f"it can be {', '.join(sorted(ACTIVATIONS))}")
    if len(chosen) != len(default):
        raise InvalidModelError(f"activations {names}")
    return chosen
