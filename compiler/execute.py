"""Running a graph as it is: compiled into a temporary folder that lives as long as the process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skive import _native, build
from skive.emit import cxx
from skive.ir import Graph
from skive.lower import lower
from skive.targets.base import Target

if TYPE_CHECKING:
    from skive.check import Run

_temporaries: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def temporary_folder() -> Path:
    _temporaries.append(tempfile.TemporaryDirectory(prefix="skive-"))
    return Path(_temporaries[-1].name) / "artefact"


def run_graph(graph: Graph, target: Target, threads: int) -> Run:
    """Compiles `graph` as it is into a temporary folder and returns its call."""
    folder = temporary_folder()
    folder.mkdir(parents=True)
    plan = lower(graph, target, threads)
    sources = cxx.emit(plan, target)
    build.write_sources(folder, sources, plan.weights, plan.name)
    library = build.build_shared(folder, sources, plan.name, target, threads=threads)
    artifact = _native.Artifact(
        str(library),
        plan.name,
        [(p.name, list(p.shape), p.dtype) for p in plan.inputs],
        [(p.name, list(p.shape), p.dtype) for p in plan.outputs],
        plan.arena_bytes,
        0,
        threads,
    )

    def run(inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        result = artifact(*inputs)
        return result if isinstance(result, tuple) else (result,)

    return run
