"""A search for how many channels each layer needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skive.errors import PruningError
from skive.ir import Node
from skive.passes.channel_groups import Groups, channel_groups
from skive.pruning import Cost, Prune, check_keep, ranking
from skive.pruning.choice import kept_by_name, named_families, obstacles, read_axes, vector_multiple
from skive.torch.network import network
from skive.torch.training import Loss, finetune

CANDIDATES = 8  # widths of a layer at most: these parts of its channels, rounded up to its multiple
SAMPLED = 2  # of them are mixed in a step
HOT, COLD = 5.0, 0.1  # temperature of the samples at the start and at the end
TOLERANCE = 0.05  # below the target by this much, widths grow again


def search_widths(model: Any, options: Prune, loader: Iterable[Any], held_out: Iterable[Any], epochs: int, lr: float, *,
                  rate: float = 0.1, cost_weight: float = 2.0, loss: Loss = F.cross_entropy,
                  example_inputs: Any = None, **training: Any) -> Prune:
    """`options` with `widths` in place of the fraction of macs, parameters or bytes that is to go: what
    `skive.torch.prune` and `skive.compile` take for the same model. The target is met.

    After Dong and Yang, Network Pruning via Transformable Architecture Search, 2019. Each family of channels that hang
    together has a distribution over a few widths. In every step two widths are sampled from it (Gumbel-softmax, with a
    temperature that falls), and what layers read is mixed of both. Steps on the weights, on batches of `loader`,
    alternate with steps on the distributions, on those of `held_out`, whose loss has the logarithm of the expected
    cost added while the most probable widths cost too much, and subtracted while they cost too little. Not as there:
    a width's channels are the first in the order of the criterion, not interpolated, so that a width is what pruning
    leaves; depths are not searched; steps up or down by the least probability meet the target in the end.

    `model` stays as it is; weights trained on the way are not kept, `finetune` follows (there with `distill`, the
    paper's distillation). Of `options` the fraction, `criterion`, `multiple`, `keep` and `seed` count for the search.
    `rate`: Adam's, of the distributions. `cost_weight`: of the logarithm of the cost beside the loss; its 2 suits
    cross-entropies. `training`: as for `finetune`, for the steps on weights.
    """
    if options.measure == "latency" or not options.fraction or options.zeros or options.erase:
        raise PruningError("search_widths() takes a fraction of macs, parameters or bytes, without zeros and erase")
    if epochs < 1 or training.get("gradual") is not None:
        raise PruningError("search_widths() takes at least one epoch, and no gradual blocks of zeros")
    net = network(model, example_inputs)
    check_keep(net.source, options.keep)
    found = channel_groups(net.source)
    scores, options = ranking(found, options)
    widths = Widths(found, scores, options)
    optimizer = torch.optim.Adam(widths.logits, rate, betas=(0.5, 0.999), weight_decay=1e-3)
    batches = _again_and_again(held_out)

    def step(done: float) -> None:
        temperature = HOT + (COLD - HOT) * done
        inputs, target = next(batches)
        net.fade(widths.factors(widths.sampled(temperature)))
        with torch.autocast("cpu", torch.bfloat16, enabled=training.get("bfloat16", False)):
            got = net(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        got = tuple(g.float() for g in got) if isinstance(got, tuple) else got.float()
        optimizer.zero_grad()
        (loss(got, target) + cost_weight * widths.pressure()).backward(inputs=widths.logits)
        optimizer.step()
        with torch.no_grad():
            net.fade(widths.factors(widths.sampled(temperature)))

    finetune(net, loader, epochs, lr, loss=loss, step=step, **training)
    fraction: dict[str, Any] = {options.measure: None}
    return replace(options, widths=widths.met(), **fraction)


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise PruningError("held_out holds no batch, or can be read only once")


class Widths:
    """Distributions over the widths of the families of channels of `found`, uniform at first. PruningError if no
    choice of widths removes as much as `options` ask for."""

    def __init__(self, found: Groups, scores: np.ndarray, options: Prune):
        self._found, self._cost = found, Cost(found, options.measure)
        self._limit = (1 - options.fraction) * self._cost.whole
        named = named_families(found)
        kept = kept_by_name(found, options.keep)
        self._names = list(named)
        self._orders = [np.array(sorted(f, key=lambda g: (-scores[g], -g))) for f in named.values()]  # what stays first
        self._widths = [[len(f)] if f in kept else _candidates(len(f), options.multiple) for f in named.values()]
        self.logits = [torch.zeros(len(w), requires_grad=True) for w in self._widths]
        self._generator = torch.Generator().manual_seed(options.seed)
        self._costs: dict[tuple[int, ...], float] = {}
        read = read_axes(found)
        self._read = torch.zeros(len(found.groups), dtype=torch.bool)  # by some layer's weights
        self._places: list[tuple[Node, int, Tensor, bool]] = []  # constant, axis, groups along it, whether it reads
        for node in sorted({n for f in named.values() for n in found.groups[f[0]].places}, key=found.graph.nodes.index):
            for axis, groups in enumerate(map(torch.from_numpy, found.axes[node])):
                self._places.append((node, axis, groups, (node, axis) in read))
                if (node, axis) in read:
                    self._read[groups] = True
        least = self.cost([w[-1] for w in self._widths])
        if not named or least > self._limit:
            raise PruningError(f"{found.graph.name}: at most {1 - least / self._cost.whole:.0%} of the "
                               f"{options.measure} can be removed, not {options.fraction:.0%}: {obstacles(found)}")

    def cost(self, widths: Sequence[int]) -> float:
        """What is left with a width for each family."""
        key = tuple(widths)
        if key not in self._costs:
            gone = np.zeros(len(self._found.groups), bool)
            for order, width in zip(self._orders, widths, strict=True):
                gone[order[width:]] = True
            self._costs[key] = self._cost(gone)
        return self._costs[key]

    def sampled(self, temperature: float) -> Tensor:
        """[groups] in which share of a mixture of sampled widths each group is; 1 for what cannot be removed."""
        result = torch.ones(len(self._found.groups))
        for order, widths, logits in zip(self._orders, self._widths, self.logits, strict=True):
            noise = -torch.empty(len(widths)).exponential_(generator=self._generator).log()
            noisy = (logits.log_softmax(0) + noise) / temperature
            some = torch.multinomial(noisy.detach().softmax(0), min(SAMPLED, len(widths)), generator=self._generator)
            inside = torch.arange(len(order)) < torch.tensor(widths)[some, None]  # [SAMPLED, channels]
            result = result.index_put((torch.from_numpy(order),), noisy[some].softmax(0) @ inside.float())
        return result

    def factors(self, shares: Tensor) -> dict[Node, dict[int, Tensor]]:
        """By constant and axis, what `Network.fade` takes for the `shares` [groups]: they multiply what layers read;
        elsewhere channels are there or not. Channels that no layer's weights read (of queries and keys) are multiplied
        where they are made."""
        made = torch.where(self._read, (shares > 0).float(), shares)
        result: dict[Node, dict[int, Tensor]] = {}
        for node, axis, groups, reads in self._places:
            result.setdefault(node, {})[axis] = (shares if reads else made)[groups]
        return result

    def pressure(self) -> Tensor:
        """A term whose gradient is that of the logarithm of the expected cost, each family's with the others at
        their expected widths; turned round while the most probable widths cost too little, 0 while they fit."""
        now = self.cost(self._widths_at(self._most_probable()))
        if (1 - TOLERANCE) * self._limit <= now <= self._limit:
            return torch.zeros((), requires_grad=True)
        chances = [v.softmax(0) for v in self.logits]
        expected = [round(float(p.detach() @ torch.tensor(w, dtype=torch.float32)))
                    for p, w in zip(chances, self._widths, strict=True)]
        total = torch.zeros(())
        for i, (p, widths) in enumerate(zip(chances, self._widths, strict=True)):
            total = total + p @ torch.tensor([self.cost([*expected[:i], w, *expected[i + 1:]]) for w in widths],
                                             dtype=torch.float32) / self.cost(expected)
        return total if now > self._limit else -total

    def met(self) -> dict[str, int]:
        """By layer, the most probable widths, changed by the least probability for the cost that it saves until the
        target is met; what that leaves over is given back."""
        chances = [v.detach().log_softmax(0).tolist() for v in self.logits]
        at = self._most_probable()

        def moved(i: int, by: int) -> tuple[list[int], float, float]:
            """(the candidates with family i one further, its probability's logarithm lost, the cost then)."""
            new = [a + by * (i == j) for j, a in enumerate(at)]
            return new, chances[i][at[i]] - chances[i][new[i]], self.cost(self._widths_at(new))

        while (now := self.cost(self._widths_at(at))) > self._limit:
            down = [moved(i, 1) for i, a in enumerate(at) if a + 1 < len(chances[i])]
            at = min(down, key=lambda m: m[1] / max(now - m[2], 1e-9))[0]
        while up := [m for m in (moved(i, -1) for i, a in enumerate(at) if a) if m[2] <= self._limit]:
            at = min(up, key=lambda m: m[1])[0]
        return dict(zip(self._names, self._widths_at(at), strict=True))

    def _most_probable(self) -> list[int]:
        return [int(v.argmax()) for v in self.logits]

    def _widths_at(self, places: Sequence[int]) -> list[int]:
        return [w[i] for w, i in zip(self._widths, places, strict=True)]


def _candidates(size: int, multiple: int | None) -> list[int]:
    """Widths of a layer with `size` channels, the whole first."""
    m = multiple or vector_multiple(size)
    return sorted({min(size, math.ceil(size * k / (CANDIDATES * m)) * m) for k in range(1, CANDIDATES + 1)},
                  reverse=True)
