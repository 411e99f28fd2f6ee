"""Pipelines: spec strings, records, checks and dumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from skive import ops, pipeline
from skive.errors import InvalidModelError, VerificationError
from skive.ir import Graph, Node, constant, rebuilt
from skive.passes import EXACT, fold_constants
from skive.pipeline import PASSES, PassManager, difference, parse_pipeline, pass_, table
from skive.types import DType


def small_graph() -> Graph:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    w = constant(np.arange(8, dtype=np.float32).reshape(2, 4))
    y = ops.make("linear", x, w, origin="fc")
    return Graph("g", (x,), (ops.make("mul", y, constant(np.float32([2, 4]))),), ("y",))


def scaled(graph: Graph, factor: float) -> Graph:
    """Every constant times `factor`: what a broken pass might do."""
    def one(n: Node, inputs: tuple[Node, ...]) -> Node:
        return constant(n.value * np.float32(factor)) if n.is_const else rebuilt(n, inputs)

    return graph.map_nodes(one)


@dataclass(frozen=True, slots=True)
class Scale:
    factor: float = 1.0
    count: int = 1
    really: bool = False
    mode: str = "plain"


@pytest.fixture(autouse=True)
def test_passes() -> Iterator[None]:
    before = dict(PASSES)

    @pass_("test-scale", exact=True, options=Scale)
    def scale(graph: Graph, options: Scale) -> Graph:
        """Constants times a factor."""
        return scaled(graph, options.factor)

    @pass_("test-lossy", exact=False)
    def lossy(graph: Graph, options: object) -> Graph:
        """Constants halved, and says so."""
        return scaled(graph, 0.5)

    yield
    PASSES.clear()
    PASSES.update(before)


def test_spec_strings() -> None:
    options = "factor=0.5 count=3,really=true mode=x"
    a, b, c = parse_pipeline(f" fold-constants{{max_bytes=64}}, eliminate-dead,test-scale{{{options}}}")
    assert (a.pass_.name, a.options.max_bytes) == ("fold-constants", 64)
    assert b.pass_.name == "eliminate-dead"
    assert c.options == Scale(0.5, 3, True, "x")
    assert str(c) == "test-scale{factor=0.5 count=3 really=True mode=x}"
    assert parse_pipeline("") == ()


@pytest.mark.parametrize(("spec", "message"), [
    ("fold-constant", "did you mean 'fold-constants'"),
    ("colour", "there are .*eliminate-dead"),
    ("fold-constants{max_bytes=many}", "needs a int, not 'many'"),
    ("fold-constants{colour=1}", "unknown option 'colour=1'"),
    ("fold-constants{max_bytes}", "unknown option"),
    ("fold-constants{max_bytes=1", "cannot read"),
    ("fold-constants;eliminate-dead", "cannot read"),
    ("fold-constants,", "ends with a comma"),
    ("test-scale{really=perhaps}", "needs a bool"),
])
def test_malformed_specs(spec: str, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        parse_pipeline(spec)


def test_records_hold_what_the_report_shows() -> None:
    _, (record,) = PassManager().run(small_graph(), "fold-batchnorm", check="always")
    assert set(record.to_json()) >= {"name", "ms", "nodes", "macs", "weight_bytes", "exact"}
    assert (record.name, record.nodes, record.macs, record.weight_bytes) == ("fold-batchnorm", 1, 8, 32)
    assert record.exact and record.checked
    assert "fold-batchnorm" in table([record])


def test_an_exact_pass_that_is_not_is_found() -> None:
    with pytest.raises(VerificationError, match="pass test-scale changed output 'y'"):
        PassManager().run(small_graph(), "test-scale{factor=1.001}", check="always")
    PassManager().run(small_graph(), "test-scale{factor=1.001}", check="never")


def test_a_lossy_pass_is_not_held_to_it() -> None:
    _, (record,) = PassManager().run(small_graph(), "test-lossy", check="always")
    assert not record.exact and not record.checked


def test_auto_checks_small_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerificationError):
        PassManager().run(small_graph(), "test-scale{factor=2}")
    monkeypatch.setattr(pipeline, "AUTO_CHECK_MACS", 1)
    PassManager().run(small_graph(), "test-scale{factor=2}")


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    @pass_("test-break", exact=True)
    def broken(graph: Graph, options: object) -> Graph:
        """Outputs without names."""
        return Graph(graph.name, graph.inputs, graph.outputs, ())

    with pytest.raises(InvalidModelError, match="after test-break"):
        PassManager().run(small_graph(), "test-break")


def test_passes_are_functions_too() -> None:
    graph = small_graph()
    assert fold_constants(graph) is graph
    with pytest.raises(TypeError):
        fold_constants(graph, colour=1)


def test_dump(tmp_path: Path) -> None:
    PassManager().run(small_graph(), ["fold-constants", "fold-batchnorm"], dump_dir=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "00-input.txt", "01-fold-constants.txt", "01-fold-constants.diff", "02-fold-batchnorm.txt",
        "02-fold-batchnorm.diff", "passes.txt"}
    assert (tmp_path / "01-fold-constants.diff").read_text() == ""
    diff = (tmp_path / "02-fold-batchnorm.diff").read_text()
    assert any(line.startswith("-") and " mul " in line for line in diff.splitlines())
    assert len((tmp_path / "passes.txt").read_text().splitlines()) == 3


def test_every_exact_pass_says_what_it_guarantees() -> None:
    for step in parse_pipeline(",".join(EXACT)):
        # Of quantized values a sum or product of integers may round the other way than one in float32,
        # and a function in front of a quantizer is a polynomial.
        assert step.pass_.exact or step.pass_.name in ("integer-arithmetic", "join-factors", "fit-functions")
        assert len(step.pass_.doc) > 20


@pytest.mark.parametrize(("got", "want", "expected"), [
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([1.0, 2.5], [1.0, 2.0], 0.25),
    ([np.nan, np.inf], [np.nan, np.inf], 0.0),
    ([np.nan], [1.0], np.inf),
    ([np.inf], [-np.inf], np.inf),
    ([], [], 0.0),
])
def test_difference(got: list[float], want: list[float], expected: float) -> None:
    assert difference(np.float32(got), np.float32(want)) == pytest.approx(expected)


def test_integers_must_be_equal() -> None:
    assert difference(np.int32([1]), np.int32([1])) == 0
    assert difference(np.int32([1]), np.int32([2])) == np.inf
    assert difference(np.int32([1]), np.int64([1])) == np.inf
