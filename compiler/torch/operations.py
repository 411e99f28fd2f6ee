"""What each operation of the IR computes, on torch tensors: differentiable, images of [N, H, W, C].

`attrs` are those of the table of operations. A shape that an operation states is that of one sample; tensors
may have any size along dimension 0 where it says 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skive.ir import FrozenDict

Function = Callable[[Sequence[Tensor], FrozenDict], Tensor]
FUNCTIONS: dict[str, Function] = {}


def _function(*names: str) -> Callable[[Function], Function]:
    def register(fn: Function) -> Function:
        FUNCTIONS.update(dict.fromkeys(names, fn))
        return fn

    return register


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish, "softplus": F.softplus, "softsign": F.softsign, "hard_swish": F.hardswish,
    **{name: getattr(torch, name) for name in (
        "sqrt", "exp", "log", "sin", "cos", "tanh", "erf", "rsqrt", "sigmoid", "reciprocal", "floor", "ceil",
        "trunc", "abs", "neg", "sign")},
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "min": torch.minimum, "max": torch.maximum,
}
for _name, _fn in _UNARY.items():
    FUNCTIONS[_name] = lambda x, a, fn=_fn: fn(x[0])  # type: ignore[misc]
for _name, _two in _BINARY.items():
    FUNCTIONS[_name] = lambda x, a, fn=_two: fn(x[0], x[1])  # type: ignore[misc]

FUNCTIONS["clip"] = lambda x, a: x[0].clamp(a["lo"], a["hi"])
FUNCTIONS["leaky_relu"] = lambda x, a: F.leaky_relu(x[0], a["alpha"])
FUNCTIONS["elu"] = lambda x, a: F.elu(x[0], a["alpha"])
FUNCTIONS["hard_sigmoid"] = lambda x, a: (a["alpha"] * x[0] + a["beta"]).clamp(0, 1)
FUNCTIONS["transpose"] = lambda x, a: x[0].permute(a["perm"])
FUNCTIONS["concat"] = lambda x, a: torch.cat(_same_batch(x, a["axis"]), a["axis"])
FUNCTIONS["softmax"] = lambda x, a: torch.softmax(x[0], a["axis"])
FUNCTIONS["log_softmax"] = lambda x, a: torch.log_softmax(x[0], a["axis"])
FUNCTIONS["reduce_mean"] = lambda x, a: x[0].mean(tuple(a["axes"]), keepdim=a["keep"])
FUNCTIONS["reduce_sum"] = lambda x, a: x[0].sum(tuple(a["axes"]), keepdim=a["keep"])
FUNCTIONS["reduce_max"] = lambda x, a: x[0].amax(tuple(a["axes"]), keepdim=a["keep"])
FUNCTIONS["gather"] = lambda x, a: _gathered(x[0], x[1], a["axis"])


def _same_batch(x: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Operands of a concatenation; constants have one sample and take as many as the others have."""
    rank = x[0].dim()
    if axis % rank == 0:
        return list(x)
    count = max(v.shape[0] for v in x)
    return [v if v.shape[0] == count else v.expand(count, *v.shape[1:]) for v in x]


def _batched(x: Tensor, shape: Sequence[int]) -> list[int]:
    """The shape of one sample for as many samples as `x` has."""
    count, rest = x.numel(), math.prod(shape)
    if shape and shape[0] == 1 and rest and count % rest == 0:
        return [count // rest, *shape[1:]]
    return list(shape)


@_function("reshape")
def _reshape(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    return x[0].reshape(_batched(x[0], a["shape"]))


@_function("expand")
def _expand(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    shape = list(a["shape"])
    if x[0].dim() == len(shape) and shape[0] == 1:
        shape[0] = x[0].shape[0]
    return x[0].expand(shape)


@_function("slice")
def _slice(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    v = x[0]
    for axis, (start, size, step) in enumerate(zip(a["start"], a["size"], a["step"], strict=True)):
        if axis == 0 and (start, size, step) == (0, 1, 1):
            continue  # every sample
        if step > 0:
            v = v[(slice(None),) * axis + (slice(start, start + (size - 1) * step + 1, step),)]
        else:
            v = v.index_select(axis, start + step * torch.arange(size))
    return v


@_function("pad")
def _pad(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    if a["mode"] != "constant":
        raise NotImplementedError(f"pad of mode {a['mode']}")
    sides = [side for pair in zip(reversed(a["before"]), reversed(a["after"]), strict=True) for side in pair]
    return F.pad(x[0], sides, value=a["value"])


def _gathered(data: Tensor, index: Tensor, axis: int) -> Tensor:
    axis %= data.dim()
    flat = torch.where(index < 0, index + data.shape[axis], index).reshape(-1)
    return data.index_select(axis, flat).reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1:])


def _window(x: Tensor, pad: Sequence[int], value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """The image as [N, C, H, W], and padding equal on opposite sides; what is not equal is applied."""
    t, left, b, r = pad
    image = x.permute(0, 3, 1, 2)
    if (t, left) == (b, r):
        return image, (t, left)
    return F.pad(image, (left, r, t, b), value=value), (0, 0)


@_function("conv2d")
def _conv(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    image, pad = _window(x[0], a["pad"])
    y = F.conv2d(image, x[1].permute(0, 3, 1, 2), x[2] if len(x) > 2 else None, a["stride"], pad, a["dilation"],
                 a["groups"])
    return y.permute(0, 2, 3, 1)


@_function("conv_transpose2d")
def _conv_transpose(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    w, g = x[1], a["groups"]
    outputs, kh, kw, ins = w.shape
    w = w.reshape(g, outputs // g, kh, kw, ins).permute(0, 4, 1, 2, 3).reshape(g * ins, outputs // g, kh, kw)
    y = F.conv_transpose2d(x[0].permute(0, 3, 1, 2), w, None, a["stride"], 0, 0, g, a["dilation"])
    y = F.pad(y, (0, a["out_pad"][1], 0, a["out_pad"][0]))
    t, left, b, r = a["pad"]
    y = y[:, :, t:y.shape[2] - b, left:y.shape[3] - r].permute(0, 2, 3, 1)
    return y + x[2] if len(x) > 2 else y  # behind out_pad, which has the bias, too


@_function("max_pool2d")
def _max_pool(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    t, left, b, r = a["pad"]
    image = F.pad(x[0].permute(0, 3, 1, 2), (left, r, t, b), value=-math.inf)
    return F.max_pool2d(image, a["kernel"], a["stride"], 0, a["dilation"]).permute(0, 2, 3, 1)


@_function("avg_pool2d")
def _avg_pool(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    if tuple(a["dilation"]) != (1, 1):
        raise NotImplementedError("avg_pool2d with dilation")
    image, pad = _window(x[0], a["pad"])
    total = F.avg_pool2d(image, a["kernel"], a["stride"], pad)
    if not a["count_pad"] and any(a["pad"]):
        ones, pad = _window(torch.ones_like(x[0][:1, :, :, :1]), a["pad"])
        total = total / F.avg_pool2d(ones, a["kernel"], a["stride"], pad)
    return total.permute(0, 2, 3, 1)


@_function("linear")
def _linear(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    return F.linear(x[0], x[1], x[2] if len(x) > 2 else None)


@_function("matmul")
def _matmul(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    left = x[0].mT if a["trans_a"] else x[0]
    return left @ (x[1].mT if a["trans_b"] else x[1])


@_function("layer_norm")
def _layer_norm(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    return F.layer_norm(x[0], x[1].shape, x[1], x[2] if len(x) > 2 else None, a["eps"])


@_function("group_norm")
def _group_norm(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    y = F.group_norm(x[0].movedim(-1, 1), a["groups"], x[1], x[2] if len(x) > 2 else None, a["eps"])
    return y.movedim(1, -1)


@_function("rms_norm")
def _rms_norm(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    axes = tuple(range(x[0].dim() - x[1].dim(), x[0].dim()))
    return x[0] * torch.rsqrt(x[0].square().mean(axes, keepdim=True) + a["eps"]) * x[1]


@_function("l2_norm")
def _l2_norm(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    axes = tuple(range(a["axis"] % x[0].dim(), x[0].dim()))
    return x[0] / torch.linalg.vector_norm(x[0], dim=axes, keepdim=True).clamp_min(a["least"])


@_function("where")
def _where(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    return torch.where(x[0], x[1], x[2])


@_function("attention")
def _attention(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    if a["levels"]:
        raise NotImplementedError("attention with rounded exponentials")
    q, k, v = (v.transpose(1, 2) if a["token_major"] else v for v in x[:3])
    scores = q @ k.mT * a["scale"]
    if len(x) > 3:
        scores = scores + x[3]
    if a["causal"]:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    y = torch.softmax(scores, -1) @ v
    return y.transpose(1, 2) if a["token_major"] else y


@_function("resize2d")
def _resize(x: Sequence[Tensor], a: FrozenDict) -> Tensor:
    image = x[0]
    for axis, sources, weights in ((1, x[1], x[2]), (2, x[3], x[4])):
        places = sources.long().clamp(0, image.shape[axis] - 1)  # [results, taps]
        shape = [1, 1, 1, 1]
        shape[axis] = len(places)
        taps = [image.index_select(axis, places[:, t]) * weights[:, t].reshape(shape) for t in range(places.shape[1])]
        image = sum(taps[1:], taps[0])
    return image


def computed(op: str, x: Sequence[Tensor], attrs: FrozenDict) -> Tensor:
    """The result of an operation of FUNCTIONS."""
    result: Any = FUNCTIONS[op](x, attrs)
    return result
