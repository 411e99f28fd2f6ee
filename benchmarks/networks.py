"""The networks for CIFAR-10 that are trained here."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as fn


class Block(nn.Module):
    """A residual block whose shortcut drops every other pixel and pads channels (He et al., 2015, option A)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.pad = (channels - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(fn.relu(self.bn1(self.conv1(x)))))
        return fn.relu(y + (fn.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x))


class ResNet20(nn.Module):
    """[N, 10] of images [N, 3, 32, 32]; its state is that of `resnet20_cifar10.pt`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(fn.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class MobileNet(nn.Sequential):
    """[N, 10] of images [N, 3, 32, 32]: MobileNet (Howard et al., 2017) of half the width, without the first and the
    last of its five halvings, 12.2 million multiply-accumulates."""

    def __init__(self) -> None:
        plan = [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2),
                *[(256, 256, 1)] * 5, (256, 512, 2), (512, 512, 1)]
        layers = [*_normed(nn.Conv2d(3, 16, 3, 1, 1, bias=False))]
        for inputs, channels, stride in plan:
            layers += [*_normed(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)),
                       *_normed(nn.Conv2d(inputs, channels, 1, bias=False))]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _normed(layer: nn.Conv2d) -> tuple[nn.Module, ...]:
    return layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()
