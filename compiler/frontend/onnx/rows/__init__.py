"""The rows of the ONNX table, by family; importing this package fills the table."""

from skive.frontend.onnx.rows import (  # noqa: F401
    contractions,
    detection,
    elementwise,
    fused,
    movement,
    normalization,
    quantization,
    recurrence,
    reductions,
    resize,
    sampling,
    signal,
    structure,
    text,
    training,
    trees,
    windows,
)
