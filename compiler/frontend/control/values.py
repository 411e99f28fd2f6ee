"""What a variable may hold while both sides of decisions are followed: conditions, numbers and alternatives."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MAX_ALTERNATIVES = 64  # of one variable


@torch.library.custom_op("skive::choose", mutates_args=())
def _choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a if bool(condition) else b).clone()


@_choose.register_fake
def _(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(a.shape, dtype=a.dtype)


class Decides(BaseException):
    """Code that is not interpreted asks for the value of a tensor. Not an Exception: no user's `except` takes it."""


class Refusal(Exception):
    """Something that no graph can say; the interpreter adds the line of the source."""

    def __init__(self, reason: str, hint: str = ""):
        super().__init__(reason)
        self.reason, self.hint = reason, hint


# --------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True, eq=False)
class Cond:
    """The truth of a bool tensor without dimensions, or its opposite."""

    tensor: Tensor
    negated: bool = False

    def __invert__(self) -> Cond:
        return Cond(self.tensor, not self.negated)

    def value(self) -> Tensor:
        return torch.logical_not(self.tensor) if self.negated else self.tensor


Truth: TypeAlias = "bool | Cond"
Note: TypeAlias = "Callable[[Tensor, Tensor, Tensor], None]"


def negation(c: Truth) -> Truth:
    return ~c if isinstance(c, Cond) else not c


def known(c: Cond, other: Truth) -> bool | None:
    """What `other` is where `c` holds, if that is clear."""
    if isinstance(other, bool):
        return other
    return None if other.tensor is not c.tensor else other.negated == c.negated


def choose_truth(c: Truth, a: Truth, b: Truth) -> Truth:
    """`a` where `c` holds, else `b`; neither is computed where the other is taken."""
    if isinstance(c, bool):
        return a if c else b
    a_known, b_known = known(c, a), known(~c, b)
    a = a if a_known is None else a_known
    b = b if b_known is None else b_known
    if isinstance(a, bool) and isinstance(b, bool):
        return a if a == b else (c if a else ~c)
    if isinstance(a, Cond) and isinstance(b, Cond) and a.tensor is b.tensor and a.negated == b.negated:
        return a
    return Cond(choose(c, as_bool(a), as_bool(b)))


def as_bool(c: Truth) -> Tensor:
    return c.value() if isinstance(c, Cond) else torch.full((), c, dtype=torch.bool)


def choose(c: Cond, a: Tensor, b: Tensor) -> Tensor:
    if c.negated:
        a, b = b, a
    return torch.ops.skive.choose(c.tensor, a, b)


# ------------------------------------------------------------------------------------------ numbers


def round_to_float32(value: float, up: bool) -> float:
    """The float32 next to `value` that is not smaller (`up`) or not larger."""
    near = np.float32(value)
    if float(near) != value and (float(near) < value) == up:
        near = np.nextafter(near, np.float32(np.inf if up else -np.inf))
    return float(near)


class Scalar:
    """A Python number that is computed: what `.item()`, `float(t)`, `int(t)` and `bool(t)` give.

    `kind` is bool, int or float. Floats are those of float32: comparisons with constants are those that
    Python makes in double precision, arithmetic is rounded to float32. `values`: those that an int may have, where
    they are few; `bound`: it is not larger, if that is known.
    """

    __slots__ = ("bound", "kind", "tensor", "values")

    def __init__(self, tensor: Tensor, kind: type | None = None, bound: int | None = None,
                 values: Iterable[int] | None = None):
        self.tensor = tensor.reshape(()) if tensor.dim() else tensor
        dtype = tensor.dtype
        self.kind = kind or (float if dtype.is_floating_point else bool if dtype == torch.bool else int)
        if self.kind is int and dtype != torch.int64:
            self.tensor = self.tensor.to(torch.int64)
        found = None if values is None else frozenset(values)
        self.values = found if found and len(found) <= MAX_ALTERNATIVES else None
        self.bound = bound if found is None else max(found)

    def number(self) -> Tensor:
        """The tensor to compute with: no bool."""
        return self.tensor.to(torch.int64) if self.kind is bool else self.tensor

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} of a tensor>"

    @classmethod
    def __torch_function__(cls, fn: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Scalar, lambda s: s.tensor, (args, kwargs or {}),
                                            is_leaf=lambda s: isinstance(s, Scalar))
        return fn(*args, **kwargs)

    def _needed(self, *_: Any) -> Any:
        raise Decides

    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __str__ = __format__ = _needed

    def __getattr__(self, name: str) -> Any:
        if name == "item":
            return lambda: self
        raise AttributeError(f"a number has no {name}")

    def __neg__(self) -> Scalar:
        return Scalar(-self.number())

    def __eq__(self, other: object) -> Any:
        return _equal(self, other)

    def __pos__(self) -> Scalar:
        return self

    def __abs__(self) -> Scalar:
        return Scalar(abs(self.number()))


def _arithmetic(fn: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Scalar, Any], Any]:
    def apply(self: Scalar, other: Any) -> Any:
        if isinstance(other, Tensor):
            return fn(other, self.tensor) if swapped else fn(self.tensor, other)
        if not isinstance(other, (Scalar, int, float)):
            return NotImplemented
        a: Any = self.number()
        b: Any = other.number() if isinstance(other, Scalar) else other
        if fn is operator.truediv:  # of integers too: in float32
            a = a.to(torch.float32)
        if not isinstance(b, Tensor):
            b = torch.full((), b, dtype=torch.float32 if isinstance(b, float) else torch.int64)
        values = None
        if fn in (operator.add, operator.sub, operator.mul):
            values = combined((lambda x, y: fn(y, x)) if swapped else fn, self, other)
        return Scalar(fn(b, a) if swapped else fn(a, b), values=values)

    return apply


def values_of(number: Any) -> frozenset[int] | None:
    """The values that an int may have, None if they are not known."""
    if isinstance(number, Scalar):
        return number.values
    return frozenset((number,)) if type(number) is int else None


def combined(fn: Callable[[Any, Any], Any], a: Any, b: Any) -> set[Any] | None:
    """What `fn` gives for all values of both."""
    left, right = values_of(a), values_of(b)
    return None if left is None or right is None else {fn(x, y) for x in left for y in right}


def _comparison(fn: Callable[[Any, Any], Any]) -> Callable[[Scalar, Any], Any]:
    # A float32 compared with a double: the double moves to the float32 that gives the same answer.
    up = {operator.gt: False, operator.le: False, operator.ge: True, operator.lt: True}.get(fn)

    def apply(self: Scalar, other: Any) -> Any:
        if isinstance(other, Tensor):
            return fn(self.tensor, other)
        if not isinstance(other, (Scalar, int, float)):
            return NotImplemented
        answers = combined(fn, self, other)
        if answers is not None and len(answers) == 1:
            return answers.pop()
        if isinstance(other, Scalar):
            return Scalar(fn(self.number(), other.number()))
        if self.kind is float:
            if up is not None:
                other = round_to_float32(float(other), up)
            elif float(np.float32(other)) != other:
                return fn is operator.ne
        elif isinstance(other, float):
            return Scalar(fn(self.number().to(torch.float32), other))
        return Scalar(fn(self.number(), other))

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Scalar, f"__{_name}__", _arithmetic(getattr(operator, _name), False))
    setattr(Scalar, f"__r{_name}__", _arithmetic(getattr(operator, _name), True))
_equal = _comparison(operator.eq)
for _name in ("lt", "le", "gt", "ge", "ne"):
    setattr(Scalar, f"__{_name}__", _comparison(getattr(operator, _name)))


# ------------------------------------------------------------------------------------- alternatives


class Unbound:
    """What a name stands for on the paths that do not assign it."""


UNBOUND = Unbound()


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Values that no tensor can hold both, each with the condition under which it is the one.

    At most one condition holds; the last one is True and stands for what is left.
    """

    cases: tuple[tuple[Truth, Any], ...]

    def without(self, value: object) -> Any:
        """The same where it is not `value`."""
        left = [(c, v) for c, v in self.cases if v is not value]
        return left[0][1] if len(left) == 1 else Alternatives((*left[:-1], (True, left[-1][1])))


@dataclass(eq=False)
class Deferred:
    """A merge that is made when somebody reads it. `versions`: of the tensors when the sides met."""

    condition: Cond
    a: Any
    b: Any

    def __post_init__(self) -> None:
        self.versions = [(v, v._version) for v in (self.a, self.b) if isinstance(v, Tensor)]


IMMUTABLE = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, slice, range)


def same(a: Any, b: Any) -> bool:
    """Whether nothing can tell `a` from `b`."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (Scalar, Alternatives, Deferred)):
        return False
    if isinstance(a, IMMUTABLE):
        return bool(a == b)
    return isinstance(a, tuple) and len(a) == len(b) and all(map(same, a, b))


def merged(c: Truth, a: Any, b: Any, note: Note, deep: bool = False) -> Any:
    """One value for both sides; `note` is told of every choice: both tensors and the result.

    Lists and dicts stay alternatives, because others may hold and change them, unless the value is final (`deep`)."""
    if isinstance(c, bool):
        return resolved(a if c else b, note)
    a, b = resolved(a, note), resolved(b, note)
    if same(a, b):
        return a
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        result = choose(c, a, b)
        note(a, b, result)
        return result
    numbers = [v.kind if isinstance(v, Scalar) else type(v) for v in (a, b)]
    if numbers[0] is bool and numbers[1] is bool and not isinstance(a, Scalar) and not isinstance(b, Scalar):
        return Scalar(as_bool(choose_truth(c, a, b)), bool)
    if numbers[0] is numbers[1] and numbers[0] in (bool, int, float):
        left, right = values_of(a), values_of(b)
        return Scalar(choose(c, as_number(a), as_number(b)), numbers[0],
                      values=None if left is None or right is None else left | right)
    rows = (tuple, list) if deep else tuple
    if type(a) is type(b) and isinstance(a, rows) and len(a) == len(b) and same_fields(a, b):
        items = [merged(c, x, y, note, deep) for x, y in zip(a, b)]
        return items if isinstance(a, list) else rebuilt(a, items)
    if deep and type(a) is dict and type(b) is dict and list(a) == list(b):
        return {k: merged(c, a[k], b[k], note, deep) for k in a}
    if deep and type(a) is type(b) and dataclasses.is_dataclass(a) and all(f.init for f in dataclasses.fields(a)):
        names = [f.name for f in dataclasses.fields(a)]
        made: Callable[..., Any] = type(a)
        return made(**{k: merged(c, getattr(a, k), getattr(b, k), note, deep) for k in names})
    cases: list[tuple[Truth, Any]] = []
    for side in (a, b):
        here = c if side is a else ~c
        cases += [(choose_truth(here, full, False), value) for full, value in exclusive(side)]
    return alternatives(cases, note)


def exclusive(value: Any) -> Iterator[tuple[Truth, Any]]:
    """The cases of a value, each with the whole condition under which it is the one."""
    left: Truth = True
    for condition, case in value.cases if isinstance(value, Alternatives) else ((True, value),):
        yield (choose_truth(condition, left, False) if isinstance(condition, Cond) else left), case
        left = choose_truth(condition, False, left) if isinstance(condition, Cond) else False


def alternatives(cases: Iterable[tuple[Truth, Any]], note: Note) -> Any:
    """The value of exclusive cases, of which one holds; equal and mergeable ones become one."""
    found: list[tuple[Truth, Any]] = []
    for condition, value in cases:
        if condition is False:
            continue
        for i, (other, present) in enumerate(found):
            if same(present, value) or fits(present, value):
                both = choose_truth(other, True, condition) if isinstance(other, Cond) else True
                found[i] = both, present if same(present, value) else merged(other, present, value, note)
                break
        else:
            found.append((condition, value))
    if len(found) > MAX_ALTERNATIVES:
        raise Refusal(f"a variable has more than {MAX_ALTERNATIVES} values that depend on tensors",
                      "keep it in a tensor")
    if len(found) == 1:
        return found[0][1]
    return Alternatives((*found[:-1], (True, found[-1][1])))


def fits(a: Any, b: Any) -> bool:
    """Whether a tensor can hold both."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    return False


def same_fields(a: Any, b: Any) -> bool:
    return getattr(a, "_fields", None) == getattr(b, "_fields", None)


def rebuilt(like: tuple[Any, ...], items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else tuple(items)


def as_number(value: Any) -> Tensor:
    if isinstance(value, Scalar):
        return value.tensor
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float32}
    return torch.full((), value, dtype=kinds[type(value)])


def resolved(value: Any, note: Note) -> Any:
    """`value` itself, with what was deferred merged."""
    if not isinstance(value, Deferred):
        return value
    for tensor, version in value.versions:
        if tensor._version != version:
            raise Refusal("a tensor was changed in place that only some paths share with another variable",
                          "write `x = x + y` instead of changing x")
    return merged(value.condition, value.a, value.b, note)


def spread(number: Scalar) -> Any:
    """A number as the alternatives of its values, for Python to compute with; Decides if they are not known."""
    if number.values is None:
        raise Decides
    *rest, last = sorted(number.values)
    return Alternatives((*((Cond(number.tensor == v), v) for v in rest), (True, last))) if rest else last
