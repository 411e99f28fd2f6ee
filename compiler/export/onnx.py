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
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from skive import expr as expressions
from skive import ops
from skive.errors import InvalidModelError, ShapeError, SkiveError, UnsupportedOpError
from skive.frontend.onnx.batch import check_separable
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes.sink_transposes import composed, inverse, is_free, through_reshape
from skive.types import DType

Order: TypeAlias = "tuple[int, ...]"
Row: TypeAlias = "Callable[[Writer, Node], None]"

F32, I32, I64, BOOL = DType.f32, DType.i32, DType.i64, DType.bool
WIDE = {DType.i16, DType.u16}
IMAGE: Order = (0, 3, 1, 2)  # channels first
OPSETS = range(18, 24)
# A model larger than this keeps its weights in a file of their own: protobuf ends at 2 GiB.
LARGEST = 1 << 30
ELEM_TYPES: dict[DType, int] = {d: helper.np_dtype_to_tensor_dtype(d.numpy) for d in DType}
# The opset that brought an operator, where it is later than the first of OPSETS.
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


def export_onnx(graph: Graph, path: str | Path | None = None, *, opset: int | None = None) -> onnx.ModelProto:
    """`graph` as an ONNX model of standard operators, written to `path` unless that is None.

    Inputs and outputs keep their names, shapes and element types; an open batch is a symbolic
    dimension, unless some operation needs to know its size: then one sample is written. Quantized
    values become QuantizeLinear and DequantizeLinear, sums of integers ConvInteger, MatMulInteger or
    QLinearConv. The opset is 20, or 21 where 16-bit values are quantized or weights have blocks or 4 bits.
    Raises UnsupportedOpError with every node that has no equivalent, InvalidModelError for an opset
    other than 18 to 23.
    """
    if opset is None:
        # onnxruntime 1.31 moves quantizations of opset 21 about without correcting their output type.
        opset = 21 if any(n.dtype in WIDE or _has_blocks(n) for n in graph.nodes) else 20
    if opset not in OPSETS:
        raise InvalidModelError(f"opset {opset}: {OPSETS.start} to {OPSETS.stop - 1} can be written")
    plain_graph = columns_as_stored(unfused(graph))
    model = Writer(plain_graph, opset, graph.batch_max is not None and takes_any_batch(plain_graph)).model()
    if path is not None:
        big = model.ByteSize() > LARGEST
        data = f"{Path(path).name}.data" if big else None
        try:
            onnx.save(model, str(path), save_as_external_data=big, location=data)
        except OSError as e:
            raise SkiveError(f"cannot write {path}: {e.strerror or e}") from None
    return model


# --------------------------------------------------------------------------------- before writing


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


def is_quantized_constant(node: Node) -> bool:
    return node.op == "dequantize" and all(i.is_const for i in node.inputs)


# --------------------------------------------------------------------------------------- the writer


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


# ------------------------------------------------------------------------------------- elementwise

# IR operation -> ONNX operator of the same operands and no attributes.
PLAIN = {
    "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin",
    "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf", "sigmoid": "Sigmoid", "softplus": "Softplus",
    "mish": "Mish", "softsign": "Softsign", "reciprocal": "Reciprocal", "floor": "Floor", "ceil": "Ceil",
    "round_even": "Round", "abs": "Abs", "neg": "Neg", "sign": "Sign", "relu": "Relu", "hard_swish": "HardSwish",
    "not": "Not", "bit_not": "BitwiseNot", "is_nan": "IsNaN", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "min": "Min", "max": "Max", "bit_and": "BitwiseAnd", "bit_or": "BitwiseOr", "bit_xor": "BitwiseXor",
    "and": "And", "or": "Or", "xor": "Xor", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "equal": "Equal", "pow": "Pow", "prelu": "PRelu", "where": "Where"}
# IR operation -> (ONNX operator, {ONNX attribute: IR attribute}).
WITH_ATTRIBUTES = {
    "elu": ("Elu", {"alpha": "alpha"}), "selu": ("Selu", {"alpha": "alpha", "gamma": "gamma"}),
    "celu": ("Celu", {"alpha": "alpha"}), "leaky_relu": ("LeakyRelu", {"alpha": "alpha"}),
    "thresholded_relu": ("ThresholdedRelu", {"alpha": "alpha"}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": "alpha", "beta": "beta"}),
    "shrink": ("Shrink", {"bias": "bias", "lambd": "lambd"})}


@row(*PLAIN)
def plain(w: Writer, n: Node) -> None:
    order, names = w.operands(n)
    w.put(n, w.emit(PLAIN[n.op], *names), order)


@row(*WITH_ATTRIBUTES)
def parametric(w: Writer, n: Node) -> None:
    order, names = w.operands(n)
    op, attrs = WITH_ATTRIBUTES[n.op]
    w.put(n, w.emit(op, *names, **{k: float(n.attrs[v]) for k, v in attrs.items()}), order)


def spelled(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers `fn(writer, node, *operand tensors)`, which spells an elementwise operation in several."""

    def register(fn: Callable[..., str]) -> Callable[..., str]:
        @row(*names)
        def write(w: Writer, n: Node) -> None:
            order, operands = w.operands(n)
            w.put(n, fn(w, n, *operands), order)

        return fn

    return register


@spelled("rsqrt")
def rsqrt(w: Writer, n: Node, x: str) -> str:
    return w.emit("Reciprocal", w.emit("Sqrt", x))


@spelled("silu")
def silu(w: Writer, n: Node, x: str) -> str:
    return w.emit("Mul", x, w.emit("Sigmoid", x))


@spelled("gelu", "gelu_tanh")
def gelu(w: Writer, n: Node, x: str) -> str:
    if w.opset >= SINCE["Gelu"] or n.op == "gelu_tanh":
        return w.emit("Gelu", x, approximate="none" if n.op == "gelu" else "tanh")
    half = w.emit("Mul", x, scalar(0.5, n.dtype))
    erf = w.emit("Erf", w.emit("Mul", x, scalar(math.sqrt(0.5), n.dtype)))
    return w.emit("Mul", half, w.emit("Add", erf, scalar(1, n.dtype)))


@spelled("trunc")
def trunc(w: Writer, n: Node, x: str) -> str:
    return w.emit("Mul", w.emit("Sign", x), w.emit("Floor", w.emit("Abs", x)))


@spelled("clip")
def clip(w: Writer, n: Node, x: str) -> str:
    lo, hi = (v if math.isfinite(v) else None for v in (n.attrs["lo"], n.attrs["hi"]))
    return w.emit("Clip", x, "" if lo is None else scalar(lo, n.dtype), "" if hi is None else scalar(hi, n.dtype))


@spelled("is_inf")
def is_inf(w: Writer, n: Node, x: str) -> str:
    return w.emit("IsInf", x, detect_negative=int(n.attrs["neg"]), detect_positive=int(n.attrs["pos"]))


@spelled("cast")
def cast(w: Writer, n: Node, x: str) -> str:
    return w.emit("Cast", x, to=ELEM_TYPES[n.dtype])


@spelled("not_equal")
def not_equal(w: Writer, n: Node, a: str, b: str) -> str:
    return w.emit("Not", w.emit("Equal", a, b))


@spelled("mod")
def mod(w: Writer, n: Node, a: str, b: str) -> str:
    if n.dtype.is_int:
        return w.emit("Mod", a, b)
    remainder = w.emit("Mod", a, b, fmod=1)  # with the sign of a
    other_sign = w.emit("Less", w.emit("Mul", remainder, b), scalar(0, n.dtype))
    return w.emit("Where", other_sign, w.emit("Add", remainder, b), remainder)


@spelled("fmod")
def fmod(w: Writer, n: Node, a: str, b: str) -> str:
    return w.emit("Mod", a, b, fmod=1)


@spelled("shift_left", "shift_right")
def shift(w: Writer, n: Node, a: str, b: str) -> str:
    if n.dtype.is_signed:
        raise Inexpressible("ONNX shifts unsigned integers only")
    return w.emit("BitShift", a, b, direction="LEFT" if n.op == "shift_left" else "RIGHT")


# ------------------------------------------------------------------------------------ quantization


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


@row("dequantize")
def dequantize_row(w: Writer, n: Node) -> None:
    if n.inputs[0].shape != n.shape:
        raise Inexpressible("dequantize of a value that its scales broadcast")
    order = w.common_order(n.inputs[:1], n.shape)
    w.put(n, dequantize(w, n, order), order)


@row("quantize")
def quantize(w: Writer, n: Node) -> None:
    order = w.common_order(n.inputs[:1], n.shape)
    scale, zero, axis = known_parameters(w, n, order)
    x = w.broadcast(n.inputs[0], n.type.rank, order)
    w.put(n, w.emit("QuantizeLinear", x, scale, zero, **axis_attr(scale, axis)), order)


def fuses(n: Node) -> bool:
    """Whether a `requantize` of a convolution of 8-bit integers is one QLinearConv."""
    if n.op != "requantize" or n.inputs[0].op != "conv2d" or n.inputs[0].dtype is not I32:
        return False
    total, factor, zero = n.inputs
    per_channel = factor.is_const and factor.type.size in (1, factor.shape[-1] if factor.shape else 1)
    constant_weights = all(i.is_const for i in total.inputs[1:])
    return (per_channel and constant_weights and zero.is_const and bool((zero.value == zero.value.flat[0]).all())
            and total.inputs[0].dtype in (DType.u8, DType.i8) and n.dtype is total.inputs[0].dtype)


@row("requantize")
def requantize(w: Writer, n: Node) -> None:
    """f32(x) * factor, rounded as QuantizeLinear with the scale 1 rounds; or one QLinearConv."""
    total, factor, zero = n.inputs
    one = scalar(1, F32)
    if fuses(n) and (total, IMAGE) not in w.tensors and total not in w.orders:
        x, weights, *bias = total.inputs
        scales = np.broadcast_to(factor.value.reshape(-1), weights.shape[:1])
        y = w.emit("QLinearConv", w.get(x, IMAGE), one, scalar(total.attrs["zero"], x.dtype), w.get(weights, IMAGE),
                   scales, np.zeros(weights.shape[0], np.int8), one, scalar(int(zero.value.flat[0]), n.dtype),
                   w.get(bias[0]) if bias else "", **window(total.attrs, weights), group=total.attrs["groups"])
        w.put(n, y, IMAGE)
        return
    order = w.common_order(n.inputs[:1], n.shape)
    if not zero.is_const or (zero.value != zero.value.flat[0]).any():
        raise Inexpressible("requantize with several zero points")
    real = w.broadcast(total, n.type.rank, order)
    real = real if total.dtype is F32 else w.emit("Cast", real, to=ELEM_TYPES[F32])
    scaled = w.emit("Mul", real, w.broadcast(factor, n.type.rank, order))
    w.put(n, w.emit("QuantizeLinear", scaled, one, scalar(int(zero.value.flat[0]), n.dtype)), order)


@spelled("requantize_fixed")
def requantize_fixed(w: Writer, n: Node, x: str, multiplier: str, shift_by: str, zero: str) -> str:
    """In 64 bits; the shift is a division that rounds down, spelled as the one that rounds to zero."""
    wide = [w.emit("Cast", v, to=ELEM_TYPES[I64]) for v in (x, multiplier, zero)]
    if not n.inputs[2].is_const:
        raise Inexpressible("requantize_fixed with a computed shift")
    by = np.int64(1) << n.inputs[2].value.astype(np.int64)
    if n.inputs[2].type.size != 1:
        raise Inexpressible("requantize_fixed with several shifts")
    by = by.reshape(())
    total = w.emit("Add", w.emit("Mul", wide[0], wide[1]), by >> 1)
    # floor(a / b) = (a - (a mod b)) / b, where ONNX's mod has the sign of b.
    floor = w.emit("Div", w.emit("Sub", total, w.emit("Mod", total, by)), by)
    limits = np.iinfo(n.dtype.numpy)
    moved = w.emit("Clip", w.emit("Add", floor, wide[2]), scalar(limits.min, I64), scalar(limits.max, I64))
    return w.emit("Cast", moved, to=ELEM_TYPES[n.dtype])


# ---------------------------------------------------------------------------------------- movement


@row("reshape")
def reshape(w: Writer, n: Node) -> None:
    """A reshape that keeps axes together keeps the order they have."""
    x = n.inputs[0]
    r = w.order(x)
    if r and 0 not in x.shape and (r[0] == 0 or not w.any_batch):
        shape = [x.shape[a] for a in r]
        split = through_reshape(shape, inverse(r), n.shape)
        if split is not None and split[0] == tuple(range(len(shape))):
            _, middle, back = split
            if back[:1] == (0,) or not w.any_batch:
                w.put(n, w.reshape(w.get(x, r), middle), inverse(back))
                return
    w.put(n, w.reshape(w.get(x), n.shape))


def any_order(w: Writer, x: Node) -> Order:
    return w.order(x) or tuple(range(x.type.rank))


@row("slice")
def slice_(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order = any_order(w, x)
    start, size, step = ([n.attrs[k][a] for a in order] for k in ("start", "size", "step"))
    axes = [i for i, a in enumerate(order) if not (start[i] == 0 and size[i] == x.shape[a] and step[i] == 1)]
    before_first = -(2**62)  # the end of a slice that runs backwards through element 0
    ends = [start[i] + size[i] * step[i] for i in axes]
    ends = [before_first if e < 0 else e for e in ends]
    w.put(n, w.emit("Slice", w.get(x, order), integers(*(start[i] for i in axes)), integers(*ends), integers(*axes),
                    integers(*(step[i] for i in axes))), order)


@row("concat")
def concat(w: Writer, n: Node) -> None:
    orders = [r for r in map(w.order, n.inputs) if r is not None] or [tuple(range(n.type.rank))]
    order = max(sorted(set(orders)), key=lambda r: sum(i.type.bytes for i in n.inputs if w.order(i) == r))
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("Concat", *(w.get(i, order) for i in n.inputs), axis=axis), order)


@row("pad")
def pad(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order = any_order(w, x)
    pads = integers(*(n.attrs[k][a] for k in ("before", "after") for a in order))
    value = scalar(n.attrs["value"], n.dtype) if n.attrs["mode"] == "constant" else ""
    if n.attrs["mode"] == "wrap" and w.opset < 19:
        raise Inexpressible("padding that wraps needs opset 19")
    w.put(n, w.emit("Pad", w.get(x, order), pads, value, mode=n.attrs["mode"]), order)


@row("expand")
def expand(w: Writer, n: Node) -> None:
    w.put(n, w.emit("Expand", w.get(n.inputs[0]), integers(*n.shape)))


@row("gather")
def gather(w: Writer, n: Node) -> None:
    data, index = n.inputs
    w.put(n, w.emit("Gather", w.get(data), w.get(index), axis=n.attrs["axis"] % data.type.rank))


@row("lookup")
def lookup(w: Writer, n: Node) -> None:
    """A Gather; a negative byte k is entry 256 + k, and negative indices count from the end."""
    x, table = n.inputs
    order = any_order(w, x)
    index = w.emit("Cast", w.get(x, order), to=ELEM_TYPES[DType.i32])
    w.put(n, w.emit("Gather", w.get(table), index, axis=0), order)


@row("gather_elements")
def gather_elements(w: Writer, n: Node) -> None:
    w.put(n, w.emit("GatherElements", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank))


@row("gather_nd")
def gather_nd(w: Writer, n: Node) -> None:
    w.put(n, w.emit("GatherND", *map(w.get, n.inputs), batch_dims=n.attrs["batch_dims"]))


@row("scatter_elements")
def scatter_elements(w: Writer, n: Node) -> None:
    w.put(n, w.emit("ScatterElements", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank,
                    reduction=n.attrs["reduction"]))


@row("scatter_nd")
def scatter_nd(w: Writer, n: Node) -> None:
    w.put(n, w.emit("ScatterND", *map(w.get, n.inputs), reduction=n.attrs["reduction"]))


# -------------------------------------------------------------------------------------- reductions

REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_mean": "ReduceMean", "reduce_prod": "ReduceProd",
              "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def kept_order(order: Order, axes: Sequence[int], keep: bool) -> Order:
    """The order of a reduction's result."""
    if keep:
        return order
    left = [a for a in range(len(order)) if a not in axes]
    return tuple(left.index(a) for a in order if a not in axes)


@row(*REDUCTIONS)
def reduction(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order, keep = any_order(w, x), n.attrs["keep"]
    axes = [a % x.type.rank for a in n.attrs["axes"]]
    image = n.op == "reduce_mean" and keep and sorted(axes) == [1, 2] and x.type.rank == 4 and order == IMAGE
    if image:  # as other runtimes recognise it
        y = w.emit("GlobalAveragePool", w.get(x, order))
    else:
        y = w.emit(REDUCTIONS[n.op], w.get(x, order), integers(*sorted(order.index(a) for a in axes)),
                   keepdims=int(keep), noop_with_empty_axes=1)
    w.put(n, y, kept_order(order, axes, keep))


@row("argmax", "argmin")
def arg(w: Writer, n: Node) -> None:
    x = n.inputs[0]
    order, axis = any_order(w, x), n.attrs["axis"] % x.type.rank
    y = w.emit("ArgMax" if n.op == "argmax" else "ArgMin", w.get(x, order), axis=order.index(axis),
               keepdims=int(n.attrs["keep"]), select_last_index=int(n.attrs["last"]))
    w.put(n, y, kept_order(order, [axis], n.attrs["keep"]))


@row("cumsum")
def cumsum(w: Writer, n: Node) -> None:
    order = any_order(w, n.inputs[0])
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("CumSum", w.get(n.inputs[0], order), scalar(axis, I64), exclusive=int(n.attrs["exclusive"]),
                    reverse=int(n.attrs["reverse"])), order)


@row("topk_values", "topk_indices")
def topk(w: Writer, n: Node) -> None:
    x, which = n.inputs[0], ("topk_values", "topk_indices")
    values, indices = w.emit_all("TopK", [w.get(x), integers(n.attrs["k"])], 2, axis=x.type.rank - 1,
                                 largest=int(n.attrs["largest"]))
    w.put(n, (values, indices)[which.index(n.op)])


@row("softmax", "log_softmax")
def softmax(w: Writer, n: Node) -> None:
    order = any_order(w, n.inputs[0])
    axis = order.index(n.attrs["axis"] % n.type.rank)
    w.put(n, w.emit("Softmax" if n.op == "softmax" else "LogSoftmax", w.get(n.inputs[0], order), axis=axis), order)


@row("layer_norm")
def layer_norm(w: Writer, n: Node) -> None:
    w.put(n, w.emit("LayerNormalization", *map(w.get, n.inputs), axis=n.attrs["axis"] % n.type.rank,
                    epsilon=float(n.attrs["eps"])))


@row("rms_norm")
def rms_norm(w: Writer, n: Node) -> None:
    x, scale = map(w.get, n.inputs)
    axis = n.attrs["axis"] % n.type.rank
    if w.opset >= SINCE["RMSNormalization"]:
        w.put(n, w.emit("RMSNormalization", x, scale, axis=axis, epsilon=float(n.attrs["eps"])))
        return
    squares = w.emit("ReduceMean", w.emit("Mul", x, x), integers(*range(axis, n.type.rank)), keepdims=1)
    root = w.emit("Sqrt", w.emit("Add", squares, scalar(n.attrs["eps"], n.dtype)))
    w.put(n, w.emit("Mul", w.emit("Div", x, root), scale))


# ----------------------------------------------------------------------------------------- windows


def window(a: Any, weights: Node | None = None) -> dict[str, Any]:
    """The attributes of a window that ONNX shares with the IR."""
    kernel = weights.shape[1:3] if weights is not None else a["kernel"]
    return {"kernel_shape": list(kernel), "strides": list(a["stride"]), "pads": list(a["pad"]),
            "dilations": list(a["dilation"])}


@row("conv2d")
def conv2d(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    image, kernel = w.get(x, IMAGE), w.get(weights, IMAGE)
    attrs = {**window(n.attrs, weights), "group": n.attrs["groups"]}
    if n.dtype is x.dtype:
        w.put(n, w.emit("Conv", image, kernel, w.get(bias[0]) if bias else "", **attrs), IMAGE)
        return
    if x.dtype is not DType.u8:
        raise Inexpressible(f"an integer convolution of {x.dtype.value}: ONNX has one of u8")
    y = w.emit("ConvInteger", image, kernel, scalar(n.attrs["zero"], x.dtype), **attrs)
    if bias:
        y = w.emit("Add", y, w.broadcast(bias[0], 4, IMAGE))
    w.put(n, y, IMAGE)


@row("conv_transpose2d")
def conv_transpose2d(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    if n.dtype is not x.dtype:
        raise Inexpressible("ONNX has no transposed convolution of integers")
    oc, kh, kw, ic = weights.shape
    g = n.attrs["groups"]
    # [G OC/G, KH, KW, IC/G] as [G IC/G, OC/G, KH, KW]
    if g == 1:
        kernel = w.get(weights, (3, 0, 1, 2))
    elif weights.is_const:
        value = weights.value.reshape(g, oc // g, kh, kw, ic).transpose(0, 4, 1, 2, 3)
        kernel = w.initializer(np.ascontiguousarray(value).reshape(g * ic, oc // g, kh, kw))
    else:
        raise Inexpressible("a grouped transposed convolution whose weights are not plain constants")
    y = w.emit("ConvTranspose", w.get(x, IMAGE), kernel, w.get(bias[0]) if bias else "", **window(n.attrs, weights),
               group=g, output_padding=list(n.attrs["out_pad"]))
    w.put(n, y, IMAGE)


@row("max_pool2d")
def max_pool2d(w: Writer, n: Node) -> None:
    w.put(n, w.emit("MaxPool", w.get(n.inputs[0], IMAGE), **window(n.attrs)), IMAGE)


def averaged(w: Writer, n: Node, image: str, count_pad: bool) -> str:
    attrs = window(n.attrs)
    if tuple(attrs["dilations"]) == (1, 1):
        del attrs["dilations"]  # younger than the operator; onnxruntime's quantized form does not know it
    elif w.opset < 19:
        raise Inexpressible("an average pool with dilation needs opset 19")
    return w.emit("AveragePool", image, **attrs, count_include_pad=int(count_pad))


@row("avg_pool2d")
def avg_pool2d(w: Writer, n: Node) -> None:
    w.put(n, averaged(w, n, w.get(n.inputs[0], IMAGE), n.attrs["count_pad"]), IMAGE)


@row("sum_pool2d")
def sum_pool2d(w: Writer, n: Node) -> None:
    """The mean of the centred integers times their number; rounding makes it the integer it must be."""
    x = n.inputs[0]
    real = w.emit("DequantizeLinear", w.get(x, IMAGE), scalar(1, F32), scalar(n.attrs["zero"], x.dtype))
    count = scalar(math.prod(n.attrs["kernel"]), F32)
    total = w.emit("Round", w.emit("Mul", averaged(w, n, real, True), count))
    w.put(n, w.emit("Cast", total, to=ELEM_TYPES[I32]), IMAGE)


# The spellings of Resize that are tried, the usual ones first.
RESIZES = [{"mode": mode, "coordinate_transformation_mode": transform, **extra}
           for mode, extras in (("linear", [{}]), ("cubic", [{}, {"cubic_coeff_a": -0.5}]),
                                ("nearest", [{"nearest_mode": m} for m in ("floor", "round_prefer_floor")]))
           for extra in extras
           for transform in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")]


def resize_tables(attrs: dict[str, Any], size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources, weights) [out, taps] of one axis under the rules of ONNX Resize."""
    from skive.frontend.onnx.rows import sampling

    mode = attrs["mode"]
    x = sampling.source_positions(attrs["coordinate_transformation_mode"], size, out, out / size, (0.0, 1.0))
    if mode == "nearest":
        table = sampling.nearest(attrs["nearest_mode"], x, size)
        return table.astype(np.int32)[:, None], np.ones((out, 1), np.float32)
    kernel, reach = (sampling.triangle, 1) if mode == "linear" else (sampling.cubic, 2)
    taps = np.floor(x).astype(np.int64)[:, None] + np.arange(-reach, reach + 2)
    weights = kernel(taps - x[:, None], float(attrs.get("cubic_coeff_a", -0.75)))
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(taps, 0, size - 1)), weights / weights.sum(1, keepdims=True))
    return sampling.taps_of(matrix)


def dense(sources: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """The matrix [out, size] of a table of taps."""
    matrix = np.zeros((len(sources), size), np.float32)
    np.add.at(matrix, (np.arange(len(sources))[:, None], np.clip(sources, 0, size - 1)), weights)
    return matrix


@row("resize2d")
def resize2d(w: Writer, n: Node) -> None:
    """One Resize where a mode of it has the same tables, else a gather or a product along each axis."""
    x, *tables = n.inputs
    if not all(t.is_const for t in tables):
        raise Inexpressible("resize2d with computed tables")
    wanted = [dense(tables[2 * i].value, tables[2 * i + 1].value, x.shape[1 + i]) for i in range(2)]
    for attrs in RESIZES:
        own = [dense(*resize_tables(attrs, x.shape[1 + i], n.shape[1 + i]), x.shape[1 + i]) for i in range(2)]
        if all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(own, wanted, strict=True)):
            y = w.emit("Resize", w.get(x, IMAGE), "", "", integers(*n.shape[1:3]), axes=[2, 3], **attrs)
            w.put(n, y, IMAGE)
            return
    y = w.get(x, IMAGE)
    for i, matrix in enumerate(wanted):
        if np.array_equal(matrix, np.eye(x.shape[1 + i])):
            continue
        if ((matrix != 0).sum(1) == 1).all() and (matrix.max(1) == 1).all():
            y = w.emit("Gather", y, matrix.argmax(1).astype(np.int64), axis=2 + i)
        else:
            y = w.emit("MatMul", matrix, y) if i == 0 else w.emit("MatMul", y, np.ascontiguousarray(matrix.T))
    w.put(n, y, IMAGE)


# ------------------------------------------------------------------------------------ contractions


def swapped(rank: int, swap: bool) -> Order:
    """The own order of a matrix, or the one with its last two axes exchanged."""
    own = tuple(range(rank))
    return (*own[:-2], rank - 1, rank - 2) if swap else own


@row("linear")
def linear(w: Writer, n: Node) -> None:
    x, weights, *bias = n.inputs
    if n.dtype is not x.dtype:
        y = w.emit("MatMulInteger", w.get(x), w.get(weights, (1, 0)), scalar(n.attrs["zero"], x.dtype))
        w.put(n, w.emit("Add", y, w.get(bias[0])) if bias else y)
    elif x.type.rank == 2:
        w.put(n, w.emit("Gemm", w.get(x), w.get(weights), w.get(bias[0]) if bias else "", transB=1))
    else:
        y = w.emit("MatMul", w.get(x), w.get(weights, (1, 0)))
        w.put(n, w.emit("Add", y, w.get(bias[0])) if bias else y)


def _has_blocks(node: Node) -> bool:
    """True for weights of 4 bits, or with several scales a channel."""
    return node.op == "compressed_linear" and (node.attrs["bits"] == 4 or node.inputs[2].shape[1] > 1)


@row("compressed_linear")
def compressed_linear(w: Writer, n: Node) -> None:
    """Weights by DequantizeLinear, the product in float32 whatever bits of the activations ours takes."""
    x, q, scale, zero, bias = n.inputs
    if not all(i.is_const for i in n.inputs[1:]):
        raise Inexpressible("compressed_linear with weights that are computed")
    if _has_blocks(n):
        if w.opset < 21:
            raise Inexpressible("weights in blocks or of 4 bits need opset 21")
        values = [q.value, zero.value] if n.attrs["bits"] == 8 else [w.nibbles(q.value), w.nibbles(zero.value)]
        block = {"axis": 1, "block_size": n.attrs["group"]}
    else:
        values, block = [q.value, zero.value[:, 0]], {"axis": 0}
    scales = scale.value if "block_size" in block else scale.value[:, 0]
    weights = w.emit("DequantizeLinear", values[0], scales, values[1], **block)
    if x.type.rank == 2:
        w.put(n, w.emit("Gemm", w.get(x), weights, w.get(bias), transB=1))
        return
    y = w.emit("MatMul", w.get(x), w.emit("Transpose", weights, perm=(1, 0)))
    w.put(n, w.emit("Add", y, w.get(bias)))


@row("matmul")
def matmul(w: Writer, n: Node) -> None:
    a, b = n.inputs
    names = [w.get(a, swapped(a.type.rank, n.attrs["trans_a"])), w.get(b, swapped(b.type.rank, n.attrs["trans_b"]))]
    if n.dtype is a.dtype:
        w.put(n, w.emit("MatMul", *names))
        return
    zeros = [scalar(n.attrs["a_zero"], a.dtype), scalar(n.attrs["b_zero"], b.dtype)]
    w.put(n, w.emit("MatMulInteger", *names, *zeros))


@row("attention")
def attention(w: Writer, n: Node) -> None:
    heads = (0, 2, 1, 3) if n.attrs["token_major"] else (0, 1, 2, 3)
    q, k, v = n.inputs[:3]
    scores = w.emit("MatMul", w.get(q, heads), w.get(k, (heads[0], heads[1], heads[3], heads[2])))
    scores = w.emit("Mul", scores, scalar(n.attrs["scale"], n.dtype))
    if len(n.inputs) > 3:
        scores = w.emit("Add", scores, w.get(n.inputs[3]))
    if n.attrs["causal"]:
        hidden = np.triu(np.full((q.shape[heads[2]], k.shape[heads[2]]), -np.inf, n.dtype.numpy), 1)
        scores = w.emit("Add", scores, hidden)
    if not n.attrs["levels"]:
        w.put(n, w.emit("MatMul", w.emit("Softmax", scores, axis=-1), w.get(v, heads)), heads)
        return
    if n.attrs["levels"] != 255:
        raise Inexpressible(f"attention with weights of {n.attrs['levels']} levels")
    p = w.emit("DequantizeLinear", byte_weights(w, scores), scalar(1, F32), scalar(0, DType.u8))
    w.put(n, w.emit("Div", w.emit("MatMul", p, w.get(v, heads)), row_sums(w, p)), heads)


def byte_weights(w: Writer, scores: str) -> str:
    """255 exp(score - largest of its row), in bytes."""
    e = w.emit("Exp", w.emit("Sub", scores, w.emit("ReduceMax", scores, integers(-1), keepdims=1)))
    return w.emit("QuantizeLinear", e, scalar(1 / 255, F32), scalar(0, DType.u8))


def row_sums(w: Writer, p: str) -> str:
    return w.emit("ReduceSum", p, integers(-1), keepdims=1)


@row("quantized_attention")
def quantized_attention(w: Writer, n: Node) -> None:
    heads = (0, 2, 1, 3) if n.attrs["token_major"] else (0, 1, 2, 3)
    q, k, v = n.inputs[:3]
    zeros = [scalar(n.attrs[z], DType.u8) for z in ("q_zero", "k_zero", "v_zero")]
    across = (heads[0], heads[1], heads[3], heads[2])
    sums = w.emit("MatMulInteger", w.get(q, heads), w.get(k, across), zeros[0], zeros[1])
    scores = w.emit("Mul", w.emit("Cast", sums, to=ELEM_TYPES[F32]), scalar(n.attrs["scale"], F32))
    if len(n.inputs) > 3:
        scores = w.emit("Add", scores, w.get(n.inputs[3]))
    if n.attrs["causal"]:
        hidden = np.triu(np.full((q.shape[heads[2]], k.shape[heads[2]]), -np.inf, np.float32), 1)
        scores = w.emit("Add", scores, hidden)
    p = byte_weights(w, scores)
    products = w.emit("MatMulInteger", p, w.get(v, heads), scalar(0, DType.u8), zeros[2])
    total = w.emit("Cast", products, to=ELEM_TYPES[F32])
    sum_ = row_sums(w, w.emit("DequantizeLinear", p, scalar(1, F32), scalar(0, DType.u8)))
    y = w.emit("Mul", total, w.emit("Div", scalar(n.attrs["factor"], F32), sum_))
    if n.dtype is not F32:
        y = w.emit("QuantizeLinear", y, scalar(1, F32), scalar(n.attrs["y_zero"], n.dtype))
    w.put(n, y, heads)


# -------------------------------------------------------------------------------------- recurrence

ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}


def recurrent(w: Writer, n: Node, op: str, outputs: int, **attrs: Any) -> list[str]:
    """An ONNX recurrence of one direction; its bias is the two rows of the IR's, one after the other."""
    if any(a not in ACTIVATIONS for a in n.attrs["activations"]):
        raise Inexpressible(f"{n.op} with the activations {', '.join(n.attrs['activations'])}")
    x, weights, r, bias, *states = n.inputs

    def one(v: Node, *shape: int) -> str:
        if v.is_const:
            return w.initializer(v.value.reshape(shape))
        return w.emit("Reshape", w.get(v), integers(*shape))

    hidden = r.shape[1]
    operands = [w.get(x), one(weights, 1, *weights.shape), one(r, 1, *r.shape), one(bias, 1, bias.type.size), "",
                *(one(s, 1, *s.shape) if s.type.rank == 2 else one(s, 1, s.type.size) for s in states)]
    return w.emit_all(op, operands, outputs, hidden_size=hidden,
                      activations=[ACTIVATIONS[a] for a in n.attrs["activations"]], **attrs)


@row("gru", "rnn")
def gru(w: Writer, n: Node) -> None:
    attrs = {"linear_before_reset": int(n.attrs["reset_after"])} if n.op == "gru" else {}
    y = recurrent(w, n, n.op.upper(), 1, **attrs)[0]  # [T, 1, N, H]
    w.put(n, w.emit("Reshape", y, integers(n.shape[0], -1, n.shape[2])))


@row("lstm")
def lstm(w: Writer, n: Node) -> None:
    """ONNX gives h of every step but c of the last one only: the others must not be read."""
    steps, _, _, hidden = n.shape
    if not reads_last_cell(w.graph, n, steps):
        raise Inexpressible("an LSTM of which the cell state of an inner step is read")
    y, _, c = recurrent(w, n, "LSTM", 3)
    states = w.emit("Reshape", c, integers(1, 1, -1, hidden))
    states = w.emit("Expand", states, integers(steps, 1, 1, 1)) if steps > 1 else states
    w.put(n, w.emit("Concat", y, states, axis=1))


def reads_last_cell(graph: Graph, x: Node, steps: int) -> bool:
    """Whether all that is read of `x` [T, ...] is the last step, or of an LSTM the hidden states too."""
    if steps == 1:
        return True
    if graph.is_output(x):
        return False
    for user in graph.users[x]:
        a = user.attrs
        hidden_only = x.op == "lstm" and user.op == "slice" and a["start"][1] + a["size"][1] == 1
        if hidden_only or (user.op == "slice" and a["start"][0] == steps - 1):
            continue
        keeps_steps = user.op in ("slice", "reshape") and user.shape[:1] == (steps,)
        if not keeps_steps or not reads_last_cell(graph, user, steps):
            return False
    return True
