"""The ONNX front end."""

from __future__ import annotations

from skive.frontend.onnx.importer import import_onnx
from skive.frontend.onnx.load import model_sha256

__all__ = ["import_onnx", "model_sha256"]
