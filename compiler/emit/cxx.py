"""Plan -> C++17 source text. Shapes, order and offsets only; the logic is in the kernel library."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skive import kernels
from skive.emit import host
from skive.plan import Access, Arg, Call, Fn, Plan
from skive.targets.base import Target

# More kernels than this are spread over several translation units, so that they compile side by side.
KERNELS_PER_UNIT = 6

_KEYWORDS = frozenset(
    """
    alignas alignof and asm auto bitand bitor bool break case catch char class compl const constexpr
    continue decltype default delete do double else enum explicit export extern false float for
    friend goto if inline int long mutable namespace new noexcept not nullptr operator or private
    protected public register return short signed sizeof static struct switch template this throw
    true try typedef typeid typename union unsigned using virtual void volatile while xor int8_t
    int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t main
    """.split()
)

# NAME.h would hide a header of the C library from a program that looks into the artefact's folder,
# libNAME one of the libraries that every program links; CMake keeps some targets to itself.
_TAKEN = frozenset(
    """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign
    stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string strings tgmath threads
    time uchar wchar wctype pthread sched semaphore unistd fcntl dlfcn malloc memory features c m
    gcc gcc_s pthread dl rt stdc all ALL_BUILD clean edit_cache help install INSTALL package PACKAGE
    package_source preinstall rebuild_cache RUN_TESTS test ZERO_CHECK
    """.split()
)


def identifier(text: str, fallback: str = "model") -> str:
    """A C identifier made of `text`: other characters become `_`; never a name that means something else."""
    s = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:60].rstrip("_") or fallback
    return f"m_{s}" if s[0].isdigit() or s in _KEYWORDS or s in _TAKEN else s


def comment(text: str) -> str:
    """`text` as it may stand in a `//` comment: printable ASCII, no backslash (line splice)."""
    return re.sub(r"[^ -\[\]-~]", "?", text)[:120].rstrip()


@dataclass(frozen=True)
class Sources:
    """File name -> text. `units` are compiled; `headers` are kernel headers they include."""

    files: dict[str, str]
    units: tuple[str, ...]
    headers: tuple[str, ...]


_ACCESS = {
    "full": "load<N>({arg} + pixel * {stride} + channel)",
    "channel": "load<N>({arg} + channel)",
    "scalar": "splat<N>({arg}[0])",
    "pixel": "splat<N>({arg}[pixel])",
    "sample": "load<N>({arg} + pixel / {pixels} * {stride} + channel)",
}
# Kernels that call their epilogue with one channel of neighbouring pixels instead of one pixel's channels.
_PIXELS_IN_LANES = frozenset(("narrow_conv2d",))
_PIXELS_ACCESS = {
    "full": "load_full<N, {stride}>({arg}, pixel, channel)",
    "channel": "load_channel<N>({arg}, channel)",
    "scalar": "splat<N>({arg}[0])",
    "pixel": "load_pixel<N>({arg}, pixel)",
}


def _operand(a: Access, vector: bool, pixels: bool) -> str:
    if a.mode == "literal":
        return f"splat<N>({a.text})" if vector else a.text
    return (_PIXELS_ACCESS if pixels else _ACCESS)[a.mode].format(arg=a.arg, stride=a.stride, pixels=a.pixels)


def _lambda(fn: Fn, pixels: bool = False) -> str:
    """The C++ lambda of a fused expression; `pixels`: for a kernel of _PIXELS_IN_LANES."""
    lines = []
    names: dict[str, str] = {}
    for i, a in enumerate(fn.operands):
        names[f"x{i}"] = f"x{i}"
        if a.mode != "value":
            names[f"x{i}"] = _operand(a, fn.vector, pixels)
    used = {arg for s in fn.steps for arg in s.args}
    needs_lanes = fn.vector and any("<N>" in names[u] for u in used if u in names)
    if needs_lanes:
        value = next(i for i, a in enumerate(fn.operands) if a.mode == "value")
        lines.append(f"constexpr int N = decltype(x{value})::lanes;")
    if not fn.steps:
        lines.append("return x0;")
    for n, s in enumerate(fn.steps):
        if s.table:
            lines.append(f"alignas(64) static constexpr float table{n}[] = {{{', '.join(s.table)}}};")
        args = ", ".join([names.get(a, a) for a in s.args] + list(s.tail) + [f"table{n}"] * bool(s.table))
        target = "return " if n == len(fn.steps) - 1 else f"const auto t{n} = "
        lines.append(f"{target}{s.name}({args});")
    body = " ".join(lines)
    if fn.epilogue:
        channel = "auto channel" if pixels else "int channel"
        head = f"[=]({_parameters(['auto x0', 'ptrdiff_t pixel', channel], body)})"
    else:
        head = f"[]({_parameters([f'auto x{i}' for i, a in enumerate(fn.operands) if a.mode == 'value'], body)})"
    head += " __attribute__((always_inline))"  # a kernel calls it in several loops, each with its constants
    if len(lines) == 1:
        return f"{head} {{ {body} }}"
    return head + " {\n      " + "\n      ".join(lines) + "\n    }"


def _parameters(declared: Sequence[str], body: str) -> str:
    """The parameter list; what `body` does not mention stays without a name."""
    return ", ".join(
        d if re.search(rf"\b{d.rsplit(' ', 1)[1]}\b", body) else d.rsplit(" ", 1)[0] for d in declared
    )


def _body(call: Call, threads: int) -> str:
    """The statements of a kernel function."""
    template = f"<{', '.join(call.template)}>" if call.template else ""
    order = [
        _lambda(call.fn, call.kernel in _PIXELS_IN_LANES) if o == "fn" and call.fn else o for o in call.order
    ]
    lines = [f"using K = {call.kernel}{template};"]
    if call.scratch_bytes:
        lines.append(
            f'static_assert(K::scratch_bytes({threads}) <= {call.scratch_bytes}, "the plan gave too little scratch");'
        )
    plain = ", ".join(o for o in order if not o.startswith("["))
    if len(plain) < sum(map(len, order)):
        at = next(i for i, o in enumerate(order) if o.startswith("["))
        parts = [", ".join(order[:at]), order[at], ", ".join(order[at + 1 :])]
        lines.append("K::run(" + ",\n         ".join(p for p in parts if p) + ");")
    else:
        lines.append(f"K::run({plain});")
    return "\n".join(f"  {line}" for line in lines)


def _signature(call: Call, name: str, threads: int) -> str:
    declared = [f"{'const ' if a.const else ''}{a.ctype}* {a.name}" for a in call.args] + ["Part part"]
    return f"void {name}({_parameters(declared, _body(call, threads))})"


# Member of Memory, kind of argument, type.
_MEMORY = (
    ("in", "input", "const unsigned char* const* "),
    ("out", "output", "unsigned char* const* "),
    ("arena", "arena", "unsigned char* "),
    ("weights", "weights", "const unsigned char* "),
)
_BASES = {"input": "in[{index}]", "output": "out[{index}]", "arena": "arena", "weights": "weights"}


def _pointer(a: Arg) -> str:
    base = _BASES[a.kind].format(index=a.index)
    typed = f"{'const ' if a.const else ''}{a.ctype}*"
    return f"reinterpret_cast<{typed}>({base} + {a.offset})" if a.offset else f"reinterpret_cast<{typed}>({base})"


def _headers(calls: Sequence[Call]) -> list[str]:
    """The kernel headers that these calls need."""
    return sorted({c.header for c in calls} | {"math.h" for c in calls if c.fn and c.fn.steps})


def emit(plan: Plan, target: Target) -> Sources:
    """All source files of the artefact except the weights and the kernel headers."""
    name, upper = plan.name, plan.name.upper()
    functions: dict[str, tuple[str, Call]] = {}  # body -> (name, first call)
    numbers: Counter[str] = Counter()
    calls = []
    for i, c in enumerate(plan.calls):
        anonymous = replace(
            c, args=tuple(replace(a, kind="", index=0, offset=0) for a in c.args), origin="", macs=0, bytes=0
        )
        key = _signature(anonymous, "", plan.threads) + _body(anonymous, plan.threads)
        if key not in functions:
            functions[key] = (f"{c.kernel}_{numbers[c.kernel]}", c)
            numbers[c.kernel] += 1
        calls.append((i, functions[key][0], c))

    headers = _headers(plan.calls)
    bodies = [
        (n, f"// {comment(c.origin)}\n{_signature(c, n, plan.threads)} {{\n{_body(c, plan.threads)}\n}}\n", c)
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
    files[f"{name}.h"] = _public_header(plan, upper)
    files[f"{name}.cpp"] = _main_unit(plan, target, upper, headers, bodies, calls, split)
    weights = _weights_unit(name)
    files[f"{name}_weights.S"] = weights
    units.append(f"{name}_weights.S")
    files["CMakeLists.txt"] = _cmake(plan, target, tuple(units))
    if plan.threads > 1:
        headers.append("threads.h")
    if target.features:
        headers.append("cpu.h")
    return Sources(files, tuple(units), tuple(sorted(set(headers))))


def _kernels_unit(name: str, target: Target, part: Sequence[tuple[str, str, Call]]) -> str:
    includes = "".join(f'#include "skive/{h}"\n' for h in _headers([c for _, _, c in part]))
    return (
        f"// Kernels of {name}, specialised to its shapes. Generated; do not edit.\n"
        f"{_defines(target)}\n{includes}\nnamespace {name}_model {{\nusing namespace skive;\n\n"
        + "\n".join(text for _, text, _ in part)
        + f"\n}}  // namespace {name}_model\n"
    )


def _defines(target: Target) -> str:
    """What a unit says before it includes kernels: the target, and which version of the headers it was written for."""
    return f"#define {target.define}\n#define SKIVE_HEADERS v{kernels.headers_hash()[:12]}"


def _public_header(plan: Plan, upper: str) -> str:
    n = plan.name
    about = [f"{n}: a compiled network. Generated; do not edit.", ""]
    for kind, ports in (("input", plan.inputs), ("output", plan.outputs)):
        for i, p in enumerate(ports):
            real = f", real = {p.scale!r} * (integer - {p.zero})" if p.scale is not None else ""
            name = comment(p.name).replace("*", "?")
            about.append(f"{kind} {i}: {name} {p.dtype}[{','.join(map(str, p.shape))}]{real}")
    about += [
        "",
        "Tensors are dense, the last index runs fastest, and aligned to their elements. bool is one byte, 0 or 1.",
    ]
    if any(p.scale is not None for p in (*plan.inputs, *plan.outputs)):
        about += [
            "A real number becomes an integer as real / scale + zero: the quotient is rounded to the nearest integer",
            "(a half to the even one), and the sum is bounded to what the element type holds.",
        ]
    about.append(f"Memory: {len(plan.weights)} bytes of constant weights, {plan.arena_bytes} of arena from the caller.")
    lines = [f"/* {text} */" if text else "" for text in about]
    lines += [
        f"#ifndef {upper}_MODEL_H",
        f"#define {upper}_MODEL_H",
        "",
        *(["#include <stdint.h>", ""] if plan.exits else []),
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {upper}_INPUT_COUNT {len(plan.inputs)}",
        f"#define {upper}_OUTPUT_COUNT {len(plan.outputs)}",
    ]
    for kind, ports in (("INPUT", plan.inputs), ("OUTPUT", plan.outputs)):
        for i, p in enumerate(ports):
            lines.append(f"#define {upper}_{kind}{i}_BYTES {p.bytes}")
            if p.scale is not None:
                lines += [f"#define {upper}_{kind}{i}_SCALE {p.scale!r}f", f"#define {upper}_{kind}{i}_ZERO {p.zero}"]
    lines += [
        f"#define {upper}_ARENA_BYTES {plan.arena_bytes}",
        f"#define {upper}_ARENA_ALIGN 64",
        f"#define {upper}_BATCH_MAX {plan.batch_max or 0}",
        f"#define {upper}_THREADS {plan.threads}",
        "",
        "/* Error codes of the functions below; 0 is success. */",
        f"#define {upper}_ERROR_CPU 1   /* this processor lacks an instruction set the code needs */",
        f"#define {upper}_ERROR_NULL 2  /* a pointer is null */",
        f"#define {upper}_ERROR_ALIGN 3 /* the arena is not {upper}_ARENA_ALIGN-byte aligned */",
        f"#define {upper}_ERROR_BATCH 4 /* the batch is not 1 to {upper}_BATCH_MAX, or there is no such layer */",
        *([f"#define {upper}_ERROR_EXIT 5  /* there is no such exit to resume from */"] if plan.exits else []),
        "",
        "#if defined(__GNUC__)",
        f'#define {upper}_API __attribute__((visibility("default")))',
        "#else",
        f"#define {upper}_API",
        "#endif",
        "",
        "/* Runs the network once. No allocation, no global state: calls on separate arenas may run",
        "   at the same time. inputs and outputs point to one pointer per tensor; inputs are only read, and",
        "   an output overlaps no other tensor. The arena needs no initialisation and, unless exits are resumed,",
        f"   keeps nothing between calls; it may be null if {upper}_ARENA_BYTES is 0. */",
        f"{upper}_API int {n}_run(const void* const* inputs, void* const* outputs, void* arena);",
    ]
    if plan.batch_max:
        lines += [
            "",
            "/* The same for `batch` samples that lie one after the other in every tensor. */",
            f"{upper}_API int {n}_run_batch(const void* const* inputs, void* const* outputs, void* arena, int batch);",
        ]
    if plan.exits:
        lines += host.header(plan, upper)
    lines += [
        "",
        "/* 1 if this processor has the instruction sets that the code needs. */",
        f"{upper}_API int {n}_cpu_supported(void);",
        "/* What an error code means, in words. */",
        f"{upper}_API const char* {n}_error(int code);",
        "",
        "/* Runs one layer, 0 to LAYER_COUNT - 1, on an arena in which the layers before it ran: for profiling. */",
        f"#define {upper}_LAYER_COUNT {len(plan.calls)}",
        f"{upper}_API int {n}_run_layer(int layer, const void* const* inputs, void* const* outputs, void* arena);",
    ]
    if plan.threads > 1:
        lines += [
            "",
            "/* Starts and stops the worker threads. Without them a call computes the same, alone. */",
            f"{upper}_API void {n}_pool_start(int threads);",
            f"{upper}_API void {n}_pool_stop(void);",
        ]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "", f"#endif  /* {upper}_MODEL_H */", ""]
    return "\n".join(lines)


def _layer_name(index: int, call: Call) -> str:
    """`layer3_block1_conv`: the number keeps it unique, the rest says where it comes from."""
    return f"layer{index}_{identifier(call.origin, call.op)[:40].rstrip('_')}"


def _pointers_of_sample(plan: Plan) -> list[str]:
    """Declarations of `in` and `out`: the tensors of sample `b`."""
    lines = []
    for kind, ports, ctype in (("in", plan.inputs, "const void*"), ("out", plan.outputs, "void*")):
        source = "inputs" if kind == "in" else "outputs"
        items = ", ".join(
            f"static_cast<{'const ' if kind == 'in' else ''}unsigned char*>({source}[{i}])"
            f" + static_cast<size_t>(b) * {p.bytes}"
            for i, p in enumerate(ports)
        )
        lines.append(f"    {ctype} {'const ' if kind == 'out' else ''}{kind}[] = {{{items or 'nullptr'}}};")
    return lines


def _main_unit(
    plan: Plan,
    target: Target,
    upper: str,
    headers: list[str],
    bodies: list[tuple[str, str, Call]],
    calls: list[tuple[int, str, Call]],
    split: bool,
) -> str:
    n = plan.name
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
        out += [f"{_signature(c, k, plan.threads)};" for k, _, c in bodies] + [""]
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
        "};",
        "",
    ]
    first_names: dict[tuple[object, ...], str] = {}  # function, what it is called on -> name
    layers = [first_names.setdefault((f, c.args, c.parallel), _layer_name(i, c)) for i, f, c in calls]
    for layer, (i, fname, c) in zip(layers, calls, strict=True):
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
                "}",
                "",
            ]
        else:
            out += [f"  {fname}({args}{', ' if args else ''}Part{{}});", "}", ""]
    pointers = "const void* const* inputs, void* const* outputs, void* arena"
    out += [
        "static Memory memory(const void* const* inputs, void* const* outputs, void* arena) {",
        "  return {reinterpret_cast<const unsigned char* const*>(inputs),",
        "          reinterpret_cast<unsigned char* const*>(outputs), static_cast<unsigned char*>(arena),",
        f"          {n}_weights}};",
        "}",
        "",
        "// This and what follows up to the checks is kept apart from the entries: their own code must",
        "// run on any processor, and here even a copy of two pointers may be a vector instruction.",
        f"__attribute__((noinline)) static void run({pointers}) {{",
        f"  {'' if calls else '[[maybe_unused]] '}const Memory m = memory(inputs, outputs, arena);",
    ]
    steps = host.sequence(plan, layers)
    out += host.guarded(steps, "  ")
    out += ["}", ""]
    if plan.batch_max:
        out += [
            f"__attribute__((noinline)) static void run_batch({pointers}, int batch) {{",
            "  for (int b = 0; b < batch; ++b) {",
            *_pointers_of_sample(plan),
        ]
        out += ["    run(in, out, arena);", "  }", "}", ""]
    if plan.exits:
        out += host.functions(plan, steps, _pointers_of_sample)
    if calls:
        out += [
            f"__attribute__((noinline)) static void run_layer(int layer, {pointers}) {{",
            *host.layer_table(layers),
            "}",
            "",
        ]
    out += [f"}}  // namespace {n}_model", "", f"using namespace {n}_model;", ""]
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
    out += [
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
        f'extern "C" int {n}_run(const void* const* inputs, void* const* outputs, void* arena) {{',
        "  if (int error = check(inputs, outputs, arena)) return error;",
        "  run(inputs, outputs, arena);",
        "  return 0;",
        "}",
        "",
    ]
    if plan.batch_max:
        out += [
            f'extern "C" int {n}_run_batch(const void* const* inputs, void* const* outputs, void* arena, int batch) {{',
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
        f'extern "C" int {n}_run_layer(int layer, const void* const* inputs, void* const* outputs, void* arena) {{',
        "  if (int error = check(inputs, outputs, arena)) return error;",
    ]
    if calls:
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
    return "\n".join(out)


def _weights_unit(name: str) -> str:
    """Assembly that places the packed weights in read-only data without a compiler parsing them."""
    return (
        f"/* The packed weights of {name}, from {name}_weights.bin. Generated; do not edit. */\n"
        "#if defined(__APPLE__)\n#define SYMBOL(name) _##name\n    .const\n#else\n#define SYMBOL(name) name\n"
        '    .section .rodata,"a",%progbits\n#endif\n'
        f"    .globl SYMBOL({name}_weights)\n"
        "#if !defined(__APPLE__)\n"
        f"    .hidden SYMBOL({name}_weights)\n"
        "#endif\n    .balign 64\n"
        f'SYMBOL({name}_weights):\n    .incbin "{name}_weights.bin"\n    .byte 0\n'
        '#if defined(__ELF__)\n    .section .note.GNU-stack,"",%progbits\n#endif\n'
    )


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


def _cmake(plan: Plan, target: Target, units: tuple[str, ...]) -> str:
    n = plan.name
    options = " ".join((*FLAGS[1:], *target.flags))
    sources = "\n  ".join(units)
    threads = (
        f"find_package(Threads REQUIRED)\ntarget_link_libraries({n} PRIVATE Threads::Threads)\n"
        if plan.threads > 1
        else ""
    )
    return (
        f"# Builds {n} from this folder alone. Generated; do not edit.\n"
        f"cmake_minimum_required(VERSION 3.13)\nproject({n} LANGUAGES CXX ASM)\n\n"
        f'option(BUILD_SHARED_LIBS "Build lib{n}.so instead of lib{n}.a" ON)\n'
        f"add_library({n}\n  {sources})\n"
        f"target_include_directories({n} INTERFACE ${{CMAKE_CURRENT_SOURCE_DIR}})\n"
        f"target_compile_features({n} PRIVATE cxx_std_17)\n"
        f'separate_arguments(options UNIX_COMMAND "{options}")\n'
        f"target_compile_options({n} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${{options}}>)\n"
        f"target_compile_options({n} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-iquote${{CMAKE_CURRENT_SOURCE_DIR}}>)\n"
        f"set_source_files_properties({n}_weights.S PROPERTIES\n"
        f'  COMPILE_OPTIONS "-Wa,-I,${{CMAKE_CURRENT_SOURCE_DIR}}")\n'
        f"target_link_options({n} PRIVATE -nodefaultlibs)\ntarget_link_libraries({n} PRIVATE m c gcc)\n{threads}"
    )
