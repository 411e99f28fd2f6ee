"""The state of an interpreted program: what a fork saves, restores and merges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from skive.frontend.control.values import (
    UNBOUND,
    Alternatives,
    Cond,
    Deferred,
    Note,
    Refusal,
    Truth,
    alternatives,
    choose_truth,
    exclusive,
    merged,
    same,
)


@dataclass(eq=False)
class Frame:
    """A running function: its variables, and where free and global names are found."""

    function: FunctionType | None
    filename: str
    locals: dict[Any, Any]
    outer: Frame | None = None  # of a function that was defined while interpreting
    declared: set[str] = field(default_factory=set)  # global and nonlocal

    @property
    def globals(self) -> dict[str, Any]:
        return self.function.__globals__ if self.function else {}


Contents = dict[Any, Any]


@dataclass(frozen=True, eq=False)
class State:
    """Variables of every frame, outermost first, and what stands in the containers that they reach."""

    frames: tuple[dict[Any, Any], ...]
    heap: dict[int, tuple[Any, Contents]]  # id -> (container, contents)


def contents(obj: Any) -> Contents | None:
    """What a mutable object holds, by position or key; None of what is not looked into."""
    if type(obj) is list:
        return dict(enumerate(obj))
    if type(obj) is dict:
        return dict(obj)
    if type(obj) is set:
        return dict.fromkeys(obj)
    if isinstance(obj, (torch.nn.Module, Tensor, type, FunctionType)):
        return None
    foreign = type(obj).__module__.startswith(("builtins", "torch.", "skive.frontend.control"))
    if not foreign and isinstance(getattr(obj, "__dict__", None), dict):
        return dict(vars(obj))
    return None


def fill(obj: Any, held: Contents) -> None:
    """Makes `held` the contents of `obj`."""
    if type(obj) is list:
        obj[:] = held.values()
    elif type(obj) is set:
        obj.clear()
        obj.update(held)
    else:
        target = obj if type(obj) is dict else vars(obj)
        target.clear()
        target.update(held)


def reachable(roots: Iterator[Any]) -> Iterator[Any]:
    """Tensors and containers that variables hold, at any depth."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Alternatives):
            todo.extend(v for _, v in value.cases)
        elif isinstance(value, Deferred):
            todo += [value.a, value.b]
        elif isinstance(value, tuple):
            todo.extend(value)
        elif isinstance(value, Tensor):
            yield value
        else:
            held = contents(value)
            if held is not None:
                yield value
                todo.extend(held.values())


def variables(frames: list[Frame]) -> Iterator[Any]:
    for frame in frames:
        yield from frame.locals.values()


def save(frames: list[Frame]) -> State:
    heap = {}
    for value in reachable(variables(frames)):
        held = contents(value)
        if held is not None:
            heap[id(value)] = (value, held)
    return State(tuple(dict(f.locals) for f in frames), heap)


def restore(frames: list[Frame], state: State) -> None:
    for frame, names in zip(frames, state.frames):
        frame.locals = dict(names)
    for obj, held in state.heap.values():
        now = contents(obj)
        if now is None or now.keys() != held.keys() or any(now[k] is not v for k, v in held.items()):
            fill(obj, held)


def merge(c: Truth, a: State, b: State, note: Note) -> State:
    """The state behind a decision: of `a` where the condition holds, else of `b`."""
    if isinstance(c, bool):
        return a if c else b
    heap = {**b.heap, **a.heap}
    torn: dict[int, Alternatives] = {}
    for key in a.heap.keys() & b.heap.keys():
        obj, left = a.heap[key]
        right = b.heap[key][1]
        if left.keys() == right.keys() and all(map(same, left.values(), right.values())):
            continue
        if list(left) == list(right) and type(obj) is not set or not isinstance(obj, (list, set, dict)):
            heap[key] = obj, {k: deferred(c, left.get(k, UNBOUND), right.get(k, UNBOUND), note, at_once=True)
                              for k in {**right, **left}}
        else:
            copies = []
            for held in (left, right):
                copies.append(type(obj)())
                fill(copies[-1], held)
            torn[key] = Alternatives(((c, copies[0]), (True, copies[1])))
            del heap[key]  # from here on there are two objects in its place
    frames = []
    for left, right in zip(a.frames, b.frames):
        names = {}
        for name in {**left, **right}:
            x, y = left.get(name, UNBOUND), right.get(name, UNBOUND)
            if torn and x is y and isinstance(x, Alternatives):
                names[name] = renewed(x, torn, note)
            else:
                names[name] = torn[id(x)] if id(x) in torn and x is y else deferred(c, x, y, note)
        frames.append(names)
    if torn:
        top = {id(v) for names in a.frames for value in names.values() for v in cases_of(value)}
        inner = {id(v) for names in frames for v in reachable(iter(names.values()))}
        if torn.keys() - top or torn.keys() & inner:
            raise Refusal("a list that stands inside another object has different lengths on different paths",
                          "keep it in a variable of its own")
    return State(tuple(frames), heap)


def cases_of(value: Any) -> list[Any]:
    return [v for _, v in value.cases] if isinstance(value, Alternatives) else [value]


def renewed(value: Alternatives, torn: dict[int, Alternatives], note: Note) -> Any:
    """`value` with both contents of lists that differ, each where it is the one."""
    cases: list[tuple[Truth, Any]] = []
    for full, case in exclusive(value):
        if id(case) in torn:
            (c, x), (_, y) = torn[id(case)].cases
            cases += [(choose_truth(c, full, False), x), (choose_truth(c, False, full), y)]
        else:
            cases.append((full, case))
    return alternatives(cases, note)


def deferred(c: Cond, a: Any, b: Any, note: Note, at_once: bool = False) -> Any:
    """The merge of two values, as late as may be."""
    if same(a, b):
        return a
    return merged(c, a, b, note) if at_once else Deferred(c, a, b)
