"""Times of single layers, through the function `NAME_run_layer` of an artefact."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skive.errors import InvalidModelError
from skive.runtime import Module, TensorInfo

_ROUNDS = (5, 5000)  # the fewest and the most passes through a network
_ALIGN = 64  # bytes; NAME_ARENA_ALIGN


def sample_arrays(ports: Sequence[TensorInfo], seed: int = 0) -> list[np.ndarray]:
    """Inputs that any network accepts: normal floats, random bools, and integers 0 and 1, which are
    valid indices of all but the smallest tables. An open batch has one sample."""
    rng = np.random.default_rng(seed)
    arrays = []
    for p in ports:
        shape = tuple(max(d, 1) if d < 0 else d for d in p.shape)
        a = rng.standard_normal(shape) if np.dtype(p.dtype).kind == "f" else rng.integers(0, 2, shape)
        arrays.append(np.asarray(a, p.dtype))
    return arrays


def aligned_bytes(n: int) -> np.ndarray:
    """At least `n` zeroed bytes at a 64-byte boundary; at least one, as no bytes have no address."""
    raw = np.zeros(n + 1 + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start:start + n + 1]


def _pointers(arrays: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(arrays)))(*(a.ctypes.data for a in arrays))


def time_layers(library_path: Path, name: str, input_ports: Sequence[TensorInfo], output_ports: Sequence[TensorInfo],
                arena_bytes: int, count: int, *, rounds: int | None = None, seconds: float = 1.0,
                ) -> tuple[np.ndarray, np.ndarray, float]:
    """(nanoseconds of whole runs [rounds], of each layer [rounds, count], cost of one call from Python).

    `count` layers of the library of an artefact called `name`, on inputs by `sample_arrays`.
    """
    # Where a Module holds the library open with its threads started, this is the same copy of it.
    library = ctypes.CDLL(str(library_path))
    try:
        run, run_layer = library[f"{name}_run"], library[f"{name}_run_layer"]
    except AttributeError:
        raise InvalidModelError(f"{library_path.parent}: the library has no {name}_run_layer; "
                                "compile the model again") from None
    pointer = ctypes.POINTER(ctypes.c_void_p)
    run.argtypes = [pointer, pointer, ctypes.c_void_p]
    run_layer.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_void_p]

    inputs = sample_arrays(input_ports)
    outputs = [np.zeros([max(d, 1) if d < 0 else d for d in p.shape], p.dtype) for p in output_ports]
    arena = aligned_bytes(arena_bytes)
    arguments = (_pointers(inputs), _pointers(outputs), ctypes.c_void_p(arena.ctypes.data))
    clock = time.perf_counter_ns

    def check(error: int) -> None:
        if error:
            text = library[f"{name}_error"]
            text.restype = ctypes.c_char_p
            raise InvalidModelError(f"{library_path.parent}: {text(error).decode(errors='replace')}")

    check(run(*arguments))
    start = clock()
    check(run(*arguments))
    if rounds is None:
        # Each round runs the network twice: once whole, once by layers.
        rounds = int(np.clip(seconds * 1e9 / (2 * max(1, clock() - start)), *_ROUNDS))
    whole = np.empty(rounds)
    refused = np.empty((rounds, 3))
    single = np.empty((rounds, count))
    for r in range(rounds):
        start = clock()
        run(*arguments)
        whole[r] = clock() - start
        for i in range(count):
            start = clock()
            error = run_layer(i, *arguments)
            single[r, i] = clock() - start
            if error:
                check(error)
        for k in range(refused.shape[1]):
            start = clock()
            run_layer(-1, *arguments)
            refused[r, k] = clock() - start
    overhead = float(np.median(refused[:, -1]))  # the last of them: as warm as the calls of layers
    return whole, single, overhead


def profile(module: Module, *, rounds: int | None = None, seconds: float = 1.0) -> dict[str, Any]:
    """What each kernel call of `module` costs: medians over `rounds` passes through the network, or
    over as many as take about `seconds`.

    Keys: `rounds`; `run_us`, one call of the whole network; `layers_us`, the sum over the layers;
    `layers[]` in the order of execution, each with name, op, kernel, macs, bytes, the types of
    the report, us, share of the sum, gmac_per_s, gb_per_s. Times are in microseconds, without the
    cost of the call from Python (that of a call that is refused). A layer runs right after the one
    before it, as in the network, so its operands are as warm as there.
    """
    name, described = module.manifest["name"], module.report["layers"]
    if module.manifest.get("backend") == "tvm":
        raise InvalidModelError(f"{module.folder} was compiled by TVM, which has no layers to measure here; "
                                "use skive bench")
    library = (module.folder / f"lib{name}.so").resolve()
    whole, single, overhead = time_layers(
        library, name, module.inputs, module.outputs, module.manifest["arena_bytes"], len(described),
        rounds=rounds, seconds=seconds)
    rounds = len(whole)
    us = np.maximum(np.median(single, axis=0) - overhead, 1.0) / 1e3 if described else np.zeros(0)
    total = float(us.sum())
    layers = [{"name": d["name"], "op": d["op"], "kernel": d["kernel"], "macs": d["macs"], "bytes": d["bytes"],
               **{k: d[k] for k in ("dtype", "reads", "writes") if k in d},
               "us": round(float(t), 3), "share": float(t) / total,
               "gmac_per_s": d["macs"] / float(t) / 1e3, "gb_per_s": d["bytes"] / float(t) / 1e3}
              for d, t in zip(described, us, strict=True)]
    return {"rounds": rounds, "threads": module.manifest["threads"],
            "run_us": round(max(0.0, float(np.median(whole)) - overhead) / 1e3, 3),
            "layers_us": round(total, 3), "layers": layers}
