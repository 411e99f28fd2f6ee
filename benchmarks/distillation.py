"""What networks are trained on here: varied and mixed images or keywords, and what a whole network says of them.

Images are mirrored, both are shifted and half of them are mixed in pairs (Zhang et al., mixup, 2018); where asked,
spectra are also stretched, made louder, disturbed, joined in time and masked (Park et al., SpecAugment, 2019). The
answers are those of a teacher (Hinton et al., Distilling the Knowledge in a Neural Network, 2015), whose student
follows it on the same views for long (Beyer et al., Knowledge Distillation: A Good Teacher Is Patient and Consistent,
2022). Classes are not needed.
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
JOINED = 0.2  # share of the spectra that begin as one input and go on as another
VARIED = 0.1  # by which the pace and contrast of spectra vary; their noise in deviations


class Batches:
    """Batches (inputs, answers of the teacher), other ones in every epoch; the same again after `rewind`, with answers
    that are remembered, or after `epochs` (0: never), which spares asking a slow teacher again. `shift`: rows and
    columns by which inputs [N, C, H, W] move at most. `spectra`: inputs are cepstra over time
    [N, 1, frames, coefficients] and are varied as such, too."""

    def __init__(self, inputs: np.ndarray, teacher: Callable[[np.ndarray], Any], shift: tuple[int, int], mirror: bool,
                 seed: int, spectra: bool = False, epochs: int = 0):
        self.inputs, self.shift, self.mirror = torch.from_numpy(inputs), shift, mirror
        self.seed, self.epoch, self.size, self.epochs = seed, 0, min(BATCH, len(inputs) // 8), epochs
        self.spectra = spectra
        self._teacher = teacher
        self._answers: dict[int, Tensor] = {}  # by epoch; NaN where the teacher was not asked

    def halves(self) -> tuple[Batches, Batches]:
        """The same of every second input, and of the others."""
        first, second = (Batches(self.inputs[i::2].numpy(), self._teacher, self.shift, self.mirror, self.seed,
                                 self.spectra, self.epochs) for i in range(2))
        return first, second

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def rewind(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch % self.epochs if self.epochs else self.epoch
        self.epoch += 1
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
        if self.spectra:
            x = self._spoken_otherwise(x, generator)
        other = x[torch.randperm(count, generator=generator)]
        share = torch.rand(count, 1, 1, 1, generator=generator)
        share[torch.rand(count, generator=generator) >= MIXED] = 1.0
        if not self.spectra:
            return share * x + (1 - share) * other
        frames = torch.arange(x.shape[2])[:, None]
        until = torch.randint(len(frames) // 5, 4 * len(frames) // 5, (count, 1, 1, 1), generator=generator)
        joined = torch.rand(count, 1, 1, 1, generator=generator) < JOINED
        share = torch.where(joined, (frames < until).float(), share)
        return self._masked(share * x + (1 - share) * other, generator)

    def _spoken_otherwise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """`x` [N, 1, T, C] slower or faster, with other contrast, as from another microphone and in noise."""
        (count, _, frames, wide), deviation = x.shape, self.inputs.std((0, 1, 2))

        def random(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator)

        middle = (frames - 1) / 2
        pace = 1 + VARIED * (2 * random(count, 1, 1, 1) - 1)
        at = (middle + pace * (torch.arange(frames)[:, None] - middle)).clamp(0, frames - 1)
        low = at.floor().long().clamp(max=frames - 2)
        rest = at - low
        low = low.expand(count, 1, frames, wide)
        x = (1 - rest) * x.gather(2, low) + rest * x.gather(2, low + 1)
        x = x * (1 + VARIED * (2 * random(count, 1, 1, 1) - 1))
        colour = VARIED * torch.randn(count, 1, 1, wide, generator=generator)
        noise = 2 * VARIED * random(count, 1, 1, 1) * torch.randn(x.shape, generator=generator)
        return x + deviation * (colour + noise)

    def _masked(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """`x` [N, 1, T, C]; of half of them each, up to twice an eighth of the frames and up to a quarter of the
        coefficients replaced by their mean."""
        mean = self.inputs.mean((0, 1, 2))
        for axis, widest in ((2, x.shape[2] // 6), (2, x.shape[2] // 6), (3, x.shape[3] // 5)):
            size = (len(x), 1, 1, 1)
            masked = torch.rand(size, generator=generator) < MIXED
            first = torch.randint(0, x.shape[axis], size, generator=generator)
            behind = first + torch.randint(1, widest + 1, size, generator=generator)
            place = torch.arange(x.shape[axis]).reshape((-1, 1) if axis == 2 else (1, -1))
            x = torch.where(masked & (place >= first) & (place < behind), mean, x)
        return x


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
