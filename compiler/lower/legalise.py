"""What no kernel takes as it stands is rewritten into what one does."""

from __future__ import annotations

import numpy as np

from skive import expr as expressions
from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.lower.abilities import has_fast_kernel
from skive.lower.functors import fusible_operand, in_vectors, sum_dtype
from skive.types import DType


def _epilogue_ok(node: Node) -> bool:
    """Whether the kernel of `node` can run its epilogue: all in vectors."""
    e = expressions.parse(node.attrs["epilogue"])
    base_count = ops.op_of(node.op).epilogue or 0
    operands = [sum_dtype(node), *(i.dtype for i in node.inputs[base_count:])]
    if not has_fast_kernel(node) or not in_vectors(e, operands):
        return False
    return all(fusible_operand(x, node) for x in node.inputs[base_count:])


def _without_epilogue(node: Node) -> Node:
    """`node` as its base operation followed by a map."""
    count = ops.op_of(node.op).epilogue or 0
    attrs = {k: v for k, v in node.attrs.items() if k != "epilogue"}
    base = ops.make(node.op, *node.inputs[:count], origin=node.origin, **attrs)
    return ops.make(
        "map", base, *node.inputs[count:], origin=node.origin, label=node.name, fn=node.attrs["epilogue"]
    )


def _widened(node: Node) -> Node:
    """A contraction of narrow integers on 32-bit ones, zero points subtracted: what the plain kernels take."""
    attrs = dict(node.attrs)
    zeros = [attrs.pop(k, 0) for k in (("a_zero", "b_zero") if node.op == "matmul" else ("zero",))] + [0]
    wide = [ops.make("cast", i, origin=node.origin, to=DType.i32) for i in node.inputs[:2]]
    wide = [
        ops.make("sub", i, constant(np.asarray(z, np.int32)), origin=node.origin) if z else i
        for i, z in zip(wide, zeros)
    ]
    return ops.make(node.op, *wide, *node.inputs[2:], origin=node.origin, label=node.name, **attrs)


def legalise(graph: Graph) -> Graph:
    """The same function in terms that the kernels take."""

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        node = rebuilt(node, inputs)
        if inputs and all(i.is_const for i in inputs) and ops.op_of(node.op).kind == "movement":
            return constant(ops.evaluate(node, [i.value for i in inputs]), name=node.name, origin=node.origin)
        if node.attrs.get("epilogue") and not _epilogue_ok(node):
            node = _without_epilogue(node)
            base, *rest = node.inputs
            if ops.op_of(base.op).kind in ("window", "contract"):
                node = rebuilt(node, (one(base, base.inputs), *rest))
            return node
        if ops.macs(node) and node.inputs[0].dtype in ops.QUANTIZED and not has_fast_kernel(node):
            return _widened(node)
        if node.op in ("softmax", "log_softmax") and node.type.size and node.dtype is not DType.f32:
            wide = ops.make("cast", node.inputs[0], origin=node.origin, to=DType.f32)
            return ops.make(
                "cast", ops.make(node.op, wide, origin=node.origin, axis=node.attrs["axis"]), to=node.dtype
            )
        return node

    return graph.map_nodes(one)
