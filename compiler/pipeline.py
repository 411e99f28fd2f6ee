"""Passes, their options and the manager that runs, verifies, checks and records them.

A pass is a function `Graph -> Graph` registered under the name the command line uses:

    @pass_("fold-constants", exact=True, options=FoldConstants)
    def fold_constants(graph: Graph, options: FoldConstants) -> Graph: ...
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skive import ops
from skive.errors import InvalidModelError, SkiveError, VerificationError
from skive.ir import Graph, constant, rebuilt
from skive.verify import verify

log = logging.getLogger("skive.pipeline")

# With check="auto" a graph of more multiply-accumulates than this is not run through the numpy
# reference after each exact pass: a compile of a small model must stay a matter of seconds.
AUTO_CHECK_MACS = 10_000_000
# Largest |difference| that an exact pass may cause, as a fraction of the output's range: float32
# sums in another order, weights multiplied by a folded scale.
EXACT_TOLERANCE = 2e-5
# A badly conditioned network (deep, random weights) amplifies any rounding. There the pass is held
# to this many times the effect of a relative perturbation of 2^-23 of every weight and input.
CONDITION_MARGIN = 16


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a pass that has none."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A registered pass. Call it with a graph and its options by keyword."""

    name: str
    fn: Callable[[Graph, Any], Graph]
    exact: bool
    options: type = NoOptions

    def __call__(self, graph: Graph, **options: Any) -> Graph:
        return self.fn(graph, self.options(**options))

    @property
    def doc(self) -> str:
        """The first line of the function's docstring."""
        return (self.fn.__doc__ or "").strip().splitlines()[0]


PASSES: dict[str, Pass] = {}


def pass_(name: str, *, exact: bool, options: type = NoOptions) -> Callable[[Callable[[Graph, Any], Graph]], Pass]:
    """A decorator that registers a function as pass `name`.

    `exact`: the outputs stay the same up to float32 rounding, and the manager may hold it to that.
    `options`: a frozen dataclass; its fields are what `name{field=value}` may set.
    """

    def register(fn: Callable[[Graph, Any], Graph]) -> Pass:
        if name in PASSES:
            raise AssertionError(f"two passes are called {name}")
        PASSES[name] = Pass(name, fn, exact, options)
        return PASSES[name]

    return register


@dataclass(frozen=True, slots=True)
class Step:
    """A pass with its options, as one element of a pipeline."""

    pass_: Pass
    options: Any

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self.options, f.name)}" for f in dataclasses.fields(self.options)
                   if getattr(self.options, f.name) != f.default]
        return self.pass_.name + ("{" + " ".join(changed) + "}" if changed else "")


_STEP = re.compile(r"\s*([a-z0-9-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")


def parse_pipeline(text: str) -> tuple[Step, ...]:
    """The steps that `text` names, such as `fold-constants{max_bytes=4096},eliminate-dead`.

    Options are separated by spaces or commas. InvalidModelError on an unknown pass or option or a
    value of the wrong type.
    """
    steps, at = [], 0
    while at < len(text.rstrip()):
        m = _STEP.match(text, at)
        if not m:
            raise InvalidModelError(f"pipeline {text!r}: cannot read {text[at:at + 24]!r}")
        if m[1] not in PASSES:
            close = difflib.get_close_matches(m[1], PASSES, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(PASSES))}"
            raise InvalidModelError(f"pipeline {text!r}: no pass {m[1]!r}; {hint}")
        steps.append(Step(PASSES[m[1]], _parse_options(PASSES[m[1]], m[2] or "")))
        at = m.end()
        if m[3] == "," and not text[at:].strip():
            raise InvalidModelError(f"pipeline {text!r} ends with a comma")
    return tuple(steps)


def _parse_options(p: Pass, text: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(p.options)}
    values: dict[str, Any] = {}
    for item in filter(None, re.split(r"[,\s]+", text)):
        key, eq, value = item.partition("=")
        if not eq or key not in fields:
            raise InvalidModelError(f"pass {p.name}: unknown option {item!r}; it has {', '.join(fields) or 'none'}")
        kind: Any = type(fields[key].default)
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False, "1": True, "0": False}[value.lower()]
            else:
                values[key] = kind(value)
        except (KeyError, ValueError):
            raise InvalidModelError(f"pass {p.name}: option {key} needs a {kind.__name__}, not {value!r}") from None
    return p.options(**values)


@dataclass(frozen=True, slots=True)
class Record:
    """What one pass did: the `passes[]` keys of report.json."""

    name: str
    ms: float
    nodes: int
    macs: int
    weight_bytes: int
    exact: bool
    checked: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def require_matches(graph: Graph, keep: Sequence[str], error: type[SkiveError]) -> None:
    """`error` if a pattern of `keep` names nothing of the network: a layer that was to stay would go."""
    names = sorted({name for n in graph.nodes for name in (n.origin, n.name) if name})
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:3]
            raise error(f"{graph.name}: keep names {pattern!r}, which no layer matches; there are {', '.join(near)}")


def total_macs(graph: Graph) -> int:
    """Multiply-accumulates of one evaluation of `graph`."""
    return sum(ops.macs(n) for n in graph.nodes)


def weight_bytes(graph: Graph) -> int:
    """Bytes of the constants of `graph`, each array once."""
    return sum({id(n.value): n.type.bytes for n in graph.nodes if n.is_const}.values())


def operations(graph: Graph) -> int:
    """The number of nodes that compute: all but inputs and constants."""
    return sum(n.op not in ("input", "const") for n in graph.nodes)


def random_inputs(graph: Graph, seed: int = 0) -> list[np.ndarray]:
    """One array per graph input: normal floats, small non-negative integers, random bools."""
    rng = np.random.default_rng(seed)
    arrays = []
    for i in graph.inputs:
        a: np.ndarray
        if i.dtype.is_float:
            a = rng.standard_normal(i.shape)
        elif i.dtype.is_int:
            a = rng.integers(0, 8, i.shape)
        else:
            a = rng.integers(0, 2, i.shape)
        arrays.append(np.asarray(a, i.dtype.numpy))
    return arrays


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest |got - want| as a fraction of the finite range of `want`; inf where they cannot be compared.

    Integers and bools must be equal. NaN equals NaN and an infinity itself.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(got, want) else math.inf
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if same.all():
        return 0.0
    if not np.isfinite(got[~same]).all() or not np.isfinite(want[~same]).all():
        return math.inf
    scale = np.max(np.abs(want), where=np.isfinite(want), initial=0.0)
    return float(np.max(np.abs(got[~same] - want[~same])) / max(scale, 1e-30))


class PassManager:
    """Runs pipelines."""

    def run(self, graph: Graph, passes: str | Sequence[str | Pass | Step], *, dump_dir: str | Path | None = None,
            check: str = "auto") -> tuple[Graph, list[Record]]:
        """(the transformed graph, one record per pass).

        Every pass is verified. An exact pass is compared with the graph before it on random inputs; `check`:
        "always", "never", or "auto" (small graphs only, see AUTO_CHECK_MACS). `dump_dir`: a folder for the text
        of the graph after each pass.
        Raises VerificationError naming the pass whose result differs, InvalidModelError if a pass
        leaves a malformed graph.
        """
        if check not in ("auto", "always", "never"):
            raise ValueError(f"check is auto, always or never, not {check!r}")
        steps = _steps(passes)
        check_exact = check == "always" or (check == "auto" and total_macs(graph) <= AUTO_CHECK_MACS)
        verify(graph)
        inputs = random_inputs(graph) if check_exact else []
        reference: list[np.ndarray] | None = None
        records: list[Record] = []
        dump = _Dump(Path(dump_dir), graph) if dump_dir is not None else None
        for index, step in enumerate(steps, 1):
            log.info(str(step))
            start = time.perf_counter()
            after = step.pass_.fn(graph, step.options)
            ms = (time.perf_counter() - start) * 1e3
            changed = after is not graph
            if changed:
                verify(after, after=step.pass_.name)
                _warn_of_nan(graph, after, step.pass_.name)
                if step.pass_.exact and check_exact:
                    if reference is None:
                        reference = _evaluate(graph, inputs)
                    reference = _compare(graph, after, inputs, reference, step.pass_.name)
                else:
                    reference = None
            records.append(Record(step.pass_.name, round(ms, 3), operations(after), total_macs(after),
                                  weight_bytes(after), step.pass_.exact, changed and step.pass_.exact and check_exact))
            graph = after
            if dump is not None:
                dump.add(index, step.pass_.name, graph)
        if dump is not None:
            dump.close(records)
        return graph, records


def _compare(before: Graph, after: Graph, inputs: list[np.ndarray], want: list[np.ndarray],
             name: str) -> list[np.ndarray]:
    """The outputs of `after`; VerificationError if pass `name` changed them from `want`, those of `before`."""
    got = _evaluate(after, inputs)
    worst = max(map(difference, got, want))
    if worst <= EXACT_TOLERANCE:
        return got
    allowed = max(EXACT_TOLERANCE, CONDITION_MARGIN * _rounding_effect(before, inputs, want))
    for output, g, w in zip(after.output_names, got, want, strict=True):
        if difference(g, w) > allowed:
            raise VerificationError(f"{after.name}: pass {name} changed output {output!r} by {difference(g, w):.2g} of "
                                    f"its range (allowed {allowed:.2g}); please report it, and leave the pass out")
    return got


def _rounding_effect(graph: Graph, inputs: list[np.ndarray], want: list[np.ndarray]) -> float:
    """How far the outputs move, as a fraction of their range, when every float32 rounds differently."""
    rng = np.random.default_rng(1)

    def shaken(a: np.ndarray) -> np.ndarray:
        if a.dtype.kind != "f":
            return a
        return np.asarray(a * (1 + 2.0**-23 * rng.uniform(-1, 1, a.shape)), a.dtype)

    perturbed = graph.map_nodes(lambda n, i: constant(shaken(n.value)) if n.is_const else rebuilt(n, i))
    effect = max(map(difference, _evaluate(perturbed, [shaken(i) for i in inputs]), want))
    return effect if math.isfinite(effect) else 0.0


def _steps(passes: str | Sequence[str | Pass | Step]) -> list[Step]:
    if isinstance(passes, str):
        return list(parse_pipeline(passes))
    steps: list[Step] = []
    for p in passes:
        if isinstance(p, Step):
            steps.append(p)
        elif isinstance(p, Pass):
            steps.append(Step(p, p.options()))
        else:
            steps.extend(parse_pipeline(p))
    return steps


def _evaluate(graph: Graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
    from skive.reference import evaluate_graph  # the only user of the evaluator here; not needed to transform

    return list(evaluate_graph(graph, inputs))


def _warn_of_nan(before: Graph, after: Graph, name: str) -> None:
    """Logs constants with NaN that the pass made: legal, but worth knowing."""
    known = {id(n.value) for n in before.nodes if n.is_const}
    for n in after.nodes:
        if n.is_const and n.dtype.is_float and id(n.value) not in known and np.isnan(n.value).any():
            log.warning("%s: pass %s made a constant that holds NaN", n.label(), name)


class _Dump:
    """`--dump-ir`: the text after each pass, the difference to the text before, and a table."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        from skive.text import print_graph

        self._print = print_graph
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._last, self._last_name = print_graph(graph), "00-input.txt"
        (folder / self._last_name).write_text(self._last, encoding="utf-8")

    def add(self, index: int, name: str, graph: Graph) -> None:
        text, file = self._print(graph), f"{index:02d}-{name}.txt"
        (self._folder / file).write_text(text, encoding="utf-8")
        diff = difflib.unified_diff(self._last.splitlines(True), text.splitlines(True), self._last_name, file)
        (self._folder / f"{index:02d}-{name}.diff").write_text("".join(diff), encoding="utf-8")
        self._last, self._last_name = text, file

    def close(self, records: list[Record]) -> None:
        (self._folder / "passes.txt").write_text(table(records) + "\n", encoding="utf-8")


def table(records: Sequence[Record]) -> str:
    """The records as a text table: pass, nodes, MACs, weight bytes, milliseconds."""
    rows = [("pass", "nodes", "macs", "weight bytes", "ms")]
    rows += [(r.name, str(r.nodes), f"{r.macs:,}", f"{r.weight_bytes:,}", f"{r.ms:.1f}") for r in records]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]).rstrip()
                     for row in rows)
