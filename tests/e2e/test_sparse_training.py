"""Networks trained with blocks of weights zero, and pruned by other tools, compiled."""

from __future__ import annotations

import numpy as np
import pytest

import skive
from skive import passes, quantization, sparsity
from skive.errors import PruningError
from skive.execute import run_graph
from skive.ir import Graph
from skive.lower import convolution, lower
from skive.pipeline import PassManager
from skive.reference import evaluate_graph
from skive.sparsity import Pattern, Sparsify
from skive.targets.base import resolve

torch = pytest.importorskip("torch")
from skive import torch as helpers  # noqa: E402


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 48, 3, 2, 1, bias=False),
              torch.nn.BatchNorm2d(48), torch.nn.ReLU(), torch.nn.Conv2d(48, 32, 1), torch.nn.ReLU(),
              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 3)]
    return torch.nn.Sequential(*layers).eval()


def batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which of the first three channels is the brightest."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 16, 4, 8, 8, generator=generator)
    kind = torch.randint(0, 3, (len(x),), generator=generator)
    x[torch.arange(len(x)), kind] += 1.0
    return list(zip(x.split(16), kind.split(16), strict=True))


def trained(way: str) -> helpers.Network:
    """At 75 % of the blocks of the two inner layers zero: at once, or during the training."""
    data = batches()
    example, calibration = (data[0][0][:1],), torch.cat([x for x, _ in data[:2]]).numpy()
    wanted = Sparsify("block4x16", 0.75, calibration=calibration)
    if way == "at once":
        return helpers.finetune(helpers.sparsify(module(), wanted, example_inputs=example), data, 2, 0.05)
    return helpers.finetune(helpers.network(module(), example), data, 4, 0.05, gradual="block4x16@0.75")


def inner(graph: Graph) -> list[np.ndarray]:
    chosen, _ = sparsity.layers(graph, Sparsify("block4x16", 0.5))
    return [n.inputs[1].value for n in chosen]


@pytest.mark.parametrize("way", ["at once", "gradual"])
def test_trained_zeros_reach_the_sparse_kernels(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = trained(way)
    graph = net.graph()
    weights = inner(graph)
    assert len(weights) == 2
    for w in weights:
        live = sparsity.block_scores(np.square(w), Pattern.parse("block4x16")) > 0
        assert abs(np.count_nonzero(live) / live.size - 0.25) < 0.04
    x = torch.cat([v for v, _ in batches()])
    fixed, _ = quantization.apply(graph, skive.Quantize("int8", calibration=x[:64].numpy()))
    fixed, _ = PassManager().run(fixed, passes.FUSED, check="never")
    host = resolve("host", skive._native.cpu_features())
    assert [c.kernel for c in lower(fixed, host).calls].count("sparse_conv2d") == 2
    samples = [[x[i : i + 1].numpy()] for i in range(8)]
    run = run_graph(fixed, host, 1)
    sparse = [run(s) for s in samples]
    monkeypatch.setattr(convolution, "sparse_choice", lambda node, target: None)
    assert "sparse_conv2d" not in {c.kernel for c in lower(fixed, host).calls}
    run = run_graph(fixed, host, 2)
    for s, got in zip(samples, sparse, strict=True):
        for a, b, want in zip(got, run(s), evaluate_graph(fixed, s), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, want)


def test_blocks_go_with_the_cube_and_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    thin_out = helpers.training._thin_out

    def watched(net: helpers.Network, options: Sparsify, share: float) -> None:
        thin_out(net, options, share)
        seen.append(np.concatenate([m.ravel() for m in net.masks.values()]))

    monkeypatch.setattr(helpers.training, "_thin_out", watched)
    net = trained("gradual")
    gone = [1 - s.mean() for s in seen]
    assert len(gone) == helpers.training.TURNS and gone == sorted(gone) and abs(gone[-1] - 0.75) < 0.03
    assert gone[helpers.training.TURNS // 2 - 1] > 0.8 * gone[-1]  # 1 - (1/2)^3 of it after half of the turns
    for before, after in zip(seen, seen[1:], strict=False):
        assert not (after & ~before).any()
    right = [float((net(x).argmax(-1) == y).float().mean()) for x, y in batches()]
    assert np.mean(right) > 0.8  # a third is chance


def test_masks_hold_in_any_loop_and_in_a_copy() -> None:
    import copy

    net = copy.deepcopy(trained("at once"))
    before = {n: m.copy() for n, m in net.masks.items()}
    assert len(before) == 2
    with torch.no_grad():
        for w in net.parameters():
            w.add_(1.0)
    for stays, now in zip(before.values(), inner(net.graph()), strict=True):
        assert not now[~stays].any() and (now[stays] != 0).all()


def test_what_cannot_grow_is_refused() -> None:
    net = helpers.network(module(), (batches()[0][0][:1],))
    with pytest.raises(PruningError, match="cannot grow"):
        helpers.finetune(net, batches(1), 1, 0.1, gradual="2:4")
    other = helpers.network(module(), (batches()[0][0][:1],))
    with pytest.raises(PruningError, match="no constant of this network"):
        net.masks = trained("at once").masks | {next(iter(other.constants)): np.ones(3, bool)}


def test_a_network_cut_by_torch_pruning() -> None:
    """What Torch-Pruning leaves compiles as it is, and its groups that are only zeroed are found and removed."""
    tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed: pip install torch-pruning")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    cut = module()
    graph = tp.DependencyGraph().build_dependency(cut, x)
    gone = [1, 5, 6, 20]
    zeroed = module()  # the same weights
    with torch.no_grad():
        zeroed[0].weight[gone], zeroed[0].bias[gone] = 0.0, 0.0
    graph.get_pruning_group(cut[0], tp.prune_conv_out_channels, idxs=gone).prune()
    assert cut[0].out_channels == 28
    with torch.no_grad():
        want = cut(x).numpy()
    compiled = skive.compile(cut, example_inputs=(x,))
    np.testing.assert_allclose(compiled(x.numpy()), want, atol=1e-5)
    net = helpers.prune(zeroed, skive.Prune(zeros=True), example_inputs=(x,))
    assert net.sparsity["zero_channels"] == 4
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), want, atol=1e-5)
