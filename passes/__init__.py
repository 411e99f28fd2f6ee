"""The passes, one file each, and the pipelines: lists that read from top to bottom."""

from __future__ import annotations

from skive.ir import Graph
from skive.passes.compress_weights import compress_weights
from skive.passes.eliminate_common import eliminate_common
from skive.passes.eliminate_dead import eliminate_dead
from skive.passes.eliminate_identity import eliminate_identity
from skive.passes.equalise import equalise
from skive.passes.fit_functions import fit_functions
from skive.passes.fold_batchnorm import fold_batchnorm
from skive.passes.fold_constants import fold_constants
from skive.passes.fold_padding import fold_padding
from skive.passes.fuse_elementwise import fuse_elementwise
from skive.passes.integer_arithmetic import integer_arithmetic
from skive.passes.integer_only import integer_only
from skive.passes.join_factors import join_factors
from skive.passes.merge_linear import merge_linear
from skive.passes.quantize import quantize
from skive.passes.recognise_patterns import recognise_patterns
from skive.passes.sink_reshapes import sink_reshapes
from skive.passes.sink_transposes import sink_transposes
from skive.passes.split_recurrences import split_recurrences
from skive.passes.tabulate import tabulate
from skive.passes.transpose_free_attention import transpose_free_attention
from skive.pipeline import PassManager, Record

__all__ = ["CANONICAL", "CLEANED", "EXACT", "FUSED", "INTEGER_ONLY", "canonical", "compress_weights",
           "eliminate_common", "eliminate_dead", "eliminate_identity", "equalise", "fit_functions", "fold_batchnorm",
           "fold_constants", "fold_padding", "fuse_elementwise", "integer_arithmetic", "integer_only", "join_factors",
           "merge_linear", "optimize", "quantize", "recognise_patterns", "sink_reshapes", "sink_transposes",
           "split_recurrences", "tabulate", "transpose_free_attention"]

# The model in its simplest form, every operation still by itself: where quantization, pruning and
# early exits start from.
CANONICAL: list[str] = [
    "fold-constants",
    "eliminate-common",
    "recognise-patterns{norms=false}",
    "sink-transposes",
    "eliminate-identity",
    "recognise-patterns",  # again: in channels-last order, and with bounds spelled as clip
    "fold-padding",
    "fold-batchnorm",
    "merge-linear",
    "transpose-free-attention",
    "sink-reshapes",
    "fold-constants",
    "eliminate-identity",
    "eliminate-common",
]

# What exits and pruning leave over, for other compilers than this one.
CLEANED: list[str] = ["fold-constants", "eliminate-identity", "eliminate-common", "eliminate-dead"]

# From there to what is lowered.
FUSED: list[str] = [
    "integer-arithmetic",  # leaves a float32 graph alone
    "tabulate",
    "fit-functions",
    "join-factors",
    "fuse-elementwise",
    "eliminate-dead",
]

# The same where nothing may be float32.
INTEGER_ONLY: list[str] = [
    "integer-arithmetic",
    "integer-only",
    "fuse-elementwise",
    "eliminate-dead",
]

# What precedes lowering of a model as it is.
EXACT: list[str] = [*CANONICAL, *FUSED]


def canonical(graph: Graph, *, check: str = "auto") -> tuple[Graph, list[Record]]:
    """(`graph` after the CANONICAL passes, one record per pass)."""
    return PassManager().run(graph, CANONICAL, check=check)


def optimize(graph: Graph, *, check: str = "auto") -> tuple[Graph, list[Record]]:
    """(`graph` after the EXACT passes, one record per pass)."""
    return PassManager().run(graph, EXACT, check=check)
