"""The host program as C++: branches, stages, tests of early exits, and the entries that run them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

from skive.plan import Exit, Plan

T = TypeVar("T")
FEWEST_TURNS = 3  # that are worth a loop
POINTERS = "const void* const* inputs, void* const* outputs, void* arena"


def _type(plan: Plan) -> str:
    """The C type of scores and thresholds."""
    return "float" if all(e.code is None for e in plan.exits) else "int32_t"


def _tail(plan: Plan) -> str:
    return f"const {_type(plan)}* thresholds, int32_t* exit_taken"


def literal(e: Exit) -> str:
    """The threshold of `e` as a literal."""
    if e.code is not None:
        return str(e.code)
    value = e.threshold
    if value in (float("inf"), float("-inf")):
        return f"{'-' if value < 0 else ''}__builtin_inff()"
    return f"{value!r}f"


def _units(plan: Plan, upper: str) -> list[str]:
    """What integer thresholds mean."""
    if _type(plan) == "float":
        return []
    return [f"/* Scores and thresholds are integers, -2^24 to 2^24: real = {upper}_EXIT<i>_SCALE * integer. A real",
            "   threshold becomes one by rounding down for > and <=, up for >= and <. */"]


def header(plan: Plan, upper: str) -> list[str]:
    """The lines of the public header."""
    n = plan.name
    lines = ["", "/* Early exits, in the order in which they are reached; the last is the whole network.",
             "   Thresholds: one for each exit but the last, null for those that the network was compiled with. */",
             *_units(plan, upper),
             f"#define {upper}_EXIT_COUNT {len(plan.exits)}"]
    spent = 0
    for i, (e, s) in enumerate(zip(plan.exits, plan.stages, strict=True)):
        spent += s.macs
        outputs = ", ".join(map(str, e.outputs))
        rule = f"if output {e.score} {e.test} its threshold" if e.score is not None else "always"
        lines.append(f"/* exit {i}: outputs {outputs}; taken {rule}; {spent} MACs and {s.arena_bytes} bytes of the "
                     "arena up to here */")
        if e.score is not None:
            lines.append(f"#define {upper}_EXIT{i}_THRESHOLD {literal(e)}")
            if e.scale is not None:
                lines.append(f"#define {upper}_EXIT{i}_SCALE {e.scale!r}")
    lines += [
        "",
        "/* Runs the network until an exit is taken, whose number goes to *exit_taken. Outputs of that exit and of",
        "   those before it are written, those of later ones are not touched. */",
        f"{upper}_API int {n}_run_exits({POINTERS},",
        f"    {_tail(plan)});",
        "/* Goes on behind exit *exit_taken, up to the next one that is taken. The arena, the inputs and the outputs",
        "   are as the call before left them. Does nothing behind the last exit. */",
        f"{upper}_API int {n}_resume({POINTERS},",
        f"    {_tail(plan)});",
    ]
    if plan.batch_max:
        lines += [
            f"/* {n}_run_exits for `batch` samples that lie one after the other in every tensor; exit_taken[batch]. */",
            f"{upper}_API int {n}_run_exits_batch({POINTERS}, int batch,",
            f"    {_tail(plan)});",
        ]
    lines += [
        "/* The same as one network: the thresholds are one more input, the exits one more output, int32[batch]. */",
        f"{upper}_API int {n}_exits_run({POINTERS});",
    ]
    if plan.batch_max:
        lines.append(f"{upper}_API int {n}_exits_run_batch({POINTERS}, int batch);")
    return [*lines, f"{upper}_API const char* {n}_exits_error(int code);",
            f"{upper}_API int {n}_exits_cpu_supported(void);"]


_BYTES = {"input": "m.in[{index}][{offset}]", "output": "m.out[{index}][{offset}]", "arena": "m.arena[{offset}]",
          "weights": "m.weights[{offset}]"}


def sequence(plan: Plan, layer_names: Sequence[str]) -> list[tuple[str, str]]:
    """(condition, function) of every call; the condition is "" where there is none."""
    found = []
    for call, name in zip(plan.calls, layer_names, strict=True):
        tests = [("" if g.holds else "!") + _BYTES[g.arg.kind].format(index=g.arg.index, offset=g.arg.offset)
                 for g in call.guards]
        found.append((" && ".join(tests), name))
    return found


def runs(steps: Sequence[T]) -> list[tuple[Sequence[T], int]]:
    """`steps` as (what comes, how often it comes in a row)."""
    places: dict[T, list[int]] = {}
    for i, step in enumerate(steps):
        places.setdefault(step, []).append(i)
    found: list[tuple[Sequence[T], int]] = []
    plain = i = 0  # steps[plain:i] come once
    while i < len(steps):
        for later in places[steps[i]]:
            length, count = later - i, 1
            while length > 0 and steps[i : i + length] == steps[i + count * length : i + (count + 1) * length]:
                count += 1
            if count >= FEWEST_TURNS:
                found += [(steps[plain:i], 1), (steps[i : i + length], count)]
                plain = i = i + count * length
                break
        else:
            i += 1
    return [run for run in [*found, (steps[plain:], 1)] if run[0]]


def guarded(steps: Sequence[tuple[str, str]], indent: str) -> list[str]:
    """The statements that call these functions on `m`, in loops where they repeat."""
    lines = []
    for group, count in runs(steps):
        if count == 1:
            lines += _statements(group, indent)
            continue
        lines.append(f"{indent}for (int trip = 0; trip < {count}; ++trip) {{")
        # Where no step of a trip runs, nothing changes what the next one tests.
        conditions = [condition.split(" && ") if condition else [] for condition, _ in group]
        common = list(itertools.takewhile(lambda tests: len(set(tests)) == 1, zip(*conditions)))
        if common:
            ends = " || ".join(t[0][1:] if t[0].startswith("!") else f"!{t[0]}" for t in common)
            lines.append(f"{indent}  if ({ends}) break;")
            if len({condition for condition, _ in group}) == 1:
                group = [("", name) for _, name in group]
        lines += [*_statements(group, indent + "  "), f"{indent}}}"]
    return lines


def _statements(steps: Sequence[tuple[str, str]], indent: str) -> list[str]:
    """Calls of functions on `m`, neighbours with the same condition together."""
    lines = []
    for condition, group in itertools.groupby(steps, key=lambda s: s[0]):
        inner = indent + "  " if condition else indent
        body = [f"{inner}{name}(m);" for _, name in group]
        lines += [f"{indent}if ({condition}) {{", *body, f"{indent}}}"] if condition else body
    return lines


def layer_table(names: Sequence[str], several: int = 0, samples: int = 1) -> list[str]:
    """Statements that call the function of number `layer` of `names`, of the `several` first ones for all `samples`."""
    table: list[str] = []
    number, first = [], 0
    for group, count in runs(names):
        if count > 1:
            end = first + len(group) * count
            number += [f"  if (layer >= {end}) {{", f"    at -= {len(group) * (count - 1)};",
                       f"  }} else if (layer >= {first}) {{",
                       f"    at = {len(table)} + (layer - {first}) % {len(group)};", "  }"]
        table += group
        first += len(group) * count
    at = "at" if number else "layer"
    each = ["  Memory m = memory(inputs, outputs, arena);",
            f"  for (; layer < {several} && m.sample < {samples - 1}; ++m.sample) layers[{at}](m);"]
    return [
        "  static void (*const layers[])(const Memory&) = {" + ",\n    ".join(table) + "};",
        *(["  int at = layer;  // trips of a loop are the same functions", *number] if number else []),
        *(each if several else []),
        f"  layers[{at}]({'m' if several else 'memory(inputs, outputs, arena)'});",
    ]


def pointers_of_sample(plan: Plan) -> list[str]:
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


def functions(plan: Plan, steps: Sequence[tuple[str, str]]) -> list[str]:
    """The host program, for the namespace of the model. `steps`: what `sequence` gave."""
    tests = [e for e in plan.exits if e.score is not None]
    out = [
        f"const {_type(plan)} default_thresholds[] = {{{', '.join(literal(e) for e in tests)}}};",
        "",
        "// The exit taken by a run that starts behind the first `from` stages.",
        f"__attribute__((noinline)) static int run_exits({POINTERS},",
        f"                                               const {_type(plan)}* thresholds, int from) {{",
        "  const Memory m = memory(inputs, outputs, arena);",
        "  switch (from) {",
    ]
    started = False
    for step in plan.host:
        e = plan.exits[step.index]
        if step.op == "call":
            s = plan.stages[step.index]
            if started:
                out.append("      [[fallthrough]];")
            out.append(f"    case {step.index}:" if started else "    default:")
            out += guarded(steps[s.first : s.end], "      ")
            started = True
        elif step.op == "leave":
            score = f"*reinterpret_cast<const {_type(plan)}*>(m.out[{e.score}])"
            out.append(f"      if ({score} {e.test} thresholds[{step.index}]) return {step.index};")
        elif step.op == "return":
            out.append(f"      return {step.index};")
        else:
            raise AssertionError(f"no host step {step.op}")
    out += ["  }", "}", ""]
    if plan.batch_max:
        out += [
            f"__attribute__((noinline)) static void run_exits_batch({POINTERS}, int batch,",
            f"                                                      {_tail(plan)}) {{",
            "  for (int b = 0; b < batch; ++b) {",
            *pointers_of_sample(plan),
            "    exit_taken[b] = run_exits(in, out, arena, thresholds, 0);",
            "  }",
            "}",
            "",
        ]
    return out


def entries(plan: Plan, upper: str) -> list[str]:
    """The exported functions."""
    n = plan.name
    resume = (
        "  if (int error = check(inputs, outputs, arena)) return error;\n"
        f"  if (!exit_taken) return {upper}_ERROR_NULL;"
    )
    defaults = "thresholds ? thresholds : default_thresholds"
    out = [
        f'extern "C" int {n}_run_exits({POINTERS},',
        f"    {_tail(plan)}) {{",
        resume,
        f"  *exit_taken = run_exits(inputs, outputs, arena, {defaults}, 0);",
        "  return 0;",
        "}",
        "",
        f'extern "C" int {n}_resume({POINTERS},',
        f"    {_tail(plan)}) {{",
        resume,
        f"  if (*exit_taken < 0 || *exit_taken >= {upper}_EXIT_COUNT) return {upper}_ERROR_EXIT;",
        f"  if (*exit_taken + 1 < {upper}_EXIT_COUNT)",
        f"    *exit_taken = run_exits(inputs, outputs, arena, {defaults}, *exit_taken + 1);",
        "  return 0;",
        "}",
        "",
    ]
    if plan.batch_max:
        out += [
            f'extern "C" int {n}_run_exits_batch({POINTERS}, int batch,',
            f"    {_tail(plan)}) {{",
            resume,
            f"  if (batch < 1 || batch > {upper}_BATCH_MAX) return {upper}_ERROR_BATCH;",
            f"  run_exits_batch(inputs, outputs, arena, batch, {defaults}, exit_taken);",
            "  return 0;",
            "}",
            "",
        ]
    given = [
        f"  if (!inputs || !outputs) return {upper}_ERROR_NULL;",
        f"  const {_type(plan)}* const thresholds = static_cast<const {_type(plan)}*>(inputs[{upper}_INPUT_COUNT]);",
        f"  int32_t* const exit_taken = static_cast<int32_t*>(outputs[{upper}_OUTPUT_COUNT]);",
    ]
    out += [
        f'extern "C" int {n}_exits_run({POINTERS}) {{',
        *given,
        f"  return {n}_run_exits(inputs, outputs, arena, thresholds, exit_taken);",
        "}",
        "",
    ]
    if plan.batch_max:
        out += [
            f'extern "C" int {n}_exits_run_batch({POINTERS}, int batch) {{',
            *given,
            f"  return {n}_run_exits_batch(inputs, outputs, arena, batch, thresholds, exit_taken);",
            "}",
            "",
        ]
    return [
        *out,
        f'extern "C" const char* {n}_exits_error(int code) {{ return {n}_error(code); }}',
        "",
        f'extern "C" int {n}_exits_cpu_supported(void) {{ return {n}_cpu_supported(); }}',
        "",
    ]
