"""Calibration data: what a user gives as inputs that the network meets in use, as samples of a graph."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from skive.errors import QuantizationError
from skive.ir import Graph, Node

Sample = tuple[np.ndarray, ...]  # one array per graph input, of its shape and element type


def fingerprint(options: Mapping[str, Any], data: Any) -> str | None:
    """Text that is equal for equal `options` and equal calibration `data`; None for data that can be read only
    once or whose kind cannot be hashed."""
    h = hashlib.sha256()
    return json.dumps(options, sort_keys=True) + h.hexdigest() if hashed(data, h) else None


def hashed(source: Any, h: Any) -> bool:
    """Feeds calibration data of any kind that can be read again to the hash `h`; False for other kinds."""
    if isinstance(source, (str, Path)):
        text = str(source)
        place = Path(text if Path(text).exists() else text.rpartition(":")[0])
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        h.update(text.encode())
        for f in files:
            if f.is_file():
                with f.open("rb") as opened:
                    h.update(f.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return True
    if source is None:
        return True
    if isinstance(source, Mapping):
        return all(h.update(str(k).encode()) is None and hashed(v, h) for k, v in source.items())
    if isinstance(source, (list, tuple)):
        h.update(f"[{len(source)}".encode())
        return all(hashed(v, h) for v in source)
    if isinstance(source, (np.ndarray, np.generic)) or hasattr(source, "__array__"):
        a = np.asarray(source)
        h.update(f"{a.dtype.str}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).data)
        return True
    return False


def _itself(value: Any) -> Any:
    return value


class Samples:
    """The calibration samples of a graph: iterable any number of times, in the same order.

    Memory does not grow with their number: arrays are viewed, files are mapped or read one at a time,
    and what can be iterated only once is spooled to a temporary file. `len` is known for all but a
    one-shot iterator that was not read yet.
    """

    def __init__(self, graph: Graph, source: Any, limit: int = 256):
        self._inputs = graph.inputs
        self._limit = limit
        self._spool: IO[bytes] | None = None
        self._spooled = 0
        if source is None:
            raise QuantizationError(
                f"{graph.name}: fixed point needs calibration data; give Quantize(calibration=...) "
                "or --calibrate FILE.npz with inputs such as the network will meet"
            )
        if isinstance(source, (str, Path)):
            source = _opened(source)
        if isinstance(source, _Files):
            self._groups: list[Callable[[], Any]] | None = source.readers
            self._once: Iterator[Any] | None = None
        elif isinstance(source, (np.ndarray, Mapping)) or hasattr(source, "__array__"):
            self._groups, self._once = [lambda: source], None
        elif isinstance(source, Sequence):
            self._groups, self._once = [functools.partial(_itself, v) for v in source], None
        elif isinstance(source, Iterable):
            self._groups, self._once = None, iter(source)
        else:
            raise QuantizationError(f"calibration data of type {type(source).__name__} cannot be read")
        # (group, index within it) of every sample that is used.
        self._chosen: list[tuple[int, int]] | None = None
        if self._groups is not None:
            every = [(g, i) for g, read in enumerate(self._groups) for i in range(len(self._split(read())))]
            if not every:
                raise QuantizationError("the calibration data holds no sample")
            step = max(1.0, len(every) / limit)
            self._chosen = [every[int(k * step)] for k in range(min(limit, len(every)))]

    def __len__(self) -> int:
        return len(self._chosen) if self._chosen is not None else self._spooled

    def __iter__(self) -> Iterator[Sample]:
        if self._groups is None:
            yield from self._replayed()
            return
        assert self._chosen is not None
        last, group = -1, _Group([], 0)
        for g, i in self._chosen:
            if g != last:
                last, group = g, self._split(self._groups[g]())
            yield group[i]

    def _replayed(self) -> Iterator[Sample]:
        """What was spooled, then the rest of the one-shot iterator, spooled on the way."""
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as these samples
        at = 0
        for _ in range(self._spooled):
            self._spool.seek(at)
            sample = tuple(np.load(self._spool, allow_pickle=False) for _ in self._inputs)
            at = self._spool.tell()
            yield sample
        if self._once is None:
            return
        for value in self._once:
            group = self._split(value)
            count = min(len(group), self._limit - self._spooled)
            self._spool.seek(0, 2)
            for i in range(count):  # all of them before the first is handed out: the reader may stop there
                for a in group[i]:
                    np.save(self._spool, a)
            self._spooled += count
            yield from (group[i] for i in range(count))
            if self._spooled >= self._limit:
                break
        self._once = None
        if not self._spooled:
            raise QuantizationError("the calibration data holds no sample")

    def _split(self, value: Any) -> _Group:
        """One sample, or an array of samples along dimension 0, as a group of samples."""
        if isinstance(value, Mapping):
            missing = [i.name for i in self._inputs if i.name not in value]
            if missing and len(self._inputs) == 1 == len(value):
                arrays = [np.asarray(v) for v in value.values()]
            elif missing:
                raise QuantizationError(
                    f"the calibration data lacks input {missing[0]!r}; it has {', '.join(map(str, value))}"
                )
            else:
                arrays = [np.asarray(value[i.name]) for i in self._inputs]
        elif isinstance(value, (tuple, list)):
            arrays = [np.asarray(v) for v in value]
        else:
            arrays = [np.asarray(value)]
        if len(arrays) != len(self._inputs):
            raise QuantizationError(
                f"a calibration sample has {len(arrays)} arrays; the network takes {len(self._inputs)}"
            )
        counts, columns = set(), []
        for node, a in zip(self._inputs, arrays, strict=True):
            if not np.can_cast(a.dtype, node.dtype.numpy, "same_kind") and not (
                a.dtype.kind in "iub" and node.dtype.is_float
            ):
                raise QuantizationError(f"calibration data for {node.name!r} is {a.dtype}, not {node.dtype.value}")
            shape = node.shape
            if a.shape == shape:
                a = a[None]
            elif shape and a.shape[1:] == shape[1:] and a.shape[0] % max(1, shape[0]) == 0:
                a = a.reshape(a.shape[0] // max(1, shape[0]), *shape)
            elif a.shape[1:] == shape:
                pass
            elif shape[:1] == (1,) and a.shape == shape[1:]:
                a = a.reshape(1, *shape)
            elif shape and a.shape[1:] == shape[1:]:
                a = a[: a.shape[0] // shape[0] * shape[0]].reshape(-1, *shape)
            else:
                raise QuantizationError(
                    f"calibration data for {node.name!r} is {list(a.shape)}; each sample must be {list(shape)}"
                )
            counts.add(len(a))
            columns.append((a, node))
        if len(counts) > 1:
            raise QuantizationError(f"the inputs have different numbers of calibration samples: {sorted(counts)}")
        return _Group(columns, counts.pop() if counts else 0)


class _Group:
    """Samples that lie in one array per input."""

    def __init__(self, columns: list[tuple[np.ndarray, Node]], count: int):
        self._columns, self._count = columns, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Sample:
        sample = tuple(np.ascontiguousarray(a[i], n.dtype.numpy) for a, n in self._columns)
        for (_, node), a in zip(self._columns, sample, strict=True):
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                raise QuantizationError(f"calibration sample {i} of {node.name!r} holds NaN or infinity")
        return sample


@dataclass(frozen=True)
class _Files:
    readers: list[Callable[[], Any]]


def _opened(path: str | Path) -> _Files:
    """The files that `path` names: an `.npy`, an `.npz` with or without `:KEY`, a folder of them."""
    text, key = str(path), None
    if not Path(text).exists() and ":" in text:
        text, _, key = text.rpartition(":")
    place = Path(text)
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix in (".npz", ".npy"))
        if not files:
            raise QuantizationError(f"{place} holds no .npz or .npy file to calibrate with")
        return _Files([functools.partial(_read, p, None) for p in files])
    if not place.is_file():
        raise QuantizationError(f"calibration data {place} does not exist")
    return _Files([lambda: _read(place, key)])


def unreadable(error: Exception) -> str:
    """Why numpy.load did not read a file; other kinds of files pass for pickled objects there."""
    return "it holds no arrays of numbers" if "pickle" in str(error) else str(error)


def _read(path: Path, key: str | None) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            if key is None:
                return {name: archive[name] for name in archive.files}
            if key not in archive.files:
                raise QuantizationError(f"{path} has no array {key!r}; it has {', '.join(archive.files)}")
            return archive[key]
    except QuantizationError:
        raise
    except Exception as e:  # noqa: BLE001 - numpy's readers raise whatever the damage leads to
        raise QuantizationError(f"{path} cannot be read as calibration data: {unreadable(e)}") from None
