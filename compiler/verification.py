"""Whether an artefact computes what its model says: compared when it is compiled, and with any model later."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import check
from skive import exits as early
from skive.agreement import Agreement
from skive.errors import ShapeError, VerificationError
from skive.execute import run_graph
from skive.ir import Graph
from skive.pipeline import random_inputs
from skive.runtime import Module
from skive.targets.base import Target

if TYPE_CHECKING:
    from skive.frontend import Source

log = logging.getLogger("skive.verification")
WAY_OUT = "another compiler ($CXX) or --target generic may avoid it; please report it"


def _given(imported: Graph, data: Sequence[np.ndarray] | None) -> list[np.ndarray]:
    """The first sample of `data`, or random inputs."""
    if data is None:
        return list(check.sample_inputs(imported))
    return [np.asarray(d[:1] if imported.batch_max else d) for d in data]


def verify_floats(
    imported: Graph,
    optimised: Graph,
    folder: Path,
    target: Target,
    threads: int,
    data: Sequence[np.ndarray] | None,
    source: Source,
) -> check.Verdict:
    """Compares the artefact with the numpy reference of the model as imported, and with onnxruntime
    where that is installed and the model is ONNX. VerificationError names the first diverging node."""
    from skive.reference import evaluate_graph

    module = Module(folder)
    inputs = _given(imported, data)
    got = module.all_outputs(*inputs)
    want = evaluate_graph(imported, inputs)
    verdict = check.compare(list(zip(got, want, strict=True)), "numpy", 1)
    tolerance = check.TOLERANCE
    if not verdict.passed:
        tolerance = check.allowed_difference(imported, inputs)
        verdict = check.compare(list(zip(got, want, strict=True)), "numpy", 1, tolerance)
    if not verdict.passed:
        simplified = check.compare(
            list(zip(evaluate_graph(optimised, inputs), want, strict=True)), "numpy", 1, tolerance
        )
        if not simplified.passed:
            raise VerificationError(
                f"{imported.name}: a pass changed the result {simplified.distance}; "
                "compile with strict=True (--strict) to learn which"
            )
        node = check.first_divergence(optimised, inputs, lambda g: run_graph(g, target, threads), tolerance)
        where = (
            f"first at {node.label()} ({node.op})" if node else "in the whole network but in no part of it"
        )
        raise VerificationError(
            f"{imported.name}: the artefact differs from the reference {verdict.distance}, {where}; {WAY_OUT}"
        )
    early.check_paths(module, inputs)
    others, one_way = check.branch_inputs(imported, inputs)
    for other in others:
        pairs = list(zip(module.all_outputs(*other), evaluate_graph(imported, other), strict=True))
        if not check.compare(pairs, "numpy", 1, check.allowed_difference(imported, other)).passed:
            raise VerificationError(f"{imported.name}: a branch that random inputs of another scale take differs from "
                                    f"the reference; {WAY_OUT}")
        outside = source.oracle(other)
        known = [(g, o) for (g, _), o in zip(pairs, outside or [], strict=False) if o is not None]
        if known and not check.compare(known, source.engine, 1, check.allowed_difference(imported, other)).passed:
            raise VerificationError(f"{imported.name}: where inputs of another scale decide another way, the artefact "
                                    f"differs from {source.engine}; please report the model")
    if one_way:
        log.warning("%s: verified on one way only through %s; give inputs that take both as data",
                    imported.name, ", ".join(one_way))
    outside = source.oracle(inputs)
    if outside is not None:
        pairs = [(g, o) for g, o in zip(got, outside, strict=True) if o is not None]
        second = check.compare(pairs, f"numpy, {source.engine}", 1, tolerance)
        if not second.passed and tolerance == check.TOLERANCE:
            second = check.compare(
                pairs, f"numpy, {source.engine}", 1, check.allowed_difference(imported, inputs)
            )
        if not second.passed:
            raise VerificationError(
                f"{imported.name}: the artefact agrees with the reference but differs from {source.engine} "
                f"{second.distance}; please report the model"
            )
        return second
    return verdict


def verify_integers(
    imported: Graph,
    optimised: Graph,
    folder: Path,
    target: Target,
    threads: int,
    data: Sequence[np.ndarray] | None,
    source: Source,
) -> check.Verdict:
    """Compares the artefact with the numpy reference of its own integer graph.

    Where every operation is exact or correctly rounded they are equal bit for bit. Where a float32 function
    that is not (exp, a float32 convolution) stands before a quantizer, a value near the middle of two integers
    may go either way: such graphs are held to check.INTEGER_SQNR_DB, or to what a rounding error of float32
    weights does to the reference itself. VerificationError names the first diverging node.
    """
    from skive.reference import evaluate_graph

    module = Module(folder)
    inputs = _given(imported, data)
    inputs = [p.quantize(a) for p, a in zip(module.inputs, inputs, strict=True)]
    got = module.all_outputs(*inputs)
    pairs = list(zip(got, evaluate_graph(optimised, inputs), strict=True))
    exactness = check.exactness(optimised)
    tolerance = 0.0 if exactness.exact else check.TOLERANCE
    verdict = check.compare(pairs, "numpy, integers", 1, tolerance)
    if (not verdict.passed and exactness.flips
            and (check.rounds_alike(pairs) or check.flips_alike(optimised, inputs, pairs))):
        verdict = dataclasses.replace(verdict, passed=True)
    if not verdict.passed:
        node = check.first_divergence(optimised, inputs, lambda g: run_graph(g, target, threads), tolerance)
        where = f"first at {node.label()} ({node.op})" if node else "in the whole network but in no part of it"
        raise VerificationError(
            f"{imported.name}: the artefact differs from the reference of its integer graph, {where}; {WAY_OUT}"
        )
    early.check_paths(module, inputs)
    return verdict


def verdict_against(
    module: Module,
    model: Any,
    calls: Iterable[Sequence[np.ndarray]] | None = None,
    labels: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[check.Verdict, Agreement]:
    """How far `module` is from the numpy reference of `model` (`skive verify`), over all `calls` (inputs
    by position) or one of random inputs; `labels`: the right class of each sample.

    A float32 artefact passes if every call is within check.TOLERANCE of the output's range. One that
    computes in integers is held to that, or to equal roundings, only where the model rounds as well:
    what it lost against a float32 model is reported, and passes.
    """
    from skive import frontend
    from skive.reference import evaluate_graph

    shapes = {p.name: p.shape for p in module.inputs}  # a leading -1 leaves the batch open
    graph = frontend.open_model(model, input_shapes=shapes, batch_max=module.manifest["batch_max"]).graph()
    kept = list(range(len(module.outputs)))
    if module.exits:
        graph, kept = early.reference(graph, module)
    results = [module.outputs[i] for i in kept]
    for what, mine, theirs in (
        ("inputs", module.inputs, graph.inputs),
        ("outputs", results, graph.outputs),
    ):
        ours = [(p.shape[1:], p.dtype if p.scale is None else "float32") for p in mine]
        if ours != [(n.shape[1:], n.dtype.numpy.name) for n in theirs]:
            raise ShapeError(
                f"the model's {what} are not those of {module.folder}: it was compiled from another model"
            )
    if calls is None:
        calls = [check.sample_inputs(graph) if graph.inputs else random_inputs(graph)]
    rounds = check.has_roundings(graph)
    fixed = any(layer.get("dtype") in ("int8", "int16", "weights8", "weights4") for layer in module.report["layers"])
    agreement = Agreement([p.name for p in results])
    worst: check.Verdict | None = None
    at = 0
    for done, inputs in enumerate(calls, 1):
        given = [p.quantize(a) for p, a in zip(module.inputs, inputs, strict=True)]
        every = module.all_outputs(*given)
        got = tuple(p.dequantize(every[i]) for p, i in zip(results, kept, strict=True))
        pairs = list(zip(got, evaluate_graph(graph, inputs), strict=True))
        verdict = check.compare(pairs, "numpy", 1)
        if not verdict.passed and fixed and (not rounds or check.rounds_alike(pairs)):
            finite = all(np.isfinite(g).all() or not np.isfinite(w).all() for g, w in pairs if w.dtype.kind == "f")
            verdict = dataclasses.replace(verdict, passed=finite)
        before = agreement.samples
        count = len(inputs[0]) if labels is not None else 0
        agreement.add(got, [w for _, w in pairs], labels[at : at + count] if labels is not None else None)
        at += agreement.samples - before
        worst = _worse(worst, verdict)
        progress(done)
    assert worst is not None
    ratios = [o.sqnr_db for o, p in zip(agreement.outputs, results, strict=True)
              if p.dtype.startswith("float") or p.scale is not None]
    return dataclasses.replace(worst, samples=agreement.samples, sqnr_db=min(ratios, default=None)), agreement


def _worse(a: check.Verdict | None, b: check.Verdict) -> check.Verdict:
    """One verdict for both."""
    if a is None:
        return b
    return dataclasses.replace(
        a,
        max_abs_error=max(a.max_abs_error, b.max_abs_error),
        relative_error=-1.0 if min(a.relative_error, b.relative_error) < 0 else max(a.relative_error, b.relative_error),
        passed=a.passed and b.passed,
    )
