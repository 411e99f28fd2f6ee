"""From an IR graph to a standard ONNX model."""

from __future__ import annotations

from pathlib import Path

import onnx

from skive.errors import InvalidModelError, SkiveError
from skive.export.onnx import rows as _rows  # noqa: F401 - fills the table
from skive.export.onnx.prepare import columns_as_stored, takes_any_batch, unfused, without_16_bits
from skive.export.onnx.writer import ROWS, WIDE, Writer, has_blocks
from skive.ir import Graph

__all__ = ["ROWS", "export_onnx"]

OPSETS = range(18, 24)
# A model larger than this keeps its weights in a file of their own: protobuf ends at 2 GiB.
LARGEST = 1 << 30


def export_onnx(graph: Graph, path: str | Path | None = None, *, opset: int | None = None) -> onnx.ModelProto:
    """`graph` as an ONNX model of standard operators, written to `path` unless that is None.

    Inputs and outputs keep their names, shapes and element types; an open batch is a symbolic
    dimension, unless some operation needs to know its size: then one sample is written. Quantized
    values become QuantizeLinear and DequantizeLinear, sums of integers ConvInteger, MatMulInteger or
    QLinearConv. The opset is 20, or 21 where 16-bit values are quantized or weights have blocks or 4 bits.
    Raises UnsupportedOpError with every node that has no equivalent, InvalidModelError for an opset
    other than 18 to 23.
    """
    if opset is None:
        # onnxruntime 1.31 moves quantizations of opset 21 about without correcting their output type.
        opset = 21 if any(n.dtype in WIDE or has_blocks(n) for n in graph.nodes) else 20
    if opset not in OPSETS:
        raise InvalidModelError(f"opset {opset}: {OPSETS.start} to {OPSETS.stop - 1} can be written")
    plain_graph = without_16_bits(columns_as_stored(unfused(graph)))
    model = Writer(plain_graph, opset, graph.batch_max is not None and takes_any_batch(plain_graph)).model()
    if path is not None:
        big = model.ByteSize() > LARGEST
        data = f"{Path(path).name}.data" if big else None
        try:
            onnx.save(model, str(path), save_as_external_data=big, location=data)
        except OSError as e:
            raise SkiveError(f"cannot write {path}: {e.strerror or e}") from None
    return model
