"""`quantize`: what is written to memory between two kernels is stored as integers.

A float graph and the ranges of its values become a graph in which `quantize` and `dequantize` stand
around float operations (stage 1 of docs/decisions/0007-quantized-ir.md). A value is stored as
integers if a contraction reads it, directly or through operations that only move values, or if it
merely passes from one integer kernel to another; a value that lives inside a fused expression is
never rounded, so one operand of a residual addition is the convolution's own sum. Operations without
an integer form read and write float32: islands.

8 bit: activations u8 with a zero point (0 is exact), weights i8 per output channel and symmetric,
biases i32 (Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018). 16 bit: dynamic fixed point (Das et al., Mixed Precision
Training of Convolutional Neural Networks using Integer Operations, 2018): i16 with one exponent per
tensor, of weights a scale per output channel. No input can make a sum leave 32 bits: either activations and
weights have few enough bits for that, or the sum is added up in parts that fit (a chain is spilled),
whichever costs less.

`storage.py` decides which values are stored as integers, `shared_ranges.py` which of them have one scale;
`formats.py` says what integers of a value mean, `weights.py` finds those of a contraction; `quantizer.py` drives
these and writes the graph, of what `nodes.py` makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skive.errors import QuantizationError
from skive.ir import Graph, Node
from skive.passes.quantize.formats import HEADROOM, Format, Range, affine, fixed
from skive.passes.quantize.nodes import constants
from skive.passes.quantize.quantizer import Quantizer, Scheme
from skive.passes.quantize.storage import PRODUCTS, SUMS, Storage, is_move
from skive.passes.quantize.weights import Layer, reach
from skive.pipeline import pass_

__all__ = ["HEADROOM", "PRODUCTS", "SUMS", "Format", "Layer", "Quantizer", "Scheme", "Storage", "affine", "constants",
           "fixed", "is_move", "quantize", "reach"]


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`dtype`: int8 or int16. `ranges`: `name:low:high` joined by `;`, by the name of a value; `*` stands for
    all that are not listed. A calibrated compile fills these in; here they are written down."""

    dtype: str = "int8"
    ranges: str = "*:-8:8"
    per_channel: bool = True
    keep: str = ""


@pass_("quantize", exact=False, options=QuantizeOptions)
def quantize(graph: Graph, options: QuantizeOptions) -> Graph:
    """Integers wherever a value is written to memory between two kernels that can work on them."""
    if options.dtype not in ("int8", "int16"):
        raise QuantizationError(f"quantize: dtype is {options.dtype!r}, not int8 or int16")
    kept = set(filter(None, options.keep.split(";")))

    def keep(node: Node) -> bool:
        return node.origin in kept or node.name in kept

    storage = Storage(graph, keep, options.dtype == "int8")
    if not storage.sources:
        return graph
    given: dict[str, Range] = {}
    for item in filter(None, options.ranges.split(";")):
        try:
            name, low, high = item.rsplit(":", 2)
            given[name] = (float(low), float(high))
        except ValueError:
            raise QuantizationError(f"quantize: range {item!r} is not name:low:high") from None
    ranges = {n: given.get(n.name, given.get("*", (math.nan, math.nan))) for n in storage.sources}
    return Quantizer(graph, Scheme(ranges, options.dtype, options.per_channel, keep), storage).build()
