"""The `skive` command.

Exit status: 0, 1 with one line `error: ...` on standard error when the input or the request is at
fault, 2 for wrong usage. `--json` prints one JSON document on standard output and nothing else
there. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import skive
from skive.console import (
    Commands,
    OneLine,
    bytes_text,
    count_text,
    fail,
    print_json,
    print_table,
    printable,
    progress_bar,
    write_file,
)
from skive.errors import ExitError, InvalidModelError, ShapeError, SkiveError, UnsupportedOpError

if TYPE_CHECKING:
    from skive.frontend import Source
    from skive.ir import Graph
    from skive.runtime import Module, TensorInfo
    from skive.speed import Forecast

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# `skive run --json` prints the values of an output of at most this many elements.
_PRINTED_VALUES = 64


# ------------------------------------------------------------------------------------- what is read


class _Bytes(click.ParamType):
    """A number of bytes: 4096, 256K, 2M, 1G."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        text = str(value).upper().removesuffix("B")
        number, suffix = (text[:-1], text[-1:]) if text[-1:] in ("K", "M", "G") else (text, "")
        if not number.isdecimal():
            self.fail(f"{value!r} is not a number of bytes such as 4096, 256K or 2M", param, ctx)
        return int(number) * _SUFFIXES[suffix]


class _InputShape(click.ParamType):
    """NAME=1x3x224x224 as (name, shape); a leading N is the batch, -1 in the shape."""

    name = "name=shape"

    def convert(self, value: Any, param: click.Parameter | None,
                ctx: click.Context | None) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).rpartition("=")  # a name may hold `=`
        dims = text.split("x") if text else []
        batched = dims[:1] == ["N"]
        if not equals or not name or not all(d.isdecimal() for d in dims[batched:]):
            self.fail(f"{value!r} is not NAME=1x3x224x224 (or NAME=Nx3x224x224 with --batch-max)",
                      param, ctx)
        return name, (-1,) * batched + tuple(int(d) for d in dims[batched:])



def _configure(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Takes the defaults of the command's options from a TOML file; the command line wins."""
    if path is None:
        return
    import tomllib

    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise SkiveError(f"cannot read {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SkiveError(f"{path}: {e}") from None
    names = {o.removeprefix("--"): p.name for p in ctx.command.params
             if isinstance(p, click.Option) and p.name != "config" for o in p.opts if o.startswith("--")}
    for key, value in values.items():
        if key not in names:
            raise SkiveError(f"{path}: {ctx.info_name} has no option {key!r}; it has "
                             + ", ".join(sorted(n for n in names if n != "help")))
        many = any(p.multiple for p in ctx.command.params
                   if isinstance(p, click.Option) and p.name == names[key])
        if isinstance(value, dict) or (isinstance(value, list) and not many):
            raise SkiveError(f"{path}: {key} is one value")
        values[key] = [value] if many and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **{names[k]: v for k, v in values.items()}}


_CONFIG = click.option("--config", metavar="FILE.toml", is_eager=True, expose_value=False,
                       callback=_configure, help="Options of this command, under their names here.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_THREADS = click.IntRange(1, 256)


def _shape_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which shapes a model has."""
    for option in (
        click.option("--example", metavar="FILE.npz", help="Example inputs: shapes and types."),
        click.option("--batch-max", type=click.IntRange(1, 1 << 20), metavar="N",
                     help="Compile a symbolic batch for 1 to N samples a call."),
        click.option("--input", "inputs", type=_InputShape(), multiple=True,
                     metavar="NAME=1x3x224x224",
                     help="Shape of an input (repeatable); NAME=Nx3x224x224 leaves the batch open."),
    ):
        command = option(command)
    return command


def read_arrays(spec: str) -> dict[str, np.ndarray]:
    """The arrays of `FILE.npz[:KEY]` by name (KEY: that one alone). InvalidModelError if unreadable."""
    path, key = spec, None
    if not Path(spec).exists() and ":" in spec:
        path, _, key = spec.rpartition(":")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InvalidModelError(f"{path} is not an .npz file; write it with numpy.savez")
        with archive:
            if key is not None and key not in archive.files:
                raise InvalidModelError(f"{path} has no array {key!r}; it has {', '.join(archive.files)}")
            return {k: archive[k] for k in ([key] if key is not None else archive.files)}
    except FileNotFoundError:
        raise InvalidModelError(f"{path} is not there") from None
    except InvalidModelError:
        raise
    except OSError as e:
        raise InvalidModelError(f"cannot read {path}: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 - zipfile, zlib and numpy raise many kinds on damaged files
        raise InvalidModelError(f"{path} is not a readable .npz file: {e}") from None


def fit_arrays(arrays: Mapping[str, np.ndarray], ports: Sequence[TensorInfo]) -> list[np.ndarray]:
    """One array per port, of its type and, but for the number of samples, its shape [n, ...].

    Arrays go by name, or by position if they are called `arr_0`, `arr_1`, ... or there is one input
    and one array. ShapeError if one is missing or does not fit.
    """
    chosen = []
    for i, port in enumerate(ports):
        if port.name in arrays:
            a = arrays[port.name]
        elif f"arr_{i}" in arrays:
            a = arrays[f"arr_{i}"]
        elif len(ports) == len(arrays) == 1:
            a = next(iter(arrays.values()))
        else:
            hint = "; choose one as FILE.npz:KEY" if len(ports) == 1 and arrays else ""
            raise ShapeError(f"input {port.name!r} is missing; the file has {', '.join(arrays) or 'nothing'}{hint}")
        want = np.dtype(port.dtype)
        if a.dtype != want:
            if not np.can_cast(a.dtype, want, "same_kind"):
                raise ShapeError(f"input {port.name!r} is {a.dtype}, not {want}; convert it")
            a = a.astype(want)
        shape = tuple(port.shape)
        if a.shape != shape:
            if shape and a.shape == shape[1:]:
                a = a[None]
            if shape and a.ndim and [d for d in a.shape[1:] if d != 1] == [d for d in shape[1:] if d != 1]:
                a = a.reshape(len(a), *shape[1:])  # only axes of length 1 differ, such as one channel
            if not shape or a.ndim != len(shape) or a.shape[1:] != shape[1:] \
                    or (shape[0] > 0 and (len(a) < shape[0] or len(a) % shape[0])):
                raise ShapeError(f"input {port.name!r} is {list(a.shape)}, not {list(shape)}")
        chosen.append(a)
    return chosen


def _slices(arrays: Sequence[np.ndarray], ports: Sequence[TensorInfo],
            batch_max: int | None) -> Iterator[list[np.ndarray]]:
    """`arrays` cut into calls: as many samples a call as the compiled shape holds."""
    steps = [(p.shape[0] if p.shape[0] > 0 else batch_max or 1) if p.shape else 1 for p in ports]
    calls = {-(-len(a) // s) if a.ndim else 1 for a, s in zip(arrays, steps, strict=True)}
    if len(calls) > 1:
        raise ShapeError("the inputs hold different numbers of samples: "
                         + ", ".join(f"{p.name} {list(a.shape)}" for p, a in zip(ports, arrays, strict=True)))
    for c in range(calls.pop() if calls else 1):
        yield [a[c * s:(c + 1) * s] if a.ndim else a for a, s in zip(arrays, steps, strict=True)]


def _requested(inputs: Sequence[tuple[str, tuple[int, ...]]], batch_max: int | None,
               example: str | None) -> dict[str, Any]:
    """The keyword arguments of `frontend.open_model` that the shape options ask for."""
    if batch_max is None and any(shape[:1] == (-1,) for _, shape in inputs):
        raise click.UsageError("a shape with a leading N needs --batch-max")
    return {"input_shapes": dict(inputs), "batch_max": batch_max, "example_inputs": _example(example)}


def _example(spec: str | None) -> Any:
    if spec is None:
        return None
    arrays = read_arrays(spec)
    positional = [f"arr_{i}" for i in range(len(arrays))]
    return tuple(arrays[k] for k in positional) if sorted(arrays) == sorted(positional) else arrays


def _open(model: str, **request: Any) -> Source:
    from skive import frontend

    if Path(model).is_dir():
        raise InvalidModelError(f"{model} is a folder, not a model")
    return frontend.open_model(model, **request)


def _graph_ports(nodes: Sequence[Any], names: Sequence[str] | None = None) -> list[TensorInfo]:
    from skive.runtime import TensorInfo

    return [TensorInfo(name, n.shape, str(n.dtype.numpy))
            for n, name in zip(nodes, names or [n.name for n in nodes], strict=True)]


# --------------------------------------------------------------------------------------- commands


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


@cli.command("compile")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="DIR", help="The artefact folder to write.")
@click.option("--name", help="Name of the C functions and files; that of the model by default.")
@click.option("--target", default="host", show_default=True, help="One of `skive targets`.")
@click.option("--threads", type=_THREADS, default=1, show_default=True, help="Threads of one call.")
@_shape_options
@click.option("--quantize", type=click.Choice(["int8", "int16", "auto", "weights8", "weights4"]),
              help="Fixed point instead of float32; needs --calibrate. weights8 and weights4: only the weights of "
                   "fully connected layers and tables, with or without --calibrate.")
@click.option("--calibrate", metavar="FILE.npz[:KEY]",
              help="Inputs such as the network will meet (also a folder of .npz or .npy): value ranges come from "
                   "them, and the artefact is verified with them.")
@click.option("--ranges", type=click.Choice(["minmax", "percentile", "mse", "entropy"]), default="minmax",
              show_default=True, help="How value ranges follow from what was observed.")
@click.option("--rounding", type=click.Choice(["nearest", "adaround"]), default="adaround", show_default=True,
              help="How weights are rounded; adaround searches, with the calibration data.")
@click.option("--integer-only", is_flag=True,
              help="With --quantize int8: no float instruction; inputs and outputs are bytes with a scale and a zero "
                   "point.")
@click.option("--keep", multiple=True, metavar="PATTERN",
              help="Layers that stay float32, by name (repeatable; * and ? match).")
@click.option("--budget-sqnr", type=click.FloatRange(0, 300, min_open=True), metavar="DB",
              help="With --quantize auto: the least signal-to-noise ratio of an output (30 by default); the fastest "
                   "element types that keep it are taken.")
@click.option("--budget-us", type=click.FloatRange(0, min_open=True), metavar="US",
              help="With --quantize auto, instead: microseconds of one run; the most accurate types that keep it.")
@click.option("--block", type=click.IntRange(8), metavar="N",
              help="With --quantize weights8 or weights4: weights that share a scale, a multiple of 8 (64 of 4 bits, "
                   "a whole channel of 8 bits by default).")
@click.option("--activations", type=click.Choice(["8", "16", "32"]), default="16", show_default=True,
              help="With --quantize weights8 or weights4: bits to which each row of activations is rounded as it is "
                   "read; 32 computes in float32.")
@click.option("--prune", metavar="WHAT",
              help="Remove whole channels: 0.4, until this fraction of the multiply-accumulates is gone; "
                   "parameters=0.4, bytes=0.4 or latency=0.4 of the weights or of the time of a run here; zeros, those "
                   "that are zero already; erase=N, so many residual branches before (several with commas between). "
                   "What is left is fitted to --calibrate, or to noise without it.")
@click.option("--prune-criterion", type=click.Choice(["l1", "l2", "activation", "obspa", "random"]),
              default="activation", show_default=True, help="Which channels count least.")
@click.option("--sparsify", metavar="PATTERN@FRACTION",
              help="Make this fraction of the blocks of weights zero: block4x16@0.75, of 4 input by 16 output "
                   "channels; 2:4 (n of m input channels stay); 1x1@0.9 (single weights). With --calibrate what is "
                   "left is fitted to the data.")
@click.option("--sparsify-criterion", type=click.Choice(["magnitude", "activation", "reconstruction", "random"]),
              help="Which blocks count least: reconstruction with --calibrate, magnitude without it, by default.")
@click.option("--exit", "exits", multiple=True, metavar="NAME:CRITERION=VALUE",
              help="A call may end at this output (or tensor) of the model: exit0:max-prob=0.9 (repeatable). Criteria: "
                   "max-prob, margin, entropy, energy, patience, quality, and with the tensor or the numbers that they "
                   "read score@TENSOR, q-exit@TENSOR, gate@W,W,W,W,BIAS, window@MIDDLE, quality@BLOCK.")
@click.option("--export-onnx", metavar="FILE.onnx", help="Also write the optimised, quantized graph as ONNX.")
@click.option("--tune", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Measure other blocks and algorithms for each layer on this processor, for about so long, and "
                   "take the fastest.")
@click.option("--max-ram", type=_Bytes(), metavar="BYTES",
              help="Fail if the arena needs more (256K, 2M); the caller's tensors are not in it.")
@click.option("--max-flash", type=_Bytes(), metavar="BYTES",
              help="Fail if packed weights and code take more.")
@click.option("--backend", type=click.Choice(["skive", "tvm"]), default="skive", show_default=True,
              help="tvm: Apache TVM compiles the stages of a float32 network; needs the extra skive-compiler[tvm], "
                   "here and where the artefact runs.")
@click.option("--emit-only", is_flag=True, help="Write sources and weights, run no compiler.")
@click.option("--no-verify", is_flag=True, help="Do not compare the artefact with the reference.")
@click.option("--strict", is_flag=True, help="Also check every pass by running the graph.")
@click.option("--dump-ir", metavar="DIR", help="Write the IR after every pass, and the differences.")
@_CONFIG
@_JSON
def compile_command(model: str, output: str, name: str | None, target: str, threads: int,
                    inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
                    example: str | None, quantize: str | None, calibrate: str | None, ranges: str,
                    rounding: str, integer_only: bool, keep: tuple[str, ...], budget_sqnr: float | None,
                    budget_us: float | None, block: int | None, activations: str, prune: str | None,
                    prune_criterion: str, sparsify: str | None, sparsify_criterion: str | None,
                    exits: tuple[str, ...], export_onnx: str | None, tune: float | None, max_ram: int | None,
                    max_flash: int | None, backend: str, emit_only: bool, no_verify: bool, strict: bool,
                    dump_ir: str | None, as_json: bool) -> None:
    """Compile MODEL into the folder DIR.

    MODEL is an .onnx file, a .pt2 exported program, skive's text form, or package.module:callable
    that returns a torch.nn.Module. DIR is written whole or not at all.

    \b
    Examples:
      skive compile resnet50.onnx -o resnet50/ --threads 2
      skive compile kws.onnx -o kws/ --calibrate test.npz:x --max-ram 64K --max-flash 256K
      skive compile kws.onnx -o kws/ --quantize int8 --calibrate train.npz:x
      skive compile kws.onnx -o kws/ --quantize auto --calibrate train.npz:x --budget-sqnr 40
      skive compile bert.onnx -o bert/ --quantize weights4
      skive compile net.onnx -o net/ --prune 0.4 --quantize int8 --calibrate train.npz:x
      skive compile net.onnx -o net/ --sparsify block4x16@0.75 --quantize int8 --calibrate train.npz:x
      skive compile net.onnx -o net/ --exit exit0:max-prob=0.9 --exit exit1:entropy=0.4
      skive compile net.onnx -o net/ --input image=Nx3x224x224 --batch-max 8
      skive compile mypackage.nets:build -o net/ --example inputs.npz
      skive compile net.onnx -o net/ --config build.toml
    """
    from skive.artifact import write_folder

    started = time.perf_counter()
    request = _requested(inputs, batch_max, example)
    data, wanted, cut = None, None, None
    if quantize != "auto" and (budget_sqnr or budget_us):
        raise click.UsageError("--budget-sqnr and --budget-us go with --quantize auto")
    if quantize is not None and calibrate is None and not quantize.startswith("weights"):
        raise click.UsageError("--quantize needs --calibrate FILE.npz[:KEY]: inputs such as the network will meet")
    ports = _graph_ports(_open(model, **request).graph().inputs) if calibrate is not None else []
    if prune is not None:
        from skive import pruning

        cut = replace(pruning.requested(prune), criterion=prune_criterion, calibration=_calibration(calibrate, ports))
    if quantize is not None:
        wanted = skive.Quantize(quantize, calibration=_calibration(calibrate, ports), method=ranges, rounding=rounding,
                                keep=keep, integer_only=integer_only, budget_sqnr_db=budget_sqnr,
                                budget_us=budget_us, block=block, activations=int(activations))
    sparse = None
    if sparsify is not None:
        from skive import sparsity

        asked = sparsity.requested(sparsify)
        sparse = replace(asked, criterion=sparsify_criterion, calibration=_calibration(calibrate, ports))
    if calibrate is not None and quantize is None and cut is None and sparse is None:
        arrays = fit_arrays(read_arrays(calibrate), ports)
        data = [a[:p.shape[0]] if p.shape else a for a, p in zip(arrays, ports, strict=True)]
    limited = max_ram is not None or max_flash is not None
    with progress_bar() as progress:
        # With a limit nothing may appear at `output` before the limit is known to be kept.
        module = skive.compile(model, output=None if limited else output, name=name, target=target,
                               threads=threads, verify=not no_verify, strict=strict,
                               emit_only=emit_only, data=data, dump_ir=dump_ir, progress=progress,
                               quantize=wanted, prune=cut, sparsify=sparse, exits=exits or None,
                               export_onnx=export_onnx, tune=tune, backend=backend, **request)
    report = module.report
    compiled = report["compiled"]
    if limited:
        flash = compiled["weight_bytes"] + compiled["code_bytes"]
        for option, limit, need, what in (
                ("--max-ram", max_ram, compiled["arena_bytes"], "the arena takes"),
                ("--max-flash", max_flash, flash, "weights and code take")):
            if limit is not None and need > limit:
                raise SkiveError(f"{what} {need:,} bytes, more than {option} {limit:,}")
        with write_folder(Path(output)) as temporary:
            shutil.copytree(module.folder, temporary, dirs_exist_ok=True)
    if as_json:
        print_json({"artefact": output, **report})
    else:
        click.echo(printable(f"{model} -> {output}"))
        _print_lines(_summary(report, time.perf_counter() - started))


def _calibration(path: str | None, ports: Sequence[TensorInfo]) -> Any:
    """What --calibrate names, as Quantize and Prune take it."""
    if path is None or ".npz" not in (Path(path.rpartition(":")[0] or path).suffix, Path(path).suffix):
        return path
    return {p.name: a for p, a in zip(ports, fit_arrays(read_arrays(path), ports), strict=True)}


def _summary(report: Mapping[str, Any], seconds: float | None = None) -> list[tuple[str, str]]:
    """The headline figures of a compile report with their names. `seconds`: what the command took,
    which is less than the report says if the artefact came from the cache."""
    model, target, compiled = report["model"], report["target"], report["compiled"]
    bound = compiled.get("arena_lower_bound") or 0
    over = f", {compiled['arena_bytes'] / bound:.2f} x the lower bound" if bound else ""
    lines = [("target", f"{target['name']}, {target['threads']} thread{'s' * (target['threads'] > 1)}"),
             ("MACs", f"{count_text(compiled['macs'])} (model: {count_text(model['macs'])})"),
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
              ("verified", _verdict_text(report["verification"])),
              ("compiled in", f"{compiled['seconds'] if seconds is None else seconds:.1f} s")]
    return lines


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


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    for key, value in lines:
        click.echo(f"  {key:<12} {printable(value)}")


def _verdict_text(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "no"
    ratio = f", SQNR {verdict['sqnr_db']:.0f} dB" if verdict.get("sqnr_db") is not None else ""
    return (f"{'yes' if verdict['passed'] else 'FAILED'}, max |error| {verdict['max_abs_error']:.2g}"
            f"{ratio} against {verdict['reference']}")


def _load(artefact: str) -> Module:
    from skive.runtime import load

    if not Path(artefact).is_dir():
        raise InvalidModelError(f"{artefact} is not an artefact folder; `skive compile` writes one")
    return load(artefact)


@cli.command()
@click.argument("artefact")
@click.option("--input", "input_file", required=True, metavar="FILE.npz[:KEY]",
              help="Inputs by name, or arr_0, arr_1, ... by position; [n, ...] runs all n samples.")
@click.option("-o", "--output", metavar="FILE.npz", help="Write the outputs, by name.")
@_CONFIG
@_JSON
def run(artefact: str, input_file: str, output: str | None, as_json: bool) -> None:
    """Run ARTEFACT on the arrays of a file.

    \b
    Examples:
      skive run kws/ --input test.npz -o scores.npz
      skive run kws/ --input test.npz:x --json
    """
    module = _load(artefact)
    arrays = fit_arrays(read_arrays(input_file), module.inputs)
    ports = [module.outputs[i] for i in module.exits[-1].outputs] if module.exits else module.outputs
    results: list[list[np.ndarray]] = [[] for _ in ports]
    seconds = []
    spent: list[Any] = []
    for call in _slices(arrays, module.inputs, module.manifest["batch_max"]):
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
        joined |= {k: np.concatenate([getattr(r, k) for r in spent]) for k in ("exit", "macs")}
    if output is not None:
        def write(path: Path) -> None:
            with path.open("wb") as f:  # a file object: savez would add .npz to the name
                np.savez(f, **joined)  # type: ignore[arg-type]  # its stub takes every name for an option

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


def _types(layer: Mapping[str, Any]) -> tuple[str, str, str]:
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


@cli.command()
@click.argument("artefact")
@click.option("--against", required=True, metavar="MODEL", help="The model it was compiled from.")
@click.option("--data", metavar="FILE.npz[:KEY]", help="Inputs, [n, ...] for n samples; random ones by default.")
@click.option("--labels", metavar="KEY|FILE.npz:KEY",
              help="The right class of each sample, in the file of --data or another: adds accuracy.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="The first N samples; all by default.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail below this signal-to-noise ratio of an output.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), metavar="FRACTION",
              help="Fail if fewer of the decisions (top-1) are those of the model.")
@_CONFIG
@_JSON
def verify(artefact: str, against: str, data: str | None, labels: str | None, samples: int | None,
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

    module = _load(artefact)
    calls, classes, total = None, None, 1
    if labels is not None and data is None:
        raise click.UsageError("--labels needs --data")
    if data is not None:
        arrays = fit_arrays(read_arrays(data), module.inputs)
        if samples is not None:
            arrays = [a[:samples] if a.ndim else a for a in arrays]
        step = module.inputs[0].shape[0] if module.inputs and module.inputs[0].shape else 1
        total = len(arrays[0]) // max(1, step) if arrays and arrays[0].ndim else 1
        calls = _slices(arrays, module.inputs, 1)
        if labels is not None:
            classes = _labels(labels, data, len(arrays[0]), samples)
    with progress_bar() as progress:
        verdict, agreement = verdict_against(module, against, calls, classes,
                                             lambda done: progress("compare", done / max(1, total)))
    fields = {k: getattr(verdict, k) for k in ("reference", "samples", "max_abs_error",
                                               "relative_error", "sqnr_db", "passed", "worst_node")}
    found = agreement.to_json()
    same = found.get("top1_agreement")
    problems = []
    if not verdict.passed:
        problems.append(f"differs from {against} by {verdict.relative_error:.2g} of the output's range")
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
            click.echo(printable(f"{artefact} {relation} {against}: {_verdict_text(fields)}"))
        if data is not None:
            _print_lines(_agreement_lines(found, verdict.samples))
    return fail(printable(f"{artefact} {'; '.join(problems)}")) if problems else 0


def _labels(spec: str, data: str, count: int, samples: int | None) -> np.ndarray:
    """The classes that KEY of the file of `data`, or FILE.npz:KEY, holds: one for each of `count` samples."""
    file = data if Path(data).exists() else data.rpartition(":")[0]
    place = spec if ":" in spec or Path(spec).exists() else f"{file}:{spec}"
    arrays = read_arrays(place)
    if len(arrays) != 1:
        raise InvalidModelError(f"{place} holds {', '.join(arrays)}; choose the labels as FILE.npz:KEY")
    (classes,) = arrays.values()
    classes = classes[:samples]
    if classes.dtype.kind not in "iu" or classes.size != count or len(classes) != count:
        raise ShapeError(f"the labels are {classes.dtype} {list(classes.shape)}, not {count} integers")
    return classes.reshape(-1)


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


@cli.command()
@click.argument("subject", metavar="MODEL|ARTEFACT")
@_shape_options
@click.option("--html", metavar="FILE", help="Write the report as one self-contained page.")
@click.option("--predict", is_flag=True,
              help="Forecast the time of each layer in float32, int8 and int16 on this processor.")
@click.option("--threads", type=_THREADS, default=1, show_default=True, help="Threads of the forecast.")
@_CONFIG
@_JSON
def inspect(subject: str, inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
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
        _inspect_model(subject, _requested(inputs, batch_max, example), html, as_json, threads if predict else 0)


def _inspect_model(model: str, request: dict[str, Any], html: str | None, as_json: bool, predicted: int = 0) -> None:
    """`predicted`: threads of the forecast, 0 for none."""
    from skive import ops
    from skive.pipeline import operations, total_macs, weight_bytes

    source = _open(model, **request)
    facts: dict[str, Any] = {"model": {"path": model, "sha256": source.sha256}, "unsupported": []}
    try:
        graph = source.graph()
    except UnsupportedOpError as e:
        facts["unsupported"] = [{"node": n, "reason": r, "hint": h} for n, r, h in e.problems]
        if as_json:
            print_json(facts)
            return
        click.echo(f"{printable(model)}: {len(e.problems)} places are not supported")
        print_table(["node", "reason", "hint"], [list(p) for p in e.problems])
        return
    facts["model"] |= {"macs": total_macs(graph), "weight_bytes": weight_bytes(graph),
                       "nodes": operations(graph)}
    sides = {"inputs": _graph_ports(graph.inputs),
             "outputs": _graph_ports(graph.outputs, graph.output_names)}
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
    click.echo(f"{printable(model)}: {facts['model']['nodes']} operations, "
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
        summary = _summary(report)
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
    _print_lines(summary)
    if any("dtype" in layer for layer in report["layers"]):
        print_table([">#", "layer", "kernel", "computes in", "reads", "writes", ">MACs"],
                    [[str(i), layer["name"] or layer["op"], layer["kernel"], *_types(layer),
                      count_text(layer["macs"]) if layer["macs"] else "-"] for i, layer in enumerate(report["layers"])])
        click.echo()
    print_table(["file", ">bytes"], [[name, f"{size:,}"] for name, size in files.items()])


@cli.command()
@click.argument("model")
@click.option("-p", "--passes", "pipeline", required=True, metavar="PASSES",
              help="Names with options: fold-constants{max_bytes=4096},eliminate-dead. "
                   "'' runs none, 'help' lists them.")
@click.option("-o", "--output", metavar="FILE", help="Write the text form (and constants beside it).")
@_shape_options
@click.option("--dump-ir", metavar="DIR", help="Write the IR after every pass, and the differences.")
@_CONFIG
def opt(model: str, pipeline: str, output: str | None,
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
    graph = _open(model, **_requested(inputs, batch_max, example)).graph()
    graph, _ = PassManager().run(graph, steps, dump_dir=dump_ir)
    if output is None:
        click.echo(text.print_graph(graph))
    else:
        text.save_text(graph, Path(output))


@cli.command()
@click.argument("artefact")
@click.option("--rounds", type=click.IntRange(3, 100_000), help="Runs of every layer; by default a second is filled.")
@click.option("--html", metavar="FILE", help="Write the report with the measured times.")
@_CONFIG
@_JSON
def profile(artefact: str, rounds: int | None, html: str | None, as_json: bool) -> None:
    """Measure every layer of ARTEFACT.

    Layers run one after the other, each timed by itself; the figures are medians over many rounds.

    \b
    Example:
      skive profile kws/ --html kws.html
    """
    from skive import profiling

    result = profiling.profile(_load(artefact), rounds=rounds)
    if html is not None:
        from skive import report

        page = report.with_profile(Path(artefact), result)
        write_file(html, lambda path: path.write_text(page, encoding="utf-8"))
    if as_json:
        print_json(result)
        return
    print_table([">#", "layer", "kernel", "computes in", "reads", "writes", ">us", ">share", ">GMAC/s", ">GB/s"],
                [[str(i), layer["name"] or layer["op"], layer["kernel"], *_types(layer), f"{layer['us']:.2f}",
                  f"{100 * layer['share']:.1f} %",
                  f"{layer['gmac_per_s']:.1f}" if layer["macs"] else "-", f"{layer['gb_per_s']:.1f}"]
                 for i, layer in enumerate(result["layers"])])
    click.echo(f"{result['rounds']} rounds; layers together {result['layers_us']:.1f} us, "
               f"the whole network in one call {result['run_us']:.1f} us")


@cli.command()
@click.argument("subjects", nargs=-1, required=True, metavar="ARTEFACT|MODEL ...")
@click.option("--threads", type=_THREADS, help="1 by default; for an artefact what it was compiled for.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True,
              help="Measured time per engine and model.")
@click.option("--against", default="", metavar="ENGINES", help="Of: onnxruntime,openvino.")
@click.option("--target", default="host", show_default=True, help="Target that models are compiled for.")
@_shape_options
@_CONFIG
@_JSON
def bench(subjects: tuple[str, ...], threads: int | None, seconds: float, against: str, target: str,
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
                                 **_requested(inputs, batch_max, example))
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


@cli.command("calibrate-exits")
@click.argument("subject", metavar="MODEL|ARTEFACT")
@click.option("--data", required=True, metavar="FILE.npz[:KEY]", help="Validation inputs, [n, ...] for n samples.")
@click.option("--labels", metavar="KEY|FILE.npz:KEY", help="The right class of each sample; without it the whole "
              "network's answer counts as right.")
@click.option("--goal", required=True, metavar="GOAL",
              help="accuracy-drop=0.5 (points), macs=0.6 or latency=0.6 (fraction of the whole network's), "
                   "risk=0.05@0.95 (fraction of inputs that lose a right answer, confidence).")
@click.option("--exit", "exits", multiple=True, metavar="NAME:CRITERION",
              help="Of a MODEL: an exit and its criterion (repeatable); by default every output but the last, by "
                   "max-prob.")
@_shape_options
@click.option("-o", "--output", metavar="FILE.toml", help="Write the thresholds, for `skive compile --config`.")
@click.option("--plot", metavar="FILE.svg", help="Write accuracy against cost as a picture.")
@_CONFIG
@_JSON
def calibrate_exits(subject: str, data: str, labels: str | None, goal: str, exits: tuple[str, ...],
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
        module = _load(subject)
    else:
        request = _requested(inputs, batch_max, example)
        names = exits or tuple(_open(subject, **request).graph().output_names[:-1])
        asked = [Exit.parse(f"{n}=inf" if ":" in n else f"{n}:max-prob=inf") for n in names]
        if not asked:
            raise ExitError(f"{subject} has one output; name a tensor with --exit, or give a model with several")
        module = skive.compile(subject, exits=asked, verify=False, **request)
    arrays = fit_arrays(read_arrays(data), module.inputs)
    classes = _labels(labels, data, len(arrays[0]), None) if labels is not None else None
    evidence = exit_calibration.collect(module, _slices(arrays, module.inputs, module.manifest["batch_max"]), classes,
                                        wanted.kind == "latency")
    found = exit_calibration.calibrate(evidence, wanted)
    rows = module.manifest["exits"]
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


@cli.command()
@_JSON
def targets(as_json: bool) -> None:
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


def main() -> None:
    """Runs the command line and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name must not fail to print
    cli()


if __name__ == "__main__":
    main()
