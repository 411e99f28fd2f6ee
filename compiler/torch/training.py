"""Importances by gradients, pruning for training, and fine-tuning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from skive import pruning, sparsity
from skive.errors import PruningError
from skive.ir import Graph, Node
from skive.pruning import Importance, Prune, constant_keys
from skive.sparsity import Sparsify
from skive.torch.network import Network, canonical_graph

TURNS = 16  # in which blocks go during training: each waits until the weights left have made up for the last

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


def importance(model: Any, data: Iterable[Any], loss: Loss = F.cross_entropy, *, kind: str = "taylor",
               example_inputs: Any = None, batches: int = 16) -> Importance:
    """What each weight of `model` counts for the `loss` on `data`, batches of (inputs, target): for
    `Prune(criterion=...)` of the same model.

    "taylor": the square of weight times gradient, mean over batches (Molchanov et al., Importance Estimation for
    Neural Network Pruning, 2019); "snip": the magnitude of weight times the gradient of all batches (Lee et al.,
    SNIP: Single-shot Network Pruning, 2019).
    """
    if kind not in ("taylor", "snip"):
        raise PruningError(f"kind is {kind!r}; it can be taylor, snip")
    net = model if isinstance(model, Network) else Network(canonical_graph(model, example_inputs))
    net.eval()
    sums = [np.zeros(tuple(w.shape), np.float64) for w in net.constants.values()]
    seen = 0
    for inputs, target in itertools.islice(data, batches):
        net.zero_grad()
        loss(net(*_tuple(inputs)), target).backward()
        for total, w in zip(sums, net.constants.values(), strict=True):
            if w.grad is not None:
                product = (w.detach() * w.grad).double().numpy()
                total += product**2 if kind == "taylor" else product
        seen += 1
    if not seen:
        raise PruningError("importance: the data holds no batch")
    net.zero_grad()
    keys = constant_keys(net.source)
    return Importance(kind, {keys[n]: np.abs(total) / seen for n, total in zip(net.constants, sums, strict=True)})


def prune(model: Any, options: Prune, *, example_inputs: Any = None) -> Network:
    """`model` without the channels that `options` name, as a module to train; `.sparsity` is what the report says."""
    graph, report = pruning.apply(canonical_graph(model, example_inputs), options)
    result = Network(graph)
    result.sparsity = report
    return result


def sparsify(model: Any, options: Sparsify | str, *, example_inputs: Any = None) -> Network:
    """`model` with blocks of weights zero as `options` say, as a module to train: the zeros stay zero (`masks`).

    Blocks can go in several turns with training between: what is zero already counts as part of the fraction.
    """
    asked = sparsity.requested(options)
    graph, report = sparsity.apply(canonical_graph(model, example_inputs), asked)
    result = Network(graph)
    result.masks = _zeros(graph, asked)
    result.sparsity = report
    return result


def _zeros(graph: Graph, options: Sparsify) -> dict[Node, np.ndarray]:
    """By weights of the layers that `options` meet, which are not zero."""
    chosen, _ = sparsity.layers(graph, options)
    return {n.inputs[1]: n.inputs[1].value != 0 for n in chosen}


def _thin_out(net: Network, options: Sparsify, share: float) -> None:
    """Masks for `share` of the fraction of `options`: of the weights as they are now, normalisation folded."""
    fraction = float(options.fraction or 0) * share
    thin, _ = sparsity.apply(net.graph(), replace(options, fraction=fraction))
    layers = [sparsity.layers(g, options)[0] for g in (net.source, thin)]  # folding adds constants, but no layers
    net.masks = {old.inputs[1]: new.inputs[1].value != 0 for old, new in zip(*layers, strict=True)}


def finetune(net: AnyModule, loader: Iterable[Any], epochs: int, lr: float, *, distill: Any = None,
             loss: Loss = F.cross_entropy, weight_decay: float = 1e-4, temperature: float = 2.0, share: float = 0.7,
             normalise: bool = True, gradual: Sparsify | str | None = None, bfloat16: bool = False,
             step: Callable[[float], None] = lambda done: None,
             progress: Callable[[int, float], None] = lambda epoch, loss: None) -> AnyModule:
    """Trains `net` on the batches (inputs, target) of `loader`: SGD with momentum, the rate rising for 1/20 of the
    steps and then falling to 0 along a cosine. Returns the network itself, in evaluation mode.
    It may be any module; `normalise` (`Network.normalise` on the first batch) and `gradual` are for a `Network`.

    `distill`: a module whose outputs are followed with weight `share`, as softened probabilities (Hinton et al.,
    Distilling the Knowledge in a Neural Network, 2015). `gradual`: blocks of weights that become zero during
    the first half of the steps, the more the sooner (Zhu and Gupta, To Prune, or Not to Prune, 2017). `bfloat16`:
    products in that type, about 1.6 times as fast where the processor has them. `step` is told after each step
    which part of them is done, `progress` the mean loss of every epoch.

    Raises:
        PruningError: `gradual` for a module that is no `Network`, or of a pattern that has a fraction of its own.
    """
    batches = len(loader)  # type: ignore[arg-type]
    thinned = None if gradual is None else (_network(net), _gradual(gradual))
    if normalise and isinstance(net, Network):
        inputs, _ = next(iter(loader))
        net.normalise(*_tuple(inputs))
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    steps = epochs * batches
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / rise, 0.5 * (1 + math.cos(math.pi * min(1.0, t / steps)))))
    turns = {max(0, (steps // 2) * k // TURNS - 1): k / TURNS for k in range(1, TURNS + 1)}
    taken = 0
    for epoch in range(epochs):
        total = 0.0
        for inputs, target in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                got = net(*_tuple(inputs))
            got = _floats(got)
            error = loss(got, target)
            if distill is not None:
                with torch.no_grad():
                    wanted = distill(*_tuple(inputs))
                soft = F.kl_div(F.log_softmax(got / temperature, -1), F.log_softmax(wanted / temperature, -1),
                                reduction="batchmean", log_target=True)
                error = (1 - share) * error + share * temperature**2 * soft
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            if thinned is not None and taken in turns:
                _thin_out(*thinned, 1 - (1 - turns[taken]) ** 3)
            taken += 1
            step(taken / steps)
            total += float(error.detach())
        progress(epoch, total / batches)
    return net.eval()


def _network(net: torch.nn.Module) -> Network:
    if isinstance(net, Network):
        return net
    raise PruningError(f"gradual: the blocks of a {type(net).__name__} are not known; train "
                       "skive.torch.network(module, example_inputs) instead")


def _gradual(value: Sparsify | str) -> Sparsify:
    """The request without what training does instead: weights are not fitted to data."""
    asked = sparsity.requested(value)
    if asked.form.group:
        raise PruningError(f"pattern {asked.pattern} has a fraction of its own, it cannot grow: use sparsify() first")
    return replace(asked, criterion="magnitude") if asked.criterion == "reconstruction" else asked


def _floats(got: Any) -> Any:
    return tuple(g.float() for g in got) if isinstance(got, tuple) else got.float()


def _tuple(inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
