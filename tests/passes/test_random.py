"""Random graphs keep their meaning through every pass, and through the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skive.ir import Graph
from skive.passes import CANONICAL, EXACT, canonical, optimize
from skive.passes.sink_transposes import moved_bytes, sink_transposes
from skive.pipeline import PASSES, PassManager, parse_pipeline
from skive.text import constants_of, parse_graph, print_graph
from skive.verify import verify

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_pipeline_keeps_the_meaning(random_graph: Callable[..., Graph], seed: int) -> None:
    graph = random_graph(seed, 24)
    _, records = optimize(graph, check="always")  # raises VerificationError on a difference
    assert [r.name for r in records] == [step.pass_.name for step in parse_pipeline(",".join(EXACT))]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_transposes_never_move_more_bytes(random_graph: Callable[..., Graph], seed: int) -> None:
    graph = random_graph(seed, 24)
    assert moved_bytes(sink_transposes(graph)) <= moved_bytes(graph)


@pytest.mark.parametrize("name", sorted(p for p in PASSES if PASSES[p].exact))
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
@example(seed=138814)  # three linear layers in a row: equalising takes two rounds
@example(seed=106899)  # a layer whose weights are all zero
@example(seed=489411)  # a constant that an epilogue can only read as the one value it holds
def test_one_pass_keeps_the_meaning_and_is_idempotent(random_graph: Callable[..., Graph], name: str, seed: int) -> None:
    once, _ = PassManager().run(random_graph(seed), [name], check="always")
    twice, _ = PassManager().run(once, [name], check="never")
    assert print_graph(twice) == print_graph(once)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_text_round_trip(random_graph: Callable[..., Graph], seed: int) -> None:
    for graph in (random_graph(seed), optimize(random_graph(seed), check="never")[0]):
        text = print_graph(graph)
        again = parse_graph(text, constants_of(graph))
        verify(again, after="parse")
        assert print_graph(again) == text


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_canonical_holds_no_fused_expression(random_graph: Callable[..., Graph], seed: int) -> None:
    after, records = canonical(random_graph(seed), check="never")
    verify(after, after=CANONICAL[-1], phase="imported")
    assert len(records) == len(CANONICAL)
