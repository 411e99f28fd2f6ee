"""What quantization did to a network: figures per layer, where float32 is left and why, and what to try.

`layers` describes the fixed-point network beside the float one it was made from, `conversions` where the
final graph leaves the integers, `kernel_types` what a compiled kernel reads, writes and computes in, and
`advice` what the measured figures suggest. All of it is JSON data for report.json.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skive import expr, ops
from skive.ir import Graph, Node
from skive.ops.recurrence import QUANTIZED_STEPS
from skive.plan import Call
from skive.types import DType

if TYPE_CHECKING:
    from skive.calibration import Observation
    from skive.passes.quantize import Quantizer

WORST = 3  # layers that a summary names
GOOD_DB = 30.0  # below, a layer's value deserves a look: its noise is more than 3 % of its signal
POOR_DB = 20.0  # below, decisions change: 10 % noise
# The largest value is this many times the RMS in what a network usually computes (a normal
# distribution reaches 5 in a million values); further out, few values cost all others resolution.
CREST = 12.0
SPREAD = 16.0  # largest channel over the median one, above which one scale for all is 4 bits too coarse
WORTH_DB = 3.0  # half the noise: a range that saturates the largest values must promise as much
FEW = 32  # calibration samples

_NARROW = frozenset((DType.i8, DType.u8, DType.i16, DType.u16))
_ROUNDING = frozenset(("quantize", "dequantize", "requantize", "requantize_fixed"))
# Steps after which a value is an integer or stays one: no arithmetic on floats.
_INTEGER_STEPS = _ROUNDING | {"clip", "relu", "min", "max", "cast"}
_ROUNDED = frozenset(("rounded", "scaled", "quotient", "quantize_by"))  # the same as kernels spell it
_BITS = {1: "int8", 2: "int16"}
_CTYPES = {t.ctype: t for t in DType}


# ------------------------------------------------------------------------------- before lowering


def decibels(signal: float, noise: float) -> float:
    """Signal-to-noise ratio; 300 where there is no noise to speak of."""
    if noise <= 0 or signal <= 0:
        return 300.0 if noise <= 0 else 0.0
    return round(min(300.0, 10 * math.log10(signal / noise)), 2)


def layers(
    graph: Graph,
    quantizer: Quantizer,
    observed: Mapping[Node, Observation],
    measured: Mapping[Node, float],
    kept: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One entry per layer of the float `graph`, in execution order: the `quantization.layers` of report.json.

    A layer is a contraction, sum or other operation with the elementwise operations that run in its
    kernel. `sqnr_db` (measured) is that of the value it stores, `input_sqnr_db` that of the worst it
    reads, `weight_sqnr_db` what rounding the weights costs, `rounding_sqnr_db` what the step of the
    stored value costs: that step squared by 12, beside the observed power.
    """
    from skive.calibration import narrowing_gain_db
    from skive.passes.quantize import is_move

    storage = quantizer.storage
    root_of, members_of = storage.root_of, storage.members_of
    described: dict[Node, dict[str, Any]] = {}
    for node in graph.nodes:
        root = root_of.get(node, node)
        if node.is_const or root in described or storage.is_moved(node) and node.op != "concat":
            continue
        members = members_of.get(root, [node])
        core = next((n for n in members if ops.macs(n)), node if ops.macs(node) else root)
        stored = root in quantizer.integers
        if not stored and (node.op == "input" or ops.op_of(core.op).kind == "movement" or not node.dtype.is_float):
            continue
        layer = quantizer.layers.get(core)
        entry: dict[str, Any] = {"name": core.label(), "op": core.op, "dtype": "float32", "sqnr_db": None}
        entry["bytes"] = root.type.size * 4
        read = [i for n in members for i in n.inputs if i in quantizer.integers]
        before = [measured[s] for s in map(storage.source_of, read) if measured.get(s) is not None]
        entry["input_sqnr_db"] = min(before, default=None)
        if layer is not None:
            x, w = quantizer.format_of(core.inputs[0]), core.inputs[1].value
            entry["dtype"] = _BITS[x.dtype.bytes]
            entry["bits"] = {"activations": x.bits, "weights": layer.weight_bits}
            entry["chain"] = layer.chain
            entry["weight_bytes"] = w.size * x.dtype.bytes
            error = (layer.real_weights - w).astype("f8")
            entry["weight_sqnr_db"] = decibels(float((w.astype("f8") ** 2).sum()), float((error**2).sum()))
        elif quantizer.is_recurrent(core):
            entry |= {"dtype": _BITS[1], "bits": {"activations": 8, "weights": 8}}
            entry["weight_bytes"] = core.inputs[1].type.size
        elif ops.macs(core):
            entry["weight_bytes"] = sum(i.type.bytes for i in core.inputs if i.is_const)
        if stored:
            form = quantizer.format_of(root)
            entry |= {"stored": form.dtype.value, "scale": form.scale, "zero": form.zero}
            entry["bytes"] = root.type.size * form.dtype.bytes
            entry["sqnr_db"] = measured.get(root)
            if layer is None and (core.op == "input" or is_move(core) or read and not _is_float_work(core)):
                entry["dtype"] = _BITS[form.dtype.bytes]
            if root in observed:
                o = observed[root]
                entry["range"] = [o.low, o.high]
                entry["kept"] = list(form.range)
                rms = math.sqrt(o.mean_square)
                entry["rounding_sqnr_db"] = decibels(o.mean_square, form.scale**2 / 12)
                entry["crest"] = round(max(abs(o.low), abs(o.high)) / rms, 2) if rms else None
                entry["channel_spread"] = _spread(o)
                if (entry["crest"] or 0.0) > CREST and form.dtype is DType.u8:
                    entry["narrowing_gain_db"] = round(narrowing_gain_db(o), 2)
        if entry["dtype"] == "float32":
            entry["reason"] = why_float(core, stored or bool(read), kept)
        described[root] = entry
    # A layer stands behind all it reads: other operands of what runs in its kernel may come after its contraction.
    place = {n: i for i, n in enumerate(graph.nodes)}
    described = {r: described[r] for r in sorted(described, key=lambda r: max(
        place.get(n, -1) for n in members_of.get(r, [r])))}
    found = list(described.values())
    index = {id(entry): i for i, entry in enumerate(found)}
    reads: list[list[int]] = []
    for root in described:
        outside = [i for n in members_of.get(root, [root]) for i in n.inputs if root_of.get(i, i) is not root]
        reads.append([index[id(described[r])] for r in _nearest(outside, described, root_of)])
    ends = {index[id(described[r])] for r in _nearest(graph.outputs, described, root_of)}
    for i, (entry, share) in enumerate(zip(found, noise_shares(found, reads, ends), strict=True)):
        entry["noise_share"] = share
        entry["read_by"] = [r["name"] for r, sources in zip(found, reads, strict=True) if i in sources]
    return found


def _nearest(nodes: Sequence[Node], described: Mapping[Node, Any], root_of: Mapping[Node, Node]) -> list[Node]:
    """The described values that `nodes` are or are made from."""
    todo, seen = list(nodes), set[Node]()
    found: dict[Node, None] = {}
    while todo:
        n = todo.pop()
        n = root_of.get(n, n)
        if n in seen or n.is_const:
            continue
        seen.add(n)
        if n in described:
            found[n] = None
        else:
            todo += n.inputs
    return list(found)


def noise_shares(
    layers: Sequence[Mapping[str, Any]], reads: Sequence[Sequence[int]], ends: Collection[int]
) -> list[float]:
    """By layer the share of the outputs' noise that its own rounding causes; all 0 where nothing was measured.

    Noise power over signal power of a layer's value is modelled as gain * (that of what it `reads`) + own, own
    being what its weights and the step of its result cost; the gain follows from the measured values. A layer's
    part of the noise at the `ends` is its own noise times all gains behind it. Estimates: weight noise is taken as
    independent of the sums, and a layer's inputs as equally loud.
    """
    own: list[float] = []
    total: list[float] = []
    gain: list[float] = []
    for layer, sources in zip(layers, reads, strict=True):
        before = sum(total[j] for j in sources)
        mine = _noise(layer.get("weight_sqnr_db")) + _noise(layer.get("rounding_sqnr_db"))
        after = _noise(layer["sqnr_db"]) if layer.get("sqnr_db") is not None else before + mine
        if not before:
            mine = after
        scale = min(1.0, after / (mine + before)) if mine + before else 0.0  # below 1: estimated too loud
        own.append(mine * scale if before else mine)
        total.append(after)
        gain.append(max(scale, (after - mine) / before) if before else 0.0)
    weight = [1.0 if i in ends else 0.0 for i in range(len(layers))]
    for i in reversed(range(len(layers))):
        for j in reads[i]:
            weight[j] += weight[i] * gain[i]
    parts = [w * o for w, o in zip(weight, own, strict=True)]
    measured = any(layer.get("sqnr_db") is not None for layer in layers)
    return [round(p / sum(parts), 4) if measured and sum(parts) > 0 else 0.0 for p in parts]


def _is_float_work(node: Node) -> bool:
    """True for an operation that has no integer form of its own."""
    if ops.macs(node):
        return True
    return ops.op_of(node.op).kind not in ("movement", "window") and node.op not in ("reduce_mean", "concat")


def _spread(o: Observation) -> float | None:
    """The magnitude of the largest channel over that of the median one."""
    magnitudes = sorted(float(m) for m in o.channel_magnitude if m > 0)
    return round(magnitudes[-1] / magnitudes[len(magnitudes) // 2], 2) if len(magnitudes) > 1 else None


def why_float(node: Node, between_integers: bool = False, kept: Sequence[str] = ()) -> str:
    """Why `node` is computed in float32."""
    import fnmatch

    for pattern in kept:
        if any(fnmatch.fnmatchcase(name, pattern) for name in (node.origin, node.name) if name):
            return f"kept by the pattern {pattern!r}"
    row = ops.op_of(node.op)
    if node.op in ("conv2d", "conv_transpose2d", "linear"):
        variable = [i for i in node.inputs[1:3] if not i.is_const and i.op != "dequantize"]
        return "its weights are computed, not constant" if variable else "its operand is not stored as integers"
    if node.op in ("lstm", "gru", "rnn"):
        return "its activations, peepholes or reset gate before the product have no integer kernel"
    if node.op in QUANTIZED_STEPS:
        return "recurrent weights become 8-bit integers, where no layer has 16 bits"
    if row.kind == "contract":
        return f"{node.op} multiplies two computed operands; constant weights become integers"
    if row.kind in ("elementwise", "source"):
        if between_integers:
            return "computed in float32 registers between integers: nothing is rounded where nothing is stored"
        return "no integer kernel makes its operands or reads its result"
    return f"{node.op} has no integer form"


# ----------------------------------------------------------------------------- the final graph


def of_quantized_model(graph: Graph) -> dict[str, Any]:
    """The `quantization` of a fused `graph` that was imported with its integers: no float network to measure."""
    entries: list[dict[str, Any]] = []
    for n in graph.nodes:
        if ops.macs(n):
            narrow = n.inputs[0].dtype in _NARROW
            dtype = _BITS[n.inputs[0].dtype.bytes] if narrow else "float32"
            entries.append({"name": n.label(), "op": n.op, "dtype": dtype, "sqnr_db": None, "bytes": n.type.bytes,
                            "weight_bytes": sum(i.type.bytes for i in n.inputs[1:2] if i.is_const)}
                           | ({"stored": n.dtype.value} if n.dtype in _NARROW else {})
                           | ({} if narrow else {"reason": why_float(n)}))
    counts = {d: sum(e["dtype"] == d for e in entries) for d in ("int8", "int16")}
    return {"dtype": max(counts, key=lambda d: counts[d]), "sqnr_db": None, "imported": True, "layers": entries}


def conversions(graph: Graph, kept: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Where the fused `graph` leaves the integers.

    `islands`: groups of kernels that compute in float32 and exchange float32 tensors, or compute in
    float32 registers between integer tensors, each with its nodes and reason. `boundaries`: kernels that
    read one kind and write the other. Both are empty if nothing is stored as 8 or 16 bits.
    """
    kernels = [n for n in graph.nodes if n.op not in ("input", "const") and n.type.size]
    if not any(n.dtype in _NARROW for n in kernels):
        return {"islands": [], "boundaries": []}
    group: dict[Node, list[Node]] = {}
    boundaries = []
    for n in kernels:
        reads = [i for i in n.inputs if not i.is_const and i.type.size]
        narrow = [i for i in reads if i.dtype in _NARROW]
        floats = [i for i in reads if i.dtype is DType.f32]
        if n.dtype in _NARROW and floats and not narrow:
            boundaries.append({"name": n.label(), "op": n.op, "to": n.dtype.value, "bytes": n.type.bytes,
                               "reason": _source_of_float(floats[0])})
        elif n.dtype is DType.f32 and narrow:
            boundaries.append({"name": n.label(), "op": n.op, "to": "f32", "bytes": n.type.bytes,
                               "reason": _reader_of_float(graph, n)})
        if _computes_in_float(n) and ops.op_of(n.op).kind != "movement":
            own = group.setdefault(n, [n])
            for i in floats:
                if i in group and group[i] is not own:
                    own[:0] = group[i]
                    for member in group[i]:
                        group[member] = own
    islands: list[dict[str, Any]] = []
    for members in {id(g): g for g in group.values()}.values():
        told = {why_float(n, n.dtype in _NARROW or any(i.dtype in _NARROW for i in n.inputs), kept) for n in members}
        whole = sorted(told, key=lambda reason: ("registers" in reason, reason))
        islands.append({"names": [n.label() for n in members], "ops": [n.op for n in members],
                        "macs": sum(map(ops.macs, members)), "bytes": sum(n.type.bytes for n in members),
                        "reason": "; ".join(whole)})
    return {"islands": islands, "boundaries": boundaries}


def _computes_in_float(node: Node) -> bool:
    """True if the kernel's own work, not only its rounding, is on float32."""
    if node.op in QUANTIZED_STEPS.values():
        return False
    if ops.macs(node) or node.op in ("sum_pool2d", "max_pool2d"):
        return node.inputs[0].dtype is DType.f32
    if node.op == "map" and not (node.dtype is DType.f32 and node.inputs[0].dtype is DType.f32):
        steps = {s.op for s in expr.parse(node.attrs["fn"]).steps}
        touches = "dequantize" in steps or any(i.dtype is DType.f32 for i in node.inputs if not i.is_const)
        return touches and bool(steps - _INTEGER_STEPS)
    if node.op in _ROUNDING:
        return False
    return node.dtype is DType.f32 or any(i.dtype is DType.f32 for i in node.inputs if not i.is_const)


def _source_of_float(node: Node) -> str:
    while node.op in ("reshape", "transpose", "slice", "pad", "expand") and node.inputs:
        node = node.inputs[0]
    return "the network's input is float32" if node.op == "input" else f"{node.label()} ({node.op}) gives float32"


def _reader_of_float(graph: Graph, node: Node) -> str:
    if graph.is_output(node):
        return "the network's output is float32"
    readers = [u for u in graph.users[node]]
    while readers and readers[0].op in ("reshape", "transpose", "slice", "pad", "expand"):
        if graph.is_output(readers[0]):
            return "the network's output is float32"
        readers = list(graph.users[readers[0]])
    return f"{readers[0].label()} ({readers[0].op}) reads float32" if readers else "nothing reads it"


# ------------------------------------------------------------------------------- the plan


def kernel_types(call: Call) -> dict[str, Any]:
    """`dtype` a kernel computes in, and the element types it `reads` and `writes`."""
    if call.op == "compressed_linear":
        return {"dtype": f"weights{call.template[0]}", "reads": ["f32"], "writes": "f32"}
    fn_reads = {o.arg for o in call.fn.operands if o.mode in ("channel", "scalar")} if call.fn else set()
    tensors = [a for a in call.args if a.kind != "weights" and a.ctype in _CTYPES and a.name not in fn_reads]
    reads = list(dict.fromkeys(_CTYPES[a.ctype].value for a in tensors if a.const))
    writes = [_CTYPES[a.ctype].value for a in tensors if not a.const]
    if call.op in QUANTIZED_STEPS.values():
        return {"dtype": _BITS[1], "reads": reads, "writes": writes[-1]}
    first = next((a.ctype for a in call.args if a.const and a.ctype in _CTYPES), writes[-1] if writes else "float")
    operand = _CTYPES.get(first, DType.f32)
    steps = {s.name.partition("<")[0].rstrip("_") for s in call.fn.steps} if call.fn else set()
    if "rounded" in steps:
        steps.discard("div")  # by the scale of each channel
    elementwise = call.op == "map" or call.op in ops.OPS and ops.op_of(call.op).kind == "elementwise"
    written = DType(writes[-1]) if writes else DType.f32
    if elementwise and steps <= _INTEGER_STEPS | _ROUNDED and {operand, written} & _NARROW:
        dtype = _BITS[(written if written in _NARROW else operand).bytes]
    elif operand in _NARROW and not (elementwise and "dequantize" in steps):
        dtype = _BITS[operand.bytes]
    else:
        dtype = "float32" if operand in _NARROW or operand is DType.f32 else operand.numpy.name
    return {"dtype": dtype, "reads": reads, "writes": writes[-1] if writes else ""}


# ---------------------------------------------------------------------------------- what to do


def _noise(sqnr: float | None) -> float:
    """Noise power over signal power."""
    return 0.0 if sqnr is None else 10 ** (-sqnr / 10)


def worst(layers: Sequence[Mapping[str, Any]], count: int = WORST) -> list[Mapping[str, Any]]:
    """The layers whose own rounding causes most of the noise at the outputs."""
    ranked = sorted((layer for layer in layers if layer.get("noise_share")), key=lambda layer: -layer["noise_share"])
    return ranked[:count]


def advice(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figures suggest, most telling first: `layer` (or None: the network), `finding`, `action`.

    Empty where the outputs are at GOOD_DB or better. Shares are estimates, and a kept layer takes no part in
    equalisation: what is tried should be measured.
    """
    layers: Sequence[Mapping[str, Any]] = quantization["layers"]
    overall = quantization.get("sqnr_db")
    chosen = worst(layers)
    lowest = min((x["sqnr_db"] for x in layers if x.get("sqnr_db") is not None), default=GOOD_DB)
    if not chosen or (lowest if overall is None else overall) >= GOOD_DB:
        return []
    found = []
    for layer in chosen:
        finding, action = _diagnosis(layer, quantization)
        share = layer["noise_share"]
        lead = f"causes {100 * share:.0f} % of the output's noise"
        found.append({"layer": layer["name"], "share": share, "finding": f"{lead}: {finding}", "action": action})
    part = sum(layer["noise_share"] for layer in chosen)
    if overall is not None and overall < POOR_DB:
        whole = (n for x in chosen for n in (x["name"], *x.get("read_by", ())) if x["op"] != "input")
        names = _keep(list(dict.fromkeys(whole)))
        if part >= 0.5:
            found.append({"layer": None, "share": round(part, 4),
                          "finding": f"{len(chosen)} layers cause {100 * part:.0f} % of it",
                          "action": f"keep them float32: {names}"})
        elif quantization["dtype"] == "int8":
            found.append({"layer": None, "share": round(part, 4),
                          "finding": f"the noise is spread: the worst {len(chosen)} layers cause only "
                                     f"{100 * part:.0f} % of it, and the output is at {overall:.1f} dB",
                          "action": "--quantize int16, which usually leaves some 30 dB less noise"})
    samples = quantization.get("samples")
    if samples is not None and samples < FEW and quantization.get("method") == "minmax":
        found.append({"layer": None, "share": None, "finding": f"the ranges are those of {samples} samples",
                      "action": f"calibrate with {FEW} to 256 that differ as inputs do in use"})
    return found


def _diagnosis(layer: Mapping[str, Any], quantization: Mapping[str, Any]) -> tuple[str, str]:
    """(what its largest source of noise is, what acts against that)."""
    options: Mapping[str, Any] = quantization.get("options") or {}
    keep, unstored = _keep([layer["name"]]), _keep(layer.get("read_by") or [layer["name"]])
    sources = {"weights": _noise(layer.get("weight_sqnr_db")), "step": _noise(layer.get("rounding_sqnr_db"))}
    low, high = layer.get("range") or (0.0, 0.0)
    bottom, top = layer.get("kept") or (low, high)
    beyond = max(0.0, bottom - low, high - top)
    rest = _noise(layer.get("sqnr_db")) - _noise(layer.get("input_sqnr_db")) - sum(sources.values())
    if beyond > 0.02 * (top - bottom) and rest > max(sources.values()):
        return (f"values reach {low:.4g} to {high:.4g}, of which {bottom:.4g} to {top:.4g} is kept",
                f"wider ranges ({_wider(quantization)}), or {unstored}")
    if sources["weights"] >= sources["step"]:
        bits = (layer.get("bits") or {}).get("weights", 8)
        if not options.get("per_channel", True):
            return (f"its weights, with one scale for all channels, are at {layer['weight_sqnr_db']:.1f} dB",
                    "per_channel=True")
        if options.get("rounding", "nearest") == "nearest":
            return (f"its weights are at {layer['weight_sqnr_db']:.1f} dB with {bits} bits",
                    f"--rounding adaround, or {keep}")
        return f"its weights are at {layer['weight_sqnr_db']:.1f} dB even with searched roundings", keep
    at = f"the step of its result costs {layer['rounding_sqnr_db']:.1f} dB"
    spread = layer.get("channel_spread") or 0.0
    if spread > SPREAD and not options.get("equalise", True):
        return (f"{at}: its largest channel is {spread:.0f} times the median one", "equalise=True")
    crest, gain = layer.get("crest") or 0.0, layer.get("narrowing_gain_db") or 0.0
    # What a float32 layer reads is not stored as integers: it is the readers that have to be kept.
    if crest > CREST:
        finding = f"{at}: its largest value is {crest:.0f} times its RMS"
        if gain > WORTH_DB and quantization.get("method") == "minmax":
            return (f"{finding}, and a narrower range would leave {gain:.1f} dB less noise in it",
                    f"--ranges mse, if the largest values do not matter most; else {unstored}")
        return finding, f"{unstored}, or --quantize int16"
    return f"{at}, what 8 bits give this distribution", f"{unstored}, or --quantize int16"


def _keep(names: Sequence[str]) -> str:
    return " ".join(f"--keep '{n}'" for n in names)


def _wider(quantization: Mapping[str, Any]) -> str:
    return "more calibration data" if quantization.get("method") == "minmax" else "--ranges minmax"
