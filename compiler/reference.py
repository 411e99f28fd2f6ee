"""The numpy evaluator: the op table's references applied node by node, the meaning of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node


def bind_inputs(graph: Graph, inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> dict[Node, np.ndarray]:
    """Input node -> array of its shape and element type; ShapeError if one is missing or does not fit."""
    if isinstance(inputs, Mapping):
        missing = [n.name for n in graph.inputs if n.name not in inputs]
        if missing:
            raise ShapeError(f"input {missing[0]!r} is missing")
        given = [inputs[n.name] for n in graph.inputs]
    else:
        given = list(inputs)
    if len(given) != len(graph.inputs):
        raise ShapeError(f"{graph.name} takes {len(graph.inputs)} inputs, not {len(given)}")
    bound = {}
    for node, value in zip(graph.inputs, given, strict=True):
        value = np.asarray(value)
        if value.shape != node.shape or value.dtype != node.dtype.numpy:
            raise ShapeError(f"input {node.name!r} is {node.type}, not {value.dtype}{list(value.shape)}")
        bound[node] = value
    return bound


def evaluate_graph(graph: Graph, inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray], *,
                   observe: Callable[[Node, np.ndarray], None] | None = None) -> list[np.ndarray]:
    """The outputs of `graph`, in order, each of its node's shape and dtype.

    `inputs` go by name or by position. `observe` is called with every node and its value in
    execution order. A value is dropped after its last use. ShapeError if an input does not fit.
    """
    values = bind_inputs(graph, inputs)
    uses = {n: len(u) for n, u in graph.users.items()}
    for o in graph.outputs:
        uses[o] += 1
    for node in graph.nodes:
        if node.op != "input":
            values[node] = node.value if node.is_const else ops.evaluate(node, [values[i] for i in node.inputs])
        if observe is not None:
            observe(node, values[node])
        for i in node.inputs:
            uses[i] -= 1
            if uses[i] == 0:
                del values[i]
    return [values[o] for o in graph.outputs]


def evaluate_wide(graph: Graph, inputs: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of `graph` with every float32 value computed and kept in float64.

    Its difference to `evaluate_graph` is the rounding error that float32 itself brings to this
    network on these inputs: what no float32 implementation can be expected to stay below.
    """

    def widened(v: np.ndarray) -> np.ndarray:
        return v.astype(np.float64) if v.dtype == np.float32 else v

    values = {n: widened(v) for n, v in bind_inputs(graph, inputs).items()}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.op != "input":
                values[node] = widened(node.value) if node.is_const else widened(np.asarray(
                    ops.op_of(node.op).reference([values[i] for i in node.inputs], node.attrs)))
    return [values[o] for o in graph.outputs]
