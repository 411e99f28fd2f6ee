"""`skive calibrate-exits`."""

from __future__ import annotations

import json
from pathlib import Path

import click

import skive
from skive.cli.arrays import as_integers, fit_arrays, in_calls, read_arrays, read_labels
from skive.cli.opened import load_artefact, open_source
from skive.cli.options import CONFIG, JSON, requested_shapes, shape_options
from skive.console import count_text, print_json, print_table, printable, write_file
from skive.errors import ExitError


@click.command("calibrate-exits")
@click.argument("subject", metavar="MODEL|ARTEFACT")
@click.option("--data", required=True, metavar="FILE.npz[:KEY]", help="Validation inputs, [n, ...] for n samples.")
@click.option("--labels", metavar="KEY|FILE.npz:KEY", help="The right class of each sample; without it the whole "
              "network's answer counts as right.")
@click.option("--goal", required=True, metavar="GOAL",
              help="accuracy=90 (percent), accuracy-drop=0.5 (points), macs=0.6 or latency=0.6 (fraction of the whole "
                   "network's), risk=0.05@0.95 (fraction of inputs that lose a right answer, confidence).")
@click.option("--shared", is_flag=True, help="One threshold for all exits: better with a few hundred samples or less.")
@click.option("--exit", "exits", multiple=True, metavar="NAME:CRITERION",
              help="Of a MODEL: an exit and its criterion (repeatable); by default every output but the last, by "
                   "max-prob.")
@shape_options
@click.option("-o", "--output", metavar="FILE.toml", help="Write the thresholds, for `skive compile --config`.")
@click.option("--plot", metavar="FILE.svg", help="Write accuracy against cost as a picture.")
@CONFIG
@JSON
def command(subject: str, data: str, labels: str | None, goal: str, shared: bool, exits: tuple[str, ...],
                    inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None, example: str | None,
                    output: str | None, plot: str | None, as_json: bool) -> None:
    """Choose the thresholds of early exits on labelled data.

    Give the ARTEFACT that will be used (in fixed point, for example), or a MODEL, which is then compiled in float32.

    \b
    Examples:
      skive calibrate-exits net.onnx --data val.npz:x --labels y --goal accuracy-drop=0.5 -o exits.toml
      skive compile net.onnx -o net/ --config exits.toml
      skive calibrate-exits net/ --data val.npz:x --labels y --goal risk=0.05@0.95 --plot curve.svg
    """
    from skive import exit_calibration
    from skive.criteria import CRITERIA
    from skive.exits import Exit

    wanted = exit_calibration.Goal.parse(goal)
    if Path(subject).is_dir():
        if exits:
            raise click.UsageError("--exit is for a MODEL; an artefact has its exits")
        module = load_artefact(subject)
    else:
        request = requested_shapes(inputs, batch_max, example)
        names = exits or tuple(open_source(subject, **request).graph().output_names[:-1])
        asked = [Exit.parse(f"{n}=inf" if ":" in n else f"{n}:max-prob=inf") for n in names]
        if not asked:
            raise ExitError(f"{subject} has one output; name a tensor with --exit, or give a model with several")
        module = skive.compile(subject, exits=asked, verify=False, **request)
    arrays = as_integers(fit_arrays(read_arrays(data), module.inputs), module.inputs)
    classes = read_labels(labels, data, len(arrays[0]), None) if labels is not None else None
    evidence = exit_calibration.collect(module, in_calls(arrays, module.inputs, module.manifest["batch_max"]), classes,
                                        wanted.kind == "latency")
    rows = module.manifest["exits"]
    if shared and len(criteria := sorted({r["criterion"] for r in rows[:-1]})) > 1:
        raise ExitError(f"the exits have different criteria ({', '.join(criteria)}): they cannot share a threshold")
    found = exit_calibration.calibrate(evidence, wanted, shared)
    texts = [Exit(r["name"], r["criterion"], 0.0, r["of"]).text(t) if r["criterion"] in CRITERIA else ""
             for r, t in zip(rows, found.setting.thresholds, strict=False)]
    facts = exit_calibration.to_json(found, [r["name"] for r in rows]) | {"goal": goal, "exits": texts}
    title = (f"{found.setting.accuracy:.2f} % (whole network {found.whole.accuracy:.2f} %) at "
             f"{100 * found.setting.cost:.1f} % of its {'time' if wanted.kind == 'latency' else 'MACs'}")
    if output is not None:
        lines = [f"# {goal}: {title}", f"exit = {json.dumps([t for t in texts if t])}", ""]
        write_file(output, lambda path: path.write_text("\n".join(lines), encoding="utf-8"))
    if plot is not None:
        picture = exit_calibration.plot(found, [r["name"] for r in rows], title)
        write_file(plot, lambda path: path.write_text(picture, encoding="utf-8"))
    if as_json:
        print_json(facts)
        return
    click.echo(printable(f"{subject}: {title}"))
    print_table(["exit", "criterion", ">threshold", ">samples", ">cost"],
                [[r["name"], r["criterion"] or "-", f"{r['test']} {t:.6g}" if r["test"] else "-", f"{100 * s:.1f} %",
                  f"{c:.3f}"]
                 for r, t, s, c in zip(rows, [*found.setting.thresholds, 0.0], found.setting.shares, evidence.cost,
                                       strict=True)])
    held = found.held_out
    click.echo(f"held out: {held.accuracy:.2f} % at {100 * held.cost:.1f} %, on half of the samples with thresholds "
               "from the other half" + (f"; risk below {found.bound:.4f}" if found.bound is not None else ""))
    click.echo(f"worst case: an input that never leaves costs {count_text(rows[-1]['macs'])} MACs, the whole network "
               "and the heads of all exits")
