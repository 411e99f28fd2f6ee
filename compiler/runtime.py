"""A compiled module: loads an artefact folder and calls it on NumPy, DLPack or torch tensors.

Importing and running this needs numpy and the native loader only, neither onnx nor torch.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skive import _native, exit_calls
from skive.errors import InvalidModelError, ShapeError, TargetError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and numpy dtype name of an input or output. Dimension 0 may be the largest batch. Where integers
    stand for real numbers: real = scale (integer - zero)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero: int | None = None

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """`real` as the integers of this tensor, rounded to even and saturated; itself if it has no scale."""
        if self.scale is None or self.zero is None:
            return real
        limits = np.iinfo(self.dtype)
        steps = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)) + self.zero
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """The float32 numbers that `integers` of this tensor stand for; itself if it has no scale."""
        if self.scale is None or self.zero is None:
            return integers
        return (np.asarray(integers, np.int32) - self.zero).astype(np.float32) * np.float32(self.scale)


class Module:
    """A network that is ready to run. Inputs go by position or by name; safe to call from several threads."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._export: Callable[[str | Path], Any] | None = None
        self.temporary = False  # whether the folder is removed when the process ends
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text())
            name, threads = self.manifest["name"], self.manifest["threads"]
            ports = [
                [
                    TensorInfo(p["name"], tuple(p["shape"]), p["dtype"], p.get("scale"), p.get("zero"))
                    for p in self.manifest[k]
                ]
                for k in ("inputs", "outputs")
            ]
            arena, batch, isa = (
                self.manifest["arena_bytes"],
                self.manifest["batch_max"] or 0,
                self.manifest["isa"],
            )
        except FileNotFoundError:
            raise InvalidModelError(f"{folder} is not an artefact: it has no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InvalidModelError(f"{self.folder / MANIFEST} is damaged: {e}") from None
        if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
            raise InvalidModelError(f"{self.folder / MANIFEST} is damaged: {name!r} is not a name")
        self.inputs, self.outputs = ports
        self._names = [p.name for p in self.inputs]
        self._call: Any
        self._call_exits: Any
        self._answer: Callable[..., Any]
        try:
            self.exits, self._thresholds = exit_calls.read(self.manifest, [p.name for p in self.outputs])
            self._limits = exit_calls.given(self.exits, self._thresholds)
        except (KeyError, ValueError, TypeError) as e:
            raise InvalidModelError(f"{self.folder / MANIFEST} is damaged: exits: {e}") from None
        missing = sorted(set(isa) - set(_native.cpu_features()))
        if missing:
            raise TargetError(
                f"{folder} needs {', '.join(missing)}, which this processor lacks; "
                "compile for --target generic or on this machine"
            )
        if self.manifest.get("backend") == "tvm":
            from skive.tvm_calls import Stages

            self._call, self._call_exits = (Stages(self.folder, self.manifest, e) for e in (False, True))
            self._bind()
            return
        library = self.folder / f"lib{name}.so"
        if not library.exists():
            raise InvalidModelError(
                f"{library} is not there: the artefact was written with --emit-only; build it with its CMakeLists.txt"
            )
        inputs, outputs = ([(p.name, p.shape, p.dtype) for p in side] for side in (self.inputs, self.outputs))
        try:
            self._call = _native.Artifact(str(library.resolve()), name, inputs, outputs, arena, batch, threads)
            if self.exits:  # thresholds are one more input, the exits taken one more output
                given = [*inputs, ("thresholds", self._limits.shape, self._limits.dtype.name)]
                got = [*outputs, ("exit_taken", (-1 if batch else 1,), "int32")]
                self._call_exits = _native.Artifact(
                    str(library.resolve()), f"{name}_exits", given, got, arena, batch, threads,
                    ways=[e.outputs for e in self.exits],
                )
        except (RuntimeError, OSError) as e:
            raise TargetError(f"{library} cannot be loaded: {e}") from None
        except ValueError as e:
            raise InvalidModelError(f"{self.folder / MANIFEST} is damaged: {e}") from None
        self._bind()

    def export_onnx(self, path: str | Path) -> None:
        """Writes the optimised, pruned, quantized graph as ONNX, with QuantizeLinear and DequantizeLinear where
        it is quantized: made anew from what `skive.compile` was given. InvalidModelError for a module that
        was loaded, since an artefact holds no graph."""
        if self._export is None:
            raise InvalidModelError(f"{self.folder} was loaded and holds no graph; export from the module that "
                                    "skive.compile returns, or compile with export_onnx (--export-onnx)")
        self._export(path)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The output, or a tuple of outputs, of the kind that came in (NumPy, DLPack or torch); with early exits
        those of the exit that each sample took."""
        if not named:
            try:
                return self._answer(*args)
            except (TypeError, ValueError):
                pass  # not plain matching arrays: the careful path below says what is wrong
        return self._careful(args, named, self._answer)

    def _bind(self) -> None:
        """Makes calls leave by `_limits`."""
        # What a call runs, ready to be called: a network may take less time than a few lines of Python.
        self._answer = functools.partial(self._call_exits.taken, self._limits) if self.exits else self._call

    def run(self, *args: Any, **named: Any) -> exit_calls.Result:
        """A call with what it cost: `.outputs` as a call gives them, and for each sample `.exit`, the index of the exit
        taken (the last one is the whole network), `.macs` and `.scores`."""
        values: list[np.ndarray] = []
        exits = np.zeros(0, np.int32)

        def call(*arrays: np.ndarray) -> Any:
            nonlocal values, exits
            if not self.exits:
                outputs = self._call(*arrays)
                first = outputs[0] if isinstance(outputs, tuple) else outputs
                exits = np.zeros(len(first) if self.manifest["batch_max"] else 1, np.int32)
                return outputs
            *values, exits = self._call_exits(*arrays, self._limits)
            return exit_calls.taken(self.exits, values, exits)

        outputs = self._careful(args, named, call)
        ways = self.exits or (exit_calls.Way("", (0,), None, None, None, self.report["compiled"]["macs"]),)
        return exit_calls.result(ways, values, exits, outputs)

    def all_outputs(self, *args: Any, **named: Any) -> tuple[Any, ...]:
        """Every output in the order of `outputs`, with early exits also those of all exits and their scores."""
        result = self._careful(args, named, self._call)
        return result if isinstance(result, tuple) else (result,)

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold of every exit but the last, by name, a real number also where scores are integers. Assign a
        dict to change some."""
        return dict(zip((e.name for e in self.exits), self._thresholds.tolist(), strict=False))

    @thresholds.setter
    def thresholds(self, new: Mapping[str, float]) -> None:
        self._thresholds = exit_calls.changed(self.exits, self._thresholds, new)
        self._limits = exit_calls.given(self.exits, self._thresholds)
        self._bind()

    def call_into(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Runs on C-contiguous arrays of the declared types and writes the results into `outputs`:
        nothing is allocated. ShapeError if an array does not fit."""
        try:
            self._call.call_into(inputs, outputs)
        except (TypeError, ValueError) as e:
            raise ShapeError(str(e)) from None

    def _careful(self, args: tuple[Any, ...], named: dict[str, Any], call: Callable[..., Any]) -> Any:
        values = list(args)
        for name in self._names[len(args) :]:
            if name not in named:
                raise ShapeError(f"input {name!r} is missing; the inputs are {', '.join(self._names)}")
            values.append(named.pop(name))
        if named or len(values) > len(self._names):
            extra = next(iter(named), f"number {len(self._names) + 1}")
            if extra in self._names:
                raise ShapeError(f"input {extra!r} is given twice, by position and by name")
            raise ShapeError(f"there is no input {extra}; the inputs are {', '.join(self._names)}")
        arrays = [self._array(v, p) for v, p in zip(values, self.inputs, strict=True)]
        try:
            result = call(*arrays)
        except (TypeError, ValueError) as e:
            raise ShapeError(str(e)) from None
        torch = sys.modules.get("torch")
        if torch is not None and any(isinstance(v, torch.Tensor) for v in values):
            return (
                tuple(map(torch.from_numpy, result))
                if isinstance(result, tuple)
                else torch.from_numpy(result)
            )
        return result

    @staticmethod
    def _array(value: Any, port: TensorInfo) -> np.ndarray:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            try:
                value = value.detach().cpu().resolve_neg().resolve_conj().numpy()
            except (TypeError, RuntimeError):  # a sparse, quantized or meta tensor, or an element type NumPy lacks
                raise ShapeError(f"input {port.name!r} is a {value.dtype} tensor of layout {value.layout} on "
                                 f"{value.device}; give a dense one of {port.dtype} with values") from None
        elif not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
            value = np.from_dlpack(value)
        refusal = f"input {port.name!r} is of type {type(value).__name__}, not an array of {port.dtype}"
        try:
            array = np.asarray(value)
        except ValueError as e:  # lists of unequal length
            raise ShapeError(f"{refusal}: {e}") from None
        if array.dtype.kind in "OUS" and not isinstance(value, np.ndarray):  # None, text
            raise ShapeError(refusal)
        if array.dtype != np.dtype(port.dtype):
            raise ShapeError(
                f"input {port.name!r} is {array.dtype}, not {port.dtype}; convert it with .astype({port.dtype!r})"
            )
        return np.ascontiguousarray(array) if array.ndim else array

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        return json.loads((self.folder / "report.json").read_text())

    def save(self, folder: str | Path) -> None:
        """Copies the artefact to `folder`, whole or not at all, with the thresholds as they are now in its manifest.
        In C, null stands for those it was compiled with."""
        from skive.artifact import write_folder

        changed = self._thresholds != exit_calls.read(self.manifest, [p.name for p in self.outputs])[1]
        manifest = copy.deepcopy(self.manifest)
        for i in np.flatnonzero(changed):
            manifest["exits"][i]["threshold"] = float(self._thresholds[i])
        with write_folder(Path(folder)) as temporary:
            shutil.copytree(self.folder, temporary, dirs_exist_ok=True)
            if changed.any():
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    def __copy__(self) -> Module:
        module = _again(self.folder, self.thresholds)
        module.temporary, module._export = self.temporary, self._export
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        return self.__copy__()

    def __reduce__(self) -> tuple[Callable[..., Module], tuple[Any, ...]]:
        """Pickled is where the artefact lies, not what is in it."""
        if self.temporary:
            raise TypeError(f"{self!r} was compiled without a folder of its own, so another process may not find it; "
                            "pickle what skive.load gives of the folder it was saved to or compiled into (output=)")
        return _again, (self.folder.resolve(), self.thresholds)

    def __repr__(self) -> str:
        ports = [
            ", ".join(f"{p.name}: {p.dtype}{list(p.shape)}" for p in side)
            for side in (self.inputs, self.outputs)
        ]
        return f"<skive.Module {self.manifest['name']} ({ports[0]}) -> ({ports[1]})>"


def _again(folder: Path, thresholds: Mapping[str, float]) -> Module:
    module = load(folder)
    module.thresholds = thresholds
    return module


def load(folder: str | Path) -> Module:
    """The module that lies in an artefact folder. InvalidModelError, TargetError."""
    return Module(folder)
