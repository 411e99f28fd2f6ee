"""Small networks in which channels hang together in every way that we know of.

The list follows the sanity checks of OTO (Chen et al., OTOv3, 2023) and what users prune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

IMAGE = (1, 3, 16, 16)


class Lambda(nn.Module):
    def __init__(self, fn: Callable[..., Tensor], *parts: nn.Module):
        super().__init__()
        self.fn, self.parts = fn, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.parts)


def conv(i: int, o: int, k: int = 3, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU,
         norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=not norm)]
    layers += [nn.BatchNorm2d(o)] if norm else []
    return nn.Sequential(*layers, *([act()] if act else []))


def classifier(body: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def residual(body: nn.Module, skip: nn.Module | None = None) -> nn.Module:
    return Lambda(lambda x, b, *s: F.relu(b(x) + (s[0](x) if s else x)), *([body, skip] if skip else [body]))


def vgg() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 12), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(12 * 16, 10), nn.ReLU(), nn.Linear(10, 5))


def resnet() -> nn.Module:
    return classifier(nn.Sequential(
        conv(3, 8), residual(nn.Sequential(conv(8, 6), conv(6, 8, act=None))),
        residual(nn.Sequential(conv(8, 10, stride=2), conv(10, 12, act=None)), conv(8, 12, 1, stride=2, act=None)),
        residual(nn.Sequential(conv(12, 4, 1), conv(4, 4), conv(4, 12, 1, act=None)))), 12)


def resnext() -> nn.Module:
    return classifier(nn.Sequential(conv(3, 8), residual(nn.Sequential(conv(8, 16, 1), conv(16, 16, groups=4),
                                                                       conv(16, 8, 1, act=None)))), 8)


def densenet() -> nn.Module:
    def dense(x: Tensor, *layers: nn.Module) -> Tensor:
        for layer in layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    def layer(i: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 4, 3, padding=1))

    return classifier(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Lambda(dense, layer(8), layer(12), layer(16)),
                                    conv(20, 10, 1), nn.AvgPool2d(2), Lambda(dense, layer(10), layer(14))), 18)


def convnext() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, c: int):
            super().__init__()
            self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
            self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
            self.scale = nn.Parameter(torch.rand(c))

        def forward(self, x: Tensor) -> Tensor:
            y = self.depthwise(x).permute(0, 2, 3, 1)
            return x + (self.scale * self.down(F.gelu(self.up(self.norm(y))))).permute(0, 3, 1, 2)

    return classifier(nn.Sequential(nn.Conv2d(3, 6, 4, 4), Block(6), Block(6)), 6)


def group_norm() -> nn.Module:
    return classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3),
                                    nn.GroupNorm(6, 6), nn.SiLU()), 6)


def transposed() -> nn.Module:
    return nn.Sequential(conv(3, 8, stride=2), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.InstanceNorm2d(6, affine=True),
                         nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, 1, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 3))


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


class Carn(nn.Module):
    """Cascaded residuals, grouped convolutions, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (nn.Sequential(conv(8, 8, groups=2, norm=False), conv(8, 8, 1, norm=False, act=None))
                          for _ in range(2))
        self.c1, self.c2 = conv(16, 8, 1, norm=False), conv(24, 8, 1, norm=False)
        self.up, self.exit = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        a = F.relu(x + self.a(x))
        c1 = self.c1(torch.cat([x, a], 1))
        b = F.relu(c1 + self.b(c1))
        c2 = self.c2(torch.cat([x, a, b], 1))
        return self.exit(F.relu(F.pixel_shuffle(self.up(c2), 2)))


class Csp(nn.Module):
    """YOLO-like: split, bottlenecks, spatial pyramid, upsampling, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8, act=nn.SiLU), conv(8, 16, stride=2, act=nn.SiLU)
        self.inner, self.merge = conv(8, 8, act=nn.SiLU), conv(24, 8, 1, act=nn.SiLU)
        self.pyramid, self.lateral = conv(16, 8, 1, act=nn.SiLU), conv(8, 8, 1, act=nn.SiLU)
        self.fine, self.coarse = nn.Conv2d(16, 7, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.stem(x)
        a, b = self.down(s).chunk(2, 1)
        y = self.merge(torch.cat([a, b, b + self.inner(b)], 1))
        y = self.pyramid(torch.cat([y, F.max_pool2d(y, 5, 1, 2)], 1))
        up = F.interpolate(self.lateral(y), scale_factor=2)
        return self.fine(torch.cat([up, s], 1)), self.coarse(y)


class Attention(nn.Module):
    """Multi-head attention; fewer heads of keys and values make it grouped-query attention."""

    def __init__(self, width: int, heads: int, kv: int | None = None, rope: bool = False):
        super().__init__()
        self.heads, self.kv, self.d, self.rope = heads, kv or heads, width // heads, rope
        self.q = nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, self.kv * self.d), nn.Linear(width, self.kv * self.d)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.d).transpose(1, 2)
        k, v = (p(x).view(b, n, self.kv, self.d).transpose(1, 2) for p in (self.k, self.v))
        if self.rope:
            angle = torch.arange(n)[:, None] / 100 ** (torch.arange(self.d) % (self.d // 2) / self.d)
            half = self.d // 2
            q, k = (t * angle.cos() + torch.cat([-t[..., half:], t[..., :half]], -1) * angle.sin() for t in (q, k))
        if self.kv != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        y = (q @ k.transpose(-1, -2) / self.d**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class Encoder(nn.Module):
    """BERT-like."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Parameter(torch.rand(6, 16))
        self.attention, self.n1, self.n2 = Attention(16, 4), nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        x = self.n1(x + self.attention(x))
        x = self.n2(x + self.down(F.gelu(self.up(x))))
        return self.head(x[:, 0])


class Decoder(nn.Module):
    """LLaMA-like: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(20, 16), Attention(16, 4, 2, rope=True)
        self.n1, self.n2 = nn.RMSNorm(16), nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.attention(self.n1(x))
        y = self.n2(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention = nn.Conv2d(3, 12, 4, 4), Attention(12, 3)
        self.n1, self.n2, self.token = nn.LayerNorm(12), nn.LayerNorm(12), nn.Parameter(torch.rand(1, 1, 12))
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token, x], 1)
        x = x + self.attention(self.n1(x))
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.head(x[:, 0])


def shufflenet() -> nn.Module:
    class Unit(nn.Module):
        def __init__(self, c: int):
            super().__init__()
            h = c // 2
            self.right = nn.Sequential(conv(h, h, 1), conv(h, h, groups=h, act=None), conv(h, h, 1))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            y = torch.cat([a, self.right(b)], 1)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    return classifier(nn.Sequential(conv(3, 12), Unit(12), Unit(12), conv(12, 8, 1)), 8)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = conv(3, 6), conv(6, 8), conv(8, 10)
        self.u2, self.c2 = nn.ConvTranspose2d(10, 8, 2, 2), conv(16, 8)
        self.u1, self.c1, self.out = nn.Upsample(scale_factor=2, mode="bilinear"), conv(14, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.d3(F.max_pool2d(b, 2))
        b = self.c2(torch.cat([b, self.u2(c)], 1))
        return self.out(self.c1(torch.cat([a, self.u1(b)], 1)))


def mobilenet() -> nn.Module:
    def inverted(i: int, e: int, o: int, stride: int = 1) -> nn.Module:
        body = nn.Sequential(conv(i, e, 1, act=nn.ReLU6), conv(e, e, stride=stride, groups=e, act=nn.ReLU6),
                             conv(e, o, 1, act=None))
        return Lambda(lambda x, b: x + b(x), body) if i == o and stride == 1 else body

    return classifier(nn.Sequential(conv(3, 8, stride=2, act=nn.ReLU6), inverted(8, 16, 10), inverted(10, 20, 10),
                                    inverted(10, 20, 12, 2), conv(12, 24, 1)), 24)


def squeeze_excite() -> nn.Module:
    def gated(x: Tensor, body: nn.Module, down: nn.Module, up: nn.Module, out: nn.Module) -> Tensor:
        y = body(x)
        return x + out(y * torch.sigmoid(up(F.silu(down(y.mean((2, 3), keepdim=True))))))

    return classifier(nn.Sequential(conv(3, 8, act=nn.SiLU), Lambda(
        gated, nn.Sequential(conv(8, 16, 1, act=nn.SiLU), conv(16, 16, groups=16, act=nn.SiLU)),
        nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), conv(16, 8, 1, act=None))), 8)


def inception() -> nn.Module:
    return classifier(nn.Sequential(conv(3, 8), Lambda(
        lambda x, *b: torch.cat([f(x) for f in b], 1), conv(8, 4, 1), nn.Sequential(conv(8, 4, 1), conv(4, 6)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(8, 3, 1))), conv(13, 8)), 8)


def fire() -> nn.Module:
    return classifier(nn.Sequential(conv(3, 8, norm=False), Lambda(
        lambda x, s, a, b: torch.cat([F.relu(a(s(x))), F.relu(b(s(x)))], 1), conv(8, 4, 1, norm=False),
        nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)), conv(12, 5, 1, norm=False)), 5)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.lead, self.cell = nn.Linear(6, 8), kind(8, 10, batch_first=True, **options)
        self.head = nn.Linear(20 if options.get("bidirectional") else 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(F.relu(self.lead(x)))
        return self.head(y[:, -1])


def mixer() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, tokens: int, c: int):
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(c), nn.LayerNorm(c)
            self.t1, self.t2 = nn.Linear(tokens, 12), nn.Linear(12, tokens)
            self.c1, self.c2 = nn.Linear(c, 14), nn.Linear(14, c)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
            return x + self.c2(F.gelu(self.c1(self.n2(x))))

    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Lambda(lambda x: x.transpose(1, 2)), Block(16, 8),
                         Lambda(lambda x: x.mean(1)), nn.Linear(8, 5))


def autoencoder() -> nn.Module:
    widths = [20, 16, 12, 4, 12, 16, 20]
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*layers[:-1], nn.Linear(16, 20))


def temporal() -> nn.Module:
    def block(i: int, o: int, d: int) -> nn.Module:
        body = nn.Sequential(nn.ConstantPad1d((2 * d, 0), 0), nn.Conv1d(i, o, 3, dilation=d), nn.ReLU())
        return Lambda(lambda x, b, s: F.relu(b(x) + s(x)), body, nn.Conv1d(i, o, 1))

    return nn.Sequential(block(4, 8, 1), block(8, 10, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(10, 3))


class Exits(nn.Module):
    """Two exits; the second reads what the first has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 10)
        self.early, self.late = nn.Linear(8, 5), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.early(x.mean((2, 3))), self.late(self.b(x).mean((2, 3)))


def gated() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 8), Lambda(
        lambda x: torch.cat([x[:, :3], x[:, 3:].tanh()], 1)), nn.Linear(8, 4))


def multiplier() -> nn.Module:
    return classifier(nn.Sequential(conv(3, 6), conv(6, 12, groups=6), conv(12, 8, 1, act=nn.PReLU)), 8)


def option_a() -> nn.Module:
    """A shortcut that pads channels with zeros (He et al., 2016, option A)."""
    return classifier(nn.Sequential(conv(3, 6), Lambda(
        lambda x, b: F.relu(b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))),
        nn.Sequential(conv(6, 8, stride=2), conv(8, 10, act=None)))), 10)


def flattened() -> nn.Module:
    return nn.Sequential(conv(3, 6, stride=4), nn.Flatten(), nn.Linear(96, 12), nn.Hardswish(), nn.Linear(12, 4))


def two_ways() -> nn.Module:
    """A value that is concatenated and added."""
    return classifier(Lambda(lambda x, s, a, b, c: c(torch.cat([s(x), a(s(x))], 1)) + b(s(x)), conv(3, 6), conv(6, 4),
                             conv(6, 8, 1), conv(10, 8, 1)), 8)


def text() -> tuple[Tensor, ...]:
    return (torch.tensor([[3, 1, 4, 1, 5, 9]]),)


# Name -> (module, example inputs, how many families can be pruned).
TOPOLOGIES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int]] = {
    "vgg": (vgg, (torch.zeros(IMAGE),), 4),
    "resnet": (resnet, (torch.zeros(IMAGE),), 6),
    "resnext": (resnext, (torch.zeros(IMAGE),), 3),
    "densenet": (densenet, (torch.zeros(IMAGE),), 7),
    "convnext": (convnext, (torch.zeros(IMAGE),), 2),
    "group_norm": (group_norm, (torch.zeros(IMAGE),), 2),
    "transposed": (transposed, (torch.zeros(IMAGE),), 3),
    "shared": (Shared, (torch.zeros(IMAGE),), 1),
    "carn": (Carn, (torch.zeros(IMAGE),), 6),
    "csp": (Csp, (torch.zeros(IMAGE),), 6),
    "bert": (Encoder, text(), 2),
    "llama": (Decoder, text(), 2),
    "vit": (Vit, (torch.zeros(IMAGE),), 2),
    "shufflenet": (shufflenet, (torch.zeros(IMAGE),), 6),
    "unet": (Unet, (torch.zeros(IMAGE),), 6),
    "mobilenet": (mobilenet, (torch.zeros(IMAGE),), 6),
    "squeeze_excite": (squeeze_excite, (torch.zeros(IMAGE),), 3),
    "inception": (inception, (torch.zeros(IMAGE),), 6),
    "fire": (fire, (torch.zeros(IMAGE),), 5),
    "lstm": (lambda: Recurrent(nn.LSTM), (torch.zeros(1, 5, 6),), 2),
    "gru": (lambda: Recurrent(nn.GRU), (torch.zeros(1, 5, 6),), 2),
    "bidirectional": (lambda: Recurrent(nn.LSTM, bidirectional=True), (torch.zeros(1, 5, 6),), 2),
    "mixer": (mixer, (torch.zeros(IMAGE),), 2),
    "autoencoder": (autoencoder, (torch.zeros(1, 20),), 5),
    "temporal": (temporal, (torch.zeros(1, 4, 12),), 2),
    "exits": (Exits, (torch.zeros(IMAGE),), 2),
    "gated": (gated, (torch.zeros(1, 6),), 2),
    "multiplier": (multiplier, (torch.zeros(IMAGE),), 2),
    "option_a": (option_a, (torch.zeros(IMAGE),), 3),
    "flattened": (flattened, (torch.zeros(IMAGE),), 2),
    "two_ways": (two_ways, (torch.zeros(IMAGE),), 3),
}
