"""Dynamic networks written in Python: does each compile, are its paths those of eager PyTorch, and how fast is it?

    taskset -c 1 python benchmarks/dynamic [NETWORK ...] [--json out.json]

Beside it what torch.export, torch.jit.trace and torch.onnx.export make of the same networks, and onnxruntime on the
`If` and `Loop` form, which the older exporter makes of torch.jit.script where that takes the source. Times are those
of a call on one thread, in us: for every one of some inputs the least of many calls, and their mean.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import results  # noqa: E402
from networks import NETWORKS  # noqa: E402

import skive  # noqa: E402
from skive.errors import SkiveError  # noqa: E402

INPUTS = 200  # of each network, and more until every path is taken
SEARCHED = 4000
TOLERANCE = 1e-4  # of the output's range
TIMED = 12

Run = Callable[[Tensor], Sequence[Any]]


class Tensors(nn.Module):
    """The network with its path as a tensor, for tools that know nothing else."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, path = self.net(x)
        return y, torch.as_tensor(path)


def inputs_of(net: Any) -> tuple[list[Tensor], list[tuple[Tensor, int]]]:
    """Inputs that take every path, as far as SEARCHED of them do, and what eager mode gives."""
    inputs, wanted, met = [], [], set()
    for seed in range(SEARCHED):
        if seed >= INPUTS and len(met) >= net.paths:
            break
        x = net.example(seed)
        y, path = net(x)
        if seed < INPUTS or path not in met:
            inputs.append(x)
            wanted.append((y, path))
        met.add(path)
    return inputs, wanted


def agreement(run: Run, inputs: Sequence[Tensor], wanted: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
    """Inputs with the path of eager mode, and with its output too."""
    path = output = 0
    for x, (y, p) in zip(inputs, wanted, strict=True):
        try:
            got, taken = (np.asarray(v) for v in run(x))
        except Exception:  # noqa: BLE001 - a result like any other
            continue
        path += int(taken.reshape(())) == p
        same = got.shape == tuple(y.shape) and (
            np.abs(got - y.numpy()).max() <= TOLERANCE * max(1e-6, float(y.abs().max())))
        output += bool(same and int(taken.reshape(())) == p)
    return {"inputs": len(inputs), "same_path": path, "same_output": output}


def least(fn: Callable[[Any], Any], x: Any, seconds: float) -> float:
    """The least time of a call, in us."""
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        fn(x)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


@contextlib.contextmanager
def quiet() -> Any:
    nowhere = io.StringIO()
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def attempt(make: Callable[[], Run], inputs: Sequence[Tensor], wanted: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
    """What another tool makes of a network: agreement, or why it does not take it."""
    try:
        with quiet():
            run = make()
    except Exception as e:  # noqa: BLE001 - whatever the tool raises
        logging.disable(logging.NOTSET)
        return {"error": f"{type(e).__name__}: {next((s.strip() for s in str(e).splitlines() if s.strip()), '')}"[:160]}
    return agreement(run, inputs, wanted)


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(name: str, seconds: float, others: bool, tvm: bool, work: Path) -> dict[str, Any]:
    """The row of one network."""
    net = NETWORKS[name]().eval()
    inputs, wanted = inputs_of(net)
    row: dict[str, Any] = {"network": name, "paths": net.paths, "covered": len({p for _, p in wanted})}
    started = time.perf_counter()
    try:
        with quiet():
            module = skive.compile(net, example_inputs=(inputs[0],))
    except SkiveError as e:
        return {**row, "error": str(e)}
    row["compile_s"] = round(time.perf_counter() - started, 1)
    row |= agreement(lambda x: [v.numpy() for v in module(x)], inputs, wanted)
    timed = [inputs[i * len(inputs) // TIMED] for i in range(TIMED)]
    each = seconds / TIMED
    row["us"] = float(np.mean([least(module, x.numpy(), each) for x in timed]))
    row["eager_us"] = float(np.mean([least(net, x, each) for x in timed]))
    row["faster"] = row["eager_us"] / row["us"]
    if tvm:
        try:
            with quiet():
                theirs = skive.compile(net, example_inputs=(inputs[0],), backend="tvm")
        except SkiveError as e:
            return {**row, "error": str(e)}
        row["tvm"] = agreement(lambda x: [v.numpy() for v in theirs(x)], inputs, wanted)
        row["tvm_us"] = float(np.mean([least(theirs, x.numpy(), each) for x in timed]))
    if not others:
        return row
    whole = Tensors(net).eval()

    def exported() -> Run:
        return torch.export.export(whole, (inputs[0],), strict=False).module()

    def traced() -> Run:
        return torch.jit.trace(whole, (inputs[0],), check_trace=False)

    def as_onnx(scripted: bool) -> Run:
        path = work / f"{name}-{'if' if scripted else 'dynamo'}.onnx"
        model = torch.jit.script(whole) if scripted else whole
        torch.onnx.export(model, (inputs[0],), str(path), dynamo=not scripted, input_names=["x"])
        engine = session(path)
        return lambda x: engine.run(None, {engine.get_inputs()[0].name: x.numpy()})

    row["torch.export"] = attempt(exported, inputs, wanted)
    row["torch.jit.trace"] = attempt(traced, inputs, wanted)
    row["torch.onnx.export"] = attempt(lambda: as_onnx(False), inputs, wanted)
    row["onnxruntime-if"] = attempt(lambda: as_onnx(True), inputs, wanted)
    if "error" not in row["onnxruntime-if"]:
        engine = session(work / f"{name}-if.onnx")
        row["onnxruntime_us"] = float(np.mean([
            least(lambda a: engine.run(None, {"x": a}), x.numpy(), each) for x in timed]))
    return row


def cell(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    return "no" if "error" in found else f"{found['same_output']}/{found['inputs']}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    p.add_argument("--seconds", type=float, default=1.0, help="of timing for each engine and network")
    p.add_argument("--alone", action="store_true", help="skive and eager mode only")
    p.add_argument("--tvm", action="store_true", help="our stages compiled by Apache TVM, too (extra tvm)")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    unknown = set(args.networks) - set(NETWORKS)
    if unknown:
        p.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = []
    print(f"{'network':16}{'paths':>8}{'same':>9}{'us':>9}{'eager':>9}{'faster':>8}{'ort If':>9}"
          f"{'export':>9}{'trace':>9}{'onnx':>9}{'script':>9}{'compile':>9}")
    with tempfile.TemporaryDirectory(prefix="skive-dynamic-") as work:
        for name in args.networks or NETWORKS:
            r = measure(name, args.seconds, not args.alone, args.tvm, Path(work))
            rows.append(r)
            if "error" in r:
                print(f"{name:16} {r['error']}", flush=True)
                continue
            ort = f"{r['onnxruntime_us']:.1f}" if "onnxruntime_us" in r else "-"
            print(f"{name:16}{r['covered']:>4}/{r['paths']:<3}{cell(r):>9}{r['us']:>9.1f}{r['eager_us']:>9.1f}"
                  f"{r['faster']:>8.1f}{ort:>9}{cell(r.get('torch.export')):>9}{cell(r.get('torch.jit.trace')):>9}"
                  f"{cell(r.get('torch.onnx.export')):>9}{cell(r.get('onnxruntime-if')):>9}{r['compile_s']:>8.1f}s"
                  + (f"  tvm {cell(r['tvm'])} {r['tvm_us']:.0f} us" if args.tvm else ""), flush=True)
    compiled = [r for r in rows if "error" not in r]
    if compiled:
        mean = math.exp(np.mean([math.log(r["faster"]) for r in compiled]))
        print(f"{len(compiled)} of {len(rows)} compile; faster than eager by {mean:.1f} (geometric mean)")
    if args.json:
        results.write(args.json, rows)
    right = all("error" not in r and all(m["same_output"] == m["inputs"] for m in (r, r.get("tvm", r))) for r in rows)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
