"""`skive.Quantize`: what is asked for when a model becomes fixed point, and the calibration data.

The work is done elsewhere: `calibration` observes the float network, `passes/quantize` writes
the graph with integers, `apply` here drives both.
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import explanation
from skive.check import has_roundings
from skive.errors import QuantizationError, UnsupportedOpError
from skive.ir import Graph, Node
from skive.pipeline import require_matches, total_macs
from skive.samples import Sample, Samples, fingerprint

if TYPE_CHECKING:
    from skive.calibration import Observation
    from skive.passes.quantize import Quantizer, Storage
    from skive.targets.base import Target

log = logging.getLogger("skive.quantization")

DTYPES = ("int8", "int16", "auto", "weights8", "weights4")
WEIGHT_ONLY = frozenset({"weights8", "weights4"})  # activations stay float32, no data is needed
METHODS = ("minmax", "percentile", "mse", "entropy")
ROUNDINGS = ("nearest", "adaround")
REPORTED = ("per_channel", "integer_only", "bias_correction", "equalise", "rounding", "smooth")
ROUNDING_SAMPLES = 32  # whose activations decide which weights are rounded up
FLAT_SAMPLES = 16  # at least, in which uniform parts of images are looked for
MEASURED = 8  # samples, at least, on which the quantized network is compared with the float one,
MEASURED_MACS = 4_000_000_000  # and as many more as this work allows

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Quantize:
    """How to quantize. Checked when it is made: QuantizationError says which value cannot be.

    `calibration`: inputs the network meets in use, unlabelled. An array (samples along dimension 0),
    a dict of such arrays by input name, a path to an `.npz` (`file.npz:KEY` picks an array), to an
    `.npy` or to a folder of them, or any iterable of samples (array, tuple, or dict by name); what can
    be read once only is kept on disk, never in memory. `samples`: how many are used, spread evenly over
    what has a length, the first ones of what has none. `method`: how ranges follow from what was
    observed; `percentile` belongs to the method of that name. `per_channel`: one weight scale per output
    channel. `integer_only`: no float instruction in the artefact, whose inputs and outputs are then integers
    with a scale and a zero point. `keep`: patterns of layer names that stay float32. `bias_correction`, `equalise` and
    `rounding` (Nagel et al., Data-Free Quantization, 2019, and Up or Down?, 2020), `smooth`, the
    migration strength behind normalisations (Xiao et al., SmoothQuant, 2023; None: found for each of
    them, 0: none): see the passes of these names. `state`: a file that holds what was observed, so that
    calibration continues where it was interrupted.

    With "weights8" and "weights4" only weights become integers, and `calibration` may be None. `block`: weights
    of a channel that share a scale, a multiple of 8 (None: 64 of 4 bits, all of 8 bits). `activations`: 16, or 8
    bits to which each row of activations is rounded as it is read, or 32 for float32 arithmetic.
    """

    dtype: str = "int8"
    calibration: Any = field(default=None, compare=False, repr=False)
    method: str = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    integer_only: bool = False
    keep: tuple[str, ...] = ()
    bias_correction: bool = True
    equalise: bool = True
    rounding: str = "adaround"
    smooth: float | None = None
    samples: int = 256
    state: str | Path | None = None
    budget_sqnr_db: float | None = None
    budget_us: float | None = None
    block: int | None = None
    activations: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("method", METHODS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise QuantizationError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}")
        if self.integer_only and (self.dtype != "int8" or self.keep):
            what = f"dtype is {self.dtype!r}" if self.dtype != "int8" else "keep names layers that stay float32"
            raise QuantizationError(f"{what}; integer_only goes with int8 and keeps nothing")
        if not 50 < self.percentile <= 100:
            raise QuantizationError(f"percentile is {self.percentile!r}, not above 50 and at most 100")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise QuantizationError(f"smooth is {self.smooth!r}, not 0 to 1")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise QuantizationError(f"samples is {self.samples!r}, not a positive number")
        for name in ("budget_sqnr_db", "budget_us"):
            value = getattr(self, name)
            if value is not None and not (self.dtype == "auto" and 0 < value < np.inf):
                raise QuantizationError(f"{name} is {value!r}; a positive limit goes with dtype 'auto'")
        if self.budget_sqnr_db is not None and self.budget_us is not None:
            raise QuantizationError("budget_sqnr_db and budget_us exclude each other: give one of them")
        if self.block is not None and not (self.dtype in WEIGHT_ONLY and self.block > 0 and self.block % 8 == 0):
            raise QuantizationError(f"block is {self.block!r}; a multiple of 8 goes with weights8 and weights4")
        if self.activations not in (8, 16, 32) or (self.activations != 16 and self.dtype not in WEIGHT_ONLY):
            raise QuantizationError(f"activations is {self.activations!r}; 8, 16 or 32 goes with weights8 and weights4")
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", (self.keep,))
        object.__setattr__(self, "keep", tuple(self.keep))

    def keeps(self, node: Node) -> bool:
        """True if the layer of `node` is to stay float32."""
        return any(fnmatch.fnmatchcase(name, p) for p in self.keep for name in (node.origin, node.name) if name)

    def storage(self, graph: Graph) -> Storage:
        """What of the float `graph` is stored as integers."""
        from skive.passes.integer_only import Storage as IntegerStorage
        from skive.passes.quantize import Storage

        return (IntegerStorage if self.integer_only else Storage)(graph, self.keeps)

    def data(self, graph: Graph) -> Samples:
        """The calibration samples for `graph`; the same object again for inputs of the same names and types,
        so that data which can be read only once is read once."""
        key = tuple((i.name, i.type) for i in graph.inputs)
        known: dict[Any, Samples] = self.__dict__.setdefault("_data", {})
        if key not in known:
            known[key] = Samples(graph, self.calibration, self.samples)
        return known[key]

    def options(self) -> dict[str, Any]:
        """All but the data and where its observation is kept, as plain values."""
        return {k: v for k, v in self.__dict__.items() if k not in ("calibration", "state", "_data")}

    def fingerprint(self) -> str | None:
        """Equal for equal options and data; None for data that can be read only once or cannot be hashed."""
        return fingerprint(self.options(), self.calibration)


def requested(value: Quantize | str) -> Quantize:
    """`value` as a Quantize: the name of an element type stands for its defaults."""
    if isinstance(value, Quantize):
        return value
    if isinstance(value, str):
        return Quantize(value)
    raise QuantizationError(f"quantize is {value!r}; give one of {', '.join(DTYPES)} or a skive.Quantize")


# ------------------------------------------------------------------------------------------ apply


@dataclass(frozen=True)
class Calibrated:
    """A float network, balanced where that was asked for, and what its values look like: all that fixed point
    in any element type follows from. `room`: by how much ranges of balanced values are widened; `flat`: what uniform
    parts of images hold."""

    graph: Graph
    samples: Samples
    observed: Mapping[Node, Observation]
    room: Mapping[Node, float]
    count: int  # samples seen
    target: str
    flat: Mapping[Node, np.ndarray] = field(default_factory=dict)

    def quantizer(
        self,
        options: Quantize,
        dtype: str,
        *,
        dtypes: Mapping[Node, str] | None = None,
        keep: Callable[[Node], bool] | None = None,
        like: Sequence[Quantizer] = (),
    ) -> Quantizer:
        """The network in `dtype`; `dtypes`: of single contractions, where it is another; `keep`: what stays
        float32; `like`: quantizers whose roundings and biases are taken over where a layer has the same
        formats."""
        from skive import calibration
        from skive.passes.quantize import Quantizer, Scheme, Storage

        keep = keep or options.keeps
        attention = "int16" not in {dtype, *(dtypes or {}).values()}
        storage, observed = Storage(self.graph, keep, attention), self.observed
        if options.integer_only:
            storage = options.storage(self.graph)
        levels = 256 if dtype == "int8" else 65536
        ranges = {}
        for v in filter(observed.__contains__, storage.sources):
            lo, hi = calibration.value_range(observed[v], options.method, percentile=options.percentile, levels=levels)
            ranges[v] = lo * self.room.get(v, 1.0), hi * self.room.get(v, 1.0)
        scheme = Scheme(
            ranges,
            dtype,
            options.per_channel,
            keep,
            {v: observed[v].mean_square for v in ranges},
            dtypes=dtypes or {},
            flat=self.flat,
        )
        if options.bias_correction:
            scheme.biases = _corrected_biases(Quantizer(self.graph, scheme, storage), observed)
        if like:
            _take_over(Quantizer(self.graph, scheme, storage), like)
        elif options.rounding == "adaround" and options.dtype == "int8":
            from skive import rounding

            draft = Quantizer(self.graph, scheme, storage)
            inputs = [n.inputs[0] for n in draft.layers]
            run = calibration.runner(self.graph, inputs, also=_every_value(self.graph), target=self.target)
            few = itertools.islice(iter(self.samples), ROUNDING_SAMPLES)
            scheme.rounded, biases = rounding.adapt(draft, run, few)
            if options.bias_correction:
                scheme.biases = {**scheme.biases, **biases}
        return Quantizer(self.graph, scheme, storage)


def _take_over(draft: Quantizer, like: Sequence[Quantizer]) -> None:
    """Weights and biases of layers that have the same formats in one of `like`, into the scheme of `draft`."""
    rounded, biases = dict(draft.scheme.rounded), dict(draft.scheme.biases)
    for node, layer in draft.layers.items():
        for other in like:
            theirs = other.layers.get(node)
            if (
                theirs is not None
                and other.format_of(node.inputs[0]) == draft.format_of(node.inputs[0])
                and np.array_equal(theirs.scales, layer.scales)
            ):
                rounded[node] = theirs.weights
                if node in other.scheme.biases:
                    biases[node] = other.scheme.biases[node]
    draft.scheme.rounded, draft.scheme.biases = rounded, biases


def _every_value(graph: Graph) -> list[Node]:
    """The values that some step of quantization wants to see: one artefact serves all of them."""
    from skive.passes.quantize import Storage

    stored = Storage(graph).stored
    return [n for n in graph.nodes if n in stored or (graph.is_output(n) and n.dtype.is_float and n.type.size)]


def calibrated(graph: Graph, options: Quantize, progress: Progress, target: str) -> Calibrated:
    """The canonical float `graph` observed on the calibration data, its recurrent layers split. QuantizationError if
    there is no data or nothing to quantize."""
    from skive import calibration
    from skive.passes.fuse_elementwise import is_elementwise
    from skive.passes.quantize import Storage
    from skive.passes.split_recurrences import recurrences_split

    if not options.integer_only:
        graph = recurrences_split(graph, options.keeps)
    storage = options.storage(graph)
    if not storage.products:
        raise QuantizationError(f"{graph.name}: no layer can be computed in integers: {_why_nothing(graph, options)}")
    samples = options.data(graph)
    total = len(samples) or options.samples

    def done(count: int) -> None:
        progress("calibrate", 0.1 + 0.1 * count / total)

    sources = list(dict.fromkeys([*storage.sources, *Storage(graph, options.keeps, attention=False).sources]))
    statistics = calibration.observe(
        graph, sources, samples, also=_every_value(graph), target=target, state=options.state, progress=done
    )
    observed: Mapping[Node, Observation] = statistics.observed
    room: dict[Node, float] = {}
    if options.equalise or options.smooth != 0:
        graph, observed, room = _equalised(graph, storage, observed, options)
    flat: dict[Node, np.ndarray] = {}
    signed = [v for v in Storage(graph, options.keeps).sources if v.type.rank == 4 and is_elementwise(v)
              and v in observed and observed[v].low < 0]
    if signed and not options.integer_only:
        run = calibration.runner(graph, signed, also=_every_value(graph), target=target)
        chosen = itertools.islice(iter(samples), 0, None, max(1, statistics.samples // FLAT_SAMPLES))
        flat = calibration.flat_parts(run, {v: observed[v] for v in signed}, chosen)
        log.info("%s: %d values have uniform parts", graph.name, len(flat))
    return Calibrated(graph, samples, observed, room, statistics.samples, target, flat)


def _why_nothing(graph: Graph, options: Quantize) -> str:
    """The reason that `graph` has no layer to quantize, and what to do."""
    if has_roundings(graph):
        return "the model comes quantized; leave quantize out, it computes in integers as it is"
    if options.keep:
        return "keep names every one of them; narrow its patterns"
    return ("these are convolutions, fully connected layers, LSTM and GRU layers with constant weights; "
            "leave quantize out")


def apply(
    graph: Graph,
    options: Quantize,
    progress: Progress = lambda step, fraction: None,
    *,
    target: Target | str = "host",  # of the artefact to come, as are the threads: what "auto" measures
    threads: int = 1,
    measure: bool = True,
) -> tuple[Graph, dict[str, Any]]:
    """(the canonical float `graph` in fixed point, the `quantization` of report.json).

    Deterministic: the same graph, options and data give the same graph. With `measure` the quantized
    network runs beside the float one on MEASURED samples. QuantizationError if there is no data or nothing
    to quantize.
    """
    require_matches(graph, options.keep, QuantizationError)
    if options.dtype == "auto":
        from skive import mixed_precision

        return mixed_precision.apply(graph, options, progress, target=target, threads=threads)
    if options.dtype in WEIGHT_ONLY:
        from skive import compression

        return compression.apply(graph, options, progress, measure)
    # Always the best code that runs here: the graph must not depend on what it is compiled for (the last bits
    # of float sums do), and another processor's code may not run at all.
    name = "host"
    if options.integer_only:
        from skive.passes.integer_only import prepared, require_integer_forms

        graph = prepared(graph)
        require_integer_forms(graph)  # before the data is looked at
    known = calibrated(graph, options, progress, name)
    quantizer = known.quantizer(options, options.dtype)
    quantized = quantizer.build()
    progress("quantized", 0.2)
    details: dict[str, Any] = {"dtype": options.dtype, "method": options.method, "samples": known.count}
    details["options"] = {k: getattr(options, k) for k in REPORTED}
    details["sqnr_db"] = None
    measured: dict[Node, float] = {}
    if measure:
        chosen = measured_samples(graph, known)
        details["measured_samples"] = len(chosen)
        try:
            measured, details["sqnr_db"] = signal_to_noise(known.graph, quantized, quantizer, chosen, name)
        except UnsupportedOpError as e:
            log.warning("%s: signal-to-noise ratios are not measured: %s", graph.name, e)
    if options.integer_only:
        details["ports"] = {
            side: [_port(quantizer, v) for v in getattr(known.graph, side)] for side in ("inputs", "outputs")
        }
    details["layers"] = explanation.layers(known.graph, quantizer, known.observed, measured, options.keep)
    return quantized, details


def _port(quantizer: Quantizer, value: Node) -> dict[str, float | int] | None:
    """real = scale (integer - zero) of an input or output that is integers; None of another."""
    if value not in quantizer.integers:
        return None
    form = quantizer.format_of(value)
    return {"scale": form.scale, "zero": form.zero}


def measured_samples(graph: Graph, known: Calibrated) -> list[Sample]:
    """The samples on which a quantized `graph` is compared with the float one, spread over the calibration data.

    MEASURED of a large network. Of a small one many: the noise of a softmax is that of its hardest samples.
    """
    most = min(known.count, max(MEASURED, MEASURED_MACS // max(1, total_macs(graph))))
    return list(itertools.islice(iter(known.samples), 0, None, known.count // most))[:most]


def _equalised(
    graph: Graph, storage: Storage, observed: Mapping[Node, Observation], options: Quantize
) -> tuple[Graph, dict[Node, Observation], dict[Node, float]]:
    """`graph` with balanced channels, what was observed in terms of its values, and by how much the ranges of
    balanced values are widened."""
    from skive.passes.equalise import HEADROOM, STRENGTHS, Channels, equalised

    bytes_ = 2 if options.dtype == "int16" else 1
    channels = {
        v: Channels(o.channel_magnitude, o.channel_squares / max(1, o.counted))
        for v, o in observed.items()
        if v.op != "input"
    }
    result = equalised(
        graph,
        storage,
        channels,
        norms=STRENGTHS if options.smooth is None else (options.smooth,) if options.smooth else (),
        convolutions=options.equalise,
        multiply=not options.integer_only,  # behind a table it would take a rounding of its own
        bytes_=bytes_,
    )
    moved, room = {}, {}
    for v, o in observed.items():
        moved[result.node[v]] = o.scaled(result.factors[v]) if v in result.factors else o
        if v in result.balanced:
            room[result.node[v]] = HEADROOM[bytes_]
    log.info("%s: channels of %d of %d values balanced", graph.name, len(room), len(observed))
    return result.graph, moved, room


def _channel_mean(value: Node, observed: Mapping[Node, Observation]) -> np.ndarray | None:
    """[C] mean of each channel of `value`, None if moves that rearrange channels made it."""
    if value in observed:
        return observed[value].channel_mean
    if value.op == "concat" and value.attrs["axis"] % value.type.rank == value.type.rank - 1:
        parts = [_channel_mean(i, observed) for i in value.inputs]
        known = [p for p in parts if p is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    return None


def _corrected_biases(quantizer: Quantizer, observed: Mapping[Node, Observation]) -> dict[Node, np.ndarray]:
    """The bias of each layer less what rounding its weights adds to the mean of its sums.

    Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, 2019, with the
    means of the inputs observed instead of derived.
    """
    found: dict[Node, np.ndarray] = {}
    for node, layer in quantizer.layers.items():
        mean = _channel_mean(node.inputs[0], observed)
        groups = node.attrs.get("groups", 1)
        if mean is None:
            continue
        error = layer.real_weights.astype(np.float64) - node.inputs[1].value
        taps = error.reshape(groups, error.shape[0] // groups, -1, error.shape[-1]).sum(2)  # [G, OC/G, IC/G]
        shift = np.einsum("goi,gi->go", taps, mean.reshape(groups, -1)).reshape(-1)
        bias = node.inputs[2].value if len(node.inputs) > 2 else np.zeros(error.shape[0])
        found[node] = (bias - shift).astype(np.float32)
    return found


def signal_to_noise(
    graph: Graph, quantized: Graph, quantizer: Quantizer, samples: Sequence[Sample], target: str
) -> tuple[dict[Node, float], float | None]:
    """(dB of each stored value of `graph` in the quantized network, the smallest dB of the outputs)."""
    from skive import calibration, passes

    whole = quantizer.storage.integer_only
    stored = [v for v in quantizer.integers if v.op != "input"]
    wanted = [o for o in graph.outputs if o.dtype.is_float and o.type.size]
    pairs = [(o, q) for o, q in zip(graph.outputs, quantized.outputs, strict=True) if o in wanted]
    values = [*stored, *(o for o, _ in pairs)]
    float_run = calibration.runner(graph, values, also=_every_value(graph), target=target)
    fixed_run = calibration.runner(
        quantized,
        [*(quantizer.integers[v] for v in stored), *(q for _, q in pairs)],
        target=target,
        pipeline=passes.INTEGER_ONLY if whole else passes.FUSED,
    )
    forms = [quantizer.format_of(v) for v in (*stored, *(o for o, _ in pairs if whole))]
    entries = [quantizer.format_of(i) if i in quantizer.integers and whole else None for i in graph.inputs]
    signal, noise = np.zeros(len(stored) + len(pairs)), np.zeros(len(stored) + len(pairs))
    for sample in samples:
        given = [f.integers(a).astype(f.dtype.numpy) if f else a for a, f in zip(sample, entries, strict=True)]
        want, got = float_run(sample), fixed_run(given)
        for i, (w, g) in enumerate(zip(want, got, strict=True)):
            if i < len(forms):
                g = (g.astype(np.int32) - forms[i].zero) * np.float32(forms[i].scale)
                offset = quantizer.offset_of(stored[i]) if i < len(stored) else None
                g = g if offset is None else g - offset
            difference = (g - w).reshape(-1)
            flat = w.reshape(-1)
            signal[i] += float(np.vdot(flat, flat))
            noise[i] += float(np.vdot(difference, difference))
    decibels = [explanation.decibels(s, n) for s, n in zip(signal, noise, strict=True)]
    return dict(zip(stored, decibels)), min(decibels[len(stored) :], default=None)
