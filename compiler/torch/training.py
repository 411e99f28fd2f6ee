"""Importances by gradients, pruning for training, and fine-tuning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skive import pruning
from skive.errors import PruningError
from skive.pruning import Importance, Prune, constant_keys
from skive.torch.network import Network, canonical_graph

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


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


def finetune(net: Network, loader: Iterable[Any], epochs: int, lr: float, *, distill: Any = None,
             loss: Loss = F.cross_entropy, weight_decay: float = 1e-4, temperature: float = 2.0, share: float = 0.7,
             normalise: bool = True, progress: Callable[[int, float], None] = lambda epoch, loss: None) -> Network:
    """Trains `net` on the batches (inputs, target) of `loader`: SGD with momentum, the rate rising for 1/20 of the
    steps and then falling to 0 along a cosine. Returns the network itself, in evaluation mode.

    `distill`: a module whose outputs are followed with weight `share`, as softened probabilities (Hinton et al.,
    Distilling the Knowledge in a Neural Network, 2015). `progress` is told the mean loss of every epoch.
    """
    batches = len(loader)  # type: ignore[arg-type]
    if normalise:
        inputs, _ = next(iter(loader))
        net.normalise(*_tuple(inputs))
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    steps = epochs * batches
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / rise, 0.5 * (1 + math.cos(math.pi * min(1.0, t / steps)))))
    for epoch in range(epochs):
        total = 0.0
        for inputs, target in loader:
            got = net(*_tuple(inputs))
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
            total += float(error.detach())
        progress(epoch, total / batches)
    return net.eval()


def _tuple(inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
