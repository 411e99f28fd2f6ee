"""The rows of the export table, by family; importing this package fills the table."""

from skive.export.onnx.rows import (  # noqa: F401
    contractions,
    elementwise,
    movement,
    quantization,
    recurrence,
    reductions,
    windows,
)
