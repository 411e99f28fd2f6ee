"""Networks for CIFAR-10 as Torch-Pruning makes them smaller (Fang et al., DepGraph, 2023)."""

from __future__ import annotations

import torch
from networks import Block
from torch import nn

STEPS = 64  # in which channels go until enough of the multiply-accumulates are gone


def pruned(net: nn.Module, macs: float) -> nn.Module:
    """`net` with at least the fraction `macs` of its multiply-accumulates removed by Torch-Pruning's global magnitudes.
    Of residual blocks only what they have inside goes: it does not know that the zeros that a shortcut appends have
    the size of what is cut. Classes stay."""
    import torch_pruning

    net.eval()
    x = torch.zeros(1, 3, 32, 32)
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    inner = {b.conv1 for b in blocks} if blocks else set(layers[:-1])
    pruner = torch_pruning.pruner.BasePruner(
        net, x, torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=True, iterative_steps=STEPS,
        pruning_ratio=0.9, max_pruning_ratio=0.9, ignored_layers=[m for m in layers if m not in inner])
    whole, _ = torch_pruning.utils.count_ops_and_params(net, x)
    for _ in range(STEPS):
        if torch_pruning.utils.count_ops_and_params(net, x)[0] <= (1 - macs) * whole:
            return net
        pruner.step()
    raise ValueError(f"Torch-Pruning cannot remove {macs:.0%} of the multiply-accumulates")
