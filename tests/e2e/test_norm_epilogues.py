"""What follows a normalisation of rows happens as the row is written, on every target."""

from __future__ import annotations

import numpy as np
import pytest

from skive import _native, lower, ops, passes
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType

SHAPE = (2, 11, 150)  # at least two whole blocks of vectors and a rest on every target; 22 rows: 8, 8 and 6


def const(value: object, dtype: type = np.float32) -> Node:
    return constant(np.asarray(value, dtype))


def network() -> Graph:
    rng = np.random.default_rng(8)
    x = ops.make("input", shape=SHAPE, dtype=DType.f32, label="x", origin="x")
    r = ops.make("input", shape=SHAPE, dtype=DType.f32, label="r", origin="r")
    p = ops.make("input", shape=(*SHAPE[:2], 1), dtype=DType.f32, label="p", origin="p")
    scale, bias = (const(rng.uniform(0.5, 2, SHAPE[-1])) for _ in range(2))

    def stored(value: Node, step: float, zero: int, dtype: DType) -> Node:
        return ops.make("quantize", value, const(step), const(zero, dtype.numpy), to=dtype)

    uneven = const(rng.uniform(0.02, 0.04, SHAPE[-1]))
    channels = ops.make("quantize", ops.make("layer_norm", x, scale), uneven, const(0, np.int8), to=DType.i8)
    outputs = {
        "bytes": stored(ops.make("layer_norm", x, scale, bias), 0.02, 99, DType.u8),
        "words": stored(ops.make("rms_norm", x, scale), 2.0**-12, 0, DType.i16),
        "channels": channels,
        "floats": ops.make("relu", ops.make("add", ops.make("mul", ops.make("layer_norm", x, scale), p), r)),
        "plane": ops.make("relu", ops.make("layer_norm", x, const(rng.uniform(0.5, 2, SHAPE[1:])), axis=1)),
    }
    return Graph("g", (x, r, p), tuple(outputs.values()), tuple(outputs))


def fused() -> Graph:
    return PassManager().run(network(), passes.FUSED, check="always")[0]


def test_one_kernel_each() -> None:
    calls = lower.lower(fused(), TARGETS["avx2"], 1).calls
    kernels = sorted(c.kernel for c in calls)
    assert kernels == ["layer_norm"] * 4 + ["rms_norm", "vmap"], "over several axes there are no channels"
    last = [c.fn.steps[-1].name for c in calls if c.fn and c.fn.steps]
    assert sum(name.startswith("rounded<") for name in last) == 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", list(TARGETS))
def test_every_target_is_near_the_reference(target: str, threads: int) -> None:
    if missing := set(TARGETS[target].features) - set(_native.cpu_features()):
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    graph = fused()
    rng = np.random.default_rng(9)
    arrays = [(2 * rng.standard_normal(i.shape) + 1).astype(np.float32) for i in graph.inputs]
    want = evaluate_graph(graph, arrays)
    got = run_graph(graph, TARGETS[target], threads)(arrays)
    for name, a, b in zip(graph.output_names, got, want, strict=True):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            far = np.abs(a.astype(int) - b.astype(int))
            assert far.max() <= 1 and (far > 0).mean() < 0.01, f"{name}: {far.max()}, {(far > 0).mean():.2%}"
            assert len(np.unique(b)) > 100
