"""A kernel call -> a C++ function: the template instance, the lambda of what is fused into it, its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from skive.plan import Access, Call, Fn

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


def body(call: Call, threads: int) -> str:
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


def signature(call: Call, name: str, threads: int) -> str:
    """The declaration of the function `name` that makes `call`."""
    declared = [f"{'const ' if a.const else ''}{a.ctype}* {a.name}" for a in call.args] + ["Part part"]
    return f"void {name}({_parameters(declared, body(call, threads))})"


def headers_of(calls: Sequence[Call]) -> list[str]:
    """The kernel headers that these calls need."""
    return sorted({c.header for c in calls} | {"functions.h" for c in calls if c.fn and c.fn.steps})
