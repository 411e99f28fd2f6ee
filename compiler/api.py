"""`skive.compile`: model -> graph -> passes -> plan -> sources -> artefact, verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import skive
from skive import _native, build, check, explanation, kernels, speed, tuning
from skive import exits as early
from skive.artifact import write_folder
from skive.changes import Changes, Progress
from skive.emit import cxx
from skive.emit.names import identifier
from skive.errors import InvalidModelError, SkiveError, TargetError
from skive.execute import temporary_folder
from skive.ir import Graph
from skive.lower import lower
from skive.lower.branches import guards_of, path_macs
from skive.pipeline import PassManager, operations, total_macs, weight_bytes
from skive.plan import Plan
from skive.runtime import MANIFEST, Module
from skive.targets.base import Target, resolve
from skive.verification import verify_floats, verify_integers

if TYPE_CHECKING:
    from skive.exits import Exit
    from skive.frontend import Source
    from skive.pruning import Prune
    from skive.quantization import Quantize
    from skive.sparsity import Sparsify

PROFILE_SECONDS = 0.2  # what measuring the layers may add to a compile


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
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
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
    backend: str = "skive",
    progress: Progress = lambda step, fraction: None,
) -> Module:
    """A callable module compiled from `model` (path, `onnx.ModelProto`, `torch.nn.Module`, `ExportedProgram`, `Graph`).

    `example_inputs`: a tuple or a dict by name; needed for torch, and fixes symbolic dimensions of an ONNX model;
    `input_shapes` does so by input name. `output`: the artefact folder to write (a temporary one that lives as long
    as the process if not given). `name`: of the C functions and files, that of the model if not given. `target`:
    one of `skive targets`, "host" the best that runs here; `threads`: 1 to 256 that share a call, which changes no
    bit of the results. `verify`: compare the artefact with the numpy reference of the model as imported,
    VerificationError if they differ; `strict`: the graph after every pass too. `quantize`: "int8", "int16", "auto",
    "weights8", "weights4" or a `skive.Quantize`, which also holds the calibration data (weights8 and weights4 need
    none). `prune`: the fraction of multiply-accumulates to remove with whole channels, or a `skive.Prune`.
    `sparsify`: the blocks of weights that become zero, as "block4x16@0.75", or a `skive.Sparsify`. `exits`: where a
    call may end early, as `skive.Exit` or in the text form "exit0:max-prob=0.9". `tune`: seconds that may go into
    measuring other ways to compute each layer on this processor; what was measured is remembered, and what was
    chosen stands in the manifest. `emit_only`: write sources and run no compiler; the result has a `folder` and a
    `report`, and cannot be called. `export_onnx`: an ONNX file to write the optimised graph to, with QuantizeLinear
    and DequantizeLinear where it is quantized. `batch_max`: compile a model with a symbolic batch for 1 to this
    many samples a call. `fixed_inputs`: inputs that become constants. `data`: inputs to verify with, random ones
    otherwise. `dump_ir`: a folder for the text of the graph after each pass. `progress(step, fraction)` is called
    as it goes on. `backend`: "skive", or "tvm", which has Apache TVM compile the stages of a float32 network (extra
    `tvm`).
    Raises the errors of `skive.errors`; nothing is written unless all went well.
    """
    request = dict(locals())
    from skive import frontend

    started = time.perf_counter()
    progress("read", 0.0)
    options = Options(target, threads, verify, strict, emit_only, name, batch_max, tune)
    changes = Changes.requested(prune, sparsify, quantize, exits)
    if not isinstance(threads, int) or not 1 <= threads <= 256:
        raise SkiveError(f"threads is {threads!r}, not 1 to 256")
    if backend not in ("skive", "tvm"):
        raise SkiveError(f"backend is {backend!r}; it can be skive or tvm")
    if backend == "tvm" and (threads > 1 or emit_only or any(v is not None for v in (tune, quantize, export_onnx))):
        raise SkiveError("backend tvm compiles float32 for one thread: leave quantize, threads, tune, emit_only and "
                         "export_onnx out")
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
    asked = changes.fingerprint()
    if asked is not None and tune is not None:
        asked += speed.cpu()  # what is chosen by measuring holds for this processor
    key = None
    if source.sha256 and dump_ir is None and export_onnx is None and asked is not None and backend == "skive":
        key = _cache_key(source, options, chosen, data, asked)
    tuned: Path | None = None  # what the last tuning for this key chose: a part of the key
    if key and tune is not None:
        tuned = build.cache_dir() / "tuning" / f"{key}.json"
        key = _tuned_key(key, tuned.read_text()) if tuned.is_file() else None
    folder = Path(output) if output is not None else temporary_folder()
    if key and (cached := build.cache_dir() / "artefacts" / key).is_dir():
        with write_folder(folder) as temporary:
            shutil.copytree(cached, temporary, dirs_exist_ok=True)
        progress("done", 1.0)
        return _finished(folder, request)

    progress("import", 0.05)
    imported = dataclasses.replace(source.graph(), name=identifier(name or source.name))
    if batch_max is not None and imported.batch_max != batch_max:
        raise SkiveError(f"batch_max={batch_max}: the graph itself says "
                         f"{imported.batch_max or 'that its batch is fixed'}; set Graph.batch_max")
    if changes.exits:
        imported, changes.exits, source = early.arranged(imported, changes.exits, source)
    elif imported.exit_points:
        imported = early.unmarked(imported)
    progress("optimise", 0.1)
    from skive import passes

    last = passes.CLEANED if backend == "tvm" else passes.INTEGER_ONLY if changes.integer_only else passes.FUSED
    optimised, records = PassManager().run(
        imported,
        [*passes.CANONICAL, *changes.steps(chosen, threads, progress), *last],
        dump_dir=dump_ir,
        check="always" if strict else "never",
    )
    if backend == "tvm":
        from skive import tvm_stages

        progress("build", 0.3)
        tvm_stages.compile_graph(
            imported, optimised, changes.meant(imported), changes.tests, changes.exits, source, chosen, folder,
            verify, data, records, started, {"model_sha256": source.sha256})
        progress("done", 1.0)
        return Module(folder)
    progress("lower", 0.25)
    choices = tuning.Tuning()
    if tune is not None:
        progress("tune", 0.25)
        choices = tuning.tune(optimised, chosen, threads, tune, progress)
        text = json.dumps(choices.to_json(), indent=1)
        if tuned is not None:
            key = _tuned_key(tuned.stem, text)
            build.store_text(text, tuned)
    plan = changes.with_scales(lower(optimised, chosen, threads, choices, changes.tests))
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
            "options_sha256": hashlib.sha256((options.fingerprint() + changes.options()).encode()).hexdigest(),
            "data_sha256": _data_sha256(data),
            "tuning": choices.to_json() if tune is not None else None,
            **changes.described(plan),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        verdict = None
        if verify and not emit_only:
            progress("verify", 0.85)
            wanted = changes.quantize
            if data is None and wanted and wanted.calibration is not None:
                data = next(iter(wanted.data(imported)))
            if changes.smaller:  # no engine knows it
                source = dataclasses.replace(source, oracle=lambda inputs: None)
            compare = verify_integers if wanted or check.has_roundings(optimised) else verify_floats
            verdict = compare(changes.meant(imported), optimised, temporary, chosen, threads, data, source)
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
        report |= changes.report(optimised, chosen) | changes.described(plan)
        _write_report(temporary, report, imported, optimised, timed=verdict is not None)
        if export_onnx is not None:
            from skive.export import onnx as exporter

            assert changes.canonical is not None
            exporter.export_onnx(changes.canonical, export_onnx)
        if key:
            _store_artefact(temporary, build.cache_dir() / "artefacts" / key)
    progress("done", 1.0)
    return _finished(folder, request)


def _finished(folder: Path, request: Mapping[str, Any]) -> Module:
    """The artefact in `folder`, which can be exported as long as the arguments it was made of are at hand."""
    if request["emit_only"]:
        return _EmittedOnly(folder)  # type: ignore[return-value]
    module = Module(folder)
    module.temporary = request["output"] is None
    once_more = {"output": None, "emit_only": True, "verify": False, "tune": None, "dump_ir": None}
    module._export = lambda path: compile(**{**request, **once_more, "export_onnx": path})
    return module


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


def _ports(plan: Plan, side: str) -> list[dict[str, Any]]:
    lead = (lambda s: [-1, *s[1:]]) if plan.batch_max else list
    return [
        {"name": p.name, "shape": lead(p.shape), "dtype": p.dtype}
        | ({"scale": p.scale, "zero": p.zero} if p.scale is not None else {})
        for p in getattr(plan, side)
    ]


def _data_sha256(data: Sequence[np.ndarray] | None) -> str | None:
    if data is None:
        return None
    h = hashlib.sha256()
    for a in data:
        h.update(f"{a.dtype.str}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()


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
        kernels.headers_hash(),
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
            **_by_branch(optimised),
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


def _by_branch(optimised: Graph) -> dict[str, int]:
    """The multiply-accumulates of the cheapest and the dearest way through branches, where there are any."""
    if all(n.op != "choose" for n in optimised.nodes):
        return {}
    least, most = path_macs(optimised.nodes, guards_of(optimised))
    return {"macs_least": least, "macs_most": most}


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
