"""The `skive` command.

Exit status: 0, 1 with one line `error: ...` on standard error when the input or the request is at
fault, 2 for wrong usage. `--json` prints one JSON document on standard output and nothing else
there. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import logging
import sys

import click

import skive
from skive.cli import bench, calibrate_exits, compile, inspect, opt, profile, run, targets, verify
from skive.console import Commands, OneLine


@click.group("skive", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(skive.__version__, prog_name="skive", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile neural networks ahead of time into small, fast native code.

    \b
      skive compile model.onnx -o model/      a folder with lib, header and sources
      skive run model/ --input x.npz          run it
      skive bench model.onnx --against onnxruntime,openvino

    Set SKIVE_DEBUG=1 to see the traceback of an error.
    """
    log = logging.getLogger("skive")
    if not any(isinstance(h, OneLine) for h in log.handlers):
        log.addHandler(OneLine(logging.WARNING))
        log.propagate = False


for _module in (compile, run, verify, inspect, opt, profile, bench, calibrate_exits, targets):
    cli.add_command(_module.command)


def main() -> None:
    """Runs the command line and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name must not fail to print
    cli()
