"""The errors a user meets. Each message names the node, says what is wrong and what to do."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line of at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class SkiveError(Exception):
    """Base of every error skive raises on purpose: the input or the request is at fault."""


class InvalidModelError(SkiveError):
    """The model file or object is damaged, unsafe or not a model."""


class UnsupportedOpError(SkiveError):
    """The model is valid but uses something skive does not compile.

    `problems` lists every such place as (node, reason, hint): a model is checked to its end
    before the error is raised, so one run shows everything that is missing. `fixable` names the
    graph inputs that would have to be known when the model is compiled.
    """

    def __init__(self, problems: list[tuple[str, str, str]], fixable: tuple[str, ...] = ()):
        self.problems = problems
        self.fixable = fixable
        lines = [f"{node}: {reason}" + (f"; {hint}" if hint else "") for node, reason, hint in problems]
        super().__init__("\n  ".join(lines) if len(lines) == 1 else
                         f"{len(lines)} places are not supported:\n  " + "\n  ".join(lines))


class ShapeError(SkiveError):
    """A shape is negative, too large, unknown or does not fit its neighbours."""


class QuantizationError(SkiveError):
    """The requested fixed-point conversion is not possible."""


class PruningError(SkiveError):
    """The requested pruning is not possible."""


class ExitError(SkiveError):
    """The requested early exit is not possible."""


class VerificationError(SkiveError):
    """The compiled artefact does not compute what the model says."""


class ToolchainError(SkiveError):
    """No C++ compiler was found, or it failed."""


class TargetError(SkiveError):
    """The target is unknown, or this processor cannot run the artefact."""
