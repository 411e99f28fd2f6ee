"""Apache TVM as another back end: every stage of a float32 network as Relax modules that TVM compiles.

The same graph, passes and criteria, another compiler below: a cross-check, and a way to reach what TVM reaches. Where
a stage has branches it is cut at them (Chen et al., DyCL, 2023), and only the side that is taken runs. The host
program runs in Python (`tvm_calls.py`); the artefact needs TVM where it runs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import skive
from skive import check
from skive import exits as early
from skive.artifact import write_folder
from skive.errors import TargetError, UnsupportedOpError, VerificationError
from skive.ir import Graph, Node
from skive.lower.branches import guards_of
from skive.lower.storage import Guards
from skive.pipeline import operations, random_inputs, total_macs, weight_bytes
from skive.program import ExitTest, Program
from skive.runtime import MANIFEST, Module
from skive.targets.base import Target
from skive.tvm_calls import CONSTANTS, tvm
from skive.types import DType

if TYPE_CHECKING:
    from skive.frontend import Source

CPUS = {"generic": "x86-64", "avx2": "haswell", "avx512": "skylake-avx512", "avx512vnni": "cascadelake"}
CHOICE = "choose"

# ---------------------------------------------------------------------------- operations as Relax

Emit = Callable[[Any, Sequence[Any], Node], Any]  # (relax.op, operands, node) -> expression
EMIT: dict[str, Emit] = {}


def _emits(*names: str) -> Callable[[Emit], Emit]:
    def register(fn: Emit) -> Emit:
        EMIT.update(dict.fromkeys(names, fn))
        return fn

    return register


_SAME = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "min": "minimum", "max": "maximum",
         "pow": "power", "less": "less", "less_equal": "less_equal", "greater": "greater",
         "greater_equal": "greater_equal", "equal": "equal", "not_equal": "not_equal", "and": "logical_and",
         "or": "logical_or", "xor": "logical_xor", "not": "logical_not", "exp": "exp", "log": "log", "sqrt": "sqrt",
         "rsqrt": "rsqrt", "tanh": "tanh", "sigmoid": "sigmoid", "erf": "erf", "neg": "negative", "abs": "abs",
         "floor": "floor", "ceil": "ceil", "sin": "sin", "cos": "cos", "where": "where", "relu": "nn.relu",
         "silu": "nn.silu", "gelu": "nn.gelu", "gelu_tanh": "nn.gelu_tanh", "softplus": "nn.softplus"}


def _named(path: str) -> Emit:
    def emit(op: Any, x: Sequence[Any], node: Node) -> Any:
        for part in path.split("."):
            op = getattr(op, part)
        return op(*x)

    return emit


EMIT.update({ours: _named(theirs) for ours, theirs in _SAME.items()})


def _number(value: float) -> Any:
    from tvm import relax

    return relax.const(np.float32(value))


@_emits("clip")
def _clip(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.minimum(op.maximum(x[0], _number(node.attrs["lo"])), _number(node.attrs["hi"]))


@_emits("hard_sigmoid", "hard_swish")
def _hard(op: Any, x: Sequence[Any], node: Node) -> Any:
    a, b = (node.attrs["alpha"], node.attrs["beta"]) if node.op == "hard_sigmoid" else (1 / 6, 0.5)
    gate = op.add(op.multiply(x[0], _number(a)), _number(b))
    gate = op.minimum(op.maximum(gate, _number(0)), _number(1))
    return gate if node.op == "hard_sigmoid" else op.multiply(x[0], gate)


@_emits("reciprocal")
def _reciprocal(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.divide(_number(1), x[0])


@_emits("leaky_relu")
def _leaky(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.nn.leakyrelu(x[0], alpha=node.attrs["alpha"])


@_emits("cast")
def _cast(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.astype(x[0], _dtype(node.attrs["to"]))


@_emits("reshape")
def _reshape(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.reshape(x[0], node.shape)


@_emits("expand")
def _expand(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.broadcast_to(x[0], node.shape)


@_emits("transpose")
def _transpose(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.permute_dims(x[0], list(node.attrs["perm"]))


@_emits("slice")
def _slice(op: Any, x: Sequence[Any], node: Node) -> Any:
    start, size, step = (list(node.attrs[k]) for k in ("start", "size", "step"))
    if min(step, default=1) < 1:
        raise _Refused("a negative step")
    end = [s + (n - 1) * d + 1 for s, n, d in zip(start, size, step, strict=True)]
    return op.strided_slice(x[0], list(range(len(start))), start, end, step)


@_emits("concat")
def _concat(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.concat(list(x), axis=node.attrs["axis"])


@_emits("pad")
def _pad(op: Any, x: Sequence[Any], node: Node) -> Any:
    if node.attrs["mode"] != "constant":
        raise _Refused(f"mode {node.attrs['mode']}")
    widths = [w for pair in zip(node.attrs["before"], node.attrs["after"], strict=True) for w in pair]
    return op.nn.pad(x[0], widths, pad_value=float(node.attrs["value"]))


@_emits("gather")
def _gather(op: Any, x: Sequence[Any], node: Node) -> Any:
    axis = node.attrs["axis"] % node.inputs[0].type.rank
    size = node.inputs[0].shape[axis]
    from tvm import relax

    kind = _dtype(node.inputs[1].dtype)
    wrapped = op.where(op.less(x[1], relax.const(0, kind)), op.add(x[1], relax.const(size, kind)), x[1])
    return op.take(x[0], wrapped, axis=axis, mode="clip")


@_emits("scatter_elements")
def _scatter(op: Any, x: Sequence[Any], node: Node) -> Any:
    kind = node.attrs["reduction"]
    return op.scatter_elements(*x, axis=node.attrs["axis"], reduction="update" if kind == "none" else kind)


@_emits("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(op: Any, x: Sequence[Any], node: Node) -> Any:
    axes = list(node.attrs["axes"])
    if not axes:
        return x[0]
    return getattr(op, node.op.removeprefix("reduce_"))(x[0], axis=axes, keepdims=node.attrs["keep"])


@_emits("argmax", "argmin")
def _arg(op: Any, x: Sequence[Any], node: Node) -> Any:
    if node.attrs["last"]:
        raise _Refused("the last of equals")
    return getattr(op, node.op)(x[0], axis=node.attrs["axis"], keepdims=node.attrs["keep"])


@_emits("topk_values", "topk_indices")
def _topk(op: Any, x: Sequence[Any], node: Node) -> Any:
    kind = "values" if node.op == "topk_values" else "indices"
    return op.topk(x[0], k=node.attrs["k"], axis=-1, ret_type=kind, largest=node.attrs["largest"], dtype="int64")


@_emits("softmax", "log_softmax")
def _softmax(op: Any, x: Sequence[Any], node: Node) -> Any:
    return getattr(op.nn, node.op)(x[0], axis=node.attrs["axis"])


@_emits("layer_norm")
def _layer_norm(op: Any, x: Sequence[Any], node: Node) -> Any:
    rank = node.type.rank
    axes = list(range(node.attrs["axis"] % rank, rank))
    from tvm import relax

    bias = x[2] if len(x) > 2 else relax.const(np.zeros(node.inputs[1].shape, np.float32))
    return op.nn.layer_norm(x[0], x[1], bias, axes=axes, epsilon=node.attrs["eps"])


@_emits("l2_norm")
def _l2_norm(op: Any, x: Sequence[Any], node: Node) -> Any:
    from tvm import relax

    axes = list(range(node.attrs["axis"] % node.type.rank, node.type.rank))
    length = op.sqrt(op.sum(op.multiply(x[0], x[0]), axis=axes, keepdims=True))
    return op.divide(x[0], op.maximum(length, relax.const(node.attrs["least"], "float32")))


@_emits("group_norm")
def _group_norm(op: Any, x: Sequence[Any], node: Node) -> Any:
    rank = node.type.rank
    from tvm import relax

    bias = x[2] if len(x) > 2 else relax.const(np.zeros(node.inputs[1].shape, np.float32))
    return op.nn.group_norm(x[0], x[1], bias, num_groups=node.attrs["groups"], channel_axis=rank - 1,
                            axes=list(range(1, rank - 1)), epsilon=node.attrs["eps"])


@_emits("matmul")
def _matmul(op: Any, x: Sequence[Any], node: Node) -> Any:
    def turned(v: Any, operand: Node, turn: bool) -> Any:
        order = list(range(operand.type.rank))
        return op.permute_dims(v, [*order[:-2], order[-1], order[-2]]) if turn else v

    return op.matmul(turned(x[0], node.inputs[0], node.attrs["trans_a"]),
                     turned(x[1], node.inputs[1], node.attrs["trans_b"]))


@_emits("linear")
def _linear(op: Any, x: Sequence[Any], node: Node) -> Any:
    y = op.matmul(x[0], op.permute_dims(x[1]))
    return op.add(y, x[2]) if len(x) > 2 else y


@_emits("attention")
def _attention(op: Any, x: Sequence[Any], node: Node) -> Any:
    if node.attrs["causal"] or node.attrs["levels"]:
        raise _Refused("causal or rounded attention")
    q, k, v = (op.permute_dims(t, [0, 2, 1, 3]) if node.attrs["token_major"] else t for t in x[:3])
    scores = op.multiply(op.matmul(q, op.permute_dims(k, [0, 1, 3, 2])), _number(node.attrs["scale"]))
    if len(x) > 3:
        scores = op.add(scores, x[3])
    y = op.matmul(op.nn.softmax(scores, axis=-1), v)
    return op.permute_dims(y, [0, 2, 1, 3]) if node.attrs["token_major"] else y


def _window(node: Node) -> dict[str, Any]:
    top, left, bottom, right = node.attrs["pad"]
    return {"strides": list(node.attrs["stride"]), "padding": [top, left, bottom, right],
            "dilation": list(node.attrs["dilation"])}


@_emits("conv2d")
def _conv2d(op: Any, x: Sequence[Any], node: Node) -> Any:
    y = op.nn.conv2d(x[0], x[1], **_window(node), groups=node.attrs["groups"], data_layout="NHWC", kernel_layout="OHWI")
    return op.add(y, x[2]) if len(x) > 2 else y


@_emits("max_pool2d")
def _max_pool(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.nn.max_pool2d(x[0], pool_size=list(node.attrs["kernel"]), **_window(node), layout="NHWC")


@_emits("avg_pool2d")
def _avg_pool(op: Any, x: Sequence[Any], node: Node) -> Any:
    return op.nn.avg_pool2d(x[0], pool_size=list(node.attrs["kernel"]), **_window(node), layout="NHWC",
                            count_include_pad=node.attrs["count_pad"])


@_emits("resize2d")
def _resize(op: Any, x: Sequence[Any], node: Node) -> Any:
    from tvm import relax

    if not all(i.is_const for i in node.inputs[1:]):
        raise _Refused("tables that are computed")
    rows, row_weights, columns, column_weights = (np.array(i.value) for i in node.inputs[1:])
    image = x[0]
    for axis, sources, weights in ((1, rows, row_weights), (2, columns, column_weights)):
        places = np.clip(sources, 0, node.inputs[0].shape[axis] - 1)
        spread = [-1 if a == axis else 1 for a in range(4)]
        taps = [op.multiply(op.take(image, relax.const(np.ascontiguousarray(places[:, t])), axis=axis, mode="clip"),
                            relax.const(weights[:, t].reshape(spread))) for t in range(places.shape[1])]
        image = taps[0]
        for tap in taps[1:]:
            image = op.add(image, tap)
    return image


class _Refused(Exception):
    """What of a node is not emitted."""


def _dtype(dtype: DType) -> str:
    return str(dtype.numpy.name)


def _problems(graph: Graph) -> list[tuple[str, str, str]]:
    """Every node that has no form in Relax here."""
    found = []
    for node in graph.nodes:
        types = {node.dtype, *(i.dtype for i in node.inputs)}
        if node.op not in ("input", "const", CHOICE) and (node.op not in EMIT or node.attrs.get("epilogue")):
            found.append((node.label(), f"{node.op} is not passed on to TVM", "leave --backend tvm out"))
        elif any(t not in (DType.f32, DType.i64, DType.i32, DType.bool) for t in types):
            kinds = ", ".join(sorted(t.value for t in types))
            found.append((node.label(), f"{node.op} on {kinds}: what is passed on to TVM is float32", ""))
    return found


# ------------------------------------------------------------------------------- stages to modules


@dataclasses.dataclass(frozen=True)
class Segment:
    """Nodes of one stage that run together, if all `guards` hold: straight-line work, or one choice, which the host
    makes. `reads`: values from before; `writes`: what others need of it."""

    nodes: tuple[Node, ...]
    guards: Guards
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]

    @property
    def chooses(self) -> bool:
        return self.nodes[0].op == CHOICE


def segments(graph: Graph, stages: Sequence[Sequence[Node]]) -> list[list[Segment]]:
    """The segments of every stage, in the order in which they run."""
    guards = guards_of(graph)
    parts: list[list[list[Node]]] = []
    for nodes in stages:
        parts.append([])
        for n in nodes:
            if n.op in ("input", "const"):
                continue
            last = parts[-1][-1] if parts[-1] else None
            if last and CHOICE not in (n.op, last[0].op) and guards[n] == guards[last[0]]:
                last.append(n)
            else:
                parts[-1].append([n])
    where = {n: id(part) for stage in parts for part in stage for n in part}
    asked = {condition for around in guards.values() for condition, _ in around}

    def segment(part: list[Node]) -> Segment:
        used = dict.fromkeys(i for n in part for i in n.inputs if not i.is_const or n.op == CHOICE)
        reads = tuple(i for i in used if where.get(i) != id(part))
        writes = tuple(n for n in part if graph.is_output(n) or n in asked
                       or any(where[u] != id(part) for u in graph.users[n]))
        return Segment(tuple(part), guards[part[0]], reads, writes)

    return [[segment(part) for part in stage] for stage in parts]


def relax_module(segment: Segment) -> Any:
    """The Relax module of a segment; UnsupportedOpError where a node has no form."""
    from tvm import relax

    builder = relax.BlockBuilder()
    values: dict[Node, Any] = {n: relax.Var(f"v{i}", relax.TensorType(n.shape, _dtype(n.dtype)))
                               for i, n in enumerate(segment.reads)}
    with builder.function("main", list(values.values())):
        with builder.dataflow():
            for node in segment.nodes:
                for i in node.inputs:
                    if i.is_const and i not in values:
                        values[i] = relax.const(np.array(i.value), _dtype(i.dtype))
                try:
                    values[node] = builder.emit(EMIT[node.op](relax.op, [values[i] for i in node.inputs], node))
                except _Refused as e:
                    raise UnsupportedOpError([(node.label(), f"{node.op} with {e} is not passed on to TVM",
                                               "leave --backend tvm out")]) from None
            result = builder.emit_output(relax.Tuple([values[n] for n in segment.writes]))
        builder.emit_func_output(result)
    return builder.get()


def _build(segment: Segment, library: Path, target: Target) -> None:
    """Compiles a segment into `library`."""
    found = tvm()
    if target.name not in CPUS:
        raise TargetError(f"--backend tvm compiles for {', '.join(CPUS)}, not for {target.name}")
    cpu = found.target.Target({"kind": "llvm", "mcpu": CPUS[target.name]})
    found.compile(relax_module(segment), target=cpu).export_library(str(library))


def write(folder: Path, graph: Graph, program: Program, target: Target, options: dict[str, Any]) -> dict[str, Any]:
    """Builds `program` into `folder` and returns its manifest."""
    problems = _problems(graph)
    if problems:
        raise UnsupportedOpError(problems)
    if direct := [n for o, n in zip(graph.outputs, graph.output_names, strict=True) if o.is_const]:
        raise UnsupportedOpError([(direct[0], "a constant as output is not passed on to TVM", "")])
    number = {n: i for i, n in enumerate(graph.nodes)}
    stages: list[list[dict[str, Any]]] = []
    constants: dict[str, Any] = {}  # sides of choices
    for k, stage in enumerate(segments(graph, program.stages())):
        stages.append([])
        for segment in filter(lambda s: s.writes, stage):
            row: dict[str, Any] = {"reads": [number[n] for n in segment.reads],
                                   "writes": [number[n] for n in segment.writes],
                                   "guards": [[number[c], holds] for c, holds in segment.guards]}
            if segment.chooses:
                row["reads"] = [number[n] for n in segment.nodes[0].inputs]
                constants |= {str(number[n]): np.array(n.value) for n in segment.reads if n.is_const}
            else:
                row["library"] = f"stage{k}_{len(stages[-1])}.so"
                _build(segment, folder / row["library"], target)
            stages[-1].append(row)
    if constants:
        np.savez(folder / CONSTANTS, **constants)

    def ports(nodes: Sequence[Node], names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"name": name, "shape": [-1, *n.shape[1:]] if graph.batch_max else list(n.shape),
                 "dtype": _dtype(n.dtype)} for n, name in zip(nodes, names, strict=True)]

    manifest = {
        "skive": skive.__version__, "backend": "tvm", "name": graph.name, "target": target.name,
        "isa": list(target.features), "threads": 1, "batch_max": graph.batch_max, "arena_bytes": 0,
        "inputs": ports(graph.inputs, [n.name for n in graph.inputs]),
        "outputs": ports(graph.outputs, graph.output_names),
        "stages": stages, "input_values": [number[n] for n in graph.inputs],
        "output_values": [number[n] for n in graph.outputs], **options,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def run_graph(graph: Graph, target: Target) -> check.Run:
    """The call of `graph` as one stage."""
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="skive-tvm-")
    whole = Program(graph, (ExitTest("all", graph.output_names),))
    write(Path(folder.name), graph, whole, target, {})
    module = Module(folder.name)

    def run(inputs: Sequence[np.ndarray], keep: Any = folder) -> Sequence[np.ndarray]:
        return module.all_outputs(*inputs)

    return run


def compile_graph(imported: Graph, optimised: Graph, meant: Graph, tests: tuple[ExitTest, ...],
                  exits: Sequence[early.Exit], source: Source, target: Target, folder: Path, verify: bool,
                  data: Sequence[np.ndarray] | None, records: Sequence[Any], started: float,
                  options: dict[str, Any]) -> None:
    """The artefact of `optimised`, whose outputs are `tests`, in `folder`; verified against the numpy reference of
    `meant`, and on every way out. UnsupportedOpError, ToolchainError, VerificationError."""
    tvm()
    program = Program(optimised, tests or (ExitTest(optimised.output_names[-1], optimised.output_names),))
    beside = {e.output: e.of for e in exits}
    rows: list[dict[str, Any]] = [
        {"name": t.name, "criterion": t.criterion or None, "threshold": t.threshold if t.score else None,
         "test": t.test if t.score else None, "of": beside.get(t.name), "score": t.score,
         "outputs": list(t.outputs), "macs": macs}
        for t, macs in zip(tests, program.macs() if tests else (), strict=True)]
    options = options | ({"exits": rows} if rows else {})
    with write_folder(folder) as temporary:
        write(temporary, optimised, program, target, options)
        size = sum(f.stat().st_size for f in temporary.glob("*.so"))
        weights = weight_bytes(optimised)
        report: dict[str, Any] = {
            "skive": skive.__version__,
            "model": {"path": source.path, "sha256": source.sha256, "macs": total_macs(imported),
                      "weight_bytes": weight_bytes(imported), "nodes": operations(imported)},
            "target": {"name": target.name, "isa": list(target.features), "threads": 1},
            "passes": [r.to_json() for r in records],
            "compiled": {"macs": total_macs(optimised), "weight_bytes": weights, "arena_bytes": 0,
                         "code_bytes": max(0, size - weights), "seconds": 0.0},
            "layers": [], "verification": None, **({"exits": [{**r, "arena_bytes": 0} for r in rows]} if rows else {}),
        }
        (temporary / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        if verify:
            verdict = _verified(temporary, meant, optimised, target, data)
            report["verification"] = dataclasses.asdict(verdict)
        report["compiled"]["seconds"] = round(time.perf_counter() - started, 3)
        (temporary / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def _verified(folder: Path, meant: Graph, optimised: Graph, target: Target,
              data: Sequence[np.ndarray] | None) -> check.Verdict:
    from skive.reference import evaluate_graph

    module = Module(folder)
    inputs = list(random_inputs(meant)) if data is None else [np.asarray(d[:1] if meant.batch_max else d) for d in data]
    pairs = list(zip(module.all_outputs(*inputs), evaluate_graph(meant, inputs), strict=True))
    verdict = check.compare(pairs, "numpy", 1)
    if not verdict.passed:
        tolerance = check.allowed_difference(meant, inputs)
        verdict = check.compare(pairs, "numpy", 1, tolerance)
        if not verdict.passed:
            node = check.first_divergence(optimised, inputs, lambda g: run_graph(g, target), tolerance)
            raise VerificationError(f"{meant.name}: what TVM built differs from the reference {verdict.distance}"
                                    + (f", first at {node.label()} ({node.op})" if node else "")
                                    + "; leave --backend tvm out")
    early.check_paths(module, inputs)
    return verdict
