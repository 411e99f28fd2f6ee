"""How long kernels take on this processor: a table of measured calls, and forecasts from it.

What is timed is what lowering would emit. A network is lowered in float32, int8 and int16, with guessed
value ranges, as speed hardly depends on them; the kernel calls that the table does not know are compiled
and timed one by one, in the order of the network, so that operands are as warm as they will be. What
there is no time to compile is interpolated from the nearest shapes of the same kernel.

Yang et al. (SpaceEvo: Hardware-Friendly Search Space Design for Efficient INT8 Inference, 2023)
measure that some operators lose by INT8; a table per operator and machine says which.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import skive
from skive import _native, build, kernels, ops, profiling
from skive.emit import cxx
from skive.errors import SkiveError
from skive.ir import Graph, Node, constant
from skive.lower import lower
from skive.plan import Call, Plan
from skive.runtime import TensorInfo
from skive.targets.base import Target, resolve
from skive.types import DType

log = logging.getLogger("skive.speed")

DTYPES = ("float32", "int8", "int16")
WEIGHTS = "weights8"  # forecast as well where some weights can be compressed
# A machine that others use too makes some rounds slower, never faster: a low quantile of the rounds is
# what a network takes when it is left alone.
QUANTILE = 0.1
ROUND_SECONDS = 1.0  # measuring of one network in one element type, compiling apart
COMPILED_PER_SECOND = 2.0  # kernels, until it is known
NEIGHBOURS = 4
CALL_US = 0.05  # what any call costs
LOSES = 1.05  # a layer loses by INT8 if it takes this many times its float32 time,
LOSES_US = 0.3  # and this much longer
PAYS = 1.2  # times as fast, from which compressed weights are worth telling
MEMORY_BOUND = 0.5  # share of a layer's time in which its bytes could be moved

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured call."""

    us: float
    macs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What this processor reaches with skive's own kernels, on one core."""

    float32: float  # GMAC/s
    int8: float
    int16: float
    memory: float  # GB/s, operands beyond the second-level cache

    def macs_of(self, dtype: str) -> float:
        return {"float": self.float32, "uint8_t": self.int8, "int8_t": self.int8, "int16_t": self.int16}.get(
            dtype, self.float32
        )


def _operand_type(call: Call, name: str) -> str:
    return next((a.ctype for a in call.args if a.name == name), "")


def signature(call: Call) -> str:
    """Text that is equal for calls that take equally long: kernel, shapes, types, fused steps.

    Scales, zero points and bounds do not matter, addresses neither.
    """
    template = list(call.template)
    if _operand_type(call, "x") in ("uint8_t", "int16_t") and call.op in (
        "conv2d",
        "linear",
        "conv_transpose2d",
        "sum_pool2d",
    ):
        template = template[:-1]  # the zero point
    types = ",".join(a.ctype.replace("_t", "") for a in call.args)
    text = f"{call.kernel}<{', '.join(template)}>({types})"
    if call.fn and call.fn.steps:
        operands = ",".join(f"{a.mode}{a.stride or ''}" for a in call.fn.operands)
        text += " " + ";".join(f"{s.name}({','.join(s.args)})" for s in call.fn.steps) + f" on {operands}"
    return text + (f" for {call.samples} samples" if call.samples > 1 else "")


class SpeedTable:
    """Measured calls of this processor, compiler and version of the kernels; kept in the cache folder."""

    def __init__(self, target: Target, threads: int = 1, folder: Path | None = None):
        self.target, self.threads = target, threads
        command = build.compiler()
        about = [
            cpu(),
            target.name,
            str(threads),
            skive.__version__,
            kernels.headers_hash(),
            *command,
            build.compiler_version(command),
            *build.user_flags(),
        ]
        self.key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:20]
        self.path = (folder or build.cache_dir() / "speed") / f"{self.key}.json"
        self.rows: dict[str, Row] = {}
        self._limits: Limits | None = None
        self._families: dict[tuple[str, ...], list[Row]] = {}
        self._grouped = 0  # rows that `_families` holds
        self._read()

    def __contains__(self, call: Call) -> bool:
        return signature(call) in self.rows

    def add(self, call: Call, us: float) -> None:
        self.rows[signature(call)] = Row(us, call.macs, call.bytes)

    def _read(self) -> None:
        """Takes in what the file holds; a damaged file is as good as none."""
        try:
            saved = json.loads(self.path.read_text())
            rows = {k: Row(float(u), int(m), int(b)) for k, (u, m, b) in saved["calls"].items()}
            limits = Limits(**saved["limits"]) if saved["limits"] else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return
        self.rows = {**rows, **self.rows}
        self._limits = self._limits or limits

    def save(self) -> None:
        """Writes the table, with what others have added to the file."""
        self._read()
        limits = {k: getattr(self._limits, k) for k in Limits.__slots__} if self._limits else None
        calls = {k: [round(r.us, 3), r.macs, r.bytes] for k, r in sorted(self.rows.items())}
        build.store_text(json.dumps({"cpu": cpu(), "limits": limits, "calls": calls}, indent=0), self.path)

    @property
    def limits(self) -> Limits:
        """Measured the first time that they are asked for."""
        if self._limits is None:
            self._limits = _measured_limits(self.target)
            self.save()
        return self._limits

    def bound(self, call: Call) -> float:
        """Microseconds below which the call cannot come: its multiplications, or its bytes."""
        peak = self.limits.macs_of(_operand_type(call, "x")) * self.threads
        return max(call.macs / peak / 1e3, call.bytes / self.limits.memory / 1e3, CALL_US)

    def us(self, call: Call) -> float:
        """Microseconds that `call` takes: measured, or interpolated from the nearest shapes of its kernel.

        What is averaged is how far calls stay above their `bound`.
        """
        row = self.rows.get(signature(call))
        if row is not None:
            return row.us
        near = self._neighbours(call)
        if not near:
            return 2 * self.bound(call)  # a kernel that was never measured
        weights = np.array([1 / (d + 0.05) for d, _ in near])
        excess = np.array([math.log(e) for _, e in near])
        return self.bound(call) * math.exp(float(weights @ excess / weights.sum()))

    def _neighbours(self, call: Call) -> list[tuple[float, float]]:
        """(distance, time over bound) of the nearest measured calls of the same family."""
        if self._grouped != len(self.rows):
            self._families, self._grouped = {}, len(self.rows)
            for text, row in self.rows.items():
                kin = _family(text)
                for k in range(1, len(kin) + 1):
                    self._families.setdefault(kin[:k], []).append(row)
        family = _family(signature(call))
        kept = (self._families.get(family[:k]) for k in range(len(family), 0, -1))
        rows = next(filter(None, kept), [])
        peak = self.limits.macs_of(_operand_type(call, "x")) * self.threads
        found = []
        for r in rows:
            bound = max(r.macs / peak / 1e3, r.bytes / self.limits.memory / 1e3, CALL_US)
            distance = math.hypot(math.log((r.macs + 1) / (call.macs + 1)), math.log((r.bytes + 1) / (call.bytes + 1)))
            found.append((distance, r.us / bound))
        return sorted(found)[:NEIGHBOURS]


def _family(text: str) -> tuple[str, ...]:
    """What the calls of two signatures must share for one to say something of the other, most telling first:
    kernel, element types, window."""
    kernel, _, rest = text.partition("<")
    types = re.search(r"\(([a-z0-9_,\s]*)\)", rest[rest.rfind(">(") :])
    window = re.search(r"Kernel<\d+, ([\d, ]+>, Stride<[\d, ]+)>", rest)
    return kernel, types.group(1) if types else "", window.group(1) if window else ""


def cpu() -> str:
    from skive.bench import machine

    return str(machine()["cpu"])


# ------------------------------------------------------------------------------------- measuring


def measure(plan: Plan, target: Target, seconds: float = ROUND_SECONDS) -> tuple[np.ndarray, float]:
    """(microseconds of each call of `plan` on its own, of the whole), a low quantile of many rounds."""
    with tempfile.TemporaryDirectory(prefix="skive-speed-") as t:
        folder = Path(t)
        sources = cxx.emit(plan, target)
        build.write_sources(folder, sources, plan.weights, plan.name)
        library = build.build_shared(folder, sources, plan.name, target, threads=plan.threads)
        return time_library(library, plan, seconds)


def time_library(
    library: Path, plan: Plan, seconds: float = ROUND_SECONDS, *, layers: bool = True
) -> tuple[np.ndarray, float]:
    """The same for the library that was built of `plan`; without `layers` the whole alone."""
    count = len(plan.calls) if layers else 0
    inputs, outputs = (
        [TensorInfo(p.name, p.shape, p.dtype) for p in side] for side in (plan.inputs, plan.outputs)
    )
    module = _native.Artifact(  # loading it as a module starts its threads
        str(library),
        plan.name,
        [(p.name, list(p.shape), p.dtype) for p in plan.inputs],
        [(p.name, list(p.shape), p.dtype) for p in plan.outputs],
        plan.arena_bytes,
        plan.batch_max or 0,
        plan.threads,
    )
    whole, single, overhead = profiling.time_layers(
        library, plan.name, inputs, outputs, plan.arena_bytes, count, seconds=seconds
    )
    del module
    us = np.maximum(np.quantile(single, QUANTILE, axis=0) - overhead, 1.0) / 1e3 if count else np.zeros(0)
    return us, max(0.0, float(np.quantile(whole, QUANTILE)) - overhead) / 1e3


def race(runners: Sequence[tuple[Path, Plan]], seconds: float = ROUND_SECONDS) -> list[float]:
    """Microseconds of one run of each library, measured in turns so that a drift of the machine meets all alike."""
    turns = 5
    us = np.array([[time_library(library, plan, seconds / turns, layers=False)[1] for library, plan in runners]
                   for _ in range(turns)])  # fmt: skip
    return [float(t) for t in us.min(axis=0)]


def _measured_limits(target: Target) -> Limits:
    """What a 1x1 convolution that fits the second-level cache, and an addition that does not, reach."""
    rng = np.random.default_rng(0)

    def convolution(dtype: DType, weight: DType) -> Node:
        x = ops.make("input", shape=(1, 14, 14, 256), dtype=dtype, label=f"x_{dtype.value}")
        w = constant(rng.integers(-9, 10, (256, 1, 1, 256)).astype(weight.numpy))
        return ops.make("conv2d", x, w) if dtype is DType.f32 else ops.make("conv2d", x, w, zero=0)

    products = [
        convolution(DType.f32, DType.f32),
        convolution(DType.u8, DType.i8),
        convolution(DType.i16, DType.i16),
    ]
    a, b = (ops.make("input", shape=(1 << 20,), dtype=DType.f32, label=n) for n in "ab")
    outputs = (*products, ops.make("add", a, b))
    inputs = (*(p.inputs[0] for p in products), a, b)
    plan = lower(Graph("limits", inputs, outputs, ("f", "q", "h", "s")), target)
    us, _ = measure(plan, target, 0.5)
    rates = [round(float(c.macs / t) / 1e3, 2) for c, t in zip(plan.calls[:3], us[:3], strict=True)]
    return Limits(rates[0], rates[1], rates[2], round(float(plan.calls[3].bytes / us[3]) / 1e3, 2))


def fill(
    table: SpeedTable, plans: Sequence[Plan], seconds: float, progress: Progress = lambda step, fraction: None
) -> None:
    """Measures calls of `plans` that the table lacks, the longest first, in about `seconds`.

    All that is missing of a plan is compiled as one library if the time allows: the calls then run in
    the order of the network.
    """
    started, rate = time.perf_counter(), COMPILED_PER_SECOND

    def missing(plan: Plan) -> list[str]:
        """Signatures that the table lacks, those with the highest bound first."""
        lacking = {signature(c): table.bound(c) for c in plan.calls if c not in table}
        return sorted(lacking, key=lambda s: -lacking[s])

    total = sum(len(missing(p)) for p in plans)
    for turn in range(2):  # what did not fit into the first turn
        for i, plan in enumerate(plans):
            wanted = missing(plan)
            if not wanted:
                continue
            left = seconds - (time.perf_counter() - started)
            ahead = len(wanted) + sum(len(missing(p)) for p in plans[i + 1 :])
            room = int((left * (1.0 if turn else len(wanted) / ahead) - ROUND_SECONDS) * rate)
            if room < min(2, len(wanted)):
                continue
            chosen = set(wanted[:room])
            part = replace(plan, calls=tuple(c for c in plan.calls if signature(c) in chosen))
            begun = time.perf_counter()
            us, _ = measure(part, table.target)
            rate = len(chosen) / max(time.perf_counter() - begun - ROUND_SECONDS, 0.1)
            times: dict[str, list[float]] = {}
            for c, t in zip(part.calls, us, strict=True):
                times.setdefault(signature(c), []).append(float(t))
            for c in part.calls:
                table.add(c, float(np.mean(times[signature(c)])))
            table.save()
            progress("measure", 1 - sum(len(missing(p)) for p in plans) / max(1, total))


# ------------------------------------------------------------------------------------ forecasting


@dataclass(frozen=True)
class LayerForecast:
    """One layer of the source model. `us` by element type; `loses`: why INT8 makes it slower, or None; `memory_bound`:
    in float32 its bytes take longer to read than its multiplications take."""

    name: str
    op: str
    macs: int
    us: Mapping[str, float]
    loses: str | None = None
    memory_bound: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "op": self.op,
            "macs": self.macs,
            "us": {k: round(v, 3) for k, v in self.us.items()},
            "loses": self.loses,
            "memory_bound": self.memory_bound,
        }


@dataclass(frozen=True)
class Forecast:
    """Times of a network by element type, before anything is calibrated.

    `measured`: the share of the total that comes from calls of exactly these shapes; the rest is
    interpolated.
    """

    layers: tuple[LayerForecast, ...]
    measured: Mapping[str, float]
    threads: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_us(self) -> dict[str, float]:
        return {d: sum(layer.us[d] for layer in self.layers) for d in self.measured}

    def weight_only(self) -> list[tuple[LayerForecast, float]]:
        """(layer, gain) of the layers that float32 keeps waiting for their weights and that weights8 makes faster."""
        waiting = [layer for layer in self.layers if layer.memory_bound and WEIGHTS in layer.us]
        gains = [(layer, layer.us["float32"] / max(layer.us[WEIGHTS], 1e-3)) for layer in waiting]
        return [(layer, gain) for layer, gain in gains if gain >= PAYS]

    def to_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "total_us": {k: round(v, 2) for k, v in self.total_us.items()},
            "measured": {k: round(v, 4) for k, v in self.measured.items()},
            "limits": dict(self.limits),
            "layers": [layer.to_json() for layer in self.layers],
        }

    @staticmethod
    def from_json(d: Mapping[str, Any]) -> Forecast:
        layers = tuple(
            LayerForecast(x["name"], x["op"], x["macs"], x["us"], x["loses"], x["memory_bound"]) for x in d["layers"]
        )
        return Forecast(layers, d["measured"], d["threads"], d["limits"])


def guessed_range(node: Node) -> tuple[float, float]:
    """A range for a value that nothing is known of: what its operation allows, or -8 to 8."""
    if node.op in ("relu", "reshape", "max_pool2d", "avg_pool2d", "reduce_mean", "slice", "transpose"):
        lo, hi = (-8.0, 8.0) if node.inputs[0].op == "input" else guessed_range(node.inputs[0])
        return (0.0, max(hi, 1.0)) if node.op == "relu" else (lo, hi)
    if node.op == "clip":
        return max(-8.0, float(node.attrs["lo"])), min(8.0, float(node.attrs["hi"]))
    return (0.0, 1.0) if node.op in ("sigmoid", "hard_sigmoid", "softmax") else (-8.0, 8.0)


def uniform_plans(graph: Graph, target: Target, threads: int = 1) -> dict[str, Plan]:
    """The plan of the canonical float `graph` in each element type, with guessed ranges, and on compressed weights.

    A type that a layer cannot be lowered in is left out, but for float32.
    """
    from skive import passes
    from skive.passes.compress_weights import Scheme as Weights
    from skive.passes.compress_weights import compress
    from skive.passes.quantize import Quantizer, Scheme, Storage
    from skive.passes.split_recurrences import recurrences_split
    from skive.pipeline import PassManager

    plans = {}
    for dtype in (*DTYPES, WEIGHTS):
        form = graph if dtype in ("float32", WEIGHTS) else recurrences_split(graph)
        storage = Storage(form, attention=dtype == "int8")
        if dtype == WEIGHTS:
            form, compressed = compress(graph, Weights())
            if not compressed:
                continue
        elif dtype != "float32" and storage.products:
            ranges = {n: guessed_range(n) for n in storage.sources}
            form = Quantizer(form, Scheme(ranges, dtype), storage).build()
        fused, _ = PassManager().run(form, passes.FUSED, check="never")
        try:
            plans[dtype] = lower(fused, target, threads)
        except SkiveError as e:
            if dtype == "float32":
                raise
            log.warning("%s: no forecast for %s: %s", graph.name, dtype, e)
    return plans


def predict(
    graph: Graph,
    *,
    target: Target | str = "host",
    threads: int = 1,
    seconds: float = 45.0,
    progress: Progress = lambda step, fraction: None,
    table: SpeedTable | None = None,
) -> Forecast:
    """What each layer of the canonical float `graph` will take in float32, int8, int16 and weights8 here.

    At most about `seconds` go into compiling and measuring what the table does not know. ToolchainError
    if there is no C++ compiler.
    """
    chosen = resolve(target, _native.cpu_features()) if isinstance(target, str) else target
    table = table or SpeedTable(chosen, threads)
    kept = table.path.parent / "forecasts" / f"{_structure(graph, table)}.json"
    try:
        return Forecast.from_json(json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or damaged
    plans = uniform_plans(graph, chosen, threads)
    fill(table, list(plans.values()), seconds, progress)
    result = forecast(graph, plans, table)
    if min(result.measured.values()) == 1:
        build.store_text(json.dumps(result.to_json()), kept)
    return result


def _structure(graph: Graph, table: SpeedTable) -> str:
    """SHA-256 of all that a forecast depends on: operations, shapes and names, not weights; skive's own sources."""
    h = hashlib.sha256(table.key.encode())
    number = {n: i for i, n in enumerate(graph.nodes)}
    for n in graph.nodes:
        attrs = {k: v for k, v in n.attrs.items() if not isinstance(v, np.ndarray)}
        h.update(repr((n.op, n.type, attrs, [number[i] for i in n.inputs], n.label())).encode())
        if n.is_const and n.type.size == 1:
            h.update(n.value.tobytes())
    h.update(build.sources_hash().encode())
    return h.hexdigest()[:20]


def forecast(graph: Graph, plans: Mapping[str, Plan], table: SpeedTable) -> Forecast:
    """The forecast for `plans` of `graph` from what `table` holds."""
    calls: dict[str, dict[str, list[Call]]] = {}
    for dtype, plan in plans.items():
        for c in plan.calls:
            calls.setdefault(c.origin or c.op, {}).setdefault(dtype, []).append(c)
    layers = []
    for name, by_type in _in_order(calls, plans):
        us = {d: sum(map(table.us, by_type.get(d, []))) for d in plans}
        every = [c for d in plans for c in by_type.get(d, [])]
        main = max(every, key=lambda c: c.macs)
        loses = None
        if "int8" in plans and us["int8"] > LOSES * us["float32"] and us["int8"] - us["float32"] > LOSES_US:
            loses = _why(by_type.get("float32", []), by_type.get("int8", []), us, table)
        moved = sum(c.bytes for c in by_type.get("float32", [])) / table.limits.memory
        bound = moved > sum(c.macs for c in by_type.get("float32", [])) / table.limits.float32 / table.threads > 0
        layers.append(LayerForecast(name, main.op, main.macs, us, loses, bound))
    measured = {}
    for d, plan in plans.items():
        known = sum(table.us(c) for c in plan.calls if c in table)
        measured[d] = known / max(sum(map(table.us, plan.calls)), 1e-9)
    limits = {k: getattr(table.limits, k) for k in Limits.__slots__}
    return Forecast(tuple(layers), measured, table.threads, limits)


def _in_order(
    calls: Mapping[str, dict[str, list[Call]]], plans: Mapping[str, Plan]
) -> Iterable[tuple[str, dict[str, list[Call]]]]:
    """Layers in order of execution: those of the first plan, with what only others have where it falls."""
    order: list[str] = []
    for plan in plans.values():
        at = 0
        for c in plan.calls:
            name = c.origin or c.op
            if name in order:
                at = order.index(name) + 1
            else:
                order.insert(at, name)
                at += 1
    return ((name, calls[name]) for name in order)


def _why(before: Sequence[Call], after: Sequence[Call], us: Mapping[str, float], table: SpeedTable) -> str:
    """Why `after`, the calls of a layer in int8, take longer than `before`, those in float32."""
    border = [
        c for c in after if c.op == "map" or c.op in ("quantize", "dequantize", "requantize")
        if c.fn and any("quantize" in s.name or s.name.startswith("rounded") for s in c.fn.steps)
    ]  # fmt: skip
    core = [c for c in after if c not in border]
    reasons = []
    if border and len(after) > len(before):
        spent = sum(map(table.us, border))
        kinds = sorted({"dequantizes" if any(s.name == "dequantize" for s in c.fn.steps)
                        and not any(s.name.startswith(("quantize", "rounded")) for s in c.fn.steps) else "quantizes"
                        for c in border if c.fn})  # fmt: skip
        reasons.append(f"{spent:.1f} us at the border between float32 and int8: it {' and '.join(kinds)} in memory")
    products = [c for c in core if c.macs]
    if products and not any(_operand_type(c, "x") in ("uint8_t", "int8_t") for c in products):
        reasons.append("stays float32: it has no integer kernel")
    elif any(c.kernel == "winograd2d" for c in before):
        reasons.append("float32 runs Winograd here, with a part of the multiplications")
    if any(c.kernel.startswith("plain_") for c in core):
        reasons.append("only the plain kernel takes these operands as integers")
    for c in products:
        image = next((m for t in c.template if (m := re.match(r"Image<(\d+), (\d+), (\d+), (\d+)>", t))), None)
        kernel = next((m for t in c.template if (m := re.match(r"Kernel<(\d+),", t))), None)
        if image and kernel and c.kernel != "depthwise2d":
            channels, outputs = int(image.group(4)), int(kernel.group(1))
            if channels < 4:
                reasons.append(f"few channels: {channels} of input, where int8 multiplies four at a time")
            elif outputs < 16:
                reasons.append(f"few channels: {outputs} of output leave vectors partly empty")
    moved = sum(c.bytes for c in after) / table.limits.memory / 1e3
    if moved >= MEMORY_BOUND * us["int8"]:
        reasons.append(f"bound by memory: {sum(c.bytes for c in after) / 1e6:.2g} MB to move")
    if not reasons and products:
        rates = [
            sum(c.macs for c in part) / max(us[d], 1e-3) / 1e3
            for part, d in ((before, "float32"), (products, "int8"))
        ]
        reasons.append(f"its int8 kernel reaches {rates[1]:.1f} GMAC/s, the float32 one {rates[0]:.1f}")
    if not reasons:
        steps = sum(len(c.fn.steps) for c in after if c.fn) - sum(len(c.fn.steps) for c in before if c.fn)
        reasons.append(
            f"{steps} more steps for each element, to convert between int8 and float32"
            if steps > 0
            else "its kernel moves bytes more slowly than floats"
        )
    return "; ".join(reasons)
