"""Whole networks under AddressSanitizer and UndefinedBehaviorSanitizer.

Those of ../shared/data/models where present, and the ONNX files in the folders that SKIVE_MODELS names.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from test_clean_code import HOST, sanitized

from skive.emit.names import identifier
from skive.frontend.onnx import import_onnx

FOLDERS = [Path(__file__).resolve().parents[3] / "shared" / "data" / "models",
           *(Path(p) for p in os.environ.get("SKIVE_MODELS", "").split(os.pathsep) if p)]
MODELS = [path for folder in FOLDERS for path in sorted(folder.glob("*.onnx"))]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Batch 1 and, for the other unknown dimensions, images of 24 x 32."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = {i.name for i in graph.initializer}
    result = {}
    for port in graph.input:
        if port.name not in stored:
            free = iter((24, 32))
            dims = port.type.tensor_type.shape.dim
            result[port.name] = tuple(d.dim_value or (next(free) if i else 1) for i, d in enumerate(dims))
    return result


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason=f"no models in {', '.join(map(str, FOLDERS))}")
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_sanitizers_find_nothing(path: Path, tmp_path: Path) -> None:
    # The weights as assembly: as a C array, megabytes of them take a compiler minutes.
    graph = import_onnx(path, input_shapes=shapes(path))
    sanitized(replace(graph, name=identifier(graph.name)), tmp_path, HOST, weights_in_c=False)
