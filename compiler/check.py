"""The verified compile: does the artefact compute what the model says, and if not, where does it start?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from skive import expr as expressions
from skive import ops
from skive.ir import Graph, Node, constant, rebuilt
from skive.pipeline import difference
from skive.reference import evaluate_graph, evaluate_wide
from skive.types import DType

# Largest accepted |difference| as a fraction of the output's range. A float32 network of a hundred
# layers, summed in another order than the reference, stays an order of magnitude below.
TOLERANCE = 1e-4
# A quantizer behind a float32 function may round a value either way; the noise of that stays well
# below the noise of quantization itself (about 40 dB for 8 bits).
INTEGER_SQNR_DB = 45.0
BRANCH_TRIES = 24  # inputs that are tried to see a choice go both ways
FLIP_DB = 6.0  # by which an artefact may be further from the reference than a perturbed reference is
# Relative error of a weight that changes the sums of a contraction about as much (2^-19.8, L2) as float32
# rounding does in the kernel that is worst at it, Winograd's (2^-21 for 16 channels, 2^-19.6 for 256).
FLOAT_ERROR = 2.0**-19

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Verdict:
    """The `verification` of report.json. `sqnr_db` is the smallest over the float outputs."""

    reference: str
    samples: int
    max_abs_error: float
    relative_error: float
    sqnr_db: float | None
    passed: bool
    worst_node: str | None = None

    @property
    def distance(self) -> str:
        """How far from each other the two are, as an adverbial for messages."""
        if self.relative_error < 0:
            return "in shape, type, integers or in which values are finite"
        return f"by {self.relative_error:.2g} of the output's range"


def sqnr_db(got: np.ndarray, want: np.ndarray) -> float:
    """Signal-to-noise ratio of `got` in decibels; 300 where there is no noise to speak of."""
    signal = float(np.sum(np.square(want, dtype=np.float64)))
    noise = float(np.sum(np.square(got.astype(np.float64) - want)))
    return 300.0 if noise == 0 or signal == 0 else min(300.0, 10 * math.log10(signal / noise))


def compare(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], reference: str, samples: int, tolerance: float = TOLERANCE
) -> Verdict:
    """The verdict over (got, want) pairs."""
    worst, absolute, ratio = 0.0, 0.0, None
    for got, want in pairs:
        d = difference(got, want)
        worst = max(worst, d)
        if want.dtype.kind == "f" and want.size and got.shape == want.shape:
            finite = np.isfinite(want) & np.isfinite(got)
            err = np.abs(got[finite].astype(np.float64) - want[finite])
            absolute = max(absolute, float(err.max(initial=0.0)))
            db = sqnr_db(np.where(finite, got, 0), np.where(finite, want, 0))
            ratio = db if ratio is None else min(ratio, db)
    return Verdict(
        reference, samples, absolute, worst if math.isfinite(worst) else -1.0, ratio, worst <= tolerance
    )


_ROUNDS = frozenset(("quantize", "requantize", "requantize_fixed"))


def _steps(node: Node) -> expressions.Expr | None:
    """The elementwise steps of a map, of an epilogue, or of one elementwise operation."""
    text = node.attrs.get("fn") or node.attrs.get("epilogue")
    if text:
        return expressions.parse(text)
    if ops.op_of(node.op).kind != "elementwise":
        return None
    return expressions.Expr(
        (expressions.Step(node.op, tuple(("x", i) for i in range(len(node.inputs))), tuple(node.attrs.items())),)
    )


def has_roundings(graph: Graph) -> bool:
    """True if `graph` (fused or not) rounds values to integers."""
    return any(s.op in _ROUNDS for n in graph.nodes for s in getattr(_steps(n), "steps", ()))


@dataclass(frozen=True)
class Exactness:
    """How far two correct implementations of a graph may differ.

    `exact`: every float operation is correctly rounded, so that they are equal. `flips`: values that are
    not are rounded to integers, where a last bit may decide.
    """

    exact: bool
    flips: bool


def exactness(graph: Graph) -> Exactness:
    """Of a fused or unfused graph; operations with a tolerance in the op table are not exact on floats."""
    inexact: set[Node] = set()
    exact, flips = True, False
    for node in graph.nodes:
        row = ops.op_of(node.op)
        e = _steps(node)
        base = 0 if e is not None and "epilogue" not in node.attrs else row.epilogue or len(node.inputs)
        blurred = any(i in inexact for i in node.inputs[:base]) if base else False
        if row.kind != "elementwise" and row.tolerance and any(i.dtype.is_float for i in node.inputs[:base]):
            flips |= blurred and node.op == "compressed_linear" and node.attrs["activation"] < 32
            blurred, exact = True, False
        if e is not None:
            # x0 is the result of the base operation; the operands behind it are those of the epilogue.
            sums = row.infer([i.type for i in node.inputs[:base]], node.attrs).dtype if base else DType.i32
            types = ([sums] if base else []) + [i.dtype for i in node.inputs[base:]]
            operands = ([blurred] if base else []) + [i in inexact for i in node.inputs[base:]]
            steps: list[bool] = []
            for n, s in enumerate(e.steps):
                blurred = any((operands if k == "x" else steps)[i] for k, i in s.args)
                flips |= blurred and s.op in _ROUNDS
                if ops.op_of(s.op).tolerance and ops.expr_dtype(expressions.Expr(e.steps[: n + 1]), types).is_float:
                    blurred, exact = True, False
                steps.append(blurred)
        if blurred:
            inexact.add(node)
    return Exactness(exact, flips)


def rounds_alike(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    """True if every (got, want) differs by no more than roundings that went the other way."""
    return all(sqnr_db(got.astype(np.float64), want.astype(np.float64)) >= INTEGER_SQNR_DB for got, want in pairs)


def flips_alike(
    graph: Graph, inputs: Sequence[np.ndarray], pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> bool:
    """True if every (got, want) is about as close as the reference stays to itself when the constants of float32
    contractions, normalizations and smooth functions change by a rounding error.

    A network in which such layers or functions stand before quantizers may amplify one integer that was rounded
    the other way until its noise is that of quantization itself.
    """
    rng = np.random.default_rng(1)

    def shaken(node: Node, operands: tuple[Node, ...]) -> Node:
        row = ops.op_of(node.op)
        inexact = row.kind != "elementwise" and row.tolerance > 0 and node.inputs[0].dtype is DType.f32
        if not inexact and all(ops.op_of(s.op).tolerance == 0 for s in getattr(_steps(node), "steps", ())):
            return rebuilt(node, operands)
        weights = [
            constant(np.asarray(i.value * (1 + FLOAT_ERROR * rng.uniform(-1, 1, i.shape)), np.float32))
            if i.is_const and i.dtype is DType.f32
            else i
            for i in operands
        ]
        return rebuilt(node, tuple(weights))

    perturbed = evaluate_graph(graph.map_nodes(shaken), inputs)
    doubles = ([a.astype(np.float64) for a in (g, w, p)] for (g, w), p in zip(pairs, perturbed, strict=True))
    return all(sqnr_db(g, w) >= sqnr_db(p, w) - FLIP_DB for g, w, p in doubles)


def allowed_difference(graph: Graph, inputs: Sequence[np.ndarray]) -> float:
    """The tolerance for an imported `graph` (no epilogues) on `inputs`.

    TOLERANCE, or eight times the error that float32 rounding alone makes in the numpy reference where
    that is larger: a network whose values explode on random inputs amplifies any rounding.
    """
    rounding = max(
        (
            difference(f, w.astype(f.dtype))
            for f, w in zip(evaluate_graph(graph, inputs), evaluate_wide(graph, inputs), strict=True)
        ),
        default=0.0,
    )
    return max(TOLERANCE, min(8 * rounding, 0.05))


def prefix(graph: Graph, nodes: Sequence[Node]) -> Graph:
    """The part of `graph` that computes `nodes`, which become its outputs."""
    return replace(
        graph, outputs=tuple(nodes), output_names=tuple(f"t{i}" for i in range(len(nodes))), states=()
    )


def first_divergence(
    graph: Graph,
    inputs: Sequence[np.ndarray],
    run_prefix: Callable[[Graph], Run],
    tolerance: float = TOLERANCE,
) -> Node | None:
    """The first node, in execution order, whose compiled value leaves the reference; None if none does.

    Bisection: the graph is cut at the middle of the suspect interval and compiled with that node as
    its output. A cut that lies before the fault agrees, one behind it does not (a fault that later
    nodes hide again can move the answer to a later node, never to an innocent one).
    """
    values: dict[Node, np.ndarray] = {}
    evaluate_graph(graph, inputs, observe=lambda n, v: values.__setitem__(n, v))
    candidates = [n for n in graph.nodes if n.op not in ("input", "const") and n.type.size]

    def diverges(node: Node) -> bool:
        (got,) = run_prefix(prefix(graph, [node]))(inputs)
        return difference(np.asarray(got), values[node]) > tolerance

    low, high = 0, len(candidates)
    outputs = [o for o in graph.outputs if o in values]
    bad = [o for o in outputs if o.op not in ("input", "const") and diverges(o)]
    if not bad:
        return None
    # Only what the first bad output depends on can be at fault.
    cone = set(prefix(graph, [bad[0]]).nodes)
    candidates = [n for n in candidates if n in cone]
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if diverges(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return candidates[high]


def branch_inputs(graph: Graph, first: Sequence[np.ndarray]) -> tuple[list[list[np.ndarray]], list[str]]:
    """(inputs beside `first` on which choices of `graph` go another way, where none was found that goes both ways).

    Tried are random inputs of several scales, until every choice was seen both ways or BRANCH_TRIES are over.
    """
    choices = [n for n in graph.nodes if n.op == "choose"]
    if not choices:
        return [], []
    seen: set[tuple[Node, bool]] = set()
    found: list[list[np.ndarray]] = []
    conditions = {n.inputs[0] for n in choices}
    for attempt in range(BRANCH_TRIES):
        scale = (1.0, 0.1, 10.0, 0.0)[attempt % 4]
        inputs = sample_inputs(graph, attempt, scale) if attempt else list(first)
        met: set[tuple[Node, bool]] = set()

        def observe(node: Node, value: np.ndarray, met: set[tuple[Node, bool]] = met) -> None:
            if node in conditions:
                met.add((node, bool(value.reshape(-1)[0])))

        evaluate_graph(graph, inputs, observe=observe)
        if met - seen and attempt:
            found.append(inputs)
        seen |= met
        if len(seen) == 2 * len(conditions):
            break
    one_way = [n.label() for n in choices if sum((n.inputs[0], way) in seen for way in (False, True)) < 2]
    return found, list(dict.fromkeys(one_way))


def sample_inputs(graph: Graph, seed: int = 0, scale: float = 1.0) -> list[np.ndarray]:
    """Random inputs that exercise a graph: normal floats times `scale`, bools, and integers that are valid indices
    where an input is used as one."""
    rng = np.random.default_rng(seed)
    arrays = []
    for node in graph.inputs:
        if node.dtype.is_float:
            a: np.ndarray = scale * rng.standard_normal(node.shape)
        elif node.dtype is DType.bool:
            a = rng.integers(0, 2, node.shape)
        else:
            a = rng.integers(
                0,
                max(2, min(_index_limit(graph, node), 100 if node.dtype.bytes == 1 else 1 << 15)),
                node.shape,
            )
        arrays.append(np.asarray(a, node.dtype.numpy))
    return arrays


def _index_limit(graph: Graph, node: Node) -> int:
    """The size of the smallest axis that `node` indexes, through shape-only operations; 128 if none."""
    limit, todo, seen = 128, [node], set()
    found = []
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        for u in graph.users[n]:
            if u.op in ("gather", "gather_elements") and u.inputs[1] is n:
                found.append(u.inputs[0].shape[u.attrs["axis"]])
            elif u.op in ("gather_nd", "scatter_nd", "scatter_elements") and u.inputs[1] is n:
                found.append(min(u.inputs[0].shape, default=1))
            elif ops.op_of(u.op).kind == "movement" or u.op == "cast":
                todo.append(u)
    return min(found, default=limit)
