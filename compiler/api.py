"""`skive.compile`: model -> graph -> passes -> plan -> sources -> artefact, verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import skive
from skive import _native, build, check, explanation, pruning, quantization, sparsity, speed, tuning
from skive import exits as early
from skive.agreement import Agreement
from skive.artifact import write_folder
from skive.emit import cxx
from skive.errors import ExitError, InvalidModelError, ShapeError, SkiveError, TargetError, VerificationError
from skive.ir import Graph
from skive.lower import lower
from skive.lower.sparse import sparse_layers
from skive.pipeline import NoOptions, Pass, PassManager, Step, operations, random_inputs, total_macs, weight_bytes
from skive.plan import Plan
from skive.runtime import MANIFEST, Module
from skive.targets.base import Target, resolve

if TYPE_CHECKING:
    from skive.exits import Exit
    from skive.frontend import Source
    from skive.program import ExitTest
    from skive.pruning import Prune
    from skive.quantization import Quantize
    from skive.sparsity import Sparsify

log = logging.getLogger("skive.api")

PROFILE_SECONDS = 0.2  # what measuring the layers may add to a compile
Progress = Callable[[str, float], None]  # (step, fraction of the whole)


@dataclass(frozen=True)
class Options:
    """Everything besides the model that decides the artefact's bytes."""

    target: str = "host"
    threads: int = 1
    verify: bool = True
    strict: bool = False
    emit_only: bool = False
    name: str | None = None
    batch_max: int | None = None
    tune: float | None = None

    def fingerprint(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def compile(
    model: Any,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,  # noqa: A001 - the contract's name
    output: str | Path | None = None,
    name: str | None = None,
    target: str = "host",
    threads: int = 1,
    verify: bool = True,
    strict: bool = False,
    emit_only: bool = False,
    batch_max: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    fixed_inputs: Mapping[str, np.ndarray] | None = None,
    data: Sequence[np.ndarray] | None = None,
    quantize: Quantize | str | None = None,
    prune: Prune | float | str | None = None,
    sparsify: Sparsify | str | None = None,
    exits: Sequence[Exit | str] | None = None,
    tune: float | None = None,
    export_onnx: str | Path | None = None,
    dump_ir: str | Path | None = None,
    progress: Progress = lambda step, fraction: None,
) -> Module:
    """A callable module compiled from `model` (path, `onnx.ModelProto`, `torch.nn.Module`, `ExportedProgram`, `Graph`).

    `example_inputs`: a tuple or a dict by name; needed for torch, and fixes symbolic dimensions of an
    ONNX model. `output`: the artefact folder to write (a temporary one that lives as long as the
    process if not given). `quantize`: "int8", "int16", "auto", "weights8", "weights4" or a `skive.Quantize`,
    which also holds the calibration data (weights8 and weights4 need none). `prune`: the fraction of
    multiply-accumulates to remove with whole channels, or a `skive.Prune`. `sparsify`: the blocks of
    weights that become zero, as "block4x16@0.75", or a `skive.Sparsify`. `exits`: where a call may
    end early, as `skive.Exit` or in the text form "exit0:max-prob=0.9". `tune`: seconds that may go into measuring
    other ways to compute
    each layer on this processor; what was measured is remembered, and what was chosen stands in the
    manifest. `export_onnx`: an ONNX file to write the optimised graph to, with QuantizeLinear and DequantizeLinear
    where it is quantized. `batch_max`: compile a model with a symbolic batch for 1 to this many samples
    a call. `fixed_inputs`: inputs that become constants. `data`: inputs to verify with, random ones otherwise.
    Raises the errors of `skive.errors`; nothing is written unless all went well.
    """
    from skive import frontend

    started = time.perf_counter()
    progress("read", 0.0)
    options = Options(target, threads, verify, strict, emit_only, name, batch_max, tune)
    wanted = quantization.requested(quantize) if quantize is not None else None
    cut = pruning.requested(prune) if prune is not None else None
    sparse = sparsity.requested(sparsify) if sparsify is not None else None
    ways = early.requested(exits) if exits is not None else ()
    if ways and wanted and wanted.integer_only:
        raise ExitError("the scores of early exits are float32, which integer_only excludes; leave one of them out")
    if not isinstance(threads, int) or not 1 <= threads <= 256:
        raise SkiveError(f"threads is {threads!r}, not 1 to 256")
    if tune is not None and not (isinstance(tune, (int, float)) and 0 < tune < float("inf")):
        raise SkiveError(f"tune is {tune!r}, not a number of seconds above 0")
    chosen = resolve(target, _native.cpu_features())
    if tune is not None and not set(chosen.features) <= set(_native.cpu_features()):
        raise TargetError(f"tune measures on this processor, which cannot run target {chosen.name}; leave it out")
    source = frontend.open_model(
        model,
        example_inputs=example_inputs,
        input_shapes=input_shapes,
        fixed_inputs=fixed_inputs,
        batch_max=batch_max,
    )
    asked = wanted.fingerprint() if wanted else ""  # None: the calibration data can be read only once
    for fewer in (lossy.fingerprint() for lossy in (cut, sparse) if lossy):
        asked = None if asked is None or fewer is None else asked + fewer
    for way in ways:
        text = way.fingerprint()
        asked = None if asked is None or text is None else asked + text
    timed = (wanted and wanted.dtype == "auto") or (cut and cut.measure == "latency")
    if asked is not None and (tune is not None or timed):
        asked += speed.cpu()  # what is chosen by measuring holds for this processor
    key = None
    if source.sha256 and dump_ir is None and export_onnx is None and asked is not None:
        key = _cache_key(source, options, chosen, data, asked)
    tuned: Path | None = None  # what the last tuning for this key chose: a part of the key
    if key and tune is not None:
        tuned = build.cache_dir() / "tuning" / f"{key}.json"
        key = _tuned_key(key, tuned.read_text()) if tuned.is_file() else None
    folder = Path(output) if output is not None else _temporary_folder()
    if key and (cached := build.cache_dir() / "artefacts" / key).is_dir():
        with write_folder(folder) as temporary:
            shutil.copytree(cached, temporary, dirs_exist_ok=True)
        progress("done", 1.0)
        return Module(folder) if not emit_only else _EmittedOnly(folder)  # type: ignore[return-value]

    progress("import", 0.05)
    imported = dataclasses.replace(source.graph(), name=cxx.identifier(name or source.name))
    if batch_max is not None and imported.batch_max != batch_max:
        raise SkiveError(f"batch_max={batch_max}: the graph itself says "
                         f"{imported.batch_max or 'that its batch is fixed'}; set Graph.batch_max")
    if imported.exit_points and not ways:
        imported = early.unmarked(imported)
    if ways:
        imported, ways, source = early.arranged(imported, ways, source)
    progress("optimise", 0.1)
    from skive import passes

    found: dict[str, Any] = {}  # what pruning and quantization report
    steps: list[Any] = [*passes.CANONICAL]
    pruned: list[Graph] = []
    if cut:
        steps.append(_prune_step(cut, chosen, threads, found, pruned, progress))
    if sparse:
        steps.append(_sparsify_step(sparse, found, pruned, progress))
    if wanted:
        steps.append(_quantize_step(wanted, chosen, threads, found, progress))
    exported: list[Graph] = []
    if export_onnx is not None:

        def keep(graph: Graph, options: Any) -> Graph:
            exported.append(graph)
            return graph

        steps.append(Step(Pass("export-onnx", keep, exact=True), NoOptions()))
    tests: list[ExitTest] = []
    if ways:
        steps.append(_exits_step(ways, tests, found))
    last = passes.INTEGER_ONLY if wanted and wanted.integer_only else passes.FUSED
    optimised, records = PassManager().run(
        imported, [*steps, *last], dump_dir=dump_ir, check="always" if strict else "never"
    )
    progress("lower", 0.25)
    choices = tuning.Tuning()
    if tune is not None:
        progress("tune", 0.25)
        choices = tuning.tune(optimised, chosen, threads, tune, progress)
        text = json.dumps(choices.to_json(), indent=1)
        if tuned is not None:
            key = _tuned_key(tuned.stem, text)
            build.store_text(text, tuned)
    plan = _with_scales(lower(optimised, chosen, threads, choices, tuple(tests)), found)
    sources = cxx.emit(plan, chosen)
    with write_folder(folder) as temporary:
        build.write_sources(temporary, sources, plan.weights, plan.name)
        code_bytes = 0
        if not emit_only:
            library = build.build_shared(
                temporary,
                sources,
                plan.name,
                chosen,
                threads=threads,
                progress=lambda done, all_: progress("build", 0.3 + 0.5 * done / all_),
            )
            code_bytes = max(0, library.stat().st_size - len(plan.weights))
        manifest = {
            "skive": skive.__version__,
            "name": plan.name,
            "target": chosen.name,
            "isa": list(chosen.features),
            "threads": threads,
            "batch_max": plan.batch_max,
            "inputs": _ports(plan, "inputs"),
            "outputs": _ports(plan, "outputs"),
            "arena_bytes": plan.arena_bytes,
            "model_sha256": source.sha256,
            "options_sha256": hashlib.sha256(_options(options, wanted, cut, sparse).encode()).hexdigest(),
            "data_sha256": _data_sha256(data),
            "tuning": choices.to_json() if tune is not None else None,
        }
        if tests:
            manifest["exits"] = early.described(plan, ways)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        verdict = None
        if verify and not emit_only:
            progress("verify", 0.85)
            if data is None and wanted and wanted.calibration is not None:
                data = next(iter(wanted.data(imported)))
            if pruned:  # no engine knows it, and the network without its channels is what must come out
                source = dataclasses.replace(source, oracle=lambda inputs: None)
            check_with = _verify_integers if wanted or check.has_roundings(optimised) else _verify
            meant = pruned[0] if pruned else imported
            if ways:
                meant = early.attach(meant, ways).graph
            verdict = check_with(meant, optimised, temporary, chosen, threads, data, source)
        report = _report(
            source,
            imported,
            optimised,
            plan,
            chosen,
            records,
            verdict,
            code_bytes,
            time.perf_counter() - started,
        )
        if found or check.has_roundings(optimised):
            report["quantization"] = _explained(found.get("quantization"), optimised, wanted.keep if wanted else ())
        if cut or sparse:
            report["sparsity"] = found["sparsity"]
        if zeros := sparse_layers(optimised, chosen):
            report.setdefault("sparsity", {"macs_removed": 0.0, "groups": [], "pattern": "as given"})["layers"] = zeros
        if tests:
            report["exits"] = early.described(plan, ways)
        _write_report(temporary, report, imported, optimised, timed=verdict is not None)
        if export_onnx is not None:
            from skive.export import onnx as exporter

            exporter.export_onnx(exported[0], export_onnx)
        if key:
            _store_artefact(temporary, build.cache_dir() / "artefacts" / key)
    progress("done", 1.0)
    return Module(folder) if not emit_only else _EmittedOnly(folder)  # type: ignore[return-value]


class _EmittedOnly:
    """What `emit_only` returns: the folder, its report, and a clear refusal to run."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    def __call__(self, *args: Any, **named: Any) -> Any:
        raise InvalidModelError(
            f"{self.folder} holds sources only (emit_only); build it with its CMakeLists.txt"
        )


_temporaries: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _temporary_folder() -> Path:
    _temporaries.append(tempfile.TemporaryDirectory(prefix="skive-"))
    return Path(_temporaries[-1].name) / "artefact"


def _ports(plan: Plan, side: str) -> list[dict[str, Any]]:
    lead = (lambda s: [-1, *s[1:]]) if plan.batch_max else list
    return [
        {"name": p.name, "shape": lead(p.shape), "dtype": p.dtype}
        | ({"scale": p.scale, "zero": p.zero} if p.scale is not None else {})
        for p in getattr(plan, side)
    ]


def _with_scales(plan: Plan, found: Mapping[str, Any]) -> Plan:
    """`plan` whose inputs and outputs say which real numbers their integers stand for."""
    known = found.get("quantization", {}).get("ports")
    if not known:
        return plan
    if plan.exits:  # the scores stand between the outputs that were quantized
        scores = {e.score for e in plan.exits}
        values = iter(known["outputs"])
        known = {**known, "outputs": [None if i in scores else next(values) for i in range(len(plan.outputs))]}
    inputs, outputs = (
        tuple(dataclasses.replace(p, **(q or {})) for p, q in zip(ports, known[side], strict=True))
        for side, ports in (("inputs", plan.inputs), ("outputs", plan.outputs))
    )
    return dataclasses.replace(plan, inputs=inputs, outputs=outputs)


def _options(options: Options, *lossy: Quantize | Prune | Sparsify | None) -> str:
    """What was asked for, without the data."""
    return options.fingerprint() + "".join(json.dumps(o.options(), sort_keys=True) for o in lossy if o)


def _data_sha256(data: Sequence[np.ndarray] | None) -> str | None:
    if data is None:
        return None
    h = hashlib.sha256()
    for a in data:
        h.update(f"{a.dtype.str}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()


def _prune_step(cut: Prune, target: Target, threads: int, found: dict[str, Any], pruned: list[Graph],
                progress: Progress) -> Step:
    """The pipeline's element that removes channels; `pruned` gets the graph, `found` what the report says of it."""

    def run(graph: Graph, options: Any) -> Graph:
        result, found["sparsity"] = pruning.apply(graph, cut, progress, target, threads)
        if result is not graph:
            pruned.append(result)
        return result

    return Step(Pass("prune", run, exact=False), NoOptions())


def _exits_step(ways: Sequence[Exit], tests: list[ExitTest], found: Mapping[str, Any]) -> Step:
    """The pipeline's element that computes each exit's score; `tests` gets how a call ends."""

    def run(graph: Graph, options: Any) -> Graph:
        ports = found.get("quantization", {}).get("ports")
        program = early.attach(graph, ways, ports["outputs"] if ports else None)
        tests[:] = program.exits
        return program.graph

    return Step(Pass("exits", run, exact=False), NoOptions())


def _sparsify_step(sparse: Sparsify, found: dict[str, Any], done: list[Graph], progress: Progress) -> Step:
    """The pipeline's element that makes blocks of weights zero; `done` gets the graph, `found` what the report says."""

    def run(graph: Graph, options: Any) -> Graph:
        result, details = sparsity.apply(graph, sparse, progress)
        if result is not graph:
            done[:] = [result]
        before = found.get("sparsity")
        if before:  # channels went first
            both = 1 - (1 - before["macs_removed"]) * (1 - details["macs_removed"])
            details = {**details, "groups": before["groups"], "channels": before, "macs_removed": both}
        found["sparsity"] = details
        return result

    return Step(Pass("sparsify", run, exact=False), NoOptions())


def _quantize_step(
    wanted: Quantize, target: Target, threads: int, found: dict[str, Any], progress: Progress
) -> Step:
    """The pipeline's element that quantizes the canonical graph; `found` gets what the report says of it."""

    def run(graph: Graph, options: Any) -> Graph:
        result, found["quantization"] = quantization.apply(graph, wanted, progress, target=target, threads=threads)
        return result

    return Step(Pass("quantize", run, exact=False), NoOptions())


def _cache_key(
    source: Source, options: Options, target: Target, data: Sequence[np.ndarray] | None, quantize: str = ""
) -> str:
    """What decides the artefact: model, options, inputs' shapes, skive itself, and the compiler."""
    h = hashlib.sha256()
    # Its name and path stand in the artefact: a copy of the file elsewhere is another model.
    parts = [
        source.sha256,
        source.name,
        source.path or "",
        source.request,
        options.fingerprint(),
        quantize,
        target.name,
        str(_data_sha256(data)),
        skive.__version__,
        build.sources_hash(),
        build.headers_hash(),
    ]
    if not options.emit_only:
        parts += [*build.compiler(), build.compiler_version(build.compiler()), *build.user_flags()]
    for p in parts:
        h.update(p.encode() + b"\0")
    return h.hexdigest()


def _tuned_key(key: str, choices: str) -> str:
    """The key of an artefact whose kernels were chosen by measuring."""
    return hashlib.sha256(f"{key}\0{choices}".encode()).hexdigest()


def _store_artefact(folder: Path, cached: Path) -> None:
    """Keeps a copy of the artefact; a full or read-only cache is no error."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".new.") as t:
            shutil.copytree(folder, Path(t) / "artefact")
            (Path(t) / "artefact").rename(cached)
        build.trim_cache()
    except OSError:
        pass


def _run_graph(graph: Graph, target: Target, threads: int) -> check.Run:
    """Compiles `graph` as it is into a temporary folder and returns its call."""
    folder = _temporary_folder()
    folder.mkdir(parents=True)
    plan = lower(graph, target, threads)
    sources = cxx.emit(plan, target)
    build.write_sources(folder, sources, plan.weights, plan.name)
    library = build.build_shared(folder, sources, plan.name, target, threads=threads)
    artifact = _native.Artifact(
        str(library),
        plan.name,
        [(p.name, list(p.shape), p.dtype) for p in plan.inputs],
        [(p.name, list(p.shape), p.dtype) for p in plan.outputs],
        plan.arena_bytes,
        0,
        threads,
    )

    def run(inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        result = artifact(*inputs)
        return result if isinstance(result, tuple) else (result,)

    return run


def _verify(
    imported: Graph,
    optimised: Graph,
    folder: Path,
    target: Target,
    threads: int,
    data: Sequence[np.ndarray] | None,
    source: Source,
) -> check.Verdict:
    """Compares the artefact with the numpy reference of the model as imported, and with onnxruntime
    where that is installed and the model is ONNX. VerificationError names the first diverging node."""
    from skive.reference import evaluate_graph

    module = Module(folder)
    inputs = (
        [np.asarray(d[:1] if imported.batch_max else d) for d in data]
        if data is not None
        else check.sample_inputs(imported)
    )
    got = module.all_outputs(*inputs)
    want = evaluate_graph(imported, inputs)
    verdict = check.compare(list(zip(got, want, strict=True)), "numpy", 1)
    tolerance = check.TOLERANCE
    if not verdict.passed:
        tolerance = check.allowed_difference(imported, inputs)
        verdict = check.compare(list(zip(got, want, strict=True)), "numpy", 1, tolerance)
    if not verdict.passed:
        simplified = check.compare(
            list(zip(evaluate_graph(optimised, inputs), want, strict=True)), "numpy", 1, tolerance
        )
        if not simplified.passed:
            raise VerificationError(
                f"{imported.name}: a pass changed the result by {simplified.relative_error:.2g} of its range; "
                "compile with strict=True (--strict) to learn which"
            )
        node = check.first_divergence(optimised, inputs, lambda g: _run_graph(g, target, threads), tolerance)
        where = (
            f"first at {node.label()} ({node.op})" if node else "in the whole network but in no part of it"
        )
        raise VerificationError(
            f"{imported.name}: the artefact differs from the reference by {verdict.relative_error:.2g} "
            f"of the output's range, {where}; please report it, or use --target generic"
        )
    early.check_paths(module, inputs)
    others, one_way = check.branch_inputs(imported, inputs)
    for other in others:
        pairs = list(zip(module.all_outputs(*other), evaluate_graph(imported, other), strict=True))
        if not check.compare(pairs, "numpy", 1, check.allowed_difference(imported, other)).passed:
            raise VerificationError(f"{imported.name}: a branch that random inputs of another scale take differs from "
                                    "the reference; please report it, or use --target generic")
    if one_way:
        log.warning("%s: verified on one way only through %s; give inputs that take both as data",
                    imported.name, ", ".join(one_way))
    outside = source.oracle(inputs)
    if outside is not None:
        pairs = [(g, o) for g, o in zip(got, outside, strict=True) if o is not None]
        second = check.compare(pairs, f"numpy, {source.engine}", 1, tolerance)
        if not second.passed and tolerance == check.TOLERANCE:
            second = check.compare(
                pairs, f"numpy, {source.engine}", 1, check.allowed_difference(imported, inputs)
            )
        if not second.passed:
            raise VerificationError(
                f"{imported.name}: the artefact agrees with the reference but differs from {source.engine} by "
                f"{second.relative_error:.2g} of the output's range; please report the model"
            )
        return second
    return verdict


def _verify_integers(
    imported: Graph,
    optimised: Graph,
    folder: Path,
    target: Target,
    threads: int,
    data: Sequence[np.ndarray] | None,
    source: Source,
) -> check.Verdict:
    """Compares the artefact with the numpy reference of its own integer graph.

    Where every operation is exact or correctly rounded they are equal bit for bit. Where a float32 function
    that is not (exp, a float32 convolution) stands before a quantizer, a value near the middle of two integers
    may go either way: such graphs are held to check.INTEGER_SQNR_DB, or to what a rounding error of float32
    weights does to the reference itself. VerificationError names the first diverging node.
    """
    from skive.reference import evaluate_graph

    module = Module(folder)
    inputs = (
        [np.asarray(d[:1] if imported.batch_max else d) for d in data]
        if data is not None
        else check.sample_inputs(imported)
    )
    inputs = [p.quantize(a) for p, a in zip(module.inputs, inputs, strict=True)]
    got = module.all_outputs(*inputs)
    pairs = list(zip(got, evaluate_graph(optimised, inputs), strict=True))
    exactness = check.exactness(optimised)
    tolerance = 0.0 if exactness.exact else check.TOLERANCE
    verdict = check.compare(pairs, "numpy, integers", 1, tolerance)
    if (not verdict.passed and exactness.flips
            and (check.rounds_alike(pairs) or check.flips_alike(optimised, inputs, pairs))):
        verdict = dataclasses.replace(verdict, passed=True)
    if not verdict.passed:
        node = check.first_divergence(optimised, inputs, lambda g: _run_graph(g, target, threads), tolerance)
        where = f"first at {node.label()} ({node.op})" if node else "in the whole network but in no part of it"
        raise VerificationError(
            f"{imported.name}: the artefact differs from the reference of its integer graph, {where}; "
            "please report it, or use --target generic"
        )
    early.check_paths(module, inputs)
    return verdict


def _report(
    source: Source,
    imported: Graph,
    optimised: Graph,
    plan: Plan,
    target: Target,
    records: Sequence[Any],
    verdict: check.Verdict | None,
    code_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """The dict of report.json (keys of the contract)."""
    return {
        "skive": skive.__version__,
        "model": {
            "path": source.path,
            "sha256": source.sha256,
            "macs": total_macs(imported),
            "weight_bytes": weight_bytes(imported),
            "nodes": operations(imported),
        },
        "target": {"name": target.name, "isa": list(target.features), "threads": plan.threads},
        "passes": [r.to_json() for r in records],
        "compiled": {
            "macs": total_macs(optimised),
            "weight_bytes": len(plan.weights),
            "arena_bytes": plan.arena_bytes,
            "arena_lower_bound": plan.arena_lower_bound,
            "code_bytes": code_bytes,
            "seconds": round(seconds, 3),
        },
        "layers": [
            {"name": c.origin, "op": c.op, "kernel": c.kernel, "macs": c.macs, "bytes": c.bytes}
            | explanation.kernel_types(c)
            for c in plan.calls
        ],
        "verification": dataclasses.asdict(verdict) if verdict else None,
    }


def _explained(details: dict[str, Any] | None, optimised: Graph, kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization` of report.json: what quantization found (None: the model came quantized), where the
    final graph leaves the integers, and what to try."""
    result = details or explanation.of_quantized_model(optimised)
    if result["dtype"] in quantization.WEIGHT_ONLY:
        return result  # nothing is stored as integers between kernels
    result |= explanation.conversions(optimised, kept)
    return result | {"advice": explanation.advice(result)}


def _write_report(folder: Path, report: dict[str, Any], imported: Graph, optimised: Graph, timed: bool) -> None:
    """report.json and report.html; with the time of every layer where the artefact may run here."""
    from skive import report as pages
    from skive.profiling import profile

    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    measured = profile(Module(folder), seconds=PROFILE_SECONDS) if timed else None
    if measured:
        report["profile"] = {k: v for k, v in measured.items() if k != "layers"}
        for layer, times in zip(report["layers"], measured["layers"], strict=True):
            layer["us"] = times["us"]
        path.write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.html").write_text(pages.render(report, imported, optimised, measured), encoding="utf-8")


def verdict_against(
    module: Module,
    model: Any,
    calls: Iterable[Sequence[np.ndarray]] | None = None,
    labels: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[check.Verdict, Agreement]:
    """How far `module` is from the numpy reference of `model` (`skive verify`), over all `calls` (inputs
    by position) or one of random inputs; `labels`: the right class of each sample.

    A float32 artefact passes if every call is within check.TOLERANCE of the output's range. One that
    computes in integers is held to that, or to equal roundings, only where the model rounds as well:
    what it lost against a float32 model is reported, and passes.
    """
    from skive import frontend
    from skive.reference import evaluate_graph

    shapes = {p.name: p.shape for p in module.inputs}  # a leading -1 leaves the batch open
    graph = frontend.open_model(model, input_shapes=shapes, batch_max=module.manifest["batch_max"]).graph()
    kept = list(range(len(module.outputs)))
    if module.exits:
        graph, kept = early.reference(graph, module)
    results = [module.outputs[i] for i in kept]
    for what, mine, theirs in (
        ("inputs", module.inputs, graph.inputs),
        ("outputs", results, graph.outputs),
    ):
        ours = [(p.shape[1:], p.dtype if p.scale is None else "float32") for p in mine]
        if ours != [(n.shape[1:], n.dtype.numpy.name) for n in theirs]:
            raise ShapeError(
                f"the model's {what} are not those of {module.folder}: it was compiled from another model"
            )
    if calls is None:
        calls = [check.sample_inputs(graph) if graph.inputs else random_inputs(graph)]
    rounds = check.has_roundings(graph)
    fixed = any(layer.get("dtype") in ("int8", "int16", "weights8", "weights4") for layer in module.report["layers"])
    agreement = Agreement([p.name for p in results])
    worst: check.Verdict | None = None
    at = 0
    for done, inputs in enumerate(calls, 1):
        given = [p.quantize(a) for p, a in zip(module.inputs, inputs, strict=True)]
        every = module.all_outputs(*given)
        got = tuple(p.dequantize(every[i]) for p, i in zip(results, kept, strict=True))
        pairs = list(zip(got, evaluate_graph(graph, inputs), strict=True))
        verdict = check.compare(pairs, "numpy", 1)
        if not verdict.passed and fixed and (not rounds or check.rounds_alike(pairs)):
            finite = all(np.isfinite(g).all() or not np.isfinite(w).all() for g, w in pairs if w.dtype.kind == "f")
            verdict = dataclasses.replace(verdict, passed=finite)
        before = agreement.samples
        count = len(inputs[0]) if labels is not None else 0
        agreement.add(got, [w for _, w in pairs], labels[at : at + count] if labels is not None else None)
        at += agreement.samples - before
        worst = _worse(worst, verdict)
        progress(done)
    assert worst is not None
    ratios = [o.sqnr_db for o, p in zip(agreement.outputs, results, strict=True)
              if p.dtype.startswith("float") or p.scale is not None]
    return dataclasses.replace(worst, samples=agreement.samples, sqnr_db=min(ratios, default=None)), agreement


def _worse(a: check.Verdict | None, b: check.Verdict) -> check.Verdict:
    """One verdict for both."""
    if a is None:
        return b
    return dataclasses.replace(
        a,
        max_abs_error=max(a.max_abs_error, b.max_abs_error),
        relative_error=-1.0 if min(a.relative_error, b.relative_error) < 0 else max(a.relative_error, b.relative_error),
        passed=a.passed and b.passed,
    )
