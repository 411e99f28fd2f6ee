"""The expressions of Python as the interpreter evaluates them."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn

from skive.frontend.control.interpreter import Machine
from skive.frontend.control.state import Frame
from skive.frontend.control.values import (
    UNBOUND,
    Alternatives,
    Decides,
    Refusal,
    Scalar,
    Truth,
    Unbound,
    as_bool,
    choose_truth,
    negation,
    spread,
)

Pair = tuple[Callable[..., Any], Callable[..., Any]]

OPERATORS: dict[type, Pair] = {
    ast.Add: (operator.add, operator.iadd), ast.Sub: (operator.sub, operator.isub),
    ast.Mult: (operator.mul, operator.imul), ast.Div: (operator.truediv, operator.itruediv),
    ast.FloorDiv: (operator.floordiv, operator.ifloordiv), ast.Mod: (operator.mod, operator.imod),
    ast.Pow: (operator.pow, operator.ipow), ast.MatMult: (operator.matmul, operator.imatmul),
    ast.BitAnd: (operator.and_, operator.iand), ast.BitOr: (operator.or_, operator.ior),
    ast.BitXor: (operator.xor, operator.ixor), ast.LShift: (operator.lshift, operator.ilshift),
    ast.RShift: (operator.rshift, operator.irshift),
}
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge}
MATH = {f"{k}": getattr(torch, k) for k in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tanh")}


class Closure:
    """A function that interpreted code defines."""

    def __init__(self, machine: Expressions, node: ast.FunctionDef | ast.Lambda, outer: Frame):
        self.machine, self.node, self.outer = machine, node, outer
        self.defaults = [machine.evaluate(d) for d in node.args.defaults]
        self.kw_defaults = [None if d is None else machine.evaluate(d) for d in node.args.kw_defaults]
        self.__name__ = getattr(node, "name", "<lambda>")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        a, kind = self.node.args, inspect.Parameter
        before = a.posonlyargs + a.args
        absent = [kind.empty] * (len(before) - len(self.defaults))
        parameters = [kind(p.arg, kind.POSITIONAL_OR_KEYWORD, default=d)
                      for p, d in zip(before, absent + self.defaults)]
        if a.vararg:
            parameters.append(kind(a.vararg.arg, kind.VAR_POSITIONAL))
        parameters += [kind(p.arg, kind.KEYWORD_ONLY, default=kind.empty if d is None else d)
                       for p, d in zip(a.kwonlyargs, self.kw_defaults)]
        if a.kwarg:
            parameters.append(kind(a.kwarg.arg, kind.VAR_KEYWORD))
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
        bound.apply_defaults()
        frame = Frame(self.outer.function, self.outer.filename, dict(bound.arguments), self.outer)
        return self.machine.body(self.node, frame)


@dataclass(frozen=True)
class Turns:
    """range(start, n) where `count`, the number of turns, is a tensor's and not above `bound`."""

    start: int
    count: Scalar
    bound: int


class Expressions(Machine):
    """Expressions; every method gives the value of its node."""

    given: list[Tensor]  # inputs and weights

    def evaluate(self, node: ast.expr) -> Any:
        method = getattr(self, f"get_{type(node).__name__}", None)
        with self.at(node):
            if method is None:
                raise Refusal(f"{type(node).__name__} in a function that decides on tensors", "write it another way")
            return self.read(method(node))

    def condition(self, node: ast.expr) -> Truth:
        """bool(node), with both ways open where tensors decide."""
        with self.at(node):
            if isinstance(node, ast.BoolOp):
                return self.conditions(node.values, isinstance(node.op, ast.And))
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                return negation(self.condition(node.operand))
            return self.truth(self.evaluate(node))

    def conditions(self, nodes: list[ast.expr], both: bool) -> Truth:
        first = self.condition(nodes[0])
        if len(nodes) == 1:
            return first
        found: list[Truth] = []

        def rest() -> None:
            found.append(self.conditions(nodes[1:], both))

        def nothing() -> None:
            found.append(not both)

        self.fork(first, *((rest, nothing) if both else (nothing, rest)))
        if len(found) == 1:
            return found[0]
        return self.settled(choose_truth(first, *found))

    # ---- names and constants

    def get_Constant(self, n: ast.Constant) -> Any:
        return n.value

    def get_Name(self, n: ast.Name) -> Any:
        frame: Frame | None = self.frames[-1]
        while frame is not None:
            if n.id in frame.locals:
                value = self.read(frame.locals[n.id])
                if isinstance(value, Alternatives):
                    value = value.without(UNBOUND)
                frame.locals[n.id] = value
                if isinstance(value, Unbound):
                    raise UnboundLocalError(f"{n.id} has no value here")
                return value
            if frame.outer is None:
                break
            frame = frame.outer
        assert frame is not None and frame.function is not None
        fn = frame.function
        if n.id in fn.__code__.co_freevars:
            return self.found((fn.__closure__ or ())[fn.__code__.co_freevars.index(n.id)].cell_contents)
        if n.id in fn.__globals__:
            return self.found(fn.__globals__[n.id])
        if hasattr(builtins, n.id):
            return getattr(builtins, n.id)
        raise NameError(f"name {n.id!r} is not defined")

    def get_NamedExpr(self, n: ast.NamedExpr) -> Any:
        value = self.evaluate(n.value)
        self.frames[-1].locals[n.target.id] = value
        return value

    def get_JoinedStr(self, n: ast.JoinedStr) -> Any:
        return self.split([self.evaluate(v) for v in n.values], "".join)

    def get_FormattedValue(self, n: ast.FormattedValue) -> str:
        value = self.evaluate(n.value)
        spec = self.evaluate(n.format_spec) if n.format_spec else ""
        if isinstance(value, Scalar) and value.values:
            value = spread(value)
        if isinstance(value, (Scalar, Alternatives, Tensor)):
            return self.each(value, lambda v: self.written(v, n.conversion, spec))
        return self.written(value, n.conversion, spec)

    def written(self, value: Any, conversion: int, spec: str) -> str:
        if isinstance(value, (Scalar, Tensor)):
            raise Refusal("the value of a tensor is written into text", "leave the text out of forward")
        converted = {-1: lambda: value, 115: lambda: str(value), 114: lambda: repr(value), 97: lambda: ascii(value)}
        return format(converted[conversion](), spec)

    # ---- containers

    def items(self, nodes: list[ast.expr]) -> list[Any]:
        found = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                value = self.evaluate(node.value)
                if isinstance(value, (Alternatives, Scalar)):
                    raise Refusal("what is taken apart here has another form on each path", "")
                found.extend(value)
            else:
                found.append(self.evaluate(node))
        return found

    def get_Tuple(self, n: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.items(n.elts))

    def get_List(self, n: ast.List) -> list[Any]:
        return self.items(n.elts)

    def get_Set(self, n: ast.Set) -> set[Any]:
        return set(self.items(n.elts))

    def get_Dict(self, n: ast.Dict) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(n.keys, n.values):
            if key is None:
                found.update(self.evaluate(value))
            else:
                found[self.evaluate(key)] = self.evaluate(value)
        return found

    def comprehension(self, generators: list[ast.comprehension], make: Callable[[], Any]) -> Iterator[Any]:
        """`make()` for every turn, in a scope of its own."""
        if not generators:
            yield make()
            return
        first, *rest = generators
        items = self.evaluate(first.iter)
        if isinstance(items, (Turns, Alternatives, Scalar)):
            raise Refusal("a tensor decides how long a list becomes", "write a loop that ends with a break")
        for item in items:
            self.assign(first.target, item)
            keep = [self.condition(test) for test in first.ifs]
            if any(not isinstance(k, bool) for k in keep):
                raise Refusal("a tensor decides how long a list becomes", "write a loop that ends with a break")
            if all(keep):
                yield from self.comprehension(rest, make)

    def listed(self, n: Any, make: Callable[[], Any]) -> list[Any]:
        names = {x.id for g in n.generators for x in ast.walk(g.target) if isinstance(x, ast.Name)}
        hidden = {k: self.frames[-1].locals[k] for k in names if k in self.frames[-1].locals}
        found = list(self.comprehension(n.generators, make))
        for name in names:
            self.frames[-1].locals.pop(name, None)
        self.frames[-1].locals.update(hidden)
        return found

    def get_ListComp(self, n: ast.ListComp) -> list[Any]:
        return self.listed(n, lambda: self.evaluate(n.elt))

    get_GeneratorExp = get_ListComp

    def get_SetComp(self, n: ast.SetComp) -> set[Any]:
        return set(self.listed(n, lambda: self.evaluate(n.elt)))

    def get_DictComp(self, n: ast.DictComp) -> dict[Any, Any]:
        return dict(self.listed(n, lambda: (self.evaluate(n.key), self.evaluate(n.value))))

    def get_Slice(self, n: ast.Slice) -> Any:
        lower, upper, step = (None if p is None else self.evaluate(p) for p in (n.lower, n.upper, n.step))
        return slice(lower, upper, step)

    def get_Lambda(self, n: ast.Lambda) -> Closure:
        return Closure(self, n, self.frames[-1])

    # ---- operators

    def get_BoolOp(self, n: ast.BoolOp) -> Any:
        def rest(i: int) -> Any:
            value = self.evaluate(n.values[i])
            if i + 1 == len(n.values):
                return value
            ways = (lambda: rest(i + 1)), (lambda: value)
            return self.chosen_value(self.truth(value), *(ways if isinstance(n.op, ast.And) else reversed(ways)))

        return rest(0)

    def get_UnaryOp(self, n: ast.UnaryOp) -> Any:
        if isinstance(n.op, ast.Not):
            return self.flag(negation(self.condition(n.operand)))
        return self.native(UNARY[type(n.op)], [self.evaluate(n.operand)])

    def flag(self, c: Truth) -> Any:
        """A bool as a value."""
        return c if isinstance(c, bool) else Scalar(as_bool(c), bool)

    def get_BinOp(self, n: ast.BinOp) -> Any:
        return self.native(OPERATORS[type(n.op)][0], [self.evaluate(n.left), self.evaluate(n.right)])

    def get_Compare(self, n: ast.Compare) -> Any:
        left = self.evaluate(n.left)

        def rest(i: int, left: Any) -> Any:
            right = self.evaluate(n.comparators[i])
            value = self.compared(n.ops[i], left, right)
            if i + 1 == len(n.ops):
                return value
            return self.chosen_value(self.truth(value), lambda: rest(i + 1, right), lambda: value)

        return rest(0, left)

    def compared(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, (ast.Is, ast.IsNot)):
            differs = self.split([left, right], lambda v: self.distinct(*v))
            return differs if isinstance(op, ast.IsNot) else self.flag(negation(self.truth(differs)))
        if not isinstance(op, (ast.In, ast.NotIn)):
            return self.native(COMPARE[type(op)], [left, right])

        def within(parts: list[Any]) -> Any:
            value, holder = parts
            if not isinstance(value, (Scalar, Tensor)) and not any(
                    isinstance(h, Scalar) for h in (holder if isinstance(holder, (list, tuple)) else ())):
                return value in holder
            if isinstance(holder, Tensor):
                raise Refusal("`in` a tensor", "use (tensor == value).any()")
            found: Truth = False
            for item in holder:
                found = choose_truth(found, True, self.truth(self.native(operator.eq, [value, item])))
            return self.flag(found)

        found = self.split([left, right], within)
        return self.flag(negation(self.truth(found))) if isinstance(op, ast.NotIn) else found

    def get_IfExp(self, n: ast.IfExp) -> Any:
        return self.chosen_value(self.condition(n.test), lambda: self.evaluate(n.body), lambda: self.evaluate(n.orelse))

    # ---- attributes and items

    def get_Attribute(self, n: ast.Attribute) -> Any:
        return self.attribute(self.evaluate(n.value), n.attr)

    def attribute(self, holder: Any, name: str) -> Any:
        if isinstance(holder, Alternatives):
            return self.each(holder, lambda h: self.attribute(h, name))
        if isinstance(holder, nn.Module):
            set_here = self.frames[0].locals
            if (id(holder), name) in set_here:
                value = self.read(set_here[id(holder), name])
                if not any(isinstance(v, Unbound) for v in _cases(value)):
                    return value
                raise Refusal(f"{name} of {type(holder).__name__} is read, which an earlier call may have set",
                              "pass state in as an input and return its new value")
        value = getattr(holder, name)
        if type(value).__name__ == "Stale":
            raise Refusal(f"{name} of {type(holder).__name__} is read, which an earlier call may have set",
                          "pass state in as an input and return its new value")
        return self.found(value) if isinstance(holder, nn.Module) else value

    def get_Subscript(self, n: ast.Subscript) -> Any:
        return self.subscript(self.evaluate(n.value), self.evaluate(n.slice))

    def subscript(self, holder: Any, key: Any) -> Any:
        def get(parts: list[Any]) -> Any:
            obj, at = parts
            if isinstance(obj, Tensor):
                return self.indexed(obj, at if isinstance(at, tuple) else (at,))
            if isinstance(at, Tensor) and isinstance(obj, (list, tuple, nn.ModuleList, nn.Sequential)):
                at = Scalar(at)
            if isinstance(at, Scalar):
                return self.item_of(obj, at)
            return operator.getitem(obj, at)

        return self.split([holder, key], get)

    def item_of(self, obj: Any, at: Scalar) -> Any:
        """The item of a list at a place that a tensor says: one alternative for each."""
        if at.kind is float or not isinstance(obj, (list, tuple, nn.ModuleList, nn.Sequential)):
            raise Refusal(f"a tensor decides which item of {type(obj).__name__} is taken", "use a list")
        items = list(obj)
        if not items:
            raise IndexError("list index out of range")
        place = at.number()
        place = torch.where(place < 0, place + len(items), place)

        def pick(i: int) -> Any:
            if i + 1 == len(items):
                return items[i]
            return self.merged(self.truth(place == i), items[i], pick(i + 1))

        return pick(0)

    def indexed(self, x: Tensor, key: tuple[Any, ...]) -> Any:
        """x[key]; a number of a tensor takes the one place that it says."""
        places = [i for i, k in enumerate(key) if isinstance(k, Scalar) or (
            isinstance(k, Tensor) and k.dim() == 0 and not k.dtype.is_floating_point and k.dtype != torch.bool)]
        for i, k in enumerate(key):
            ends: list[Any] = [k.start, k.stop, k.step] if isinstance(k, slice) else []
            for j, end in enumerate(ends):
                if isinstance(end, Scalar) and end.values:
                    def cut(v: Any, i: int = i, j: int = j, ends: list[Any] = ends) -> Any:
                        part = [*ends[:j], v, *ends[j + 1:]]
                        return self.indexed(x, (*key[:i], slice(part[0], part[1], part[2]), *key[i + 1:]))

                    return self.each(spread(end), cut)
        if any(isinstance(p, Scalar) for k in key if isinstance(k, slice) for p in (k.start, k.stop, k.step)):
            raise Refusal("a tensor decides the shape of a result", "take all and mask it with torch.where")
        if not places:
            return x[key if len(key) != 1 else key[0]]
        if any(isinstance(k, (Tensor, list)) for i, k in enumerate(key) if i not in places):
            raise Refusal("an index mixes numbers of tensors with tensors", "take one after the other")
        chosen = [key[i] for i in places]
        used = sum(k is not None and k is not Ellipsis for k in key)
        full: list[Any] = []
        for i, k in enumerate(key):
            full += [slice(None)] * (x.dim() - used) if k is Ellipsis else [slice(None) if i in places else k]
        where, dim = [], 0  # of the numbers, among the dimensions of the result
        seen = 0
        for i, k in enumerate(key):
            if i in places:
                where.append(dim)
                seen += 1
            if k is Ellipsis:
                dim += x.dim() - used
            elif k is None or isinstance(k, slice) or i in places:
                dim += 1
        x = x[tuple(full)]
        for at, k in reversed(list(zip(where, chosen, strict=True))):
            place = (k.number() if isinstance(k, Scalar) else k.to(torch.int64)).reshape(1)
            place = torch.where(place < 0, place + x.shape[at], place)
            x = torch.index_select(x, at, place).select(at, 0)
        return x

    def write_item(self, x: Tensor, key: Any, value: Any) -> None:
        """x[key] = value, of a tensor that nobody else holds."""
        def write(parts: list[Any]) -> None:
            at, v = parts
            ats = list(at) if isinstance(at, tuple) else [at]
            if not any(isinstance(k, Scalar) or (isinstance(k, Tensor) and k.dim() == 0) for k in ats):
                x[at] = v.tensor if isinstance(v, Scalar) else v
                return
            if len(ats) != 1 and any(not isinstance(k, (int, Scalar, Tensor)) for k in ats):
                raise Refusal("a tensor decides where a slice is stored", "use torch.where or scatter")
            mask = torch.ones((), dtype=torch.bool)
            for dim, k in enumerate(ats):
                k = k.number() if isinstance(k, Scalar) else k
                k = torch.where(k < 0, k + x.shape[dim], k) if isinstance(k, Tensor) else k % x.shape[dim]
                steps = torch.arange(x.shape[dim]).reshape(-1, *[1] * (x.dim() - dim - 1))
                mask = mask & (steps == k)
            v = v.tensor if isinstance(v, Scalar) else v
            v = v.to(x.dtype) if isinstance(v, Tensor) else torch.full((), v, dtype=x.dtype)
            x.copy_(torch.where(mask, v, x))

        self.split([key, value], write)

    # ---- calls

    def get_Call(self, n: ast.Call) -> Any:
        if isinstance(n.func, ast.Name) and n.func.id == "super" and not n.args:
            frame = self.frames[-1]
            while frame.outer is not None:
                frame = frame.outer
            assert frame.function is not None
            cells = dict(zip(frame.function.__code__.co_freevars, frame.function.__closure__ or ()))
            first = frame.function.__code__.co_varnames[0]
            return super(cells["__class__"].cell_contents, frame.locals[first])
        fn = self.evaluate(n.func)
        if (fn is any or fn is all) and len(n.args) == 1 and isinstance(n.args[0], ast.GeneratorExp):
            generator = n.args[0]
            values = self.listed(generator, lambda: self.condition(generator.elt))
            return self.flag(self.folded(values, fn is all))
        args = self.items(n.args)
        kwargs: dict[str, Any] = {}
        for keyword in n.keywords:
            value = self.evaluate(keyword.value)
            kwargs.update({keyword.arg: value} if keyword.arg else value)
        return self.call(fn, args, kwargs)

    def folded(self, values: list[Truth], both: bool) -> Truth:
        result: Truth = both
        for value in reversed(values):
            result = choose_truth(value, result, False) if both else choose_truth(value, True, result)
        return self.settled(result)

    def call(self, fn: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        fn = self.read(fn)
        if isinstance(fn, Alternatives):
            return self.each(fn, lambda f: self.call(f, args, kwargs))
        if isinstance(fn, nn.Module) and self.interprets(type(fn).forward) or isinstance(fn, Closure):
            return fn(*args, **kwargs)  # its forward leads back here
        if self.interprets(fn):
            return self.run(fn, tuple(args), kwargs)
        if isinstance(fn, functools.partial):
            # torch.export puts a partial function in the place of min and max.
            real = fn.keywords.get("real_callable")
            return self.call(real or fn.func, [*fn.args, *args], kwargs if real else {**fn.keywords, **kwargs})
        name = getattr(fn, "__name__", "")
        if any(fn is f for f in SPECIAL):
            special = getattr(self, f"call_{fn.__name__}")
            return self.split(list(args), lambda vs: special(*vs, **kwargs))
        if name in MATH and getattr(math, name) is fn:
            fn = self.of_number(fn)
        names = list(kwargs)
        count = len(args)

        def go(values: list[Any]) -> Any:
            return fn(*values[:count], **dict(zip(names, values[count:])))

        return self.native(go, [*args, *kwargs.values()], fn)

    def of_number(self, fn: Any) -> Callable[[Any], Any]:
        """A function of `math` that takes numbers of tensors too."""
        def apply(x: Any) -> Any:
            return Scalar(MATH[fn.__name__](x.number().to(torch.float32))) if isinstance(x, Scalar) else fn(x)

        return apply

    def native(self, fn: Callable[..., Any], values: list[Any], called: Any = None) -> Any:
        """`fn(*values)`, of every alternative among `values` on its own."""
        def go(parts: list[Any]) -> Any:
            try:
                return fn(parts) if called is not None else fn(*parts)
            except Decides:
                counted = [i for i, v in enumerate(parts) if isinstance(v, Scalar) and v.values]
                if counted:
                    i = counted[0]
                    return self.each(spread(parts[i]), lambda v: go([*parts[:i], v, *parts[i + 1:]]))
                if isinstance(called, (BuiltinFunctionType, type)) and called.__module__ in ("builtins", "math"):
                    raise Refusal(f"{called.__name__}() needs the value of a tensor", "compute it with torch") from None
                raise

        return self.split(values, go)

    # ---- built-in functions of numbers that tensors hold

    def number_of(self, value: Any, kind: type) -> Any:
        if isinstance(value, Scalar):
            value = value.number()
        if not isinstance(value, Tensor):
            return kind(value)
        if value.numel() != 1:
            raise Refusal(f"{kind.__name__}() of a tensor of shape {list(value.shape)}", "reduce it to one element")
        value = value.reshape(()).clone()  # as it is now
        if kind is int and value.dtype.is_floating_point:
            value = torch.trunc(value)
        return Scalar(value.to(torch.float32 if kind is float else torch.int64), kind)

    def call_float(self, *args: Any) -> Any:
        return self.number_of(args[0], float) if args else 0.0

    def call_int(self, *args: Any) -> Any:
        return self.number_of(args[0], int) if len(args) == 1 else int(*args)

    def call_bool(self, *args: Any) -> Any:
        return self.flag(self.truth(args[0])) if args else False

    def call_any(self, values: Any) -> Any:
        return self.flag(self.folded([self.truth(v) for v in values], False))

    def call_all(self, values: Any) -> Any:
        return self.flag(self.folded([self.truth(v) for v in values], True))

    def call_type(self, *args: Any) -> Any:
        return args[0].kind if len(args) == 1 and isinstance(args[0], Scalar) else type(*args)

    def call_isinstance(self, value: Any, kinds: Any) -> bool:
        return issubclass(value.kind, kinds) if isinstance(value, Scalar) else isinstance(value, kinds)

    def smallest(self, args: tuple[Any, ...], kwargs: dict[str, Any], plain: Any, smaller: bool) -> Any:
        values = list(args[0]) if len(args) == 1 else list(args)
        if kwargs or not any(isinstance(v, (Scalar, Tensor, Alternatives)) for v in values):
            return plain(*args, **kwargs)
        if any(isinstance(v, Tensor) and v.numel() != 1 for v in values):
            return plain(*args)
        best = values[0]
        for v in values[1:]:  # as Python does: the first of equals
            takes = operator.lt if smaller else operator.gt
            best = self.merged(self.truth(self.native(takes, [v, best])), v, best)
        bounds = [v for v in values if isinstance(v, int)]
        if smaller and bounds and isinstance(best, Scalar) and best.values is None:
            best = Scalar(best.tensor, best.kind, min(bounds))
        return best

    def call_min(self, *args: Any, **kwargs: Any) -> Any:
        return self.smallest(args, kwargs, min, True)

    def call_max(self, *args: Any, **kwargs: Any) -> Any:
        return self.smallest(args, kwargs, max, False)

    def call_range(self, *args: Any) -> Any:
        args = tuple(Scalar(a) if isinstance(a, Tensor) else a for a in args)
        if not any(isinstance(a, Scalar) for a in args):
            return range(*args)
        start, stop = (0, args[0]) if len(args) == 1 else args[:2]
        if len(args) > 2 or isinstance(start, Scalar):
            raise Refusal("a tensor gives the start or the step of a range", "let it give the end alone")
        if stop.bound is None:
            raise Refusal("a tensor says how many turns a loop has, and nothing how many at most",
                          "give it a bound: range(min(n, N))")
        return Turns(start, stop - start if start else stop, max(0, stop.bound - start))


SPECIAL = (float, int, bool, any, all, isinstance, type, min, max, range)  # these have a method call_NAME


def _cases(value: Any) -> list[Any]:
    return [v for _, v in value.cases] if isinstance(value, Alternatives) else [value]
