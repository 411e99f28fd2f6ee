"""Latency of skive and of other engines, measured in turns.

Each engine runs in a process of its own and has the machine for a fraction of a second at a time;
the turns go round, so that a drift of the machine's speed meets all engines alike. A round in which
a process did not have its cores is repeated. What is compared are the turns of one round.

A worker is `python -m skive.bench`: its job is a line of JSON on standard input, every further line
asks for a turn, and each is answered by one line of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive.errors import InvalidModelError, SkiveError

if TYPE_CHECKING:
    from skive.ir import Graph

# How quiet a turn must be to count: for one thread, and for several, where the clock of the machine's
# load ticks in 10 ms.
_QUIET = {True: 0.97, False: 0.9}
_ROUNDS = (5, 30)  # fewest and most rounds, in each of which every engine has one turn
_TURN_SECONDS = 0.15
_REPEATS = 3  # at most this many times as many rounds as wanted, if the machine is disturbed
_CALLS = 3  # fewest calls in a turn
_REST = 0.02  # s before a turn: spinning threads of the engine before go to sleep
# Engines whose outputs differ by more than this fraction of the range do not compute the same:
# float32 sums in another order stay well below, unless the network amplifies rounding.
_AGREEMENT = 1e-3

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Job:
    """What a worker runs: `source` is an artefact folder for skive, else a model; `data` an .npz of
    the inputs arr_0, ...; the outputs go to `outputs`, an .npz likewise."""

    engine: str
    source: str
    data: str
    outputs: str
    threads: int

    def inputs(self) -> list[np.ndarray]:
        with np.load(self.data) as z:
            return [z[f"arr_{i}"] for i in range(len(z.files))]


# ------------------------------------------------------------------------------- inside a worker

# An engine gives (its version, a call without arguments, the outputs of the last call).
Loaded = tuple[str, Callable[[], Any], Callable[[], Sequence[np.ndarray]]]


def _skive(job: Job) -> Loaded:
    import skive
    from skive.runtime import load

    module = load(job.source)
    inputs = job.inputs()
    outputs = list(module.all_outputs(*inputs))  # with early exits the whole network is measured
    # The output arrays are bound once, as those of the other engines are.
    return skive.__version__, lambda: module.call_into(inputs, outputs), lambda: outputs


def _onnxruntime(job: Job) -> Loaded:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(job.source, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    half = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    arrays = [a.astype(np.float16) if n in half else a for n, a in zip(names, job.inputs(), strict=True)]
    # Shapes may be symbolic in the model: one ordinary call gives those of the outputs.
    first = session.run(None, dict(zip(names, arrays, strict=True)))
    kept = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]
    outputs = [ort.OrtValue.ortvalue_from_numpy(np.zeros_like(a)) for a in first]
    binding = session.io_binding()
    for name, value in zip(names, kept, strict=True):
        binding.bind_ortvalue_input(name, value)
    for o, value in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_ortvalue_output(o.name, value)
    return (ort.__version__, lambda keep=kept: session.run_with_iobinding(binding),
            lambda: [v.numpy() for v in outputs])


def _openvino(job: Job, **properties: str) -> Loaded:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(job.source)
    arrays = [np.ascontiguousarray(a) for a in job.inputs()]
    if model.is_dynamic():
        model.reshape({i: a.shape for i, a in enumerate(arrays)})
    compiled = core.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads, "NUM_STREAMS": 1, **properties})
    request = compiled.create_infer_request()
    for i, a in enumerate(arrays):
        request.set_input_tensor(i, ov.Tensor(a, shared_memory=True))
    # The tensors borrow the arrays.
    return (ov.__version__.split("-")[0], lambda keep=arrays: request.infer(),
            lambda: [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))])


ENGINES: dict[str, Callable[[Job], Loaded]] = {
    "skive": _skive, "onnxruntime": _onnxruntime, "openvino": _openvino}


def _turn(run: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Calls for `seconds`, after one that warms caches which the other engines have used."""
    clock = time.perf_counter
    all_cpu = time.process_time()
    run()
    times = []
    cpu, start = time.process_time(), clock()
    while True:
        before = clock()
        run()
        after = clock()
        times.append(after - before)
        if after - start >= seconds and len(times) >= _CALLS:
            break
    now = time.process_time()
    return {"calls": len(times), "min": min(times), "median": float(np.median(times)),
            "share": (now - cpu) / (after - start), "cpu": now - all_cpu}


def worker() -> None:
    """Serves one job. What engines print goes to standard error, never between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        job = Job(**json.loads(sys.stdin.readline()))
        version, run, outputs = ENGINES[job.engine](job)
        for _ in range(_CALLS):
            run()
        np.savez(job.outputs, *outputs())
        gc.disable()
        answer(version=version)
        for line in sys.stdin:
            answer(**_turn(run, float(line)))
    except KeyboardInterrupt:
        pass
    except Exception as e:  # noqa: BLE001 - whatever an engine raises is an answer
        answer(error=f"{type(e).__name__}: {' '.join(str(e).split())[:500]}")


# ------------------------------------------------------------------------------------ controller


def _busy_seconds() -> float:
    """Core-seconds that the whole machine was busy since it started."""
    ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


@dataclass(frozen=True)
class Turn:
    """Seconds of `calls` calls in a row. `quiet` is 1 if nothing else ran meanwhile: the share of
    its time that a single-threaded worker was on a core, else 1 minus the cores others used."""

    calls: int
    min: float
    median: float
    quiet: float


class Worker:
    """A running engine."""

    def __init__(self, job: Job, process: subprocess.Popen[str]):
        self.job, self.process, self.version = job, process, ""

    @staticmethod
    def start(job: Job, command: Sequence[str] = ("-m", "skive.bench")) -> Worker:
        """The worker of `job`; `command` are Python's arguments for a script that adds to ENGINES."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        process = subprocess.Popen([sys.executable, *command], env=environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        started = Worker(job, process)
        try:
            started.version = str(started._ask(json.dumps(dataclasses.asdict(job)))["version"])
        except BaseException:
            started.stop()
            raise
        return started

    def _ask(self, line: str) -> dict[str, Any]:
        to, answers = self.process.stdin, self.process.stdout
        assert to is not None and answers is not None
        text = ""
        with contextlib.suppress(BrokenPipeError):
            to.write(line + "\n")
            to.flush()
            text = answers.readline()
        if not text:
            raise SkiveError(f"{self.job.engine} on {self.job.source}: the process ended with {self.process.wait()}")
        reply: dict[str, Any] = json.loads(text)
        if "error" in reply:
            raise SkiveError(f"{self.job.engine} cannot run {self.job.source}: {reply['error']}")
        return reply

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`."""
        time.sleep(_REST)
        busy, start = _busy_seconds(), time.perf_counter()
        reply = self._ask(str(seconds))
        if self.job.threads == 1:
            quiet = reply["share"]
        else:
            quiet = 1 - (_busy_seconds() - busy - reply["cpu"]) / (time.perf_counter() - start)
        return Turn(reply["calls"], reply["min"], reply["median"], quiet)

    def outputs(self) -> list[np.ndarray]:
        with np.load(self.job.outputs) as z:
            return [z[f"arr_{i}"] for i in range(len(z.files))]

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def machine() -> dict[str, Any]:
    """The `machine` of the result: processor, its skive target, and the cores this process may use."""
    from skive import _native
    from skive.targets.base import resolve

    cpu = "unknown"
    with contextlib.suppress(OSError):
        cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), cpu)
    return {"cpu": cpu, "isa": resolve("host", _native.cpu_features()).name, "cores": len(os.sched_getaffinity(0))}


@dataclass(frozen=True)
class Subject:
    """One network to measure: an artefact and, for the other engines, the model it was made of.
    `graph` imports that model."""

    name: str
    artefact: str
    model: str | None
    threads: int
    inputs: tuple[np.ndarray, ...]
    graph: Callable[[], Graph] | None


def _subject(path: str, folder: Path, threads: int | None, target: str, need_model: bool,
             request: Mapping[str, Any], progress: Progress) -> Subject:
    """`path` made ready: an artefact as it is, a model compiled into `folder`."""
    from skive import frontend
    from skive.profiling import sample_arrays
    from skive.runtime import load

    if Path(path).is_dir():
        module = load(path)
        compiled = module.manifest["threads"]
        if threads is not None and threads != compiled:
            raise SkiveError(f"{path} was compiled for {compiled} threads, not {threads}; "
                             "compile it again or name the model")
        inputs = tuple(sample_arrays(module.inputs))
        name = module.manifest["name"]
        if not need_model:
            return Subject(name, path, None, compiled, inputs, None)
        model = _model_of(path, module.report, module.manifest)
        shapes = {p.name: a.shape for p, a in zip(module.inputs, inputs, strict=True)}
        return Subject(name, path, model, compiled, inputs, frontend.open_model(model, input_shapes=shapes).graph)
    import skive
    from skive import check

    threads = threads or 1
    graph = frontend.open_model(path, **request).graph()
    inputs = tuple(check.sample_inputs(graph))
    skive.compile(path, output=folder, target=target, threads=threads, verify=False, progress=progress, **request)
    if need_model and Path(path).suffix != ".onnx":
        raise SkiveError(f"{path}: only ONNX files can be compared with other engines")
    return Subject(Path(path).stem, str(folder), path if need_model else None, threads, inputs, lambda: graph)


def _model_of(artefact: str, report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The ONNX file that an artefact was compiled from, if it is still the same."""
    from skive import frontend

    path = (report.get("model") or {}).get("path")
    if not path or not Path(path).is_file() or Path(path).suffix != ".onnx":
        raise SkiveError(f"{artefact}: the ONNX model it was compiled from ({path}) is not there; "
                         "name the model instead")
    if frontend.open_model(path).sha256 != manifest.get("model_sha256"):
        raise SkiveError(f"{path} has changed since {artefact} was compiled from it; name the model instead")
    return str(path)


def require(engines: Sequence[str]) -> None:
    """Nothing, or an error that says how to install the engine that is missing."""
    for e in engines:
        if importlib.util.find_spec(e) is None:
            extra = f"skive-compiler[{e}]" if e == "onnxruntime" else e
            raise SkiveError(f"--against {e}: it is not installed; `pip install {extra}`")


def bench(subjects: Sequence[str], *, engines: Sequence[str] = (), threads: int | None = None,
          seconds: float = 3.0, target: str = "host", progress: Progress = lambda step, fraction: None,
          **request: Any) -> dict[str, Any]:
    """The measurements of every subject (artefact or model) on skive and on `engines`.

    Keys: `machine`; `results[]`, one row per subject and engine: model, engine, version, threads,
    median_ms (of the medians of the turns), min_ms, spread (how far the 90th percentile of those
    medians lies above the smallest), runs (calls), disturbed, agrees, max_relative_error;
    `ratio{ENGINE}`, the median over rounds of ENGINE's time by skive's, for several subjects its
    geometric mean; `models[]` with the ratios of each. A wrong answer has no ratio: it is null.
    """
    require(engines)
    rows: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for i, path in enumerate(subjects):
        def step(name: str, fraction: float, done: int = i) -> None:
            progress(name, (done + fraction) / len(subjects))

        with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
            def compiling(name: str, fraction: float, step: Progress = step) -> None:
                step(f"compile: {name}", 0.5 * fraction)

            subject = _subject(path, Path(folder) / "artefact", threads, target, bool(engines), request, compiling)
            new, ratio = _measure(subject, engines, seconds, Path(folder), step)
        rows += new
        models.append({"model": subject.name, "path": path, "ratio": ratio})
    combined = {e: _geometric_mean([m["ratio"][e] for m in models]) for e in engines}
    return {"machine": machine(), "results": rows, "ratio": combined, "models": models}


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known and len(known) == len(values) else None


def _measure(subject: Subject, engines: Sequence[str], seconds: float, folder: Path,
             progress: Progress) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    data = folder / "inputs.npz"
    np.savez(data, *subject.inputs)
    workers: list[Worker] = []
    try:
        for e in ("skive", *engines):
            source = subject.artefact if e == "skive" else str(subject.model)
            workers.append(Worker.start(Job(e, source, str(data), str(folder / f"{e}.npz"), subject.threads)))
        rounds = take_turns(workers, seconds, lambda done: progress("measure", 0.5 + 0.5 * done))
        return _results(subject, workers, rounds)
    finally:
        for w in workers:
            w.stop()


def take_turns(workers: Sequence[Worker], seconds: float, progress: Callable[[float], None] = lambda done: None,
               ) -> list[list[Turn]]:
    """Rounds in which each of `workers` has a turn, about `seconds` for each in all; more where some were
    disturbed."""
    threads = workers[0].job.threads
    wanted = int(np.clip(seconds / _TURN_SECONDS, *_ROUNDS))
    rounds: list[list[Turn]] = []
    clean = 0
    while clean < wanted and len(rounds) < _REPEATS * wanted:
        turns: list[Turn | None] = [None] * len(workers)
        for k in range(len(workers)):  # nobody is always the first
            i = (k + len(rounds)) % len(workers)
            turns[i] = workers[i].turn(seconds / wanted)
        rounds.append([t for t in turns if t is not None])
        clean += _is_clean(rounds[-1], threads)
        progress(max(clean / wanted, len(rounds) / (_REPEATS * wanted)))
    return rounds


def undisturbed(rounds: Sequence[Sequence[Turn]], threads: int) -> tuple[Sequence[Sequence[Turn]], bool]:
    """(The rounds that count; True if too few were clean and the least disturbed ones stand for them)."""
    kept = [r for r in rounds if _is_clean(r, threads)]
    if len(kept) >= _ROUNDS[0]:
        return kept, False
    least = sorted(rounds, key=lambda r: -min(t.quiet for t in r))
    return least[:max(_ROUNDS[0], len(rounds) // _REPEATS)], True


def timing(turns: Sequence[Turn]) -> dict[str, Any]:
    """What the turns of one worker say: median_ms (of their medians), min_ms, spread, runs."""
    medians = sorted(t.median for t in turns)
    return {"median_ms": float(np.median(medians)) * 1e3, "min_ms": min(t.min for t in turns) * 1e3,
            "spread": medians[min(len(medians) - 1, int(0.9 * len(medians)))] / medians[0] - 1,
            "runs": sum(t.calls for t in turns)}


def _is_clean(turns: Sequence[Turn], threads: int) -> bool:
    return all(t.quiet >= _QUIET[threads == 1] for t in turns)


def _results(subject: Subject, workers: Sequence[Worker], rounds: Sequence[Sequence[Turn]],
             ) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """The rows and the ratios of one subject."""
    kept, disturbed = undisturbed(rounds, subject.threads)
    reference = workers[1].outputs() if len(workers) > 1 else None
    errors = [None if reference is None else _difference(w.outputs(), reference) for w in workers]
    limit = _AGREEMENT
    if subject.graph is not None and any(e is not None and limit < e < math.inf for e in errors):
        from skive import check

        # Two engines, each as far from the exact result as rounding may take it.
        limit = max(limit, 2 * check.allowed_difference(subject.graph(), subject.inputs))
    rows = []
    for w, error, turns in zip(workers, errors, zip(*kept, strict=True), strict=True):
        rows.append({"model": subject.name, "engine": w.job.engine, "version": w.version, "threads": subject.threads,
                     **timing(turns), "disturbed": disturbed,
                     "agrees": None if error is None else error <= limit, "max_relative_error": error})
    ratio: dict[str, float | None] = {}
    for i, row in enumerate(rows[1:], 1):
        right = rows[0]["agrees"] and row["agrees"]
        ratio[row["engine"]] = float(np.median([r[i].median / r[0].median for r in kept])) if right else None
    return rows, ratio


def _difference(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The largest |difference| over all outputs as a fraction of that output's range."""
    from skive.pipeline import difference

    if len(got) != len(want):
        raise InvalidModelError(f"the engines give {len(got)} and {len(want)} outputs")
    return max((difference(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


if __name__ == "__main__":
    worker()
