"""Channels that fade while a network is trained."""

from __future__ import annotations

import numpy as np
import pytest

from skive.errors import PruningError
from skive.passes.channel_groups import channel_groups
from skive.pipeline import total_macs
from skive.pruning import Prune
from skive.reference import evaluate_graph

torch = pytest.importorskip("torch")
from skive import torch as helpers  # noqa: E402


class Residual(torch.nn.Module):
    """A stem, a residual branch and a classifier of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm, self.two = torch.nn.BatchNorm2d(24), torch.nn.Conv2d(24, 16, 3, padding=1)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(x.mean((2, 3)))


def batches(count: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which of the first three channels is the brightest."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 16, 4, 8, 8, generator=generator)
    kind = torch.randint(0, 3, (len(x),), generator=generator)
    x[torch.arange(len(x)), kind] += 1.0
    return list(zip(x.split(16), kind.split(16), strict=True))


def module() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.mark.parametrize("correct", [False, True])
def test_channels_fade_and_the_network_learns(correct: bool) -> None:
    data = batches()
    net = helpers.hesso(module(), Prune(macs=0.5, multiple=2), data, 8, 0.05, periods=2, correct=correct,
                        example_inputs=(data[0][0][:1],))
    whole = total_macs(helpers.network(module(), (data[0][0][:1],)).source)
    assert 0.5 <= 1 - total_macs(net.source) / whole < 0.65 and net.sparsity["macs_removed"] >= 0.5
    with torch.no_grad():
        right = [float((net(x).argmax(-1) == y).float().mean()) for x, y in data]
    assert np.mean(right) > 0.9
    x = data[0][0][:1]
    with torch.no_grad():
        np.testing.assert_allclose(evaluate_graph(net.graph(), [x.numpy()])[0], net(x).numpy(), rtol=1e-3, atol=1e-3)


def test_removing_what_has_faded_changes_nothing() -> None:
    """Behind batch normalisation, too, which undoes any factor on the weights."""
    from skive.torch.hesso import _factors, _faded

    data = batches(4)
    net = helpers.network(module(), (data[0][0][:1],))
    found = channel_groups(net.source)
    gone = np.zeros(len(found.groups), bool)
    for family in found.families:
        gone[list(family[1::3])] = True
    small = _faded(net, found, gone, data, 1, 0.05, torch.nn.functional.cross_entropy, {})
    x = data[1][0]
    with torch.no_grad():
        np.testing.assert_allclose(small(x).numpy(), net.eval()(x).numpy(), rtol=1e-4, atol=1e-4)
    sizes = [sorted(n.inputs[1].shape[0] for n in g.nodes if n.op == "conv2d") for g in (net.source, small.source)]
    assert sizes == [[16, 16, 24], [11, 11, 16]]
    half = _factors(found, gone, 0.5)
    assert all(set(np.unique(f)) == {0.5, 1.0} for by_axis in half.values() for f in by_axis.values())


def test_what_hesso_cannot_do_is_refused() -> None:
    example = (torch.zeros(1, 4, 8, 8),)
    with pytest.raises(PruningError, match="takes a fraction of macs"):
        helpers.hesso(module(), Prune(latency=0.5), batches(1), 8, 0.1, example_inputs=example)
    with pytest.raises(PruningError, match="4 epochs are too few for 4 periods"):
        helpers.hesso(module(), Prune(macs=0.5), batches(1), 4, 0.1, example_inputs=example)
