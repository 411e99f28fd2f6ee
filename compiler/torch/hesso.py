"""Channels that go while a network is trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F

from skive.errors import PruningError
from skive.ir import Node
from skive.passes.channel_groups import Groups, channel_groups, without
from skive.pruning import Cost, Importance, Prune, check_keep, constant_keys
from skive.pruning.choice import chosen_groups
from skive.pruning.scores import summed
from skive.pruning.zeros import zero_groups
from skive.torch.network import Network, network
from skive.torch.training import Loss, finetune

BATCHES = 4  # whose mean gradient scores are made of
CYCLES = 10  # of corrections at most
SAMPLES = 4  # scores of a cycle, while what may go fades


def hesso(model: Any, options: Prune, loader: Iterable[Any], epochs: int, lr: float, *, periods: int = 4,
          correct: bool = False, loss: Loss = F.cross_entropy, example_inputs: Any = None, **training: Any) -> Network:
    """`model` trained while channels go, in `periods` that share the first half of the `epochs`; in evaluation mode.

    At the start of a period groups of channels are scored by five criteria of equal weight, and the least important
    ones fade to zero along a line while all weights are trained; then they are removed, which changes nothing (Chen
    et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning, 2024).
    `correct`: scores are collected while those who may go fade for a trial, until nobody new is among them (its CRIC).
    Of `options` the fraction of macs, parameters or bytes, `multiple` and `keep` count. `training`: as for `finetune`.
    """
    if options.measure == "latency" or not options.fraction:
        raise PruningError("hesso() takes a fraction of macs, parameters or bytes")
    each = max(1, epochs // (2 * periods))
    if periods < 1 or epochs <= each * periods:
        raise PruningError(f"{epochs} epochs are too few for {periods} periods and training after them")
    net = network(model, example_inputs)
    check_keep(net.source, options.keep)
    found = channel_groups(net.source)
    whole = Cost(found, options.measure).whole
    for period in range(1, periods + 1):
        cost = Cost(found, options.measure)
        wanted = 1 - (1 - options.fraction * period / periods) * whole / cost.whole
        if wanted > 0:
            part: dict[str, Any] = {options.measure: wanted}
            gone = _redundant(net, found, replace(options, **part), cost, loader, loss, correct)
            net = _faded(net, found, gone, loader, each, lr, loss, training)
        found = channel_groups(net.source)
    removed = 1 - Cost(found, options.measure).whole / whole
    finetune(net, loader, epochs - each * periods, lr, loss=loss, **training)
    net.sparsity = {f"{options.measure}_removed": removed, "criterion": "hesso-cric" if correct else "hesso"}
    return net


def _faded(net: Network, found: Groups, gone: np.ndarray, loader: Iterable[Any], epochs: int, lr: float, loss: Loss,
           training: dict[str, Any]) -> Network:
    """`net` trained while the groups `gone` fade, and without them."""
    finetune(net, loader, epochs, lr, loss=loss, step=lambda done: net.fade(_factors(found, gone, 1 - done)),
             **training)
    zero = channel_groups(net.graph())
    return Network(without(zero, np.flatnonzero(zero_groups(zero))))


def _factors(found: Groups, gone: np.ndarray, factor: float) -> dict[Node, dict[int, np.ndarray]]:
    """By constant and axis: `factor` where a group of `gone` stands, 1 elsewhere."""
    result: dict[Node, dict[int, np.ndarray]] = {}
    for g in map(int, np.flatnonzero(gone)):
        for node, by_axis in found.groups[g].places.items():
            for axis, at in by_axis.items():
                result.setdefault(node, {}).setdefault(axis, np.ones(node.shape[axis]))[list(at)] = factor
    return result


def _redundant(net: Network, found: Groups, options: Prune, cost: Cost, loader: Iterable[Any], loss: Loss,
               correct: bool) -> np.ndarray:
    """[groups] bool, which are to go."""
    data = list(itertools.islice(loader, BATCHES))
    collected = [_scores(net, found, data, loss)]
    gone = chosen_groups(found, collected[0], options, cost)
    if not correct:
        return gone
    tried = np.zeros(len(gone), bool)
    for _ in range(CYCLES):
        if not (gone & ~tried).any():
            break
        tried |= gone
        for k in range(1, SAMPLES + 1):
            trial = copy.deepcopy(net)
            trial.fade(_factors(found, tried, 1 - k / (SAMPLES + 1)))
            collected.append(_scores(trial, found, data, loss))
        gone = chosen_groups(found, np.mean(collected, 0), options, cost)
    return gone


def _scores(net: Network, found: Groups, data: Iterable[Any], loss: Loss) -> np.ndarray:
    """[groups] the sum of five criteria, each of norm 1 over all groups; inf for what stays."""
    net.eval()
    net.zero_grad()
    for inputs, target in data:
        loss(net(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,))), target).backward()
    keys = constant_keys(found.graph)
    w = {n: net.weight(n).detach().double().numpy() for n in net.constants}
    g = {n: np.zeros(n.shape) if p.grad is None else p.grad.double().numpy() for n, p in net.constants.items()}

    def total(of: dict[Node, np.ndarray]) -> np.ndarray:
        return summed(found, Importance("hesso", {keys[n]: v for n, v in of.items()}))

    squares, sizes = total({n: v**2 for n, v in w.items()}), total({n: np.abs(v) for n, v in w.items()})
    count, steep = total({n: np.ones(n.shape) for n in w}), total({n: v**2 for n, v in g.items()})
    along = total({n: v * g[n] for n, v in w.items()})
    net.zero_grad()
    can = np.isfinite(squares) & (count > 0)
    with np.errstate(invalid="ignore"):
        criteria = [np.sqrt(squares), sizes / np.maximum(count, 1), 1 - along / (np.sqrt(squares * steep) + 1e-30),
                    np.abs(along), 0.5 * along**2]
    result = np.full(len(squares), np.inf)
    result[can] = sum(c[can] / (np.linalg.norm(c[can]) + 1e-30) for c in criteria) / len(criteria)
    return result
