"""The PyTorch front end: `torch.export`, then PyTorch's own translation to ONNX, then the ONNX importer.

One table of operators serves both kinds of model. The way through ONNX keeps whole what export
alone would take apart (an LSTM stays one node), and follows PyTorch's operators as they grow. The
older tracing exporter is never used: it records one path through `forward` and drops the branches
that the example inputs did not take, without a word. A `forward` that decides on the values of tensors
is exported by `skive.frontend.control`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive.errors import ExitError, InvalidModelError, ShapeError, SkiveError, UnsupportedOpError, first_line
from skive.frontend import Source
from skive.frontend.archive import refuse_code
from skive.ir import Graph

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
OWN_DOMAIN = "skive"
OPSET = 20  # of the ONNX model in between: the newest that PyTorch 2.9 translates to without conversion
REFUSED_TYPES = ("float16", "bfloat16", "float64", "complex64", "complex128")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise SkiveError("this model needs PyTorch; install it with pip install 'skive-compiler[torch]'") from None
    return torch


def open_module(model: Any, example_inputs: Any, *, request: str, batch_max: int | None,
                shapes: Mapping[str, tuple[int, ...]] = {}, fixed: Mapping[str, np.ndarray] = {}) -> Source:  # noqa: B006
    """The Source of a `torch.nn.Module` in evaluation mode, or of an `ExportedProgram`.

    `example_inputs` (a tuple, or a dict by the names of `forward`) fixes shapes and element types; `shapes` those of
    symbolic dimensions of a program. Inputs named in `fixed` become constants.
    InvalidModelError if the module is in training mode, is a TorchScript module, has weights of
    another type than float32, or if `forward` fails; UnsupportedOpError if it branches on values.
    """
    torch = _torch()
    if isinstance(model, torch.export.ExportedProgram):
        args, kwargs = model.example_inputs or ((), {})
        return _source(model, "model", None, request, batch_max, lambda: _runner(model, args, kwargs),
                       {**_shapes(model, example_inputs), **shapes}, fixed)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModelError(f"{name} is a TorchScript module; give the torch.nn.Module it was made from")
    from skive.frontend import modules

    model = modules.prepared(model)
    name = type(model).__name__
    for path, weight in model.named_parameters():
        _check_type(f"parameter {path}", weight)
    if example_inputs is None:
        raise InvalidModelError(f"{name}: example_inputs is missing; give a tuple of tensors, "
                                "or a dict by the names of forward's parameters")
    if shapes:
        raise InvalidModelError(f"{name}: input_shapes is for files and programs; the shapes of example_inputs hold")
    args, kwargs = _arguments(model, example_inputs)
    try:
        program = modules.exported(model, args, kwargs, lambda: _export(model, args, kwargs, batch_max))
    except _Undecided:
        program = modules.exported(model, args, kwargs, lambda: _with_decisions(model, args, kwargs, batch_max))
        source = _source(program, name, None, request, None, lambda: _eager(model, args, kwargs, numbers=True),
                         {}, fixed)
        return source if batch_max is None else replace(source, graph=lambda: _per_sample(source.graph(), batch_max))
    return _source(program, name, None, request, batch_max, lambda: _eager(model, args, kwargs), {}, fixed)


def open_exported(path: Path, example_inputs: Any, *, request: str, batch_max: int | None,
                  shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, np.ndarray]) -> Source:
    """The Source of a `.pt2` file; InvalidModelError if it is damaged or carries anything executable."""
    torch = _torch()
    refuse_code(path)
    import skive.frontend.exit_point  # noqa: F401 - registers its operator

    with _quiet():
        try:
            program = torch.export.load(path)
        except Exception as e:  # noqa: BLE001 - torch raises what it likes for a damaged archive
            raise InvalidModelError(f"{path}: this PyTorch cannot read the program: {first_line(e)}") from None
    args, kwargs = program.example_inputs or ((), {})
    return _source(program, path.stem, str(path), request, batch_max, lambda: _runner(program, args, kwargs),
                   {**_shapes(program, example_inputs), **shapes}, fixed)


def open_callable(spec: str, example_inputs: Any, *, request: str, batch_max: int | None,
                  shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, np.ndarray]) -> Source:
    """The Source of the module that `package.module:callable` returns.

    Without `example_inputs`, float32 inputs of the given `shapes` (by the names of `forward`).
    """
    torch = _torch()
    where, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:  # what `python -m` does
        sys.path.insert(0, str(Path.cwd()))
    if where.endswith(".py") or "/" in where:
        raise InvalidModelError(f"{spec}: give package.module:callable, such as {Path(where).stem}:{attribute}, in "
                                "the folder of the package")
    try:
        target: Any = importlib.import_module(where)
        for part in attribute.split("."):
            target = getattr(target, part)
        model: Any = target if isinstance(target, torch.nn.Module) else target()
    except (Exception, SystemExit) as e:  # the user's code
        raise InvalidModelError(f"{spec}: {type(e).__name__}: {first_line(e)}") from None
    if not isinstance(model, torch.nn.Module):
        raise InvalidModelError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module")
    if example_inputs is None and not shapes:
        names = list(inspect.signature(model.forward).parameters)
        raise InvalidModelError(f"{spec}: the shapes of the inputs ({', '.join(names)}) are missing; give "
                                f"--input {names[0] if names else 'NAME'}=1x3x224x224 for float32 ones, or --example "
                                "FILE.npz")
    if example_inputs is None:
        generator = torch.Generator().manual_seed(0)
        example_inputs = {k: torch.randn([abs(d) for d in v], generator=generator) for k, v in shapes.items()}
        shapes = {}
    source = open_module(model, example_inputs, request=request, batch_max=batch_max, shapes=shapes, fixed=fixed)
    return replace(source, name=attribute.rpartition(".")[2])


# ------------------------------------------------------------------------------------------- inputs


def _arguments(model: Any, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as the arguments of `forward`: tensors on the CPU, of element types skive has."""
    torch = _torch()
    from torch.utils import _pytree as pytree

    def tensors(name: str, value: Any) -> Any:  # in lists and dicts, too
        return pytree.tree_map(lambda v: tensor(name, v), value)

    def tensor(name: str, value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            value = torch.from_numpy(np.array(value))
        if isinstance(value, torch.Tensor):
            _check_type(name, value)
            return value.detach().cpu()
        return value

    if isinstance(example, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**example)
        except TypeError as e:
            raise InvalidModelError(f"{type(model).__name__}: example_inputs: {e}") from None
        args = tuple(tensors(f"input {i}", v) for i, v in enumerate(bound.args))
        return args, {k: tensors(f"input {k}", v) for k, v in bound.kwargs.items()}
    if not isinstance(example, (tuple, list)):
        raise InvalidModelError(f"example_inputs is {type(example).__name__}; give a tuple of tensors or a dict")
    try:
        inspect.signature(model.forward).bind(*example)
    except TypeError as e:
        raise InvalidModelError(f"{type(model).__name__}: example_inputs: {e}") from None
    return tuple(tensors(f"input {i}", v) for i, v in enumerate(example)), {}


def _check_type(name: str, value: Any) -> None:
    kind = str(value.dtype).removeprefix("torch.")
    if kind in REFUSED_TYPES:
        raise InvalidModelError(f"{name} is {kind}; convert the model and its inputs with .float()")


def _shapes(program: ExportedProgram, example: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by input name that `example_inputs` gives to a program with symbolic dimensions."""
    names = list(program.graph_signature.user_inputs)
    given = example if isinstance(example, Mapping) else dict(zip(names, example or (), strict=False))
    return {str(k): tuple(v.shape) for k, v in given.items() if hasattr(v, "shape")}


def _eager(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: bool = False) -> Run:
    """`model` as a function of arrays, which take the places of the tensors among the arguments.

    `numbers`: those that it returns are results too."""
    torch = _torch()
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten((args, kwargs))

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        values = iter(inputs)
        filled = [torch.from_numpy(np.array(next(values))) if isinstance(v, torch.Tensor) else v for v in leaves]
        new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
        with torch.no_grad():
            result = model(*new_args, **new_kwargs)
        if numbers:
            from skive.frontend.control.trace import results

            result = results(result)
        return [v.detach().cpu().numpy() for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]

    return run


def _runner(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    return _eager(program.module(check_guards=False), args, kwargs)


# ------------------------------------------------------------------------------------------- export


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings, log lines and graph listings of export; what matters is raised."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [g.level for g in loggers]
    for g in loggers:
        g.setLevel(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with (warnings.catch_warnings(), contextlib.redirect_stdout(nowhere),
              contextlib.redirect_stderr(nowhere)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for g, level in zip(loggers, levels, strict=True):
            g.setLevel(level)


def _export(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch_max: int | None) -> ExportedProgram:
    """`torch.export` of a module, with a symbolic dimension 0 of every input if `batch_max` is given."""
    torch = _torch()
    dynamic = None
    if batch_max is not None:
        from torch.utils import _pytree as pytree

        batch = torch.export.Dim("batch", max=max(2, batch_max))

        def twice(v: Any) -> Any:  # export takes a dimension of size 1 for a constant
            return torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == 1 else v

        args, kwargs = pytree.tree_map(twice, (args, kwargs))
        bound = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        dynamic = pytree.tree_map(lambda v: {0: batch} if isinstance(v, torch.Tensor) and v.dim() else None, bound)
    with _quiet():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as e:  # noqa: BLE001 - whatever forward and torch.export raise
            raise _export_error(e, type(model).__name__) from None


class _Undecided(UnsupportedOpError):
    """`forward` decides on the values of a tensor."""


def _with_decisions(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch_max: int | None
) -> ExportedProgram:
    """The program of a module that decides on the values of tensors, for one sample where there may be several."""
    from torch.utils import _pytree as pytree

    from skive.frontend.control.trace import export

    if batch_max is not None:  # every sample decides for itself
        args, kwargs = pytree.tree_map(lambda v: v[:1] if hasattr(v, "shape") and v.dim() else v, (args, kwargs))
    with _quiet():
        return export(model, args, kwargs)


def _per_sample(graph: Graph, batch_max: int) -> Graph:
    """The graph of one sample as that of each sample of a batch; ShapeError unless all ports begin with 1."""
    for name, node in [*((i.name, i) for i in graph.inputs), *zip(graph.output_names, graph.outputs, strict=True)]:
        if not node.shape or node.shape[0] != 1:
            raise ShapeError(f"{name!r} has shape {list(node.shape)} for one sample, so a batch of it has no meaning; "
                             "let it begin with 1, or compile without batch_max")
    return replace(graph, batch_max=batch_max)


def _export_error(error: Exception, name: str) -> SkiveError:
    """What went wrong in `forward`, at which line of the user's source."""
    not_theirs = (os.path.dirname(_torch().__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
    python = os.path.dirname(contextlib.__file__) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)
              and not (f.filename.startswith(python) and "-packages" not in f.filename)]
    where, text = name, str(error)
    if frames:
        last = frames[-1]
        where = f"{Path(last.filename).name}:{last.lineno}: {(last.line or '').strip().rstrip(':')}"
    if type(error).__name__.startswith("GuardOnDataDependent") or "data-dependent" in text or ".item()" in text \
            or "Boolean value of Tensor" in text or "cannot be converted to Scalar" in text:
        return _Undecided([(where, "forward decides on the values of a tensor",
                            "use torch.where, or compute both branches and give each as an output")])
    if "Constraints violated" in text:
        why = next((line.strip(" -") for line in text.splitlines() if "batch" in line and "violated" not in line), "")
        return InvalidModelError(f"{where}: forward takes one size of batch only ({why[:200]}); compile without "
                                 "batch_max")
    return InvalidModelError(f"{where}: {type(error).__name__}: {first_line(error)}")


# ----------------------------------------------------------------------------------------- to graph


def _source(program: ExportedProgram, name: str, path: str | None, request: str, batch_max: int | None,
            make_run: Callable[[], Run], shapes: Mapping[str, tuple[int, ...]],
            fixed: Mapping[str, np.ndarray]) -> Source:
    def graph() -> Graph:
        from skive.frontend.onnx import import_onnx

        model = to_onnx(program)
        marked = _exit_outputs(model)
        imported = import_onnx(model, input_shapes=shapes, fixed_inputs=fixed, batch_max=batch_max)
        return replace(imported, exit_points=marked)

    def oracle(inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        if fixed:
            return None
        try:
            return make_run()(inputs)
        except Exception:  # noqa: BLE001 - random inputs may be none that the model takes: an index too large
            return None

    return Source(name, path, _sha256(program), request, graph, oracle, "PyTorch")


def _sha256(program: ExportedProgram) -> str:
    """SHA-256 of the program: its code, signature, weights and constants."""
    torch = _torch()
    h = hashlib.sha256()
    for path, part in program.graph_module.named_modules():
        if hasattr(part, "code"):
            h.update(f"{path}\n{part.code}\n".encode())
    h.update(repr(program.graph_signature).encode())
    for key, value in sorted([*program.state_dict.items(), *program.constants.items()], key=lambda kv: kv[0]):
        h.update(f"{key} {type(value).__name__}".encode())
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            h.update(f"{value.dtype} {tuple(value.shape)}".encode())
            h.update(array.data)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        h.update(f"{node.name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}\n".encode())
    return h.hexdigest()


def _may_write(program: ExportedProgram) -> bool:
    """Whether some operator may write to an operand; only then is it worth finding out to which.

    Batch normalisation updates its statistics in training mode, though its schema does not say so.
    """
    for node in program.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__module__", "") == "_operator":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable:
            return True
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        if given.get("training") is True or given.get("use_input_stats") is True:
            return True
    return False


def _refuse_state(program: ExportedProgram) -> None:
    """UnsupportedOpError, with every buffer and input that `forward` writes to."""
    signature = program.graph_signature
    problems = []
    for name in signature.buffers_to_mutate.values():
        statistics = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        problems.append((name, "forward writes to this tensor", "call .eval() on the model before it is exported"
                         if statistics else "pass state in as an input and return its new value as an output"))
    problems += [(str(name), "forward writes to its input (an operation in place, such as ReLU(inplace=True))",
                  f"begin with {name} = {name}.clone(), or, if it is a state, return its new value as an output")
                 for name in signature.user_inputs_to_mutate.values()]
    if problems:
        raise UnsupportedOpError(problems)


def to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """The ONNX model of an exported program, in memory.

    Inputs have the names of `forward`'s parameters; outputs are called `output`, `output_0` ... or
    by their path in the dicts, lists and tuples that `forward` returns; a node is called by the
    path of its module and its ONNX operator.
    """
    torch = _torch()
    try:
        import onnxscript  # noqa: F401 - torch.onnx translates with it
    except ImportError:
        raise SkiveError("a PyTorch model needs onnxscript; pip install 'skive-compiler[torch]'") from None
    from skive.frontend import repairs, translated

    names = translated.output_names(program)
    if not names:
        raise InvalidModelError("forward returns no tensor; return what the compiled network is to compute")
    with _quiet():
        may_write = _may_write(program)
        program = repairs.repaired(program)
        try:
            with _constants(program):
                result = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                                           custom_translation_table=_own_operators(program))
        except torch.onnx.OnnxExporterError as e:
            if may_write:
                _refuse_state(program.run_decompositions({}))
            raise _translation_error(program, e) from None
        if may_write:
            _refuse_state(result.exported_program)  # without operations in place, which takes seconds to make
        translated.tidied(result.model)
        model = result.model_proto
    translated.name_ports(model, {str(i) for i in program.graph_signature.user_inputs}, names)
    translated.name_nodes(model)
    translated.resize_as_torch(model.graph)
    return model


@contextlib.contextmanager
def _constants(program: ExportedProgram) -> Iterator[None]:
    """Parameters are not trained meanwhile. Attention with a trained mask lays its result out in memory as its
    derivative wants it, which only some steps of the translation assume; others then fail to reshape it."""
    torch = _torch()
    trained = [node.meta["val"] for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)
               for node in part.graph.nodes
               if node.op == "placeholder" and getattr(node.meta.get("val"), "requires_grad", False)]
    for value in trained:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in trained:
            value.requires_grad_(True)


def _own_operators(program: ExportedProgram) -> dict[Any, Callable[..., Any]] | None:
    """How operators of skive are translated: to nodes of its own; None where the program has none."""
    targets = {str(n.target): n.target for n in program.graph.nodes if str(n.target).startswith("skive.")}
    if not targets:
        return None
    import onnxscript
    from onnx import defs

    parameter = defs.OpSchema.FormalParameter
    if not defs.has("ExitPoint", domain=OWN_DOMAIN):
        floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
        defs.register_schema(defs.OpSchema(
            "ExitPoint", OWN_DOMAIN, 1, inputs=[parameter("x", "T"), parameter("logits", "T")],
            outputs=[parameter("y", "T")], type_constraints=[("T", floats, "")],
            attributes=[defs.OpSchema.Attribute("name", defs.OpSchema.AttrType.STRING, "")]))
        kinds = [f"tensor({t})" for t in ("bool", "float", "int8", "int16", "int32", "int64", "uint8")]
        defs.register_schema(defs.OpSchema(
            "Choose", OWN_DOMAIN, 1, inputs=[parameter("condition", "B"), parameter("a", "T"), parameter("b", "T")],
            outputs=[parameter("y", "T")], type_constraints=[("B", ["tensor(bool)"], ""), ("T", kinds, "")]))
    own = onnxscript.values.Opset(OWN_DOMAIN, 1)

    def exit_point(x: Any, logits: Any, name: str = "") -> Any:
        return own.ExitPoint(x, logits, name=name)

    def choose(condition: Any, a: Any, b: Any) -> Any:
        return own.Choose(condition, a, b)

    known: dict[str, Callable[..., Any]] = {"skive.exit_point.default": exit_point,
                                            "skive.choose.default": choose}
    return {target: known[name] for name, target in targets.items()}


def _exit_outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """Turns every marked exit of `model` into an output; their names. ExitError if two have one name."""
    from onnx import helper

    from skive.frontend import translated

    graph = model.graph
    marks = [n for n in graph.node if n.domain == OWN_DOMAIN and n.op_type == "ExitPoint"]
    names: list[str] = []
    taken = {port.name for port in (*graph.input, *graph.output)}
    for number, mark in enumerate(marks):
        given = next((a.s.decode() for a in mark.attribute if a.name == "name"), "")
        name = given or f"exit{number}"
        if name in taken or name in names:
            raise ExitError(f"exit_point: another input or output is called {name!r}; give each exit a name of its own")
        names.append(name)
    translated.set_aside(model, names)
    renamed = {}
    for name, mark in zip(names, marks, strict=True):
        renamed[mark.output[0]] = mark.input[0]
        graph.node.append(helper.make_node("Identity", [mark.input[1]], [name], name=name))
        graph.output.append(onnx_value(name))
    for mark in marks:
        graph.node.remove(mark)
    while any(v in renamed for v in renamed.values()):  # one mark behind the other
        renamed = {k: renamed.get(v, v) for k, v in renamed.items()}
    for node in graph.node:
        for i, operand in enumerate(node.input):
            node.input[i] = renamed.get(operand, operand)
    for i, output in enumerate(graph.output):  # the whole network's result went through a mark
        if output.name in renamed:
            graph.node.append(helper.make_node("Identity", [renamed[output.name]], [output.name], name=f"out{i}"))
    return tuple(names)


def onnx_value(name: str) -> onnx.ValueInfoProto:
    """An output whose type the importer infers."""
    from onnx import ValueInfoProto

    return ValueInfoProto(name=name)


def _translation_error(program: ExportedProgram, error: Exception) -> SkiveError:
    """Every operator of the program that PyTorch cannot translate, or else the first complaint."""
    problems: dict[str, tuple[str, str, str]] = {}
    try:
        from torch.onnx._internal.exporter import _fx_passes
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        known = ONNXRegistry.from_torchlib(OPSET)
        decomposed = _fx_passes.decompose_with_registry(program, known).graph_module
        for node in _fx_passes.remove_assertion_nodes(decomposed).graph.nodes:
            target = node.target
            if node.op == "call_function" and hasattr(target, "_schema") and not known.is_registered(target) \
                    and not str(target).startswith("skive."):
                target = node.meta.get("original_aten") or target
                stack = [s for s, _ in (node.meta.get("nn_module_stack") or {}).values() if s]
                problems[str(target)] = (stack[-1] if stack else node.name, f"{target} has no ONNX equivalent",
                                         "replace it by operations of torch that have one")
    except Exception:  # noqa: BLE001 - private parts of torch, read only to say more
        problems = {}
    if problems:
        return UnsupportedOpError(list(problems.values()))
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return UnsupportedOpError([("model", f"PyTorch cannot translate it to ONNX: {first_line(cause)}", "")])
