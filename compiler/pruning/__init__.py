"""Channels removed: which, how many, and weights that make up for them.

`passes/channel_groups/` says what can be removed together. Here groups are scored (`scores.py`), as many of the
least important ones are chosen as the target asks for (`choice.py`, `cost.py`), and the layers that read what is
left are fitted anew to calibration data (`fit.py`). Before that whole residual branches (`erasing.py`) and channels
that are zero already (`zeros.py`) may go.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skive.errors import PruningError
from skive.ir import Graph, Node
from skive.passes.channel_groups import WINDOW, Groups, channel_groups, without
from skive.pruning.choice import (
    check_keep,
    chosen_groups,
    given_groups,
    kept_by_name,
    obstacles,
    per_cost,
    places_by_loss,
)
from skive.pruning.cost import Cost, Latency
from skive.pruning.erasing import erased
from skive.pruning.fit import left_as_they_were, refitted, restored
from skive.pruning.request import CRITERIA, DATA_DRIVEN, SCOPES, Prune, requested
from skive.pruning.scores import (
    Importance,
    activations,
    constant_keys,
    losses,
    magnitudes,
    moments,
    summed,
)
from skive.pruning.sensitivity import damages, marginal
from skive.pruning.zeros import zero_groups
from skive.samples import Samples
from skive.targets.base import Target

__all__ = ["CRITERIA", "DATA_DRIVEN", "SCOPES", "Cost", "Importance", "Prune", "apply", "check_keep",
           "constant_keys", "ranking", "refitted", "requested", "restored"]

log = logging.getLogger("skive.pruning")

NOISE_SAMPLES = 32  # stand in for calibration data where none is given
FIT_SAMPLES = 128  # whose activations decide what the remaining weights become
TURNS = 3  # of choosing by measured time: what is chosen is measured, and may turn out slower than estimated


def apply(
    graph: Graph, options: Prune, progress: Callable[[str, float], None] = lambda step, fraction: None,
    target: Target | None = None, threads: int = 1, dtype: str = "float32",
) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` with channels removed, the `sparsity` of report.json).

    Deterministic, but for a target of latency, which is measured for `target`, this processor if None, with products
    in `dtype`.
    PruningError if so much cannot be removed.
    """
    progress("prune", 0.1)
    check_keep(graph, options.keep)
    samples: list[Sequence[np.ndarray]] = []
    whole = graph
    branches: list[dict[str, Any]] = []
    if options.erase:
        samples = _samples(graph, options)
        graph, branches = erased(graph, options.erase, options.keep, samples)
    found = channel_groups(graph)
    nothing = 0
    if options.zeros:
        zero = zero_groups(found)
        zero = _leaving_one(found, zero)
        nothing = int(zero.sum())
        found = channel_groups(without(found, np.flatnonzero(zero)))
    if options.fraction and not found.removable:
        raise PruningError(f"{graph.name}: no channel can be removed: {obstacles(found)}")
    gone = np.zeros(len(found.groups), bool)
    criterion = options.criterion_name
    curves: list[list[tuple[int, float]]] = []
    measured_with = None
    if options.fraction or options.widths:
        cost = _cost(found, options, target, threads, dtype, progress)
        if options.refit or options.criterion in DATA_DRIVEN or options.scope == "measured":
            samples = samples or _samples(graph, options)
        measured = options.fraction > 0 and options.scope == "measured"
        observed = options.criterion in DATA_DRIVEN or (measured and options.refit)
        seen = moments(found, samples) if observed else {}
        scores, criterion = _scores(found, options, seen, cost)
        if measured:
            curves, measured_with = damages(found, scores, seen, samples, kept_by_name(found, options.keep), progress)
            scores = places_by_loss(found, marginal(found, scores, curves), options, _counted(found, cost))
        for _ in range(TURNS if options.fraction else 0):
            gone = chosen_groups(found, scores, options, cost)
            cost.measure(gone)
            if cost(gone) <= (1 - options.fraction) * cost.whole:
                break
        if options.widths:
            gone = given_groups(found, scores, options)
    whole_groups = found
    used = "calibration" if options.calibration is not None else "noise"
    fit: dict[str, Any] = {"data": used if samples else None, "samples": len(samples), "not_fitted": []}
    if options.refit and gone.any():
        progress("prune", 0.15)
        fit["not_fitted"] = left_as_they_were(found, gone)
        found = channel_groups(refitted(found, gone, samples))
    if samples and used == "noise":
        log.warning("%s: no calibration data was given; noise stands in, to which the network's accuracy does not "
                    "matter: give Prune(calibration=...) or --calibrate", graph.name)
    report = _reported(found, gone, options, curves)
    report["criterion"] = criterion
    if options.fraction and options.multiple is None and options.measure != "latency":
        exact = chosen_groups(whole_groups, scores, replace(options, multiple=1), cost)
        report["rounding"] = {"channels": int(exact.sum()) - int(gone.sum()), "removed": 1 - cost(gone) / cost.whole,
                              "removed_exactly": 1 - cost(exact) / cost.whole}
    report["fit"] = fit | ({} if measured_with is None else {"measured_with": measured_with})
    if options.erase:
        report["erased"] = branches
    if options.zeros:
        report["zero_channels"] = nothing
    before = channel_groups(whole) if whole is not found.graph and (options.erase or options.zeros) else found
    for measure in ("macs", "parameters", "bytes"):
        had = Cost(before, measure).whole
        report[f"{measure}_removed"] = 1 - Cost(found, measure)(gone) / max(1, had)
    if options.fraction and options.measure == "latency":
        report["latency_removed"] = 1 - cost(gone) / cost.whole
        report["forecast_us"] = {"whole": cost.whole, "pruned": cost(gone), "dtype": dtype}
    return without(found, np.flatnonzero(gone)), report


def ranking(found: Groups, options: Prune) -> tuple[np.ndarray, Prune]:
    """([groups] the scores by which `apply` chooses, `options` with the calibration data that were read for them)."""
    samples: list[Sequence[np.ndarray]] = []
    if options.calibration is not None:
        samples = _samples(found.graph, options)
        options = replace(options, calibration=samples)
    elif options.criterion in DATA_DRIVEN:
        samples = _samples(found.graph, options)
    seen = moments(found, samples) if options.criterion in DATA_DRIVEN else {}
    return _scores(found, options, seen, Cost(found, "macs"))[0], options


def _cost(found: Groups, options: Prune, target: Target | None, threads: int, dtype: str,
          progress: Callable[[str, float], None]) -> Cost | Latency:
    if options.measure != "latency":
        return Cost(found, options.measure)
    from skive import _native
    from skive.targets.base import resolve

    return Latency(found, target or resolve("host", _native.cpu_features()), threads, progress, dtype)


def _counted(found: Groups, cost: Cost | Latency) -> Cost:
    """`cost`, or multiply-accumulates in the place of times, each of which is a compilation."""
    return Cost(found, "macs") if isinstance(cost, Latency) else cost


def _scores(found: Groups, options: Prune, seen: Mapping[Node, np.ndarray], cost: Cost | Latency
            ) -> tuple[np.ndarray, str]:
    """(the score of each group, the criterion that it is of: magnitudes where no layer can be observed). `seen`: the
    moments of criteria that are driven by data."""
    if isinstance(options.criterion, Importance):
        if options.erase or options.zeros:
            raise PruningError("measured importances are those of the whole network: remove zeros and branches first")
        return summed(found, options.criterion), options.criterion.kind
    if options.criterion == "random":
        return np.random.default_rng(options.seed).random(len(found.groups)), "random"
    if options.criterion in DATA_DRIVEN:
        if seen:
            if options.criterion == "activation":
                return activations(found, seen), "activation"
            return per_cost(found, losses(found, seen), _counted(found, cost)), "obspa"
        log.warning("%s: no layer with float32 weights reads what can be removed: magnitudes (l1) decide instead of %s",
                    found.graph.name, options.criterion)
    return (magnitudes(found, 2), "l2") if options.criterion == "l2" else (magnitudes(found, 1), "l1")


def _leaving_one(found: Groups, gone: np.ndarray) -> np.ndarray:
    """`gone` [groups] bool without a channel of those families of which nothing would be left."""
    gone = gone.copy()
    for axes in found.axes.values():
        for groups in axes:
            if len(groups) and gone[groups].all():
                gone[groups[0]] = False
    return gone


def _samples(graph: Graph, options: Prune) -> list[Sequence[np.ndarray]]:
    if options.calibration is None:
        from skive.pipeline import random_inputs

        return [random_inputs(graph, seed) for seed in range(NOISE_SAMPLES)]
    return list(itertools.islice(iter(Samples(graph, options.calibration, options.samples)), FIT_SAMPLES))


def _reported(found: Groups, gone: np.ndarray, options: Prune, curves: Sequence[Sequence[tuple[int, float]]]
              ) -> dict[str, Any]:
    """Families with their channels before and after and their measured curves, and what had to stay with its
    reason."""
    families = []
    for f, curve in itertools.zip_longest(found.families, curves):
        places = sorted({n.label() for n in found.groups[f[0]].places})
        family = {"layers": places, "channels": len(f), "kept": int((~gone[list(f)]).sum())}
        families.append(family | ({"lost_alone": {str(count): loss for count, loss in curve}} if curve else {}))
    reasons: dict[str, int] = {}
    for g in found.groups:
        if g.reason and g.places and not g.reason.startswith(WINDOW):
            reasons[g.reason] = reasons.get(g.reason, 0) + 1
    return {
        "refit": options.refit,
        "scope": options.scope,
        "pattern": "channels",
        "groups": families,
        "kept": [{"reason": r, "groups": n} for r, n in sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0]))],
    }
