"""What several test folders share: a cache of their own, random graphs."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable

import numpy as np
import pytest

from skive import ops
from skive.errors import ShapeError
from skive.ir import Graph, Node, constant
from skive.lower import sparse as lower_sparse
from skive.types import DType


def pytest_configure(config: pytest.Config) -> None:
    """What earlier runs compiled and measured would hide what a test is about: a compile from the cache says less."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["SKIVE_CACHE"] = tempfile.mkdtemp(prefix="skive-tests-")  # the workers inherit it


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["SKIVE_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _one_multiplier_of_512_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which zeros pay is decided alike on every machine."""
    monkeypatch.setattr(lower_sparse, "_wide", lambda: False)


# Continuous and of slow growth: a rounding difference stays a small difference.
UNARY = ("relu", "tanh", "sigmoid", "neg", "abs", "silu", "gelu", "hard_swish", "softplus", "leaky_relu", "sin")
BINARY = ("add", "sub", "mul", "max", "min", "add", "mul")
LARGEST = 4096  # elements of one value


class _Maker:
    """Grows one graph from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.values: list[Node] = []

    def pick(self, *options: object) -> object:
        return options[int(self.rng.integers(len(options)))]

    def constant(self, *shape: int) -> Node:
        if self.rng.random() < 0.2:
            return constant(np.full(shape, self.pick(0.0, 1.0, 2.0, -0.5), np.float32))
        return constant(self.rng.standard_normal(shape).astype(np.float32))

    def operand(self) -> Node:
        recent = self.values[-4:]
        return recent[int(self.rng.integers(len(recent)))] if self.rng.random() < 0.7 else self.values[
            int(self.rng.integers(len(self.values)))]

    def permuted(self, x: Node) -> Node:
        common = {4: [(0, 2, 3, 1), (0, 3, 1, 2)], 3: [(0, 2, 1)]}.get(x.type.rank, [])
        perm = tuple(map(int, self.rng.permutation(x.type.rank)))
        return ops.make("transpose", x, perm=self.pick(perm, *common, *common, *common))

    def reshaped(self, x: Node) -> Node:
        shape = list(x.shape)
        if len(shape) > 1 and self.rng.random() < 0.5:  # merge two neighbours
            i = int(self.rng.integers(len(shape) - 1))
            shape[i:i + 2] = [shape[i] * shape[i + 1]]
        else:  # split an axis, or add one of length 1
            i = int(self.rng.integers(len(shape) + 1))
            if i < len(shape):
                d = int(self.pick(*[k for k in (1, 2, 3) if shape[i] % k == 0]))  # type: ignore[call-overload]
                shape[i:i + 1] = [shape[i] // d, d]
            else:
                shape.append(1)
        return ops.make("reshape", x, shape=tuple(shape))

    def convolved(self, x: Node) -> Node:
        """A convolution in channels-first order, as an importer writes it."""
        name = str(self.pick("conv2d", "conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d"))
        t = ops.make("transpose", x, perm=(0, 2, 3, 1))
        k, c = int(self.pick(1, 1, 2, 3)), t.shape[3]  # type: ignore[call-overload]
        pad = (int(self.rng.integers(k)),) * 4
        window = {"stride": self.pick((1, 1), (1, 1), (2, 1)), "pad": pad}
        if name.endswith("pool2d"):
            y = ops.make(name, t, kernel=(k, k), **window)
        else:
            groups = c if self.rng.random() < 0.3 else 1
            oc = groups * int(self.rng.integers(1, 4))
            bias = [self.constant(oc)] if self.rng.random() < 0.5 else []
            y = ops.make(name, t, self.constant(oc, k, k, c // groups), *bias, groups=groups, **window)
        return ops.make("transpose", y, perm=(0, 3, 1, 2))

    def step(self) -> Node:
        x = self.operand()
        rank = x.type.rank
        axis = int(self.rng.integers(max(rank, 1)))
        kind = self.pick("unary", "unary", "binary", "binary", "constant", "constant", "transpose", "transpose",
                         "reshape", "slice", "concat", "pad", "expand", "reduce", "softmax", "linear", "matmul",
                         "gather", "window", "window", "window", "clip")
        if kind == "unary":
            return ops.make(str(self.pick(*UNARY)), x)
        if kind == "binary":
            return ops.make(str(self.pick(*BINARY)), x, self.operand())
        if kind == "constant":
            shape = [d if self.rng.random() < 0.4 else 1 for d in x.shape][int(self.rng.integers(rank + 1)):]
            pair = [x, self.constant(*shape)]
            return ops.make(str(self.pick(*BINARY)), *(pair if self.rng.random() < 0.5 else pair[::-1]))
        if kind == "clip":
            return ops.make("clip", x, lo=float(self.pick(-1, 0)), hi=float(self.pick(1, 6, math.inf)))  # type: ignore
        if kind == "transpose":
            return self.permuted(x)
        if kind == "reshape":
            return self.reshaped(x)
        if kind == "slice":
            start = [int(self.rng.integers(max(d, 1))) for d in x.shape]
            step = [int(self.pick(1, 1, 2, -1)) for _ in x.shape]  # type: ignore[call-overload]
            size = [len(range(a, d if s > 0 else -1, s)) for a, d, s in zip(start, x.shape, step, strict=True)]
            return ops.make("slice", x, start=tuple(start), size=tuple(size), step=tuple(step))
        if kind == "concat":
            return ops.make("concat", x, self.operand(), axis=axis)
        if kind == "pad":
            before, after = (tuple(map(int, self.rng.integers(0, 2, rank))) for _ in range(2))
            return ops.make("pad", x, before=before, after=after, value=float(self.pick(0, 0, 1)))  # type: ignore
        if kind == "expand":
            return ops.make("expand", x, shape=tuple(2 if d == 1 else d for d in x.shape))
        if kind == "reduce":
            axes = tuple(sorted({axis, int(self.rng.integers(rank))})) if rank else ()
            name, keep = str(self.pick("reduce_mean", "reduce_max")), bool(self.pick(True, False))
            return ops.make(name, x, axes=axes, keep=keep)
        if kind == "softmax":
            return ops.make("softmax", x, axis=axis)
        if kind == "linear":
            return ops.make("linear", x, self.constant(int(self.rng.integers(1, 4)), x.shape[-1]))
        if kind == "matmul":
            return ops.make("matmul", x, self.constant(x.shape[-1], 3) if self.rng.random() < 0.5 else self.operand())
        if kind == "gather":
            index = self.rng.integers(0, x.shape[axis], 3)
            return ops.make("gather", x, constant(index.astype(np.int64)), axis=axis)
        return self.convolved(x)

    def graph(self, nodes: int) -> Graph:
        inputs = tuple(ops.make("input", shape=s, dtype=DType.f32, label=f"x{i}")
                       for i, s in enumerate([(1, 2, 4, 6), (2, 3, 4)][:int(self.rng.integers(1, 3))]))
        self.values += inputs
        for _ in range(200):
            if len(self.values) >= nodes:
                break
            try:
                node = self.step()
            except (ShapeError, IndexError, TypeError):
                continue  # this operation does not fit that operand
            if 0 < node.type.size <= LARGEST and node.type.rank <= 6:
                self.values.append(node)
        used = {i for n in self.values for i in n.inputs}
        ends = [n for n in self.values if n not in used][-3:]
        return Graph("random", inputs, tuple(ends), tuple(f"y{i}" for i in range(len(ends))))


@pytest.fixture(scope="session")
def random_graph() -> Callable[..., Graph]:
    """seed, nodes -> a valid graph over float32, the same for the same arguments."""
    return lambda seed, nodes=16: _Maker(seed).graph(nodes)
