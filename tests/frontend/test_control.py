"""Python control flow on tensors in `forward`: the graph takes the paths that eager PyTorch takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import skive  # noqa: E402
from skive.errors import InvalidModelError, ShapeError, UnsupportedOpError  # noqa: E402
from skive.frontend.control.trace import results  # noqa: E402
from skive.frontend.torch import open_module  # noqa: E402
from skive.ir import Graph  # noqa: E402
from skive.lower.branches import guards_of  # noqa: E402
from skive.reference import evaluate_graph  # noqa: E402

nn, Tensor = torch.nn, torch.Tensor


class Net(nn.Module):
    """A body for `forward`: linear layers of width 4 that everybody may use."""

    def __init__(self, forward: Callable[..., Any], layers: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(layers)])
        self.helper = forward

    def forward(self, x: Tensor) -> Any:
        return self.helper(self, x)


def imported(model: nn.Module, batch_max: int | None = None) -> Graph:
    model.eval()
    with torch.no_grad():
        return open_module(model, (torch.zeros(1, 4),), request="", batch_max=batch_max).graph()


def check(body: Callable[..., Any], paths: int, count: int = 40) -> Graph:
    """The graph of `body`, which equals eager mode on inputs that take at least `paths` ways through it."""
    model = body if isinstance(body, nn.Module) else Net(body)
    graph = imported(model)
    taken = set()
    for seed in range(count):
        x = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed)) * (0.2 + seed % 5)
        decided = []

        def observe(node: Any, value: np.ndarray, decided: list[Any] = decided) -> None:
            if any(u.op == "choose" and u.inputs[0] is node for u in graph.users[node]):
                decided.append(bool(value))

        with torch.no_grad():
            want = torch.utils._pytree.tree_leaves(results(model(x.clone())))
        got = evaluate_graph(graph, [x.numpy()], observe=observe)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.numpy().dtype and g.shape == tuple(w.shape)
            np.testing.assert_allclose(g, w.numpy(), rtol=1e-4, atol=1e-5)
        taken.add(tuple(decided))
    assert len(taken) >= paths
    return graph


def early_return(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = torch.tanh(layer(x))
        if x.abs().max().item() > 0.6:
            return x
    return x * 2


def skipping(self: Any, x: Tensor) -> tuple[Tensor, int]:
    used = 0
    for layer in self.layers:
        if layer.bias.sum() + x.mean() > 0:
            x = x + torch.tanh(layer(x))
            used += 1
    return x, used


def nested(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        if x[0, 0] > 0:
            y = self.layers[0](x)
        elif x[0, 1] > 0.5:
            y = self.layers[1](x)
        else:
            return x
        y = y + 1
    else:
        y = self.layers[2](x)
    return y * 3


def until(self: Any, x: Tensor) -> tuple[Tensor, int]:
    done, i = False, 0
    while not done and i < 6:
        x = x + torch.tanh(self.layers[0](x))
        done = bool(x.abs().mean() > 1.5)
        i += 1
    return x, i


def with_else(self: Any, x: Tensor) -> tuple[Tensor, int]:
    count = 0
    for layer in self.layers:
        x = layer(x)
        if x.mean() < -0.3:
            continue
        count += 2
        if x.mean() > 0.6:
            break
    else:
        x = -x
    return x, count


def data_length(self: Any, x: Tensor) -> Tensor:
    n = int(x.abs().sum())
    h = torch.zeros(1, 4)
    for t in range(min(n, 5)):
        h = torch.tanh(self.layers[0](h + x * t))
    return h


def patience(self: Any, x: Tensor) -> tuple[Tensor, int]:
    last, count = None, 0
    for i, layer in enumerate(self.layers):
        x = torch.tanh(layer(x)) * 2
        now = int(x.argmax())
        count = count + 1 if last is not None and now == last else 0
        last = now
        if count >= 1:
            return x, i
    return x, -1


def expert(self: Any, x: Tensor) -> tuple[Tensor, int]:
    k = int(x.argmax())
    return self.layers[k](x) * x[0, k].item(), k


def accumulated(self: Any, x: Tensor) -> Tensor:
    parts = []
    for layer in self.layers:
        x = layer(x)
        parts.append(x)
        if x.sum() > 0.5:
            parts[0] = parts[0] + 1
    return torch.stack(parts).sum(0)


def collected(self: Any, x: Tensor) -> Tensor:
    """A list of another length on each path, and a variable that only some assign."""
    kept = [x]
    if x[0, 0] > 0:
        kept.append(self.layers[0](x))
        bonus = kept[-1].sum()
    if x[0, 1] > 0:
        kept.append(self.layers[1](x))
    if x[0, 0] > 0:
        kept[0] = kept[0] * bonus
    return torch.stack(kept).mean(0)


def in_place(self: Any, x: Tensor) -> Tensor:
    h = self.layers[0](x)
    if h.sum() > 0:
        h += 1
        h[:, 1] = 0
    else:
        h *= 2
    h += self.layers[1](h)
    return h


def tokens(self: Any, x: Tensor) -> tuple[Tensor, int]:
    out = torch.zeros(1, 6, dtype=torch.int64)
    token, length = int(x.argmax()), 0
    while token != 3 and length < 6:
        out[0, length] = token
        x = self.layers[token](x) + torch.tensor([token, 2.0]).sum() / 8
        token = x.argmax().item()
        length += 1
    return out, length


def logic(self: Any, x: Tensor) -> Tensor:
    low, high = x.min().item(), x.max().item()
    if low > -1 and (high < 1 or not x.sum() > 0.2):
        y = self.layers[0](x)
    else:
        y = x if any(v > 2 for v in x[0]) else self.layers[1](x)
    return y + (low if abs(low) > high else max(low, high, 0.5))


def closures(self: Any, x: Tensor) -> Tensor:
    def pick(a: Tensor, *, scale: float = 2.0) -> Tensor:
        return a * scale if x.sum() > 0 else a

    act = lambda v: v if v.mean() > 0 else -v  # noqa: E731
    return pick(act(self.layers[0](x))) + pick(x, scale=3.0)


def numbers_stay(self: Any, x: Tensor) -> Tensor:
    """A number, a flag and a list that is one of two are as they were when they were taken."""
    total, flag = x.sum(), x.sum() > 0
    before, first, second = total.item(), [x, x + 1], [x + 2, x + 3]
    pair = first if flag else second
    if flag:
        y = self.layers[0](x)
    else:
        y = self.layers[1](x)
    flag.logical_not_()
    total.mul_(2)
    pair[0] = pair[0] * 3
    a, b = pair
    scale = {"0": 1.0, "1": 2.0}[f"{1 if flag else 0}"]
    if flag:
        y = y + scale
    return y + first[0] * before + second[0] * total.item() + a - b


def relayed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


@relayed
def decorated(self: Any, x: Tensor, scale: float = 2.0) -> Tensor:
    return self.layers[0](x) * scale if x.sum() > 0 else x


BODIES = {"decorated": 2, "numbers_stay": 2, "early_return": 3, "skipping": 5, "nested": 4, "until": 4, "with_else": 4,
          "data_length": 4, "patience": 3, "expert": 4, "accumulated": 4, "collected": 4, "in_place": 2,
          "tokens": 4, "logic": 4, "closures": 4}


@pytest.mark.parametrize("name", BODIES)
def test_all_paths_are_those_of_eager_mode(name: str) -> None:
    check(globals()[name], BODIES[name])


class Block(nn.Module):
    """A submodule that decides, inside a container."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.gate, self.act = nn.Linear(4, 4), nn.Linear(4, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate(x) > 0:
            return x + self.act(self.linear(x))
        return x


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(i) for i in range(12)))

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.blocks(x)}


def test_submodules_decide_and_paths_are_not_enumerated() -> None:
    graph = check(Stacked(), 10)
    assert sum(n.op == "choose" for n in graph.nodes) == 12  # of 4096 paths
    guards = guards_of(graph)
    assert sum(n.op == "linear" and len(guards[n]) == 1 for n in graph.nodes) == 12
    assert graph.output_names == ("y",)


def test_batches_decide_for_every_sample() -> None:
    graph = imported(Stacked(), batch_max=8)
    assert graph.batch_max == 8 and graph.inputs[0].shape == (1, 4)
    with pytest.raises(ShapeError, match="'output_1' has shape .* for one sample"):
        imported(Net(skipping), batch_max=8)


def unbounded(self: Any, x: Tensor) -> Tensor:
    while x.sum() < 10:
        x = x + 1
    return x


def unbounded_range(self: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.sum())):
        x = x + 1
    return x


def shapes_differ(self: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x[:, :2]


def raises(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        raise ValueError("too much")
    return x


def asserts(self: Any, x: Tensor) -> Tensor:
    assert x.sum() > 0
    return x


def length_of_list(self: Any, x: Tensor) -> Tensor:
    return torch.stack([v for v in x[0] if v > 0])


def remembers(self: Any, x: Tensor) -> Tensor:
    if x.sum() > self.layers[0].seen:
        self.layers[0].seen = x.sum().item()
    return x


def view_changes(self: Any, x: Tensor) -> Tensor:
    h = self.layers[0](x)
    first = h[:, 0]
    if x.sum() > 0:
        h += 1
    return h + first


def shared_changes(self: Any, x: Tensor) -> Tensor:
    h = self.layers[0](x)
    y = h
    if x.sum() > 0:
        y = self.layers[1](x)
    y += 1
    return h + y


def native_change(self: Any, x: Tensor) -> Tensor:
    h = self.layers[0](x)
    if x.sum() > 0:
        torch.relu_(h)
    return h


def same_object(self: Any, x: Tensor) -> Tensor:
    y = x
    if x.sum() > 0:
        y = self.layers[0](x)
    return x + 1 if y is x else y


def grows(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        self.log.append(x)
    return x


def sorts(self: Any, x: Tensor) -> Tensor:
    return sorted(x[0], key=lambda v: v)[0]


def selects(self: Any, x: Tensor) -> Tensor:
    for i in (x[0] > 0).nonzero():
        x = x * x[0, i]
    return x


def catches(self: Any, x: Tensor) -> Tensor:
    try:
        return x if x.sum() > 0 else -x
    except ValueError:
        return x


def fails(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return self.layers[0](x[:, :3])
    return x


REFUSED = {
    "unbounded": ("while x.sum", "no end of this loop is in sight.*give it a bound"),
    "unbounded_range": ("for _ in range", r"how many at most; give it a bound: range\(min\(n, N\)\)"),
    "shapes_differ": ("def forward", r"different forms: float32\[1, 2\], float32\[1, 4\]"),
    "raises": ("raise ValueError", "whether this is raised depends on a tensor"),
    "asserts": ("assert x.sum", "whether an assertion holds depends on a tensor"),
    "length_of_list": ("return torch.stack", "a tensor decides how long a list becomes"),
    "remembers": ("if x.sum", "seen of Linear is read, which an earlier call may have set"),
    "view_changes": (r"h \+= 1", "of which another variable holds a view"),
    "shared_changes": (r"y \+= 1", "another variable's on some paths"),
    "native_change": ("torch.relu_", "changed in place on one side of a decision"),
    "same_object": ("return x", "`is` between tensors that are one on some paths"),
    "grows": ("", "a list that stands inside another object|a list or an object that outlives the call"),
    "sorts": ("return sorted", "Python needs the value of a tensor here|needs the value of a tensor"),
    "selects": ("for i in", "the values of a tensor decide a length"),
    "catches": ("try", "`try` in a function that decides on tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_say_is_refused_with_its_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skive.frontend.control.statements.MAX_TURNS", 10)
    line, reason = REFUSED[name]
    model = Net(globals()[name])
    model.layers[0].seen = 0.0
    model.log = []
    with pytest.raises(UnsupportedOpError, match=rf"test_control.py:\d+: {line}[\s\S]*{reason}"):
        imported(model)
    assert "forward" not in vars(model) and model.layers[0].seen == 0.0 and not model.log  # the model is as it was


def test_an_error_of_forward_itself_names_its_line() -> None:
    with pytest.raises(InvalidModelError, match=r"test_control.py:\d+: return self.layers\[0\]\(x\[:, :3\]\)"):
        imported(Net(fails))


def test_compiled(tmp_path: Any) -> None:
    model = Net(early_return).eval()
    module = skive.compile(model, example_inputs=(torch.zeros(1, 4),), batch_max=16)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 16)[:, None]
    with torch.no_grad():
        want = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)
