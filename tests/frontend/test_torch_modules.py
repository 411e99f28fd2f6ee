"""Modules as people write them: wrapped, parametrized, with masks, states and results of their own classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skive.errors import InvalidModelError, SkiveError, UnsupportedOpError
from skive.frontend import open_model
from skive.reference import evaluate_graph

torch = pytest.importorskip("torch", reason="needs PyTorch (pip install 'skive-compiler[torch]')")
pytest.importorskip("onnxscript", reason="needs onnxscript (pip install 'skive-compiler[torch]')")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402


def noise(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclasses.dataclass
class Answer:
    logits: Any
    hidden: Any = None


@dataclasses.dataclass
class Both:
    first: Answer
    second: Any


class Opaque:
    def __init__(self, value: Any):
        self.value = value


class Function(nn.Module):
    """A function of the module and its inputs."""

    def __init__(self, fn: Callable[..., Any], **parts: Any):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.fn(self, x)


def masked(m: Any, x: Any) -> Any:
    y = x.clone()
    y[y < 0] = -1
    y[x.sum(-1) > 0] = m.row  # a mask over the leading axes
    y[:, torch.tensor([True, False, True])] = 7.0
    return y


def decided(m: Any, x: Any) -> Any:
    if x.sum() > 0:
        return Answer(x * 2)
    return Answer(x * 3)


def counted(m: Any, x: Any) -> Any:
    m.calls += 1
    m.last = x * 2
    return m.last


def seq2seq(m: Any, x: Any) -> Any:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return m.net(x, x * 2, tgt_mask=mask)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dataclass": lambda: Function(lambda m, x: Answer(x * 2)),
    "dataclasses in a dataclass": lambda: Function(lambda m, x: Both(Answer(x, x + 1), [x * 3])),
    "dataclass on one of two paths": lambda: Function(decided),
    "compiled": lambda: torch.compile(nn.Linear(3, 2)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(3, 2)),
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 3)), parametrizations.orthogonal(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 2))),
    "assigned through masks": lambda: Function(masked, row=noise(4)),
    "counts its calls": lambda: Function(counted, calls=0),
    "transformer with a mask": lambda: Function(seq2seq, net=nn.Transformer(4, 2, 1, 1, 8, batch_first=True)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_to_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    x = noise(2, 3) if "mask" not in name else noise(2, 3, 4)
    before = {m: set(vars(m)) for m in module.modules()}
    source = open_model(module, example_inputs=(x,))
    assert {m: set(vars(m)) for m in module.modules()} == before  # nothing is left behind in the user's module
    got = evaluate_graph(source.graph(), [x.numpy()])
    with torch.no_grad():
        want = [v.numpy() for v in torch.utils._pytree.tree_leaves(module(x)) if v is not None]
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def steps(m: Any, x: Any) -> Any:
    m.calls += 1
    return x * m.calls


def added(m: Any, x: Any) -> Any:
    m.state = x if m.state is None else m.state + x
    return m.state


def collected(m: Any, x: Any) -> Any:
    m.seen.append(0)
    return x * len(m.seen)


def remembered(m: Any, x: Any) -> Any:
    m.features = x * 2  # for whoever looks
    return m.features + 1


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(3, 3)


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[SkiveError], str]] = {
    "class": (lambda: Function(lambda m, x: Opaque(x)), InvalidModelError, "forward returns Opaque.*dataclasses"),
    "nothing": (lambda: Function(lambda m, x: None), InvalidModelError, "returns no tensor"),
    "number": (lambda: Function(steps, calls=0), UnsupportedOpError, "calls: forward keeps.*another result"),
    "tensor": (lambda: Function(added, state=None), UnsupportedOpError, "state: forward keeps.*another result"),
    "list": (lambda: Function(collected, seen=[]), UnsupportedOpError, "Function: forward keeps.*another result"),
    "no copy": (lambda: Function(steps, calls=0, held=(i for i in ())), UnsupportedOpError, "cannot be copied"),
    "input in place": (lambda: nn.Sequential(nn.ReLU(inplace=True)), UnsupportedOpError, r"input = input.clone\(\)"),
    "lazy": (lambda: nn.LazyLinear(3), InvalidModelError, "weight has no shape yet; call the model once"),
    "meta": (meta, InvalidModelError, "weight has no values"),
    "quantized": (quantized, InvalidModelError, "0 is quantized by PyTorch; give the float32 model"),
    "numpy": (lambda: Function(lambda m, x: x * float(np.mean(x.numpy()))), InvalidModelError, "test_torch_modules"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_taken_is_refused_with_a_way_out(name: str) -> None:
    make, error, says = REFUSED[name]
    with pytest.raises(error, match=says):
        open_model(make().eval(), example_inputs=(noise(2, 3),)).graph()


def test_features_that_are_kept_for_others_are_no_state() -> None:
    module = Function(remembered, features=None).eval()
    x = noise(2, 3).requires_grad_()
    module(x)  # leaves a tensor that has a history
    (got,) = evaluate_graph(open_model(module, example_inputs=(noise(2, 3),)).graph(), [noise(2, 3).numpy()])
    np.testing.assert_allclose(got, noise(2, 3).numpy() * 2 + 1, rtol=1e-6)


@dataclasses.dataclass
class Scaled:
    value: Any


class Named(dict):  # type: ignore[type-arg]
    """Results of a library that tells PyTorch their parts, but not how these are called."""


def test_parts_of_results_that_pytorch_has_no_names_for() -> None:
    pytree = torch.utils._pytree
    pytree.register_pytree_node(Named, lambda d: ([d[k] for k in sorted(d)], sorted(d)),
                                lambda values, keys: Named(reversed([*zip(keys, values, strict=True)])))
    module, x = Function(lambda m, x: Named(sample=x + 1, rest=(x * 2,))).eval(), noise(2, 3)
    graph = open_model(module, example_inputs=(x,)).graph()
    got = dict(zip(graph.output_names, evaluate_graph(graph, [x.numpy()]), strict=True))
    np.testing.assert_array_equal(got["sample"], x + 1)
    np.testing.assert_array_equal(got["rest.0"], x * 2)


class Anchored(nn.Module):
    grid, shape = torch.empty(0), None

    def forward(self, x: Any) -> Scaled:
        if self.shape != x.shape:
            self.grid, self.shape = torch.arange(x.shape[-1]).to(x.dtype), x.shape
        return Scaled(x * self.grid)


def test_what_is_made_for_a_shape_and_kept_is_no_state() -> None:
    """Detectors keep the anchors of the last shape: of an export neither the tensor nor the shape may stay."""
    module, x = Anchored().eval(), noise(2, 4)
    source = open_model(module, example_inputs=(x,))
    assert not {"grid", "shape"} & set(vars(module))
    np.testing.assert_array_equal(evaluate_graph(source.graph(), [x.numpy()])[0], module(x).value)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cache, self.calls = nn.ReLU(), {}, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.inner._forward_hooks:
            self.inner.register_forward_hook(lambda module, args, result: result + 1)
        if x.shape not in self.cache:
            self.cache[x.shape] = torch.arange(x.shape[-1]).to(x.dtype)
        self.calls.append(x)
        return self.inner(x) * self.cache[x.shape]


def test_what_an_export_puts_into_dictionaries_and_hooks_is_taken_out() -> None:
    """Positional encodings are kept in a dictionary by length, and some libraries install hooks in the first call."""
    module, x = Caching().eval(), noise(2, 4)
    source = open_model(module, example_inputs=(x,))
    assert not module.cache and not module.calls and not module.inner._forward_hooks
    np.testing.assert_array_equal(evaluate_graph(source.graph(), [x.numpy()])[0], module(x).numpy())
    assert len(module.inner._forward_hooks) == 1 and not module._forward_hooks


def test_a_program_exported_in_training_mode_says_so() -> None:
    program = torch.export.export(nn.Sequential(nn.BatchNorm1d(3)), (noise(2, 3),))
    with pytest.raises(UnsupportedOpError, match=r"0.running_mean: .*call \.eval\(\)"):
        open_model(program).graph()


@pytest.mark.parametrize(("example", "says"), [
    (5, "example_inputs is int; give a tuple"),
    ((noise(1, 3), noise(1, 3)), "Linear: example_inputs: too many positional arguments"),
    (({"x": np.zeros(3)},), "input 0 is float64"),
])
def test_unfit_examples_are_named(example: Any, says: str) -> None:
    with pytest.raises(InvalidModelError, match=says):
        open_model(nn.Linear(3, 3).eval(), example_inputs=example)


def test_one_size_of_batch_is_no_open_batch() -> None:
    module = Function(lambda m, x: x.reshape(2, -1)).eval()
    with pytest.raises(InvalidModelError, match="one size of batch only.*without batch_max"):
        open_model(module, example_inputs=(noise(2, 3),), batch_max=4).graph()


def test_inputs_can_be_fixed() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Any, scale: Any) -> Any:
            return x * scale

    example = (noise(2, 3), torch.tensor(2.0))
    source = open_model(Scaled().eval(), example_inputs=example, fixed_inputs={"scale": np.float32(4)})
    graph = source.graph()
    assert [i.name for i in graph.inputs] == ["x"]
    np.testing.assert_array_equal(evaluate_graph(graph, [example[0].numpy()])[0], example[0].numpy() * 4)
    with pytest.raises(SkiveError, match="sclae"):
        open_model(Scaled().eval(), example_inputs=example, fixed_inputs={"sclae": np.float32(4)}).graph()


def test_shapes_that_would_not_count_are_refused() -> None:
    with pytest.raises(InvalidModelError, match="shapes of example_inputs hold"):
        open_model(nn.Linear(3, 3).eval(), example_inputs=(noise(1, 3),), input_shapes={"input": (5, 3)})


@pytest.mark.parametrize(("spec", "says"), [
    ("mine.py:build", "such as mine:build"),
    ("mine_for_skive:build", r"the inputs \(x, y\) are missing; give --input x="),
    ("mine_for_skive:leave", "SystemExit: 3"),
])
def test_a_callable_that_gives_no_network_is_named(spec: str, says: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_skive.py").write_text("""
import sys
from torch import nn
class Sum(nn.Module):
    def forward(self, x, y):
        return x + y
def build():
    return Sum().eval()
def leave():
    sys.exit(3)
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidModelError, match=says):
        open_model(spec)


def test_attention_takes_an_open_batch() -> None:
    torch.manual_seed(0)
    module, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), noise(3, 5, 8)
    graph = open_model(module, example_inputs=(x[:1],), batch_max=4).graph()
    got = np.concatenate([evaluate_graph(graph, [x[i:i + 1].numpy()])[0] for i in range(3)])
    with torch.no_grad():
        np.testing.assert_allclose(got, module(x).numpy(), rtol=1e-4, atol=1e-5)
