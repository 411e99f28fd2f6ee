"""Running stages that Apache TVM built, by the host program of a network with exits. Imports tvm when it is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skive import exit_calls
from skive.errors import ToolchainError

VERSION = "0.27.0.post1"
CONSTANTS = "constants.npz"  # of an artefact: values of sides of choices, by number
INSTALL = "pip install 'skive-compiler[tvm]'"  # pins TVM and its FFI: newer ones of it crash


def tvm() -> Any:
    """The module `tvm`; ToolchainError if it is missing or not the one whose interface is used here."""
    try:
        found = importlib.import_module("tvm")
    except ImportError as e:
        raise ToolchainError(f"--backend tvm needs Apache TVM ({e}); {INSTALL}") from None
    version = getattr(found, "__version__", "unknown")
    if version != VERSION:
        raise ToolchainError(f"--backend tvm is made for apache-tvm {VERSION}, not {version}; {INSTALL}")
    return found


def _holds(condition: Any) -> bool:
    return bool(condition.numpy().reshape(-1)[0])


def _chosen(condition: Any, a: Any, b: Any) -> tuple[Any]:
    """The side of a choice that was computed."""
    return (a if _holds(condition) else b,)


@dataclass(frozen=True)
class Segment:
    """What runs if all conditions of `guards` are as they say; values go by number."""

    run: Callable[..., Any]
    reads: list[int]
    writes: list[int]
    guards: list[tuple[int, bool]]


class Stages:
    """Takes the place of the loaded library of an artefact, with the same calls (`skive._native.Artifact`).

    `with_exits`: thresholds are one more input and the exits taken one more output, as in `NAME_exits_run`.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], with_exits: bool):
        self._tvm = tvm()
        from tvm import relax

        self._manifest, self._with_exits = manifest, with_exits
        self._batch = manifest["batch_max"]

        def loaded(row: Mapping[str, Any]) -> Segment:
            run = _chosen
            if "library" in row:
                library = self._tvm.runtime.load_module(str(folder / row["library"]))
                run = relax.VirtualMachine(library, self._tvm.cpu())["main"]
            return Segment(run, row["reads"], row["writes"], row["guards"])

        self._stages = [[loaded(row) for row in stage] for stage in manifest["stages"]]
        stored = np.load(folder / CONSTANTS) if (folder / CONSTANTS).exists() else {}
        self._constants = {int(k): self._tvm.runtime.tensor(stored[k]) for k in stored}
        names = [p["name"] for p in manifest["outputs"]]
        self._ways, _ = exit_calls.read(manifest, names)
        self._tests = [(names.index(e["score"]), exit_calls.COMPARE[e["test"]]) for e in manifest.get("exits", ())
                       if e["score"] is not None]

    def __call__(self, *arrays: np.ndarray) -> Any:
        arrays, thresholds = (arrays[:-1], arrays[-1]) if self._with_exits else (arrays, None)
        self._check(arrays)
        batch = arrays[0].shape[0] if self._batch else 1
        shapes = [(batch, *p["shape"][1:]) if self._batch else p["shape"] for p in self._manifest["outputs"]]
        outputs = [np.zeros(s, p["dtype"]) for s, p in zip(shapes, self._manifest["outputs"], strict=True)]
        exits = np.zeros(batch, np.int32)
        for b in range(batch):
            one = [a[b:b + 1] if self._batch else a for a in arrays]
            into = [o[b:b + 1] if self._batch else o for o in outputs]
            exits[b] = self._run(one, into, thresholds)
        results = [*outputs, exits] if self._with_exits else outputs
        return results[0] if len(results) == 1 else tuple(results)

    def taken(self, thresholds: np.ndarray, *arrays: np.ndarray) -> Any:
        """The outputs of the exit that each sample took."""
        *values, exits = self(*arrays, thresholds)
        return exit_calls.taken(self._ways, values, exits)

    def call_into(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Runs on `inputs` and writes the results into `outputs`."""
        results = self(*inputs)
        for into, value in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
            into[...] = value

    def _run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], thresholds: np.ndarray | None) -> int:
        """The exit that one sample takes."""
        tensor = self._tvm.runtime.tensor
        given = (tensor(np.ascontiguousarray(a)) for a in inputs)
        values: dict[int, Any] = self._constants | dict(zip(self._manifest["input_values"], given, strict=True))
        for k, stage in enumerate(self._stages):
            for s in stage:
                if all(_holds(values[c]) == wanted for c, wanted in s.guards):
                    values |= zip(s.writes, s.run(*(values.get(i) for i in s.reads)), strict=True)
            for into, value in zip(outputs, self._manifest["output_values"], strict=True):
                if value in values:
                    into[...] = values[value].numpy()
            if thresholds is not None and k < len(self._tests):
                score, leaves = self._tests[k]
                if leaves(outputs[score].reshape(-1)[0], thresholds[k]):
                    return k
        return len(self._stages) - 1

    def _check(self, arrays: Sequence[Any]) -> None:
        """TypeError or ValueError where the arrays are not those of the network."""
        ports = self._manifest["inputs"]
        if len(arrays) != len(ports):
            raise TypeError(f"{len(ports)} inputs are needed, {len(arrays)} were given")
        for a, p in zip(arrays, ports, strict=True):
            if not isinstance(a, np.ndarray) or a.dtype != np.dtype(p["dtype"]):
                raise TypeError(f"input {p['name']!r} is not an array of {p['dtype']}")
            fits = a.shape[1:] == tuple(p["shape"][1:]) if self._batch else a.shape == tuple(p["shape"])
            if not fits or (self._batch and not (1 <= len(a) <= self._batch and len(a) == len(arrays[0]))):
                raise ValueError(f"input {p['name']!r} has shape {list(a.shape)}, not {list(p['shape'])}"
                                 + (f" with a batch of 1 to {self._batch}" if self._batch else ""))
