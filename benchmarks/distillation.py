"""What networks are trained on here: varied and mixed images or keywords, and what a whole network says of them.

Images are mirrored, both are shifted and half of them are mixed in pairs (Zhang et al., mixup, 2018); the answers are
those of a teacher (Hinton et al., Distilling the Knowledge in a Neural Network, 2015), whose student follows it on
the same views for long (Beyer et al., Knowledge Distillation: A Good Teacher Is Patient and Consistent, 2022).
Classes are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import skive

BATCH = 100
TEMPERATURE = 4.0
MIXED = 0.5  # share of the inputs that are two inputs


class Batches:
    """Batches (inputs, answers of the teacher), other ones in every epoch; the same again after `rewind`, with answers
    that are remembered. `shift`: rows and columns by which inputs [N, C, H, W] move at most."""

    def __init__(self, inputs: np.ndarray, teacher: Callable[[np.ndarray], Any], shift: tuple[int, int], mirror: bool,
                 seed: int):
        self.inputs, self.shift, self.mirror = torch.from_numpy(inputs), shift, mirror
        self.seed, self.epoch, self.size = seed, 0, min(BATCH, len(inputs) // 8)
        self._teacher = teacher
        self._answers: dict[int, Tensor] = {}  # by epoch; NaN where the teacher was not asked

    def halves(self) -> tuple[Batches, Batches]:
        """The same of every second input, and of the others."""
        first, second = (Batches(self.inputs[i::2].numpy(), self._teacher, self.shift, self.mirror, self.seed)
                         for i in range(2))
        return first, second

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def rewind(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.inputs), generator=generator)
        for i in range(len(self)):
            x = self._varied(self.inputs[order[i * self.size:(i + 1) * self.size]], generator)
            said = self._answers.get(epoch)
            if said is None or said[i].isnan().any():
                answer = torch.from_numpy(np.asarray(self._teacher(x.numpy())))
                if said is None:
                    said = self._answers[epoch] = torch.full((len(self), *answer.shape), torch.nan)
                said[i] = answer
            yield x, said[i]

    def _varied(self, x: Tensor, generator: torch.Generator) -> Tensor:
        count, (rows, columns) = len(x), self.shift
        if self.mirror:
            x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
        padded = F.pad(x, (columns, columns, rows, rows), mode="constant" if self.mirror else "replicate")
        down = torch.randint(0, 2 * rows + 1, (count,), generator=generator).tolist()
        right = torch.randint(0, 2 * columns + 1, (count,), generator=generator).tolist()
        x = torch.stack([p[:, i:i + x.shape[2], j:j + x.shape[3]] for p, i, j in zip(padded, down, right, strict=True)])
        other = x[torch.randperm(count, generator=generator)]
        share = torch.rand(count, 1, 1, 1, generator=generator)
        share[torch.rand(count, generator=generator) >= MIXED] = 1.0
        return share * x + (1 - share) * other


def answers(module: skive.Module, inputs: np.ndarray) -> np.ndarray:
    """[N, classes] what a compiled network of one sample gives."""
    return np.concatenate([module(inputs[i:i + 1]) for i in range(len(inputs))])


def mean_answer(models: Sequence[Path], one: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What these networks, of one sample, say on average of each of a batch of inputs like `one`."""
    compiled = [skive.compile(m, example_inputs=(one,), verify=False) for m in models]
    return lambda x: np.mean([answers(module, x) for module in compiled], 0)


def followed(got: Tensor, wanted: Tensor) -> Tensor:
    """How far the softened probabilities are from the wanted ones; networks may give scores or probabilities."""
    if wanted.min() >= 0 and (wanted.sum(-1) - 1).abs().max() < 1e-3:
        got, wanted = got.clamp_min(1e-7).log(), wanted.clamp_min(1e-7).log()
    return TEMPERATURE**2 * F.kl_div(F.log_softmax(got / TEMPERATURE, -1), F.log_softmax(wanted / TEMPERATURE, -1),
                                     reduction="batchmean", log_target=True)
