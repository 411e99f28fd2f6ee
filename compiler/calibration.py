"""What the values of a float network look like on calibration data: ranges, histograms, channels.

The network runs as a compiled artefact with the wanted values as its outputs, one sample at a time;
each value is summarised and dropped. Memory does not depend on the number of samples, and the result
on nothing but their order.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from skive.errors import QuantizationError, ToolchainError
from skive.ir import Graph, Node

log = logging.getLogger("skive.calibration")

BINS = 4096  # of a histogram over [-limit, limit]
SUBSAMPLE = 32768  # elements of one value of one sample that enter its histogram and channel sums
FLAT = 0.02  # of the pixels are equal where an image has uniform parts,
FLAT_PIXELS = 1024  # among so many of one sample
SAVE_EVERY = 16  # samples between two saved states
STATE_FORMAT = 1
MOST_WORKERS = 8  # samples computed at the same time: each holds all its values

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


@dataclass
class Observation:
    """Summary of one value over all samples seen.

    `low` and `high` are exact. `histogram` counts a strided subsample in bins of equal width over
    [-limit, limit]; `limit` is a power of two: where a larger value comes, bins are merged in pairs and
    nothing is counted twice. `channel_*` run over the last axis: exact bounds, and sums over the
    subsample of `counted` rows.
    """

    low: float
    high: float
    limit: float
    histogram: np.ndarray  # [BINS] int64
    channel_low: np.ndarray  # [C] float32
    channel_high: np.ndarray  # [C] float32
    channel_sum: np.ndarray  # [C] float64
    channel_squares: np.ndarray  # [C] float64
    counted: int

    @classmethod
    def empty(cls, channels: int) -> Observation:
        """Nothing seen yet of a value with this many channels."""
        return cls(
            math.inf,
            -math.inf,
            0.0,
            np.zeros(BINS, np.int64),
            np.full(channels, np.inf, np.float32),
            np.full(channels, -np.inf, np.float32),
            np.zeros(channels, np.float64),
            np.zeros(channels, np.float64),
            0,
        )

    @property
    def channel_mean(self) -> np.ndarray:
        """[C] mean of each channel over the subsample."""
        return self.channel_sum / max(1, self.counted)

    @property
    def mean_square(self) -> float:
        return float(self.channel_squares.sum()) / max(1, self.counted * len(self.channel_sum))

    @property
    def channel_magnitude(self) -> np.ndarray:
        """[C] the largest |x| seen in each channel."""
        return np.maximum(np.abs(self.channel_low), np.abs(self.channel_high))

    @property
    def magnitude(self) -> float:
        """The largest |x| seen."""
        return max(abs(self.low), abs(self.high))

    def scaled(self, factors: np.ndarray) -> Observation:
        """The observation of the same value with channel c multiplied by the positive `factors`[c].

        Bounds and sums are exact. The histogram is that of the old value stretched to the new bounds,
        which is what ranges other than min-max then rest on.
        """
        low, high = self.channel_low * factors, self.channel_high * factors
        lo, hi = float(low.min()), float(high.max())
        magnitude = max(abs(lo), abs(hi))
        stretch = magnitude / self.magnitude if self.magnitude else 1.0
        return replace(
            self,
            low=lo,
            high=hi,
            limit=self.limit * stretch,
            channel_low=low.astype(np.float32),
            channel_high=high.astype(np.float32),
            channel_sum=self.channel_sum * factors,
            channel_squares=self.channel_squares * factors**2,
        )

    def add(self, value: np.ndarray, turn: int) -> None:
        """Takes in one sample's `value`; `turn` shifts which rows the subsample takes."""
        rows = value.reshape(-1, len(self.channel_low))
        if not rows.size:
            return
        low, high = _bounds(rows)
        if not (math.isfinite(float(low.min())) and math.isfinite(float(high.max()))):
            raise QuantizationError("the float network gives NaN or infinity on the calibration data")
        np.minimum(self.channel_low, low, out=self.channel_low)
        np.maximum(self.channel_high, high, out=self.channel_high)
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        # An odd stride visits every phase of an image whose width is a power of two.
        stride = max(1, rows.size // SUBSAMPLE) | 1
        part = rows[(turn * 7919) % min(stride, len(rows)) :: stride]
        self.channel_sum += part.sum(0, dtype=np.float64)
        self.channel_squares += np.einsum("ij,ij->j", part, part, dtype=np.float64)
        self.counted += len(part)
        self._reserve(self.magnitude)
        if self.limit:
            places = np.multiply(part, np.float32(BINS / (2 * self.limit)), dtype=np.float32).reshape(-1)
            places = np.clip(places + np.float32(BINS // 2), 0, BINS - 1).astype(np.int32)
            self.histogram += np.bincount(places, minlength=BINS)

    def _reserve(self, magnitude: float) -> None:
        """Doubles `limit` until `magnitude` lies inside."""
        if magnitude <= self.limit or magnitude < 1e-30:
            return
        wanted = 2.0 ** math.ceil(math.log2(magnitude))
        if self.limit == 0:
            self.histogram[BINS // 2] = self.histogram.sum()
            self.limit = wanted
            return
        while self.limit < wanted:
            pairs = self.histogram.reshape(-1, 2).sum(1)
            self.histogram[:] = 0
            self.histogram[BINS // 4 : BINS // 4 + BINS // 2] = pairs
            self.limit *= 2


def _bounds(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) of each column of [rows, C].

    Few channels are folded into rows of a few hundred first: numpy reduces long rows at memory speed.
    """
    n, c = rows.shape
    fold = max(1, 512 // c)
    while fold > 1 and n % fold:
        fold -= 1
    wide = rows.reshape(n // fold, fold * c)
    low, high = wide.min(0), wide.max(0)
    return low.reshape(fold, c).min(0), high.reshape(fold, c).max(0)


class Statistics:
    """Observations by node, with a file that lets an interrupted calibration go on."""

    def __init__(self, graph: Graph, values: Sequence[Node]):
        self.values = list(dict.fromkeys(values))
        self.observed = {v: Observation.empty(v.shape[-1] if v.shape else 1) for v in self.values}
        self.samples = 0
        self._digest = _digest(graph, self.values)

    def __getitem__(self, node: Node) -> Observation:
        return self.observed[node]

    def add(self, arrays: Sequence[np.ndarray]) -> None:
        """Takes in the values of one sample, in the order of `values`."""
        for value, array in zip(self.values, arrays, strict=True):
            try:
                self.observed[value].add(array, self.samples)
            except QuantizationError as e:
                raise QuantizationError(f"{value.label()}: {e}") from None
        self.samples += 1

    def save(self, path: str | Path) -> None:
        """Writes everything seen so far to `path` (.npz), whole or not at all."""
        path = Path(path)
        arrays: dict[str, np.ndarray] = {
            "about": np.array([STATE_FORMAT, self.samples], np.int64),
            "digest": np.array(self._digest),
        }
        for i, v in enumerate(self.values):
            o = self.observed[v]
            arrays[f"numbers{i}"] = np.array([o.low, o.high, o.limit, o.counted], np.float64)
            arrays[f"histogram{i}"] = o.histogram
            arrays[f"channels{i}"] = np.stack(
                [o.channel_low, o.channel_high, o.channel_sum, o.channel_squares], dtype=np.float64
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as f:
            np.savez(f, **arrays)  # type: ignore[arg-type]
        os.replace(f.name, path)

    def load(self, path: str | Path) -> bool:
        """Takes over a saved state; False if it is of another network, other values or damaged."""
        try:
            with np.load(path, allow_pickle=False) as a:
                form, samples = a["about"]
                if form != STATE_FORMAT or str(a["digest"]) != self._digest:
                    return False
                loaded = {}
                for i, v in enumerate(self.values):
                    low, high, limit, counted = a[f"numbers{i}"].tolist()
                    channels = a[f"channels{i}"]
                    loaded[v] = Observation(
                        low,
                        high,
                        limit,
                        a[f"histogram{i}"].copy(),
                        channels[0].astype(np.float32),
                        channels[1].astype(np.float32),
                        channels[2].copy(),
                        channels[3].copy(),
                        int(counted),
                    )
        except Exception as e:  # noqa: BLE001 - numpy's reader raises whatever the damage leads to
            log.warning("%s: not a calibration state (%s); starting anew", path, e)
            return False
        self.observed, self.samples = loaded, int(samples)
        return True


def _digest(graph: Graph, values: Sequence[Node]) -> str:
    """SHA-256 over structure and weights of the part of `graph` that `values` depend on."""
    from skive.check import prefix
    from skive.text import print_graph

    h = hashlib.sha256(print_graph(prefix(graph, values)).encode())
    for node in graph.nodes:
        if node.is_const:
            h.update(np.ascontiguousarray(node.value).data)
    return h.hexdigest()


def runner(
    graph: Graph,
    values: Sequence[Node],
    *,
    also: Sequence[Node] = (),
    threads: int = 1,
    target: str = "host",
    pipeline: Sequence[str] | None = None,
) -> Run:
    """A call that maps a sample to the arrays of `values`, compiled; by the numpy reference where there is no
    C++ compiler. Values that are inputs or constants are allowed.

    `also`: values that the artefact computes as well. Runners of one network with the same values in all
    consist of the same code, which is compiled once. `pipeline`: the passes before lowering, FUSED if None.
    """
    from skive import check, passes
    from skive.pipeline import PassManager
    from skive.reference import evaluate_graph

    inputs = {node: i for i, node in enumerate(graph.inputs)}
    wanted = dict.fromkeys([*values, *also])
    # In the order of the graph, which is that of its code; then what is built on it.
    ordered = [*(n for n in graph.nodes if n in wanted), *(v for v in wanted if v not in graph.users)]
    computed = [v for v in ordered if v not in inputs and not v.is_const]
    run: Run = lambda sample: ()  # noqa: E731
    if computed:
        part = replace(check.prefix(graph, computed), batch_max=None)  # its name: most kernels are the artefact's
        try:
            fused, _ = PassManager().run(part, pipeline or passes.FUSED, check="never")
            run = _compiled(fused, target, threads)
        except ToolchainError as e:
            log.warning("calibrating with the numpy reference, which is slow: %s", e)
            run = lambda sample: evaluate_graph(part, sample)  # noqa: E731
    place = {node: i for i, node in enumerate(computed)}

    def call(sample: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        results = run(sample)
        return [
            sample[inputs[v]] if v in inputs else v.value if v.is_const else np.asarray(results[place[v]])
            for v in values
        ]

    return call


def _compiled(graph: Graph, target: str, threads: int) -> Run:
    from skive import _native
    from skive.execute import run_graph
    from skive.targets.base import resolve

    return run_graph(graph, resolve(target, _native.cpu_features()), threads)


def observe(
    graph: Graph,
    values: Sequence[Node],
    samples: Iterable[Sequence[np.ndarray]],
    *,
    also: Sequence[Node] = (),
    target: str = "host",
    state: str | Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Statistics of `values` of the float graph `graph` over `samples`.

    As many samples are computed at once as there are cores, one thread each: an image of its own needs
    no barrier between layers. They are summarised in their order. `state`: a file to continue from and
    to save to. `also`: as for `runner`. `progress(done)` is called after each sample. QuantizationError if
    there is no sample or a value is not finite.
    """
    statistics = Statistics(graph, values)
    if state is not None and Path(state).exists():
        statistics.load(state)
    done = statistics.samples
    run = runner(graph, statistics.values, also=also, target=target)
    workers = max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS))
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Sequence[np.ndarray]]] = deque()

        def finish_one() -> None:
            statistics.add(pending.popleft().result())
            if state is not None and statistics.samples % SAVE_EVERY == 0:
                statistics.save(state)
            progress(statistics.samples)

        for sample in itertools.islice(iter(samples), done, None):
            pending.append(pool.submit(run, sample))
            if len(pending) > workers:
                finish_one()
        while pending:
            finish_one()
    if not statistics.samples:
        raise QuantizationError("the calibration data holds no sample")
    if state is not None and statistics.samples != done:
        statistics.save(state)
    return statistics


# ----------------------------------------------------------------------------------- uniform parts


def flat_parts(
    run: Run, observed: Mapping[Node, Observation], samples: Iterable[Sequence[np.ndarray]]
) -> dict[Node, np.ndarray]:
    """By value [C] float32, the pixel that recurs most often in its images [N, H, W, C], where it is at least FLAT
    of all pixels; NaN for channels that are exactly 0 more often.

    `run` gives the values of `observed`, in order, for each of the `samples`. Letterboxing leaves such parts, and
    silence, black borders and paper do. Pixels count as equal if they differ by less than one in 2^20.
    """
    names: dict[Node, list[np.ndarray]] = {v: [] for v in observed}  # of pixels: one number stands for all channels
    zeros = {v: np.zeros(len(o.channel_low), np.int64) for v, o in observed.items()}
    frequent: dict[Node, dict[float, np.ndarray]] = {v: {} for v in observed}  # the most frequent pixel of each sample
    for turn, sample in enumerate(samples):
        for (v, o), x in zip(observed.items(), run(sample), strict=True):
            rows = x.reshape(-1, x.shape[-1])
            stride = max(1, len(rows) // FLAT_PIXELS) | 1
            rows = rows[turn % stride :: stride].astype(np.float64)
            mixed = rows @ np.random.default_rng(0).standard_normal(rows.shape[1])
            names[v].append(np.rint(mixed * (2**20 / max(o.magnitude, 1e-30))))
            zeros[v] += (rows == 0).sum(0)
            values, first, counts = np.unique(names[v][-1], return_index=True, return_counts=True)
            if len(values):
                frequent[v].setdefault(values[counts.argmax()], rows[first[counts.argmax()]])
    found: dict[Node, np.ndarray] = {}
    for v in observed:
        every = np.concatenate(names[v])
        values, counts = np.unique(every, return_counts=True)
        if counts.max(initial=0) < FLAT * len(every) or values[counts.argmax()] not in frequent[v]:
            continue
        pixel = frequent[v][values[counts.argmax()]]
        found[v] = np.where(zeros[v] > counts.max(), np.nan, pixel).astype(np.float32)
    return found


# ----------------------------------------------------------------------------------------- ranges


def value_range(o: Observation, method: str, *, percentile: float = 99.99, levels: int = 256) -> tuple[float, float]:
    """(low, high) of the interval that `levels` integers are spread over; it contains 0.

    `minmax`: everything seen. `percentile`: without the outermost (100 - percentile) per cent.
    `mse`: the interval inside the bounds with the least expected squared error of rounding and
    saturation. `entropy`: that with the least Kullback-Leibler divergence between the histogram and its
    rounded form (Migacz, 8-bit Inference with TensorRT, 2017).
    """
    low, high = min(0.0, o.low), max(0.0, o.high)
    if o.counted == 0 or not math.isfinite(low + high):
        return 0.0, 0.0
    if method == "minmax" or o.limit == 0 or high - low <= 0:
        return low, high
    width = 2 * o.limit / BINS
    centres = (np.arange(BINS) + 0.5) * width - o.limit
    counts = o.histogram.astype(np.float64)
    if method == "percentile":
        share = np.cumsum(counts) / counts.sum()
        cut = (100 - percentile) / 100
        first = int(np.searchsorted(share, cut / 2, "right")) if low < 0 else 0
        last = int(np.searchsorted(share, 1 - (cut / 2 if low < 0 else cut), "left"))
        top = float(centres[min(last, BINS - 1)]) + width / 2
        return max(low, min(0.0, float(centres[first]) - width / 2)), min(high, max(0.0, top))
    best, chosen = math.inf, (low, high)
    for share in np.concatenate([np.linspace(1.0, 0.3, 36), np.linspace(0.28, 0.04, 13)]):
        lo, hi = low * share, high * share
        loss = (_squared_error if method == "mse" else _divergence)(counts, centres, width, lo, hi, levels)
        if loss < best * (1 - 1e-6):
            best, chosen = loss, (float(lo), float(hi))
    return chosen


def narrowing_gain_db(o: Observation, levels: int = 256) -> float:
    """By how much the range of least squared error lowers the noise of a value against its whole range, in dB."""
    if o.counted == 0 or o.limit == 0 or o.high - o.low <= 0:
        return 0.0
    width = 2 * o.limit / BINS
    centres, counts = (np.arange(BINS) + 0.5) * width - o.limit, o.histogram.astype(np.float64)
    whole, best = (_squared_error(counts, centres, width, *value_range(o, m, levels=levels), levels)
                   for m in ("minmax", "mse"))
    return 10 * math.log10(whole / best) if whole > 0 and best > 0 else 0.0


def _squared_error(counts: np.ndarray, centres: np.ndarray, width: float, lo: float, hi: float, levels: int) -> float:
    """Expected squared error of a uniform quantizer of `levels` steps over [lo, hi]."""
    step = (hi - lo) / (levels - 1)
    beyond = np.maximum(np.maximum(lo - centres, centres - hi), 0.0)
    inside = beyond == 0
    # Rounding loses step^2 / 12 where a bin is wide against a step, and 0 is exact in any case.
    zero = (np.abs(centres) < width) & (centres >= 0)
    rounding = step * step / 12
    return float(np.sum(counts * np.where(inside, np.where(zero, 0.0, rounding), beyond * beyond)))


def _divergence(counts: np.ndarray, centres: np.ndarray, width: float, lo: float, hi: float, levels: int) -> float:
    """KL divergence of the histogram, clipped to [lo, hi], from its form with `levels` levels."""
    inside = (centres >= lo) & (centres <= hi)
    # The bin of 0 holds the zeros of a ReLU, which every quantizer keeps exactly: they decide nothing.
    inside_zero = np.abs(centres) < width
    reference = np.where(inside & ~inside_zero, counts, 0.0)
    if reference.sum() == 0:
        return math.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    outside = np.where(inside | inside_zero, 0.0, counts)
    clipped = reference.copy()
    clipped[first] += outside[:first].sum()
    clipped[last] += outside[last + 1 :].sum()
    level = np.rint((centres - lo) / max(hi - lo, 1e-30) * (levels - 1)).astype(np.int64)
    level = np.clip(level, 0, levels - 1)
    used = reference > 0
    mass = np.bincount(level, weights=reference, minlength=levels)
    bins = np.bincount(level, weights=used.astype(np.float64), minlength=levels)
    spread = np.where(used, mass[level] / np.maximum(bins[level], 1), 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-30)
    with np.errstate(all="ignore"):
        terms = np.where(p > 0, p * np.log(p / np.maximum(q, 1e-12)), 0.0)
    return float(terms.sum())
