"""The fuzzers, for about a minute together; `make fuzz` runs them for ten minutes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).parent


def script(name: str) -> ModuleType:
    """A script beside this test as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_seed_models_compile(tmp_path: Path) -> None:
    fuzzer = script("fuzz_files")
    folder = tmp_path / "model"
    folder.mkdir()
    fuzzer.surroundings(folder)
    for seed in fuzzer.SEEDS:
        (folder / "model.onnx").write_bytes(seed().SerializeToString())
        fuzzer.sources_of(folder / "model.onnx")


def test_mutation_is_deterministic_and_varied() -> None:
    fuzzer = script("fuzz_files")
    assert [fuzzer.mutated(n) for n in range(40)] == [fuzzer.mutated(n) for n in range(40)]
    assert len({fuzzer.mutated(n)[0] for n in range(200)}) > 160  # some mutations find nothing to change


def test_mutated_files_compile_or_are_refused() -> None:
    result = script("fuzz_files").fuzz(seconds=15)
    assert result.cases > 50 and result.outcomes["compiled"] and result.outcomes["refused"]
    assert not result.defects, "\n".join(f"case {n}: {text}" for n, text in result.defects)


def test_command_on_mutated_files() -> None:
    result = script("fuzz_files").fuzz(first=7, count=3, command_every=1)
    assert result.cases == 3
    assert not result.defects, "\n".join(f"case {n}: {text}" for n, text in result.defects)


def test_random_graphs_compute_what_onnxruntime_computes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the oracle of the random graphs")
    result = script("fuzz_graphs").fuzz(seconds=12, jobs=1, folder=tmp_path)
    assert result.graphs
    assert not result.problems, "\n".join(result.problems.values())


def test_graph_fuzzer_finds_and_shrinks_a_planted_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reference that is wrong for one operator must be found, and cut down to that operator."""
    pytest.importorskip("onnxruntime", reason="the oracle of the random graphs")
    fuzzer, graphs = script("fuzz_graphs"), script("graphs")
    seed = next(
        s for s in range(1000) if "Softmax" in {n.op_type for n in graphs.random_graph(s).nodes}
        and len(graphs.random_graph(s).nodes) > 2
    )  # fmt: skip
    monkeypatch.setattr(fuzzer, "problem_of", lambda parts, target: "planted" if any(
        n.op_type == "Softmax" for g in parts for n in g.nodes) else None)  # fmt: skip
    result = fuzzer.check([seed], "host", tmp_path)
    assert list(result.problems) == [seed] and "planted" in result.problems[seed]
    (model,) = tmp_path.glob("*.onnx")
    import onnx

    assert [n.op_type for n in onnx.load(model).graph.node] == ["Softmax"]
    with np.load(model.with_suffix(".npz")) as inputs:
        assert set(inputs.files) == {i.name for i in onnx.load(model).graph.input}


def test_random_networks_in_fixed_point_equal_the_reference() -> None:
    result = script("fuzz_quantized").fuzz(seconds=10)
    assert result.graphs and result.exact and result.operations["conv2d u8"] and result.operations["conv2d i16"]
    assert not result.problems, "\n".join(f"seed {n}: {text}" for n, text in result.problems.items())


def test_the_fuzzer_of_fixed_point_sees_one_wrong_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = script("fuzz_quantized")
    seed = next(s for s in range(1000) if fuzzer.random_case(s).exact)
    case, evaluate = fuzzer.random_case(seed), fuzzer.evaluate_graph
    integers = [i for i, o in enumerate(case.graph.outputs) if o.dtype in fuzzer.NARROW]
    at = integers[-1] if integers else 0

    def off_by_one(graph: object, inputs: object, **more: object) -> list[np.ndarray]:
        values = evaluate(graph, inputs, **more)
        values[at] = values[at].copy()
        values[at].flat[-1] = values[at].flat[-1] + 1 if values[at].flat[-1] < 100 else values[at].flat[-1] - 1
        return values

    got = evaluate(case.graph, case.inputs)
    assert fuzzer.differences(case, got) is None
    monkeypatch.setattr(fuzzer, "evaluate_graph", off_by_one)
    assert "differs in 1 of" in str(fuzzer.differences(case, got))
