"""The statements of Python as the interpreter runs them."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from skive.frontend.control import state
from skive.frontend.control.expressions import OPERATORS, Closure, Expressions, Turns
from skive.frontend.control.interpreter import MAX_TURNS, End, Outcome, storage
from skive.frontend.control.values import Alternatives, Cond, Refusal, Scalar, Truth, choose_truth

Turn = tuple[Truth, Callable[[], None]]  # whether there is one, and what binds its item


class Sets(BaseException):
    """`forward` sets an attribute of a module; another run takes care that nothing reads what it was before."""

    def __init__(self, holder: nn.Module, name: str):
        super().__init__(name)
        self.holder, self.name = holder, name


class Stale:
    """Stands in an attribute of a module that `forward` sets: what a call before left there is not known."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<what an earlier call left in {self.name}>"


class Interpreter(Expressions):
    """Statements; every method gives the ways in which its statement ends, None if it just ends."""

    def block(self, statements: list[ast.stmt]) -> Outcome | None:
        for i, statement in enumerate(statements):
            with self.at(statement):
                outcome = self.execute(statement)
            if outcome is None:
                continue
            onward = outcome.pop("next", None)
            if onward is None:
                return outcome
            self.restore(onward.state)
            if not outcome:
                continue
            rest = statements[i + 1:]
            return self.beside(onward.condition, outcome, functools.partial(self.block, rest))
        return None

    def beside(self, condition: Truth, ended: Outcome, run: Callable[[], Outcome | None]) -> Outcome:
        """What runs where `condition` holds, and the ends of where it does not."""
        if not isinstance(condition, Cond):
            return run() or {"next": End(True, self.save())}
        return self.join(condition, self.side(condition, True, run), ended)

    def execute(self, statement: ast.stmt) -> Outcome | None:
        method = getattr(self, f"do_{type(statement).__name__}", None)
        if method is None:
            name = type(statement).__name__.lower().removeprefix("async")
            raise Refusal(f"`{name}` in a function that decides on tensors",
                          "move the decision or this statement into a function of its own")
        return method(statement)

    # ---- straight lines

    def do_Expr(self, s: ast.Expr) -> None:
        self.evaluate(s.value)

    def do_Pass(self, s: ast.Pass) -> None:
        pass

    def do_Assign(self, s: ast.Assign) -> None:
        value = self.evaluate(s.value)
        for target in s.targets:
            self.assign(target, value)

    def do_AnnAssign(self, s: ast.AnnAssign) -> None:
        if s.value is not None:
            self.assign(s.target, self.evaluate(s.value))

    def do_AugAssign(self, s: ast.AugAssign) -> None:
        target = s.target
        if isinstance(target, ast.Name):
            holder: Any = None
            key: Any = None
            value = self.evaluate(ast.copy_location(ast.Name(target.id, ast.Load()), target))
        elif isinstance(target, ast.Attribute):
            holder, key = self.evaluate(target.value), target.attr
            value = self.attribute(holder, key)
        else:
            holder, key = self.evaluate(target.value), self.evaluate(target.slice)
            value = self.subscript(holder, key)
        operand = self.evaluate(s.value)
        plain, in_place = OPERATORS[type(s.op)]
        if isinstance(value, Tensor) and not isinstance(target, ast.Subscript):
            new = self.native(plain, [value, operand])
            if not isinstance(new, Tensor) or new.shape != value.shape:
                raise Refusal("a tensor changed in place would change its shape", "write x = x + y")
            self.replace(value, new.to(value.dtype))
            return
        if isinstance(value, (Scalar, Tensor)):
            in_place = plain
        value = self.native(in_place, [value, operand])
        if isinstance(target, ast.Name):
            self.frames[-1].locals[target.id] = value
        elif isinstance(target, ast.Attribute):
            self.set_attribute(holder, key, value)
        else:
            self.set_item(holder, key, value)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """`new` is what `old` holds from now on, wherever it stands: a change in place, of all its names at once."""
        self.check_unshared(old)
        if any(storage(old) == storage(t) for t in self.given):
            raise Refusal("forward writes to an input or a weight", "write x = x + y")
        for value in state.reachable(state.variables(self.frames)):
            held = state.contents(value)
            if held is not None and any(v is old for v in held.values()):
                state.fill(value, {k: new if v is old else v for k, v in held.items()})
            if held is not None and any(type(v) is tuple and any(x is old for x in v) for v in held.values()):
                raise Refusal("a tensor in a tuple is changed in place", "write x = x + y")
        for frame in self.frames:
            for name, value in frame.locals.items():
                if value is old:
                    frame.locals[name] = new
                elif type(value) is tuple and any(v is old for v in value):
                    frame.locals[name] = tuple(new if v is old else v for v in value)
                elif not isinstance(value, Tensor) and state.contents(value) is None and any(
                        t is old for t in state.reachable(iter([value]))):
                    frame.locals[name] = self.read(value)
                    if any(t is old for t in state.reachable(iter([frame.locals[name]]))):
                        raise Refusal(f"{name} may hold a tensor that is changed in place", "write x = x + y")

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            if target.id in self.frames[-1].declared:
                raise Refusal(f"{target.id} is not a variable of this function", "return its new value")
            self.frames[-1].locals[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self.unpack(target.elts, value)
        elif isinstance(target, ast.Attribute):
            self.set_attribute(self.evaluate(target.value), target.attr, value)
        elif isinstance(target, ast.Subscript):
            holder = self.evaluate(target.value)
            key = self.evaluate(target.slice)
            if isinstance(holder, Tensor):
                new = holder.clone()
                self.write_item(new, key, value)
                self.replace(holder, new)
            else:
                self.set_item(holder, key, value)
        else:
            raise Refusal("a starred target", "take the items apart by position")

    def unpack(self, targets: list[ast.expr], value: Any) -> None:
        value = self.read(value)
        if isinstance(value, Alternatives):
            lengths = {len(v) if isinstance(v, (list, tuple)) else -1 for _, v in value.cases}
            if len(lengths) > 1 or -1 in lengths:
                raise Refusal("what is taken apart here has another form on each path",
                              "let all paths give equal forms")
            value = [self.each(value, operator.itemgetter(i)) for i in range(lengths.pop())]
        if isinstance(value, Scalar):
            raise Refusal("a number of a tensor is taken apart", "")
        items = list(value)
        starred = [i for i, t in enumerate(targets) if isinstance(t, ast.Starred)]
        if starred:
            at, rest = starred[0], len(items) - len(targets) + 1
            if rest < 0:
                raise ValueError(f"not enough values to unpack (expected at least {len(targets) - 1})")
            items[at:at + rest] = [items[at:at + rest]]
            targets = [t.value if isinstance(t, ast.Starred) else t for t in targets]
        for target, item in zip(targets, items, strict=True):
            self.assign(target, item)

    def set_attribute(self, holder: Any, name: str, value: Any) -> None:
        holder = self.read(holder)
        if isinstance(holder, nn.Module):
            if name in holder._parameters or name in holder._buffers or name in holder._modules:
                raise Refusal(f"forward sets {name} of {type(holder).__name__}",
                              "pass state in as an input and return its new value")
            if not isinstance(holder.__dict__.get(name), Stale):
                raise Sets(holder, name)
            self.frames[0].locals[id(holder), name] = value
        elif isinstance(holder, (Alternatives, Scalar, Tensor, type)) or state.contents(holder) is None:
            raise Refusal(f"an attribute of {type(holder).__name__} is set", "keep the value in a variable")
        else:
            setattr(holder, name, value)

    def set_item(self, holder: Any, key: Any, value: Any) -> None:
        def store(parts: list[Any]) -> None:
            obj, at = parts
            if isinstance(at, Scalar):
                raise Refusal("a tensor decides where in a list a value is stored", "keep the values in a tensor")
            obj[at] = value

        self.split([holder, key], store)

    def do_Delete(self, s: ast.Delete) -> None:
        for target in s.targets:
            if not isinstance(target, ast.Name):
                raise Refusal("only variables can be deleted here", "")
            self.frames[-1].locals.pop(target.id, None)

    def do_Global(self, s: ast.Global | ast.Nonlocal) -> None:
        self.frames[-1].declared.update(s.names)

    do_Nonlocal = do_Global

    def do_Import(self, s: ast.Import) -> None:
        for alias in s.names:
            module = __import__(alias.name, self.frames[-1].globals)
            if alias.asname:
                for part in alias.name.split(".")[1:]:
                    module = getattr(module, part)
            self.frames[-1].locals[alias.asname or alias.name.split(".")[0]] = module

    def do_ImportFrom(self, s: ast.ImportFrom) -> None:
        module = __import__(s.module or "", self.frames[-1].globals, None, [a.name for a in s.names], s.level)
        for alias in s.names:
            self.frames[-1].locals[alias.asname or alias.name] = getattr(module, alias.name)

    def do_FunctionDef(self, s: ast.FunctionDef) -> None:
        if s.decorator_list:
            raise Refusal("a decorated function inside a function that decides on tensors", "define it outside")
        self.frames[-1].locals[s.name] = Closure(self, s, self.frames[-1])

    def do_With(self, s: ast.With) -> Outcome | None:
        managers = []
        for item in s.items:
            manager = self.evaluate(item.context_expr)
            value = manager.__enter__()
            managers.append(manager)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, value)
        try:
            return self.block(s.body)
        finally:
            for manager in reversed(managers):
                manager.__exit__(None, None, None)

    def do_Assert(self, s: ast.Assert) -> None:
        holds = self.condition(s.test)
        if isinstance(holds, Cond):
            raise Refusal("whether an assertion holds depends on a tensor", "a compiled network raises nothing: "
                          "check the inputs before the call")
        if not holds:
            raise AssertionError(self.evaluate(s.msg) if s.msg else "")

    def do_Raise(self, s: ast.Raise) -> None:
        if len(self.branch) > 1:
            raise Refusal("whether this is raised depends on a tensor", "a compiled network raises nothing: check the "
                          "inputs before the call, or give the result for this case")
        error = self.evaluate(s.exc) if s.exc else RuntimeError("raise")
        raise error

    # ---- ways out

    def do_Return(self, s: ast.Return) -> Outcome:
        value = self.evaluate(s.value) if s.value else None
        return {"return": End(True, self.save(), value)}

    def do_Break(self, s: ast.Break) -> Outcome:
        return {"break": End(True, self.save())}

    def do_Continue(self, s: ast.Continue) -> Outcome:
        return {"continue": End(True, self.save())}

    # ---- decisions

    def do_If(self, s: ast.If) -> Outcome | None:
        return self.fork(self.condition(s.test), lambda: self.block(s.body), lambda: self.block(s.orelse))

    def do_For(self, s: ast.For) -> Outcome | None:
        return self.for_each(s, self.evaluate(s.iter))

    def for_each(self, s: ast.For, value: Any) -> Outcome | None:
        value = self.read(value)
        if isinstance(value, Alternatives):
            (condition, first), *rest = value.cases
            others = rest[0][1] if len(rest) == 1 else Alternatives(tuple(rest))
            return self.fork(condition, lambda: self.for_each(s, first), lambda: self.for_each(s, others))
        if isinstance(value, Scalar):
            raise Refusal("a number of a tensor is iterated over", "use range(min(n, N))")

        def turns() -> Iterator[Turn]:
            def bind(item: Any) -> Callable[[], None]:
                return lambda: self.assign(s.target, item)

            if isinstance(value, Turns):
                for i in range(value.bound):
                    yield self.truth(operator.gt(value.count, i)), bind(value.start + i)
            else:
                for item in value:
                    yield True, bind(item)

        return self.loop(turns(), s)

    def do_While(self, s: ast.While) -> Outcome | None:
        def turns() -> Iterator[Turn]:
            while True:
                yield self.condition(s.test), lambda: None

        return self.loop(turns(), s)

    def loop(self, turns: Iterator[Turn], s: ast.For | ast.While) -> Outcome | None:
        """The turns of a loop one behind the other, those behind a way out only where it is not taken."""
        depth, facts = len(self.branch), self.facts
        left: list[tuple[Cond, Outcome]] = []  # where it goes on, and the ends where it does not
        result: Outcome | None = None
        for number, (more, bind) in enumerate(turns):
            more = self.settled(more)
            if number >= MAX_TURNS and (left or isinstance(more, Cond)):
                raise Refusal(f"no end of this loop is in sight after {MAX_TURNS} turns: only tensors end it",
                              "give it a bound: `while ... and i < N`, or `for i in range(N)` with a break")
            if more is False:
                break
            if isinstance(more, Cond):
                left.append((more, {"done": End(True, self.save())}))
                self.enter(more, True)
            bind()
            outcome = self.block(s.body)
            if outcome is None:
                continue
            again = self.again(outcome)
            if again is None:  # every path leaves the loop in this turn
                result = self.after(outcome)
                break
            self.restore(again.state)
            if isinstance(again.condition, Cond):
                left.append((again.condition, outcome))
                self.enter(again.condition, True)
        if result is None:
            result = self.block(s.orelse) or {"next": End(True, self.save())}
        for condition, ended in reversed(left):
            ended = self.otherwise(ended["done"], s, condition) if "done" in ended else self.after(ended)
            result = self.join(condition, result, ended)
        del self.branch[depth:]
        self.facts = facts
        return self.settle(result)

    def otherwise(self, end: End, s: ast.For | ast.While, condition: Cond) -> Outcome:
        """What follows when a tensor says that there is no further turn."""
        if not s.orelse:
            return {"next": end}
        self.restore(end.state)
        return self.side(condition, False, lambda: self.block(s.orelse))  # the condition is false here

    def after(self, outcome: Outcome) -> Outcome:
        """A turn's ends as those of the loop: what breaks goes on behind it."""
        if "break" not in outcome:
            return outcome
        rest = {k: v for k, v in outcome.items() if k != "break"}
        end = outcome["break"]
        if "next" not in rest:
            return {**rest, "next": end}
        both = rest.pop("next")
        return {**rest, "next": self.united(end, both)}

    def again(self, outcome: Outcome) -> End | None:
        """Takes what leads to another turn out of `outcome`."""
        ends = [outcome.pop(k) for k in ("next", "continue") if k in outcome]
        if not ends:
            return None
        return self.united(*ends) if len(ends) == 2 else ends[0]

    def united(self, a: End, b: End) -> End:
        """Two ends that lead to the same place."""
        if not isinstance(a.condition, Cond):
            return a
        return End(choose_truth(a.condition, True, b.condition),
                   state.merge(a.condition, a.state, b.state, self.note))
