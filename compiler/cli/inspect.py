"""`skive inspect`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import skive
from skive.cli.opened import graph_ports, open_source
from skive.cli.options import CONFIG, JSON, THREADS, requested_shapes, shape_options
from skive.cli.run import layer_types
from skive.cli.summary import print_lines, summary_lines
from skive.console import bytes_text, count_text, print_json, print_table, printable, progress_bar, write_file
from skive.errors import InvalidModelError, UnsupportedOpError

if TYPE_CHECKING:
    from skive.ir import Graph
    from skive.runtime import TensorInfo
    from skive.speed import Forecast


@click.command("inspect")
@click.argument("subject", metavar="MODEL|ARTEFACT")
@shape_options
@click.option("--html", metavar="FILE", help="Write the report as one self-contained page.")
@click.option("--predict", is_flag=True,
              help="Forecast the time of each layer in float32, int8 and int16 on this processor.")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="Threads of the forecast.")
@CONFIG
@JSON
def command(subject: str, inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
            example: str | None, html: str | None, predict: bool, threads: int, as_json: bool) -> None:
    """Show what a model needs, or what an artefact holds.

    For a model: inputs, outputs, operations, MACs, weights, and what is not supported. For an
    artefact: its compile report.

    --predict needs no calibration data: the kernels that the model would be lowered to are compiled and
    timed once for each processor; afterwards the forecast comes from the cache. What does not fit into
    three quarters of a minute is interpolated; the same command measures more of it the next time.

    \b
    Examples:
      skive inspect resnet50.onnx
      skive inspect resnet50.onnx --predict
      skive inspect kws/ --json
      skive inspect kws.onnx --html kws.html
    """
    if Path(subject).is_dir():
        if predict:
            raise click.UsageError("--predict is for models; `skive profile` measures an artefact")
        _inspect_artefact(Path(subject), html, as_json)
    else:
        _inspect_model(subject, requested_shapes(inputs, batch_max, example), html, as_json, threads if predict else 0)


def _inspect_model(model: str, request: dict[str, Any], html: str | None, as_json: bool, predicted: int = 0) -> None:
    """`predicted`: threads of the forecast, 0 for none."""
    from skive import ops
    from skive.pipeline import operations, total_macs, weight_bytes

    source = open_source(model, **request)
    facts: dict[str, Any] = {"model": {"path": model, "sha256": source.sha256}, "unsupported": []}
    try:
        graph = source.graph()
    except UnsupportedOpError as e:
        facts["unsupported"] = [{"node": n, "reason": r, "hint": h} for n, r, h in e.problems]
        if as_json:
            print_json(facts)
            return
        count = len(e.problems)
        click.echo(f"{printable(model)}: {count} {'place is' if count == 1 else 'places are'} not supported")
        print_table(["node", "reason", "hint"], [list(p) for p in e.problems])
        return
    facts["model"] |= {"macs": total_macs(graph), "weight_bytes": weight_bytes(graph),
                       "nodes": operations(graph)}
    sides = {"inputs": graph_ports(graph.inputs),
             "outputs": graph_ports(graph.outputs, graph.output_names)}
    facts |= {k: [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in ports]
              for k, ports in sides.items()}
    counts: dict[str, list[int]] = {}
    for n in graph.nodes:
        if n.op not in ("input", "const"):
            row = counts.setdefault(n.op, [0, 0])
            row[0] += 1
            row[1] += ops.macs(n)
    facts["operations"] = [{"op": op, "count": c, "macs": m} for op, (c, m) in
                           sorted(counts.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))]
    if html is not None:
        from skive import passes, report
        from skive.pipeline import PassManager

        after, records = PassManager().run(graph, passes.EXACT, check="never")
        page = report.render({"skive": skive.__version__, "model": facts["model"],
                              "passes": [r.to_json() for r in records]}, graph, after)
        write_file(html, lambda path: path.write_text(page, encoding="utf-8"))
    forecast = _forecast(graph, predicted) if predicted else None
    if forecast:
        facts["prediction"] = forecast.to_json()
    if as_json:
        print_json(facts)
        return
    click.echo(f"{printable(model)}: {facts['model']['nodes']} operation"
               f"{'s' * (facts['model']['nodes'] != 1)}, "
               f"{count_text(facts['model']['macs'])} MACs, {bytes_text(facts['model']['weight_bytes'])} of weights")
    _print_ports(sides)
    print_table(["operation", ">count", ">MACs"],
                [[o["op"], str(o["count"]), count_text(o["macs"]) if o["macs"] else "-"] for o in facts["operations"]])
    if forecast:
        _print_forecast(forecast)


def _forecast(graph: Graph, threads: int) -> Forecast:
    from skive import passes, speed

    canonical, _ = passes.canonical(graph, check="never")
    with progress_bar() as progress:
        return speed.predict(canonical, threads=threads, progress=progress)


def _print_forecast(forecast: Forecast) -> None:
    """Microseconds by layer and element type, the totals, and which layers lose by int8."""
    dtypes = list(forecast.measured)
    click.echo(f"\nforecast for this processor, {forecast.threads} thread{'s' * (forecast.threads > 1)}")
    rows = [[layer.name, layer.op, *(f"{layer.us[d]:.2f}" for d in dtypes)] for layer in forecast.layers]
    totals = forecast.total_us
    rows.append(["total", "", *(f"{totals[d]:.2f}" for d in dtypes)])
    print_table(["layer", "op", *(f">{d} us" for d in dtypes)], rows)
    for d in dtypes:
        if forecast.measured[d] < 1:
            click.echo(f"{d}: {100 * (1 - forecast.measured[d]):.0f} % of the time is interpolated from similar shapes")
    losing = [layer for layer in forecast.layers if layer.loses]
    for layer in losing:
        factor = layer.us["int8"] / layer.us["float32"] if layer.us["float32"] else 0
        by = f"{factor:.2f} x its float32 time" if factor else f"{layer.us['int8']:.2f} us that float32 does not need"
        click.echo(printable(f"{layer.name} loses by int8 ({by}): {layer.loses}"))
    if "int8" in totals and not losing:
        click.echo("no layer loses by int8")
    for layer, factor in forecast.weight_only():
        click.echo(printable(f"{layer.name} waits for its weights: weights8 makes it {factor:.1f} x as fast"))


def _print_ports(sides: Mapping[str, Sequence[TensorInfo]]) -> None:
    for side, ports in sides.items():
        for p in ports:
            shape = "x".join("N" if d < 0 else str(d) for d in p.shape) or "scalar"
            click.echo(f"  {side[:-1]:<7} {printable(p.name)}  {p.dtype} {shape}")


def _inspect_artefact(folder: Path, html: str | None, as_json: bool) -> None:
    from skive.runtime import MANIFEST, TensorInfo

    documents = {}
    for name in (MANIFEST, "report.json"):
        try:
            documents[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidModelError(f"{folder} is not an artefact: it has no {name}") from None
        except ValueError as e:
            raise InvalidModelError(f"{folder / name} is damaged: {e}") from None
    manifest, report = documents[MANIFEST], documents["report.json"]
    try:
        sides = {side: [TensorInfo(p["name"], tuple(p["shape"]), p["dtype"]) for p in manifest[side]]
                 for side in ("inputs", "outputs")}
        title = f"{folder}: {manifest['name']}, skive {manifest['skive']}"
        summary = summary_lines(report)
    except (KeyError, TypeError, AttributeError) as e:
        raise InvalidModelError(f"{folder}: the manifest or the report is damaged: {e}") from None
    if html is not None:
        write_file(html, lambda path: shutil.copyfile(folder / "report.html", path))
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    if as_json:
        print_json({"manifest": manifest, "report": report, "files": files})
        return
    click.echo(printable(title))
    _print_ports(sides)
    print_lines(summary)
    if any("dtype" in layer for layer in report["layers"]):
        print_table([">#", "layer", "kernel", "computes in", "reads", "writes", ">MACs"],
                    [[str(i), layer["name"] or layer["op"], layer["kernel"], *layer_types(layer),
                      count_text(layer["macs"]) if layer["macs"] else "-"] for i, layer in enumerate(report["layers"])])
        click.echo()
    print_table(["file", ">bytes"], [[name, f"{size:,}"] for name, size in files.items()])
