"""Exits of PyTorch models: the marker in `forward`, and heads that are added and trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import skive  # noqa: E402
from skive.errors import ExitError  # noqa: E402
from skive.torch import add_exits, suggest_exits, train_exits  # noqa: E402

nn = torch.nn


class Marked(nn.Module):
    """Two exits on the way; the last mark is the result itself."""

    def __init__(self, second: str = "middle") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.then, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.second = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        x = skive.exit_point(x, self.heads[0](x))
        x = torch.tanh(self.then(x))
        x = skive.exit_point(skive.exit_point(x, self.heads[1](x), self.second), self.heads[1](2 * x), "double")
        return self.last(x)


def test_exit_point_is_nothing_in_eager_mode() -> None:
    x = torch.randn(2, 3)
    assert skive.exit_point(x, x) is x


def test_marked_exits(tmp_path: Path) -> None:
    model = Marked("tanh").eval()  # as the translation calls a value inside
    x = torch.randn(40, 6)
    exits = ["exit0:max-prob=0.5", "tanh:margin=0.1"]
    module = skive.compile(model, example_inputs=(x[:1],), exits=exits, batch_max=40)
    assert [e.name for e in module.exits] == ["exit0", "tanh", "output"]
    result = module.run(x)
    with torch.no_grad():
        h = torch.tanh(model.first(x))
        g = torch.tanh(model.then(h))
        logits = [model.heads[0](h), model.heads[1](g), model.last(g)]
    top = logits[0].softmax(-1).amax(-1)
    two = logits[1].softmax(-1).topk(2).values
    want = np.where(top > 0.5, 0, np.where(two[:, 0] - two[:, 1] > 0.1, 1, 2))
    np.testing.assert_array_equal(result.exit, want)
    assert set(want.tolist()) == {0, 1, 2}
    expected = torch.stack([logits[e][i] for i, e in enumerate(want)])
    torch.testing.assert_close(result.outputs, expected, rtol=1e-4, atol=1e-5)
    plain = skive.compile(model, example_inputs=(x[:1],))  # the marks mean nothing without exits
    assert [p.name for p in plain.outputs] == ["output"]
    with torch.no_grad():
        torch.testing.assert_close(plain(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x[:1],))  # the mark survives export and its file
    torch.export.save(program, tmp_path / "net.pt2")
    saved = skive.compile(tmp_path / "net.pt2", exits=["double:max-prob=0"], verify=False)
    assert saved.run(x[:1].numpy()).exit.tolist() == [0]


@pytest.mark.parametrize("name", ["exit0", "x"])
def test_exits_called_as_another_port_are_refused(name: str) -> None:
    with pytest.raises(ExitError, match=f"called '{name}'"):
        skive.compile(Marked(name).eval(), example_inputs=(torch.randn(1, 6),), exits=["exit0:max-prob=1"])


class Stack(nn.Module):
    """Blocks in a row that a classifier follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU())
                                      for i in range(4)))
        self.classify = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.blocks(x).mean((2, 3)))


def test_heads_learn_on_a_network_that_stays() -> None:
    network = Stack().eval()
    x = torch.randn(64, 3, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert suggest_exits(network, (x[:1],), 2) == ["blocks.1", "blocks.2"]
    model = add_exits(network, (x[:1],), ["blocks.0", "blocks.2"], channels=4)
    assert model.at == ("blocks.0", "blocks.2")
    losses: list[float] = []
    train_exits(model, lambda: [(x, y)], epochs=60, lr=0.02, distill=0.0, progress=lambda e, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0] and not model.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        answers = model(x)
    assert (answers["exit1"].argmax(-1) == y).float().mean() > 0.9
    module = skive.compile(model, example_inputs=(x[:1],), exits=["exit0:max-prob=0.9", "exit1:max-prob=0.9"])
    np.testing.assert_allclose(module.all_outputs(x[:1].numpy())[0], answers["exit0"][:1], rtol=1e-3, atol=1e-4)
    train_exits(model, lambda: [(x, y)], epochs=1, network_lr=1e-3)
    assert not all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 5.0)])
def test_a_hidden_layer_tells_apart_what_no_line_divides(scale: float, offset: float) -> None:
    """Whatever the size of the features: they are normalised."""
    x = scale * torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]) + offset
    y = torch.tensor([0, 1, 1, 0])
    right = {}
    for hidden in (0, 16):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).eval()
        model = add_exits(network, (x[:1],), ["0"], hidden=hidden)
        train_exits(model, lambda: [(x, y)] * 20, epochs=20, lr=0.02, distill=0.0)
        right[hidden] = int((model(x)["exit0"].argmax(-1) == y).sum())
    assert right[0] < 4 and right[16] == 4


def test_heads_that_learn_with_noise_do_not_rest_on_small_differences() -> None:
    """Two features say the same, one of them a thousandth of the other."""
    x = torch.randn(256, 1)
    x, y = torch.cat([x, x / 1000], 1), (x[:, 0] > 0).long()
    moved = {}
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).eval()
        model = add_exits(network, (x[:1],), ["0"], hidden=16)
        train_exits(model, lambda: [(x, y)] * 20, epochs=20, lr=0.02, distill=0.0, noise=noise)
        answers = [model(v)["exit0"] for v in (x, x + torch.tensor([0.0, 1e-3]))]
        assert (answers[0].argmax(-1) == y).float().mean() > 0.95
        moved[noise] = float(((answers[1] - answers[0]).norm() / answers[0].norm()).detach())
    assert moved[0.5] < 0.1 * moved[0.0]


def test_a_grid_of_rows_and_columns() -> None:
    """One row and five columns: what happens in a column counts, where in it does not."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 25, 5)
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    model = add_exits(network, (x[:1],), ["0"], grid=(1, 5), hidden=8).eval()
    head = model(x)["exit0"]
    assert model.heads[0].linear[1].in_features == 2 * 4 * 5
    torch.testing.assert_close(model(x.flip(2))["exit0"], head)
    assert not torch.allclose(model(x.flip(3))["exit0"], head, atol=1e-3)
    module = skive.compile(model, example_inputs=(x[:1],), exits=["exit0:max-prob=2"])
    np.testing.assert_allclose(module.all_outputs(x[:1].numpy())[0], head[:1].detach(), rtol=1e-4, atol=1e-5)


def test_places_that_are_not_there_are_refused() -> None:
    with pytest.raises(ExitError, match="no submodule 'nowhere'"):
        add_exits(Stack().eval(), (torch.randn(1, 3, 8, 8),), ["nowhere"])


def test_the_teacher_s_answers_are_learned_with_the_network() -> None:
    torch.manual_seed(0)
    network = Stack()
    x = torch.randn(64, 3, 8, 8)
    teacher = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        teacher[2].weight.mul_(6)
        wanted = teacher(x).argmax(1)
    model = add_exits(network, (x[:1],), ["blocks.1"], channels=4)
    losses: list[float] = []
    wrong = 1 - wanted  # classes do not count with distill=1
    train_exits(model, lambda: [(x, wrong)], epochs=60, lr=2e-2, network_lr=1e-2, teacher=teacher, distill=1.0,
                temperature=2.0,
                progress=lambda epoch, loss: losses.append(loss))
    with torch.no_grad():
        answers = model(x)
    assert losses[-1] < losses[0]
    for name, logits in answers.items():
        assert (logits.argmax(1) == wanted).float().mean() > 0.8, name


def synthetic(count: int = 4000) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of an exit that is right where it is sure, and of a network that is nearly always right."""
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(0, 4, (count,), generator=generator)
    truth = nn.functional.one_hot(classes, 4).float()
    strength = 4 * torch.rand(count, 1, generator=generator)
    early = strength * truth + torch.randn(count, 4, generator=generator)
    return [early, 6 * truth + torch.randn(count, 4, generator=generator)], classes


def test_gates_open_where_it_pays() -> None:
    logits, classes = synthetic()
    errors = torch.stack([nn.functional.cross_entropy(v, classes, reduction="none") for v in logits], -1)
    left = []
    for tradeoff in (0.2, 0.6, 1.5):
        gate = skive.torch.fit_gates(logits, classes, [40, 100], tradeoff)[0]
        assert gate.output == "exit0" and gate.criterion == "gate" and gate.threshold == 0.5
        assert isinstance(gate.of, tuple)
        p = logits[0].softmax(-1)
        squared = p**2 / (p**2).sum(-1, keepdim=True)
        two = p.topk(2).values
        features = torch.stack([two[:, 0], -(p * p.log()).sum(-1), two[:, 0] - two[:, 1],
                                -(squared * squared.log()).sum(-1)], -1)
        opened = (features @ torch.tensor(gate.of[:4]) + gate.of[4]) >= 0
        spent = errors + tradeoff * torch.tensor([0.4, 1.0])
        total = torch.where(opened, spent[:, 0], spent[:, 1]).mean()
        assert total < spent.mean(0).min() - 0.003  # better than everybody or nobody leaving
        left.append(float(opened.float().mean()))
    assert left == sorted(left) and 0.1 < left[0] < left[-1] < 0.99
    with pytest.raises(ExitError, match="2 answers.* 3 costs"):
        skive.torch.fit_gates(logits, classes, [1, 2, 3])


def test_gates_of_a_model_are_exits_of_its_artefact() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 8, 8)
    model = add_exits(Stack(), (x[:1],), ["blocks.1"])
    y = (x.mean((1, 2, 3)) > 0).long()
    train_exits(model, lambda: [(x, y)], epochs=40, network_lr=1e-2)
    gates = skive.torch.train_gates(model, [(x[:100], y[:100]), (x[100:], y[100:])], [1, 2], tradeoff=0.4)
    module = skive.compile(model, example_inputs=(x[:1],), exits=gates, batch_max=200)
    weights = torch.tensor(gates[0].of)
    with torch.no_grad():
        p = model(x)["exit0"].softmax(-1)
    q = p**2 / (p**2).sum(-1, keepdim=True)
    two = p.topk(2).values
    opened = torch.stack([two[:, 0], -(p * p.log()).sum(-1), two[:, 0] - two[:, 1], -(q * q.log()).sum(-1)], -1)
    score = (opened @ weights[:4] + weights[4]).sigmoid()
    sure = (score - 0.5).abs() > 1e-4
    np.testing.assert_array_equal(module.run(x).exit[sure], np.where(score >= 0.5, 0, 1)[sure])
