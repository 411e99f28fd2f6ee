"""Dynamic networks as people write them in PyTorch: small, with seeded weights, runnable without data.

Every `forward` returns its result and the path that it took, as a number. Where a network decides by a score, its
limits are quantiles of that score over seeded inputs, so that every path is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALIBRATION = 96  # inputs that limits are set on


class Dynamic(nn.Module):
    """A network that compares scores with limits."""

    paths: int  # that exist

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[float] = [0.0] * 16
        self.seen: dict[int, list[float]] | None = None

    def above(self, i: int, score: Tensor) -> bool:
        """Whether the score of decision `i` is above its limit."""
        if self.seen is not None:
            self.seen.setdefault(i, []).append(float(score))
        return score.item() > self.limits[i]

    def example(self, seed: int) -> Tensor:
        raise NotImplementedError


def image(seed: int, size: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(1, 3, 4, 4, generator=g) * (0.3 + seed % 7 * 0.4)
    fine = torch.randn(1, 3, size, size, generator=g) * (0.1 + seed % 5 * 0.3)
    return F.interpolate(low, size=size, mode="nearest") + fine + (seed % 3 - 1) * 0.5


def calibrated(make: Callable[[], Dynamic], decisions: int, fraction: float) -> Dynamic:
    """The network with limits that `fraction` of the inputs that come to each decision exceed."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for i in range(decisions):
            net.seen = {}
            for seed in range(CALIBRATION):
                net(net.example(1000 + seed))
            scores = net.seen.get(i, [0.0])
            share = fraction if fraction else 1 / (decisions + 1 - i)
            net.limits[i] = float(torch.tensor(scores).quantile(1 - share))
    net.seen = None
    return net


def conv(a: int, b: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(b),
                         nn.ReLU(inplace=True))


class Basic(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1):
        super().__init__()
        self.first = conv(a, b, stride)
        self.second = nn.Sequential(nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b))
        self.short = nn.Conv2d(a, b, 1, stride) if stride > 1 or a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.short(x))


class Inverted(nn.Module):
    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(conv(a, 4 * a, kernel=1), conv(4 * a, 4 * a, stride, groups=4 * a),
                                  nn.Conv2d(4 * a, b, 1, bias=False), nn.BatchNorm2d(b))
        self.residual = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 10):
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class EarlyExits(Dynamic):
    """SDN, BranchyNet: a head behind every stage, left when its largest probability is high enough."""

    def __init__(self, stages: list[nn.Module], widths: list[int]):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList([Head(w) for w in widths])
        self.paths = len(stages)

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for i, (stage, head) in enumerate(zip(self.stages, self.heads)):
            x = stage(x)
            logits = head(x)
            if i + 1 < len(self.stages) and self.above(i, logits.softmax(1).max()):
                return logits, i
        return logits, i


def sdn_resnet() -> Dynamic:
    return calibrated(lambda: EarlyExits(
        [nn.Sequential(conv(3, 16), Basic(16, 16), Basic(16, 16)), nn.Sequential(Basic(16, 32, 2), Basic(32, 32)),
         nn.Sequential(Basic(32, 64, 2), Basic(64, 64))], [16, 32, 64]), 2, 0)


def sdn_vgg() -> Dynamic:
    def stage(a: int, b: int) -> nn.Module:
        return nn.Sequential(conv(a, b), conv(b, b), nn.MaxPool2d(2))

    return calibrated(lambda: EarlyExits([stage(3, 16), stage(16, 32), stage(32, 64), stage(64, 64)],
                                         [16, 32, 64, 64]), 3, 0)


def sdn_mobilenet() -> Dynamic:
    return calibrated(lambda: EarlyExits(
        [nn.Sequential(conv(3, 16, 2), Inverted(16, 16, 1)), nn.Sequential(Inverted(16, 24, 2), Inverted(24, 24, 1)),
         nn.Sequential(Inverted(24, 32, 2), Inverted(32, 32, 1))], [16, 24, 32]), 2, 0)


class MSDNet(Dynamic):
    """Two scales, every layer sees all before it; a classifier on the coarse scale of each block."""

    paths = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8), conv(8, 16, 2)
        self.fine = nn.ModuleList([conv(8 * (i + 1), 8) for i in range(3)])
        self.coarse = nn.ModuleList([conv(16 * (i + 1), 8) for i in range(3)])
        self.strided = nn.ModuleList([conv(8 * (i + 1), 8, 2) for i in range(3)])
        self.heads = nn.ModuleList([Head(16 * (i + 2)) for i in range(3)])

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        fine = [self.stem(x)]
        coarse = [self.down(fine[0])]
        for i in range(3):
            seen = torch.cat(fine, 1)
            coarse.append(torch.cat([self.coarse[i](torch.cat(coarse, 1)), self.strided[i](seen)], 1))
            fine.append(self.fine[i](seen))
            logits = self.heads[i](torch.cat(coarse, 1))
            if i < 2 and self.above(i, logits.softmax(1).max()):
                break
        return logits, i


class SkipNet(Dynamic):
    """Each residual block has a gate that looks at what comes in."""

    paths = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 2)
        self.blocks = nn.ModuleList([Basic(16, 16) for _ in range(4)])
        self.gates = nn.ModuleList([Head(16, 1) for _ in range(4)])
        self.last = Head(16)

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x, path = self.stem(x), 0
        for i, (block, gate) in enumerate(zip(self.blocks, self.gates)):
            if self.above(i, torch.sigmoid(gate(F.layer_norm(x, x.shape[1:])))):
                x = block(x)
                path += 2 ** i
        return self.last(x), path


class BlockDrop(Dynamic):
    """A policy network says beforehand which blocks run."""

    paths = 16

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(conv(3, 8, 4), nn.Flatten(), nn.Linear(8 * 64, 4))
        self.stem = conv(3, 16, 2)
        self.blocks = nn.ModuleList([Basic(16, 16) for _ in range(4)])
        self.last = Head(16)

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        keep = torch.sigmoid(self.policy(x))[0].tolist()
        x, path = self.stem(x), 0
        for i, block in enumerate(self.blocks):
            if keep[i] > 0.5:
                x = block(x)
                path = path + 2 ** i
        return self.last(x), path


class AdaptiveDepth(Dynamic):
    """One block again and again, until it changes little."""

    paths = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = conv(3, 16, 2), Basic(16, 16), Head(16)

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x, steps, done = self.stem(x), 0, False
        while not done and steps < 8:
            new = 0.5 * x + 0.5 * self.block(x)
            change = (new - x).abs().mean() / x.abs().mean()
            done = self.above(steps, -change)
            x = new
            steps += 1
        return self.last(x), steps


class PonderNet(Dynamic):
    """A recurrent cell that ponders until the probability of having halted is high; results weighted by it."""

    paths = 6

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt, self.out = nn.GRUCell(32, 64), nn.Linear(64, 1), nn.Linear(64, 10)

    def example(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(1, 32, generator=g) * (0.2 + seed % 9 * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        h = torch.zeros(1, 64)
        y, left, halted = torch.zeros(1, 10), 1.0, 0.0
        for n in range(6):
            h = self.cell(x, h)
            p = torch.sigmoid(4 * self.halt(h)).item()
            y = y + left * p * self.out(h)
            halted += left * p
            left = left * (1 - p)
            if n < 5 and self.above(n, torch.as_tensor(halted)):
                break
        return y, n


class PABEE(Dynamic):
    """ALBERT: one layer for all depths; left once so many classifiers in a row agree."""

    paths = 5
    patience = 2

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(100, 64), nn.Parameter(torch.randn(16, 64) * 0.1)
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.heads = nn.ModuleList([nn.Linear(64, 3) for _ in range(6)])

    def example(self, seed: int) -> Tensor:
        return torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(seed))

    def layer(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 16, 64)
        x = self.norms[0](x + self.proj(a))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        x = self.words(tokens) + self.places
        counter, last = 0, None
        for i, head in enumerate(self.heads):
            x = self.layer(x)
            logits = head(x[:, 0])
            label = int(logits.argmax())
            counter = counter + 1 if label == last else 0
            last = label
            if counter == self.patience:
                return logits, i
        return logits, len(self.heads)


class RNNLength(Dynamic):
    """A recurrent network that runs as far as the sentence goes."""

    paths = 13

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.out = nn.Embedding(50, 32), nn.LSTMCell(32, 64), nn.Linear(64, 5)

    def example(self, seed: int) -> Tensor:
        tokens = torch.randint(1, 50, (1, 12), generator=torch.Generator().manual_seed(seed))
        tokens[0, seed % 13:] = 0
        return tokens

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        length = int((tokens != 0).sum())
        h = c = torch.zeros(1, 64)
        for t in range(min(length, tokens.shape[1])):
            h, c = self.cell(self.words(tokens[:, t]), (h, c))
        return self.out(h), length


class MoE(Dynamic):
    """Two layers of four experts, of which the best one runs."""

    paths = 16

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList([nn.Linear(64, 4) for _ in range(2)])
        self.experts = nn.ModuleList([nn.ModuleList([
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]) for _ in range(2)])

    def example(self, seed: int) -> Tensor:
        return torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 2

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        path = 0
        for router, experts in zip(self.routers, self.experts):
            weights = router(F.layer_norm(x, [64])).softmax(-1)
            best = int(weights.argmax())
            x = x + weights[0, best] * experts[best](x)
            path = 4 * path + best
        return x, path


class Nested(Dynamic):
    """Ifs in ifs, with a result that leaves early."""

    paths = 5

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 2)
        self.sides = nn.ModuleList([Basic(16, 16) for _ in range(4)])
        self.last = Head(16)

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def refine(self, x: Tensor) -> tuple[Tensor, int]:
        if self.above(2, x.mean()):
            return self.sides[2](x), 2
        return self.sides[3](self.sides[2](x)), 3

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.stem(x)
        if self.above(0, x.square().mean()):
            y = self.sides[0](x)
            if self.above(1, y.mean()):
                return self.last(y), 0
            if self.above(3, y.max()):
                y, path = self.sides[1](y), 1
            else:
                path = 4
        else:
            y, path = self.refine(x)
        return self.last(y), path


class Cascade(Dynamic):
    """A small network, and a large one for what it is not sure of."""

    paths = 2

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(conv(3, 8, 2), conv(8, 16, 2), Head(16))
        self.large = nn.Sequential(conv(3, 32), Basic(32, 32, 2), Basic(32, 64, 2), Head(64))

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        logits = self.small(x)
        two = logits.softmax(1).topk(2).values[0]
        if self.above(0, two[0] - two[1]):
            return logits, 0
        return self.large(x), 1


class Greedy(Dynamic):
    """Decodes word by word until the stop token."""

    paths = 9
    stop = 0

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.words = nn.Linear(32, 64), nn.Embedding(24, 32)
        self.cell, self.out = nn.GRUCell(32, 64), nn.Linear(64, 24)
        with torch.no_grad():
            self.out.weight.mul_(6)
            self.out.bias[self.stop] += 0.9

    def example(self, seed: int) -> Tensor:
        return torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * 3

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        h = torch.tanh(self.encoder(x))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        token, length = 1, 0
        while length < 8:
            h = self.cell(self.words(torch.as_tensor([token])), h)
            token = self.out(h).argmax().item()
            if token == self.stop:
                break
            tokens[0, length] = token
            length += 1
        return tokens, length


class RBQE(Dynamic):
    """A nested U-Net for images, left at the depth whose result is good enough by a measure without reference."""

    paths = 3

    def __init__(self) -> None:
        super().__init__()
        w = [8, 12, 16]
        self.down = nn.ModuleList([conv(3, w[0]), conv(w[0], w[1], 2), conv(w[1], w[2], 2)])
        self.first = nn.ModuleList([conv(w[0] + w[1], w[0]), conv(w[1] + w[2], w[1])])
        self.second = conv(2 * w[0] + w[1], w[0])
        self.outs = nn.ModuleList([nn.Conv2d(w[0], 3, 3, padding=1) for _ in range(3)])

    def example(self, seed: int) -> Tensor:
        return image(seed)

    def quality(self, y: Tensor) -> Tensor:
        """Minus the mean second difference: how free of noise and blocks an image is."""
        dx = y[..., 2:] - 2 * y[..., 1:-1] + y[..., :-2]
        dy = y[..., 2:, :] - 2 * y[..., 1:-1, :] + y[..., :-2, :]
        return -(dx.abs().mean() + dy.abs().mean())

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        a = self.down[0](x)
        y = x + self.outs[0](a)
        if self.above(0, self.quality(y)):
            return y, 0
        b = self.down[1](a)
        up = F.interpolate(b, scale_factor=2.0, mode="nearest")
        a1 = self.first[0](torch.cat([a, up], 1))
        y = x + self.outs[1](a1)
        if self.above(1, self.quality(y)):
            return y, 1
        c = self.down[2](b)
        b1 = self.first[1](torch.cat([b, F.interpolate(c, scale_factor=2.0, mode="nearest")], 1))
        a2 = self.second(torch.cat([a, a1, F.interpolate(b1, scale_factor=2.0, mode="nearest")], 1))
        return x + self.outs[2](a2), 2


NETWORKS: dict[str, Callable[[], Any]] = {
    "sdn-resnet": sdn_resnet,
    "sdn-vgg": sdn_vgg,
    "sdn-mobilenet": sdn_mobilenet,
    "msdnet": lambda: calibrated(MSDNet, 2, 0),
    "skipnet": lambda: calibrated(SkipNet, 4, 0.5),
    "blockdrop": lambda: calibrated(BlockDrop, 0, 0),
    "adaptive-depth": lambda: calibrated(AdaptiveDepth, 7, 0),
    "pondernet": lambda: calibrated(PonderNet, 5, 0),
    "pabee-albert": lambda: calibrated(PABEE, 0, 0),
    "rnn-length": lambda: calibrated(RNNLength, 0, 0),
    "moe": lambda: calibrated(MoE, 0, 0),
    "nested-ifs": lambda: calibrated(Nested, 4, 0.5),
    "cascade": lambda: calibrated(Cascade, 1, 0.5),
    "greedy-decoding": lambda: calibrated(Greedy, 0, 0),
    "rbqe": lambda: calibrated(RBQE, 2, 0),
}
