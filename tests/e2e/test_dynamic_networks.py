"""Dynamic networks as people write them: every artefact takes the paths of eager PyTorch, on inputs that take all."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import skive  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "dynamic"


def module(name: str) -> Any:
    """A file of the benchmark, under a name of its own: torch finds the source of `forward` by its path."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


networks = module("networks")


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_paths_and_outputs_are_those_of_eager_mode(name: str) -> None:
    with torch.no_grad():
        net = networks.NETWORKS[name]().eval()
        compiled = skive.compile(net, example_inputs=(net.example(0),))
        met: set[int] = set()
        for seed in range(4000):
            if seed >= 200 and len(met) == net.paths:
                break
            x = net.example(seed)
            y, path = net(x)
            if seed >= 200 and path in met:
                continue
            met.add(path)
            got, taken = compiled(x)
            assert int(taken) == path
            torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4 * float(y.abs().max() + 1e-6))
    assert len(met) == net.paths
