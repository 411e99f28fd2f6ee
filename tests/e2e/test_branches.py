"""Branches on the values of tensors: only the side that is taken runs, and gives what the reference gives."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import skive
from skive import ops
from skive.emit import cxx
from skive.errors import UnsupportedOpError
from skive.ir import Graph, Node, constant
from skive.lower import lower
from skive.lower.branches import guards_of
from skive.passes import optimize
from skive.reference import evaluate_graph
from skive.targets.base import TARGETS
from skive.types import DType


def nested() -> Graph:
    """One choice inside a side of another; values that both sides share, or that are used outside as well."""
    rng = np.random.default_rng(0)

    def dense(x: Node, label: str) -> Node:
        w = constant((rng.standard_normal((8, 8)) / 3).astype(np.float32))
        return ops.make("linear", x, w, constant(rng.standard_normal(8).astype(np.float32)), origin=label)

    def above(x: Node, value: float) -> Node:
        mean = ops.make("reduce_mean", x, axes=(0, 1), keep=False)
        return ops.make("greater", mean, constant(np.asarray(value, np.float32)))

    x = ops.make("input", shape=(1, 8), dtype=DType.f32, label="x")
    shared = dense(x, "shared")  # of both sides: always
    outside = dense(shared, "outside")  # of one side, and an output: always
    then = ops.make("tanh", dense(outside, "then"))
    often = above(then, 0.55)  # about its mean
    inner = ops.make("choose", often, ops.make("exp", dense(then, "inner-then")), dense(then, "inner-else"),
                     origin="inner")
    other = ops.make("add", dense(shared, "else"), shared)
    outer = ops.make("choose", above(x, 0.1), inner, other, origin="outer")
    return Graph("nested", (x,), (ops.make("mul", outer, constant(np.float32(2))), outside), ("y", "z"))


def test_what_one_side_alone_needs_is_guarded() -> None:
    graph = nested()
    guards = guards_of(graph)
    depth = {n.origin: len(guards[n]) for n in graph.nodes if n.origin}
    assert depth == {"shared": 0, "outside": 0, "then": 1, "inner-then": 2, "inner-else": 2, "inner": 1, "else": 1,
                     "outer": 0}
    side = {n.origin: [holds for _, holds in guards[n]] for n in graph.nodes}
    assert side["inner-then"] == [True, True] and side["inner-else"] == [True, False] and side["else"] == [False]


def test_the_report_counts_the_work_of_each_way() -> None:
    compiled = skive.compile(nested()).report["compiled"]
    # shared, outside: always; then and one inner side, or else: 8 x 8 multiply-adds each
    assert (compiled["macs_least"], compiled["macs_most"]) == (3 * 64, 4 * 64)
    assert compiled["macs"] == 6 * 64


def test_exits_count_the_work_of_each_way() -> None:
    graph = nested()
    late = ops.make("linear", graph.outputs[0], constant(np.ones((8, 8), np.float32)))
    graph = Graph("ways", graph.inputs, (graph.outputs[0], late), ("early", "late"))
    rows = skive.compile(graph, exits=["early:max-prob=0.5"]).report["exits"]
    # shared: always; one layer for `outside` and `then` and an inner side, or else
    assert [(r["macs_least"], r["macs"]) for r in rows] == [(2 * 64, 3 * 64), (3 * 64, 4 * 64)]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_path_equals_the_reference(threads: int) -> None:
    from skive.reference import evaluate_graph

    graph = nested()
    module = skive.compile(graph, threads=threads)
    rng = np.random.default_rng(1)
    paths = set()
    for _ in range(60):
        x = rng.standard_normal((1, 8)).astype(np.float32)
        conditions = []

        def observe(node: Node, value: np.ndarray, conditions: list[bool] = conditions) -> None:
            if node.op == "greater":
                conditions.append(bool(value))

        want = evaluate_graph(graph, [x], observe=observe)
        paths.add(tuple(conditions))
        for a, b in zip(module(x), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert paths >= {(False, False), (True, False), (True, True)}  # the outer condition comes first


def test_the_other_side_does_not_run() -> None:
    """The memory of a side that is not taken is not written."""
    module = skive.compile(nested(), verify=False)
    text = (module.folder / "nested.cpp").read_text()
    body = text[text.index("static void run("):]
    body = body[:body.index("\n}")]
    calls = [line for line in body.splitlines() if line.startswith("  layer")]
    guarded = [line for line in body.splitlines() if line.startswith("    layer")]
    assert any("shared" in line for line in calls) and any("outside" in line for line in calls)
    assert all(any(name in line for line in guarded) for name in ("inner_then", "inner_else", "then", "else"))
    library = ctypes.CDLL(str(module.folder / "libnested.so"))
    size = module.manifest["arena_bytes"]
    raw = np.zeros(size + 64, np.uint8)
    arena = raw[-raw.ctypes.data % 64:][:size]
    written = []
    for sign in (1, -1):
        x = np.full((1, 8), sign, np.float32)
        outputs = [np.zeros((1, 8), np.float32) for _ in range(2)]
        arena[:] = 0xA5
        pointers = (ctypes.c_void_p * 1)(x.ctypes.data), (ctypes.c_void_p * 2)(*(o.ctypes.data for o in outputs))
        assert library.nested_run(*pointers, ctypes.c_void_p(arena.ctypes.data)) == 0
        written.append(int((arena != 0xA5).sum()))
    assert written[0] != written[1]


def test_a_side_is_computed_where_the_result_lies() -> None:
    plan = lower(nested(), TARGETS["generic"])
    copies = [c for c in plan.calls if c.op == "choose"]
    assert [c.origin for c in copies] == ["inner", "outer"]  # one side of each


def test_a_flag_that_a_flag_chooses() -> None:
    """The result is as large as its condition, which both copies read."""
    x = ops.make("input", shape=(), dtype=DType.f32, label="x")
    above = [ops.make("greater", x, constant(np.float32(v))) for v in (0, 1, 2)]
    chosen = ops.make("choose", above[0], above[1], ops.make("not", above[2]))
    graph = Graph("flags", (x,), (ops.make("not", chosen),), ("y",))
    module = skive.compile(graph, verify=False, target="generic")
    for value in (-2.0, -0.5, 0.5, 2.0):
        (want,) = evaluate_graph(graph, [np.float32(value)])
        np.testing.assert_array_equal(module(np.float32(value)), want, err_msg=str(value))


def if_model() -> onnx.ModelProto:
    """An ONNX If: a product or a sum, with two results."""
    w = np.random.default_rng(3).standard_normal((4, 4)).astype(np.float32)

    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [helper.make_node(op, ["x", "w"], [f"{name}_a"], name=f"{name}/{op}"),
                 helper.make_node("Neg", [f"{name}_a"], [f"{name}_b"])]
        outs = [helper.make_tensor_value_info(f"{name}_{k}", TensorProto.FLOAT, [4, 4]) for k in "ab"]
        return helper.make_graph(nodes, name, [], outs)

    nodes = [helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
             helper.make_node("Greater", ["s", "zero"], ["c"]),
             helper.make_node("If", ["c"], ["a", "b"], name="gate", then_branch=branch("yes", "MatMul"),
                              else_branch=branch("no", "Add"))]
    graph = helper.make_graph(
        nodes, "gated", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in "ab"],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32(0), "zero")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_onnx_if_with_two_results() -> None:
    module = skive.compile(if_model())
    w = numpy_helper.to_array(if_model().graph.initializer[0])
    for seed in range(6):
        x = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
        a, b = module(x)
        np.testing.assert_allclose(a, x @ w if x.sum() > 0 else x + w, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(b, -a)


def loop_model(trips: int | None) -> onnx.ModelProto:
    """x = 1.5 x + 1 while its sum stays below 50, at most `trips` times; how often is the second result."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Mul", ["v", "half"], ["m"], name="step"), helper.make_node("Add", ["m", "one"], ["w"]),
         helper.make_node("Add", ["n", "one"], ["k"]),
         helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0), helper.make_node("Less", ["s", "limit"], ["more"])],
        "body", [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []),
                 value("v", TensorProto.FLOAT, [4]), value("n", TensorProto.FLOAT, [])],
        [value("more", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, [4]), value("k", TensorProto.FLOAT, [])])
    nodes = [helper.make_node("ReduceSum", ["x"], ["s0"], keepdims=0),
             helper.make_node("Less", ["s0", "limit"], ["c"]),
             helper.make_node("Loop", ["trips" if trips is not None else "", "c", "x", "zero"], ["y", "n"],
                              name="again", body=body)]
    constants = {"half": np.float32(1.5), "one": np.float32(1), "limit": np.float32(50), "zero": np.float32(0)}
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    if trips is not None:
        stored.append(numpy_helper.from_array(np.int64(trips), "trips"))
    graph = helper.make_graph(nodes, "looping", [value("x", TensorProto.FLOAT, [4])],
                              [value("y", TensorProto.FLOAT, [4]), value("n", TensorProto.FLOAT, [])], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_loop_ends_when_its_values_say_so() -> None:
    module = skive.compile(loop_model(6))
    counts = set()
    for start in (60.0, 11.0, 8.0, 5.0, 2.0, 0.5, -1.0, -30.0):
        x = np.full(4, start, np.float32)
        y, n = module(x)
        want, steps = x, 0
        while steps < 6 and want.sum() < 50:
            want, steps = want * np.float32(1.5) + np.float32(1), steps + 1
        np.testing.assert_allclose(y, want, rtol=1e-6)
        assert n == steps
        counts.add(steps)
    assert {0, 1, 6} <= counts and len(counts) >= 5


def test_the_trips_of_a_long_loop_share_their_code() -> None:
    rate = np.float32(1.01)
    model = loop_model(64)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.asarray(rate), "half"))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.asarray(np.float32(0.125)), "one"))
    module = skive.compile(model, target="generic", threads=2)
    text = (module.folder / "looping.cpp").read_text()
    assert text.count("for (int trip = 0; trip < 6") == 1 and text.count("static void layer") < 40
    assert module.report["compiled"]["arena_bytes"] < 4096
    counts = set()
    for start in (60.0, 12.4, 12.0, 9.0, 4.0, 1.0, -1.0, -30.0):
        y, n = module(np.full(4, start, np.float32))
        want, steps = np.full(4, start, np.float32), 0
        while steps < 64 and want.sum() < 50:
            want, steps = want * rate + np.float32(0.125), steps + 1
        np.testing.assert_array_equal(y, want)
        assert n == steps * np.float32(0.125)
        counts.add(steps)
    assert {0, 1, 64} <= counts and len(counts) > 4


def exits_around_a_loop(bound: int) -> Graph:
    """An exit, a loop that its values end, an exit on what it left, and one layer more; the trips are a result."""
    rng = np.random.default_rng(7)
    weights = [constant((rng.standard_normal((8, 8)) / 3).astype(np.float32)) for _ in range(4)]
    x = ops.make("input", shape=(1, 8), dtype=DType.f32, label="x")
    first = ops.make("linear", x, weights[0])
    states, flags = [x], []
    for _ in range(bound):
        mean = ops.make("reduce_mean", states[-1], axes=(0, 1), keep=False)
        flags.append(ops.make("greater", mean, constant(np.float32(0.5))))
        new = ops.make("tanh", ops.make("linear", states[-1], weights[1]))
        new = ops.make("add", ops.make("mul", new, constant(np.float32(0.0625))), constant(np.float32(0.0625)))
        states.append(ops.make("add", states[-1], new))
    h, count = states[-1], constant(np.full((1, 8), bound, np.float32))
    for i in reversed(range(bound)):
        h = ops.make("choose", flags[i], states[i], h)
        count = ops.make("choose", flags[i], constant(np.full((1, 8), i, np.float32)), count)
    last = ops.make("add", ops.make("linear", ops.make("linear", h, weights[2]), weights[3]), count)
    return Graph("around", (x,), (first, ops.make("linear", h, weights[2]), last), ("a", "b", "y"), batch_max=8)


def test_exits_around_a_loop() -> None:
    """Compiling checks every way out; here are batches, and the work of each way."""
    graph = exits_around_a_loop(20)
    x = np.random.default_rng(3).uniform(-2, 0.6, (40, 8)).astype(np.float32)
    x[:8] += 2
    module = skive.compile(graph, exits=["a:max-prob=0.5", "b:max-prob=0.4"], target="generic")
    assert (module.folder / "around.cpp").read_text().count("for (int trip") == 2  # with exits and without
    rows = module.report["exits"]
    assert rows[1]["macs"] == (2 + 20) * 64 and rows[1]["macs_least"] == 2 * 64
    taken, steps = set(), set()
    for i in range(0, 40, 8):
        result = module.run(x[i : i + 8])
        for j in range(8):
            one = module.run(x[i + j : i + j + 1])
            assert one.exit[0] == result.exit[j] and one.macs[0] == result.macs[j]
            np.testing.assert_array_equal(one.outputs[0], result.outputs[j])
            want = evaluate_graph(graph, [x[i + j : i + j + 1]])[result.exit[j]]
            np.testing.assert_allclose(one.outputs, want, atol=1e-5)
            taken.add(int(result.exit[j]))
            steps.add(float(np.round(want.mean())))
    assert taken == {0, 1, 2} and len(steps) > 3


def test_the_number_of_the_trip_may_end_a_loop() -> None:
    """Without a trip count, and with no counter of its own."""
    model = loop_model(None)
    again = next(n for n in model.graph.node if n.name == "again")
    body = again.attribute[0].g
    del body.node[2]  # of the counter
    body.node[-1].output[0] = "small"
    body.node.extend([helper.make_node("Identity", ["n"], ["k"]), helper.make_node("Less", ["i", "last"], ["early"]),
                      helper.make_node("And", ["small", "early"], ["more"])])
    model.graph.initializer.append(numpy_helper.from_array(np.int64(4), "last"))
    module = skive.compile(model)
    for start, trips in ((60.0, 0), (11.0, 1), (0.5, 5), (-30.0, 5)):
        want = np.full(4, start, np.float32)
        for _ in range(trips):
            want = want * np.float32(1.5) + np.float32(1)
        np.testing.assert_allclose(module(np.full(4, start, np.float32))[0], want, rtol=1e-6)


def test_a_loop_without_a_bound_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="more than 4096 iterations, or that its values alone end; count"):
        skive.compile(loop_model(None))


def test_a_side_that_no_input_takes_is_reported(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path))  # an artefact from the cache is not verified again
    model = if_model()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32(1e9), "zero"))
    with caplog.at_level(logging.WARNING, logger="skive.api"):
        skive.compile(model)
    assert "verified on one way only through gate" in caplog.text


def test_without_choices_nothing_is_guarded(tmp_path: Path) -> None:
    x = ops.make("input", shape=(1, 8), dtype=DType.f32, label="x")
    where = ops.make("where", ops.make("greater", x, constant(np.float32(0))), x, ops.make("exp", x))
    graph, _ = optimize(Graph("plain", (x,), (where,), ("y",)))
    plan = lower(graph, TARGETS["generic"])
    assert all(not c.guards for c in plan.calls)
    assert "  if (m." not in cxx.emit(plan, TARGETS["generic"]).files["plain.cpp"]
