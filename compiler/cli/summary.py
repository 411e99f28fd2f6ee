"""What an artefact is, in lines for a reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click

from skive.console import bytes_text, count_text, printable


def summary_lines(report: Mapping[str, Any], seconds: float | None = None) -> list[tuple[str, str]]:
    """The headline figures of a compile report with their names. `seconds`: what the command took,
    which is less than the report says if the artefact came from the cache."""
    model, target, compiled = report["model"], report["target"], report["compiled"]
    bound = compiled.get("arena_lower_bound") or 0
    over = f", {compiled['arena_bytes'] / bound:.2f} x the lower bound" if bound else ""
    lines = [("target", f"{target['name']}, {target['threads']} thread{'s' * (target['threads'] > 1)}"),
             ("MACs", f"{_path_text(compiled)} (model: {count_text(model['macs'])})"),
             ("weights", f"{bytes_text(compiled['weight_bytes'])} (model: {bytes_text(model['weight_bytes'])})"),
             ("arena", bytes_text(compiled["arena_bytes"]) + over)]
    if compiled["code_bytes"]:
        lines.append(("code", bytes_text(compiled["code_bytes"])))
    if fewer := report.get("sparsity"):
        lines += _sparsity_lines(fewer)
    lines += [(f"exit {e['name']}", (f"{e['criterion']} {e['test']} {e['threshold']:g}, " if e["criterion"] else "")
               + f"{count_text(e['macs'])} MACs, {bytes_text(e['arena_bytes'])} of arena")
              for e in report.get("exits", ())]
    if fixed := report.get("quantization"):
        lines += _quantization_lines(fixed)
    lines += [("layers", f"{len(report['layers'])} kernel calls (model: {model['nodes']} operations)"),
              ("verified", verdict_text(report["verification"])),
              ("compiled in", f"{compiled['seconds'] if seconds is None else seconds:.1f} s")]
    return lines


def _path_text(compiled: Mapping[str, Any]) -> str:
    """The multiply-accumulates of a call, from the cheapest way through branches to the dearest."""
    if "macs_least" not in compiled:
        return count_text(compiled["macs"])
    return f"{count_text(compiled['macs_least'])} to {count_text(compiled['macs_most'])}"


def _sparsity_lines(fewer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many channels went, how many weights are zero in blocks, and what the zeros bring."""
    lines = []
    if fewer["groups"]:
        channels = fewer.get("channels", fewer)
        kept, whole = (sum(g[k] for g in fewer["groups"]) for k in ("kept", "channels"))
        lines.append(("pruned", f"{channels['macs_removed']:.1%} of the MACs, {whole - kept} of {whole} channels "
                                f"({channels['criterion']})"))
        lines += _pruning_lines(channels)
    if "fraction" in fewer:
        lines.append(("sparsified", f"{fewer['pattern']}, {fewer['macs_removed']:.1%} of the MACs ({fewer['criterion']}"
                                    ")"))
    if layers := fewer.get("layers"):
        used = [layer for layer in layers if not layer["refused"]]
        gains = [layer["speedup"] for layer in used]
        gain = f", {min(gains):.1f} to {max(gains):.1f} times as fast by forecast" if gains else ""
        lines.append(("zeros", f"sparse kernels in {len(used)} of {len(layers)} layers with zeros{gain}"))
    return lines


def _pruning_lines(channels: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else went, and what the weights that are left were fitted to."""
    lines = []
    if branches := channels.get("erased"):
        lines.append(("erased", ", ".join(b["sum"] for b in branches)))
    if channels.get("zero_channels"):
        lines.append(("zero", f"{channels['zero_channels']} channels were zero"))
    if forecast := channels.get("forecast_us"):
        lines.append(("forecast", f"{forecast['whole']:.0f} us whole, {forecast['pruned']:.0f} us pruned, in float32"))
    fit = channels["fit"]
    if fit["data"]:
        noise = " of noise, as --calibrate gives no data" if fit["data"] == "noise" else " of --calibrate"
        what = "measured with" if not channels["refit"] else "fitted to"
        lines.append((what, f"{fit['samples']} samples{noise}"))
    if layers := fit["not_fitted"]:
        lines.append(("not fitted", "; ".join(f"{n['layer']}: {n['reason']}" for n in layers)))
    return lines


def _quantization_lines(fixed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many layers are computed in what, and those that cause most noise."""
    from skive import explanation

    counts = Counter(layer["dtype"] for layer in fixed["layers"] if layer["op"] != "input")
    ratio = f", SQNR {fixed['sqnr_db']:.1f} dB against float32" if fixed.get("sqnr_db") is not None else ""
    lines = [("quantized", ", ".join(f"{n} x {t}" for t, n in counts.most_common()) + ratio)]
    worst = explanation.worst(fixed["layers"])
    for key, layer in zip(["most noise", *[""] * len(worst)], worst, strict=False):
        lines.append((key, f"{layer['name']} ({layer['op']}): {100 * layer['noise_share']:.0f} % of it"
                      + (f", {layer['sqnr_db']:.1f} dB" if layer["sqnr_db"] is not None else "")))
    islands = [i for i in fixed.get("islands", ()) if i["bytes"]]
    if islands:
        kinds = Counter(op for i in islands for op in i["ops"])
        lines.append(("in float32", ", ".join(f"{n} x {op}" if n > 1 else op for op, n in kinds.most_common())
                      + " (report.html says why)"))
    return lines


def print_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Prints what `summary_lines` gives as two columns."""
    for key, value in lines:
        click.echo(f"  {key:<12} {printable(value)}")


def verdict_text(verdict: Mapping[str, Any] | None) -> str:
    """The `verification` of report.json in one line."""
    if verdict is None:
        return "no"
    ratio = f", SQNR {verdict['sqnr_db']:.0f} dB" if verdict.get("sqnr_db") is not None else ""
    return (f"{'yes' if verdict['passed'] else 'FAILED'}, max |error| {verdict['max_abs_error']:.2g}"
            f"{ratio} against {verdict['reference']}")
