"""From an ONNX graph to an IR graph: scopes, constants, functions, and the list of all problems."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto

from skive import ops
from skive.errors import InvalidModelError, ShapeError, SkiveError, UnsupportedOpError, first_line
from skive.frontend.onnx import rows as _rows  # noqa: F401 - fills the table
from skive.frontend.onnx.batch import check_separable
from skive.frontend.onnx.load import (
    DTYPES,
    ELEM_TYPES,
    NIBBLES,
    Loaded,
    elem_name,
    load_model,
    nibble_array,
    sparse_array,
    tensor_array,
)
from skive.frontend.onnx.table import (
    ROWS,
    UNKNOWN,
    Call,
    Decline,
    OptionalValue,
    SequenceValue,
    UnknownValue,
    Unsupported,
    Value,
)
from skive.ir import Graph, Node, constant, topological

Scope: TypeAlias = "ChainMap[str, Value | None]"  # None: an optional input of a function, not given
MAX_DEPTH = 32  # nested subgraphs and functions
MAX_STEPS = 250_000  # nodes imported or built: a small file may describe a very long program


@dataclass(frozen=True)
class Env:
    """Where a node stands: the tensors it sees, the attributes of its function, the opsets."""

    scope: Scope
    refs: Mapping[str, AttributeProto]
    opsets: Mapping[str, int]

    def inner(self, values: Mapping[str, Value]) -> Env:
        """The surroundings of a subgraph whose inputs are `values`."""
        return Env(self.scope.new_child(dict(values)), self.refs, self.opsets)


def normal_domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


@dataclass(frozen=True)
class Imported:
    """An imported model. A sequence among its outputs is several outputs of `graph`."""

    graph: Graph
    output_names: tuple[str, ...]
    outputs: tuple[Value, ...]

    @property
    def graph_inputs(self) -> list[str]:
        return [n.name for n in self.graph.inputs]

    def structured(self, flat: Sequence[np.ndarray]) -> list[Any]:
        """The outputs of the model from those of `graph`: arrays, lists of them, None."""
        values = iter(flat)
        return [self._collect(o, values) for o in self.outputs]

    def _collect(self, value: Value, values: Iterator[np.ndarray]) -> Any:
        if isinstance(value, SequenceValue):
            return [self._collect(v, values) for v in value.items]
        if isinstance(value, OptionalValue):
            return None if value.item is None else self._collect(value.item, values)
        return next(values)


def tensors_in(value: Value) -> Iterator[Node]:
    """The tensors of a value, in order."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, SequenceValue):
        for v in value.items:
            yield from tensors_in(v)
    elif isinstance(value, OptionalValue) and value.item is not None:
        yield from tensors_in(value.item)


class Importer:
    """Imports one model with given input shapes; `run` may be called once."""

    def __init__(self, model: ModelProto, folder: Path | None, fixed_inputs: Mapping[str, np.ndarray],
                 input_shapes: Mapping[str, tuple[int, ...]], batch: int | None = None):
        self.model, self.folder = model, folder
        self.fixed, self.shapes, self.batch = dict(fixed_inputs), dict(input_shapes), batch
        self.opsets = {normal_domain(o.domain): o.version for o in model.opset_import}
        self.functions = {(normal_domain(f.domain), f.name): f for f in model.functions}
        self.problems: list[tuple[str, str, str]] = []
        self.to_fix: dict[str, None] = {}
        self.inputs: list[Node] = []
        self.batched: set[Node] = set()
        self.nibbles: set[Node] = set()  # constants of 4-bit integers, which stand in 8 bits
        self.depth = 0
        self.steps = 0

    def step(self) -> None:
        """Counts one node; InvalidModelError when the program grows beyond all reason."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise InvalidModelError(f"the model unrolls to more than {MAX_STEPS} operations")

    def run(self) -> Imported:
        """The graph and its outputs; UnsupportedOpError with every problem if there is one."""
        graph = self.model.graph
        scope: Scope = ChainMap()
        known = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        unknown = set(self.fixed) - {i.name for i in graph.input}
        if unknown:
            raise ShapeError(f"the model has no input {sorted(unknown)[0]!r} that could be fixed; it has "
                             + ", ".join(i.name for i in graph.input if i.name not in known))
        symbols = [d.dim_param for i in graph.input for d in i.type.tensor_type.shape.dim if d.dim_param]
        unknown = set(self.shapes) - {i.name for i in graph.input} - set(symbols)
        if unknown:
            raise ShapeError(f"a shape is given for {sorted(unknown)[0]!r}, which is no input and no dimension of the "
                             "model; it has " + ", ".join(dict.fromkeys([i.name for i in graph.input
                                                                         if i.name not in known] + symbols)))
        for info in graph.input:
            if info.name in self.fixed:
                scope[info.name] = self.fixed_input(info.name, self.fixed[info.name], info.type)
            elif info.name not in known:
                scope[info.name] = self.graph_input(info)
        outputs = self.graph(graph, Env(scope, {}, self.opsets))
        names = [o.name for o in graph.output]
        if self.problems:
            raise UnsupportedOpError(self.problems, tuple(self.to_fix))
        for name, value in zip(names, outputs):
            if isinstance(value, UnknownValue):
                raise InvalidModelError(f"the output {name!r} depends on an optional result that its "
                                        "operator does not give")
        flat: list[Node] = []
        flat_names: list[str] = []
        for info, value in zip(graph.output, outputs):
            elem = info.type.tensor_type.elem_type
            if isinstance(value, Node) and elem and DTYPES.get(elem) is not value.dtype:
                raise InvalidModelError(f"the output {info.name!r} is declared {elem_name(elem)} but computed as "
                                        f"{value.dtype.value}")
        for name, value in zip(names, outputs):
            leaves = list(tensors_in(value))
            flat += leaves
            flat_names += [name] if isinstance(value, Node) else [f"{name}[{i}]" for i in range(len(leaves))]
        result = Graph(graph.name or "model", tuple(self.inputs), tuple(flat), tuple(flat_names))
        return Imported(result, tuple(names), tuple(outputs))

    # -------------------------------------------------------------------------------- inputs

    def fixed_input(self, name: str, value: Any, type_: TypeProto) -> Value:
        """A graph input whose value the user gives: a constant, a sequence of them, or an optional."""
        if type_.HasField("optional_type"):
            inner = type_.optional_type.elem_type
            return OptionalValue(None if value is None else self.fixed_input(name, value, inner))
        if type_.HasField("sequence_type"):
            inner = type_.sequence_type.elem_type
            return SequenceValue(tuple(self.fixed_input(name, v, inner) for v in value))
        array = np.array(value)
        wanted = DTYPES.get(type_.tensor_type.elem_type)
        if wanted is None or array.dtype != wanted.numpy:
            self.problems.append((name, f"the fixed value has the element type {array.dtype}",
                                  f"give {wanted.numpy}" if wanted else ""))
            return UNKNOWN
        return constant(array, name=name, origin=name)

    def graph_input(self, info: ValueInfoProto) -> Value:
        if not info.type.HasField("tensor_type"):
            return self.structured_input(info.name, info.type, self.shapes.get(info.name, UNKNOWN))
        elem = info.type.tensor_type.elem_type
        if elem not in DTYPES:
            self.problems.append((info.name, f"element type {elem_name(elem)} is not supported", ""))
            return UNKNOWN
        node = ops.make("input", shape=self.input_shape(info), dtype=DTYPES[elem], label=info.name, origin=info.name)
        self.inputs.append(node)
        return node

    def structured_input(self, name: str, type_: TypeProto, given: Any) -> Value:
        """A sequence or optional of which `given` tells the structure: a list of shapes, or None for nothing.

        Each tensor in it is an input of the graph: element 2 of `name` is called `name[2]`.
        """
        if given is UNKNOWN:
            self.problems.append((name, "the input is a sequence or an optional",
                                  "give the shapes of its tensors as a list, or None for nothing, with input_shapes"))
            return UNKNOWN
        if type_.HasField("optional_type"):
            inner = type_.optional_type.elem_type
            return OptionalValue(None if given is None else self.structured_input(name, inner, given))
        if type_.HasField("sequence_type"):
            inner = type_.sequence_type.elem_type
            return SequenceValue(tuple(self.structured_input(f"{name}[{i}]", inner, g) for i, g in enumerate(given)))
        elem = type_.tensor_type.elem_type
        if elem not in DTYPES:
            self.problems.append((name, f"element type {elem_name(elem)} is not supported", ""))
            return UNKNOWN
        node = ops.make("input", shape=tuple(int(d) for d in given), dtype=DTYPES[elem], label=name, origin=name)
        self.inputs.append(node)
        return node

    def input_shape(self, info: ValueInfoProto) -> tuple[int, ...]:
        """The static shape of a graph input; ShapeError if it is not known."""
        tensor = info.type.tensor_type
        given = self.shapes.get(info.name)
        if given is not None and given[:1] == (-1,):  # the batch is left open
            if self.batch is None:
                raise ShapeError(f"{info.name}: an open batch needs its maximum, --batch-max")
            given = (self.batch, *given[1:])
        if not tensor.HasField("shape"):
            if given is None:
                raise ShapeError(f"{info.name}: the shape is unknown; give it with --input {info.name}=1x3x224x224")
            return tuple(int(d) for d in given)
        dims = tensor.shape.dim
        if given is not None and (len(given) != len(dims) or any(
                d.HasField("dim_value") and g not in (-1, d.dim_value) for d, g in zip(dims, given))):
            raise ShapeError(f"{info.name}: the shape {list(given)} does not fit {shape_text(dims)}")
        shape = []
        for i, d in enumerate(dims):
            if given is not None and given[i] != -1:  # -1 leaves a dimension open
                shape.append(int(given[i]))
            elif d.HasField("dim_value") and d.dim_value >= 0:
                shape.append(d.dim_value)
            elif d.dim_param in self.shapes:
                shape.append(int(np.asarray(self.shapes[d.dim_param]).reshape(())))
            elif i == 0 and self.batch is not None:
                shape.append(self.batch)
            else:
                example = "x".join(str(e.dim_value) if e.HasField("dim_value") else "1" for e in dims)
                raise ShapeError(f"{info.name}: dimension {i} ({d.dim_param or '?'}) of {shape_text(dims)} is unknown; "
                                 f"give the shape, such as --input {info.name}={example}"
                                 + (f", or this dimension wherever it occurs, --input {d.dim_param}=1" if d.dim_param
                                    else "")
                                 + (", or the largest batch with --batch-max" if i == 0 else ""))
        return tuple(shape)

    def inputs_behind(self, node: Node) -> tuple[str, ...]:
        """The graph inputs that `node` is computed from."""
        return tuple(n.name for n in topological([node]) if n.op == "input")

    # --------------------------------------------------------------------------------- graphs

    def graph(self, graph: GraphProto, env: Env) -> list[Value]:
        """The outputs of `graph`, whose inputs are in the scope of `env` already."""
        scope = env.scope
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise InvalidModelError(f"subgraphs are nested more than {MAX_DEPTH} deep")
        for t in graph.initializer:
            if t.name not in scope.maps[0]:
                scope[t.name] = self.initializer(t)
        for t in graph.sparse_initializer:
            scope[t.values.name] = constant(sparse_array(t, self.folder), name=t.values.name, origin=t.values.name)
        for node in graph.node:
            self.node(node, env)
        self.depth -= 1
        return [self.lookup(o.name, scope, "the output of the graph") or UNKNOWN for o in graph.output]

    def initializer(self, tensor: onnx.TensorProto) -> Value:
        if tensor.data_type in NIBBLES:
            node = constant(nibble_array(tensor, self.folder), name=tensor.name, origin=tensor.name)
            self.nibbles.add(node)
            return node
        if tensor.data_type not in DTYPES:
            self.problems.append((tensor.name, f"element type {elem_name(tensor.data_type)} is not supported", ""))
            return UNKNOWN
        value = tensor_array(tensor, self.folder)
        # One NaN alone may be meant (a marker that Where selects); among weights it is damage.
        if value.dtype.kind == "f" and value.size > 1 and np.isnan(value).any():
            count = np.count_nonzero(np.isnan(value))
            raise InvalidModelError(f"{tensor.name}: {count} of {value.size} weights are NaN; "
                                    "train or export the model again")
        return constant(value, name=tensor.name, origin=tensor.name)

    def lookup(self, name: str, scope: Scope, user: str) -> Value | None:
        """The tensor `name`, None for an optional input that a function was not given."""
        try:
            return scope[name]
        except KeyError:
            raise InvalidModelError(f"{user}: tensor {name!r} is produced by nothing before it") from None

    def node(self, node: NodeProto, env: Env) -> None:
        """Adds the outputs of `node` to the scope of `env`."""
        scope = env.scope
        self.step()
        domain = normal_domain(node.domain)
        outputs = list(node.output)
        origin = node.name or f"{node.op_type}:{next((o for o in outputs if o), '')}"
        inputs = [self.lookup(i, scope, origin) if i else None for i in node.input]
        results: Sequence[Value | None] = [UNKNOWN] * len(outputs)
        try:
            results = self.results(node, env, domain, origin, inputs)
        except Unsupported as e:
            self.problems.append((origin, e.reason, e.hint))
            self.to_fix.update(dict.fromkeys(e.inputs))
        except SkiveError as e:
            if isinstance(e, UnsupportedOpError) or getattr(e, "located", False):
                raise
            raise located(e, origin, node.op_type) from None
        except Exception as e:  # a damaged model may break any row anywhere
            raise located(InvalidModelError(f"{type(e).__name__}: {first_line(e)}"), origin, node.op_type) from e
        for name, value in zip(outputs, [*results, *[None] * len(outputs)]):
            if name:
                scope[name] = UNKNOWN if value is None else value

    def results(self, node: NodeProto, env: Env, domain: str, origin: str,
                inputs: list[Value | None]) -> Sequence[Value | None]:
        """The values of the outputs of `node`, by a function of the model, a row, or ONNX's own function."""
        unknown = any(isinstance(i, UnknownValue) for i in inputs)
        if node.op_type != "DequantizeLinear" and any(i in self.nibbles for i in inputs if isinstance(i, Node)):
            raise Unsupported("4-bit integers are read as constants of DequantizeLinear only")
        attrs = {a.name: env.refs.get(a.ref_attr_name) if a.ref_attr_name else a for a in node.attribute}
        bound = {k: a for k, a in attrs.items() if a is not None}
        own = self.functions.get((domain, node.op_type))
        if own is not None:
            return [UNKNOWN] * len(node.output) if unknown else self.function(own, inputs, bound)
        row = ROWS.get((domain, node.op_type))
        if domain not in env.opsets:
            raise InvalidModelError(f"no opset is imported for the domain {domain!r}")
        opset = env.opsets[domain]
        if unknown:
            if row is None and not has_function(node.op_type, domain, opset):
                raise not_supported(node.op_type, domain, opset)
            return [UNKNOWN] * len(node.output)
        reason = not_supported(node.op_type, domain, opset)
        if row is not None:
            check_attribute_kinds(bound, node.op_type, domain, opset)
            values = {k: self.attribute(a) for k, a in bound.items()}
            call = Call(node.op_type, node.name, origin, opset, values, inputs, list(node.output), self, env)
            try:
                got = row(call)
                if isinstance(got, Node | SequenceValue | OptionalValue | UnknownValue):
                    got = [got]
                return call.named(got)
            except Decline as e:
                reason = Unsupported(str(e))
        body = schema_function(node, bound, domain, opset, inputs)
        if body is None:
            raise reason
        return self.function(body, inputs, bound)

    def attribute(self, a: AttributeProto) -> Any:
        """The Python value of an attribute: strings decoded, tensors as arrays."""
        if a.type == AttributeProto.TENSOR:
            if a.t.data_type not in DTYPES:
                raise Unsupported(f"attribute {a.name} has the element type {elem_name(a.t.data_type)}")
            return tensor_array(a.t, self.folder)
        value = onnx.helper.get_attribute_value(a)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if a.type == AttributeProto.STRINGS:
            return [v.decode("utf-8", "replace") for v in value]
        return list(value) if a.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value

    def function(self, function: FunctionProto, inputs: Sequence[Value | None],
                 attrs: Mapping[str, AttributeProto]) -> list[Value | None]:
        """The outputs of a function body called with `inputs`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise InvalidModelError(f"functions are nested more than {MAX_DEPTH} deep")
        given = dict(zip(function.input, inputs))
        scope: Scope = ChainMap({name: given.get(name) for name in function.input})
        env = Env(scope, {a.name: a for a in function.attribute_proto} | dict(attrs),
                  {"": self.opsets.get("", onnx.defs.onnx_opset_version())}
                  | {normal_domain(o.domain): o.version for o in function.opset_import})
        for inner in function.node:
            self.node(inner, env)
        self.depth -= 1
        return [scope.get(o) for o in function.output]


def located(error: SkiveError, origin: str, op_type: str) -> SkiveError:
    """`error` with the name of the ONNX node in front; marked, so that outer nodes leave it alone."""
    result = type(error)(f"{origin} ({op_type}): {error}")
    result.located = True  # type: ignore[attr-defined]
    return result


def not_supported(op_type: str, domain: str, opset: int) -> Unsupported:
    hint = "give the model as it was before onnxruntime optimised it" if domain == "com.microsoft" else ""
    return Unsupported(f"operator {domain + '.' if domain else ''}{op_type} (opset {opset}) is not supported", hint)


def schema_function(node: NodeProto, attrs: Mapping[str, AttributeProto], domain: str, opset: int,
                    inputs: Sequence[Value | None]) -> FunctionProto | None:
    """The function body that the ONNX specification gives for `node`, None if it has none."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    body = None
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset] or schema.function_opset_versions
        body = schema.get_function_with_opset_version(max(versions))
    elif schema.has_context_dependent_function:
        bound = NodeProto()
        bound.CopyFrom(node)
        del bound.attribute[:]
        for name, a in attrs.items():
            bound.attribute.add().CopyFrom(a)
            bound.attribute[-1].name = name
            bound.attribute[-1].ref_attr_name = ""
        types = [type_proto(i).SerializeToString() for i in inputs]
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        if versions:
            body = schema.get_context_dependent_function_with_opset_version(
                max(versions), bound.SerializeToString(), types)
    if not body:
        return None
    body = FunctionProto.FromString(body) if isinstance(body, bytes) else body
    present = {a.name for a in body.attribute_proto}
    for name, a in schema.attributes.items():
        if name not in present and a.default_value.name:
            body.attribute_proto.add().CopyFrom(a.default_value)
    return body


def check_attribute_kinds(attrs: Mapping[str, AttributeProto], op_type: str, domain: str, opset: int) -> None:
    """InvalidModelError if an attribute is a string where the specification says integer, and the like."""
    try:
        known = onnx.defs.get_schema(op_type, opset, domain).attributes
    except onnx.defs.SchemaError:
        return
    for name, a in attrs.items():
        if name in known and a.type != int(known[name].type.value):
            kind = AttributeProto.AttributeType.Name(a.type).lower()
            raise InvalidModelError(f"attribute {name} is of the kind {kind}, not {known[name].type.name.lower()}")


def has_function(op_type: str, domain: str, opset: int) -> bool:
    """Whether the ONNX specification defines the operator by a function body."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return False
    return schema.has_function or schema.has_context_dependent_function


def type_proto(value: Value | None) -> TypeProto:
    """The ONNX type of a value, as far as function bodies need it."""
    if not isinstance(value, Node):
        return TypeProto()
    return onnx.helper.make_tensor_type_proto(ELEM_TYPES[value.dtype], value.shape)


def shape_text(dims: Any) -> str:
    return "[" + ", ".join(str(d.dim_value) if d.HasField("dim_value") else str(d.dim_param or "?") for d in dims) + "]"


def import_model(model: str | Path | ModelProto | Loaded, *, fixed_inputs: Mapping[str, Any] = {},  # noqa: B006
                 input_shapes: Mapping[str, tuple[int, ...]] = {}) -> Imported:  # noqa: B006
    """The model as `import_onnx` gives it, and how the outputs of the model lie in the graph's."""
    proto, folder, _ = load_model(model)
    return Importer(proto, folder, fixed_inputs, input_shapes).run()


def import_onnx(model: str | Path | ModelProto | Loaded, *, fixed_inputs: Mapping[str, np.ndarray] = {},  # noqa: B006
                input_shapes: Mapping[str, tuple[int, ...]] = {}, batch_max: int | None = None) -> Graph:  # noqa: B006
    """The IR graph of an ONNX model: static shapes, constants folded, images channels-last inside.

    `fixed_inputs` turns graph inputs into constants; `input_shapes` gives the shape of inputs (by
    name) or the value of symbolic dimensions (by theirs). With `batch_max` the unknown first
    dimensions are the batch: the graph describes one sample, and it is proved that samples do not
    mix. Raises InvalidModelError for a damaged model, ShapeError for an unknown or impossible shape
    or a model that mixes samples, UnsupportedOpError with all problems of the model at once.
    """
    proto, folder, _ = load_model(model)
    if batch_max is None:
        return Importer(proto, folder, fixed_inputs, input_shapes).run().graph
    if batch_max < 1:
        raise ShapeError(f"a batch of at most {batch_max} samples")
    one = Importer(proto, folder, fixed_inputs, input_shapes, batch=1).run().graph
    try:
        two = Importer(proto, folder, fixed_inputs, input_shapes, batch=2).run().graph
    except ShapeError as e:
        raise ShapeError(f"{e}: the model does not take a batch of 2; compile for a fixed batch") from None
    check_separable(one, two)
    return replace(one, batch_max=batch_max)
