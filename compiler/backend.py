"""`skive.backend`: skive as an `onnx.backend.base.Backend`, so that ONNX's own tests run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto
from onnx.backend.base import Backend, BackendRep, namedtupledict

from skive.errors import ShapeError, UnsupportedOpError
from skive.frontend.onnx.importer import Imported, import_model
from skive.ir import Graph
from skive.reference import evaluate_graph

# What runs an imported graph: tensors by input name in, the graph's outputs in order out.
Executor: TypeAlias = Callable[[dict[str, np.ndarray]], "list[np.ndarray]"]
# How a graph becomes something that runs.
Engine: TypeAlias = Callable[[Graph], Executor]


def reference_engine(graph: Graph) -> Executor:
    """Runs `graph` with the numpy references of the op table."""
    return lambda inputs: evaluate_graph(graph, inputs)


def compiled_engine(graph: Graph) -> Executor:
    """Compiles `graph` for this machine."""
    from skive.api import compile

    if not graph.inputs:  # every input was fixed: what remains are constants
        return lambda inputs: evaluate_graph(graph, inputs)
    module = compile(graph, verify=False)

    def execute(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = module(*(inputs[n.name] for n in graph.inputs))
        return list(results) if isinstance(results, tuple) else [results]

    return execute


class SkiveRep(BackendRep):
    """A model ready to run.

    ONNX lets values decide shapes (the shape given to a Reshape may be an input) and skive compiles
    static shapes only: those inputs, and the shapes of the others, are fixed to what the first call
    gives, and the model is compiled again when a later call changes them. Data is never fixed: an
    operator whose result has a shape that depends on data is refused.
    """

    def __init__(self, model: ModelProto, engine: Engine):
        self.model, self.engine = model, engine
        constants = {t.name for t in model.graph.initializer}
        self.names = [i.name for i in model.graph.input if i.name not in constants]
        self.fixed: set[str] = set()
        self.compiled: dict[Any, tuple[Imported, Executor]] = {}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs for `inputs`, one value per graph input, in order or by name.

        Raises UnsupportedOpError with all problems if the model cannot be compiled even with every
        input fixed that decides a shape.
        """
        values = dict(inputs) if isinstance(inputs, dict) else dict(zip(self.names, inputs))
        missing = [n for n in self.names if n not in values]
        if missing:
            raise ShapeError(f"input {missing[0]!r} is missing")
        while True:
            try:
                imported, execute = self.specialised(values)
                break
            except UnsupportedOpError as e:
                new = set(e.fixable) - self.fixed
                if not new:
                    raise
                self.fixed |= new
        tensors = dict(leaf for n, v in values.items() for leaf in tensors_of(n, v))
        flat = execute({n: tensors[n] for n in imported.graph_inputs})
        results = imported.structured(flat)
        return namedtupledict("Outputs", list(imported.output_names))(*results)

    def specialised(self, values: dict[str, Any]) -> tuple[Imported, Executor]:
        """The compiled model for these values of the fixed inputs and shapes of the others."""
        fixed = {n: v for n, v in values.items() if n in self.fixed}
        shapes = {n: shapes_of(v) for n, v in values.items() if n not in self.fixed}
        key = (repr(shapes), tuple((n, frozen(v)) for n, v in fixed.items()))
        if key not in self.compiled:
            imported = import_model(self.model, fixed_inputs=fixed, input_shapes=shapes)
            self.compiled[key] = imported, self.engine(imported.graph)
        return self.compiled[key]


def shapes_of(value: Any) -> Any:
    """The shape of a tensor, a list of such for a sequence, None for an optional that is absent."""
    if isinstance(value, (list, tuple)):
        return [shapes_of(v) for v in value]
    return None if value is None else np.shape(value)


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of an input by the names that the importer gives them."""
    if isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from tensors_of(f"{name}[{i}]", v)
    elif value is not None:
        yield name, np.asarray(value)


def frozen(value: Any) -> Any:
    """A hashable stand-in for a tensor, a sequence of them or None."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    if value is None:
        return None
    array = np.asarray(value)
    return array.dtype.str, array.shape, array.tobytes()


class SkiveBackend(Backend):
    """The Backend interface of ONNX; every model runs on the CPU."""

    engine: Engine = staticmethod(compiled_engine)

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> SkiveRep:
        return SkiveRep(model, cls.engine)

    @classmethod
    def run_model(cls, model: ModelProto, inputs: Sequence[Any], device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        return cls.prepare(model, device).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.split(":")[0] == "CPU"


prepare = SkiveBackend.prepare
run_model = SkiveBackend.run_model
supports_device = SkiveBackend.supports_device
