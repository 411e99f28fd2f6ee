"""Float graphs in fixed point without a calibration run: ranges are those of a few reference evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skive import check, passes
from skive.ir import Graph, Node
from skive.passes.integer_only import Storage as IntegerStorage
from skive.passes.quantize import Quantizer, Scheme, Storage
from skive.pipeline import PassManager
from skive.reference import evaluate_graph


def observed_ranges(graph: Graph, storage: Storage,
                    samples: Sequence[Sequence[np.ndarray]]) -> dict[Node, tuple[float, float]]:
    """The least and the largest value of each stored value over `samples`."""
    ranges: dict[Node, tuple[float, float]] = {}

    def see(node: Node, value: np.ndarray) -> None:
        if node in sources:
            low, high = ranges.get(node, (np.inf, -np.inf))
            ranges[node] = min(low, float(value.min())), max(high, float(value.max()))

    sources = set(storage.sources)
    for inputs in samples:
        evaluate_graph(graph, inputs, observe=see)
    for node, a in zip(graph.inputs, zip(*samples, strict=True), strict=True):
        if node in sources:
            ranges[node] = min(float(v.min()) for v in a), max(float(v.max()) for v in a)
    return ranges


def fixed_point(graph: Graph, dtype: str, *, per_channel: bool = True, integer_only: bool = False,
                samples: Sequence[Sequence[np.ndarray]] | None = None) -> Graph:
    """`graph` with integer arithmetic, fused: what is lowered. `samples` give the ranges."""
    canonical, _ = passes.canonical(graph, check="never")
    storage = IntegerStorage(canonical) if integer_only else Storage(canonical)
    samples = samples or [check.sample_inputs(canonical, seed) for seed in (1, 2)]
    scheme = Scheme(observed_ranges(canonical, storage, samples), dtype, per_channel)
    quantized = Quantizer(canonical, scheme, storage).build()
    fused, _ = PassManager().run(quantized, passes.INTEGER_ONLY if integer_only else passes.FUSED, check="never")
    return fused
