"""The search for widths of layers."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from skive.errors import PruningError
from skive.passes.channel_groups import channel_groups
from skive.pipeline import total_macs
from skive.pruning import Prune, ranking
from skive.pruning.choice import named_families

torch = pytest.importorskip("torch")
from skive import torch as helpers  # noqa: E402
from skive.torch.widths import Widths  # noqa: E402

SIZE = 8
LOSS = torch.nn.functional.mse_loss


class Sides(torch.nn.Module):
    """Two branches of equal shape on the halves of the input, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Linear(SIZE, SIZE) for _ in range(2))
        self.left_out, self.right_out = (torch.nn.Linear(SIZE, SIZE) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.left_out(torch.relu(self.left(x[:, :SIZE])))
                + self.right_out(torch.relu(self.right(x[:, SIZE:]))))


@functools.cache
def sides() -> helpers.Network:
    """Both branches are nearly the positive part."""
    torch.manual_seed(3)
    module = Sides()
    with torch.no_grad():
        for layer in module.children():
            layer.weight.copy_(torch.eye(SIZE) + 0.01 * torch.randn(SIZE, SIZE))
            layer.bias.zero_()
    return helpers.network(module.eval(), (torch.zeros(1, 2 * SIZE),))


def halves(needed: str = "left") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose targets are the positive part of one half of the input. With w channels in that branch the
    results lie in a plane of w dimensions, while the targets' 8 vary alike and independently: the mean squared error
    is at least (8 - w) / 8 of their variance. The other half has nothing to do with them."""
    x = torch.randn(40 * 32, 2 * SIZE, generator=torch.Generator().manual_seed(4))
    y = torch.relu(x[:, :SIZE] if needed == "left" else x[:, SIZE:])
    return list(zip(x.split(32), y.split(32), strict=True))


@pytest.mark.parametrize("needed", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_what_is_needed_stays_and_what_is_not_goes(needed: str) -> None:
    """Both branches cost the same, and `l1` counts the channels of each family relative to their mean."""
    data = halves(needed)
    asked = Prune(macs=0.37, criterion="l1", multiple=2, refit=False)  # the least that one branch alone can give
    found = helpers.search_widths(sides(), asked, data[::2], data[1::2], 10, 0.1, cost_weight=0.2, loss=LOSS)
    assert list(found.widths.values()) == ([SIZE, 2] if needed == "left" else [2, SIZE]) and found.macs is None
    net, even = (helpers.prune(sides(), p) for p in (found, replace(asked, scope="layer")))
    assert net.sparsity["macs_removed"] >= 0.37
    for n in (net, even):
        helpers.finetune(n, data, 4, 0.5, loss=LOSS)

    def error(n: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([LOSS(n(x), y) for x, y in data]))

    assert error(net) < 0.02 < 0.34 * 2 / 8 < error(even)  # of the variance of 0.34, without two of 8 channels


class Residual(torch.nn.Module):
    """A stem, a depthwise branch with batch normalisation, a gate on its channels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 24, 1, bias=False)
        self.norm, self.deep = torch.nn.BatchNorm2d(24), torch.nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.gate, self.two = torch.nn.Linear(24, 24), torch.nn.Conv2d(24, 16, 3, padding=1)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.deep(torch.relu(self.norm(self.one(x)))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.head(torch.relu(x + self.two(y)).mean((2, 3)))


def pictures(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which of the three channels is the brightest."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 16, 3, 8, 8, generator=generator)
    kind = torch.randint(0, 3, (len(x),), generator=generator)
    x[torch.arange(len(x)), kind] += 1.0
    return list(zip(x.split(16), kind.split(16), strict=True))


@functools.cache
def residual() -> helpers.Network:
    torch.manual_seed(0)
    return helpers.network(Residual().eval(), (torch.zeros(1, 3, 8, 8),))


@pytest.mark.parametrize("normalised", [False, True])
def test_the_pruned_network_is_the_masked_one(normalised: bool) -> None:
    data = pictures()
    asked = Prune(macs=0.6, criterion="activation", calibration=data[0][0].numpy(), multiple=4, refit=False)
    found = helpers.search_widths(residual(), asked, data[::2], data[1::2], 2, 0.02)
    net = helpers.prune(residual(), found)
    whole = helpers.network(residual()).eval()
    assert 0.6 <= 1 - total_macs(net.source) / total_macs(whole.source) == net.sparsity["macs_removed"]
    stem, inner = found.widths.values()
    assert [n.shape[3] for n in net.source.nodes if n.op == "conv2d"] == [stem, inner, inner, stem]
    groups = channel_groups(whole.source)
    scores, _ = ranking(groups, asked)
    masked = Widths(groups, scores, asked)
    shares = torch.ones(len(groups.groups))
    for name, family in named_families(groups).items():
        shares[sorted(family, key=lambda g: -scores[g])[found.widths[name]:]] = 0
    x = data[2][0]
    with torch.no_grad():
        if normalised:
            whole.normalise(x)
        before = whole(x)
        whole.fade(masked.factors(shares))
        np.testing.assert_allclose(whole(x).numpy(), net(x).numpy(), rtol=1e-5, atol=1e-5)
        assert not np.allclose(before.numpy(), net(x).numpy(), rtol=1e-3, atol=1e-3)


def test_layers_read_a_mixture_of_two_widths_and_gradients_reach_the_distributions() -> None:
    net = helpers.network(residual())
    found = channel_groups(net.source)
    asked = Prune(macs=0.5, criterion="l2", multiple=4)
    scores, _ = ranking(found, asked)
    widths = Widths(found, scores, asked)
    shares = widths.sampled(1.0)
    for order in widths._orders:
        assert (np.diff(scores[order]) <= 0).all()
        kept = shares.detach()[order].numpy()
        assert (np.diff(kept) <= 0).all() and kept[0] == pytest.approx(1) and len(set(kept[kept > 0])) == 2
    by_constant = widths.factors(shares)
    weights = {n.op: n.inputs[1] for n in net.source.nodes if n.op in ("conv2d", "linear")}
    stem = next(n for n in net.source.nodes if n.op == "conv2d").inputs[1]
    assert set(by_constant[stem][0].tolist()) == {0.0, 1.0}  # made whole, or not at all
    assert len(set(by_constant[weights["linear"]][1].tolist())) == 3  # read in parts
    net.fade(by_constant)
    x, y = pictures(1)[0]
    torch.nn.functional.cross_entropy(net(x), y).backward(inputs=widths.logits)
    assert all(v.grad.abs().max() > 0 for v in widths.logits)
    assert all(w.grad is None for w in net.parameters())


def test_the_pressure_is_the_gradient_of_the_expected_cost() -> None:
    """Against the sum over all pairs of widths; the classifier alone does not fit the target."""
    found = channel_groups(sides().source)
    asked = Prune(macs=0.3, criterion="l1", multiple=4)
    widths = Widths(found, ranking(found, asked)[0], asked)
    assert widths._widths == [[8, 4], [8, 4]]
    for bias, sign in ((0.0, 1), (40.0, -1)):  # the whole is too much; the narrowest too little
        widths.logits = [torch.tensor([0.0, bias], requires_grad=True) for _ in range(2)]
        widths.pressure().backward()
        got = [v.grad.clone() for v in widths.logits]
        again = [torch.tensor([0.0, bias], requires_grad=True) for _ in range(2)]
        p = [v.softmax(0) for v in again]
        torch.log(sum(p[0][i] * p[1][j] * widths.cost([widths._widths[0][i], widths._widths[1][j]])
                      for i, j in itertools.product(range(2), range(2)))).backward()
        for g, v in zip(got, again, strict=True):
            np.testing.assert_allclose(g, sign * v.grad, rtol=1e-4, atol=1e-12)


def test_given_widths_are_checked() -> None:
    data = halves()
    with pytest.raises(PruningError, match="give one of macs"):
        Prune(macs=0.5, widths={"left": 4})
    with pytest.raises(PruningError, match="width of left is 0, not a number"):
        Prune(widths={"left": 0})
    names = list(helpers.search_widths(sides(), Prune(macs=0.2, criterion="l1"), data[:1], data[1:2], 1, 0.02,
                                       loss=LOSS).widths)
    with pytest.raises(PruningError, match=f"given for 'lfet'.*there are {names[0]}"):
        helpers.prune(sides(), Prune(widths={"lfet": 4}))
    with pytest.raises(PruningError, match="has 8 channels, 9 cannot be left"):
        helpers.prune(sides(), Prune(widths={names[0]: 9}))
    with pytest.raises(PruningError, match="has 8 channels that keep names, 4 cannot be left"):
        helpers.prune(sides(), Prune(widths={names[0]: 4}, keep=names[0]))
    given = Prune(widths={names[1]: 3}, criterion="l1")
    assert given.options()["widths"] == {names[1]: 3} and hash(given) is not None
    assert given.fingerprint() != Prune(widths={names[1]: 4}, criterion="l1").fingerprint()
    net = helpers.prune(sides(), given)
    assert sorted(n.shape[1] for n in net.source.nodes if n.op == "linear") == [3, 8, 8, 8]


def test_what_the_search_cannot_do_is_refused() -> None:
    data = halves()
    for options in (Prune(latency=0.5), Prune(zeros=True), Prune(macs=0.3, erase=1)):
        with pytest.raises(PruningError, match="takes a fraction of macs, parameters or bytes"):
            helpers.search_widths(sides(), options, data, data, 1, 0.1)
    with pytest.raises(PruningError, match="at most 75% of the macs can be removed, not 90%"):
        helpers.search_widths(sides(), Prune(macs=0.9, criterion="l1", multiple=2), data, data, 1, 0.1)
    with pytest.raises(PruningError, match="at least one epoch"):
        helpers.search_widths(sides(), Prune(macs=0.3), data, data, 0, 0.1)
    with pytest.raises(PruningError, match="held_out holds no batch"):
        helpers.search_widths(sides(), Prune(macs=0.3, criterion="l1"), data, [], 1, 0.1, loss=LOSS)
