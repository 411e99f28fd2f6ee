"""Arrays from files: read, fitted to ports, cut into calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skive.errors import InvalidModelError, ShapeError
from skive.samples import unreadable

if TYPE_CHECKING:
    from skive.runtime import TensorInfo


def read_arrays(spec: str) -> dict[str, np.ndarray]:
    """The arrays of `FILE.npz[:KEY]` by name (KEY: that one alone). InvalidModelError if unreadable."""
    path, key = spec, None
    if not Path(spec).exists() and ":" in spec:
        path, _, key = spec.rpartition(":")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InvalidModelError(f"{path} is not an .npz file; write it with numpy.savez")
        with archive:
            if key is not None and key not in archive.files:
                raise InvalidModelError(f"{path} has no array {key!r}; it has {', '.join(archive.files)}")
            return {k: archive[k] for k in ([key] if key is not None else archive.files)}
    except FileNotFoundError:
        raise InvalidModelError(f"{path} is not there") from None
    except InvalidModelError:
        raise
    except OSError as e:
        raise InvalidModelError(f"cannot read {path}: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 - zipfile, zlib and numpy raise many kinds on damaged files
        raise InvalidModelError(f"{path} is not a readable .npz file: {unreadable(e)}") from None


def fit_arrays(arrays: Mapping[str, np.ndarray], ports: Sequence[TensorInfo]) -> list[np.ndarray]:
    """One array per port, of its type and, but for the number of samples, its shape [n, ...].

    Arrays go by name, or by position if they are called `arr_0`, `arr_1`, ... or there is one input
    and one array. Where integers stand for real numbers, these are taken too and stay as they are
    (`as_integers`). ShapeError if one is missing or does not fit.
    """
    chosen = []
    for i, port in enumerate(ports):
        if port.name in arrays:
            a = arrays[port.name]
        elif f"arr_{i}" in arrays:
            a = arrays[f"arr_{i}"]
        elif len(ports) == len(arrays) == 1:
            a = next(iter(arrays.values()))
        else:
            hint = "; choose one as FILE.npz:KEY" if len(ports) == 1 and arrays else ""
            raise ShapeError(f"input {port.name!r} is missing; the file has {', '.join(arrays) or 'nothing'}{hint}")
        want = np.dtype(port.dtype if port.scale is None or a.dtype.kind != "f" else np.float32)
        if a.dtype != want:
            if not np.can_cast(a.dtype, want, "same_kind"):
                raise ShapeError(f"input {port.name!r} is {a.dtype}, not {want}; convert it")
            if want.kind in "iu" and a.size and not np.iinfo(want).min <= a.min() <= a.max() <= np.iinfo(want).max:
                raise ShapeError(f"input {port.name!r} is {a.dtype} with values from {a.min()} to {a.max()}, which "
                                 f"{want} does not hold" + ("; give real numbers" if port.scale is not None else ""))
            a = a.astype(want)
        shape = tuple(port.shape)
        if a.shape != shape:
            if shape and a.shape == shape[1:]:
                a = a[None]
            if shape and a.ndim and [d for d in a.shape[1:] if d != 1] == [d for d in shape[1:] if d != 1]:
                a = a.reshape(len(a), *shape[1:])  # only axes of length 1 differ, such as one channel
            if not shape or a.ndim != len(shape) or a.shape[1:] != shape[1:] \
                    or (shape[0] > 0 and (len(a) < shape[0] or len(a) % shape[0])):
                raise ShapeError(f"input {port.name!r} is {list(a.shape)}, not {list(shape)}")
        chosen.append(a)
    return chosen


def as_integers(arrays: Sequence[np.ndarray], ports: Sequence[TensorInfo]) -> list[np.ndarray]:
    """`arrays` as an artefact takes them: real numbers in the integers of their port."""
    return [p.quantize(a) if a.dtype.kind == "f" else a for p, a in zip(ports, arrays, strict=True)]


def in_calls(arrays: Sequence[np.ndarray], ports: Sequence[TensorInfo],
             batch_max: int | None) -> Iterator[list[np.ndarray]]:
    """`arrays` cut into calls: as many samples a call as the compiled shape holds."""
    steps = [(p.shape[0] if p.shape[0] > 0 else batch_max or 1) if p.shape else 1 for p in ports]
    calls = {-(-len(a) // s) if a.ndim else 1 for a, s in zip(arrays, steps, strict=True)}
    if len(calls) > 1:
        raise ShapeError("the inputs hold different numbers of samples: "
                         + ", ".join(f"{p.name} {list(a.shape)}" for p, a in zip(ports, arrays, strict=True)))
    for c in range(calls.pop() if calls else 1):
        yield [a[c * s:(c + 1) * s] if a.ndim else a for a, s in zip(arrays, steps, strict=True)]


def samples(path: str | None, ports: Sequence[TensorInfo]) -> Any:
    """What --calibrate names, as Quantize and Prune take it."""
    if path is None or ".npz" not in (Path(path.rpartition(":")[0] or path).suffix, Path(path).suffix):
        return path
    return {p.name: a for p, a in zip(ports, fit_arrays(read_arrays(path), ports), strict=True)}


def read_labels(spec: str, data: str, count: int, samples: int | None) -> np.ndarray:
    """The classes that KEY of the file of `data`, or FILE.npz:KEY, holds: one for each of `count` samples."""
    file = data if Path(data).exists() else data.rpartition(":")[0]
    place = spec if ":" in spec or Path(spec).exists() else f"{file}:{spec}"
    arrays = read_arrays(place)
    if len(arrays) != 1:
        raise InvalidModelError(f"{place} holds {', '.join(arrays)}; choose the labels as FILE.npz:KEY")
    (classes,) = arrays.values()
    classes = classes[:samples]
    if classes.dtype.kind not in "iu" or classes.size != count or len(classes) != count:
        raise ShapeError(f"the labels are {classes.dtype} {list(classes.shape)}, not {count} integers")
    return classes.reshape(-1)
