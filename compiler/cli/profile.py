"""`skive profile`."""

from __future__ import annotations

from pathlib import Path

import click

from skive.cli.opened import load_artefact
from skive.cli.options import CONFIG, JSON
from skive.cli.run import layer_types
from skive.console import print_json, print_table, write_file


@click.command("profile")
@click.argument("artefact")
@click.option("--rounds", type=click.IntRange(3, 100_000), help="Runs of every layer; by default a second is filled.")
@click.option("--html", metavar="FILE", help="Write the report with the measured times.")
@CONFIG
@JSON
def command(artefact: str, rounds: int | None, html: str | None, as_json: bool) -> None:
    """Measure every layer of ARTEFACT.

    Layers run one after the other, each timed by itself; the figures are medians over many rounds.

    \b
    Example:
      skive profile kws/ --html kws.html
    """
    from skive import profiling

    result = profiling.profile(load_artefact(artefact), rounds=rounds)
    if html is not None:
        from skive import report

        page = report.with_profile(Path(artefact), result)
        write_file(html, lambda path: path.write_text(page, encoding="utf-8"))
    if as_json:
        print_json(result)
        return
    print_table([">#", "layer", "kernel", "computes in", "reads", "writes", ">us", ">share", ">GMAC/s", ">GB/s"],
                [[str(i), layer["name"] or layer["op"], layer["kernel"], *layer_types(layer), f"{layer['us']:.2f}",
                  f"{100 * layer['share']:.1f} %",
                  f"{layer['gmac_per_s']:.1f}" if layer["macs"] else "-", f"{layer['gb_per_s']:.1f}"]
                 for i, layer in enumerate(result["layers"])])
    click.echo(f"{result['rounds']} rounds; layers together {result['layers_us']:.1f} us, "
               f"the whole network in one call {result['run_us']:.1f} us")
