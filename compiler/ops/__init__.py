"""THE op table: one row per operation of the IR.

A row holds the name, the operands, the attributes with their defaults, the shape rule, the numpy
reference (which *is* the meaning of the operation), the tolerance of a compiled float32 kernel
against it, and for elementwise operations the name of the C++ function. Importers, passes, the
verifier, the reference evaluator, the fuzzer and the generated documentation all read this table.

The rows stand in a module per family; `table.py` says what a row is and what follows from it.

Conventions: images are channels-last, `[N, H, W, C]`; convolution weights are `[OC, KH, KW, IC/groups]`;
pads are `(top, left, bottom, right)`; integer arithmetic wraps; integer division truncates toward
zero and is 0 for a zero divisor. Contractions of 8- and 16-bit integers give 32-bit sums of
(x - zero) w, where the attribute `zero` is the zero point of x (docs/decisions/0007).
"""

from __future__ import annotations

from skive.ops import (
    attention,
    contractions,
    control,
    elementwise,
    indexing,
    movement,
    normalization,
    quantization,
    recurrence,
    reductions,
    sources,
    windows,
)
from skive.ops.attention import heads_first
from skive.ops.contractions import compressed_weights, rounded_rows
from skive.ops.elementwise import erf, piecewise_table
from skive.ops.normalization import integer_norm_limit
from skive.ops.recurrence import ACTIVATIONS
from skive.ops.table import (
    ANY,
    BOOL,
    F32,
    FLOATS,
    I64,
    INTS,
    NUMBERS,
    OPS,
    QUANTIZED,
    REQUIRED,
    Array,
    Op,
    add,
    broadcast_shapes,
    complete_attrs,
    evaluate,
    evaluate_expr,
    expr_dtype,
    infer,
    make,
    op_of,
)
from skive.ops.windows import copies_neighbours, window_out
from skive.ops.work import macs

__all__ = ["ACTIVATIONS", "ANY", "BOOL", "F32", "FLOATS", "I64", "INTS", "NUMBERS", "OPS", "QUANTIZED", "REQUIRED",
           "Array", "Op", "broadcast_shapes", "complete_attrs", "compressed_weights", "copies_neighbours", "erf",
           "evaluate", "evaluate_expr", "expr_dtype", "heads_first", "infer", "integer_norm_limit", "macs", "make", "op_of",
           "piecewise_table", "rounded_rows", "window_out"]

for _family in (elementwise, control, quantization, movement, indexing, reductions, contractions, windows, normalization,
                attention, recurrence, sources):
    add(_family.ROWS)
