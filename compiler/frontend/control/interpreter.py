"""Runs functions from their syntax trees, both ways at every decision on a tensor."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from skive.errors import first_line
from skive.frontend.control import source, state
from skive.frontend.control.state import Frame, State
from skive.frontend.control.values import (
    UNBOUND,
    Alternatives,
    Cond,
    Deferred,
    Refusal,
    Scalar,
    Truth,
    choose_truth,
    merged,
    resolved,
)

MAX_TURNS = 1000  # of a loop that tensors end

Thunk: TypeAlias = "Callable[[], Outcome | None]"


@dataclass(frozen=True, eq=False)
class End:
    """One way in which statements end: `next`, `return`, `break` or `continue`, the condition, and the state then."""

    condition: Truth
    state: State
    value: Any = None


Outcome: TypeAlias = "dict[str, End]"


class Failed(Exception):
    """Something that is refused, at a line of the user's source; `raised`: by the user's code itself."""

    def __init__(self, where: str, reason: str, hint: str = "", raised: bool = False):
        super().__init__(f"{where}: {reason}")
        self.where, self.reason, self.hint, self.raised = where, reason, hint, raised


class Machine:
    """The frames, forks and joins of one run; statements and expressions stand in the classes on top of it."""

    def __init__(self, interpreted: set[CodeType]):
        self.interpreted = interpreted
        self.frames: list[Frame] = [Frame(None, "", {})]  # the first holds the attributes of modules that forward sets
        self.facts: dict[int, bool] = {}  # id of a condition's tensor -> what it is on this side
        self.branch: list[int] = [0]  # numbers of the sides that we are in, outermost first
        self.branches = 0
        self.born: dict[int, tuple[Tensor, int]] = {}  # id -> (tensor, side that computed it)
        self.chosen: list[tuple[Tensor, int]] = []  # tensors that went into choices, and their versions
        self.choices: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.kept: list[Truth] = []  # an id is that of one object as long as this lives
        self.truths: dict[int, tuple[Tensor, int, Cond]] = {}  # id -> (tensor, its version, condition)
        self.outside: dict[int, tuple[Any, state.Contents]] = {}  # what modules and globals hold, as it was
        self.position: tuple[str, int] = ("", 0)

    # ---- positions

    def where(self) -> str:
        return source.line_of(*self.position)

    def refuse(self, reason: str, hint: str = "") -> Failed:
        return Failed(self.where(), reason, hint)

    @contextlib.contextmanager
    def at(self, node: ast.AST) -> Iterator[None]:
        """The position for messages while `node` is evaluated."""
        before = self.position
        self.position = (self.frames[-1].filename, getattr(node, "lineno", before[1]))
        try:
            yield
        except Failed:
            raise
        except Refusal as e:
            raise self.refuse(e.reason, e.hint) from None
        except Exception as e:  # noqa: BLE001 - what the user's code and torch raise
            inner = source.codes_on(e.__traceback__)
            where = source.line_of(inner[-1][0].co_filename, inner[-1][1]) if inner else self.where()
            if isinstance(e, GuardOnDataDependentSymNode):
                raise Failed(where, "the values of a tensor decide a length",
                             "keep lengths fixed: torch.where, or weights of 0 and 1") from None
            raise Failed(where, f"{type(e).__name__}: {first_line(e)}", raised=True) from None
        finally:
            self.position = before

    # ---- values

    def note(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        """Keeps in mind that `result` is `a` or `b`."""
        self.chosen += [(t, t._version) for t in (a, b)]
        self.choices[id(result)] = (result, [a, b])

    def read(self, value: Any) -> Any:
        """`value` with what was deferred made, as far as this side of the decisions needs it."""
        while isinstance(value, Deferred):
            fact = self.fact(value.condition)
            if fact is None:
                break
            value = value.a if fact else value.b
        if not isinstance(value, Deferred):
            return value
        return resolved(value, self.note)

    def fact(self, c: Truth) -> bool | None:
        """What is known of a condition on this side."""
        if isinstance(c, bool):
            return c
        known = self.facts.get(id(c.tensor))
        return None if known is None else known != c.negated

    def truth(self, value: Any) -> Truth:
        """bool(value); both ways stay open where tensors decide it."""
        if isinstance(value, Alternatives):
            result: Truth = False
            for condition, case in reversed(value.cases):
                result = choose_truth(condition, self.truth(case), result)
            return self.settled(result)
        if isinstance(value, Scalar):
            value = value.tensor
        if not isinstance(value, Tensor):
            return bool(value)
        if value.numel() != 1:
            raise Refusal(f"the truth of a tensor of shape {list(value.shape)}", "use .any() or .all()")
        kept = self.truths.get(id(value))
        if kept is None or kept[1] != value._version:
            flag = value.clone() if value.dtype == torch.bool else value != 0  # as it is now
            kept = value, value._version, Cond(flag if flag.dim() == 0 else flag.reshape(()))
            self.truths[id(value)] = kept
        return self.settled(kept[2])

    def settled(self, c: Truth) -> Truth:
        fact = self.fact(c)
        return c if fact is None else fact

    # ---- forks and joins

    def save(self) -> State:
        return state.save(self.frames)

    def restore(self, s: State) -> None:
        state.restore(self.frames, s)

    def enter(self, condition: Truth, holds: bool) -> None:
        """What follows runs only where the condition is `holds`."""
        self.branches += 1
        self.branch.append(self.branches)
        self.kept.append(condition)
        if isinstance(condition, Cond):
            self.facts = {**self.facts, id(condition.tensor): holds != condition.negated}

    def side(self, condition: Cond, holds: bool, run: Thunk) -> Outcome:
        facts, depth = self.facts, len(self.branch)
        self.enter(condition, holds)
        outcome = run()
        if outcome is None:
            outcome = {"next": End(True, self.save())}
        self.facts = facts
        del self.branch[depth:]
        return outcome

    def fork(self, condition: Truth, then: Thunk, other: Thunk) -> Outcome | None:
        """Runs one side where it is clear which, else both."""
        condition = self.settled(condition)
        if isinstance(condition, bool):
            return then() if condition else other()
        start = self.save()
        a = self.side(condition, True, then)
        self.restore(start)
        b = self.side(condition, False, other)
        return self.settle(self.join(condition, a, b))

    def settle(self, outcome: Outcome) -> Outcome | None:
        """None, with the state restored, if all paths just go on."""
        if outcome.keys() == {"next"} and outcome["next"].value is None:
            self.restore(outcome["next"].state)
            return None
        return outcome

    def join(self, c: Cond, a: Outcome, b: Outcome) -> Outcome:
        """The ends of both sides as those of one."""
        ends = {}
        for kind in {**a, **b}:
            x, y = a.get(kind), b.get(kind)
            if x and y:
                value = None
                if x.value is not None or y.value is not None:
                    value = self.merged(c, x.value, y.value)
                ends[kind] = End(choose_truth(c, x.condition, y.condition),
                                 state.merge(c, x.state, y.state, self.note), value)
            elif x:
                ends[kind] = replace(x, condition=choose_truth(c, x.condition, False))
            elif y:
                ends[kind] = replace(y, condition=choose_truth(c, False, y.condition))
        return ends

    def merged(self, c: Truth, a: Any, b: Any, deep: bool = False) -> Any:
        return merged(c, a, b, self.note, deep)

    def found(self, value: Any) -> Any:
        """`value` of a module or a global; what it holds is kept apart on both sides of a decision."""
        held = state.contents(value)
        if held is not None and id(value) not in self.outside:
            self.outside[id(value)] = (value, held)
            self.frames[0].locals[id(value), ""] = value
        return value

    def check_outside(self) -> None:
        """Refusal, with everything put back, if a list or object of a module or a global has changed."""
        changed = False
        for obj, held in self.outside.values():
            now = state.contents(obj) or {}
            if now.keys() != held.keys() or any(now[k] is not v for k, v in held.items()):
                state.fill(obj, held)
                changed = True
        if changed:
            raise Refusal("forward changes a list or an object that outlives the call",
                          "pass state in as an input and return its new value")

    def distinct(self, a: Any, b: Any) -> bool:
        """`a is not b` of values of which one is a tensor or its number; Refusal where paths differ in that."""
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Scalar) and isinstance(y, (bool, int, float, Scalar)):
                raise Refusal("`is` between numbers of tensors", "use ==")
            todo = self.sources(x) if isinstance(x, Tensor) else []
            while todo:
                one = todo.pop()
                if one is y:
                    raise Refusal("`is` between tensors that are one on some paths", "keep a flag")
                todo = [*todo, *self.sources(one)]
        return a is not b

    def chosen_value(self, condition: Truth, then: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """The value of one of two expressions."""
        condition = self.settled(condition)
        if isinstance(condition, bool):
            return then() if condition else other()
        values = []

        def run(fn: Callable[[], Any]) -> Thunk:
            def go() -> None:
                values.append(fn())

            return go

        self.fork(condition, run(then), run(other))
        return self.merged(condition, *values)

    def each(self, value: Any, fn: Callable[[Any], Any]) -> Any:
        """`fn` of every case of `value`, as one value."""
        value = self.read(value)
        if not isinstance(value, Alternatives):
            return fn(value)
        value = value.without(UNBOUND)
        if not isinstance(value, Alternatives):
            return fn(value)
        (condition, first), *rest = value.cases
        others = rest[0][1] if len(rest) == 1 else Alternatives(tuple(rest))
        return self.chosen_value(condition, lambda: fn(first), lambda: self.each(others, fn))

    def split(self, values: list[Any], fn: Callable[[list[Any]], Any], start: int = 0) -> Any:
        """`fn` of `values` in which no alternatives are left, also inside tuples and lists; from number `start` on."""
        for i in range(start, len(values)):
            value = self.read(values[i])
            before, after = values[:i], values[i + 1:]
            values = [*before, value, *after]
            if isinstance(value, Alternatives):
                def one(v: Any, b: list[Any] = before, a: list[Any] = after, i: int = i) -> Any:
                    return self.split([*b, v, *a], fn, i)

                return self.each(value, one)
            if type(value) in (tuple, list) and any(isinstance(v, (Alternatives, Deferred)) for v in value):
                kind = type(value)

                def filled(items: list[Any], b: list[Any] = before, a: list[Any] = after, i: int = i,
                           kind: Any = kind) -> Any:
                    return self.split([*b, kind(items), *a], fn, i + 1)

                return self.split(list(value), filled)
        return fn(values)

    # ---- changes in place

    def computed(self, tensor: Tensor) -> None:
        self.born.setdefault(id(tensor), (tensor, self.branch[-1]))

    def check_change(self, tensor: Tensor) -> None:
        """Refusal unless changing `tensor` in place concerns this side alone and nothing that was merged."""
        base = tensor._base if tensor._base is not None else tensor
        kept, side = self.born.get(id(base), (None, 0))
        if side != self.branch[-1]:
            raise Refusal("a tensor is changed in place on one side of a decision",
                          "compute a new tensor instead: x = x + y")
        self.check_unshared(base)

    def check_unshared(self, tensor: Tensor) -> None:
        """Refusal if `tensor` may be, on some path, what another variable holds as well."""
        mine = storage(tensor)
        others = {id(t): t for t in state.reachable(state.variables(self.frames)) if isinstance(t, Tensor)}
        for t in others.values():
            if t is not tensor and storage(t) == mine:
                raise Refusal("a tensor is changed in place of which another variable holds a view",
                              "compute a new tensor instead: x = x + y")
        todo, seen = [tensor], set()
        while todo:
            for operand in self.sources(todo.pop()):
                if id(operand) in seen:
                    continue
                seen.add(id(operand))
                todo.append(operand)
                if id(operand) in others and operand is not tensor:
                    raise Refusal("a tensor is changed in place that is another variable's on some paths",
                                  "compute a new tensor instead: x = x + y")

    def sources(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of which `tensor` is one, by a choice."""
        return self.choices.get(id(tensor), (None, []))[1]

    def check_versions(self) -> None:
        """Refusal if a tensor changed after it had gone into a choice."""
        for tensor, version in self.chosen:
            if tensor._version != version:
                raise Refusal("a tensor is changed in place after a decision on which it depends whether a result "
                              "is this tensor", "compute a new tensor instead: x = x + y")

    # ---- functions

    def interprets(self, fn: Any) -> bool:
        fn = undecorated(fn.__func__ if isinstance(fn, MethodType) else fn)
        return isinstance(fn, FunctionType) and fn.__code__ in self.interpreted

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of an interpreted function's call."""
        if isinstance(fn, MethodType):
            args = (fn.__self__, *args)
            fn = fn.__func__
        whole, fn = fn, undecorated(fn)
        assert isinstance(fn, FunctionType)
        try:
            node = source.definition(fn.__code__)
        except Refusal as e:
            raise Failed(source.line_of(fn.__code__.co_filename, fn.__code__.co_firstlineno), e.reason,
                         e.hint) from None
        bound = inspect.signature(fn, follow_wrapped=False).bind(*args, **kwargs)
        bound.apply_defaults()
        quiet = torch.no_grad() if whole is not fn else contextlib.nullcontext()
        with quiet:
            return self.body(node, Frame(fn, fn.__code__.co_filename, dict(bound.arguments)))

    def body(self, node: source.Definition, frame: Frame) -> Any:
        """The value that a function's statements return."""
        if len(self.frames) > 100:
            raise self.refuse("more than 100 calls inside each other", "write a loop")
        before = self.position
        self.frames.append(frame)
        try:
            if isinstance(node, ast.Lambda):
                return self.evaluate(node.body)
            outcome = self.block(node.body)
        finally:
            self.frames.pop()
            self.position = before
        if outcome is None:
            return None
        ends = [outcome[k] for k in ("return", "next") if k in outcome]
        end = ends[0]
        if len(ends) == 2:
            end = End(True, state.merge(ends[0].condition, ends[0].state, ends[1].state, self.note),
                      self.merged(ends[0].condition, ends[0].value, None))
        self.restore(end.state)
        return end.value

    def block(self, statements: list[ast.stmt]) -> Outcome | None:
        raise NotImplementedError

    def evaluate(self, node: ast.expr) -> Any:
        raise NotImplementedError

    def assign(self, target: ast.expr, value: Any) -> None:
        raise NotImplementedError


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def undecorated(fn: Any) -> Any:
    """The function inside `@torch.no_grad()` and its like."""
    while isinstance(fn, FunctionType) and hasattr(fn, "__wrapped__"):
        if not fn.__code__.co_filename.startswith(source.TORCH):
            break
        fn = fn.__wrapped__
    return fn
