"""skive.torch: graphs as modules to train, importances by gradients, fine-tuning."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from skive import ops, pruning
from skive.errors import PruningError, UnsupportedOpError
from skive.ir import Graph, constant
from skive.pipeline import total_macs
from skive.reference import evaluate_graph
from skive.types import DType

torch = pytest.importorskip("torch")
from topologies import TOPOLOGIES  # noqa: E402

from skive import torch as helpers  # noqa: E402
from skive.torch.operations import computed  # noqa: E402


class Small(torch.nn.Module):
    """Two convolutions with batch normalisation and a shortcut that drops every second pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), torch.nn.Conv2d(8, 8, 3, 2, 1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x) + x[:, :, ::2, ::2])
        return self.head(x.mean((2, 3)))


def stripes(count: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images with stripes across or down, and which."""
    generator = torch.Generator().manual_seed(3)
    kind = torch.randint(0, 2, (count,), generator=generator)
    wave = torch.arange(8).fmod(2) * 2 - 1.0
    across = wave[:, None].expand(8, 8)
    images = torch.where(kind[:, None, None] > 0, across, across.T)[:, None]
    return images + 0.7 * torch.randn(images.shape, generator=generator), kind


def batches(size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = stripes()
    return list(zip(x.split(size), y.split(size), strict=True))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.mark.parametrize("name", ["transposed", "unet", "squeeze_excite", "llama", "vit", "option_a"])
def test_a_module_computes_what_its_graph_does(name: str) -> None:
    torch.manual_seed(1)
    make, example, _ = TOPOLOGIES[name]
    net = helpers.network(make().eval(), example)
    example = tuple(torch.randn_like(v) if v.is_floating_point() else v for v in example)  # those may be zeros
    inputs = [v.numpy() for v in example]
    with torch.no_grad():
        got = net(*example)
    want = evaluate_graph(net.source, inputs)
    for g, w in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        assert np.abs(g.numpy() - w).max() <= 1e-4 * np.abs(w).max()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_that_of_the_graph(groups: int) -> None:
    """Rows that only `out_pad` makes have the bias alone."""
    rng = np.random.default_rng(0)
    x, w, bias = (constant(rng.standard_normal(s).astype(np.float32))
                  for s in ((1, 4, 5, 6), (4, 3, 2, 6 // groups), (4,)))
    node = ops.make("conv_transpose2d", x, w, bias, stride=(2, 3), pad=(1, 0, 0, 1), dilation=(1, 2), groups=groups,
                    out_pad=(1, 2))
    want = ops.evaluate(node, [i.value for i in node.inputs])
    got = computed(node.op, [torch.from_numpy(i.value.copy()) for i in node.inputs], node.attrs)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)


def test_normalisation_is_the_identity_until_trained_and_folds_exactly() -> None:
    x, y = stripes(64)
    net = helpers.network(small(), (x[:1],)).eval()
    with torch.no_grad():
        before = net(x)
    net.normalise(x)
    with torch.no_grad():
        assert torch.allclose(net(x), before, atol=1e-4)
    helpers.finetune(net, batches(), 1, 0.05, normalise=False)
    with torch.no_grad():
        after = net(x)
    assert not torch.allclose(after, before, atol=1e-2)
    folded = np.concatenate([evaluate_graph(net.graph(), [x[i:i + 1].numpy()])[0] for i in range(8)])
    assert np.abs(folded - after[:8].numpy()).max() < 1e-4
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(net)(x), after)


def test_a_pruned_network_learns_again() -> None:
    x, y = stripes()

    def right(net: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((net(x).argmax(-1) == y).float().mean())

    teacher = helpers.finetune(helpers.network(small(), (x[:1],)), batches(), 8, 0.1)
    assert right(teacher) > 0.95
    asked = pruning.Prune(macs=0.5, criterion="random", refit=False, multiple=1)
    net = helpers.prune(teacher, asked)
    assert total_macs(net.source) <= 0.5 * total_macs(teacher.source) and net.sparsity["macs_removed"] >= 0.5
    told: list[float] = []
    helpers.finetune(net, batches(), 8, 0.1, distill=teacher, progress=lambda epoch, loss: told.append(loss))
    assert right(net) > 0.95 and len(told) == 8 and told[-1] < told[0]


def test_any_module_is_trained_but_only_a_network_loses_blocks() -> None:
    x, y = stripes()
    module = small()
    assert helpers.finetune(module, batches(), 8, 0.1) is module and not module.training
    with torch.no_grad():
        assert float((module(x).argmax(-1) == y).float().mean()) > 0.95
    with pytest.raises(PruningError, match=r"blocks of a \w+ are not known; train skive.torch.network"):
        helpers.finetune(small(), batches(), 1, 0.1, gradual="block4x16@0.75")


@pytest.mark.parametrize("kind", ["taylor", "snip"])
def test_importances_find_what_the_loss_does_not_need(kind: str) -> None:
    """Channels of the first layer whose output the second multiplies by almost nothing."""
    module = small()
    with torch.no_grad():
        module.two.weight[:, [1, 6]] *= 1e-6
        module.head.weight[:, [1, 6]] *= 1e-6  # the shortcut leads there
    x, _ = stripes(1)
    scores = helpers.importance(module, batches(), kind=kind, example_inputs=(x,))
    options = pruning.Prune(macs=0.2, criterion=scores, refit=False, multiple=1)
    net = helpers.prune(module, options, example_inputs=(x,))
    assert net.sparsity["criterion"] == kind
    from skive.passes.channel_groups import channel_groups

    found = channel_groups(helpers.network(module, (x,)).source)
    ranked = np.argsort(pruning.scores.summed(found, scores)[list(found.families[0])])
    assert len(found.families) == 1 and set(ranked[:2].tolist()) == {1, 6}


def test_importance_needs_data_and_a_known_kind() -> None:
    x, _ = stripes(1)
    with pytest.raises(PruningError, match="no batch"):
        helpers.importance(small(), [], example_inputs=(x,))
    with pytest.raises(PruningError, match="taylor, snip"):
        helpers.importance(small(), batches(), kind="best", example_inputs=(x,))


def test_masks_of_torch_are_recognised() -> None:
    from torch.nn.utils import prune

    module = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
                                 torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
    prune.ln_structured(module[0], "weight", amount=3, n=2, dim=0)
    x, _ = stripes(1)
    net = helpers.prune(module, pruning.Prune(zeros=True), example_inputs=(x,))
    assert net.sparsity["zero_channels"] == 3
    with torch.no_grad():
        assert torch.allclose(net(x), module(x), atol=1e-6)


def test_what_cannot_be_trained_is_named() -> None:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x", origin="x")
    y = ops.make("cumsum", x, axis=1, origin="running")
    with pytest.raises(UnsupportedOpError, match="running"):
        helpers.Network(Graph("g", (x,), (y,), ("y",)))


def test_a_network_that_mixes_samples_is_refused() -> None:
    x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x", origin="x")
    y = ops.make("linear", ops.make("transpose", x, perm=(1, 0)), constant(np.ones((3, 1), np.float32)), origin="fc")
    with pytest.raises(UnsupportedOpError):
        helpers.Network(Graph("g", (x,), (y,), ("y",)))
