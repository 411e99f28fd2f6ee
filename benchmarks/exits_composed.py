"""Early exits, half of the multiply-accumulates removed with whole channels, and INT8 in one artefact of ResNet-20.

    taskset -c 1 python benchmarks/exits_composed.py DATA WORK [--epochs 12] [--joint] [--teachers NAMES]
                                                     [--prune macs=0.5] [--prune-scope measured]
                                                     [--tuning-epochs 10] [--drop 1.5] [--limit 200] [--json FILE]

DATA as for `accuracy.py`. Exits are trained as in `exits.py` (kept in WORK), the network with its exits is pruned and
trained again on the same answers, then compiled in INT8 with exits. With its thresholds it loses
`--drop` points of the network as it came on one half of the test images; what stands here is measured on the other
half, both ways round. `us` is the mean over images of the smallest time of a call, of ONNX Runtime (one thread) the
smallest time of a call, all in turns.
The network that was trained lies in WORK as text, by what it was made with: `skive compile WORK/FILE.skive --exit ...`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exits
import numpy as np
import peers
import results
import torch
from distillation import Batches, followed, mean_answer
from torch import Tensor, nn

import skive
from skive import exit_calibration, pruning, text
from skive import torch as helpers
from skive.torch import WithExits

ROUNDS = 7


def error(got: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
    """The sum over all exits of the distance from what the whole network says."""
    return torch.stack([followed(g, wanted) for g in got]).sum()


def pruned(a: argparse.Namespace, original: nn.Module, model: WithExits, fold: exits.Arrays) -> Any:
    """The graph of the network with exits after pruning and training, from WORK or made now."""
    asked = [a.prune, a.prune_scope, a.tuning_epochs, a.rate, a.epochs, *["joint"] * a.joint, a.teachers or "itself"]
    file = a.work / f"resnet20-pruned-{'-'.join(map(str, asked))}.skive"
    if file.exists():
        return text.load_text(file)
    cut = replace(pruning.requested(a.prune), scope=a.prune_scope, calibration=fold[0][:200])
    example = (torch.from_numpy(fold[0][:1]),)
    net = helpers.prune(model, cut, example_inputs=example)
    print(f"  pruned: {net.sparsity['macs_removed']:.1%} of the MACs", flush=True)
    files, one = exits.teachers(a), fold[0][:1]
    answer = mean_answer(files, one) if files else exits.teacher(original, one)
    loader = Batches(fold[0], answer, exits.MODELS["resnet20"].shift, True, 0)
    helpers.finetune(net, loader, a.tuning_epochs, a.rate, loss=error, bfloat16=True,
                     progress=lambda e, loss: print(f"  pruned, epoch {e}: loss {loss:.3f}", flush=True))
    graph = net.graph()
    text.save_text(graph, file)
    return graph


def session(path: Path, x: np.ndarray) -> Callable[[], Any]:
    """A call of ONNX Runtime with one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    loaded = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = loaded.get_inputs()[0].name
    return lambda: loaded.run(None, {name: x})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--teachers", metavar="NAMES", help="networks of DATA whose mean answer is followed, with "
                        "commas (default: the network itself)")
    parser.add_argument("--joint", action="store_true", help="the network learns along with its exits")
    parser.add_argument("--prune", default="macs=0.5", help="as in `skive compile --prune`")
    parser.add_argument("--prune-scope", choices=pruning.SCOPES, default="global")
    parser.add_argument("--tuning-epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--drop", type=float, default=1.5, help="points that all of it together may lose")
    parser.add_argument("--limit", type=int, default=200, help="images that are timed")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    network, fold, (x, y) = exits.MODELS["resnet20"].load(a.data)
    network.eval()
    model = exits.trained("resnet20", network, fold, a.work, 0, a.epochs, a.joint, exits.teachers(a))
    graph = pruned(a, exits.MODELS["resnet20"].load(a.data)[0].eval(), model, fold)
    original = a.data / "models" / "resnet20_cifar10.onnx"
    int8 = a.work / "resnet20-onnxruntime-int8.onnx"
    peers.quantize_onnxruntime(original, fold[0][:200], int8)
    float32 = skive.compile(original, input_shapes={"input": (1, *x.shape[1:])})
    ways = [skive.Exit(n, "max-prob", 1e9) for n in graph.output_names[:-1]]
    module = skive.compile(graph, exits=ways, quantize=skive.Quantize("int8", calibration=fold[0][:200]))

    def evidence(rows: slice) -> exit_calibration.Evidence:
        return exit_calibration.collect(module, ([v[None]] for v in x[rows]), y[rows])

    right = np.asarray([float32(v[None]).argmax() == c for v, c in zip(x, y, strict=True)])
    halves = slice(0, None, 2), slice(1, None, 2)
    seen = [evidence(half) for half in halves]
    goals = [exit_calibration.Goal("accuracy", 100 * right[half].mean() - a.drop) for half in halves]
    thresholds = [exit_calibration.calibrate(e, goal).setting.thresholds for e, goal in zip(seen, goals, strict=True)]
    found = [exit_calibration.setting(e, t) for e, t in zip(seen, reversed(thresholds), strict=True)]
    sample = np.concatenate([x[half][:a.limit // 2] for half in halves])

    def judge(half: int) -> None:
        """Gives `module` the thresholds that the other half chose."""
        module.thresholds = dict(zip(module.thresholds, thresholds[1 - half].tolist(), strict=True))

    calls = {"onnxruntime float32": session(original, sample[:1]), "onnxruntime int8": session(int8, sample[:1]),
             "skive float32": lambda: float32(sample[:1])}
    us, mean = dict.fromkeys(calls, np.inf), np.full(len(sample), np.inf)
    for _ in range(ROUNDS):  # in turns: a drift of the machine meets all alike
        for name, call in calls.items():
            for _ in range(20):
                start = time.perf_counter()
                call()
                us[name] = min(us[name], 1e6 * (time.perf_counter() - start))
        for i in range(len(sample)):
            judge(2 * i // len(sample))
            start = time.perf_counter()
            module(sample[i:i + 1])
            mean[i] = min(mean[i], 1e6 * (time.perf_counter() - start))
    shared = np.mean([f.shares for f in found], 0)
    macs = float(np.mean([f.cost for f in found])) * module.exits[-1].macs
    row = {"top1": float(np.mean([f.accuracy for f in found])), "original_top1": 100 * float(right.mean()),
           "shares": shared.tolist(), "us": float(mean.mean()), "macs": macs,
           "original_macs": float32.report["compiled"]["macs"], **us}
    shares = " ".join(f"{100 * s:.0f}" for s in shared)
    print(f"top-1 {row['top1']:.2f} % of {row['original_top1']:.2f}, "
          f"{100 * row['macs'] / row['original_macs']:.1f} % of the MACs, exits {shares} %, {row['us']:.1f} us a call")
    for name in calls:
        print(f"  {name}: {us[name]:.1f} us, {us[name] / row['us']:.2f} times as long")
    if a.json:
        results.write(a.json, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
