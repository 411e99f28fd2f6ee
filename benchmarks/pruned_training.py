"""What training gives back after channels or blocks of weights were removed: real networks on their training data.

    python benchmarks/pruned_training.py DATA [--models resnet20_cifar10,mobilenet_cifar10,kws_dscnn] [--work WORK]
                     [--macs 0.5] [--epochs 20] [--views EPOCHS]
                     [--rate 0.01] [--ways whole,activation,l1,random,scratch,torch-pruning,blocks]
                     [--teachers resnet20_cifar10,resnet56_cifar10] [--int8]
                     [--held-out] [--seed 0] [--limit N] [--json FILE]

DATA as for `accuracy.py`. Every way gets the same batches, rate and number of steps, and follows the answers of
the whole network, or the mean of those of `--teachers` (`distillation.py`); classes only judge.

`whole`: as it is, trained on (what the others are to be compared with). A criterion of `skive.Prune`, or `taylor`, a
scope behind it if wanted (`activation-measured`): pruned at once, fitted (not l1 and random) and trained. `scratch`:
the shape of `activation` with new weights and five times the rate. `tas`: channels by `activation`, how many of each
layer by a search (`skive.torch.search_widths`) for as many epochs on two halves of the data, which comes on top
(`search_seconds`). `torch-pruning`: Torch-Pruning, if installed, of ResNet-20 the channels inside blocks, as it cannot
follow the shortcuts that append zeros. `blocks`: `--zeros` of the blocks of 4x16 weights of each layer zero, half
of all at once with reconstruction, the others during the first half of the training. `--int8` adds the top-1 of the
result compiled in INT8. `difference` is that to the whole network as it came, on the same samples, with its 95 %
interval. `--held-out` keeps the last tenth of the training part to judge instead of the test, for choosing settings.
Keywords have no training part: each third of the maps is judged by networks trained on the others, and the rows say
how all 600 were answered. No MobileNet comes with the data: `mobilenet_cifar10` (`networks.py`) is trained here, on
the answers of `--teachers` for `WHOLE_EPOCHS`, and kept in WORK; what it becomes then follows the same answers.
Seconds are those of this process's processor time.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results
import torch
from accuracy import paired, wilson
from distillation import BATCH, Batches, answers, followed, mean_answer
from networks import MobileNet, ResNet20
from real_models import REAL_MODELS, RealModel
from torch import nn

import skive
from skive import torch as helpers
from skive.pipeline import total_macs

SPARSE = "block4x16"
WHOLE_EPOCHS = 60  # of a network that does not come with the data
KEYWORD_PARTS = 3


@dataclass
class Task:
    """A network with what it is trained and judged on; `source`: what it is compiled from, `whole` its graph as a
    module."""

    model: RealModel
    source: Path | nn.Module
    batches: Batches
    calibration: np.ndarray
    inputs: np.ndarray
    classes: np.ndarray
    whole: helpers.Network

    @property
    def example(self) -> tuple[np.ndarray]:
        return (self.calibration[:1],)


def keywords(model: RealModel, data: Path, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps to train on and their classes, those of `part`, which judge, and theirs."""
    (fold,) = model.folds(data)
    x, y = np.concatenate([fold.calibration, fold.inputs]), np.load(data / "kws_mfcc_a.npz")["y"]
    judged = np.random.default_rng(0).permutation(len(x)) % KEYWORD_PARTS == part
    recording = np.unique(x.reshape(len(x), -1), axis=0, return_inverse=True)[1].reshape(-1)
    trained = ~judged & ~np.isin(recording, recording[judged])  # some are there twice
    return x[trained], y[trained], x[judged], y[judged]


def task(model: RealModel, data: Path, a: argparse.Namespace, part: int = 0) -> Task:
    images = model.name.endswith("cifar10")
    if images:
        mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        parts = [np.load(data / f"cifar10_train_{i}.npz") for i in range(2)]
        pixels = np.concatenate([p["x"] for p in parts]).astype(np.float32) / 255
        x = np.ascontiguousarray(((pixels - mean) / deviation).transpose(0, 3, 1, 2))
        y = np.concatenate([p["y"] for p in parts])
        (fold,) = model.folds(data)
        assert fold.expected is not None
        inputs, classes = fold.inputs[: a.limit], fold.expected[: a.limit]
    else:
        x, y, inputs, classes = keywords(model, data, part)
    if a.held_out:
        kept = len(x) - len(x) // 10
        x, inputs, classes = x[:kept], x[kept:], y[kept:]
    teachers = [data / "models" / f"{name}.onnx" for name in (a.teachers or model.name).split(",")]
    batches = Batches(x, mean_answer(teachers, x[:1]), (4, 4) if images else (3, 0), images, a.seed,
                      spectra=not images, epochs=a.views)
    source = mobilenet(batches, a) if model.name == "mobilenet_cifar10" else model.path(data)
    return Task(model, source, batches, x[:: len(x) // 128][:128], inputs, classes,
                helpers.network(source, (x[:1],)).eval())


def mobilenet(batches: Batches, a: argparse.Namespace) -> nn.Module:
    """MobileNet as it was trained on `batches`, from WORK if it lies there."""
    file = a.work / f"mobilenet_cifar10-{a.seed}-{WHOLE_EPOCHS}{'-held-out' if a.held_out else ''}.pt"
    torch.manual_seed(a.seed)
    net = MobileNet().eval()
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    started = time.process_time()
    helpers.finetune(net, batches, WHOLE_EPOCHS, 0.05, loss=followed, weight_decay=5e-4,
                     progress=lambda epoch, loss: print(f"    mobilenet_cifar10 epoch {epoch + 1}: {loss:.3f}, "
                                                        f"{time.process_time() - started:.0f} s", flush=True))
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    return net


def top1(right: np.ndarray) -> float:
    return 100 * float(right.mean())


@torch.no_grad()
def right_of(net: torch.nn.Module, t: Task) -> np.ndarray:
    """bool [samples]: which the network answers rightly."""
    net.eval()
    got = torch.cat([net(part) for part in torch.from_numpy(t.inputs).split(125)]).numpy()
    return got.argmax(-1) == t.classes


def torch_module(t: Task) -> nn.Module:
    """A copy of the network as PyTorch has it."""
    if isinstance(t.source, nn.Module):
        return copy.deepcopy(t.source)
    net = ResNet20()
    net.load_state_dict(torch.load(t.source.with_suffix(".pt"), map_location="cpu", weights_only=True))
    return net


def smaller(way: str, t: Task, a: argparse.Namespace) -> helpers.Network:
    """The network of `t` as `way` makes it smaller."""
    if way == "whole":
        return helpers.network(t.source, t.example)
    if way == "blocks":
        half = skive.Sparsify(SPARSE, 0.5, scope=a.scope, calibration=t.calibration)
        return helpers.sparsify(t.source, half, example_inputs=t.example)
    if way == "torch-pruning":
        from torch_pruning_peer import pruned

        return helpers.network(pruned(torch_module(t), a.macs), t.example)
    criterion: Any
    criterion, _, scope = ("activation" if way in ("scratch", "tas") else way).partition("-")
    if criterion == "taylor":
        criterion = helpers.importance(t.whole, t.batches, followed)
        t.batches.rewind()
    asked = skive.Prune(macs=a.macs, criterion=criterion, refit=way not in ("l1", "random"), seed=a.seed,
                        scope=scope or "global", multiple=a.multiple, calibration=t.calibration,
                        keep=tuple(a.keep.split(",")) if a.keep else ())
    if way == "tas":
        asked = helpers.search_widths(t.source, asked, *t.batches.halves(), a.epochs, a.rate, loss=followed,
                                      bfloat16=a.bfloat16, example_inputs=t.example)
    return helpers.prune(t.source, asked, example_inputs=t.example)


@dataclass
class Trained:
    """What one way made of one task; the arrays tell which samples are answered rightly."""

    removed: float  # of the multiply-accumulates
    whole: np.ndarray
    before: np.ndarray
    after: np.ndarray
    seconds: float
    extra: dict[str, float]
    int8: np.ndarray | None = None


def trained(way: str, t: Task, a: argparse.Namespace) -> Trained:
    t.batches.rewind()
    torch.manual_seed(a.seed)
    started = time.process_time()
    net = smaller(way, t, a)
    extra = {"search_seconds": time.process_time() - started} if way == "tas" else {}
    before = right_of(net, t)
    if way == "scratch":
        net.normalise(t.batches.inputs[:BATCH]).reset(a.seed)
    started = time.process_time()
    most = skive.Sparsify(SPARSE, a.zeros, scope=a.scope)
    helpers.finetune(net, t.batches, a.epochs, 5 * a.rate if way == "scratch" else a.rate, loss=followed,
                     gradual=most if way == "blocks" else None, bfloat16=a.bfloat16,
                     progress=lambda epoch, loss: print(f"    {way} epoch {epoch + 1}: {loss:.3f}, "
                                                        f"{time.process_time() - started:.0f} s", flush=True))
    done = Trained(1 - total_macs(net.source) / total_macs(t.whole.source), right_of(t.whole, t), before,
                   right_of(net, t), time.process_time() - started, extra)
    if way == "blocks":
        stays = [m for m in net.masks.values()]
        extra["zeros"] = 1 - sum(int(m.sum()) for m in stays) / sum(m.size for m in stays)
    if a.int8:
        module = skive.compile(net.graph(), quantize=skive.Quantize("int8", calibration=t.calibration), verify=False)
        done.int8 = answers(module, t.inputs).argmax(-1) == t.classes
        extra["sparse_layers"] = sum(layer["kernel"].startswith("sparse") for layer in module.report["layers"])
    return done


def together(model: str, way: str, parts: list[Trained], a: argparse.Namespace) -> dict[str, Any]:
    """What the benchmark says about one way, over all parts of the data; shares and seconds are means of a part."""
    whole, before, after = (np.concatenate([getattr(p, n) for p in parts]) for n in ("whole", "before", "after"))
    gained, lost = int((after & ~whole).sum()), int((whole & ~after).sum())
    row: dict[str, Any] = {
        "model": model, "way": way, "epochs": a.epochs, "rate": a.rate, "seed": a.seed,
        "judged_on": "held out" if a.held_out else "test", "samples": len(after),
        "macs_removed": statistics.mean(p.removed for p in parts), "whole": top1(whole), "before": top1(before),
        "top1": top1(after), "interval": wilson(int(after.sum()), len(after)),
        "difference": 100 * (gained - lost) / len(after), "difference_interval": paired(gained, lost, len(after)),
        "seconds": statistics.mean(p.seconds for p in parts)}
    row |= {name: statistics.mean(p.extra[name] for p in parts) for name in parts[0].extra}
    if a.int8:
        row["int8"] = top1(np.concatenate([p.int8 for p in parts if p.int8 is not None]))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="resnet20_cifar10,kws_dscnn")
    parser.add_argument("--work", type=Path, metavar="WORK", help="where mobilenet_cifar10 is kept, once trained")
    parser.add_argument("--views", type=int, default=0, metavar="EPOCHS", help="after so many epochs the same views of "
                        "the samples come again, with answers that are remembered (default: always new ones)")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--multiple", type=int)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--teachers", metavar="NAMES", help="networks whose mean answer is followed, with commas "
                        "(default: the network itself)")
    parser.add_argument("--ways", default="whole,activation,l1,random,scratch,torch-pruning,blocks")
    parser.add_argument("--keep", metavar="NAMES", help="patterns of layers that keep their channels, with commas")
    parser.add_argument("--scope", default="layer", help="of blocks: each layer loses the fraction, or all together "
                        "(global)")
    parser.add_argument("--zeros", type=float, default=0.75, metavar="FRACTION", help="of blocks (with --scope global "
                        "of the multiply-accumulates)")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16, where the processor has them")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="samples of the test at most")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    if a.work is None and "mobilenet_cifar10" in a.models:
        parser.error("mobilenet_cifar10 is trained first: --work says where it is kept")
    torch.set_num_threads(1)
    known = {m.name: m for m in REAL_MODELS}
    known["mobilenet_cifar10"] = replace(known["resnet20_cifar10"], name="mobilenet_cifar10")
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        tasks = [task(known[name], a.data, a, part) for part in range(KEYWORD_PARTS if name == "kws_dscnn" else 1)]
        for way in a.ways.split(","):
            if way == "torch-pruning" and name not in ("resnet20_cifar10", "mobilenet_cifar10"):
                print(f"{name:<18} {way:<13} left out: there is no PyTorch module of it here", flush=True)
                continue
            row = together(name, way, [trained(way, t, a) for t in tasks], a)
            rows.append(row)
            (low, high), (least, most) = row["interval"], row["difference_interval"]
            print(f"{name:<18} {way:<13} {row['macs_removed']:6.1%} of the MACs gone  top-1 {row['before']:6.2f} % "
                  f"untrained, {row['top1']:6.2f} % [{low:.2f}, {high:.2f}] of {row['whole']:.2f} "
                  f"({row['difference']:+.2f} [{least:+.2f}, {most:+.2f}]) after {a.epochs} epochs "
                  f"in {row['seconds']:.0f} s"
                  + (f"  {row['zeros']:.1%} of the weights zero" if "zeros" in row else "")
                  + (f"  INT8 {row['int8']:.2f} %, {row['sparse_layers']:.0f} sparse layers" if a.int8 else ""),
                  flush=True)
            if a.json:
                results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
