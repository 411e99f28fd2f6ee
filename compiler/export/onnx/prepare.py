"""What is done to a graph before it is written as ONNX."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive import expr as expressions
from skive import ops
from skive.errors import ShapeError
from skive.export.onnx.writer import F32, IMAGE, WIDE, is_quantized_constant
from skive.frontend.onnx.batch import check_separable
from skive.ir import Graph, Node, constant, rebuilt


def unfused(graph: Graph) -> Graph:
    """The graph with fused expressions taken apart into single operations."""

    def steps(text: str, operands: Sequence[Node], node: Node) -> Node:
        done: list[Node] = []
        for s in expressions.parse(text).steps:
            arguments = [operands[i] if kind == "x" else done[i] for kind, i in s.args]
            done.append(ops.make(s.op, *arguments, origin=node.origin, **dict(s.attrs)))
        return done[-1]

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        node = rebuilt(node, inputs)
        if node.op == "map":
            return steps(node.attrs["fn"], inputs, node)
        text = node.attrs.get("epilogue", "")
        if not text:
            return node
        first = ops.op_of(node.op).epilogue
        attrs = {k: v for k, v in node.attrs.items() if k != "epilogue"}
        kernel = ops.make(node.op, *inputs[:first], origin=node.origin, **attrs)
        return steps(text, [kernel, *inputs[first:]], node)

    return graph.map_nodes(one)


def columns_as_stored(graph: Graph) -> Graph:
    """The graph in which a linear layer reads a flattened image channels first: the weights' columns move."""
    new: dict[Node, Node] = {}
    outputs = set(graph.outputs)

    def flattened(x: Node, columns: int) -> list[Node] | None:
        """From the operand of the layer back to the reshape of an image; None if there is none."""
        chain = [x]
        while ops.op_of(chain[-1].op).kind == "elementwise" and len(chain) < 8:
            data = [i for i in chain[-1].inputs if not (i.is_const and i.type.size == 1)]
            if len(data) != 1:
                return None
            chain.append(data[0])
        last = chain[-1]
        if last.op != "reshape" or any(len(graph.users[n]) != 1 or n in outputs for n in chain):
            return None
        image = last.inputs[0]
        computed = ops.op_of(image.op).kind in ("window", "elementwise")
        return chain if computed and image.type.rank == 4 and last.shape == (image.shape[0], columns) else None

    def moved(w: Node, h: int, wide: int, ch: int) -> Node | None:
        """The weights with their columns in the order [C, H, W] instead of [H, W, C]."""
        if is_quantized_constant(w) and all(math.prod(i.shape[1:]) == 1 for i in w.inputs[1:]):
            q = moved(w.inputs[0], h, wide, ch)
            return None if q is None else ops.make("dequantize", q, *w.inputs[1:], origin=w.origin)
        if not w.is_const:
            return None
        columns = w.value.reshape(-1, h, wide, ch).transpose(0, 3, 1, 2)
        return constant(np.ascontiguousarray(columns).reshape(w.shape), name=w.name, origin=w.origin)

    for node in graph.nodes:
        inputs = tuple(new[i] for i in node.inputs)
        new[node] = rebuilt(node, inputs)
        chain = flattened(node.inputs[0], node.inputs[1].shape[1]) if node.op == "linear" else None
        weights = moved(node.inputs[1], *chain[-1].inputs[0].shape[1:]) if chain else None
        if chain is None or weights is None:
            continue
        x = ops.make("transpose", new[chain[-1].inputs[0]], perm=IMAGE, origin=node.origin)
        x = ops.make("reshape", x, shape=chain[-1].shape, origin=chain[-1].origin)
        for step in reversed(chain[:-1]):
            operands = [i if i.is_const and i.type.size == 1 else x for i in step.inputs]
            x = ops.make(step.op, *operands, origin=step.origin, label=step.name, **step.attrs)
        new[node] = rebuilt(node, (x, weights, *inputs[2:]))
    return graph.with_nodes(new)


# What ONNX or onnxruntime 1.31 has for floats and other integers than those of 16 bits; exact in float32.
NOT_OF_16_BITS = {"clip", "max", "max_pool2d", "min", "pad", "reduce_max", "reduce_min", "relu", "resize2d", "where"}


def without_16_bits(graph: Graph) -> Graph:
    """The graph with integers of 16 bits as float32 where ONNX has no operator for them."""

    def one(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op not in NOT_OF_16_BITS or node.dtype not in WIDE:
            return rebuilt(node, inputs)
        wide = [ops.make("cast", i, to=F32, origin=node.origin) if i.dtype in WIDE else i for i in inputs]
        result = ops.make(node.op, *wide, label=node.name, origin=node.origin, **node.attrs)
        return ops.make("cast", result, to=node.dtype, origin=node.origin)

    return graph.map_nodes(one)


def takes_any_batch(graph: Graph) -> bool:
    """Whether the graph is the same for every batch once each reshape leaves its first axis open: it is rebuilt
    for two samples that way, and compared with itself."""
    new: dict[Node, Node] = {}
    try:
        for n in graph.nodes:
            inputs, attrs = [new[i] for i in n.inputs], dict(n.attrs)
            if n.op == "input":
                attrs["shape"] = (2 * n.shape[0], *n.shape[1:])
            elif n.op == "reshape":
                attrs["shape"] = (n.shape[0] * (inputs[0].type.size // n.inputs[0].type.size), *n.shape[1:])
            elif n.op == "expand":
                attrs["shape"] = ops.broadcast_shapes(inputs[0].shape, n.shape)
            elif n.op == "slice":
                attrs["size"] = tuple(after if size == before else size for size, before, after in zip(
                    n.attrs["size"], n.inputs[0].shape, inputs[0].shape, strict=True))
            new[n] = n if n.is_const else ops.make(n.op, *inputs, label=n.name, origin=n.origin, **attrs)
        check_separable(graph, graph.with_nodes(new))
    except (ShapeError, IndexError, ZeroDivisionError):
        return False
    return True
