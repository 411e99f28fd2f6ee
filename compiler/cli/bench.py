"""`skive bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from skive.cli.options import CONFIG, JSON, THREADS, requested_shapes, shape_options
from skive.console import print_json, print_table, printable, progress_bar


@click.command("bench")
@click.argument("subjects", nargs=-1, required=True, metavar="ARTEFACT|MODEL ...")
@click.option("--threads", type=THREADS, help="1 by default; for an artefact what it was compiled for.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True,
              help="Measured time per engine and model.")
@click.option("--against", default="", metavar="ENGINES", help="Of: onnxruntime,openvino.")
@click.option("--target", default="host", show_default=True, help="Target that models are compiled for.")
@shape_options
@CONFIG
@JSON
def command(subjects: tuple[str, ...], threads: int | None, seconds: float, against: str, target: str,
          inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
          example: str | None, as_json: bool) -> None:
    """Measure latency, alone or in turns with other engines.

    Every engine runs in a process of its own; they take turns of a fraction of a second, so that a
    drift of the machine meets all alike. A turn in which the process did not have its cores is
    repeated. The ratio is the median over pairs of turns: above 1, skive is faster.

    \b
    Examples:
      skive bench kws/
      skive bench resnet50.onnx mobilenetv2.onnx --against onnxruntime,openvino --seconds 5
    """
    from skive import bench as benchmark

    engines = [e for e in (part.strip() for part in against.split(",")) if e]
    unknown = [e for e in engines if e not in benchmark.ENGINES or e == "skive"]
    if unknown:
        raise click.UsageError(f"--against: no engine {unknown[0]!r}; there are "
                               + ", ".join(e for e in benchmark.ENGINES if e != "skive"))
    with progress_bar() as progress:
        result = benchmark.bench(subjects, engines=engines, threads=threads, seconds=seconds,
                                 target=target, progress=progress,
                                 **requested_shapes(inputs, batch_max, example))
    if as_json:
        print_json(result)
        return
    machine = result["machine"]
    click.echo(printable(f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores"))
    print_table(["model", "engine", "version", ">threads", ">median ms", ">min ms", ">spread", ">runs", ""],
                [[r["model"], r["engine"], r["version"], str(r["threads"]), f"{r['median_ms']:.4f}",
                  f"{r['min_ms']:.4f}", f"{100 * r['spread']:.1f} %", str(r["runs"]), _remarks(r)]
                 for r in result["results"]])
    for engine, ratio in result["ratio"].items():
        if ratio is None:
            click.echo(f"{engine} has no ratio: the outputs differ")
        else:
            click.echo(f"{engine} takes {ratio:.2f} x the time of skive"
                       + (" (geometric mean)" if len(subjects) > 1 else ""))


def _remarks(row: Mapping[str, Any]) -> str:
    remarks = []
    if row["agrees"] is False:
        remarks.append(f"WRONG: off by {row['max_relative_error']:.2g} of the range")
    if row["disturbed"]:
        remarks.append("noisy machine")
    return ", ".join(remarks)
