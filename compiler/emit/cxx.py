"""Plan -> C++17 source text. Shapes, order and offsets only; the logic is in the kernel library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skive import kernels
from skive.emit import host
from skive.emit.build_files import cmake, weights_unit
from skive.emit.header import public_header
from skive.emit.host import POINTERS
from skive.emit.kernel_functions import body, headers_of, signature
from skive.emit.names import comment, identifier
from skive.plan import Arg, Call, Plan
from skive.targets.base import Target

# More kernels than this are spread over several translation units, so that they compile side by side.
KERNELS_PER_UNIT = 6

FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
)


@dataclass(frozen=True)
class Sources:
    """File name -> text. `units` are compiled; `headers` are kernel headers they include."""

    files: dict[str, str]
    units: tuple[str, ...]
    headers: tuple[str, ...]


# Member of Memory, kind of argument, type.
_MEMORY = (
    ("in", "input", "const unsigned char* const* "),
    ("out", "output", "unsigned char* const* "),
    ("arena", "arena", "unsigned char* "),
    ("weights", "weights", "const unsigned char* "),
)
_BASES = {"input": "in[{index}]", "output": "out[{index}]", "arena": "arena", "weights": "weights"}

# A statement with effects at the end of each layer.
_KEEP_WRITES = (
    "// Where both pointers of a loop lie in the arena, g++ 12 may address one as 0 + a register, take that for",
    "// an access through a null pointer, the layer for a function without effects, and drop the call.",
    'static inline void keep_writes() { __asm__ volatile("" ::: "memory"); }',
    "",
)


def _pointer(a: Arg) -> str:
    base = _BASES[a.kind].format(index=a.index)
    if a.step:
        base += f" + m.sample * ptrdiff_t{{{a.step}}}"
    typed = f"{'const ' if a.const else ''}{a.ctype}*"
    return f"reinterpret_cast<{typed}>({base} + {a.offset})" if a.offset else f"reinterpret_cast<{typed}>({base})"


def emit(plan: Plan, target: Target) -> Sources:
    """All source files of the artefact except the weights and the kernel headers."""
    name, upper = plan.name, plan.name.upper()
    functions: dict[str, tuple[str, Call]] = {}  # body -> (name, first call)
    numbers: Counter[str] = Counter()
    calls = []
    for c in plan.calls:
        anonymous = replace(
            c, args=tuple(replace(a, kind="", index=0, offset=0, step=0) for a in c.args), origin="", macs=0, bytes=0
        )
        key = signature(anonymous, "", plan.threads) + body(anonymous, plan.threads)
        if key not in functions:
            functions[key] = (f"{c.kernel}_{numbers[c.kernel]}", c)
            numbers[c.kernel] += 1
        calls.append((functions[key][0], c))

    headers = headers_of(plan.calls)
    bodies = [
        (n, f"// {comment(c.origin)}\n{signature(c, n, plan.threads)} {{\n{body(c, plan.threads)}\n}}\n", c)
        for n, c in functions.values()
    ]
    files: dict[str, str] = {}
    units = [f"{name}.cpp"]
    split = len(bodies) > KERNELS_PER_UNIT
    if split:
        # Neighbouring layers share template instances: they stay in one unit. What takes long to compile is numbered
        # and grouped by itself, so that a network with other outputs finds it in the cache.
        products = [b for b in bodies if b[2].macs]
        for kind, group in (("products", products), ("kernels", [b for b in bodies if not b[2].macs])):
            count = -(-len(group) // KERNELS_PER_UNIT)
            for u in range(count):
                part = group[u * len(group) // count : (u + 1) * len(group) // count]
                units.append(f"{name}_{kind}_{u}.cpp")
                files[units[-1]] = _kernels_unit(name, target, part)
    files[f"{name}.h"] = public_header(plan, upper)
    files[f"{name}.cpp"] = _main_unit(plan, target, upper, headers, bodies, calls, split)
    files[f"{name}_weights.S"] = weights_unit(name)
    units.append(f"{name}_weights.S")
    files["CMakeLists.txt"] = cmake(plan, (*FLAGS[1:], *target.flags), units)
    if plan.threads > 1:
        headers.append("threads.h")
    if target.features:
        headers.append("cpu.h")
    return Sources(files, tuple(units), tuple(sorted(set(headers))))


def _kernels_unit(name: str, target: Target, part: Sequence[tuple[str, str, Call]]) -> str:
    includes = "".join(f'#include "skive/{h}"\n' for h in headers_of([c for _, _, c in part]))
    return (
        f"// Kernels of {name}, specialised to its shapes. Generated; do not edit.\n"
        f"{_defines(target)}\n{includes}\nnamespace {name}_model {{\nusing namespace skive;\n\n"
        + "\n".join(text for _, text, _ in part)
        + f"\n}}  // namespace {name}_model\n"
    )


def _defines(target: Target) -> str:
    """What a unit says before it includes kernels: the target, and which version of the headers it was written for."""
    return f"#define {target.define}\n#define SKIVE_HEADERS v{kernels.headers_hash()[:12]}"


def _layer_name(index: int, call: Call) -> str:
    """`layer3_block1_conv`: the number keeps it unique, the rest says where it comes from."""
    return f"layer{index}_{identifier(call.origin, call.op)[:40].rstrip('_')}"


def _layers(plan: Plan, calls: Sequence[tuple[str, Call]]) -> tuple[list[str], list[str]]:
    """(the name of every layer, the functions of these names)."""
    out = []
    first_names: dict[tuple[object, ...], str] = {}  # function, what it is called on -> name
    layers = [first_names.setdefault((f, c.args, c.parallel), _layer_name(i, c)) for i, (f, c) in enumerate(calls)]
    for i, (layer, (fname, c)) in enumerate(zip(layers, calls, strict=True)):
        if layer != _layer_name(i, c):
            continue  # of another trip of a loop
        given = [_pointer(a) for a in c.args]
        used = {a.kind for a in c.args}
        unpack = [f"  {ctype}{k} = m.{k};" for k, kind, ctype in _MEMORY if kind in used]
        args = ", ".join(given)
        out += [
            f"// {comment(c.origin) or c.op}",
            f"static void {layer}({'[[maybe_unused]] ' if not used else ''}const Memory& m) {{",
            *unpack,
        ]
        if plan.threads > 1 and c.parallel:
            out += [
                f"  pool.parallel({plan.threads}, [&](Part part) {{",
                f"    {fname}({args}{', ' if args else ''}part);",
                "  });",
            ]
        else:
            out += [f"  {fname}({args}{', ' if args else ''}Part{{}});"]
        out += ["  keep_writes();", "}", ""]
    return layers, out


def _main_unit(
    plan: Plan,
    target: Target,
    upper: str,
    headers: list[str],
    bodies: list[tuple[str, str, Call]],
    calls: list[tuple[str, Call]],
    split: bool,
) -> str:
    n = plan.name
    several = sum(c.samples > 1 for c in plan.calls)  # of the first calls
    out = [
        f"// {n}: layers in order, with their places in memory. Generated; do not edit.",
        f'#include "{n}.h"',
        "",
    ]
    out += [_defines(target)]
    if plan.threads > 1:
        out += ['#include "skive/threads.h"']
    out += [f'#include "skive/{"cpu.h" if target.features else "isa.h"}"']
    if not split:
        out += [f'#include "skive/{h}"' for h in headers]
    out += [
        "",
        f'extern "C" const unsigned char {n}_weights[];',
        "",
        f"namespace {n}_model {{",
        "using namespace skive;",
        "",
    ]
    if split:
        out += [f"{signature(c, k, plan.threads)};" for k, _, c in bodies] + [""]
    else:
        out += ["namespace {"] + [b for _, b, _ in bodies] + ["}  // namespace", ""]
    if plan.threads > 1:
        out += ["static Pool pool;", ""]
    out += [
        "struct Memory {",
        "  const unsigned char* const* in;",
        "  unsigned char* const* out;",
        "  unsigned char* arena;",
        "  const unsigned char* weights;",
        *(["  int sample;  // of the batch"] if several else []),
        "};",
        "",
    ]
    layers, functions = _layers(plan, calls)
    if functions:
        out += _KEEP_WRITES
    out += functions
    out += [
        f"static Memory memory({POINTERS}) {{",
        "  return {reinterpret_cast<const unsigned char* const*>(inputs),",
        "          reinterpret_cast<unsigned char* const*>(outputs), static_cast<unsigned char*>(arena),",
        f"          {n}_weights{', 0' if several else ''}}};",
        "}",
        "",
        "// This and what follows up to the checks is kept apart from the entries: their own code must",
        "// run on any processor, and here even a copy of two pointers may be a vector instruction.",
        f"__attribute__((noinline)) static void run({POINTERS}) {{",
        f"  {'' if calls else '[[maybe_unused]] '}{'' if several else 'const '}Memory m = memory(inputs, outputs,"
        " arena);",
    ]
    steps = host.sequence(plan, layers)
    if several:
        out += [
            f"  for (; m.sample < {plan.calls[0].samples}; ++m.sample) {{",
            *host.guarded(steps[:several], "    "),
            "  }",
        ]
    out += host.guarded(steps[several:], "  ")
    out += ["}", ""]
    if plan.batch_max:
        out += [
            f"__attribute__((noinline)) static void run_batch({POINTERS}, int batch) {{",
            "  for (int b = 0; b < batch; ++b) {",
            *host.pointers_of_sample(plan),
        ]
        out += ["    run(in, out, arena);", "  }", "}", ""]
    if plan.exits:
        out += host.functions(plan, steps)
    if calls:
        out += [
            f"__attribute__((noinline)) static void run_layer(int layer, {POINTERS}) {{",
            *host.layer_table(layers, several, plan.calls[0].samples),
            "}",
            "",
        ]
    out += [f"}}  // namespace {n}_model", "", f"using namespace {n}_model;", ""]
    out += _entries(plan, target, upper)
    return "\n".join(out)


def _entries(plan: Plan, target: Target, upper: str) -> list[str]:
    """The exported functions, which check what they are given on any processor."""
    n = plan.name
    supported = ["  return 1;"]
    names = ", ".join(f'"{f}"' for f in target.features)
    if names:  # asking takes microseconds, in a virtual machine many: once
        supported = [
            f"  static const char* const needed[] = {{{names}}};",
            "  static int known = 0;  // 1: no, 2: yes",
            "  int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);",
            "  if (!answer) {",
            "    answer = skive::cpu_has(needed) ? 2 : 1;",
            "    __atomic_store_n(&known, answer, __ATOMIC_RELAXED);",
            "  }",
            "  return answer - 1;",
        ]
    out = [
        f'extern "C" int {n}_cpu_supported(void) {{',
        *supported,
        "}",
        "",
        f'extern "C" const char* {n}_error(int code) {{',
        "  switch (code) {",
        '    case 0: return "success";',
        f'    case {upper}_ERROR_CPU: return "this processor lacks one of {", ".join(target.features) or "nothing"}";',
        f'    case {upper}_ERROR_NULL: return "a pointer is null";',
        f'    case {upper}_ERROR_ALIGN: return "the arena is not 64-byte aligned";',
        f'    case {upper}_ERROR_BATCH: return "the batch or the layer is out of range";',
        *([f'    case {upper}_ERROR_EXIT: return "there is no such exit";'] if plan.exits else []),
        '    default: return "unknown error";',
        "  }",
        "}",
        "",
        "static int check(const void* const* inputs, void* const* outputs, const void* arena) {",
        f"  if (!{n}_cpu_supported()) return {upper}_ERROR_CPU;",
        f"  if (({upper}_INPUT_COUNT && !inputs) || ({upper}_OUTPUT_COUNT && !outputs)) return {upper}_ERROR_NULL;",
    ]
    if plan.inputs:
        out += [
            f"  for (int i = 0; i < {upper}_INPUT_COUNT; ++i)",
            f"    if (!inputs[i]) return {upper}_ERROR_NULL;",
        ]
    if plan.outputs:
        out += [
            f"  for (int i = 0; i < {upper}_OUTPUT_COUNT; ++i)",
            f"    if (!outputs[i]) return {upper}_ERROR_NULL;",
        ]
    out += [
        f"  if ({upper}_ARENA_BYTES && !arena) return {upper}_ERROR_NULL;",
        f"  if (reinterpret_cast<uintptr_t>(arena) % {upper}_ARENA_ALIGN) return {upper}_ERROR_ALIGN;",
        "  return 0;",
        "}",
        "",
        f'extern "C" int {n}_run({POINTERS}) {{',
        "  if (int error = check(inputs, outputs, arena)) return error;",
        "  run(inputs, outputs, arena);",
        "  return 0;",
        "}",
        "",
    ]
    if plan.batch_max:
        out += [
            f'extern "C" int {n}_run_batch({POINTERS}, int batch) {{',
            "  if (int error = check(inputs, outputs, arena)) return error;",
            f"  if (batch < 1 || batch > {upper}_BATCH_MAX) return {upper}_ERROR_BATCH;",
            "  run_batch(inputs, outputs, arena, batch);",
            "  return 0;",
            "}",
            "",
        ]
    if plan.exits:
        out += host.entries(plan, upper)
    out += [
        f'extern "C" int {n}_run_layer(int layer, {POINTERS}) {{',
        "  if (int error = check(inputs, outputs, arena)) return error;",
    ]
    if plan.calls:
        out += [
            f"  if (layer < 0 || layer >= {upper}_LAYER_COUNT) return {upper}_ERROR_BATCH;",
            "  run_layer(layer, inputs, outputs, arena);",
        ]
    else:
        out += ["  (void)layer;"]
    out += ["  return 0;", "}", ""]
    if plan.threads > 1:
        out += [
            f'extern "C" void {n}_pool_start(int threads) {{',
            f"  if ({n}_cpu_supported()) pool.start(threads);",
            "}",
            "",
            f'extern "C" void {n}_pool_stop(void) {{',
            f"  if ({n}_cpu_supported()) pool.stop();",
            "}",
            "",
        ]
    return out
