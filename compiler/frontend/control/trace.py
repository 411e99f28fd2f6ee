"""`torch.export` of a module whose `forward` decides on the values of tensors."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from skive.errors import InvalidModelError, SkiveError, UnsupportedOpError
from skive.frontend.control import source
from skive.frontend.control.interpreter import Failed, undecorated
from skive.frontend.control.statements import Interpreter, Sets, Stale
from skive.frontend.control.values import Alternatives, Decides, Refusal, Scalar, as_number

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ASKS = frozenset(("__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__contains__"))
MAX_LISTED = 256  # elements of a tensor that `tolist` takes apart
DEPTH = 20_000  # Python's own frames: some ten for every statement that encloses another


class Watch(TorchFunctionMode):
    """Gives numbers where code asks for the value of a tensor, and sees what is changed in place."""

    def __init__(self, machine: Interpreter):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, fn: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(fn, "__name__", "")
        if name == "__get__":
            return fn(*args, **kwargs)
        if name in ASKS:
            raise Decides
        if name == "item":
            return Scalar(args[0].clone())  # as it is now
        if name == "tolist" and args[0].numel() <= MAX_LISTED:
            return listed(args[0].clone())
        if name == "equal" and len(args) == 2:
            return Scalar((args[0] == args[1]).all()) if args[0].shape == args[1].shape else False
        flat = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, (Tensor, Scalar))]
        if any(isinstance(v, Scalar) for v in flat):
            args, kwargs = pytree.tree_map_only(Scalar, lambda s: s.tensor, (args, kwargs))
            if name in ("tensor", "as_tensor"):
                made = assembled(args[0])
                dtype = kwargs.get("dtype") or next((a for a in args[1:] if isinstance(a, torch.dtype)), None)
                return made if dtype is None else made.to(dtype)
        before = [(t, t._version) for t in flat if isinstance(t, Tensor)]
        result = fn(*args, **kwargs)
        for tensor, version in before:
            if tensor._version != version:
                self.machine.check_change(tensor)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.machine.computed(value)
        return result


def listed(x: Tensor) -> Any:
    """x.tolist()"""
    return [listed(v) for v in x.unbind(0)] if x.dim() else Scalar(x)


def assembled(data: Any) -> Tensor:
    """torch.tensor(data) of nested lists with numbers that tensors hold."""
    if isinstance(data, (list, tuple)):
        parts = [assembled(v) for v in data]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parts))
        return torch.stack([p.to(dtype) for p in parts])
    return data if isinstance(data, Tensor) else as_number(data)


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The program of `model`, in which `skive::choose` stands for every decision.

    A function is interpreted once it is found to decide on a tensor. UnsupportedOpError names the line of the source
    that no graph can say; InvalidModelError the line at which `forward` itself fails.
    """
    interpreted: set[CodeType] = set()
    attributes: list[tuple[nn.Module, str]] = []
    _mark(interpreted, [undecorated(type(model).forward).__code__])
    while True:
        machine = Interpreter(interpreted)
        try:
            with _deep(), _patched(model, machine, attributes):
                program = torch.export.export(model, args, kwargs, strict=False)
        except Decides as e:
            asked = source.codes_on(e.__traceback__)
            if not _mark(interpreted, [c for c, _ in asked]):
                code, line = asked[-1] if asked else (undecorated(type(model).forward).__code__, 0)
                where = source.line_of(code.co_filename, line) if asked else machine.where()
                raise _unsupported(where, "Python needs the value of a tensor here",
                                   "compute it with torch, or decide in a function of your own") from None
        except Sets as e:
            attributes.append((e.holder, e.name))
        except Failed as e:
            if e.raised:
                raise InvalidModelError(f"{e.where}: {e.reason}") from None
            raise _unsupported(e.where, e.reason, e.hint) from None
        except RecursionError:
            raise _unsupported(type(model).__name__, "forward decides too often in a row", "use a loop") from None
        else:
            program.graph_module.graph.eliminate_dead_code()
            return program


def results(value: Any) -> Any:
    """What `forward` returns, with tensors for its numbers."""
    def tensor(v: Any) -> Any:
        if isinstance(v, Scalar):
            return v.tensor
        if type(v) in (bool, int, float):
            return torch.tensor(v, dtype={bool: torch.bool, int: torch.int64, float: torch.float32}[type(v)])
        return v

    return pytree.tree_map(tensor, value)


def _mark(interpreted: set[CodeType], codes: list[CodeType]) -> bool:
    """Adds functions to those that are interpreted; False if all of them were."""
    new = set(codes) - interpreted
    interpreted |= new
    return bool(new)


def _unsupported(where: str, reason: str, hint: str) -> SkiveError:
    return UnsupportedOpError([(where, reason, hint)])


@contextlib.contextmanager
def _deep() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEPTH))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@contextlib.contextmanager
def _patched(model: nn.Module, machine: Interpreter, attributes: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """Modules whose `forward` is interpreted call the interpreter; `attributes` that forward sets are hidden."""
    kept = [(m, name, m.__dict__.get(name), name in m.__dict__) for m, name in attributes]
    changed: list[nn.Module] = []
    try:
        for m, name in attributes:
            m.__dict__[name] = Stale(name)
        for m in model.modules():
            if "forward" not in m.__dict__ and (m is model or machine.interprets(type(m).forward)):
                m.__dict__["forward"] = _whole(m, machine) if m is model else _part(m, machine)
                changed.append(m)
        yield
    finally:
        for m in changed:
            del m.__dict__["forward"]
        for m, name, value, present in kept:
            if present:
                m.__dict__[name] = value
            else:
                m.__dict__.pop(name, None)


def _part(module: nn.Module, machine: Interpreter) -> Callable[..., Any]:
    own = MethodType(type(module).forward, module)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return machine.run(own, args, kwargs)

    return forward


def _whole(module: nn.Module, machine: Interpreter) -> Callable[..., Any]:
    own = MethodType(type(module).forward, module)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        machine.given = [*module.parameters(), *module.buffers(),
                         *(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))]
        code = undecorated(type(module).forward).__code__
        with Watch(machine):
            try:
                value = settled(machine.run(own, args, kwargs), machine)
                machine.check_versions()
                machine.check_outside()
            except Refusal as e:
                raise Failed(source.line_of(code.co_filename, code.co_firstlineno), e.reason, e.hint) from None
            return value

    return forward


def settled(value: Any, machine: Interpreter) -> Any:
    """A result as tensors alone, with one tensor for the number that a path gives; Refusal where none can be that."""
    def leaf(v: Any) -> Any:
        v = machine.read(v)
        if not isinstance(v, Alternatives):
            return v
        whole = v.cases[-1][1]
        for condition, case in reversed(v.cases[:-1]):
            whole = machine.merged(condition, case, whole, deep=True)
        if isinstance(whole, Alternatives):
            raise Refusal("forward returns results of different forms: "
                          + ", ".join(sorted(_form(c) for _, c in whole.cases)),
                          "let all paths return one shape and type, padded where they differ in length")
        return settled(whole, machine)

    return results(pytree.tree_map(leaf, value, is_leaf=lambda v: isinstance(v, Alternatives)))


def _form(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
