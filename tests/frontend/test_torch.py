"""The PyTorch front end: compiled modules against eager PyTorch, and what it refuses."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skive
from skive.errors import InvalidModelError, ShapeError, UnsupportedOpError
from skive.frontend import open_model
from skive.reference import evaluate_graph

torch = pytest.importorskip("torch", reason="needs PyTorch (pip install 'skive-compiler[torch]')")
pytest.importorskip("onnxscript", reason="needs onnxscript (pip install 'skive-compiler[torch]')")

from torch import nn  # noqa: E402
from torch._higher_order_ops import while_loop  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch.utils import _pytree as pytree  # noqa: E402

TOLERANCE = 1e-4  # of the output's range


class Lambda(nn.Module):
    """A function, and the modules it uses, as one module; its parameters are the function's."""

    def __init__(self, fn: Callable[..., Any], **parts: nn.Module):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)
        names = [p for p in inspect.signature(fn).parameters if p != "m"]
        self.takes_self = "m" in inspect.signature(fn).parameters
        assert len(names) <= 3

    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any:
        given = [v for v in (x, y, z) if v is not None]
        return self.fn(self, *given) if self.takes_self else self.fn(*given)


def noise(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


# name: (module, inputs)
MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "conv_bn_relu": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        (noise(1, 3, 12, 12),),
    ),
    "residual": lambda: (Residual(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU6())), (noise(2, 4, 9, 9),)),
    "depthwise": lambda: (nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Conv2d(8, 6, 1)), (noise(1, 8, 9, 9),)),
    "groups": lambda: (nn.Conv2d(6, 8, 3, groups=2, dilation=2), (noise(1, 6, 9, 9),)),
    "conv_transpose": lambda: (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (noise(1, 4, 8, 8),)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (noise(1, 4, 20),)),
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()), (noise(2, 3, 4),)),
    "layer_norm_gelu": lambda: (nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU()), (noise(2, 5, 8),)),
    "attention": lambda: (
        Lambda(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
        (noise(1, 2, 6, 4), noise(1, 2, 7, 4), noise(1, 2, 7, 4)),
    ),
    "attention_causal": lambda: (
        Lambda(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        (noise(1, 2, 6, 4),),
    ),
    "multihead_attention": lambda: (
        Lambda(lambda m, x: m.att(x, x, x)[0], att=nn.MultiheadAttention(16, 4, batch_first=True)),
        (noise(2, 5, 16),),
    ),
    "transformer_layer": lambda: (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (noise(2, 5, 16),)),
    "lstm": lambda: (nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True), (noise(2, 7, 6),)),
    "gru": lambda: (nn.GRU(6, 5), (noise(7, 2, 6),)),
    "embedding": lambda: (
        Lambda(lambda m, i: m.table(i).mean(1), table=nn.Embedding(10, 4)),
        (torch.tensor([[1, 9, 3], [0, 0, 2]]),),
    ),
    "upsample_nearest": lambda: (nn.Upsample(scale_factor=2), (noise(1, 3, 5, 5),)),
    "upsample_bilinear": lambda: (nn.Upsample(size=(9, 11), mode="bilinear", align_corners=True), (noise(1, 3, 5, 5),)),
    "pixel_shuffle": lambda: (nn.PixelShuffle(2), (noise(1, 8, 5, 5),)),
    "adaptive_pool": lambda: (
        Lambda(lambda x: (F.adaptive_avg_pool2d(x, (3, 2)), F.adaptive_avg_pool2d(x, 1))),
        (noise(1, 4, 7, 5),),
    ),
    "pool": lambda: (
        Lambda(lambda x: (F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2, ceil_mode=True))),
        (noise(1, 2, 7, 7),),
    ),
    "unit_vectors": lambda: (
        Lambda(lambda x: (F.normalize(x), F.normalize(x, dim=-2, eps=2.0), F.normalize(1e-11 * x, dim=-1),
                          x / x.norm(dim=(2, 3), keepdim=True))),
        (noise(2, 6, 3, 4),),
    ),
    "group_norm": lambda: (nn.GroupNorm(2, 8), (noise(1, 8, 5, 5),)),
    "one_group_of_a_row": lambda: (nn.Sequential(nn.GroupNorm(1, 6), nn.PReLU()), (noise(2, 6, 11),)),
    "group_norm_of_volumes": lambda: (nn.GroupNorm(3, 6, affine=False), (noise(2, 6, 3, 4, 5),)),
    "instance_norm_of_rows": lambda: (nn.InstanceNorm1d(5), (noise(2, 5, 11) + 3,)),
    "instance_norm": lambda: (nn.InstanceNorm2d(8, affine=True), (noise(1, 8, 5, 5),)),
    "activations": lambda: (
        Lambda(lambda x: (F.silu(x), F.hardswish(x), F.mish(x), F.elu(x), F.leaky_relu(x), F.softplus(x))),
        (noise(4, 8),),
    ),
    "einsum": lambda: (Lambda(lambda a, b: torch.einsum("bij,bkj->bik", a, b)), (noise(2, 3, 4), noise(2, 5, 4))),
    "cat_split_chunk": lambda: (
        Lambda(lambda x: (torch.cat(x.chunk(3, 1)[::-1], 1), x.split([1, 5], 1)[1])),
        (noise(2, 6),),
    ),
    "view_permute": lambda: (
        Lambda(lambda x: x.view(2, 3, 4).permute(2, 0, 1).flatten(1)[:, 1:3].unsqueeze(-1)),
        (noise(2, 12),),
    ),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 3, (3, 2, 3), (1, 2, 1), 1, bias=False), nn.BatchNorm3d(3), nn.RReLU(),
                      nn.Conv3d(3, 4, 3, padding="same", bias=False)),
        (noise(1, 2, 4, 5, 5),),
    ),
    "squeeze": lambda: (
        Lambda(lambda x: (x.squeeze(0), x.squeeze((0, 1, -1)), x[:, 0].squeeze((0, 1)), x.squeeze(1), x.squeeze())),
        (noise(3, 1, 4, 1),),
    ),
    "mean_var": lambda: (Lambda(lambda x: (x.mean(1), x.var(1), x.amax(0), x.sum())), (noise(3, 6),)),
    "where_masked_fill": lambda: (
        Lambda(lambda x: (torch.where(x > 0, x, -x * 2), x.masked_fill(x < 0, -1.0))),
        (noise(3, 6),),
    ),
    "topk": lambda: (Lambda(lambda x: torch.topk(x, 3, 1)), (noise(3, 6),)),
    "cumsum": lambda: (Lambda(lambda x: torch.cumsum(x, 1)), (noise(3, 6),)),
    "integers": lambda: (Lambda(lambda i: (i // 2, i % 3, i.float() / 2, i > 2)), (torch.arange(-3, 6),)),
}


class BiasedAttention(nn.Module):
    """Attention of vision transformers with a trained bias for every pair of places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(24, 72), nn.Parameter(noise(2, 5, 5))

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).reshape(1, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.unsqueeze(0))
        return y.transpose(1, 2).reshape(1, 5, 24)


MODULES["biased_attention"] = lambda: (BiasedAttention(), (noise(1, 5, 24),))


def close(got: Any, want: Any) -> None:
    """Equal shapes and dtypes; floats within TOLERANCE of the range of `want`, the rest equal."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
    elif want.size:
        scale = max(float(want.max() - want.min()), float(np.abs(want).max()), 1e-3)
        assert float(np.abs(got.astype(np.float64) - want).max()) <= TOLERANCE * scale


def eager(module: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    with torch.no_grad():
        return [v.numpy() for v in torch.utils._pytree.tree_leaves(module(*inputs))]


@pytest.mark.parametrize("name", MODULES)
def test_compiled_module_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = MODULES[name]()
    module.eval()
    compiled = skive.compile(module, example_inputs=inputs)
    got = compiled(*inputs)
    want = eager(module, inputs)
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(want) and all(isinstance(g, torch.Tensor) for g in got)
    for g, w in zip(got, want, strict=True):
        close(g, w)


BENCH = Path(__file__).resolve().parents[2].parent / "shared" / "bench"
ZOO = ("espcn", "tiny_resnet8", "tiny_kws", "tiny_ad", "tcn")  # the small ones; all of them: benchmarks/


@pytest.mark.parametrize("name", ZOO)
def test_zoo_module_imports_to_the_same_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (BENCH / "models.py").exists():
        pytest.skip("../shared/bench is not there")
    monkeypatch.syspath_prepend(str(BENCH))
    import models  # type: ignore[import-not-found]

    module, x = models.build(name), models.sample(name)
    source = open_model(module, example_inputs=(x,))
    (got,) = evaluate_graph(source.graph(), [x.numpy()])
    close(got, eager(module, (x,))[0])


def test_names_come_from_forward_and_its_result() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def forward(self, image: Any, bias: Any) -> Any:
            y = self.stem(image)
            return {"mask": y + bias, "parts": [y * 2, (image, None)]}

    inputs = (noise(1, 3, 6, 6), noise(1, 4, 4, 4))
    graph = open_model(Named().eval(), example_inputs=inputs).graph()
    assert [i.name for i in graph.inputs] == ["image", "bias"]
    assert graph.output_names == ("mask", "parts.0", "parts.1.0")
    assert "stem.0/Conv" in {n.origin for n in graph.nodes}


def repaired(x: Any, i: Any, image: Any, bits: Any, mask: Any) -> dict[str, Any]:
    """What PyTorch's translation to ONNX computes otherwise, or does not know; some outputs have the names of values
    inside it."""
    index = i[:, :2] % 3
    return {
        "mul": x * 2 + x.sin(), "val_0": torch.trunc(x * 3) + 1,
        "softmax": i.softmax(-1, dtype=torch.float32), "log_softmax": i.log_softmax(0, dtype=torch.float32),
        "masks": mask + (x > 0), "bytes": (bits >> 2, bits << 1), "shift": (i - 4) >> 1,
        "mean": x.scatter_reduce(1, index, x + 1, "mean"),
        "own mean": x.scatter_reduce(1, index, x + 1, "mean", include_self=False),
        "largest": x.scatter_reduce(1, index, x + 1, "amax"), "sum": x.scatter_add(1, index, x + 1),
        "scatter": x.scatter(1, index[:, :1], x), "sort": torch.sort(i % 2, dim=1, descending=True, stable=True),
        "argsort": torch.argsort(i % 3, dim=1, stable=True),
        "pools": (F.adaptive_avg_pool2d(image, (3, 4)), F.adaptive_max_pool2d(image, (None, 2))),
        "pools1": (F.adaptive_avg_pool1d(image[0], 5), F.adaptive_max_pool1d(image[0], 4)),
        "nearest": (F.interpolate(image, scale_factor=(0.6, 1.7)), F.interpolate(image, scale_factor=(1 / 7, 1.05)),
                    F.interpolate(image, size=(3, 29))),
        "linear": [F.interpolate(image, scale_factor=s, mode="bilinear", align_corners=c)
                   for s in ((0.6, 1.7), 1.05) for c in (False, True)],
        "antialias": F.interpolate(image, size=(3, 5), mode="bilinear", antialias=True, align_corners=True),
        "divisor": [F.avg_pool2d(image, (3, 2), 2, 1, ceil_mode=c, divisor_override=5) for c in (False, True)],
        "blind": F.scaled_dot_product_attention(image, image, image, mask.all(1)[:, None] | (image[0] > 0)[:, :, :7]),
        "seeing": [F.scaled_dot_product_attention(image, image, image, m) for m in (None, image[0, :, :, :7])],
        "distances": (torch.cdist(x, x[:3] + 1), torch.cdist(image[0], image[0, :, :2], p=1.0)),
        "order": (torch.median(x, 1), torch.kthvalue(x, 2, 0, keepdim=True), torch.median(x[:, :1], 0),
                  torch.median(image), torch.aminmax(x), torch.aminmax(i, dim=1, keepdim=True)),
        "logarithms": (F.logsigmoid(90 * x), torch.logaddexp(90 * x, x), torch.logaddexp2(400 * x, x.abs().log()),
                       torch.logaddexp(x[0] / 0, x / 0) == torch.inf, torch.logcumsumexp(90 * x, 1),
                       *(F.binary_cross_entropy_with_logits(99 * x, x.sigmoid(), x[0].abs(), reduction=r, pos_weight=w)
                         for r in ("none", "mean", "sum") for w in (None, x[1].abs()))),
        "so far": [f(t, d) for f in (torch.cummax, torch.cummin, torch.cumprod)
                   for t, d in ((x.round(), 0), (i % 5, 1), (image, -2), (x[:1], 0), (image.mean(), 0))],
        "nans": (torch.cummax(torch.log(x), 1)[1], torch.cummin(torch.log(x), 0)[1]),
        "lengths": (torch.hypot(x, x[:1] * 1e25), torch.hypot(x * 0, x[:, :1] * 1e-30), F.pdist(x), F.pdist(x, 1.0)),
        "numbers": (torch.fmax(torch.log(x), x[:1]), torch.fmin(x, torch.log(x.sin())), torch.fmax(i, i.T[:1, :6])),
        "signs": (torch.copysign(x, x.round() * -1), torch.copysign(x, -0.0), torch.copysign(x, 2.0)),
        "put": (x.masked_scatter(mask, x.sin().T), image.masked_scatter(image[:, :1] > 0, image + 1)),
        "bounds": [torch.searchsorted(torch.sort(s, -1)[0], x, right=r, out_int32=r) for s in (x[0], x + 0.1)
                   for r in (False, True)],
        "phases": (torch.atan2(x.round() + 0.0, i.to(x.dtype) - 20), torch.atan2(x.abs() * 0, -x.abs()), x.angle(),
                   i.angle(), torch.stft(image[0, 0], 8, 4, window=image[0, 0, 0, :8].abs(), center=False,
                                         return_complex=True).angle()),
        "axes": [F.scaled_dot_product_attention(t, t, t, m, is_causal=c)
                 for t in (x, image[0], torch.stack([image, image + 1]))
                 for m, c in ((None, False), (None, True), (t[..., :1] > 0.5, False))],
    }


def test_what_the_translation_of_pytorch_gets_wrong() -> None:
    inputs = (noise(7, 6), torch.arange(42).reshape(7, 6), noise(1, 2, 7, 9),
              torch.arange(200, 206, dtype=torch.uint8), torch.arange(42).reshape(7, 6) % 11 > 4)
    inputs[2][0, 1, 2] = -1  # a query that may look nowhere

    class Repaired(nn.Module):
        def forward(self, val_2: Any, i: Any, image: Any, bits: Any, mask: Any) -> Any:
            return repaired(val_2, i, image, bits, mask)

    graph = open_model(Repaired().eval(), example_inputs=inputs).graph()
    want = pytree.tree_leaves(repaired(*inputs))
    assert [n.name for n in graph.inputs] == ["val_2", "i", "image", "bits", "mask"]
    assert graph.output_names[:3] == ("mul", "val_0", "softmax")
    for name, a, b in zip(graph.output_names, want, evaluate_graph(graph, [v.numpy() for v in inputs]), strict=True):
        try:
            close(b, a)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None


def test_small_constants_count() -> None:
    """What an optimiser of ONNX that compares roughly takes for `x` itself."""
    x = torch.tensor([[0.0, 3e-9, -2e-8, 1.0]])

    def near(x: Any) -> list[Any]:
        return [x + 1e-8, x - 5e-9, x / (x.abs() + 1e-12), x * torch.rsqrt(x.pow(2) + 1e-9), x * 0.999995]

    graph = open_model(Lambda(near).eval(), example_inputs=(x,)).graph()
    for got, want in zip(evaluate_graph(graph, [x.numpy()]), near(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-7)


def test_what_the_translation_of_pytorch_forgets_is_refused() -> None:
    """The scale of antialiased resizing, if it makes no whole length, the smoothing of labels, a projected state."""
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 4, proj_size=3)

        def forward(self, x: Any, t: Any) -> Any:
            return (F.interpolate(x, scale_factor=0.45, mode="bilinear", antialias=True),
                    F.cross_entropy(x[0, 0], t, label_smoothing=0.1), self.lstm(x[0]))

    with pytest.raises(UnsupportedOpError, match="3 places") as caught:
        open_model(Three().eval(), example_inputs=(noise(1, 1, 5, 5), torch.arange(5))).graph()
    for reason in ("ends within a pixel", "labels are smoothed", "projects its state"):
        assert reason in str(caught.value)


def test_inputs_by_name_and_plain_python_arguments() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Any, scale: float = 1.0, offset: Any = None) -> Any:
            return x * scale + offset

    example = {"offset": np.ones((1, 3), np.float32), "x": np.full((1, 3), 2, np.float32), "scale": 4.0}
    graph = open_model(Scaled().eval(), example_inputs=example).graph()
    assert [i.name for i in graph.inputs] == ["x", "offset"]
    (got,) = evaluate_graph(graph, {"x": example["x"], "offset": example["offset"]})
    np.testing.assert_array_equal(got, np.full((1, 3), 9, np.float32))


def test_batch_max_gives_one_sample_graphs() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    graph = open_model(module, example_inputs=(noise(1, 1, 4, 4),), batch_max=8).graph()
    assert graph.batch_max == 8
    assert graph.inputs[0].shape == (1, 1, 4, 4) and graph.outputs[0].shape == (1, 3)


def test_exported_program_and_its_file(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), noise(2, 3)
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "net.pt2")
    for model in (program, tmp_path / "net.pt2"):
        source = open_model(model)
        (got,) = evaluate_graph(source.graph(), [x.numpy()])
        close(got, eager(module, (x,))[0])
        outside = source.oracle([x.numpy()])
        assert outside is not None
        close(outside[0], eager(module, (x,))[0])


def test_symbolic_dimension_of_a_program_needs_a_value() -> None:
    program = torch.export.export(nn.Linear(3, 4).eval(), (noise(2, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(ShapeError, match="dimension 0"):
        open_model(program).graph()
    assert open_model(program, example_inputs=(noise(5, 3),)).graph().outputs[0].shape == (5, 4)


def test_hash_is_of_the_model_and_nothing_else() -> None:
    """Two processes with different hash seeds agree on three models, whose hashes differ."""
    script = """
import torch
from torch import nn
from skive.frontend import open_model

for seed, activation in ((0, nn.ReLU), (1, nn.ReLU), (0, nn.Tanh)):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), activation()).eval()
    print(open_model(module, example_inputs=(torch.zeros(1, 1, 4, 4),)).sha256)
"""

    def hashes(seed: str) -> list[str]:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.check_output([sys.executable, "-c", script], text=True, env=environment).split()

    first = hashes("0")
    assert len(set(first)) == 3 and all(len(h) == 64 for h in first)
    assert hashes("7") == first


class While(nn.Module):
    def __init__(self, bound: int | None):
        super().__init__()
        self.layer, self.bound = nn.Linear(8, 8), bound

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def condition(i: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            shrinks = h.abs().mean() > 0.25
            return shrinks if self.bound is None else (i < self.bound) & shrinks

        def body(i: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return i.clone() if self.bound is None else i + 1, torch.tanh(self.layer(h))

        i, h = while_loop(condition, body, (torch.tensor(0), x))
        return h, i


@pytest.mark.parametrize("bound", [5, 40])
def test_while_loop_of_torch(bound: int) -> None:
    torch.manual_seed(0)
    model, x = While(bound).eval(), torch.randn(2, 8)
    module = skive.compile(torch.export.export(model, (x,)), target="generic", name="loop")
    assert ("for (int trip" in (module.folder / "loop.cpp").read_text()) is (bound == 40)  # code that trips share
    counts = set()
    for scale in (0.01, 0.3, 0.6, 1, 2, 4, 8):
        want, trips = model(x * scale)
        got, n = module((x * scale).numpy())
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
        assert n == int(trips)
        counts.add(int(trips))
    assert 0 in counts and len(counts) > 2


def test_while_loop_without_a_counter_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="values alone end; count the iterations"):
        skive.compile(While(None).eval(), example_inputs=(torch.randn(2, 8),))


# ----------------------------------------------------------------------------------------- refusals


class Loops(nn.Module):
    def forward(self, x: Any) -> Any:
        while (x.abs() > 1).any():
            x = x / 2
        return x


def test_a_loop_without_a_bound_is_refused_with_its_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skive.frontend.control.statements.MAX_TURNS", 10)
    with pytest.raises(UnsupportedOpError) as caught:
        open_model(Loops().eval(), example_inputs=(noise(1, 3),))
    ((where, reason, _),) = caught.value.problems
    assert "while (x.abs() > 1).any()" in where and where.startswith("test_torch.py:")
    assert "no end of this loop" in reason
    assert capfd.readouterr().out == ""


def test_state_written_by_forward_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Any) -> Any:
            self.seen[0:2] = self.seen[0:2] + x[0:2]
            return self.seen * 2

    with pytest.raises(UnsupportedOpError, match="seen: forward writes"):
        open_model(Counter().eval(), example_inputs=(noise(3),)).graph()


def test_every_untranslatable_operator_is_named() -> None:
    @torch.library.custom_op("skivetest::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @torch.library.custom_op("skivetest::thrice", mutates_args=())
    def thrice(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    for op in (twice, thrice):
        op.register_fake(torch.empty_like)
    module = Lambda(lambda x: twice(x.float()) + thrice(x)).eval()  # float() asserts a type
    with pytest.raises(UnsupportedOpError) as caught:
        open_model(module, example_inputs=(noise(3),)).graph()
    assert len(caught.value.problems) == 2
    assert "skivetest.twice" in str(caught.value) and "skivetest.thrice" in str(caught.value)


def scripted() -> Any:
    return torch.jit.script(nn.Linear(3, 3).eval())


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: nn.Linear(3, 3), (noise(1, 3),), r"call \.eval\(\)"),
        (lambda: nn.Linear(3, 3).eval().half(), (noise(1, 3),), r"weight is float16.*\.float\(\)"),
        (lambda: nn.Linear(3, 3).eval().double(), (noise(1, 3),), r"weight is float64"),
        (lambda: nn.Linear(3, 3).eval(), (noise(1, 3).double(),), r"input 0 is float64"),
        (lambda: nn.Linear(3, 3).eval(), None, r"example_inputs is missing"),
        (lambda: nn.Linear(3, 3).eval(), noise(1, 3), r"give a tuple"),
        (lambda: nn.Linear(3, 3).eval(), {"image": noise(1, 3)}, r"missing a required argument: 'input'"),
        (lambda: nn.Linear(3, 3).eval(), (noise(1, 4),), r"Linear"),
        (scripted, (noise(1, 3),), r"TorchScript"),
    ],
    ids=[
        "training",
        "half",
        "double",
        "double-input",
        "no-inputs",
        "bare-tensor",
        "wrong-name",
        "wrong-shape",
        "torchscript",
    ],
)
def test_unusable_modules_are_refused(make: Callable[[], Any], inputs: Any, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        open_model(make(), example_inputs=inputs)


def test_one_part_in_training_mode_is_enough() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    module[1].train()
    with pytest.raises(InvalidModelError, match="^1 is in training mode"):
        open_model(module, example_inputs=(noise(1, 3),))


# --------------------------------------------------------------------------------- hostile .pt2 files


class Exploit:
    """Its unpickling creates the file `path`."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def rewritten(
    source: Path, target: Path, edit: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None
) -> Path:
    """`source` with each member passed through `edit` (None removes it) and `extra` members added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = edit(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name, data in (extra or {}).items():
            new.writestr(f"{source.stem}/{name}", data)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    program = torch.export.export(nn.Linear(3, 4).eval(), (noise(2, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Exploit(path),), buffer)
    return buffer.getvalue()


def with_config(data: bytes, **fields: Any) -> bytes:
    document = json.loads(data)
    next(iter(document["config"].values())).update(fields)
    return json.dumps(document).encode()


HOSTILE: dict[str, Callable[[str, bytes, Path], bytes | None]] = {
    "pickled weights": lambda n, d, mark: (
        with_config(d, use_pickle=True)
        if n == "data/weights/model_weights_config.json"
        else pickled(mark)
        if n == "data/weights/weight_0"
        else d
    ),
    "pickled sample inputs": lambda n, d, mark: pickled(mark) if n == "data/sample_inputs/model.pt" else d,
    "pickled object": lambda n, d, mark: (
        json.dumps(
            {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
        ).encode()
        if n == "data/constants/model_constants_config.json"
        else d
    ),
    "function of a module": lambda n, d, mark: (
        d.replace(b"torch.ops.aten.linear.default", b"torch.serialization.os.system") if n == "models/model.json" else d
    ),
    "loader of libraries": lambda n, d, mark: (
        d.replace(b"torch.ops.aten.linear.default", b"torch.ops.load_library.__call__")
        if n == "models/model.json"
        else d
    ),
    "code as an expression": lambda n, d, mark: (
        d.replace(b"Symbol('s", f"__import__('os').mknod('{mark}') or Symbol('s".encode())
        if n == "models/model.json"
        else d
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused_unread(name: str, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bad = rewritten(
        saved,
        tmp_path / "bad.pt2",
        lambda n, d: HOSTILE[name](n, d, mark),
        {"data/constants/opaque_obj_0": pickle.dumps(Exploit(mark))},
    )
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(bad) as new:  # the edit did happen
        assert any(new.read(m) != old.read(m) for m in old.namelist())
    with pytest.raises(InvalidModelError, match=r"bad\.pt2: .*export the model again"):
        open_model(bad)
    assert not mark.exists()


def test_untouched_archive_with_symbols_is_read(saved: Path) -> None:
    assert open_model(saved, batch_max=4).graph().outputs[0].shape == (1, 4)


@pytest.mark.parametrize("cut", [0, 3, 100, 2000])
def test_truncated_archive_is_refused(saved: Path, cut: int) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(InvalidModelError, match="not a .pt2 archive"):
        open_model(saved)


def test_plain_pickles_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for name, data in {"a.pt2": pickle.dumps(Exploit(mark)), "b.pt2": pickled(mark)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidModelError):
            open_model(tmp_path / name)
    assert not mark.exists()
