"""Weights of the layers that read what is left, fitted to what these layers gave before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.channel_groups import Groups, zeroed
from skive.pruning.readers import DAMPING, MOST_INPUTS, input_channels, readers_of, rows_of, width

CONTRACTIONS = frozenset({"conv2d", "conv_transpose2d", "linear", "lstm", "gru", "rnn"})
WIDE_ROWS = 2048  # positions that a layer wider than MOST_INPUTS is fitted to


def restored(weights: np.ndarray, now: np.ndarray, cross: np.ndarray, keep: np.ndarray, rows: int) -> np.ndarray:
    """Weights [OC, K + 1], bias last, on the inputs that `keep` [K + 1] bool names, zero elsewhere, whose results
    have the least mean squared error against `weights` on the inputs of the whole network.

    `now` [K + 1, K + 1] the mean of x x' over `rows` positions, `cross` that of X x', X the inputs x as they
    were in the whole network (He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017).
    """
    inner = now[np.ix_(keep, keep)]
    # The fewer positions were seen for each weight, the less they say about others; a bias needs few.
    share = DAMPING + np.count_nonzero(keep) / rows
    pull = np.full(len(inner), share * float(np.diagonal(now)[:-1].mean()) + 1e-12)
    if keep[-1]:
        pull[-1] = 1e-12
    old = weights[:, keep]
    target = weights @ cross[:, keep] - old @ inner  # damping pulls towards the old weights, not towards zero
    result = np.zeros_like(weights)
    result[:, keep] = old + np.linalg.solve(inner + np.diag(pull), target.T).T
    return result


def restored_wide(weights: np.ndarray, before: np.ndarray, after: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """What `restored` gives, for weights that are many more than the positions: `before` and `after` [R, K + 1] are
    the inputs in the whole network and now. Costs R^2 K: the problem is solved in the space of the positions."""
    rows = len(after)
    result = np.where(keep, weights, 0.0)
    lacking = before @ weights.T - after @ result.T  # [R, OC]
    x = after[:, :-1] * keep[:-1]
    pull = (DAMPING + np.count_nonzero(keep) / rows) * float(np.square(after[:, :-1]).mean()) + 1e-12
    middle, shift = (x.mean(0), lacking.mean(0)) if keep[-1] else (0.0, 0.0)  # the bias takes the mean
    x, lacking = x - middle, lacking - shift
    dual = np.linalg.solve(x @ x.T / rows + pull * np.eye(rows), lacking)  # [R, OC]
    change = dual.T @ x / rows
    result[:, :-1] += change
    if keep[-1]:
        result[:, -1] += shift - change @ middle
    return result


def unfit(found: Groups, node: Node) -> str | None:
    """Why the weights of a layer that reads removed channels cannot be fitted; None if they can."""
    if node in set(readers_of(found)):
        shared = [i for i in node.inputs[1:3] if len(found.graph.users[i]) > 1]
        return "its weights are shared with another layer" if shared else None
    if any(not i.is_const or not i.dtype.is_float for i in node.inputs[1:3]):
        return "its weights are not float32 constants"
    if node.attrs.get("groups", 1) > 1:
        return "a convolution in groups"
    return f"{node.op} has no least-squares form here"


def left_as_they_were(found: Groups, gone: np.ndarray) -> list[dict[str, str]]:
    """The layers that lose input channels and are not fitted, with the reason."""
    listed = []
    for n in found.graph.nodes:
        if n.op not in CONTRACTIONS or not any(gone[found.axes[n.inputs[0]][-1]].tolist()):
            continue
        if n.attrs.get("groups", 1) == n.inputs[0].shape[-1]:
            continue  # depthwise: an output channel goes with its input channel
        if reason := unfit(found, n):
            listed.append({"layer": n.label(), "reason": reason})
    return listed


def refitted(found: Groups, gone: np.ndarray, samples: Sequence[Sequence[np.ndarray]]) -> Graph:
    """The graph of `found` with the groups `gone` [groups] bool zero and the layers that read what is left
    fitted, first to last, to what they gave in the whole network.

    The network runs twice side by side, whole and with what was fitted so far: a layer makes up for what
    its inputs lost, and no layer for what another has made up for already.
    """
    emptied = dict(zip(found.graph.nodes, zeroed(found, np.flatnonzero(gone)).nodes, strict=True))
    fit = {n for n in readers_of(found) if not unfit(found, n)}
    last = {i: n for n in found.graph.nodes for i in n.inputs}
    new: dict[Node, Node] = {}
    whole: dict[Node, list[np.ndarray]] = {}
    now: dict[Node, list[np.ndarray]] = {}
    for node in found.graph.nodes:
        if node.is_const:
            new[node] = emptied[node]
            continue
        if node.op == "input":
            new[node] = node
            whole[node] = now[node] = [s[found.graph.inputs.index(node)] for s in samples]
            continue
        if node in fit:
            w, *bias = node.inputs[1:3]
            keep = np.append(~gone[found.axes[w][-1][input_channels(node)]], bool(bias))
            if keep[:-1].any() and whole[node.inputs[0]] is not now[node.inputs[0]]:
                weights = _fitted_weights(node, whole[node.inputs[0]], now[node.inputs[0]], keep)
                weights[gone[found.axes[w][0]]] = 0
                new[w] = constant(weights[:, :-1].reshape(w.shape).astype(np.float32), name=w.name, origin=w.origin)
                for b in bias:
                    new[b] = constant(weights[:, -1].astype(np.float32), name=b.name, origin=b.origin)
        new[node] = rebuilt(node, tuple(new[i] for i in node.inputs))
        whole[node] = [_evaluated(node, whole, s) for s in range(len(samples))]
        same = all(a is b for a, b in zip(new[node].inputs, node.inputs, strict=True) if a.is_const) and all(
            whole[i] is now[i] for i in node.inputs if not i.is_const)
        now[node] = whole[node] if same else [_evaluated(new[node], now, s, node) for s in range(len(samples))]
        for i in set(node.inputs):
            if last[i] is node and not i.is_const:
                del whole[i], now[i]
    return found.graph.with_nodes(new)


def _evaluated(node: Node, values: Mapping[Node, Sequence[np.ndarray]], sample: int, old: Node | None = None
               ) -> np.ndarray:
    inputs = (old or node).inputs
    return ops.evaluate(node, [n.value if n.is_const else values[o][sample]
                               for n, o in zip(node.inputs, inputs, strict=True)])


def _fitted_weights(node: Node, whole: Sequence[np.ndarray], now: Sequence[np.ndarray], keep: np.ndarray) -> np.ndarray:
    w, *bias = node.inputs[1:3]
    flat = np.zeros((w.shape[0], width(node) + 1))
    flat[:, :-1] = w.value.reshape(len(flat), -1)
    for b in bias:
        flat[:, -1] = b.value
    if flat.shape[1] - 1 > MOST_INPUTS:
        share = max(1, WIDE_ROWS // len(whole))
        pairs = [tuple(rows_of(node, v, turn)[:share].astype(np.float64) for v in pair)
                 for turn, pair in enumerate(zip(whole, now, strict=True))]
        before, after = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return restored_wide(flat, before, after, keep)
    inner, cross, rows = np.zeros((flat.shape[1],) * 2), np.zeros((flat.shape[1],) * 2), 0
    for turn, (old, new) in enumerate(zip(whole, now, strict=True)):
        before, after = rows_of(node, old, turn), rows_of(node, new, turn)
        inner += after.T @ after
        cross += before.T @ after
        rows += len(after)
    return restored(flat, inner / rows, cross / rows, keep, rows)


