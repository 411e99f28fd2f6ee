"""Loads compiled artefacts and calls them with NumPy arrays (written in C++: bindings/module.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, final

import numpy as np

Tensor = tuple[str, Sequence[int], str]  # name, shape, dtype ("f32" or "float32")

@final
class Artifact:
    """A loaded shared library, callable with one array per input.

    Inputs go positionally in the declared order, or by name. An input that is strided or misaligned is
    copied first; nothing is converted. The interpreter lock is released while the artefact runs, and
    calls from several threads run at once, each in an arena of its own. One output comes back as the
    array itself, several as a tuple.

    With `batch_max` > 0 a leading dimension of -1 is the batch, the same 1 to `batch_max` in every
    array of a call, and the library must have `NAME_run_batch`.

    `ways`, of a network with early exits: for each exit the numbers of its outputs; the last output then says in
    int32 which exit each sample took.

    `needs` names processor features (as `cpu_features()` spells them) without which the library is not
    even opened.

    Raises:
        TypeError: wrong number of arrays, not a NumPy array, or another dtype.
        ValueError: another shape or batch, or an output of `call_into` that cannot be written.
        TargetError: this processor cannot run the artefact (constructor).
        OSError: the library cannot be opened or lacks the run function (constructor).
        SkiveError: the artefact returned an error code; the text is that of `NAME_error`.
        MemoryError: no memory for the arena or an output.
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        arena_bytes: int,
        batch_max: int = 0,
        threads: int = 1,
        *,
        needs: Sequence[str] = (),
        ways: Sequence[Sequence[int]] = (),
    ) -> Artifact: ...
    def __call__(
        self, *inputs: np.ndarray[Any, Any], **named: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], ...]: ...
    def taken(
        self, last: np.ndarray[Any, Any], /, *inputs: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], ...]:
        """The outputs of the way that each sample took, in the order of the samples. The last input, which
        thresholds are, comes first, so that `functools.partial` can hold it."""

    def call_into(
        self, inputs: Sequence[np.ndarray[Any, Any]], outputs: Sequence[np.ndarray[Any, Any]], /
    ) -> None:
        """Runs the artefact and writes its results into `outputs`, which may not share memory."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> list[tuple[str, tuple[int, ...], str]]: ...
    @property
    def outputs(self) -> list[tuple[str, tuple[int, ...], str]]: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def batch_max(self) -> int: ...
    @property
    def threads(self) -> int: ...

def cpu_features() -> list[str]:
    """The instruction-set extensions of this processor, in the spelling of the compilers' -m flags."""
