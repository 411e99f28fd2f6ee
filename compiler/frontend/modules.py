"""What `torch.export` cannot take from ordinary modules, put in a form that it can, or refused in words."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from skive.errors import InvalidModelError, UnsupportedOpError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

PLAIN = (bool, int, float, str, type(None))
OWN = frozenset(vars(nn.Module()))  # attributes that every module has
CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def prepared(model: nn.Module) -> nn.Module:
    """`model` without what wraps it (`torch.compile`, `DataParallel`), its parametrized weights computed.

    InvalidModelError if it is in training mode, if weights have no values yet, or if PyTorch has quantized it.
    """
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    name = type(model).__name__
    for path, part in model.named_modules():
        if part.training:
            raise InvalidModelError(f"{path or name} is in training mode; call .eval() on the model first")
        if ".quantized" in type(part).__module__ and type(part).__module__.startswith("torch."):
            raise InvalidModelError(f"{path or name} is quantized by PyTorch; give the float32 model and let "
                                    "quantize='int8' do it")
    for path, weight in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(weight, nn.parameter.UninitializedTensorMixin):
            raise InvalidModelError(f"{path} has no shape yet; call the model once on an example to make its lazy "
                                    "modules real")
        if weight.is_meta:
            raise InvalidModelError(f"{path} has no values (device meta); load the weights of the model first")
    if any(parametrize.is_parametrized(m) for m in model.modules()):
        return _computed(model)
    return model


def _computed(model: nn.Module) -> nn.Module:
    """A copy in which every parametrized tensor is what its parametrizations make of it now."""
    try:
        model = copy.deepcopy(model)
    except Exception:  # noqa: BLE001 - what the user's parts raise; export then sees the computation itself
        return model
    for part in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        values = {name: getattr(part, name).detach() for name in part.parametrizations}
        del part.parametrizations
        part.__class__ = type(part).__bases__[0]  # that of PyTorch's own is shared with the model copied
        for name, value in values.items():
            setattr(part, name, nn.Parameter(value, requires_grad=False))
    return model


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
             export: Callable[[], ExportedProgram]) -> ExportedProgram:
    """`export()`, which runs `model.forward` on tensors without values and may do so more than once.

    Dataclasses that `forward` returns are made known to PyTorch. Attributes that it sets, what they hold, and hooks
    are as before afterwards: a tensor without values, and whatever says that there is one, must not stay.
    UnsupportedOpError if a second call gives another result than the first, or if `forward` sets attributes and no copy
    of the model can be made to see that.
    """
    results: list[Any] = []
    changed: list[str] = []

    def look(_module: nn.Module, _args: Any, result: Any) -> None:
        results.append(result)
        changed.extend(".".join(filter(None, [path, key])) for path, m in model.named_modules()
                       for key, value in vars(m).items()
                       if key not in OWN and (key not in before[m] or before[m][key] is not value))

    def restore() -> None:
        for module, old in before.items():
            for key in set(vars(module)) - set(old):
                del vars(module)[key]
            vars(module).update(old)
            for key, held in inside[module].items():  # also the hooks that forward installs
                _refill(old[key], held)

    hook = model.register_forward_hook(look)
    before = {m: dict(vars(m)) for m in model.modules()}
    inside = {m: {k: copy.copy(v) for k, v in old.items() if type(v) in CONTAINERS} for m, old in before.items()}
    try:
        with mock.patch("torch.nn.modules.transformer._detect_is_causal_mask", _said_to_be_causal):
            try:
                program = export()
            except InvalidModelError as e:
                if "not a known type" not in str(e) or not results:
                    raise
                _register(results[-1])
                restore()
                program = export()
    finally:
        restore()
        hook.remove()
    same = _same_again(model, args, kwargs)
    if same is False or (changed and same is None):
        why = "gives another result at the next call" if same is False else "cannot be copied to call it twice"
        raise UnsupportedOpError([(c, f"forward keeps something from call to call: the model {why}",
                                   "pass state in as an input and return its new value as an output")
                                  for c in dict.fromkeys(changed) or [type(model).__name__]])
    return program


def _refill(container: Any, held: Any) -> None:
    """Makes `container` hold the very objects of `held`, a copy of it."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(held)


def _said_to_be_causal(_mask: Any, is_causal: bool | None = None, _size: int | None = None) -> bool:
    """What `nn.Transformer` asks the values of a mask for: a hint, beside which the mask itself is applied."""
    return is_causal is True


def _same_again(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether a second call gives what the first gave, but for buffers, of whose writing the program itself tells; None
    if there is no copy of the model to find it out with."""
    results = {id(v): v.detach().clone() for m in model.modules() for v in vars(m).values()
               if isinstance(v, Tensor) and not v.is_leaf}  # of earlier calls, which are not copied otherwise
    try:
        twin = copy.deepcopy(model, results)
    except Exception:  # noqa: BLE001 - what the user's parts raise
        return None
    calls = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for _ in range(2):
            torch.manual_seed(0)
            result = twin(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            calls.append([v.clone() for v in pytree.tree_leaves(result) if isinstance(v, Tensor)])
    if not all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True)):
        return True
    return len(calls[0]) == len(calls[1]) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*calls, strict=True))


def _register(result: Any) -> None:
    """Makes the dataclasses in `result` known to PyTorch; InvalidModelError for any other class."""
    while True:
        unknown = next((v for v in pytree.tree_leaves(result) if not isinstance(v, (Tensor, *PLAIN))), None)
        if unknown is None:
            return
        if not dataclasses.is_dataclass(unknown):
            raise InvalidModelError(f"forward returns {type(unknown).__name__}, of which PyTorch does not know the "
                                    "parts; return tensors, or tuples, lists, dicts or dataclasses of them")
        torch.export.register_dataclass(type(unknown))
