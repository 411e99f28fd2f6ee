"""Learned gates: when to leave, from how sure each head is (the criterion `gate`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as fn

from skive.errors import ExitError
from skive.exits import Exit
from skive.torch.exits import WithExits

LARGEST_WEIGHT = 5.0  # of the samples that are to leave, where they are few
DECAY = 1e-4  # keeps the weights finite where the samples can be told apart
STEPS = 300


def features(logits: Tensor) -> Tensor:
    """[n, 4] what a gate reads: largest probability, entropy, margin, entropy of the normalised p^2."""
    log_p = logits.log_softmax(-1)
    log_q = (2 * log_p).log_softmax(-1)
    two = log_p.exp().topk(2, -1).values

    def entropy(log_values: Tensor) -> Tensor:
        return -(log_values.exp() * log_values.clamp(min=-100)).sum(-1)

    return torch.stack([two[:, 0], entropy(log_p), two[:, 0] - two[:, 1], entropy(log_q)], -1)


@torch.no_grad()
def answers(model: WithExits, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """(logits [n, classes] of every exit and of the network, classes [n])."""
    model.eval()
    rows, classes = [], []
    for x, y in batches:
        rows.append(tuple(model(x).values()))
        classes.append(y)
    if not rows:
        raise ExitError("there is no sample to train gates with")
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.cat(classes)


def train_gates(model: WithExits, batches: Iterable[tuple[Tensor, Tensor]], costs: Sequence[float],
                tradeoff: float = 0.5, threshold: float = 0.5) -> list[Exit]:
    """The exits of `model` with learned gates, for `exits=` of `skive.compile` (Regol et al., Jointly-Learned Exit and
    Inference for a Dynamic Neural Network, 2024: the phase of the gates; heads stay as they are).

    `batches`: (input, class) that the heads were not trained on. `costs`: multiply-accumulates from the start to each
    exit and to the end, as `Module.exits` has them. The best exit of a sample has the smallest cross-entropy +
    tradeoff * cost / whole cost; a gate learns to open from there on. Larger `tradeoff`: earlier and less accurate.
    """
    logits, classes = answers(model, batches)
    return fit_gates(logits, classes, costs, tradeoff, threshold)


def fit_gates(logits: Sequence[Tensor], classes: Tensor, costs: Sequence[float], tradeoff: float = 0.5,
              threshold: float = 0.5) -> list[Exit]:
    """`train_gates` from the logits [n, classes] of every exit and of the whole network."""
    if len(costs) != len(logits):
        raise ExitError(f"there are {len(logits)} answers, the whole network's among them, and {len(costs)} costs")
    errors = torch.stack([fn.cross_entropy(v, classes, reduction="none") for v in logits], -1)
    share = torch.tensor([c / costs[-1] for c in costs])
    best = (errors + tradeoff * share).argmin(-1)
    found = []
    for k, v in enumerate(logits[:-1]):
        wanted = (best <= k).float()
        x = features(v)
        mean, spread = x.mean(0), x.std(0) + 1e-6
        scaled = (x - mean) / spread
        opening = float(wanted.sum())
        weight = min(LARGEST_WEIGHT, (len(wanted) - opening) / max(opening, 1.0))
        parameters = _separated(scaled, wanted, weight)
        slopes = parameters[:4] / spread
        bias = parameters[4] - (slopes * mean).sum()
        found.append(Exit(f"exit{k}", "gate", threshold, of=[*slopes.tolist(), float(bias)]))
    return found


def _separated(scaled: Tensor, wanted: Tensor, weight: float) -> Tensor:
    """[5] weights and bias of the logistic regression of `wanted` on `scaled` [n, 4]; those wanted count `weight`."""
    parameters = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = fn.binary_cross_entropy_with_logits(scaled @ parameters[:4] + parameters[4], wanted,
                                                    pos_weight=torch.tensor(weight))
        error = error + DECAY * parameters[:4].square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    return parameters.detach()
