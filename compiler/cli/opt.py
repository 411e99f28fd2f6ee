"""`skive opt`."""

from __future__ import annotations

from pathlib import Path

import click

from skive.cli.opened import open_source
from skive.cli.options import CONFIG, requested_shapes, shape_options
from skive.console import print_table


@click.command("opt")
@click.argument("model")
@click.option("-p", "--passes", "pipeline", required=True, metavar="PASSES",
              help="Names with options: fold-constants{max_bytes=4096},eliminate-dead. "
                   "'' runs none, 'help' lists them.")
@click.option("-o", "--output", metavar="FILE", help="Write the text form (and constants beside it).")
@shape_options
@click.option("--dump-ir", metavar="DIR", help="Write the IR after every pass, and the differences.")
@CONFIG
def command(model: str, pipeline: str, output: str | None,
        inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
        example: str | None, dump_ir: str | None) -> None:
    """Run PASSES over MODEL and print skive's text form.

    \b
    Examples:
      skive opt kws.onnx -p fold-constants,eliminate-dead
      skive opt kws.onnx -p fold-batchnorm --dump-ir steps/
    """
    from skive import passes, text  # noqa: F401 - importing `passes` registers them
    from skive.pipeline import PASSES, PassManager, parse_pipeline

    if pipeline == "help":
        print_table(["pass", "exact", "result"],
                    [[p.name, "yes" if p.exact else "no", p.doc] for p in PASSES.values()])
        return
    steps = parse_pipeline(pipeline)
    graph = open_source(model, **requested_shapes(inputs, batch_max, example)).graph()
    graph, _ = PassManager().run(graph, steps, dump_dir=dump_ir)
    if output is None:
        click.echo(text.print_graph(graph))
    else:
        text.save_text(graph, Path(output))
