"""What fine-tuning gives back after channels were removed: real networks on their training data.

    python benchmarks/pruned_training.py DATA [--models resnet20_cifar10] [--macs 0.5] [--epochs 10]
                                         [--rate 0.02] [--ways whole,activation,l1,random,scratch] [--json FILE]

DATA as for `accuracy.py`. Every way gets the same batches, rate and number of steps: `whole` is the network as it
is, trained on (what the others are to be compared with); a criterion of `skive.Prune`, or `taylor`, is pruned at
once and trained; `scratch` has the shape of `activation` and new weights. Training follows the whole network's
outputs (distillation). Where DATA has no more than a test set (keywords), 400 samples are trained on, and the
other 100 are the test.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
import torch
from accuracy import wilson
from real_models import REAL_MODELS, RealModel

import skive
from skive import torch as helpers
from skive.pipeline import total_macs

BATCH = 128


class Batches:
    """Shuffled batches of (inputs [N, C, H, W] float32, class); images are mirrored and shifted by 4 pixels at most."""

    def __init__(self, inputs: torch.Tensor, classes: torch.Tensor, images: bool, seed: int = 0):
        self.inputs, self.classes, self.images = inputs, classes, images
        self.size = min(BATCH, len(inputs) // 8)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator)
        for i in range(len(self)):
            chosen = order[i * self.size:(i + 1) * self.size]
            yield self._varied(self.inputs[chosen]), self.classes[chosen]

    def _varied(self, x: torch.Tensor) -> torch.Tensor:
        if not self.images:
            down, = torch.randint(-2, 3, (1,), generator=self.generator).tolist()
            return torch.roll(x, down, 2)
        left = torch.rand(len(x), generator=self.generator) < 0.5
        x = torch.where(left[:, None, None, None], x.flip(3), x)
        padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
        places = torch.randint(0, 9, (len(x), 2), generator=self.generator).tolist()
        return torch.stack([p[:, i:i + x.shape[2], j:j + x.shape[3]] for p, (i, j) in zip(padded, places, strict=True)])


def data_of(model: RealModel, folder: Path, limit: int | None) -> tuple[Batches, torch.Tensor, np.ndarray]:
    """(training batches, test inputs, test classes)."""
    (fold,) = model.folds(folder)
    assert fold.expected is not None
    if not model.name.endswith("cifar10"):
        x, y = torch.from_numpy(fold.inputs), torch.from_numpy(fold.expected.astype(np.int64))
        return Batches(x[:400], y[:400], images=False), x[400:], fold.expected[400:]
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    parts = [np.load(folder / f"cifar10_train_{i}.npz") for i in range(2)]
    images = np.concatenate([p["x"] for p in parts]).astype(np.float32) / 255
    x = torch.from_numpy(np.ascontiguousarray(((images - mean) / deviation).transpose(0, 3, 1, 2)))
    y = torch.from_numpy(np.concatenate([p["y"] for p in parts]).astype(np.int64))
    return Batches(x, y, images=True), torch.from_numpy(fold.inputs[:limit]), fold.expected[:limit]


@torch.no_grad()
def accuracy(net: torch.nn.Module, inputs: torch.Tensor, classes: np.ndarray) -> dict[str, Any]:
    """{top1, interval} in percent."""
    net.eval()
    got = torch.cat([net(part).argmax(-1) for part in inputs.split(250)]).numpy()
    right = int((got == classes).sum())
    return {"top1": 100 * right / len(classes), "interval": wilson(right, len(classes))}


def smaller(way: str, path: Path, teacher: helpers.Network, train: Batches, macs: float) -> helpers.Network:
    """The network of `path` as `way` prunes it."""
    if way == "whole":
        return helpers.network(path, (train.inputs[:1].numpy(),))
    calibration = train.inputs[:128].numpy()
    if way == "taylor":
        criterion: Any = helpers.importance(teacher, train)
    else:
        criterion = "activation" if way == "scratch" else way
    plain = way in ("l1", "random")
    asked = skive.Prune(macs=macs, criterion=criterion, refit=not plain, calibration=calibration)
    return helpers.prune(path, asked, example_inputs=(train.inputs[:1].numpy(),))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="resnet20_cifar10,kws_dscnn")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--ways", default="whole,activation,l1,random,scratch")
    parser.add_argument("--limit", type=int, help="samples of the test at most")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    torch.set_num_threads(1)
    known = {m.name: m for m in REAL_MODELS}
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        model = known[name]
        train, inputs, classes = data_of(model, a.data, a.limit)
        teacher = helpers.network(model.path(a.data), (train.inputs[:1].numpy(),)).eval()
        whole = total_macs(teacher.source)
        for way in a.ways.split(","):
            train.generator.manual_seed(0)
            torch.manual_seed(0)
            net = smaller(way, model.path(a.data), teacher, train, a.macs)
            left = total_macs(net.source) / whole
            before = accuracy(net, inputs, classes)
            if way == "scratch":
                net.normalise(train.inputs[:BATCH]).reset()
            started = time.perf_counter()
            rate = 5 * a.rate if way == "scratch" else a.rate
            helpers.finetune(net, train, a.epochs, rate, distill=teacher)
            seconds = time.perf_counter() - started
            row = {"model": name, "way": way, "macs_removed": 1 - left, "epochs": a.epochs, "seconds": seconds,
                   "before": before["top1"], **accuracy(net, inputs, classes)}
            rows.append(row)
            low, high = row["interval"]
            print(f"{name:<18} {way:<12} {1 - left:6.1%} of the MACs gone  top-1 {row['before']:6.2f} % untrained, "
                  f"{row['top1']:6.2f} % [{low:.2f}, {high:.2f}] after {a.epochs} epochs "
                  f"in {seconds:.0f} s", flush=True)
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
