"""How tensors are walked, and how that is spelled in C++."""

from __future__ import annotations

from collections.abc import Sequence


def collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Neighbouring axes merged where every operand walks them as one."""
    dims: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for axis, d in enumerate(shape):
        if d == 1:
            continue
        if dims and all(w[-1] == s[axis] * d for w, s in zip(walks, strides, strict=True)):
            dims[-1] *= d
            for w, s in zip(walks, strides, strict=True):
                w[-1] = s[axis]
        else:
            dims.append(d)
            for w, s in zip(walks, strides, strict=True):
                w.append(s[axis])
    if not dims:
        dims, walks = [1], [[1] for _ in strides]
    return tuple(dims), [tuple(w) for w in walks]


def row_strides(shape: Sequence[int]) -> list[int]:
    """Strides in elements of a dense row-major tensor."""
    out, step = [], 1
    for d in reversed(shape):
        out.append(step)
        step *= d
    return out[::-1]


def broadcast_strides(
    shape: Sequence[int], to: Sequence[int], strides: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Strides in elements that walk a tensor of `shape` (and `strides`, or dense) over the broadcast shape `to`."""
    strides = row_strides(shape) if strides is None else strides
    walk = (0 if d == 1 else s for d, s in zip(shape, strides, strict=True))
    return (0,) * (len(to) - len(shape)) + tuple(walk)


def boolean(value: bool) -> str:
    return "true" if value else "false"


def tag(name: str, numbers: Sequence[object]) -> str:
    """`Shape<1, 2>` and its like."""
    return f"{name}<{', '.join(map(str, numbers))}>"


def image(shape: Sequence[int]) -> str:
    return f"Image<{', '.join(map(str, shape))}>"
