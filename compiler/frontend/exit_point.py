"""`skive.exit_point`: a marker inside `forward` that survives `torch.export`."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("skive::exit_point", mutates_args=())
def _exit_point(x: Tensor, logits: Tensor, name: str) -> Tensor:
    return x.clone()


@_exit_point.register_fake
def _(x: Tensor, logits: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def exit_point(x: Tensor, logits: Tensor, name: str = "") -> Tensor:
    """`x`, unchanged. Says that a call may end here with the result `logits`.

    The exit is called `name`, by default `exit0`, `exit1` ... in the order of execution; `skive.compile(exits=...)`
    says when it is taken, and without that the marker means nothing. Survives `torch.export`; in eager mode it costs
    nothing and `logits` is not returned.
    """
    if not torch.compiler.is_exporting():
        return x
    return torch.ops.skive.exit_point(x, logits, name)
