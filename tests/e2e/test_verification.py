"""A compile that went wrong says so and names the layer; one that went well leaves nothing but the artefact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skive
from skive import lower, ops, pack
from skive.errors import VerificationError
from skive.ir import Graph, Node, constant
from skive.types import DType

RNG = np.random.default_rng(0)


def weights(*shape: int) -> Node:
    return constant((RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))


def network() -> Graph:
    """Eight layers; the widths tell them apart."""
    x = y = ops.make("input", shape=(1, 8, 8, 4), dtype=DType.f32, label="x")
    for i, channels in enumerate((5, 6, 7, 9, 10)):
        w = weights(channels, 3, 3, y.shape[3])
        y = ops.make("conv2d", y, w, pad=(1, 1, 1, 1), origin=f"block{i}/conv")
        y = ops.make("tanh", y, origin=f"block{i}/tanh")
    y = ops.make("softmax", ops.make("reduce_mean", y, axes=(1, 2), keep=False, origin="pool"), origin="head")
    return Graph("net", (x,), (y,), ("y",))


@pytest.fixture(autouse=True)
def fast_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIVE_CXXFLAGS", "-O1")


def test_the_network_itself_is_fine(tmp_path: Path) -> None:
    assert skive.compile(network(), output=tmp_path / "out").report["verification"]["passed"]


@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_wrong_weights_are_found(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One packed weight of one layer is not what the model says."""
    channels = (5, 6, 7, 9, 10)[block]
    for name in ("pack_conv2d", "pack_winograd"):
        right = getattr(pack, name)

        def wrong(w: np.ndarray, *rest: object, right: object = right) -> np.ndarray:
            packed = right(w, *rest).copy()  # type: ignore[operator]
            if w.shape[0] == channels:
                packed.flat[np.flatnonzero(packed)[0]] += 1
            return packed

        monkeypatch.setattr(pack, name, wrong)
    with pytest.raises(VerificationError, match=rf"first at block{block}/") as caught:
        skive.compile(network(), output=tmp_path / "out")
    assert "differs from the reference" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering that calls log_softmax for softmax."""

    def wrong(ctx: lower.Lowering, node: Node) -> None:
        ctx.call(node, "softmax", "softmax.h", [1, 10, 1, "true"], ["x", "y", "part"],
                 [ctx.read("x", node.inputs[0]), ctx.write("y", node)])

    monkeypatch.setitem(lower.LOWER, "softmax", wrong)
    with pytest.raises(VerificationError, match=r"first at head \(softmax\)"):
        skive.compile(network(), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_pass_is_not_blamed_on_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skive.pipeline import PassManager

    run = PassManager.run

    def wrong(self: PassManager, graph: Graph, *rest: object, **options: object) -> object:
        optimised, records = run(self, graph, *rest, **options)  # type: ignore[arg-type]
        y = ops.make("mul", optimised.outputs[0], constant(np.float32(1.01)))
        return Graph(optimised.name, optimised.inputs, (y,), optimised.output_names), records

    monkeypatch.setattr(PassManager, "run", wrong)
    with pytest.raises(VerificationError, match="a pass changed the result"):
        skive.compile(network(), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupted_build_leaves_nothing(error: type[BaseException], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """And an artefact that was there before stays whole."""
    from skive import build

    module = skive.compile(network(), output=tmp_path / "out", verify=False)
    before = {p.name: p.read_bytes() for p in module.folder.iterdir() if p.is_file()}

    def interrupted(*arguments: object, **options: object) -> Path:
        raise error("in the middle")

    monkeypatch.setattr(build, "build_shared", interrupted)
    with pytest.raises((error, skive.SkiveError)):
        skive.compile(network(), output=tmp_path / "out", threads=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in module.folder.iterdir() if p.is_file()} == before
