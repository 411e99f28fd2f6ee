"""Calling a compiled module: threads, concurrent callers, batches, tensors of other libraries, saving, the cache."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_networks import KEYWORDS, NETWORKS

import skive
from skive import check, ops
from skive.errors import ShapeError
from skive.ir import Graph, constant
from skive.types import DType

Compile = Callable[..., skive.Module]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The module of one of the small networks, compiled once for each set of options."""
    modules: dict[tuple[object, ...], skive.Module] = {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("SKIVE_CXXFLAGS", "-O1")  # its speed does not matter

    def get(name: str, graph: Graph | None = None, **options: object) -> skive.Module:
        key = (name, *sorted(options.items()), graph is None)
        if key not in modules:
            folder = tmp_path_factory.mktemp(name) / "artefact"
            modules[key] = skive.compile(graph or NETWORKS[name](), output=folder, verify=False, **options)
        return modules[key]

    yield get
    monkeypatch.undo()


def outputs(module: skive.Module, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    result = module(*inputs)
    return result if isinstance(result, tuple) else (result,)


def same_bits(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape and g.tobytes() == w.tobytes()


@pytest.mark.parametrize("name", ["convolutions", "transformer", *(
    pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n not in ("convolutions", "transformer"))])
def test_threads_change_no_bit(name: str, compiled: Compile) -> None:
    one = compiled(name)
    others = [compiled(name, threads=n) for n in (2, 3)]
    for seed in range(3):
        inputs = check.sample_inputs(NETWORKS[name](), seed)
        want = outputs(one, *inputs)
        for module in others:
            for _ in range(5):
                same_bits(outputs(module, *inputs), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls_of_one_module(threads: int, compiled: Compile) -> None:
    module = compiled("transformer", threads=threads)
    samples = [check.sample_inputs(NETWORKS["transformer"](), seed) for seed in range(8)]
    want = [outputs(module, *s) for s in samples]

    def caller(first: int) -> None:
        for i in range(100):
            k = (first + i) % len(samples)
            same_bits(outputs(module, *samples[k]), want[k])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(caller, i) for i in range(4)]:
            done.result()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_single_calls(threads: int, compiled: Compile) -> None:
    graph = NETWORKS["keywords"]()
    single, batched = compiled("keywords"), compiled("keywords", replace(graph, batch_max=5), threads=threads)
    x = np.random.default_rng(0).normal(size=(5, 1, 49, 10)).astype(np.float32) * 30
    for n in (1, 2, 5):
        got = batched(x[:n])
        assert got.shape[0] == n
        same_bits((got,), (np.concatenate([single(x[i:i + 1]) for i in range(n)]),))
    for n in (0, 6):
        with pytest.raises(ShapeError):
            batched(np.zeros((n, 1, 49, 10), np.float32))


def test_the_batch_of_a_graph_is_its_own() -> None:
    with pytest.raises(skive.SkiveError, match="batch_max=4: the graph itself says that its batch is fixed"):
        skive.compile(NETWORKS["pools"](), batch_max=4)


def test_several_inputs_and_outputs(compiled: Compile) -> None:
    module, graph = compiled("recurrent"), NETWORKS["recurrent"]()
    inputs = check.sample_inputs(graph)
    want = outputs(module, *inputs)
    assert [w.shape for w in want] == [o.shape for o in graph.outputs]
    assert [(p.name, p.shape, p.dtype) for p in module.inputs] == [
        ("x0", (5, 2, 9), "float32"), ("x1", (2, 8), "float32"), ("x2", (2, 8), "float32")]
    same_bits(module(**dict(zip(("x2", "x0", "x1"), (inputs[2], inputs[0], inputs[1]), strict=True))), want)
    same_bits(module(inputs[0], x2=inputs[2], x1=inputs[1]), want)
    kept = [a.copy() for a in inputs]
    assert all(np.array_equal(a, b) for a, b in zip(inputs, kept, strict=True))  # inputs are not written to
    first = outputs(module, *inputs)
    module(*(a + 1 for a in inputs))
    same_bits(first, want)  # nor are earlier results


def test_every_result_agrees_with_the_reference(compiled: Compile) -> None:
    from skive.reference import evaluate_graph

    graph = NETWORKS["recurrent"]()
    inputs = check.sample_inputs(graph, 5)
    pairs = list(zip(outputs(compiled("recurrent"), *inputs), evaluate_graph(graph, inputs), strict=True))
    assert check.compare(pairs, "numpy", 1).passed


def test_inputs_of_any_layout(compiled: Compile) -> None:
    """Strided, reversed, Fortran-ordered, unaligned, read-only and big-endian views."""
    module = compiled("pools")
    x = np.random.default_rng(1).standard_normal((2, 7, 8, 20)).astype(np.float32)
    want = outputs(module, x)
    wide = np.zeros((2, 7, 8, 41), np.float32)
    wide[..., 1::2] = x
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = x.view(np.uint8).ravel()
    frozen = x.copy()
    frozen.flags.writeable = False
    unaligned = raw[1:].view(np.float32).reshape(x.shape)
    for view in (wide[..., 1::2], x[:, ::-1].copy()[:, ::-1], np.asfortranarray(x), unaligned, frozen):
        np.testing.assert_array_equal(view, x)
        same_bits(outputs(module, view), want)
    for wrong in (x.astype(np.float64), x.astype(">f4"), x[:1], x.ravel(), [1.0]):
        with pytest.raises(ShapeError):
            module(wrong)
    with pytest.raises(ShapeError, match="is given twice, by position and by name"):
        module(x, **{module.inputs[0].name: x})


class Capsule:
    """A tensor that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_dlpack(compiled: Compile) -> None:
    module = compiled("pools")
    x = np.random.default_rng(2).standard_normal((2, 7, 8, 20)).astype(np.float32)
    same_bits(outputs(module, Capsule(x)), outputs(module, x))  # type: ignore[arg-type]


def test_torch_tensors(compiled: Compile) -> None:
    torch = pytest.importorskip("torch")
    module = compiled("pools")
    x = np.random.default_rng(3).standard_normal((2, 7, 8, 20)).astype(np.float32)
    want = outputs(module, x)
    channels_first = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    for tensor in (torch.from_numpy(x), channels_first.permute(0, 2, 3, 1), torch.from_numpy(x).requires_grad_()):
        got = module(tensor)
        assert all(isinstance(g, torch.Tensor) for g in got)
        same_bits(tuple(g.numpy() for g in got), want)
    negated = torch.complex(torch.from_numpy(x), torch.from_numpy(-x)).conj().imag  # a view that stands for -(-x)
    same_bits(tuple(g.numpy() for g in module(negated)), want)
    for wrong in (torch.from_numpy(x).bfloat16(), torch.from_numpy(x).to_sparse(), torch.from_numpy(x).to("meta")):
        with pytest.raises(ShapeError, match="give a dense one of float32"):
            module(wrong)


def test_save_and_load(compiled: Compile, tmp_path: Path) -> None:
    module = compiled("pools")
    inputs = check.sample_inputs(NETWORKS["pools"]())
    module.save(tmp_path / "saved")
    again = skive.load(tmp_path / "saved")
    same_bits(outputs(again, *inputs), outputs(module, *inputs))
    assert again.report == module.report and again.inputs == module.inputs
    module.save(tmp_path / "saved")  # replaces it, while the first is loaded
    same_bits(outputs(again, *inputs), outputs(module, *inputs))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("kept")
    with pytest.raises(skive.SkiveError, match="not empty"):
        module.save(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "saved"]


@pytest.mark.parametrize("value", [None, "cat.png", [[1.0], "two"]])
def test_what_is_no_array(value: object, compiled: Compile) -> None:
    module = compiled("pools")
    with pytest.raises(ShapeError, match=f"is of type {type(value).__name__}, not an array of float32"):
        module(value)
    with pytest.raises(ShapeError, match="is <U3, not float32"):
        module(np.array(["cat"]))


def test_copies_and_pickles(compiled: Compile, tmp_path: Path) -> None:
    module = compiled("pools")
    inputs = check.sample_inputs(NETWORKS["pools"]())
    for again in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same_bits(outputs(again, *inputs), outputs(module, *inputs))
    here = skive.compile(NETWORKS["pools"](), verify=False)
    copy.deepcopy(here).save(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"compiled without a folder of its own.*skive\.load"):
        pickle.dumps(here)
    same_bits(outputs(pickle.loads(pickle.dumps(skive.load(tmp_path / "saved"))), *inputs), outputs(here, *inputs))


def test_an_unchanged_model_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIVE_CACHE", str(tmp_path / "cache"))

    def timed(name: str, **options: object) -> tuple[dict[str, bytes], float]:
        start = time.perf_counter()
        module = skive.compile(KEYWORDS, input_shapes={"input": (1, 1, 49, 10)}, output=tmp_path / name, **options)
        seconds = time.perf_counter() - start
        files = {str(p.relative_to(module.folder)): p.read_bytes() for p in module.folder.rglob("*") if p.is_file()}
        return files, seconds

    first, cold = timed("first")
    second, warm = min((timed("second") for _ in range(3)), key=lambda t: t[1])
    assert first == second  # the report with its times included: nothing was done again
    assert warm < 1.0 and warm < cold / 2
    other, _ = timed("other", target="generic", verify=False)
    assert other["kws_dscnn.cpp"] != first["kws_dscnn.cpp"]  # other options, another artefact


def test_another_model_in_the_same_folder_is_the_one_that_runs(tmp_path: Path) -> None:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    modules = []
    for factor in (2.0, 3.0, 4.0):
        y = ops.make("mul", x, constant(np.full(4, factor, np.float32)))
        graph = Graph("scaled", (x,), (y,), ("y",), None)
        modules.append(skive.compile(graph, output=tmp_path / "net", verify=False))
    modules.append(skive.load(tmp_path / "net"))
    found = [float(m(np.ones((1, 4), np.float32))[0, 0]) for m in modules]
    assert found == [2.0, 3.0, 4.0, 4.0]
