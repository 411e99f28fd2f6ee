"""`quantize="auto"`: an element type for each layer, out of float32, int16 and int8.

What a layer's type costs in time is measured on this processor (`speed`), what it costs in accuracy on
calibration samples: the noise at the outputs when this layer alone is quantized. Noise powers of layers
add up, times do, and so the choice is a knapsack with several items per layer, solved exactly by
dynamic programming (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). The model decides
nothing alone: the result runs beside the float network and beside the uniform choices, and is taken
only if it keeps the budget and nothing uniform that keeps it is faster.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import _native, build, calibration, explanation, ops, quantization, speed
from skive.emit import cxx
from skive.errors import QuantizationError, SkiveError
from skive.ir import Graph, Node, constant, rebuilt
from skive.lower import lower
from skive.targets.base import Target, resolve
from skive.types import DType

if TYPE_CHECKING:
    from skive.passes.quantize import Quantizer
    from skive.quantization import Calibrated, Quantize

log = logging.getLogger("skive.mixed_precision")

DTYPES = speed.DTYPES
BYTES = {"float32": 4, "int16": 2, "int8": 1}
BUDGET_DB = 30.0  # unless the request says otherwise: noise of 3 % of the signal
BINS = 10_000  # of the knapsack: each layer's share of the limit is rounded up to 1/BINS of it
SENSITIVITY_SECONDS = 10.0  # of measuring single layers, compiling apart; one sample is measured in any case
ATTEMPTS = 6  # knapsacks with limits that account for how far the model was off, each compiled and measured,
ATTEMPT_SECONDS = 40.0  # as long as there is time
CLOSE = 1.25  # a choice is good enough if it takes up the noise that is allowed to within this factor
MOST_STEP = 10.0  # by which the limit is widened at once where noises add up to less than their sum
FASTER = 0.99  # a mixture must take at most this many times what the best uniform choice takes

Choice = tuple[str, ...]  # an element type per group
Progress = Callable[[str, float], None]


@dataclass
class Group:
    """Layers that read the same stored values and so share their element type."""

    sources: list[Node]
    products: list[Node]


class Built:
    """A graph compiled into a temporary folder, ready to run and to be timed."""

    def __init__(self, graph: Graph, target: Target, threads: int, folder: Path):
        from skive import passes
        from skive.pipeline import PassManager

        fused, _ = PassManager().run(replace(graph, batch_max=None), passes.FUSED, check="never")
        self.plan = lower(fused, target, threads)
        folder.mkdir()
        sources = cxx.emit(self.plan, target)
        build.write_sources(folder, sources, self.plan.weights, self.plan.name)
        self.library = build.build_shared(folder, sources, self.plan.name, target, threads=threads)
        self._call = _native.Artifact(
            str(self.library),
            self.plan.name,
            [(p.name, list(p.shape), p.dtype) for p in self.plan.inputs],
            [(p.name, list(p.shape), p.dtype) for p in self.plan.outputs],
            self.plan.arena_bytes,
            0,
            threads,
        )

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        result = self._call(*inputs)
        return result if isinstance(result, tuple) else (result,)


@dataclass
class Candidate:
    """A choice that was compiled and measured."""

    choice: Choice
    graph: Graph
    quantizer: Quantizer
    built: Built
    noise: float  # relative to the signal, of the worst output
    us: float = math.inf  # unknown where the noise decides already

    @property
    def name(self) -> str:
        return self.choice[0] if len(set(self.choice)) == 1 else "mixed"

    @property
    def sqnr_db(self) -> float:
        return explanation.decibels(1.0, self.noise)


class Search:
    """Everything that is measured of one network."""

    def __init__(
        self, graph: Graph, known: Calibrated, options: Quantize, target: Target, threads: int, folder: Path
    ):
        self.graph, self.known, self.options = graph, known, options
        self.target, self.threads, self.folder = target, threads, folder
        # The same as a compile in this type alone would make.
        self.uniform_options = {
            d: replace(options, dtype=d, budget_sqnr_db=None, budget_us=None) for d in ("int8", "int16")
        }
        self.formats = {d: known.quantizer(o, d) for d, o in self.uniform_options.items()}
        self.groups = [Group(*g) for g in self.formats["int8"].groups()]
        self.samples = quantization.measured_samples(graph, known)
        self.candidates: dict[Choice, Candidate] = {}
        self.table = speed.SpeedTable(target, threads)
        self._wanted: list[tuple[np.ndarray, ...]] = []  # outputs of the float network, by sample

    # ----------------------------------------------------------------------------- candidates

    def uniform(self, dtype: str) -> Candidate:
        """The candidate in which every layer has this type."""
        return self.candidate((dtype,) * len(self.groups))

    def candidate(self, choice: Choice) -> Candidate:
        """The network with these element types, compiled, its noise measured. Every choice is built once."""
        if choice not in self.candidates:
            quantizer, graph = self._quantized(choice)
            built = Built(graph, self.target, self.threads, self.folder / f"choice{len(self.candidates)}")
            if not self._wanted:  # the float network comes first
                assert set(choice) == {"float32"}
                self._wanted = [built(s) for s in self.samples]
            noise = _relative_noise(self._wanted, [built(s) for s in self.samples])
            self.candidates[choice] = Candidate(choice, graph, quantizer, built, noise)
        return self.candidates[choice]

    def _quantized(self, choice: Choice) -> tuple[Quantizer, Graph]:
        by_product = {p: d for g, d in zip(self.groups, choice, strict=True) for p in g.products}
        if set(choice) == {"float32"}:
            quantizer = self.known.quantizer(self.options, "int8", keep=lambda node: True)
            quantizer.build()
            return quantizer, self.graph
        if len(set(choice)) == 1:
            quantizer = self.formats[choice[0]]
        else:
            floats = {p for p, d in by_product.items() if d == "float32"}
            quantizer = self.known.quantizer(
                self.uniform_options["int8"],
                "int8",
                like=list(self.formats.values()),
                dtypes={p: d for p, d in by_product.items() if d == "int16"},
                keep=lambda node: node in floats or self.options.keeps(node),
            )
        return quantizer, quantizer.build()

    # ----------------------------------------------------------------------------------- time

    def costs(self) -> np.ndarray:
        """[groups, types] microseconds that each group takes in each type, border included.

        A call belongs to the group of the contraction it computes, else to the next one that has a
        group. What a kernel writes it writes in the type of those that read it: the uniform networks
        are measured, and the bytes of each stored value are charged to its readers instead.
        """
        owner: dict[str, int] = {}
        for i, g in enumerate(self.groups):
            owner.update({v.label(): i for v in g.sources if v.label() not in owner})
        owner.update({p.label(): i for i, g in enumerate(self.groups) for p in g.products})
        memory = self.table.limits.memory * 1e3  # bytes per microsecond
        costs = np.zeros((len(self.groups), len(DTYPES)))
        for k, dtype in enumerate(DTYPES):
            built = self.uniform(dtype).built
            us, _ = speed.time_library(built.library, built.plan)
            waiting = 0.0
            at: int | None = None
            for call, t in zip(built.plan.calls, us, strict=True):
                self.table.add(call, float(t))
                at = owner.get(call.origin, at if call.macs else None)
                if at is None:
                    waiting += float(t)
                else:
                    costs[at, k] += float(t) + waiting
                    waiting = 0.0
            costs[-1, k] += waiting
            moved = BYTES[dtype] / memory
            for i, g in enumerate(self.groups):
                costs[i, k] += moved * (sum(v.type.size for v in g.sources) - sum(p.type.size for p in g.products))
        self.table.save()
        return costs

    # ------------------------------------------------------------------------------- accuracy

    def sensitivities(self) -> np.ndarray:
        """[groups, types] noise at the worst output, relative to its signal, when one group alone has the type.

        Two artefacts measure that for all layers: one gives each stored value and what rounded weights
        add to each sum, one is the float network with a term to be added at these places.
        """
        sources = [v for g in self.groups for v in g.sources]
        products = [p for g in self.groups for p in g.products]
        extra = {
            (p, d): ops.make(p.op, p.inputs[0], *self._weight_errors(p, d), origin=p.origin, **p.attrs)
            for p in products
            for d in self.formats
        }
        observed = calibration.runner(
            self.known.graph, [*sources, *extra.values()], threads=self.threads, target=self.target.name
        )
        network = Built(self._disturbed(sources, products), self.target, self.threads, self.folder / "disturbed")
        silent = [np.zeros(n.shape, np.float32) for n in (*sources, *products)]
        place = {n: i for i, n in enumerate(sources)}
        place_of_sum = {n: len(sources) + i for i, n in enumerate(products)}
        signal = np.zeros(len(self.graph.outputs))
        noise = np.zeros((len(self.groups), len(DTYPES), len(self.graph.outputs)))
        started = time.perf_counter()
        for sample in self.samples:
            if signal.any() and time.perf_counter() - started > SENSITIVITY_SECONDS:
                break
            values = dict(zip([*sources, *extra], observed(sample), strict=True))
            want = network([*sample, *silent])
            signal += [_power(w) for w in want]
            for i, g in enumerate(self.groups):
                for d, quantizer in self.formats.items():
                    terms = list(silent)
                    for v in g.sources:
                        if v not in quantizer.storage.stored:
                            continue  # operands of attention, which has no kernel of 16 bits, stay float32
                        offset = quantizer.offset_of(v)
                        stored = values[v] if offset is None else values[v] + offset
                        terms[place[v]] = quantizer.format_of(v).real(stored) - stored
                    for p in g.products:
                        terms[place_of_sum[p]] = np.ascontiguousarray(values[p, d], np.float32)
                    got = network([*sample, *terms])
                    noise[i, DTYPES.index(d)] += [_power(a - w) for a, w in zip(got, want, strict=True)]
        counted = signal > 0
        return (noise[..., counted] / signal[counted]).max(axis=-1, initial=0.0)

    def _weight_errors(self, product: Node, dtype: str) -> list[Node]:
        """What quantization adds to the weights and to the bias of a contraction, as its operands."""
        quantizer = self.formats[dtype]
        error = quantizer.layers[product].real_weights - product.inputs[1].value
        operands = [constant(error.astype(np.float32))]
        corrected = quantizer.scheme.biases.get(product)
        if corrected is not None:
            bias = product.inputs[2].value if len(product.inputs) > 2 else np.float32(0)
            operands.append(constant((corrected - bias).astype(np.float32)))
        return operands

    def _disturbed(self, sources: Sequence[Node], products: Sequence[Node]) -> Graph:
        """The float network with an input for each source and each product, added to the value."""

        def term(node: Node, kind: str) -> Node:
            return ops.make("input", shape=node.shape, dtype=DType.f32, label=f"{kind}{len(added)}")

        added: dict[tuple[Node, str], Node] = {}
        for kind, nodes in (("source", sources), ("sum", products)):
            for n in nodes:
                added[n, kind] = term(n, kind)
        new: dict[Node, Node] = {}
        unrounded: dict[Node, Node] = {}  # outputs are not stored in integers
        for n in self.known.graph.nodes:
            node = rebuilt(n, tuple(new[i] for i in n.inputs))
            if (n, "sum") in added:
                node = ops.make("add", node, added[n, "sum"], origin=n.origin)
            unrounded[n] = node
            if (n, "source") in added:
                node = ops.make("add", node, added[n, "source"], origin=n.origin)
            new[n] = node
        graph = self.known.graph.with_nodes({**new, **{o: unrounded[o] for o in self.known.graph.outputs}})
        inputs = (*self.known.graph.inputs, *added.values())
        return replace(graph, inputs=inputs, states=(), name="disturbed")


def _power(a: np.ndarray) -> float:
    flat = a.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _relative_noise(want: Sequence[Sequence[np.ndarray]], got: Sequence[Sequence[np.ndarray]]) -> float:
    """Noise over signal of the worst float output, over all samples."""
    worst = 0.0
    for w, g in zip(zip(*want, strict=True), zip(*got, strict=True), strict=True):
        if w[0].dtype.kind == "f" and w[0].size:
            signal = sum(map(_power, w))
            noise = sum(_power(a.astype(np.float64) - b) for a, b in zip(g, w, strict=True))
            worst = max(worst, noise / signal if signal else math.inf if noise else 0.0)
    return worst


def knapsack(costs: np.ndarray, weights: np.ndarray, limit: float) -> list[int] | None:
    """The column of each row for which the costs [rows, columns] sum to the least while the weights stay
    within `limit`; None if no choice does. Exact for weights rounded up to limit / BINS."""
    rows, columns = costs.shape
    with np.errstate(invalid="ignore"):
        size = np.ceil(np.maximum(weights, 0) / max(limit, 1e-300) * BINS)
    size = np.where(np.isfinite(size) & (size <= BINS), size, BINS + 1).astype(np.int64)
    best = np.zeros(BINS + 1)
    taken = np.zeros((rows, BINS + 1), np.uint8)
    for r in range(rows):
        options = np.full((columns, BINS + 1), np.inf)
        for c in range(columns):
            if size[r, c] <= BINS:
                options[c, size[r, c] :] = best[: BINS + 1 - size[r, c]] + costs[r, c]
        taken[r] = options.argmin(axis=0)
        best = options.min(axis=0)
    if not np.isfinite(best[BINS]):
        return None
    at, chosen = BINS, []
    for r in reversed(range(rows)):
        c = int(taken[r, at])
        chosen.append(c)
        at -= int(size[r, c])
    return chosen[::-1]


def apply(
    graph: Graph,
    options: Quantize,
    progress: Progress = lambda step, fraction: None,
    *,
    target: Target | str = "host",
    threads: int = 1,
) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` with an element type per layer, the `quantization` of report.json).

    QuantizationError if this processor cannot run code for `target`; ToolchainError without a compiler.
    """
    features = _native.cpu_features()
    chosen = resolve(target, features) if isinstance(target, str) else target
    if not set(chosen.features) <= set(features):
        raise QuantizationError(f"quantize='auto' measures on this processor, which cannot run target {chosen.name}; "
                                "give int8 or int16")  # fmt: skip
    known = quantization.calibrated(graph, options, progress, chosen.name)
    with tempfile.TemporaryDirectory(prefix="skive-auto-") as folder:
        search = Search(graph, known, options, chosen, threads, Path(folder))
        best, costs, noises = _best(search, options, progress)
        details = _details(search, options, best, costs, noises)
    return best.graph, details


def _best(
    search: Search, options: Quantize, progress: Progress
) -> tuple[Candidate, np.ndarray, np.ndarray | None]:
    """(the candidate to take, times and noises that were measured of single groups)."""
    for i, dtype in enumerate(DTYPES):
        search.uniform(dtype)
        progress("auto: uniform choices", 0.2 + 0.01 * i)
    costs = search.costs()
    noises: np.ndarray | None = None
    limit = 10 ** (-(options.budget_sqnr_db or BUDGET_DB) / 10)
    if options.budget_us is None:
        # What is fastest without a budget may keep it; else single layers tell where the noise comes from.
        candidate = search.candidate(tuple(DTYPES[c] for c in costs.argmin(axis=1)))
        if candidate.noise > limit:
            progress("auto: sensitivities", 0.23)
            noises = search.sensitivities()
            _within_noise(search, costs, noises, limit)
    else:
        progress("auto: sensitivities", 0.23)
        noises = search.sensitivities()
        _within_time(search, costs, noises, options.budget_us)
    progress("auto: race", 0.24)
    every = [c for c in search.candidates.values() if options.budget_us is not None or c.noise <= limit]
    for c, us in zip(every, speed.race([(c.built.library, c.built.plan) for c in every]), strict=True):
        c.us = us
    if options.budget_us is not None:
        quick = [c for c in every if c.us <= options.budget_us]
        if not quick:
            log.warning("%s: no choice of element types runs within %g us", search.graph.name, options.budget_us)
        return min(quick, key=lambda c: (c.noise, c.us)) if quick else min(every, key=lambda c: c.us), costs, noises
    uniform = min((c for c in every if c.name != "mixed"), key=lambda c: c.us)
    mixed = min((c for c in every if c.name == "mixed"), key=lambda c: c.us, default=uniform)
    return (mixed if mixed.us < FASTER * uniform.us else uniform), costs, noises


def _within_noise(search: Search, costs: np.ndarray, noises: np.ndarray, limit: float) -> None:
    """Builds the fastest choice whose measured noise keeps `limit`, by knapsacks of ever tighter limits."""
    asked, kept, broken = limit, 0.0, math.inf  # limits of the model: to try, known to do, known not to do
    started = time.perf_counter()
    for _ in range(ATTEMPTS):
        columns = knapsack(costs, noises, asked)
        if columns is None:
            return
        candidate = search.candidate(tuple(DTYPES[c] for c in columns))
        room = limit / max(candidate.noise, 1e-30)  # above 1: single noises summed up to too much
        modelled = float(noises[np.arange(len(columns)), columns].sum())
        if room >= 1:
            kept = asked
            asked *= 0.9 * min(room, MOST_STEP)
        else:
            broken = asked
            asked = 0.9 * room * min(asked, modelled)
        if kept and broken < math.inf and not kept < asked < broken:
            asked = math.sqrt(kept * broken)
        if 1 <= room < CLOSE or broken < CLOSE * kept or time.perf_counter() - started > ATTEMPT_SECONDS:
            return


def _within_time(search: Search, costs: np.ndarray, noises: np.ndarray, limit: float) -> None:
    """Builds the most accurate choice that runs within `limit` microseconds."""
    asked = limit
    for _ in range(ATTEMPTS):
        columns = knapsack(noises, costs - min(0.0, float(costs.min())), asked)
        if columns is None:
            return
        built = search.candidate(tuple(DTYPES[c] for c in columns)).built
        us = speed.time_library(built.library, built.plan, layers=False)[1]
        if us <= limit:
            return
        asked *= 0.95 * limit / us


def _details(
    search: Search, options: Quantize, best: Candidate, costs: np.ndarray, noises: np.ndarray | None
) -> dict[str, Any]:
    """The `quantization` of report.json."""
    known, name = search.known, search.target.name
    measured: Mapping[Node, float] = {}
    if set(best.choice) != {"float32"}:
        try:
            measured, _ = quantization.signal_to_noise(known.graph, best.graph, best.quantizer, search.samples, name)
        except SkiveError as e:
            log.warning("%s: signal-to-noise ratios are not measured: %s", search.graph.name, e)
    layers = explanation.layers(known.graph, best.quantizer, known.observed, measured, options.keep)
    group_of = {p.label(): i for i, g in enumerate(search.groups) for p in g.products}
    for entry in layers:
        i = group_of.get(entry["name"])
        if i is None:
            continue
        entry["choices"] = {
            d: {"us": round(float(costs[i, k]), 3),
                "output_sqnr_db": None if noises is None else explanation.decibels(1.0, float(noises[i, k]))}
            for k, d in enumerate(DTYPES)
        }  # fmt: skip
        if entry["dtype"] == "float32" and entry.get("reason"):
            entry["reason"] = _why_float(dict(zip(DTYPES, costs[i], strict=True)))
    budget = {"us": options.budget_us} if options.budget_us else {"sqnr_db": options.budget_sqnr_db or BUDGET_DB}
    return {
        "dtype": "auto",
        "method": options.method,
        "samples": known.count,
        "options": {k: getattr(options, k) for k in quantization.REPORTED},
        "sqnr_db": best.sqnr_db,
        "auto": {
            "budget": budget,
            "chosen": best.name,
            "candidates": [
                {"choice": c.name, "us": round(c.us, 3) if c.us < math.inf else None, "sqnr_db": c.sqnr_db,
                 "layers": {d: sum(len(g.products) for g, t in zip(search.groups, c.choice, strict=True) if t == d)
                            for d in DTYPES}}
                for c in search.candidates.values()
            ],
        },
        "layers": layers,
    }  # fmt: skip


def _why_float(us: Mapping[str, float]) -> str:
    fastest = min(us["int8"], us["int16"])
    if us["float32"] <= fastest:
        return f"fastest in float32: {us['float32']:.1f} us, {us['int16']:.1f} in int16 and {us['int8']:.1f} in int8"
    return f"its noise does not fit the budget, and int16 would take {us['int16']:.1f} us, float32 {us['float32']:.1f}"
