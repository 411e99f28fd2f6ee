"""Rules: operations that only move elements, and look-ups by index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skive.ir import Node
from skive.passes.channel_groups.labels import Analysis, Axes, Labels, rule


@rule("transpose")
def _transpose(at: Analysis, node: Node) -> Axes:
    return tuple(at(node.inputs[0])[p] for p in node.attrs["perm"])


@rule("slice")
def _slice(at: Analysis, node: Node) -> Axes:
    x = node.inputs[0]
    axes = []
    windows = zip(*(node.attrs[k] for k in ("start", "size", "step")), strict=True)
    for a, d, (start, size, step) in zip(at(x), x.shape, windows, strict=True):
        if abs(step) != 1 and size > 1:
            at.joins.keep(a, f"every {abs(step)}th index is taken ({node.label()})")
        taken = np.arange(size) * step + start
        axes.append(a if size == d and step == 1 else a[taken])
    return tuple(axes)


@rule("concat")
def _concat(at: Analysis, node: Node) -> Axes:
    along = node.attrs["axis"] % node.type.rank
    parts = [at(i) for i in node.inputs]
    axes = []
    for axis in range(node.type.rank):
        if axis == along:
            axes.append(np.concatenate([p[axis] for p in parts]))
            continue
        for p in parts[1:]:
            at.joins.join(parts[0][axis], p[axis])
        axes.append(parts[0][axis])
    return tuple(axes)


@rule("pad")
def _pad(at: Analysis, node: Node) -> Axes:
    axes = []
    for a, before, after in zip(at(node.inputs[0]), node.attrs["before"], node.attrs["after"], strict=True):
        if not before and not after:
            axes.append(a)
        elif node.attrs["mode"] == "constant" and before >= 0 and after >= 0:
            axes.append(np.concatenate([at.joins.fresh(before), a, at.joins.fresh(after)]))
        else:
            at.joins.keep(a, f"the border is made of its elements ({node.label()})")
            axes.append(at.joins.kept(len(a) + before + after, f"padded ({node.label()})"))
    return tuple(axes)


@rule("expand")
def _expand(at: Analysis, node: Node) -> Axes:
    x = at(node.inputs[0])
    missing = node.type.rank - len(x)
    return tuple(
        x[i - missing] if i >= missing and len(x[i - missing]) == d else at.joins.fresh(d)
        for i, d in enumerate(node.shape)
    )


def factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape in the smallest groups of equal product, those of size 1 apart."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        a: list[int] = []
        b: list[int] = []
        p = q = 1
        while p != q or not (a or b):
            if i < len(before) and (p < q or (p == q and before[i] == 1) or j >= len(after) or (p == q and not a)):
                p *= before[i]
                a.append(i)
                i += 1
            elif j < len(after):
                q *= after[j]
                b.append(j)
                j += 1
            else:
                break
            if p == q:
                break
        result.append((a, b))
    return result


@rule("reshape")
def _reshape(at: Analysis, node: Node) -> Axes:
    x, before, after = at(node.inputs[0]), node.inputs[0].shape, node.shape
    axes: list[Labels] = [np.empty(0, np.int64)] * len(after)
    for sources, results in factors(before, after):
        wide_in = [i for i in sources if before[i] != 1]
        wide_out = [j for j in results if after[j] != 1]
        for j in results:
            if after[j] == 1:
                axes[j] = at.joins.fresh(1)
        if len(wide_in) == len(wide_out) == 1:
            axes[wide_out[0]] = x[wide_in[0]]
        elif len(wide_in) == 1:
            sizes = [after[j] for j in wide_out]
            carry = 0 if node in at.outer else len(sizes) - 1
            where = np.unravel_index(np.arange(math.prod(sizes)), sizes)[carry]
            for n, j in enumerate(wide_out):
                axes[j] = at.joins.fresh(sizes[n]) if n == carry else at.joins.kept(
                    sizes[n], f"one part of an axis that is split ({node.label()})")
            at.joins.join(x[wide_in[0]], axes[wide_out[carry]][where])
        elif len(wide_out) == 1:
            sizes = [before[i] for i in wide_in]
            carry = _carrier(at, [x[i] for i in wide_in])
            for n, i in enumerate(wide_in):
                if n != carry:
                    at.joins.keep(x[i], f"merged with another axis ({node.label()})")
            where = np.unravel_index(np.arange(math.prod(sizes)), sizes)[carry]
            axes[wide_out[0]] = x[wide_in[carry]][where]
        else:
            for i in wide_in:
                at.joins.keep(x[i], f"reshaped together with other axes ({node.label()})")
            for j in wide_out:
                axes[j] = at.joins.kept(after[j], f"reshaped together with other axes ({node.label()})")
    return tuple(axes)


def _carrier(at: Analysis, axes: Sequence[Labels]) -> int:
    """Which of several axes that become one stays removable: the last one that is so far."""
    kept = {at.joins.find(x) for x in at.joins.reasons}
    free = [n for n, a in enumerate(axes) if not any(at.joins.find(x) in kept for x in a.tolist())]
    return free[-1] if free else len(axes) - 1


@rule("gather")
def _gather(at: Analysis, node: Node) -> Axes:
    data, index = node.inputs
    axis = node.attrs["axis"] % data.type.rank
    x = at(data)
    if index.is_const and index.type.rank == 1:
        return (*x[:axis], x[axis][index.value], *x[axis + 1 :])
    at.joins.keep(x[axis], f"the index is computed at run time ({node.label()})")
    return (*x[:axis], *at(index), *x[axis + 1 :])
