"""From an IR graph to a standard ONNX model: one row per IR operation.

The IR is channels-last and ONNX channels-first. No tensor is transposed until somebody asks for it: the
writer remembers in which order of axes each value exists, operations that can work in any order follow
their operands, weights are permuted in the file, and a `transpose` of the IR is only a change of that
order. What is left are the transposes at the borders of operations that insist on an order.

Notation: an order `r` of a value says that axis i of the ONNX tensor is axis r[i] of the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from skive.errors import UnsupportedOpError
from skive.ir import Graph, Node
from skive.passes.sink_transposes import composed, is_free
from skive.types import DType

Order: TypeAlias = "tuple[int, ...]"
Row: TypeAlias = "Callable[[Writer, Node], None]"

F32, I32, I64, BOOL = DType.f32, DType.i32, DType.i64, DType.bool
WIDE = {DType.i16, DType.u16}
IMAGE: Order = (0, 3, 1, 2)  # channels first
ELEM_TYPES: dict[DType, int] = {d: helper.np_dtype_to_tensor_dtype(d.numpy) for d in DType}
# The opset that brought an operator, where it is later than 18.
SINCE = {"Gelu": 20, "RMSNormalization": 23}
ROWS: dict[str, Row] = {}


class Inexpressible(Exception):
    """A node that has no equivalent in ONNX, and why."""


def row(*names: str) -> Callable[[Row], Row]:
    """Registers a function as the row of the IR operations `names`."""

    def register(fn: Row) -> Row:
        for name in names:
            if name in ROWS:
                raise AssertionError(f"{name} is twice in the export table")
            ROWS[name] = fn
        return fn

    return register


def is_quantized_constant(node: Node) -> bool:
    return node.op == "dequantize" and all(i.is_const for i in node.inputs)


def has_blocks(node: Node) -> bool:
    """True for weights of 4 bits, or with several scales a channel."""
    return node.op == "compressed_linear" and (node.attrs["bits"] == 4 or node.inputs[2].shape[1] > 1)


@dataclass
class Writer:
    """One model while it is written."""

    graph: Graph
    opset: int
    any_batch: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    tensors: dict[tuple[Node, Order], str] = field(default_factory=dict)
    orders: dict[Node, Order] = field(default_factory=dict)  # in which each computed value exists
    known: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    current: Node | None = None

    def model(self) -> onnx.ModelProto:
        graph = self.graph
        self.taken |= {n.name for n in graph.inputs} | set(graph.output_names)
        for n in graph.inputs:
            self.put(n, n.name, range(n.type.rank))
        problems = []
        skipped = self.written_by_users()
        for node in graph.nodes:
            self.current = node
            if node.op in ("input", "const", "transpose") or is_quantized_constant(node) or node in skipped:
                continue
            try:
                if node.op not in ROWS:
                    raise Inexpressible(f"{node.op} has no equivalent in ONNX")
                ROWS[node.op](self, node)
            except Inexpressible as e:
                problems.append((node.label(), str(e), ""))
                self.put(node, self.fresh("missing"), range(node.type.rank))
        self.current = None
        if problems:
            raise UnsupportedOpError(problems)
        self.name_outputs()
        infos = [[self.port(name, n) for name, n in ports] for ports in (
            [(n.name, n) for n in graph.inputs], zip(graph.output_names, graph.outputs, strict=True))]
        used = {i for n in self.nodes for i in n.input}
        proto = helper.make_graph(self.nodes, graph.name, infos[0], infos[1],
                                  [t for name, t in self.initializers.items() if name in used])
        opsets = [helper.make_opsetid("", self.opset)]
        result = helper.make_model(proto, opset_imports=opsets, producer_name="skive")
        result.ir_version = helper.find_min_ir_version_for(opsets)
        return result

    def port(self, name: str, n: Node) -> onnx.ValueInfoProto:
        shape = ("batch", *n.shape[1:]) if self.any_batch else n.shape
        return helper.make_tensor_value_info(name, ELEM_TYPES[n.dtype], shape)

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """A Reshape, its first axis left open where the batch is."""
        if self.any_batch and shape and 0 not in shape:
            shape = (-1, *shape[1:])
        return self.emit("Reshape", tensor, integers(*shape), **({"allowzero": 1} if 0 in shape else {}))

    def written_by_users(self) -> set[Node]:
        """Nodes that their users spell themselves: sums of a convolution that one `requantize` reads."""
        return {n for n in self.graph.nodes if n.op == "conv2d" and n.dtype is I32 and not self.graph.is_output(n)
                and len(self.graph.users[n]) == 1 and fuses(self.graph.users[n][0])}

    def name_outputs(self) -> None:
        """The tensors of the outputs get the outputs' names; a value that has a name already is copied."""
        renamed: dict[str, str] = {}
        fixed = {n.name for n in self.graph.inputs}
        for name, node in zip(self.graph.output_names, self.graph.outputs, strict=True):
            tensor = self.get(node)
            if tensor in fixed or tensor in renamed or tensor in self.initializers:
                self.nodes.append(helper.make_node("Identity", [tensor], [name], name=self.fresh("output", node)))
            else:
                renamed[tensor] = name
        for n in self.nodes:
            for field_ in (n.input, n.output):
                for i, tensor in enumerate(field_):
                    field_[i] = renamed.get(tensor, tensor)

    # ------------------------------------------------------------------------------------- names

    def fresh(self, what: str, node: Node | None = None) -> str:
        """A name that nothing has yet, after the layer that is being written."""
        node = node or self.current
        base = (node.origin or node.name or node.op) if node is not None else what
        name, k = f"{base}/{what}", 1
        while name in self.taken:
            name, k = f"{base}/{what}_{k}", k + 1
        self.taken.add(name)
        return name

    def emit(self, op: str, *inputs: str | np.ndarray, **attrs: Any) -> str:
        """The result of an ONNX node; arrays among the inputs become initializers."""
        return self.emit_all(op, inputs, 1, **attrs)[0]

    def emit_all(self, op: str, inputs: Sequence[str | np.ndarray], outputs: int, **attrs: Any) -> list[str]:
        if SINCE.get(op, 0) > self.opset:
            raise Inexpressible(f"{op} needs opset {SINCE[op]}")
        names = [i if isinstance(i, str) else self.initializer(i) for i in inputs]
        while names and not names[-1]:
            names.pop()
        label = self.fresh(op)
        results = [f"{label}:{k}" if k else label for k in range(outputs)]
        self.taken.update(results)
        self.nodes.append(helper.make_node(op, names, results, name=label, **attrs))
        return results

    def initializer(self, value: np.ndarray, name: str = "") -> str:
        """The name of a constant; equal small constants are stored once."""
        value = np.ascontiguousarray(value).reshape(np.shape(value))
        key = (value.dtype.str, value.shape, value.tobytes()) if value.nbytes <= 4096 else None
        if key in self.known:
            return self.known[key]
        if not name or name in self.taken:
            name = self.fresh("constant")
        self.taken.add(name)
        self.initializers[name] = numpy_helper.from_array(value, name)
        if key is not None:
            self.known[key] = name
        return name

    def nibbles(self, value: np.ndarray) -> str:
        """The name of a constant of unsigned 4-bit integers."""
        flat = np.append(value.reshape(-1), [0] * (value.size % 2)).astype(np.uint8)
        name = self.fresh("constant")
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.UINT4, dims=value.shape)
        tensor.raw_data = (flat[0::2] | flat[1::2] << 4).tobytes()
        self.initializers[name] = tensor
        return name

    # ----------------------------------------------------------------------------------- layouts

    def put(self, node: Node, tensor: str, order: Sequence[int] | None = None) -> None:
        """`tensor` is the value of `node` in `order`, by default its own."""
        r = tuple(range(node.type.rank)) if order is None else tuple(order)
        self.tensors[node, r] = tensor
        self.orders.setdefault(node, r)

    def order(self, x: Node) -> Order | None:
        """The order of axes in which `x` exists; None if it can be had in any."""
        if x.is_const or is_quantized_constant(x):
            return None
        if x.op == "transpose":
            r = self.order(x.inputs[0])
            return None if r is None else tuple(x.attrs["perm"].index(a) for a in r)
        return self.orders[x]

    def get(self, x: Node, order: Sequence[int] | None = None) -> str:
        """The tensor of `x` in `order`, by default its own; transposed at most once for all who ask."""
        r = tuple(range(x.type.rank)) if order is None else tuple(order)
        if (x, r) not in self.tensors:
            self.tensors[x, r] = self.reordered(x, r)
        return self.tensors[x, r]

    def reordered(self, x: Node, order: Order) -> str:
        if x.is_const:
            return self.initializer(x.value.transpose(order), x.name)
        if x.op == "transpose":
            return self.get(x.inputs[0], composed(x.attrs["perm"], order))
        if is_quantized_constant(x):
            return dequantize(self, x, order)
        r = self.orders[x]
        perm = tuple(r.index(a) for a in order)
        if is_free([x.shape[a] for a in r], perm) and (perm[0] == 0 or not self.any_batch):
            return self.reshape(self.tensors[x, r], [x.shape[a] for a in order])
        return self.emit("Transpose", self.tensors[x, r], perm=perm)

    def common_order(self, operands: Sequence[Node], shape: tuple[int, ...]) -> Order:
        """The order in which an elementwise operation moves the fewest bytes."""
        full = [i for i in operands if i.shape == shape]
        best, cost = tuple(range(len(shape))), math.inf
        for r in [self.order(i) for i in full]:
            if r is None:
                continue
            moved = sum(i.type.bytes for i in full if self.order(i) not in (None, r) and (i, r) not in self.tensors)
            if moved < cost:
                best, cost = r, moved
        return best

    def broadcast(self, x: Node, rank: int, order: Order) -> str:
        """The tensor of an operand that broadcasts to `rank` axes in `order`."""
        if x.type.rank == rank:
            return self.get(x, order)
        if x.type.size == 1 and x.is_const:
            return self.get(x)
        full = (1,) * (rank - x.type.rank) + x.shape
        if x.is_const:
            value = x.value.reshape(full).transpose(order)
            while value.ndim and value.shape[0] == 1:
                value = value[0]
            return self.initializer(value)
        if order == tuple(range(rank)):
            return self.get(x)
        wide = self.emit("Reshape", self.get(x), np.array(full, np.int64))
        return self.emit("Transpose", wide, perm=order)

    def operands(self, n: Node) -> tuple[Order, list[str]]:
        """The order of an elementwise node, and its operands in it."""
        order = self.common_order(n.inputs, n.shape)
        return order, [self.broadcast(i, n.type.rank, order) for i in n.inputs]


def scalar(value: float | int | bool, dtype: DType) -> np.ndarray:
    return np.array(value, dtype.numpy)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def parameters(n: Node, order: Order) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(scale, zero point, axis of the ONNX tensor) of a quantization; None if they are no such thing."""
    scale, zero = n.inputs[1:]
    if not (scale.is_const and zero.is_const):
        return None
    rank = n.type.rank
    shape = np.broadcast_shapes(scale.shape, zero.shape)
    s, z = (np.broadcast_to(v.value, shape) for v in (scale, zero))
    axes = [i + rank - len(shape) for i, d in enumerate(shape) if d != 1]
    if len(axes) > 1:
        return None
    if not axes:
        return s.reshape(()), z.reshape(()), 0
    return s.reshape(-1), z.reshape(-1), order.index(axes[0])


def known_parameters(w: Writer, n: Node, order: Order) -> tuple[np.ndarray, np.ndarray, int]:
    found = parameters(n, order)
    if found is None:
        raise Inexpressible(f"{n.op} whose scales are computed, or vary along several axes")
    if {n.dtype, n.inputs[0].dtype} & WIDE and w.opset < 21:
        raise Inexpressible("16-bit quantization needs opset 21")
    return found


def axis_attr(scale: np.ndarray, axis: int) -> dict[str, int]:
    return {"axis": axis} if scale.ndim else {}


def dequantize(w: Writer, n: Node, order: Order) -> str:
    scale, zero, axis = known_parameters(w, n, order)
    x = n.inputs[0]
    q = w.broadcast(x, n.type.rank, order)
    if x.dtype is I32:
        if zero.any():
            q = w.emit("Sub", q, w.broadcast(n.inputs[2], n.type.rank, order))
        if x.is_const:
            return w.emit("DequantizeLinear", q, scale, **axis_attr(scale, axis))
        # Spelled out: onnxruntime 1.31 takes a DequantizeLinear behind a ConvInteger for one of weights.
        return w.emit("Mul", w.emit("Cast", q, to=ELEM_TYPES[F32]), w.broadcast(n.inputs[1], n.type.rank, order))
    return w.emit("DequantizeLinear", q, scale, zero, **axis_attr(scale, axis))


def fuses(n: Node) -> bool:
    """Whether a `requantize` of a convolution of 8-bit integers is one QLinearConv."""
    if n.op != "requantize" or n.inputs[0].op != "conv2d" or n.inputs[0].dtype is not I32:
        return False
    total, factor, zero = n.inputs
    per_channel = factor.is_const and factor.type.size in (1, factor.shape[-1] if factor.shape else 1)
    constant_weights = all(i.is_const for i in total.inputs[1:])
    return (per_channel and constant_weights and zero.is_const and bool((zero.value == zero.value.flat[0]).all())
            and total.inputs[0].dtype in (DType.u8, DType.i8) and n.dtype is total.inputs[0].dtype)
