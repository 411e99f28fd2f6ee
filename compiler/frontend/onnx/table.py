"""The table of ONNX operators: one decorated function per operator, and what such a row works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from skive import ops
from skive.errors import InvalidModelError
from skive.ir import Node, constant
from skive.types import DType

if TYPE_CHECKING:
    from skive.frontend.onnx.importer import Env, Importer

# A folded constant may be this large even if its operands are small; beyond it an Expand or
# ConstantOfShape stays a node and is computed when the model runs.
FOLD_BYTES = 1 << 22
# Multiply-accumulates that folding may spend on one node.
FOLD_MACS = 1 << 30
# What importers do to weights; a quantized constant goes through these as one.
MOVES_WEIGHTS = frozenset({"reshape", "transpose", "slice"})
# Elements of a constant that an attribute or a shape calls for, such as a window or a Fourier matrix.
MAX_CONSTANT = 1 << 25


@dataclass(frozen=True)
class SequenceValue:
    """A sequence whose length is known: it exists only while the model is imported."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class OptionalValue:
    """An optional whose presence is known: it exists only while the model is imported."""

    item: Value | None


class UnknownValue:
    """Stands for what a node that was reported as unsupported would have produced."""


UNKNOWN = UnknownValue()
Value: TypeAlias = "Node | SequenceValue | OptionalValue | UnknownValue"
Results: TypeAlias = "Value | Sequence[Value | None]"
Row: TypeAlias = "Callable[[Call], Results]"
Operand: TypeAlias = "Node | np.ndarray | np.generic | float | int | bool"

ROWS: dict[tuple[str, str], Row] = {}
# Rows that only say why the operator is refused, and operands that must be constants of the model.
REFUSED: set[tuple[str, str]] = set()
CONSTANT: dict[tuple[str, str], str] = {}


class Unsupported(Exception):
    """A valid ONNX node that has no equivalent in the IR: why, and what the user can do.

    `inputs` names the graph inputs that, once fixed to values, would remove the reason.
    """

    def __init__(self, reason: str, hint: str = "", inputs: Sequence[str] = ()):
        super().__init__(reason)
        self.reason, self.hint, self.inputs = reason, hint, tuple(inputs)


class Decline(Exception):
    """Raised by a row that leaves a case to the function body in the ONNX specification."""


def onnx_op(*names: str, domain: str = "", refused: bool = False, constant: str = "") -> Callable[[Row], Row]:
    """Registers a function as the row of the operators `names` of `domain`.

    For the documentation: `refused` if the row always raises Unsupported; `constant` names operands
    that hold data and yet must be constants of the model.
    """

    def register(row: Row) -> Row:
        for name in names:
            if (domain, name) in ROWS:
                raise AssertionError(f"{name} is twice in the ONNX table")
            ROWS[domain, name] = row
            if refused:
                REFUSED.add((domain, name))
            if constant:
                CONSTANT[domain, name] = constant
        return row

    return register


def is_quantized_constant(node: Node) -> bool:
    """Whether `node` is the `dequantize` of constants: weights that stay integers."""
    return node.op == "dequantize" and all(i.is_const for i in node.inputs)


def is_known(node: Node) -> bool:
    """Whether the value of `node` does not depend on the inputs of the model."""
    return node.is_const or is_quantized_constant(node)


def moved_constant(op: str, node: Node, attrs: dict[str, Any], origin: str) -> Node | None:
    """A movement of a quantized constant as a quantized constant: its integers move, scales and zero
    points with them. None where the integers would be folded into something larger than they are."""
    q, *parameters = node.inputs
    moved = folded(ops.make(op, q, origin=origin, **attrs))
    if not moved.is_const:
        return None

    def followed(v: Node) -> Node:
        if v.type.size == 1:
            return constant(v.value.reshape(()), origin=v.origin)
        full = (1,) * (node.type.rank - v.type.rank) + v.shape
        if op == "transpose":
            return constant(v.value.reshape(full).transpose(attrs["perm"]), origin=v.origin)
        # Move the index of the scale that each element has; an axis along which it stays the same is one scale.
        index = np.broadcast_to(np.arange(v.type.size, dtype=np.int32).reshape(full), node.shape)
        index = ops.evaluate(ops.make(op, constant(index), **attrs), [index])
        for axis in range(index.ndim):
            first = index.take([0], axis)
            index = first if (index == first).all() else index
        return constant(v.value.reshape(-1)[index], origin=v.origin)

    return ops.make("dequantize", moved, *(followed(v) for v in parameters), origin=origin)


def folded(node: Node) -> Node:
    """`node`, or the constant it always computes when that is known and of reasonable size."""
    if node.op in ("const", "input") or is_quantized_constant(node):
        return node
    if node.type.size == 0:
        return constant(np.zeros(node.shape, node.dtype.numpy), origin=node.origin)
    limit = max(FOLD_BYTES, sum(i.type.bytes for i in node.inputs))
    if not all(i.is_const for i in node.inputs) or node.type.bytes > limit or ops.macs(node) > FOLD_MACS:
        return node
    if "pad" in node.attrs and padded_bytes(node) > limit * 16:
        return node
    return constant(ops.evaluate(node, [i.value for i in node.inputs]), origin=node.origin)


def padded_bytes(node: Node) -> int:
    """The memory that evaluating a window operation needs for its padded operand."""
    n, h, w, ch = node.inputs[0].shape
    top, left, bottom, right = node.attrs["pad"]
    return n * (h + top + bottom) * (w + left + right) * ch * node.dtype.bytes


@dataclass
class Call:
    """One ONNX node while it is imported: operands, attributes, and the means to build IR nodes."""

    op_type: str
    name: str
    origin: str
    opset: int
    attrs: dict[str, Any]
    inputs: list[Value | None]
    outputs: list[str]
    importer: Importer
    env: Env
    created: list[Node] = field(default_factory=list)

    # -------------------------------------------------------------------------------- operands

    def has(self, i: int) -> bool:
        """Whether optional input `i` is given."""
        return i < len(self.inputs) and self.inputs[i] is not None

    def wants(self, i: int) -> bool:
        """Whether output `i` is used by name."""
        return i < len(self.outputs) and bool(self.outputs[i])

    def value(self, i: int) -> Value:
        """Input `i`, tensor or not; InvalidModelError if it is missing."""
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise InvalidModelError(f"input {i} is missing")
        return value

    def __getitem__(self, i: int) -> Node:
        """Tensor input `i`; InvalidModelError if it is missing or not a tensor."""
        value = self.value(i)
        if not isinstance(value, Node):
            raise InvalidModelError(f"input {i} is not a tensor")
        return value

    def get(self, i: int) -> Node | None:
        """Tensor input `i`, None if it is not given."""
        return self[i] if self.has(i) else None

    @property
    def tensors(self) -> list[Node]:
        """All inputs, each of which must be a tensor."""
        return [self[i] for i in range(len(self.inputs))]

    def const(self, i: int, what: str, *, data: bool = False) -> np.ndarray:
        """The value of input `i`; Unsupported if it is not known when the model is compiled."""
        return self.known(self[i], what, data=data)

    def known(self, node: Node, what: str, *, data: bool = False) -> np.ndarray:
        """The value of `node`; Unsupported, naming the inputs to fix, if it is not a constant.

        `data`: the operand is what the model computes with, not a parameter such as a shape. To fix
        it would be to compute the result in advance, so no input is named.
        """
        if node.is_const:
            return node.value
        if is_quantized_constant(node):
            return ops.evaluate(node, [i.value for i in node.inputs])
        if data:
            raise Unsupported(f"{self.op_type} needs {what} to be a constant of the model",
                              "end the model before this node and do it in the program that calls it")
        names = self.importer.inputs_behind(node)
        hint = f"give its value with fixed_inputs={{{', '.join(f'{n!r}: ...' for n in names)}}}"
        raise Unsupported(f"{self.op_type} needs {what} to be a constant", hint, names)

    def ints(self, i: int, what: str) -> tuple[int, ...]:
        """The integers in constant input `i`."""
        return tuple(int(v) for v in self.const(i, what).reshape(-1))

    def ints_or_attr(self, i: int, name: str, default: Any = None) -> Any:
        """Integers given as input `i` in newer opsets, as attribute `name` in older ones."""
        if self.has(i):
            return self.ints(i, name)
        return self.attrs.get(name, default)

    def attr(self, name: str, default: Any = None) -> Any:
        """Attribute `name` as a Python value: int, float, str, list, array or GraphProto."""
        return self.attrs.get(name, default)

    def choice(self, name: str, default: str, *others: str) -> str:
        """String attribute `name`; InvalidModelError if it is none of the given values."""
        value = self.attrs.get(name, default)
        if value not in (default, *others):
            raise InvalidModelError(f"{name} is {value!r}, not one of {', '.join((default, *others))}")
        return value

    def required(self, name: str) -> Any:
        """Attribute `name`; InvalidModelError if it is missing."""
        if name not in self.attrs:
            raise InvalidModelError(f"attribute {name} is missing")
        return self.attrs[name]

    def subgraph(self, name: str, *values: Value) -> list[Value]:
        """The outputs of the graph in attribute `name`, imported here with `values` as its inputs."""
        body = self.required(name)
        formal = [i.name for i in body.input]
        if len(formal) != len(values):
            raise InvalidModelError(f"{name} takes {len(formal)} inputs, not {len(values)}")
        return self.importer.graph(body, self.env.inner(dict(zip(formal, values))))

    # ----------------------------------------------------------------------------------- nodes

    def make(self, op: str, *operands: Operand, **attrs: Any) -> Node:
        """An IR node, folded if its operands are constants.

        Python and numpy scalars among the operands take the element type of the tensors.
        """
        tensors = [o for o in operands if isinstance(o, Node)]
        like = (tensors[1:] if op == "where" and len(tensors) > 1 and tensors[0] is operands[0] else tensors)
        nodes = [o if isinstance(o, Node) else self.lit(o, like[0].dtype) for o in operands]
        computes = ops.op_of(op).kind not in ("movement", "index") and op != "cast"
        if computes and any(n.dtype is DType.f16 for n in nodes):
            raise Unsupported("float16 arithmetic", "convert the model to float32")
        self.importer.step()
        node = None
        if op in MOVES_WEIGHTS and is_quantized_constant(nodes[0]) and nodes[0].type.size:
            node = moved_constant(op, nodes[0], attrs, self.origin)
        if node is None:
            node = folded(ops.make(op, *nodes, origin=self.origin, **attrs))
        if node not in nodes:
            self.created.append(node)
        return node

    def room(self, elements: int, what: str) -> None:
        """InvalidModelError if a constant that an attribute asks for is absurdly large."""
        if elements > MAX_CONSTANT:
            raise InvalidModelError(f"{what} of {elements} elements")

    def full(self, shape: Sequence[int], value: float | int | bool, dtype: DType) -> Node:
        """A tensor of equal elements; a large one is made when the model runs."""
        return self.expand(self.lit(value, dtype), shape)

    def lit(self, value: Any, dtype: DType | np.dtype | type | None = None) -> Node:
        """A constant."""
        dtype = dtype.numpy if isinstance(dtype, DType) else dtype
        node = constant(np.array(value, dtype=dtype), origin=self.origin)
        self.created.append(node)
        return node

    def cast(self, x: Node, to: DType) -> Node:
        return x if x.dtype is to else self.make("cast", x, to=to)

    def reshape(self, x: Node, shape: Sequence[int]) -> Node:
        shape = tuple(int(d) for d in shape)
        return x if x.shape == shape else self.make("reshape", x, shape=shape)

    def transpose(self, x: Node, perm: Sequence[int]) -> Node:
        perm = tuple(int(p) for p in perm)
        return x if perm == tuple(range(x.type.rank)) else self.make("transpose", x, perm=perm)

    def expand(self, x: Node, shape: Sequence[int]) -> Node:
        shape = tuple(int(d) for d in shape)
        return x if x.shape == shape else self.make("expand", x, shape=shape)

    def slice(self, x: Node, axis: int, start: int, size: int, step: int = 1) -> Node:
        """`size` elements of one axis from `start`, `step` apart."""
        if start == 0 and size == x.shape[axis] and step == 1:
            return x
        starts, sizes, steps = [0] * x.type.rank, list(x.shape), [1] * x.type.rank
        starts[axis], sizes[axis], steps[axis] = start, size, step
        return self.make("slice", x, start=tuple(starts), size=tuple(sizes), step=tuple(steps))

    def index(self, x: Node, axis: int, i: int) -> Node:
        """Element `i` of an axis, which disappears."""
        part = self.slice(x, axis, i, 1)
        return self.reshape(part, x.shape[:axis] + x.shape[axis + 1:])

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        return parts[0] if len(parts) == 1 else self.make("concat", *parts, axis=axis)

    def stack(self, parts: Sequence[Node], axis: int) -> Node:
        """Tensors of one shape joined along a new axis."""
        shape = parts[0].shape
        return self.concat([self.reshape(p, (*shape[:axis], 1, *shape[axis:])) for p in parts], axis)

    def back(self, x: Node, perm: Sequence[int]) -> Node:
        """The inverse of `transpose(x, perm)`."""
        return self.transpose(x, [list(perm).index(i) for i in range(len(perm))])

    def fold(self, op: str, parts: Sequence[Node]) -> Node:
        """All parts joined by a binary operation; InvalidModelError if there are none."""
        if not parts:
            raise InvalidModelError(f"{op} of nothing")
        return reduce(lambda a, b: self.make(op, a, b), parts)

    def axis(self, name: str, default: int, rank: int) -> int:
        """Attribute `name` as an axis counted from 0; InvalidModelError if outside the rank."""
        return checked_axis(int(self.attrs.get(name, default)), rank)

    def named(self, results: Sequence[Value | None]) -> list[Value | None]:
        """`results` with the ONNX tensor names on the nodes that this call created for them."""
        inner = {i for n in self.created for i in n.inputs}
        fresh = set(self.created) - inner
        return [replace(r, name=name) if isinstance(r, Node) and r in fresh and name else r
                for r, name in zip(results, self.outputs)]


def checked_axis(axis: int, rank: int) -> int:
    """`axis` counted from 0; InvalidModelError if it is outside the rank."""
    if not -rank <= axis < rank:
        raise InvalidModelError(f"axis {axis} is outside rank {rank}")
    return axis % rank
