"""`skive.Prune`: what is asked for when channels are removed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skive.errors import PruningError
from skive.ir import FrozenDict
from skive.pruning.scores import Importance
from skive.samples import fingerprint

CRITERIA = ("l1", "l2", "activation", "obspa", "random")
SCOPES = ("global", "layer", "measured")
MEASURES = ("macs", "parameters", "bytes", "latency")
DATA_DRIVEN = frozenset({"activation", "obspa"})


@dataclass(frozen=True)
class Prune:
    """What to remove. Checked when it is made: PruningError says which value cannot be.

    `macs`, `parameters`, `bytes` or `latency`: the fraction of multiply-accumulates, of weights, of their bytes, or
    of the time of one run on this processor to remove (by the table of measured kernels, in the type that the
    network is quantized to); the nearest
    possible amount that is not less. `criterion`: "l1", "l2" (the size of a group's weights, each weight tensor
    counted alike), "activation" (weights times the size of what they multiply: Sun et al., A Simple and
    Effective Pruning Approach for Large Language Models, 2023), "obspa" (what the outputs of the reading
    layers lose if their other weights make up for it: Wang et al., Structurally Prune Anything, 2024),
    "random" (the baseline, by `seed`), or what `skive.torch.importance` measured on the same model. `refit`: the
    layers that read what is left are fitted to what they gave before. `scope`: "global" compares all layers,
    "layer" takes the same fraction of each, "measured" from each what the outputs do without best, which takes longer
    and loses less (Li et al., Pruning Filters for Efficient ConvNets, 2017). `multiple`: channels of a layer are kept
    in multiples of this, as vectors like them; None: of 16 where a layer has 128 or more, of 8 from 24 on, of 4 or
    less below. `keep`: patterns of layer names
    that keep all their channels. `zeros`: before that, channels that are zero already (masks and zero groups of
    other tools) go, exactly. `widths`: instead of a fraction, how many channels stay, by the layer
    that makes them, as `skive.torch.search_widths` finds them; what is not named stays whole. `erase`: before all, so
    many residual branches go whole, those that change their input least. `calibration`: as for `skive.Quantize`;
    without it, noise stands in.
    """

    macs: float | None = None
    parameters: float | None = None
    bytes: float | None = None
    latency: float | None = None
    criterion: str | Importance = "activation"
    refit: bool = True
    scope: str = "global"
    multiple: int | None = None
    keep: tuple[str, ...] = ()
    zeros: bool = False
    erase: int = 0
    widths: Mapping[str, int] = field(default_factory=FrozenDict, hash=False)
    calibration: Any = field(default=None, compare=False, repr=False)
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        given = [m for m in MEASURES if getattr(self, m) is not None]
        if len(given) + bool(self.widths) > 1 or not (given or self.zeros or self.erase or self.widths):
            raise PruningError(f"give one of {', '.join(MEASURES)}: the fraction to remove; or widths, zeros, or erase")
        for name, width in self.widths.items():
            if not isinstance(width, (int, np.integer)) or width < 1:
                raise PruningError(f"the width of {name} is {width!r}, not a number of channels")
        object.__setattr__(self, "widths", FrozenDict({name: int(width) for name, width in self.widths.items()}))
        if not 0 <= self.fraction < 1:
            raise PruningError(f"{self.measure} is {getattr(self, self.measure)!r}, not a fraction from 0 to below 1")
        if not isinstance(self.criterion, Importance) and self.criterion not in CRITERIA:
            raise PruningError(f"criterion is {self.criterion!r}; it can be {', '.join(CRITERIA)}, or the result of "
                               "skive.torch.importance")
        if self.scope not in SCOPES:
            raise PruningError(f"scope is {self.scope!r}; it can be {', '.join(SCOPES)}")
        if self.multiple is not None and self.multiple < 1:
            raise PruningError(f"multiple is {self.multiple!r}, not a positive number")
        if not isinstance(self.erase, int) or self.erase < 0:
            raise PruningError(f"erase is {self.erase!r}, not a number of residual branches")
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", (self.keep,))
        object.__setattr__(self, "keep", tuple(self.keep))

    def options(self) -> dict[str, Any]:
        """All but the data, as plain values."""
        values = {k: v for k, v in self.__dict__.items() if k != "calibration"} | {"widths": dict(self.widths)}
        if isinstance(self.criterion, Importance):
            h = hashlib.sha256()
            for key, value in sorted(self.criterion.values.items()):
                h.update(key.encode() + np.ascontiguousarray(value).tobytes())
            values["criterion"] = f"{self.criterion.kind} {h.hexdigest()}"
        return values

    def fingerprint(self) -> str | None:
        """Equal for equal options and data; None for data that can be read only once or cannot be hashed."""
        return fingerprint(self.options(), self.calibration)

    @property
    def criterion_name(self) -> str:
        return self.criterion.kind if isinstance(self.criterion, Importance) else self.criterion

    @property
    def measure(self) -> str:
        return next((m for m in MEASURES if getattr(self, m) is not None), "macs")

    @property
    def fraction(self) -> float:
        """What is to go of `measure`; 0 where only zeros or branches are to go."""
        value = getattr(self, self.measure)
        return 0.0 if value is None else value if isinstance(value, (int, float)) else math.nan


def requested(value: Prune | float | str) -> Prune:
    """`value` as a Prune: a number is the fraction of multiply-accumulates to remove; text is what the command line
    takes: `0.4`, `latency=0.5`, `zeros`, `erase=2`, several with commas between."""
    if isinstance(value, Prune):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Prune(macs=float(value))
    if isinstance(value, str):
        return Prune(**spelled(value))
    raise PruningError(f"prune is {value!r}; give the fraction of multiply-accumulates or a skive.Prune")


def spelled(text: str) -> Mapping[str, Any]:
    """The options of Prune that `text` names."""
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, number = (p.strip() for p in part.partition("="))
        if not equals and name != "zeros":
            name, number = "macs", name
        if name not in (*MEASURES, "zeros", "erase") or name in options:
            raise PruningError(f"{part.strip()!r} is nothing to remove; give FRACTION, MEASURE=FRACTION with one of "
                               f"{', '.join(MEASURES)}, zeros, or erase=N")
        try:
            options[name] = True if name == "zeros" else int(number) if name == "erase" else float(number)
        except ValueError:
            raise PruningError(f"{part.strip()!r}: {number!r} is not a number; 0.4 removes 40 % of the "
                               "multiply-accumulates") from None
    return options
