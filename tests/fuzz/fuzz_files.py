"""Mutation fuzzer of model files: each one compiles or is refused with a SkiveError, in time and memory.

    python tests/fuzz/fuzz_files.py --count 5000 --jobs 2

Case n is the same for every run: the seed model, the mutations and their places come from n alone.
A case runs the whole compiler up to the emitted sources in a worker process; every `--command-every`th
one runs the command `skive compile` instead. Four things are defects: an exception that is not a
SkiveError, the death of the worker, no answer in TIME_LIMIT, and more than MEMORY_LIMIT.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

sys.path.insert(0, str(Path(__file__).parent))
from seed_models import EXTERNAL_BYTES, SEEDS  # noqa: E402

TIME_LIMIT = 20.0  # seconds for a case; the seeds take 0.1
COMMAND_LIMIT = 180.0  # seconds for the command, which also runs the C++ compiler
MEMORY_LIMIT = 4 << 30  # bytes of address space of a worker
WEAK = (
    "IndexError",
    "KeyError",
    "TypeError",
    "AttributeError",
    "ValueError",
    "MemoryError",
    "RecursionError",
    "OverflowError",
    "AssertionError",
    "ZeroDivisionError",
    "StopIteration",
    "UnboundLocalError",
)

HOSTILE_INTS = (
    -1,
    0,
    1,
    2,
    3,
    5,
    7,
    127,
    255,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    -(1 << 31),
    (1 << 32) + 1,
    1 << 40,
    (1 << 62),
    (1 << 63) - 1,
    -(1 << 63),
    -7,
    65536,
    1000003,
)
HOSTILE_FLOATS = (0.0, -0.0, 1e-45, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"), 0.5, 1e10)
HOSTILE_NAMES = (
    '"; } int main() { //',
    "*/ #include <evil> /*",
    "a\nb",
    "a\r\nb",
    "\x00",
    "",
    " ",
    "int",
    "class",
    "__init__",
    "\u202eevil\u2066",
    "??/",
    "??)",
    "x" * 70000,
    "../../etc/passwd",
    "/dev/zero",
    "%s%n",
    "${HOME}",
    "`id`",
    "\\",
    "\\\n",
    "名前",
    "a" * 255,
    "..",
    ".",
    'R"(',
    "//",
    "'",
    "\ufeff",
    "#define x",
    "y",
    "x",
    "w0",
)
PATHS = (
    "../weights.bin",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "weights.bin/..",
    "./weights.bin",
    "link.bin",
    "",
    ".",
    "sub/../../weights.bin",
    "weights.bin\x00.onnx",
    "C:\\weights.bin",
    "..\\weights.bin",
    "~/.bashrc",
    "fifo",
    "missing.bin",
)
OPERATORS = (
    "Conv",
    "Add",
    "MatMul",
    "Reshape",
    "Concat",
    "Softmax",
    "LSTM",
    "Resize",
    "Loop",
    "If",
    "Scan",
    "Gather",
    "Split",
    "TopK",
    "Einsum",
    "Pad",
    "Expand",
    "Tile",
    "Range",
    "ConstantOfShape",
    "OneHot",
    "NonZero",
    "Cast",
    "Slice",
    "DepthToSpace",
    "ConvTranspose",
    "AveragePool",
    "LayerNormalization",
    "BatchNormalization",
    "ReduceMax",
    "ArgMax",
    "CumSum",
    "ScatterND",
    "GatherND",
    "Identity",
    "Constant",
    "SequenceAt",
    "Optional",
    "StringNormalizer",
    "NotAnOp",
)


# ---------------------------------------------------------------------------------------- mutations


def messages(root: Message) -> Iterator[Message]:
    """`root` and every message inside it."""
    stack = [root]
    while stack:
        m = stack.pop()
        yield m
        for descriptor, v in m.ListFields():
            if descriptor.message_type is not None:
                stack.extend(v if descriptor.is_repeated else [v])


def pick(rng: random.Random, root: ModelProto, kind: type) -> Any:
    """A random message of a kind inside `root`; None if there is none."""
    found = [m for m in messages(root) if isinstance(m, kind)]
    return rng.choice(found) if found else None


def change_field(rng: random.Random, model: ModelProto) -> None:
    """Any scalar field of any message takes a hostile value."""
    message = rng.choice(list(messages(model)))
    fields = [d for d in message.DESCRIPTOR.fields if d.message_type is None]
    if not fields:
        return
    d = rng.choice(fields)
    kind = d.cpp_type
    choices: tuple[Any, ...]
    if kind in (d.CPPTYPE_INT32, d.CPPTYPE_UINT32):
        choices = tuple(v for v in HOSTILE_INTS if 0 <= v < 1 << 31)
    elif kind == d.CPPTYPE_INT64:
        choices = HOSTILE_INTS
    elif kind == d.CPPTYPE_UINT64:
        choices = tuple(v for v in HOSTILE_INTS if v >= 0)
    elif kind in (d.CPPTYPE_FLOAT, d.CPPTYPE_DOUBLE):
        choices = HOSTILE_FLOATS
    elif kind == d.CPPTYPE_ENUM:
        choices = tuple(range(0, 24))
    elif kind == d.CPPTYPE_STRING:
        choices = HOSTILE_NAMES if d.type == d.TYPE_STRING else tuple(n.encode() for n in HOSTILE_NAMES)
    else:
        choices = (True, False)
    value = rng.choice(choices)
    if not d.is_repeated:
        setattr(message, d.name, value)
        return
    values = getattr(message, d.name)
    action = rng.random()
    if values and action < 0.6:
        values[rng.randrange(len(values))] = value
    elif values and action < 0.8:
        del values[rng.randrange(len(values))]
    else:
        values.append(value)


def drop_message(rng: random.Random, model: ModelProto) -> None:
    parent = rng.choice(list(messages(model)))
    fields = [(d, v) for d, v in parent.ListFields() if d.message_type is not None]
    if fields:
        d, v = rng.choice(fields)
        if d.is_repeated:
            del v[rng.randrange(len(v))]
        else:
            parent.ClearField(d.name)


def repeat_message(rng: random.Random, model: ModelProto) -> None:
    parent = rng.choice(list(messages(model)))
    lists = [v for d, v in parent.ListFields() if d.message_type is not None and d.is_repeated]
    if lists:
        chosen = rng.choice(lists)
        chosen.add().CopyFrom(chosen[rng.randrange(len(chosen))])


def shuffle_nodes(rng: random.Random, model: ModelProto) -> None:
    graph = pick(rng, model, GraphProto)
    if graph is not None and len(graph.node) > 1:
        nodes = [NodeProto.FromString(n.SerializeToString()) for n in graph.node]
        rng.shuffle(nodes)
        del graph.node[:]
        graph.node.extend(nodes)


def make_cycle(rng: random.Random, model: ModelProto) -> None:
    node = pick(rng, model, NodeProto)
    if node is not None and node.input and node.output:
        other = rng.choice(list(model.graph.node) or [node])
        node.input[rng.randrange(len(node.input))] = rng.choice(list(other.output) or ["x"])


def rename(rng: random.Random, model: ModelProto) -> None:
    """One tensor takes a hostile name everywhere, so that the model stays whole."""
    graph = model.graph
    names = (
        [i.name for i in graph.input] + [o for n in graph.node for o in n.output] + [t.name for t in graph.initializer]
    )
    if not names:
        return
    old, new = rng.choice(names), rng.choice(HOSTILE_NAMES)
    for m in (*graph.input, *graph.output, *graph.initializer):
        if m.name == old:
            m.name = new
    for n in graph.node:
        n.input[:] = [new if i == old else i for i in n.input]
        n.output[:] = [new if o == old else o for o in n.output]
    if rng.random() < 0.5:
        graph.name = rng.choice(HOSTILE_NAMES)
        for n in graph.node:
            n.name = rng.choice(HOSTILE_NAMES)


def change_operator(rng: random.Random, model: ModelProto) -> None:
    node = pick(rng, model, NodeProto)
    if node is not None:
        node.op_type = rng.choice(OPERATORS)


def swap_attributes(rng: random.Random, model: ModelProto) -> None:
    nodes = [m for m in messages(model) if isinstance(m, NodeProto) and m.attribute]
    if len(nodes) > 1:
        a, b = rng.sample(nodes, 2)
        x, y = rng.choice(list(a.attribute)), rng.choice(list(b.attribute))
        name, copy = x.name, AttributeProto.FromString(y.SerializeToString())
        x.CopyFrom(copy)
        if rng.random() < 0.7:
            x.name = name


def huge_dims(rng: random.Random, model: ModelProto) -> None:
    tensor = pick(rng, model, TensorProto)
    inputs = list(model.graph.input)
    if tensor is not None and rng.random() < 0.5:
        tensor.dims[:] = [rng.choice(HOSTILE_INTS) for _ in range(rng.choice((1, 2, 4, 9, 70)))]
    elif inputs:
        shape = rng.choice(inputs).type.tensor_type.shape
        for d in shape.dim:
            if rng.random() < 0.6:
                d.dim_value = rng.choice(HOSTILE_INTS)
        if rng.random() < 0.2:
            for _ in range(rng.choice((1, 60, 300))):
                shape.dim.add().dim_value = rng.choice((1, 2, 1 << 20))


def external_data(rng: random.Random, model: ModelProto) -> None:
    tensor = pick(rng, model, TensorProto)
    if tensor is None:
        return
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=rng.choice((*PATHS, "weights.bin")))
    for key in ("offset", "length", "checksum"):
        if rng.random() < 0.5:
            tensor.external_data.add(
                key=key, value=rng.choice(("0", "64", "-1", "99999999999999999999", "1e3", "", "0x10", "abc"))
            )


def nest(rng: random.Random, model: ModelProto) -> None:
    """The graph inside itself, as a branch of an If, many times over."""
    depth = rng.choice((2, 30, 40, 70))
    inner = GraphProto.FromString(model.graph.SerializeToString())
    del inner.input[:]
    for _ in range(depth):
        if inner.ByteSize() > 1 << 20:
            break
        outer = GraphProto(name="nest")
        node = outer.node.add(op_type="If", input=["yes"], output=[o.name for o in inner.output] or ["y"])
        for branch in ("then_branch", "else_branch"):
            node.attribute.add(name=branch, type=AttributeProto.GRAPH).g.CopyFrom(
                inner if branch == "then_branch" else GraphProto()
            )
        outer.output.extend(inner.output)
        inner = outer
    condition = TensorProto(name="yes", data_type=TensorProto.BOOL, raw_data=b"\x01")
    inner.initializer.append(condition)
    inner.input.extend(model.graph.input)
    model.graph.CopyFrom(inner)


def self_call(rng: random.Random, model: ModelProto) -> None:
    """A model-local function that calls itself."""
    for function in model.functions:
        for node in function.node:
            node.op_type, node.domain = function.name, function.domain


MUTATIONS: tuple[Callable[[random.Random, ModelProto], None], ...] = (
    change_field,
    change_field,
    change_field,
    change_field,
    drop_message,
    repeat_message,
    shuffle_nodes,
    make_cycle,
    rename,
    change_operator,
    swap_attributes,
    huge_dims,
    external_data,
    nest,
    self_call,
)


def damage_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bit flips, cuts, insertions, copies, splices, and edits of lengths and varints."""
    b = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        kind, at = rng.randrange(8), rng.randrange(len(b)) if b else 0
        if not b:
            break
        if kind == 0:
            b[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del b[at:]
        elif kind == 2:
            del b[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            b[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            b[at:at] = b[at : at + rng.choice((4, 16, 200))]
        elif kind == 5:
            b[at:] = other[rng.randrange(len(other)) :]
        elif kind == 6:  # a length or number: all bits set, or ten bytes of varint
            b[at : at + 1] = rng.choice(
                (b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff" * 12, b"\x80\x00", b"\x7f")
            )
        else:
            b[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x12))
    return bytes(b)


def mutated(case: int) -> tuple[bytes, str]:
    """The file of a case, and in words what was done to which seed."""
    rng = random.Random(case)
    seed = rng.choice(SEEDS)
    model, done = seed(), [seed.__name__]
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            mutation = rng.choice(MUTATIONS)
            done.append(mutation.__name__)
            try:
                mutation(rng, model)
            except (ValueError, TypeError, OverflowError, DecodeError):  # protobuf itself refuses the value
                done[-1] += " (refused)"
    data = model.SerializeToString()
    if len(done) == 1 or rng.random() < 0.1:
        data = damage_bytes(rng, data, rng.choice(SEEDS)().SerializeToString())
        done.append("damage_bytes")
    return data, ", ".join(done)


# ------------------------------------------------------------------------------------------ a worker


def surroundings(folder: Path) -> None:
    """The files beside the model: honest weights, a link out of the folder, a pipe that nobody feeds."""
    (folder / "weights.bin").write_bytes(EXTERNAL_BYTES)
    (folder.parent / "weights.bin").write_bytes(EXTERNAL_BYTES)
    if not (folder / "link.bin").is_symlink():
        (folder / "link.bin").symlink_to("/etc/passwd")
        os.mkfifo(folder / "fifo")


def sources_of(path: Path) -> None:
    """Everything that compiling does, except the C++ compiler's part."""
    import dataclasses

    from skive import passes
    from skive.emit import cxx
    from skive.emit.names import identifier
    from skive.frontend import open_model
    from skive.lower import lower
    from skive.pipeline import PassManager
    from skive.targets.base import resolve

    source = open_model(path, batch_max=None)
    graph = dataclasses.replace(source.graph(), name=identifier(source.name))
    optimised, _ = PassManager().run(graph, passes.EXACT, check="never")
    target = resolve("generic", [])
    cxx.emit(lower(optimised, target, 1), target)


def worker() -> None:
    """Answers each case number on standard input with a line of JSON on standard output."""
    from skive.errors import SkiveError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler itself prints must not mix with the replies
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "model"
        folder.mkdir()
        surroundings(folder)
        for line in sys.stdin:
            path = folder / "model.onnx"
            path.write_bytes(mutated(int(line))[0])
            outcome, text = "compiled", ""
            try:
                sources_of(path)
            except SkiveError as e:
                outcome, text = "refused", f"{type(e).__name__}: {e}"
            except BaseException as e:  # noqa: BLE001 - that is what is looked for
                outcome = "defect"
                text = "".join(traceback.format_exception(e)[-6:])
            replies.write(json.dumps([int(line), outcome, text[:4000]]) + "\n")
            replies.flush()


# ------------------------------------------------------------------------------------------ the run


@dataclass
class Result:
    """What a run of the fuzzer found. `defects` are (case, what happened)."""

    cases: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    defects: list[tuple[int, str]] = field(default_factory=list)
    weak: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, case: int, outcome: str, text: str) -> None:
        self.cases += 1
        self.outcomes[outcome] += 1
        if outcome == "defect":
            self.defects.append((case, text))
        elif outcome == "refused" and any(f"{w}:" in text for w in WEAK):
            self.weak.append((case, text))


class Worker:
    def __init__(self) -> None:
        self.case: int | None = None
        self.since = 0.0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def give(self, case: int) -> None:
        assert self.process.stdin is not None
        self.case, self.since = case, time.monotonic()
        try:
            self.process.stdin.write(f"{case}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its death is noticed when it does not answer

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()


def run_command(case: int) -> tuple[str, str]:
    """(outcome, text) of the command `skive compile` on a case."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "model"
        folder.mkdir()
        surroundings(folder)
        (folder / "model.onnx").write_bytes(mutated(case)[0])
        before = {p.name for p in folder.iterdir()}
        environment = {**os.environ, "SKIVE_CACHE": str(Path(outer) / "cache"), "SKIVE_CXXFLAGS": "-O0"}
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({2 * MEMORY_LIMIT}, {2 * MEMORY_LIMIT})); "
        command = [sys.executable, "-c", limit + "from skive.cli import main; main()", "compile"]
        command += [str(folder / "model.onnx"), "-o", str(folder / "out")]
        try:
            r = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMMAND_LIMIT, env=environment
            )
        except subprocess.TimeoutExpired:
            return "defect", f"skive compile: no answer in {COMMAND_LIMIT:.0f} s"
        left = {p.name for p in folder.iterdir()} - before
        if r.returncode == 0:
            whole = (folder / "out" / "manifest.json").exists() and left == {"out"}
            return ("compiled", "") if whole else ("defect", f"skive compile: exit 0, and wrote {sorted(left)}")
        lines = [line for line in r.stderr.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ")]
        if r.returncode != 1 or "Traceback" in r.stderr or len(told) != 1 or "internal: " in told[0]:
            return "defect", f"skive compile: exit {r.returncode}: {r.stderr[-2000:]}"
        if left:
            return "defect", f"skive compile: refused, and left {sorted(left)}"
        return "refused", told[0]


def fuzz(
    *,
    first: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    command_every: int = 0,
    report: Callable[[Result], None] = lambda r: None,
) -> Result:
    """Runs the cases from `first` until `count` cases or `seconds` are spent."""
    result, started = Result(), time.monotonic()
    cases = iter(range(first, first + count) if count is not None else range(first, 1 << 60))
    workers = [Worker() for _ in range(jobs)]

    def next_case() -> int | None:
        if seconds is not None and time.monotonic() - started > seconds:
            return None
        for case in cases:
            if command_every and case % command_every == command_every - 1:
                result.add(case, *run_command(case))
                for w in workers:  # they waited for us, not we for them
                    w.since = time.monotonic()
                continue
            return case
        return None

    try:
        for w in workers:
            case = next_case()
            if case is not None:
                w.give(case)
        while any(w.case is not None for w in workers):
            busy = {w.process.stdout: w for w in workers if w.case is not None}
            ready, _, _ = select.select(list(busy), [], [], 1.0)
            for stream in ready:
                w = busy[stream]
                line = stream.readline()
                assert w.case is not None
                if line:
                    _, outcome, text = json.loads(line)
                    result.add(w.case, outcome, text)
                else:
                    result.add(w.case, "defect", f"the process died with status {w.process.wait()}")
                    w.restart()
                w.case = None
            for w in busy.values():
                if w.case is not None and time.monotonic() - w.since > TIME_LIMIT:
                    result.add(w.case, "defect", f"no answer in {TIME_LIMIT:.0f} s")
                    w.restart()
                    w.case = None
                if w.case is None:
                    case = next_case()
                    if case is not None:
                        w.give(case)
            result.seconds = time.monotonic() - started
            report(result)
    finally:
        for w in workers:
            w.process.kill()
            w.process.wait()
    return result


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--first", type=int, default=0, help="number of the first case")
    p.add_argument("--count", type=int, help="cases to run (5000 unless --seconds is given)")
    p.add_argument("--seconds", type=float, help="stop after this time")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument(
        "--command-every", type=int, default=0, metavar="N", help="every Nth case through the command `skive compile`"
    )
    p.add_argument("--show", type=int, metavar="CASE", help="write the file of a case to standard output and stop")
    p.add_argument("--keep", type=Path, help="folder for the files of defects")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        worker()
        return 0
    if a.show is not None:
        data, done = mutated(a.show)
        print(done, file=sys.stderr)
        sys.stdout.buffer.write(data)
        return 0
    count = a.count if a.count is not None or a.seconds is not None else 5000
    result = fuzz(first=a.first, count=count, seconds=a.seconds, jobs=a.jobs, command_every=a.command_every)
    for case, text in result.defects:
        print(f"case {case} ({mutated(case)[1]}):\n{text}")
        if a.keep:
            a.keep.mkdir(parents=True, exist_ok=True)
            (a.keep / f"case{case}.onnx").write_bytes(mutated(case)[0])
    weak = collections.Counter(t.rpartition("): ")[2].split(":")[0] for _, t in result.weak)
    print(
        f"{result.cases} files in {result.seconds:.0f} s: {dict(result.outcomes)}; {len(result.defects)} defects; "
        f"refused by the importer's last net: {len(result.weak)} {dict(weak.most_common(4))}"
    )
    return 1 if result.defects else 0


if __name__ == "__main__":
    sys.exit(main())
