"""Graph -> Plan: chooses kernels, packs weights, gives every value its place in memory.

Three steps: `legalise` rewrites what no kernel takes as it stands into what one does; `Storage`
decides which values share memory (views, in-place elementwise, concat written in place; channels may
lie between those of other values); then one function per operation (`@lowers`) appends kernel calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from skive import expr as expressions
from skive import ops, pack
from skive.errors import UnsupportedOpError
from skive.ir import Graph, Node, constant, rebuilt
from skive.plan import Access, Arg, Block, Call, Fn, FnStep, Plan, Port, WeightPool, aligned, place
from skive.targets.base import Target
from skive.tuning import Tuning, contraction_variants
from skive.types import DType, TensorType

F32 = DType.f32

# Operations whose function in math.h has an overload for Vec<N>; the others run on scalars.
VECTOR = frozenset(
    """
    less less_equal greater greater_equal equal not_equal and or xor not where is_nan is_inf add sub
    mul div neg abs sqrt rsqrt exp log sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh
    erf floor ceil round_even trunc sign reciprocal relu clip min max pow mod fmod sigmoid silu gelu
    gelu_tanh hard_sigmoid hard_swish leaky_relu elu selu celu softplus softsign mish prelu
    thresholded_relu shrink
    """.split()
)


# The same for integers in vectors of 32-bit lanes: what never leaves the range of its type, and what may.
VECTOR_INT = frozenset("quantize requantize requantize_fixed dequantize cast min max relu clip".split())
VECTOR_I32 = VECTOR_INT | frozenset("add sub mul neg abs".split())
_IN_VECTORS = frozenset((F32, DType.i8, DType.u8, DType.i16, DType.u16, DType.i32))


def in_vectors(e: expressions.Expr, operands: Sequence[DType]) -> bool:
    """Whether every step of `e` on operands of these types has a function over vectors."""
    types: list[DType] = []
    for s in e.steps:
        args = [operands[i] if k == "x" else types[i] for k, i in s.args]
        to = ops.infer(s.op, [TensorType((), t) for t in args], ops.complete_attrs(s.op, dict(s.attrs))).dtype
        types.append(to)
        involved = {to, *args}
        if involved <= {F32, DType.bool}:
            known = s.op in VECTOR
        elif not involved <= _IN_VECTORS:
            known = False
        elif s.op == "cast":  # truncation and wrapping have no vector form
            known = args[0] is not F32 and (to is F32 or to is DType.i32)
        else:
            known = s.op in (VECTOR_I32 if involved <= {DType.i32} else VECTOR_INT)
        if not known:
            return False
    return types[-1] in _IN_VECTORS


@dataclass
class Root:
    """Memory that one or more values share."""

    kind: str
    bytes: int
    index: int = 0
    offset: int = 0
    block: Block | None = None
    values: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A value's place: bytes `offset` into `root`; `pixel` elements between neighbours along the last
    axis but one where the value is a slice of channels of a wider one, 0 if it is dense."""

    root: Root
    offset: int = 0
    pixel: int = 0


def _literal(value: Any, dtype: DType) -> str:
    """A C++ literal of exactly this value and type."""
    if dtype is DType.bool:
        return "true" if value else "false"
    if dtype.is_float:
        v = dtype.numpy.type(value)
        suffix = "f" if dtype is F32 else ""
        if np.isnan(v):
            return f'__builtin_nan{suffix}("")'
        if np.isinf(v):
            return f"{'-' if v < 0 else ''}__builtin_inf{suffix}()"
        text = repr(float(v)) if dtype is not F32 else np.format_float_scientific(v, unique=True)
        return text.rstrip(".") + suffix if "e" in text or "." in text else f"{text}.0{suffix}"
    v = int(value)
    if dtype is DType.u64:
        return f"uint64_t{{{v}ull}}"
    if v == -(2**63):
        return "(-9223372036854775807ll - 1)"
    return f"static_cast<{dtype.ctype}>({v}{'ll' if dtype is DType.i64 else ''})"


# ------------------------------------------------------------------------------------ legalise


def _fusible_operand(extra: Node, base: Node) -> Access | None:
    """How an epilogue reads `extra` beside a result of `base`'s shape; None if it cannot."""
    shape, full = extra.shape, base.shape
    if extra.dtype not in _IN_VECTORS:
        return None
    if extra.type.size == 1:
        return Access("literal", text=_literal(extra.value.item(), extra.dtype)) if extra.is_const else Access("scalar")
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    c = full[-1]
    if padded == full:
        return Access("full", stride=c)
    if padded[-1] == c and all(d == 1 for d in padded[:-1]):
        return Access("channel")
    if padded[-1] == 1 and padded[:-1] == full[:-1]:
        return Access("pixel")
    if len(full) > 2 and padded[-1] == c and padded[0] == full[0] and all(d == 1 for d in padded[1:-1]):
        return Access("sample", stride=c, pixels=math.prod(full[1:-1]))
    return None


def _epilogue_ok(node: Node) -> bool:
    """Whether the kernel of `node` can run its epilogue: all in vectors."""
    e = expressions.parse(node.attrs["epilogue"])
    base_count = ops.op_of(node.op).epilogue or 0
    operands = [_sum_dtype(node), *(i.dtype for i in node.inputs[base_count:])]
    if not _has_fast_kernel(node) or not in_vectors(e, operands):
        return False
    return all(_fusible_operand(x, node) for x in node.inputs[base_count:])


def _sum_dtype(node: Node) -> DType:
    """The element type that the kernel of `node` hands to its epilogue."""
    return F32 if node.inputs[0].dtype is F32 else DType.i32


_PRODUCTS = frozenset(("conv2d", "linear", "conv_transpose2d"))


def _has_fast_kernel(node: Node) -> bool:
    """Whether a packed, vectorised kernel exists for `node` (else the plain one runs)."""
    x = node.inputs[0].dtype
    if x is not F32:
        if node.op in _PRODUCTS:
            return x in _INTEGER_PACKING and all(i.is_const for i in node.inputs[1:3])
        return node.op == "sum_pool2d" or (node.op == "max_pool2d" and x in (DType.u8, DType.i8, DType.i16))
    if node.op in _PRODUCTS:
        return all(i.is_const for i in node.inputs[1:3])
    if node.op == "resize2d":
        return all(i.is_const for i in node.inputs[1:5])
    return True


# Operations whose fast kernel takes the floats between neighbouring pixels of operand and result.
_STRIDED = frozenset(
    ("conv2d", "conv_transpose2d", "linear", "max_pool2d", "avg_pool2d", "sum_pool2d", "resize2d")
)


def _writes_channel_slices(node: Node) -> bool:
    """Whether the kernel of `node` can write its result with other values' channels in between."""
    if node.op in _STRIDED:
        return _has_fast_kernel(node)
    return node.op in ("slice", "concat") or ops.op_of(node.op).kind == "elementwise"


def _reads_channel_slices(node: Node, x: Node, lanes: int) -> bool:
    """Whether the kernel of `node` can read `x` with other values' channels in between."""
    row = ops.op_of(node.op)
    if row.kind == "elementwise":
        return x.shape[-1] >= lanes  # a row of less leaves most of each vector empty
    if node.op in ("slice", "concat", "expand") or node.op in _REDUCE:
        return True
    if node.op not in _STRIDED or not _has_fast_kernel(node):
        return False
    count = row.epilogue or 0
    extras = [_fusible_operand(i, node) for i in node.inputs[count:] if i is x]
    return x not in node.inputs[1:count] and all(a and a.mode in ("full", "sample") for a in extras)


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
        if ops.macs(node) and node.inputs[0].dtype in ops.QUANTIZED and not _has_fast_kernel(node):
            return _widened(node)
        if node.op in ("softmax", "log_softmax") and node.type.size and node.dtype is not F32:
            wide = ops.make("cast", node.inputs[0], origin=node.origin, to=F32)
            return ops.make(
                "cast", ops.make(node.op, wide, origin=node.origin, axis=node.attrs["axis"]), to=node.dtype
            )
        return node

    return graph.map_nodes(one)


# ------------------------------------------------------------------------------------ lowering


class Lowering:
    """Collects the calls of one graph."""

    def __init__(self, graph: Graph, target: Target, threads: int, tuning: Tuning):
        self.graph, self.target, self.threads, self.tuning = graph, target, threads, tuning
        self.weights = WeightPool()
        self.calls: list[Call] = []
        self.problems: list[tuple[str, str, str]] = []
        self._pending: list[tuple[list[tuple[Root, int, Arg]], int]] = []
        self._roots: list[Root] = []
        self._views: dict[Node, View] = {}
        self._const_roots: dict[Node, Root] = {}
        self._aliases: set[Node] = set()  # slices that are views of their operand
        self._strided_readers = self._read_as_channel_slices()
        self._assign_storage()

    # -- storage

    def _new_root(self, kind: str, nbytes: int, index: int = 0) -> Root:
        root = Root(kind, nbytes, index)
        if kind == "arena":
            root.block = Block(nbytes, 1 << 30, -1)
            self._roots.append(root)
        return root

    def _read_as_channel_slices(self) -> set[Node]:
        """The values that may lie with other values' channels in between: all that read them can."""
        found: set[Node] = set()
        outputs = set(self.graph.outputs)
        for n in reversed(self.graph.nodes):
            if n.is_const or n.type.rank < 2 or not n.type.size or n in outputs:
                continue
            if all(
                u in found and u.shape[-1] == n.shape[-1]
                if u.op == "reshape"
                else _reads_channel_slices(u, n, self.target.lanes)
                for u in self.graph.users[n]
            ):
                found.add(n)
        return found

    def _assign_storage(self) -> None:
        graph = self.graph
        position = {n: i for i, n in enumerate(graph.nodes)}
        last_use = {n: max([position[u] for u in users], default=position[n]) for n, users in graph.users.items()}
        self._position, self._last_use = position, last_use
        outputs = set(graph.outputs)
        for i, n in enumerate(graph.inputs):
            self._views[n] = View(self._new_root("input", n.type.bytes, i))
        for n in graph.nodes:
            if n.op in ("input", "const"):
                continue
            view = self._shared_view(n, position, last_use, outputs) or View(self._new_root("arena", n.type.bytes))
            self._views[n] = view
            view.root.values.append(n)
            if n.op == "slice" and n.inputs[0] in self._views and view.root is self._views[n.inputs[0]].root:
                self._aliases.add(n)
        for i, o in enumerate(graph.outputs):
            settled = self._views.get(o)
            if (
                settled
                and settled.root.kind == "arena"
                and settled.offset == 0
                and settled.root.bytes == o.type.bytes
            ):
                settled.root.kind, settled.root.index = "output", i
                self._roots.remove(settled.root)
                settled.root.block = None
        for n in graph.nodes:  # a concat whose place is known takes its operands in
            if n.op == "concat":
                self._concat_in_place(n, outputs)
                self._concat_channels_in_place(n)

    def _shared_view(
        self, n: Node, position: dict[Node, int], last_use: dict[Node, int], outputs: set[Node]
    ) -> View | None:
        """The memory that `n` takes over from an operand; None if it needs its own."""
        if not n.type.size:
            return None
        if n.op == "reshape" and not n.inputs[0].is_const:
            return self._views[n.inputs[0]]
        if n.op == "slice" and not n.inputs[0].is_const:
            return self._slice_view(n)
        if ops.op_of(n.op).kind == "elementwise":
            for x in n.inputs:
                view = self._views.get(x)
                if (
                    view
                    and view.root.kind == "arena"
                    and view.offset == 0
                    and view.root.bytes == n.type.bytes == x.type.bytes
                    and x.shape == n.shape
                    and not any(v in outputs for v in view.root.values)
                    and all(last_use[v] <= position[n] for v in view.root.values)
                    and sum(i is x for i in n.inputs) == 1
                    and not any(
                        self._views.get(i) and self._views[i].root is view.root for i in n.inputs if i is not x
                    )
                ):
                    return view
        return None

    def _slice_view(self, n: Node) -> View | None:
        """Where a slice lies inside its operand; None if no kernel could read it there."""
        x = n.inputs[0]
        whole, width = self._views[x], self.pixel(x)
        if any(s != 1 and d > 1 for s, d in zip(n.attrs["step"], n.shape, strict=True)):
            return None
        # The pixels must be neighbours; of what lies around them only whole outer parts may be left out.
        cut = [i for i in range(n.type.rank - 1) if n.shape[i] != x.shape[i]]
        if any(n.shape[i] != 1 for i in range(cut[-1] if cut else 0)):
            return None
        dense = n.type.size == math.prod(n.shape[-1:]) or n.shape[-1] == width
        if not dense and n not in self._strided_readers:
            return None
        start = sum(s * b for s, b in zip(self.strides(x), n.attrs["start"], strict=True))
        return View(whole.root, whole.offset + start * n.dtype.bytes, 0 if dense else width)

    def _concat_in_place(self, n: Node, outputs: set[Node]) -> None:
        """Operands that nothing else shares memory with are computed right where they end up."""
        axis = n.attrs["axis"] % n.type.rank
        if math.prod(n.shape[:axis]) != 1:
            return
        view, offset = self._views[n], self._views[n].offset
        # An in-place operation on the result would destroy an operand that is read again later.
        if any(ops.op_of(v.op).kind == "elementwise" for v in view.root.values) and any(
            self._last_use[v] > self._position[n]
            for x in n.inputs
            for v in (self._views[x].root.values if x in self._views else [])
        ):
            return
        for x in n.inputs:
            own = self._views.get(x)
            if (
                own
                and own.root.kind == "arena"
                and own.offset == 0
                and own.root.bytes == x.type.bytes
                and own.root is not view.root
                and own.root in self._roots
                and not any(v in outputs for v in own.root.values)
                and sum(i is x for i in n.inputs) == 1
            ):
                self._roots.remove(own.root)
                for v in own.root.values:
                    inner = self._views[v]
                    self._views[v] = View(view.root, offset + inner.offset, inner.pixel)
                view.root.values.extend(own.root.values)
            offset += x.type.bytes

    def _concat_channels_in_place(self, n: Node) -> None:
        """Operands are written as slices of the result's channels, if all that write and read them can.

        What moves is the whole memory of an operand, with the views of it and the values computed in
        place: one operand, or neighbours that together are all channels of what they are slices of.
        """
        if n.attrs["axis"] % n.type.rank != n.type.rank - 1 or math.prod(n.shape[:-1]) in (0, 1):
            return
        channel = 0
        for i, x in enumerate(n.inputs):
            own = self._views.get(x)
            if own and self._fills_channels(own.root, n, i):
                self._move_into_channels(own.root, n, channel)
            channel += x.shape[-1]

    def _fills_channels(self, root: Root, n: Node, first: int) -> bool:
        """Whether the operands of `n` from number `first` on are all of `root`, which can be moved there."""
        result, size = self._views[n].root, n.dtype.bytes
        width, rest = divmod(root.bytes, size * math.prod(n.shape[:-1]))  # channels
        if rest or root not in self._roots or root is result:
            return False
        channel = 0
        for x in n.inputs[first:]:
            view = self._views.get(x)
            if channel == width or not view or view.root is not root or view.offset != channel * size:
                break
            channel += x.shape[-1]
        overwritten = any(
            ops.op_of(v.op).kind == "elementwise" and self._position[v] > self._position[n] for v in result.values
        )
        return channel == width and all(
            v in self._strided_readers
            and (v.op == "reshape" or _writes_channel_slices(v))
            and v.dtype is n.dtype
            and self.pixel(v) == width
            and not (overwritten and self._last_use[v] > self._position[n])
            for v in root.values
        )

    def _move_into_channels(self, root: Root, n: Node, channel: int) -> None:
        """Every value in `root` becomes a part of the channels of `n` from number `channel` on."""
        result, size, pixel = self._views[n], n.dtype.bytes, self.pixel(n)
        width = root.bytes // math.prod(n.shape[:-1])  # bytes
        self._roots.remove(root)
        for v in root.values:
            pixels, rest = divmod(self._views[v].offset, width)
            offset = result.offset + (pixels * pixel + channel) * size + rest
            self._views[v] = View(result.root, offset, pixel)
        result.root.values.extend(root.values)

    def pixel(self, node: Node) -> int:
        """Elements between neighbouring pixels of `node` where it lies."""
        return self.view(node).pixel or math.prod(node.shape[-1:])

    def strides(self, node: Node) -> list[int]:
        """Elements between neighbours along each axis of `node` where it lies."""
        strides, pixel = row_strides(node.shape), self.view(node).pixel
        return [s // node.shape[-1] * pixel for s in strides[:-1]] + [1] if pixel else strides

    def pixel_strides(self, x: Node, node: Node) -> list[int]:
        """XS and YS of a kernel that reads `x` and writes `node`; nothing where both are dense."""
        return [self.pixel(x), self.pixel(node)] if self.view(x).pixel or self.view(node).pixel else []

    # -- building calls

    def is_view(self, node: Node) -> bool:
        """Whether `node` is a slice that lies inside its operand: nothing computes it."""
        return node in self._aliases

    def view(self, node: Node) -> View:
        """Where `node` lies; constants are placed in the weights when first used unpacked."""
        if node.is_const:
            if node not in self._const_roots:
                self._const_roots[node] = Root("weights", node.type.bytes, offset=self.weights.add(node.value))
            return View(self._const_roots[node])
        return self._views[node]

    def read(self, name: str, node: Node, strided: bool = False) -> tuple[View, Arg]:
        """An operand; `strided`: of a kernel that heeds `pixel(node)`."""
        assert strided or not self.view(node).pixel, f"{node.label()}: read as if its pixels were neighbours"
        return self.view(node), Arg(name, node.dtype.ctype, "")

    def write(self, name: str, node: Node, strided: bool = False) -> tuple[View, Arg]:
        """The result; `strided` as for `read`."""
        assert strided or not self.view(node).pixel, f"{node.label()}: written as if its pixels were neighbours"
        return self.view(node), Arg(name, node.dtype.ctype, "", const=False)

    def packed(self, name: str, array: np.ndarray) -> tuple[View, Arg]:
        """A constant in the layout its kernel reads."""
        return (
            View(Root("weights", array.nbytes, offset=self.weights.add(array))),
            Arg(name, DType.of(array.dtype).ctype, ""),
        )

    def temporary(self, name: str, nbytes: int) -> tuple[View, Arg]:
        """Memory that lives from the first to the last call that names it."""
        return View(self._new_root("arena", nbytes)), Arg(name, "unsigned char", "", const=False)

    def call(
        self,
        node: Node,
        kernel: str,
        header: str,
        template: Sequence[object],
        order: Sequence[str],
        args: Sequence[tuple[View, Arg]],
        fn: Fn | None = None,
        parallel: bool = True,
        scratch: int = 0,
    ) -> None:
        """Appends one kernel call that computes (a part of) `node`.

        `scratch`: bytes of working memory; the argument called `scratch` in `order`, null if 0.
        """
        index = len(self.calls)
        if scratch:
            args = [
                *args,
                (View(self._new_root("arena", scratch)), Arg("scratch", "unsigned char", "", const=False)),
            ]
        else:
            order = ["nullptr" if o == "scratch" else o for o in order]
        moved = 0
        for view, _ in args:
            moved += view.root.bytes
            if view.root.block:
                view.root.block.first = min(view.root.block.first, index)
                view.root.block.last = max(view.root.block.last, index)
        self._pending.append(([(v.root, v.offset, a) for v, a in args], index))
        self.calls.append(
            Call(
                kernel,
                header,
                tuple(map(str, template)),
                tuple(order),
                (),
                fn,
                node.label(),
                node.op,
                ops.macs(node),
                moved,
                parallel,
                scratch,
            )
        )

    def finish(self) -> Plan:
        """Places the blocks and resolves every argument."""
        graph = self.graph
        for i, o in enumerate(graph.outputs):
            view = self.view(o)
            if view.root.kind == "output" and view.root.index == i and view.offset == 0:
                continue
            target = View(self._new_root("output", o.type.bytes, i))
            if o.type.size:
                dense = f"Shape<{o.type.size}>"
                self.call(
                    o,
                    "copy_strided",
                    "copy.h",
                    [o.dtype.ctype, dense, dense, dense],
                    ["y", "x", "part"],
                    [self.read("x", o), (target, Arg("y", o.dtype.ctype, "", const=False))],
                )
        if self.problems:
            raise UnsupportedOpError(self.problems)
        blocks = [r.block for r in self._roots if r.block and r.block.last >= 0]
        size, bound = place(blocks)
        calls = list(self.calls)
        for args, index in self._pending:
            resolved = []
            for root, offset, arg in args:
                base = root.block.offset if root.block else root.offset
                resolved.append(replace(arg, kind=root.kind, index=root.index, offset=base + offset))
            calls[index] = replace(calls[index], args=tuple(resolved))
        ports = [
            tuple(Port(name, n.shape, n.dtype.numpy.name, n.type.bytes) for name, n in side)
            for side in (
                [(n.name, n) for n in graph.inputs],
                list(zip(graph.output_names, graph.outputs, strict=True)),
            )
        ]
        return Plan(
            graph.name,
            self.target.name,
            self.threads,
            ports[0],
            ports[1],
            tuple(calls),
            self.weights.blob(),
            size,
            bound,
            graph.batch_max,
        )

    # -- epilogues

    def epilogue(self, node: Node) -> tuple[Fn, list[tuple[View, Arg]]]:
        """The functor of `node`'s epilogue and the pointers it reads."""
        text = node.attrs.get("epilogue", "")
        if not text:
            return Fn((), (Access("value"),), True, True), []
        e = expressions.parse(text)
        operands, args = [Access("value")], []
        for i, extra in enumerate(node.inputs[ops.op_of(node.op).epilogue or 0 :], 1):
            access = _fusible_operand(extra, node)
            assert access is not None, "legalise() lets only fusible epilogues through"
            if access.mode != "literal":
                access = replace(access, arg=f"e{i}")
                if access.mode in ("full", "sample"):
                    access = replace(access, stride=self.pixel(extra))
                args.append(self.read(f"e{i}", extra, strided=access.mode in ("full", "sample")))
            operands.append(access)
        types = [_sum_dtype(node), *(i.dtype for i in node.inputs[ops.op_of(node.op).epilogue or 0 :])]
        steps = _steps(e, types)
        if _is_integer_conv(node):
            steps = _rounded_by_store(node, e, steps, operands, types)
        return Fn(steps, tuple(operands), True, True), args


def _steps(e: expressions.Expr, dtypes: Sequence[DType]) -> tuple[FnStep, ...]:
    """The expression in C++ function names and literals."""
    steps: list[FnStep] = []
    types: list[DType] = []
    for s in e.steps:
        row = ops.op_of(s.op)
        operand_types = [dtypes[i] if k == "x" else types[i] for k, i in s.args]
        attrs = ops.complete_attrs(s.op, dict(s.attrs))
        types.append(row.infer([TensorType((), t) for t in operand_types], attrs).dtype)
        name, tail = row.cxx, []
        for v in attrs.values():
            if isinstance(v, DType):
                name += f"<{v.ctype}>"
            elif isinstance(v, bool):
                tail.append("true" if v else "false")
            else:
                tail.append(_literal(v, operand_types[0]))
        steps.append(FnStep(name, tuple(f"{k}{i}" for k, i in s.args), tuple(tail)))
    return tuple(steps)


def _is_integer_conv(node: Node) -> bool:
    """Whether the integer kernels of conv.h compute `node`."""
    if node.op not in _PRODUCTS or node.inputs[0].dtype is F32:
        return False
    return node.op != "conv2d" or not _is_depthwise(node)


def _is_depthwise(conv: Node) -> bool:
    groups, channels = conv.attrs["groups"], conv.inputs[0].shape[3]
    return groups == channels and conv.inputs[1].shape[0] % channels == 0 and groups > 1


def _rounded_by_store(
    node: Node,
    e: expressions.Expr,
    steps: tuple[FnStep, ...],
    operands: Sequence[Access],
    types: Sequence[DType],
) -> tuple[FnStep, ...]:
    """`steps` with a quantizing last step as `rounded` (tile.h), whose store saturates several registers at once."""
    last = e.steps[-1]
    if last.op not in ("quantize", "requantize") or last.args[2][0] != "x":
        return steps
    zero, (kind, index) = operands[last.args[2][1]], last.args[0]
    if zero.mode != "literal" or steps[-1].name not in (f"{last.op}<{t}>" for t in ("uint8_t", "int8_t", "int16_t")):
        return steps
    to = steps[-1].name[len(last.op) + 1 : -1]
    value, factor = (f"{k}{i}" for k, i in last.args[:2])
    done = list(steps[:-1])
    dtype = types[index] if kind == "x" else ops.expr_dtype(expressions.Expr(e.steps[: index + 1]), types)
    if dtype is not F32:
        done.append(FnStep("cast<float>", (value,)))
        value = f"t{len(done) - 1}"
    done.append(FnStep("mul" if last.op == "requantize" else "div_", (value, factor)))
    bounded = "true" if len(e.steps) == 1 and _stays_below(node, last, 2**30) else "false"
    done.append(FnStep(f"rounded<{to}, {bounded}>", (f"t{len(done) - 1}",), (zero.text,)))
    return tuple(done)


def _stays_below(node: Node, step: expressions.Step, limit: int) -> bool:
    """Whether the sums of a contraction times the constant factor of `step` are proven to stay below `limit`."""
    x, w, bias = node.inputs[:3]
    kind, index = step.args[1]
    if step.op != "requantize" or kind != "x" or not node.inputs[2 + index].is_const:
        return False
    factor = node.inputs[2 + index]
    limits = np.iinfo(x.dtype.numpy)
    sums = np.abs(w.value.astype(np.int64)).reshape(w.shape[0], -1).sum(1) * (limits.max - limits.min)
    return bool(((sums + np.abs(bias.value.astype(np.int64))) * np.abs(factor.value.astype(np.float64))).max() < limit)


LOWER: dict[str, Callable[[Lowering, Node], None]] = {}


def lowers(*names: str) -> Callable[[Callable[[Lowering, Node], None]], Callable[[Lowering, Node], None]]:
    """Registers the lowering of operations."""

    def register(fn: Callable[[Lowering, Node], None]) -> Callable[[Lowering, Node], None]:
        for n in names:
            LOWER[n] = fn
        return fn

    return register


def lower(graph: Graph, target: Target, threads: int = 1, tuning: Tuning | None = None) -> Plan:
    """The plan of `graph` on `target`, with the variants that `tuning` chooses.

    UnsupportedOpError lists every node without a kernel.
    """
    graph = legalise(graph)
    ctx = Lowering(graph, target, threads, tuning or Tuning())
    for node in graph.nodes:
        if node.op in ("input", "const", "reshape") or not node.type.size:
            continue
        if node.dtype is DType.f16 or any(i.dtype is DType.f16 for i in node.inputs):
            ctx.problems.append((node.label(), f"{node.op} on float16", "cast the model to float32"))
        elif node.op in LOWER:
            LOWER[node.op](ctx, node)
        else:
            ctx.problems.append((node.label(), f"{node.op} has no kernel", "report it"))
    return ctx.finish()


# -- windows


def _image(shape: Sequence[int]) -> str:
    return f"Image<{', '.join(map(str, shape))}>"


def _window_tags(a: Any) -> list[str]:
    t, left, b, r = a["pad"]
    tags = [f"Stride<{a['stride'][0]}, {a['stride'][1]}>", f"Pad<{t}, {left}, {b}, {r}>"]
    return [*tags, f"Dilation<{a['dilation'][0]}, {a['dilation'][1]}>"] if "dilation" in a else tags


def _bias(node: Node, oc: int) -> np.ndarray:
    return node.inputs[2].value if len(node.inputs) > 2 else np.zeros(oc, _sum_dtype(node).numpy)


_INTEGER_PACKING: dict[DType, Callable[..., np.ndarray]] = {
    DType.u8: pack.pack_conv2d_u8,
    DType.i16: pack.pack_conv2d_i16,
}


def _element(ctx: Lowering, x: Node, node: Node) -> list[object]:
    """The template arguments behind the block of a convolution: XS and YS, and of integers type and zero point."""
    if x.dtype is F32:
        return [*ctx.pixel_strides(x, node)]
    return [ctx.pixel(x), ctx.pixel(node), x.dtype.ctype, node.attrs["zero"]]


def _packed_conv(
    node: Node, w: np.ndarray, bias: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [OC, KH, KW, IC] and bias of a dense convolution as its kernel reads them."""
    x = node.inputs[0].dtype
    if x is F32:
        return pack.pack_conv2d(w, block), pack.pack_bias(bias, block)
    dilation = node.attrs.get("dilation", (1, 1))
    return _INTEGER_PACKING[x](w, block, dilation), pack.pack_bias_i32(bias, w, node.attrs["zero"], block)


@lowers("conv2d")
def _conv2d(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    oc, kh, kw, _ = w.shape
    groups, c = node.attrs["groups"], x.shape[3]
    tags = [_image(x.shape), f"Kernel<{oc}, {kh}, {kw}>", *_window_tags(node.attrs)]
    if not _has_fast_kernel(node):
        _plain_conv(ctx, node, "plain_conv2d", [w.dtype.ctype, *tags, groups])
        return
    strides = _element(ctx, x, node)
    fn, extra = ctx.epilogue(node)
    order = ["x", "w", "bias", "y", "scratch", "part", "fn"]

    def run(
        kernel: str, header: str, template: list[object], weights: np.ndarray, bias: np.ndarray, scratch: int = 0
    ) -> None:
        ctx.call(
            node,
            kernel,
            header,
            template,
            order,
            [
                ctx.read("x", x, strided=True),
                ctx.packed("w", weights),
                ctx.packed("bias", bias),
                ctx.write("y", node, strided=True),
                *extra,
            ],
            fn,
            scratch=scratch,
        )

    if _is_depthwise(node):
        taps, bias = w.value[..., 0], _bias(node, oc)
        weights: np.ndarray
        biases: np.ndarray
        if x.dtype is F32:
            weights, biases = pack.pack_depthwise(taps, bias, oc // c)
        else:
            packing = pack.pack_depthwise_u8 if x.dtype is DType.u8 else pack.pack_depthwise_i16
            weights, biases = packing(taps, bias, node.attrs["zero"], node.attrs, ctx.target.name, oc // c)
        header = "depthwise.h" if x.dtype is F32 else "depthwise_integer.h"
        run("depthwise2d", header, [*tags, *strides], weights, biases)
        return
    kernel, block = ctx.tuning.choose(node, contraction_variants(node, ctx.target))
    if kernel == "winograd2d":
        run(
            kernel,
            "winograd.h",
            [tags[0], tags[1], tags[3], block, *strides],
            pack.pack_winograd(w.value, block),
            pack.pack_bias(_bias(node, oc), block),
            pack.winograd_scratch_bytes(x.shape, node.attrs["pad"], oc, block, ctx.threads),
        )
    else:
        template = [*tags, block] if groups == 1 else [*tags, groups, block]
        run(
            kernel,
            "conv.h",
            [*template, *strides],
            *_joined(_packed_conv(node, g, b, block)
                     for g, b in zip(np.split(w.value, groups), np.split(_bias(node, oc), groups), strict=True)),
            pack.conv2d_scratch_bytes(x.shape, node.attrs, (kh, kw), ctx.threads, ctx.pixel(x), x.dtype.bytes),
        )


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The packed weights, and the packed biases, of groups one after the other."""
    weights, biases = zip(*parts, strict=True)
    return np.concatenate(weights), np.concatenate(biases)


def _plain_conv(ctx: Lowering, node: Node, kernel: str, template: list[object]) -> None:
    args = [ctx.read("x", node.inputs[0]), ctx.read("w", node.inputs[1])]
    if len(node.inputs) > 2:
        args.append(ctx.read("bias", node.inputs[2]))
    bias = "bias" if len(node.inputs) > 2 else "nullptr"
    ctx.call(node, kernel, "plain.h", template, ["x", "w", bias, "y", "part"], [*args, ctx.write("y", node)])


@lowers("conv_transpose2d")
def _conv_transpose2d(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    oc, kh, kw, _ = w.shape
    tags = [_image(x.shape), f"Kernel<{oc}, {kh}, {kw}>", *_window_tags(node.attrs)]
    groups = node.attrs["groups"]
    if not _has_fast_kernel(node):
        _plain_conv(ctx, node, "plain_conv_transpose2d", [w.dtype.ctype, *tags, groups, _image(node.shape)])
        return
    fn, extra = ctx.epilogue(node)
    _, block = ctx.tuning.choose(node, contraction_variants(node, ctx.target))
    weights: np.ndarray
    bias: np.ndarray
    if x.dtype is F32:
        weights = pack.pack_conv_transpose2d(w.value, node.attrs, node.shape, block)
        bias = np.concatenate([pack.pack_bias(g, block) for g in np.split(_bias(node, oc), groups)])
    else:
        packing = pack.pack_conv_transpose2d_u8 if x.dtype is DType.u8 else pack.pack_conv_transpose2d_i16
        weights = packing(w.value, node.attrs, node.shape, block)
        bias = pack.pack_conv_transpose2d_bias_i32(
            _bias(node, oc), w.value, node.attrs["zero"], node.attrs, node.shape, block
        )
    ctx.call(
        node,
        "conv_transpose2d",
        "conv.h",
        [*tags, _image(node.shape), groups, block, *_element(ctx, x, node)],
        ["x", "w", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", weights),
            ctx.packed("bias", bias),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=pack.conv_transpose2d_scratch_bytes(
            x.shape, node.attrs, (kh, kw), node.shape, ctx.threads, x.dtype.bytes
        ),
    )


@lowers("max_pool2d", "avg_pool2d", "sum_pool2d")
def _pool2d(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    kernel = f"Kernel<{x.shape[3]}, {node.attrs['kernel'][0]}, {node.attrs['kernel'][1]}>"
    stride, padding, dilation = _window_tags(node.attrs)
    if not _has_fast_kernel(node):
        if node.op == "avg_pool2d":
            ctx.problems.append(
                (node.label(), f"average pooling of {x.dtype.value}", "cast the operand to float32")
            )
            return
        ctx.call(
            node,
            "plain_max_pool2d",
            "plain.h",
            [x.dtype.ctype, _image(x.shape), kernel, stride, padding, dilation],
            ["x", "y", "part"],
            [ctx.read("x", x), ctx.write("y", node)],
        )
        return
    fn, extra = ctx.epilogue(node)
    template: list[object] = [_image(x.shape), kernel, stride, padding]
    if node.op == "avg_pool2d":
        template.append(padding if node.attrs["count_pad"] else "Pad<0, 0, 0, 0>")
    template.append(dilation)
    template += _element(ctx, x, node) if node.op == "sum_pool2d" else ctx.pixel_strides(x, node)
    ctx.call(
        node,
        node.op,
        "pool.h",
        template,
        ["x", "y", "nullptr", "part", *(["fn"] if x.dtype is F32 or node.op == "sum_pool2d" else [])],
        [ctx.read("x", x, strided=True), ctx.write("y", node, strided=True), *extra],
        fn,
    )


@lowers("resize2d")
def _resize2d(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    if not _has_fast_kernel(node):
        ctx.problems.append(
            (node.label(), "resampling with tables that are not constant", "fix the size of the result")
        )
        return
    args, spelled, taps = [ctx.read("x", x, strided=True)], [], []
    for axis, name in ((1, "rows"), (2, "columns")):
        sources, weights = (i.value for i in node.inputs[2 * axis - 1 : 2 * axis + 1])
        args.append(ctx.packed(name, np.clip(sources, 0, x.shape[axis] - 1)))
        plain = sources.shape[1] == 1 and (weights == 1).all()
        if not plain:
            args.append(ctx.packed(f"{name}_weights", weights))
        spelled.append(f"{{{name}, {'nullptr' if plain else f'{name}_weights'}}}")
        taps.append(sources.shape[1])
    fn, extra = ctx.epilogue(node)
    ctx.call(
        node,
        "resize2d",
        "resize.h",
        [_image(x.shape), *node.shape[1:3], *taps, ctx.pixel(x), ctx.pixel(node)],
        ["x", *spelled, "y", "nullptr", "part", "fn"],
        [*args, ctx.write("y", node, strided=True), *extra],
        fn,
    )


@lowers("linear")
def _linear(ctx: Lowering, node: Node) -> None:
    x, w = node.inputs[:2]
    if not _has_fast_kernel(node):
        ctx.problems.append(
            (node.label(), f"linear on {x.dtype.value} or with weights that are not constant", "use matmul")
        )
        return
    oc, k = w.shape
    rows = x.type.size // k
    fn, extra = ctx.epilogue(node)
    _, block = ctx.tuning.choose(node, contraction_variants(node, ctx.target))
    one = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
    weights, bias = _packed_conv(node, w.value.reshape(oc, 1, 1, k), _bias(node, oc), block)
    ctx.call(
        node,
        "conv2d",
        "conv.h",
        [_image((1, 1, rows, k)), f"Kernel<{oc}, 1, 1>", *_window_tags(one), block, *_element(ctx, x, node)],
        ["x", "w", "bias", "y", "scratch", "part", "fn"],
        [
            ctx.read("x", x, strided=True),
            ctx.packed("w", weights),
            ctx.packed("bias", bias),
            ctx.write("y", node, strided=True),
            *extra,
        ],
        fn,
        scratch=pack.conv2d_scratch_bytes((1, 1, rows, k), one, (1, 1), ctx.threads, ctx.pixel(x), x.dtype.bytes),
    )


# -- elementwise


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Neighbouring axes merged where every operand walks them as one."""
    dims: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for axis, d in enumerate(shape):
        if d == 1:
            continue
        if dims and all(w[-1] == s[axis] * d for w, s in zip(walks, strides, strict=True)):
            dims[-1] *= d
            for w, s in zip(walks, strides, strict=True):
                w[-1] = s[axis]
        else:
            dims.append(d)
            for w, s in zip(walks, strides, strict=True):
                w.append(s[axis])
    if not dims:
        dims, walks = [1], [[1] for _ in strides]
    return tuple(dims), [tuple(w) for w in walks]


def row_strides(shape: Sequence[int]) -> list[int]:
    """Strides in elements of a dense row-major tensor."""
    out, step = [], 1
    for d in reversed(shape):
        out.append(step)
        step *= d
    return out[::-1]


def broadcast_strides(
    shape: Sequence[int], to: Sequence[int], strides: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Strides in elements that walk a tensor of `shape` (and `strides`, or dense) over the broadcast shape `to`."""
    strides = row_strides(shape) if strides is None else strides
    walk = (0 if d == 1 else s for d, s in zip(shape, strides, strict=True))
    return (0,) * (len(to) - len(shape)) + tuple(walk)


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _tag(name: str, numbers: Sequence[object]) -> str:
    """`Shape<1, 2>` and its like."""
    return f"{name}<{', '.join(map(str, numbers))}>"


def _elementwise(ctx: Lowering, node: Node) -> None:
    if node.op == "map":
        e = expressions.parse(node.attrs["fn"])
    else:
        e = expressions.Expr(
            (
                expressions.Step(
                    node.op, tuple(("x", i) for i in range(len(node.inputs))), tuple(node.attrs.items())
                ),
            )
        )
    e_types = [i.dtype for i in node.inputs]
    vector = in_vectors(e, e_types) and set(e_types) <= _IN_VECTORS
    operands, args, strides = [], [], []
    for i, x in enumerate(node.inputs):
        if x.is_const and x.type.size == 1:
            operands.append(Access("literal", text=_literal(x.value.item(), x.dtype)))
        else:
            operands.append(Access("value"))
            args.append(ctx.read(f"x{i}", x, strided=True))
            strides.append(broadcast_strides(x.shape, node.shape, ctx.strides(x)))
    pixel = ctx.view(node).pixel
    dims, walks = collapse(node.shape, [ctx.strides(node), *strides])
    template = [node.dtype.ctype, _tag("Shape", dims), *(_tag("Strides", w) for w in walks[0 if pixel else 1 :])]
    ctx.call(
        node,
        ("vmap" if vector else "map") + ("_to" if pixel else ""),
        "map.h",
        template[1:] if vector else template,
        ["y", "part", "fn", *(a.name for _, a in args)],
        [ctx.write("y", node, strided=True), *args],
        Fn(_steps(e, e_types), tuple(operands), False, vector),
    )


for _op in ops.OPS.values():
    if _op.kind == "elementwise":
        LOWER[_op.name] = _elementwise


# -- data movement


def _shift(arg: tuple[View, Arg], elements: int, dtype: DType) -> tuple[View, Arg]:
    """The same argument, `elements` further on."""
    view, a = arg
    return View(view.root, view.offset + elements * dtype.bytes), a


def _copy(
    ctx: Lowering,
    node: Node,
    x: tuple[View, Arg],
    y: tuple[View, Arg],
    shape: Sequence[int],
    x_strides: Sequence[int],
    y_strides: Sequence[int],
) -> None:
    dims, (to, start) = collapse(shape, [y_strides, x_strides])
    ctx.call(
        node,
        "copy_strided",
        "copy.h",
        [node.dtype.ctype, _tag("Shape", dims), _tag("Strides", to), _tag("Strides", start)],
        ["y", "x", "part"],
        [x, y],
    )


@lowers("slice")
def _slice(ctx: Lowering, node: Node) -> None:
    if ctx.is_view(node):
        return
    x = node.inputs[0]
    strides = ctx.strides(x)
    start = sum(s * b for s, b in zip(strides, node.attrs["start"], strict=True))
    steps = [s * st for s, st in zip(strides, node.attrs["step"], strict=True)]
    _copy(
        ctx,
        node,
        _shift(ctx.read("x", x, strided=True), start, x.dtype),
        ctx.write("y", node, strided=True),
        node.shape,
        steps,
        ctx.strides(node),
    )


@lowers("concat")
def _concat(ctx: Lowering, node: Node) -> None:
    axis, offset = node.attrs["axis"] % node.type.rank, 0
    strides = ctx.strides(node)
    view = ctx.view(node)
    for x in node.inputs:
        place_of = View(view.root, view.offset + offset * strides[axis] * node.dtype.bytes)
        if x.type.size and not (ctx.view(x).root is view.root and ctx.view(x).offset == place_of.offset):
            _copy(
                ctx,
                node,
                ctx.read("x", x, strided=True),
                _shift(ctx.write("y", node, strided=True), offset * strides[axis], node.dtype),
                x.shape,
                ctx.strides(x),
                strides,
            )
        offset += x.shape[axis]


@lowers("expand")
def _expand(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    _copy(
        ctx,
        node,
        ctx.read("x", x, strided=True),
        ctx.write("y", node),
        node.shape,
        broadcast_strides(x.shape, node.shape, ctx.strides(x)),
        row_strides(node.shape),
    )


@lowers("transpose")
def _transpose(ctx: Lowering, node: Node) -> None:
    x, perm = node.inputs[0], node.attrs["perm"]
    kept = [i for i in range(x.type.rank) if x.shape[i] != 1]
    dims = [x.shape[i] for i in kept]
    order = [kept.index(p) for p in perm if p in kept]
    # Input axes that stay neighbours in the result are one axis.
    groups: list[list[int]] = []
    for p in order:
        if groups and groups[-1][-1] + 1 == p:
            groups[-1].append(p)
        else:
            groups.append([p])
    by_input = sorted(groups)
    shape = [math.prod(dims[i] for i in g) for g in by_input] or [1]
    new_perm = [by_input.index(g) for g in groups] or [0]
    ctx.call(
        node,
        "transpose",
        "transpose.h",
        [node.dtype.ctype, _tag("Shape", shape), _tag("Perm", new_perm)],
        ["y", "x", "part"],
        [ctx.read("x", x), ctx.write("y", node)],
    )


@lowers("pad")
def _pad(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    ctx.call(
        node,
        "pad",
        "copy.h",
        [
            node.dtype.ctype,
            f"PadMode::{node.attrs['mode']}",
            _tag("Shape", x.shape),
            _tag("Shape", node.shape),
            _tag("Strides", node.attrs["before"]),
        ],
        ["y", "x", _literal(node.attrs["value"], node.dtype), "part"],
        [ctx.read("x", x), ctx.write("y", node)],
    )


# -- indexing


@lowers("gather")
def _gather(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    axis = node.attrs["axis"] % x.type.rank
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        math.prod(x.shape[:axis]),
        x.shape[axis],
        index.type.size,
        math.prod(x.shape[axis + 1 :]),
    ]
    ctx.call(
        node,
        "gather",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


@lowers("gather_elements")
def _gather_elements(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        _tag("Shape", x.shape),
        _tag("Shape", index.shape),
        node.attrs["axis"] % x.type.rank,
    ]
    ctx.call(
        node,
        "gather_elements",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


@lowers("gather_nd")
def _gather_nd(ctx: Lowering, node: Node) -> None:
    x, index = node.inputs
    b, q = node.attrs["batch_dims"], index.shape[-1]
    template = [
        x.dtype.ctype,
        index.dtype.ctype,
        math.prod(x.shape[:b]),
        _tag("Shape", x.shape[b : b + q]),
        math.prod(index.shape[b:-1]),
        math.prod(x.shape[b + q :]),
    ]
    ctx.call(
        node,
        "gather_nd",
        "gather.h",
        template,
        ["x", "i", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.write("y", node)],
    )


_SCATTER = {"none": "Replace", "add": "Add", "mul": "Mul", "min": "Minimum", "max": "Maximum"}


@lowers("scatter_elements", "scatter_nd")
def _scatter(ctx: Lowering, node: Node) -> None:
    x, index, updates = node.inputs
    template: list[object] = [x.dtype.ctype, index.dtype.ctype]
    if node.op == "scatter_elements":
        template += [_tag("Shape", x.shape), _tag("Shape", index.shape), node.attrs["axis"] % x.type.rank]
    else:
        q = index.shape[-1]
        template += [_tag("Shape", x.shape[:q]), math.prod(index.shape[:-1]), math.prod(x.shape[q:])]
    ctx.call(
        node,
        node.op,
        "gather.h",
        [*template, _SCATTER[node.attrs["reduction"]]],
        ["x", "i", "u", "y", "part"],
        [ctx.read("x", x), ctx.read("i", index), ctx.read("u", updates), ctx.write("y", node)],
    )


@lowers("topk_values", "topk_indices")
def _topk(ctx: Lowering, node: Node) -> None:
    x, k = node.inputs[0], node.attrs["k"]
    template = [x.dtype.ctype, x.type.size // x.shape[-1], x.shape[-1], k, _bool(node.attrs["largest"])]
    results = ["y", "nullptr"] if node.op == "topk_values" else ["nullptr", "y"]
    ctx.call(
        node,
        "topk",
        "topk.h",
        template,
        ["x", *results, "scratch", "part"],
        [ctx.read("x", x), ctx.write("y", node)],
        scratch=aligned(8 * k) * ctx.threads,
    )


# -- recurrence


@lowers("lstm", "gru", "rnn")
def _recurrent(ctx: Lowering, node: Node) -> None:
    x, w, r = node.inputs[:3]
    t, b, i = x.shape
    h = r.shape[1]
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[node.op]
    packed, isa = w.is_const and r.is_const, ctx.target.name
    template: list[object] = [t, b, i, h, *(f"{a.capitalize()}Fn" for a in node.attrs["activations"])]
    if node.op == "gru":
        template.append(_bool(node.attrs["reset_after"]))
    template.append(_bool(packed))
    if packed:
        # The reset gate of a GRU stands between its first two gates and the third: two panels.
        panels = np.split(r.value, [2 * h]) if node.op == "gru" else [r.value]
        weights = [
            ctx.packed("w", pack.pack_gates(w.value, t * b, isa)),
            ctx.packed("r", np.concatenate([pack.pack_gates(p, b, isa) for p in panels])),
        ]
    else:
        weights = [ctx.read("w", w), ctx.read("r", r)]
    args = [ctx.read("x", x), *weights, ctx.read("bias", node.inputs[3]), ctx.read("h0", node.inputs[4])]
    order = ["x", "w", "r", "bias", "h0"]
    if node.op == "lstm":
        args.append(ctx.read("c0", node.inputs[5]))
        order.append("c0")
        if len(node.inputs) > 6:
            args.append(ctx.read("peep", node.inputs[6]))
        order.append("peep" if len(node.inputs) > 6 else "nullptr")
    args.append(ctx.write("y", node))
    order.append("y")
    ctx.call(
        node,
        node.op,
        "rnn.h",
        template,
        [*order, "scratch", "part"],
        args,
        scratch=pack.recurrent_scratch_bytes(gates, t, b, i, h, packed, isa),
    )


# -- reductions


def _outer_axis_inner(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    axis %= max(len(shape), 1)
    return math.prod(shape[:axis]), shape[axis] if shape else 1, math.prod(shape[axis + 1 :])


_REDUCE = {
    "reduce_sum": "Sum",
    "reduce_mean": "Mean",
    "reduce_max": "Max",
    "reduce_min": "Min",
    "reduce_prod": "Prod",
}
_PLAIN = Fn((), (Access("value"),), True, True)  # an epilogue that changes nothing


@lowers(*_REDUCE)
def _reduce(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    axes = {a % x.type.rank for a in node.attrs["axes"]}
    strides, pixel = ctx.strides(x), ctx.view(x).pixel
    kept = [i for i in range(x.type.rank) if i not in axes]
    reduced = sorted(axes)
    # The mean over the middle of [outer, n, inner] is a pooling window: vectors run over inner.
    if node.op == "reduce_mean" and x.dtype is F32 and reduced and reduced[-1] - reduced[0] == len(reduced) - 1:
        outer, n, inner = (
            math.prod(x.shape[: reduced[0]]),
            math.prod(x.shape[i] for i in reduced),
            math.prod(x.shape[reduced[-1] + 1 :]),
        )
        if inner > 1 and outer and n and (not pixel or reduced[-1] == x.type.rank - 2):
            ctx.call(
                node,
                "global_pool2d",
                "pool.h",
                [_image((outer, 1, n, inner)), "GlobalAverage", *([pixel] if pixel else [])],
                ["x", "y", "nullptr", "part", "fn"],
                [ctx.read("x", x, strided=True), ctx.write("y", node)],
                _PLAIN,
            )
            return
    template: list[object] = [_REDUCE[node.op], x.dtype.ctype]
    for group in (kept, reduced):
        dims, (walk,) = collapse([x.shape[i] for i in group], [[strides[i] for i in group]])
        template += [_tag("Shape", dims), _tag("Strides", walk)]
    args = [ctx.read("x", x, strided=True), ctx.write("y", node)]
    ctx.call(node, "reduce", "reduce.h", template, ["x", "y", "part"], args)


@lowers("argmax", "argmin")
def _arg(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [
        x.dtype.ctype,
        *_outer_axis_inner(x.shape, node.attrs["axis"]),
        _bool(node.op == "argmax"),
        _bool(node.attrs["last"]),
    ]
    ctx.call(
        node, "arg_extremum", "reduce.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)]
    )


@lowers("cumsum", "cumprod")
def _scan(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [
        "Sum" if node.op == "cumsum" else "Prod",
        x.dtype.ctype,
        *_outer_axis_inner(x.shape, node.attrs["axis"]),
        _bool(node.attrs["exclusive"]),
        _bool(node.attrs["reverse"]),
    ]
    ctx.call(node, "scan", "reduce.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)])


# -- normalisation


@lowers("softmax", "log_softmax")
def _softmax(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    template = [*_outer_axis_inner(x.shape, node.attrs["axis"]), _bool(node.op == "log_softmax")]
    ctx.call(node, "softmax", "softmax.h", template, ["x", "y", "part"], [ctx.read("x", x), ctx.write("y", node)])


@lowers("layer_norm", "rms_norm")
def _norm(ctx: Lowering, node: Node) -> None:
    x = node.inputs[0]
    axis = node.attrs["axis"] % x.type.rank
    template = [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])]
    args = [ctx.read("x", x), ctx.read("scale", node.inputs[1])]
    order = ["x", "scale"]
    if node.op == "layer_norm":
        order.append("bias" if len(node.inputs) > 2 else "nullptr")
        args += [ctx.read("bias", b) for b in node.inputs[2:]]
    ctx.call(
        node,
        node.op,
        "norm.h",
        template,
        [*order, "y", "part", _literal(node.attrs["eps"], F32)],
        [*args, ctx.write("y", node)],
    )


# -- products


@lowers("matmul")
def _matmul(ctx: Lowering, node: Node) -> None:
    a, b = node.inputs[:2]
    batch, (m, n) = node.shape[:-2], node.shape[-2:]
    k = a.shape[-2] if node.attrs["trans_a"] else a.shape[-1]
    trans = [_bool(node.attrs["trans_a"]), _bool(node.attrs["trans_b"])]
    strides = [[s * math.prod(x.shape[-2:]) for s in broadcast_strides(x.shape[:-2], batch)] for x in (a, b)]
    dims, (_, wa, wb) = collapse(batch, [row_strides(batch), *strides])
    template = [_tag("Shape", dims), m, k, n, _tag("Strides", wa), _tag("Strides", wb), *trans]
    args = [ctx.read("a", a), ctx.read("b", b), ctx.write("y", node)]
    if node.inputs[0].dtype is not F32:
        t = node.dtype.ctype
        ctx.call(node, "plain_matmul", "matmul.h", [t, t, *template], ["a", "b", "y", "part"], args)
        return
    fn, extra = ctx.epilogue(node)
    scratch = (
        pack.matmul_scratch_bytes(math.prod(dims), m, k, n, node.attrs["trans_a"], ctx.target.name) * ctx.threads
    )
    ctx.call(
        node,
        "matmul",
        "matmul.h",
        template,
        ["a", "b", "y", "scratch", "part", "fn"],
        [*args, *extra],
        fn,
        scratch=scratch,
    )


@lowers("attention")
def _attention(ctx: Lowering, node: Node) -> None:
    q, k, v = node.inputs[:3]
    tokens = node.attrs["token_major"]  # [B, N, heads, D] instead of [B, heads, N, D]
    b, heads, nq, d = ops.heads_first(q.shape, tokens)
    nk, dv = ops.heads_first(k.shape, tokens)[2], v.shape[3]

    def head_strides(x: Node) -> str:
        s = row_strides(x.shape)
        return _tag("HeadStrides", [s[0], s[2], s[1]] if tokens else s[:3])

    args = [ctx.read("q", q), ctx.read("k", k), ctx.read("v", v)]
    mask, name = "NoMask", "nullptr"
    if len(node.inputs) > 3:
        walk = broadcast_strides(node.inputs[3].shape, (b, heads, nq, nk))
        mask, name = _tag("MaskStrides", walk), "mask"
        args.append(ctx.read("mask", node.inputs[3]))
    template = [
        b,
        heads,
        nq,
        nk,
        d,
        dv,
        head_strides(q),
        head_strides(k),
        head_strides(v),
        head_strides(node),
        mask,
        _bool(node.attrs["causal"]),
    ]
    ctx.call(
        node,
        "attention",
        "attention.h",
        template,
        ["q", "k", "v", name, "y", "scratch", "part", _literal(node.attrs["scale"], F32)],
        [*args, ctx.write("y", node)],
        scratch=pack.attention_scratch_bytes(nq, nk, d, dv, ctx.target.name) * ctx.threads,
    )
