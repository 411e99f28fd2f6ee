"""`skive.Exit`: where a network may stop and when, and the graph with the tests in it.

`arrange` puts the outputs of a model into the order in which its exits are reached; passes, pruning and
quantization then see an ordinary graph with several outputs. `attach` adds the criteria behind them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from skive import criteria, exit_calls, integer_criteria, ops
from skive.errors import ExitError, VerificationError
from skive.ir import Graph, Node, topological
from skive.program import TESTS, ExitTest, Program

if TYPE_CHECKING:
    from skive.frontend import Source
    from skive.plan import Plan
    from skive.runtime import Module

log = logging.getLogger("skive.exits")


@dataclass(frozen=True)
class Exit:
    """A place where a call may end early. Checked when it is made: ExitError says which value cannot be.

    `output`: an output of the model, or a tensor inside it by its name in the source; its value is the result of a
    call that ends here. `criterion`: a name of `skive.criteria.CRITERIA`, or a function of a
    `skive.criteria.Point` that returns a score. The call ends if the score compares with `threshold` as the criterion
    says (`max-prob` > 0.9, `entropy` < 0.3); `test` says it for a function (">" by default). `of`: what else
    the criterion reads: the name of a tensor of the model (`score`, `q-exit`), or numbers (`gate`).
    `axis`: where the classes are; by default 1 of a rank 4 or 5 tensor, otherwise the last.
    """

    output: str
    criterion: str | Callable[[criteria.Point], Node] = "max-prob"
    threshold: float = 0.9
    of: str | Sequence[float] | None = None
    axis: int | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output:
            raise ExitError(f"an exit is named by an output or a tensor of the model, not by {self.output!r}")
        if not callable(self.criterion) and self.criterion not in criteria.CRITERIA:
            raise ExitError(f"exit {self.output}: there is no criterion {self.criterion!r}; there are "
                            + ", ".join(criteria.CRITERIA))
        if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
            raise ExitError(f"exit {self.output}: the threshold is {self.threshold!r}, not a number")
        if self.test is not None and self.test not in TESTS:
            raise ExitError(f"exit {self.output}: test is {self.test!r}; it can be {', '.join(TESTS)}")
        if self.of is not None and not isinstance(self.of, str):
            object.__setattr__(self, "of", tuple(float(v) for v in self.of))

    @property
    def criterion_name(self) -> str:
        """The criterion as reports and the tensors of an artefact call it."""
        return self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "function")

    @property
    def leaves(self) -> str:
        """The comparison of score and threshold that ends a call."""
        return self.test or (criteria.CRITERIA[self.criterion][1] if isinstance(self.criterion, str) else ">")

    def options(self) -> dict[str, Any]:
        """As plain values, for the manifest and the cache."""
        return {**self.__dict__, "criterion": self.criterion_name}

    def fingerprint(self) -> str | None:
        """Equal for equal exits; None where a function decides."""
        return json.dumps(self.options(), sort_keys=True) if isinstance(self.criterion, str) else None

    def text(self, threshold: float) -> str:
        """The form that `parse` reads, with another threshold."""
        of = self.of if isinstance(self.of, str) else ",".join(map(repr, self.of or ()))
        return f"{self.output}:{self.criterion_name}{'@' + of if of else ''}={float(np.float32(threshold)):.9g}"

    @staticmethod
    def parse(text: str) -> Exit:
        """The Exit of `NAME:CRITERION=VALUE` or `NAME:CRITERION@OF=VALUE`; ExitError if it is neither."""
        head, equals, value = text.rpartition("=")
        name, colon, rule = head.rpartition(":")
        rule, at, of = rule.partition("@")
        try:
            threshold = float(value)
        except ValueError:
            equals = ""
        if not (equals and colon and name and rule):
            raise ExitError(f"{text!r} is not NAME:CRITERION=VALUE, for example exit0:max-prob=0.9")
        beside: Any = of if at else None
        with contextlib.suppress(ValueError):  # the name of a tensor
            beside = [float(v) for v in of.split(",")] if at else None
        return Exit(name, rule, threshold, beside)


def requested(exits: Any) -> tuple[Exit, ...]:
    """What the argument `exits` asks for: Exit objects or their text form. ExitError."""
    if isinstance(exits, (str, Exit)):
        exits = [exits]
    found = tuple(Exit.parse(e) if isinstance(e, str) else e for e in exits)
    for e in found:
        if not isinstance(e, Exit):
            raise ExitError(f"{e!r} is not an exit; give skive.Exit(output, criterion, threshold)")
    names = [e.output for e in found]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise ExitError(f"exit {double} is given twice")
    if not found:
        raise ExitError("exits is empty; name an output, or leave it out")
    return found


def _outputs_of(graph: Graph) -> dict[str, Node]:
    return dict(zip(graph.output_names, graph.outputs, strict=True))


def _tensor(graph: Graph, name: str, exit_name: str) -> Node:
    """The output or inner tensor called `name`; ExitError if there is none."""
    node = _outputs_of(graph).get(name) or next((n for n in graph.nodes if n.name == name), None)
    if node is None or node.is_const:
        raise ExitError(f"exit {exit_name}: the model has no tensor {name!r}; its outputs are "
                        + ", ".join(graph.output_names))
    return node


def arrange(graph: Graph, exits: Sequence[Exit]) -> tuple[Graph, tuple[Exit, ...]]:
    """(`graph` whose outputs are the exits, then what else the model returns, then what criteria read; the exits
    in the order in which they are reached: by the work that leads to them).

    An inner tensor that is an exit, or that a criterion reads, becomes an output. ExitError if a name is unknown, if an
    exit is not a tensor of float classes, or if every output is an exit.
    """
    macs = {e: sum(map(ops.macs, topological([_tensor(graph, e.output, e.output)]))) for e in exits}
    ordered = tuple(sorted(exits, key=lambda e: macs[e]))
    beside = [e.of for e in ordered if isinstance(e.of, str)]
    for e in ordered:
        node = _tensor(graph, e.output, e.output)
        if not node.dtype.is_float:
            raise ExitError(f"exit {e.output} is {node.type}; an exit is float logits or probabilities")
        if any(e.of == o.output for o in ordered):
            raise ExitError(f"exit {e.output} reads {e.of}, which is an exit itself; give it as a second output")
    rest = [n for n in graph.output_names if n not in beside and all(n != e.output for e in ordered)]
    if not rest:
        raise ExitError(f"all outputs of {graph.name} are exits; the last one is that of the whole network: "
                        "leave it unnamed")
    if graph.batch_max:
        last = [_tensor(graph, n, n) for n in rest]
        for e in ordered:
            node = _tensor(graph, e.output, e.output)
            if [n.type for n in last] != [node.type]:
                raise ExitError(f"exit {e.output} is {node.type}, the whole network gives "
                                f"{', '.join(str(n.type) for n in last)}: a batch whose samples leave at different "
                                "exits has no one shape; give all the last shape, or leave batch_max out")
    elif (together := samples_together(graph)) > 1:
        log.warning("%s takes %d samples a call, which leave together, when the least sure one may; for each to leave "
                    "by itself give it a batch of 1 and batch_max (--batch-max %d)", graph.name, together, together)
    names = [e.output for e in ordered] + rest + list(dict.fromkeys(beside))
    outputs = tuple(_tensor(graph, n, n) for n in names)
    return replace(graph, outputs=outputs, output_names=tuple(names)), ordered


def samples_together(graph: Graph) -> int:
    """Samples of one decision: the first dimension that all inputs and outputs have in common, 1 if there is none."""
    first = {n.shape[0] if n.type.rank else 0 for n in (*graph.inputs, *graph.outputs)}
    return max(1, *first) if len(first) == 1 else 1


def attach(graph: Graph, exits: Sequence[Exit], ports: Sequence[Mapping[str, Any] | None] | None = None) -> Program:
    """The program of a graph that `arrange` gave and passes changed: each exit's score is computed behind it.

    `ports`: scale and zero point of each output, of a graph without floats; scores are then integers as well.
    """
    found = _outputs_of(graph)
    formats = dict(zip(found, ports, strict=True)) if ports is not None else None
    states: dict[str, dict[str, Node]] = {}
    outputs: list[Node] = []
    names: list[str] = []
    tests: list[ExitTest] = []
    for e in exits:
        node = found[e.output]
        axis = e.axis if e.axis is not None else 1 if node.type.rank in (4, 5) else -1
        if not node.type.rank or not -node.type.rank <= axis < node.type.rank or not node.type.size:
            raise ExitError(f"exit {e.output} is {node.type}: it has no axis {axis} of classes")
        if e.criterion in ("margin", "gate") and node.shape[axis] < 2:
            raise ExitError(f"exit {e.output} has one class; {e.criterion} needs two")
        state = states.setdefault(e.criterion_name, {})
        scale: float | None = None
        if formats is not None:
            score, scale = _integer_score(e, found, axis, state, formats)
        else:
            score = _float_score(e, found, axis, state)
        label = f"{e.output}.{e.criterion_name}"
        while label in found or label in names:
            label += "_"
        score = replace(criteria.worst(score, e.leaves), name=label, origin=label)
        outputs += [node, score]
        names += [e.output, label]
        tests.append(ExitTest(e.output, (e.output,), e.criterion_name, label, e.leaves, float(e.threshold), scale))
    used = {*(e.output for e in exits), *(e.of for e in exits)}
    rest = [n for n in graph.output_names if n not in used]
    program = replace(graph, outputs=(*outputs, *(found[n] for n in rest)), output_names=(*names, *rest))
    return Program(program, (*tests, ExitTest(rest[0], tuple(rest))))


def _float_score(e: Exit, found: Mapping[str, Node], axis: int, state: dict[str, Node]) -> Node:
    """The float32 scores of an exit among the outputs `found`."""
    real = {n: criteria.as_float(found[n]) for n in (e.output, e.of) if isinstance(n, str)}
    extra = real[e.of] if isinstance(e.of, str) else None
    numbers = e.of if isinstance(e.of, tuple) else ()
    point = criteria.Point(e.output, criteria.classes_last(real[e.output], axis), extra, numbers, state,
                           criteria.is_softmax(*criteria.before_moves(real[e.output], axis)))
    build = criteria.CRITERIA[e.criterion][0] if isinstance(e.criterion, str) else e.criterion
    return criteria.as_float(build(point))


def _integer_score(e: Exit, found: Mapping[str, Node], axis: int, state: dict[str, Node],
                   formats: Mapping[str, Mapping[str, Any] | None]) -> tuple[Node, float]:
    """The scores of an exit as i32, and the real number that a 1 stands for."""
    node, form = found[e.output], formats[e.output]
    assert form is not None and isinstance(e.criterion, str), "Changes.requested lets nothing else through"
    scale, zero = float(form["scale"]), int(form["zero"])
    if inner := integer_criteria.softmax_input(e.output, node, axis):
        node, scale, zero, axis = inner
    extra = integer_criteria.integers(e.output, found[e.of], formats[e.of]) if isinstance(e.of, str) else None
    numbers = e.of if isinstance(e.of, tuple) else ()
    logits = criteria.classes_last(node, axis)
    point = integer_criteria.IntegerPoint(e.output, logits, scale, zero, extra, numbers, state)
    return integer_criteria.finished(integer_criteria.CRITERIA[e.criterion](point))


def arranged(graph: Graph, exits: Sequence[Exit], source: Source) -> tuple[Graph, tuple[Exit, ...], Source]:
    """`arrange`, and the Source whose oracle gives outputs in that order, None for what it does not compute."""
    asked = {n for e in exits for n in (e.output, e.of)}
    ordered, ways = arrange(unmarked(graph, asked), exits)
    names = attach(ordered, ways).graph.output_names

    def oracle(inputs: Sequence[np.ndarray]) -> list[Any] | None:
        values = source.oracle(inputs)
        if values is None:
            return None
        returned = [n for n in graph.output_names if n not in graph.exit_points]
        known = dict(zip(returned, values, strict=True))
        return [known.get(n) for n in names]

    return ordered, ways, replace(source, oracle=oracle)


def reference(graph: Graph, module: Module) -> tuple[Graph, list[int]]:
    """(`graph`, imported anew, with the outputs of `module` that are not scores, the whole network's first; their
    numbers in `module`)."""
    kept = [i for way in reversed(module.exits) for i in way.outputs]
    names = tuple(module.outputs[i].name for i in kept)
    known = _outputs_of(graph) | {n.name: n for n in graph.nodes if n.name and n.name in names}
    if missing := [n for n in names if n not in known]:
        raise ExitError(f"the model has no tensor {missing[0]!r}: {module.folder} was compiled from another model")
    return replace(graph, outputs=tuple(known[n] for n in names), output_names=names), kept


def unmarked(graph: Graph, asked: Collection[Any] = ()) -> Graph:
    """`graph` without the outputs that are there only as exits, but for those that are `asked` for."""
    kept = [i for i, n in enumerate(graph.output_names) if n not in graph.exit_points or n in asked]
    return replace(graph, outputs=tuple(graph.outputs[i] for i in kept),
                   output_names=tuple(graph.output_names[i] for i in kept), exit_points=())


def described(plan: Plan, exits: Sequence[Exit]) -> list[dict[str, Any]]:
    """The exits in the order in which they are reached, as manifest and report hold them. `macs` and `arena_bytes` are
    what a call needs at most that ends there, `macs_least` at least, where branches decide; `of` is that of the
    request. Of integer scores `scale` is the real number that a 1 stands for, `code` the threshold among them."""
    beside = {e.output: e.of for e in exits}
    rows, macs = [], 0
    for e, stage in zip(plan.exits, plan.stages, strict=True):
        macs += stage.macs
        rows.append({
            "name": e.name,
            "criterion": e.criterion or None,
            "threshold": e.threshold if e.score is not None else None,
            "test": e.test or None,
            "of": beside.get(e.name),
            "score": plan.outputs[e.score].name if e.score is not None else None,
            "outputs": [plan.outputs[i].name for i in e.outputs],
            "macs": macs,
            "macs_least": stage.least_macs,
            "arena_bytes": stage.arena_bytes,
        })
        if e.scale is not None:
            rows[-1] |= {"scale": e.scale, "code": e.code}
    return rows


def path(module: Module, values: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """The exit that each sample takes, decided here from all outputs of the network, the scores among them."""
    last = len(module.exits) - 1
    chosen: np.ndarray | None = None
    for k in reversed(range(last)):
        way = module.exits[k]
        assert way.score is not None and way.test is not None
        leaves = exit_calls.COMPARE[way.test](way.real(values[way.score]), thresholds[k])
        chosen = np.where(leaves, k, last if chosen is None else chosen)
    assert chosen is not None
    return chosen


def check_paths(module: Module, inputs: Sequence[np.ndarray]) -> None:
    """Every way through `module` on `inputs`: with thresholds that hold a call until an exit and let it go there, and
    with its own. VerificationError if a call ends elsewhere than its scores say, or gives something else than the
    whole network does at that exit, bit for bit."""
    if not module.exits:
        return
    values = module.all_outputs(*inputs)
    own = np.asarray(list(module.thresholds.values()), np.float32)
    forced = [own]
    for k in range(len(module.exits)):
        open_ = [math.inf if (e.test or "")[0] == "<" else -math.inf for e in module.exits[:-1]]
        forced.append(np.asarray([math.nan] * k + open_[k:], np.float32))  # nothing compares with NaN
    names = list(module.thresholds)
    try:
        for thresholds in forced:
            module.thresholds = dict(zip(names, thresholds.tolist(), strict=True))
            got = module.run(*inputs)
            want = path(module, values, thresholds)
            if not np.array_equal(got.exit, want):
                raise VerificationError(f"{module.manifest['name']}: a call ended at exit {got.exit.tolist()}, but its "
                                        f"scores say {want.tolist()}; please report it")
            results = got.outputs if isinstance(got.outputs, tuple) else (got.outputs,)
            whole = exit_calls.taken(module.exits, [v.copy() for v in values], want)
            for a, b in zip(results, whole if isinstance(whole, tuple) else (whole,), strict=True):
                if a.tobytes() != b.tobytes():
                    raise VerificationError(f"{module.manifest['name']}: exit {module.exits[int(want[0])].name} gives "
                                            "another result when the call ends there; please report it")
    finally:
        module.thresholds = dict(zip(names, own.tolist(), strict=True))
