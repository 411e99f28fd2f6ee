"""`skive verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from skive.cli.arrays import fit_arrays, in_calls, read_arrays, read_labels
from skive.cli.opened import load_artefact
from skive.cli.options import CONFIG, JSON
from skive.cli.summary import print_lines, verdict_text
from skive.console import fail, print_json, printable, progress_bar


@click.command("verify")
@click.argument("artefact")
@click.option("--against", required=True, metavar="MODEL", help="The model it was compiled from.")
@click.option("--data", metavar="FILE.npz[:KEY]", help="Inputs, [n, ...] for n samples; random ones by default.")
@click.option("--labels", metavar="KEY|FILE.npz:KEY",
              help="The right class of each sample, in the file of --data or another: adds accuracy.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="The first N samples; all by default.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail below this signal-to-noise ratio of an output.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), metavar="FRACTION",
              help="Fail if fewer of the decisions (top-1) are those of the model.")
@CONFIG
@JSON
def command(artefact: str, against: str, data: str | None, labels: str | None, samples: int | None,
           min_sqnr: float | None, min_agreement: float | None, as_json: bool) -> int:
    """Compare ARTEFACT with the numpy reference of MODEL; exit status 1 if they differ.

    A float32 artefact may differ by 1e-4 of the output's range. An artefact in fixed point was compared
    with its own integers when it was compiled; against a float32 model this command reports what
    quantization cost, and fails only below --min-sqnr or --min-agreement.

    \b
    Examples:
      skive verify kws/ --against kws.onnx --data test.npz:x
      skive verify kws8/ --against kws.onnx --data test.npz:x --labels y --min-agreement 0.98
    """
    from skive import check
    from skive.verification import verdict_against

    module = load_artefact(artefact)
    calls, classes, total = None, None, 1
    if labels is not None and data is None:
        raise click.UsageError("--labels needs --data")
    if data is not None:
        arrays = fit_arrays(read_arrays(data), module.inputs)
        if samples is not None:
            arrays = [a[:samples] if a.ndim else a for a in arrays]
        step = module.inputs[0].shape[0] if module.inputs and module.inputs[0].shape else 1
        total = len(arrays[0]) // max(1, step) if arrays and arrays[0].ndim else 1
        calls = in_calls(arrays, module.inputs, 1)
        if labels is not None:
            classes = read_labels(labels, data, len(arrays[0]), samples)
    with progress_bar() as progress:
        verdict, agreement = verdict_against(module, against, calls, classes,
                                             lambda done: progress("compare", done / max(1, total)))
    fields = {k: getattr(verdict, k) for k in ("reference", "samples", "max_abs_error",
                                               "relative_error", "sqnr_db", "passed", "worst_node")}
    found = agreement.to_json()
    same = found.get("top1_agreement")
    problems = []
    if not verdict.passed:
        problems.append(f"differs from {against} {verdict.distance}")
    if min_sqnr is not None and (verdict.sqnr_db is None or verdict.sqnr_db < min_sqnr):
        reached = "no float output" if verdict.sqnr_db is None else f"an SQNR of {verdict.sqnr_db:.1f} dB"
        problems.append(f"has {reached}, --min-sqnr is {min_sqnr:g}")
    if min_agreement is not None and (same is None or same["fraction"] < min_agreement):
        reached = "no output with classes" if same is None else f"{same['fraction']:.4f} of its decisions in common"
        problems.append(f"has {reached}, --min-agreement is {min_agreement:g}")
    fields["passed"] = not problems
    if as_json:
        print_json(fields | found)
    else:
        if not problems:
            relation = "agrees with" if 0 <= verdict.relative_error <= check.TOLERANCE else "rounds more than"
            click.echo(printable(f"{artefact} {relation} {against}: {verdict_text(fields)}"))
        if data is not None:
            print_lines(_agreement_lines(found, verdict.samples))
    return fail(printable(f"{artefact} {'; '.join(problems)}")) if problems else 0


def _agreement_lines(found: Mapping[str, Any], samples: int) -> list[tuple[str, str]]:
    def rate(p: Mapping[str, Any]) -> str:
        low, high = p["interval"]
        return (f"{100 * p['fraction']:.2f} % ({p['count']} of {p['of']}; "
                f"95 % interval {100 * low:.1f} to {100 * high:.1f})")

    lines = [("samples", str(samples))]
    lines += [("output", f"{o['name']}: SQNR {o['sqnr_db']:.1f} dB, max |error| {o['max_abs_error']:.3g}")
              for o in found["outputs"]]
    if "top1_agreement" in found:
        lines.append(("same top-1", rate(found["top1_agreement"])))
    if accuracy := found.get("accuracy"):
        lines += [("accuracy", rate(accuracy["artefact"])), ("of the model", rate(accuracy["model"])),
                  ("only right", f"artefact {accuracy['only_artefact_right']}, model {accuracy['only_model_right']}")]
    return lines
