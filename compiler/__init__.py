"""skive: an ahead-of-time compiler that makes neural networks small and fast enough for the edge.

The heavy parts load when first used: `import skive` and running an artefact need numpy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from skive.errors import (
    ExitError,
    InvalidModelError,
    PruningError,
    QuantizationError,
    ShapeError,
    SkiveError,
    TargetError,
    ToolchainError,
    UnsupportedOpError,
    VerificationError,
)

if TYPE_CHECKING:
    from skive.api import compile  # noqa: A004 - the contract's name
    from skive.cascade import Cascade
    from skive.exits import Exit
    from skive.frontend.exit_point import exit_point
    from skive.pruning import Prune
    from skive.quantization import Quantize
    from skive.runtime import Module, load
    from skive.sparsity import Sparsify

__version__ = "0.1.0"

__all__ = [
    "Cascade",
    "Exit",
    "ExitError",
    "InvalidModelError",
    "Module",
    "Prune",
    "PruningError",
    "QuantizationError",
    "Quantize",
    "ShapeError",
    "SkiveError",
    "Sparsify",
    "TargetError",
    "ToolchainError",
    "UnsupportedOpError",
    "VerificationError",
    "__version__",
    "compile",
    "exit_point",
    "load",
]

_LAZY = {"Cascade": "skive.cascade", "compile": "skive.api", "Exit": "skive.exits",
         "exit_point": "skive.frontend.exit_point",
         "load": "skive.runtime", "Module": "skive.runtime",
         "Prune": "skive.pruning", "Quantize": "skive.quantization", "Sparsify": "skive.sparsity"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("backend", "torch"):
        return importlib.import_module(f"skive.{name}")
    raise AttributeError(f"module 'skive' has no attribute {name!r}")
