"""The rows of the ONNX table, by family; importing this package fills the table."""

from skive.frontend.onnx.rows import contractions, elementwise, movement, normalization, reductions, windows  # noqa: F401
