"""The arithmetic of permutations and reshapes behind `sink-transposes`, against numpy."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from skive.passes.sink_transposes import _merged_axes, _refinement, composed, inverse, is_free, through_reshape

SEEDS = st.integers(0, 2**32 - 1)


def sample(seed: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape of x, p, a shape of T_p(x) after a few merges and splits)."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 6))
    source = tuple(int(d) for d in rng.choice([1, 1, 2, 3, 4], rank))
    p = tuple(int(i) for i in rng.permutation(rank))
    shape = [source[i] for i in p]
    for _ in range(3):
        if rng.random() < 0.5 and len(shape) > 1:
            i = int(rng.integers(len(shape) - 1))
            shape[i:i + 2] = [shape[i] * shape[i + 1]]
        else:
            i = int(rng.integers(len(shape)))
            d = int(rng.choice([k for k in (1, 2, 3, 4) if shape[i] % k == 0]))
            shape[i:i + 1] = [shape[i] // d, d]
    return source, p, tuple(shape)


@settings(max_examples=500, deadline=None)
@given(seed=SEEDS)
def test_through_reshape(seed: int) -> None:
    source, p, shape = sample(seed)
    x = np.arange(math.prod(source)).reshape(source)
    found = through_reshape(source, p, shape)
    if found is not None:
        s, mid, r = found
        assert np.array_equal(x.transpose(s).reshape(mid).transpose(r), x.transpose(p).reshape(shape))


def test_through_reshape_finds_the_common_cases() -> None:
    nchw = (0, 3, 1, 2)
    assert through_reshape((2, 5, 7, 6), nchw, (2, 3, 2, 5, 7)) == ((0, 1, 2, 3), (2, 5, 7, 3, 2), (0, 3, 4, 1, 2))
    assert through_reshape((2, 5, 7, 6), nchw, (2, 6, 35)) == ((0, 1, 2, 3), (2, 35, 6), (0, 2, 1))
    assert through_reshape((2, 1, 1, 6), nchw, (2, 6)) == ((0, 1, 2, 3), (2, 6), (0, 1))
    assert through_reshape((2, 5, 3, 7), (0, 2, 1, 3), (2, 3, 35)) is None


@settings(max_examples=500, deadline=None)
@given(seed=SEEDS)
def test_merged_axes_cover_every_axis_once(seed: int) -> None:
    source, p, shape = sample(seed)
    fine = tuple(source[i] for i in p)
    found = _merged_axes(fine, shape)
    if found is not None:
        assert sum(found, []) == list(range(len(fine)))
        assert [math.prod(fine[a] for a in axes) for axes in found] == list(shape)


def test_merged_axes_of_group_normalization() -> None:
    assert _merged_axes((1, 2, 3, 5, 7), (1, 2, 105)) == [[0], [1], [2, 3, 4]]
    assert _merged_axes((2, 3, 1, 4), (6, 4)) == [[0, 1, 2], [3]]
    assert _merged_axes((6, 4), (4, 6)) is None


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_refinement_merges_to_both_shapes(seed: int) -> None:
    source, p, shape = sample(seed)
    before = tuple(source[i] for i in p)
    fine = _refinement(before, shape)
    if fine is not None:
        cuts = {math.prod(fine[:i]) for i in range(len(fine) + 1)}
        assert {math.prod(s[:i]) for s in (before, shape) for i in range(len(s) + 1)} == cuts


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_permutations(seed: int) -> None:
    source, p, _ = sample(seed)
    q = tuple(int(i) for i in np.random.default_rng(seed + 1).permutation(len(p)))
    x = np.arange(math.prod(source)).reshape(source)
    assert np.array_equal(x.transpose(p).transpose(q), x.transpose(composed(p, q)))
    assert composed(p, inverse(p)) == tuple(range(len(p)))
    assert is_free(source, p) == np.array_equal(x.transpose(p).reshape(-1), x.reshape(-1))
