"""Fuzzer of the compiler: random operator graphs, compiled, against onnxruntime and the numpy reference.

    python tests/fuzz/fuzz_graphs.py --seconds 600 --jobs 2

Graph n is drawn from seed n alone (see graphs.py for what is drawn and why). Several graphs are
compiled side by side as one model, which costs about as much as one of them: most of the time of a
small artefact goes into reading the kernel headers. When such a model fails, its graphs are tried
one by one, and the failing one is shrunk: any tensor's value is known, so the graph can be cut
anywhere. The reproducer is an .onnx file with its inputs beside it.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))
from graphs import Graph, distance, merged_inputs, ort_run, random_graph, to_model  # noqa: E402

TOLERANCE = 1e-4  # of the range; a graph whose results move more when its inputs move by 1e-6 is not drawn
SIDE_BY_SIDE = 12  # graphs in one artefact
UNSUPPORTED = "not supported"


@dataclass
class Result:
    """What a run found: problems by seed, and the operators that were refused as not supported."""

    graphs: int = 0
    nodes: int = 0
    operators: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: dict[int, str] = field(default_factory=dict)

    def merge(self, other: Result) -> None:
        self.graphs += other.graphs
        self.nodes += other.nodes
        self.operators.update(other.operators)
        self.refused.update(other.refused)
        self.problems.update(other.problems)


def refusal(graph: Graph) -> str | None:
    """Why skive does not support the graph (found before any C++ is compiled); None if it does.

    Anything but an UnsupportedOpError is left for `problem_of` to find again.
    """
    import dataclasses

    from skive import passes
    from skive.errors import UnsupportedOpError
    from skive.frontend import open_model
    from skive.lower import lower
    from skive.pipeline import PassManager
    from skive.targets.base import resolve

    try:
        imported = dataclasses.replace(open_model(to_model([graph])).graph(), name="fuzz")
        optimised, _ = PassManager().run(imported, passes.EXACT, check="never")
        lower(optimised, resolve("generic", []), 1)
    except UnsupportedOpError as e:
        return str(e)
    except Exception:  # noqa: BLE001
        return None
    return None


def problem_of(graphs: Sequence[Graph], target: str) -> str | None:
    """What is wrong with the compiled graphs, in words; None if all results are right."""
    import skive
    from skive.errors import UnsupportedOpError
    from skive.frontend import open_model
    from skive.reference import evaluate_graph

    model, inputs = to_model(graphs), merged_inputs(graphs)
    try:
        reference = evaluate_graph(open_model(model).graph(), inputs)
        got = skive.compile(model, target=target, verify=False)(**inputs)
    except UnsupportedOpError as e:
        return f"{UNSUPPORTED}: {e}"
    except Exception as e:  # noqa: BLE001 - that is what is looked for
        return f"{type(e).__name__}: {e}"
    got = got if isinstance(got, tuple) else (got,)
    outside = ort_run(model, inputs)
    if outside is None:
        return "onnxruntime runs the parts but not the whole"
    names = [o.name for o in model.graph.output]
    for name, g, r, o in zip(names, got, reference, outside, strict=True):
        for what, want in (("the numpy reference", r), ("onnxruntime", o)):
            d = distance(np.asarray(g), want)
            if d > TOLERANCE:
                agree = "" if want is o else f"; the reference is {distance(r, o):.2g} from onnxruntime"
                return f"{name} is {d:.2g} of its range away from {what}{agree}"
    return None


def shrunk(graph: Graph, target: str) -> Graph:
    """A part of the graph, as small as dropping one node at a time makes it, that still fails."""
    for i in range(len(graph.nodes)):
        alone = graph
        for k in reversed(range(len(graph.nodes))):
            if k != i:
                alone = alone.without(k)
        if problem_of([alone], target):
            return alone
    shrinking = True
    while shrinking and len(graph.nodes) > 1:
        shrinking = False
        for i in reversed(range(len(graph.nodes))):
            smaller = graph.without(i)
            if smaller.nodes and problem_of([smaller], target):
                graph, shrinking = smaller, True
                break
    return graph


def save(graph: Graph, seed: int, problem: str, folder: Path) -> str:
    """Writes the reproducer and returns what to print."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"graph{seed}.onnx"
    onnx.save(to_model([graph]), path)
    np.savez(path.with_suffix(".npz"), **merged_inputs([graph]))
    return (
        f"seed {seed}: {problem}\n{graph.describe()}\n  reproducer: {path}, inputs in {path.with_suffix('.npz').name}"
    )


def check(seeds: Sequence[int], target: str, folder: Path) -> Result:
    """Compiles and compares the graphs of `seeds` side by side."""
    result, drawn = Result(), []
    for seed in seeds:
        graph = random_graph(seed)
        result.graphs += 1
        result.nodes += len(graph.nodes)
        result.operators.update(n.op_type for n in graph.nodes)
        why = refusal(graph)
        if why is None:
            drawn.append((seed, graph))
        else:
            result.refused[why.splitlines()[0][:120]] += 1
    if drawn and problem_of([g for _, g in drawn], target):
        alone = {seed: problem_of([graph], target) for seed, graph in drawn}
        for seed, graph in drawn:
            if alone[seed] and str(alone[seed]).startswith(UNSUPPORTED):
                result.refused[str(alone[seed]).splitlines()[0][:120]] += 1
            elif alone[seed]:
                small = shrunk(graph, target)
                result.problems[seed] = save(small, seed, str(problem_of([small], target) or alone[seed]), folder)
        if not any(alone.values()):
            both = problem_of([g for _, g in drawn], target)
            result.problems[seeds[0]] = f"seeds {seeds[0]} to {seeds[-1]}: fail side by side but not alone: {both}"
    return result


def _task(arguments: tuple[Sequence[int], str, Path]) -> Result:
    return check(*arguments)


def _prepare(cache: str) -> None:
    os.environ["SKIVE_CACHE"] = cache  # thousands of artefacts that nobody needs again
    os.environ.setdefault("SKIVE_CXXFLAGS", "-O1")  # half the compile time, the same code paths


def fuzz(
    *,
    first: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    target: str = "host",
    folder: Path = Path("fuzz-failures"),
    announce: bool = False,
) -> Result:
    """Runs graphs from seed `first` until `count` graphs or `seconds` are spent."""
    result, started = Result(), time.monotonic()

    def tasks() -> Iterator[tuple[Sequence[int], str, Path]]:
        end = None if count is None else first + count
        start = first
        while (end is None or start < end) and (seconds is None or time.monotonic() - started < seconds):
            stop = start + SIDE_BY_SIDE if end is None else min(start + SIDE_BY_SIDE, end)
            yield range(start, stop), target, folder
            start = stop

    def take(part: Result) -> None:
        result.merge(part)
        if announce:
            for text in part.problems.values():
                print(text, flush=True)

    with tempfile.TemporaryDirectory() as cache:
        if jobs == 1:
            _prepare(cache)
            for task in tasks():
                take(_task(task))
        else:
            context = multiprocessing.get_context("spawn")
            with context.Pool(jobs, _prepare, (cache,), maxtasksperchild=50) as pool:
                running: list[multiprocessing.pool.AsyncResult[Result]] = []
                for task in tasks():
                    running.append(pool.apply_async(_task, (task,)))
                    while len(running) >= 2 * jobs:
                        take(running.pop(0).get())
                for r in running:
                    take(r.get())
    return result


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seed", "--first", dest="first", type=int, default=0, help="the first seed")
    p.add_argument("--count", type=int, help="graphs to run (2000 unless --seconds is given)")
    p.add_argument("--seconds", type=float, help="start no more graphs after this time")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--target", default="host")
    p.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for reproducers")
    p.add_argument("--show", action="store_true", help="print the graph of --seed and stop")
    a = p.parse_args()
    if a.show:
        print(random_graph(a.first).describe())
        return 0
    count = a.count if a.count is not None or a.seconds is not None else 2000
    started = time.monotonic()
    result = fuzz(
        first=a.first, count=count, seconds=a.seconds, jobs=a.jobs, target=a.target, folder=a.keep, announce=True
    )
    took = time.monotonic() - started
    for why, n in result.refused.most_common():
        print(f"not supported, {n} times: {why}")
    print(
        f"{result.graphs} graphs of {result.nodes} nodes, {len(result.operators)} operators, seeds {a.first} to "
        f"{a.first + result.graphs - 1}, in {took:.0f} s; {len(result.problems)} wrong, "
        f"{sum(result.refused.values())} refused"
    )
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
