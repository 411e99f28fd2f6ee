"""`skive compile`."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

import skive
from skive.cli.arrays import fit_arrays, read_arrays, samples
from skive.cli.opened import graph_ports, open_source
from skive.cli.options import CONFIG, JSON, THREADS, Bytes, requested_shapes, shape_options
from skive.cli.summary import print_lines, summary_lines
from skive.console import print_json, printable, progress_bar
from skive.errors import SkiveError

# Options that mean nothing without another one.
BELONGS_TO = {"ranges": "quantize", "rounding": "quantize", "integer_only": "quantize", "keep": "quantize",
              "budget_sqnr": "quantize", "budget_us": "quantize", "block": "quantize", "activations": "quantize",
              "prune_criterion": "prune", "prune_scope": "prune", "sparsify_criterion": "sparsify"}


@click.command("compile")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="DIR", help="The artefact folder to write.")
@click.option("--name", help="Name of the C functions and files; that of the model by default.")
@click.option("--target", default="host", show_default=True, help="One of `skive targets`.")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="Threads of one call.")
@shape_options
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
                   "point, early exits are decided on integers.")
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
@click.option("--prune-scope", type=click.Choice(["global", "layer", "measured"]), default="global", show_default=True,
              help="How many go from each layer: by comparing all of them, the same fraction, or by what the outputs "
                   "lose when a layer alone is cut, which takes longer and loses least.")
@click.option("--sparsify", metavar="PATTERN@FRACTION",
              help="Make this fraction of the blocks of weights zero: block4x16@0.75, of 4 input by 16 output "
                   "channels; 2:4 or 2:4x32 (n of m input channels stay, the same for 16 or 32 output "
                   "channels); 1x1@0.9 (single weights). With --calibrate what is "
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
@click.option("--max-ram", type=Bytes(), metavar="BYTES",
              help="Fail if the arena needs more (256K, 2M); the caller's tensors are not in it.")
@click.option("--max-flash", type=Bytes(), metavar="BYTES",
              help="Fail if packed weights and code take more.")
@click.option("--backend", type=click.Choice(["skive", "tvm"]), default="skive", show_default=True,
              help="tvm: Apache TVM compiles the stages of a float32 network; needs the extra skive-compiler[tvm], "
                   "here and where the artefact runs.")
@click.option("--emit-only", is_flag=True, help="Write sources and weights, run no compiler.")
@click.option("--no-verify", is_flag=True, help="Do not compare the artefact with the reference.")
@click.option("--strict", is_flag=True, help="Also check every pass by running the graph.")
@click.option("--dump-ir", metavar="DIR", help="Write the IR after every pass, and the differences.")
@CONFIG
@JSON
def command(model: str, output: str, name: str | None, target: str, threads: int,
                    inputs: tuple[tuple[str, tuple[int, ...]], ...], batch_max: int | None,
                    example: str | None, quantize: str | None, calibrate: str | None, ranges: str,
                    rounding: str, integer_only: bool, keep: tuple[str, ...], budget_sqnr: float | None,
                    budget_us: float | None, block: int | None, activations: str, prune: str | None,
                    prune_criterion: str, prune_scope: str, sparsify: str | None, sparsify_criterion: str | None,
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
    request = requested_shapes(inputs, batch_max, example)
    data, wanted, cut = None, None, None
    context = click.get_current_context()
    for option, other in BELONGS_TO.items():
        if context.params[other] is None and context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{option.replace('_', '-')} goes with --{other}, which is not given")
    if quantize != "auto" and (budget_sqnr or budget_us):
        raise click.UsageError("--budget-sqnr and --budget-us go with --quantize auto")
    if quantize is not None and calibrate is None and not quantize.startswith("weights"):
        raise click.UsageError("--quantize needs --calibrate FILE.npz[:KEY]: inputs such as the network will meet")
    ports = graph_ports(open_source(model, **request).graph().inputs) if calibrate is not None else []
    if prune is not None:
        from skive import pruning

        cut = replace(pruning.requested(prune), criterion=prune_criterion, scope=prune_scope,
                      calibration=samples(calibrate, ports))
    if quantize is not None:
        wanted = skive.Quantize(quantize, calibration=samples(calibrate, ports), method=ranges, rounding=rounding,
                                keep=keep, integer_only=integer_only, budget_sqnr_db=budget_sqnr,
                                budget_us=budget_us, block=block, activations=int(activations))
    sparse = None
    if sparsify is not None:
        from skive import sparsity

        asked = sparsity.requested(sparsify)
        sparse = replace(asked, criterion=sparsify_criterion, calibration=samples(calibrate, ports))
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
        print_lines(summary_lines(report, time.perf_counter() - started))
