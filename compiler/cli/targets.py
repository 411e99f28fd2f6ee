"""`skive targets`."""

from __future__ import annotations

from typing import Any

import click

from skive.cli.options import JSON
from skive.console import print_json, print_table, printable


@click.command("targets")
@JSON
def command(as_json: bool) -> None:
    """List the targets, which of them run here, and the C++ compiler found."""
    from skive import _native, build
    from skive.errors import ToolchainError
    from skive.targets.base import TARGETS, resolve

    features = set(_native.cpu_features())
    host = resolve("host", sorted(features)).name
    rows = [{"name": t.name, "runs_here": set(t.features) <= features, "host": t.name == host,
             "needs": list(t.features), "doc": t.doc} for t in TARGETS.values()]
    try:
        command = build.compiler()
        toolchain: dict[str, Any] = {"command": list(command), "version": build.compiler_version(command)}
    except ToolchainError as e:
        toolchain = {"command": None, "version": None, "error": str(e)}
    if as_json:
        print_json({"targets": rows, "compiler": toolchain})
        return
    print_table(["target", "runs here", "what"],
                [[str(r["name"]), ("yes, `host`" if r["host"] else "yes") if r["runs_here"] else "no", str(r["doc"])]
                 for r in rows])
    if toolchain["command"]:
        click.echo(printable(f"compiler: {' '.join(toolchain['command'])} ({toolchain['version']})"))
    else:
        click.echo(printable(f"compiler: none; {toolchain['error']}"))
