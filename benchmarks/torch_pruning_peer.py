"""ResNet-20 of CIFAR-10 as Torch-Pruning makes it smaller (Fang et al., DepGraph, 2023)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 64  # in which channels go until enough of the multiply-accumulates are gone


class Block(nn.Module):
    """Two convolutions and a shortcut that drops every second pixel and appends channels of zeros."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.step = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.step, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.step > 1:
            side = x.shape[1] // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """[N, 10] of images [N, 3, 32, 32]; its state is that of `resnet20_cifar10.pt`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16), (16, 32), (32, 64)]
        for i, (a, b) in enumerate(widths):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(a, b), Block(b, b), Block(b, b)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def resnet20(weights: Path, macs: float) -> nn.Module:
    """The network with at least the fraction `macs` of its multiply-accumulates removed by Torch-Pruning's global
    magnitudes. Only what the blocks have inside goes: it does not know that the zeros that a shortcut appends have
    the size of what is cut."""
    import torch_pruning

    net = ResNet20()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net.eval()
    x = torch.zeros(1, 3, 32, 32)
    inner = {m.conv1 for m in net.modules() if isinstance(m, Block)}
    stays = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inner]
    pruner = torch_pruning.pruner.BasePruner(
        net, x, torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=True, iterative_steps=STEPS,
        pruning_ratio=0.9, max_pruning_ratio=0.9, ignored_layers=stays)
    whole, _ = torch_pruning.utils.count_ops_and_params(net, x)
    for _ in range(STEPS):
        if torch_pruning.utils.count_ops_and_params(net, x)[0] <= (1 - macs) * whole:
            return net
        pruner.step()
    raise ValueError(f"Torch-Pruning cannot remove {macs:.0%} of the multiply-accumulates inside the blocks")
