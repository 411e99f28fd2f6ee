"""Networks with blocks of zero weights beside the same networks dense: time of the whole and of each layer.

    taskset -c 1 python benchmarks/sparse.py MODEL.onnx ... [--pattern block4x16] [--fractions 0.5,0.75,0.9]
        [--quantize int8|none] [--layers] [--json FILE]

Blocks go by their magnitude: time does not depend on which ones. NAME.npy beside NAME.onnx is a typical input and,
rolled along its axes, the calibration data. `encoder:WIDTHxLAYERS` instead of a file is an encoder of BERT's form with
random weights for 128 tokens (BERT-base: encoder:768x12). All networks of a model have turns in one process; a ratio
is the median over rounds of dense by sparse, `min` the fastest call. First and last layers stay dense, as by default.
`--layers` adds the time of each layer and what its forecast was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import results

import skive
from skive import frontend, ops, profiling
from skive.ir import Graph, Node, constant
from skive.types import DType

CALIBRATION = 4  # samples
TURN_SECONDS = 0.1
ROUNDS = 15
WORDS = 1000


def encoder(width: int, layers: int, tokens: int = 128) -> Graph:
    """BERT (Devlin et al., 2019) for two classes, of random weights: heads of 64 channels, GELU, four times the width
    inside, and a vocabulary of `WORDS` instead of 30,522."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Node:
        return constant((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def dense(x: Node, outputs: int) -> Node:
        return ops.make("linear", x, weight(outputs, x.shape[-1]), constant(np.zeros(outputs, np.float32)))

    def normal(a: Node, b: Node) -> Node:
        one, zero = constant(np.ones(width, np.float32)), constant(np.zeros(width, np.float32))
        return ops.make("layer_norm", ops.make("add", a, b), one, zero)

    x = ops.make("input", shape=(1, tokens), dtype=DType.i64, label="x")
    h = normal(ops.make("gather", weight(WORDS, width), x, axis=0), weight(1, tokens, width))
    for _ in range(layers):
        heads = [ops.make("reshape", dense(h, width), shape=(1, tokens, width // 64, 64)) for _ in range(3)]
        mixed = ops.make("attention", *heads, scale=0.125, token_major=True)
        h = normal(h, dense(ops.make("reshape", mixed, shape=(1, tokens, width)), width))
        h = normal(h, dense(ops.make("gelu", dense(h, 4 * width)), width))
    one_token = ops.make("slice", h, start=(0, 0, 0), size=(1, 1, width), step=(1, 1, 1))
    first = ops.make("reshape", one_token, shape=(1, width))
    y = dense(ops.make("tanh", dense(first, width)), 2)
    return Graph(f"encoder_{width}x{layers}", (x,), (y,), ("y",))


def source(path: Path) -> Path | Graph:
    """What is compiled: the file, or the made-up network that `path` names."""
    if not path.name.startswith("encoder:"):
        return path
    return encoder(*map(int, path.name.removeprefix("encoder:").split("x")))


def inputs_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(a typical input, calibration samples one after another along dimension 0)."""
    file = path.with_suffix(".npy")
    rng = np.random.default_rng(0)
    if file.is_file():
        x = np.load(file)
    else:
        (node,) = frontend.open_model(source(path)).graph().inputs
        x = (rng.standard_normal(node.shape) if node.dtype.is_float else rng.integers(0, WORDS, node.shape)).astype(
            node.dtype.numpy)
    rolled = [np.roll(x, tuple(rng.integers(0, n) for n in x.shape[1:]), tuple(range(1, x.ndim)))
              for _ in range(CALIBRATION - 1)]
    return x, np.concatenate([x, *rolled])


def built(path: Path, x: np.ndarray, data: np.ndarray, a: argparse.Namespace, fraction: float) -> skive.Module:
    """The network with `fraction` of its blocks zero; 0: as it is."""
    name = frontend.open_model(source(path)).graph().inputs[0].name
    quantize = None
    if a.quantize != "none":
        quantize = skive.Quantize(a.quantize, calibration={name: data}, rounding="nearest")
    example = {} if path.name.startswith("encoder:") else {"example_inputs": {name: x}}
    return skive.compile(source(path), **example, quantize=quantize, threads=a.threads, verify=False,
                         sparsify=f"{a.pattern}@{fraction}" if fraction else None)


def turn(module: skive.Module, x: np.ndarray) -> list[float]:
    """Seconds of each call of one turn."""
    module(x)
    seconds, end = [], time.perf_counter() + TURN_SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        module(x)
        seconds.append(time.perf_counter() - start)
    return seconds


def layers_of(module: skive.Module) -> dict[str, tuple[float, str]]:
    """(microseconds, kernel) by layer of those that multiply."""
    measured = profiling.profile(module, seconds=1.0)
    assert measured is not None
    found: dict[str, tuple[float, str]] = {}
    for layer, times in zip(module.report["layers"], measured["layers"], strict=True):
        if layer["macs"]:
            found[layer["name"]] = (found.get(layer["name"], (0.0, ""))[0] + times["us"], layer["kernel"])
    return found


def measure(path: Path, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per fraction, that of the dense network first."""
    x, data = inputs_of(path)
    fractions = [0.0, *(float(f) for f in a.fractions.split(","))]
    modules = [built(path, x, data, a, f) for f in fractions]
    medians, fastest = np.zeros((ROUNDS, len(modules))), np.full(len(modules), np.inf)
    for r in range(ROUNDS):
        for k in np.roll(np.arange(len(modules)), r):
            seconds = turn(modules[k], x)
            medians[r, k], fastest[k] = np.median(seconds), min(fastest[k], *seconds)
    rows = []
    dense = layers_of(modules[0]) if a.layers else {}
    for k, (fraction, module) in enumerate(zip(fractions, modules, strict=True)):
        sparsity = module.report.get("sparsity", {})
        row = {"model": path.stem, "pattern": a.pattern, "fraction": fraction, "min_ms": 1e3 * fastest[k],
               "median_ms": 1e3 * float(np.median(medians[:, k])),
               "ratio": float(np.median(medians[:, 0] / medians[:, k])),
               "weight_bytes": module.report["compiled"]["weight_bytes"],
               "macs_zero": sparsity.get("macs_removed", 0.0),
               "refused": sum(bool(layer["refused"]) for layer in sparsity.get("layers", []))}  # fmt: skip
        rows.append(row)
        print(f"{path.stem:<14} {a.pattern} {fraction:4.0%}  {row['macs_zero']:6.1%} of the MACs zero  min "
              f"{row['min_ms']:8.3f} ms  median {row['median_ms']:8.3f} ms  {row['ratio']:5.2f} x dense  "
              f"{row['weight_bytes'] / 1e6:6.2f} MB", flush=True)  # fmt: skip
        if a.layers and fraction:
            forecast = {layer["name"]: layer for layer in sparsity.get("layers", [])}
            row["layers"] = []
            for name, (us, kernel) in layers_of(module).items():
                said = forecast.get(name, {})
                row["layers"].append({"name": name, "kernel": kernel, "us": us, "dense_us": dense[name][0],
                                      "forecast": said.get("speedup"), "refused": said.get("refused")})
                print(f"    {name[-44:]:<44} {kernel:<16} {dense[name][0]:8.1f} -> {us:8.1f} us  "
                      f"{dense[name][0] / max(us, 1e-3):5.2f} x"
                      + (f" (forecast {said['speedup']:.2f})" if said else ""), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--pattern", default="block4x16")
    parser.add_argument("--fractions", default="0.5,0.75,0.9")
    parser.add_argument("--quantize", choices=("int8", "int16", "none"), default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", action="store_true", help="time of every layer, too")
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    rows = [row for path in a.models for row in measure(path, a)]
    if a.json:
        results.write(a.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
