"""Compares every integer kernel with NumPy, bit for bit, on hundreds of random shapes and 10^8 results per target.

    python tests/kernels/exhaustive.py                  # goes on where the last run stopped
    python tests/kernels/exhaustive.py --report         # the table of what has been compared

For each kernel (exhaustive_kernels.py) 500 random instantiations are compiled for each target as an artefact is, with
g++ -O2, and run on the worst operands there are and on random ones; the first 50 of them also with g++ and clang at
-O0, -O1, -O2 and -O3. Results must be equal, what lies between and around them untouched, whatever the number of
workers; with 50 instantiations in one file this is a piece of work. Pieces run in processes of their own: a crash is
a finding, not the end. What was found is kept in exhaustive.json beside this file, by piece, with a hash of the C++
text, the kernel headers (without comments), the flags and the compiler: a changed kernel is measured anew and an
unchanged one is not, on whatever machine.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from batch import CTYPE  # noqa: E402
from exhaustive_kernels import GAP, KERNELS, Array, Sample, Subject  # noqa: E402

from skive import _native  # noqa: E402
from skive.build import header_closure  # noqa: E402
from skive.emit.cxx import FLAGS  # noqa: E402
from skive.kernels import include_dir  # noqa: E402
from skive.targets.base import TARGETS  # noqa: E402

PIECE = 50  # instantiations in one file
SHAPES = 500  # per kernel and target, as shipped
MATRIX_SHAPES = 50  # per kernel and target, with every compiler and level
LEVELS = ("-O0", "-O1", "-O2", "-O3")
SHIPPED = "-O2"
OUTPUTS = 20_000  # results per instantiation and target at least, as shipped: 2 * 10^8 of all kernels
MATRIX_OUTPUTS = 5_000
WORK = 40_000_000  # multiply-adds per instantiation at most
STATE = Path(__file__).resolve().with_suffix(".json")


@dataclass
class Finding:
    """What one piece gave on one target."""

    key: str = ""  # of the C++ text, headers, flags and compiler
    shapes: int = 0
    outputs: int = 0
    differences: int = 0  # results that differ, or calls that crashed or wrote elsewhere
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """`PIECE` instantiations of one kernel, with one compiler at one level, on some targets."""

    kernel: str
    number: int
    compiler: str
    level: str
    targets: tuple[str, ...]

    def name(self, target: str) -> str:
        return f"{self.kernel}/{target}/{self.compiler}/{self.level}/{self.number}"

    @property
    def outputs(self) -> int:
        return OUTPUTS if self.compiler == "g++" and self.level == SHIPPED else MATRIX_OUTPUTS

    def subjects(self) -> list[Subject]:
        """The same ones in every run."""
        seed = int.from_bytes(hashlib.sha256(f"{self.kernel}/{self.number}".encode()).digest()[:6], "big")
        rng = np.random.default_rng(seed)
        return [KERNELS[self.kernel].make(rng) for _ in range(PIECE)]


@lru_cache(maxsize=1)
def compilers() -> dict[str, list[str]]:
    """The compilers that are there. Zig's clang would take this processor's instructions and check for undefined
    behaviour unless told otherwise."""
    found = {}
    if shutil.which("g++"):
        found["g++"] = ["g++"]
    if os.environ.get("SKIVE_CLANG"):
        found["clang"] = shlex.split(os.environ["SKIVE_CLANG"])
    elif shutil.which("clang++"):
        found["clang"] = ["clang++"]
    elif importlib.util.find_spec("ziglang") is not None:
        found["clang"] = [sys.executable, "-m", "ziglang", "c++"]
    if any("zig" in word for word in found.get("clang", ())):
        found["clang"] += ["-march=x86_64", "-fno-sanitize=undefined"]
    return found


@lru_cache(maxsize=8)
def version(compiler: str) -> str:
    done = subprocess.run([*compilers()[compiler], "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def runnable() -> tuple[str, ...]:
    """The targets whose code this processor runs; avx512 last: it has the integer code of the others in part."""
    features = set(_native.cpu_features())
    names = [t.name for t in TARGETS.values() if set(t.features) <= features]
    return tuple(sorted(names, key=lambda n: n == "avx512"))


@lru_cache(maxsize=64)
def header_text(headers: tuple[str, ...], vectors: str) -> str:
    """The kernel headers that `headers` include on a target with these vectors, without comments and blank lines."""
    root = include_dir() / "skive"
    others = {t.vectors for t in TARGETS.values()} - {vectors}
    text = []
    for name in header_closure(headers):
        if not (name.startswith("isa/") and any(re.search(rf"(^|_){o}$", Path(name).stem) for o in others)):
            lines = [re.sub(r"\s*//.*", "", line) for line in (root / name).read_text().splitlines()]
            text += [name, *filter(None, lines)]
    return "\n".join(text)


def short_hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def source(subjects: Sequence[Subject], samples: Sequence[Sample], kernel: str, isa: str) -> str:
    """One C++ function per subject. Sample k tells the element types of subject k."""
    what = KERNELS[kernel]
    lines = [f"#define {TARGETS[isa].define}", *(f'#include "skive/{h}"' for h in what.headers)]
    lines += ["namespace skive {", "inline namespace SKIVE_ISA {", what.prelude]
    for n, (subject, sample) in enumerate(zip(subjects, samples, strict=True)):
        operands = [sample.x, *sample.rest(isa)]
        scratch = f"{subject.scratch(isa)}::scratch_bytes(parts)" if subject.scratch else "parts * 0"
        public = 'extern "C" __attribute__((visibility("default")))'
        lines += [
            f"{public} void case_{n}(void* const* p, [[maybe_unused]] void* scratch, int index, int count) {{",
            "  [[maybe_unused]] const Part part{index, count};",
            *(f"  [[maybe_unused]] auto* x{i} = static_cast<const {CTYPE[a.dtype]}*>(p[{i}]);"
              for i, a in enumerate(operands)),
            f"  auto* y0 = static_cast<{CTYPE[sample.want.dtype]}*>(p[{len(operands)}]);",
            f"  {subject.text(isa)};",
            "}",
            f"{public} size_t scratch_{n}([[maybe_unused]] int parts) {{ return static_cast<size_t>({scratch}); }}",
        ]  # fmt: skip
    return "\n".join([*lines, "}", "}", ""])


class Buffer:
    """Bytes for an array between canaries, at an odd element unless `aligned` to 64 bytes."""

    def __init__(self, like: Array, aligned: bool) -> None:
        self.raw = np.full(like.nbytes + 320, 0xA5, np.uint8)
        begin = -self.raw.ctypes.data % 64 + 64 + (0 if aligned else like.dtype.itemsize)
        self.view = self.raw[begin : begin + like.nbytes].view(like.dtype).reshape(like.shape)
        self.begin, self.end = begin, begin + like.nbytes
        self.address = self.raw.ctypes.data + begin

    def intact(self) -> bool:
        return bool((self.raw[: self.begin] == 0xA5).all() and (self.raw[self.end :] == 0xA5).all())


def compare(
    library: ctypes.CDLL, n: int, subject: Subject, sample: Sample, isa: str, finding: Finding, turn: int
) -> None:
    """Runs every call of `sample` and adds what came of it to `finding`."""
    run, need = getattr(library, f"case_{n}"), getattr(library, f"scratch_{n}")
    need.restype = ctypes.c_size_t
    rest = sample.rest(isa)
    x, y = Buffer(sample.x[0], False), Buffer(sample.want[0], False)
    constants = [Buffer(a, True) for a in rest]
    for buffer, a in zip(constants, rest, strict=True):
        buffer.view[...] = a
    buffers = [x, *constants, y]
    pointers = (ctypes.c_void_p * len(buffers))(*(b.address for b in buffers))
    parts = (1, 3, 2)[turn % 3]
    scratch = Buffer(np.empty(need(parts), np.uint8), True)
    scratch.view[...] = 0xFF
    text = subject.text(isa)
    for operand, want in zip(sample.x, sample.want, strict=True):
        x.view[...] = operand
        y.view[...] = GAP
        for index in reversed(range(parts)):
            run(pointers, ctypes.c_void_p(scratch.address), index, parts)
        finding.outputs += subject.outputs
        same = y.view == want
        if want.dtype.kind == "f":
            same |= np.isnan(y.view) & np.isnan(want)
        if not same.all():
            wrong = np.argwhere(~np.asarray(same))
            finding.differences += len(wrong)
            at = tuple(wrong[0])
            finding.problems.append(f"{text}: {parts} parts, {len(wrong)} of {want.size} differ, first at "
                                    f"{[int(i) for i in at]}: {y.view[at]}, not {want[at]}")  # fmt: skip
    for what, buffer in [("an operand", x), ("the result", y), ("the scratch", scratch),
                         *(("a constant", b) for b in constants)]:  # fmt: skip
        if not buffer.intact():
            finding.differences += 1
            finding.problems.append(f"{text}: {parts} parts, wrote outside {what}")


def samples_of(subject: Subject, rng: np.random.Generator, outputs: int) -> Iterator[Sample]:
    """The worst operands, then at least two sets of random ones, until there are `outputs` results."""
    yield subject.draw(rng, 1, True)
    calls = max(2, min(-(-outputs // subject.outputs), WORK // max(1, subject.work)))
    while calls > 0:
        # A few calls at a time: new weights for each, and memory for the reference.
        some = max(1, min(calls if calls == 1 else -(-calls // 2), 24, 300_000 // subject.outputs))
        yield subject.draw(rng, some, False)
        calls -= some


def _measure(piece: Piece, libraries: dict[str, str], keys: dict[str, str], pipe: Connection) -> None:
    """In a process of its own: compares all of the piece and sends the findings by target."""
    faulthandler.disable()  # pytest's would print the crash that is only recorded here
    findings = {isa: Finding(keys[isa], PIECE) for isa in libraries}
    loaded = {isa: ctypes.CDLL(path) for isa, path in libraries.items()}
    for n, subject in enumerate(piece.subjects()):
        rng = np.random.default_rng([n, piece.number])
        for turn, sample in enumerate(samples_of(subject, rng, piece.outputs)):
            for isa, library in loaded.items():
                pipe.send(f"{isa}: {subject.text(isa)}")  # where it is, should it crash
                compare(library, n, subject, sample, isa, findings[isa], turn)
    pipe.send(findings)


def command_of(piece: Piece, isa: str) -> list[str]:
    """The compiler and its flags: those of artefacts but for the level."""
    flags = [piece.level if f == SHIPPED else f for f in FLAGS]
    return [*compilers()[piece.compiler], *flags, *TARGETS[isa].flags]


def conditions(piece: Piece, isa: str) -> list[str]:
    """What decides the result of a piece, its own C++ text apart."""
    return [header_text(KERNELS[piece.kernel].headers, TARGETS[isa].vectors), *command_of(piece, isa)[1:],
            version(piece.compiler), str(piece.outputs)]  # fmt: skip


@lru_cache(maxsize=8)
def sources(kernel: str, number: int, isa: str) -> str:
    """The C++ text of a piece, the same for every compiler and level."""
    subjects = Piece(kernel, number, "", "", (isa,)).subjects()
    samples = [s.draw(np.random.default_rng(0), 1, False) for s in subjects]
    return source(subjects, samples, kernel, isa)


def key_of(piece: Piece, isa: str) -> str:
    return short_hash(*conditions(piece, isa), sources(piece.kernel, piece.number, isa))


def run_piece(piece: Piece, known: dict[str, Finding]) -> dict[str, Finding]:
    """Compiles and compares what of `piece` has not agreed yet."""
    results: dict[str, Finding] = {}
    libraries, keys = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in piece.targets:
            key, before = key_of(piece, isa), known.get(piece.name(isa))
            if before is not None and before.key == key and not before.differences:
                continue
            file, library = Path(folder) / f"{isa}.cpp", Path(folder) / f"{isa}.so"
            file.write_text(sources(piece.kernel, piece.number, isa))
            command = [*command_of(piece, isa), f"-I{include_dir()}", "-shared", "-nodefaultlibs", str(file)]
            done = subprocess.run([*command, "-lm", "-lc", "-o", str(library)], capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line][:2]
                results[isa] = Finding(key, PIECE, 0, 1, [f"does not compile: {' / '.join(errors)[:600]}"])
            else:
                libraries[isa], keys[isa] = str(library), key
        return results | (_in_process(piece, libraries, keys) if libraries else {})


def _in_process(piece: Piece, libraries: dict[str, str], keys: dict[str, str]) -> dict[str, Finding]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(piece, libraries, keys, there), daemon=True)
    process.start()
    there.close()
    last = "nothing yet"
    try:
        while True:
            message = here.recv()
            if isinstance(message, dict):
                return message
            last = message
    except EOFError:
        process.join()
        crashed = f"process ended with {process.exitcode} in {last}"
        isa = last.split(":")[0]
        # The others are compared again without the one that crashed.
        others = {k: v for k, v in libraries.items() if k != isa}
        found = {isa if isa in libraries else piece.targets[0]:
                 Finding(keys.get(isa, ""), PIECE, 0, 1, [crashed])}  # fmt: skip
        return found | (_in_process(piece, others, keys) if others and isa in libraries else {})
    finally:
        process.join()


class State:
    """What has been found, kept in a JSON file after each piece: a line each, what is zero or empty left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.findings: dict[str, Finding] = {}
        if path.exists():
            self.findings = {k: Finding(**v) for k, v in json.loads(path.read_text()).items()}

    def add(self, found: dict[str, Finding]) -> None:
        self.findings |= found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = (f"{json.dumps(name)}: {json.dumps({k: v for k, v in asdict(f).items() if v})}"
                for name, f in sorted(self.findings.items()))  # fmt: skip
        temporary = self.path.with_suffix(".new")
        temporary.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        os.replace(temporary, self.path)


def pieces(kernels: Sequence[str], targets: Sequence[str], shapes: int, matrix: int) -> list[Piece]:
    """All pieces, one kernel after the other, and avx512 without VNNI at the end."""
    first = tuple(t for t in targets if t != "avx512")
    order = []
    for chosen in filter(None, (first, tuple(t for t in targets if t not in first))):
        for kernel in kernels:
            for compiler, level in [(c, level) for c in compilers() for level in LEVELS]:
                count = shapes if (compiler, level) == ("g++", SHIPPED) else matrix
                order += [Piece(kernel, n, compiler, level, chosen) for n in range(-(-count // PIECE))]
    return order


def table(state: State) -> str:
    """What has been compared of the present kernels, by kernel and target: shapes and results as shipped, on how many
    shapes each compiler and level ran at least, and how many results differ."""
    past = 0
    rows: dict[tuple[str, str], dict[str, int]] = {}
    ways: dict[tuple[str, str], dict[str, int]] = {}
    for name, f in state.findings.items():
        kernel, isa, compiler, level, number = name.split("/")
        present = kernel in KERNELS and isa in TARGETS and compiler in compilers()
        if not present or f.key != key_of(Piece(kernel, int(number), compiler, level, (isa,)), isa):
            past += 1
            continue
        row = rows.setdefault((kernel, isa), {"shapes": 0, "shipped": 0, "all": 0, "differ": 0})
        if (compiler, level) == ("g++", SHIPPED):
            row["shapes"] += f.shapes
            row["shipped"] += f.outputs
        way = ways.setdefault((kernel, isa), {})
        way[f"{compiler} {level}"] = way.get(f"{compiler} {level}", 0) + f.shapes
        row["all"] += f.outputs
        row["differ"] += f.differences
    lines = [
        "| kernel | target | shapes, g++ -O2 | results | least shapes of compilers x levels | all results | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    total: dict[str, list[int]] = {}
    names = list(KERNELS)
    for kernel, isa in sorted(rows, key=lambda k: (names.index(k[0]) if k[0] in names else 99, k[1])):
        row, way = rows[kernel, isa], ways[kernel, isa]
        lines.append(f"| {kernel} | {isa} | {row['shapes']} | {row['shipped']:,} "
                     f"| {min(way.values())} ({len(way)} of 8) | {row['all']:,} | {row['differ']} |")  # fmt: skip
        for i, v in enumerate((row["shapes"], row["shipped"], row["all"], row["differ"])):
            total.setdefault(isa, [0] * 4)[i] += v
    for isa, (shapes, shipped, results, differ) in sorted(total.items()):
        lines.append(f"| all | {isa} | {shapes} | {shipped:,} | | {results:,} | {differ} |")
    if past:
        lines.append(f"\n{past} pieces of other kernels, tests or compilers than the present ones are left out.")
    return "\n".join(lines)


def run(
    *,
    kernels: Sequence[str],
    targets: Sequence[str],
    shapes: int,
    matrix: int,
    state: State,
    seconds: float | None = None,
    jobs: int = 1,
    report: bool = False,
) -> int:
    """Runs what is not known yet until `seconds` have passed; the number of pieces that differ."""
    todo = iter(enumerate(pieces(kernels, targets, shapes, matrix), 1))
    for missing in {"g++", "clang"} - set(compilers()):
        print(f"{missing} is not there: left out (pip install ziglang==0.17.0, or SKIVE_CLANG=command)", flush=True)
    of, bad, end = len(pieces(kernels, targets, shapes, matrix)), 0, math.inf if seconds is None else seconds
    started = time.monotonic()
    running: dict[Future[dict[str, Finding]], tuple[int, Piece]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        while True:
            while len(running) < jobs and time.monotonic() - started < end and (one := next(todo, None)):
                names = [one[1].name(isa) for isa in one[1].targets]
                known = {n: state.findings[n] for n in names if n in state.findings}
                running[pool.submit(run_piece, one[1], known)] = one
            if not running:
                return bad
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                (number, piece), found = running.pop(done), done.result()
                if found:
                    state.add({piece.name(isa): f for isa, f in found.items()})
                wrong = {isa: f for isa, f in found.items() if f.differences}
                bad += bool(wrong)
                for isa, f in wrong.items():
                    print(f"\n{piece.name(isa)}: {f.differences} differences; {f.problems[0]}", flush=True)
                if report:
                    _progress(number, of, piece, found)


def _progress(done: int, of: int, piece: Piece, found: dict[str, Finding]) -> None:
    outputs = sum(f.outputs for f in found.values())
    filled = 30 * done // of
    line = (f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{of} {piece.kernel} {piece.compiler} {piece.level} "
            f"{piece.number}: " + (f"{outputs:,} results" if found else "known"))  # fmt: skip
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)
    elif found:
        print(line, flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kernel", action="append", choices=list(KERNELS), help="this one only; may be repeated")
    p.add_argument("--target", action="append", choices=list(TARGETS), help="this one only; may be repeated")
    p.add_argument("--shapes", type=int, default=SHAPES)
    p.add_argument("--matrix", type=int, default=MATRIX_SHAPES, help="shapes for every compiler and level")
    p.add_argument("--seconds", type=float, help="begin no more pieces after this time")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pieces at once")
    p.add_argument("--state", type=Path, default=STATE)
    p.add_argument("--report", action="store_true", help="print the table of what is known and stop")
    a = p.parse_args()
    state = State(a.state)
    bad = 0
    if not a.report:
        bad = run(kernels=a.kernel or list(KERNELS), targets=a.target or runnable(), shapes=a.shapes,
                  matrix=a.matrix, state=state, seconds=a.seconds, jobs=a.jobs, report=True)  # fmt: skip
        print()
    print(table(state))
    hours = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 3600
    print(f"{hours:.2f} hours of processor time")
    return 1 if bad or any(f.differences for f in state.findings.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
