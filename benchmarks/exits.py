"""Early exits on real data: heads trained on frozen networks, thresholds calibrated, accuracy, cost and time.

    python benchmarks/exits.py DATA WORK [--models resnet20,dscnn] [--seeds 1] [--epochs N] [--joint]
                               [--views EPOCHS] [--teachers resnet20_cifar10,resnet56_cifar10]
                               [--criteria max-prob,entropy,margin,patience,gate]
                               [--drop 0.5 | --macs 0.6 [--shared]] [--int8 [--ranges mse]] [--json FILE]

DATA as for `accuracy.py`; trained heads are kept in WORK and used again. Thresholds come from one half of the test
samples, where they lose `--drop` points of what the network had before it got exits, or take `--macs` of its
multiply-accumulates (`--shared`: one for all exits, for few samples), and every figure from the other half, both ways
round; the mean of both stands here. `us` is the mean over samples of the smallest time of a call, beside that of the
same network compiled without exits, to which shares of multiply-accumulates refer, too.

There are 600 keyword recordings, none of them a training part: 500 judge, a third of them with each seed. Heads (and
the network, `--joint`) learn from the other two thirds and 100 more, thresholds (and gates) come from three quarters of
that third and meet the last, four ways round. `all seeds` is over all that judged, with three seeds each of the 500
once; `difference` is the 95 % interval of the paired one. Settings of the training were chosen on those 100 by
agreement with the network as it came, without classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import paired
from distillation import BATCH, TEMPERATURE, Batches, mean_answer
from networks import ResNet20
from torch import Tensor, nn
from torch.nn import functional as fn

import skive
from skive import bench, exit_calibration
from skive.torch import WithExits, add_exits, fit_gates, train_exits

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
Arrays = tuple[np.ndarray, np.ndarray]
KEYWORD_FOLDS = 3
CALIBRATION = 500  # training samples that INT8 ranges come from, at most
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # at which int8 is to leave where float32 does
TRADEOFF = 0.5  # of gates: what the whole network's cost counts against cross-entropy in nats


class DSCNN(nn.Module):
    """The keyword network of MLPerf Tiny, without its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 64, (10, 4), 2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.ReLU(),
                                                    nn.Conv2d(64, 64, 1), nn.ReLU()) for _ in range(4)))
        self.linear = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(fn.relu(self.first(fn.pad(x, (1, 1, 4, 5)))))
        return self.linear(x.mean((2, 3)))


def resnet20(data: Path, seed: int = 0) -> tuple[nn.Module, Arrays, Arrays]:
    """The network, (inputs, classes) to train heads with, and those to test with, the same for every seed."""
    network = ResNet20()
    network.load_state_dict(torch.load(data / "models" / "resnet20_cifar10.pt", weights_only=True))

    def images(*files: str) -> Arrays:
        parts = [np.load(data / f) for f in files]
        x = (np.concatenate([p["x"] for p in parts]).astype(np.float32) / 255 - MEAN) / STD
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), np.concatenate([p["y"] for p in parts]).astype(np.int64)

    return network, images("cifar10_train_0.npz", "cifar10_train_1.npz"), images("cifar10_test_a.npz")


def dscnn(data: Path, seed: int = 0) -> tuple[nn.Module, Arrays, Arrays]:
    """As `resnet20`; of the 500 recordings that judge, the third whose turn it is with `seed`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(data / "models" / "kws_dscnn.onnx")
    value = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in model.graph.initializer}
    network = DSCNN()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for layer, node in zip(convolutions, (n for n in model.graph.node if n.op_type == "Conv"), strict=True):
            layer.weight.copy_(value[node.input[1]])
            layer.bias.copy_(value[node.input[2]])  # type: ignore[union-attr]
        network.linear.weight.copy_(value["functional_1/dense/MatMul/ReadVariableOp:0"].T)
        network.linear.bias.copy_(value["functional_1/dense/BiasAdd/ReadVariableOp:0"])
    stored = np.load(data / "kws_mfcc_a.npz")
    x = ((stored["x"].astype(np.float32) - 83) * 0.5847029089927673)[:, None]
    y = stored["y"].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    judging, settings = np.concatenate([order[:200], order[300:]]), order[200:300]
    turn = np.arange(len(judging)) % KEYWORD_FOLDS == seed % KEYWORD_FOLDS
    train, test = np.concatenate([settings, judging[~turn]]), judging[turn]
    recording = np.unique(stored["x"].reshape(len(x), -1), axis=0, return_inverse=True)[1].reshape(-1)
    train = train[~np.isin(recording[train], recording[test])]  # some are there twice
    return network, (x[train], y[train]), (x[test], y[test])


@dataclass(frozen=True)
class Plan:
    """Where a network gets its exits: `load` gives it with its data; `channels`, `grid` and `hidden` of the heads; rows
    and columns by which inputs are shifted; whether they are images, which are mirrored, too, or spectra, which are
    varied in more ways."""

    load: Callable[..., tuple[nn.Module, Arrays, Arrays]]  # of the folder and the seed
    at: tuple[str, ...]
    channels: int
    grid: int | tuple[int, int]
    shift: tuple[int, int]
    images: bool
    rate: float  # of the network that learns along
    epochs: int = 12
    hidden: int = 0
    temperature: float = TEMPERATURE
    noise: float = 0.0
    parts: int = 2  # of the test samples: thresholds come from all but one and meet that one, every way round
    folds: int = 1  # with each of so many seeds other samples judge


MODELS = {
    "resnet20": Plan(resnet20, ("layer2.0", "layer3.0"), 32, 2, (4, 4), True, 1.5e-3),
    "dscnn": Plan(dscnn, ("blocks.0", "blocks.1"), 0, (1, 5), (3, 0), False, 2e-3, epochs=500, hidden=16,
                  temperature=2.0, noise=0.4, parts=4, folds=KEYWORD_FOLDS),
}


def teacher(network: nn.Module, one: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The answers of `network`, as it is now, for a batch of inputs like `one`."""
    module = skive.compile(network, example_inputs=(torch.from_numpy(one),), batch_max=BATCH)
    return lambda x: np.asarray(module(x))


def teachers(a: argparse.Namespace) -> list[Path]:
    """The files that `--teachers` names."""
    return [a.data / "models" / f"{name}.onnx" for name in a.teachers.split(",")] if a.teachers else []


def trained(name: str, network: nn.Module, fold: Arrays, work: Path, seed: int, epochs: int, joint: bool,
            teachers: Sequence[Path], views: int = 0) -> WithExits:
    """`network` with heads from WORK, or trained now on the mean answer of `teachers` (none: its own)."""
    plan = MODELS[name]
    torch.manual_seed(seed)
    example = (torch.from_numpy(fold[0][:1]),)
    model = add_exits(network.eval(), example, plan.at, channels=plan.channels, grid=plan.grid, hidden=plan.hidden)
    asked = [name, seed, epochs, *[f"views{views}"] * bool(views), *["joint"] * joint, *(t.stem for t in teachers)]
    file = work / f"{'-'.join(map(str, asked))}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    answer = mean_answer(teachers, fold[0][:1]) if teachers else teacher(network, fold[0][:1])
    batches = Batches(fold[0], answer, plan.shift, plan.images, seed, not plan.images, views)
    unused = torch.zeros(batches.size, dtype=torch.long)  # classes
    said = [unused]  # what the teacher says of the batch

    def seen() -> Iterable[tuple[Tensor, Tensor]]:
        for x, said[0] in batches:
            yield x, unused

    train_exits(model, seen, epochs=epochs, network_lr=plan.rate if joint else 0.0, lr=4e-3, distill=1.0,
                teacher=lambda x: said[0], temperature=plan.temperature, noise=plan.noise, bfloat16=True,
                progress=lambda e, loss: print(f"  {name} seed {seed} epoch {e}: loss {loss:.3f}", flush=True))
    work.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def mean_us(module: skive.Module, inputs: np.ndarray, rounds: int = 5) -> float:
    """Microseconds of a call with one sample: the mean over samples, each the smallest of `rounds`."""
    best = np.full(len(inputs), np.inf)
    for _ in range(rounds):
        for i in range(len(inputs)):
            one = inputs[i : i + 1]
            start = time.perf_counter()
            module(one)
            best[i] = min(best[i], time.perf_counter() - start)
    return 1e6 * float(best.mean())


def gates(module: skive.Module, x: np.ndarray, y: np.ndarray, tradeoff: float) -> list[skive.Exit]:
    """Learned gates for the exits of `module`, from samples that the heads have not seen."""
    values = [np.concatenate(rows) for rows in zip(*(module.all_outputs(v[None]) for v in x), strict=True)]
    logits = [torch.from_numpy(values[e.outputs[0]]) for e in module.exits]
    return fit_gates(logits, torch.from_numpy(y), [e.macs for e in module.exits], tradeoff)


def measured(model: WithExits, plain: skive.Module, test: Arrays, before: np.ndarray, drop: float, macs: float | None,
             shared: bool, criterion: str, quantize: skive.Quantize | None, limit: int,
             parts: int) -> list[dict[str, Any]]:
    """A criterion, calibrated on all but one of `parts` of the test samples and measured on that one, every way round,
    to lose `drop` points or, if given, to take `macs` of the multiply-accumulates. `before`: which samples the network
    without exits has right; `plain`: that network as `model` has it. `curve`: what all settings that are good on the
    other parts do to this one."""
    x, y = test
    whole_macs = plain.report["compiled"]["macs"]
    example = (torch.from_numpy(x[:1]),)
    exits = [skive.Exit(f"exit{i}", "max-prob" if criterion == "gate" else criterion, 1e9)
             for i in range(len(model.at))]
    module = first = skive.compile(model, example_inputs=example, exits=exits, quantize=quantize)

    def evidence() -> exit_calibration.Evidence:
        return exit_calibration.collect(module, ([v[None]] for v in x), y)

    seen = evidence()
    rows = []
    for part in reversed(range(parts)):
        here = np.arange(len(x)) % parts == part
        if criterion == "gate":
            learned = gates(first, x[~here], y[~here], TRADEOFF)
            module = skive.compile(model, example_inputs=example, exits=learned, quantize=quantize)
            seen = evidence()
        held, others = seen.part(here), seen.part(~here)
        stay = np.asarray([-exit_calibration.always(t) for t in seen.tests], np.float32)
        curve = exit_calibration.curve(others)
        known = [*curve, exit_calibration.setting(others, stay)]
        if macs is not None:
            goal = exit_calibration.Goal("macs", macs * whole_macs / module.exits[-1].macs)
            chosen = exit_calibration.calibrate(others, goal, shared).setting.thresholds
        else:
            best = max(s.accuracy for s in known)
            least = min(best, 100 * float(before[~here].mean()) - drop) - 1e-9  # few samples may ask for too much
            chosen = min((s for s in known if s.accuracy >= least), key=lambda s: s.cost).thresholds
        found, whole = exit_calibration.setting(held, chosen), exit_calibration.setting(held, stay)
        taken = held.taken(chosen)
        right = held.right[np.arange(len(taken)), taken]
        names = list(module.thresholds)
        sample = x[here][:limit]
        module.thresholds = dict(zip(names, stay.tolist(), strict=True))
        never = mean_us(module, sample)
        module.thresholds = dict(zip(names, chosen.tolist(), strict=True))
        if not np.array_equal(taken[:limit], np.concatenate([module.run(v[None]).exit for v in sample])):
            raise RuntimeError(f"{criterion}: a call leaves elsewhere than its scores say")
        rows.append({"dtype": "int8" if quantize else "float32", "criterion": criterion,
                     "top1": float(found.accuracy), "before_top1": 100 * float(before[here].mean()),
                     "whole_top1": float(whole.accuracy),
                     "macs": float(found.cost) * module.exits[-1].macs / whole_macs,
                     "shares": found.shares.tolist(), "samples": len(right),
                     "gained": int((right & ~before[here]).sum()),
                     "lost": int((before[here] & ~right).sum()), "us": mean_us(module, sample),
                     "plain_us": mean_us(plain, sample), "never_us": never,
                     "thresholds": chosen.tolist(),
                     "curve": [[s.cost, s.accuracy]
                               for s in (exit_calibration.setting(held, c.thresholds) for c in curve)]})
    return rows


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of rows that other samples judge each; what has no mean as a list of all, counts as their sum."""
    counts = [r["samples"] for r in rows]
    mean = {key: float(np.average([r[key] for r in rows], weights=counts)) for key, value in rows[0].items()
            if isinstance(value, float)}
    total = {key: sum(r[key] for r in rows) for key in ("samples", "gained", "lost")}
    same = {key: rows[0][key] for key in ("dtype", "criterion")}
    lists = {key: [r[key] for r in rows] for key in rows[0] if key not in mean | total | same}
    return {**same, **mean, **total, **lists,
            "shares": np.average([r["shares"] for r in rows], 0, weights=counts).tolist()}


def line(name: str, seed: str, row: dict[str, Any]) -> str:
    """A row for people."""
    shares = " ".join(f"{100 * s:.0f}" for s in row["shares"])
    low, high = paired(row["gained"], row["lost"], row["samples"])
    return (f"{name:<9} {seed:<9} {row['dtype']:<8} {row['criterion']:<9} top-1 {row['top1']:.2f} % of "
            f"{row['before_top1']:.2f} (never leaving {row['whole_top1']:.2f}; difference {low:+.2f} to {high:+.2f}), "
            f"{100 * row['macs']:.1f} % of the MACs, exits {shares} %, "
            f"{row['us']:.1f} us of {row['plain_us']:.1f} (never leaving {row['never_us']:.1f})")


def int8_and_batch(model: WithExits, test: Arrays, quantize: skive.Quantize, batch: int = 64) -> np.ndarray:
    """[THRESHOLDS] how many of the samples leave in int8 where they leave in float32. Prints what a batch saves beside
    its MACs, with thresholds of 0.9."""
    example, x = (torch.from_numpy(test[0][:1]),), test[0]
    exits = [skive.Exit(f"exit{i}", "max-prob", 0.9) for i in range(len(model.at))]
    taken = []
    for kind, lossy in (("float32", None), ("int8", quantize)):
        module = skive.compile(model, example_inputs=example, exits=exits, quantize=lossy, batch_max=batch)
        parts = [x[i : i + batch] for i in range(0, len(x), batch)]
        own, never = module.thresholds, dict.fromkeys(module.thresholds, 2.0)
        paths = []
        for threshold in THRESHOLDS:
            module.thresholds = dict.fromkeys(own, float(threshold))
            paths.append(np.concatenate([module.run(p).exit for p in parts]))
        taken.append(np.stack(paths))
        module.thresholds = own
        macs = float(module.run(parts[0]).macs.mean()) / module.exits[-1].macs
        seconds = [np.inf, np.inf]
        for _ in range(15):
            for i, thresholds in enumerate((own, never)):
                module.thresholds = thresholds
                start = time.perf_counter()
                module(parts[0])
                seconds[i] = min(seconds[i], time.perf_counter() - start)
        saved = (1 - seconds[0] / seconds[1]) / (1 - macs)
        print(f"  {kind}, batch of {batch}: {100 * macs:.1f} % of the MACs, {100 * seconds[0] / seconds[1]:.1f} % of "
              f"the time: {100 * saved:.0f} % of the ideal saving")
    return np.asarray((taken[0] == taken[1]).sum(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="resnet20,dscnn")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="default: by network")
    parser.add_argument("--views", type=int, default=0, metavar="EPOCHS", help="after so many epochs the same views of "
                        "the samples come again, with answers that are remembered (default: always new ones)")
    parser.add_argument("--teachers", metavar="NAMES", help="networks of DATA whose mean answer is followed, with "
                        "commas (default: the network itself)")
    parser.add_argument("--joint", action="store_true", help="the network learns along")
    parser.add_argument("--criteria", default="max-prob,entropy,margin,patience,gate")
    parser.add_argument("--drop", type=float, default=0.5, help="points that thresholds may lose")
    parser.add_argument("--macs", type=float, metavar="FRACTION", help="of the multiply-accumulates that thresholds "
                        "may take, as accurate as possible, instead of --drop")
    parser.add_argument("--shared", action="store_true", help="with --macs: one threshold for all exits")
    parser.add_argument("--int8", action="store_true", help="the same in int8, too")
    parser.add_argument("--ranges", default="minmax", help="of --int8")
    parser.add_argument("--limit", type=int, default=300, help="samples that are timed")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in a.models.split(","):
        plan = MODELS[name]
        done: list[dict[str, Any]] = []
        same, judged = np.zeros(len(THRESHOLDS)), 0
        for seed in range(a.seeds):
            network, fold, test = plan.load(a.data, seed)
            classes = teacher(network.eval(), test[0][:1])
            before = np.concatenate([classes(x).argmax(-1) for x in np.array_split(test[0], -(-len(test[0]) // BATCH))])
            model = trained(name, network, fold, a.work, seed, a.epochs or plan.epochs, a.joint, teachers(a), a.views)
            int8 = skive.Quantize("int8", calibration=fold[0][:CALIBRATION], samples=CALIBRATION, method=a.ranges)
            if a.int8:
                same, judged = same + int8_and_batch(model, test, int8), judged + len(test[0])
            quantizes = [None, int8][:1 + a.int8]
            example = (torch.from_numpy(test[0][:1]),)
            plains = [skive.compile(model.network, example_inputs=example, quantize=q) for q in quantizes]
            for criterion in a.criteria.split(","):
                for quantize, plain in zip(quantizes, plains, strict=True):
                    row = together(measured(model, plain, test, before == test[1], a.drop, a.macs, a.shared, criterion,
                                            quantize, a.limit, plan.parts))
                    done.append({"model": name, "seed": seed, **row})
                    print(line(name, f"seed {seed}", row), flush=True)
        if a.int8:
            shares = 100 * same / judged
            print(f"{name:<9} int8 leaves where float32 does on {shares.mean():.1f} % of {judged} samples, mean over "
                  f"thresholds of 0.5 to 0.95 ({shares.min():.1f} to {shares.max():.1f} %)", flush=True)
        rows += done
        if 1 < a.seeds <= plan.folds:  # no sample has judged twice
            for kind in dict.fromkeys((r["criterion"], r["dtype"]) for r in done):
                row = together([r for r in done if (r["criterion"], r["dtype"]) == kind])
                rows.append({**row, "model": name, "seed": "all"})
                print(line(name, "all seeds", row), flush=True)
    if a.json:
        document = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(), "rows": rows}
        Path(a.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
