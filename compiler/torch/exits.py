"""Early exits for PyTorch models that have none: heads behind layers, and their training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from skive.errors import ExitError
from skive.frontend.exit_point import exit_point

__all__ = ["WithExits", "add_exits", "exit_point", "suggest_exits", "train_exits"]

GRID = 4  # positions per side of which a head of images keeps the average and the maximum
SMALL_GRID = 2  # the same behind a convolution, which has seen the neighbours
RISE = 50  # batches until the rate of training has risen
CONVOLVED = 8  # positions per side that the convolution of a head is to give
Progress = Callable[[int, float], None]  # (epoch, mean loss of its batches)


class Head(nn.Module):
    """Class scores from the features of some layer.

    Of images [N, C, H, W]: averages and maxima over a grid of `grid` rows and as many columns, or (rows, columns), then
    one linear layer (Kaya et al., Shallow-Deep Networks, 2019, reduce features so); before that, with `channels`,
    averages of 2x2 and a 3x3 convolution to so many, of stride 2 where more than 8 positions per side are left: what
    never leaves pays for it too.
    Of sequences [N, T, C] the mean over T. Of [N, C] the linear layer alone. With `hidden`, before the last layer
    a normalisation over the batch, another linear one with so many outputs and ReLU.
    """

    def __init__(self, example: Tensor, classes: int, channels: int = 0, grid: int | tuple[int, int] | None = None,
                 hidden: int = 0) -> None:
        super().__init__()
        self.window: tuple[int, int] | None = None
        self.features: nn.Module = nn.Identity()
        width = example.shape[1]
        if example.dim() == 4:
            grid = grid or (SMALL_GRID if channels else GRID)
            if channels:
                stride = 2 if max(example.shape[2:]) // 2 > CONVOLVED else 1
                self.features = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, channels, 3, stride, 1, bias=False),
                                              nn.BatchNorm2d(channels), nn.ReLU())
                example = self.features.eval()(example)
            height, wide = example.shape[2:]
            rows, columns = (grid, grid) if isinstance(grid, int) else grid
            self.window = (max(1, height // rows), max(1, wide // columns))
            width = self._pooled(example).shape[1]
        elif example.dim() == 3:
            width = example.shape[2]
        elif example.dim() != 2:
            raise ExitError(f"a head reads a tensor of 2 to 4 dimensions, not {example.dim()}")
        self.linear: nn.Module = nn.Linear(hidden or width, classes)
        if hidden:
            normalise = nn.BatchNorm1d(width, affine=False)
            self.linear = nn.Sequential(normalise, nn.Linear(width, hidden), nn.ReLU(), self.linear)

    def _pooled(self, x: Tensor) -> Tensor:
        assert self.window is not None
        both = [fn.avg_pool2d(x, self.window), fn.max_pool2d(x, self.window)]
        return torch.cat(both, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.window is not None:
            x = self._pooled(self.features(x))
        elif x.dim() == 3:
            x = x.mean(1)
        y: Tensor = self.linear(x)
        return y


class WithExits(nn.Module):
    """A network and heads behind some of its layers. `forward` returns {"exit0": logits, ..., "output": y}."""

    def __init__(self, network: nn.Module, at: Sequence[str], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network, self.at = network, tuple(at)
        self.heads = nn.ModuleList(heads)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        features, y = features_at(self.network, self.at, inputs)
        answers = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return {f"exit{i}": a for i, a in enumerate(answers)} | {"output": y}


def features_at(network: nn.Module, at: Sequence[str], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(the results of the submodules called `at`, the result of `network`). ExitError if one is not there."""
    known = dict(network.named_modules())
    found: dict[str, Tensor] = {}
    hooks = []
    for name in at:
        if name not in known:
            raise ExitError(f"{type(network).__name__} has no submodule {name!r}; see named_modules()")

        def keep(module: nn.Module, given: Any, result: Any, name: str = name) -> None:
            found[name] = result

        hooks.append(known[name].register_forward_hook(keep))
    try:
        y = network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in at:
        if not isinstance(found.get(name), Tensor):
            raise ExitError(f"submodule {name} gives no tensor on these inputs; a head reads one tensor")
    if not isinstance(y, Tensor):
        raise ExitError(f"{type(network).__name__} returns {type(y).__name__}; exits are added to a network with one "
                        "result")
    return [found[name] for name in at], y


def suggest_exits(network: nn.Module, example_inputs: Sequence[Tensor], count: int = 3) -> list[str]:
    """`count` submodules behind which exits lie evenly in the network's multiply-accumulates, in order.

    Blocks are asked: members of a Sequential or ModuleList that are not layers themselves, else all layers with
    weights. The last of them is left out: an exit there would save nothing.
    """
    spent = 0
    reached: dict[str, tuple[float, bool]] = {}
    hooks = []
    names = {m: n for n, m in network.named_modules()}
    blocks = {m for parent in network.modules() if isinstance(parent, (nn.Sequential, nn.ModuleList))
              for m in parent.children() if any(True for _ in m.children())}

    def count_macs(module: nn.Module, given: Any, result: Any) -> None:
        nonlocal spent
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and isinstance(result, Tensor):
            spent += weight.numel() * result.numel() // (len(result) * weight.shape[0])  # type: ignore[union-attr]
        if isinstance(result, Tensor) and result.dim() in (2, 3, 4):
            reached[names[module]] = (spent, module in blocks)

    for module in network.modules():
        if module is not network:
            hooks.append(module.register_forward_hook(count_macs))
    try:
        with torch.no_grad():
            network(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    wanted = [n for n, (_, block) in reached.items() if block] or list(reached)
    wanted = [n for n in wanted if 0 < reached[n][0] < spent]
    chosen: list[str] = []
    for i in range(count):
        left = [n for n in wanted if n not in chosen]
        if not left:
            break
        chosen.append(min(left, key=lambda n: abs(reached[n][0] / spent - (i + 1) / (count + 1))))
    return sorted(chosen, key=lambda n: reached[n][0])


def add_exits(network: nn.Module, example_inputs: Sequence[Tensor], at: Sequence[str] | int = 3,
              classes: int | None = None, channels: int = 0, grid: int | tuple[int, int] | None = None,
              hidden: int = 0) -> WithExits:
    """`network` with untrained heads behind the submodules called `at`, or at so many suggested places.

    `classes`: by default the size of the last axis of the network's result. `channels`: of a convolution in each
    head of image features, 0 for none; `grid`: positions per side that a head keeps of them (4, behind a convolution 2;
    1 is cheapest and learns from the fewest samples), or (rows, columns): of a spectrum, where columns are
    frequencies and rows time, (1, 5) tells five bands apart and not when something was heard. `hidden`: outputs of a
    linear layer with ReLU before the last one, 0 for none: a head that can tell more apart asks less of the features.
    Train them with `train_exits`.
    """
    places = suggest_exits(network, example_inputs, at) if isinstance(at, int) else list(at)
    with torch.no_grad():
        features, y = features_at(network, places, example_inputs)
    return WithExits(network, places, [Head(f, classes or y.shape[-1], channels, grid, hidden) for f in features])


def train_exits(model: WithExits, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], epochs: int = 10,
                lr: float = 2e-3, weight_decay: float = 1e-3, distill: float = 0.5, network_lr: float = 0.0,
                teacher: Callable[[Tensor], Tensor] | None = None, temperature: float = 1.0, noise: float = 0.0,
                bfloat16: bool = False, progress: Progress = lambda epoch, loss: None) -> WithExits:
    """`model` with trained heads, in evaluation mode. The network itself is not changed, unless `network_lr` says how
    fast it may learn along, its normalisation statistics fixed (joint training).

    `batches()` gives the (input, class) batches of one epoch. The loss of each head is the cross-entropy with the
    classes and, with weight `distill`, with the probabilities of the network, or of the `teacher` that is given,
    softened by `temperature` (Hinton et al., Distilling the Knowledge in a Neural Network, 2015); with a teacher the
    network that learns along has the same loss. With `distill=1` classes do not count, so that images may be mixed.
    `noise`: the standard deviation of what is added to the features that heads read, as a share of their root mean
    square. It keeps heads from resting on small differences (Bishop, Training with Noise Is Equivalent to Tikhonov
    Regularization, 1995), so that in INT8 more samples leave where they leave in float32.
    Adam; the rate rises over the first batches and falls along a cosine. `bfloat16`: products in that type, faster
    where the processor has them.
    """
    model.network.eval()
    groups = [{"params": list(model.heads.parameters()), "lr": lr}]
    if network_lr:
        groups.append({"params": list(model.network.parameters()), "lr": network_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    rates = [float(g["lr"]) for g in groups]  # type: ignore[arg-type]
    model.heads.train()

    def lost(logits: Tensor, y: Tensor, soft: Tensor) -> Tensor:
        hard = fn.cross_entropy(logits, y) if distill < 1 else logits.new_zeros(())
        return (1 - distill) * hard + distill * temperature**2 * fn.cross_entropy(logits / temperature, soft)

    seen = length = 0
    for epoch in range(epochs):
        losses: list[float] = []
        for x, y in batches():
            done = (epoch + len(losses) / length if length else 0.0) / epochs
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (seen + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            seen += 1
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                with torch.set_grad_enabled(bool(network_lr)):
                    features, answer = features_at(model.network, model.at, (x,))
                if noise:
                    features = [f + noise * f.detach().square().mean().sqrt() * torch.randn_like(f) for f in features]
                heads = [head(f).float() for head, f in zip(model.heads, features, strict=True)]
            answer = answer.float()
            with torch.no_grad():
                soft = ((answer if teacher is None else teacher(x)) / temperature).softmax(-1)
            total = x.new_zeros(())
            if network_lr:
                total = fn.cross_entropy(answer, y) if teacher is None else lost(answer, y, soft)
            for logits in heads:
                total = total + lost(logits, y, soft)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(float(total.detach()) / len(model.heads))
        length = len(losses)
        progress(epoch, sum(losses) / max(1, len(losses)))
    return model.eval()
