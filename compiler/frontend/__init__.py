"""Where models come in: one `Source` for every kind of model that skive reads."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skive.errors import InvalidModelError, ShapeError
from skive.ir import Graph

log = logging.getLogger("skive.frontend")


@dataclass(frozen=True)
class Source:
    """A model that was opened but not imported yet.

    `sha256` covers everything the model consists of ("" if it cannot be hashed); `request` is what
    besides it decides the graph (shapes, fixed inputs); `oracle(inputs)` gives the outputs that
    another engine, called `engine`, computes; None where there is none.
    """

    name: str
    path: str | None
    sha256: str
    request: str
    graph: Callable[[], Graph]
    oracle: Callable[[Sequence[np.ndarray]], list[np.ndarray] | None] = lambda inputs: None
    engine: str = "onnxruntime"


def open_model(
    model: Any,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    fixed_inputs: Mapping[str, np.ndarray] | None = None,
    batch_max: int | None = None,
) -> Source:
    """The Source of a path, `onnx.ModelProto`, `torch.nn.Module`, `ExportedProgram` or `Graph`.

    InvalidModelError if `model` is none of these or the file cannot be read.
    """
    shapes = {k: tuple(v) for k, v in (input_shapes or {}).items()}
    fixed = dict(fixed_inputs or {})
    request = json.dumps(
        [
            sorted((k, list(v)) for k, v in shapes.items()),
            batch_max,
            _shapes_of(example_inputs),
            sorted((k, hashlib.sha256(np.ascontiguousarray(v).data).hexdigest()) for k, v in fixed.items()),
        ]
    )
    if isinstance(model, Graph):
        return Source(model.name, None, "", request, lambda: model)
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.suffix == ".skive" or path.suffix == ".txt":
            from skive.text import load_text

            written = load_text(path)
            own = {n.name: (-1, *n.shape[1:]) if written.batch_max else n.shape for n in written.inputs}
            if fixed or any(own.get(name) != shape for name, shape in shapes.items()):
                raise InvalidModelError(f"{path}: skive's text form has its shapes and constants; edit the file")
            return Source(path.stem, str(path), "", request, lambda: written)
        if path.suffix == ".pt2":
            from skive.frontend import torch as torch_frontend

            return torch_frontend.open_exported(
                path, example_inputs, request=request, batch_max=batch_max, shapes=shapes, fixed=fixed
            )
        if ":" in path.name and not path.exists():
            from skive.frontend import torch as torch_frontend

            return torch_frontend.open_callable(
                str(model), example_inputs, request=request, batch_max=batch_max, shapes=shapes, fixed=fixed
            )
        return _open_onnx(path, path.stem, str(path), shapes, fixed, example_inputs, batch_max, request)
    torch = sys.modules.get("torch")
    if torch is not None and (
        isinstance(model, torch.nn.Module) or type(model).__name__ == "ExportedProgram"
    ):
        from skive.frontend import torch as torch_frontend

        return torch_frontend.open_module(
            model, example_inputs, request=request, batch_max=batch_max, shapes=shapes, fixed=fixed
        )
    if type(model).__name__ == "ModelProto":
        return _open_onnx(
            model, model.graph.name or "model", None, shapes, fixed, example_inputs, batch_max, request
        )
    raise InvalidModelError(
        f"{type(model).__name__} is not a model; give an .onnx or .pt2 file, an onnx.ModelProto, "
        "a torch.nn.Module or an ExportedProgram"
    )


def _shapes_of(example: tuple[Any, ...] | Mapping[str, Any] | None) -> Any:
    if example is None:
        return None
    if not isinstance(example, (Mapping, tuple, list)):
        raise InvalidModelError(f"example_inputs is {type(example).__name__}; give a tuple of arrays or a dict")
    items = example.items() if isinstance(example, Mapping) else enumerate(example)
    return [[str(k), list(np.shape(v)), str(getattr(v, "dtype", type(v).__name__))] for k, v in items]


def _open_onnx(
    model: Any,
    name: str,
    path: str | None,
    shapes: dict[str, tuple[int, ...]],
    fixed: dict[str, np.ndarray],
    example: tuple[Any, ...] | Mapping[str, Any] | None,
    batch_max: int | None,
    request: str,
) -> Source:
    from skive.frontend.onnx import import_onnx, model_sha256
    from skive.frontend.onnx.load import load_model
    from skive.frontend.onnx.widen import widened

    as_given = load_model(model)
    loaded = widened(as_given)
    proto = loaded.proto
    own, ports = ([*p.graph.input, *p.graph.output] for p in (as_given.proto, proto))
    if changed := [a.name for a, b in zip(own, ports, strict=True) if a != b]:
        log.warning("%s: 16-bit floats are computed in float32, so these inputs and outputs are float32: %s", name,
                    ", ".join(changed))
    if example is not None:
        names = [i.name for i in proto.graph.input if i.name not in {t.name for t in proto.graph.initializer}]
        if not isinstance(example, Mapping) and len(example) > len(names):
            raise ShapeError(f"{len(example)} example_inputs are given; the inputs of the model are {', '.join(names)}")
        given = dict(example) if isinstance(example, Mapping) else dict(zip(names, example, strict=False))
        shapes = {**{k: tuple(np.shape(v)) for k, v in given.items()}, **shapes}

    def oracle(inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        if fixed or (path is None or loaded is not as_given) and proto.ByteSize() > 1 << 30:
            return None
        try:
            import onnxruntime as ort
        except ImportError:
            return None
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        # It would round activations to 8 bits where weights have 4: in float32, if at all, it is an oracle.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if any(
            a.name == "accuracy_level" and a.i > 1
            for n in proto.graph.node
            if n.op_type == "MatMulNBits"
            for a in n.attribute
        ):
            return None
        try:
            session = ort.InferenceSession(
                (loaded is as_given and path) or proto.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
            names = [i.name for i in session.get_inputs()]
            return [np.asarray(v) for v in session.run(None, dict(zip(names, inputs, strict=True)))]
        except Exception:  # noqa: BLE001 - an engine that cannot run the model is no oracle for it
            return None

    return Source(
        name,
        path,
        model_sha256(as_given),
        request,
        lambda: import_onnx(loaded, fixed_inputs=fixed, input_shapes=shapes, batch_max=batch_max),
        oracle,
    )
