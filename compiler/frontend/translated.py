"""What PyTorch's translation to ONNX is given afterwards: names of ports and nodes, PyTorch's rules of resizing."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from skive.errors import UnsupportedOpError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch.export import ExportedProgram

OWN = "skive"


def output_names(program: ExportedProgram) -> list[str]:
    """One name per output tensor: the path in the structure that `forward` returns; None is skipped."""
    from torch.utils import _pytree as pytree

    spec = program.call_spec.out_spec
    leaves = list(range(spec.num_leaves))
    tree = pytree.tree_unflatten(leaves, spec)
    for known in (tree, dict(tree) if isinstance(tree, dict) else leaves, leaves):
        try:
            paths = sorted(pytree.tree_flatten_with_path(known)[0], key=lambda part: part[1])  # in the program's order
            break
        except ValueError:  # a class of which PyTorch knows the parts, but not their names
            continue
    taken = {str(i) for i in program.graph_signature.user_inputs}
    names, problems = [], []
    results = [o.arg for o in program.graph_signature.output_specs if o.kind.name == "USER_OUTPUT"]
    for (path, _), result in zip(paths, results, strict=True):
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        name = ".".join(parts)
        if not name or name[0].isdigit():
            name = "_".join(["output", *filter(None, [name])])
        while name in taken:
            name += "_out"
        taken.add(name)
        if getattr(result, "value", result) is None:
            continue
        if type(result).__name__ != "TensorArgument":
            problems.append((name, f"forward returns {getattr(result, 'value', result)!r}, which is not a tensor",
                             "return tensors or None"))
        names.append(name)
    if problems:
        raise UnsupportedOpError(problems)
    return names


def name_ports(model: onnx.ModelProto, inputs: set[str], outputs: Sequence[str]) -> None:
    """Gives inputs and outputs their names; values inside that have one of these get another.

    The translation names values inside after operators, as users do outputs (`mul`, `val_0`), and calls an
    input that is also an output, or that it has a value of the same name for, `x_orig`.
    """
    graph = model.graph
    wanted = {o.name: name for o, name in zip(graph.output, outputs, strict=True)}
    given = {i.name for i in graph.input}
    for formal in graph.input:
        name = formal.name.removesuffix("_orig")
        if formal.name not in inputs and name in inputs - given:
            wanted[formal.name] = name
    _rename(graph, {**_others(graph, wanted.values(), set(wanted)), **wanted})


def tidied(model: ir.Model) -> None:
    """Writes functions out, computes what is constant and gives every output a value of its own, in place.

    Not by `onnxscript.optimizer.optimize`: its rules compare numbers roughly and take `x + 1e-8` and `x * 0.999995`
    for `x`.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    graph = model.graph
    taken = {*graph.inputs, *graph.initializers.values()}
    for i, value in enumerate(graph.outputs):
        if value in taken:
            graph.append(node := ir.Node("", "Identity", [value]))
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.outputs[i] = value = node.outputs[0]
        value.name = f"{OWN}.output.{i}"
        taken.add(value)


def set_aside(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Gives values inside that have one of `names`, which no port has, another one."""
    _rename(model.graph, _others(model.graph, names, set()))


def _others(graph: onnx.GraphProto, names: Iterable[str], ports: set[str]) -> dict[str, str]:
    """New names for the values of `names` that are there and none of `ports`."""
    used = {v for g in _graphs(graph) for v in _values(g)}
    fresh = (f"{OWN}.value.{i}" for i in itertools.count())
    return {name: next(f for f in fresh if f not in used) for name in names if name in used - ports}


def _rename(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    for part in _graphs(graph):
        for port in (*part.input, *part.output, *part.initializer, *part.value_info):
            port.name = renamed.get(port.name, port.name)
        for node in part.node:
            for operands in (node.input, node.output):
                for i, name in enumerate(operands):
                    operands[i] = renamed.get(name, name)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for inner in (*([a.g] if a.HasField("g") else []), *a.graphs):
                yield from _graphs(inner)


def _values(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of everything that `graph` itself defines."""
    yield from (i.name for i in (*graph.input, *graph.initializer))
    yield from (o for n in graph.node for o in n.output)


def resize_as_torch(graph: onnx.GraphProto) -> None:
    """Marks every Resize as PyTorch's, whose rules for the places of pixels differ in details from those of ONNX."""
    for node in (n for g in _graphs(graph) for n in g.node if n.op_type == "Resize" and not n.domain):
        for a in node.attribute:
            if a.name == "coordinate_transformation_mode" and a.s in (b"asymmetric", b"half_pixel", b"align_corners"):
                a.s = b"torch_" + a.s


def name_nodes(model: onnx.ModelProto) -> None:
    """Calls each node by the path of its torch module and its operator, `layer1.0.conv1/Conv`."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        try:
            modules = [s for s in ast.literal_eval(scopes)[:-1] if isinstance(s, str) and s]
        except (ValueError, SyntaxError):
            modules = []
        name = f"{modules[-1]}/{node.op_type}" if modules else node.op_type
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name] - 1}"
