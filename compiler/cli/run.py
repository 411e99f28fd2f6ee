"""`skive run`."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from skive.cli.arrays import as_integers, fit_arrays, in_calls, read_arrays
from skive.cli.opened import load_artefact
from skive.cli.options import CONFIG, JSON
from skive.console import count_text, print_json, print_table, printable, write_file

if TYPE_CHECKING:
    from skive.runtime import Module


# `skive run --json` prints the values of an output of at most this many elements.
_PRINTED_VALUES = 64


@click.command("run")
@click.argument("artefact")
@click.option("--input", "input_file", required=True, metavar="FILE.npz[:KEY]",
              help="Inputs by name, or arr_0, arr_1, ... by position; [n, ...] runs all n samples.")
@click.option("-o", "--output", metavar="FILE.npz", help="Write the outputs, by name.")
@CONFIG
@JSON
def command(artefact: str, input_file: str, output: str | None, as_json: bool) -> None:
    """Run ARTEFACT on the arrays of a file.

    \b
    Examples:
      skive run kws/ --input test.npz -o scores.npz
      skive run kws/ --input test.npz:x --json
    """
    module = load_artefact(artefact)
    arrays = as_integers(fit_arrays(read_arrays(input_file), module.inputs), module.inputs)
    ports = [module.outputs[i] for i in module.exits[-1].outputs] if module.exits else module.outputs
    results: list[list[np.ndarray]] = [[] for _ in ports]
    seconds = []
    spent: list[Any] = []
    for call in in_calls(arrays, module.inputs, module.manifest["batch_max"]):
        start = time.perf_counter()
        if module.exits:
            spent.append(module.run(*call))
        result = spent[-1].outputs if module.exits else module(*call)
        seconds.append(time.perf_counter() - start)
        for kept, r in zip(results, result if isinstance(result, tuple) else (result,), strict=True):
            kept.append(r)
    joined = {p.name: np.concatenate(r) if len(r) > 1 and r[0].ndim else r[0]
              for p, r in zip(ports, results, strict=True)}
    taken = _exits_taken(module, spent)
    if taken:
        for kind in ("exit", "macs"):
            key = kind
            while key in joined:  # an output has this name
                key += "_"
            joined[key] = np.concatenate([getattr(r, kind) for r in spent])
    if output is not None:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as archive:  # as savez, which takes an output called `file` for its own
                for name, value in joined.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                        np.lib.format.write_array(f, np.asarray(value), allow_pickle=False)

        write_file(output, write)
    statistics = [_statistics(k, v) for k, v in joined.items()]
    median_ms = float(np.median(seconds)) * 1e3
    if as_json:
        print_json({"calls": len(seconds), "median_ms": median_ms, "outputs": statistics} | taken)
        return
    print_table(["output", "shape", "dtype", ">min", ">mean", ">max"],
                [[o["name"], str(o["shape"]), o["dtype"],
                  *("-" if o[k] is None else f"{o[k]:.6g}" for k in ("min", "mean", "max"))]
                 for o in statistics])
    if taken:
        click.echo(printable("exits: " + ", ".join(f"{e['name']} {100 * e['share']:.1f} %" for e in taken["exits"])
                             + f"; {count_text(int(taken['mean_macs']))} MACs a sample"))
    click.echo(f"{len(seconds)} call{'s' * (len(seconds) > 1)}, median {median_ms:.3f} ms"
               + (f", written to {printable(output)}" if output else ""))


def _exits_taken(module: Module, spent: Sequence[Any]) -> dict[str, Any]:
    """How many samples left at each exit, and the mean of their MACs; nothing for a network without exits."""
    if not spent:
        return {}
    taken = np.concatenate([r.exit for r in spent])
    counts = np.bincount(taken, minlength=len(module.exits))
    return {"exits": [{"name": e.name, "samples": int(c), "share": float(c) / len(taken)}
                      for e, c in zip(module.exits, counts, strict=True)],
            "mean_macs": float(np.mean(np.concatenate([r.macs for r in spent])))}


def layer_types(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a kernel computes in, reads and writes; artefacts of an earlier skive do not say."""
    return layer.get("dtype", "-"), ", ".join(layer.get("reads", ())) or "-", layer.get("writes") or "-"


def _statistics(name: str, a: np.ndarray) -> dict[str, Any]:
    numbers = a[np.isfinite(a)].astype(np.float64) if a.dtype.kind == "f" else a.astype(np.float64)
    some = numbers.size > 0
    info: dict[str, Any] = {
        "name": name, "shape": list(a.shape), "dtype": str(a.dtype),
        "min": numbers.min() if some else None, "mean": numbers.mean() if some else None,
        "max": numbers.max() if some else None}
    if a.size <= _PRINTED_VALUES:
        info["values"] = a
    return info
