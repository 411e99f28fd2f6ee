"""The rewrite engine: matching, fixpoints, user counts, and time linear in the graph."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from skive import ops
from skive.errors import InvalidModelError
from skive.ir import Graph, Node, constant
from skive.rewrite import Const, Declined, Match, Var, op, rewrite, rule, scalar
from skive.types import DType


def parameter(*shape: int) -> Node:
    return ops.make("input", shape=shape, dtype=DType.f32, label="x")


def graph(x: Node, *outputs: Node) -> Graph:
    return Graph("g", (x,), outputs, tuple(f"y{i}" for i in range(len(outputs))))


def number(value: float) -> Node:
    return constant(np.float32(value))


@rule(op("add", Var("x"), scalar(0)))
def drop_zero(m: Match) -> Node:
    return m["x"]


def test_either_order_of_a_commutative_operation() -> None:
    x = parameter(2)
    for y in (ops.make("add", x, number(0)), ops.make("add", number(0), x)):
        assert rewrite(graph(x, y), [drop_zero]).outputs == (x,)


def test_operand_order_counts_elsewhere() -> None:
    x = parameter(2)
    g = graph(x, ops.make("sub", number(0), x))
    assert rewrite(g, [rule(op("sub", Var("x"), scalar(0)), lambda m: m["x"])]) is g


def test_same_name_means_same_node() -> None:
    x = parameter(2)
    double = rule(op("add", Var("x"), Var("x")), lambda m: ops.make("mul", m["x"], number(2)))
    y = ops.make("neg", x)
    assert rewrite(graph(x, ops.make("add", x, y)), [double]).outputs[0].op == "add"
    assert rewrite(graph(x, ops.make("add", y, y)), [double]).outputs[0].op == "mul"


def test_backtracking_into_nested_operands() -> None:
    """The first operand order of the inner node fits by itself but not with the outer one."""
    x = parameter(2)
    a, b = ops.make("neg", x), ops.make("exp", x)
    found = rule(op("mul", op("add", Var("p"), Var("q")), op("tanh", Var("p"))), lambda m: m["q"])
    y = ops.make("mul", ops.make("add", a, b), ops.make("tanh", b))
    assert rewrite(graph(x, y), [found]).outputs == (a,)


def test_constants_by_predicate() -> None:
    x = parameter(3)
    small = rule(op("add", Var("x"), Const("c", lambda c: bool((c < 1).all()))), lambda m: m["x"])
    assert rewrite(graph(x, ops.make("add", x, constant(np.float32([0, 2, 0])))), [small]).outputs[0].op == "add"
    assert rewrite(graph(x, ops.make("add", x, constant(np.float32([0, 0.5, 0])))), [small]).outputs == (x,)


@pytest.mark.parametrize(("array", "fits"), [([2, 2], True), ([2, 3], False), ([], False), ([np.nan, np.nan], False)])
def test_scalar_needs_equal_elements(array: list[float], fits: bool) -> None:
    assert scalar(2).where is not None
    assert scalar(2).where(np.float32(array)) is fits


def test_exclusive_counts_users_and_outputs() -> None:
    x = parameter(2)
    inner = ops.make("neg", x)
    y = ops.make("relu", inner)
    once = rule(op("relu", op("neg", Var("x"), exclusive=True)), lambda m: ops.make("abs", m["x"]))
    assert rewrite(graph(x, y), [once]).outputs[0].op == "abs"
    assert rewrite(graph(x, y, inner), [once]).outputs[0].op == "relu"
    assert rewrite(graph(x, y, ops.make("exp", inner)), [once]).outputs[0].op == "relu"


def test_a_user_that_a_rewrite_removed_no_longer_counts() -> None:
    x = parameter(2)
    inner = ops.make("neg", x)
    dying = ops.make("mul", ops.make("exp", inner), number(0))
    y = ops.make("add", ops.make("relu", inner), dying)
    zero = rule(op("mul", Var("x"), scalar(0)), lambda m: constant(np.zeros(2, np.float32)))
    once = rule(op("relu", op("neg", Var("x"), exclusive=True)), lambda m: ops.make("abs", m["x"]))
    result = rewrite(graph(x, y), [zero, once, drop_zero])
    assert [n.op for n in result.nodes] == ["input", "abs"]


def test_a_shared_node_is_not_copied() -> None:
    x = parameter(2)
    shared = ops.make("exp", x)
    y = ops.make("add", shared, number(0))
    result = rewrite(graph(x, y, ops.make("neg", shared)), [drop_zero])
    assert [n.op for n in result.nodes].count("exp") == 1


def test_origin_and_name_survive() -> None:
    x = parameter(2)
    y = ops.make("add", x, x, origin="layer/add", label="sum")
    result = rewrite(graph(x, y), [rule(op("add"), lambda m: ops.make("mul", m.root.inputs[0], number(2)))])
    assert (result.outputs[0].op, result.outputs[0].origin, result.outputs[0].name) == ("mul", "layer/add", "sum")


def test_declined_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    x = parameter(2)
    g = graph(x, ops.make("neg", x, origin="layer/neg"))
    with caplog.at_level(logging.INFO, "skive.rewrite"):
        assert rewrite(g, [rule(op("neg"), lambda m: Declined("the weather"))]) is g
    assert "layer/neg" in caplog.text
    assert "the weather" in caplog.text


def test_a_rule_must_keep_the_type() -> None:
    x = parameter(2)
    wrong = rule(op("neg"), lambda m: ops.make("reshape", m.root.inputs[0], shape=(1, 2)))
    with pytest.raises(InvalidModelError, match=r"layer/neg.*f32\[2\] by f32\[1,2\]"):
        rewrite(graph(x, ops.make("neg", x, origin="layer/neg")), [wrong])


def test_rules_that_undo_each_other_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("skive"), "propagate", True)  # the command line switches it off
    caplog.set_level(logging.WARNING, "skive.rewrite")  # whatever another test did to the root logger
    x = parameter(2)
    there = rule(op("neg"), lambda m: ops.make("exp", m.root.inputs[0]))
    back = rule(op("exp"), lambda m: ops.make("neg", m.root.inputs[0]))
    rewrite(graph(x, ops.make("neg", x)), [there, back], sweeps=3)
    assert "stopped after 3 sweeps" in caplog.text


def test_a_chain_of_thousands_in_linear_time() -> None:
    def seconds(length: int) -> float:
        x = parameter(2)
        y = x
        for _ in range(length):
            y = ops.make("add", ops.make("neg", y), number(0))
        start = time.process_time()
        result = rewrite(graph(x, y), [drop_zero])
        assert len(result.nodes) == length + 1
        return time.process_time() - start

    short = min(seconds(500) for _ in range(3))
    # Ten times the nodes: quadratic time would take a hundred times as long.
    assert min(seconds(5000) for _ in range(3)) < 40 * short
