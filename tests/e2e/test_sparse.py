"""Networks compiled with blocks of weights zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from keywords import MODEL, accuracy, compiled, features

import skive
from skive import ops
from skive.cli import cli
from skive.execute import run_graph
from skive.ir import Graph, Node, constant
from skive.lower import convolution, lower
from skive.pipeline import random_inputs
from skive.reference import evaluate_graph
from skive.sparsity import mask
from skive.targets.base import TARGETS, resolve


def test_fitted_weights_keep_the_accuracy_in_fewer_bytes() -> None:
    data = features()[0][:100]
    whole = compiled(quantize=skive.Quantize("int8", calibration=data))
    fitted = compiled(sparsify=skive.Sparsify("block4x16", 0.3, calibration=data),
                      quantize=skive.Quantize("int8", calibration=data))
    assert accuracy(fitted) > accuracy(whole) - 0.12
    report = fitted.report
    assert report["verification"]["passed"] and report["sparsity"]["pattern"] == "block4x16"
    assert 0.2 < report["sparsity"]["macs_removed"] < 0.5
    assert report["compiled"]["weight_bytes"] < 0.9 * whole.report["compiled"]["weight_bytes"]
    used = {layer["name"] for layer in report["sparsity"]["layers"] if not layer["refused"]}
    kernels = {layer["name"]: layer["kernel"] for layer in report["layers"]}
    assert len(used) >= 4 and {n for n, k in kernels.items() if k == "sparse_conv2d"} == used


def test_zeros_stay_zeros_in_fixed_point() -> None:
    """Through equalisation, adaptive rounding and the correction of biases: no block comes back."""
    from skive import passes, quantization, sparsity
    from skive.frontend import open_model
    from skive.pipeline import PassManager

    data = features()[0][:32]
    graph = open_model(MODEL, input_shapes={"input": (1, 1, 49, 10)}).graph()
    graph, _ = PassManager().run(graph, passes.CANONICAL, check="never")
    graph, _ = sparsity.apply(graph, skive.Sparsify("block4x16", 0.5, calibration=data))
    fixed, _ = quantization.apply(graph, skive.Quantize("int8", calibration=data))
    fixed, _ = PassManager().run(fixed, passes.FUSED, check="never")
    layers = [[n for n in g.nodes if n.op in ("conv2d", "linear")] for g in (graph, fixed)]
    zeros = [[(n.inputs[1].value == 0).reshape(n.inputs[1].shape) for n in nodes] for nodes in layers]
    assert len(zeros[0]) == len(zeros[1]) and sum(int(z.sum()) for z in zeros[0]) > 5000
    for before, after in zip(*zeros, strict=True):
        assert not (before & ~after.reshape(before.shape)).any()


def test_nothing_sparsified_is_the_same_code(tmp_path: Path) -> None:
    compiled(output=tmp_path / "whole", emit_only=True)
    compiled(output=tmp_path / "same", emit_only=True, sparsify="block4x16@0")
    for file in sorted(tmp_path.glob("whole/*")):
        if file.suffix in (".cpp", ".c", ".h", ".bin", ".S"):
            assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name


def test_channels_first_then_blocks() -> None:
    data = features()[0][:32]
    module = compiled(prune=skive.Prune(macs=0.3, calibration=data),
                      sparsify=skive.Sparsify("block4x16", 0.5, calibration=data))
    report = module.report["sparsity"]
    assert module.report["verification"]["passed"]
    assert report["groups"] and report["channels"]["macs_removed"] >= 0.3
    assert report["macs_removed"] > report["channels"]["macs_removed"] + 0.15


def quantized(zeros: float, n_of_m: str | None = None) -> Graph:
    """Integer convolutions with a border, strides, a residual and a vector, `zeros` of their blocks zero.

    With `n_of_m` one more, with this pattern of zeros.
    """
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> Node:
        w = rng.integers(-127, 128, shape).astype(np.int8)
        blocks = rng.random((-(-shape[0] // 16), *shape[1:-1], -(-shape[-1] // 4))) >= zeros
        return constant(w * np.repeat(np.repeat(blocks, 16, 0)[: shape[0]], 4, -1)[..., : shape[-1]])

    def bias(n: int) -> Node:
        return constant(rng.integers(-1000, 1000, n, np.int32))

    from skive.types import DType

    x = ops.make("input", shape=(1, 13, 11, 28), dtype=DType.u8, label="x")
    a = ops.make("conv2d", x, weights(40, 3, 3, 28), bias(40), zero=7, pad=(1, 1, 1, 1))
    b = ops.make("conv2d", x, weights(33, 1, 1, 28), zero=7, stride=(2, 2))
    c = ops.make("conv2d", x, weights(16, 3, 2, 28), bias(16), zero=0, dilation=(2, 3), pad=(0, 2, 0, 2))
    d = ops.make("linear", ops.make("reshape", x, shape=(143, 28)), weights(20, 28), bias(20), zero=7)
    results = [a, b, c, d]
    if n_of_m:
        full = rng.integers(-127, 128, (37, 3, 3, 28)).astype(np.int8)
        fifth = constant(full * mask(full, n_of_m))
        results.append(ops.make("conv2d", x, fifth, bias(37), zero=7, pad=(1, 1, 1, 1)))
    return Graph("sparse", (x,), tuple(results), tuple("abcde"[: len(results)]))


@pytest.mark.parametrize("target", TARGETS)
def test_integers_are_those_of_the_dense_kernels(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TARGETS[target]
    if not set(chosen.features) <= set(skive._native.cpu_features()):
        pytest.skip(f"this CPU cannot run {target}")
    graph = quantized(0.8, "2:4")
    inputs = random_inputs(graph)
    assert [c.kernel for c in lower(graph, chosen).calls] == ["sparse_conv2d"] * 5
    sparse = run_graph(graph, chosen, 2)(inputs)
    monkeypatch.setattr(convolution, "sparse_choice", lambda node, target: None)
    assert "sparse_conv2d" not in {c.kernel for c in lower(graph, chosen).calls}
    dense = run_graph(graph, chosen, 1)(inputs)
    for got, same, want in zip(sparse, dense, evaluate_graph(graph, inputs), strict=True):
        np.testing.assert_array_equal(got, same)
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_n_of_m_input_channels_in_integers() -> None:
    data = features()[0][:32]
    module = compiled(sparsify=skive.Sparsify("2:4", calibration=data),
                      quantize=skive.Quantize("int8", calibration=data))
    report = module.report
    assert report["verification"]["passed"] and report["sparsity"]["pattern"] == "2:4"
    used = [layer for layer in report["sparsity"]["layers"] if not layer["refused"]]
    assert len(used) >= 4 and all(layer["kept"] <= 0.6 and layer["pattern"].startswith("block1x") for layer in used)


def test_code_does_not_grow_with_the_layer() -> None:
    """The places are data: twice the weights are the same instructions."""
    host = resolve("host", skive._native.cpu_features())
    sizes = []
    for zeros in (0.9, 0.4):
        plan = lower(quantized(zeros), host)
        sizes.append((len(plan.calls), len(plan.weights)))
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < 0.5 * sizes[1][1]


def test_command_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=features()[0][:32])
    runner = CliRunner()
    done = runner.invoke(cli, ["compile", str(MODEL), "-o", str(tmp_path / "a"), "--input", "input=1x1x49x10",
                                   "--sparsify", "block4x16@0.6", "--calibrate", f"{tmp_path}/data.npz:x"])
    assert done.exit_code == 0, done.output
    assert "block4x16" in done.output and "reconstruction" in done.output and "sparse kernels in" in done.output
    for wrong, message in (("block4x16", "fraction is None"), ("blok@0.5", "pattern is 'blok'"), ("2:4@x", "PATTERN@")):
        done = runner.invoke(cli, ["compile", str(MODEL), "-o", str(tmp_path / "b"), "--sparsify", wrong])
        assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output, done.output
