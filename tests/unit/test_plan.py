"""Where blocks of the arena lie."""

from __future__ import annotations

import random

import pytest

from skive.plan import Block, aligned, place


def check(blocks: list[Block]) -> float:
    """How far the arena is above its lower bound, as a ratio, if no two live blocks overlap."""
    height, bound = place(blocks)
    filled = [b for b in blocks if b.bytes]
    for i, x in enumerate(filled):
        assert x.offset == aligned(x.offset) and 0 <= x.offset <= height - x.bytes
        for y in filled[:i]:
            if x.first <= y.last and y.first <= x.last:
                assert x.offset + x.bytes <= y.offset or y.offset + y.bytes <= x.offset, (x, y)
    return height / max(bound, 1)


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_live_together_do_not_overlap(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        blocks = []
        for _ in range(rng.randrange(1, 24)):
            first = rng.randrange(30)
            size = rng.choice([0, 1, 1, 64, 1000, 4096, rng.randrange(1, 5000)])
            blocks.append(Block(size, first, rng.randrange(first, 30)))
        assert check(blocks) < 1.3


@pytest.mark.parametrize("seed", range(5))
def test_many_small_blocks_around_large_ones(seed: int) -> None:
    """Flags of many decisions, all alive while states are computed: more than one block lies above the bound."""
    rng = random.Random(seed)
    steps = 100
    blocks = [Block(1, i, steps - i) for i in range(12)]
    blocks += [Block(rng.choice([256, 1024]), t, min(t + rng.randrange(1, 30), steps)) for t in range(12, steps - 12)]
    assert check(blocks) < 1.3
