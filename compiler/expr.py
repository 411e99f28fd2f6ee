"""Fused elementwise expressions: the `fn` of a `map` node and the `epilogue` of a kernel node.

The text is a list of steps, `t0=add(x0,x1);t1=relu(t0)`; `x0`, `x1` ... are the operands, the last
step is the result, attributes follow the arguments: `t0=clip(x0,lo=0.0,hi=6.0)`. Every step is an
elementwise operation of the op table, so reference, types and C++ names come from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from skive.errors import InvalidModelError
from skive.types import DType


@dataclass(frozen=True, slots=True)
class Step:
    """`op(args, **attrs)`; an argument is ("x", i) for operand i or ("t", i) for step i."""

    op: str
    args: tuple[tuple[str, int], ...]
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Expr:
    steps: tuple[Step, ...]

    @property
    def arity(self) -> int:
        """One more than the highest operand index used."""
        return 1 + max((i for s in self.steps for k, i in s.args if k == "x"), default=-1)

    def __str__(self) -> str:
        return ";".join(
            f"t{n}={s.op}(" + ",".join([f"{k}{i}" for k, i in s.args]
                                       + [f"{k}={_literal(v)}" for k, v in s.attrs]) + ")"
            for n, s in enumerate(self.steps))

    def then(self, op: str, args: list[int | None], attrs: tuple[tuple[str, Any], ...]) -> Expr:
        """This expression followed by one step; argument None is the current result."""
        last = ("t", len(self.steps) - 1)
        return Expr((*self.steps, Step(op, tuple(last if a is None else ("x", a) for a in args), attrs)))


def _literal(v: Any) -> str:
    return v.value if isinstance(v, DType) else repr(v)


_STEP = re.compile(r"t(\d+)=([a-z_0-9]+)\(([^()]*)\)")


def _value(text: str) -> Any:
    if text in DType.__members__:
        return DType[text]
    if text in ("True", "False"):
        return text == "True"
    if text.startswith("'") and text.endswith("'"):
        return text[1:-1]
    try:
        return int(text)
    except ValueError:
        return float(text)


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """The expression that `text` spells; InvalidModelError if it is not one."""
    steps = []
    for n, part in enumerate(text.split(";")):
        m = _STEP.fullmatch(part.strip())
        if not m or int(m[1]) != n:
            raise InvalidModelError(f"malformed expression step {part!r} in {text!r}")
        args, attrs = [], []
        for a in filter(None, (p.strip() for p in m[3].split(","))):
            if "=" in a:
                k, v = a.split("=", 1)
                attrs.append((k.strip(), _value(v.strip())))
            else:
                if a[0] not in "xt" or not a[1:].isdigit() or (a[0] == "t" and int(a[1:]) >= n):
                    raise InvalidModelError(f"malformed operand {a!r} in {text!r}")
                args.append((a[0], int(a[1:])))
        steps.append(Step(m[2], tuple(args), tuple(attrs)))
    return Expr(tuple(steps))


def merge(outer: Expr, position: int, inner: Expr, inner_inputs: list[int]) -> Expr:
    """`outer` with its operand `position` computed by `inner`.

    `inner_inputs[i]` is the operand index in the merged expression of `inner`'s operand i; the
    caller keeps `outer`'s other operand indices as they are.
    """
    steps = [Step(s.op, tuple(("x", inner_inputs[i]) if k == "x" else (k, i) for k, i in s.args), s.attrs)
             for s in inner.steps]
    base, result = len(steps), ("t", len(steps) - 1)
    for s in outer.steps:
        steps.append(Step(s.op, tuple(result if (k, i) == ("x", position) else (k, i + base) if k == "t"
                                      else (k, i) for k, i in s.args), s.attrs))
    return Expr(tuple(steps))


def renumber(e: Expr, new: list[int]) -> Expr:
    """`e` with operand i called `new[i]`."""
    return Expr(tuple(Step(s.op, tuple(("x", new[i]) if k == "x" else (k, i) for k, i in s.args), s.attrs)
                      for s in e.steps))
