"""Models and artefacts, opened for a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skive.errors import InvalidModelError

if TYPE_CHECKING:
    from skive.frontend import Source
    from skive.runtime import Module, TensorInfo


def open_source(model: str, **request: Any) -> Source:
    """The model, its shapes as `request` (arguments of `frontend.open_model`) says."""
    from skive import frontend

    if Path(model).is_dir():
        raise InvalidModelError(f"{model} is a folder, not a model")
    return frontend.open_model(model, **request)


def graph_ports(nodes: Sequence[Any], names: Sequence[str] | None = None) -> list[TensorInfo]:
    """What a caller sees of these nodes, under `names` or their own."""
    from skive.runtime import TensorInfo

    return [TensorInfo(name, n.shape, str(n.dtype.numpy))
            for n, name in zip(nodes, names or [n.name for n in nodes], strict=True)]


def load_artefact(artefact: str) -> Module:
    """The artefact in this folder; InvalidModelError if there is none."""
    from skive.runtime import load

    if not Path(artefact).is_dir():
        raise InvalidModelError(f"{artefact} is not an artefact folder; `skive compile` writes one")
    return load(artefact)
